//! Conditions: observations about an object, in the form of Kubernetes' `metav1.Condition`.
//!
//! Types, statuses and reasons are enums, so that decisions match on variants and never on text. A cluster also holds
//! conditions of other writers and of newer versions: [`ConditionType::Other`] and [`Reason::Other`] keep their text
//! unchanged, and a status that is not one of the three of Kubernetes reads as [`ConditionStatus::Unknown`].

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// An observation about an object, in the form of Kubernetes' `metav1.Condition`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["type"]))]
pub struct Condition {
    /// The type of the condition.
    #[serde(rename = "type")]
    #[schemars(with = "String", length(max = 64))]
    pub kind: ConditionType,
    /// `True`, `False` or `Unknown`.
    #[schemars(with = "String", length(max = 7))]
    pub status: ConditionStatus,
    /// The reason of the last transition, in PascalCase.
    #[schemars(with = "String", length(max = 128))]
    pub reason: Reason,
    /// Details for people.
    #[schemars(length(max = 4096))]
    pub message: String,
    /// The generation of the object's spec that the condition was computed from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// When `status` last changed, RFC 3339.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub last_transition_time: String,
}

impl Condition {
    /// A condition without a transition time; [`set_transition_times`] adds it.
    pub fn new(
        kind: ConditionType,
        status: impl Into<ConditionStatus>,
        reason: Reason,
        message: impl Into<String>,
    ) -> Self {
        Self { kind, status: status.into(), reason, message: message.into(), ..Self::default() }
    }
}

/// The type of a condition.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ConditionType {
    /// The object is in its desired state.
    Ready,
    /// The object is moving towards its desired state.
    Progressing,
    /// The object works, but not fully.
    Degraded,
    /// The object is moving towards its desired state, in the terms of kstatus.
    Reconciling,
    /// The object does not reach its desired state without a change, in the terms of kstatus.
    Stalled,
    /// The desired version's file is on all nodes.
    Downloaded,
    /// The desired version's file matches its digest, and its signature where one is required.
    Verified,
    /// The desired version passed admission on all nodes.
    Compatible,
    /// The desired version is loaded on all nodes.
    Loaded,
    /// The agent has a connection to an MQTT broker.
    BrokerConnected,
    /// The agent has a connection to the API server.
    ClusterConnected,
    /// A type of another writer, or of a newer version.
    #[serde(untagged)]
    Other(String),
}

/// The status of a condition.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ConditionStatus {
    /// The condition holds.
    True,
    /// The condition does not hold.
    False,
    /// Whether the condition holds cannot be determined. Any other text reads as this.
    #[default]
    #[serde(other)]
    Unknown,
}

/// The reason of a condition or of a Kubernetes Event.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Reason {
    /// Every node has the desired version of the model ready.
    AllNodesReady,
    /// Nothing is degraded.
    AsExpected,
    /// The node's desired state has not been read yet.
    ConfigPending,
    /// Manifest files are rejected; their last valid content applies.
    ConfigRejected,
    /// The source of the node's desired state cannot be read; the last desired state applies.
    ConfigUnreadable,
    /// The connection is up.
    Connected,
    /// The data folder accepted no writes when the agent started.
    DataFolderUnwritable,
    /// Something is degraded for a reason that has no name of its own.
    Degraded,
    /// The connection is down.
    Disconnected,
    /// More models or streams than a status may list.
    LimitExceeded,
    /// A version of a model could not be loaded; it is retried.
    ModelFailed,
    /// A version of a model failed too often; it is not retried.
    ModelQuarantined,
    /// A version of a model began to serve.
    ModelReady,
    /// A desired model has no version that serves.
    ModelsNotReady,
    /// Every desired model has a version that serves.
    ModelsReady,
    /// No node matches the object's selector.
    NoNodes,
    /// Messages were set aside, because the broker does not take them.
    MessagesSetAside,
    /// Another agent uses the same site and node name on the broker.
    NodeNameClash,
    /// The node's agent does not report its status.
    NodeUnreachable,
    /// The object failed on some of its nodes.
    NodesFailed,
    /// Some nodes have not reached the desired state yet.
    NodesPending,
    /// The agents of some nodes do not report their status.
    NodesUnreachable,
    /// Every node has completed this step.
    OnAllNodes,
    /// No node is in transition.
    Settled,
    /// The signature of a serving version has expired.
    SignatureExpired,
    /// The verdict rule of a stream fails.
    RuleFailed,
    /// The disk rejects the spool's writes.
    SpoolDegraded,
    /// The spool dropped records to stay within its limit.
    SpoolFull,
    /// The model store cannot be read.
    StoreUnreadable,
    /// A stream delivers no frames.
    StreamDown,
    /// A stream delivers frames again.
    StreamUp,
    /// Every node of the stream delivers frames.
    StreamsReady,
    /// A task of the agent failed and was restarted within the last minute.
    TaskRestarted,
    /// A reason of another writer, or of a newer version.
    #[serde(untagged)]
    Other(String),
}

impl Default for ConditionType {
    /// The empty type, which only a condition without one has.
    fn default() -> Self {
        Self::Other(String::new())
    }
}

impl Default for Reason {
    /// The empty reason, which only a condition without one has.
    fn default() -> Self {
        Self::Other(String::new())
    }
}

impl From<bool> for ConditionStatus {
    fn from(holds: bool) -> Self {
        if holds { Self::True } else { Self::False }
    }
}

impl fmt::Display for ConditionType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(formatter)
    }
}

impl fmt::Display for ConditionStatus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(formatter)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(formatter)
    }
}

/// Adds a problem to the one `Degraded` condition. The condition's reason is that of the first problem; its message
/// lists all problems.
pub fn add_degraded(conditions: &mut Vec<Condition>, reason: Reason, message: &str) {
    match conditions.iter_mut().find(|condition| condition.kind == ConditionType::Degraded) {
        Some(degraded) if degraded.status == ConditionStatus::True => {
            degraded.message = format!("{}; {reason}: {message}", degraded.message);
        }
        Some(degraded) => *degraded = Condition::new(ConditionType::Degraded, true, reason, message),
        None => conditions.push(Condition::new(ConditionType::Degraded, true, reason, message)),
    }
}

/// Sets the transition time of each condition: the time it has in `previous` while its status is the same, otherwise
/// `now`.
pub fn set_transition_times(conditions: &mut [Condition], previous: &[Condition], now: &str) {
    for condition in conditions {
        let same = previous.iter().find(|other| other.kind == condition.kind && other.status == condition.status);
        condition.last_transition_time = match same {
            Some(same) if !same.last_transition_time.is_empty() => same.last_transition_time.clone(),
            _ => now.to_owned(),
        };
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_transition_time_changes_only_with_the_status() {
        let ready = |status: bool, reason| Condition::new(ConditionType::Ready, status, reason, "");
        let mut first = [ready(false, Reason::ConfigPending)];
        set_transition_times(&mut first, &[], "t1");
        let degraded = Condition::new(ConditionType::Degraded, true, Reason::SpoolFull, "");
        let mut second = [ready(false, Reason::ModelsNotReady), degraded];
        set_transition_times(&mut second, &first, "t2");
        assert_eq!((second[0].last_transition_time.as_str(), second[1].last_transition_time.as_str()), ("t1", "t2"));
        let mut third = [ready(true, Reason::ModelsReady)];
        set_transition_times(&mut third, &second, "t3");
        assert_eq!(third[0].last_transition_time, "t3");
    }

    #[test]
    fn names_are_those_of_the_variants() {
        let condition = Condition::new(ConditionType::BrokerConnected, false, Reason::Disconnected, "no route");
        assert_eq!(
            serde_json::to_value(&condition).unwrap(),
            json!({"type": "BrokerConnected", "status": "False", "reason": "Disconnected", "message": "no route"})
        );
        assert_eq!(serde_json::from_value::<Condition>(serde_json::to_value(&condition).unwrap()).unwrap(), condition);
        let texts =
            [ConditionType::Ready.to_string(), ConditionStatus::True.to_string(), Reason::SpoolFull.to_string()];
        assert_eq!(texts, ["Ready", "True", "SpoolFull"]);
    }

    #[test]
    fn conditions_of_other_writers_keep_their_text() {
        let foreign =
            json!({"type": "Approved", "status": "True", "reason": "ByHand", "message": "", "lastTransitionTime": "t"});
        let condition: Condition = serde_json::from_value(foreign.clone()).unwrap();
        assert_eq!(condition.kind, ConditionType::Other("Approved".to_owned()));
        assert_eq!(condition.reason.to_string(), "ByHand");
        assert_eq!(serde_json::to_value(&condition).unwrap(), foreign);
    }

    #[test]
    fn a_status_of_another_text_reads_as_unknown_and_missing_fields_are_empty() {
        let condition: Condition = serde_json::from_value(json!({"type": "Ready", "status": "Maybe"})).unwrap();
        assert_eq!(condition, Condition::new(ConditionType::Ready, ConditionStatus::Unknown, Reason::default(), ""));
        let empty: Condition = serde_json::from_value(json!({})).unwrap();
        assert_eq!(empty, Condition::default());
    }

    #[test]
    fn problems_are_collected_in_one_degraded_condition() {
        let mut conditions = vec![Condition::new(ConditionType::Degraded, false, Reason::AsExpected, "")];
        add_degraded(&mut conditions, Reason::SpoolFull, "no room");
        add_degraded(&mut conditions, Reason::StreamDown, "cam7: timeout");
        assert_eq!(conditions.len(), 1);
        assert_eq!((conditions[0].status, &conditions[0].reason), (ConditionStatus::True, &Reason::SpoolFull));
        assert_eq!(conditions[0].message, "no room; StreamDown: cam7: timeout");
    }
}
