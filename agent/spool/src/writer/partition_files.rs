//! The files of one partition as the writer uses them: the open segment and the cursor.
//!
//! Tested with the writer, in `tests.rs` and `model_test.rs`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{CACHE_BYTES, Pass};
use crate::disk::{Disk, DiskFile};
use crate::layout::{CURSOR, partition_folder};
use crate::record::{Record, RecordKind};
use crate::record_format::{self, HEADER};
use crate::segment;
use crate::shared::Shared;

/// Bound on the bytes of one write.
const BATCH_BYTES: u64 = 256 << 10;
/// Maintenance removes an open segment of at least this size when all of its records are completed. A smaller one is only
/// removed when the spool is crowded.
const REMOVABLE_BYTES: u64 = 64 << 10;

/// The files of one partition.
pub(super) struct PartitionFiles {
    pub(super) kind: RecordKind,
    pub(super) folder: PathBuf,
    /// Failed attempts to read the next segment of the backlog.
    pub(super) failed_reads: u32,
    disk: Arc<dyn Disk>,
    segment_bytes: u64,
    open: Option<OpenSegment>,
    cursor: Option<Box<dyn DiskFile>>,
}

/// The segment that is appended to.
struct OpenSegment {
    name: String,
    file: Box<dyn DiskFile>,
    bytes: u64,
    last: u64,
    /// Whether the name of the file survives a power cut.
    is_name_synced: bool,
    /// Whether a write failed. Nothing is appended any more.
    is_broken: bool,
}

impl PartitionFiles {
    pub(super) fn new(disk: Arc<dyn Disk>, root: &Path, kind: RecordKind, segment_bytes: u64) -> Self {
        let folder = partition_folder(root, kind);
        Self { kind, folder, failed_reads: 0, disk, segment_bytes, open: None, cursor: None }
    }

    /// Writes, syncs, closes and removes what is due. All steps are attempted; the first error is returned.
    pub(super) fn persist(&mut self, shared: &Shared, pass: Pass) -> io::Result<()> {
        if pass.is_maintenance_due {
            shared.change(|state, dropped| state.partition(self.kind).drop_expired_segments(pass.now_ms, dropped));
        }
        let written = self.write(shared);
        let synced = if pass.is_sync_due { self.sync(shared, false) } else { Ok(()) };
        let closed = if self.should_close(shared, pass) { self.close(shared) } else { Ok(()) };
        let obsolete = {
            let open = self.open.as_ref().map(|open| open.name.as_str());
            let mut state = shared.state();
            state.partition(self.kind).remove_completed_segments(open);
            state.partition(self.kind).take_obsolete_files()
        };
        if !obsolete.is_empty() {
            shared.wake_blocked();
        }
        // The cursor is written before files are removed, so that a missing file is known to be completed.
        let cursor_written = self.write_cursor(shared, pass);
        let removed = self.remove(shared, obsolete);
        written.and(synced).and(closed).and(cursor_written).and(removed)
    }

    fn should_close(&self, shared: &Shared, pass: Pass) -> bool {
        let Some(open) = &self.open else { return pass.is_closing };
        let is_removable = pass.is_maintenance_due && open.bytes >= REMOVABLE_BYTES || pass.is_crowded;
        pass.is_closing || open.bytes >= self.segment_bytes || is_removable && self.is_completed(shared, open)
    }

    /// Whether all records of the open segment are completed, and no record waits to be written.
    fn is_completed(&self, shared: &Shared, open: &OpenSegment) -> bool {
        let mut state = shared.state();
        let partition = state.partition(self.kind);
        !partition.has_unwritten()
            && partition.closing_segment(&open.name).is_none_or(|(segment, _)| segment.pending == 0)
    }

    /// Writes all records that are in no segment.
    fn write(&mut self, shared: &Shared) -> io::Result<()> {
        loop {
            let (batch, is_dropped) = {
                let mut state = shared.state();
                let partition = state.partition(self.kind);
                let is_dropped = self.open.as_ref().is_some_and(|open| partition.closing_segment(&open.name).is_none());
                (partition.unwritten_batch(BATCH_BYTES.min(self.segment_bytes)), is_dropped)
            };
            let Some(first) = batch.first().map(|record| record.id.position) else { return Ok(()) };
            if is_dropped {
                self.open = None;
            }
            let is_unusable =
                |open: &OpenSegment| open.is_broken || open.bytes >= self.segment_bytes || open.last + 1 != first;
            if self.open.as_ref().is_some_and(is_unusable) {
                self.close(shared)?;
            }
            self.write_batch(shared, first, &batch)?;
        }
    }

    /// Writes a batch to the open segment, or to a new one when none is open.
    fn write_batch(&mut self, shared: &Shared, first: u64, batch: &[Record]) -> io::Result<()> {
        let mut bytes = Vec::new();
        let is_new = self.open.is_none();
        let mut open = match self.open.take() {
            Some(open) => open,
            None => {
                bytes.extend_from_slice(HEADER);
                self.create_segment(shared, first)?
            }
        };
        batch.iter().for_each(|record| record_format::encode(record, &mut bytes));
        if let Err(error) = open.file.write_at(&bytes, open.bytes) {
            if is_new {
                // No record is registered in it yet.
                shared.state().partition(self.kind).add_obsolete_files([open.name]);
            } else {
                open.is_broken = true;
                self.open = Some(open);
            }
            return Err(error);
        }
        open.bytes += bytes.len() as u64;
        open.last = batch.last().map_or(first, |record| record.id.position);
        shared.metrics.written_bytes.inc_by(bytes.len() as u64);
        shared.state().partition(self.kind).batch_written(batch, &open.name, is_new, open.bytes);
        self.open = Some(open);
        Ok(())
    }

    fn create_segment(&self, shared: &Shared, first: u64) -> io::Result<OpenSegment> {
        let name = segment::open_name(first);
        let file = self.in_folder(|| self.disk.create(&self.folder.join(&name)))?;
        // A segment of this name may wait for its removal, because its first write failed.
        shared.state().partition(self.kind).keep_file(&name);
        Ok(OpenSegment { name, file, bytes: 0, last: first, is_name_synced: false, is_broken: false })
    }

    /// Opens a file, after creating the folder if it does not exist: it could not be created when the spool was opened on a disk
    /// that refused writes, or somebody has removed it.
    fn in_folder<T>(&self, open: impl Fn() -> io::Result<T>) -> io::Result<T> {
        match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.disk.create_folder(&self.folder)?;
                open()
            }
            result => result,
        }
    }

    /// Makes the written records durable, unless all of them are completed.
    fn sync(&mut self, shared: &Shared, is_closing: bool) -> io::Result<()> {
        let (first_unwritten, is_needed) = {
            let mut state = shared.state();
            let partition = state.partition(self.kind);
            (partition.first_unwritten(), partition.needs_sync(is_closing))
        };
        if is_needed {
            let name = self.open.as_ref().map(|open| open.name.clone()).unwrap_or_default();
            if let Err(error) = self.sync_open(shared) {
                let synced_part = shared.state().partition(self.kind).sync_failed(&name);
                if let Some((_, closed_name)) = synced_part {
                    self.rename(shared, &name, closed_name);
                }
                self.open = None;
                return Err(error);
            }
        }
        shared.state().partition(self.kind).synced_to(first_unwritten, CACHE_BYTES);
        // Memory was released.
        shared.wake_blocked();
        Ok(())
    }

    fn sync_open(&mut self, shared: &Shared) -> io::Result<()> {
        let Some(open) = &mut self.open else { return Err(io::Error::other("the segment to sync is not open")) };
        open.file.sync()?;
        if !open.is_name_synced {
            self.disk.sync_folder(&self.folder)?;
            open.is_name_synced = true;
        }
        shared.metrics.syncs.inc();
        Ok(())
    }

    /// Closes the open segment: syncs what is needed, and gives it the name of a closed segment.
    fn close(&mut self, shared: &Shared) -> io::Result<()> {
        self.sync(shared, true)?;
        let Some(open) = self.open.take() else { return Ok(()) };
        let closing = shared.state().partition(self.kind).closing_segment(&open.name);
        // A segment without pending records is removed under its old name.
        if let Some((_, closed_name)) = closing.filter(|(segment, _)| segment.pending > 0) {
            self.rename(shared, &open.name, closed_name);
        }
        Ok(())
    }

    fn rename(&self, shared: &Shared, name: &str, closed_name: String) {
        // Recovery also finds a segment that keeps its old name.
        if self.disk.rename(&self.folder.join(name), &self.folder.join(&closed_name)).is_ok() {
            shared.state().partition(self.kind).segment_renamed(name, closed_name);
        }
    }

    /// Writes the cursor when it has changed, and during maintenance when records are pending, to store the clock.
    fn write_cursor(&mut self, shared: &Shared, pass: Pass) -> io::Result<()> {
        let cursor = {
            let mut state = shared.state();
            let partition = state.partition(self.kind);
            let is_forced = pass.is_maintenance_due && partition.pending() > 0;
            partition.take_cursor(pass.now_ms, is_forced)
        };
        let Some(cursor) = cursor else { return Ok(()) };
        let written = match &mut self.cursor {
            Some(file) => file.write_at(&cursor.encode(), cursor.offset()),
            None => self.in_folder(|| self.disk.open(&self.folder.join(CURSOR))).and_then(|mut file| {
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

    /// Syncs the cursor.
    pub(super) fn sync_cursor(&mut self) -> io::Result<()> {
        match &mut self.cursor {
            Some(cursor) => cursor.sync(),
            None => Ok(()),
        }
    }

    /// Removes files. Those that cannot be removed are tried again in the next pass; the last error is returned.
    fn remove(&self, shared: &Shared, names: Vec<String>) -> io::Result<()> {
        let mut remaining = Vec::new();
        let mut removed = Ok(());
        for name in names {
            if let Err(error) = self.disk.remove(&self.folder.join(&name)) {
                removed = Err(error);
                remaining.push(name);
            }
        }
        if !remaining.is_empty() {
            shared.state().partition(self.kind).add_obsolete_files(remaining);
        }
        removed
    }
}
