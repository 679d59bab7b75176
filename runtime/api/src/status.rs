//! The statuses of nodes, models and streams.
//!
//! A [`NodeStatus`] is the response of `GET /v1/status` and the status of the node's `EdgeNode`. The controller
//! aggregates the statuses of all nodes into [`EdgeModelStatus`] and [`CameraStreamStatus`], the statuses of the other
//! two kinds. The custom resource definitions take their schemas from these types, so every list, map and string has a
//! bound.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::state::ModelState;

/// The most models, and the most streams, in one node's status. Further ones are left out, and the condition `Degraded`
/// has the reason `LimitExceeded`.
pub const ITEMS_MAX: usize = 256;
/// The most characters of a reason or message.
pub const TEXT_MAX: usize = 1024;

/// The status of a node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeStatus {
    /// The agent that reports.
    pub agent: AgentStatus,
    /// The inference engines of the agent.
    #[schemars(length(max = 8))]
    pub engines: Vec<EngineStatus>,
    /// The desired models, by name; at most 256.
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub models: Vec<ModelStatus>,
    /// The desired streams, by name; at most 256.
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub streams: Vec<StreamStatus>,
    /// The spool.
    pub spool: SpoolStatus,
    /// The model store.
    pub store: StoreStatus,
    /// Observations for operators and for tools.
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// The identity of an agent and of its node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AgentStatus {
    /// The node's name.
    #[schemars(length(max = 253))]
    pub node: String,
    /// The site's name.
    #[schemars(length(max = 253))]
    pub site: String,
    /// The version of the agent.
    #[schemars(length(max = 64))]
    pub version: String,
    /// The number of starts of the agent with this data folder.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub epoch: u64,
    /// The labels that selectors match: those of the Kubernetes node, overridden by those of the agent's configuration.
    #[schemars(extend("maxProperties" = 512, "additionalProperties" = {"type": "string", "maxLength": 253}))]
    pub labels: BTreeMap<String, String>,
    /// When the agent started, RFC 3339.
    #[schemars(length(max = 64))]
    pub started_at: String,
    /// When the agent last wrote this status, RFC 3339 by the node's clock. It is refreshed at least once a minute, so
    /// that the controller can distinguish an unreachable agent from one without changes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub last_heartbeat_time: Option<String>,
    /// The uid of the Kubernetes node that has the agent's node name, if there is one.
    #[serde(rename = "nodeUID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub node_uid: Option<String>,
}

/// An inference engine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EngineStatus {
    /// The engine's name.
    #[schemars(length(max = 64))]
    pub name: String,
    /// The devices that it can use: `cpu`, `gpu`.
    #[schemars(length(max = 8), inner(length(max = 16)))]
    pub devices: Vec<String>,
}

/// The status of a desired model on a node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["name"]))]
pub struct ModelStatus {
    /// The name of the `EdgeModel`.
    #[schemars(length(max = 63))]
    pub name: String,
    /// The desired version.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub version: u64,
    /// The uid of the `EdgeModel`, if it comes from a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub uid: Option<String>,
    /// The generation of the `EdgeModel` that this status was computed from, if it comes from a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The digest of the desired version's file, once it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 71))]
    pub digest: Option<String>,
    /// The state of the desired version: `Pending`, `Downloading`, `Verifying`, `Vetting`, `Warming`, `Ready`,
    /// `Failed`, `Quarantined`.
    #[schemars(with = "String", length(max = 32))]
    pub state: ModelState,
    /// The state in which the desired version failed last; it stays while the version is retried.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", length(max = 32))]
    pub failed_phase: Option<ModelState>,
    /// The version that serves, which may be an earlier one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serving: Option<Serving>,
    /// The median duration of an inference when the serving version was admitted, in milliseconds.
    #[serde(rename = "p50Ms", skip_serializing_if = "Option::is_none")]
    pub p50_ms: Option<f64>,
    /// The 99th percentile of that duration, in milliseconds.
    #[serde(rename = "p99Ms", skip_serializing_if = "Option::is_none")]
    pub p99_ms: Option<f64>,
    /// The peak memory when the serving version was admitted, in MiB.
    #[serde(rename = "peakMemoryMiB", skip_serializing_if = "Option::is_none")]
    pub peak_memory_mib: Option<f64>,
    /// Why the desired version is not ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub reason: Option<String>,
    /// The progress of the download, while there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Download>,
    /// When the signature of the serving version expires, RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub signature_expires: Option<String>,
}

/// The serving version of a model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Serving {
    /// The version.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub version: u64,
    /// The digest of the version's file.
    #[schemars(length(max = 71))]
    pub digest: String,
    /// The engine that executes it.
    #[schemars(length(max = 64))]
    pub engine: String,
    /// The device that the engine uses.
    #[schemars(length(max = 16))]
    pub device: String,
}

/// The progress of a download.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Download {
    /// Bytes received, including those of earlier attempts that are resumed.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub bytes: u64,
    /// Bytes in total, if the source reports it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub total: Option<u64>,
    /// `bytes` in percent of `total`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub percent: Option<u8>,
    /// The address of the source, without secrets.
    #[schemars(length(max = 2048))]
    pub from: String,
}

/// The status of a desired stream on a node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["name"]))]
pub struct StreamStatus {
    /// The name of the `CameraStream`.
    #[schemars(length(max = 63))]
    pub name: String,
    /// The model that processes the frames.
    #[schemars(length(max = 63))]
    pub model: String,
    /// The uid of the `CameraStream`, if it comes from a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub uid: Option<String>,
    /// The generation of the `CameraStream` that this status was computed from, if it comes from a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Whether the camera delivers frames.
    pub up: bool,
    /// Why the stream is not up.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub reason: Option<String>,
}

/// The spool: messages that no broker has acknowledged yet.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SpoolStatus {
    /// Records in the spool.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub records: u64,
    /// The size of the records, in bytes.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub bytes: u64,
    /// The limit of that size, in bytes.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub bytes_max: u64,
    /// The age of the oldest record, in seconds.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub oldest_seconds: u64,
}

/// The model store: the model files on disk.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct StoreStatus {
    /// The size of the files, in bytes.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub bytes: u64,
    /// The quota of that size, in bytes.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub quota_bytes: u64,
    /// The number of files.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub blobs: u64,
    /// The number of model versions.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub versions: u64,
    /// The state of the store's index: `ok`, `rebuilt` or `off`.
    #[schemars(length(max = 16))]
    pub index: String,
}

/// The text, cut to [`TEXT_MAX`] characters if it is longer.
pub fn truncated(text: &str) -> String {
    if text.chars().count() <= TEXT_MAX {
        return text.to_owned();
    }
    text.chars().take(TEXT_MAX - 1).chain(['…']).collect()
}

/// The status of a model on all nodes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EdgeModelStatus {
    /// The generation of the object's spec that this status was computed from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Numbers of nodes.
    pub nodes: NodeCounts,
    /// Observations for operators and for tools.
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// The status of a stream on the nodes that run it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CameraStreamStatus {
    /// The generation of the object's spec that this status was computed from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Numbers of nodes; `ready` are those where the camera delivers frames.
    pub nodes: NodeCounts,
    /// Observations for operators and for tools.
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Numbers of nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeCounts {
    /// Nodes that the object targets.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub desired: u64,
    /// Nodes where the desired state is reached.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub ready: u64,
    /// Nodes that run the desired version as a candidate beside the previous one.
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub candidate: u64,
    /// Nodes where the object failed.
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
