//! The reconciler's state machine: what is desired, what is observed, and what to do next. Synchronous and without I/O other
//! than the file of last-good versions; time is an argument.
//!
//! A model version moves like this:
//!
//! ```text
//!            Load                     loaded
//!  (absent) ──────> Loading ─────────────────────> Serving ─── Unload ───> (absent)
//!                    │   ^                            │
//!             failed │   │ Load, after the backoff    │ Load of a changed manifest; the version
//!                    v   │                            v that serves is not touched until then
//!                   Failed                         Loading beside Serving
//!                    │
//!                    │ three failures of one digest
//!                    v
//!                Quarantined: not tried again until the manifest or the file changes
//! ```
//!
//! [`plan`](super::plan::plan) computes the steps from the desired to the observed state; this module keeps the observed
//! state, and turns steps into [`Action`]s that the driver carries out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lineside_api::kinds::{ModelManifest, StreamManifest};
use lineside_api::state::ModelState;
use lineside_common::backoff::Backoff;
use lineside_common::digest::Digest;
use lineside_common::error_chain;
use lineside_models::last_good::{HighestVersion, LastGoodError, LastGoodVersions};
use lineside_scheduler::VersionId;
use tokio_util::sync::CancellationToken;

use super::load_task::{LoadFailure, LoadProgress, LoadRequest, LoadedVersion};
use super::plan::{ObservedModel, ObservedState, Step, plan};
use super::snapshot::{ModelSnapshot, Snapshot, StreamSnapshot};
use crate::desired::{Assignment, DesiredObject, DesiredState, Identity, Node, Refused};

/// First delay before a model that failed to load is tried again.
const RETRY_FIRST: Duration = Duration::from_secs(4);
/// Longest delay between two tries.
const RETRY_CAP: Duration = Duration::from_secs(120);
/// Delay before a last-good version that could not be restored is tried again.
const RESTORE_RETRY: Duration = Duration::from_secs(30);
/// Why a version below the highest that ever served is refused.
pub(super) const LOWER_VERSION: &str = "a lower version is refused; set rollback: true to go back";
/// Why a version is refused while the highest version is not known.
pub(super) const UNKNOWN_HIGHEST: &str = "highest-versions.json in the data folder cannot be read, so it is not known whether \
    this version is lower than one that served; restore the file, or run `lineside store reset-highest-versions` and restart \
    the agent, or set rollback: true";

/// Why a version is refused. `highest` is `None` when it is not known.
fn refusal(highest: Option<u64>) -> &'static str {
    if highest.is_some() { LOWER_VERSION } else { UNKNOWN_HIGHEST }
}

/// What the driver has to do.
pub(super) enum Action {
    /// Load a version in the background; the outcome comes back through [`Core::on_load_finished`].
    Load(Box<LoadRequest>),
    /// Stop the versions of a model.
    Unload(String),
    /// Start a stream.
    StartStream(Box<StreamManifest>),
    /// Stop a stream.
    StopStream(String),
}

/// The outcome of a load.
#[derive(Debug)]
pub(super) struct LoadOutcome {
    pub(super) manifest: ModelManifest,
    /// Whether it was the last-good version, restored because nothing served.
    pub(super) is_restored: bool,
    /// What serves now; `None` when the manifest changed before the version could serve.
    pub(super) result: Result<Option<LoadedVersion>, LoadFailure>,
}

/// A load that runs.
struct RunningLoad {
    superseded: CancellationToken,
    progress: Arc<LoadProgress>,
}

/// The failures of a model since it last loaded.
struct RetryState {
    backoff: Backoff,
    version: u64,
    /// How far the last try came.
    phase: ModelState,
    failure: LoadFailure,
}

/// Whether the store still has a file.
pub(super) type HasBlob = Box<dyn Fn(&Digest) -> bool + Send>;

/// The state.
pub(super) struct Core {
    node: Node,
    /// Labels of the agent's own configuration; they override those of the cluster.
    own_labels: BTreeMap<String, String>,
    desired: Option<Arc<DesiredState>>,
    identities: BTreeMap<(&'static str, String), Identity>,
    assignment: Assignment,
    observed: ObservedState,
    last_good: LastGoodVersions,
    has_blob: HasBlob,
    retries: HashMap<String, RetryState>,
    loads: HashMap<String, RunningLoad>,
    serving: HashMap<String, LoadedVersion>,
    paused: BTreeSet<String>,
    /// Objects that stand behind another of the same name, logged already.
    duplicates: BTreeSet<String>,
}

impl Core {
    /// A core that knows the versions that served last, and nothing else.
    pub(super) fn new(node: Node, last_good: LastGoodVersions, has_blob: HasBlob) -> Self {
        Self {
            own_labels: node.labels.clone(),
            node,
            desired: None,
            identities: BTreeMap::new(),
            assignment: Assignment::default(),
            observed: ObservedState::default(),
            last_good,
            has_blob,
            retries: HashMap::new(),
            loads: HashMap::new(),
            serving: HashMap::new(),
            paused: BTreeSet::new(),
            duplicates: BTreeSet::new(),
        }
    }

    /// Takes a new desired state.
    pub(super) fn on_desired(&mut self, desired: Arc<DesiredState>) {
        let is_complete = desired.is_complete;
        self.assign(desired);
        self.track_models(is_complete);
        self.cancel_superseded();
    }

    /// Selects the objects for this node. Of two objects with one name, the first counts.
    fn assign(&mut self, desired: Arc<DesiredState>) {
        self.node.labels.clone_from(&desired.labels);
        self.node.labels.extend(self.own_labels.clone());
        let mut assignment = Assignment::default();
        if desired.is_pending {
            assignment.models = self.restorable();
        }
        let mut identities = BTreeMap::new();
        let mut duplicates = BTreeSet::new();
        for DesiredObject { object, place, identity } in &desired.objects {
            let (kind, name) = object.key();
            if !assignment.add(object.clone(), &self.node) {
                let duplicate = format!("{kind} {name} in {place}");
                if !self.duplicates.contains(&duplicate) {
                    tracing::error!(
                        event = "duplicate_object",
                        kind,
                        name,
                        file = place,
                        "The object is defined in an earlier file too; this definition is ignored"
                    );
                }
                duplicates.insert(duplicate);
                continue;
            }
            identities.insert((kind, name.to_owned()), identity.clone());
        }
        assignment.streams.retain(|name, _| !self.paused.contains(name));
        (self.assignment, self.identities, self.duplicates) = (assignment, identities, duplicates);
        self.desired = Some(desired);
    }

    /// The models whose last-good version is in the store. They serve while the desired state is not known.
    fn restorable(&self) -> BTreeMap<String, ModelManifest> {
        let good = self.last_good.names().filter_map(|name| Some((name, self.last_good.get(name)?)));
        let stored = good.filter(|(_, good)| (self.has_blob)(&good.digest));
        stored.map(|(name, good)| (name.clone(), good.manifest.clone())).collect()
    }

    /// Begins to observe models that are new, with what is remembered of them, and forgets those that are gone.
    fn track_models(&mut self, is_complete: bool) {
        let wanted = &self.assignment.models;
        for name in wanted.keys() {
            if !self.observed.models.contains_key(name) {
                let good = self.last_good.get(name).filter(|good| (self.has_blob)(&good.digest));
                let last_good = good.map(|good| good.manifest.clone());
                let highest = self.last_good.highest_version(name);
                let model = ObservedModel { highest, last_good, ..ObservedModel::default() };
                self.observed.models.insert(name.clone(), model);
            }
        }
        self.observed.models.retain(|name, model| wanted.contains_key(name) || !model.is_idle());
        // An incomplete state, such as a file that cannot be read, does not show that a model is gone.
        if is_complete {
            let is_gone = |name: &&String| !wanted.contains_key(*name) && !self.observed.models.contains_key(*name);
            let gone: Vec<String> = self.last_good.names().filter(is_gone).cloned().collect();
            gone.iter().for_each(|name| self.forget_last_good(name));
        }
    }

    /// Cancels loads of manifests that are not wanted any more. A last-good version is loaded to the end, unless its model is
    /// gone.
    fn cancel_superseded(&mut self) {
        for (name, load) in &self.loads {
            let model = self.observed.models.get(name);
            let wanted = self.assignment.models.get(name);
            let is_restored = wanted.is_some() && model.is_some_and(|model| model.loading == model.last_good);
            if wanted != model.and_then(|model| model.loading.as_ref()) && !is_restored {
                load.superseded.cancel();
            }
        }
    }

    fn forget_last_good(&mut self, name: &str) {
        if let Err(error) = self.last_good.remove(name) {
            log_not_written(name, &error);
        }
    }

    /// The actions that are due, in the order in which they are to be carried out.
    pub(super) fn poll(&mut self, now: Instant) -> Vec<Action> {
        self.track_models(false);
        self.cancel_superseded();
        let mut actions = Vec::new();
        for step in plan(&self.assignment, &self.observed, now) {
            match step {
                Step::Load(manifest) => actions.push(self.begin_load(manifest, false)),
                Step::Restore(manifest) => actions.push(self.begin_load(manifest, true)),
                Step::Refuse { manifest, highest } => {
                    tracing::error!(
                        event = "model_version_refused",
                        model = manifest.name,
                        version = manifest.version,
                        highest,
                        "{}",
                        refusal(highest)
                    );
                    let name = manifest.name.clone();
                    self.observed.models.entry(name).or_default().refused = Some(manifest);
                }
                Step::Unload(name) => {
                    self.observed.models.remove(&name);
                    self.retries.remove(&name);
                    self.serving.remove(&name);
                    self.forget_last_good(&name);
                    actions.push(Action::Unload(name));
                }
                Step::Start(manifest) => {
                    self.observed.streams.insert(manifest.name.clone(), manifest.clone());
                    actions.push(Action::StartStream(Box::new(manifest)));
                }
                Step::Stop(name) => {
                    self.observed.streams.remove(&name);
                    actions.push(Action::StopStream(name));
                }
            }
        }
        actions
    }

    fn begin_load(&mut self, manifest: ModelManifest, is_restored: bool) -> Action {
        if manifest.spec.runtime.threads.is_some_and(|threads| threads > 1) {
            tracing::warn!(
                event = "threads_ignored",
                model = manifest.name,
                "spec.runtime.threads is ignored: tract runs one thread per instance"
            );
        }
        let known_good = self.last_good.get(&manifest.name).filter(|good| good.manifest.version == manifest.version);
        let known_good = known_good.map(|good| good.digest);
        let model = self.observed.models.entry(manifest.name.clone()).or_default();
        model.loading = Some(manifest.clone());
        let has_alternative = model.last_good.as_ref().is_some_and(|last_good| *last_good != manifest);
        let request = LoadRequest {
            known_good,
            is_restored,
            has_alternative,
            protected: self.protected(),
            superseded: CancellationToken::new(),
            progress: Arc::new(LoadProgress::new(&manifest)),
            manifest,
        };
        let load = RunningLoad { superseded: request.superseded.clone(), progress: request.progress.clone() };
        self.loads.insert(request.manifest.name.clone(), load);
        Action::Load(Box::new(request))
    }

    /// Digests that must not be evicted: what serves, what served last, and what is wanted.
    pub(super) fn protected(&self) -> BTreeSet<Digest> {
        let serving = self.serving.values().map(|serving| serving.digest);
        let wanted = self.assignment.models.values().filter_map(|model| model.digest);
        serving.chain(wanted).chain(self.last_good.digests()).collect()
    }

    /// Models and streams of the observed state: their deployments are needed.
    pub(super) fn needs_deployment(&self, model: &str) -> bool {
        self.observed.models.contains_key(model) || self.observed.streams.values().any(|stream| stream.model == model)
    }

    /// Takes the outcome of a load. `still_serves` states whether a version of the model serves now; one that was stopped
    /// first to make room does not.
    pub(super) fn on_load_finished(&mut self, outcome: LoadOutcome, still_serves: bool, now: Instant) {
        let LoadOutcome { manifest, is_restored, result } = outcome;
        let phase = self.loads.remove(&manifest.name).map_or(ModelState::Pending, |load| load.progress.state());
        let model = self.observed.models.entry(manifest.name.clone()).or_default();
        model.loading = None;
        if !still_serves {
            model.serving = None;
            self.serving.remove(&manifest.name);
        }
        match result {
            Ok(None) => {
                tracing::info!(
                    event = "model_load_superseded",
                    model = manifest.name,
                    version = manifest.version,
                    "Loading was cancelled: the manifest has changed"
                );
                if model.is_idle() && !self.assignment.models.contains_key(&manifest.name) {
                    self.observed.models.remove(&manifest.name);
                }
            }
            Ok(Some(loaded)) => self.on_serving(manifest, is_restored, loaded),
            Err(failure) if is_restored => {
                let is_first = model.restore_at.is_none();
                model.restore_at = Some(now + RESTORE_RETRY);
                if is_first {
                    tracing::error!(
                        event = "last_good_not_restored",
                        model = manifest.name,
                        version = manifest.version,
                        reason = failure.reason,
                        "The last-good version cannot be restored, retrying"
                    );
                }
            }
            Err(failure) => self.on_failed(manifest, phase, failure, now),
        }
    }

    fn on_serving(&mut self, manifest: ModelManifest, is_restored: bool, loaded: LoadedVersion) {
        let info = &loaded.info;
        tracing::info!(
            event = "model_serving",
            model = info.name,
            version = info.version,
            digest = info.digest,
            engine = info.engine,
            took_ms = loaded.took.as_millis() as u64,
            "Model is serving"
        );
        if is_restored {
            let wanted = self.assignment.models.get(&manifest.name).map(|wanted| wanted.version);
            tracing::warn!(
                event = "last_good_serving",
                model = info.name,
                version = info.version,
                digest = info.digest,
                wanted,
                "The last-good version is serving meanwhile"
            );
        } else {
            self.retries.remove(&manifest.name);
        }
        // The command line reads this file to know what must not be evicted, so it is written before anything else can
        // happen to the version before.
        if let Err(error) = self.last_good.record(&manifest, loaded.digest) {
            tracing::error!(
                event = "last_good_not_written",
                reason = error_chain(&error),
                "The last-good file cannot be written; a start without a network may serve an older version"
            );
        }
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

    fn on_failed(&mut self, manifest: ModelManifest, phase: ModelState, failure: LoadFailure, now: Instant) {
        let model = self.observed.models.entry(manifest.name.clone()).or_default();
        let serving = model.serving.as_ref().map(|serving| serving.version);
        let retry = self.retries.entry(manifest.name.clone());
        let is_known = matches!(&retry, std::collections::hash_map::Entry::Occupied(known)
            if known.get().version == manifest.version && known.get().failure == failure);
        let retry = retry.or_insert_with(|| RetryState {
            backoff: Backoff::new(RETRY_FIRST, RETRY_CAP),
            version: manifest.version,
            phase,
            failure: failure.clone(),
        });
        if retry.version != manifest.version {
            retry.backoff.reset();
        }
        let delay = retry.backoff.next_delay();
        if !is_known {
            match failure.quarantined_after {
                Some(failures) => tracing::error!(
                    event = "model_quarantined",
                    model = manifest.name,
                    version = manifest.version,
                    digest = failure.digest.map(|digest| digest.to_string()),
                    failures,
                    serving,
                    reason = failure.reason,
                    "Model is quarantined"
                ),
                None => tracing::error!(
                    event = "model_load_failed",
                    model = manifest.name,
                    version = manifest.version,
                    serving,
                    reason = failure.reason,
                    "Model cannot be loaded, retrying"
                ),
            }
        }
        let retry_at = failure.quarantined_after.is_none().then(|| now + delay);
        (retry.version, retry.phase, retry.failure) = (manifest.version, phase, failure);
        model.failed = Some((manifest, retry_at));
    }

    /// The scheduler gave up the version that serves: its workers hang or end. It counts as a failed load, and the version that
    /// served before it is restored.
    pub(super) fn on_given_up(&mut self, name: &str, reason: &str, now: Instant) {
        self.serving.remove(name);
        let Some(manifest) = self.observed.models.get_mut(name).and_then(|model| model.serving.take()) else { return };
        let failure = LoadFailure { reason: reason.to_owned(), quarantined_after: None, digest: None };
        let before = self.last_good.fall_back(name).unwrap_or_else(|error| {
            log_not_written(name, &error);
            self.last_good.get(name).cloned()
        });
        let before = before.filter(|before| (self.has_blob)(&before.digest)).map(|before| before.manifest);
        self.on_failed(manifest, ModelState::Ready, failure, now);
        let Some(model) = self.observed.models.get_mut(name) else { return };
        if let Some(before) = before {
            model.last_good = Some(before);
            model.restore_at = None;
        }
        // Where the version that hung is the last-good version itself, it is not restored at once: it would hang again at once.
        if let (Some(last_good), Some((failed, Some(retry_at)))) = (&model.last_good, &model.failed)
            && last_good == failed
        {
            model.restore_at = Some(*retry_at);
        }
    }

    /// The versions that serve, by model.
    pub(super) fn serving_ids(&self) -> Vec<(String, VersionId)> {
        self.serving.iter().map(|(name, loaded)| (name.clone(), loaded.id)).collect()
    }

    /// Tries failed models at once.
    pub(super) fn retry_now(&mut self, now: Instant) {
        for model in self.observed.models.values_mut() {
            if let Some((_, Some(retry_at))) = &mut model.failed {
                *retry_at = now;
            }
        }
    }

    /// Pauses a stream until it is resumed or the agent is restarted. `false` when there is no such stream.
    pub(super) fn pause(&mut self, stream: &str) -> bool {
        if self.paused.contains(stream) {
            return true;
        }
        let exists = self.assignment.streams.remove(stream).is_some();
        if exists {
            self.paused.insert(stream.to_owned());
        }
        exists
    }

    /// Resumes a stream. `false` when there is no such stream.
    pub(super) fn resume(&mut self, stream: &str) -> bool {
        if self.paused.remove(stream) {
            if let Some(desired) = self.desired.clone() {
                self.assign(desired);
            }
            return true;
        }
        self.assignment.streams.contains_key(stream)
    }

    /// The paused streams.
    pub(super) fn paused(&self) -> Vec<String> {
        self.paused.iter().cloned().collect()
    }

    /// The streams of this node that are not paused.
    pub(super) fn stream_names(&self) -> Vec<String> {
        self.assignment.streams.keys().cloned().collect()
    }

    /// Cancels all loads.
    pub(super) fn cancel_loads(&self) {
        self.loads.values().for_each(|load| load.superseded.cancel());
    }

    /// The state as others see it.
    pub(super) fn snapshot(&self) -> Snapshot {
        let refused = self.desired.iter().flat_map(|desired| &desired.refused);
        let refused: Vec<Refused> = refused.filter(|refused| refused.concerns(&self.node)).cloned().collect();
        let paused = self.paused.iter().map(|name| StreamSnapshot {
            name: name.clone(),
            model: None,
            identity: self.identity("CameraStream", name),
            has_model: true,
            is_paused: true,
        });
        let running = self.assignment.streams.values().map(|stream| StreamSnapshot {
            name: stream.name.clone(),
            model: Some(stream.model.clone()),
            identity: self.identity("CameraStream", &stream.name),
            has_model: self.assignment.models.contains_key(&stream.model),
            is_paused: false,
        });
        let desired = self.desired.as_deref();
        Snapshot {
            is_configured: desired.is_some_and(|desired| !desired.is_pending),
            unreadable: desired.and_then(|desired| desired.unreadable.clone()),
            rejected_files: desired.map(|desired| desired.rejected_files.clone()).unwrap_or_default(),
            is_restored: self.observed.models.values().all(ObservedModel::is_restored),
            labels: self.node.labels.clone(),
            models: self.assignment.models.values().map(|wanted| self.model_snapshot(wanted)).collect(),
            streams: running.chain(paused).collect(),
            refused,
            serving: self.serving.iter().map(|(name, loaded)| (name.clone(), loaded.clone())).collect(),
        }
    }

    fn model_snapshot(&self, wanted: &ModelManifest) -> ModelSnapshot {
        let (state, reason) = self.model_state(wanted);
        let load = self.loads.get(&wanted.name).filter(|_| state == ModelState::Downloading);
        let retry = self.retries.get(&wanted.name).filter(|retry| retry.version == wanted.version);
        ModelSnapshot {
            name: wanted.name.clone(),
            version: wanted.version,
            digest: wanted.digest,
            identity: self.identity("EdgeModel", &wanted.name),
            state,
            reason,
            failed_phase: retry.map(|retry| retry.phase),
            download: load.map(|load| load.progress.download()),
        }
    }

    /// The state of the wanted version, and why it is not ready.
    fn model_state(&self, wanted: &ModelManifest) -> (ModelState, Option<String>) {
        let Some(observed) = self.observed.models.get(&wanted.name) else { return (ModelState::Pending, None) };
        if observed.serving.as_ref() == Some(wanted) {
            return (ModelState::Ready, None);
        }
        if observed.loading.as_ref() == Some(wanted)
            && let Some(load) = self.loads.get(&wanted.name)
        {
            return (load.progress.state(), None);
        }
        if observed.failed.as_ref().is_some_and(|(failed, _)| failed == wanted) {
            let failure = self.retries.get(&wanted.name).map(|retry| &retry.failure);
            let is_quarantined = failure.is_some_and(|failure| failure.quarantined_after.is_some());
            let state = if is_quarantined { ModelState::Quarantined } else { ModelState::Failed };
            return (state, failure.map(|failure| failure.reason.clone()));
        }
        if observed.refused.as_ref() == Some(wanted) {
            let is_known = observed.highest != HighestVersion::Unknown;
            return (ModelState::Failed, Some(refusal(is_known.then_some(wanted.version)).to_owned()));
        }
        (ModelState::Pending, None)
    }

    fn identity(&self, kind: &'static str, name: &str) -> Identity {
        self.identities.get(&(kind, name.to_owned())).cloned().unwrap_or_default()
    }
}

fn log_not_written(model: &str, error: &LastGoodError) {
    let reason = error_chain(error);
    tracing::error!(event = "last_good_not_written", model, reason, "The last-good file cannot be written");
}
