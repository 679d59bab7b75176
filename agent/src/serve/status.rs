//! How the node stands, in full: `GET /v1/status`. It is what an operator looks at, and what a cluster will be told.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::fetch::Snapshot;

/// The node's status.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct NodeStatus {
    /// The node's name.
    pub node: String,
    /// The site's name.
    pub site: String,
    /// The agent's version.
    pub version: &'static str,
    /// How many times the agent has been started on this node.
    pub epoch: u64,
    /// The models that are asked for, by name.
    pub models: Vec<ModelStatus>,
    /// The store.
    pub store: StoreStatus,
    /// What an operator should know, in the manner of Kubernetes' conditions.
    pub conditions: Vec<Condition>,
}

/// A model that is asked for.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelStatus {
    /// Its name.
    pub name: String,
    /// The version that is asked for.
    pub version: u64,
    /// The digest of that version, once it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Where that version stands.
    pub state: &'static str,
    /// What serves, which may be an earlier version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serving: Option<Serving>,
    /// Median time of one inference when the serving version was vetted, in milliseconds.
    #[serde(rename = "p50Ms", skip_serializing_if = "Option::is_none")]
    pub p50_ms: Option<f64>,
    /// The 99th percentile of it.
    #[serde(rename = "p99Ms", skip_serializing_if = "Option::is_none")]
    pub p99_ms: Option<f64>,
    /// Most memory it took when it was vetted.
    #[serde(rename = "peakMemoryMiB", skip_serializing_if = "Option::is_none")]
    pub peak_memory_mib: Option<f64>,
    /// Why it is not ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How far its download is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Snapshot>,
    /// When the signature of the serving version ends, RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signature_expires: Option<String>,
}

/// A version that serves.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Serving {
    /// Its version.
    pub version: u64,
    /// Its file.
    pub digest: String,
    /// What executes it.
    pub engine: String,
    /// Where.
    pub device: String,
}

/// The store.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StoreStatus {
    /// Bytes it takes.
    pub bytes: u64,
    /// Bytes it may take.
    pub quota_bytes: u64,
    /// Files of models.
    pub blobs: usize,
    /// Model versions.
    pub versions: usize,
    /// `ok`, `rebuilt` or `off`.
    pub index: &'static str,
}

/// Something an operator should know.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// `True`, `False` or `Unknown`.
    pub status: &'static str,
    /// In one word.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Condition {
    /// Something works less well than it should.
    pub fn degraded(reason: &'static str, message: String) -> Self {
        Self { kind: "Degraded", status: "True", reason, message }
    }
}

/// Written by the core loop, read by whoever asks.
#[derive(Default)]
pub struct Board {
    status: Mutex<NodeStatus>,
}

impl Board {
    /// A board that says who this is and nothing else yet.
    pub fn new(node: &str, site: &str, epoch: u64) -> Self {
        let status = NodeStatus {
            node: node.to_owned(),
            site: site.to_owned(),
            version: env!("CARGO_PKG_VERSION"),
            epoch,
            ..NodeStatus::default()
        };
        Self { status: Mutex::new(status) }
    }

    /// How the models stand, and what an operator should know.
    pub fn set(&self, models: Vec<ModelStatus>, conditions: Vec<Condition>) {
        let mut status = self.status();
        (status.models, status.conditions) = (models, conditions);
    }

    /// As it stands, but for the store, which whoever asks looks at.
    pub fn get(&self) -> NodeStatus {
        self.status().clone()
    }

    fn status(&self) -> MutexGuard<'_, NodeStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
