//! The state of one partition in memory: its records, where each one is held, and which are completed. A partition performs
//! no I/O; the writer brings to the disk what the partition selects.
//!
//! ```text
//!   positions   floor ............ memory_first ..... synced .... written .... next
//!   on disk     [ segment ][ segment ][ open segment              ]
//!   in memory                      [ memory                                    ]
//!   delivery    [ backlog_next ->          ) live_from ...   [ live_next ->    )
//! ```
//!
//! A record that is not completed is in a segment, in `memory`, or in `in_flight`; a record that is not synced is always in
//! `memory`. A segment is removed when all of its records are completed. A record in flight is also held in `in_flight`, and
//! a segment with records in flight is dropped for room only when there is no other. Then only memory holds these records, so
//! each one is either acknowledged, set aside or counted as dropped, never two of these.
//!
//! The submodules hold the operations of the publisher (`delivery`, `read_ahead`), of the bounds (`eviction`) and of the
//! writer (`writing`). They are tested through the spool, in `tests.rs` and against a model in `model_test.rs`, because
//! their contract is about what survives on the disk.

mod delivery;
mod eviction;
mod read_ahead;
mod writing;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::cursor::Cursor;
use crate::position_set::PositionSet;
use crate::record::Record;
use crate::record_format;
use crate::segment::Segment;
use crate::set_aside::SetAsideReason;

pub(crate) use read_ahead::ReadAhead;

/// One partition.
#[derive(Debug)]
pub(crate) struct Partition {
    /// In ascending order of position.
    segments: VecDeque<Segment>,
    /// Bytes of all segments.
    segment_bytes: u64,
    /// Whether all records of a segment may be completed.
    may_have_completed_segments: bool,
    /// The newest records, without gaps, up to `next`.
    memory: VecDeque<Record>,
    /// Encoded bytes of `memory`.
    memory_bytes: u64,
    /// Encoded bytes of the records in `memory` that are in no segment.
    unwritten_bytes: u64,
    /// Encoded bytes of the records in `memory` that are not synced.
    unsynced_bytes: u64,
    /// The next position to assign.
    next: u64,
    /// Positions below it are written to a segment, or completed.
    written: u64,
    /// Positions below it are synced, or completed.
    synced: u64,
    /// Completed positions at or above the floor.
    completed: PositionSet,
    /// Records taken by the publisher and not acknowledged, by position.
    in_flight: BTreeMap<u64, Record>,
    /// Positions in `in_flight` to deliver again.
    resend: BTreeSet<u64>,
    /// Positions in `in_flight` that the writer moves to the folder `set-aside`. They are not delivered again.
    setting_aside: BTreeMap<u64, SetAsideReason>,
    /// Records at or above it are live, records below it are backlog.
    live_from: u64,
    /// The next live record to deliver.
    live_next: u64,
    /// The next record of the backlog to read ahead.
    backlog_next: u64,
    /// Records of the backlog that are ready to be delivered.
    ready: VecDeque<Record>,
    /// Files to remove.
    obsolete_files: Vec<String>,
    /// Whether the cursor on disk is outdated.
    is_cursor_outdated: bool,
    /// The generation of the last cursor that was written.
    cursor_generation: u64,
}

impl Partition {
    /// A partition with the segments and the cursor found on disk. `segments` are closed and in ascending order of position.
    pub(crate) fn new(mut segments: VecDeque<Segment>, cursor: Cursor) -> Self {
        let next = segments.back().map_or(0, |segment| segment.last + 1).max(cursor.next).max(1);
        let mut completed = cursor.completed;
        if cursor.floor > 0 {
            completed.insert(0..=cursor.floor - 1);
        }
        let mut obsolete_files = Vec::new();
        segments.retain_mut(|segment| {
            let range = segment.first..=segment.last;
            segment.pending = segment.last - segment.first + 1 - completed.count_within(range);
            if segment.pending == 0 {
                obsolete_files.push(segment.name.clone());
            }
            segment.pending > 0
        });
        let floor = segments.front().map_or(next, |segment| segment.first);
        completed.remove_below(floor);
        Self {
            segment_bytes: segments.iter().map(|segment| segment.bytes).sum(),
            segments,
            may_have_completed_segments: false,
            memory: VecDeque::new(),
            memory_bytes: 0,
            unwritten_bytes: 0,
            unsynced_bytes: 0,
            next,
            written: next,
            synced: next,
            completed,
            in_flight: BTreeMap::new(),
            resend: BTreeSet::new(),
            setting_aside: BTreeMap::new(),
            live_from: next,
            live_next: next,
            backlog_next: floor,
            ready: VecDeque::new(),
            obsolete_files,
            is_cursor_outdated: true,
            cursor_generation: cursor.generation,
        }
    }

    /// The position of the next record.
    pub(crate) fn next_position(&self) -> u64 {
        self.next
    }

    /// Appends a record with the position [`Self::next_position`].
    pub(crate) fn append(&mut self, record: Record) {
        let size = record_format::size(&record);
        self.next += 1;
        self.memory_bytes += size;
        self.unwritten_bytes += size;
        self.unsynced_bytes += size;
        self.memory.push_back(record);
    }

    /// The number of pending records.
    pub(crate) fn pending(&self) -> u64 {
        let unwritten = self.next - self.written;
        let unwritten_completed =
            if unwritten == 0 { 0 } else { self.completed.count_within(self.written..=self.next - 1) };
        let in_segments: u64 = self.segments.iter().map(|segment| segment.pending).sum();
        in_segments + unwritten - unwritten_completed + self.orphaned()
    }

    /// Bytes in segments, and in memory before they are written.
    pub(crate) fn bytes(&self) -> u64 {
        self.segment_bytes + self.unwritten_bytes
    }

    /// Bytes that would be lost in a power cut.
    pub(crate) fn unsynced_bytes(&self) -> u64 {
        self.unsynced_bytes
    }

    /// When the oldest pending record was appended, accurate to one segment.
    pub(crate) fn oldest_ms(&self) -> Option<u64> {
        let in_segment = self.segments.iter().find(|segment| segment.pending > 0).map(|segment| segment.created_ms);
        let is_pending = |record: &&Record| !self.is_completed(record.id.position);
        in_segment.or_else(|| self.memory.iter().find(is_pending).map(|record| record.created_ms))
    }

    /// The number of records in flight whose segment was dropped: only `in_flight` holds them.
    fn orphaned(&self) -> u64 {
        let is_orphaned = |position: &&u64| **position < self.written && self.segment_index(**position).is_none();
        self.in_flight.keys().filter(is_orphaned).count() as u64
    }

    /// The position of the first record in memory.
    fn memory_first(&self) -> u64 {
        self.next - self.memory.len() as u64
    }

    fn record_in_memory(&self, position: u64) -> Option<&Record> {
        let index = position.checked_sub(self.memory_first())?;
        self.memory.get(usize::try_from(index).ok()?)
    }

    fn segment_index(&self, position: u64) -> Option<usize> {
        let after = self.segments.partition_point(|segment| segment.first <= position);
        let index = after.checked_sub(1)?;
        (self.segments[index].last >= position).then_some(index)
    }

    /// Every position below the floor is completed.
    fn floor(&self) -> u64 {
        self.segments.front().map_or(self.written, |segment| segment.first)
    }

    /// Whether a record was acknowledged or dropped. Also `true` for a record in flight whose segment was dropped.
    fn is_completed(&self, position: u64) -> bool {
        position < self.floor() || self.completed.contains(position)
    }

    /// Marks a record as completed.
    fn complete(&mut self, position: u64) {
        if self.is_completed(position) {
            return;
        }
        if let Some(index) = self.segment_index(position) {
            let segment = &mut self.segments[index];
            segment.pending = segment.pending.saturating_sub(1);
            self.may_have_completed_segments |= segment.pending == 0;
        }
        self.completed.insert(position..=position);
        self.release_completed();
    }

    /// Releases completed records at the old end of memory, and the completed positions that no segment covers.
    fn release_completed(&mut self) {
        self.is_cursor_outdated = true;
        self.release_memory(u64::MAX);
        self.completed.remove_below(self.floor());
    }

    /// Releases records at the old end of memory that are completed, and synced ones beyond `cache_bytes_max`.
    fn release_memory(&mut self, cache_bytes_max: u64) {
        while let Some(front) = self.memory.front() {
            let position = front.id.position;
            let is_releasable = position < self.synced && position < self.written;
            if !is_releasable || !(self.is_completed(position) || self.memory_bytes > cache_bytes_max) {
                break;
            }
            self.memory_bytes -= record_format::size(front);
            self.memory.pop_front();
        }
    }

    /// Raises the synced position.
    fn advance_synced(&mut self, position: u64) {
        let newly_synced = self.synced..position.max(self.synced);
        let bytes: u64 =
            newly_synced.filter_map(|position| self.record_in_memory(position)).map(record_format::size).sum();
        self.unsynced_bytes -= bytes;
        self.synced = self.synced.max(position);
    }
}

#[cfg(test)]
impl Partition {
    /// Whether a record was acknowledged or dropped.
    pub(crate) fn is_gone(&self, position: u64) -> bool {
        self.is_completed(position) && !self.in_flight.contains_key(&position)
    }

    /// Whether a record has to survive a power cut.
    pub(crate) fn survives_power_cut(&self, position: u64) -> bool {
        position < self.synced && !self.is_completed(position) && self.segment_index(position).is_some()
    }

    /// Whether a record has to survive the end of the process.
    pub(crate) fn survives_kill(&self, position: u64) -> bool {
        position < self.written && !self.is_completed(position) && self.segment_index(position).is_some()
    }

    /// The positions of the pending records in segments.
    pub(crate) fn positions(&self) -> BTreeSet<u64> {
        let all = self.segments.iter().flat_map(|segment| segment.first..=segment.last);
        all.filter(|position| !self.is_completed(*position)).collect()
    }
}
