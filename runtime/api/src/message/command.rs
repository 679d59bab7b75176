//! Commands of operators and their responses.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A command, received on `{prefix}/v1/{site}/{node}/cmd/{name}/set`. The configuration of the node lists the names of the
/// accepted commands; the name determines the required fields.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CommandMessage {
    /// Identifier chosen by the sender; the response repeats it.
    pub id: Option<String>,
    /// For `pause`, `resume` and `snapshot`: name of the stream.
    pub stream: Option<String>,
    /// For `log-level`: a level such as `debug`, or a filter.
    pub level: Option<String>,
}

/// The response to a command, published with QoS 1 on `{prefix}/v1/{site}/{node}/cmd/{name}/state`. It is retained for
/// `log-level`, `pause` and `resume`, so that later subscribers receive the current state.
#[derive(Debug, Serialize, JsonSchema)]
pub struct CommandState<'a> {
    /// Time of the execution, RFC 3339 in UTC.
    pub ts: String,
    /// Name of the node.
    pub node: &'a str,
    /// Name of the command.
    pub command: &'a str,
    /// Identifier of the command.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Whether the command was executed.
    pub ok: bool,
    /// Why the command was not executed, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The state after the command.
    #[serde(flatten)]
    pub outcome: CommandOutcome,
}

/// The state after a command; the fields depend on the command.
#[derive(Debug, Clone, Default, PartialEq, Serialize, JsonSchema)]
pub struct CommandOutcome {
    /// For `pause` and `resume`: names of all paused streams.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paused: Option<Vec<String>>,
    /// For `log-level`: the filter in effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<String>,
    /// For `snapshot`: name of the stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream: Option<String>,
    /// For `snapshot`: time at which the agent received the frame, RFC 3339 in UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub captured_at: Option<String>,
    /// For `snapshot`: the frame as the camera encoded it, JPEG or PNG, in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
}
