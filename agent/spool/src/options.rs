//! What a spool is opened with.

use std::time::Duration;

use lineside_common::supervisor::FailureReporter;

use crate::config::SpoolConfig;
use crate::metrics::SpoolMetrics;

/// Default bound on the bytes of records that only memory holds, while the disk refuses writes.
pub const MEMORY_BYTES_MAX: u64 = 8 << 20;
/// Target size of a segment. A small spool uses smaller segments.
const SEGMENT_BYTES: u64 = 1 << 20;

/// Bounds, intervals and metrics of a spool.
pub struct Options {
    /// Bound on the bytes on disk. The spool may exceed it by one segment for a short time.
    pub bytes_max: u64,
    /// Maximum age of a record, in seconds during which the agent runs; 0: no limit.
    pub age_max_seconds: u32,
    /// Longest time that a pending record stays unsynced.
    pub sync_interval: Duration,
    /// Size at which a segment is closed. Default: 1 MiB, and at most an eighth of `bytes_max`.
    pub segment_bytes: u64,
    /// Bound on the bytes that only memory holds. Default: [`MEMORY_BYTES_MAX`].
    pub memory_bytes_max: u64,
    /// What the spool counts.
    pub metrics: SpoolMetrics,
    /// Reports a panic of the writer thread to the supervisor. Default: none.
    pub failure_reporter: Option<FailureReporter>,
}

impl Options {
    /// Options from the configuration, with the default segment size and memory bound.
    pub fn new(config: &SpoolConfig, metrics: SpoolMetrics) -> Self {
        Self {
            bytes_max: config.bytes_max,
            age_max_seconds: config.age_max_seconds,
            sync_interval: config.sync_interval,
            // A small spool has small segments, so that dropping one segment does not empty the spool.
            segment_bytes: SEGMENT_BYTES.min(config.bytes_max / 8),
            memory_bytes_max: MEMORY_BYTES_MAX,
            metrics,
            failure_reporter: None,
        }
    }
}
