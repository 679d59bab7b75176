//! Events of a node: changes of the state of its streams and models.

use std::borrow::Cow;

use schemars::JsonSchema;
use serde::Serialize;

/// An event, published with QoS 1 on `{prefix}/v1/{site}/{node}/{stream}/event`, or on `{prefix}/v1/{site}/{node}/event` for an
/// event that concerns no stream.
#[derive(Debug, Serialize, JsonSchema)]
pub struct EventMessage<'a> {
    /// Time of the event, RFC 3339 in UTC.
    pub ts: String,
    /// Name of the site.
    pub site: &'a str,
    /// Name of the node.
    pub node: &'a str,
    /// The event.
    #[serde(flatten)]
    pub event: NodeEvent,
    /// `false` while the clock of the node has never been set. `ts` is then meaningless.
    pub clock_synced: bool,
    /// Whether the event is older than the connection that delivers it. Always the last field.
    pub historical: bool,
}

/// A change of the state of a stream, of a model or of the node; the field `event` names its type.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "event")]
pub enum NodeEvent {
    /// A stream delivers frames.
    StreamUp {
        /// Name of the stream.
        stream: String,
    },
    /// A stream delivers no frames.
    StreamDown {
        /// Name of the stream.
        stream: String,
        /// Reason, for people. Absent for a stream that has ended or was removed.
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// The verdict rule of a stream failed or exceeded its bounds; the verdict is that of `onError` until it succeeds again.
    RuleFailed {
        /// Name of the stream.
        stream: String,
        /// Reason, for people.
        reason: String,
    },
    /// The verdict rule of a stream succeeds again.
    RuleRecovered {
        /// Name of the stream.
        stream: String,
    },
    /// The state of a model version has changed.
    ModelState {
        /// Name of the model.
        model: String,
        /// The desired version.
        version: u64,
        /// State of the desired version: `Pending`, `Downloading`, `Verifying`, `Vetting`, `Warming`, `Ready`, `Failed` or
        /// `Quarantined`.
        state: Cow<'static, str>,
        /// The version that serves, which may be an earlier one. Absent when no version serves.
        #[serde(skip_serializing_if = "Option::is_none")]
        serving: Option<u64>,
        /// Why the desired version is not ready, for people.
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// Another agent uses the same site and node name on the broker.
    NodeNameClash {
        /// Id of the other agent's data folder.
        folder: String,
    },
}

impl NodeEvent {
    /// Name of the stream that the event concerns.
    pub fn stream(&self) -> Option<&str> {
        match self {
            Self::StreamUp { stream }
            | Self::StreamDown { stream, .. }
            | Self::RuleFailed { stream, .. }
            | Self::RuleRecovered { stream } => Some(stream),
            Self::ModelState { .. } | Self::NodeNameClash { .. } => None,
        }
    }
}
