//! The state that the handle of the spool and its writer share. Tested through both, in `tests.rs` and `model_test.rs`.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::Notify;

use crate::metrics::{DropCounts, SpoolMetrics};
use crate::partition::Partition;
use crate::record::RecordKind;
use crate::set_aside::SetAsideStats;
use crate::stats::DiskFailure;

/// A monotonic clock: the time since a fixed moment in the past.
pub(crate) type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// Whether the publisher has a connection to a broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Connection {
    Connected,
    Disconnected,
}

/// The state, and the signals about its changes.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Wakes the writer.
    work: Condvar,
    /// Wakes callers that are blocked by a full spool.
    room: Condvar,
    /// Wakes the publisher: there may be records to take.
    pub(crate) changed: Notify,
    pub(crate) metrics: SpoolMetrics,
    clock: Clock,
    /// The time that the agent had run when the spool was opened. Added to the clock.
    clock_base_ms: u64,
}

pub(crate) struct State {
    partitions: Vec<Partition>,
    /// The last sequence number of each partition.
    sequences: [u64; 3],
    /// Only the handle changes it, when the publisher reports it.
    pub(crate) connection: Connection,
    /// The last failure of the disk, while the disk refuses writes. Only the writer changes it.
    pub(crate) degraded: Option<DiskFailure>,
    /// The records that are set aside. Only the writer changes it.
    pub(crate) set_aside: SetAsideStats,
    /// When a record was last dropped for lack of room.
    pub(crate) last_overflow_ms: Option<u64>,
    /// Whether the writer has work to do.
    has_work: bool,
    pub(crate) is_closing: bool,
}

impl State {
    pub(crate) fn partition(&mut self, kind: RecordKind) -> &mut Partition {
        &mut self.partitions[kind as usize]
    }

    pub(crate) fn partitions(&self) -> impl Iterator<Item = &Partition> {
        self.partitions.iter()
    }

    pub(crate) fn partitions_mut(&mut self) -> impl Iterator<Item = &mut Partition> {
        self.partitions.iter_mut()
    }

    /// The last sequence number of a partition.
    pub(crate) fn sequence(&mut self, kind: RecordKind) -> &mut u64 {
        &mut self.sequences[kind as usize]
    }

    /// Bytes on disk, and in memory before they are written.
    pub(crate) fn bytes(&self) -> u64 {
        self.partitions().map(Partition::bytes).sum()
    }

    /// Bytes that would be lost in a power cut.
    pub(crate) fn unsynced_bytes(&self) -> u64 {
        self.partitions().map(Partition::unsynced_bytes).sum()
    }
}

impl Shared {
    /// The state after recovery. `recovered_ms` is the time that the agent has run before.
    pub(crate) fn new(partitions: Vec<Partition>, recovered_ms: u64, clock: Clock, metrics: SpoolMetrics) -> Self {
        let state = State {
            partitions,
            sequences: [0; 3],
            connection: Connection::Disconnected,
            degraded: None,
            set_aside: SetAsideStats::default(),
            last_overflow_ms: None,
            has_work: true,
            is_closing: false,
        };
        let clock_base_ms = recovered_ms.saturating_sub(as_ms(clock()));
        Self {
            state: Mutex::new(state),
            work: Condvar::new(),
            room: Condvar::new(),
            changed: Notify::new(),
            metrics,
            clock,
            clock_base_ms,
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// The clock of the spool: milliseconds during which the agent has run.
    pub(crate) fn now_ms(&self) -> u64 {
        self.clock_base_ms + as_ms((self.clock)())
    }

    /// Changes the state, and counts the records that the change drops.
    pub(crate) fn change<R>(&self, change: impl FnOnce(&mut State, &mut DropCounts) -> R) -> R {
        let mut dropped = DropCounts::default();
        let mut state = self.state();
        let out = change(&mut state, &mut dropped);
        self.note_overflow(&mut state, &dropped);
        drop(state);
        dropped.record(&self.metrics.dropped);
        out
    }

    /// Stores the time of an overflow.
    pub(crate) fn note_overflow(&self, state: &mut State, dropped: &DropCounts) {
        if dropped.is_overflow() {
            state.last_overflow_ms = Some(self.now_ms());
        }
    }

    /// Releases the state and wakes the writer.
    pub(crate) fn wake_writer(&self, mut state: MutexGuard<'_, State>) {
        state.has_work = true;
        drop(state);
        self.work.notify_one();
    }

    /// Blocks the writer until there is work, or `timeout` has passed. Returns `false` when the spool is closing.
    pub(crate) fn wait_for_work(&self, timeout: Duration) -> bool {
        let mut state = self.state();
        if !state.has_work && !state.is_closing {
            self.work.wait_for(&mut state, timeout);
        }
        state.has_work = false;
        !state.is_closing
    }

    /// Wakes callers that are blocked by a full spool.
    pub(crate) fn wake_blocked(&self) {
        self.room.notify_all();
    }

    /// Blocks a caller until there may be room.
    pub(crate) fn wait_for_room(&self, state: &mut MutexGuard<'_, State>) {
        self.room.wait(state);
    }
}

fn as_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX / 2)
}
