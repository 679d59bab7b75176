//! The queue between the line and the broker, on the disk. Nothing that makes results ever waits for the network or for
//! the disk: it appends here and goes on. The publisher takes records out, and a record is deleted only when the broker
//! has acknowledged it, when it has lived too long, or when a bound is exceeded, which is counted.
//!
//! **On the disk.** Each kind of record has a partition, a folder of its own below `spool`: `result`, `event`, `metrics`. A
//! partition is a log in segments of about 1 MiB ([`frame`] has the format). The one that is written to is called
//! `{first}.open`; a closed one `{first}-{last}-{born}-{expires}.seg`, so that a spool of a million records opens by
//! reading names. `cursor` ([`cursor`]) remembers what was delivered. `lock` is held by the agent.
//!
//! **What holds.**
//! - A record that was appended and written outlasts the process; one that was synced outlasts a power cut. It is written
//!   at once and synced within `sync_interval`, unless it was acknowledged sooner ([`writer`]).
//! - Of every record that was appended, one thing becomes true: it is acknowledged, or it is counted as dropped, by reason.
//! - A position is given once. What is recovered after a crash is a record that was appended, whole, or nothing.
//! - Records of a partition are given out in the order they were appended: those of the last connection first, then live ones,
//!   then the backlog.
//! - When the bound is exceeded, the oldest segment gives way, of metrics first, then of results, then of events
//!   ([`WhenFull`] says what else can be had). The disk holds a segment more than the bound at most.
//! - A disk that refuses to write stops nothing: records wait in memory, within [`MEMORY_BYTES_MAX`], and go to the broker
//!   from there.
//! - Age is measured in the time the agent ran, never by the wall clock: a clock that jumps expires nothing.

mod config;
mod cursor;
mod disk;
#[cfg(any(test, feature = "simulation"))]
mod fake_disk;
#[cfg(any(test, feature = "simulation"))]
pub mod model_test;
mod partition;
mod ranges;
mod record_format;
mod segment;
#[cfg(test)]
mod tests;
mod view;
mod writer;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prometheus::{IntCounter, IntCounterVec};
use rustix::fs::{FlockOperation, flock};
use tokio::sync::Notify;

pub use config::{SPOOL_MIB_DEFAULT, SpoolConfig};
use disk::{Disk, RealDisk};
use partition::Partition;
pub use view::{Listed, View};
use writer::{Found, Writer};

/// Bytes of one record at most. What is larger would be refused on the wire, again and again, and hold up all others.
pub const RECORD_BYTES_MAX: u64 = 4 << 20;
/// Bytes of records that only memory holds, while the disk refuses them.
pub const MEMORY_BYTES_MAX: u64 = 8 << 20;
/// Bytes of a segment, about; fewer where the whole spool is small.
const SEGMENT_BYTES: u64 = 1 << 20;
/// Bytes of a topic at most; MQTT's own limit.
const TOPIC_BYTES_MAX: usize = 65_535;
const LOCK: &str = "lock";
/// How long to wait for another agent to let go of the spool.
const LOCK_WAIT: Duration = Duration::from_secs(10);
/// How long the end waits for the disk.
const CLOSE_WAIT: Duration = Duration::from_secs(3);

/// What a record says. Each kind has a partition of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RecordKind {
    /// The result of an inspection.
    Result,
    /// Something happened.
    Event,
    /// How things stood.
    Metrics,
}

impl RecordKind {
    /// All of them, the most urgent first.
    pub const ALL: [Self; 3] = [Self::Result, Self::Event, Self::Metrics];
    /// All of them, the one that gives way for room first, first.
    const DROPPED_FIRST: [Self; 3] = [Self::Metrics, Self::Result, Self::Event];

    /// Its name, which is also its folder's.
    pub fn name(self) -> &'static str {
        match self {
            Self::Result => "result",
            Self::Event => "event",
            Self::Metrics => "metrics",
        }
    }
}

/// Where a record stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordId {
    /// Its partition.
    pub kind: RecordKind,
    /// Its number in the partition. No two records of a partition have the same.
    pub position: u64,
}

/// One message that waits for the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Where it stands.
    pub place: RecordId,
    /// Where it goes.
    pub topic: Arc<str>,
    /// What it says.
    pub payload: Bytes,
    /// When it was appended, in milliseconds of the time the agent ran.
    pub created_ms: u64,
    /// How long it may live, in seconds of the same; 0 is for ever.
    pub ttl_seconds: u32,
}

/// A record to be appended.
pub struct NewRecord<F> {
    /// Its partition.
    pub kind: RecordKind,
    /// Where it goes; at most 65,535 bytes.
    pub topic: Arc<str>,
    /// How long it may live; 0 is for ever. The spool's own bound holds in any case.
    pub ttl_seconds: u32,
    /// What becomes of it when there is no room.
    pub when_full: WhenFull,
    /// Makes its payload. It is given the record's number, which starts at 1 in each partition when the agent starts; it may be
    /// called again with another one, when it had to wait for room.
    pub make: F,
}

/// What becomes of a new record when there is no room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// The oldest segment gives way.
    #[default]
    DropOldest,
    /// The new record is refused.
    DropNewest,
    /// Whoever appends waits for room. For batch work that may take its time, never for a live stream.
    Block,
}

/// What came of an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AppendOutcome {
    /// The record is in, under this number.
    Kept(u64),
    /// There was no room for it. It was counted, and no number was used.
    Full,
    /// It is larger than [`RECORD_BYTES_MAX`], or than the whole spool. It was counted, and no number was used.
    TooLarge,
}

/// What a spool holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Records that are neither delivered nor given up.
    pub records: u64,
    /// Bytes on the disk, and in memory on their way to it.
    pub bytes: u64,
    /// Bytes it may take.
    pub bytes_max: u64,
    /// Age of the oldest record, to a segment, in the time the agent ran.
    pub oldest: Option<Duration>,
    /// Why the disk does not take records at present.
    pub trouble: Option<String>,
    /// Whether records gave way for room within the last minute.
    pub is_overflowing: bool,
}

/// How a spool is kept.
#[derive(Clone)]
pub struct Options {
    /// Bytes it may take on the disk; a segment more for a moment.
    pub bytes_max: u64,
    /// The longest a record may live, in seconds; 0 is for ever.
    pub age_max_seconds: u32,
    /// A record that waits for the broker is synced within this.
    pub sync_interval: Duration,
    /// Bytes of a segment.
    pub segment_bytes: u64,
    /// Bytes that only memory holds.
    pub memory_bytes_max: u64,
    /// Records given up, by reason.
    pub dropped: IntCounterVec,
    /// Bytes written to segments.
    pub written_bytes: IntCounter,
    /// Segments synced.
    pub syncs: IntCounter,
}

impl Options {
    /// The usual ones, with bounds and counters.
    pub fn new(bytes_max: u64, dropped: IntCounterVec, written_bytes: IntCounter, syncs: IntCounter) -> Self {
        Self {
            bytes_max,
            age_max_seconds: 0,
            sync_interval: Duration::from_millis(200),
            // A small spool has small segments, so that not everything goes at once when room is short.
            segment_bytes: SEGMENT_BYTES.min(bytes_max / 8),
            memory_bytes_max: MEMORY_BYTES_MAX,
            dropped,
            written_bytes,
            syncs,
        }
    }
}

/// What was dropped, for the counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Dropped {
    /// Gave way for room.
    full: u64,
    /// Lived too long.
    expired: u64,
    /// Could not be read any more.
    damaged: u64,
    /// The disk would not take it, and memory had no more room.
    disk: u64,
}

impl Dropped {
    /// All of it.
    fn total(self) -> u64 {
        self.full + self.expired + self.damaged + self.disk
    }
}

/// The time since something that is always before, which never goes back.
type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// What everybody shares.
struct Shared {
    state: Mutex<State>,
    /// Wakes the writer.
    work: Condvar,
    /// Wakes who waits for room.
    room: Condvar,
    /// Tells the publisher that there is something to take.
    changed: Notify,
    dropped: IntCounterVec,
    written_bytes: IntCounter,
    syncs: IntCounter,
    clock: Clock,
    /// Added to the clock: the time the agent ran before.
    clock_base_ms: u64,
}

struct State {
    partitions: Vec<Partition>,
    /// The last number given in each partition.
    numbers: [u64; 3],
    is_connected: bool,
    trouble: Option<String>,
    last_overflow_ms: Option<u64>,
    is_poked: bool,
    is_closing: bool,
}

impl State {
    fn partition(&mut self, kind: RecordKind) -> &mut Partition {
        &mut self.partitions[kind as usize]
    }

    fn bytes(&self) -> u64 {
        self.partitions.iter().map(Partition::bytes).sum()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics while it holds the lock, so a poisoned one is as good as any.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        self.clock_base_ms + u64::try_from((self.clock)().as_millis()).unwrap_or(u64::MAX / 2)
    }

    /// Changes the state and counts what was dropped by it.
    fn change<R>(&self, change: impl FnOnce(&mut State, &mut Dropped) -> R) -> R {
        let mut dropped = Dropped::default();
        let mut state = self.state();
        let out = change(&mut state, &mut dropped);
        if dropped.full + dropped.disk > 0 {
            state.last_overflow_ms = Some(self.now_ms());
        }
        drop(state);
        self.count(dropped);
        out
    }

    fn count(&self, dropped: Dropped) {
        for (reason, count) in
            [("full", dropped.full), ("expired", dropped.expired), ("damaged", dropped.damaged), ("disk", dropped.disk)]
        {
            if count > 0 {
                self.dropped.with_label_values(&[reason]).inc_by(count);
            }
        }
    }

    fn poke(&self, mut state: MutexGuard<'_, State>) {
        state.is_poked = true;
        drop(state);
        self.work.notify_one();
    }
}

/// The spool.
pub struct Spool {
    shared: Arc<Shared>,
    options: Options,
    writer: Mutex<Option<(JoinHandle<()>, mpsc::Receiver<()>)>>,
    /// Held while the spool is open.
    _lock: Option<File>,
}

impl Spool {
    /// Opens the spool in a folder, which is made where it is missing, and starts its writer.
    ///
    /// # Errors
    /// When another agent has it, or when the folder cannot be read.
    pub fn open(folder: &Path, options: Options) -> io::Result<Arc<Self>> {
        std::fs::create_dir_all(folder)?;
        let lock = lock(folder, LOCK_WAIT)?;
        let started = Instant::now();
        let clock: Clock = Arc::new(move || started.elapsed());
        let (spool, writer) = Self::assemble(Arc::new(RealDisk), folder, options, clock, Some(lock))?;
        let shared = spool.shared.clone();
        let (ended, end) = mpsc::channel();
        let thread = std::thread::Builder::new().name("spool".to_owned()).spawn(move || {
            keep(&shared, writer);
            if ended.send(()).is_err() {
                tracing::debug!("nobody waits for the spool's end any more");
            }
        })?;
        *spool.writer.lock().unwrap_or_else(PoisonError::into_inner) = Some((thread, end));
        Ok(Arc::new(spool))
    }

    fn assemble(
        disk: Arc<dyn Disk>,
        folder: &Path,
        options: Options,
        clock: Clock,
        lock: Option<File>,
    ) -> io::Result<(Self, Writer)> {
        let Found { partitions, clock_ms } = writer::recover(&*disk, folder)?;
        let writer = Writer::new(disk, folder, &options);
        let now = u64::try_from(clock().as_millis()).unwrap_or(u64::MAX / 2);
        let shared = Shared {
            state: Mutex::new(State {
                partitions,
                numbers: [0; 3],
                is_connected: false,
                trouble: None,
                last_overflow_ms: None,
                is_poked: true,
                is_closing: false,
            }),
            work: Condvar::new(),
            room: Condvar::new(),
            changed: Notify::new(),
            dropped: options.dropped.clone(),
            written_bytes: options.written_bytes.clone(),
            syncs: options.syncs.clone(),
            clock,
            clock_base_ms: clock_ms.saturating_sub(now),
        };
        let spool = Self { shared: Arc::new(shared), options, writer: Mutex::new(None), _lock: lock };
        Ok((spool, writer))
    }

    /// Appends a record made for the next number of its partition. It waits for nothing, but with [`WhenFull::Block`].
    pub fn append(&self, mut draft: NewRecord<impl FnMut(u64) -> Bytes>) -> AppendOutcome {
        let shared = &*self.shared;
        let kind = draft.kind;
        let ttl_seconds = match (draft.ttl_seconds, self.options.age_max_seconds) {
            (0, other) | (other, 0) => other,
            (wanted, bound) => wanted.min(bound),
        };
        let mut state = shared.state();
        loop {
            let number = state.numbers[kind as usize] + 1;
            let record = Record {
                place: RecordId { kind, position: state.partition(kind).next() },
                topic: draft.topic.clone(),
                payload: (draft.make)(number),
                created_ms: shared.now_ms(),
                ttl_seconds,
            };
            let size = record_format::size(&record);
            if size > RECORD_BYTES_MAX.min(self.options.bytes_max) || record.topic.len() > TOPIC_BYTES_MAX {
                drop(state);
                shared.dropped.with_label_values(&["too_large"]).inc();
                return AppendOutcome::TooLarge;
            }
            if draft.when_full != WhenFull::DropOldest && !self.has_room(&state, size) && !state.is_closing {
                if draft.when_full == WhenFull::DropNewest {
                    state.last_overflow_ms = Some(shared.now_ms());
                    drop(state);
                    shared.count(Dropped { full: 1, ..Dropped::default() });
                    return AppendOutcome::Full;
                }
                state = shared.room.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.numbers[kind as usize] = number;
            state.partition(kind).append(record);
            let mut dropped = Dropped::default();
            self.make_room(&mut state, &mut dropped);
            if dropped.total() > 0 {
                state.last_overflow_ms = Some(shared.now_ms());
            }
            shared.poke(state);
            shared.changed.notify_one();
            shared.count(dropped);
            return AppendOutcome::Kept(number);
        }
    }

    fn has_room(&self, state: &State, bytes: u64) -> bool {
        let unsynced: u64 = state.partitions.iter().map(Partition::unsynced_bytes).sum();
        state.bytes() + bytes <= self.options.bytes_max && unsynced + bytes <= self.options.memory_bytes_max
    }

    /// Lets the oldest records go until the bounds hold.
    fn make_room(&self, state: &mut State, dropped: &mut Dropped) {
        let bytes_max = self.options.bytes_max;
        while state.bytes() > bytes_max
            && RecordKind::DROPPED_FIRST.into_iter().any(|kind| state.partition(kind).drop_oldest(dropped))
        {}
        // What is in no segment yet is bounded by less: it is the disk that does not keep up.
        let unsynced = |state: &State| state.partitions.iter().map(Partition::unsynced_bytes).sum::<u64>();
        while unsynced(state) > self.options.memory_bytes_max.min(bytes_max)
            && RecordKind::DROPPED_FIRST.into_iter().any(|kind| state.partition(kind).drop_from_memory(dropped))
        {
        }
    }

    /// The publisher has a connection. What was on the way on the last one is given out again first; what waits is the
    /// backlog, and what is appended from now on is live.
    pub fn connected(&self) {
        let mut state = self.shared.state();
        state.partitions.iter_mut().for_each(Partition::connected);
        state.is_connected = true;
        self.shared.poke(state);
    }

    /// The publisher has lost its connection.
    pub fn disconnected(&self) {
        self.shared.state().is_connected = false;
    }

    /// A record that was taken could not be sent.
    pub fn requeue(&self, place: RecordId) {
        self.shared.state().partition(place.kind).requeue(place.position);
    }

    /// The next record that goes out at once: one of the last connection, which is `false`, or a live one, which is `true`.
    pub fn take(&self) -> Option<(Record, bool)> {
        let now_ms = self.shared.now_ms();
        self.shared.change(|state, dropped| {
            let again = state.partitions.iter_mut().find_map(Partition::take_again).map(|record| (record, false));
            again.or_else(|| {
                let live = state.partitions.iter_mut().find_map(|partition| partition.take_live(now_ms, dropped));
                live.map(|record| (record, true))
            })
        })
    }

    /// The next record of the backlog, of those that have been read so far. The publisher is told when there are more.
    pub fn take_backlog(&self) -> Option<Record> {
        let now_ms = self.shared.now_ms();
        let (record, is_low) = self.shared.change(|state, dropped| {
            let record = state.partitions.iter_mut().find_map(|partition| partition.take_backlog(now_ms, dropped));
            (record, state.partitions.iter().any(Partition::is_low))
        });
        if is_low {
            self.shared.poke(self.shared.state());
        }
        record
    }

    /// The broker has this record: it is forgotten. Others than those on the way are passed over.
    pub fn acknowledge(&self, place: RecordId) {
        let mut state = self.shared.state();
        if state.partition(place.kind).acknowledge(place.position) {
            self.shared.room.notify_all();
            self.shared.poke(state);
        }
    }

    /// What it holds now.
    pub fn stats(&self) -> Stats {
        let now_ms = self.shared.now_ms();
        let state = self.shared.state();
        let oldest_ms = state.partitions.iter().filter_map(Partition::oldest_ms).min();
        Stats {
            records: state.partitions.iter().map(Partition::waiting).sum(),
            bytes: state.bytes(),
            bytes_max: self.options.bytes_max,
            oldest: oldest_ms.map(|oldest| Duration::from_millis(now_ms.saturating_sub(oldest))),
            trouble: state.trouble.clone(),
            is_overflowing: state.last_overflow_ms.is_some_and(|last| now_ms.saturating_sub(last) < 60_000),
        }
    }

    /// HostSignal when there may be something to take.
    pub fn changed(&self) -> &Notify {
        &self.shared.changed
    }

    /// Brings everything to the disk and ends the writer. A disk that hangs is not waited for.
    pub fn close(&self) {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((thread, end)) = writer else { return };
        let mut state = self.shared.state();
        state.is_closing = true;
        self.shared.room.notify_all();
        self.shared.poke(state);
        match end.recv_timeout(CLOSE_WAIT) {
            Err(mpsc::RecvTimeoutError::Timeout) => tracing::error!("the disk hangs, the spool is left as it is"),
            _ => {
                if thread.join().is_err() {
                    tracing::error!("the spool's writer had panicked");
                }
            }
        }
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        self.close();
    }
}

/// The writer's thread.
fn keep(shared: &Shared, mut writer: Writer) {
    loop {
        let wait = writer.cycle(shared, shared.now_ms());
        let mut state = shared.state();
        if !state.is_poked && !state.is_closing {
            state = shared.work.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.is_poked = false;
        if state.is_closing {
            drop(state);
            return writer.finish(shared, shared.now_ms());
        }
    }
}

/// Takes the spool for this process.
fn lock(folder: &Path, wait: Duration) -> io::Result<File> {
    let path = folder.join(LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path)?;
    let begun = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() < wait => {
                std::thread::park_timeout(Duration::from_millis(100));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let why =
                    format!("another agent has {}; end it first, or give this one a folder of its own", path.display());
                return Err(io::Error::new(io::ErrorKind::WouldBlock, why));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// The spool's folder in an agent's folder.
pub fn folder(data_dir: &Path) -> PathBuf {
    data_dir.join("spool")
}
