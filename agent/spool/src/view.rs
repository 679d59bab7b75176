//! A spool looked at from outside, without changing it, while an agent may be using it: for operators.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::disk::{Disk as _, RealDisk};
use super::partition::Partition;
use super::ranges::Ranges;
use super::segment::Segment;
use super::writer::{self, folder_of};
use super::{Record, RecordKind, lock};

/// One partition as it was found.
pub struct Listed {
    /// What its records say.
    pub kind: RecordKind,
    /// Records that are neither delivered nor given up.
    pub records: u64,
    /// Bytes of its segments.
    pub bytes: u64,
    /// Its segments.
    pub segments: usize,
}

/// A spool as it was found.
pub struct View {
    root: PathBuf,
    partitions: Vec<(Listed, Vec<Segment>, Ranges, u64)>,
}

impl View {
    /// Looks at the spool in a folder.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    pub fn open(root: &Path) -> io::Result<Self> {
        let mut partitions = Vec::new();
        for kind in RecordKind::ALL {
            let folder = folder_of(root, kind);
            if !folder.is_dir() {
                return Err(io::Error::new(
                    io::ErrorKind::NotFound,
                    format!("{} holds no spool; is it the agent's?", root.display()),
                ));
            }
            let (segments, _) = writer::segments(&RealDisk, &folder, kind, false)?;
            let cursor = writer::read_cursor(&RealDisk, &folder)?;
            let (done, floor) = (cursor.done.clone(), cursor.floor);
            let bytes = segments.iter().map(|segment| segment.bytes).sum();
            let count = segments.len();
            let records = Partition::new(segments.clone().into(), cursor).waiting();
            partitions.push((Listed { kind, records, bytes, segments: count }, segments, done, floor));
        }
        Ok(Self { root: root.to_owned(), partitions })
    }

    /// Its partitions.
    pub fn partitions(&self) -> impl Iterator<Item = &Listed> {
        self.partitions.iter().map(|(listed, ..)| listed)
    }

    /// The records that wait, partition by partition, oldest first. A file that went away meanwhile was delivered.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn records(&self) -> impl Iterator<Item = io::Result<Record>> + '_ {
        self.partitions.iter().flat_map(move |(listed, segments, done, floor)| {
            let folder = folder_of(&self.root, listed.kind);
            segments.iter().flat_map(move |segment| {
                let range = segment.first..=segment.last;
                let waits = move |record: &Record| {
                    let position = record.place.position;
                    range.contains(&position) && position >= *floor && !done.contains(position)
                };
                let read = match writer::read_segment(&RealDisk, &folder, listed.kind, segment) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
                    read => read,
                };
                let (records, error) = match read {
                    Ok(records) => (records, None),
                    Err(error) => (Vec::new(), Some(Err(error))),
                };
                records.into_iter().filter(waits).map(Ok).chain(error)
            })
        })
    }

    /// Deletes the records of the partitions that are wanted, and says how many. What they were is lost.
    ///
    /// # Errors
    /// When an agent has the spool, or a file cannot be removed.
    pub fn purge(root: &Path, is_wanted: impl Fn(RecordKind) -> bool) -> io::Result<u64> {
        // A process that is being started shares its parent's files for a moment, also a lock that was just let go.
        let held = lock(root, Duration::from_secs(1))?;
        let mut purged = 0;
        // Looked at again now that nobody changes it.
        for (listed, segments, ..) in Self::open(root)?.partitions.iter().filter(|(listed, ..)| is_wanted(listed.kind))
        {
            for segment in segments {
                RealDisk.remove(&folder_of(root, listed.kind).join(&segment.name))?;
            }
            purged += listed.records;
        }
        drop(held);
        Ok(purged)
    }
}
