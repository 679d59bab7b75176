//! The records of the spool, and how they are appended and taken.

use std::sync::Arc;

use bytes::Bytes;

/// Maximum size of a record in bytes. A broker would refuse a larger message on every attempt, and it would block all
/// records behind it.
pub const RECORD_BYTES_MAX: u64 = 4 << 20;
/// Maximum length of a topic in bytes, as defined by MQTT.
pub const TOPIC_BYTES_MAX: usize = 65_535;

/// Highest position of a record, and latest time in milliseconds during which the agent ran: about 280,000 years. Files that
/// contain more are damaged. The bound keeps sums of positions and times free of overflow.
pub(crate) const POSITION_MAX: u64 = 1 << 53;
/// See [`POSITION_MAX`].
pub(crate) const TIME_MS_MAX: u64 = 1 << 53;

/// The kind of a record. Each kind has a partition of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RecordKind {
    /// The result of an inspection.
    Result,
    /// An event of a stream, a model or the agent.
    Event,
    /// Metrics of a reporting period.
    Metrics,
}

impl RecordKind {
    /// All kinds in the order they are delivered.
    pub const ALL: [Self; 3] = [Self::Result, Self::Event, Self::Metrics];
    /// All kinds in the order they are dropped when the spool is full.
    pub(crate) const DROP_ORDER: [Self; 3] = [Self::Metrics, Self::Result, Self::Event];

    /// The name, which is also the name of the partition's folder.
    pub fn name(self) -> &'static str {
        match self {
            Self::Result => "result",
            Self::Event => "event",
            Self::Metrics => "metrics",
        }
    }
}

/// Identifies a record for as long as the data folder exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordId {
    /// The partition.
    pub kind: RecordKind,
    /// The position in the partition, from 1. A position is never reused.
    pub position: u64,
}

/// A message that waits for the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Partition and position.
    pub id: RecordId,
    /// The MQTT topic.
    pub topic: Arc<str>,
    /// The MQTT payload.
    pub payload: Bytes,
    /// When the record was appended, in milliseconds during which the agent has run.
    pub created_ms: u64,
    /// Time to live from `created_ms`, in seconds; 0: no limit.
    pub ttl_seconds: u32,
}

impl Record {
    /// The last moment of the record's time to live, in milliseconds; `u64::MAX` for a record without a limit.
    pub(crate) fn expires_ms(&self) -> u64 {
        match self.ttl_seconds {
            0 => u64::MAX,
            seconds => self.created_ms.saturating_add(u64::from(seconds) * 1000),
        }
    }
}

/// A record to append.
pub struct NewRecord<F> {
    /// The partition.
    pub kind: RecordKind,
    /// The MQTT topic; at most [`TOPIC_BYTES_MAX`] bytes.
    pub topic: Arc<str>,
    /// Time to live in seconds; 0: no limit. The maximum age of the spool applies as well.
    pub ttl_seconds: u32,
    /// What happens when the spool is full.
    pub when_full: WhenFull,
    /// Builds the payload from the sequence number of the record, which starts at 1 in each partition when the spool is
    /// opened. It is called again, possibly with another number, after the caller was blocked by a full spool.
    pub build_payload: F,
}

/// What happens to a new record when the spool is full.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// The oldest segment is dropped.
    #[default]
    DropOldest,
    /// The new record is dropped.
    DropNewest,
    /// The caller is blocked until there is room. For batch work, never for a live stream.
    Block,
}

/// The outcome of appending a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AppendOutcome {
    /// The record was appended with this sequence number.
    Appended(u64),
    /// The spool is full. The record was counted as dropped and used no sequence number.
    Full,
    /// The record is larger than [`RECORD_BYTES_MAX`] or the whole spool, or its topic is longer than [`TOPIC_BYTES_MAX`].
    /// It was counted as dropped and used no sequence number.
    TooLarge,
}

/// Why a record is delivered now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordOrigin {
    /// The record was in flight when the last connection ended, or was requeued.
    Resend,
    /// The record was appended after the connection was established.
    Live,
}
