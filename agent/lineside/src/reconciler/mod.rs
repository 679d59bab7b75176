//! The node's reconcile loop: manifests in, models and streams running.
//!
//! One task owns all of it. It is told what is asked for, by the folder of manifests or by the cluster, asks
//! [`plan::diff`](crate::reconciler::plan) for the steps, and carries them out. Bringing a model to its slot takes from milliseconds to hours, so it is an request of its own
//! (`bring.rs`), at most one for each model, which comes back as a message; everything else goes on meanwhile.

mod commands;
mod load_task;
pub mod plan;
mod status_builder;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::desired::{Assignment, DesiredObject, DesiredState, Identity, Node};
use crate::http::health::Health;
use crate::http::status_store::StatusStore;
use crate::message_writer::MessageWriter;
use crate::reconciler::plan::{ObservedModel, ObservedState, Step, diff};
use crate::streams::capture::Capture;
use crate::streams::inspector::{Inspector, StreamContext};
use crate::streams::registry::StreamRegistry;
use lineside_api::kinds::ModelManifest;
use lineside_api::message::Event;
use lineside_api::state::ModelState;
use lineside_api::state::StreamStates;
use lineside_common::backoff::Backoff;
use lineside_common::digest::Digest;
use lineside_common::metrics::Metrics;
use lineside_models::admission::AdmissionLimits;
use lineside_models::fetch::Fetcher;
use lineside_models::last_good::LastGoodVersions;
use lineside_models::signing::Keyring;
use lineside_models::store::Store;
use lineside_mqtt::command::CommandRequest;
use lineside_scheduler::slot::Deployment;
use lineside_spool::Spool;
use load_task::{LoadContext, LoadFailure, LoadRequest, LoadedVersion, Stage, bring};

/// How often the loop comes round where nothing happens.
const BEAT_EVERY: Duration = Duration::from_millis(500);
/// A model that failed to load is tried again, first after this.
const RETRY_FIRST: Duration = Duration::from_secs(4);
/// What served last and could not be restored is tried again after this.
const RESTORE_AGAIN: Duration = Duration::from_secs(30);
/// The longest time between two tries.
const RETRY_CAP: Duration = Duration::from_secs(120);
const LOWER_VERSION: &str = "a lower version is refused; set rollback: true to go back";

/// The task and what it owns.
pub struct Reconciler {
    node: Node,
    /// Labels of the agent's own configuration.
    labels: BTreeMap<String, String>,
    desired_state: watch::Receiver<Option<Arc<DesiredState>>>,
    /// Asks whoever says what is asked for to look again.
    again: Arc<Notify>,
    has_cluster: bool,
    /// What was asked for last.
    asked: Option<Arc<DesiredState>>,
    /// Which objects of a cluster are desired, by kind and name.
    identities: BTreeMap<(&'static str, String), Identity>,
    way: Arc<LoadContext>,
    metrics: Metrics,
    health: Arc<Health>,
    board: Arc<StatusStore>,
    last_good: LastGoodVersions,
    desired: Assignment,
    observed: ObservedState,
    slots: HashMap<String, Arc<Deployment<StreamContext>>>,
    captures: HashMap<String, Capture>,
    /// Models that fail to load, by name.
    failures: HashMap<String, RetryState>,
    /// Objects of one name in several files, already complained about.
    doubled: BTreeSet<String>,
    /// The series set in `model_state`: model to version and state.
    reported: BTreeMap<String, (u64, ModelState)>,
    /// What was said last of each model.
    said: BTreeMap<String, Event>,
    /// StreamStates that an operator has paused.
    paused: BTreeSet<String>,
    commands: mpsc::Receiver<CommandRequest>,
    /// The streams that are played, and whether they are up.
    members: watch::Receiver<StreamStates>,
    registry: Arc<StreamRegistry>,
    message_writer: Arc<MessageWriter>,
    spool: Arc<Spool>,
    /// Errands under way, by model.
    running_loads: HashMap<String, RunningLoad>,
    /// What serves, by model.
    serving: HashMap<String, LoadedVersion>,
    /// Models whose signature has expired, already complained about.
    expired: BTreeSet<String>,
    loaded: mpsc::UnboundedSender<Loaded>,
    loads: mpsc::UnboundedReceiver<Loaded>,
}

/// An request that is under way.
struct RunningLoad {
    /// To be cancelled when the manifest has changed meanwhile.
    superseded: CancellationToken,
    stage: Arc<Stage>,
}

/// What is remembered of a model that fails to load, so that it is tried more and more rarely and logged once.
struct RetryState {
    backoff: Backoff,
    version: u64,
    /// How far it came.
    stage: ModelState,
    failure: LoadFailure,
}

/// What came of an request.
struct Loaded {
    manifest: ModelManifest,
    is_restored: bool,
    /// What serves now; `None` when the manifest had changed before it could serve.
    outcome: Result<Option<LoadedVersion>, LoadFailure>,
}

/// What the task is given.
pub struct Parts {
    /// This node.
    pub node: Node,
    /// What is asked for; `None` until somebody has said anything.
    pub desired_state: watch::Receiver<Option<Arc<DesiredState>>>,
    /// Asks whoever says what is asked for to look again.
    pub again: Arc<Notify>,
    /// Whether that is a cluster.
    pub has_cluster: bool,
    /// The agent's own folder.
    pub data_dir: PathBuf,
    /// Looks at frames.
    pub inspector: Inspector,
    /// Everything that is counted.
    pub metrics: Metrics,
    /// What operators ask for.
    pub commands: mpsc::Receiver<CommandRequest>,
    /// The streams that are played, for others to see.
    pub registry: Arc<StreamRegistry>,
    /// Where events are said.
    pub message_writer: Arc<MessageWriter>,
    /// What waits for the broker.
    pub spool: Arc<Spool>,
    /// What the probes look at.
    pub health: Arc<Health>,
    /// What operators look at.
    pub board: Arc<StatusStore>,
    /// Where models are kept.
    pub store: Arc<Store>,
    /// Brings models into the store.
    pub fetcher: Fetcher,
    /// The keys that are believed; without any, signatures are not looked at.
    pub keys: Option<Keyring>,
    /// AdmissionLimits of admission.
    pub limits: AdmissionLimits,
}

impl Reconciler {
    /// A task that has not looked at anything yet.
    pub fn new(parts: Parts) -> Self {
        // Bounded by the number of models: each has at most one request under way.
        let (loaded, loads) = mpsc::unbounded_channel();
        let way = LoadContext {
            store: parts.store,
            fetcher: parts.fetcher,
            keys: parts.keys,
            limits: parts.limits,
            inspector: Arc::new(parts.inspector),
            metrics: parts.metrics.clone(),
            one_at_a_time: Arc::new(Semaphore::new(1)),
        };
        Self {
            labels: parts.node.labels.clone(),
            node: parts.node,
            desired_state: parts.desired_state,
            again: parts.again,
            has_cluster: parts.has_cluster,
            asked: None,
            identities: BTreeMap::new(),
            way: Arc::new(way),
            metrics: parts.metrics,
            health: parts.health,
            board: parts.board,
            last_good: LastGoodVersions::read(&parts.data_dir),
            desired: Assignment::default(),
            observed: ObservedState::default(),
            slots: HashMap::new(),
            captures: HashMap::new(),
            failures: HashMap::new(),
            doubled: BTreeSet::new(),
            reported: BTreeMap::new(),
            said: BTreeMap::new(),
            paused: BTreeSet::new(),
            commands: parts.commands,
            members: parts.registry.follow(),
            registry: parts.registry,
            message_writer: parts.message_writer,
            spool: parts.spool,
            running_loads: HashMap::new(),
            serving: HashMap::new(),
            expired: BTreeSet::new(),
            loaded,
            loads,
        }
    }

    /// Runs until stopped; then the streams end, and the models finish the frames they hold.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(BEAT_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = ticks.tick() => self.align(false),
                Ok(()) = self.desired_state.changed() => self.on_wishes(),
                Some(loaded) = self.loads.recv() => self.on_loaded(loaded),
                Some(task) = self.commands.recv() => self.on_command(task),
            }
            self.reconcile().await;
            self.report();
        }
        for request in self.running_loads.values() {
            request.superseded.cancel();
        }
        for (_, capture) in self.captures.drain() {
            capture.stop(&self.metrics).await;
        }
        let slots = std::mem::take(&mut self.slots);
        let ended = tokio::task::spawn_blocking(move || slots.values().for_each(|slot| slot.stop())).await;
        if let Err(error) = ended {
            tracing::error!(%error, "the models could not be stopped in order");
        }
    }

    /// Takes in what is asked for now.
    fn on_wishes(&mut self) {
        let Some(desired_state) = self.desired_state.borrow_and_update().clone() else { return };
        self.gather(desired_state);
        self.align(true);
    }

    /// What is asked for of this node. Of two objects with one name, the one that stands first counts.
    fn gather(&mut self, desired_state: Arc<DesiredState>) {
        self.node.labels.clone_from(&desired_state.labels);
        self.node.labels.extend(self.labels.clone());
        let mut desired = Assignment::default();
        let mut identities = BTreeMap::new();
        let mut doubled = BTreeSet::new();
        for DesiredObject { object, place, identity } in &desired_state.objects {
            let (kind, name) = object.key();
            if !desired.add(object.clone(), &self.node) {
                let what = format!("{kind} {name} in {place}");
                if !self.doubled.contains(&what) {
                    tracing::error!(kind, name, file = place, "stands in an earlier file too; this one is passed over");
                }
                doubled.insert(what);
                continue;
            }
            identities.insert((kind, name.to_owned()), identity.clone());
        }
        self.doubled = doubled;
        desired.streams.retain(|name, _| !self.paused.contains(name));
        (self.desired, self.identities, self.asked) = (desired, identities, Some(desired_state));
    }

    /// Brings what is observed in line with what is asked for. What a fresh and certain word does not name is forgotten.
    fn align(&mut self, is_fresh: bool) {
        self.remember_and_forget(
            is_fresh && self.asked.as_ref().is_some_and(|desired_state| desired_state.is_complete),
        );
        for (name, request) in &self.running_loads {
            let model = self.observed.models.get(name);
            let wanted = self.desired.models.get(name);
            // What served last is finished in any case, unless the model is not wanted at all.
            let is_restored = wanted.is_some() && model.is_some_and(|model| model.loading == model.last_good);
            if wanted != model.and_then(|model| model.loading.as_ref()) && !is_restored {
                request.superseded.cancel();
            }
        }
    }

    /// Begins to observe models with what is remembered of them from earlier runs, and lets go of those that nobody wants.
    fn remember_and_forget(&mut self, is_complete: bool) {
        let wanted = &self.desired.models;
        let observed = &self.observed.models;
        let new: Vec<String> = wanted.keys().filter(|name| !observed.contains_key(*name)).cloned().collect();
        for name in &new {
            let good = self.last_good.get(name).filter(|good| self.way.store.contains_blob(&good.digest));
            let last_good = good.map(|good| good.manifest.clone());
            let model =
                ObservedModel { highest: self.last_good.highest_version(name), last_good, ..ObservedModel::default() };
            self.observed.models.insert(name.clone(), model);
        }
        self.observed.models.retain(|name, model| wanted.contains_key(name) || !model.is_idle());
        // A file that cannot be read says nothing of what was in it.
        if is_complete {
            let is_gone = |name: &&String| !wanted.contains_key(*name) && !self.observed.models.contains_key(*name);
            let gone: Vec<String> = self.last_good.names().filter(is_gone).cloned().collect();
            gone.iter().for_each(|name| self.forget_good(name));
        }
    }

    fn forget_good(&mut self, name: &str) {
        if let Err(error) = self.last_good.remove(name) {
            let reason = lineside_common::error_chain(&error);
            tracing::error!(
                event = "last_good_not_written",
                model = name,
                reason,
                "Cannot record that the model was removed"
            );
        }
    }

    async fn reconcile(&mut self) {
        for step in diff(&self.desired, &self.observed, Instant::now()) {
            match step {
                Step::Load(manifest) => self.load(manifest, false),
                Step::Restore(manifest) => self.load(manifest, true),
                Step::Refuse { manifest, highest } => {
                    tracing::error!(
                        event = "model_version_refused",
                        model = manifest.name,
                        version = manifest.version,
                        highest,
                        "{LOWER_VERSION}"
                    );
                    let name = manifest.name.clone();
                    self.observed.models.entry(name).or_default().refused = Some(manifest);
                }
                Step::Unload(name) => self.unload(&name).await,
                Step::Start(manifest) => {
                    let slot = self.slot(&manifest.model);
                    self.observed.streams.insert(manifest.name.clone(), manifest.clone());
                    self.captures
                        .insert(manifest.name.clone(), Capture::start(manifest, &slot, &self.metrics, &self.registry));
                }
                Step::Stop(name) => {
                    self.observed.streams.remove(&name);
                    if let Some(capture) = self.captures.remove(&name) {
                        capture.stop(&self.metrics).await;
                    }
                }
            }
        }
        let (models, streams) = (&self.observed.models, &self.observed.streams);
        self.slots.retain(|name, _| models.contains_key(name) || streams.values().any(|stream| stream.model == *name));
    }

    fn slot(&mut self, model: &str) -> Arc<Deployment<StreamContext>> {
        self.slots.entry(model.to_owned()).or_insert_with(|| Arc::new(Deployment::new(model))).clone()
    }

    /// Sends for a version. One that is restored comes from the store or not at all.
    fn load(&mut self, manifest: ModelManifest, is_restored: bool) {
        let slot = self.slot(&manifest.name);
        let model = self.observed.models.entry(manifest.name.clone()).or_default();
        model.loading = Some(manifest.clone());
        let has_alternative = model.last_good.as_ref().is_some_and(|last_good| *last_good != manifest);
        if manifest.spec.runtime.threads.is_some_and(|threads| threads > 1) {
            tracing::warn!(
                model = manifest.name,
                "spec.runtime.threads is passed over: tract runs one thread per instance"
            );
        }
        let good = self.last_good.get(&manifest.name);
        let known_good = good.filter(|good| good.manifest.version == manifest.version).map(|good| good.digest);
        let request = LoadRequest {
            known_good,
            is_restored,
            has_alternative,
            protected: self.protected(),
            slot,
            superseded: CancellationToken::new(),
            stage: Arc::new(Stage::new(&manifest)),
            manifest: manifest.clone(),
        };
        let under_way = RunningLoad { superseded: request.superseded.clone(), stage: request.stage.clone() };
        self.running_loads.insert(manifest.name.clone(), under_way);
        let (way, loaded) = (self.way.clone(), self.loaded.clone());
        tokio::spawn(async move {
            // On a task of its own, so that a panic in it comes back as a failure.
            let outcome = tokio::spawn(bring(way, request)).await;
            let outcome = outcome.unwrap_or_else(|error| Err(format!("bringing it panicked: {error}").into()));
            // When the receiver is gone the agent is ending, and nobody wants to know.
            drop(loaded.send(Loaded { manifest, is_restored, outcome }));
        });
    }

    /// Digests that must not be evicted: what serves, what served last, and what is wanted.
    fn protected(&self) -> BTreeSet<Digest> {
        let serving = self.serving.values().map(|serving| serving.digest);
        let wanted = self.desired.models.values().filter_map(|model| model.digest);
        serving.chain(wanted).chain(self.last_good.digests()).collect()
    }

    fn on_loaded(&mut self, loaded: Loaded) {
        let Loaded { manifest, is_restored, outcome } = loaded;
        let stage =
            self.running_loads.remove(&manifest.name).map_or(ModelState::Pending, |request| request.stage.get());
        let model = self.observed.models.entry(manifest.name.clone()).or_default();
        model.loading = None;
        if self.slots.get(&manifest.name).is_some_and(|slot| slot.serving().is_none()) {
            // It was stopped to make room for this one.
            model.serving = None;
            self.serving.remove(&manifest.name);
        }
        match outcome {
            Ok(None) => {
                tracing::info!(
                    model = manifest.name,
                    version = manifest.version,
                    "model was loaded in vain: its manifest has changed meanwhile"
                );
                if model.serving.is_none()
                    && model.failed.is_none()
                    && !self.desired.models.contains_key(&manifest.name)
                {
                    self.observed.models.remove(&manifest.name);
                }
            }
            Ok(Some(loaded)) => self.on_served(manifest, is_restored, loaded),
            Err(failure) if is_restored => {
                let is_news = model.restore_at.is_none();
                model.restore_at = Some(Instant::now() + RESTORE_AGAIN);
                if !is_news {
                    return;
                }
                tracing::error!(
                    model = manifest.name,
                    version = manifest.version,
                    reason = failure.reason,
                    "what served last cannot be restored, trying again later"
                );
            }
            Err(failure) => self.on_failed(manifest, stage, failure),
        }
    }

    fn on_served(&mut self, manifest: ModelManifest, is_restored: bool, loaded: LoadedVersion) {
        let info = &loaded.info;
        tracing::info!(
            event = "model_serving",
            model = info.name,
            version = info.version,
            digest = info.digest,
            engine = info.engine,
            took_ms = loaded.took.as_millis() as u64,
            "model serves"
        );
        if is_restored {
            let wanted = self.desired.models.get(&manifest.name).map(|wanted| wanted.version);
            tracing::warn!(
                event = "last_good_serving",
                model = info.name,
                version = info.version,
                digest = info.digest,
                wanted,
                "last good version serves meanwhile"
            );
        } else {
            self.failures.remove(&manifest.name);
        }
        // The command line reads this file to know what must not be evicted, so it is written before anything else can
        // happen to the version before.
        if let Err(error) = self.last_good.record(&manifest, loaded.digest) {
            tracing::error!(
                event = "last_good_not_written",
                reason = lineside_common::error_chain(&error),
                "Cannot record the serving version; a start without a network may serve an older version"
            );
        }
        self.expired.remove(&manifest.name);
        self.serving.insert(manifest.name.clone(), loaded);
        let model = self.observed.models.entry(manifest.name.clone()).or_default();
        model.highest = self.last_good.highest_version(&manifest.name);
        model.last_good = Some(manifest.clone());
        model.restore_at = None;
        model.refused = None;
        if !is_restored {
            model.failed = None;
        }
        model.serving = Some(manifest);
    }

    fn on_failed(&mut self, manifest: ModelManifest, stage: ModelState, failure: LoadFailure) {
        let failures = self.failures.entry(manifest.name.clone()).or_insert_with(|| RetryState {
            backoff: Backoff::new(RETRY_FIRST, RETRY_CAP),
            version: 0,
            stage,
            failure: String::new().into(),
        });
        if failures.version != manifest.version {
            failures.backoff.reset();
        }
        let delay = failures.backoff.next_delay();
        let model = self.observed.models.entry(manifest.name.clone()).or_default();
        let is_news = (failures.version, &failures.failure) != (manifest.version, &failure);
        if is_news && let Some(failures) = failure.quarantined_after {
            tracing::error!(
                event = "model_quarantined",
                model = manifest.name,
                version = manifest.version,
                digest = failure.digest.map(|digest| digest.to_string()),
                failures,
                serving = model.serving.as_ref().map(|serving| serving.version),
                reason = failure.reason,
                "model is quarantined"
            );
        } else if is_news {
            tracing::error!(
                event = "model_load_failed",
                model = manifest.name,
                version = manifest.version,
                serving = model.serving.as_ref().map(|serving| serving.version),
                reason = failure.reason,
                "model cannot be loaded, trying again later"
            );
        }
        let retry_at = failure.quarantined_after.is_none().then(|| Instant::now() + delay);
        (failures.version, failures.stage, failures.failure) = (manifest.version, stage, failure);
        model.failed = Some((manifest, retry_at));
    }

    async fn unload(&mut self, name: &str) {
        self.observed.models.remove(name);
        self.failures.remove(name);
        self.serving.remove(name);
        self.expired.remove(name);
        self.forget_good(name);
        let Some(slot) = self.slots.get(name).cloned() else { return };
        if slot.serving().is_some() {
            let ended = tokio::task::spawn_blocking(move || slot.stop()).await;
            if let Err(error) = ended {
                tracing::error!(model = name, %error, "the model could not be stopped in order");
            }
            tracing::info!(model = name, "model unloaded");
        }
    }
}
