//! Dropping of records: for room, by age, and while the disk refuses writes.

use std::collections::VecDeque;

use super::Partition;
use crate::metrics::{DropCounts, DropReason};
use crate::record_format;
use crate::segment::Segment;

impl Partition {
    /// Drops the oldest segment for room. Returns `false` when there is no segment.
    pub(crate) fn drop_oldest_segment(&mut self, dropped: &mut DropCounts) -> bool {
        // Only memory would hold a record in flight after its segment is dropped, and the end of the process would lose it.
        // So a segment without records in flight is preferred.
        let index = self.segments.iter().position(|segment| !self.has_in_flight(segment)).unwrap_or(0);
        let Some(segment) = self.segments.remove(index) else { return false };
        dropped.add(DropReason::Full, self.drop_segment(segment));
        true
    }

    /// Drops the segments in which all records have expired.
    pub(crate) fn drop_expired_segments(&mut self, now_ms: u64, dropped: &mut DropCounts) {
        let segments = std::mem::take(&mut self.segments);
        let is_expired = |segment: &Segment| segment.expires_ms < now_ms && !self.has_in_flight(segment);
        let (expired, kept): (VecDeque<Segment>, VecDeque<Segment>) = segments.into_iter().partition(is_expired);
        self.segments = kept;
        let records: u64 = expired.into_iter().map(|segment| self.drop_segment(segment)).sum();
        dropped.add(DropReason::Expired, records);
    }

    fn has_in_flight(&self, segment: &Segment) -> bool {
        self.in_flight.range(segment.first..=segment.last).next().is_some()
    }

    /// Completes all records of a segment that are not in flight, and returns how many were pending.
    fn drop_segment(&mut self, segment: Segment) -> u64 {
        let range = segment.first..=segment.last;
        let in_flight: Vec<u64> = self.in_flight.range(range).map(|(position, _)| *position).collect();
        let mut from = segment.first;
        for position in &in_flight {
            if from < *position {
                self.completed.insert(from..=position - 1);
            }
            from = position + 1;
        }
        self.completed.insert(from..=segment.last);
        self.segment_bytes -= segment.bytes;
        self.obsolete_files.push(segment.name);
        self.advance_synced(segment.last + 1);
        self.release_completed();
        segment.pending.saturating_sub(in_flight.len() as u64)
    }

    /// Drops the oldest record that only memory holds, because the disk refuses it. Returns `false` when there is none.
    pub(crate) fn drop_oldest_in_memory(&mut self, dropped: &mut DropCounts) -> bool {
        if self.synced >= self.next {
            return false;
        }
        // Records that the disk holds leave memory without being dropped.
        self.release_memory(0);
        let Some(record) = self.memory.pop_front() else { return false };
        let (position, size) = (record.id.position, record_format::size(&record));
        let is_completed = self.is_completed(position);
        self.memory_bytes -= size;
        if position >= self.written {
            self.unwritten_bytes -= size;
        }
        if position >= self.synced {
            self.unsynced_bytes -= size;
        }
        self.written = self.written.max(position + 1);
        self.is_cursor_outdated = true;
        if !self.in_flight.contains_key(&position) && !is_completed {
            dropped.add(DropReason::Disk, 1);
            self.complete(position);
        }
        true
    }

    /// Counts the records that end with the process, because only memory holds them.
    pub(crate) fn count_lost_at_end(&self, dropped: &mut DropCounts) {
        dropped.add(DropReason::Full, self.orphaned());
        if self.synced < self.next {
            let unsynced = self.synced..=self.next - 1;
            dropped.add(DropReason::Disk, self.next - self.synced - self.completed.count_within(unsynced));
        }
    }
}
