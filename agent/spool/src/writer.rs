//! The one owner of the spool's files: a thread that writes, syncs, reads ahead and removes, so that nobody else ever
//! waits for the disk.
//!
//! ```text
//!   append --> written at once ----> synced in batches --> closed at its size --> removed when all is done with
//!                   |  refused           |  refused
//!                   v                    v
//!              tried again every second, in a new file; meanwhile memory holds the records, within its bound
//! ```
//!
//! Writing at once means that a killed process loses nothing it had handed over. Syncing is what outlasts a power cut:
//! it happens when a record has waited for the broker's answer for `sync_interval`, and not at all for records that were
//! acknowledged sooner. So a line whose broker answers costs the flash next to nothing.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::cursor::{Cursor, SLOT_BYTES};
use super::disk::{Disk, DiskFile};
use super::partition::{Ahead, Partition, expiry};
use super::record_format::{self, HEADER};
use super::segment::{self, Segment};
use super::{Options, RECORD_BYTES_MAX, RecordKind, Shared};

/// Bytes written in one go at most.
const BATCH_BYTES: u64 = 256 << 10;
/// Bytes of synced records that stay in memory, so that live ones need not be read back.
const CACHE_BYTES: u64 = 1 << 20;
/// After a disk has refused something, it is tried again after this.
const RETRY_MS: u64 = 1000;
/// What need not be done at once is done this often.
const TIDY_MS: u64 = 10_000;
/// An open segment of at least this size is let go when everything in it is done with; a smaller one when room is short.
const WORTH_REMOVING_BYTES: u64 = 64 << 10;
/// A file that cannot be read is given up after so many tries.
const READ_TRIES: u32 = 3;
const CURSOR: &str = "cursor";
const CURSOR_BESIDE: &str = "cursor.tmp";

/// The writer's side of all partitions.
pub(super) struct Writer {
    disk: Arc<dyn Disk>,
    partitions: Vec<Files>,
    segment_bytes: u64,
    bytes_max: u64,
    sync_ms: u64,
    memory_bytes_max: u64,
    retry_at_ms: Option<u64>,
    tidy_at_ms: u64,
}

/// The files of one partition.
struct Files {
    kind: RecordKind,
    folder: PathBuf,
    open: Option<Open>,
    cursor: Option<Box<dyn DiskFile>>,
    failed_reads: u32,
}

/// The segment that is written to.
struct Open {
    name: String,
    file: Box<dyn DiskFile>,
    bytes: u64,
    last: u64,
    /// Whether its name outlasts a power cut.
    is_named: bool,
    /// A write to it has failed; nothing is appended any more.
    is_spoilt: bool,
}

/// The folder of a partition.
pub(super) fn folder_of(root: &Path, kind: RecordKind) -> PathBuf {
    root.join(kind.name())
}

/// What was found on the disk.
pub(super) struct Found {
    pub(super) partitions: Vec<Partition>,
    pub(super) clock_ms: u64,
}

/// Reads what is on the disk: names, the cursors, and the segments that were open at the end.
pub(super) fn recover(disk: &dyn Disk, root: &Path) -> io::Result<Found> {
    let mut found = Found { partitions: Vec::new(), clock_ms: 0 };
    for kind in RecordKind::ALL {
        let folder = folder_of(root, kind);
        disk.create_folder(&folder)?;
        let (segments, mut newest_ms) = segments(disk, &folder, kind, true)?;
        let cursor = read_cursor(disk, &folder)?;
        newest_ms = newest_ms.max(cursor.clock_ms);
        found.clock_ms = found.clock_ms.max(newest_ms);
        let mut partition = Partition::new(segments.into(), cursor);
        // What the last process wrote and did not sync may still come true, or not. From here on it is one or the other.
        if let Some(cursor) = partition.take_cursor(newest_ms, true) {
            let (path, beside) = (folder.join(CURSOR), folder.join(CURSOR_BESIDE));
            let mut file = disk.create(&beside)?;
            file.write_at(&cursor.encode(), cursor.offset())?;
            file.sync()?;
            disk.rename(&beside, &path)?;
            disk.sync_folder(&folder)?;
        }
        found.partitions.push(partition);
    }
    Ok(found)
}

/// What a partition remembers; nothing, where it never wrote anything down or it cannot be made out.
pub(super) fn read_cursor(disk: &dyn Disk, folder: &Path) -> io::Result<Cursor> {
    match disk.read(&folder.join(CURSOR), 2 * SLOT_BYTES as u64) {
        Ok(bytes) => Ok(Cursor::read(&bytes).unwrap_or_default()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Cursor::default()),
        Err(error) => Err(error),
    }
}

/// The segments of a folder in the order of their positions, and when the newest record that was looked at was appended.
/// Where the folder `is_ours`, segments that were open are closed, and empty ones removed.
pub(super) fn segments(
    disk: &dyn Disk,
    folder: &Path,
    kind: RecordKind,
    is_ours: bool,
) -> io::Result<(Vec<Segment>, u64)> {
    let mut segments = Vec::new();
    let mut newest_ms = 0;
    for (name, bytes) in disk.list(folder)? {
        if let Some(segment) = segment::from_name(&name, bytes) {
            newest_ms = newest_ms.max(segment.created_ms);
            segments.push(segment);
            continue;
        }
        let Some(first) = name.strip_suffix(".open").and_then(|first| first.parse::<u64>().ok()) else { continue };
        let path = folder.join(&name);
        let records = record_format::scan(kind, &Bytes::from(disk.read(&path, u64::MAX)?)).records;
        let (Some(front), Some(back)) = (records.first(), records.last()) else {
            if is_ours {
                disk.remove(&path)?;
            }
            continue;
        };
        newest_ms = newest_ms.max(back.created_ms);
        let mut segment = Segment {
            name,
            // The name tells where it began, also when the first record is damaged.
            first: first.min(front.place.position),
            last: back.place.position,
            bytes,
            created_ms: front.created_ms,
            expires_ms: records.iter().map(expiry).max().unwrap_or(u64::MAX),
            waiting: 0,
        };
        let closed = segment::closed_name(&segment);
        if is_ours {
            // The last process may have been killed before it synced this; from now on it counts as synced.
            disk.open(&path)?.sync()?;
        }
        // Under its old name it would be read once more the next time, and nothing else.
        if is_ours && disk.rename(&path, &folder.join(&closed)).is_ok() {
            segment.name = closed;
        }
        segments.push(segment);
    }
    if is_ours {
        disk.sync_folder(folder)?;
    }
    segments.sort_by_key(|segment| (segment.first, segment.last));
    // After a sync that failed, records were written once more into another file: the later file counts.
    let starts: Vec<u64> = segments.iter().map(|segment| segment.first).collect();
    let mut kept: Vec<Segment> = Vec::new();
    for (index, mut segment) in segments.into_iter().enumerate() {
        let next = starts.get(index + 1).copied().unwrap_or(u64::MAX);
        match segment.first < next {
            true => {
                segment.last = segment.last.min(next - 1);
                kept.push(segment);
            }
            false if is_ours => disk.remove(&folder.join(&segment.name))?,
            false => {}
        }
    }
    Ok((kept, newest_ms))
}

/// Reads the records of a segment.
pub(super) fn read_segment(
    disk: &dyn Disk,
    folder: &Path,
    kind: RecordKind,
    segment: &Segment,
) -> io::Result<Vec<super::Record>> {
    // A segment has one record more than its size at most; whatever is larger is none of ours.
    let bytes_max = segment.bytes.max(RECORD_BYTES_MAX) + (1 << 20);
    let bytes = disk.read(&folder.join(&segment.name), bytes_max)?;
    Ok(record_format::scan(kind, &Bytes::from(bytes)).records)
}

impl Writer {
    pub(super) fn new(disk: Arc<dyn Disk>, root: &Path, options: &Options) -> Self {
        let files = |kind| Files { kind, folder: folder_of(root, kind), open: None, cursor: None, failed_reads: 0 };
        Self {
            disk,
            partitions: RecordKind::ALL.into_iter().map(files).collect(),
            segment_bytes: options.segment_bytes,
            bytes_max: options.bytes_max,
            sync_ms: u64::try_from(options.sync_interval.as_millis()).unwrap_or(u64::MAX),
            memory_bytes_max: options.memory_bytes_max,
            retry_at_ms: None,
            tidy_at_ms: 0,
        }
    }

    /// Does whatever is to be done now, and says how long it may wait for something to happen.
    pub(super) fn cycle(&mut self, shared: &Shared, now_ms: u64) -> Duration {
        if self.retry_at_ms.is_none_or(|at| at <= now_ms) {
            self.keep(shared, now_ms, false);
        }
        self.read_ahead(shared);
        // A disk that refuses is left alone until it is tried again.
        let wake_ms = self.retry_at_ms.unwrap_or_else(|| self.sync_at(shared).unwrap_or(u64::MAX).min(self.tidy_at_ms));
        Duration::from_millis(wake_ms.saturating_sub(now_ms).max(1))
    }

    /// When something has to be synced: a record that waits has done so for long enough.
    fn sync_at(&self, shared: &Shared) -> Option<u64> {
        let mut state = shared.state();
        let oldest_ms =
            state.partitions.iter_mut().filter_map(|partition| partition.oldest_unsynced_ms(CACHE_BYTES)).min()?;
        Some(oldest_ms.saturating_add(self.sync_ms))
    }

    /// Brings everything to the disk at the end: written, synced, closed.
    pub(super) fn finish(&mut self, shared: &Shared, now_ms: u64) {
        self.keep(shared, now_ms, true);
        let lost = shared.change(|state, dropped| {
            state.partitions.iter().for_each(|partition| partition.give_up_memory(dropped));
            dropped.total()
        });
        if lost > 0 {
            tracing::error!(records = lost, "ending with results that only memory held; they are lost");
        }
        for files in &mut self.partitions {
            if let Some(cursor) = &mut files.cursor
                && let Err(error) = cursor.sync()
            {
                tracing::debug!(%error, "the spool's cursor could not be synced");
            }
        }
    }

    /// Writes, syncs, tidies. A disk that refuses is complained about once and tried again.
    fn keep(&mut self, shared: &Shared, now_ms: u64, is_end: bool) {
        let was_in_trouble = shared.state().trouble.is_some();
        let is_tight =
            shared.state().partitions.iter().map(Partition::unsynced_bytes).sum::<u64>() > self.memory_bytes_max / 4;
        let is_due =
            was_in_trouble || is_end || is_tight || self.sync_at(shared).is_some_and(|sync_ms| sync_ms <= now_ms);
        let is_tidy_time = is_end || now_ms >= self.tidy_at_ms;
        let mut trouble = None;
        for index in 0..self.partitions.len() {
            if let Err(error) = self.keep_lane(index, shared, now_ms, is_due, is_tidy_time, is_end) {
                trouble = Some(error);
            }
        }
        if is_tidy_time {
            self.tidy_at_ms = now_ms + TIDY_MS;
        }
        match trouble {
            Some(error) => {
                self.retry_at_ms = Some(now_ms + RETRY_MS);
                if !was_in_trouble {
                    tracing::error!(event = "spool_disk_failed", %error, "the disk does not take results, memory holds them meanwhile");
                }
                shared.state().trouble = Some(error.to_string());
            }
            None => {
                self.retry_at_ms = None;
                if was_in_trouble {
                    tracing::info!("the disk takes results again");
                    shared.state().trouble = None;
                }
            }
        }
    }

    fn keep_lane(
        &mut self,
        index: usize,
        shared: &Shared,
        now_ms: u64,
        is_due: bool,
        is_tidy_time: bool,
        is_end: bool,
    ) -> io::Result<()> {
        let (disk, segment_bytes) = (self.disk.clone(), self.segment_bytes);
        let is_crowded = shared.state().bytes() > self.bytes_max / 2;
        let files = &mut self.partitions[index];
        let kind = files.kind;
        if is_tidy_time {
            shared.change(|state, dropped| state.partition(kind).drop_expired(now_ms, dropped));
        }
        let written = files.write(&*disk, shared, segment_bytes);
        let synced = match is_due {
            true => files.sync(&*disk, shared, false),
            false => Ok(()),
        };
        let is_full = files.open.as_ref().is_some_and(|open| open.bytes >= segment_bytes);
        let is_idle = files.is_finished(shared) && (is_tidy_time && files.is_worth_removing() || is_crowded);
        let closed = match is_full || is_idle || is_end {
            true => files.close(&*disk, shared),
            false => Ok(()),
        };
        let open = files.open.as_ref().map(|open| open.name.clone());
        let discarded = {
            let mut state = shared.state();
            state.partition(kind).discard_finished(open.as_deref());
            state.partition(kind).take_discarded()
        };
        if !discarded.is_empty() {
            shared.room.notify_all();
        }
        // The cursor first: when a file is gone it should be known why.
        let remembered = files.remember(&*disk, shared, now_ms, is_tidy_time);
        let mut left = Vec::new();
        let mut removed = Ok(());
        for name in discarded {
            if let Err(error) = disk.remove(&files.folder.join(&name)) {
                removed = Err(error);
                left.push(name);
            }
        }
        if !left.is_empty() {
            shared.state().partition(kind).put_back_discarded(left);
        }
        written.and(synced).and(closed).and(remembered).and(removed)
    }

    /// Reads ahead for a publisher that is connected.
    fn read_ahead(&mut self, shared: &Shared) {
        for files in &mut self.partitions {
            let kind = files.kind;
            loop {
                let ahead = {
                    let mut state = shared.state();
                    if !state.is_connected {
                        return;
                    }
                    state.partition(kind).read_ahead()
                };
                match ahead {
                    Ahead::Nothing => break,
                    Ahead::Ready => {
                        shared.changed.notify_one();
                        break;
                    }
                    Ahead::InFile(segment) => {
                        let records = match read_segment(&*self.disk, &files.folder, kind, &segment) {
                            Ok(records) => records,
                            Err(error) => {
                                files.failed_reads += 1;
                                if files.failed_reads < READ_TRIES && error.kind() != io::ErrorKind::NotFound {
                                    break;
                                }
                                tracing::error!(file = segment.name, %error, "a file of the spool cannot be read, its results are lost");
                                Vec::new()
                            }
                        };
                        files.failed_reads = 0;
                        shared.change(|state, dropped| state.partition(kind).read(&segment, records, dropped));
                        shared.changed.notify_one();
                    }
                }
            }
        }
    }
}

impl Files {
    /// Writes what is in no segment yet.
    fn write(&mut self, disk: &dyn Disk, shared: &Shared, segment_bytes: u64) -> io::Result<()> {
        loop {
            let (batch, is_given_up) = {
                let mut state = shared.state();
                let partition = state.partition(self.kind);
                let is_given_up = self.open.as_ref().is_some_and(|open| partition.close_of(&open.name).is_none());
                (partition.unwritten(BATCH_BYTES.min(segment_bytes)), is_given_up)
            };
            let (Some(first), Some(last)) = (batch.first(), batch.last()) else { return Ok(()) };
            let (first, last) = (first.place.position, last.place.position);
            if is_given_up {
                self.open = None;
            }
            let is_over = |open: &Open| open.is_spoilt || open.bytes >= segment_bytes || open.last + 1 != first;
            if self.open.as_ref().is_some_and(is_over) {
                self.close(disk, shared)?;
            }
            let mut bytes = Vec::new();
            let is_new = self.open.is_none();
            if is_new {
                bytes.extend_from_slice(HEADER);
                let name = segment::open_name(first);
                let file = disk.create(&self.folder.join(&name))?;
                // One that was given up before it was any use may have had the same name.
                shared.state().partition(self.kind).keep_file(&name);
                self.open = Some(Open { name, file, bytes: 0, last, is_named: false, is_spoilt: false });
            }
            batch.iter().for_each(|record| record_format::encode(record, &mut bytes));
            let Some(open) = &mut self.open else { return Ok(()) };
            if let Err(error) = open.file.write_at(&bytes, open.bytes) {
                if is_new {
                    // Nothing counts on it yet.
                    let name = std::mem::take(&mut open.name);
                    self.open = None;
                    shared.state().partition(self.kind).put_back_discarded(vec![name]);
                } else {
                    open.is_spoilt = true;
                }
                return Err(error);
            }
            open.bytes += bytes.len() as u64;
            open.last = last;
            shared.written_bytes.inc_by(bytes.len() as u64);
            shared.state().partition(self.kind).wrote(&batch, &open.name, is_new, open.bytes);
        }
    }

    /// Makes what was written outlast a power cut, unless it is done with already.
    fn sync(&mut self, disk: &dyn Disk, shared: &Shared, is_closing: bool) -> io::Result<()> {
        let (target, is_needed) = {
            let mut state = shared.state();
            let partition = state.partition(self.kind);
            (partition.written(), partition.needs_sync(is_closing))
        };
        if is_needed {
            let name = self.open.as_ref().map(|open| open.name.clone()).unwrap_or_default();
            if let Err(error) = self.sync_open(disk, shared) {
                let half = shared.state().partition(self.kind).sync_failed(&name);
                if let Some((_, closed)) = half {
                    self.rename(disk, shared, &name, closed);
                }
                self.open = None;
                return Err(error);
            }
        }
        shared.state().partition(self.kind).synced_to(target, CACHE_BYTES);
        // DesiredCache is free again, so whoever waited for room may go on.
        shared.room.notify_all();
        Ok(())
    }

    fn sync_open(&mut self, disk: &dyn Disk, shared: &Shared) -> io::Result<()> {
        let Some(open) = &mut self.open else { return Err(io::Error::other("the segment to be synced is not open")) };
        open.file.sync()?;
        if !open.is_named {
            disk.sync_folder(&self.folder)?;
            open.is_named = true;
        }
        shared.syncs.inc();
        Ok(())
    }

    /// Whether nothing in the open segment is needed any more.
    fn is_finished(&self, shared: &Shared) -> bool {
        let Some(open) = &self.open else { return false };
        let mut state = shared.state();
        let partition = state.partition(self.kind);
        !partition.has_unwritten() && partition.close_of(&open.name).is_none_or(|(segment, _)| segment.waiting == 0)
    }

    fn is_worth_removing(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.bytes >= WORTH_REMOVING_BYTES)
    }

    /// Closes the open segment: synced as far as it is needed, under the name that says what is in it.
    fn close(&mut self, disk: &dyn Disk, shared: &Shared) -> io::Result<()> {
        self.sync(disk, shared, true)?;
        let Some(open) = self.open.take() else { return Ok(()) };
        let half = shared.state().partition(self.kind).close_of(&open.name);
        match half {
            Some((segment, closed)) if segment.waiting > 0 => self.rename(disk, shared, &open.name, closed),
            // It goes without being renamed first.
            _ => {}
        }
        Ok(())
    }

    fn rename(&self, disk: &dyn Disk, shared: &Shared, name: &str, closed: String) {
        // Under its old name it is found all the same.
        if disk.rename(&self.folder.join(name), &self.folder.join(&closed)).is_ok() {
            shared.state().partition(self.kind).closed(name, closed);
        }
    }

    /// Writes down what is done with.
    fn remember(&mut self, disk: &dyn Disk, shared: &Shared, now_ms: u64, is_tidy_time: bool) -> io::Result<()> {
        let cursor = {
            let mut state = shared.state();
            let partition = state.partition(self.kind);
            let is_due = is_tidy_time && partition.waiting() > 0;
            partition.take_cursor(now_ms, is_due)
        };
        let Some(cursor) = cursor else { return Ok(()) };
        let written = match &mut self.cursor {
            Some(file) => file.write_at(&cursor.encode(), cursor.offset()),
            None => disk.open(&self.folder.join(CURSOR)).and_then(|mut file| {
                file.write_at(&cursor.encode(), cursor.offset())?;
                self.cursor = Some(file);
                Ok(())
            }),
        };
        if written.is_err() {
            shared.state().partition(self.kind).cursor_failed();
            self.cursor = None;
        }
        written
    }
}
