//! Reading a spool from disk: segments, cursors and records.
//!
//! Tested through the spool, in `tests.rs` and `model_test.rs`.

use std::io;
use std::path::Path;

use bytes::Bytes;
use lineside_common::error_chain;

use crate::cursor::{Cursor, SLOT_BYTES};
use crate::disk::Disk;
use crate::error::{IoContext as _, SpoolError, SpoolErrorKind};
use crate::layout::{CURSOR, CURSOR_TMP, partition_folder};
use crate::partition::Partition;
use crate::record::{RECORD_BYTES_MAX, Record, RecordKind};
use crate::record_format;
use crate::segment::{self, Segment};

/// Bytes that are read of a segment. A segment exceeds its target size, 1 MiB, by at most one record; a larger file was not
/// written by the spool.
const SEGMENT_READ_BYTES_MAX: u64 = 8 * RECORD_BYTES_MAX;

/// Who reads a spool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AccessMode {
    /// The agent: open segments are closed, and unusable ones removed.
    Owner,
    /// Another process, while an agent may be using the spool, or the agent on a disk that refuses writes: nothing is changed.
    Observer,
}

/// A spool as it was found on disk.
pub(crate) struct Recovered {
    pub(crate) partitions: Vec<Partition>,
    /// The time that the agent has run before, in milliseconds.
    pub(crate) clock_ms: u64,
}

/// Reads a spool: the names of its segments, its cursors, and the segments that were open when the last process ended. On a
/// disk that refuses writes, a partition is read without being changed.
pub(crate) fn recover(disk: &dyn Disk, root: &Path) -> Result<Recovered, SpoolError> {
    let mut recovered = Recovered { partitions: Vec::new(), clock_ms: 0 };
    for kind in RecordKind::ALL {
        let (partition, newest_ms) = match recover_partition(disk, root, kind, AccessMode::Owner) {
            Err(error) if error.refuses_writes() => {
                let reason = error_chain(&error);
                tracing::warn!(event = "spool_opened_without_writes", reason, "The disk refuses writes of the spool");
                recover_partition(disk, root, kind, AccessMode::Observer)
            }
            result => result,
        }?;
        recovered.clock_ms = recovered.clock_ms.max(newest_ms);
        recovered.partitions.push(partition);
    }
    Ok(recovered)
}

/// Reads a partition. Returns it with the time that the agent had run when its newest known record was appended.
fn recover_partition(
    disk: &dyn Disk,
    root: &Path,
    kind: RecordKind,
    access: AccessMode,
) -> Result<(Partition, u64), SpoolError> {
    let folder = partition_folder(root, kind);
    if access == AccessMode::Owner {
        disk.create_folder(&folder).during("create", &folder)?;
    }
    let (segments, newest_ms) = match read_segments(disk, &folder, kind, access) {
        // The folder could not be created.
        Err(error) if access == AccessMode::Observer && error.kind() == SpoolErrorKind::NotFound => (Vec::new(), 0),
        result => result?,
    };
    let cursor = read_cursor(disk, &folder)?;
    let newest_ms = newest_ms.max(cursor.clock_ms);
    let mut partition = Partition::new(segments.into(), cursor);
    // A cursor that the last process wrote and did not sync may or may not survive a power cut. Replacing it durably
    // makes the completed positions certain.
    if access == AccessMode::Owner
        && let Some(cursor) = partition.take_cursor(newest_ms, true)
    {
        replace_cursor(disk, &folder, &cursor)?;
    }
    Ok((partition, newest_ms))
}

fn replace_cursor(disk: &dyn Disk, folder: &Path, cursor: &Cursor) -> Result<(), SpoolError> {
    let (path, temporary) = (folder.join(CURSOR), folder.join(CURSOR_TMP));
    let mut file = disk.create(&temporary).during("create", &temporary)?;
    file.write_at(&cursor.encode(), cursor.offset()).during("write", &temporary)?;
    file.sync().during("sync", &temporary)?;
    disk.rename(&temporary, &path).during("rename", &temporary)?;
    disk.sync_folder(folder).during("sync", folder)
}

/// Reads the cursor of a partition. A missing or invalid cursor is an empty one.
pub(crate) fn read_cursor(disk: &dyn Disk, folder: &Path) -> Result<Cursor, SpoolError> {
    let path = folder.join(CURSOR);
    match disk.read(&path, 2 * SLOT_BYTES as u64) {
        Ok(bytes) => Ok(Cursor::read(&bytes).unwrap_or_default()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Cursor::default()),
        Err(error) => Err(error).during("read", &path),
    }
}

/// The segments of a partition in ascending order of position, and when the newest known record was appended.
pub(crate) fn read_segments(
    disk: &dyn Disk,
    folder: &Path,
    kind: RecordKind,
    access: AccessMode,
) -> Result<(Vec<Segment>, u64), SpoolError> {
    let mut segments = Vec::new();
    let mut newest_ms = 0;
    for (name, bytes) in disk.list(folder).during("list", folder)? {
        if let Some(segment) = segment::from_name(&name, bytes) {
            newest_ms = newest_ms.max(segment.created_ms);
            segments.push(segment);
        } else if let Some(first) = segment::first_of_open(&name) {
            let path = folder.join(&name);
            let content = disk.read(&path, SEGMENT_READ_BYTES_MAX).during("read", &path)?;
            let records = record_format::scan(kind, &Bytes::from(content)).records;
            match describe_open(name, first, bytes, &records) {
                Some((mut segment, last_ms)) => {
                    newest_ms = newest_ms.max(last_ms);
                    if access == AccessMode::Owner {
                        close_recovered(disk, folder, &mut segment)?;
                    }
                    segments.push(segment);
                }
                None if access == AccessMode::Owner => disk.remove(&path).during("remove", &path)?,
                None => {}
            }
        }
    }
    if access == AccessMode::Owner {
        disk.sync_folder(folder).during("sync", folder)?;
    }
    let segments = remove_overlaps(disk, folder, segments, access)?;
    Ok((segments, newest_ms))
}

/// An open segment, and when its last record was appended. `None` when it contains no record.
fn describe_open(name: String, first: u64, bytes: u64, records: &[Record]) -> Option<(Segment, u64)> {
    let (front, back) = (records.first()?, records.last()?);
    let segment = Segment {
        name,
        // The name gives the first position even when the first record is damaged.
        first: first.min(front.id.position),
        last: back.id.position,
        bytes,
        created_ms: front.created_ms,
        expires_ms: records.iter().map(Record::expires_ms).max().unwrap_or(u64::MAX),
        pending: 0,
    };
    Some((segment, back.created_ms))
}

/// Closes a segment that was open when the last process ended.
fn close_recovered(disk: &dyn Disk, folder: &Path, segment: &mut Segment) -> Result<(), SpoolError> {
    let path = folder.join(&segment.name);
    // The last process may have been killed before it synced the segment; from now on it counts as synced.
    let mut file = disk.open(&path).during("open", &path)?;
    file.sync().during("sync", &path)?;
    let closed = segment::closed_name(segment);
    // A segment that cannot be renamed is scanned again at the next start, which has no other effect.
    if disk.rename(&path, &folder.join(&closed)).is_ok() {
        segment.name = closed;
    }
    Ok(())
}

/// Sorts segments and removes overlaps: after a failed sync, records were written again to a later segment, which takes
/// precedence.
fn remove_overlaps(
    disk: &dyn Disk,
    folder: &Path,
    mut segments: Vec<Segment>,
    access: AccessMode,
) -> Result<Vec<Segment>, SpoolError> {
    segments.sort_by_key(|segment| (segment.first, segment.last));
    let starts: Vec<u64> = segments.iter().map(|segment| segment.first).collect();
    let mut kept: Vec<Segment> = Vec::new();
    for (index, mut segment) in segments.into_iter().enumerate() {
        let next = starts.get(index + 1).copied().unwrap_or(u64::MAX);
        if segment.first < next {
            segment.last = segment.last.min(next - 1);
            kept.push(segment);
        } else if access == AccessMode::Owner {
            let path = folder.join(&segment.name);
            disk.remove(&path).during("remove", &path)?;
        }
    }
    Ok(kept)
}

/// Reads the records of a segment.
pub(crate) fn read_records(
    disk: &dyn Disk,
    folder: &Path,
    kind: RecordKind,
    segment: &Segment,
) -> io::Result<Vec<Record>> {
    let bytes = disk.read(&folder.join(&segment.name), SEGMENT_READ_BYTES_MAX)?;
    Ok(record_format::scan(kind, &Bytes::from(bytes)).records)
}
