//! The controller's loop: watches all models, streams and nodes; the leader writes what follows from them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::aggregate::{self, FleetObject};
use crate::heartbeat::Heartbeat;
use crate::liveness::{NodeLiveness, Timeouts};
use crate::metrics::ControllerMetrics;
use lineside_api::condition::{Condition, ConditionStatus, ConditionType, Reason, set_transition_times};
use lineside_api::status::{CameraStreamStatus, EdgeModelStatus};
use lineside_common::supervisor::{OnFailure, SupervisedTask, Supervisor};
use lineside_common::{clock, error_chain};
use lineside_kube::reflector::{WatchEvent, reflect};
use lineside_kube::{ClusterClient, ClusterError, ClusterErrorKind, ClusterEvent, Lease, Resource, ResourceKind};

/// The name of the lease.
pub const LEASE: &str = "lineside-controller";
/// The kinds that the controller watches.
const KINDS: [ResourceKind; 3] = [ResourceKind::EdgeModel, ResourceKind::CameraStream, ResourceKind::EdgeNode];
/// The most events that wait; a full queue holds the watches back.
const EVENTS_MAX: usize = 256;
/// How often the lease is renewed and changes are written.
const TICK_EVERY: Duration = Duration::from_secs(2);
/// The time limit of the writes of one tick, so that the lease is renewed in time; the rest is written in the next
/// tick.
const WRITE_MAX: Duration = Duration::from_secs(2);
/// How often the volume of the data folders is checked.
const VOLUME_EVERY: Duration = Duration::from_secs(20);
/// The most error messages that are remembered as logged.
const LOGGED_ERRORS_MAX: usize = 64;
/// The connection is replaced after this long without an answer.
const RECONNECT_AFTER: Duration = Duration::from_secs(20);

/// The controller.
pub struct Controller {
    cluster: Arc<ClusterClient>,
    lease: Lease,
    unreachable_after: Duration,
    heartbeat: Arc<Heartbeat>,
    metrics: ControllerMetrics,
    /// The objects with their statuses as last read or written.
    models: BTreeMap<String, (FleetObject, EdgeModelStatus)>,
    streams: BTreeMap<String, (FleetObject, CameraStreamStatus)>,
    nodes: NodeLiveness,
    /// The kinds that have been listed completely.
    listed: BTreeSet<ResourceKind>,
    was_leader: bool,
    /// The persistent volume of the data folders, and when it is checked next.
    volume: Option<(String, Instant)>,
    /// The error messages that were logged since the last successful list.
    logged_errors: BTreeSet<String>,
}

impl Controller {
    /// A controller that has listed nothing yet. `identity` must be unique among the controllers.
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
            unreachable_after: timeouts.unreachable_after,
            heartbeat,
            metrics,
            models: BTreeMap::new(),
            streams: BTreeMap::new(),
            nodes: NodeLiveness::new(timeouts),
            listed: BTreeSet::new(),
            was_leader: false,
            volume: None,
            logged_errors: BTreeSet::new(),
        }
    }

    /// Keeps the persistent volume of this name bound to the claim of the same name, also when the namespace is deleted and
    /// created again.
    #[must_use]
    pub fn with_data_volume(mut self, name: Option<String>) -> Self {
        self.volume = name.map(|name| (name, Instant::now()));
        self
    }

    /// Runs until stopped, and releases the lease at the end. The reflectors run under `supervisor`: one that panics is
    /// restarted and counted, and starts with a list, which replaces what it had reported.
    pub async fn run(mut self, supervisor: &Supervisor, stop: CancellationToken) {
        let rewatch = Arc::new(Notify::new());
        let (sender, mut events) = mpsc::channel(EVENTS_MAX);
        let reflectors = KINDS.map(|kind| self.start_reflector(supervisor, kind, &sender, &rewatch));
        let mut ticks = tokio::time::interval(TICK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(event) = events.recv() => self.handle(event, Instant::now()),
                _ = ticks.tick() => {
                    if self.cluster.time_since_response() > RECONNECT_AFTER {
                        self.nodes.watch_interrupted();
                        self.cluster.reconnect().await;
                        rewatch.notify_waiters();
                    }
                    self.tick().await;
                }
            }
        }
        for reflector in reflectors {
            reflector.stop().await;
        }
        if let Err(error) = self.lease.release(&self.cluster).await {
            let error = error_chain(&error);
            tracing::warn!(event = "lease_release_failed", error, "Lease cannot be released; it expires by itself");
        }
    }

    fn start_reflector(
        &self,
        supervisor: &Supervisor,
        kind: ResourceKind,
        events: &mpsc::Sender<WatchEvent>,
        rewatch: &Arc<Notify>,
    ) -> SupervisedTask {
        let (cluster, events, rewatch) = (self.cluster.clone(), events.clone(), rewatch.clone());
        supervisor.spawn(&format!("reflector-{}", kind.name()), OnFailure::Restart, move |stop| {
            let reflector = reflect(cluster.clone(), kind, events.clone(), rewatch.clone());
            async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = reflector => {}
                }
            }
        })
    }

    fn handle(&mut self, event: WatchEvent, now: Instant) {
        match event {
            WatchEvent::Failed(kind, error) => {
                if kind == ResourceKind::EdgeNode {
                    self.nodes.watch_interrupted();
                }
                self.log_error(&error);
            }
            WatchEvent::Bookmark(kind) => self.watch_opened(kind, now),
            WatchEvent::Listed(kind, items) => {
                let names: BTreeSet<String> = items.iter().map(|item| item.name.clone()).collect();
                match kind {
                    ResourceKind::EdgeModel => self.models.retain(|name, _| names.contains(name)),
                    ResourceKind::CameraStream => self.streams.retain(|name, _| names.contains(name)),
                    ResourceKind::EdgeNode => self.nodes.retain(|name| names.contains(name)),
                }
                self.listed.insert(kind);
                self.watch_opened(kind, now);
                self.logged_errors.clear();
                items.into_iter().for_each(|item| self.update(kind, item, now));
            }
            WatchEvent::Updated(kind, item) => self.update(kind, item, now),
            WatchEvent::Deleted(ResourceKind::EdgeModel, name) => drop(self.models.remove(&name)),
            WatchEvent::Deleted(ResourceKind::CameraStream, name) => drop(self.streams.remove(&name)),
            WatchEvent::Deleted(ResourceKind::EdgeNode, name) => self.nodes.remove(&name),
        }
    }

    fn watch_opened(&mut self, kind: ResourceKind, now: Instant) {
        if kind == ResourceKind::EdgeNode {
            self.nodes.watch_opened(now);
        }
    }

    fn update(&mut self, kind: ResourceKind, item: Resource, now: Instant) {
        let object = || FleetObject::new(&item.name, &item.uid, item.generation, &item.document);
        match kind {
            ResourceKind::EdgeModel => {
                let mut status: EdgeModelStatus = read_status(&item.status);
                aggregate::retain_own_conditions(&mut status.conditions);
                self.models.insert(item.name.clone(), (object(), status));
            }
            ResourceKind::CameraStream => {
                let mut status: CameraStreamStatus = read_status(&item.status);
                aggregate::retain_own_conditions(&mut status.conditions);
                self.streams.insert(item.name.clone(), (object(), status));
            }
            ResourceKind::EdgeNode => {
                let status = read_status(&item.status);
                self.nodes.observe(item.name, item.uid, status, now);
            }
        }
    }

    fn is_synced(&self) -> bool {
        self.listed.len() == KINDS.len()
    }

    /// Logs an error once until a list succeeds.
    fn log_error(&mut self, error: &ClusterError) {
        if self.logged_errors.len() >= LOGGED_ERRORS_MAX {
            self.logged_errors.clear();
        }
        let error = error_chain(error);
        if self.logged_errors.insert(error.clone()) {
            tracing::warn!(event = "cluster_call_failed", error, "Call to the API server failed");
        }
    }

    /// Renews the lease, and writes what has changed if this controller leads.
    async fn tick(&mut self) {
        if let Err(error) = self.lease.renew(&self.cluster).await {
            if error.kind() == ClusterErrorKind::Unreachable {
                self.cluster.reconnect().await;
            }
            self.log_error(&error);
        }
        let is_leader = self.lease.is_leader();
        if is_leader != self.was_leader {
            tracing::info!(event = "leadership_changed", is_leader, "Leadership changed");
            self.was_leader = is_leader;
        }
        self.heartbeat.beat(self.is_synced(), Instant::now());
        self.publish_metrics(is_leader);
        if !is_leader {
            return;
        }
        if let Err(error) = self.rebind_volume(Instant::now()).await {
            self.metrics.failures.inc();
            self.log_error(&error);
        }
        if !self.is_synced() {
            return;
        }
        // The leadership may end before the time for writes does.
        let end = (Instant::now() + WRITE_MAX).min(self.lease.leads_until());
        let outcomes =
            [self.write_aggregates(end).await, self.mark_unreachable(end).await, self.remove_deleted(end).await];
        for error in outcomes.into_iter().filter_map(Result::err) {
            self.metrics.failures.inc();
            self.log_error(&error);
        }
    }

    fn publish_metrics(&self, is_leader: bool) {
        let (reporting, unreachable) = self.nodes.counts(Instant::now());
        let gauge = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.metrics.leader.set(i64::from(is_leader));
        self.metrics.reporting_nodes.set(gauge(reporting));
        self.metrics.unreachable_nodes.set(gauge(unreachable));
    }

    /// Makes the volume of the data folders available again if its claim was deleted. A conflict is left to the next check.
    async fn rebind_volume(&mut self, now: Instant) -> Result<(), ClusterError> {
        let Some((name, next)) = self.volume.as_mut().filter(|(_, next)| *next <= now) else { return Ok(()) };
        *next = now + VOLUME_EVERY;
        match self.cluster.rebind_volume(name).await {
            Ok(true) => {
                tracing::info!(
                    event = "volume_released",
                    volume = name,
                    "Claim of the volume was deleted; a new one can use it"
                );
                Ok(())
            }
            Err(error) if error.kind() != ClusterErrorKind::Conflict => Err(error),
            _ => Ok(()),
        }
    }

    /// Writes the statuses of models and streams that differ from what the nodes report.
    async fn write_aggregates(&mut self, end: Instant) -> Result<(), ClusterError> {
        let time = clock::rfc3339(SystemTime::now());
        let views = self.nodes.views(Instant::now());
        let models = changed(&self.models, |model, last| aggregate::model_status(model, &views, last, &time));
        let streams = changed(&self.streams, |stream, last| aggregate::stream_status(stream, &views, last, &time));
        for (name, status) in models {
            if Instant::now() >= end {
                return Ok(());
            }
            if self.write(ResourceKind::EdgeModel, &name, &status).await?
                && let Some((_, last)) = self.models.get_mut(&name)
            {
                *last = status;
            }
        }
        for (name, status) in streams {
            if Instant::now() >= end {
                return Ok(());
            }
            if self.write(ResourceKind::CameraStream, &name, &status).await?
                && let Some((_, last)) = self.streams.get_mut(&name)
            {
                *last = status;
            }
        }
        Ok(())
    }

    /// Writes a status. `false` when it was not written and the writes of other objects can continue: the object no
    /// longer exists, as the watch will report, or the API server refuses the status, which is logged and retried in
    /// the next tick.
    async fn write(&mut self, kind: ResourceKind, name: &str, status: &impl Serialize) -> Result<bool, ClusterError> {
        let Err(error) = self.cluster.apply_status(kind, name, status).await else {
            self.metrics.status_writes.inc();
            return Ok(true);
        };
        match error.kind() {
            ClusterErrorKind::NotFound => Ok(false),
            ClusterErrorKind::Refused | ClusterErrorKind::Conflict => {
                self.metrics.failures.inc();
                self.log_error(&error);
                Ok(false)
            }
            _ => Err(error),
        }
    }

    /// Sets all conditions of unreachable nodes to `Unknown`, since their state cannot be determined. An agent's next status
    /// overwrites the marks.
    async fn mark_unreachable(&mut self, end: Instant) -> Result<(), ClusterError> {
        for name in self.nodes.unmarked(Instant::now()) {
            if Instant::now() >= end {
                return Ok(());
            }
            let Some(node) = self.nodes.get(&name) else { continue };
            let uid = node.uid.clone();
            let message = format!("the agent has not reported for {} s", self.unreachable_after.as_secs());
            let marks = unknown_conditions(&node.status.conditions, &message);
            if !self.write(ResourceKind::EdgeNode, &name, &json!({"conditions": marks})).await? {
                continue;
            }
            self.nodes.set_conditions(&name, marks);
            let event = ClusterEvent {
                is_warning: true,
                reason: Reason::NodeUnreachable,
                note: message,
                kind: ResourceKind::EdgeNode,
                name,
                uid: Some(uid),
            };
            self.cluster.publish_event(&event).await?;
        }
        Ok(())
    }

    /// Deletes the `EdgeNode`s of unreachable nodes that the cluster no longer has.
    async fn remove_deleted(&mut self, end: Instant) -> Result<(), ClusterError> {
        for candidate in self.nodes.removal_candidates(Instant::now()) {
            if Instant::now() >= end {
                return Ok(());
            }
            let name = &candidate.name;
            self.nodes.record_check(name, Instant::now());
            let node = self.cluster.node_metadata(name).await?;
            if node.is_some_and(|node| node.uid == candidate.node_uid) {
                continue;
            }
            tracing::info!(event = "edge_node_deleted", node = name, "Node no longer exists; its EdgeNode is deleted");
            match self.cluster.delete(ResourceKind::EdgeNode, name, &candidate.uid).await {
                Err(error) if !matches!(error.kind(), ClusterErrorKind::NotFound | ClusterErrorKind::Conflict) => {
                    return Err(error);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The statuses that differ from the last ones, by name.
fn changed<S: PartialEq>(
    objects: &BTreeMap<String, (FleetObject, S)>,
    status: impl Fn(&FleetObject, &S) -> S,
) -> Vec<(String, S)> {
    objects
        .iter()
        .filter_map(|(name, (object, last))| {
            let status = status(object, last);
            (status != *last).then(|| (name.clone(), status))
        })
        .collect()
}

/// A status that is missing or cannot be read counts as an empty one, and is overwritten.
fn read_status<T: DeserializeOwned + Default>(status: &Value) -> T {
    T::deserialize(status).unwrap_or_default()
}

/// The conditions of an agent that does not report, all of them unknown. Conditions of other writers are left alone.
fn unknown_conditions(last: &[Condition], message: &str) -> Vec<Condition> {
    let is_own = |kind: &&ConditionType| !matches!(kind, ConditionType::Ready | ConditionType::Other(_));
    let others = last.iter().map(|condition| &condition.kind).filter(is_own);
    let kinds = std::iter::once(&ConditionType::Ready).chain(others);
    let unknown =
        |kind: &ConditionType| Condition::new(kind.clone(), ConditionStatus::Unknown, Reason::NodeUnreachable, message);
    let mut marks: Vec<Condition> = kinds.map(unknown).collect();
    set_transition_times(&mut marks, last, &clock::rfc3339(SystemTime::now()));
    marks
}

#[cfg(test)]
mod tests {
    use super::*;
    use lineside_common::metrics::Registrar;
    use lineside_kube::ClusterConfig;

    async fn controller() -> Controller {
        let kubeconfig = tempfile::NamedTempFile::new().unwrap();
        let text = r#"{"current-context": "a", "clusters": [{"name": "a", "cluster": {"server": "http://127.0.0.1:1"}}],
            "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}], "users": [{"name": "a", "user": {}}]}"#;
        std::fs::write(kubeconfig.path(), text).unwrap();
        let config = ClusterConfig { kubeconfig: Some(kubeconfig.path().to_owned()), ..ClusterConfig::default() };
        let timeouts = Timeouts { unreachable_after: Duration::from_secs(180), remove_after: Duration::from_secs(600) };
        Controller::new(
            Arc::new(ClusterClient::new(config, "test", "test").await.unwrap()),
            "test",
            timeouts,
            Arc::new(Heartbeat::new(Instant::now())),
            ControllerMetrics::register(&Registrar::default()).unwrap(),
        )
    }

    fn resource(name: &str, status: Value) -> Resource {
        Resource { name: name.into(), uid: "u".into(), generation: Some(1), document: json!({}), status }
    }

    #[tokio::test]
    async fn only_errors_of_nodes_interrupt_their_watch() {
        let mut controller = controller().await;
        let start = Instant::now();
        let late = start + Duration::from_secs(200);
        let heartbeat = json!({"agent": {"lastHeartbeatTime": "t1"}});
        controller.handle(WatchEvent::Listed(ResourceKind::EdgeNode, vec![resource("n1", heartbeat)]), start);
        assert_eq!((controller.nodes.counts(start), controller.nodes.counts(late)), ((1, 0), (0, 1)));
        let error = || ClusterError::new(ClusterErrorKind::Unreachable, "no answer");
        controller.handle(WatchEvent::Failed(ResourceKind::EdgeModel, error()), late);
        assert_eq!(controller.nodes.counts(late), (0, 1));
        controller.handle(WatchEvent::Failed(ResourceKind::EdgeNode, error()), late);
        assert_eq!(controller.nodes.counts(late), (1, 0));
        controller.handle(WatchEvent::Bookmark(ResourceKind::EdgeNode), late);
        assert_eq!(controller.nodes.counts(late + Duration::from_secs(180)), (0, 1));
    }

    #[tokio::test]
    async fn a_list_replaces_what_was_known_and_makes_the_kind_synced() {
        let mut controller = controller().await;
        let now = Instant::now();
        for kind in KINDS {
            assert!(!controller.is_synced());
            controller.handle(WatchEvent::Updated(kind, resource("old", json!({}))), now);
            controller.handle(WatchEvent::Listed(kind, vec![resource("new", json!({}))]), now);
        }
        assert!(controller.is_synced());
        assert!(controller.models.keys().eq(["new"]) && controller.streams.keys().eq(["new"]));
        assert!(controller.nodes.get("old").is_none() && controller.nodes.get("new").is_some());
        for kind in KINDS {
            controller.handle(WatchEvent::Deleted(kind, "new".to_owned()), now);
        }
        assert!(controller.models.is_empty() && controller.streams.is_empty() && controller.nodes.get("new").is_none());
    }

    #[tokio::test]
    async fn conditions_of_other_writers_are_no_difference() {
        let mut controller = controller().await;
        let time = "2026-01-01T00:00:00Z";
        controller.handle(WatchEvent::Updated(ResourceKind::EdgeModel, resource("m", json!({}))), Instant::now());
        let statuses = |controller: &Controller| {
            changed(&controller.models, |model, last| aggregate::model_status(model, &[], last, time))
        };
        let written = statuses(&controller).remove(0).1;
        let mut status = serde_json::to_value(&written).unwrap();
        let foreign = json!({"type": "Approved", "status": "True", "reason": "ByHand", "lastTransitionTime": time});
        status["conditions"].as_array_mut().unwrap().push(foreign);
        controller.handle(WatchEvent::Updated(ResourceKind::EdgeModel, resource("m", status)), Instant::now());
        assert!(statuses(&controller).is_empty(), "{:?}", statuses(&controller));
    }

    #[test]
    fn nothing_stays_true_on_a_silent_node() {
        let condition = |kind| Condition::new(kind, true, Reason::AsExpected, "");
        let foreign = ConditionType::Other("Approved".to_owned());
        let last =
            [ConditionType::Ready, ConditionType::BrokerConnected, foreign, ConditionType::Degraded].map(condition);
        let marks = unknown_conditions(&last, "silent");
        let kinds: Vec<String> = marks.iter().map(|mark| mark.kind.to_string()).collect();
        assert_eq!(kinds, ["Ready", "BrokerConnected", "Degraded"]);
        assert!(marks.iter().all(|mark| mark.status == ConditionStatus::Unknown && mark.message == "silent"));
        assert_eq!(unknown_conditions(&[], "silent").len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reflector_that_panics_is_restarted_and_counted() {
        let controller = controller().await;
        let restarts = Registrar::default().counters("task_restarts_total", "Restarts.", &["task"]).unwrap();
        let (supervisor, stop) = (Supervisor::new(restarts.clone()), CancellationToken::new());
        let (watched, ended) = (supervisor.clone(), stop.clone());
        let running = tokio::spawn(async move { controller.run(&watched, ended).await });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(supervisor.tasks(), ["reflector-CameraStream", "reflector-EdgeModel", "reflector-EdgeNode"]);
        assert!(supervisor.inject_panic("reflector-EdgeNode"));
        while restarts.with_label_values(&["reflector-EdgeNode"]).get() == 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(supervisor.failure(), None, "the process does not end");
        stop.cancel();
        running.await.unwrap();
    }
}
