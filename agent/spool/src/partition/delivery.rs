//! Delivery of records to the publisher, and their acknowledgement.

use super::Partition;
use crate::metrics::{DropCounts, DropReason};
use crate::record::Record;
use crate::set_aside::SetAsideReason;

/// A record that was not delivered within this time becomes backlog, so that newer records are delivered first.
const LIVE_AGE_MAX_MS: u64 = 5000;

impl Partition {
    /// Starts a connection: records in flight are delivered again, and records appended from now on are live.
    pub(crate) fn connected(&mut self) {
        let is_delivered = |position: &u64| !self.setting_aside.contains_key(position);
        self.resend = self.in_flight.keys().copied().filter(is_delivered).collect();
        self.make_backlog();
    }

    /// Turns all records that were not delivered yet into backlog.
    fn make_backlog(&mut self) {
        (self.live_from, self.live_next) = (self.next, self.next);
    }

    /// Schedules a record in flight to be delivered again, before all others.
    pub(crate) fn requeue(&mut self, position: u64) {
        if self.in_flight.contains_key(&position) && !self.setting_aside.contains_key(&position) {
            self.resend.insert(position);
        }
    }

    /// Takes the next record to deliver again.
    pub(crate) fn take_resend(&mut self) -> Option<Record> {
        let position = self.resend.pop_first()?;
        self.in_flight.get(&position).cloned()
    }

    /// Takes the next live record.
    pub(crate) fn take_live(&mut self, now_ms: u64, dropped: &mut DropCounts) -> Option<Record> {
        if self.live_next < self.memory_first() {
            // Records that left memory before they were delivered are backlog.
            (self.live_from, self.live_next) = (self.memory_first(), self.memory_first());
        }
        while self.live_next < self.next {
            let position = self.live_next;
            let record = self.record_in_memory(position).cloned();
            if record.as_ref().is_some_and(|record| now_ms.saturating_sub(record.created_ms) > LIVE_AGE_MAX_MS) {
                self.make_backlog();
                return None;
            }
            self.live_next += 1;
            if let Some(record) = record.filter(|_| !self.is_completed(position))
                && self.put_in_flight(&record, now_ms, dropped)
            {
                return Some(record);
            }
        }
        None
    }

    /// Takes the next record of the backlog that was read ahead.
    pub(crate) fn take_backlog(&mut self, now_ms: u64, dropped: &mut DropCounts) -> Option<Record> {
        while let Some(record) = self.ready.pop_front() {
            let position = record.id.position;
            if self.is_completed(position) || self.in_flight.contains_key(&position) {
                continue;
            }
            if self.put_in_flight(&record, now_ms, dropped) {
                return Some(record);
            }
        }
        None
    }

    /// Puts a record in flight. Drops it and returns `false` when it has expired.
    fn put_in_flight(&mut self, record: &Record, now_ms: u64, dropped: &mut DropCounts) -> bool {
        if record.expires_ms() < now_ms {
            dropped.add(DropReason::Expired, 1);
            self.complete(record.id.position);
            return false;
        }
        self.in_flight.insert(record.id.position, record.clone());
        true
    }

    /// Completes a record in flight. Returns `false` when the record is not in flight.
    pub(crate) fn acknowledge(&mut self, position: u64) -> bool {
        let was_in_flight = self.in_flight.remove(&position).is_some();
        if was_in_flight {
            self.resend.remove(&position);
            self.setting_aside.remove(&position);
            self.complete(position);
        }
        was_in_flight
    }

    /// Schedules a record in flight to be set aside. Returns `false` when the record is not in flight.
    pub(crate) fn set_aside(&mut self, position: u64, reason: SetAsideReason) -> bool {
        let is_in_flight = self.in_flight.contains_key(&position);
        if is_in_flight {
            self.resend.remove(&position);
            self.setting_aside.insert(position, reason);
        }
        is_in_flight
    }

    /// The next record to set aside. The writer stores it, and then acknowledges it in the place of the broker.
    pub(crate) fn next_to_set_aside(&self) -> Option<(Record, SetAsideReason)> {
        let (position, reason) = self.setting_aside.first_key_value()?;
        Some((self.in_flight.get(position)?.clone(), *reason))
    }
}
