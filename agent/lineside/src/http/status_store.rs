//! The status of the node. The reconciler writes it; `GET /v1/status` and the status writer of the cluster read it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use tokio::sync::watch;

use lineside_api::condition::{Condition, Reason, add_degraded, set_transition_times};
use lineside_api::status::{
    AgentStatus, EngineStatus, ModelStatus, NodeStatus, SpoolStatus, StoreStatus, StreamStatus,
};
use lineside_common::clock;
use lineside_models::store::Store;

/// The part of the status that the reconciler determines.
#[derive(Debug, Default)]
pub struct NodeState {
    /// The labels of the node, which node selectors are matched against.
    pub labels: BTreeMap<String, String>,
    /// The desired models and their states.
    pub models: Vec<ModelStatus>,
    /// The desired streams and their states.
    pub streams: Vec<StreamStatus>,
    /// The messages that wait for the broker.
    pub spool: SpoolStatus,
    /// The conditions of the node. Their transition times are set by [`StatusStore::set`].
    pub conditions: Vec<Condition>,
}

/// The current status of the node, with notifications of changes.
pub struct StatusStore {
    status: Mutex<NodeStatus>,
    store: Arc<Store>,
    changed: watch::Sender<()>,
}

impl StatusStore {
    /// The status of a node that has just started: its identity, without models, streams and conditions.
    pub fn new(node: &str, site: &str, epoch: u64, store: Arc<Store>) -> Self {
        let agent = AgentStatus {
            node: node.to_owned(),
            site: site.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            epoch,
            started_at: clock::rfc3339(SystemTime::now()),
            ..AgentStatus::default()
        };
        let engines = vec![EngineStatus { name: "tract".to_owned(), devices: vec!["cpu".to_owned()] }];
        let status = NodeStatus { agent, engines, ..NodeStatus::default() };
        Self { status: Mutex::new(status), store, changed: watch::Sender::new(()) }
    }

    /// Replaces the state. Subscribers are notified when labels, models, streams or conditions have changed.
    pub fn set(&self, state: NodeState) {
        let mut status = self.status.lock();
        let NodeState { labels, models, streams, spool, mut conditions } = state;
        set_transition_times(&mut conditions, &status.conditions, &clock::rfc3339(SystemTime::now()));
        let is_changed = (&status.agent.labels, &status.models, &status.streams, &status.conditions)
            != (&labels, &models, &streams, &conditions);
        status.agent.labels = labels;
        (status.models, status.streams, status.spool, status.conditions) = (models, streams, spool, conditions);
        drop(status);
        if is_changed {
            self.changed.send_replace(());
        }
    }
}

impl lineside_kube::status_writer::StatusSource for StatusStore {
    /// Receives a notification when labels, models, streams or conditions have changed.
    fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// The current status. Reads the usage of the store from disk, so the caller must be allowed to block.
    fn get(&self) -> NodeStatus {
        let mut status = self.status.lock().clone();
        match self.store.usage() {
            Ok(usage) => {
                let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
                status.store = StoreStatus {
                    bytes: usage.bytes,
                    quota_bytes: usage.quota_bytes,
                    blobs: count(usage.blobs),
                    versions: count(usage.versions),
                    index: self.store.index_state().as_str().to_owned(),
                };
            }
            Err(error) => {
                let message = lineside_common::error_chain(&error);
                add_degraded(&mut status.conditions, Reason::StoreUnreadable, &message);
            }
        }
        status
    }
}
