//! A model's live versions, with the thread that dispatches their jobs.
//!
//! The dispatcher thread sleeps until a job is submitted, a worker replies or a deadline passes, and then does what the
//! [`Dispatcher`] says. Outcomes are delivered outside the lock. A version is replaced in the order: start the new worker,
//! give it the whole weight, move the waiting jobs, wait for the old worker to finish what it executes, drop it.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lineside_api::message::ModelInfo;
use lineside_common::supervisor::Supervisor;
use lineside_worker::{ReplySink, Worker};
use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use crate::dispatcher::{Actions, BatchPolicy, Dispatcher, SubmitErrorKind, VersionId};
use crate::job::{Job, JobOutcome};
use crate::metrics::{DeploymentMetrics, SchedulerMetrics};

/// Jobs that wait in one deployment at most.
pub const QUEUE_MAX: usize = 256;
/// A version whose workers hang or end more often than this is given up.
const REPLACEMENTS_MAX: u32 = 3;
/// A worker that ran for this long was healthy: its replacement counts as the first one.
const REPLACEMENT_WINDOW: Duration = Duration::from_secs(600);
/// Longest time that [`Deployment::stop`] waits for the jobs that are executed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// The dispatcher looks after everything at least this often.
const IDLE: Duration = Duration::from_secs(3600);

/// Starts a worker of one version. Called again when the worker has to be replaced.
pub type WorkerFactory = Box<dyn Fn(ReplySink) -> io::Result<Box<dyn Worker>> + Send + Sync>;

/// A version to serve.
pub struct VersionSpec {
    /// What results say of the version.
    pub info: Arc<ModelInfo>,
    /// Its share of new jobs, relative to the other versions.
    pub weight: u32,
    /// Batching and limits.
    pub policy: BatchPolicy,
    /// Starts its worker.
    pub worker: WorkerFactory,
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
    worker: Box<dyn Worker>,
    factory: WorkerFactory,
    info: Arc<ModelInfo>,
    /// Replacements that followed each other within [`REPLACEMENT_WINDOW`].
    replacements: u32,
    replaced_at: Option<Instant>,
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

    /// Starts a version beside those that serve.
    ///
    /// # Errors
    /// When its worker cannot be started.
    pub fn add(&self, spec: VersionSpec) -> io::Result<VersionId> {
        let (id, _) = self.start_version(spec, false)?;
        Ok(id)
    }

    /// Starts a version's worker and adds the version. With `takes_over`, the weight of the others becomes 0 in the same step:
    /// whoever sees the new stable version can be sure that no later job goes to another one. Returns the others.
    fn start_version(&self, spec: VersionSpec, takes_over: bool) -> io::Result<(VersionId, Vec<VersionId>)> {
        let VersionSpec { info, weight, policy, worker: factory } = spec;
        let id = self.shared.state.lock().dispatcher.reserve();
        let worker = factory(self.shared.reply_sink(id))?;
        let mut state = self.shared.state.lock();
        let others = state.dispatcher.versions();
        let capacity = worker.capacity();
        state
            .workers
            .insert(id, LiveWorker { worker, factory, info: info.clone(), replacements: 0, replaced_at: None });
        state.dispatcher.add(id, info, weight, policy, capacity);
        if takes_over {
            others.iter().for_each(|other| state.dispatcher.set_weight(*other, 0));
        }
        self.shared.publish(&state);
        Ok((id, others))
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
    pub fn replace(&self, spec: VersionSpec) -> io::Result<VersionId> {
        let (id, others) = self.start_version(VersionSpec { weight: spec.weight.max(1), ..spec }, true)?;
        self.retire(&others, None);
        Ok(id)
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
                    abandoned.extend(state.dispatcher.abandon(*id, "it did not end before the deployment was stopped"));
                    break;
                }
            }
            retired.extend(state.workers.remove(id));
            state.failed.remove(id);
            drop(state.dispatcher.remove(*id));
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
    /// Where a worker of a version sends its replies. It does not keep the deployment alive.
    fn reply_sink(self: &Arc<Self>, id: VersionId) -> ReplySink {
        let shared: Weak<Self> = Arc::downgrade(self);
        Box::new(move |reply| {
            let Some(shared) = shared.upgrade() else { return };
            let mut state = shared.state.lock();
            let ended = state.dispatcher.on_reply(id, reply);
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
            let Actions { batches, mut ended, hung, wake_at } = state.dispatcher.poll(now);
            let is_idle = batches.is_empty() && ended.is_empty() && hung.is_empty();
            for (id, batch, items) in batches {
                self.metrics.batch_size.observe(items.len() as f64);
                let submitted = state.workers.get(&id).map(|live| live.worker.submit(batch, items));
                if let Some(Err(error)) = submitted {
                    ended.extend(self.replace_worker(&mut state, id, &error.to_string()));
                }
            }
            for id in hung {
                ended.extend(self.replace_worker(&mut state, id, "the execution limit was exceeded"));
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

    /// Replaces the worker of a version. The batch it executes fails. After [`REPLACEMENTS_MAX`] the version is given up and
    /// all its jobs fail.
    fn replace_worker(self: &Arc<Self>, state: &mut State, id: VersionId, why: &str) -> Vec<(Job, JobOutcome)> {
        let mut ended = state.dispatcher.abandon(id, why);
        let Some(live) = state.workers.get_mut(&id) else { return ended };
        let is_recent = live.replaced_at.is_some_and(|at| at.elapsed() < REPLACEMENT_WINDOW);
        live.replacements = if is_recent { live.replacements + 1 } else { 1 };
        live.replaced_at = Some(Instant::now());
        let (model, version) = (&self.model, live.info.version);
        self.metrics.count_replacement(&live.info);
        tracing::error!(event = "worker_replaced", model, version, reason = why, "Worker is replaced");
        let started = match live.replacements > REPLACEMENTS_MAX {
            true => Err(format!("{why}, {} times", live.replacements)),
            false => (live.factory)(self.reply_sink(id)).map_err(|error| error.to_string()),
        };
        match started {
            Ok(worker) => live.worker = worker,
            Err(reason) => {
                tracing::error!(event = "version_given_up", model, version, reason, "Version is given up");
                state.workers.remove(&id);
                ended.extend(state.dispatcher.remove(id));
                state.failed.insert(id, reason);
                self.publish(state);
            }
        }
        ended
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
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use bytes::Bytes;
    use lineside_api::prediction::{Inspection, Prediction, Timings};
    use lineside_common::metrics::Registrar;
    use lineside_ipc::frame::Frame;
    use lineside_worker::{BatchId, BatchReply, WorkError, WorkItem};

    use super::*;
    use crate::job::Priority;

    /// A worker that the test plays: batches come out of a channel, and replies are given by hand.
    struct ManualWorker(Sender<(BatchId, usize)>);

    impl Worker for ManualWorker {
        fn submit(&self, batch: BatchId, items: Vec<WorkItem>) -> Result<(), WorkError> {
            self.0
                .send((batch, items.len()))
                .map_err(|_| WorkError::new(lineside_worker::WorkErrorKind::Worker, "the worker has ended"))
        }

        fn capacity(&self) -> usize {
            2
        }
    }

    /// The batches of a version, and the sinks of its workers, the newest last.
    struct Played {
        batches: Receiver<(BatchId, usize)>,
        sinks: Arc<Mutex<Vec<ReplySink>>>,
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
            };
            let results = (0..size).map(|_| Ok(inspection())).collect();
            self.sinks.lock().last().unwrap()(BatchReply { batch, results });
        }
    }

    fn version(number: u64, execution_limit: Duration) -> (VersionSpec, Played) {
        let (send, batches) = channel();
        let sinks: Arc<Mutex<Vec<ReplySink>>> = Arc::default();
        let kept = sinks.clone();
        let worker: WorkerFactory = Box::new(move |sink| {
            kept.lock().push(sink);
            Ok(Box::new(ManualWorker(send.clone())))
        });
        let info = ModelInfo {
            name: "m".into(),
            version: number,
            digest: String::new(),
            engine: "test".into(),
            device: "cpu".into(),
        };
        let policy = BatchPolicy { execution_limit, ..BatchPolicy::default() };
        (VersionSpec { info: Arc::new(info), weight: 1, policy, worker }, Played { batches, sinks })
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
        for replacement in 0..=REPLACEMENTS_MAX {
            submit(&deployment, &outcome);
            played.next();
            assert_eq!(outcomes.recv().unwrap(), "failed: the execution limit was exceeded", "{replacement}");
        }
        let mut stable = deployment.stable();
        while stable.borrow_and_update().is_some() {
            std::thread::yield_now();
        }
        assert!(deployment.failure(id).is_some_and(|reason| reason.contains("execution limit")));
        assert_eq!(played.sinks.lock().len(), 1 + REPLACEMENTS_MAX as usize);
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
