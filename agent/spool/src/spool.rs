//! The handle of a spool: appends records for producers, and delivers them to the publisher.
//!
//! Tested in `tests.rs` and `model_test.rs`.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use lineside_common::supervisor::FailureReporter;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::disk::{Disk, RealDisk};
use crate::error::SpoolError;
use crate::metrics::{DropCounts, DropReason};
use crate::options::Options;
use crate::partition::Partition;
use crate::record::{
    AppendOutcome, NewRecord, RECORD_BYTES_MAX, Record, RecordId, RecordKind, RecordOrigin, TOPIC_BYTES_MAX, WhenFull,
};
use crate::record_format;
use crate::recovery::{self, Recovered};
use crate::set_aside::SetAsideReason;
use crate::shared::{Clock, Connection, Shared, State};
use crate::stats::Stats;
use crate::writer::{self, Writer};

/// How long closing waits for the disk.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long [`Stats::is_overflowing`] stays set after a record was dropped for lack of room.
const OVERFLOW_MS: u64 = 60_000;

/// The spool.
pub struct Spool {
    pub(crate) shared: Arc<Shared>,
    bytes_max: u64,
    age_max_seconds: u32,
    memory_bytes_max: u64,
    /// `None` before the start and after the end of the writer.
    writer: Mutex<Option<WriterThread>>,
}

struct WriterThread {
    thread: JoinHandle<()>,
    /// Disconnected when the thread has ended.
    ended: mpsc::Receiver<()>,
}

impl Spool {
    /// Opens the spool in a folder, which is created when it does not exist, and starts the writer. The caller holds the lock
    /// of the data folder, so that no other process uses the spool.
    ///
    /// A disk that refuses writes does not prevent the start: the spool delivers what the disk holds, keeps new records in
    /// memory, and creates missing folders once the disk accepts writes.
    ///
    /// # Errors
    /// When the folder cannot be read, or when the writer cannot be started.
    pub fn open(folder: &Path, mut options: Options) -> Result<Arc<Self>, SpoolError> {
        let reporter = options.failure_reporter.take();
        match Self::assemble(Arc::new(RealDisk), folder, &options, since_now()) {
            Ok((spool, writer)) => spool.start(writer, reporter),
            Err(error) => {
                // The writer did not run, so it did not fail.
                reporter.into_iter().for_each(FailureReporter::done);
                Err(error)
            }
        }
    }

    /// Recovers a spool, without starting its writer.
    pub(crate) fn assemble(
        disk: Arc<dyn Disk>,
        folder: &Path,
        options: &Options,
        clock: Clock,
    ) -> Result<(Self, Writer), SpoolError> {
        let Recovered { partitions, clock_ms } = recovery::recover(&*disk, folder)?;
        let spool = Self {
            shared: Arc::new(Shared::new(partitions, clock_ms, clock, options.metrics.clone())),
            bytes_max: options.bytes_max,
            age_max_seconds: options.age_max_seconds,
            memory_bytes_max: options.memory_bytes_max,
            writer: Mutex::new(None),
        };
        let writer = Writer::new(disk, folder, options);
        spool.shared.state().set_aside = writer.set_aside_stats();
        Ok((spool, writer))
    }

    /// Starts the writer thread.
    pub(crate) fn start(self, writer: Writer, reporter: Option<FailureReporter>) -> Result<Arc<Self>, SpoolError> {
        let shared = self.shared.clone();
        let (ending, ended) = mpsc::channel::<()>();
        let thread = std::thread::Builder::new()
            .name("spool-writer".to_owned())
            .spawn(move || {
                // A panic drops the reporter, which reports the failure, and `ending`, which wakes `close`.
                writer::run(&shared, writer);
                reporter.into_iter().for_each(FailureReporter::done);
                drop(ending);
            })
            .map_err(SpoolError::Thread)?;
        *self.writer.lock() = Some(WriterThread { thread, ended });
        Ok(Arc::new(self))
    }

    /// Appends a record with the next sequence number of its partition. Blocks only with [`WhenFull::Block`].
    pub fn append(&self, mut new: NewRecord<impl FnMut(u64) -> Bytes>) -> AppendOutcome {
        let shared = &*self.shared;
        let kind = new.kind;
        let ttl_seconds = match (new.ttl_seconds, self.age_max_seconds) {
            (0, other) | (other, 0) => other,
            (ttl, age_max) => ttl.min(age_max),
        };
        let mut state = shared.state();
        loop {
            let sequence = *state.sequence(kind) + 1;
            let record = Record {
                id: RecordId { kind, position: state.partition(kind).next_position() },
                topic: new.topic.clone(),
                payload: (new.build_payload)(sequence),
                created_ms: shared.now_ms(),
                ttl_seconds,
            };
            let size = record_format::size(&record);
            let mut dropped = DropCounts::default();
            if size > RECORD_BYTES_MAX.min(self.bytes_max) || record.topic.len() > TOPIC_BYTES_MAX {
                drop(state);
                dropped.add(DropReason::TooLarge, 1);
                dropped.record(&shared.metrics.dropped);
                return AppendOutcome::TooLarge;
            }
            if new.when_full != WhenFull::DropOldest && !self.has_room(&state, size) && !state.is_closing {
                if new.when_full == WhenFull::DropNewest {
                    dropped.add(DropReason::Full, 1);
                    shared.note_overflow(&mut state, &dropped);
                    drop(state);
                    dropped.record(&shared.metrics.dropped);
                    return AppendOutcome::Full;
                }
                shared.wait_for_room(&mut state);
                continue;
            }
            *state.sequence(kind) = sequence;
            state.partition(kind).append(record);
            self.make_room(&mut state, &mut dropped);
            shared.note_overflow(&mut state, &dropped);
            shared.wake_writer(state);
            shared.changed.notify_one();
            dropped.record(&shared.metrics.dropped);
            return AppendOutcome::Appended(sequence);
        }
    }

    fn has_room(&self, state: &State, bytes: u64) -> bool {
        state.bytes() + bytes <= self.bytes_max && state.unsynced_bytes() + bytes <= self.memory_bytes_max
    }

    /// Drops the oldest records until the bounds hold.
    fn make_room(&self, state: &mut State, dropped: &mut DropCounts) {
        let mut drop_one = |state: &mut State, drop_from: fn(&mut Partition, &mut DropCounts) -> bool| {
            RecordKind::DROP_ORDER.into_iter().any(|kind| drop_from(state.partition(kind), dropped))
        };
        while state.bytes() > self.bytes_max && drop_one(state, Partition::drop_oldest_segment) {}
        // Records that are not synced have a bound of their own: it is exceeded when the disk does not keep up.
        let unsynced_bytes_max = self.memory_bytes_max.min(self.bytes_max);
        while state.unsynced_bytes() > unsynced_bytes_max && drop_one(state, Partition::drop_oldest_in_memory) {}
    }

    /// Starts a connection of the publisher. Records in flight on the last connection are delivered again first, pending
    /// records are the backlog, and records appended from now on are live.
    pub fn connected(&self) {
        let mut state = self.shared.state();
        state.partitions_mut().for_each(Partition::connected);
        state.connection = Connection::Connected;
        self.shared.wake_writer(state);
    }

    /// Ends a connection of the publisher.
    pub fn disconnected(&self) {
        self.shared.state().connection = Connection::Disconnected;
    }

    /// Returns a record that was taken and could not be sent. It is delivered again before all others.
    pub fn requeue(&self, id: RecordId) {
        self.shared.state().partition(id.kind).requeue(id.position);
    }

    /// Takes the next record to send at once: a resend, or else a live record.
    pub fn take(&self) -> Option<(Record, RecordOrigin)> {
        let now_ms = self.shared.now_ms();
        self.shared.change(|state, dropped| {
            if let Some(record) = state.partitions_mut().find_map(Partition::take_resend) {
                return Some((record, RecordOrigin::Resend));
            }
            let live = state.partitions_mut().find_map(|partition| partition.take_live(now_ms, dropped));
            live.map(|record| (record, RecordOrigin::Live))
        })
    }

    /// Takes the next record of the backlog that was read ahead. [`Self::changed`] is notified when more are ready.
    pub fn take_backlog(&self) -> Option<Record> {
        let now_ms = self.shared.now_ms();
        let (record, needs_read_ahead) = self.shared.change(|state, dropped| {
            let record = state.partitions_mut().find_map(|partition| partition.take_backlog(now_ms, dropped));
            (record, state.partitions().any(Partition::needs_read_ahead))
        });
        if needs_read_ahead {
            self.shared.wake_writer(self.shared.state());
        }
        record
    }

    /// Completes a record that the broker has acknowledged. Ignores a record that is not in flight.
    pub fn acknowledge(&self, id: RecordId) {
        let mut state = self.shared.state();
        if state.partition(id.kind).acknowledge(id.position) {
            self.shared.wake_blocked();
            self.shared.wake_writer(state);
        }
    }

    /// Sets a record aside that was taken and that the broker does not take: the writer moves it to the folder `set-aside`, and
    /// it is not delivered again unless the process ends before that. Ignores a record that is not in flight.
    pub fn set_aside(&self, id: RecordId, reason: SetAsideReason) {
        let mut state = self.shared.state();
        if state.partition(id.kind).set_aside(id.position, reason) {
            self.shared.wake_writer(state);
        }
    }

    /// The contents and the state of the spool.
    pub fn stats(&self) -> Stats {
        let now_ms = self.shared.now_ms();
        let state = self.shared.state();
        let oldest_ms = state.partitions().filter_map(Partition::oldest_ms).min();
        Stats {
            records: state.partitions().map(Partition::pending).sum(),
            bytes: state.bytes(),
            bytes_max: self.bytes_max,
            oldest: oldest_ms.map(|oldest| Duration::from_millis(now_ms.saturating_sub(oldest))),
            degraded: state.degraded.clone(),
            set_aside: state.set_aside,
            is_overflowing: state.last_overflow_ms.is_some_and(|last| now_ms.saturating_sub(last) < OVERFLOW_MS),
        }
    }

    /// Sets the gauges of [`SpoolMetrics`](crate::SpoolMetrics), for a scrape.
    pub fn update_metrics(&self) {
        self.shared.metrics.set(&self.stats());
    }

    /// Notified when there may be records to take.
    pub fn changed(&self) -> &Notify {
        &self.shared.changed
    }

    /// Writes and syncs everything, and ends the writer. Waits at most 3 seconds for a disk that does not respond.
    pub fn close(&self) {
        let Some(WriterThread { thread, ended }) = self.writer.lock().take() else { return };
        let mut state = self.shared.state();
        state.is_closing = true;
        self.shared.wake_blocked();
        self.shared.wake_writer(state);
        if let Err(mpsc::RecvTimeoutError::Timeout) = ended.recv_timeout(CLOSE_TIMEOUT) {
            tracing::error!(event = "spool_close_timed_out", "Disk does not respond; the spool is left as it is");
        } else if thread.join().is_err() {
            tracing::error!(event = "spool_writer_panicked", "Writer of the spool panicked");
        }
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        self.close();
    }
}

/// A clock that starts now.
fn since_now() -> Clock {
    let started = Instant::now();
    Arc::new(move || started.elapsed())
}
