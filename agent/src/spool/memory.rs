//! A spool in memory, bounded in bytes; the oldest records give way.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use tokio::sync::Notify;

use super::{Appended, RECORD_BYTES_MAX, Record, Spool, Stats};

/// Records in memory.
pub struct MemorySpool {
    bytes_max: u64,
    held: Mutex<Held>,
    appended: Notify,
}

#[derive(Default)]
struct Held {
    records: BTreeMap<u64, (Record, SystemTime)>,
    bytes: u64,
    last_seq: u64,
}

impl Held {
    fn remove(&mut self, seq: u64) -> bool {
        match self.records.remove(&seq) {
            Some((record, _)) => {
                self.bytes -= size(&record);
                true
            }
            None => false,
        }
    }
}

fn size(record: &Record) -> u64 {
    (record.topic.len() + record.payload.len()) as u64
}

impl MemorySpool {
    /// An empty spool for at most `bytes_max` bytes of topics and payloads.
    pub fn new(bytes_max: u64) -> Self {
        Self { bytes_max, held: Mutex::default(), appended: Notify::new() }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // Nothing in here panics while it holds the lock, so a poisoned one is as good as any.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Spool for MemorySpool {
    fn append(&self, topic: String, make: &mut dyn FnMut(u64) -> Vec<u8>) -> Appended {
        let mut held = self.held();
        let seq = held.last_seq + 1;
        let record = Record { seq, topic, payload: Bytes::from(make(seq)) };
        if size(&record) > self.bytes_max.min(RECORD_BYTES_MAX) {
            return Appended::TooLarge;
        }
        held.last_seq = seq;
        held.bytes += size(&record);
        held.records.insert(seq, (record, SystemTime::now()));
        let mut dropped = 0;
        while held.bytes > self.bytes_max {
            let Some(oldest) = held.records.keys().next().copied() else { break };
            held.remove(oldest);
            dropped += 1;
        }
        drop(held);
        self.appended.notify_one();
        Appended::Kept { dropped }
    }

    fn next(&self, after: Option<u64>) -> Option<Record> {
        let from = after.map_or(0, |seq| seq.saturating_add(1));
        self.held().records.range(from..).next().map(|(_, (record, _))| record.clone())
    }

    fn acknowledge(&self, seq: u64) {
        self.held().remove(seq);
    }

    fn stats(&self) -> Stats {
        let held = self.held();
        let oldest = held.records.values().next().map(|(_, appended)| *appended);
        Stats { records: held.records.len(), bytes: held.bytes, oldest }
    }

    fn appended(&self) -> &Notify {
        &self.appended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_spool_keeps_the_contract() {
        super::super::contract::suite(|bytes_max| Box::new(MemorySpool::new(bytes_max)));
    }
}
