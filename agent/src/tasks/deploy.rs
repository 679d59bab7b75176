//! The node's reconcile loop: manifests in, models and streams running.
//!
//! One task owns all of it. Twice a second it looks at the manifests, asks [`plan::diff`](crate::plan::diff) for the steps
//! and carries them out. Loading a model takes seconds, so it happens on a blocking thread, one model at a time, and
//! comes back as a message; everything else goes on meanwhile.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lineside_runtime::pipeline::{Pipeline, engine_for};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::capture::Capture;
use super::infer::{Inspector, StreamContext};
use crate::base::backoff::Backoff;
use crate::base::digest::Digest;
use crate::base::files::read_bounded;
use crate::base::metrics::Metrics;
use crate::config::ModelManifest;
use crate::manifests::{Finding, Folder};
use crate::message::ModelInfo;
use crate::plan::ModelState;
use crate::plan::desired::{Desired, Node};
use crate::plan::diff::{Observed, Step, diff};
use crate::serve::health::{Health, ModelHealth};
use crate::slot::{Ready, Slot};

/// How often the manifests are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A model that failed to load is tried again, first after this.
const RETRY_FIRST: Duration = Duration::from_secs(4);
/// The longest time between two tries.
const RETRY_CAP: Duration = Duration::from_secs(120);
/// Bytes of one model file at most; ONNX itself ends at 2 GiB.
const MODEL_BYTES_MAX: u64 = 2 << 30;

const LOWER_VERSION: &str = "a lower version is refused; set rollback: true to go back";

/// The task and what it owns.
pub struct Deploy {
    node: Node,
    /// Here between two looks; with the look while one is under way.
    folder: Option<Folder>,
    looking: Option<JoinHandle<(Folder, Vec<Finding>)>>,
    inspector: Arc<Inspector>,
    metrics: Metrics,
    health: Arc<Health>,
    desired: Desired,
    observed: Observed,
    slots: HashMap<String, Arc<Slot<StreamContext>>>,
    captures: HashMap<String, Capture>,
    /// Models that fail to load, by name.
    failures: HashMap<String, Failures>,
    /// Objects of one name in several files, already complained about.
    doubled: BTreeSet<String>,
    /// The series set in `model_state`: model to version and state.
    reported: BTreeMap<String, (u64, ModelState)>,
    /// Loads under way, by model; cancelled when the manifest has changed meanwhile.
    loading: HashMap<String, CancellationToken>,
    one_at_a_time: Arc<Semaphore>,
    loaded: mpsc::UnboundedSender<Loaded>,
    loads: mpsc::UnboundedReceiver<Loaded>,
}

/// What is remembered of a model that fails to load, so that it is tried more and more rarely and logged once.
struct Failures {
    backoff: Backoff,
    version: u64,
    reason: String,
}

/// What came of loading a model.
struct Loaded {
    manifest: ModelManifest,
    /// What serves now and how long it took; `None` when the manifest had changed before it could serve.
    outcome: Result<Option<(Arc<ModelInfo>, Duration)>, String>,
}

impl Deploy {
    /// A task that has not looked at anything yet.
    pub fn new(node: Node, folder: &Path, inspector: Inspector, metrics: Metrics, health: Arc<Health>) -> Self {
        // Bounded by the number of models: each has at most one load under way.
        let (loaded, loads) = mpsc::unbounded_channel();
        Self {
            node,
            folder: Some(Folder::new(folder)),
            looking: None,
            inspector: Arc::new(inspector),
            metrics,
            health,
            desired: Desired::default(),
            observed: Observed::default(),
            slots: HashMap::new(),
            captures: HashMap::new(),
            failures: HashMap::new(),
            doubled: BTreeSet::new(),
            reported: BTreeMap::new(),
            loading: HashMap::new(),
            one_at_a_time: Arc::new(Semaphore::new(1)),
            loaded,
            loads,
        }
    }

    /// Runs until stopped; then the streams end, and the models finish the frames they hold.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = ticks.tick() => self.look(),
                looked = under_way(&mut self.looking) => self.on_looked(looked),
                Some(loaded) = self.loads.recv() => self.on_loaded(loaded),
            }
            self.reconcile().await;
            self.report();
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

    /// Looks at the manifests off this task: the folder may lie on a network that hangs.
    fn look(&mut self) {
        if let Some(mut folder) = self.folder.take() {
            self.looking = Some(tokio::task::spawn_blocking(move || {
                let findings = folder.look();
                (folder, findings)
            }));
        }
    }

    fn on_looked(&mut self, looked: Result<(Folder, Vec<Finding>), JoinError>) {
        let (folder, findings) = match looked {
            Ok(looked) => looked,
            Err(error) => {
                return tracing::error!(%error, "looking at the manifests panicked; they are not followed any more");
            }
        };
        for finding in &findings {
            self.tell(finding);
        }
        if !findings.is_empty() {
            self.desired = self.gather(&folder);
        }
        self.folder = Some(folder);
        for (name, loading) in &self.loading {
            if self.desired.models.get(name) != self.observed.models.get(name).and_then(|model| model.loading.as_ref())
            {
                loading.cancel();
            }
        }
    }

    fn tell(&self, finding: &Finding) {
        let rejected = |path: &PathBuf| self.metrics.manifest_rejected.with_label_values(&[&file_name(path)]);
        match finding {
            Finding::Accepted(path, objects) => {
                rejected(path).set(0);
                tracing::info!(file = %path.display(), objects, "manifest read");
            }
            Finding::Rejected(path, reasons) => {
                rejected(path).set(1);
                for reason in reasons {
                    tracing::error!(file = %path.display(), reason, "manifest refused, its last good content stays in force");
                }
            }
            Finding::Removed(path) => {
                drop(self.metrics.manifest_rejected.remove_label_values(&[&file_name(path)]));
                tracing::info!(file = %path.display(), "manifest removed");
            }
            Finding::Unreadable(reason) => {
                tracing::error!(reason, "the manifests cannot be read, everything stays as it is");
            }
        }
    }

    /// What the files say together. Of two objects with one name, the one in the first file counts.
    fn gather(&mut self, folder: &Folder) -> Desired {
        let mut desired = Desired::default();
        let mut doubled = BTreeSet::new();
        for (path, object) in folder.objects() {
            if !desired.add(object.clone(), &self.node) {
                let (kind, name) = object.key();
                let what = format!("{kind} {name} in {}", path.display());
                if !self.doubled.contains(&what) {
                    tracing::error!(kind, name, file = %path.display(), "stands in an earlier file too; this one is passed over");
                }
                doubled.insert(what);
            }
        }
        self.doubled = doubled;
        desired
    }

    async fn reconcile(&mut self) {
        for step in diff(&self.desired, &self.observed, Instant::now()) {
            match step {
                Step::Load(manifest) => self.load(manifest),
                Step::Refuse { manifest, serving } => {
                    tracing::error!(model = manifest.name, version = manifest.version, serving, "{LOWER_VERSION}");
                    let name = manifest.name.clone();
                    self.observed.models.entry(name).or_default().refused = Some(manifest);
                }
                Step::Unload(name) => self.unload(&name).await,
                Step::Start(manifest) => {
                    let slot = self.slot(&manifest.model);
                    self.observed.streams.insert(manifest.name.clone(), manifest.clone());
                    self.captures.insert(manifest.name.clone(), Capture::start(manifest, &slot, &self.metrics));
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

    fn slot(&mut self, model: &str) -> Arc<Slot<StreamContext>> {
        self.slots.entry(model.to_owned()).or_insert_with(|| Arc::new(Slot::new(model))).clone()
    }

    fn load(&mut self, manifest: ModelManifest) {
        let slot = self.slot(&manifest.name);
        self.observed.models.entry(manifest.name.clone()).or_default().loading = Some(manifest.clone());
        let superseded = CancellationToken::new();
        self.loading.insert(manifest.name.clone(), superseded.clone());
        if manifest.spec.runtime.threads.is_some_and(|threads| threads > 1) {
            tracing::warn!(
                model = manifest.name,
                "spec.runtime.threads is passed over: tract runs one thread per instance"
            );
        }
        let (inspector, turn, loaded) = (self.inspector.clone(), self.one_at_a_time.clone(), self.loaded.clone());
        tokio::spawn(async move {
            let turn = turn.acquire_owned().await;
            let wanted = manifest.clone();
            let work = tokio::task::spawn_blocking(move || {
                let started = Instant::now();
                if superseded.is_cancelled() {
                    return Ok(None);
                }
                let ready = load(&wanted)?;
                if superseded.is_cancelled() {
                    return Ok(None);
                }
                let info = ready.info.clone();
                slot.serve(ready, move |pipeline, info, taken| inspector.inspect(pipeline, info, &taken))
                    .map_err(|error| format!("its threads cannot be started: {error}"))?;
                Ok(Some((info, started.elapsed())))
            });
            let outcome = work.await.unwrap_or_else(|error| Err(format!("loading it panicked: {error}")));
            drop(turn);
            // When the receiver is gone the agent is ending, and nobody wants to know.
            drop(loaded.send(Loaded { manifest, outcome }));
        });
    }

    fn on_loaded(&mut self, loaded: Loaded) {
        let Loaded { manifest, outcome } = loaded;
        let model = self.observed.models.entry(manifest.name.clone()).or_default();
        model.loading = None;
        self.loading.remove(&manifest.name);
        match outcome {
            Ok(None) => {
                tracing::info!(
                    model = manifest.name,
                    version = manifest.version,
                    "model was loaded in vain: its manifest has changed meanwhile"
                );
                if model.serving.is_none() && model.failed.is_none() {
                    self.observed.models.remove(&manifest.name);
                }
            }
            Ok(Some((info, took))) => {
                tracing::info!(
                    model = info.name,
                    version = info.version,
                    digest = info.digest,
                    engine = info.engine,
                    took_ms = took.as_millis(),
                    "model serves"
                );
                self.failures.remove(&manifest.name);
                model.serving = Some(manifest);
                model.failed = None;
                model.refused = None;
            }
            Err(reason) => {
                let failures = self.failures.entry(manifest.name.clone()).or_insert_with(|| Failures {
                    backoff: Backoff::new(RETRY_FIRST, RETRY_CAP),
                    version: 0,
                    reason: String::new(),
                });
                if failures.version != manifest.version {
                    failures.backoff.reset();
                }
                let delay = failures.backoff.next_delay();
                if (failures.version, &failures.reason) != (manifest.version, &reason) {
                    let serving = model.serving.as_ref().map(|serving| serving.version);
                    tracing::error!(
                        model = manifest.name,
                        version = manifest.version,
                        serving,
                        reason,
                        "model cannot be loaded, trying again later"
                    );
                    (failures.version, failures.reason) = (manifest.version, reason);
                }
                model.failed = Some((manifest, Instant::now() + delay));
            }
        }
    }

    async fn unload(&mut self, name: &str) {
        self.observed.models.remove(name);
        self.failures.remove(name);
        let Some(slot) = self.slots.get(name).cloned() else { return };
        if slot.serving().is_some() {
            let ended = tokio::task::spawn_blocking(move || slot.stop()).await;
            if let Err(error) = ended {
                tracing::error!(model = name, %error, "the model could not be stopped in order");
            }
            tracing::info!(model = name, "model unloaded");
        }
    }

    /// Tells the probes and the metrics how the models stand.
    fn report(&mut self) {
        let mut models = BTreeMap::new();
        let mut states = BTreeMap::new();
        for (name, wanted) in &self.desired.models {
            let observed = self.observed.models.get(name);
            let serving = observed.and_then(|model| model.serving.as_ref());
            let state = match observed {
                Some(model) if model.serving.as_ref() == Some(wanted) => ModelState::Ready,
                Some(model) if model.loading.is_some() => ModelState::Warming,
                Some(model) if model.failed.as_ref().is_some_and(|(failed, _)| failed == wanted) => ModelState::Failed,
                Some(model) if model.refused.as_ref() == Some(wanted) => ModelState::Failed,
                _ => ModelState::Pending,
            };
            if state == ModelState::Ready {
                self.failures.remove(name);
            }
            let has_failed =
                observed.and_then(|model| model.failed.as_ref()).is_some_and(|(failed, _)| failed == wanted);
            let reason = match (state, self.failures.get(name)) {
                (ModelState::Failed, Some(failures)) if has_failed => Some(failures.reason.clone()),
                (ModelState::Failed, _) => Some(LOWER_VERSION.to_owned()),
                _ => None,
            };
            if state == ModelState::Ready {
                self.failures.remove(name);
            }
            states.insert(name.clone(), (wanted.version, state));
            models.insert(
                name.clone(),
                ModelHealth {
                    version: wanted.version,
                    state: state.name(),
                    serving: serving.map(|serving| serving.version),
                    reason,
                },
            );
        }
        if self.reported != states {
            for (name, (version, state)) in &self.reported {
                drop(self.metrics.model_state.remove_label_values(&[name, &version.to_string(), state.name()]));
            }
            for (name, (version, state)) in &states {
                self.metrics.model_state.with_label_values(&[name, &version.to_string(), state.name()]).set(1);
            }
            self.reported = states;
        }
        self.health.beat(Instant::now(), models);
    }
}

/// The end of a look that is under way; never, where none is.
async fn under_way(
    looking: &mut Option<JoinHandle<(Folder, Vec<Finding>)>>,
) -> Result<(Folder, Vec<Finding>), JoinError> {
    match looking {
        Some(look) => {
            let looked = look.await;
            *looking = None;
            looked
        }
        None => std::future::pending().await,
    }
}

/// Reads, verifies and loads a model, with a warm pipeline for each instance. The bytes that were verified are the bytes
/// that are loaded.
fn load(manifest: &ModelManifest) -> Result<Ready, String> {
    let file = manifest.file.display();
    let bytes = read_bounded(&manifest.file, MODEL_BYTES_MAX).map_err(|error| format!("{file}: {error}"))?;
    let digest = Digest::of(&bytes);
    if let Some(expected) = manifest.digest.filter(|expected| *expected != digest) {
        return Err(format!("{file} has the digest {digest}, but spec.source.digest asks for {expected}"));
    }
    let engine = engine_for(&manifest.spec).map_err(|error| error.to_string())?;
    let first = Pipeline::load(engine, &bytes, &manifest.spec).map_err(|error| format!("{file}: {error}"))?;
    let info = ModelInfo {
        name: manifest.name.clone(),
        version: manifest.version,
        digest: digest.to_string(),
        engine: first.engine().to_owned(),
        device: "cpu".to_owned(),
    };
    let mut pipelines = vec![first];
    for _ in 1..manifest.instances {
        let fork = pipelines[0].fork().map_err(|error| format!("{file}: {error}"))?;
        pipelines.push(fork);
    }
    Ok(Ready { info: Arc::new(info), pipelines })
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
