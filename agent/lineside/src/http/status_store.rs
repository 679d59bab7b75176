//! The board with the node's status: written by the core loop, read by whoever asks (`GET /v1/status`, the cluster).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::watch;

use lineside_api::condition::{Condition, Reason, add_degraded, set_transition_times};
use lineside_api::status::{
    AgentStatus, EngineStatus, ModelStatus, NodeStatus, SpoolStatus, StoreStatus, StreamStatus,
};
use lineside_common::clock;
use lineside_models::store::Store;

/// What the core loop knows.
#[derive(Debug, Default)]
pub struct NodeState {
    /// The labels that selectors are matched with.
    pub labels: BTreeMap<String, String>,
    /// The models that are asked for.
    pub models: Vec<ModelStatus>,
    /// The streams that are asked for.
    pub streams: Vec<StreamStatus>,
    /// What waits for the broker.
    pub spool: SpoolStatus,
    /// What an operator should know.
    pub conditions: Vec<Condition>,
}

/// The node's status, for those who show it.
pub struct StatusStore {
    status: Mutex<NodeStatus>,
    store: Arc<Store>,
    changed: watch::Sender<()>,
}

impl StatusStore {
    /// A board that says who this is and nothing else yet.
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

    /// How things stand now.
    pub fn set(&self, standing: NodeState) {
        let mut status = self.status();
        let NodeState { labels, models, streams, spool, mut conditions } = standing;
        set_transition_times(&mut conditions, &status.conditions, &clock::rfc3339(SystemTime::now()));
        let is_news = (&status.agent.labels, &status.models, &status.streams, &status.conditions)
            != (&labels, &models, &streams, &conditions);
        status.agent.labels = labels;
        (status.models, status.streams, status.spool, status.conditions) = (models, streams, spool, conditions);
        drop(status);
        if is_news {
            self.changed.send_replace(());
        }
    }

    fn status(&self) -> MutexGuard<'_, NodeStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl lineside_kube::status_writer::StatusSource for StatusStore {
    /// Tells when models, streams or conditions stand otherwise than before.
    fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// As it stands. The store is looked at now, so the caller has to be allowed to block.
    fn get(&self) -> NodeStatus {
        let mut status = self.status().clone();
        match self.store.usage() {
            Ok(usage) => {
                let whole = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
                status.store = StoreStatus {
                    bytes: usage.bytes,
                    quota_bytes: usage.quota_bytes,
                    blobs: whole(usage.blobs),
                    versions: whole(usage.versions),
                    index: self.store.index_state().as_str().to_owned(),
                };
            }
            Err(error) => {
                add_degraded(&mut status.conditions, Reason::StoreUnreadable, &lineside_common::error_chain(&error))
            }
        }
        status
    }
}
