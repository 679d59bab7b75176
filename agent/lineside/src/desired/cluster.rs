//! Follows the desired state in a cluster, and reports this node's status to it.
//!
//! ```text
//! reflector (one for each kind) ──events──> ClusterFollower ──> desired state ──> reconciler
//!                                              │    ^                                │
//!                                   desired.json    Node labels (every 30 s)         v
//!                                                                      status writer <── status
//! ```
//!
//! Until every kind has been listed, the desired state of the last run applies (`desired_cache.rs`). Changes within a short
//! time are applied together. The labels of the node are read every half minute; this request also shows that a connection is
//! dead, which a watch alone would show only after a minute.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lineside_common::supervisor::{OnFailure, SupervisedTask, Supervisor};
use lineside_common::{LogOnChange, error_chain};
use lineside_kube::reflector::{WatchEvent, reflect};
use lineside_kube::status_writer::{StatusWriter, Uids, write_status};
use lineside_kube::{
    ClusterClient, ClusterError, ClusterErrorKind, ClusterStatePublisher, NodeMetadata, Resource, ResourceKind,
};
use parking_lot::Mutex;
use prometheus::IntCounter;
use tokio::sync::{Mutex as AsyncMutex, Notify, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};

use super::desired_cache::{CachedState, DesiredCache};
use super::object_set::{ApiObject, ObjectSet};
use super::{DesiredState, Node};
use crate::http::status_store::StatusStore;
use crate::rules_child::RuleChecker;

/// Watch events that wait for the follower. A full queue slows the watches down.
const EVENTS_MAX: usize = 64;
/// Changes within this time are applied together.
const DEBOUNCE: Duration = Duration::from_millis(200);
/// How often the node's labels are read.
const LABELS_INTERVAL: Duration = Duration::from_secs(30);
/// How often the node's labels are read until they are known, and after a request without an answer.
const LABELS_RETRY: Duration = Duration::from_secs(5);
/// How often an earlier context of the kubeconfig is tried.
const PREFERRED_CONTEXT_INTERVAL: Duration = Duration::from_secs(300);
/// How often the connection's state is updated.
const STATE_INTERVAL: Duration = Duration::from_secs(1);
/// The kinds that make up the desired state.
const KINDS: [ResourceKind; 2] = [ResourceKind::EdgeModel, ResourceKind::CameraStream];

/// What following a cluster takes.
pub struct ClusterSync {
    /// The client.
    pub cluster: Arc<ClusterClient>,
    /// This node, with the labels of the agent's own configuration.
    pub node: Node,
    /// The agent's data folder.
    pub data_dir: PathBuf,
    /// Receives the desired state.
    pub desired: watch::Sender<Option<Arc<DesiredState>>>,
    /// Asks for everything to be listed again.
    pub reread: Arc<Notify>,
    /// The node's status.
    pub status: Arc<StatusStore>,
    /// Counts failed watches.
    pub watch_failures: IntCounter,
    /// The state of the connection.
    pub state: ClusterStatePublisher,
    /// Checks verdict rules.
    pub rules: Arc<RuleChecker>,
}

/// What the tasks share.
struct Shared {
    sync: ClusterSync,
    uids: Uids,
    node_uid: Arc<Mutex<Option<String>>>,
    /// Makes the reflectors open their watches again.
    rewatch: Arc<Notify>,
}

impl ClusterSync {
    /// Starts the tasks: a reflector for each kind, the follower, and the status writer.
    pub fn start(self, supervisor: &Supervisor) -> Vec<SupervisedTask> {
        let (sender, receiver) = mpsc::channel(EVENTS_MAX);
        let cached = DesiredCache::open(&self.data_dir);
        let node_uid = cached.get().and_then(|cached| cached.node_uid.clone());
        let shared = Arc::new(Shared {
            sync: self,
            uids: Uids::default(),
            node_uid: Arc::new(Mutex::new(node_uid)),
            rewatch: Arc::new(Notify::new()),
        });
        let mut tasks: Vec<SupervisedTask> = KINDS
            .into_iter()
            .map(|kind| {
                let (shared, sender) = (shared.clone(), sender.clone());
                supervisor.spawn(&format!("reflector/{}", kind.name()), OnFailure::Restart, move |stop| {
                    let (cluster, rewatch) = (shared.sync.cluster.clone(), shared.rewatch.clone());
                    let work = reflect(cluster, kind, sender.clone(), rewatch);
                    async move {
                        stop.run_until_cancelled(work).await;
                    }
                })
            })
            .collect();
        let writing = shared.clone();
        tasks.push(supervisor.spawn("status-writer", OnFailure::Restart, move |stop| {
            let writer = StatusWriter {
                cluster: writing.sync.cluster.clone(),
                node: writing.sync.node.name.clone(),
                source: writing.sync.status.clone(),
                uids: writing.uids.clone(),
                node_uid: writing.node_uid.clone(),
            };
            write_status(writer, stop)
        }));
        // The follower outlives its task: after a failure the next one continues with the objects that are known. A change that
        // was lost with the failure is seen by the next periodic list.
        let follower = Arc::new(AsyncMutex::new(ClusterFollower::new(shared, receiver, cached)));
        tasks.push(supervisor.spawn("cluster-follower", OnFailure::Restart, move |stop| {
            let follower = follower.clone();
            async move {
                stop.run_until_cancelled(async { follower.lock().await.run().await }).await;
            }
        }));
        tasks
    }
}

/// Owns what is known of the cluster's objects.
struct ClusterFollower {
    shared: Arc<Shared>,
    events: mpsc::Receiver<WatchEvent>,
    cache: DesiredCache,
    objects: ObjectSet,
    labels: BTreeMap<String, String>,
    /// Whether the labels are known, possibly from the last run. Until then no desired state is complete: an object may be
    /// selected by a label.
    are_labels_known: bool,
    /// The kinds that have been listed from the present context.
    listed: BTreeSet<ResourceKind>,
    context_generation: u64,
    /// The error that was logged last, by kind.
    watch_errors: BTreeMap<ResourceKind, LogOnChange<String>>,
    node_error: LogOnChange<String>,
}

impl ClusterFollower {
    fn new(shared: Arc<Shared>, events: mpsc::Receiver<WatchEvent>, cache: DesiredCache) -> Self {
        let mut follower = Self {
            cache,
            shared,
            events,
            objects: ObjectSet::default(),
            labels: BTreeMap::new(),
            are_labels_known: false,
            listed: BTreeSet::new(),
            context_generation: 0,
            watch_errors: BTreeMap::new(),
            node_error: LogOnChange::default(),
        };
        follower.restore();
        follower
    }

    async fn run(&mut self) {
        let shared = self.shared.clone();
        let cluster = &shared.sync.cluster;
        let mut state = tokio::time::interval(STATE_INTERVAL);
        state.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut preferred = tokio::time::interval(PREFERRED_CONTEXT_INTERVAL);
        let mut labels = Box::pin(self.read_node(Duration::ZERO));
        // A change that was due when the task failed is applied now.
        let mut apply_at = Some(Instant::now());
        loop {
            let due = apply_at.unwrap_or_else(Instant::now);
            tokio::select! {
                Some(event) = self.events.recv() => {
                    // The check of a rule waits for the rules child.
                    if tokio::task::block_in_place(|| self.on_watch_event(event)) && apply_at.is_none() {
                        apply_at = Some(Instant::now() + DEBOUNCE);
                    }
                }
                () = tokio::time::sleep_until(due), if apply_at.is_some() => {
                    apply_at = None;
                    self.apply();
                }
                node = &mut labels => {
                    let is_answered = !matches!(&node, Err(error) if error.kind() == ClusterErrorKind::Unreachable);
                    if self.on_node(node).await {
                        apply_at.get_or_insert(Instant::now());
                    }
                    let interval =
                        if self.are_labels_known && is_answered { LABELS_INTERVAL } else { LABELS_RETRY };
                    labels = Box::pin(self.read_node(interval.mul_f64(0.9 + fastrand::f64() / 5.0)));
                }
                () = shared.sync.reread.notified() => {
                    cluster.try_preferred_context().await;
                    shared.rewatch.notify_waiters();
                }
                _ = preferred.tick() => {
                    cluster.try_preferred_context().await;
                    if cluster.context_generation() != self.context_generation {
                        shared.rewatch.notify_waiters();
                    }
                }
                _ = state.tick() => {
                    let is_synced = self.listed.len() == KINDS.len();
                    shared.sync.state.update(cluster.last_response(), is_synced, std::time::Instant::now());
                }
            }
        }
    }

    /// Reads the node's metadata after a delay.
    fn read_node(
        &self,
        delay: Duration,
    ) -> impl Future<Output = Result<Option<NodeMetadata>, ClusterError>> + Send + use<> {
        let (cluster, name) = (self.shared.sync.cluster.clone(), self.shared.sync.node.name.clone());
        async move {
            tokio::time::sleep(delay).await;
            cluster.node_metadata(&name).await
        }
    }

    /// The desired state of the last run applies until the cluster answers. Where it is not known, the reconciler restores the
    /// last-good versions meanwhile.
    fn restore(&mut self) {
        let Some(cached) = self.cache.get().cloned() else {
            self.shared.sync.desired.send_replace(Some(Arc::new(DesiredState::pending(None))));
            return;
        };
        let objects = cached.objects.len();
        self.labels = cached.labels;
        self.are_labels_known = true;
        let rules = self.shared.sync.rules.clone();
        cached.objects.into_iter().for_each(|object| {
            self.objects.put(object, &|rule| rules.check_rule(rule));
        });
        rules.release();
        tracing::info!(event = "desired_state_restored", objects, "The desired state of the last run applies");
        self.send();
    }

    /// Takes a watch event. Returns whether it may change the desired state.
    fn on_watch_event(&mut self, event: WatchEvent) -> bool {
        let generation = self.shared.sync.cluster.context_generation();
        if generation != self.context_generation {
            // Switching contexts invalidates the completeness until a full list has completed. What runs keeps running.
            self.context_generation = generation;
            self.listed.clear();
        }
        let rules = self.shared.sync.rules.clone();
        let check_rule = |rule: &str| rules.check_rule(rule);
        match event {
            WatchEvent::Bookmark(_) => false,
            WatchEvent::Failed(kind, error) => {
                self.log_watch_error(kind, &error);
                self.shared.sync.watch_failures.inc();
                false
            }
            WatchEvent::Listed(kind, resources) => {
                if self.watch_errors.remove(&kind).is_some() || !self.listed.contains(&kind) {
                    let objects = resources.len();
                    tracing::info!(event = "cluster_listed", kind = kind.name(), objects, "Listed a kind");
                }
                let is_first = self.listed.insert(kind);
                let all = resources.into_iter().map(|resource| api_object(kind, resource)).collect();
                self.objects.replace(kind.name(), all, &check_rule) || is_first
            }
            WatchEvent::Updated(kind, resource) => self.objects.put(api_object(kind, resource), &check_rule),
            WatchEvent::Deleted(kind, name) => self.objects.remove(kind.name(), &name),
        }
    }

    fn log_watch_error(&mut self, kind: ResourceKind, error: &ClusterError) {
        let text = error_chain(error);
        if !self.watch_errors.entry(kind).or_default().set(text.clone()) {
            return;
        }
        let advice = match error.kind() {
            ClusterErrorKind::NotFound => {
                "the custom resource definitions are missing; apply the output of `lineside crd`"
            }
            ClusterErrorKind::Refused => "check the RBAC rules in edge-manifests/base",
            _ => "it is retried",
        };
        tracing::warn!(
            event = "cluster_watch_failed",
            kind = kind.name(),
            error = text,
            advice,
            "Watching failed; the last known desired state applies"
        );
    }

    /// Takes the node's metadata. Returns whether it may change the desired state.
    async fn on_node(&mut self, node: Result<Option<NodeMetadata>, ClusterError>) -> bool {
        match node {
            Ok(Some(metadata)) => self.on_metadata(metadata),
            Ok(None) => {
                // The cluster has no such node, or it is being registered again. Known labels stay: a model that is unloaded by
                // mistake costs more than one that is kept too long.
                self.node_error.clear();
                !std::mem::replace(&mut self.are_labels_known, true)
            }
            Err(error) if error.kind() == ClusterErrorKind::Unreachable => {
                tracing::debug!(error = error_chain(&error), "The node's labels cannot be read");
                self.shared.sync.cluster.reconnect().await;
                self.shared.rewatch.notify_waiters();
                false
            }
            Err(error) => {
                let text = error_chain(&error);
                if self.node_error.set(text.clone()) {
                    tracing::warn!(
                        event = "node_labels_unreadable",
                        error = text,
                        "The node's labels cannot be read; known labels apply"
                    );
                }
                // A refusal is permanent. Objects that select every node, or this one by name, have to run all the same.
                let is_refused = error.kind() == ClusterErrorKind::Refused && !self.are_labels_known;
                self.are_labels_known |= is_refused;
                is_refused
            }
        }
    }

    fn on_metadata(&mut self, metadata: NodeMetadata) -> bool {
        self.node_error.clear();
        let uid = Some(metadata.uid).filter(|uid| !uid.is_empty());
        let mut known_uid = self.shared.node_uid.lock();
        let is_new = self.labels != metadata.labels || *known_uid != uid || !self.are_labels_known;
        *known_uid = uid;
        self.are_labels_known = true;
        self.labels = metadata.labels;
        is_new
    }

    /// Sends the desired state and writes it to disk, once all of it is known.
    fn apply(&mut self) {
        tokio::task::block_in_place(|| self.shared.sync.rules.release());
        if self.listed.len() < KINDS.len() || !self.are_labels_known {
            return;
        }
        self.send();
        let state = CachedState {
            labels: self.labels.clone(),
            node_uid: self.shared.node_uid.lock().clone(),
            objects: self.objects.cacheable(&self.node()),
        };
        tokio::task::block_in_place(|| self.cache.write(state));
    }

    fn send(&mut self) {
        let is_complete = self.listed.len() == KINDS.len();
        let desired = self.objects.desired_state(&self.node(), &self.labels, is_complete);
        let mut uids = BTreeMap::new();
        let accepted = desired.objects.iter().map(|object| object.object.key());
        let refused =
            desired.refused.iter().filter_map(|refused| Some((kind_name(&refused.kind)?, refused.name.as_str())));
        for (kind, name) in accepted.chain(refused) {
            if let Some(uid) = self.objects.uid(kind, name) {
                uids.insert((kind, name.to_owned()), uid.to_owned());
            }
        }
        *self.shared.uids.lock() = uids;
        self.shared.sync.desired.send_replace(Some(Arc::new(desired)));
    }

    /// This node with all its labels; those of the agent's own configuration override the cluster's.
    fn node(&self) -> Node {
        let own = &self.shared.sync.node;
        let mut labels = self.labels.clone();
        labels.extend(own.labels.clone());
        Node { name: own.name.clone(), labels }
    }
}

fn api_object(kind: ResourceKind, resource: Resource) -> ApiObject {
    ApiObject {
        kind: kind.name().to_owned(),
        name: resource.name,
        uid: resource.uid,
        generation: resource.generation,
        document: resource.document,
    }
}

fn kind_name(name: &str) -> Option<&'static str> {
    KINDS.into_iter().map(ResourceKind::name).find(|kind| *kind == name)
}
