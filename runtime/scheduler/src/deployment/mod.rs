//! A model's live versions, with the thread that dispatches their jobs.
//!
//! The dispatcher thread sleeps until a job is submitted, a worker replies or a deadline passes, and then does what the
//! [`Dispatcher`] says. Outcomes are delivered outside the lock. A version is replaced in the order: start the new worker,
//! give it the whole weight, move the waiting jobs, wait for the old worker to finish what it executes, drop it. A
//! worker that ends or hangs is [replaced](replacement).

mod replacement;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lineside_api::message::ModelInfo;
use lineside_common::supervised_child::RestartBudget;
use lineside_common::supervisor::Supervisor;
use lineside_worker::{EventSink, StartError, WorkErrorKind, Worker, WorkerEvent};
use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use self::replacement::{Look, restart_budget};
use crate::dispatcher::{Actions, BatchPolicy, Dispatcher, SubmitErrorKind, VersionId, WorkerSize};
use crate::job::{Job, JobOutcome};
use crate::metrics::{DeploymentMetrics, SchedulerMetrics};

/// Jobs that wait in one deployment at most.
pub const QUEUE_MAX: usize = 256;
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
    /// The last look at a batch that takes long.
    look: Option<Look>,
}

/// What does not change while a version serves.
struct ServedVersion {
    id: VersionId,
    info: Arc<ModelInfo>,
    execution_limit: Duration,
    factory: WorkerFactory,
    on_fault: FaultRecorder,
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
        let live = LiveWorker {
            worker: Some(worker),
            generation: 0,
            version: version.clone(),
            budget: restart_budget(),
            look: None,
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
            for (id, batch) in overdue {
                ended.extend(self.on_overdue(&mut state, id, batch, now));
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
mod tests;
