//! The liveness of nodes: which agents report their status, and which are unreachable.
//!
//! A node is unreachable when the time since its agent last wrote its status exceeds [`Timeouts::unreachable_after`].
//! The time is measured by this process's clock from when it saw the change, never by the node's clock. Only what the
//! agent writes about itself counts as a sign of life, not what a controller wrote into the same object. Time in which
//! this controller did not watch the nodes does not count. A node that a controller has marked as unreachable stays so
//! until its agent overwrites the mark.
//!
//! All functions take the time as an argument.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::aggregate::NodeView;
use lineside_api::condition::{Condition, ConditionStatus, ConditionType};
use lineside_api::status::NodeStatus;

/// When a node counts as unreachable, and when it is removed.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// A node whose agent has not written its status for this long is unreachable. Agents write once a minute at least.
    pub unreachable_after: Duration,
    /// The `EdgeNode` of an unreachable node is deleted after this long, if the cluster no longer has the node.
    pub remove_after: Duration,
}

/// A node as last seen.
#[derive(Debug)]
pub(crate) struct ObservedNode {
    /// The uid of the `EdgeNode`.
    pub(crate) uid: String,
    pub(crate) status: NodeStatus,
    /// When a write of the node's agent was last seen.
    last_report: Instant,
    /// When it was last checked whether the cluster still has the node.
    checked: Option<Instant>,
}

impl ObservedNode {
    /// Whether a controller has marked the node as unreachable, and its agent has not overwritten the mark.
    fn is_marked(&self) -> bool {
        let is_mark = |condition: &Condition| {
            condition.kind == ConditionType::Ready && condition.status == ConditionStatus::Unknown
        };
        self.status.conditions.iter().any(is_mark)
    }
}

/// A node whose `EdgeNode` may have to be deleted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RemovalCandidate {
    pub(crate) name: String,
    /// The uid of the `EdgeNode`.
    pub(crate) uid: String,
    /// The uid of the Kubernetes `Node` that the agent ran on.
    pub(crate) node_uid: String,
}

/// All nodes, and since when they are watched without interruption.
#[derive(Debug)]
pub(crate) struct NodeLiveness {
    timeouts: Timeouts,
    nodes: BTreeMap<String, ObservedNode>,
    watching_since: Option<Instant>,
}

impl NodeLiveness {
    pub(crate) fn new(timeouts: Timeouts) -> Self {
        Self { timeouts, nodes: BTreeMap::new(), watching_since: None }
    }

    /// The watch of the nodes is open.
    pub(crate) fn watch_opened(&mut self, now: Instant) {
        self.watching_since.get_or_insert(now);
    }

    /// The watch of the nodes is interrupted: no node is unreachable on the ground of time that has passed so far.
    pub(crate) fn watch_interrupted(&mut self) {
        self.watching_since = None;
    }

    /// Keeps the nodes for which `exists` holds.
    pub(crate) fn retain(&mut self, exists: impl Fn(&String) -> bool) {
        self.nodes.retain(|name, _| exists(name));
    }

    pub(crate) fn remove(&mut self, name: &str) {
        self.nodes.remove(name);
    }

    /// Records the current state of an `EdgeNode`.
    pub(crate) fn observe(&mut self, name: String, uid: String, status: NodeStatus, now: Instant) {
        let known = self.nodes.get(&name).filter(|known| known.uid == uid);
        // The `agent` part contains the heartbeat; a write of a controller leaves it as it is.
        let last_report =
            known.filter(|known| known.status.agent == status.agent).map_or(now, |known| known.last_report);
        let checked = known.and_then(|known| known.checked);
        self.nodes.insert(name, ObservedNode { uid, status, last_report, checked });
    }

    pub(crate) fn is_unreachable(&self, node: &ObservedNode, now: Instant) -> bool {
        let watched = self.watching_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let silence = now.saturating_duration_since(node.last_report);
        node.is_marked() || silence.min(watched) >= self.timeouts.unreachable_after
    }

    /// The numbers of reporting and of unreachable nodes.
    pub(crate) fn counts(&self, now: Instant) -> (usize, usize) {
        let unreachable = self.nodes.values().filter(|node| self.is_unreachable(node, now)).count();
        (self.nodes.len() - unreachable, unreachable)
    }

    /// All nodes, as the aggregation takes them.
    pub(crate) fn views(&self, now: Instant) -> Vec<NodeView<'_>> {
        self.nodes
            .iter()
            .map(|(name, node)| NodeView { name, status: &node.status, is_unreachable: self.is_unreachable(node, now) })
            .collect()
    }

    /// The names of the nodes that are unreachable and not marked so.
    pub(crate) fn unmarked(&self, now: Instant) -> Vec<String> {
        let unmarked = self.nodes.iter().filter(|(_, node)| self.is_unreachable(node, now) && !node.is_marked());
        unmarked.map(|(name, _)| name.clone()).collect()
    }

    pub(crate) fn get(&self, name: &str) -> Option<&ObservedNode> {
        self.nodes.get(name)
    }

    /// Replaces conditions of the node, after they were written.
    pub(crate) fn set_conditions(&mut self, name: &str, marks: Vec<Condition>) {
        if let Some(node) = self.nodes.get_mut(name) {
            let is_marked = |kind: &ConditionType| marks.iter().any(|mark| mark.kind == *kind);
            node.status.conditions.retain(|condition| !is_marked(&condition.kind));
            node.status.conditions.extend(marks);
        }
    }

    /// The nodes that have been unreachable for long enough to be removed and were not checked recently. A node that
    /// never was one of this cluster, which is one without a node uid, is not among them.
    pub(crate) fn removal_candidates(&self, now: Instant) -> Vec<RemovalCandidate> {
        let is_due = |since: Instant| now.saturating_duration_since(since) >= self.timeouts.remove_after;
        let due = self.nodes.iter().filter(|(_, node)| is_due(node.last_report) && node.checked.is_none_or(is_due));
        due.filter_map(|(name, node)| {
            let node_uid = node.status.agent.node_uid.clone()?;
            Some(RemovalCandidate { name: name.clone(), uid: node.uid.clone(), node_uid })
        })
        .collect()
    }

    /// Records that it was checked whether the cluster still has the node.
    pub(crate) fn record_check(&mut self, name: &str, now: Instant) {
        if let Some(node) = self.nodes.get_mut(name) {
            node.checked = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lineside_api::condition::Reason;

    fn status(heartbeat: &str, ready: ConditionStatus) -> NodeStatus {
        let mut status = NodeStatus::default();
        status.agent.last_heartbeat_time = Some(heartbeat.to_owned());
        status.agent.node_uid = Some("node-uid".to_owned());
        status.conditions.push(Condition::new(ConditionType::Ready, ready, Reason::ModelsReady, ""));
        status
    }

    /// Observes the node `n` with this uid and heartbeat.
    fn observe(nodes: &mut NodeLiveness, uid: &str, heartbeat: &str, now: Instant) {
        nodes.observe("n".to_owned(), uid.to_owned(), status(heartbeat, ConditionStatus::True), now);
    }

    fn is_unreachable(nodes: &NodeLiveness, now: Instant) -> bool {
        nodes.is_unreachable(&nodes.nodes["n"], now)
    }

    fn nodes() -> NodeLiveness {
        let timeouts = Timeouts { unreachable_after: Duration::from_secs(180), remove_after: Duration::from_secs(600) };
        NodeLiveness::new(timeouts)
    }

    #[test]
    fn a_node_is_unreachable_when_it_was_watched_and_did_not_report() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut nodes = nodes();
        observe(&mut nodes, "u1", "t1", start);
        assert!(!is_unreachable(&nodes, after(1000)), "nothing was watched yet");
        nodes.watch_opened(after(1000));
        nodes.watch_opened(after(1100));
        assert!(!is_unreachable(&nodes, after(1179)) && is_unreachable(&nodes, after(1180)));
        assert_eq!((nodes.counts(after(1179)), nodes.counts(after(1180))), ((1, 0), (0, 1)));
        assert_eq!(nodes.unmarked(after(1180)), ["n"]);
        nodes.watch_interrupted();
        assert!(!is_unreachable(&nodes, after(2000)), "the reports may have been missed");
        nodes.watch_opened(after(2000));
        assert!(!is_unreachable(&nodes, after(2179)) && is_unreachable(&nodes, after(2180)));
    }

    #[test]
    fn only_what_the_agent_writes_is_a_sign_of_life() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut nodes = nodes();
        nodes.watch_opened(start);
        observe(&mut nodes, "u1", "t1", start);
        observe(&mut nodes, "u1", "t1", after(170));
        assert!(is_unreachable(&nodes, after(180)), "another writer changed the object");
        observe(&mut nodes, "u1", "t2", after(181));
        assert!(!is_unreachable(&nodes, after(182)));
        observe(&mut nodes, "u2", "t2", after(360));
        assert!(!is_unreachable(&nodes, after(362)), "another object of this name");
    }

    #[test]
    fn a_marked_node_stays_unreachable_until_its_agent_reports() {
        let start = Instant::now();
        let mut nodes = nodes();
        nodes.watch_opened(start);
        observe(&mut nodes, "u1", "t1", start);
        let mark = Condition::new(
            ConditionType::Ready,
            ConditionStatus::Unknown,
            Reason::NodeUnreachable,
            "no report for 180 s",
        );
        nodes.set_conditions("n", vec![mark]);
        assert!(is_unreachable(&nodes, start) && nodes.unmarked(start).is_empty());
        assert_eq!(nodes.get("n").unwrap().status.conditions.len(), 1);
        observe(&mut nodes, "u1", "t2", start);
        assert!(!is_unreachable(&nodes, start));
    }

    #[test]
    fn an_unreachable_node_is_checked_for_removal_once_per_period() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut nodes = nodes();
        observe(&mut nodes, "u1", "t1", start);
        assert!(nodes.removal_candidates(after(599)).is_empty());
        let candidate = RemovalCandidate { name: "n".into(), uid: "u1".into(), node_uid: "node-uid".into() };
        assert_eq!(nodes.removal_candidates(after(600)), [candidate]);
        nodes.record_check("n", after(600));
        observe(&mut nodes, "u1", "t1", after(700));
        assert!(nodes.removal_candidates(after(1199)).is_empty(), "a write of another keeps what was checked");
        assert_eq!(nodes.removal_candidates(after(1200)).len(), 1);
        let mut foreign = status("t1", ConditionStatus::True);
        foreign.agent.node_uid = None;
        nodes.observe("n".into(), "u2".into(), foreign, start);
        assert!(nodes.removal_candidates(after(9999)).is_empty(), "it never was a node of this cluster");
    }
}
