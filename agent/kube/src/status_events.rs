//! What an operator should be told when a node's status has changed: at most one notice for each thing that changed.

use lineside_api::state::ModelState;
use lineside_api::status::{CONFIG_PENDING, Condition, NodeStatus, READY};

/// What a notice is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventSubject {
    /// The node.
    Node,
    /// A model.
    Model(String),
    /// A stream.
    Stream(String),
}

/// Something to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusEvent {
    /// Whether somebody should look.
    pub is_warning: bool,
    /// In one word.
    pub reason: &'static str,
    /// For people.
    pub note: String,
    /// What it is about.
    pub about: EventSubject,
}

/// What changed between two statuses of a node. Without one before, only what is wrong is told: everything is new then.
pub fn status_events(node: &str, before: Option<&NodeStatus>, now: &NodeStatus) -> Vec<StatusEvent> {
    let mut told = Vec::new();
    for model in &now.models {
        let known = before.and_then(|status| status.models.iter().find(|known| known.name == model.name));
        let about = || EventSubject::Model(model.name.clone());
        let serves = |model: &lineside_api::status::ModelStatus| model.serving.as_ref().map(|serving| serving.version);
        if before.is_some()
            && let Some(serving) = model.serving.as_ref().filter(|_| known.and_then(serves) != serves(model))
        {
            told.push(StatusEvent {
                is_warning: false,
                reason: "ModelReady",
                note: format!(
                    "version {} serves on {node} ({} on {})",
                    serving.version, serving.engine, serving.device
                ),
                about: about(),
            });
        }
        let state = ModelState::named(&model.state);
        let failed = state.is_some_and(ModelState::has_failed);
        let is_same = known.is_some_and(|known| (&known.state, &known.reason) == (&model.state, &model.reason));
        if failed && !is_same {
            let why = model.reason.as_deref().unwrap_or("the agent's log says more");
            let reason = match state == Some(ModelState::Quarantined) {
                true => "ModelQuarantined",
                false => "ModelFailed",
            };
            let note = format!("version {} on {node}: {why}", model.version);
            told.push(StatusEvent { is_warning: true, reason, note, about: about() });
        }
    }
    for stream in &now.streams {
        let known = before.and_then(|status| status.streams.iter().find(|known| known.name == stream.name));
        let about = || EventSubject::Stream(stream.name.clone());
        let was_told = known.is_some_and(|known| !known.up && known.reason.is_some());
        match (known.map(|known| known.up), stream.up) {
            (Some(false), true) => told.push(StatusEvent {
                is_warning: false,
                reason: "StreamUp",
                note: format!("frames come on {node}"),
                about: about(),
            }),
            (_, false) if stream.reason.is_some() && !was_told => told.push(StatusEvent {
                is_warning: true,
                reason: "StreamDown",
                note: format!("no frames on {node}: {}", stream.reason.as_deref().unwrap_or_default()),
                about: about(),
            }),
            _ => {}
        }
    }
    for condition in now.conditions.iter().filter(|condition| condition.kind != READY) {
        let known = before.and_then(|status| status.conditions.iter().find(|known| known.kind == condition.kind));
        let is_bad =
            condition.status == if condition.kind == lineside_api::status::DEGRADED { "True" } else { "False" };
        let was_same = known.is_some_and(|known| known.status == condition.status && known.reason == condition.reason);
        // What is wrong with models and streams is told about them.
        let is_told = ["ModelFailed", "ModelQuarantined", "StreamDown"].contains(&condition.reason.as_str());
        // An agent that has just started has not reached anything yet, which is no news.
        let is_start = before.is_none() && condition.reason == "Disconnected";
        if is_bad && !was_same && !is_told && !is_start {
            let reason = reason_of(&condition.reason);
            told.push(StatusEvent {
                is_warning: true,
                reason,
                note: condition.message.clone(),
                about: EventSubject::Node,
            });
        }
    }
    told
}

/// The reasons of conditions that are told; they are few, and constant.
fn reason_of(reason: &str) -> &'static str {
    const KNOWN: [&str; 6] =
        ["SignatureExpired", "SpoolDegraded", "SpoolFull", "StoreUnreadable", "Disconnected", "LimitExceeded"];
    KNOWN.into_iter().find(|known| *known == reason).unwrap_or("Degraded")
}

/// Whether everything that is asked for stands as it will for a while: nothing is on its way any more.
pub fn is_settled(status: &NodeStatus) -> bool {
    let is_asked = |condition: &Condition| condition.kind == READY && condition.reason != CONFIG_PENDING;
    let has_ended = |state: ModelState| state == ModelState::Ready || state.has_failed();
    status.conditions.iter().any(is_asked)
        && status.models.iter().all(|model| ModelState::named(&model.state).is_some_and(has_ended))
        && status.streams.iter().all(|stream| stream.up || stream.reason.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lineside_api::status::{Condition, ModelStatus, Serving, StreamStatus};

    fn status(state: &str, version: u64, up: bool) -> NodeStatus {
        let serving = Serving { version, engine: "tract".into(), device: "cpu".into(), ..Serving::default() };
        let model = ModelStatus {
            name: "m".into(),
            version,
            state: state.into(),
            serving: Some(serving),
            ..ModelStatus::default()
        };
        let stream =
            StreamStatus { name: "s".into(), up, reason: (!up).then(|| "refused".into()), ..StreamStatus::default() };
        NodeStatus { models: vec![model], streams: vec![stream], ..NodeStatus::default() }
    }

    fn reasons(before: Option<&NodeStatus>, now: &NodeStatus) -> Vec<&'static str> {
        status_events("edge-1", before, now).into_iter().map(|notice| notice.reason).collect()
    }

    #[test]
    fn each_change_is_told_once_and_what_stays_is_not() {
        let good = status("Ready", 1, true);
        assert!(reasons(None, &good).is_empty(), "after a start only what is wrong is told");
        assert!(reasons(Some(&good), &good).is_empty());
        assert_eq!(reasons(Some(&good), &status("Ready", 2, true)), ["ModelReady"]);
        let bad = status("Failed", 2, false);
        assert_eq!(reasons(Some(&good), &bad), ["ModelReady", "ModelFailed", "StreamDown"]);
        assert!(reasons(Some(&bad), &bad).is_empty());
        assert_eq!(reasons(None, &bad), ["ModelFailed", "StreamDown"]);
        assert_eq!(reasons(Some(&bad), &status("Ready", 2, true)), ["StreamUp"]);
    }

    #[test]
    fn a_node_has_settled_when_nothing_is_on_its_way() {
        let with = |state: &str, up: bool, reason: &str| {
            let mut status = status(state, 1, up);
            status.conditions = vec![Condition::new(READY, true, reason, "")];
            status.streams[0].reason = None;
            is_settled(&status)
        };
        assert!(with("Ready", true, "ModelsReady") && with("Quarantined", true, "ModelsNotReady"));
        assert!(!with("Warming", true, "ModelsNotReady") && !with("Ready", false, "ModelsReady"));
        assert!(!with("Ready", true, CONFIG_PENDING), "it does not know yet");
        assert!(!is_settled(&NodeStatus::default()), "nobody has looked yet");
    }

    #[test]
    fn a_condition_is_told_when_it_turns_bad() {
        let mut now = NodeStatus::default();
        now.conditions.push(Condition::new("BrokerConnected", true, "Connected", ""));
        now.conditions.push(Condition::new("Degraded", true, "SpoolFull", "no room"));
        assert_eq!(reasons(Some(&NodeStatus::default()), &now), ["SpoolFull"]);
        assert!(reasons(Some(&now), &now).is_empty());
        let mut later = now.clone();
        later.conditions[0] = Condition::new("BrokerConnected", false, "Disconnected", "");
        assert_eq!(reasons(Some(&now), &later), ["Disconnected"]);
        assert_eq!(reasons(None, &later), ["SpoolFull"], "an agent that has just started has reached nothing yet");
    }
}
