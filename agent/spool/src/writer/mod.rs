//! The writer: the thread that performs all I/O of the spool, so that no other thread waits for the disk.
//!
//! ```text
//!   append --> written at once ----> synced in batches --> closed at its size --> removed when all records are completed
//!                   |  fails             |  fails
//!                   v                    v
//!              retried every second, in a new file; meanwhile memory holds the records, within its bound
//! ```
//!
//! Records are written at once, so that the end of the process loses no record that was written. A sync makes records survive
//! a power cut. It is performed when a record has been pending for `sync_interval`, and never for records that are
//! acknowledged earlier. So while the broker answers, the spool causes almost no wear of flash memory.
//!
//! Tested in `tests.rs` and `model_test.rs`, with a disk that has faults and a clock that is advanced by hand.

mod partition_files;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use partition_files::PartitionFiles;

use crate::disk::Disk;
use crate::metrics::DropReason;
use crate::options::Options;
use crate::partition::ReadAhead;
use crate::record::{Record, RecordKind};
use crate::recovery;
use crate::segment::Segment;
use crate::set_aside::{SetAsideFolder, SetAsideStats};
use crate::shared::{Connection, Shared};
use crate::stats::DiskFailure;

/// Bound on the bytes of synced records that stay in memory, so that live records need not be read from disk.
const CACHE_BYTES: u64 = 1 << 20;
/// Time between attempts while the disk refuses writes.
const RETRY_MS: u64 = 1000;
/// Time between runs of maintenance: expiry, removal of completed segments, the clock in the cursor.
const MAINTENANCE_MS: u64 = 10_000;
/// Attempts to read a segment before its records are dropped.
const READ_ATTEMPTS: u32 = 3;

/// The writer.
pub(crate) struct Writer {
    disk: Arc<dyn Disk>,
    partitions: Vec<PartitionFiles>,
    set_aside: SetAsideFolder,
    bytes_max: u64,
    sync_ms: u64,
    memory_bytes_max: u64,
    /// When the disk is tried again. `None` while the disk accepts writes.
    retry_at_ms: Option<u64>,
    maintenance_at_ms: u64,
}

/// What a pass over one partition does besides writing.
#[derive(Clone, Copy)]
struct Pass {
    now_ms: u64,
    is_sync_due: bool,
    is_maintenance_due: bool,
    /// Whether the spool holds more than half of its bound, so that completed segments are removed at once.
    is_crowded: bool,
    is_closing: bool,
}

/// The writer thread: runs until the spool is closed.
pub(crate) fn run(shared: &Shared, mut writer: Writer) {
    loop {
        let timeout = writer.cycle(shared, shared.now_ms());
        if !shared.wait_for_work(timeout) {
            return writer.finish(shared, shared.now_ms());
        }
    }
}

impl Writer {
    pub(crate) fn new(disk: Arc<dyn Disk>, root: &Path, options: &Options) -> Self {
        let files = |kind| PartitionFiles::new(disk.clone(), root, kind, options.segment_bytes);
        Self {
            partitions: RecordKind::ALL.into_iter().map(files).collect(),
            set_aside: SetAsideFolder::new(disk.clone(), root),
            disk,
            bytes_max: options.bytes_max,
            sync_ms: u64::try_from(options.sync_interval.as_millis()).unwrap_or(u64::MAX),
            memory_bytes_max: options.memory_bytes_max,
            retry_at_ms: None,
            maintenance_at_ms: 0,
        }
    }

    /// Does what is due, and returns the time until more is due.
    pub(crate) fn cycle(&mut self, shared: &Shared, now_ms: u64) -> Duration {
        if self.retry_at_ms.is_none_or(|at| at <= now_ms) {
            self.persist(shared, now_ms, false);
        }
        self.read_ahead(shared);
        // A disk that refuses writes is not used before the next attempt is due.
        let next_ms =
            self.retry_at_ms.unwrap_or_else(|| self.sync_at(shared).unwrap_or(u64::MAX).min(self.maintenance_at_ms));
        Duration::from_millis(next_ms.saturating_sub(now_ms).max(1))
    }

    /// When the next sync is due. `None` when no pending record is unsynced.
    fn sync_at(&self, shared: &Shared) -> Option<u64> {
        let mut state = shared.state();
        let oldest_ms =
            state.partitions_mut().filter_map(|partition| partition.oldest_unsynced_ms(CACHE_BYTES)).min()?;
        Some(oldest_ms.saturating_add(self.sync_ms))
    }

    /// Writes, syncs and closes everything, when the spool is closed.
    pub(crate) fn finish(&mut self, shared: &Shared, now_ms: u64) {
        self.persist(shared, now_ms, true);
        let lost = shared.change(|state, dropped| {
            state.partitions().for_each(|partition| partition.count_lost_at_end(dropped));
            dropped.total()
        });
        if lost > 0 {
            tracing::error!(
                event = "spool_records_lost",
                records = lost,
                "Spool closed; records held only in memory are lost"
            );
        }
        for files in &mut self.partitions {
            if let Err(error) = files.sync_cursor() {
                tracing::debug!(%error, "Cannot sync the cursor of the spool");
            }
        }
    }

    /// Brings the state to the disk. A failure is logged once, and retried until it ends.
    fn persist(&mut self, shared: &Shared, now_ms: u64, is_closing: bool) {
        let (was_degraded, unsynced_bytes) = {
            let state = shared.state();
            (state.degraded.is_some(), state.unsynced_bytes())
        };
        let is_sync_due = was_degraded
            || is_closing
            || unsynced_bytes > self.memory_bytes_max / 4
            || self.sync_at(shared).is_some_and(|sync_at_ms| sync_at_ms <= now_ms);
        let is_maintenance_due = is_closing || now_ms >= self.maintenance_at_ms;
        let mut failure = self.set_aside(shared).err();
        for files in &mut self.partitions {
            let is_crowded = shared.state().bytes() > self.bytes_max / 2;
            let pass = Pass { now_ms, is_sync_due, is_maintenance_due, is_crowded, is_closing };
            if let Err(error) = files.persist(shared, pass) {
                failure = Some(error);
            }
        }
        if is_maintenance_due {
            self.maintenance_at_ms = now_ms + MAINTENANCE_MS;
        }
        self.retry_at_ms = failure.is_some().then(|| now_ms + RETRY_MS);
        set_disk_state(shared, failure.as_ref());
    }

    /// Moves the records to the folder `set-aside` that the broker does not take. Each is completed once its copy is synced.
    fn set_aside(&self, shared: &Shared) -> io::Result<()> {
        for kind in RecordKind::ALL {
            loop {
                let next = shared.state().partition(kind).next_to_set_aside();
                let Some((record, reason)) = next else { break };
                let dropped_older = self.set_aside.store(&record, reason)?;
                let stats = self.set_aside.stats();
                shared.metrics.set_aside.inc(reason);
                shared.metrics.dropped.add(DropReason::SetAsideFull, dropped_older);
                let mut state = shared.state();
                state.set_aside = stats;
                state.partition(kind).acknowledge(record.id.position);
            }
        }
        Ok(())
    }

    pub(crate) fn set_aside_stats(&self) -> SetAsideStats {
        self.set_aside.stats()
    }

    /// Reads ahead for a connected publisher.
    fn read_ahead(&mut self, shared: &Shared) {
        for files in &mut self.partitions {
            let kind = files.kind;
            loop {
                let step = {
                    let mut state = shared.state();
                    if state.connection == Connection::Disconnected {
                        return;
                    }
                    state.partition(kind).plan_read_ahead()
                };
                match step {
                    ReadAhead::Idle => break,
                    ReadAhead::Ready => {
                        shared.changed.notify_one();
                        break;
                    }
                    ReadAhead::Segment(segment) => {
                        let Some(records) = read_segment(&*self.disk, files, &segment) else { break };
                        shared.change(|state, dropped| {
                            state.partition(kind).add_segment_records(&segment, records, dropped);
                        });
                        shared.changed.notify_one();
                    }
                }
            }
        }
    }
}

/// Reads a segment. Returns `None` when reading failed and is tried again, and no records when it failed for good.
fn read_segment(disk: &dyn Disk, files: &mut PartitionFiles, segment: &Segment) -> Option<Vec<Record>> {
    match recovery::read_records(disk, &files.folder, files.kind, segment) {
        Ok(records) => {
            files.failed_reads = 0;
            Some(records)
        }
        Err(error) => {
            files.failed_reads += 1;
            if files.failed_reads < READ_ATTEMPTS && error.kind() != io::ErrorKind::NotFound {
                return None;
            }
            files.failed_reads = 0;
            tracing::error!(
                event = "spool_segment_unreadable",
                file = segment.name,
                %error,
                "Cannot read a segment of the spool; its records are lost"
            );
            Some(Vec::new())
        }
    }
}

/// Stores whether the disk accepts writes, and logs a change.
fn set_disk_state(shared: &Shared, failure: Option<&io::Error>) {
    let was_degraded = std::mem::replace(&mut shared.state().degraded, failure.map(DiskFailure::from)).is_some();
    shared.metrics.degraded.set(i64::from(failure.is_some()));
    match failure {
        Some(error) if !was_degraded => {
            tracing::error!(
                event = "spool_disk_failed",
                %error,
                "Disk refuses writes of the spool; memory holds new records"
            );
        }
        None if was_degraded => {
            tracing::info!(event = "spool_disk_recovered", "Disk accepts writes of the spool again");
        }
        _ => {}
    }
}
