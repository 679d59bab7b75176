//! One partition of the spool as it stands in memory: which records there are, where each one is, and what has become of it.
//! No I/O happens in here; [`writer`](super::writer) brings to the disk what a partition says has to go there.
//!
//! ```text
//!   positions   floor ............ recent_first ..... synced .... written .... next
//!   on disk     [ segment ][ segment ][ open segment              ]
//!   in memory                      [ recent                                    ]
//!   sent        [ backlog_at ->            ) live_from ...   [ live_at ->      )
//! ```
//!
//! A record is *done with* when it was acknowledged, or was given up and counted. Until then it is in a segment, in
//! `recent`, or in `sending`; what is not synced is always in `recent`. A segment goes when everything in it is done with.
//! While a record is on the way to the broker it is held in `sending`, and another segment than its own is given up for room,
//! where there is one. Where there is none, memory alone holds it: so it is either delivered or counted as dropped, never both.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::cursor::Cursor;
use super::ranges::Ranges;
use super::record_format;
use super::segment::{Segment, closed_name};
use super::{Dropped, Record};

/// Records read ahead for the publisher at most, where they come from memory.
const AHEAD_RECORDS_MAX: usize = 256;
/// A record that has waited for longer than this is not live any more: newer ones go first.
const LIVE_AGE_MAX_MS: u64 = 5000;
/// With fewer than this the next ones are read.
const AHEAD_RECORDS_LOW: usize = 64;

/// Where the next records of the backlog are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ahead {
    /// In this file.
    InFile(Segment),
    /// They were in memory and are ready now.
    Ready,
    /// There are none, or enough are ready.
    Nothing,
}

/// One partition.
#[derive(Debug)]
pub(super) struct Partition {
    segments: VecDeque<Segment>,
    /// Bytes of all of them.
    segment_bytes: u64,
    /// Whether one of them may be finished.
    has_finished: bool,
    recent: VecDeque<Record>,
    /// Bytes of `recent`, as frames.
    recent_bytes: u64,
    /// Bytes of the part of it that is in no segment yet.
    unwritten_bytes: u64,
    /// Bytes of the part of it that no sync has covered.
    unsynced_bytes: u64,
    next: u64,
    written: u64,
    synced: u64,
    done: Ranges,
    sending: BTreeMap<u64, Record>,
    resend: BTreeSet<u64>,
    live_from: u64,
    live_at: u64,
    backlog_at: u64,
    ahead: VecDeque<Record>,
    /// Files that can go.
    discarded: Vec<String>,
    /// Whether the cursor on the disk is out of date.
    is_dirty: bool,
    generation: u64,
}

impl Partition {
    /// A partition with what was found on the disk. `segments` come in the order of their positions, all closed.
    pub(super) fn new(mut segments: VecDeque<Segment>, cursor: Cursor) -> Self {
        let next = segments.back().map_or(0, |segment| segment.last + 1).max(cursor.next).max(1);
        let mut done = cursor.done;
        if cursor.floor > 0 {
            done.insert(0..=cursor.floor - 1);
        }
        let mut discarded = Vec::new();
        segments.retain_mut(|segment| {
            let range = segment.first..=segment.last;
            segment.waiting = segment.last - segment.first + 1 - done.count_within(range);
            if segment.waiting == 0 {
                discarded.push(segment.name.clone());
            }
            segment.waiting > 0
        });
        let floor = segments.front().map_or(next, |segment| segment.first);
        done.forget_below(floor);
        Self {
            segment_bytes: segments.iter().map(|segment| segment.bytes).sum(),
            segments,
            has_finished: false,
            recent: VecDeque::new(),
            recent_bytes: 0,
            unwritten_bytes: 0,
            unsynced_bytes: 0,
            next,
            written: next,
            synced: next,
            done,
            sending: BTreeMap::new(),
            resend: BTreeSet::new(),
            live_from: next,
            live_at: next,
            backlog_at: floor,
            ahead: VecDeque::new(),
            discarded,
            is_dirty: true,
            generation: cursor.generation,
        }
    }

    /// The position the next record gets.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// Takes a record for the next position.
    pub(super) fn append(&mut self, record: Record) {
        let size = record_format::size(&record);
        self.next += 1;
        self.recent_bytes += size;
        self.unwritten_bytes += size;
        self.unsynced_bytes += size;
        self.recent.push_back(record);
    }

    // ---- What the publisher does ----------------------------------------------------------------------------------

    /// A connection was made: what was on the way goes out again, what is appended from now on is live.
    pub(super) fn connected(&mut self) {
        self.resend = self.sending.keys().copied().collect();
        self.catch_up();
    }

    /// What has not been sent yet is backlog from now on.
    fn catch_up(&mut self) {
        (self.live_from, self.live_at) = (self.next, self.next);
    }

    /// A record that was taken could not be sent; it is given out again first of all.
    pub(super) fn requeue(&mut self, position: u64) {
        if self.sending.contains_key(&position) {
            self.resend.insert(position);
        }
    }

    /// A record that was on the way when the last connection broke.
    pub(super) fn take_again(&mut self) -> Option<Record> {
        let position = self.resend.pop_first()?;
        self.sending.get(&position).cloned()
    }

    /// The next live record.
    pub(super) fn take_live(&mut self, now_ms: u64, dropped: &mut Dropped) -> Option<Record> {
        if self.live_at < self.recent_first() {
            // What has left the memory unsent is not so live any more.
            (self.live_from, self.live_at) = (self.recent_first(), self.recent_first());
        }
        while self.live_at < self.next {
            let position = self.live_at;
            let record = self.recent_record(position).cloned();
            if record.as_ref().is_some_and(|record| now_ms.saturating_sub(record.created_ms) > LIVE_AGE_MAX_MS) {
                self.catch_up();
                return None;
            }
            self.live_at += 1;
            if let Some(record) = record.filter(|_| !self.is_done(position))
                && self.check_out(&record, now_ms, dropped)
            {
                return Some(record);
            }
        }
        None
    }

    /// The next record of the backlog, of those that are ready.
    pub(super) fn take_backlog(&mut self, now_ms: u64, dropped: &mut Dropped) -> Option<Record> {
        while let Some(record) = self.ahead.pop_front() {
            let position = record.place.position;
            if self.is_done(position) || self.sending.contains_key(&position) {
                continue;
            }
            if self.check_out(&record, now_ms, dropped) {
                return Some(record);
            }
        }
        None
    }

    /// Holds a record while it is on the way; or gives it up, when it has lived too long.
    fn check_out(&mut self, record: &Record, now_ms: u64, dropped: &mut Dropped) -> bool {
        if expiry(record) < now_ms {
            dropped.expired += 1;
            self.finish(record.place.position);
            return false;
        }
        self.sending.insert(record.place.position, record.clone());
        true
    }

    /// A record was delivered. `false` when it was not on the way.
    pub(super) fn acknowledge(&mut self, position: u64) -> bool {
        let was_sent = self.sending.remove(&position).is_some();
        if was_sent {
            self.resend.remove(&position);
            self.finish(position);
        }
        was_sent
    }

    /// Records on the way whose segment was given up: they are nowhere else.
    fn orphans(&self) -> u64 {
        let is_orphan = |position: &&u64| **position < self.written && self.segment_index(**position).is_none();
        self.sending.keys().filter(is_orphan).count() as u64
    }

    /// Records that are not done with.
    pub(super) fn waiting(&self) -> u64 {
        let unwritten = self.next - self.written;
        let unwritten_done = if unwritten == 0 { 0 } else { self.done.count_within(self.written..=self.next - 1) };
        let in_segments: u64 = self.segments.iter().map(|segment| segment.waiting).sum();
        in_segments + unwritten - unwritten_done + self.orphans()
    }

    /// Bytes in segments and in memory.
    pub(super) fn bytes(&self) -> u64 {
        self.segment_bytes + self.unwritten_bytes
    }

    /// Bytes that only memory holds for sure.
    pub(super) fn unsynced_bytes(&self) -> u64 {
        self.unsynced_bytes
    }

    /// Whether more of the backlog should be read.
    pub(super) fn is_low(&self) -> bool {
        self.ahead.len() < AHEAD_RECORDS_LOW && self.backlog_at < self.live_from
    }

    /// When about the oldest record that is not done with was appended.
    pub(super) fn oldest_ms(&self) -> Option<u64> {
        let in_segment = self.segments.iter().find(|segment| segment.waiting > 0).map(|segment| segment.created_ms);
        let undone = |record: &&Record| !self.is_done(record.place.position);
        in_segment.or_else(|| self.recent.iter().find(undone).map(|record| record.created_ms))
    }

    // ---- What is given up -----------------------------------------------------------------------------------------

    /// Gives up the oldest segment for room. `false` when there is none.
    pub(super) fn drop_oldest(&mut self, dropped: &mut Dropped) -> bool {
        // A record on the way would have nothing but memory left, and go with the process. So its segment stays, if another
        // can go.
        let index = self.segments.iter().position(|segment| !self.is_on_the_way(segment)).unwrap_or(0);
        let Some(segment) = self.segments.remove(index) else { return false };
        dropped.full += self.give_up(segment);
        true
    }

    /// Gives up segments in which everything has expired.
    pub(super) fn drop_expired(&mut self, now_ms: u64, dropped: &mut Dropped) {
        let segments = std::mem::take(&mut self.segments);
        let is_over = |segment: &Segment| segment.expires_ms < now_ms && !self.is_on_the_way(segment);
        let (over, kept) = segments.into_iter().partition(is_over);
        self.segments = kept;
        dropped.expired += VecDeque::into_iter(over).map(|segment| self.give_up(segment)).sum::<u64>();
    }

    fn is_on_the_way(&self, segment: &Segment) -> bool {
        self.sending.range(segment.first..=segment.last).next().is_some()
    }

    /// Everything in a segment that is neither done with nor on the way is given up; says how much that was.
    fn give_up(&mut self, segment: Segment) -> u64 {
        let range = segment.first..=segment.last;
        let sending: Vec<u64> = self.sending.range(range).map(|(position, _)| *position).collect();
        let mut from = segment.first;
        for position in &sending {
            if from < *position {
                self.done.insert(from..=position - 1);
            }
            from = position + 1;
        }
        self.done.insert(from..=segment.last);
        self.segment_bytes -= segment.bytes;
        self.discarded.push(segment.name);
        self.advance_synced(segment.last + 1);
        self.settle();
        segment.waiting.saturating_sub(sending.len() as u64)
    }

    /// Gives up the oldest record that only memory holds, because the disk does not take it. `false` when there is none.
    pub(super) fn drop_from_memory(&mut self, dropped: &mut Dropped) -> bool {
        if self.synced >= self.next {
            return false;
        }
        // What the disk has goes from memory without being given up.
        self.prune(0);
        let Some(record) = self.recent.pop_front() else { return false };
        let (position, size) = (record.place.position, record_format::size(&record));
        let is_done = self.is_done(position);
        self.recent_bytes -= size;
        if position >= self.written {
            self.unwritten_bytes -= size;
        }
        if position >= self.synced {
            self.unsynced_bytes -= size;
        }
        self.written = self.written.max(position + 1);
        self.is_dirty = true;
        if !self.sending.contains_key(&position) && !is_done {
            dropped.disk += 1;
            self.finish(position);
        }
        true
    }

    /// The process ends: what only memory holds is given up.
    pub(super) fn give_up_memory(&self, dropped: &mut Dropped) {
        dropped.full += self.orphans();
        if self.synced < self.next {
            dropped.disk += self.next - self.synced - self.done.count_within(self.synced..=self.next - 1);
        }
    }

    // ---- What the writer does -------------------------------------------------------------------------------------

    /// What is in no segment yet, oldest first and without a gap, as far as `bytes_max` goes; at least one record.
    pub(super) fn unwritten(&self, bytes_max: u64) -> Vec<Record> {
        let first = self.recent_first();
        let skip = usize::try_from(self.written.saturating_sub(first)).unwrap_or(usize::MAX);
        let mut bytes = 0;
        let mut batch: Vec<Record> = Vec::new();
        for record in self.recent.iter().skip(skip) {
            bytes += record_format::size(record);
            if !batch.is_empty() && bytes > bytes_max {
                break;
            }
            batch.push(record.clone());
        }
        batch
    }

    /// Whether anything is in no segment yet.
    pub(super) fn has_unwritten(&self) -> bool {
        self.written < self.next
    }

    /// The batch stands in this file now, which has so many bytes. Nothing has happened when the file was given up
    /// meanwhile: the batch is written once more, into another.
    pub(super) fn wrote(&mut self, batch: &[Record], name: &str, is_new: bool, bytes: u64) {
        let (Some(first), Some(last)) = (batch.first(), batch.last()) else { return };
        let (first_position, last_position) = (first.place.position, last.place.position);
        if first_position != self.written {
            // DesiredCache gave up part of the batch meanwhile. What was not given up is written once more.
            if is_new {
                self.discarded.push(name.to_owned());
            }
            return;
        }
        let waiting = last_position - first_position + 1 - self.done.count_within(first_position..=last_position);
        let expires_ms = batch.iter().map(expiry).max().unwrap_or(u64::MAX);
        match self.segments.back_mut().filter(|segment| segment.name == name) {
            Some(segment) => {
                segment.last = last_position;
                self.segment_bytes += bytes - segment.bytes;
                segment.bytes = bytes;
                segment.waiting += waiting;
                segment.expires_ms = segment.expires_ms.max(expires_ms);
            }
            None if is_new => {
                self.segment_bytes += bytes;
                self.segments.push_back(Segment {
                    name: name.to_owned(),
                    first: first_position,
                    last: last_position,
                    bytes,
                    created_ms: first.created_ms,
                    expires_ms,
                    waiting,
                });
            }
            None => return,
        }
        self.has_finished = true;
        self.written = last_position + 1;
        self.unwritten_bytes -= batch.iter().map(record_format::size).sum::<u64>();
    }

    /// Whether records of the open segment still have to be synced: some that are not done with. The name of a closed
    /// segment vouches for all of its records, so when it is closed, also those that are done with have to be.
    pub(super) fn needs_sync(&self, is_closing: bool) -> bool {
        let Some(segment) = self.segments.back() else { return false };
        if is_closing || segment.last < self.synced {
            return is_closing && segment.waiting > 0;
        }
        let range = segment.first.max(self.synced)..=segment.last;
        self.done.count_within(range.clone()) < range.end() - range.start() + 1
    }

    /// The first position that is in no segment.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// When the oldest record was appended that is written, not synced, and not done with.
    pub(super) fn oldest_unsynced_ms(&mut self, cache_bytes_max: u64) -> Option<u64> {
        if let Some(end) = self.done.end_of(self.synced) {
            self.synced_to((end + 1).min(self.written), cache_bytes_max);
        }
        let is_written = self.synced < self.written;
        is_written.then(|| self.recent_record(self.synced).map_or(0, |record| record.created_ms))
    }

    /// Everything below this position is safe, or done with.
    pub(super) fn synced_to(&mut self, position: u64, cache_bytes_max: u64) {
        self.advance_synced(position);
        self.prune(cache_bytes_max);
    }

    /// A sync failed: what the segment held beyond the last sync that went well may be gone, and is written once more.
    /// The segment is closed; its name as a closed one, or `None` when nothing in it counts.
    pub(super) fn sync_failed(&mut self, name: &str) -> Option<(Segment, String)> {
        self.written = self.synced.max(self.recent_first());
        let first = self.recent_first();
        let unwritten = self.recent.iter().skip(usize::try_from(self.written - first).unwrap_or(usize::MAX));
        self.unwritten_bytes = unwritten.map(record_format::size).sum();
        let segment = self.segments.back_mut().filter(|segment| segment.name == name)?;
        if segment.first >= self.synced {
            let gone = self.segments.pop_back()?;
            self.segment_bytes -= gone.bytes;
            self.discarded.push(gone.name);
            return None;
        }
        // What is done with was not synced for its own sake, so the name of the segment must not vouch for it.
        segment.last =
            self.done.last_outside(segment.first..=segment.last.min(self.synced - 1)).unwrap_or(segment.first);
        let range = segment.first..=segment.last;
        segment.waiting = segment.last - segment.first + 1 - self.done.count_within(range);
        self.has_finished |= segment.waiting == 0;
        self.close_of(name)
    }

    /// The segment of this name as it stands and the name it gets when it is closed; `None` when it was given up.
    pub(super) fn close_of(&self, name: &str) -> Option<(Segment, String)> {
        let segment = self.segments.iter().find(|segment| segment.name == name)?;
        Some((segment.clone(), closed_name(segment)))
    }

    /// A segment was closed under a new name.
    pub(super) fn closed(&mut self, name: &str, new_name: String) {
        match self.segments.iter_mut().find(|segment| segment.name == name) {
            Some(segment) => segment.name = new_name,
            // It was given up while it was being renamed.
            None => match self.discarded.iter_mut().find(|discarded| **discarded == name) {
                Some(discarded) => *discarded = new_name,
                None => self.discarded.push(new_name),
            },
        }
    }

    /// Lets go of segments in which everything is done with, but for the open one.
    pub(super) fn discard_finished(&mut self, open: Option<&str>) {
        if !std::mem::take(&mut self.has_finished) {
            return;
        }
        self.segments.retain(|segment| {
            if segment.waiting > 0 {
                return true;
            }
            if Some(segment.name.as_str()) == open {
                self.has_finished = true;
                return true;
            }
            self.segment_bytes -= segment.bytes;
            self.discarded.push(segment.name.clone());
            false
        });
        self.settle();
    }

    /// Files to be removed; they are the caller's now.
    pub(super) fn take_discarded(&mut self) -> Vec<String> {
        std::mem::take(&mut self.discarded)
    }

    /// A file of this name is in use again.
    pub(super) fn keep_file(&mut self, name: &str) {
        self.discarded.retain(|discarded| discarded != name);
    }

    /// Files that could not be removed; they are tried again.
    pub(super) fn put_back_discarded(&mut self, names: Vec<String>) {
        self.discarded.extend(names);
    }

    /// What is to be remembered, if that has changed.
    pub(super) fn take_cursor(&mut self, clock_ms: u64, is_due: bool) -> Option<Cursor> {
        if !self.is_dirty && !is_due {
            return None;
        }
        self.is_dirty = false;
        self.generation += 1;
        Some(Cursor {
            generation: self.generation,
            clock_ms,
            next: self.next,
            floor: self.floor(),
            done: self.done.clone(),
        })
    }

    /// The cursor could not be written.
    pub(super) fn cursor_failed(&mut self) {
        self.is_dirty = true;
        // The slot may be half written now; the other one must stay as it is until this one is whole.
        self.generation -= 1;
    }

    /// Where to read ahead; what is in memory is made ready at once.
    pub(super) fn read_ahead(&mut self) -> Ahead {
        if self.ahead.len() >= AHEAD_RECORDS_LOW {
            return Ahead::Nothing;
        }
        while self.backlog_at < self.live_from {
            let at = self.backlog_at;
            if at >= self.recent_first() {
                let last = (self.live_from - 1).min(at + AHEAD_RECORDS_MAX as u64 - 1);
                self.backlog_at = last + 1;
                let wanted = |position: &u64| !self.is_done(*position) && !self.sending.contains_key(position);
                let ready: Vec<Record> =
                    (at..=last).filter(wanted).filter_map(|position| self.recent_record(position).cloned()).collect();
                if !ready.is_empty() {
                    self.ahead.extend(ready);
                    return Ahead::Ready;
                }
                continue;
            }
            if let Some(index) = self.segment_index(at) {
                return Ahead::InFile(self.segments[index].clone());
            }
            // Between two segments there is nothing.
            let behind = self.segments.iter().map(|segment| segment.first).find(|first| *first > at);
            self.backlog_at = behind.unwrap_or(self.live_from).min(self.recent_first()).min(self.live_from);
        }
        Ahead::Nothing
    }

    /// A segment was read: what waits in it is ready now. What should be in it and is not, is damaged.
    pub(super) fn read(&mut self, segment: &Segment, records: Vec<Record>, dropped: &mut Dropped) {
        let from = segment.first.max(self.backlog_at);
        let to = segment.last.min(self.live_from.saturating_sub(1));
        let mut found = records.into_iter().filter(|record| (from..=to).contains(&record.place.position)).peekable();
        let mut at = from;
        while at <= to {
            if let Some(record) = found.next_if(|record| record.place.position == at) {
                if !self.is_done(at) && !self.sending.contains_key(&at) {
                    self.ahead.push_back(record);
                }
                at += 1;
                continue;
            }
            let missing_to = found.peek().map_or(to, |record| record.place.position - 1);
            self.lose(at..=missing_to, dropped);
            at = missing_to + 1;
        }
        self.backlog_at = self.backlog_at.max(to + 1);
    }

    /// Records that should be in a segment and are not. What memory still has is taken from there.
    fn lose(&mut self, range: std::ops::RangeInclusive<u64>, dropped: &mut Dropped) {
        for position in range {
            if self.is_done(position) || self.sending.contains_key(&position) {
                continue;
            }
            match self.recent_record(position).cloned() {
                Some(record) => self.ahead.push_back(record),
                None => {
                    dropped.damaged += 1;
                    self.finish(position);
                }
            }
        }
    }

    // ---- Inside ---------------------------------------------------------------------------------------------------

    fn recent_first(&self) -> u64 {
        self.next - self.recent.len() as u64
    }

    fn recent_record(&self, position: u64) -> Option<&Record> {
        let index = position.checked_sub(self.recent_first())?;
        self.recent.get(usize::try_from(index).ok()?)
    }

    fn segment_index(&self, position: u64) -> Option<usize> {
        let after = self.segments.partition_point(|segment| segment.first <= position);
        let index = after.checked_sub(1)?;
        (self.segments[index].last >= position).then_some(index)
    }

    fn advance_synced(&mut self, position: u64) {
        let newly = self.synced..position.max(self.synced);
        let bytes: u64 = newly.filter_map(|position| self.recent_record(position)).map(record_format::size).sum();
        self.unsynced_bytes -= bytes;
        self.synced = self.synced.max(position);
    }

    /// A record is done with.
    fn finish(&mut self, position: u64) {
        if self.is_done(position) {
            return;
        }
        if let Some(index) = self.segment_index(position) {
            let segment = &mut self.segments[index];
            segment.waiting = segment.waiting.saturating_sub(1);
            self.has_finished |= segment.waiting == 0;
        }
        self.done.insert(position..=position);
        self.is_dirty = true;
        self.settle();
    }

    /// Whether a record was acknowledged, or given up. One that is still on the way counts too, when its segment is gone.
    fn is_done(&self, position: u64) -> bool {
        position < self.floor() || self.done.contains(position)
    }

    fn floor(&self) -> u64 {
        self.segments.front().map_or(self.written, |segment| segment.first)
    }

    /// Forgets what no segment holds any more, and what memory need not hold.
    fn settle(&mut self) {
        self.is_dirty = true;
        self.prune(u64::MAX);
        self.done.forget_below(self.floor());
    }

    /// Lets go of records at the old end of memory that are safe on the disk, or done with.
    fn prune(&mut self, cache_bytes_max: u64) {
        while let Some(front) = self.recent.front() {
            let position = front.place.position;
            let is_done = self.is_done(position);
            let may_go = position < self.synced && position < self.written;
            if !may_go || !(is_done || self.recent_bytes > cache_bytes_max) {
                break;
            }
            self.recent_bytes -= record_format::size(front);
            self.recent.pop_front();
        }
    }
}

/// When a record has lived too long, in the spool's milliseconds.
pub(super) fn expiry(record: &Record) -> u64 {
    match record.ttl_seconds {
        0 => u64::MAX,
        seconds => record.created_ms.saturating_add(u64::from(seconds) * 1000),
    }
}

#[cfg(any(test, feature = "simulation"))]
#[allow(dead_code, reason = "test code, a part of which other crates use too")]
impl Partition {
    /// Whether a record was delivered or given up.
    pub(super) fn is_gone(&self, position: u64) -> bool {
        self.is_done(position) && !self.sending.contains_key(&position)
    }

    /// Whether a record has to outlast a power cut.
    pub(super) fn is_promised(&self, position: u64) -> bool {
        position < self.synced && !self.is_done(position) && self.segment_index(position).is_some()
    }

    /// Whether a record has to outlast the process.
    pub(super) fn is_written(&self, position: u64) -> bool {
        position < self.written && !self.is_done(position) && self.segment_index(position).is_some()
    }

    /// The records that wait in segments.
    pub(super) fn positions(&self) -> BTreeSet<u64> {
        let all = self.segments.iter().flat_map(|segment| segment.first..=segment.last);
        all.filter(|position| !self.is_done(*position)).collect()
    }
}
