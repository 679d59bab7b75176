//! The nodes' statuses added up into those of models and streams.
//!
//! A node counts for a model when its labels match the model's selector, whether or not its agent has heard of the model
//! yet; so a model that a node has not taken up is a model that is not ready there. A node that is silent is counted, and
//! not as ready: what it does is not known.

use std::collections::BTreeMap;

use serde_json::Value;

use lineside_api::condition::{Condition, ConditionType, Reason, set_transition_times};
use lineside_api::kinds::selects;
use lineside_api::state::ModelState;
use lineside_api::status::{CameraStreamStatus, EdgeModelStatus, ModelStatus, NodeCounts, NodeStatus, truncated};

/// Nodes named in a message at most.
const NAMED_MAX: usize = 5;

/// What a version has behind it on a node once it is in the state beside or further on, as conditions of an `EdgeModel`.
const STEPS: [(ConditionType, ModelState); 4] = [
    (ConditionType::Downloaded, ModelState::Verifying),
    (ConditionType::Verified, ModelState::Vetting),
    (ConditionType::Compatible, ModelState::Warming),
    (ConditionType::Loaded, ModelState::Ready),
];

/// Keeps of a status's conditions those that are written here; others are somebody else's, and no difference to us.
pub fn own(conditions: &mut Vec<Condition>) {
    let sums = [ConditionType::Ready, ConditionType::Progressing, ConditionType::Degraded];
    conditions
        .retain(|condition| sums.contains(&condition.kind) || STEPS.iter().any(|(kind, _)| *kind == condition.kind));
}

/// A node, as far as the sums need it.
#[derive(Debug, Clone, Copy)]
pub struct NodeView<'a> {
    /// Its name.
    pub name: &'a str,
    /// What it said last.
    pub status: &'a NodeStatus,
    /// Whether it has said nothing for too long.
    pub is_silent: bool,
}

/// An `EdgeModel` or `CameraStream` that is asked for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FleetObject {
    /// Its name.
    pub name: String,
    /// Which of all objects that ever bore its name it is.
    pub uid: String,
    /// How often its spec was changed.
    pub generation: Option<i64>,
    version: Option<u64>,
    selector: BTreeMap<String, String>,
    node_name: Option<String>,
}

impl FleetObject {
    /// Reads what is needed of an object. What is missing or of another type counts as not said: the API server has
    /// validated the rest.
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

    /// Whether what a node says is of this very object, as it is now.
    fn is_meant(&self, uid: Option<&str>, generation: Option<i64>) -> bool {
        uid.is_none_or(|uid| uid == self.uid) && generation >= self.generation
    }

    fn concerns(&self, node: &NodeView<'_>) -> bool {
        self.node_name.as_deref().is_none_or(|name| name == node.name)
            && selects(&self.selector, &node.status.agent.labels)
    }
}

/// How one node stands to one subject.
enum NodeState<'a> {
    Ready,
    Pending,
    Failed(&'a str),
    Silent,
}

/// A model on all nodes. `now` dates what has changed since `before`.
pub fn model(subject: &FleetObject, nodes: &[NodeView<'_>], before: &EdgeModelStatus, now: &str) -> EdgeModelStatus {
    let mut came = Vec::new();
    let stands = nodes.iter().filter(|node| subject.concerns(node)).map(|node| {
        let said = node.status.models.iter().find(|model| model.name == subject.name);
        let said = said.filter(|said| subject.is_meant(said.uid.as_deref(), said.observed_generation));
        came.push((node.name, said.map_or((0, false), way_come)));
        let Some(said) = said else {
            return (node.name, if node.is_silent { NodeState::Silent } else { NodeState::Pending });
        };
        let state = said.state;
        let standing = if node.is_silent {
            NodeState::Silent
        } else if state == ModelState::Ready && Some(said.version) == subject.version {
            NodeState::Ready
        } else if state.has_failed() {
            NodeState::Failed(said.reason.as_deref().unwrap_or_default())
        } else {
            NodeState::Pending
        };
        (node.name, standing)
    });
    let stands = stands.collect();
    let (nodes, mut conditions) = sum(stands, Reason::AllNodesReady, "serves");
    conditions.extend(STEPS.iter().enumerate().map(|(index, (kind, _))| step(kind, index + 1, &came)));
    settle(&mut conditions, subject, &before.conditions, now);
    EdgeModelStatus { observed_generation: subject.generation, nodes, conditions }
}

/// How many of the [`STEPS`] a version has behind it, and whether it failed at the next.
fn way_come(said: &ModelStatus) -> (usize, bool) {
    let state = said.state;
    let failed_phase = said.failed_phase.unwrap_or_default();
    // What is tried again has the steps behind it that it had before.
    let came_to = if state.has_failed() { failed_phase } else { state.max(failed_phase) };
    (STEPS.iter().filter(|(_, from)| came_to >= *from).count(), state.has_failed())
}

/// Whether all nodes have so many steps behind them.
fn step(kind: &ConditionType, steps: usize, came: &[(&str, (usize, bool))]) -> Condition {
    let done = came.iter().filter(|(_, (behind, _))| *behind >= steps).count();
    let failed =
        came.iter().filter(|(_, (behind, has_failed))| *has_failed && behind + 1 == steps).map(|(name, _)| *name);
    let failed: Vec<&str> = failed.take(NAMED_MAX).collect();
    let reason = match (came.len(), failed.is_empty()) {
        (0, _) => Reason::NoNodes,
        (all, _) if done == all => Reason::OnAllNodes,
        (_, false) => Reason::NodesFailed,
        _ => Reason::NodesPending,
    };
    let message = match failed.as_slice() {
        [] => format!("on {done} of {} nodes", came.len()),
        names => truncated(&format!("on {done} of {} nodes; it failed on {}", came.len(), names.join(", "))),
    };
    Condition::new(kind.clone(), reason == Reason::OnAllNodes, reason, message)
}

/// A stream on the nodes that play it.
pub fn stream(
    subject: &FleetObject,
    nodes: &[NodeView<'_>],
    before: &CameraStreamStatus,
    now: &str,
) -> CameraStreamStatus {
    let mut stands: Vec<(&str, NodeState<'_>)> = nodes
        .iter()
        .filter(|node| subject.concerns(node))
        .map(|node| {
            let said = node.status.streams.iter().find(|stream| stream.name == subject.name);
            let standing = match said.filter(|said| subject.is_meant(said.uid.as_deref(), said.observed_generation)) {
                _ if node.is_silent => NodeState::Silent,
                Some(said) if said.up => NodeState::Ready,
                Some(said) => said.reason.as_deref().map_or(NodeState::Pending, NodeState::Failed),
                None => NodeState::Pending,
            };
            (node.name, standing)
        })
        .collect();
    // A node that is named is meant even where nobody has heard of it.
    if let (Some(name), true) = (&subject.node_name, stands.is_empty()) {
        stands.push((name.as_str(), NodeState::Failed("no agent of this name has reported")));
    }
    let (nodes, mut conditions) = sum(stands, Reason::StreamsReady, "plays");
    settle(&mut conditions, subject, &before.conditions, now);
    CameraStreamStatus { observed_generation: subject.generation, nodes, conditions }
}

fn sum(stands: Vec<(&str, NodeState<'_>)>, reason: Reason, verb: &str) -> (NodeCounts, Vec<Condition>) {
    let whole = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
    let count = |is: fn(&NodeState<'_>) -> bool| whole(stands.iter().filter(|(_, standing)| is(standing)).count());
    let counts = NodeCounts {
        desired: whole(stands.len()),
        ready: count(|standing| matches!(standing, NodeState::Ready)),
        candidate: 0,
        failed: count(|standing| matches!(standing, NodeState::Failed(_))),
    };
    let (pending, silent) = (
        count(|standing| matches!(standing, NodeState::Pending)),
        count(|standing| matches!(standing, NodeState::Silent)),
    );
    let named = |is: fn(&NodeState<'_>) -> bool| {
        let names: Vec<String> = stands
            .iter()
            .filter(|(_, standing)| is(standing))
            .take(NAMED_MAX + 1)
            .enumerate()
            .map(|(index, (name, standing))| match standing {
                _ if index == NAMED_MAX => "and more".to_owned(),
                NodeState::Failed(why) if !why.is_empty() => format!("{name} ({why})"),
                _ => (*name).to_owned(),
            })
            .collect();
        truncated(&names.join(", "))
    };
    let is_ready = counts.desired > 0 && counts.ready == counts.desired;
    let failed_names = named(|standing| matches!(standing, NodeState::Failed(_)));
    let silent_names = named(|standing| matches!(standing, NodeState::Silent));
    let (why, message) = match (counts.desired, counts.failed, silent) {
        _ if is_ready => (reason, format!("it {verb} on all {} nodes", counts.desired)),
        (0, ..) => (Reason::NoNodes, "no node that reports bears the labels asked for".to_owned()),
        (_, 1.., _) => (Reason::NodesFailed, format!("it failed on {failed_names}")),
        (_, _, 1..) => (Reason::NodesUnreachable, format!("nothing is heard of {silent_names}")),
        _ => (Reason::NodesPending, format!("{} of {} are on their way", pending, counts.desired)),
    };
    let mut conditions = vec![Condition::new(ConditionType::Ready, is_ready, why, message)];
    conditions.push(match pending {
        0 => Condition::new(ConditionType::Progressing, false, Reason::Settled, ""),
        _ => Condition::new(
            ConditionType::Progressing,
            true,
            Reason::NodesPending,
            format!("{} of {} are on their way", pending, counts.desired),
        ),
    });
    conditions.push(match (counts.failed, silent) {
        (0, 0) => Condition::new(ConditionType::Degraded, false, Reason::AsExpected, ""),
        (0, _) => Condition::new(ConditionType::Degraded, true, Reason::NodesUnreachable, silent_names),
        _ => Condition::new(ConditionType::Degraded, true, Reason::NodesFailed, failed_names),
    });
    (counts, conditions)
}

fn settle(conditions: &mut [Condition], subject: &FleetObject, before: &[Condition], now: &str) {
    conditions.iter_mut().for_each(|condition| condition.observed_generation = subject.generation);
    set_transition_times(conditions, before, now);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use lineside_api::condition::ConditionStatus;
    use lineside_api::status::StreamStatus;

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

    fn view<'a>(name: &'a str, status: &'a NodeStatus, is_silent: bool) -> NodeView<'a> {
        NodeView { name, status, is_silent }
    }

    fn subject() -> FleetObject {
        FleetObject::new("m", "u", Some(4), &json!({"spec": {"version": 3, "nodeSelector": {"line": "a"}}}))
    }

    fn ready(status: &EdgeModelStatus) -> (bool, Reason) {
        (status.conditions[0].status == ConditionStatus::True, status.conditions[0].reason.clone())
    }

    #[test]
    fn nodes_count_by_their_labels_and_by_what_they_say_of_this_generation() {
        let (good, old, failed, other) = (
            node("a", ModelState::Ready, 3, 4),
            node("a", ModelState::Ready, 2, 3),
            node("a", ModelState::Failed, 3, 4),
            node("b", ModelState::Ready, 3, 4),
        );
        let all =
            [view("n1", &good, false), view("n2", &old, false), view("n3", &failed, false), view("n4", &other, false)];
        let status = model(&subject(), &all, &EdgeModelStatus::default(), "t1");
        assert_eq!(status.nodes, NodeCounts { desired: 3, ready: 1, candidate: 0, failed: 1 });
        assert_eq!(ready(&status), (false, Reason::NodesFailed));
        assert_eq!(status.conditions[0].message, "it failed on n3 (no such file)");
        let status = model(&subject(), &all[..1], &status, "t2");
        assert_eq!((ready(&status), status.nodes.ready), ((true, Reason::AllNodesReady), 1));
        assert_eq!(model(&subject(), &all[..1], &status, "t3"), status, "what stays the same is not written again");
        assert_eq!(ready(&model(&subject(), &all[1..2], &status, "t3")), (false, Reason::NodesPending));
        assert_eq!(ready(&model(&subject(), &all[3..], &status, "t3")), (false, Reason::NoNodes));
        let mut of_another = node("a", ModelState::Ready, 3, 9);
        of_another.models[0].uid = Some("before".into());
        let views = [view("n1", &of_another, false)];
        assert_eq!(ready(&model(&subject(), &views, &status, "t3")), (false, Reason::NodesPending), "it was made anew");
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
            let status = model(&subject(), &views, &EdgeModelStatus::default(), "t");
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
            "it is tried again"
        );
        assert_eq!(steps(&[]), vec![(false, Reason::NoNodes); 4]);
    }

    #[test]
    fn a_silent_node_is_not_ready_and_is_named() {
        let good = node("a", ModelState::Ready, 3, 4);
        let status = model(&subject(), &[view("n1", &good, true)], &EdgeModelStatus::default(), "t1");
        assert_eq!(
            (ready(&status), status.nodes.ready, status.nodes.desired),
            ((false, Reason::NodesUnreachable), 0, 1)
        );
        assert_eq!(status.conditions[0].message, "nothing is heard of n1");
    }

    #[test]
    fn a_stream_on_a_node_that_is_not_there_is_told() {
        let on = |name: &str| FleetObject::new("s", "u", Some(1), &json!({"spec": {"nodeName": name}}));
        let good = node("a", ModelState::Ready, 3, 4);
        let all = [view("n1", &good, false)];
        let status = stream(&on("n1"), &all, &CameraStreamStatus::default(), "t");
        assert_eq!((status.nodes.ready, status.conditions[0].reason.clone()), (1, Reason::StreamsReady));
        let status = stream(&on("n9"), &all, &CameraStreamStatus::default(), "t");
        assert_eq!((status.nodes.desired, status.nodes.failed), (1, 1));
        assert!(status.conditions[0].message.contains("n9 (no agent of this name has reported)"));
    }
}
