//! A model's live versions, with the thread that dispatches their jobs.
//!
//! The dispatcher thread sleeps until a job is submitted, a worker replies or a deadline passes, and then does what the
//! [`Dispatcher`] says. Outcomes are delivered outside the lock. A version is replaced in the order: start the new worker,
//! give it the whole weight, move the waiting jobs, wait for the old worker to finish what it executes, drop it.
//!
//! A worker that ends, or exceeds its execution limit, is replaced by a thread of its own, because starting a worker takes
//! time; the jobs of the version wait meanwhile:
//!
//! ```text
//! running ──ended, or overdue──> replacing: drop the worker, record a fault of the model, wait for the restart budget, start
//!    ^                              │              │
//!    └──────── started ─────────────┘              └── too many faults, or it cannot be started ──> given up
//! ```

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lineside_api::message::ModelInfo;
use lineside_common::backoff::Backoff;
use lineside_common::supervised_child::RestartBudget;
use lineside_common::supervisor::Supervisor;
use lineside_worker::{EventSink, StartError, WorkErrorKind, Worker, WorkerEvent};
use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use crate::dispatcher::{Actions, BatchPolicy, Dispatcher, SubmitErrorKind, VersionId, WorkerSize};
use crate::fault::Fault;
use crate::job::{Job, JobOutcome};
use crate::metrics::{DeploymentMetrics, SchedulerMetrics};

/// Jobs that wait in one deployment at most.
pub const QUEUE_MAX: usize = 256;
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
/// Longest time that [`Deployment::stop`] waits for the jobs that are executed.
const STOP_TIMEOUT: Duration = Duration::from_millis(1500);
/// The dispatcher looks after everything at least this often.
const IDLE: Duration = Duration::from_secs(3600);

/// Starts a worker of one version. Called again when the worker has to be replaced. It may block.
pub type WorkerFactory = Box<dyn Fn(EventSink) -> Result<Box<dyn Worker>, StartError> + Send + Sync>;

/// Records a fault of the model, with its description. Returns a reason where the version is to be given up. It may block.
pub type FaultRecorder = Box<dyn Fn(&str) -> Option<String> + Send + Sync>;

/// A version to serve.
pub struct VersionSpec {
    /// What results say of the version. The engine is that of the worker.
    pub info: ModelInfo,
    /// Its share of new jobs, relative to the other versions.
    pub weight: u32,
    /// Batching and limits.
    pub policy: BatchPolicy,
    /// Starts its worker.
    pub worker: WorkerFactory,
    /// Records that the version made its worker end or hang.
    pub on_fault: FaultRecorder,
}

/// A model's place on this node. It outlives the versions that serve in it.
pub struct Deployment {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    model: String,
    state: Mutex<State>,
    /// Notified when there may be something to dispatch.
    work: Condvar,
    /// Notified when a version may have become idle.
    idle: Condvar,
    stable: watch::Sender<Option<Arc<ModelInfo>>>,
    metrics: DeploymentMetrics,
}

struct State {
    dispatcher: Dispatcher,
    workers: BTreeMap<VersionId, LiveWorker>,
    /// Versions that were given up, with the reason.
    failed: HashMap<VersionId, String>,
    /// Replies whose outcomes are being delivered, by version.
    delivering: HashMap<VersionId, usize>,
    is_stopped: bool,
}

struct LiveWorker {
    /// `None` while it is replaced.
    worker: Option<Arc<dyn Worker>>,
    /// Counts the workers of the version; events of earlier workers are ignored.
    generation: u64,
    version: Arc<ServedVersion>,
    budget: RestartBudget,
    /// Processor time at the last look at a worker that takes long, and the number of looks.
    looks: (Option<Duration>, u32),
}

/// What does not change while a version serves.
struct ServedVersion {
    id: VersionId,
    info: Arc<ModelInfo>,
    execution_limit: Duration,
    factory: WorkerFactory,
    on_fault: FaultRecorder,
}

/// A worker that has to be replaced.
struct Replacement {
    version: Arc<ServedVersion>,
    worker: Option<Arc<dyn Worker>>,
    fault: Fault,
    why: String,
    delay: Duration,
    generation: u64,
}

impl Deployment {
    /// A deployment in which no version serves yet. A panic of its dispatcher thread is reported to the supervisor as a failure
    /// that ends the process: the jobs that the thread held would be lost.
    ///
    /// # Errors
    /// When the dispatcher thread cannot be started.
    pub fn new(model: &str, metrics: &SchedulerMetrics, supervisor: &Supervisor) -> io::Result<Self> {
        let state = State {
            dispatcher: Dispatcher::new(QUEUE_MAX),
            workers: BTreeMap::new(),
            failed: HashMap::new(),
            delivering: HashMap::new(),
            is_stopped: false,
        };
        let shared = Arc::new(Shared {
            model: model.to_owned(),
            state: Mutex::new(state),
            work: Condvar::new(),
            idle: Condvar::new(),
            stable: watch::Sender::new(None),
            metrics: metrics.of_model(model),
        });
        let (dispatching, supervisor, task) = (shared.clone(), supervisor.clone(), format!("dispatcher/{model}"));
        let thread = std::thread::Builder::new().name(format!("q-{model}")).spawn(move || {
            let reporter = supervisor.reporter(&task);
            dispatching.run();
            reporter.done();
        })?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// The model's name.
    pub fn model(&self) -> &str {
        &self.shared.model
    }

    /// The stable version: the one with the largest weight. `None` while no version serves.
    pub fn stable(&self) -> watch::Receiver<Option<Arc<ModelInfo>>> {
        self.shared.stable.subscribe()
    }

    /// The stable version now.
    pub fn serving(&self) -> Option<Arc<ModelInfo>> {
        self.shared.stable.borrow().clone()
    }

    /// Submits a job.
    ///
    /// # Errors
    /// The job itself, with the reason why it is not accepted.
    #[expect(clippy::result_large_err, reason = "the job goes back to its owner; a box per refused frame costs more")]
    pub fn submit(&self, job: Job) -> Result<(), (Job, SubmitErrorKind)> {
        let mut state = self.shared.state.lock();
        let accepted = state.dispatcher.submit(job);
        self.shared.metrics.set_waiting(state.dispatcher.waiting());
        drop(state);
        let evicted = accepted.inspect_err(|(_, kind)| {
            if *kind == SubmitErrorKind::QueueFull {
                self.shared.metrics.rejected.inc();
            }
        })?;
        self.shared.work.notify_one();
        if let Some(job) = evicted {
            self.shared.metrics.rejected.inc();
            deliver(vec![(job, JobOutcome::Cancelled)]);
        }
        Ok(())
    }

    /// Starts a version beside those that serve. Blocks until its worker is ready.
    ///
    /// # Errors
    /// When its worker cannot be started.
    pub fn add(&self, spec: VersionSpec) -> Result<VersionId, StartError> {
        let (version, _) = self.start_version(spec, false)?;
        Ok(version.id)
    }

    /// Starts a version's worker and adds the version. With `takes_over`, the weight of the others becomes 0 in the same step:
    /// once the new stable version is published, no later job goes to another one. Returns the others.
    fn start_version(
        &self,
        spec: VersionSpec,
        takes_over: bool,
    ) -> Result<(Arc<ServedVersion>, Vec<VersionId>), StartError> {
        let VersionSpec { info, weight, policy, worker: factory, on_fault } = spec;
        let id = self.shared.state.lock().dispatcher.reserve();
        let worker: Arc<dyn Worker> = factory(self.shared.event_sink(id, 0))?.into();
        let info = Arc::new(ModelInfo { engine: worker.engine().to_owned(), ..info });
        let execution_limit = policy.execution_limit;
        let version = Arc::new(ServedVersion { id, info, execution_limit, factory, on_fault });
        let mut state = self.shared.state.lock();
        let others = state.dispatcher.versions();
        let size = WorkerSize { capacity: worker.capacity(), instances: worker.instances() };
        let (first, cap) = RESTART_DELAY;
        let live = LiveWorker {
            worker: Some(worker),
            generation: 0,
            version: version.clone(),
            budget: RestartBudget::new(RESTARTS_MAX, Backoff::new(first, cap)),
            looks: (None, 0),
        };
        state.workers.insert(id, live);
        state.dispatcher.add(id, version.info.clone(), weight, policy, size);
        if takes_over {
            others.iter().for_each(|other| state.dispatcher.set_weight(*other, 0));
        }
        self.shared.publish(&state);
        Ok((version, others))
    }

    /// Changes the share of new jobs that a version takes.
    pub fn set_weight(&self, id: VersionId, weight: u32) {
        let mut state = self.shared.state.lock();
        state.dispatcher.set_weight(id, weight);
        self.shared.publish(&state);
    }

    /// Lets a version take over from all others. Blocks until the others have finished the jobs they execute; call it where
    /// blocking is allowed.
    ///
    /// # Errors
    /// When the worker cannot be started; then the versions before serve on.
    pub fn replace(&self, spec: VersionSpec) -> Result<(VersionId, Arc<ModelInfo>), StartError> {
        let (version, others) = self.start_version(VersionSpec { weight: spec.weight.max(1), ..spec }, true)?;
        self.retire(&others, None);
        Ok((version.id, version.info.clone()))
    }

    /// Stops serving. Blocks until the jobs that are executed have ended, at most [`STOP_TIMEOUT`]: then they fail. Waiting jobs
    /// are cancelled.
    pub fn stop(&self) {
        let all = self.shared.state.lock().dispatcher.versions();
        self.retire(&all, Some(Instant::now() + STOP_TIMEOUT));
    }

    /// Why the last version was given up, where that happened since it was added.
    pub fn failure(&self, id: VersionId) -> Option<String> {
        self.shared.state.lock().failed.get(&id).cloned()
    }

    /// Removes versions when they are idle, or at the deadline.
    fn retire(&self, versions: &[VersionId], deadline: Option<Instant>) {
        let shared = &self.shared;
        let mut ended = Vec::new();
        let mut state = shared.state.lock();
        for id in versions {
            state.dispatcher.set_weight(*id, 0);
        }
        for id in versions {
            ended.extend(state.dispatcher.move_waiting(*id));
        }
        shared.publish(&state);
        shared.work.notify_one();
        drop(state);
        deliver(ended);
        let mut state = shared.state.lock();
        let (mut retired, mut abandoned) = (Vec::new(), Vec::new());
        for id in versions {
            while !state.dispatcher.is_idle(*id) || state.delivering.contains_key(id) {
                // Without a deadline this ends too: the dispatcher gives up a batch that exceeds its limit.
                let Some(deadline) = deadline else {
                    shared.idle.wait(&mut state);
                    continue;
                };
                if shared.idle.wait_until(&mut state, deadline).timed_out() {
                    abandoned.extend(state.dispatcher.abandon(*id, "the deployment was stopped first"));
                    break;
                }
            }
            retired.extend(state.workers.remove(id));
            state.failed.remove(id);
            abandoned.extend(state.dispatcher.remove(*id));
        }
        drop(state);
        shared.count(&abandoned);
        deliver(abandoned);
        drop(retired);
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.is_stopped = true;
        let versions = state.dispatcher.versions();
        let ended: Vec<(Job, JobOutcome)> = versions.into_iter().flat_map(|id| state.dispatcher.remove(id)).collect();
        let workers = std::mem::take(&mut state.workers);
        self.shared.publish(&state);
        self.shared.metrics.set_waiting(0);
        drop(state);
        self.shared.work.notify_all();
        deliver(ended);
        drop(workers);
        if let Some(thread) = self.thread.lock().take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!(event = "dispatcher_panicked", model = self.shared.model, "The dispatcher thread panicked");
        }
    }
}

impl Shared {
    /// Where a worker of a version sends its events. It does not keep the deployment alive.
    fn event_sink(self: &Arc<Self>, id: VersionId, generation: u64) -> EventSink {
        let shared: Weak<Self> = Arc::downgrade(self);
        Box::new(move |event| {
            let Some(shared) = shared.upgrade() else { return };
            let mut state = shared.state.lock();
            if state.workers.get(&id).is_none_or(|live| live.generation != generation) {
                return;
            }
            let ended = match event {
                WorkerEvent::Reply(reply) => state.dispatcher.on_reply(id, reply, Instant::now()),
                WorkerEvent::Ended { reason, is_external } => {
                    shared.begin_replacement(&mut state, id, is_external, &reason)
                }
            };
            *state.delivering.entry(id).or_default() += 1;
            drop(state);
            shared.work.notify_one();
            shared.count(&ended);
            deliver(ended);
            let mut state = shared.state.lock();
            if let Some(count) = state.delivering.get_mut(&id) {
                *count -= 1;
                if *count == 0 {
                    state.delivering.remove(&id);
                }
            }
            drop(state);
            shared.idle.notify_all();
        })
    }

    fn publish(&self, state: &State) {
        let stable = state.dispatcher.stable();
        self.stable.send_if_modified(|known| {
            let is_new = *known != stable;
            *known = stable;
            is_new
        });
    }

    fn count(&self, ended: &[(Job, JobOutcome)]) {
        for (_, outcome) in ended {
            self.metrics.count(&self.model, outcome);
        }
    }

    fn run(self: &Arc<Self>) {
        let mut state = self.state.lock();
        while !state.is_stopped {
            let now = Instant::now();
            let Actions { batches, mut ended, overdue, wake_at } = state.dispatcher.poll(now);
            let is_idle = batches.is_empty() && ended.is_empty() && overdue.is_empty();
            for (id, batch, items) in batches {
                self.metrics.batch_size.observe(items.len() as f64);
                let worker = state.workers.get(&id).and_then(|live| live.worker.clone());
                match worker.map(|worker| worker.submit(batch, items)) {
                    Some(Err(error)) if error.kind() == WorkErrorKind::Frame => {
                        ended.extend(state.dispatcher.on_refused(id, batch, &error));
                    }
                    Some(Err(error)) => {
                        ended.extend(self.begin_replacement(&mut state, id, false, &error.to_string()));
                    }
                    Some(Ok(())) | None => {}
                }
            }
            for id in overdue {
                ended.extend(self.on_overdue(&mut state, id, now));
            }
            self.metrics.set_waiting(state.dispatcher.waiting());
            if is_idle {
                let wait = wake_at.map_or(IDLE, |at| at.saturating_duration_since(now));
                self.work.wait_for(&mut state, wait.max(Duration::from_micros(50)));
                continue;
            }
            drop(state);
            self.count(&ended);
            deliver(ended);
            self.idle.notify_all();
            state = self.state.lock();
        }
    }

    /// A worker has executed a batch for longer than its limit. On a node that is overloaded, or throttled by its cgroup, a
    /// worker that got less than half of the processor time is given the limit again, some times.
    fn on_overdue(self: &Arc<Self>, state: &mut State, id: VersionId, now: Instant) -> Vec<(Job, JobOutcome)> {
        let used = state.workers.get(&id).and_then(|live| live.worker.as_ref()).map(|worker| worker.cpu_time());
        if let (Some(live), Some(Some(used))) = (state.workers.get_mut(&id), used) {
            let (before, looks) = live.looks;
            let limit = live.version.execution_limit;
            let has_run = before.is_some_and(|before| used.saturating_sub(before) >= limit / 2);
            if !has_run && looks < EXTENSIONS_MAX {
                live.looks = (Some(used), looks + 1);
                state.dispatcher.extend_limit(id, now);
                return Vec::new();
            }
        }
        self.begin_replacement(state, id, false, OVERDUE)
    }

    /// Takes the worker of a version away and starts a thread that replaces it. Returns the jobs that have failed.
    fn begin_replacement(
        self: &Arc<Self>,
        state: &mut State,
        id: VersionId,
        is_external: bool,
        why: &str,
    ) -> Vec<(Job, JobOutcome)> {
        let Some(live) = state.workers.get_mut(&id) else { return Vec::new() };
        let Some(worker) = live.worker.take() else { return Vec::new() };
        live.generation += 1;
        live.looks = (None, 0);
        let (mut ended, fault) = state.dispatcher.on_worker_ended(id, &worker.activity(), is_external, why);
        let version = live.version.clone();
        let replacement = Replacement {
            version: version.clone(),
            worker: Some(worker),
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
    let (first, cap) = RESTART_DELAY;
    let mut backoff = Backoff::new(first, cap);
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

/// Hands outcomes to their clients. A client that panics costs its own job and no other.
fn deliver(ended: Vec<(Job, JobOutcome)>) {
    for (job, outcome) in ended {
        if catch_unwind(AssertUnwindSafe(|| job.end(outcome))).is_err() {
            tracing::error!(event = "job_sink_panicked", "The client of a job panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use bytes::Bytes;
    use lineside_api::prediction::{Inspection, Prediction, Timings};
    use lineside_common::metrics::Registrar;
    use lineside_ipc::frame::Frame;
    use lineside_worker::{Activity, BatchId, BatchReply, Stage, WorkError, WorkItem};

    use super::*;
    use crate::job::Priority;

    /// A worker that the test plays: batches come out of a channel, and replies are given by hand.
    struct ManualWorker(Sender<(BatchId, usize)>, Arc<Mutex<Vec<Activity>>>);

    impl Worker for ManualWorker {
        fn submit(&self, batch: BatchId, items: Vec<WorkItem>) -> Result<(), WorkError> {
            self.0
                .send((batch, items.len()))
                .map_err(|_| WorkError::new(lineside_worker::WorkErrorKind::Worker, "the worker has ended"))
        }

        fn capacity(&self) -> usize {
            2
        }

        fn instances(&self) -> usize {
            1
        }

        fn engine(&self) -> &str {
            "test"
        }

        fn activity(&self) -> Vec<Activity> {
            self.1.lock().clone()
        }

        fn cpu_time(&self) -> Option<Duration> {
            None
        }
    }

    /// The batches of a version, and the sinks of its workers, the newest last.
    struct Played {
        batches: Receiver<(BatchId, usize)>,
        sinks: Arc<Mutex<Vec<EventSink>>>,
        activity: Arc<Mutex<Vec<Activity>>>,
    }

    impl Played {
        fn next(&self) -> (BatchId, usize) {
            self.batches.recv_timeout(Duration::from_secs(60)).unwrap()
        }

        fn reply(&self, (batch, size): (BatchId, usize)) {
            let inspection = || Inspection {
                prediction: Prediction::Anomaly { score: 0.0, map: None },
                width: 1,
                height: 1,
                timings: Timings::default(),
                rule: None,
            };
            let results = (0..size).map(|_| Ok(inspection())).collect();
            self.sinks.lock().last().unwrap()(WorkerEvent::Reply(BatchReply { batch, results }));
        }
    }

    fn version(number: u64, execution_limit: Duration) -> (VersionSpec, Played) {
        let (send, batches) = channel();
        let sinks: Arc<Mutex<Vec<EventSink>>> = Arc::default();
        let activity: Arc<Mutex<Vec<Activity>>> = Arc::default();
        let (kept, stated) = (sinks.clone(), activity.clone());
        let worker: WorkerFactory = Box::new(move |sink| {
            kept.lock().push(sink);
            Ok(Box::new(ManualWorker(send.clone(), stated.clone())))
        });
        let info = ModelInfo {
            name: "m".into(),
            version: number,
            digest: String::new(),
            engine: String::new(),
            device: "cpu".into(),
        };
        let policy = BatchPolicy { execution_limit, ..BatchPolicy::default() };
        let faults = Mutex::new(0);
        let on_fault: FaultRecorder = Box::new(move |why| {
            let mut faults = faults.lock();
            *faults += 1;
            (*faults >= 3).then(|| format!("{why}, {faults} times"))
        });
        (VersionSpec { info, weight: 1, policy, worker, on_fault }, Played { batches, sinks, activity })
    }

    fn deployment() -> (Arc<Deployment>, Registrar) {
        let registrar = Registrar::default();
        let metrics = SchedulerMetrics::register(&registrar).unwrap();
        let supervisor =
            Supervisor::new(registrar.counters("task_restarts_total", "Failed tasks.", &["task"]).unwrap());
        (Arc::new(Deployment::new("m", &metrics, &supervisor).unwrap()), registrar)
    }

    fn submit(deployment: &Deployment, outcomes: &Sender<String>) {
        let outcomes = outcomes.clone();
        let sink = Box::new(move |outcome| {
            let text = match outcome {
                JobOutcome::Answered(answer) => format!("answered by {}", answer.model.version),
                JobOutcome::Failed(_, error) => format!("failed: {error}"),
                other => format!("{other:?}"),
            };
            drop(outcomes.send(text));
        });
        let job = Job::new(Frame::encoded(Bytes::new(), None, false), Priority::Stream, None, sink);
        assert!(deployment.submit(job).is_ok());
    }

    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn a_version_takes_over_after_the_one_before_has_finished_its_jobs() {
        let (deployment, registrar) = deployment();
        let (first, one) = version(1, LONG);
        deployment.add(first).unwrap();
        assert_eq!(deployment.serving().map(|info| info.version), Some(1));
        let (outcome, outcomes) = channel();
        submit(&deployment, &outcome);
        let executing = one.next();
        let (second, two) = version(2, LONG);
        let replacing = deployment.clone();
        let replaced = std::thread::spawn(move || replacing.replace(second).unwrap());
        let mut stable = deployment.stable();
        while stable.borrow_and_update().as_ref().is_none_or(|info| info.version != 2) {
            std::thread::yield_now();
        }
        submit(&deployment, &outcome);
        two.reply(two.next());
        assert_eq!(outcomes.recv().unwrap(), "answered by 2");
        assert!(!replaced.is_finished(), "version 1 still executes a job");
        one.reply(executing);
        assert_eq!(outcomes.recv().unwrap(), "answered by 1");
        replaced.join().unwrap();
        let text = registrar.encode().unwrap();
        assert!(
            text.contains("lineside_inference_requests_total{model=\"m\",outcome=\"ok\",version=\"2\"} 1"),
            "{text}"
        );
    }

    #[test]
    fn a_worker_that_exceeds_its_limit_is_replaced_and_given_up_after_a_while() {
        let (deployment, _) = deployment();
        let (spec, played) = version(1, Duration::from_millis(1));
        let id = deployment.add(spec).unwrap();
        let (outcome, outcomes) = channel();
        for replacement in 1..=3 {
            submit(&deployment, &outcome);
            let mut held = played.next();
            loop {
                // The limit of a millisecond may pass before the activity is stated: then the job is executed again.
                *played.activity.lock() = vec![Activity { batch: held.0, item: 0, stage: Stage::Infer }];
                match outcomes.recv_timeout(Duration::from_millis(50)) {
                    Ok(text) => {
                        assert_eq!(
                            text, "failed: inference ended the worker: the execution limit was exceeded",
                            "{replacement}"
                        );
                        break;
                    }
                    Err(_) => held = played.batches.try_recv().unwrap_or(held),
                }
            }
        }
        let mut stable = deployment.stable();
        while stable.borrow_and_update().is_some() {
            std::thread::yield_now();
        }
        assert!(deployment.failure(id).is_some_and(|reason| reason.contains("execution limit")));
    }

    #[test]
    fn the_jobs_of_a_worker_that_ends_are_executed_by_the_next_one() {
        let (deployment, _) = deployment();
        let (spec, played) = version(1, LONG);
        deployment.add(spec).unwrap();
        let (outcome, outcomes) = channel();
        (0..3).for_each(|_| submit(&deployment, &outcome));
        let (first, _second) = (played.next(), played.next());
        *played.activity.lock() = vec![Activity { batch: first.0, item: 0, stage: Stage::Decode }];
        let ended = || WorkerEvent::Ended { reason: "signal 11".to_owned(), is_external: false };
        played.sinks.lock()[0](ended());
        assert_eq!(outcomes.recv().unwrap(), "failed: decoding the frame ended the worker: signal 11");
        for _ in 0..2 {
            let batch = played.next();
            played.reply(batch);
            assert_eq!(outcomes.recv().unwrap(), "answered by 1");
        }
        // The end of a worker that was replaced already changes nothing.
        played.sinks.lock()[0](ended());
        submit(&deployment, &outcome);
        played.reply(played.next());
        assert_eq!(outcomes.recv().unwrap(), "answered by 1");
        assert_eq!(played.sinks.lock().len(), 2);
    }

    #[test]
    fn stopping_cancels_what_waits_and_finishes_what_is_executed() {
        let (deployment, _) = deployment();
        let (spec, played) = version(1, LONG);
        deployment.add(spec).unwrap();
        let (outcome, outcomes) = channel();
        (0..3).for_each(|_| submit(&deployment, &outcome));
        let executing = [played.next(), played.next()];
        let stopping = deployment.clone();
        let stopped = std::thread::spawn(move || stopping.stop());
        assert_eq!(outcomes.recv().unwrap(), "Cancelled");
        executing.into_iter().for_each(|batch| played.reply(batch));
        stopped.join().unwrap();
        drop(outcome);
        assert_eq!(outcomes.iter().collect::<Vec<_>>(), ["answered by 1", "answered by 1"]);
        assert!(deployment.serving().is_none());
    }

    #[test]
    fn a_client_that_panics_harms_no_other_job() {
        let (deployment, _) = deployment();
        let (spec, played) = version(1, LONG);
        deployment.add(spec).unwrap();
        let panics = Job::new(
            Frame::encoded(Bytes::new(), None, false),
            Priority::Stream,
            None,
            Box::new(|_| panic!("the client panics")),
        );
        assert!(deployment.submit(panics).is_ok());
        played.reply(played.next());
        let (outcome, outcomes) = channel();
        submit(&deployment, &outcome);
        played.reply(played.next());
        assert_eq!(outcomes.recv().unwrap(), "answered by 1");
    }
}
