//! The queue between the line and the broker. Nothing that makes results ever waits for the network: it appends here and
//! goes on. The publisher takes records out, and a record leaves the spool only when the broker has acknowledged it, or
//! when a cap is exceeded, which is counted.
//!
//! This version holds the records in memory; a restart loses what was not acknowledged. The trait is what the durable
//! spool will keep.

mod memory;

use std::time::SystemTime;

use bytes::Bytes;

pub use memory::MemorySpool;

/// Bytes of one record at most. What is larger would be refused on the wire, again and again, and hold up all others.
pub const RECORD_BYTES_MAX: u64 = 4 << 20;

/// What came of an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Appended {
    /// The record is in; this many older ones had to give way.
    Kept {
        /// Records dropped because the spool was full.
        dropped: usize,
    },
    /// The record is larger than [`RECORD_BYTES_MAX`], or than the whole spool. Nothing has changed, and no number was used.
    TooLarge,
}

/// One message that waits for the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its place in the order, which is also the `seq` of a result.
    pub seq: u64,
    /// Where it goes.
    pub topic: String,
    /// What it says.
    pub payload: Bytes,
}

/// What a spool holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Records.
    pub records: usize,
    /// Bytes of topics and payloads.
    pub bytes: u64,
    /// When the oldest record was appended.
    pub oldest: Option<SystemTime>,
}

/// A queue that forgets a record only when told to, or when it is full.
pub trait Spool: Send + Sync {
    /// Appends a record made for the next sequence number. It never waits.
    fn append(&self, topic: String, make: &mut dyn FnMut(u64) -> Vec<u8>) -> Appended;

    /// The oldest record behind `seq`, or the oldest of all.
    fn next(&self, after: Option<u64>) -> Option<Record>;

    /// The broker has this record: it may be forgotten. Unknown numbers are passed over.
    fn acknowledge(&self, seq: u64);

    /// What it holds now.
    fn stats(&self) -> Stats;

    /// Told once after every append.
    fn appended(&self) -> &tokio::sync::Notify;
}

/// What every spool has to do, whichever it is.
#[cfg(test)]
mod contract {
    use super::*;

    fn fill(spool: &dyn Spool, count: usize) -> usize {
        let append = || spool.append("t".to_owned(), &mut |seq| format!("{seq:04}").into_bytes());
        (0..count)
            .map(|_| match append() {
                Appended::Kept { dropped } => dropped,
                Appended::TooLarge => panic!("four bytes are not too large"),
            })
            .sum()
    }

    fn drain(spool: &dyn Spool) -> Vec<u64> {
        let mut seen = Vec::new();
        let mut at = None;
        while let Some(record) = spool.next(at) {
            assert_eq!(record.payload, format!("{:04}", record.seq));
            seen.push(record.seq);
            at = Some(record.seq);
        }
        seen
    }

    /// `new` makes an empty spool that holds this many bytes; each record here takes five.
    pub(super) fn suite(new: impl Fn(u64) -> Box<dyn Spool>) {
        let spool = new(1000);
        assert_eq!(spool.next(None), None);
        assert_eq!(fill(&*spool, 4), 0);
        assert_eq!(drain(&*spool), [1, 2, 3, 4], "reading forgets nothing");
        assert_eq!(drain(&*spool), [1, 2, 3, 4]);
        spool.acknowledge(2);
        spool.acknowledge(2);
        spool.acknowledge(99);
        assert_eq!(drain(&*spool), [1, 3, 4], "acknowledged in any order, twice, or unknown");
        assert_eq!((spool.stats().records, spool.stats().bytes), (3, 15));
        assert!(spool.stats().oldest.is_some());
        [1, 3, 4].into_iter().for_each(|seq| spool.acknowledge(seq));
        assert_eq!(spool.stats(), Stats::default());
        fill(&*spool, 1);
        assert_eq!(drain(&*spool), [5], "a number is never given twice");

        let full = new(25);
        assert_eq!(fill(&*full, 7), 2, "the oldest give way and are counted");
        assert_eq!(drain(&*full), [3, 4, 5, 6, 7]);
        assert_eq!(full.append("t".to_owned(), &mut |_| vec![0; 100]), Appended::TooLarge);
        assert_eq!(drain(&*full), [3, 4, 5, 6, 7], "what can never fit costs nobody else");
        fill(&*full, 1);
        assert_eq!(drain(&*full), [4, 5, 6, 7, 8], "and leaves no gap");
        let large = new(u64::MAX);
        let too_much = RECORD_BYTES_MAX as usize;
        assert_eq!(large.append("t".to_owned(), &mut |_| vec![0; too_much]), Appended::TooLarge);
    }
}
