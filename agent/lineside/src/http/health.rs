//! Liveness and readiness of the agent. Neither depends on the network: an agent without a connection to its broker, cameras or
//! cluster is alive and can be ready. The status reports such a disconnection; a restart does not fix it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::config::probes::ReadinessMode;
use lineside_api::state::ModelState;
use parking_lot::Mutex;
use serde::Serialize;

/// Time without a heartbeat after which the agent is not alive. The reconciler sends a heartbeat twice a second; a restart may fix
/// a reconciler that sends none for this long.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(30);

/// The state of one model, as `/readyz` reports it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelHealth {
    /// The desired version.
    pub version: u64,
    /// State of the desired version.
    pub state: ModelState,
    /// The version that serves, which can be an earlier one. Absent when no version serves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serving: Option<u64>,
    /// Why the desired version does not serve.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The readiness of the agent, as `/readyz` reports it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Readiness {
    /// Whether the agent is ready, as the [mode](ReadinessMode) defines it.
    pub ready: bool,
    /// Why the desired state is not known, or cannot be read now. An agent that has read it once stays ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The desired models by name.
    pub models: BTreeMap<String, ModelHealth>,
}

/// The health of the agent. The reconciler writes it, the probes read it.
pub struct Health {
    mode: ReadinessMode,
    state: Mutex<State>,
}

struct State {
    last_heartbeat: Instant,
    is_settled: bool,
    reason: Option<String>,
    /// Whether the agent was settled once.
    was_settled: bool,
    models: BTreeMap<String, ModelHealth>,
}

impl Health {
    /// The health of an agent that starts at `now`: alive and not ready.
    pub fn new(mode: ReadinessMode, now: Instant) -> Self {
        let models = BTreeMap::new();
        let state = State { last_heartbeat: now, is_settled: false, reason: None, was_settled: false, models };
        Self { mode, state: Mutex::new(state) }
    }

    /// Records a heartbeat of the reconciler and the states of the models. `is_settled` is set once the desired state is known and
    /// what served last was restored, or could not be; the agent is not ready before. `reason` is why the desired state is not
    /// known, or cannot be read now.
    pub fn beat(&self, now: Instant, is_settled: bool, reason: Option<String>, models: BTreeMap<String, ModelHealth>) {
        let mut state = self.state.lock();
        let was_settled = state.was_settled || is_settled;
        *state = State { last_heartbeat: now, is_settled, reason, was_settled, models };
    }

    /// Whether the last heartbeat is recent enough.
    pub fn is_alive(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.state.lock().last_heartbeat) < HEARTBEAT_TIMEOUT
    }

    /// The readiness of the agent and its models.
    pub fn readiness(&self) -> Readiness {
        let state = self.state.lock();
        let ready = match self.mode {
            ReadinessMode::Agent => state.was_settled,
            ReadinessMode::Models => {
                let is_served = !state.models.is_empty() && state.models.values().all(|model| model.serving.is_some());
                state.is_settled && is_served
            }
        };
        Readiness { ready, reason: state.reason.clone(), models: state.models.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(serving: Option<u64>) -> BTreeMap<String, ModelHealth> {
        BTreeMap::from([("m".to_owned(), ModelHealth { version: 2, state: ModelState::Failed, serving, reason: None })])
    }

    #[test]
    fn in_the_mode_models_every_model_must_serve_some_version() {
        let now = Instant::now();
        let health = Health::new(ReadinessMode::Models, now);
        assert!(!health.readiness().ready, "the reconciler has not run yet");
        health.beat(now, false, None, model(Some(1)));
        assert!(!health.readiness().ready, "the desired state is not known yet");
        health.beat(now, true, None, BTreeMap::new());
        assert!(!health.readiness().ready, "no model");
        health.beat(now, true, None, model(None));
        assert!(!health.readiness().ready);
        health.beat(now, true, None, model(Some(1)));
        assert!(health.readiness().ready);
        health.beat(now, true, None, model(None));
        assert!(!health.readiness().ready);
    }

    #[test]
    fn in_the_mode_agent_no_model_takes_readiness_away() {
        let now = Instant::now();
        let health = Health::new(ReadinessMode::Agent, now);
        assert!(!health.readiness().ready, "the reconciler has not run yet");
        health.beat(now, false, None, BTreeMap::new());
        assert!(!health.readiness().ready, "the desired state is not known yet, or its models are being restored");
        health.beat(now, true, None, model(None));
        assert!(health.readiness().ready);
        health.beat(now, false, None, model(None));
        assert!(health.readiness().ready, "a model that is new, or fails, changes nothing");
        health.beat(now, true, Some("the folder cannot be read".into()), model(Some(1)));
        let readiness = health.readiness();
        assert_eq!((readiness.ready, readiness.reason.as_deref()), (true, Some("the folder cannot be read")));
    }

    #[test]
    fn agent_is_alive_while_heartbeats_arrive() {
        let now = Instant::now();
        let health = Health::new(ReadinessMode::Agent, now);
        assert!(health.is_alive(now + Duration::from_secs(29)));
        assert!(!health.is_alive(now + Duration::from_secs(31)));
        health.beat(now + Duration::from_secs(31), true, None, BTreeMap::new());
        assert!(health.is_alive(now + Duration::from_secs(60)));
    }
}
