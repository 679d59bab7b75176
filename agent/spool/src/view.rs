//! Read access to a spool for operators, while an agent may be using it, and purging of a spool that no agent uses.
//!
//! Tested in `tests.rs`.

use std::io;
use std::path::{Path, PathBuf};

use crate::disk::{Disk as _, RealDisk};
use crate::error::{IoContext as _, SpoolError};
use crate::layout::partition_folder;
use crate::partition::Partition;
use crate::position_set::PositionSet;
use crate::record::{Record, RecordKind};
use crate::recovery::{self, AccessMode};
use crate::segment::Segment;

/// The contents of a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionStats {
    /// The kind of its records.
    pub kind: RecordKind,
    /// Pending records.
    pub records: u64,
    /// Bytes of its segments.
    pub bytes: u64,
    /// Number of its segments.
    pub segments: usize,
}

/// The contents of a spool at one moment. Opening a view changes nothing.
pub struct SpoolView {
    root: PathBuf,
    partitions: Vec<PartitionView>,
}

struct PartitionView {
    stats: PartitionStats,
    segments: Vec<Segment>,
    completed: PositionSet,
    floor: u64,
}

impl SpoolView {
    /// Reads which records the spool in a folder contains.
    ///
    /// # Errors
    /// When the folder does not contain a spool, or cannot be read.
    pub fn open(root: &Path) -> Result<Self, SpoolError> {
        let partitions = RecordKind::ALL.into_iter().map(|kind| PartitionView::open(root, kind));
        Ok(Self { root: root.to_owned(), partitions: partitions.collect::<Result<_, _>>()? })
    }

    /// The contents of each partition.
    pub fn partitions(&self) -> impl Iterator<Item = &PartitionStats> {
        self.partitions.iter().map(|partition| &partition.stats)
    }

    /// Reads the pending records, partition by partition, oldest first. The records of a segment that was removed meanwhile
    /// are completed, and left out. A segment that cannot be read yields an error in place of its records.
    pub fn records(&self) -> impl Iterator<Item = Result<Record, SpoolError>> + '_ {
        self.partitions.iter().flat_map(|partition| {
            partition.segments.iter().flat_map(|segment| match partition.read(&self.root, segment) {
                Ok(records) => records.into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            })
        })
    }
}

impl PartitionView {
    fn open(root: &Path, kind: RecordKind) -> Result<Self, SpoolError> {
        let folder = partition_folder(root, kind);
        if !folder.is_dir() {
            return Err(SpoolError::NotFound { path: root.to_owned() });
        }
        let (segments, _) = recovery::read_segments(&RealDisk, &folder, kind, AccessMode::Observer)?;
        let cursor = recovery::read_cursor(&RealDisk, &folder)?;
        let (completed, floor) = (cursor.completed.clone(), cursor.floor);
        let stats = PartitionStats {
            kind,
            bytes: segments.iter().map(|segment| segment.bytes).sum(),
            segments: segments.len(),
            records: Partition::new(segments.clone().into(), cursor).pending(),
        };
        Ok(Self { stats, segments, completed, floor })
    }

    /// Reads the pending records of a segment.
    fn read(&self, root: &Path, segment: &Segment) -> Result<Vec<Record>, SpoolError> {
        let kind = self.stats.kind;
        let folder = partition_folder(root, kind);
        let mut records = match recovery::read_records(&RealDisk, &folder, kind, segment) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            read => read.during("read", &folder.join(&segment.name))?,
        };
        let range = segment.first..=segment.last;
        records.retain(|record| {
            let position = record.id.position;
            range.contains(&position) && position >= self.floor && !self.completed.contains(position)
        });
        Ok(records)
    }
}

/// Deletes all records of the selected partitions, and returns how many were pending. The caller holds the lock of the data
/// folder, so that the contents cannot change meanwhile.
///
/// # Errors
/// When the spool cannot be read, or a file cannot be removed.
pub fn purge(root: &Path, is_selected: impl Fn(RecordKind) -> bool) -> Result<u64, SpoolError> {
    let mut purged = 0;
    let view = SpoolView::open(root)?;
    for partition in view.partitions.iter().filter(|partition| is_selected(partition.stats.kind)) {
        let folder = partition_folder(root, partition.stats.kind);
        for segment in &partition.segments {
            let path = folder.join(&segment.name);
            RealDisk.remove(&path).during("remove", &path)?;
        }
        purged += partition.stats.records;
    }
    Ok(purged)
}
