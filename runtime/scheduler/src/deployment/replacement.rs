//! Replaces workers of a deployment that end or exceed their execution limit.
//!
//! A thread of its own does it, because starting a worker takes time; the jobs of the version wait meanwhile:
//!
//! ```text
//! running ──ended, or overdue──> replacing: drop the worker, record a fault of the model, wait for the restart budget, start
//!    ^                              │              │
//!    └──────── started ─────────────┘              └── too many faults, or it cannot be started ──> given up
//! ```

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use lineside_common::backoff::Backoff;
use lineside_common::supervised_child::RestartBudget;
use lineside_worker::{BatchId, Worker};
use parking_lot::{Condvar, Mutex};

use super::{ServedVersion, Shared, State, deliver};
use crate::dispatcher::{VersionId, WorkerSize};
use crate::fault::Fault;
use crate::job::{Job, JobOutcome};

/// Failed starts of a worker in a row after which its version is given up.
const FAILED_STARTS_MAX: u32 = 3;
/// Restarts of a worker within a minute that are not delayed.
const RESTARTS_MAX: usize = 5;
/// First and longest delay of further restarts.
const RESTART_DELAY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Times that the execution limit of a worker is extended because the worker got little processor time.
const EXTENSIONS_MAX: u32 = 9;
/// The reason for the replacement of a worker that takes too long.
const OVERDUE: &str = "the execution limit was exceeded";

/// A look at a worker that executes a batch for longer than its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Look {
    batch: BatchId,
    /// Processor time of the worker at that moment.
    used: Duration,
    /// Looks at this batch.
    count: u32,
}

impl Look {
    /// The next look at a worker, after which its batch gets the limit again. `None` when the worker has had at least half of the
    /// processor time since the last look at this batch, or after too many looks.
    fn next(before: Option<Self>, batch: BatchId, used: Duration, limit: Duration) -> Option<Self> {
        // A look at an earlier batch says nothing of this one.
        let before = before.filter(|look| look.batch == batch);
        let has_run = before.is_some_and(|look| used.saturating_sub(look.used) >= limit / 2);
        let count = before.map_or(1, |look| look.count + 1);
        (!has_run && count <= EXTENSIONS_MAX).then_some(Self { batch, used, count })
    }
}

fn backoff() -> Backoff {
    let (first, cap) = RESTART_DELAY;
    Backoff::new(first, cap)
}

/// The restarts of the worker of a new version.
pub(super) fn restart_budget() -> RestartBudget {
    RestartBudget::new(RESTARTS_MAX, backoff())
}

/// A worker that has to be replaced.
struct Replacement {
    version: Arc<ServedVersion>,
    worker: Arc<dyn Worker>,
    fault: Fault,
    why: String,
    delay: Duration,
    generation: u64,
}

impl Shared {
    /// A worker has executed a batch for longer than its limit. On a node that is overloaded, or throttled by its cgroup, a
    /// worker that got less than half of the processor time is given the limit again, some times.
    pub(super) fn on_overdue(
        self: &Arc<Self>,
        state: &mut State,
        id: VersionId,
        batch: BatchId,
        now: Instant,
    ) -> Vec<(Job, JobOutcome)> {
        if let Some(live) = state.workers.get_mut(&id)
            && let Some(used) = live.worker.as_ref().and_then(|worker| worker.cpu_time())
            && let Some(look) = Look::next(live.look, batch, used, live.version.execution_limit)
        {
            live.look = Some(look);
            state.dispatcher.extend_limit(id, now);
            return Vec::new();
        }
        self.begin_replacement(state, id, false, OVERDUE)
    }

    /// Takes the worker of a version away and starts a thread that replaces it. Returns the jobs that have failed.
    pub(super) fn begin_replacement(
        self: &Arc<Self>,
        state: &mut State,
        id: VersionId,
        is_external: bool,
        why: &str,
    ) -> Vec<(Job, JobOutcome)> {
        let Some(live) = state.workers.get_mut(&id) else { return Vec::new() };
        let Some(worker) = live.worker.take() else { return Vec::new() };
        live.generation += 1;
        live.look = None;
        let (mut ended, fault) = state.dispatcher.on_worker_ended(id, &worker.activity(), is_external, why);
        let version = live.version.clone();
        let replacement = Replacement {
            version: version.clone(),
            worker,
            fault,
            why: why.to_owned(),
            delay: live.budget.next_delay(Instant::now()),
            generation: live.generation,
        };
        self.metrics.count_replacement(&version.info);
        let (shared, name) = (Arc::downgrade(self), format!("r-{}", self.model));
        let thread = std::thread::Builder::new().name(name).spawn(move || replace_worker(&shared, replacement));
        if let Err(error) = thread {
            ended.extend(self.give_up(state, &version, format!("its worker cannot be replaced: {error}")));
        }
        ended
    }

    /// Removes a version whose worker cannot be replaced.
    fn give_up(&self, state: &mut State, version: &ServedVersion, reason: String) -> Vec<(Job, JobOutcome)> {
        let (model, number) = (&self.model, version.info.version);
        tracing::error!(event = "version_given_up", model, version = number, reason, "Version is given up");
        state.workers.remove(&version.id);
        let ended = state.dispatcher.remove(version.id);
        state.failed.insert(version.id, reason);
        self.publish(state);
        ended
    }

    /// Puts a new worker into its place, or gives the version up.
    fn end_replacement(&self, version: &ServedVersion, outcome: Result<Arc<dyn Worker>, String>) {
        let mut state = self.state.lock();
        let mut unused = None;
        let ended = match outcome {
            Ok(worker) => {
                let size = WorkerSize { capacity: worker.capacity(), instances: worker.instances() };
                match state.workers.get_mut(&version.id) {
                    Some(live) => {
                        live.worker = Some(worker);
                        state.dispatcher.on_worker_started(version.id, size);
                    }
                    None => unused = Some(worker),
                }
                Vec::new()
            }
            Err(reason) if state.workers.contains_key(&version.id) => self.give_up(&mut state, version, reason),
            Err(_) => Vec::new(),
        };
        drop(state);
        drop(unused);
        self.count(&ended);
        deliver(ended);
        self.work.notify_one();
        self.idle.notify_all();
    }
}

/// Replaces a worker, on a thread of its own. It does not keep the deployment alive.
fn replace_worker(shared: &Weak<Shared>, replacement: Replacement) {
    let Replacement { version, worker, fault, why, delay, generation } = replacement;
    let (model, number) = (&version.info.name, version.info.version);
    tracing::error!(
        event = "worker_replaced",
        model,
        version = number,
        reason = why,
        fault = fault.name(),
        delay_ms = delay.as_millis() as u64,
        "Worker is replaced"
    );
    // This kills the process of a worker that hangs.
    drop(worker);
    let given_up = if fault == Fault::Model { (version.on_fault)(&why) } else { None };
    let outcome = match given_up {
        Some(reason) => Err(reason),
        None => start_again(shared, &version, delay, generation),
    };
    if let (Some(shared), Some(outcome)) = (shared.upgrade(), outcome.transpose()) {
        shared.end_replacement(&version, outcome);
    }
}

/// Starts a worker after a delay. `None` when the version is not wanted any more.
fn start_again(
    shared: &Weak<Shared>,
    version: &ServedVersion,
    delay: Duration,
    generation: u64,
) -> Result<Option<Arc<dyn Worker>>, String> {
    let mut backoff = backoff();
    let mut delay = delay;
    for attempt in 1.. {
        wait(delay);
        let Some(sink) = shared.upgrade().and_then(|shared| {
            let is_wanted = shared.state.lock().workers.contains_key(&version.id);
            is_wanted.then(|| shared.event_sink(version.id, generation))
        }) else {
            return Ok(None);
        };
        match (version.factory)(sink) {
            Ok(worker) => return Ok(Some(worker.into())),
            Err(error) if attempt >= FAILED_STARTS_MAX => return Err(format!("its worker cannot be started: {error}")),
            Err(_) => delay = backoff.next_delay(),
        }
    }
    Ok(None)
}

/// Blocks this thread, which does nothing else.
fn wait(delay: Duration) {
    let (never, lock) = (Condvar::new(), Mutex::new(()));
    never.wait_for(&mut lock.lock(), delay);
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(2);

    #[test]
    fn a_worker_without_processor_time_gets_the_limit_again_some_times() {
        let mut look = None;
        for _ in 0..EXTENSIONS_MAX {
            look = Look::next(look, 1, Duration::from_secs(7), LIMIT);
            assert!(look.is_some());
        }
        assert_eq!(Look::next(look, 1, Duration::from_secs(7), LIMIT), None);
    }

    #[test]
    fn a_worker_that_runs_is_given_up_and_time_spent_on_earlier_batches_does_not_count() {
        let first = Look::next(None, 1, Duration::from_secs(10), LIMIT);
        assert_eq!(Look::next(first, 1, Duration::from_secs(11), LIMIT), None);
        let second = Look::next(first, 2, Duration::from_secs(3600), LIMIT);
        assert_eq!(second, Some(Look { batch: 2, used: Duration::from_secs(3600), count: 1 }));
    }
}
