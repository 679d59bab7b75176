//! The spool: a durable queue on disk between the producers of messages and the MQTT publisher.
//!
//! A producer appends records and never waits for the network or for the disk. The publisher takes records and acknowledges
//! them. A record is deleted only when the broker has acknowledged it, when its time to live has expired, or when a bound is
//! exceeded, which is counted by reason. A record that the broker does not take is **set aside**: it is moved to the bounded folder
//! `set-aside`, where operators can export, retry or drop it.
//!
//! # Terms
//! - **Record**: one message with its topic and payload.
//! - **Partition**: the log of all records of one [`RecordKind`]; a folder below `spool`: `result`, `event`, `metrics`.
//! - **Position**: the number of a record in its partition. It is never reused.
//! - **Segment**: a file of consecutive records of about 1 MiB. `record_format` describes its bytes.
//! - **Cursor**: the file that stores which positions of a partition are completed. `cursor` describes its bytes.
//! - **Completed**: acknowledged by the broker, set aside, or dropped and counted. A record that is not completed is **pending**.
//! - **In flight**: taken by the publisher and not acknowledged yet.
//!
//! # Files
//! The segment that is appended to is named `{first}.open`. A closed segment is named
//! `{first}-{last}-{created}-{expires}.seg`, so that a spool of a million records opens by reading file names only. `cursor`
//! stores what is completed. The caller holds the lock of the data folder ([`FolderLock`](lineside_common::folder_lock)) while the
//! spool is open or purged.
//!
//! # Invariants
//! - A record that is appended and written survives the end of the process; a record that is synced survives a power cut. A
//!   record is written at once, and synced within `sync_interval` unless it is acknowledged earlier.
//! - Each appended record is acknowledged, or set aside, or dropped and counted by [`DropReason`]. A record is completed in its
//!   partition only when its copy in `set-aside` is synced, so a crash leaves it in one of the two, or in both with one id.
//! - A position is assigned once. Recovery after a crash returns a record exactly as it was appended, or does not return it.
//! - The records of a partition are delivered in the order they were appended: first those that were in flight when the last
//!   connection ended, then live records, then the backlog.
//! - When the bound on bytes is exceeded, the oldest segment is dropped: of metrics first, then of results, then of events.
//!   [`WhenFull`] lists the alternatives. The spool exceeds its bound on disk by at most one segment.
//! - A disk that refuses writes does not stop the agent: records wait in memory, up to [`MEMORY_BYTES_MAX`], and are
//!   delivered from there.
//! - Age is measured in time during which the agent runs, not by the wall clock, so a clock that jumps expires nothing.
//!
//! One thread, the writer, performs all I/O. All other callers change the state in memory under a lock and wake the writer.

mod config;
mod cursor;
mod disk;
mod error;
#[cfg(any(test, feature = "simulation"))]
mod fake_disk;
mod layout;
mod metrics;
mod options;
mod partition;
mod position_set;
mod record;
mod record_format;
mod recovery;
mod segment;
mod set_aside;
mod shared;
#[cfg(any(test, feature = "simulation"))]
pub mod simulation;
mod spool;
mod stats;
mod view;
mod writer;

pub use config::{SPOOL_MIB_DEFAULT, SpoolConfig};
pub use error::{SpoolError, SpoolErrorKind};
pub use layout::folder;
pub use metrics::{DropCounters, DropReason, SpoolMetrics};
pub use options::{MEMORY_BYTES_MAX, Options};
pub use record::{
    AppendOutcome, NewRecord, RECORD_BYTES_MAX, Record, RecordId, RecordKind, RecordOrigin, TOPIC_BYTES_MAX, WhenFull,
};
pub use set_aside::{
    SET_ASIDE_BYTES_MAX, SET_ASIDE_RECORDS_MAX, SetAsideReason, SetAsideRecord, SetAsideStats, drop_set_aside,
    set_aside_records,
};
pub use spool::Spool;
pub use stats::{DiskFailure, Stats};
pub use view::{PartitionStats, SpoolView, purge};

#[cfg(test)]
mod model_test;
#[cfg(test)]
mod tests;
