//! What the writer brings to the disk, and the effect of each write, sync and rename on the partition.
//!
//! No unit tests: `model_test.rs` checks each of these transitions on a disk with faults.

use super::Partition;
use crate::cursor::Cursor;
use crate::record::Record;
use crate::record_format;
use crate::segment::{Segment, closed_name};

impl Partition {
    /// Records that are in no segment, oldest first and without gaps, up to `bytes_max`, but at least one when there are any.
    pub(crate) fn unwritten_batch(&self, bytes_max: u64) -> Vec<Record> {
        let skip = usize::try_from(self.written.saturating_sub(self.memory_first())).unwrap_or(usize::MAX);
        let mut bytes = 0;
        let mut batch: Vec<Record> = Vec::new();
        for record in self.memory.iter().skip(skip) {
            bytes += record_format::size(record);
            if !batch.is_empty() && bytes > bytes_max {
                break;
            }
            batch.push(record.clone());
        }
        batch
    }

    /// Whether any record is in no segment.
    pub(crate) fn has_unwritten(&self) -> bool {
        self.written < self.next
    }

    /// The first position that is in no segment.
    pub(crate) fn first_unwritten(&self) -> u64 {
        self.written
    }

    /// Registers that a batch was written to the open segment `name`, which now has `bytes`. Has no effect when the segment
    /// was dropped meanwhile: the batch is then written again, to another segment.
    pub(crate) fn batch_written(&mut self, batch: &[Record], name: &str, is_new: bool, bytes: u64) {
        let (Some(first_record), Some(last_record)) = (batch.first(), batch.last()) else { return };
        let (first, last) = (first_record.id.position, last_record.id.position);
        if first != self.written {
            // Part of the batch was dropped from memory meanwhile. The rest is written again.
            if is_new {
                self.obsolete_files.push(name.to_owned());
            }
            return;
        }
        let pending = last - first + 1 - self.completed.count_within(first..=last);
        let expires_ms = batch.iter().map(Record::expires_ms).max().unwrap_or(u64::MAX);
        match self.segments.back_mut().filter(|segment| segment.name == name) {
            Some(segment) => {
                segment.last = last;
                self.segment_bytes += bytes - segment.bytes;
                segment.bytes = bytes;
                segment.pending += pending;
                segment.expires_ms = segment.expires_ms.max(expires_ms);
            }
            None if is_new => {
                self.segment_bytes += bytes;
                let created_ms = first_record.created_ms;
                self.segments.push_back(Segment {
                    name: name.to_owned(),
                    first,
                    last,
                    bytes,
                    created_ms,
                    expires_ms,
                    pending,
                });
            }
            None => return,
        }
        self.may_have_completed_segments = true;
        self.written = last + 1;
        self.unwritten_bytes -= batch.iter().map(record_format::size).sum::<u64>();
    }

    /// Whether the open segment has to be synced: it contains unsynced records that are not completed. The name of a closed
    /// segment guarantees all of its records, so a segment that is closed is also synced for the sake of completed ones.
    pub(crate) fn needs_sync(&self, is_closing: bool) -> bool {
        let Some(segment) = self.segments.back() else { return false };
        if is_closing || segment.last < self.synced {
            return is_closing && segment.pending > 0;
        }
        let range = segment.first.max(self.synced)..=segment.last;
        self.completed.count_within(range.clone()) < range.end() - range.start() + 1
    }

    /// When the oldest record was appended that is written, not synced, and not completed.
    pub(crate) fn oldest_unsynced_ms(&mut self, cache_bytes_max: u64) -> Option<u64> {
        if let Some(end) = self.completed.end_of(self.synced) {
            self.synced_to((end + 1).min(self.written), cache_bytes_max);
        }
        let is_written = self.synced < self.written;
        is_written.then(|| self.record_in_memory(self.synced).map_or(0, |record| record.created_ms))
    }

    /// Registers that every position below `position` is synced or completed.
    pub(crate) fn synced_to(&mut self, position: u64, cache_bytes_max: u64) {
        self.advance_synced(position);
        self.release_memory(cache_bytes_max);
    }

    /// Registers that a sync of the open segment failed. Records written since the last successful sync may be lost, and are
    /// written again. Returns the segment and its name as a closed one, or `None` when it holds no synced record.
    pub(crate) fn sync_failed(&mut self, name: &str) -> Option<(Segment, String)> {
        let memory_first = self.memory_first();
        self.written = self.synced.max(memory_first);
        let unwritten = self.memory.iter().skip(usize::try_from(self.written - memory_first).unwrap_or(usize::MAX));
        self.unwritten_bytes = unwritten.map(record_format::size).sum();
        let segment = self.segments.back_mut().filter(|segment| segment.name == name)?;
        if segment.first >= self.synced {
            let lost = self.segments.pop_back()?;
            self.segment_bytes -= lost.bytes;
            self.obsolete_files.push(lost.name);
            return None;
        }
        // Completed records may count as synced without being so, and the name of a segment must not guarantee them.
        segment.last =
            self.completed.last_outside(segment.first..=segment.last.min(self.synced - 1)).unwrap_or(segment.first);
        let range = segment.first..=segment.last;
        segment.pending = segment.last - segment.first + 1 - self.completed.count_within(range);
        self.may_have_completed_segments |= segment.pending == 0;
        self.closing_segment(name)
    }

    /// A segment and its name as a closed one. `None` when the segment was dropped.
    pub(crate) fn closing_segment(&self, name: &str) -> Option<(Segment, String)> {
        let segment = self.segments.iter().find(|segment| segment.name == name)?;
        Some((segment.clone(), closed_name(segment)))
    }

    /// Registers that the file of a segment was renamed.
    pub(crate) fn segment_renamed(&mut self, name: &str, new_name: String) {
        match self.segments.iter_mut().find(|segment| segment.name == name) {
            Some(segment) => segment.name = new_name,
            // The segment was dropped while it was renamed.
            None => match self.obsolete_files.iter_mut().find(|obsolete| **obsolete == name) {
                Some(obsolete) => *obsolete = new_name,
                None => self.obsolete_files.push(new_name),
            },
        }
    }

    /// Removes the segments in which all records are completed, except the open one.
    pub(crate) fn remove_completed_segments(&mut self, open: Option<&str>) {
        if !std::mem::take(&mut self.may_have_completed_segments) {
            return;
        }
        self.segments.retain(|segment| {
            if segment.pending > 0 {
                return true;
            }
            if Some(segment.name.as_str()) == open {
                self.may_have_completed_segments = true;
                return true;
            }
            self.segment_bytes -= segment.bytes;
            self.obsolete_files.push(segment.name.clone());
            false
        });
        self.release_completed();
    }

    /// Takes the names of the files to remove.
    pub(crate) fn take_obsolete_files(&mut self) -> Vec<String> {
        std::mem::take(&mut self.obsolete_files)
    }

    /// Adds names of files to remove.
    pub(crate) fn add_obsolete_files(&mut self, names: impl IntoIterator<Item = String>) {
        self.obsolete_files.extend(names);
    }

    /// Registers that a file of this name is in use again.
    pub(crate) fn keep_file(&mut self, name: &str) {
        self.obsolete_files.retain(|obsolete| obsolete != name);
    }

    /// The cursor to write. `None` when it has not changed, unless `is_forced`.
    pub(crate) fn take_cursor(&mut self, clock_ms: u64, is_forced: bool) -> Option<Cursor> {
        if !self.is_cursor_outdated && !is_forced {
            return None;
        }
        self.is_cursor_outdated = false;
        self.cursor_generation += 1;
        Some(Cursor {
            generation: self.cursor_generation,
            clock_ms,
            next: self.next,
            floor: self.floor(),
            completed: self.completed.clone(),
        })
    }

    /// Registers that the cursor could not be written.
    pub(crate) fn cursor_failed(&mut self) {
        self.is_cursor_outdated = true;
        // The slot may be partly written. The other slot must not be written until this one is complete.
        self.cursor_generation -= 1;
    }
}
