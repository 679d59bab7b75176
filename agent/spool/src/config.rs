//! The settings of the spool.

use std::time::Duration;

/// Mebibytes that records may take where the configuration does not say.
pub const SPOOL_MIB_DEFAULT: u64 = 512;

/// How results wait for a broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpoolConfig {
    /// Bytes on the disk.
    pub bytes_max: u64,
    /// The longest a record may wait, in seconds of the time the agent runs; 0 is for ever.
    pub age_max_seconds: u32,
    /// A record that waits is synced within this.
    pub sync_interval: Duration,
    /// Whether new records are refused when there is no room, instead of the oldest giving way.
    pub drops_newest: bool,
}

impl Default for SpoolConfig {
    fn default() -> Self {
        Self {
            bytes_max: SPOOL_MIB_DEFAULT << 20,
            age_max_seconds: 0,
            sync_interval: Duration::from_millis(200),
            drops_newest: false,
        }
    }
}
