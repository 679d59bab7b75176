//! The MQTT topics of one node: `{prefix}/v1/{site}/{node}/...`.

use crate::names::is_name;

/// The topics of one node.
#[derive(Debug, Clone)]
pub struct Topics {
    base: String,
}

impl Topics {
    /// The topics below `{prefix}/v1/{site}/{node}`.
    pub fn new(prefix: &str, site: &str, node: &str) -> Self {
        Self { base: format!("{prefix}/v1/{site}/{node}") }
    }

    /// Topic of the node's presence.
    pub fn status(&self) -> String {
        format!("{}/status", self.base)
    }

    /// Topic of a stream's results.
    pub fn result(&self, stream: &str) -> String {
        format!("{}/{stream}/result", self.base)
    }

    /// Topic of a stream's current state.
    pub fn health(&self, stream: &str) -> String {
        format!("{}/{stream}/health", self.base)
    }

    /// Topic of events: of a stream, or of the node.
    pub fn event(&self, stream: Option<&str>) -> String {
        match stream {
            Some(stream) => format!("{}/{stream}/event", self.base),
            None => format!("{}/event", self.base),
        }
    }

    /// Topic of the node's metrics.
    pub fn metrics(&self) -> String {
        format!("{}/metrics", self.base)
    }

    /// Topic of the fence, in Sparkplug B mode only: a message with QoS 1 whose acknowledgement also confirms the
    /// messages with QoS 0 before it.
    pub fn fence(&self) -> String {
        format!("{}/fence", self.base)
    }

    /// Topic of the responses to a command.
    pub fn command_state(&self, name: &str) -> String {
        format!("{}/cmd/{name}/state", self.base)
    }

    /// Topic on which a command is received.
    pub fn command_set(&self, name: &str) -> String {
        format!("{}/cmd/{name}/set", self.base)
    }

    /// The topic filters that the agent subscribes to: commands and triggers.
    pub fn subscriptions(&self) -> [String; 2] {
        [self.command_set("+"), format!("{}/+/trigger", self.base)]
    }

    /// Parses the topic of a received message. `None` for a topic that is not among the subscriptions.
    pub fn parse<'a>(&self, topic: &'a str) -> Option<IncomingTopic<'a>> {
        let levels: Vec<&str> = topic.strip_prefix(&self.base)?.strip_prefix('/')?.split('/').collect();
        match levels.as_slice() {
            ["status"] => Some(IncomingTopic::Presence),
            ["cmd", name, "set"] => Some(IncomingTopic::Command(name)),
            [stream, "trigger"] if is_name(stream) => Some(IncomingTopic::Trigger(stream)),
            _ => None,
        }
    }

    /// The topic filter for all messages of the node.
    pub fn all(&self) -> String {
        format!("{}/#", self.base)
    }
}

/// The meaning of a subscribed topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IncomingTopic<'a> {
    /// A command with this name.
    Command(&'a str),
    /// The presence of an agent with this node name.
    Presence,
    /// A trigger of this stream, which requests the inspection of one part.
    Trigger(&'a str),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_commands_triggers_and_presence_of_this_node_are_parsed() {
        let topics = Topics::new("lineside", "plant", "edge-1");
        let own = |rest: &str| format!("lineside/v1/plant/edge-1/{rest}");
        assert_eq!(topics.parse(&own("cmd/pause/set")), Some(IncomingTopic::Command("pause")));
        assert_eq!(topics.parse(&own("cam7/trigger")), Some(IncomingTopic::Trigger("cam7")));
        assert_eq!(topics.parse(&own("status")), Some(IncomingTopic::Presence));
        for other in ["cmd/pause/state", "cmd/a/b/set", "cam7/result", "Cam_7/trigger", "trigger", "", "cmd/set"] {
            assert_eq!(topics.parse(&own(other)), None, "{other}");
        }
        assert_eq!(topics.parse("lineside/v1/plant/edge-2/cmd/pause/set"), None);
        assert_eq!(topics.parse("lineside/v1/plant/edge-1cmd/pause/set"), None);
    }
}
