//! Publishes the reconciler's state: the node's status, the probes, the metrics of models, and events.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use lineside_api::message::NodeEvent;
use lineside_api::state::ModelState;
use lineside_api::status::ModelStatus;
use lineside_common::clock;
use lineside_common::metrics::Registrar;
use lineside_common::supervisor::Supervisor;
use lineside_kube::ClusterStateReader;
use lineside_models::signing::has_expired;
use lineside_mqtt::broker_state::BrokerStateReader;
use lineside_mqtt::node_clash::NodeClash;
use lineside_spool::Spool;
use prometheus::IntGaugeVec;

use tokio::sync::watch;

use super::snapshot::Snapshot;
use super::status_builder::{Surroundings, build};
use crate::http::health::{Health, ModelHealth};
use crate::http::status_store::StatusStore;
use crate::message_writer::MessageWriter;
use crate::streams::StreamRegistry;

/// The metrics of models.
#[derive(Clone)]
pub struct ModelMetrics {
    state: IntGaugeVec,
    signature_expiry: IntGaugeVec,
}

impl ModelMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// When a name is registered already.
    pub fn register(registrar: &Registrar) -> Result<Self, prometheus::Error> {
        Ok(Self {
            state: registrar.gauges(
                "model_state",
                "State of each model version: 1 for the state it is in.",
                &["model", "version", "state"],
            )?,
            signature_expiry: registrar.gauges(
                "model_signature_expiry_timestamp_seconds",
                "When the signature of a serving version expires.",
                &["model", "version"],
            )?,
        })
    }
}

/// Publishes snapshots.
pub struct StatePublisher {
    /// The node's status, for those who ask.
    pub status: Arc<StatusStore>,
    /// What the probes report.
    pub health: Arc<Health>,
    /// The metrics of models.
    pub metrics: ModelMetrics,
    /// Where events go.
    pub events: Arc<MessageWriter>,
    /// The spool, for its state.
    pub spool: Arc<Spool>,
    /// The streams.
    pub streams: Arc<StreamRegistry>,
    /// The state of the broker connection.
    pub broker: BrokerStateReader,
    /// Another agent with the node's name on the broker.
    pub node_clash: watch::Receiver<Option<NodeClash>>,
    /// Why the data folder accepted no writes at the start; `None` if it did.
    pub data_folder_problem: Option<String>,
    /// The connection to the cluster; `None` for an agent that follows no cluster.
    pub cluster: Option<ClusterStateReader>,
    /// Tasks that failed are reported.
    pub supervisor: Supervisor,
    /// What was published last.
    pub published: Published,
}

/// What was published last, so that only changes are published.
#[derive(Default)]
pub struct Published {
    states: BTreeMap<String, (u64, ModelState)>,
    events: BTreeMap<String, NodeEvent>,
    /// Models whose expired signature was logged.
    expired: BTreeSet<String>,
    clash: Option<NodeClash>,
}

impl StatePublisher {
    /// Publishes a snapshot.
    pub(super) fn publish(&mut self, snapshot: &Snapshot) {
        let now = SystemTime::now();
        self.streams.evaluate(Instant::now());
        let stats = self.spool.stats();
        let clash = self.node_clash.borrow().clone();
        let around = Surroundings {
            streams: &self.streams.subscribe().borrow().clone(),
            broker: &self.broker.at(Instant::now()),
            is_cluster_connected: self.cluster.as_ref().map(|cluster| cluster.at(Instant::now()).is_connected()),
            node_clash: clash.as_ref(),
            data_folder_problem: self.data_folder_problem.as_deref(),
            spool: &stats,
            failed_tasks: self.supervisor.recent_failures(),
            now,
        };
        let state = build(snapshot, &around);
        let names: BTreeSet<&str> = snapshot.models.iter().map(|model| model.name.as_str()).collect();
        let assigned: Vec<&ModelStatus> =
            state.models.iter().filter(|model| names.contains(model.name.as_str())).collect();
        let health = assigned.iter().map(|model| {
            let serving = model.serving.as_ref().map(|serving| serving.version);
            let health =
                ModelHealth { version: model.version, state: model.state, serving, reason: model.reason.clone() };
            (model.name.clone(), health)
        });
        let health: BTreeMap<String, ModelHealth> = health.collect();
        let events: Vec<NodeEvent> = assigned.iter().map(|model| model_event(model)).collect();
        let states = assigned.iter().map(|model| (model.name.clone(), (model.version, model.state))).collect();
        self.publish_states(states);
        self.publish_events(events);
        self.publish_signatures(snapshot, now);
        self.publish_clash(clash);
        self.status.set(state);
        self.health.beat(
            Instant::now(),
            snapshot.is_configured && snapshot.is_restored,
            snapshot.config_error(),
            health,
        );
    }

    fn publish_clash(&mut self, clash: Option<NodeClash>) {
        if let Some(new) = clash.as_ref().filter(|new| self.published.clash.as_ref() != Some(*new)) {
            self.events.event(NodeEvent::NodeNameClash { folder: new.folder.clone() });
        }
        self.published.clash = clash;
    }

    fn publish_states(&mut self, states: BTreeMap<String, (u64, ModelState)>) {
        if self.published.states == states {
            return;
        }
        for (name, (version, state)) in &self.published.states {
            self.metrics.state.remove_label_values(&[name, &version.to_string(), state.name()]).ok();
        }
        for (name, (version, state)) in &states {
            self.metrics.state.with_label_values(&[name, &version.to_string(), state.name()]).set(1);
        }
        self.published.states = states;
    }

    fn publish_events(&mut self, events: Vec<NodeEvent>) {
        let mut current = BTreeMap::new();
        for event in events {
            let NodeEvent::ModelState { model, .. } = &event else { continue };
            let model = model.clone();
            if self.published.events.get(&model) != Some(&event) {
                self.events.event(event.clone());
            }
            current.insert(model, event);
        }
        self.published.events = current;
    }

    /// An expired signature is reported and stops nothing.
    fn publish_signatures(&mut self, snapshot: &Snapshot, now: SystemTime) {
        self.metrics.signature_expiry.reset();
        let mut expired = BTreeSet::new();
        for (name, serving) in &snapshot.serving {
            let Some(expires) = serving.expires else { continue };
            let version = serving.info.version;
            let seconds = expires.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
            let gauge = self.metrics.signature_expiry.with_label_values(&[name.as_str(), &version.to_string()]);
            gauge.set(i64::try_from(seconds).unwrap_or(i64::MAX));
            if has_expired(expires, now) {
                if !self.published.expired.contains(name) {
                    tracing::warn!(
                        event = "signature_expired",
                        model = name,
                        version,
                        expires = clock::rfc3339(expires),
                        "The signature has expired; the running version keeps serving"
                    );
                }
                expired.insert(name.clone());
            }
        }
        self.published.expired = expired;
    }
}

fn model_event(model: &ModelStatus) -> NodeEvent {
    NodeEvent::ModelState {
        model: model.name.clone(),
        version: model.version,
        state: model.state.name().into(),
        serving: model.serving.as_ref().map(|serving| serving.version),
        reason: model.reason.clone(),
    }
}
