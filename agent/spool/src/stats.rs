//! The state of a spool, for status and metrics.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::set_aside::SetAsideStats;

/// The contents and the state of a spool at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Pending records: neither acknowledged nor dropped.
    pub records: u64,
    /// Bytes on disk, and in memory before they are written.
    pub bytes: u64,
    /// Bound on `bytes`.
    pub bytes_max: u64,
    /// Age of the oldest pending record in time during which the agent runs, accurate to one segment. `None` when no record
    /// is pending.
    pub oldest: Option<Duration>,
    /// The last failure of the disk, while the disk refuses writes. `None` while the disk accepts writes.
    pub degraded: Option<DiskFailure>,
    /// The records that are set aside because the broker does not take them.
    pub set_aside: SetAsideStats,
    /// Whether records were dropped for lack of room within the last minute.
    pub is_overflowing: bool,
}

/// Why the disk refused the last write, sync, rename or removal of the spool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFailure {
    /// The kind of the error, to branch on.
    pub kind: io::ErrorKind,
    /// The error, for people.
    pub message: String,
}

impl fmt::Display for DiskFailure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl From<&io::Error> for DiskFailure {
    fn from(error: &io::Error) -> Self {
        Self { kind: error.kind(), message: error.to_string() }
    }
}
