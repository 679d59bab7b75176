//! The Kubernetes Events of a node: computed from two successive statuses, at most one per object that changed.

use lineside_api::condition::{Condition, ConditionStatus, ConditionType, Reason};
use lineside_api::state::ModelState;
use lineside_api::status::{ModelStatus, NodeStatus, StreamStatus};

/// The object that an Event is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventSubject {
    /// The node's own `EdgeNode`.
    Node,
    /// The `EdgeModel` of this name.
    Model(String),
    /// The `CameraStream` of this name.
    Stream(String),
}

/// An Event to publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusEvent {
    /// Whether the Event is of type `Warning`; otherwise it is `Normal`.
    pub is_warning: bool,
    /// The Event's reason.
    pub reason: Reason,
    /// Details for people.
    pub note: String,
    /// The object that the Event is about.
    pub subject: EventSubject,
}

/// The Events for the changes from `previous` to `current`. Without a previous status, which is the case after a start,
/// there are only warnings: everything would be a change.
pub fn status_events(node: &str, previous: Option<&NodeStatus>, current: &NodeStatus) -> Vec<StatusEvent> {
    let mut events = Vec::new();
    for model in &current.models {
        let before = previous.and_then(|status| status.models.iter().find(|before| before.name == model.name));
        events.extend(previous.and_then(|_| model_ready(node, before, model)));
        events.extend(model_failed(node, before, model));
    }
    for stream in &current.streams {
        let before = previous.and_then(|status| status.streams.iter().find(|before| before.name == stream.name));
        events.extend(stream_changed(node, before, stream));
    }
    for condition in &current.conditions {
        let before = previous.and_then(|status| status.conditions.iter().find(|before| before.kind == condition.kind));
        // An agent that has just started is not connected yet, which needs no Event.
        let is_start = previous.is_none() && condition.reason == Reason::Disconnected;
        events.extend(condition_failed(before, condition).filter(|_| !is_start));
    }
    events
}

/// Another version serves than before.
fn model_ready(node: &str, before: Option<&ModelStatus>, model: &ModelStatus) -> Option<StatusEvent> {
    let version = |model: &ModelStatus| model.serving.as_ref().map(|serving| serving.version);
    let serving = model.serving.as_ref().filter(|_| before.and_then(version) != version(model))?;
    Some(StatusEvent {
        is_warning: false,
        reason: Reason::ModelReady,
        note: format!("version {} serves on {node} ({} on {})", serving.version, serving.engine, serving.device),
        subject: EventSubject::Model(model.name.clone()),
    })
}

/// The desired version failed, or failed for another reason than before.
fn model_failed(node: &str, before: Option<&ModelStatus>, model: &ModelStatus) -> Option<StatusEvent> {
    let is_same = before.is_some_and(|before| (before.state, &before.reason) == (model.state, &model.reason));
    if !model.state.has_failed() || is_same {
        return None;
    }
    let message = model.reason.as_deref().unwrap_or("see the agent's log");
    let reason = if model.state == ModelState::Quarantined { Reason::ModelQuarantined } else { Reason::ModelFailed };
    let note = format!("version {} on {node}: {message}", model.version);
    Some(StatusEvent { is_warning: true, reason, note, subject: EventSubject::Model(model.name.clone()) })
}

/// The stream went up, or down with a reason. A stream that is down without one is still connecting.
fn stream_changed(node: &str, before: Option<&StreamStatus>, stream: &StreamStatus) -> Option<StatusEvent> {
    let was_down = before.is_some_and(|before| !before.up);
    let had_reason = before.is_some_and(|before| before.reason.is_some());
    let (reason, note) = if stream.up {
        was_down.then(|| (Reason::StreamUp, format!("the stream delivers frames on {node}")))?
    } else {
        let message = stream.reason.as_deref().filter(|_| !(was_down && had_reason))?;
        (Reason::StreamDown, format!("no frames on {node}: {message}"))
    };
    let subject = EventSubject::Stream(stream.name.clone());
    Some(StatusEvent { is_warning: reason == Reason::StreamDown, reason, note, subject })
}

/// The condition went from good to bad, or is bad for another reason than before. `Ready` is left out, since its parts
/// have Events of their own; so are problems with models and streams, which have Events about those objects.
fn condition_failed(before: Option<&Condition>, condition: &Condition) -> Option<StatusEvent> {
    let bad = match condition.kind {
        ConditionType::Ready => return None,
        ConditionType::Degraded => ConditionStatus::True,
        _ => ConditionStatus::False,
    };
    let is_same = before.is_some_and(|before| (before.status, &before.reason) == (condition.status, &condition.reason));
    if condition.status != bad || is_same {
        return None;
    }
    let reason = match &condition.reason {
        Reason::ModelFailed | Reason::ModelQuarantined | Reason::StreamDown => return None,
        Reason::Other(_) => Reason::Degraded,
        reason => reason.clone(),
    };
    Some(StatusEvent { is_warning: true, reason, note: condition.message.clone(), subject: EventSubject::Node })
}

/// Whether the node's state is stable: the desired state is known, every model is ready or has failed, and every stream
/// is up or has a reason why not.
pub fn is_settled(status: &NodeStatus) -> bool {
    let is_configured =
        |condition: &Condition| condition.kind == ConditionType::Ready && condition.reason != Reason::ConfigPending;
    let has_ended = |state: ModelState| state == ModelState::Ready || state.has_failed();
    status.conditions.iter().any(is_configured)
        && status.models.iter().all(|model| has_ended(model.state))
        && status.streams.iter().all(|stream| stream.up || stream.reason.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lineside_api::status::Serving;

    fn status(state: ModelState, version: u64, up: bool) -> NodeStatus {
        let serving = Serving { version, engine: "tract".into(), device: "cpu".into(), ..Serving::default() };
        let model = ModelStatus { name: "m".into(), version, state, serving: Some(serving), ..ModelStatus::default() };
        let stream =
            StreamStatus { name: "s".into(), up, reason: (!up).then(|| "refused".into()), ..StreamStatus::default() };
        NodeStatus { models: vec![model], streams: vec![stream], ..NodeStatus::default() }
    }

    fn reasons(previous: Option<&NodeStatus>, current: &NodeStatus) -> Vec<Reason> {
        status_events("edge-1", previous, current).into_iter().map(|event| event.reason).collect()
    }

    #[test]
    fn each_change_has_one_event_and_a_lasting_state_has_none() {
        let good = status(ModelState::Ready, 1, true);
        assert!(reasons(None, &good).is_empty(), "only warnings after a start");
        assert!(reasons(Some(&good), &good).is_empty());
        assert_eq!(reasons(Some(&good), &status(ModelState::Ready, 2, true)), [Reason::ModelReady]);
        let bad = status(ModelState::Failed, 2, false);
        assert_eq!(reasons(Some(&good), &bad), [Reason::ModelReady, Reason::ModelFailed, Reason::StreamDown]);
        assert!(reasons(Some(&bad), &bad).is_empty());
        assert_eq!(reasons(None, &bad), [Reason::ModelFailed, Reason::StreamDown]);
        assert_eq!(reasons(Some(&bad), &status(ModelState::Ready, 2, true)), [Reason::StreamUp]);
        assert_eq!(reasons(Some(&bad), &status(ModelState::Quarantined, 2, false)), [Reason::ModelQuarantined]);
    }

    #[test]
    fn a_node_is_settled_when_no_model_or_stream_is_in_transition() {
        let with = |state: ModelState, up: bool, reason: Reason| {
            let mut status = status(state, 1, up);
            status.conditions = vec![Condition::new(ConditionType::Ready, true, reason, "")];
            status.streams[0].reason = None;
            is_settled(&status)
        };
        assert!(with(ModelState::Ready, true, Reason::ModelsReady));
        assert!(with(ModelState::Quarantined, true, Reason::ModelsNotReady));
        assert!(!with(ModelState::Warming, true, Reason::ModelsNotReady));
        assert!(!with(ModelState::Ready, false, Reason::ModelsReady));
        assert!(!with(ModelState::Ready, true, Reason::ConfigPending), "the desired state is not known yet");
        assert!(!is_settled(&NodeStatus::default()), "no status has been computed yet");
    }

    #[test]
    fn a_condition_has_an_event_when_it_turns_bad() {
        let broker = |connected: bool, reason| Condition::new(ConditionType::BrokerConnected, connected, reason, "");
        let mut current = NodeStatus::default();
        current.conditions.push(broker(true, Reason::Connected));
        current.conditions.push(Condition::new(ConditionType::Degraded, true, Reason::SpoolFull, "no room"));
        assert_eq!(reasons(Some(&NodeStatus::default()), &current), [Reason::SpoolFull]);
        assert!(reasons(Some(&current), &current).is_empty());
        let mut later = current.clone();
        later.conditions[0] = broker(false, Reason::Disconnected);
        assert_eq!(reasons(Some(&current), &later), [Reason::Disconnected]);
        assert_eq!(reasons(None, &later), [Reason::SpoolFull], "an agent that has just started is not connected yet");
    }

    #[test]
    fn problems_of_models_and_streams_have_no_event_about_the_node() {
        let mut current = NodeStatus::default();
        for reason in [Reason::ModelFailed, Reason::ModelQuarantined, Reason::StreamDown] {
            current.conditions = vec![Condition::new(ConditionType::Degraded, true, reason, "")];
            assert!(reasons(Some(&NodeStatus::default()), &current).is_empty());
        }
        current.conditions = vec![Condition::new(ConditionType::Degraded, true, Reason::Other("New".into()), "")];
        assert_eq!(reasons(Some(&NodeStatus::default()), &current), [Reason::Degraded]);
    }
}
