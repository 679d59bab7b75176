//! How things stand, as it is written down: a node's own status, and what the controller sums up of all nodes.
//!
//! A [`NodeStatus`] is what `GET /v1/status` answers and what stands in the status of the node's `EdgeNode`;
//! [`EdgeModelStatus`] and [`CameraStreamStatus`] stand in the status of the other two kinds. The custom resource
//! definitions take their schemas from these types, so lists and texts have bounds here.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::state::ModelState;

/// Models or streams in one node's status at most; what is over is left out and said in a condition.
pub const ITEMS_MAX: usize = 256;
/// Characters of a reason or message at most.
pub const TEXT_MAX: usize = 1024;
/// A node's status.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeStatus {
    /// The agent.
    pub agent: AgentStatus,
    /// What can execute models here.
    #[schemars(length(max = 8))]
    pub engines: Vec<EngineStatus>,
    /// The models that are asked for, by name.
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub models: Vec<ModelStatus>,
    /// The streams that are asked for, by name.
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub streams: Vec<StreamStatus>,
    /// What waits for the broker.
    pub spool: SpoolStatus,
    /// The models on disk.
    pub store: StoreStatus,
    /// What an operator should know.
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// The agent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AgentStatus {
    /// The node's name.
    #[schemars(length(max = 253))]
    pub node: String,
    /// The site's name.
    #[schemars(length(max = 253))]
    pub site: String,
    /// The agent's version.
    #[schemars(length(max = 64))]
    pub version: String,
    /// How many times the agent has been started on this node.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub epoch: u64,
    /// The labels that it matches selectors with: those of the cluster's node, and its own configuration's on top.
    #[schemars(extend("maxProperties" = 512, "additionalProperties" = {"type": "string", "maxLength": 253}))]
    pub labels: BTreeMap<String, String>,
    /// When it was started last, RFC 3339.
    #[schemars(length(max = 64))]
    pub started_at: String,
    /// When it last wrote its status, RFC 3339 by the node's clock. It is refreshed also where nothing else changes, so that
    /// an agent that went silent can be told from one with nothing to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub last_heartbeat_time: Option<String>,
    /// The uid of the Kubernetes node it runs on, where the cluster has one of its name.
    #[serde(rename = "nodeUID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub node_uid: Option<String>,
}

/// Something that executes models.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EngineStatus {
    /// Its name.
    #[schemars(length(max = 64))]
    pub name: String,
    /// What it executes on: `cpu`, `gpu`.
    #[schemars(length(max = 8), inner(length(max = 16)))]
    pub devices: Vec<String>,
}

/// A model that is asked for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["name"]))]
pub struct ModelStatus {
    /// Its name.
    #[schemars(length(max = 63))]
    pub name: String,
    /// The version that is asked for.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub version: u64,
    /// The uid of the `EdgeModel` that this speaks of, where a cluster asks for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub uid: Option<String>,
    /// The generation of the `EdgeModel` that this speaks of, where a cluster asks for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The digest of that version, once it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 71))]
    pub digest: Option<String>,
    /// Where that version stands: `Pending`, `Downloading`, `Verifying`, `Vetting`, `Warming`, `Ready`, `Failed`,
    /// `Quarantined`.
    #[schemars(with = "String", length(max = 32))]
    pub state: ModelState,
    /// How far that version came when it failed last, also while it is tried again: one of the states above.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", length(max = 32))]
    pub failed_phase: Option<ModelState>,
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
    #[schemars(length(max = 1024))]
    pub reason: Option<String>,
    /// How far its download is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Download>,
    /// When the signature of the serving version ends, RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub signature_expires: Option<String>,
}

/// A version that serves.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Serving {
    /// Its version.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub version: u64,
    /// Its file.
    #[schemars(length(max = 71))]
    pub digest: String,
    /// What executes it.
    #[schemars(length(max = 64))]
    pub engine: String,
    /// Where.
    #[schemars(length(max = 16))]
    pub device: String,
}

/// How far a download is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Download {
    /// Bytes that have come.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub bytes: u64,
    /// Bytes there will be, where the source tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub total: Option<u64>,
    /// Of the total.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub percent: Option<u8>,
    /// Where they come from, without secrets.
    #[schemars(length(max = 2048))]
    pub from: String,
}

/// A stream that is asked for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["name"]))]
pub struct StreamStatus {
    /// Its name.
    #[schemars(length(max = 63))]
    pub name: String,
    /// The model that looks at its frames.
    #[schemars(length(max = 63))]
    pub model: String,
    /// The uid of the `CameraStream` that this speaks of, where a cluster asks for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub uid: Option<String>,
    /// The generation of the `CameraStream` that this speaks of, where a cluster asks for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Whether frames can be had.
    pub up: bool,
    /// Why it is not up.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub reason: Option<String>,
}

/// What waits for the broker.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SpoolStatus {
    /// Records that wait.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub records: u64,
    /// Bytes they take.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub bytes: u64,
    /// Bytes they may take.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub bytes_max: u64,
    /// Age of the oldest.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub oldest_seconds: u64,
}

/// The models on disk.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct StoreStatus {
    /// Bytes they take.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub bytes: u64,
    /// Bytes they may take.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub quota_bytes: u64,
    /// Files of models.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub blobs: u64,
    /// Model versions.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub versions: u64,
    /// `ok`, `rebuilt` or `off`.
    #[schemars(length(max = 16))]
    pub index: String,
}

/// The beginning of a text that is too long.
pub fn truncated(text: &str) -> String {
    if text.chars().count() <= TEXT_MAX {
        return text.to_owned();
    }
    text.chars().take(TEXT_MAX - 1).chain(['…']).collect()
}

/// How a model stands on all nodes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EdgeModelStatus {
    /// The generation that this speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Nodes, counted.
    pub nodes: NodeCounts,
    /// What an operator should know.
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// How a stream stands on the nodes that play it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CameraStreamStatus {
    /// The generation that this speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Nodes, counted; `ready` are those where frames can be had.
    pub nodes: NodeCounts,
    /// What an operator should know.
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Nodes, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeCounts {
    /// Nodes that are meant.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub desired: u64,
    /// Nodes where it stands as asked.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub ready: u64,
    /// Nodes that try the version beside the one before.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub candidate: u64,
    /// Nodes where it failed.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub failed: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(truncated("short"), "short");
        assert_eq!(truncated(&"é".repeat(2000)).chars().count(), TEXT_MAX);
    }
}
