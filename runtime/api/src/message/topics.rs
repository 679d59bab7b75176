//! The topics of one node, `{prefix}/v1/{site}/{node}/...`: where it speaks, and what it listens to.

use crate::names::is_name;

/// The topics of one node.
#[derive(Debug, Clone)]
pub struct Topics {
    base: String,
}

impl Topics {
    /// `{prefix}/v1/{site}/{node}`.
    pub fn new(prefix: &str, site: &str, node: &str) -> Self {
        Self { base: format!("{prefix}/v1/{site}/{node}") }
    }

    /// Where the node says whether it is there.
    pub fn status(&self) -> String {
        format!("{}/status", self.base)
    }

    /// Where a stream's results go.
    pub fn result(&self, stream: &str) -> String {
        format!("{}/{stream}/result", self.base)
    }

    /// Where an event goes.
    pub fn event(&self, stream: Option<&str>) -> String {
        match stream {
            Some(stream) => format!("{}/{stream}/event", self.base),
            None => format!("{}/event", self.base),
        }
    }

    /// Where metrics go.
    pub fn metrics(&self) -> String {
        format!("{}/metrics", self.base)
    }

    /// Where the message goes whose acknowledgement counts for messages with QoS 0 before it (SparkplugConfig B only).
    pub fn fence(&self) -> String {
        format!("{}/fence", self.base)
    }

    /// Where the answers to a command go.
    pub fn command_state(&self, name: &str) -> String {
        format!("{}/cmd/{name}/state", self.base)
    }

    /// Where a command is given.
    pub fn command_set(&self, name: &str) -> String {
        format!("{}/cmd/{name}/set", self.base)
    }

    /// What the agent listens to.
    pub fn incoming(&self) -> [String; 2] {
        [self.command_set("+"), format!("{}/+/trigger", self.base)]
    }

    /// What came in on a topic.
    pub fn understand<'a>(&self, topic: &'a str) -> Option<Incoming<'a>> {
        let levels: Vec<&str> = topic.strip_prefix(&self.base)?.strip_prefix('/')?.split('/').collect();
        match levels.as_slice() {
            ["cmd", name, "set"] => Some(Incoming::Command(name)),
            [stream, "trigger"] if is_name(stream) => Some(Incoming::Trigger(stream)),
            _ => None,
        }
    }

    /// Everything the node says.
    pub fn all(&self) -> String {
        format!("{}/#", self.base)
    }
}

/// What a topic that the agent listens to means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Incoming<'a> {
    /// A command of this name.
    Command(&'a str),
    /// A request to inspect one part in front of this stream.
    Trigger(&'a str),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_commands_and_triggers_of_this_node_are_understood() {
        let topics = Topics::new("lineside", "plant", "edge-1");
        let mine = |rest: &str| format!("lineside/v1/plant/edge-1/{rest}");
        assert_eq!(topics.understand(&mine("cmd/pause/set")), Some(Incoming::Command("pause")));
        assert_eq!(topics.understand(&mine("cam7/trigger")), Some(Incoming::Trigger("cam7")));
        for other in ["cmd/pause/state", "cmd/a/b/set", "cam7/result", "Cam_7/trigger", "trigger", "", "cmd/set"] {
            assert_eq!(topics.understand(&mine(other)), None, "{other}");
        }
        assert_eq!(topics.understand("lineside/v1/plant/edge-2/cmd/pause/set"), None);
        assert_eq!(topics.understand("lineside/v1/plant/edge-1cmd/pause/set"), None);
    }
}
