//! The configuration of the spool, as the agent's settings define it.

use std::time::Duration;

use crate::record::WhenFull;

/// Default bound on the spool's bytes on disk, in MiB.
pub const SPOOL_MIB_DEFAULT: u64 = 512;

/// The settings of the spool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpoolConfig {
    /// Bound on the bytes on disk. Default: 512 MiB.
    pub bytes_max: u64,
    /// Maximum age of a record, in seconds during which the agent runs. Default: 0, no limit.
    pub age_max_seconds: u32,
    /// Longest time that a pending record stays unsynced. Default: 200 ms.
    pub sync_interval: Duration,
    /// What happens to a new record when the spool is full. Default: the oldest segment is dropped.
    pub when_full: WhenFull,
}

impl Default for SpoolConfig {
    fn default() -> Self {
        Self {
            bytes_max: SPOOL_MIB_DEFAULT << 20,
            age_max_seconds: 0,
            sync_interval: Duration::from_millis(200),
            when_full: WhenFull::DropOldest,
        }
    }
}
