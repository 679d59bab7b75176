//! Whether the agent lives, and whether it is ready. Neither depends on the network: an agent without a broker, a camera
//! or a cluster is alive and may be ready; being offline is to be reported, not to be restarted for.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lineside_api::state::ModelState;
use serde::Serialize;

/// The core loop beats twice a second; after this long without, something is badly wrong and a restart may help.
const BEAT_OVERDUE: Duration = Duration::from_secs(30);

/// One model as readiness sees it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelHealth {
    /// The version that was asked for.
    pub version: u64,
    /// Where that version stands.
    pub state: ModelState,
    /// The version that serves, where one does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serving: Option<u64>,
    /// Why it is not ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Readiness in full.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Readiness {
    /// Whether every model that was asked for has a version that serves, and the manifests have been read once.
    pub ready: bool,
    /// By name.
    pub models: BTreeMap<String, ModelHealth>,
}

/// Written by the core loop, read by the probes.
pub struct Health {
    state: Mutex<State>,
}

struct State {
    last_beat: Instant,
    is_settled: bool,
    models: BTreeMap<String, ModelHealth>,
}

impl Health {
    /// Health of an agent that starts now: alive, not ready.
    pub fn new(now: Instant) -> Self {
        Self { state: Mutex::new(State { last_beat: now, is_settled: false, models: BTreeMap::new() }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The core loop has come round and this is how the models stand.
    ///
    /// `is_settled` says that it is known what is asked for; without that, no agent is ready.
    pub fn beat(&self, now: Instant, is_settled: bool, models: BTreeMap<String, ModelHealth>) {
        *self.state() = State { last_beat: now, is_settled, models };
    }

    /// Whether the core loop beats.
    pub fn is_alive(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.state().last_beat) < BEAT_OVERDUE
    }

    /// Whether the models that were asked for can be used.
    pub fn readiness(&self) -> Readiness {
        let state = self.state();
        let ready = state.is_settled && state.models.values().all(|model| model.serving.is_some());
        Readiness { ready, models: state.models.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(serving: Option<u64>) -> BTreeMap<String, ModelHealth> {
        BTreeMap::from([("m".to_owned(), ModelHealth { version: 2, state: ModelState::Failed, serving, reason: None })])
    }

    #[test]
    fn a_model_that_serves_its_last_good_version_is_ready() {
        let now = Instant::now();
        let health = Health::new(now);
        assert!(!health.readiness().ready, "the manifests were not read yet");
        health.beat(now, false, BTreeMap::new());
        assert!(!health.readiness().ready, "nobody has said what is to run");
        health.beat(now, true, BTreeMap::new());
        assert!(health.readiness().ready);
        health.beat(now, true, model(None));
        assert!(!health.readiness().ready);
        health.beat(now, true, model(Some(1)));
        assert!(health.readiness().ready);
    }

    #[test]
    fn life_is_the_beat_of_the_core_loop() {
        let now = Instant::now();
        let health = Health::new(now);
        assert!(health.is_alive(now + Duration::from_secs(29)));
        assert!(!health.is_alive(now + Duration::from_secs(31)));
        health.beat(now + Duration::from_secs(31), true, BTreeMap::new());
        assert!(health.is_alive(now + Duration::from_secs(60)));
    }
}
