//! The presence of an agent on its broker, and the current state of its streams.

use schemars::JsonSchema;
use serde::Serialize;

/// The presence of an agent, retained on `{prefix}/v1/{site}/{node}/status`. The agent registers the `offline` message as its
/// Will, so that the broker publishes it when the connection is lost.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(title = "Lineside status")]
pub struct PresenceMessage<'a> {
    /// Whether the agent is connected.
    pub state: AgentPresence,
    /// Time at which the message was written, RFC 3339 in UTC. For a Will this is the time of the connection, not of its loss.
    pub ts: String,
    /// Name of the site.
    pub site: &'a str,
    /// Name of the node.
    pub node: &'a str,
    /// Version of the agent.
    pub version: &'a str,
    /// Random id of the agent's data folder, which is part of every message id.
    pub folder: &'a str,
    /// Number of starts of the agent with this data folder.
    pub epoch: u64,
}

/// The current state of a stream, retained on `{prefix}/v1/{site}/{node}/{stream}/health`. It is published when a connection is opened and
/// when it changes, and never late: unlike an event it does not wait in the spool.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(title = "Lineside stream health")]
pub struct StreamHealthMessage<'a> {
    /// Whether the stream delivers frames and most of them are inspected.
    pub up: bool,
    /// Why it is down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'a str>,
    /// Time at which the message was written, RFC 3339 in UTC.
    pub ts: String,
    /// Name of the site.
    pub site: &'a str,
    /// Name of the node.
    pub node: &'a str,
    /// Name of the stream.
    pub stream: &'a str,
}

/// Whether an agent is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AgentPresence {
    /// The agent is connected.
    Online,
    /// The agent has ended, or its connection is lost.
    Offline,
}
