//! The loops between this node and its cluster: what is asked for comes in (`mirror.rs`, this file), how things stand goes
//! out (`tell.rs`).
//!
//! Until the cluster has been heard, what it asked for last time is in force (`memory.rs`). Changes that come close
//! together are taken together. Every half minute the node's own labels are looked at; that call is also what finds out
//! that the connection is dead, where a watch alone would wait for a minute.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::desired_cache::{CachedState, DesiredCache};
use crate::desired::object_set::{ApiObject, ObjectSet};
use crate::desired::{DesiredState, Node};
use crate::http::status_store::StatusStore;
use lineside_common::metrics::Metrics;
use lineside_common::{LogOnChange, error_chain};
use lineside_kube::reflector::{WatchEvent, reflect};
use lineside_kube::status_writer::{StatusWriter, Uids, write_status};
use lineside_kube::{ClusterClient, ClusterErrorKind, Resource, ResourceKind};

/// Things heard that wait at most; a full queue holds the watches back.
const HEARD_MAX: usize = 64;
/// Changes within this time are taken together.
const GATHER: Duration = Duration::from_millis(200);
/// How often the node's labels are looked at.
const NODE_EVERY: Duration = Duration::from_secs(30);
/// And until they are known, or when there was no answer.
const NODE_AGAIN: Duration = Duration::from_secs(5);
/// How often a context before the present one is tried.
const PREFER_EVERY: Duration = Duration::from_secs(300);
/// How often the age of the last answer is measured.
const MEASURE_EVERY: Duration = Duration::from_secs(1);
/// After this long without an answer the cluster counts as out of reach.
const SILENT_MAX: Duration = Duration::from_secs(75);

/// What the loops are given.
pub struct ClusterSync {
    /// The way into the cluster.
    pub cluster: Arc<ClusterClient>,
    /// This node, with the labels of the agent's own configuration.
    pub node: Node,
    /// The agent's own folder.
    pub data_dir: PathBuf,
    /// Where it is said what is asked for.
    pub desired_state: watch::Sender<Option<Arc<DesiredState>>>,
    /// Asks for another look.
    pub again: Arc<Notify>,
    /// How things stand.
    pub board: Arc<StatusStore>,
    /// Everything that is counted.
    pub metrics: Metrics,
}

impl ClusterSync {
    /// Runs until stopped.
    pub async fn run(self, stop: CancellationToken) {
        let doubt = Arc::new(Notify::new());
        let uids = Uids::default();
        let (heard, hears) = mpsc::channel(HEARD_MAX);
        let mut loops = JoinSet::new();
        for kind in [ResourceKind::EdgeModel, ResourceKind::CameraStream] {
            loops.spawn(reflect(self.cluster.clone(), kind, heard.clone(), doubt.clone()));
        }
        let memory = DesiredCache::open(&self.data_dir);
        let node_uid = Arc::new(Mutex::new(memory.get().and_then(|known| known.node_uid.clone())));
        let writer = StatusWriter {
            cluster: self.cluster.clone(),
            node: self.node.name.clone(),
            source: self.board.clone(),
            uids: uids.clone(),
            node_uid: node_uid.clone(),
        };
        let teller = tokio::spawn(write_status(writer, stop.clone()));
        let listener = Listener {
            sync: self,
            memory,
            asked: ObjectSet::default(),
            labels: BTreeMap::new(),
            knows_labels: false,
            heard_all: BTreeSet::new(),
            era: 0,
            uids,
            node_uid,
            doubt,
            troubles: BTreeMap::new(),
            node_trouble: LogOnChange::default(),
        };
        // Whatever it waits for, it waits no longer than the agent runs.
        tokio::select! {
            () = stop.cancelled() => {}
            () = listener.run(hears) => {}
        }
        loops.shutdown().await;
        if let Err(error) = teller.await {
            tracing::error!(%error, "the loop that writes the node's status had panicked");
        }
    }
}

/// The one owner of what was heard.
struct Listener {
    sync: ClusterSync,
    memory: DesiredCache,
    asked: ObjectSet,
    labels: BTreeMap<String, String>,
    /// Whether they are known, be it from last time. Until then nothing is certain: a model may be for a label.
    knows_labels: bool,
    /// The kinds of which all objects are known.
    heard_all: BTreeSet<ResourceKind>,
    era: u64,
    uids: Uids,
    node_uid: Arc<Mutex<Option<String>>>,
    doubt: Arc<Notify>,
    /// What was said last about why a kind cannot be listened to.
    troubles: BTreeMap<ResourceKind, LogOnChange<String>>,
    /// What was said last about why the node cannot be looked at.
    node_trouble: LogOnChange<String>,
}

impl Listener {
    async fn run(mut self, mut hears: mpsc::Receiver<WatchEvent>) {
        self.recall();
        let mut measure = tokio::time::interval(MEASURE_EVERY);
        measure.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut prefer = tokio::time::interval(PREFER_EVERY);
        let mut node = Box::pin(look_at_node(self.sync.cluster.clone(), self.sync.node.name.clone(), Duration::ZERO));
        let mut gathered: Option<Instant> = None;
        loop {
            let due = gathered.unwrap_or_else(Instant::now);
            tokio::select! {
                Some(heard) = hears.recv() => {
                    if self.hear(heard) && gathered.is_none() {
                        gathered = Some(Instant::now() + GATHER);
                    }
                }
                () = tokio::time::sleep_until(due), if gathered.is_some() => {
                    gathered = None;
                    self.speak();
                }
                facts = &mut node => {
                    let is_answered = !matches!(&facts, Err(trouble) if trouble.kind() == ClusterErrorKind::Unreachable);
                    if self.on_node(facts).await {
                        gathered.get_or_insert(Instant::now());
                    }
                    let every = if self.knows_labels && is_answered { NODE_EVERY } else { NODE_AGAIN };
                    let rest = every.mul_f64(0.9 + fastrand::f64() / 5.0);
                    node = Box::pin(look_at_node(self.sync.cluster.clone(), self.sync.node.name.clone(), rest));
                }
                () = self.sync.again.notified() => {
                    self.sync.cluster.try_preferred_context().await;
                    self.doubt.notify_waiters();
                }
                _ = prefer.tick() => {
                    self.sync.cluster.try_preferred_context().await;
                    if self.sync.cluster.context_generation() != self.era {
                        self.doubt.notify_waiters();
                    }
                }
                _ = measure.tick() => self.measure(),
            }
        }
    }

    /// What was asked for last time is in force until the cluster is heard.
    fn recall(&mut self) {
        let Some(known) = self.memory.get().cloned() else { return };
        let objects = known.objects.len();
        self.labels = known.labels;
        self.knows_labels = true;
        known.objects.into_iter().for_each(|given| {
            self.asked.put(given);
        });
        tracing::info!(objects, "what the cluster asked for last time is in force until it is heard");
        self.say();
    }

    /// Takes in what was heard. `true` when it may change what is asked for.
    fn hear(&mut self, heard: WatchEvent) -> bool {
        let era = self.sync.cluster.context_generation();
        if era != self.era {
            // Another context is another word. What runs goes on until all of it was heard.
            self.era = era;
            self.heard_all.clear();
        }
        match heard {
            WatchEvent::Bookmark(_) => false,
            WatchEvent::Failed(kind, trouble) => {
                let error = error_chain(&trouble);
                if self.troubles.entry(kind).or_default().set(error.clone()) {
                    let advice = match trouble.kind() {
                        ClusterErrorKind::NotFound => {
                            "the kinds of lineside.dev are not there; apply what `lineside crd` prints"
                        }
                        ClusterErrorKind::Refused => "see the RBAC rules in edge-manifests/base",
                        _ => "it is tried again",
                    };
                    tracing::warn!(
                        event = "cluster_watch_failed",
                        error,
                        advice,
                        "the cluster cannot be listened to, what it asked for last stays in force"
                    );
                }
                self.sync.metrics.cluster_watch_failures.inc();
                false
            }
            WatchEvent::Listed(kind, items) => {
                if self.troubles.remove(&kind).is_some() || !self.heard_all.contains(&kind) {
                    tracing::info!(kind = kind.name(), objects = items.len(), "the cluster is heard");
                }
                let is_first = self.heard_all.insert(kind);
                let all = items.into_iter().map(|item| given(kind, item)).collect();
                self.asked.replace(kind.name(), all) || is_first
            }
            WatchEvent::Updated(kind, item) => self.asked.put(given(kind, item)),
            WatchEvent::Deleted(kind, name) => self.asked.remove(kind.name(), &name),
        }
    }

    async fn on_node(&mut self, facts: Facts) -> bool {
        let facts = match facts {
            Ok(facts) => facts,
            Err(trouble) if trouble.kind() == ClusterErrorKind::Unreachable => {
                tracing::debug!(error = error_chain(&trouble), "the node's labels cannot be looked at");
                self.sync.cluster.reconnect().await;
                self.doubt.notify_waiters();
                return false;
            }
            Err(trouble) => {
                let error = error_chain(&trouble);
                if self.node_trouble.set(error.clone()) {
                    tracing::warn!(error, "the node's labels cannot be looked at; those that are known stay in force");
                }
                // A rejection does not go away by itself; what is for every node, or for this one by name, is to run all the same.
                let is_news = trouble.kind() == ClusterErrorKind::Refused && !self.knows_labels;
                self.knows_labels |= is_news;
                return is_news;
            }
        };
        self.node_trouble.clear();
        let Some(facts) = facts else {
            // No node of this cluster, or one that is being registered anew. The labels there were stay, since a model that
            // is unloaded by error costs more than one that stays too long.
            let is_news = !self.knows_labels;
            self.knows_labels = true;
            return is_news;
        };
        let uid = Some(facts.uid).filter(|uid| !uid.is_empty());
        let mut known = self.node_uid.lock();
        let is_news = self.labels != facts.labels || *known != uid || !self.knows_labels;
        self.knows_labels = true;
        *known = uid;
        self.labels = facts.labels;
        is_news
    }

    /// Says what is asked for, and writes it down, once all of it is known.
    fn speak(&mut self) {
        if self.heard_all.len() < 2 || !self.knows_labels {
            return;
        }
        self.say();
        let remembered = CachedState {
            labels: self.labels.clone(),
            node_uid: self.node_uid.lock().clone(),
            objects: self.asked.memory(&self.node()),
        };
        tokio::task::block_in_place(|| self.memory.keep(remembered));
    }

    fn say(&mut self) {
        let is_complete = self.heard_all.len() == 2;
        let desired_state = self.asked.desired_state(&self.node(), &self.labels, is_complete);
        let mut uids = BTreeMap::new();
        let names = desired_state.objects.iter().map(|wish| wish.object.key());
        let refused =
            desired_state.refused.iter().filter_map(|refused| Some((kind_of(&refused.kind)?, refused.name.as_str())));
        for (kind, name) in names.chain(refused) {
            if let Some(uid) = self.asked.uid(kind, name) {
                uids.insert((kind, name.to_owned()), uid.to_owned());
            }
        }
        *self.uids.lock() = uids;
        self.sync.desired_state.send_replace(Some(Arc::new(desired_state)));
    }

    /// This node with all its labels; those of the agent's own configuration count more.
    fn node(&self) -> Node {
        let mut labels = self.labels.clone();
        labels.extend(self.sync.node.labels.clone());
        Node { name: self.sync.node.name.clone(), labels }
    }

    fn measure(&self) {
        let silent = self.sync.cluster.time_since_response();
        let is_heard = self.heard_all.len() == 2 && silent <= SILENT_MAX;
        self.sync.metrics.cluster_connected.set(i64::from(is_heard));
        self.sync.metrics.cluster_response_age.set(i64::try_from(silent.as_secs()).unwrap_or(i64::MAX));
    }
}

type Facts = Result<Option<lineside_kube::NodeMetadata>, lineside_kube::ClusterError>;

async fn look_at_node(cluster: Arc<ClusterClient>, name: String, after: Duration) -> Facts {
    tokio::time::sleep(after).await;
    cluster.node_metadata(&name).await
}

fn given(kind: ResourceKind, item: Resource) -> ApiObject {
    ApiObject {
        kind: kind.name().to_owned(),
        name: item.name,
        uid: item.uid,
        generation: item.generation,
        document: item.document,
    }
}

fn kind_of(name: &str) -> Option<&'static str> {
    [ResourceKind::EdgeModel, ResourceKind::CameraStream].into_iter().map(ResourceKind::name).find(|kind| *kind == name)
}
