//! Records that the broker does not take, kept apart from the records that wait: the folder `set-aside` of the spool.
//!
//! Each record has a file of its own, `{created}-{position}-{checksum}-{kind}-{reason}.rec`, which is a segment with this one
//! record. The name follows from the record alone, and no two records share one, so setting a record aside twice, which happens after a crash between the two writes,
//! leaves one file. The writer completes the record in its partition only when the file is synced: at any moment the record is
//! in its partition, in this folder, or in both.
//!
//! The folder is bounded by [`SET_ASIDE_RECORDS_MAX`] and [`SET_ASIDE_BYTES_MAX`]. The oldest record is dropped first, and
//! counted as [`DropReason::SetAsideFull`](crate::DropReason::SetAsideFull). A record that is set aside does not expire.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::disk::{Disk, RealDisk};
use crate::error::{IoContext as _, SpoolError};
use crate::record::{POSITION_MAX, RECORD_BYTES_MAX, Record, RecordKind, TIME_MS_MAX, TOPIC_BYTES_MAX};
use crate::record_format::{self, HEADER};

/// Maximum number of records that are set aside.
pub const SET_ASIDE_RECORDS_MAX: usize = 1000;
/// Maximum bytes of the records that are set aside.
pub const SET_ASIDE_BYTES_MAX: u64 = 16 << 20;
/// Upper bound on the bytes of one file.
const FILE_BYTES_MAX: u64 = RECORD_BYTES_MAX + TOPIC_BYTES_MAX as u64 + 1024;
const TMP: &str = "record.tmp";

/// Why a record is set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetAsideReason {
    /// The broker closed the connection each time the record was sent alone.
    ConnectionLost,
    /// The message is larger than the broker accepts.
    TooLarge,
    /// The broker answered other requests and never acknowledged the record.
    Unacknowledged,
}

impl SetAsideReason {
    /// All reasons in the order of their labels.
    pub const ALL: [Self; 3] = [Self::ConnectionLost, Self::TooLarge, Self::Unacknowledged];

    /// The value of the label `reason`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ConnectionLost => "connection_lost",
            Self::TooLarge => "too_large",
            Self::Unacknowledged => "unacknowledged",
        }
    }
}

/// A record that is set aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetAsideRecord {
    /// The record.
    pub record: Record,
    /// Why the broker does not take it.
    pub reason: SetAsideReason,
}

/// What is in the folder: a file name, decoded.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct FileName {
    created_ms: u64,
    position: u64,
    /// CRC-32C of the encoded record: a power cut can make the spool assign a position again.
    checksum: u32,
    kind: RecordKind,
    reason: SetAsideReason,
}

impl FileName {
    fn of(record: &Record, reason: SetAsideReason) -> Self {
        let mut encoded = Vec::new();
        record_format::encode(record, &mut encoded);
        let (created_ms, position, kind) = (record.created_ms, record.id.position, record.id.kind);
        Self { created_ms, position, checksum: crc32c::crc32c(&encoded), kind, reason }
    }

    fn encode(&self) -> String {
        let Self { created_ms, position, checksum, kind, reason } = self;
        format!("{created_ms:020}-{position:020}-{checksum:08x}-{}-{}.rec", kind.name(), reason.as_str())
    }

    fn decode(name: &str) -> Option<Self> {
        let mut parts = name.strip_suffix(".rec")?.splitn(5, '-');
        let mut number = |max: u64| parts.next()?.parse().ok().filter(|number| *number <= max);
        let (created_ms, position) = (number(TIME_MS_MAX)?, number(POSITION_MAX)?);
        let checksum = u32::from_str_radix(parts.next()?, 16).ok()?;
        let (kind, reason) = (parts.next()?, parts.next()?);
        let kind = RecordKind::ALL.into_iter().find(|known| known.name() == kind)?;
        let reason = SetAsideReason::ALL.into_iter().find(|known| known.as_str() == reason)?;
        let decoded = Self { created_ms, position, checksum, kind, reason };
        (decoded.encode() == name).then_some(decoded)
    }

    fn is_same_record(&self, other: &Self) -> bool {
        let record = |name: &Self| (name.created_ms, name.position, name.checksum, name.kind);
        record(self) == record(other)
    }
}

/// The contents of the folder `set-aside`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SetAsideStats {
    /// Number of records.
    pub records: u64,
    /// Bytes of their files.
    pub bytes: u64,
}

/// The folder `set-aside`.
pub(crate) struct SetAsideFolder {
    disk: Arc<dyn Disk>,
    folder: PathBuf,
}

impl SetAsideFolder {
    pub(crate) fn new(disk: Arc<dyn Disk>, root: &Path) -> Self {
        Self { disk, folder: folder(root) }
    }

    /// Stores a record durably. Returns how many older records were dropped to keep the bounds.
    pub(crate) fn store(&self, record: &Record, reason: SetAsideReason) -> io::Result<u64> {
        let mut bytes = HEADER.to_vec();
        record_format::encode(record, &mut bytes);
        self.disk.create_folder(&self.folder)?;
        let (name, tmp) = (FileName::of(record, reason), self.folder.join(TMP));
        let mut file = self.disk.create(&tmp)?;
        file.write_at(&bytes, 0)?;
        file.sync()?;
        self.disk.rename(&tmp, &self.folder.join(name.encode()))?;
        self.disk.sync_folder(&self.folder)?;
        let dropped = self.drop_excess(&name)?;
        Ok(dropped)
    }

    /// Removes other files of the same record, and the oldest records until the bounds hold.
    fn drop_excess(&self, stored: &FileName) -> io::Result<u64> {
        let mut files = list(&*self.disk, &self.folder)?;
        for (other, _) in files.extract_if(.., |(other, _)| other != stored && other.is_same_record(stored)) {
            self.disk.remove(&self.folder.join(other.encode()))?;
        }
        let (mut records, mut bytes) = (files.len(), files.iter().map(|(_, bytes)| bytes).sum::<u64>());
        let mut dropped = 0;
        for (name, size) in files {
            if records <= SET_ASIDE_RECORDS_MAX && bytes <= SET_ASIDE_BYTES_MAX {
                break;
            }
            self.disk.remove(&self.folder.join(name.encode()))?;
            (records, bytes, dropped) = (records - 1, bytes - size, dropped + 1);
        }
        Ok(dropped)
    }

    pub(crate) fn stats(&self) -> SetAsideStats {
        let files = list(&*self.disk, &self.folder).unwrap_or_default();
        SetAsideStats { records: files.len() as u64, bytes: files.iter().map(|(_, bytes)| bytes).sum() }
    }

    #[cfg(test)]
    pub(crate) fn records(&self) -> Vec<SetAsideRecord> {
        let files = list(&*self.disk, &self.folder).unwrap_or_default();
        files.into_iter().filter_map(|(name, _)| read(&*self.disk, &self.folder, &name).ok().flatten()).collect()
    }
}

fn folder(root: &Path) -> PathBuf {
    root.join("set-aside")
}

/// The files of the folder with their sizes, oldest record first. A folder that does not exist is empty.
fn list(disk: &dyn Disk, folder: &Path) -> io::Result<Vec<(FileName, u64)>> {
    let found = match disk.list(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        found => found?,
    };
    let mut files: Vec<(FileName, u64)> =
        found.into_iter().filter_map(|(name, bytes)| Some((FileName::decode(&name)?, bytes))).collect();
    files.sort();
    Ok(files)
}

/// Reads one record. `None` when the file is damaged or was removed meanwhile.
fn read(disk: &dyn Disk, folder: &Path, name: &FileName) -> io::Result<Option<SetAsideRecord>> {
    let bytes = match disk.read(&folder.join(name.encode()), FILE_BYTES_MAX) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        bytes => Bytes::from(bytes?),
    };
    let record = record_format::scan(name.kind, &bytes).records.into_iter().next();
    Ok(record.map(|record| SetAsideRecord { record, reason: name.reason }))
}

/// Lists the records that are set aside in the spool of this folder, oldest first. Damaged files are left out.
///
/// # Errors
/// When the folder or a file in it cannot be read.
pub fn set_aside_records(root: &Path) -> Result<Vec<SetAsideRecord>, SpoolError> {
    let folder = folder(root);
    let files = list(&RealDisk, &folder).during("list", &folder)?;
    let mut records = Vec::new();
    for (name, _) in files {
        records.extend(read(&RealDisk, &folder, &name).during("read", &folder.join(name.encode()))?);
    }
    Ok(records)
}

/// Deletes a record that is set aside. Succeeds when it does not exist.
///
/// # Errors
/// When the file cannot be removed.
pub fn drop_set_aside(root: &Path, set_aside: &SetAsideRecord) -> Result<(), SpoolError> {
    let path = folder(root).join(FileName::of(&set_aside.record, set_aside.reason).encode());
    RealDisk.remove(&path).during("remove", &path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_disk::FakeDisk;
    use crate::record::RecordId;

    fn record(position: u64, bytes: usize) -> Record {
        Record {
            id: RecordId { kind: RecordKind::Result, position },
            topic: "t".into(),
            payload: Bytes::from(vec![b'x'; bytes]),
            created_ms: position,
            ttl_seconds: 0,
        }
    }

    fn positions(store: &SetAsideFolder) -> Vec<u64> {
        store.records().iter().map(|set_aside| set_aside.record.id.position).collect()
    }

    #[test]
    fn a_record_is_stored_once_and_the_last_reason_is_kept() {
        let store = SetAsideFolder::new(Arc::new(FakeDisk::default()), Path::new("/spool"));
        for reason in [SetAsideReason::ConnectionLost, SetAsideReason::TooLarge, SetAsideReason::TooLarge] {
            assert_eq!(store.store(&record(7, 10), reason).unwrap(), 0);
        }
        assert_eq!(store.records(), [SetAsideRecord { record: record(7, 10), reason: SetAsideReason::TooLarge }]);
        assert_eq!(store.stats().records, 1);
    }

    #[test]
    fn the_oldest_records_are_dropped_at_the_bounds() {
        let store = SetAsideFolder::new(Arc::new(FakeDisk::default()), Path::new("/spool"));
        let dropped: u64 =
            (1..=7).map(|position| store.store(&record(position, 3 << 20), SetAsideReason::TooLarge).unwrap()).sum();
        assert_eq!((dropped, positions(&store)), (2, vec![3, 4, 5, 6, 7]));
    }

    #[test]
    fn names_of_other_files_are_ignored() {
        for name in ["record.tmp", "1-2-result-too_large.rec", "x.rec", "-.rec"] {
            assert_eq!(FileName::decode(name), None, "{name}");
        }
        let name = FileName::of(&record(3, 1), SetAsideReason::Unacknowledged);
        assert_eq!(FileName::decode(&name.encode()), Some(name));
    }
}
