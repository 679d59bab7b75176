//! The controller's loop: it follows all models, streams and nodes, and the one that leads writes what they add up to.
//!
//! Several controllers run, one leads; those that wait follow everything too, so that the next leader knows at once which
//! nodes have been silent since when. Whether a node is silent is told by our own clock from when its status last changed,
//! never by the node's clock. Only differences are written, so a leader that changes writes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

pub mod aggregate;
mod heartbeat;

use crate::aggregate::{FleetObject, NodeView};
pub use heartbeat::{BEAT_MAX, Heartbeat};
use lineside_api::condition::{Condition, ConditionStatus, ConditionType, Reason, set_transition_times};
use lineside_api::status::{CameraStreamStatus, EdgeModelStatus, NodeStatus};
use lineside_common::clock;
use lineside_common::metrics::ControllerMetrics;
use lineside_kube::reflector::{WatchEvent, mirror};
use lineside_kube::{
    ClusterClient, ClusterError, ClusterErrorKind, ClusterEvent, Leadership, Lease, Resource, ResourceKind,
};

/// The name of the lease.
pub const LEASE: &str = "lineside-controller";
/// Things heard that wait at most.
const HEARD_MAX: usize = 256;
/// How often the lease is attended to, and what has changed is written.
const ROUND_EVERY: Duration = Duration::from_secs(2);
/// A round's writes end after this, so that the lease is attended to in time; the rest is written in the next.
const WRITE_MAX: Duration = Duration::from_secs(2);
/// Different troubles that are remembered.
const TROUBLES_MAX: usize = 64;
/// The connection is doubted after this long without an answer.
const DOUBT_AFTER: Duration = Duration::from_secs(20);

/// When a node counts as silent and as gone.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// A node that has not said anything for this long is silent.
    pub unreachable_after: Duration,
    /// A silent node's `EdgeNode` is removed after this long in all, where the cluster has no such node any more.
    pub remove_after: Duration,
}

/// The controller.
pub struct Controller {
    cluster: Arc<ClusterClient>,
    lease: Lease,
    timeouts: Timeouts,
    heartbeat: Arc<Heartbeat>,
    metrics: ControllerMetrics,
    models: BTreeMap<String, (FleetObject, EdgeModelStatus)>,
    streams: BTreeMap<String, (FleetObject, CameraStreamStatus)>,
    nodes: BTreeMap<String, Seen>,
    heard_all: BTreeSet<ResourceKind>,
    /// Since when nodes are listened to without a break.
    hears_nodes_since: Option<Instant>,
    was_leading: bool,
    /// What was said already of what the cluster does not do.
    troubles: BTreeSet<String>,
}

/// A node as it was seen last.
struct Seen {
    uid: String,
    status: NodeStatus,
    changed: Instant,
    /// When it was last looked up whether the node is still there.
    looked_up: Option<Instant>,
}

impl Controller {
    /// A controller that knows nothing yet. `identity` tells it from the others.
    pub fn new(
        cluster: Arc<ClusterClient>,
        identity: &str,
        timeouts: Timeouts,
        heartbeat: Arc<Heartbeat>,
        metrics: ControllerMetrics,
    ) -> Self {
        Self {
            cluster,
            lease: Lease::new(LEASE, identity),
            timeouts,
            heartbeat,
            metrics,
            models: BTreeMap::new(),
            streams: BTreeMap::new(),
            nodes: BTreeMap::new(),
            heard_all: BTreeSet::new(),
            hears_nodes_since: None,
            was_leading: false,
            troubles: BTreeSet::new(),
        }
    }

    /// Runs until stopped, and lets go of the lease at the end.
    pub async fn run(mut self, stop: CancellationToken) {
        let doubt = Arc::new(Notify::new());
        let (heard, mut hears) = mpsc::channel(HEARD_MAX);
        let mut loops = JoinSet::new();
        for kind in [ResourceKind::EdgeModel, ResourceKind::CameraStream, ResourceKind::EdgeNode] {
            loops.spawn(mirror(self.cluster.clone(), kind, heard.clone(), doubt.clone()));
        }
        let mut rounds = tokio::time::interval(ROUND_EVERY);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(heard) = hears.recv() => self.hear(heard),
                _ = rounds.tick() => {
                    if self.cluster.time_since_response() > DOUBT_AFTER {
                        self.hears_nodes_since = None;
                        self.cluster.renew().await;
                        doubt.notify_waiters();
                    }
                    self.round().await;
                }
            }
        }
        loops.shutdown().await;
        if let Err(trouble) = self.lease.release(&self.cluster).await {
            tracing::warn!(%trouble, "the lease could not be released; it runs out by itself");
        }
    }

    fn hear(&mut self, heard: WatchEvent) {
        match heard {
            WatchEvent::Failed(kind, trouble) => {
                if kind == ResourceKind::EdgeNode {
                    self.hears_nodes_since = None;
                }
                self.tell(&trouble);
            }
            WatchEvent::Bookmark(kind) => self.on_word(kind),
            WatchEvent::Listed(kind, items) => {
                let is_named = |name: &String| items.iter().any(|item| item.name == *name);
                match kind {
                    ResourceKind::EdgeModel => self.models.retain(|name, _| is_named(name)),
                    ResourceKind::CameraStream => self.streams.retain(|name, _| is_named(name)),
                    ResourceKind::EdgeNode => self.nodes.retain(|name, _| is_named(name)),
                }
                self.heard_all.insert(kind);
                self.on_word(kind);
                self.troubles.clear();
                items.into_iter().for_each(|item| self.put(kind, item));
            }
            WatchEvent::Updated(kind, item) => self.put(kind, item),
            WatchEvent::Deleted(ResourceKind::EdgeModel, name) => drop(self.models.remove(&name)),
            WatchEvent::Deleted(ResourceKind::CameraStream, name) => drop(self.streams.remove(&name)),
            WatchEvent::Deleted(ResourceKind::EdgeNode, name) => drop(self.nodes.remove(&name)),
        }
    }

    /// Nodes are listened to, from now on if they were not before.
    fn on_word(&mut self, kind: ResourceKind) {
        if kind == ResourceKind::EdgeNode && self.hears_nodes_since.is_none() {
            self.hears_nodes_since = Some(Instant::now());
        }
    }

    fn put(&mut self, kind: ResourceKind, item: Resource) {
        let subject = || FleetObject::new(&item.name, &item.uid, item.generation, &item.document);
        match kind {
            ResourceKind::EdgeModel => {
                let mut status: EdgeModelStatus = read(&item.status);
                aggregate::own(&mut status.conditions);
                self.models.insert(item.name.clone(), (subject(), status));
            }
            ResourceKind::CameraStream => {
                let mut status: CameraStreamStatus = read(&item.status);
                aggregate::own(&mut status.conditions);
                self.streams.insert(item.name.clone(), (subject(), status));
            }
            ResourceKind::EdgeNode => {
                let status: NodeStatus = read(&item.status);
                let known = self.nodes.get(&item.name).filter(|known| known.uid == item.uid);
                // What we wrote ourselves is not a sign of life; the time that the agent gives is.
                let changed = known.filter(|known| known.status.agent == status.agent).map(|known| known.changed);
                let seen = Seen {
                    looked_up: known.and_then(|known| known.looked_up),
                    uid: item.uid,
                    status,
                    changed: changed.unwrap_or_else(Instant::now),
                };
                self.nodes.insert(item.name, seen);
            }
        }
    }

    /// Says what is wrong, once until all objects of some kind could be listed again.
    fn tell(&mut self, trouble: &ClusterError) {
        if self.troubles.len() >= TROUBLES_MAX {
            self.troubles.clear();
        }
        if self.troubles.insert(trouble.to_string()) {
            tracing::warn!(%trouble, "the cluster does not do what it is asked for");
        }
    }

    async fn round(&mut self) {
        match self.lease.attend(&self.cluster).await {
            Ok(Leadership::Leads | Leadership::Waits) => {}
            Err(trouble) => {
                if trouble.kind == ClusterErrorKind::Unreachable {
                    self.cluster.renew().await;
                }
                self.tell(&trouble);
            }
        }
        let leads = self.lease.leads();
        if leads != self.was_leading {
            tracing::info!(leads, "leadership has changed");
            self.was_leading = leads;
        }
        self.metrics.leads.set(i64::from(leads));
        self.heartbeat.beat(self.heard_all.len() == 3);
        let silent = self.nodes.values().filter(|seen| self.is_silent(seen)).count();
        for (state, count) in [("reporting", self.nodes.len() - silent), ("silent", silent)] {
            self.metrics.nodes.with_label_values(&[state]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        if !leads || self.heard_all.len() < 3 {
            return;
        }
        // The term may end before the time for writing does.
        let end = (Instant::now() + WRITE_MAX).min(self.lease.ends());
        for outcome in [self.sum_up(end).await, self.mark_silent(end).await, self.remove_gone(end).await] {
            if let Err(trouble) = outcome {
                self.metrics.failures.inc();
                self.tell(&trouble);
            }
        }
    }

    /// Whether a node has said nothing for too long. While *we* could not listen nobody is silent; and a node that was marked,
    /// by whichever controller, stays so until its agent takes the mark back.
    fn is_silent(&self, seen: &Seen) -> bool {
        let listened = self.hears_nodes_since.map_or(Duration::ZERO, |since| since.elapsed());
        is_marked(&seen.status) || seen.changed.elapsed().min(listened) >= self.timeouts.unreachable_after
    }

    /// Writes the statuses of models and streams that are not as the nodes say.
    async fn sum_up(&mut self, end: Instant) -> Result<(), ClusterError> {
        let now = clock::rfc3339(SystemTime::now());
        let views: Vec<NodeView<'_>> = self
            .nodes
            .iter()
            .map(|(name, seen)| NodeView { name, status: &seen.status, is_silent: self.is_silent(seen) })
            .collect();
        let models = news(&self.models, |subject, before| aggregate::model(subject, &views, before, &now));
        let streams = news(&self.streams, |subject, before| aggregate::stream(subject, &views, before, &now));
        for (name, status) in models {
            if Instant::now() >= end {
                return Ok(());
            }
            if self.write(ResourceKind::EdgeModel, &name, &status).await?
                && let Some((_, known)) = self.models.get_mut(&name)
            {
                *known = status;
            }
        }
        for (name, status) in streams {
            if Instant::now() >= end {
                return Ok(());
            }
            if self.write(ResourceKind::CameraStream, &name, &status).await?
                && let Some((_, known)) = self.streams.get_mut(&name)
            {
                *known = status;
            }
        }
        Ok(())
    }

    /// Writes a status. `false` where it was not taken, which holds up no other: the object is gone, as the watch will say,
    /// or the server refuses, which is told and tried again in the next round.
    async fn write(
        &mut self,
        kind: ResourceKind,
        name: &str,
        status: &impl serde::Serialize,
    ) -> Result<bool, ClusterError> {
        match self.cluster.apply_status(kind, name, status).await {
            Ok(_) => {
                self.metrics.writes.inc();
                Ok(true)
            }
            Err(trouble) if trouble.kind == ClusterErrorKind::NotFound => Ok(false),
            Err(trouble) if matches!(trouble.kind, ClusterErrorKind::Refused | ClusterErrorKind::Conflict) => {
                self.metrics.failures.inc();
                self.tell(&trouble);
                Ok(false)
            }
            Err(trouble) => Err(trouble),
        }
    }

    /// Marks nodes that have fallen silent: whether they are ready cannot be told. The agent takes the mark back itself
    /// with its next word.
    async fn mark_silent(&mut self, end: Instant) -> Result<(), ClusterError> {
        let silent: Vec<(String, String, Vec<Condition>)> = self
            .nodes
            .iter()
            .filter(|(_, seen)| self.is_silent(seen) && !is_marked(&seen.status))
            .map(|(name, seen)| (name.clone(), seen.uid.clone(), seen.status.conditions.clone()))
            .collect();
        for (name, uid, before) in silent {
            if Instant::now() >= end {
                return Ok(());
            }
            let message = format!("nothing was heard of its agent for {} s", self.timeouts.unreachable_after.as_secs());
            let mut mark = [Condition::new(
                ConditionType::Ready,
                ConditionStatus::Unknown,
                Reason::NodeUnreachable,
                message.clone(),
            )];
            set_transition_times(&mut mark, &before, &clock::rfc3339(SystemTime::now()));
            if !self.write(ResourceKind::EdgeNode, &name, &serde_json::json!({"conditions": mark})).await? {
                continue;
            }
            if let Some(seen) = self.nodes.get_mut(&name) {
                seen.status.conditions.retain(|condition| condition.kind != ConditionType::Ready);
                seen.status.conditions.extend(mark);
            }
            let saying = ClusterEvent {
                is_warning: true,
                reason: Reason::NodeUnreachable,
                note: message,
                kind: ResourceKind::EdgeNode,
                name,
                uid: Some(uid),
            };
            self.cluster.say(&saying).await?;
        }
        Ok(())
    }

    /// Removes the `EdgeNode`s of nodes that the cluster has no more. One that never was a node of this cluster stays.
    async fn remove_gone(&mut self, end: Instant) -> Result<(), ClusterError> {
        let timeouts = self.timeouts;
        let silent: Vec<(String, String, String)> = self
            .nodes
            .iter()
            .filter(|(_, seen)| {
                seen.changed.elapsed() >= timeouts.remove_after
                    && seen.looked_up.is_none_or(|at| at.elapsed() >= timeouts.remove_after)
            })
            .filter_map(|(name, seen)| Some((name.clone(), seen.uid.clone(), seen.status.agent.node_uid.clone()?)))
            .collect();
        for (name, uid, node_uid) in silent {
            if Instant::now() >= end {
                return Ok(());
            }
            if let Some(seen) = self.nodes.get_mut(&name) {
                seen.looked_up = Some(Instant::now());
            }
            let found = self.cluster.node(&name).await?;
            if found.is_none_or(|facts| facts.uid != node_uid) {
                tracing::info!(node = name, "the node is gone, its EdgeNode is removed");
                match self.cluster.delete(ResourceKind::EdgeNode, &name, &uid).await {
                    Err(trouble)
                        if !matches!(trouble.kind, ClusterErrorKind::NotFound | ClusterErrorKind::Conflict) =>
                    {
                        return Err(trouble);
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// The statuses that are not as they were, by name.
fn news<S: PartialEq>(
    known: &BTreeMap<String, (FleetObject, S)>,
    sum: impl Fn(&FleetObject, &S) -> S,
) -> Vec<(String, S)> {
    let sums = known.iter().map(|(name, (subject, before))| (name, before, sum(subject, before)));
    sums.filter(|(_, before, after)| *before != after).map(|(name, _, after)| (name.clone(), after)).collect()
}

/// Whether a controller has marked the node as silent.
fn is_marked(status: &NodeStatus) -> bool {
    status
        .conditions
        .iter()
        .any(|condition| condition.kind == ConditionType::Ready && condition.status == ConditionStatus::Unknown)
}

/// A status that cannot be read, or is not there, counts as an empty one: it is written anew.
fn read<T: serde::de::DeserializeOwned + Default>(status: &Value) -> T {
    T::deserialize(status).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use lineside_kube::ClusterConfig;

    async fn controller() -> Controller {
        let kubeconfig = tempfile::NamedTempFile::new().unwrap();
        let text = r#"{"current-context": "a", "clusters": [{"name": "a", "cluster": {"server": "http://127.0.0.1:1"}}],
            "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}], "users": [{"name": "a", "user": {}}]}"#;
        std::fs::write(kubeconfig.path(), text).unwrap();
        let access = ClusterConfig { kubeconfig: Some(kubeconfig.path().to_owned()), ..ClusterConfig::default() };
        let timeouts = Timeouts { unreachable_after: Duration::from_secs(180), remove_after: Duration::from_secs(600) };
        Controller::new(
            Arc::new(ClusterClient::new(access, "test", "test").await.unwrap()),
            "test",
            timeouts,
            Arc::new(Heartbeat::new(std::time::Instant::now())),
            ControllerMetrics::new().unwrap(),
        )
    }

    fn item(name: &str, uid: &str, status: Value) -> Resource {
        Resource { name: name.into(), uid: uid.into(), generation: Some(1), document: json!({}), status }
    }

    fn node(uid: &str, seen: &str) -> Resource {
        item(
            "n1",
            uid,
            json!({"agent": {"lastHeartbeatTime": seen}, "conditions": [
            {"type": "Ready", "status": "True", "reason": "ModelsReady", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}),
        )
    }

    fn ago(seconds: u64) -> Instant {
        Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap()
    }

    #[tokio::test]
    async fn a_node_is_silent_when_we_listened_and_it_said_nothing() {
        let mut controller = controller().await;
        controller.hear(WatchEvent::Listed(ResourceKind::EdgeNode, vec![node("u1", "t1")]));
        assert!(!controller.is_silent(&controller.nodes["n1"]));
        controller.nodes.get_mut("n1").unwrap().changed = ago(200);
        assert!(!controller.is_silent(&controller.nodes["n1"]), "we have only begun to listen");
        controller.hears_nodes_since = Some(ago(200));
        assert!(controller.is_silent(&controller.nodes["n1"]));
        // ClusterError with other kinds is none with nodes.
        let trouble = || ClusterError { kind: ClusterErrorKind::Unreachable, message: "no answer".into() };
        controller.hear(WatchEvent::Failed(ResourceKind::EdgeModel, trouble()));
        assert!(controller.is_silent(&controller.nodes["n1"]));
        controller.hear(WatchEvent::Failed(ResourceKind::EdgeNode, trouble()));
        assert!(!controller.is_silent(&controller.nodes["n1"]), "we cannot tell");
        controller.hear(WatchEvent::Bookmark(ResourceKind::EdgeNode));
        assert!(!controller.is_silent(&controller.nodes["n1"]), "and listen from now on");
    }

    #[tokio::test]
    async fn only_the_agents_own_word_is_a_sign_of_life() {
        let mut controller = controller().await;
        controller.hear(WatchEvent::Listed(ResourceKind::EdgeNode, vec![node("u1", "t1")]));
        let old = ago(200);
        let forget = |controller: &mut Controller| {
            controller.hears_nodes_since = Some(ago(200));
            controller.nodes.get_mut("n1").unwrap().changed = old;
        };
        forget(&mut controller);
        controller.hear(WatchEvent::Updated(ResourceKind::EdgeNode, node("u1", "t1")));
        assert_eq!(controller.nodes["n1"].changed, old, "something else of it was written");
        controller.hear(WatchEvent::Updated(ResourceKind::EdgeNode, node("u1", "t2")));
        assert!(!controller.is_silent(&controller.nodes["n1"]));
        forget(&mut controller);
        controller.hear(WatchEvent::Updated(ResourceKind::EdgeNode, node("u2", "t2")));
        assert!(!controller.is_silent(&controller.nodes["n1"]), "another object of this name");
        // Marked by whichever controller: so it stays until its agent speaks.
        let mut marked = node("u2", "t2");
        marked.status["conditions"][0]["status"] = "Unknown".into();
        controller.hear(WatchEvent::Updated(ResourceKind::EdgeNode, marked));
        assert!(controller.is_silent(&controller.nodes["n1"]));
        controller.hear(WatchEvent::Updated(ResourceKind::EdgeNode, node("u2", "t3")));
        assert!(!controller.is_silent(&controller.nodes["n1"]));
    }

    #[tokio::test]
    async fn a_condition_of_somebody_else_is_no_difference() {
        let mut controller = controller().await;
        let now = "2026-01-01T00:00:00Z";
        let bare = item("m", "u", json!({}));
        controller.hear(WatchEvent::Updated(ResourceKind::EdgeModel, bare.clone()));
        let sums = |controller: &Controller| {
            news(&controller.models, |subject, before| aggregate::model(subject, &[], before, now))
        };
        let written = sums(&controller).remove(0).1;
        let mut status = serde_json::to_value(&written).unwrap();
        let foreign = json!({"type": "Approved", "status": "True", "reason": "ByHand", "lastTransitionTime": now});
        status["conditions"].as_array_mut().unwrap().push(foreign);
        controller.hear(WatchEvent::Updated(ResourceKind::EdgeModel, Resource { status, ..bare }));
        assert!(sums(&controller).is_empty(), "{:?}", sums(&controller));
    }
}
