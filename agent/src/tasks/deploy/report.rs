//! What the loop tells the probes, the metrics and the operators.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Instant, SystemTime};

use super::{Deploy, LOWER_VERSION};
use crate::base::clock;
use crate::config::ModelManifest;
use crate::message::Event;
use crate::plan::ModelState;
use crate::serve::health::ModelHealth;
use crate::serve::status::{Condition, ModelStatus, Serving};
use crate::trust::has_expired;

impl Deploy {
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
        let conditions = self.conditions();
        self.board.set(statuses, conditions);
        self.health.beat(Instant::now(), healths);
    }

    /// Where the version that is asked for stands, and why it is not ready.
    fn state(&self, wanted: &ModelManifest) -> (ModelState, Option<String>) {
        let Some(observed) = self.observed.models.get(&wanted.name) else { return (ModelState::Pending, None) };
        if observed.serving.as_ref() == Some(wanted) {
            return (ModelState::Ready, None);
        }
        if observed.loading.as_ref() == Some(wanted)
            && let Some(errand) = self.errands.get(&wanted.name)
        {
            return (errand.stage.get(), None);
        }
        if observed.failed.as_ref().is_some_and(|(failed, _)| failed == wanted) {
            let setback = self.failures.get(&wanted.name).map(|failures| &failures.setback);
            let is_quarantined = setback.is_some_and(|setback| setback.quarantined_after.is_some());
            let state = if is_quarantined { ModelState::Quarantined } else { ModelState::Failed };
            return (state, setback.map(|setback| setback.reason.clone()));
        }
        match observed.refused.as_ref() == Some(wanted) {
            true => (ModelState::Failed, Some(LOWER_VERSION.to_owned())),
            false => (ModelState::Pending, None),
        }
    }

    fn status(&self, wanted: &ModelManifest, state: ModelState, reason: Option<String>) -> ModelStatus {
        let brought = self.serving.get(&wanted.name);
        let figures = brought.map(|brought| &brought.figures);
        let errand = self.errands.get(&wanted.name).filter(|_| state == ModelState::Downloading);
        ModelStatus {
            name: wanted.name.clone(),
            version: wanted.version,
            digest: match (wanted.digest, brought) {
                (None, Some(brought)) if state == ModelState::Ready => Some(brought.digest.to_string()),
                (digest, _) => digest.map(|digest| digest.to_string()),
            },
            state: state.name(),
            serving: brought.map(|brought| Serving {
                version: brought.info.version,
                digest: brought.info.digest.clone(),
                engine: brought.info.engine.clone(),
                device: brought.info.device.clone(),
            }),
            p50_ms: figures.map(|figures| figures.p50_ms),
            p99_ms: figures.map(|figures| figures.p99_ms),
            peak_memory_mib: figures.map(|figures| (figures.peak_memory_bytes as f64 / 1048.576).round() / 1e3),
            reason,
            progress: errand.map(|errand| errand.stage.progress.snapshot()),
            signature_expires: brought.and_then(|brought| brought.expires).map(clock::rfc3339),
        }
    }

    /// What an operator should know. An expired signature is said, and stops nothing.
    fn conditions(&mut self) -> Vec<Condition> {
        let mut conditions = Vec::new();
        self.metrics.signature_expiry.reset();
        let mut expired = BTreeSet::new();
        for (name, brought) in &self.serving {
            let Some(expires) = brought.expires else { continue };
            let seconds = expires.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
            let version = brought.info.version;
            let labels = [name.as_str(), &version.to_string()];
            let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
            self.metrics.signature_expiry.with_label_values(&labels).set(seconds);
            if has_expired(expires, SystemTime::now()) {
                let expires = clock::rfc3339(expires);
                if !self.expired.contains(name) {
                    tracing::warn!(
                        model = name,
                        version,
                        expires,
                        "signature has expired, the running version goes on"
                    );
                }
                expired.insert(name.clone());
                conditions.push(Condition::degraded(
                    "SignatureExpired",
                    format!("the signature of {name} version {version} ended at {expires}; sign it again"),
                ));
            }
        }
        self.expired = expired;
        conditions.extend(self.spool_conditions());
        conditions
    }

    /// What an operator should know of the results that wait.
    fn spool_conditions(&self) -> Vec<Condition> {
        let stats = self.spool.stats();
        self.metrics.spool_in_trouble.set(i64::from(stats.trouble.is_some()));
        let trouble = stats.trouble.map(|trouble| {
            let message = format!("the disk does not take results ({trouble}); they wait in memory, which holds few");
            Condition::degraded("SpoolDiskFailing", message)
        });
        let overflow = stats.is_overflowing.then(|| {
            let message = format!(
                "results gave way for room within the last minute: {} bytes wait and {} may; is a broker reached?",
                stats.bytes, stats.bytes_max
            );
            Condition::degraded("SpoolFull", message)
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
        let event = Event::ModelState {
            model: name.to_owned(),
            version: wanted.version,
            state: state.name().into(),
            serving,
            reason: reason.clone(),
        };
        if self.said.get(name) != Some(&event) {
            self.said.insert(name.to_owned(), event.clone());
            self.outbox.event(event);
        }
    }
}
