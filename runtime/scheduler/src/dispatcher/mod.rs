//! Decides which job goes to which version, in which batch, and when. No threads, no clock and no I/O: time is an argument,
//! so that every order of events can be tested.
//!
//! A job is assigned to a version when it is submitted, by smooth weighted round robin (the algorithm of nginx's upstream
//! module), so that the weights hold exactly over any window of their sum. It waits in that version's queue until the worker
//! has room; a batch is formed when it is full, or when its oldest job has waited for `max_queue_delay`.
//!
//! Invariants, each tested below:
//! - Every job ends exactly once.
//! - A batch holds jobs of one version only, and each answer goes to its own job.
//! - Waiting jobs never exceed `queue_max`.
//! - When a worker ends, at most the job that caused it fails; see [`fault`](crate::fault).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lineside_api::message::ModelInfo;
use lineside_api::prediction::Inspection;
use lineside_api::verdict::RuleOutcome;
use lineside_worker::{Activity, BatchId, BatchReply, Stage, WorkError, WorkErrorKind, WorkItem};

use crate::fault::{Fate, Fault, attribute};
use crate::job::{Answer, Job, JobOutcome, Priority};
use crate::queue::JobQueue;

/// Rules that are remembered because they ended a worker. A rule that was forgotten may end one more.
const BARRED_RULES_MAX: usize = 256;
/// The result of a rule that is not evaluated any more.
const BARRED_RULE: &str =
    "the rule exceeded the limits of the worker process and is not evaluated any more; make it simpler";

/// Identifies a version of a deployment. Never reused within a deployment.
pub type VersionId = u64;

/// How the jobs of one version are batched and limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchPolicy {
    /// Jobs in one batch, at least 1.
    pub max_batch_size: usize,
    /// How long the oldest job waits for a batch to fill.
    pub max_queue_delay: Duration,
    /// A batch that executes for longer than this is given up, and the worker replaced. The time that it waits in the worker for
    /// the batch before it does not count.
    pub execution_limit: Duration,
}

impl Default for BatchPolicy {
    fn default() -> Self {
        Self { max_batch_size: 1, max_queue_delay: Duration::ZERO, execution_limit: Duration::from_secs(30) }
    }
}

/// What the owner of the threads has to do.
#[derive(Default)]
pub(crate) struct Actions {
    /// Batches to hand to the workers of these versions.
    pub(crate) batches: Vec<(VersionId, BatchId, Vec<WorkItem>)>,
    /// Jobs that have ended.
    pub(crate) ended: Vec<(Job, JobOutcome)>,
    /// Versions whose worker has exceeded its execution limit, with the batch that it has executed for the longest time.
    pub(crate) overdue: Vec<(VersionId, BatchId)>,
    /// When to ask again, if nothing happens before.
    pub(crate) wake_at: Option<Instant>,
}

/// Why a job was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubmitErrorKind {
    /// No version serves.
    NotServing,
    /// The queue is full of jobs that are at least as urgent.
    QueueFull,
}

struct LiveVersion {
    info: Arc<ModelInfo>,
    policy: BatchPolicy,
    weight: u32,
    /// State of the smooth weighted round robin.
    credit: i64,
    size: WorkerSize,
    /// Whether a worker takes batches; not while it is replaced.
    has_worker: bool,
    queue: JobQueue,
    /// Jobs that are executed alone.
    suspects: VecDeque<Job>,
    in_flight: BTreeMap<BatchId, InFlight>,
}

/// How much a worker takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WorkerSize {
    /// Batches that it holds.
    pub(crate) capacity: usize,
    /// Batches that it executes at once.
    pub(crate) instances: usize,
}

struct InFlight {
    jobs: Vec<Job>,
    dispatched: Instant,
    /// When the worker began to execute it: at most as many batches as it has instances, oldest first.
    executing_since: Option<Instant>,
}

impl LiveVersion {
    fn waiting(&self) -> usize {
        self.queue.len() + self.suspects.len()
    }

    fn mark_executing(&mut self, now: Instant) {
        for batch in self.in_flight.values_mut().take(self.size.instances) {
            batch.executing_since.get_or_insert(now);
        }
    }

    /// The jobs of the next batch: a suspect alone, or those of the queue.
    fn next_jobs(&mut self) -> Vec<Job> {
        match self.suspects.pop_front() {
            Some(suspect) => vec![suspect],
            None => std::iter::from_fn(|| self.queue.pop()).take(self.policy.max_batch_size.max(1)).collect(),
        }
    }
}

/// The state of one deployment.
pub(crate) struct Dispatcher {
    queue_max: usize,
    versions: BTreeMap<VersionId, LiveVersion>,
    next_version: VersionId,
    next_batch: BatchId,
    /// Rules that ended a worker.
    barred_rules: BTreeSet<Arc<str>>,
}

impl Dispatcher {
    pub(crate) fn new(queue_max: usize) -> Self {
        Self { queue_max, versions: BTreeMap::new(), next_version: 0, next_batch: 0, barred_rules: BTreeSet::new() }
    }

    /// Reserves the id of the next version, which a worker needs to know before the version can take jobs.
    pub(crate) fn reserve(&mut self) -> VersionId {
        self.next_version += 1;
        self.next_version
    }

    /// Adds a version. It takes jobs at once.
    pub(crate) fn add(
        &mut self,
        id: VersionId,
        info: Arc<ModelInfo>,
        weight: u32,
        policy: BatchPolicy,
        size: WorkerSize,
    ) {
        let version = LiveVersion {
            info,
            policy,
            weight,
            credit: 0,
            size,
            has_worker: true,
            queue: JobQueue::default(),
            suspects: VecDeque::new(),
            in_flight: BTreeMap::new(),
        };
        self.versions.insert(id, version);
    }

    /// Sets the share of new jobs that a version takes. A version of weight 0 takes none, and finishes what it holds.
    pub(crate) fn set_weight(&mut self, id: VersionId, weight: u32) {
        if let Some(version) = self.versions.get_mut(&id) {
            version.weight = weight;
        }
    }

    /// The ids of all versions, oldest first.
    pub(crate) fn versions(&self) -> Vec<VersionId> {
        self.versions.keys().copied().collect()
    }

    /// The version with the largest weight above 0; the newest of several.
    pub(crate) fn stable(&self) -> Option<Arc<ModelInfo>> {
        let live = self.versions.values().filter(|version| version.weight > 0);
        live.max_by_key(|version| version.weight).map(|version| version.info.clone())
    }

    /// Jobs that wait for a worker.
    pub(crate) fn waiting(&self) -> usize {
        self.versions.values().map(LiveVersion::waiting).sum()
    }

    /// Whether a version executes nothing and holds no job.
    pub(crate) fn is_idle(&self, id: VersionId) -> bool {
        self.versions.get(&id).is_none_or(|version| version.in_flight.is_empty() && version.waiting() == 0)
    }

    /// Accepts a job. A full queue drops its least urgent job for a more urgent one.
    #[expect(clippy::result_large_err, reason = "the job goes back to its owner; a box per refused frame costs more")]
    pub(crate) fn submit(&mut self, job: Job) -> Result<Option<Job>, (Job, SubmitErrorKind)> {
        let Some(id) = self.assign() else { return Err((job, SubmitErrorKind::NotServing)) };
        let mut evicted = None;
        if self.waiting() >= self.queue_max {
            evicted = self.evict_below(job.priority);
            if evicted.is_none() {
                return Err((job, SubmitErrorKind::QueueFull));
            }
        }
        if let Some(version) = self.versions.get_mut(&id) {
            version.queue.push(job);
        }
        Ok(evicted)
    }

    fn evict_below(&mut self, priority: Priority) -> Option<Job> {
        self.versions.values_mut().find_map(|version| version.queue.evict_below(priority))
    }

    /// Smooth weighted round robin: every version earns its weight, the richest one is chosen and pays the sum.
    fn assign(&mut self) -> Option<VersionId> {
        let mut total = 0;
        let mut chosen: Option<(VersionId, i64)> = None;
        for (id, version) in self.versions.iter_mut().filter(|(_, version)| version.weight > 0) {
            total += i64::from(version.weight);
            version.credit += i64::from(version.weight);
            if chosen.is_none_or(|(_, credit)| version.credit > credit) {
                chosen = Some((*id, version.credit));
            }
        }
        let (id, _) = chosen?;
        if let Some(version) = self.versions.get_mut(&id) {
            version.credit -= total;
        }
        Some(id)
    }

    /// Forms the batches that can start now, and ends what has expired.
    pub(crate) fn poll(&mut self, now: Instant) -> Actions {
        let mut actions = Actions::default();
        let mut wake_at: Option<Instant> = None;
        let mut wake = |at: Instant| wake_at = Some(wake_at.map_or(at, |known| known.min(at)));
        let barred_rules = &self.barred_rules;
        for (id, version) in &mut self.versions {
            let mut expired = version.queue.take_expired(now);
            let (late, suspects) = version.suspects.drain(..).partition::<Vec<_>, _>(|job| job.is_expired(now));
            (version.suspects, _) = (suspects.into(), expired.extend(late));
            actions.ended.extend(expired.into_iter().map(|job| (job, JobOutcome::Expired)));
            let executing = version.in_flight.iter().filter_map(|(batch, held)| Some((held.executing_since?, *batch)));
            if let Some((since, batch)) = executing.min() {
                let limit = since + version.policy.execution_limit;
                if limit <= now {
                    actions.overdue.push((*id, batch));
                } else {
                    wake(limit);
                }
            }
            while version.has_worker && version.in_flight.len() < version.size.capacity {
                if !version.suspects.is_empty() {
                    if !version.in_flight.is_empty() {
                        break;
                    }
                } else if let Some(oldest) = version.queue.oldest() {
                    let full_at = oldest + version.policy.max_queue_delay;
                    if version.queue.len() < version.policy.max_batch_size && full_at > now {
                        wake(full_at);
                        break;
                    }
                } else {
                    break;
                }
                let is_alone = !version.suspects.is_empty();
                let jobs = version.next_jobs();
                let items = jobs.iter().map(|job| {
                    let rule = job.rule.clone().filter(|rule| !barred_rules.contains(rule));
                    WorkItem { frame: job.frame.clone(), deadline: job.deadline, rule }
                });
                let items = items.collect();
                self.next_batch += 1;
                let batch = InFlight { jobs, dispatched: now, executing_since: None };
                version.in_flight.insert(self.next_batch, batch);
                version.mark_executing(now);
                wake(now + version.policy.execution_limit);
                actions.batches.push((*id, self.next_batch, items));
                if is_alone {
                    break;
                }
            }
            if let Some(deadline) = version.queue.next_deadline() {
                wake(deadline);
            }
        }
        actions.wake_at = wake_at;
        actions
    }

    /// Takes the reply of a worker. A batch that was given up before is unknown by now, and its reply is dropped.
    pub(crate) fn on_reply(&mut self, id: VersionId, reply: BatchReply, now: Instant) -> Vec<(Job, JobOutcome)> {
        let Some(version) = self.versions.get_mut(&id) else { return Vec::new() };
        let Some(InFlight { jobs, dispatched, .. }) = version.in_flight.remove(&reply.batch) else { return Vec::new() };
        version.mark_executing(now);
        let mut results = reply.results.into_iter();
        let info = &version.info;
        let answer = |job: &Job, mut inspection: Inspection| {
            if inspection.rule.is_none() && job.rule.is_some() {
                inspection.rule = Some(RuleOutcome::Failed(BARRED_RULE.to_owned()));
            }
            let queued = dispatched.saturating_duration_since(job.submitted);
            JobOutcome::Answered(Answer { inspection, model: info.clone(), queued })
        };
        jobs.into_iter()
            .map(|job| {
                let outcome = match results.next() {
                    Some(Ok(inspection)) => answer(&job, inspection),
                    Some(Err(error)) if error.kind() == WorkErrorKind::Expired => JobOutcome::Expired,
                    Some(Err(error)) => JobOutcome::Failed(info.clone(), error),
                    None => JobOutcome::Failed(info.clone(), lost("the worker's reply is too short")),
                };
                (job, outcome)
            })
            .collect()
    }

    /// A batch could not be handed over because of one of its frames.
    pub(crate) fn on_refused(&mut self, id: VersionId, batch: BatchId, error: &WorkError) -> Vec<(Job, JobOutcome)> {
        let Some(version) = self.versions.get_mut(&id) else { return Vec::new() };
        let jobs = version.in_flight.remove(&batch).map(|batch| batch.jobs).unwrap_or_default();
        jobs.into_iter().map(|job| (job, JobOutcome::Failed(version.info.clone(), error.clone()))).collect()
    }

    /// The worker of a version has processor time left to use: its batches get the execution limit once more.
    pub(crate) fn extend_limit(&mut self, id: VersionId, now: Instant) {
        if let Some(version) = self.versions.get_mut(&id) {
            version.in_flight.values_mut().filter_map(|batch| batch.executing_since.as_mut()).for_each(|at| *at = now);
        }
    }

    /// The worker of a version has ended. Nothing is dispatched to the version until [`Dispatcher::on_worker_started`].
    /// Returns the jobs that fail, and the cause.
    pub(crate) fn on_worker_ended(
        &mut self,
        id: VersionId,
        activity: &[Activity],
        is_external: bool,
        why: &str,
    ) -> (Vec<(Job, JobOutcome)>, Fault) {
        let Some(version) = self.versions.get_mut(&id) else { return (Vec::new(), Fault::Unknown) };
        version.has_worker = false;
        let batches = std::mem::take(&mut version.in_flight).into_iter().map(|(id, batch)| (id, batch.jobs)).collect();
        let (fault, jobs) = attribute(batches, activity, is_external);
        if let Fault::Rule(rule) = &fault {
            if self.barred_rules.len() >= BARRED_RULES_MAX {
                self.barred_rules.clear();
            }
            self.barred_rules.insert(rule.clone());
        }
        let mut ended = Vec::new();
        for (job, fate) in jobs {
            match fate {
                Fate::Retry => version.queue.push(job),
                Fate::RetryAlone => version.suspects.push_back(job),
                Fate::Failed(stage) => {
                    let error = match stage {
                        Some(Stage::Decode) => WorkError::new(WorkErrorKind::Frame, during(Stage::Decode, why)),
                        Some(stage) => WorkError::new(WorkErrorKind::Model, during(stage, why)),
                        None => lost(why),
                    };
                    ended.push((job, JobOutcome::Failed(version.info.clone(), error)));
                }
            }
        }
        (ended, fault)
    }

    /// A version has a worker again.
    pub(crate) fn on_worker_started(&mut self, id: VersionId, size: WorkerSize) {
        if let Some(version) = self.versions.get_mut(&id) {
            (version.size, version.has_worker) = (size, true);
        }
    }

    /// The worker of a version is given up for good: everything that it holds fails.
    pub(crate) fn abandon(&mut self, id: VersionId, why: &str) -> Vec<(Job, JobOutcome)> {
        let Some(version) = self.versions.get_mut(&id) else { return Vec::new() };
        let batches = std::mem::take(&mut version.in_flight);
        let jobs = batches.into_values().flat_map(|batch| batch.jobs);
        jobs.map(|job| (job, JobOutcome::Failed(version.info.clone(), lost(why)))).collect()
    }

    /// Takes a version out. Its waiting jobs go to the versions that remain, and end as cancelled where there are none.
    pub(crate) fn remove(&mut self, id: VersionId) -> Vec<(Job, JobOutcome)> {
        let Some(version) = self.versions.remove(&id) else { return Vec::new() };
        let executing = version.in_flight.into_values().flat_map(|batch| batch.jobs);
        let mut ended: Vec<(Job, JobOutcome)> = executing.map(|job| (job, JobOutcome::Cancelled)).collect();
        ended.extend(self.assign_again(version.queue, version.suspects));
        ended
    }

    /// Moves the waiting jobs of a version that takes no new ones to those that do.
    pub(crate) fn move_waiting(&mut self, id: VersionId) -> Vec<(Job, JobOutcome)> {
        match self.versions.get_mut(&id) {
            Some(version) if version.weight == 0 => {
                let (queue, suspects) = (std::mem::take(&mut version.queue), std::mem::take(&mut version.suspects));
                self.assign_again(queue, suspects)
            }
            _ => Vec::new(),
        }
    }

    /// Suspects remain suspects: the next version may be the same file.
    fn assign_again(&mut self, mut queue: JobQueue, suspects: VecDeque<Job>) -> Vec<(Job, JobOutcome)> {
        let mut ended = Vec::new();
        let queued = queue.drain().into_iter().map(|job| (job, false));
        for (job, is_suspect) in queued.chain(suspects.into_iter().map(|job| (job, true))) {
            match self.assign().and_then(|id| self.versions.get_mut(&id)) {
                Some(version) if is_suspect => version.suspects.push_back(job),
                Some(version) => version.queue.push(job),
                None => ended.push((job, JobOutcome::Cancelled)),
            }
        }
        ended
    }
}

fn during(stage: Stage, why: &str) -> String {
    format!("{} ended the worker: {why}", stage.name())
}

fn lost(why: &str) -> WorkError {
    WorkError::new(WorkErrorKind::Worker, why)
}

#[cfg(test)]
mod tests;
