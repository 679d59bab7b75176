//! What the loop tells the probes, the metrics and the operators.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Instant, SystemTime};

use super::{LOWER_VERSION, Reconciler};
use crate::desired::{Identity, Refused};
use crate::http::health::ModelHealth;
use crate::http::status_store::NodeState;
use lineside_api::kinds::ModelManifest;
use lineside_api::message::NodeEvent;
use lineside_api::state::ModelState;
use lineside_api::status::{
    CONFIG_PENDING, Condition, DEGRADED, ITEMS_MAX, ModelStatus, READY, Serving, SpoolStatus, StreamStatus, degrade,
    shortened,
};
use lineside_common::clock;
use lineside_models::signing::has_expired;

impl Reconciler {
    /// Tells everybody how the models stand.
    pub(super) fn report(&mut self) {
        let mut statuses = Vec::new();
        let mut healths = BTreeMap::new();
        let mut states = BTreeMap::new();
        // What is desired does not change meanwhile; it is taken out so that the rest may.
        let models = std::mem::take(&mut self.desired.models);
        for (name, wanted) in &models {
            let (state, reason) = self.state(wanted);
            let status = self.status(wanted, state, reason.clone());
            let serving = status.serving.as_ref().map(|serving| serving.version);
            self.say(name, wanted, state, serving, &reason);
            statuses.push(status);
            healths.insert(name.clone(), ModelHealth { version: wanted.version, state: state.name(), serving, reason });
            states.insert(name.clone(), (wanted.version, state));
        }
        self.desired.models = models;
        self.said.retain(|name, _| states.contains_key(name));
        if self.reported != states {
            for (name, (version, state)) in &self.reported {
                drop(self.metrics.model_state.remove_label_values(&[name, &version.to_string(), state.name()]));
            }
            for (name, (version, state)) in &states {
                self.metrics.model_state.with_label_values(&[name, &version.to_string(), state.name()]).set(1);
            }
            self.reported = states;
        }
        let refused = self.refused();
        for refused in refused.iter().filter(|refused| refused.kind == "EdgeModel") {
            tell_refused(&mut statuses, refused);
        }
        let mut streams = self.streams(&refused);
        let stats = self.spool.stats();
        let spool = SpoolStatus {
            records: stats.records,
            bytes: stats.bytes,
            bytes_max: stats.bytes_max,
            oldest_seconds: stats.oldest.unwrap_or_default().as_secs(),
        };
        let conditions = self.conditions(&mut statuses, &streams);
        streams.truncate(ITEMS_MAX);
        let labels = self.node.labels.clone();
        self.board.set(NodeState { labels, models: statuses, streams, spool, conditions });
        self.health.beat(Instant::now(), self.asked.is_some(), healths);
    }

    /// What is meant for this node and cannot be followed.
    fn refused(&self) -> Vec<Refused> {
        let refused = self.asked.iter().flat_map(|desired_state| &desired_state.refused);
        refused.filter(|refused| refused.concerns(&self.node)).cloned().collect()
    }

    /// How the streams stand that are asked for.
    fn streams(&self, refused: &[Refused]) -> Vec<StreamStatus> {
        let members = self.members.borrow();
        let paused = self.paused.iter().map(|name| {
            let Identity { uid, generation } = self.identity("CameraStream", name);
            StreamStatus {
                name: name.clone(),
                uid,
                observed_generation: generation,
                reason: Some("an operator has paused it".to_owned()),
                ..StreamStatus::default()
            }
        });
        let desired = self.desired.streams.values().map(|stream| {
            let member = members.get(&stream.name);
            let up = member.is_some_and(|member| member.up);
            let reason = match member {
                _ if !self.desired.models.contains_key(&stream.model) => {
                    Some(format!("the model {} is not asked for on this node", stream.model))
                }
                Some(member) if !up => member.reason.clone(),
                _ => None,
            };
            let Identity { uid, generation } = self.identity("CameraStream", &stream.name);
            StreamStatus {
                name: stream.name.clone(),
                model: stream.model.clone(),
                uid,
                observed_generation: generation,
                up,
                reason: reason.as_deref().map(shortened),
            }
        });
        let mut streams: Vec<StreamStatus> = desired.chain(paused).collect();
        for refused in refused.iter().filter(|refused| refused.kind == "CameraStream") {
            let reason = Some(shortened(&format!("refused: {}", refused.reasons.join("; "))));
            let index = streams.iter().position(|stream| stream.name == refused.name).unwrap_or_else(|| {
                streams.push(StreamStatus { name: refused.name.clone(), ..StreamStatus::default() });
                streams.len() - 1
            });
            let stream = &mut streams[index];
            let Identity { uid, generation } = refused.identity.clone();
            (stream.reason, stream.uid, stream.observed_generation) = (reason, uid, generation);
        }
        streams.sort_by(|one, other| one.name.cmp(&other.name));
        streams
    }

    /// Where the version that is asked for stands, and why it is not ready.
    fn state(&self, wanted: &ModelManifest) -> (ModelState, Option<String>) {
        let Some(observed) = self.observed.models.get(&wanted.name) else { return (ModelState::Pending, None) };
        if observed.serving.as_ref() == Some(wanted) {
            return (ModelState::Ready, None);
        }
        if observed.loading.as_ref() == Some(wanted)
            && let Some(request) = self.running_loads.get(&wanted.name)
        {
            return (request.stage.get(), None);
        }
        if observed.failed.as_ref().is_some_and(|(failed, _)| failed == wanted) {
            let failure = self.failures.get(&wanted.name).map(|failures| &failures.failure);
            let is_quarantined = failure.is_some_and(|failure| failure.quarantined_after.is_some());
            let state = if is_quarantined { ModelState::Quarantined } else { ModelState::Failed };
            return (state, failure.map(|failure| failure.reason.clone()));
        }
        match observed.refused.as_ref() == Some(wanted) {
            true => (ModelState::Failed, Some(LOWER_VERSION.to_owned())),
            false => (ModelState::Pending, None),
        }
    }

    /// Which object of the cluster is followed; nothing without one.
    fn identity(&self, kind: &'static str, name: &str) -> Identity {
        self.identities.get(&(kind, name.to_owned())).cloned().unwrap_or_default()
    }

    fn status(&self, wanted: &ModelManifest, state: ModelState, reason: Option<String>) -> ModelStatus {
        let Identity { uid, generation } = self.identity("EdgeModel", &wanted.name);
        let loaded = self.serving.get(&wanted.name);
        let benchmark = loaded.map(|loaded| &loaded.benchmark);
        let request = self.running_loads.get(&wanted.name).filter(|_| state == ModelState::Downloading);
        let failed = self.failures.get(&wanted.name).filter(|failures| failures.version == wanted.version);
        ModelStatus {
            name: wanted.name.clone(),
            version: wanted.version,
            failed_phase: failed.map(|failures| failures.stage.name().to_owned()),
            digest: match (wanted.digest, loaded) {
                (None, Some(loaded)) if state == ModelState::Ready => Some(loaded.digest.to_string()),
                (digest, _) => digest.map(|digest| digest.to_string()),
            },
            state: state.name().to_owned(),
            uid,
            observed_generation: generation,
            serving: loaded.map(|loaded| Serving {
                version: loaded.info.version,
                digest: loaded.info.digest.clone(),
                engine: loaded.info.engine.clone(),
                device: loaded.info.device.clone(),
            }),
            p50_ms: benchmark.map(|benchmark| benchmark.p50_ms),
            p99_ms: benchmark.map(|benchmark| benchmark.p99_ms),
            peak_memory_mib: benchmark.map(|benchmark| (benchmark.peak_memory_bytes as f64 / 1048.576).round() / 1e3),
            reason: reason.as_deref().map(shortened),
            progress: request.map(|request| request.stage.progress.snapshot()),
            signature_expires: loaded.and_then(|loaded| loaded.expires).map(clock::rfc3339),
        }
    }

    /// What an operator should know. An expired signature is said, and stops nothing.
    fn conditions(&mut self, models: &mut Vec<ModelStatus>, streams: &[StreamStatus]) -> Vec<Condition> {
        let mut conditions = vec![self.ready(models), self.broker()];
        if self.has_cluster {
            conditions.push(self.cluster());
        }
        let mut troubles: Vec<(&str, String)> = Vec::new();
        self.metrics.signature_expiry.reset();
        let mut expired = BTreeSet::new();
        for (name, loaded) in &self.serving {
            let Some(expires) = loaded.expires else { continue };
            let seconds = expires.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
            let version = loaded.info.version;
            let labels = [name.as_str(), &version.to_string()];
            let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
            self.metrics.signature_expiry.with_label_values(&labels).set(seconds);
            if has_expired(expires, SystemTime::now()) {
                let expires = clock::rfc3339(expires);
                if !self.expired.contains(name) {
                    tracing::warn!(
                        event = "signature_expired",
                        model = name,
                        version,
                        expires,
                        "signature has expired, the running version goes on"
                    );
                }
                expired.insert(name.clone());
                let message = format!("the signature of {name} version {version} ended at {expires}; sign it again");
                troubles.push(("SignatureExpired", message));
            }
        }
        self.expired = expired;
        troubles.extend(self.spool_troubles());
        for model in models.iter().filter(|model| matches!(model.state.as_str(), "Failed" | "Quarantined")) {
            let reason = if model.state == "Failed" { "ModelFailed" } else { "ModelQuarantined" };
            let why = model.reason.as_deref().unwrap_or_default();
            troubles.push((reason, format!("{} version {}: {why}", model.name, model.version)));
        }
        for stream in streams.iter().filter(|stream| !stream.up) {
            let why = stream.reason.as_deref().unwrap_or("no frames come");
            troubles.push(("StreamDown", format!("{}: {why}", stream.name)));
        }
        if models.len() > ITEMS_MAX || streams.len() > ITEMS_MAX {
            troubles.push(("LimitExceeded", format!("only {ITEMS_MAX} models and streams of a node are shown")));
            models.truncate(ITEMS_MAX);
        }
        conditions.push(Condition::new(DEGRADED, false, "AsExpected", ""));
        for (reason, message) in troubles {
            degrade(&mut conditions, reason, &message);
        }
        if let Some(degraded) = conditions.last_mut() {
            degraded.message = shortened(&degraded.message);
        }
        conditions
    }

    /// Whether every model that is asked for has a version that serves.
    fn ready(&self, models: &[ModelStatus]) -> Condition {
        let missing: Vec<&str> =
            models.iter().filter(|model| model.serving.is_none()).map(|model| model.name.as_str()).collect();
        match (&self.asked, missing.as_slice()) {
            (None, _) => Condition::new(READY, false, CONFIG_PENDING, "nobody has said yet what is to run here"),
            (Some(_), []) => Condition::new(READY, true, "ModelsReady", format!("{} models serve", models.len())),
            (Some(_), missing) => {
                let message = format!("no version serves of {}", missing.join(", "));
                Condition::new(READY, false, "ModelsNotReady", shortened(&message))
            }
        }
    }

    /// Whether results reach a broker.
    fn broker(&self) -> Condition {
        match self.metrics.mqtt_connected.get() {
            1 => Condition::new("BrokerConnected", true, "Connected", ""),
            _ => Condition::new(
                "BrokerConnected",
                false,
                "Disconnected",
                "results wait on disk; see the agent's log for why",
            ),
        }
    }

    /// Whether the cluster is heard. In the cluster itself this says True, since else nobody can write it there; it matters
    /// to whoever looks at the node.
    fn cluster(&self) -> Condition {
        match self.metrics.cluster_connected.get() {
            1 => Condition::new("ClusterConnected", true, "Connected", ""),
            _ => Condition::new(
                "ClusterConnected",
                false,
                "Disconnected",
                "what the cluster asked for last stays in force",
            ),
        }
    }

    /// What an operator should know of the results that wait.
    fn spool_troubles(&self) -> Vec<(&'static str, String)> {
        let stats = self.spool.stats();
        self.metrics.spool_degraded.set(i64::from(stats.trouble.is_some()));
        let trouble = stats.trouble.map(|trouble| {
            let message = format!("the disk does not take results ({trouble}); they wait in memory, which holds few");
            ("SpoolDegraded", message)
        });
        let overflow = stats.is_overflowing.then(|| {
            let message = format!(
                "results gave way for room within the last minute: {} bytes may wait; is a broker reached?",
                stats.bytes_max
            );
            ("SpoolFull", message)
        });
        trouble.into_iter().chain(overflow).collect()
    }

    /// Says where a model stands, when that is news.
    fn say(
        &mut self,
        name: &str,
        wanted: &ModelManifest,
        state: ModelState,
        serving: Option<u64>,
        reason: &Option<String>,
    ) {
        let event = NodeEvent::ModelState {
            model: name.to_owned(),
            version: wanted.version,
            state: state.name().into(),
            serving,
            reason: reason.clone(),
        };
        if self.said.get(name) != Some(&event) {
            self.said.insert(name.to_owned(), event.clone());
            self.message_writer.event(event);
        }
    }
}

/// A refused object overrides what is said of the content that is still followed.
fn tell_refused(models: &mut Vec<ModelStatus>, refused: &Refused) {
    let index = match models.iter().position(|model| model.name == refused.name) {
        Some(index) => index,
        None => {
            models.push(ModelStatus { name: refused.name.clone(), ..ModelStatus::default() });
            models.len() - 1
        }
    };
    let model = &mut models[index];
    model.state = ModelState::Failed.name().to_owned();
    model.version = refused.version.unwrap_or(model.version);
    let Identity { uid, generation } = refused.identity.clone();
    (model.uid, model.observed_generation) = (uid, generation);
    // These are of what it said before.
    (model.digest, model.failed_phase) = (None, None);
    model.reason = Some(shortened(&format!("refused: {}", refused.reasons.join("; "))));
}
