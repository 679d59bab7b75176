//! Aggregates the statuses of nodes into those of `EdgeModel`s and `CameraStream`s. All functions are pure.
//!
//! A node counts for a model when its labels match the model's selector, whether or not its agent has seen the model
//! yet: a model that a node has not taken up is not ready there. A node that is unreachable is counted and named, but
//! does not decide whether the object is ready, since its state is not known: one absent node must not block those who
//! wait. Where all nodes are unreachable, nothing is known.
//!
//! `Reconciling` and `Stalled` are the conditions of kstatus (sigs.k8s.io/cli-utils), which Flux, Argo CD and `kubectl`
//! plugins read.

use std::collections::BTreeMap;

use serde_json::Value;

use lineside_api::condition::{Condition, ConditionStatus, ConditionType, Reason, set_transition_times};
use lineside_api::kinds::selects;
use lineside_api::state::ModelState;
use lineside_api::status::{
    CameraStreamStatus, EdgeModelStatus, ModelStatus, NodeCounts, NodeStatus, StreamStatus, truncated,
};

/// The most nodes that a message names.
const NAMED_MAX: usize = 5;

/// The steps of a version as conditions of an `EdgeModel`. A version has completed a step on a node once it is in this
/// state or a later one.
const STEPS: [(ConditionType, ModelState); 4] = [
    (ConditionType::Downloaded, ModelState::Verifying),
    (ConditionType::Verified, ModelState::Vetting),
    (ConditionType::Compatible, ModelState::Warming),
    (ConditionType::Loaded, ModelState::Ready),
];

/// Removes the conditions that the controller does not write. They belong to other writers, whose changes are no
/// difference to write.
pub fn retain_own_conditions(conditions: &mut Vec<Condition>) {
    let summary = [
        ConditionType::Ready,
        ConditionType::Progressing,
        ConditionType::Degraded,
        ConditionType::Reconciling,
        ConditionType::Stalled,
    ];
    conditions
        .retain(|condition| summary.contains(&condition.kind) || STEPS.iter().any(|(step, _)| *step == condition.kind));
}

/// A node, as far as the aggregation needs it.
#[derive(Debug, Clone, Copy)]
pub struct NodeView<'a> {
    /// The node's name.
    pub name: &'a str,
    /// The status that its agent wrote last.
    pub status: &'a NodeStatus,
    /// Whether its agent has not reported for too long.
    pub is_unreachable: bool,
}

/// An `EdgeModel` or `CameraStream`, as far as the aggregation needs it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FleetObject {
    /// The object's name.
    pub name: String,
    /// The object's uid.
    pub uid: String,
    /// The generation of the object's spec.
    pub generation: Option<i64>,
    version: Option<u64>,
    selector: BTreeMap<String, String>,
    node_name: Option<String>,
}

impl FleetObject {
    /// Reads the fields from a manifest. A field that is missing or has another type counts as absent: the API server
    /// has validated the object.
    pub fn new(name: &str, uid: &str, generation: Option<i64>, document: &Value) -> Self {
        let spec = |field: &str| document.pointer(&format!("/spec/{field}"));
        let labels = spec("nodeSelector").and_then(Value::as_object).into_iter().flatten();
        Self {
            name: name.to_owned(),
            uid: uid.to_owned(),
            generation,
            version: spec("version").and_then(Value::as_u64),
            selector: labels.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect(),
            node_name: spec("nodeName").and_then(Value::as_str).map(str::to_owned),
        }
    }

    /// Whether a node's report is about this object in its current generation.
    fn is_current(&self, uid: Option<&str>, generation: Option<i64>) -> bool {
        uid.is_none_or(|uid| uid == self.uid) && generation >= self.generation
    }

    /// Whether the object is for this node.
    fn targets(&self, node: &NodeView<'_>) -> bool {
        self.node_name.as_deref().is_none_or(|name| name == node.name)
            && selects(&self.selector, &node.status.agent.labels)
    }

    /// What a node reports about this model.
    fn model_report<'a>(&self, node: &NodeView<'a>) -> Option<&'a ModelStatus> {
        let report = node.status.models.iter().find(|model| model.name == self.name);
        report.filter(|report| self.is_current(report.uid.as_deref(), report.observed_generation))
    }

    /// What a node reports about this stream.
    fn stream_report<'a>(&self, node: &NodeView<'a>) -> Option<&'a StreamStatus> {
        let report = node.status.streams.iter().find(|stream| stream.name == self.name);
        report.filter(|report| self.is_current(report.uid.as_deref(), report.observed_generation))
    }
}

/// The state of an object on one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ObjectState<'a> {
    Ready,
    Pending,
    /// With the reason that the node reports.
    Failed(&'a str),
    /// The node is unreachable.
    Unreachable,
}

/// The status of a model on all nodes. `now` is the transition time of the conditions whose status differs from that in
/// `last`.
pub fn model_status(model: &FleetObject, nodes: &[NodeView<'_>], last: &EdgeModelStatus, now: &str) -> EdgeModelStatus {
    let targets = || nodes.iter().filter(|node| model.targets(node));
    let states: Vec<_> = targets().map(|node| (node.name, model_state(model, node))).collect();
    let reporting = targets().filter(|node| !node.is_unreachable);
    let steps: Vec<_> = reporting.map(|node| (node.name, completed_steps(model.model_report(node)))).collect();
    let (nodes, mut conditions) = summarize(&states, Reason::AllNodesReady, "serves");
    conditions.extend(STEPS.iter().enumerate().map(|(index, (kind, _))| step_condition(kind, index + 1, &steps)));
    complete(&mut conditions, model, &last.conditions, now);
    EdgeModelStatus { observed_generation: model.generation, nodes, conditions }
}

fn model_state<'a>(model: &FleetObject, node: &NodeView<'a>) -> ObjectState<'a> {
    if node.is_unreachable {
        return ObjectState::Unreachable;
    }
    match model.model_report(node) {
        Some(report) if report.state == ModelState::Ready && Some(report.version) == model.version => {
            ObjectState::Ready
        }
        Some(report) if report.state.has_failed() => ObjectState::Failed(report.reason.as_deref().unwrap_or_default()),
        _ => ObjectState::Pending,
    }
}

/// The number of [`STEPS`] that a version has completed on a node, and whether it failed at the next one.
#[derive(Debug, Clone, Copy)]
struct CompletedSteps {
    count: usize,
    has_failed: bool,
}

fn completed_steps(report: Option<&ModelStatus>) -> CompletedSteps {
    let Some(report) = report else { return CompletedSteps { count: 0, has_failed: false } };
    let failed_phase = report.failed_phase.unwrap_or_default();
    let has_failed = report.state.has_failed();
    // A version that is retried keeps the steps that it had completed before.
    let phase = if has_failed { failed_phase } else { report.state.max(failed_phase) };
    CompletedSteps { count: STEPS.iter().filter(|(_, from)| phase >= *from).count(), has_failed }
}

/// The condition that all nodes have completed the first `step` steps.
fn step_condition(kind: &ConditionType, step: usize, nodes: &[(&str, CompletedSteps)]) -> Condition {
    let done = nodes.iter().filter(|(_, steps)| steps.count >= step).count();
    let failed = nodes.iter().filter(|(_, steps)| steps.has_failed && steps.count + 1 == step);
    let failed: Vec<&str> = failed.map(|(name, _)| *name).take(NAMED_MAX).collect();
    let reason = match nodes.len() {
        0 => Reason::NoNodes,
        all if done == all => Reason::OnAllNodes,
        _ if failed.is_empty() => Reason::NodesPending,
        _ => Reason::NodesFailed,
    };
    let mut message = format!("on {done} of {} nodes", nodes.len());
    if !failed.is_empty() {
        message = truncated(&format!("{message}; it failed on {}", failed.join(", ")));
    }
    Condition::new(kind.clone(), reason == Reason::OnAllNodes, reason, message)
}

/// The status of a stream on the nodes that run it. `now` is as in [`model_status`].
pub fn stream_status(
    stream: &FleetObject,
    nodes: &[NodeView<'_>],
    last: &CameraStreamStatus,
    now: &str,
) -> CameraStreamStatus {
    let targets = nodes.iter().filter(|node| stream.targets(node));
    let mut states: Vec<_> = targets.map(|node| (node.name, stream_state(stream, node))).collect();
    // A node that the spec names counts even if no agent of this name has ever reported.
    if let Some(name) = &stream.node_name
        && states.is_empty()
    {
        states.push((name.as_str(), ObjectState::Failed("no agent of this name has reported")));
    }
    let (nodes, mut conditions) = summarize(&states, Reason::StreamsReady, "runs");
    complete(&mut conditions, stream, &last.conditions, now);
    CameraStreamStatus { observed_generation: stream.generation, nodes, conditions }
}

fn stream_state<'a>(stream: &FleetObject, node: &NodeView<'a>) -> ObjectState<'a> {
    if node.is_unreachable {
        return ObjectState::Unreachable;
    }
    match stream.stream_report(node) {
        Some(report) if report.up => ObjectState::Ready,
        Some(report) => report.reason.as_deref().map_or(ObjectState::Pending, ObjectState::Failed),
        None => ObjectState::Pending,
    }
}

/// The counts of nodes, and the conditions `Ready`, `Progressing`, `Degraded`, `Reconciling` and `Stalled`. `ready` is the
/// reason when all nodes that report are ready.
fn summarize(states: &[(&str, ObjectState<'_>)], ready: Reason, verb: &str) -> (NodeCounts, Vec<Condition>) {
    let count = |is: fn(&ObjectState<'_>) -> bool| {
        u64::try_from(states.iter().filter(|(_, state)| is(state)).count()).unwrap_or(u64::MAX)
    };
    let counts = NodeCounts {
        desired: u64::try_from(states.len()).unwrap_or(u64::MAX),
        ready: count(|state| matches!(state, ObjectState::Ready)),
        candidate: 0,
        failed: count(|state| matches!(state, ObjectState::Failed(_))),
    };
    let pending = count(|state| matches!(state, ObjectState::Pending));
    let unreachable = count(|state| matches!(state, ObjectState::Unreachable));
    let failed_names = names(states, |state| matches!(state, ObjectState::Failed(_)));
    let unreachable_names = names(states, |state| matches!(state, ObjectState::Unreachable));
    let pending_message = format!("{pending} of {} nodes are not ready yet", counts.desired);

    let reporting = counts.desired.saturating_sub(unreachable);
    let is_ready = ConditionStatus::from(reporting > 0 && counts.ready == reporting);
    let silence = format!("no agent reports on {unreachable_names}");
    let (is_ready, reason, message) = if counts.desired == 0 {
        (is_ready, Reason::NoNodes, "no reporting node has the labels of the selector".to_owned())
    } else if reporting == 0 {
        (ConditionStatus::Unknown, Reason::NodesUnreachable, silence)
    } else if is_ready == ConditionStatus::True && unreachable > 0 {
        (is_ready, ready, format!("it {verb} on all {reporting} nodes that report; {silence}"))
    } else if is_ready == ConditionStatus::True {
        (is_ready, ready, format!("it {verb} on all {reporting} nodes"))
    } else if counts.failed > 0 {
        (is_ready, Reason::NodesFailed, format!("it failed on {failed_names}"))
    } else {
        (is_ready, Reason::NodesPending, pending_message.clone())
    };
    let in_transition = |kind| match pending {
        0 => Condition::new(kind, false, Reason::Settled, ""),
        _ => Condition::new(kind, true, Reason::NodesPending, pending_message.clone()),
    };
    let (progressing, reconciling) =
        (in_transition(ConditionType::Progressing), in_transition(ConditionType::Reconciling));
    // A node that failed tries again, but reaches nothing new while the others do not change either.
    let stalled = if counts.failed > 0 && pending == 0 {
        Condition::new(ConditionType::Stalled, true, Reason::NodesFailed, format!("it failed on {failed_names}"))
    } else {
        Condition::new(ConditionType::Stalled, false, Reason::AsExpected, "")
    };
    let degraded = if counts.failed > 0 {
        Condition::new(ConditionType::Degraded, true, Reason::NodesFailed, failed_names)
    } else if unreachable > 0 {
        Condition::new(ConditionType::Degraded, true, Reason::NodesUnreachable, unreachable_names)
    } else {
        Condition::new(ConditionType::Degraded, false, Reason::AsExpected, "")
    };
    let ready = Condition::new(ConditionType::Ready, is_ready, reason, message);
    (counts, vec![ready, progressing, degraded, reconciling, stalled])
}

/// The names of the first nodes in a state, each with the reason that it reports.
fn names(states: &[(&str, ObjectState<'_>)], is: fn(&ObjectState<'_>) -> bool) -> String {
    let mut names: Vec<String> = states
        .iter()
        .filter(|(_, state)| is(state))
        .take(NAMED_MAX + 1)
        .map(|(name, state)| match state {
            ObjectState::Failed(reason) if !reason.is_empty() => format!("{name} ({reason})"),
            _ => (*name).to_owned(),
        })
        .collect();
    if let Some(one_more) = names.get_mut(NAMED_MAX) {
        *one_more = "and more".to_owned();
    }
    truncated(&names.join(", "))
}

/// Adds the generation and the transition times.
fn complete(conditions: &mut [Condition], object: &FleetObject, last: &[Condition], now: &str) {
    conditions.iter_mut().for_each(|condition| condition.observed_generation = object.generation);
    set_transition_times(conditions, last, now);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(line: &str, state: ModelState, version: u64, generation: i64) -> NodeStatus {
        let mut status = NodeStatus::default();
        status.agent.labels.insert("line".into(), line.into());
        status.models.push(ModelStatus {
            name: "m".into(),
            version,
            state,
            observed_generation: Some(generation),
            reason: (state == ModelState::Failed).then(|| "no such file".into()),
            ..ModelStatus::default()
        });
        status.streams.push(StreamStatus {
            name: "s".into(),
            up: true,
            observed_generation: Some(1),
            ..StreamStatus::default()
        });
        status
    }

    fn view<'a>(name: &'a str, status: &'a NodeStatus, is_unreachable: bool) -> NodeView<'a> {
        NodeView { name, status, is_unreachable }
    }

    fn object() -> FleetObject {
        FleetObject::new("m", "u", Some(4), &json!({"spec": {"version": 3, "nodeSelector": {"line": "a"}}}))
    }

    fn ready(status: &EdgeModelStatus) -> (bool, Reason) {
        (status.conditions[0].status == ConditionStatus::True, status.conditions[0].reason.clone())
    }

    #[test]
    fn nodes_count_by_their_labels_and_by_their_report_of_the_current_generation() {
        let (good, old, failed, other) = (
            node("a", ModelState::Ready, 3, 4),
            node("a", ModelState::Ready, 2, 3),
            node("a", ModelState::Failed, 3, 4),
            node("b", ModelState::Ready, 3, 4),
        );
        let all =
            [view("n1", &good, false), view("n2", &old, false), view("n3", &failed, false), view("n4", &other, false)];
        let status = model_status(&object(), &all, &EdgeModelStatus::default(), "t1");
        assert_eq!(status.nodes, NodeCounts { desired: 3, ready: 1, candidate: 0, failed: 1 });
        assert_eq!(ready(&status), (false, Reason::NodesFailed));
        assert_eq!(status.conditions[0].message, "it failed on n3 (no such file)");
        let status = model_status(&object(), &all[..1], &status, "t2");
        assert_eq!((ready(&status), status.nodes.ready), ((true, Reason::AllNodesReady), 1));
        assert_eq!(
            model_status(&object(), &all[..1], &status, "t3"),
            status,
            "an unchanged status is equal, so it is not written again"
        );
        assert_eq!(ready(&model_status(&object(), &all[1..2], &status, "t3")), (false, Reason::NodesPending));
        assert_eq!(ready(&model_status(&object(), &all[3..], &status, "t3")), (false, Reason::NoNodes));
        let mut other_uid = node("a", ModelState::Ready, 3, 9);
        other_uid.models[0].uid = Some("before".into());
        let views = [view("n1", &other_uid, false)];
        assert_eq!(
            ready(&model_status(&object(), &views, &status, "t3")),
            (false, Reason::NodesPending),
            "the report is about a deleted object of this name"
        );
    }

    #[test]
    fn each_step_of_a_version_is_a_condition() {
        let steps = |states: &[(ModelState, Option<ModelState>)]| -> Vec<(bool, Reason)> {
            let nodes: Vec<NodeStatus> = states
                .iter()
                .map(|(state, failed_phase)| {
                    let mut status = node("a", *state, 3, 4);
                    status.models[0].failed_phase = *failed_phase;
                    status
                })
                .collect();
            let views: Vec<NodeView<'_>> = nodes.iter().map(|status| view("n", status, false)).collect();
            let status = model_status(&object(), &views, &EdgeModelStatus::default(), "t");
            let of = |(kind, _): &(ConditionType, ModelState)| {
                let condition = status.conditions.iter().find(|condition| condition.kind == *kind).unwrap();
                (condition.status == ConditionStatus::True, condition.reason.clone())
            };
            STEPS.iter().map(of).collect()
        };
        let (yes, no) = (|| (true, Reason::OnAllNodes), || (false, Reason::NodesPending));
        assert_eq!(steps(&[(ModelState::Ready, None), (ModelState::Ready, None)]), [yes(), yes(), yes(), yes()]);
        assert_eq!(steps(&[(ModelState::Ready, None), (ModelState::Vetting, None)]), [yes(), yes(), no(), no()]);
        assert_eq!(steps(&[(ModelState::Downloading, None)]), [no(), no(), no(), no()]);
        let failed = || (false, Reason::NodesFailed);
        assert_eq!(steps(&[(ModelState::Quarantined, Some(ModelState::Vetting))]), [yes(), yes(), failed(), no()]);
        assert_eq!(steps(&[(ModelState::Failed, Some(ModelState::Downloading))]), [failed(), no(), no(), no()]);
        assert_eq!(
            steps(&[(ModelState::Downloading, Some(ModelState::Vetting))]),
            [yes(), yes(), no(), no()],
            "a retried version keeps its steps"
        );
        assert_eq!(steps(&[]), vec![(false, Reason::NoNodes); 4]);
    }

    #[test]
    fn an_unreachable_node_is_named_and_does_not_block_the_others() {
        let good = node("a", ModelState::Ready, 3, 4);
        let status = model_status(&object(), &[view("n1", &good, true)], &EdgeModelStatus::default(), "t1");
        assert_eq!(
            (ready(&status), status.nodes.ready, status.nodes.desired),
            ((false, Reason::NodesUnreachable), 0, 1)
        );
        assert_eq!(status.conditions[0].status, ConditionStatus::Unknown);
        assert_eq!(status.conditions[0].message, "no agent reports on n1");
        let both = [view("n1", &good, true), view("n2", &good, false)];
        let status = model_status(&object(), &both, &EdgeModelStatus::default(), "t1");
        assert_eq!((ready(&status), status.nodes.ready, status.nodes.desired), ((true, Reason::AllNodesReady), 1, 2));
        assert_eq!(status.conditions[0].message, "it serves on all 1 nodes that report; no agent reports on n1");
        assert_eq!(status.conditions[2].reason, Reason::NodesUnreachable, "it is degraded");
    }

    #[test]
    fn kstatus_reads_progress_and_failure() {
        let kstatus = |states: &[ModelState]| {
            let nodes: Vec<NodeStatus> = states.iter().map(|state| node("a", *state, 3, 4)).collect();
            let views: Vec<NodeView<'_>> = nodes.iter().map(|status| view("n", status, false)).collect();
            let status = model_status(&object(), &views, &EdgeModelStatus::default(), "t");
            assert_eq!(status.observed_generation, Some(4));
            let holds = |kind| {
                let condition = status.conditions.iter().find(|condition| condition.kind == kind).unwrap();
                condition.status == ConditionStatus::True
            };
            (holds(ConditionType::Reconciling), holds(ConditionType::Stalled))
        };
        assert_eq!(kstatus(&[ModelState::Ready]), (false, false));
        assert_eq!(kstatus(&[ModelState::Vetting, ModelState::Failed]), (true, false));
        assert_eq!(kstatus(&[ModelState::Ready, ModelState::Failed]), (false, true));
    }

    #[test]
    fn a_stream_on_a_node_without_an_agent_has_failed() {
        let on = |name: &str| FleetObject::new("s", "u", Some(1), &json!({"spec": {"nodeName": name}}));
        let good = node("a", ModelState::Ready, 3, 4);
        let all = [view("n1", &good, false)];
        let status = stream_status(&on("n1"), &all, &CameraStreamStatus::default(), "t");
        assert_eq!((status.nodes.ready, status.conditions[0].reason.clone()), (1, Reason::StreamsReady));
        let status = stream_status(&on("n9"), &all, &CameraStreamStatus::default(), "t");
        assert_eq!((status.nodes.desired, status.nodes.failed), (1, 1));
        assert!(status.conditions[0].message.contains("n9 (no agent of this name has reported)"));
    }
}
