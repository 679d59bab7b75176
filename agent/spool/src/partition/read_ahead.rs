//! Reading ahead of the backlog, so that the publisher never waits for the disk.

use std::ops::RangeInclusive;

use super::Partition;
use crate::metrics::{DropCounts, DropReason};
use crate::record::Record;
use crate::segment::Segment;

/// Bound on the records made ready from memory in one step.
const READY_RECORDS_MAX: usize = 256;
/// With fewer ready records than this, more are read.
const READY_RECORDS_LOW: usize = 64;

/// The next step of reading ahead.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ReadAhead {
    /// Read this segment, and pass its records to [`Partition::add_segment_records`].
    Segment(Segment),
    /// Records in memory were made ready.
    Ready,
    /// The backlog is empty, or enough records are ready.
    Idle,
}

impl Partition {
    /// Whether more of the backlog has to be read.
    pub(crate) fn needs_read_ahead(&self) -> bool {
        self.ready.len() < READY_RECORDS_LOW && self.backlog_next < self.live_from
    }

    /// Plans the next step. Records in memory are made ready at once.
    pub(crate) fn plan_read_ahead(&mut self) -> ReadAhead {
        if self.ready.len() >= READY_RECORDS_LOW {
            return ReadAhead::Idle;
        }
        while self.backlog_next < self.live_from {
            let position = self.backlog_next;
            if position >= self.memory_first() {
                let last = (self.live_from - 1).min(position + READY_RECORDS_MAX as u64 - 1);
                self.backlog_next = last + 1;
                let records: Vec<Record> = (position..=last)
                    .filter(|position| self.is_deliverable(*position))
                    .filter_map(|position| self.record_in_memory(position).cloned())
                    .collect();
                if !records.is_empty() {
                    self.ready.extend(records);
                    return ReadAhead::Ready;
                }
                continue;
            }
            if let Some(index) = self.segment_index(position) {
                return ReadAhead::Segment(self.segments[index].clone());
            }
            // No record lies between two segments.
            let next_segment = self.segments.iter().map(|segment| segment.first).find(|first| *first > position);
            self.backlog_next = next_segment.unwrap_or(self.live_from).min(self.memory_first()).min(self.live_from);
        }
        ReadAhead::Idle
    }

    /// Makes the records of a segment ready. A record that the segment should contain and does not is damaged.
    pub(crate) fn add_segment_records(&mut self, segment: &Segment, records: Vec<Record>, dropped: &mut DropCounts) {
        let from = segment.first.max(self.backlog_next);
        let to = segment.last.min(self.live_from.saturating_sub(1));
        let mut found = records.into_iter().filter(|record| (from..=to).contains(&record.id.position)).peekable();
        let mut position = from;
        while position <= to {
            if let Some(record) = found.next_if(|record| record.id.position == position) {
                if self.is_deliverable(position) {
                    self.ready.push_back(record);
                }
                position += 1;
                continue;
            }
            let missing_to = found.peek().map_or(to, |record| record.id.position - 1);
            self.drop_missing(position..=missing_to, dropped);
            position = missing_to + 1;
        }
        self.backlog_next = self.backlog_next.max(to + 1);
    }

    /// Replaces records that a segment does not contain by those in memory, and drops the others as damaged.
    fn drop_missing(&mut self, range: RangeInclusive<u64>, dropped: &mut DropCounts) {
        let (first, last) = range.into_inner();
        // The name of a damaged file may claim any number of records, so those that no memory holds are not visited one by one.
        if let Some(last) = self.memory_first().checked_sub(1).map(|before_memory| last.min(before_memory)) {
            dropped.add(DropReason::Damaged, self.complete_range(first..=last));
        }
        for position in first.max(self.memory_first())..=last {
            if !self.is_deliverable(position) {
                continue;
            }
            match self.record_in_memory(position).cloned() {
                Some(record) => self.ready.push_back(record),
                None => {
                    dropped.add(DropReason::Damaged, 1);
                    self.complete(position);
                }
            }
        }
    }

    /// Marks the positions of a range as completed that are not in flight. Returns how many were pending.
    fn complete_range(&mut self, range: RangeInclusive<u64>) -> u64 {
        let (mut from, last) = (*range.start().max(&self.floor()), *range.end());
        if from > last {
            return 0;
        }
        let in_flight: Vec<u64> = self.in_flight.range(from..=last).map(|(position, _)| *position).collect();
        let mut gaps = Vec::new();
        for position in in_flight {
            if from < position {
                gaps.push((from, position - 1));
            }
            from = position + 1;
        }
        if from <= last {
            gaps.push((from, last));
        }
        let mut newly_completed = 0;
        for (first, last) in gaps {
            newly_completed += last - first + 1 - self.completed.count_within(first..=last);
            for segment in &mut self.segments {
                let (from, to) = (segment.first.max(first), segment.last.min(last));
                if from <= to {
                    let pending = to - from + 1 - self.completed.count_within(from..=to);
                    segment.pending = segment.pending.saturating_sub(pending);
                    self.may_have_completed_segments |= segment.pending == 0;
                }
            }
            self.completed.insert(first..=last);
        }
        self.release_completed();
        newly_completed
    }

    fn is_deliverable(&self, position: u64) -> bool {
        !self.is_completed(position) && !self.in_flight.contains_key(&position)
    }
}
