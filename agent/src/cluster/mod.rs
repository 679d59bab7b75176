//! A Kubernetes cluster, as the agent and the controller need it. This folder is the only place that names `kube`.
//!
//! Objects are read as they come and handed on as JSON, so that one that this version does not understand is one refused
//! object and not the end of a list. Every call has a deadline. Nothing here tries again: whoever calls decides when, and
//! may have the connection made anew first ([`Cluster::renew`]), since a connection through a network that was gone for a
//! while can stay silent for a long time after it is back.
//!
//! Access is by the pod's own service account or by a kubeconfig. A kubeconfig may name several contexts, which are ways
//! to the same objects: they are tried in order, and the first is gone back to when it can be had again.

mod kinds;
mod lease;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1::{Node, ObjectReference};
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, Preconditions, WatchEvent, WatchParams,
};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Config, ResourceExt as _};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::config::cluster::Access;
use crate::plan::asked::document;
use crate::status::NodeStatus;
pub use kinds::definitions;
pub use lease::{Lease, Term};

/// Every call but a watch has to be answered within this.
const DEADLINE: Duration = Duration::from_secs(10);
/// A list may take longer.
const LIST_DEADLINE: Duration = Duration::from_secs(30);
/// Objects of one page of a list.
const PAGE: u32 = 500;
/// The server ends a watch after this, which is no trouble.
const WATCH_SECONDS: u32 = 60;
/// A watch that is silent for longer is broken: the server should have ended it.
const SILENCE_MAX: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 5);
/// Connections are made anew this far apart at least.
const RENEW_EVERY: Duration = Duration::from_secs(3);
/// A context that has failed for this long makes room for the next.
const CONTEXT_PATIENCE: Duration = Duration::from_secs(20);
/// A program for credentials that has not ended after this is started anew.
const HANGS_AFTER: Duration = Duration::from_secs(600);
/// Objects and reasons of which it is remembered what was said.
const NOTES_MAX: usize = 1024;
/// Bytes of an Event's note, and of the name of who says it, that the API server takes.
const NOTE_BYTES_MAX: usize = 1024;
const INSTANCE_BYTES_MAX: usize = 128;
/// The namespace where none is named.
const NAMESPACE: &str = "lineside";
/// Where a pod finds the namespace it is in.
const POD_NAMESPACE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";

/// A kind of object that is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `EdgeModel`.
    EdgeModel,
    /// `CameraStream`.
    CameraStream,
    /// `EdgeNode`.
    EdgeNode,
}

impl Kind {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::EdgeModel => "EdgeModel",
            Self::CameraStream => "CameraStream",
            Self::EdgeNode => "EdgeNode",
        }
    }

    fn resource(self) -> ApiResource {
        match self {
            Self::EdgeModel => ApiResource::erase::<kinds::EdgeModel>(&()),
            Self::CameraStream => ApiResource::erase::<kinds::CameraStream>(&()),
            Self::EdgeNode => ApiResource::erase::<kinds::EdgeNode>(&()),
        }
    }
}

/// An object as the cluster holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Its name.
    pub name: String,
    /// Which of all objects that ever bore its name it is.
    pub uid: String,
    /// How often its spec was changed.
    pub generation: Option<i64>,
    /// `apiVersion`, `kind`, `metadata.name` and `spec`, as a file of manifests has them.
    pub document: Value,
    /// Its status, as written by whoever writes it.
    pub status: Value,
}

impl Item {
    fn new(kind: Kind, object: DynamicObject) -> Self {
        let mut data = object.data;
        let (spec, status) = (data["spec"].take(), data["status"].take());
        let name = object.metadata.name.unwrap_or_default();
        Self {
            document: document(kind.name(), &name, &spec),
            uid: object.metadata.uid.unwrap_or_default(),
            generation: object.metadata.generation,
            name,
            status,
        }
    }
}

/// Something that a watch has to say.
#[derive(Debug)]
pub enum Change {
    /// An object is new or not as it was.
    Put(Item),
    /// An object is gone.
    Removed(String),
    /// Nothing, but time has gone on.
    Nothing,
}

/// The changes of a kind, each with the version of the whole from which to go on after it.
pub type Changes = Pin<Box<dyn Stream<Item = Result<(Change, Option<String>), Trouble>> + Send>>;

/// Why the cluster did not do what it was asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Trouble {
    /// What to do about it.
    pub kind: TroubleKind,
    /// For people.
    pub message: String,
}

/// What to do about a [`Trouble`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TroubleKind {
    /// The version to go on from is too old: list again.
    Expired,
    /// There is no such object, or no such kind.
    NotFound,
    /// Somebody else was faster.
    Conflict,
    /// It is not allowed, or not valid: somebody has to change something first.
    Refused,
    /// The server is there and has no time: try again, and not before this.
    Busy(Duration),
    /// There was no answer, or none that can be read, or the credentials are not good any more: try again with a new
    /// connection.
    Unreachable,
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl std::error::Error for Trouble {}

impl Trouble {
    fn unreachable(message: impl Into<String>) -> Self {
        Self { kind: TroubleKind::Unreachable, message: message.into() }
    }

    fn new(error: kube::Error) -> Self {
        let kube::Error::Api(status) = error else {
            // The causes say what happened: `ServiceError: client error (Connect)` alone says little.
            let mut message = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(inner) = cause {
                let text = inner.to_string();
                if !message.contains(&text) {
                    message = format!("{message}: {text}");
                }
                cause = inner.source();
            }
            return Self::unreachable(message);
        };
        let seconds = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
        let kind = match status.code {
            410 => TroubleKind::Expired,
            404 => TroubleKind::NotFound,
            409 => TroubleKind::Conflict,
            // The credentials may have been changed where they lie; a new connection reads them.
            401 => TroubleKind::Unreachable,
            429 | 500..=599 => TroubleKind::Busy(Duration::from_secs(u64::from(seconds))),
            _ => TroubleKind::Refused,
        };
        let message = match status.message.as_str() {
            "" => format!("the API server answers {} {}", status.code, status.reason),
            message => format!("{message} ({})", status.code),
        };
        Self { kind, message }
    }
}

/// What the cluster knows of a node.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NodeFacts {
    /// Which of all nodes that ever bore its name it is.
    pub uid: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// Something that is said about an object with a Kubernetes Event.
#[derive(Debug, Clone, PartialEq)]
pub struct Saying {
    /// Whether somebody should look.
    pub is_warning: bool,
    /// In one word.
    pub reason: &'static str,
    /// For people.
    pub note: String,
    /// The kind of the object it is about.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: Option<String>,
}

/// A way into a cluster.
pub struct Cluster {
    access: Access,
    namespace: String,
    /// Who speaks, for field managers and events.
    reporter: Reporter,
    line: tokio::sync::Mutex<Line>,
    /// What was said last, by object and reason.
    notes: Mutex<HashMap<(Kind, String, &'static str), String>>,
    context: AtomicUsize,
    era: AtomicU64,
    /// Milliseconds after `begun` at which the server answered last.
    answered: AtomicU64,
    /// Since when nothing but failures has come of the present context.
    failing_since: Mutex<Option<Instant>>,
    begun: Instant,
}

/// Connections by one context.
#[derive(Clone)]
struct Way {
    client: Client,
    recorder: Recorder,
}

/// The connections there are. They are made when they are first needed: a program that the kubeconfig names for credentials
/// may fail, or hang, while the network does, and an agent has to start all the same.
struct Line {
    way: Option<Way>,
    /// Connections that are still being made, by context, and since when.
    pending: HashMap<usize, (Instant, oneshot::Receiver<kube::Result<Client>>)>,
    renewed: Instant,
    /// What was said last about why there is no connection.
    trouble: Option<String>,
}

impl Cluster {
    /// Prepares the way; nothing is sent yet. `speaker` is who speaks, such as `lineside-agent`; `instance` says which of
    /// them.
    ///
    /// # Errors
    /// When there is no service account, or the kubeconfig cannot be read or lacks one of the contexts.
    pub async fn new(access: Access, speaker: &str, instance: &str) -> Result<Self, Trouble> {
        let config = configuration(&access, 0).await?;
        for context in 1..access.contexts.len() {
            configuration(&access, context).await?;
        }
        let namespace = match (&access.namespace, &access.kubeconfig) {
            (Some(namespace), _) => namespace.clone(),
            (None, Some(_)) if config.default_namespace != "default" => config.default_namespace.clone(),
            (None, Some(_)) => NAMESPACE.to_owned(),
            (None, None) => std::fs::read_to_string(POD_NAMESPACE)
                .map(|text| text.trim().to_owned())
                .unwrap_or_else(|_| NAMESPACE.to_owned()),
        };
        let instance = shortened(instance, INSTANCE_BYTES_MAX).to_owned();
        let reporter = Reporter { controller: speaker.to_owned(), instance: Some(instance) };
        let now = Instant::now();
        Ok(Self {
            access,
            namespace,
            reporter,
            notes: Mutex::default(),
            line: tokio::sync::Mutex::new(Line { way: None, pending: HashMap::new(), renewed: now, trouble: None }),
            context: AtomicUsize::new(0),
            era: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            failing_since: Mutex::default(),
            begun: now,
        })
    }

    /// The namespace of our objects.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Counts how often another context was taken. What was heard before is then void.
    pub fn era(&self) -> u64 {
        self.era.load(Ordering::Acquire)
    }

    /// How long ago the server answered last.
    pub fn silent_for(&self) -> Duration {
        self.begun.elapsed().saturating_sub(Duration::from_millis(self.answered.load(Ordering::Relaxed)))
    }

    /// Gives up the connections there are and makes new ones, with credentials read anew. Where the present context has
    /// failed for a while and there are others, the next one is taken that can be had.
    pub async fn renew(&self) {
        let mut line = self.line.lock().await;
        if line.renewed.elapsed() < RENEW_EVERY {
            return;
        }
        let contexts = self.access.contexts.len().max(1);
        let present = self.context.load(Ordering::Relaxed);
        let has_failed_long = self.failing_since().is_some_and(|since| since.elapsed() >= CONTEXT_PATIENCE);
        let candidates: Vec<usize> = match has_failed_long {
            true => (1..=contexts).map(|step| (present + step) % contexts).collect(),
            false => vec![present],
        };
        for context in candidates {
            match self.open(&mut line, context).await {
                Ok(way) => {
                    self.take(way, context, &mut line);
                    break;
                }
                Err(trouble) => {
                    let text = trouble.to_string();
                    if line.trouble.as_ref() != Some(&text) {
                        tracing::warn!(%trouble, "the way into the cluster cannot be made anew");
                        line.trouble = Some(text);
                    }
                }
            }
        }
        // Counted from now: who has waited for the line meanwhile wants nothing else.
        line.renewed = Instant::now();
    }

    /// Goes back to the first context where that can be had again.
    pub async fn prefer_first(&self) {
        if self.context.load(Ordering::Relaxed) == 0 {
            return;
        }
        let opened = {
            let mut line = self.line.lock().await;
            self.open(&mut line, 0).await
        };
        let Ok(way) = opened else { return };
        let api: Api<DynamicObject> =
            Api::namespaced_with(way.client.clone(), &self.namespace, &Kind::EdgeModel.resource());
        if matches!(tokio::time::timeout(DEADLINE, api.list(&ListParams::default().limit(1))).await, Ok(Ok(_))) {
            let mut line = self.line.lock().await;
            self.take(way, 0, &mut line);
        }
    }

    /// Makes connections by a context. The caller holds the line, so that this is done once at a time.
    ///
    /// A program that hangs has a thread to itself, none of those that load models, and is not started anew for a while.
    async fn open(&self, line: &mut Line, context: usize) -> Result<Way, Trouble> {
        if line.pending.get(&context).is_none_or(|(since, _)| since.elapsed() >= HANGS_AFTER) {
            let config = configuration(&self.access, context).await?;
            line.pending.insert(context, (Instant::now(), in_thread(config)?));
        }
        let Some((_, making)) = line.pending.get_mut(&context) else {
            return Err(Trouble::unreachable("there is no connection"));
        };
        let made = tokio::time::timeout(DEADLINE, making).await;
        if made.is_ok() {
            line.pending.remove(&context);
        }
        match made {
            Ok(Ok(Ok(client))) => Ok(Way { recorder: Recorder::new(client.clone(), self.reporter.clone()), client }),
            Ok(Ok(Err(error))) => Err(Trouble::new(error)),
            Ok(Err(_)) => Err(Trouble::unreachable("making the connection panicked")),
            Err(_) => {
                // The connections there are would start the program too, once their token has run out.
                if context == self.context.load(Ordering::Relaxed) {
                    line.way = None;
                }
                Err(Trouble::unreachable(format!("no credentials within {} s", DEADLINE.as_secs())))
            }
        }
    }

    fn take(&self, way: Way, context: usize, line: &mut Line) {
        if self.context.swap(context, Ordering::Relaxed) != context {
            tracing::warn!(context = self.access.contexts.get(context), "another context of the kubeconfig is taken");
            *self.failing_since.lock().unwrap_or_else(PoisonError::into_inner) = None;
            self.era.fetch_add(1, Ordering::Release);
        }
        line.trouble = None;
        line.way = Some(way);
    }

    /// The connections there are; where there are none yet, they are made.
    async fn way(&self) -> Result<Way, Trouble> {
        let mut line = self.line.lock().await;
        self.ready(&mut line).await.cloned()
    }

    async fn ready<'a>(&self, line: &'a mut Line) -> Result<&'a Way, Trouble> {
        if line.way.is_none() {
            let context = self.context.load(Ordering::Relaxed);
            match self.open(line, context).await {
                Ok(way) => self.take(way, context, line),
                Err(trouble) => {
                    self.failed();
                    return Err(trouble);
                }
            }
        }
        line.way.as_ref().ok_or_else(|| Trouble::unreachable("there is no connection"))
    }

    async fn client(&self) -> Result<Client, Trouble> {
        Ok(self.way().await?.client)
    }

    async fn api(&self, kind: Kind) -> Result<Api<DynamicObject>, Trouble> {
        Ok(Api::namespaced_with(self.client().await?, &self.namespace, &kind.resource()))
    }

    /// Waits for an answer, but not for ever.
    async fn ask<T>(&self, deadline: Duration, call: impl Future<Output = kube::Result<T>>) -> Result<T, Trouble> {
        let outcome = match tokio::time::timeout(deadline, call).await {
            Ok(outcome) => outcome.map_err(Trouble::new),
            Err(_) => {
                Err(Trouble::unreachable(format!("the API server has not answered within {} s", deadline.as_secs())))
            }
        };
        match &outcome {
            Err(trouble) if matches!(trouble.kind, TroubleKind::Unreachable | TroubleKind::Busy(_)) => self.failed(),
            _ => self.heard(),
        }
        outcome
    }

    fn heard(&self) {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.answered.store(now, Ordering::Relaxed);
        *self.failing_since.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn failed(&self) {
        self.failing_since.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(Instant::now);
    }

    fn failing_since(&self) -> Option<Instant> {
        *self.failing_since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All objects of a kind, and the version of the whole.
    ///
    /// # Errors
    /// See [`TroubleKind`].
    pub async fn list(&self, kind: Kind) -> Result<(Vec<Item>, String), Trouble> {
        let api = self.api(kind).await?;
        let mut params = ListParams::default().limit(PAGE);
        let mut items = Vec::new();
        loop {
            let page = self.ask(LIST_DEADLINE, api.list(&params)).await?;
            items.extend(page.items.into_iter().map(|object| Item::new(kind, object)));
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok((items, page.metadata.resource_version.unwrap_or_default())),
            }
        }
    }

    /// The changes of a kind since a version. The server ends the stream after a while, which is no trouble; the stream
    /// ends itself with a trouble when it is silent for too long.
    ///
    /// # Errors
    /// See [`TroubleKind`].
    pub async fn watch(&self, kind: Kind, version: &str) -> Result<Changes, Trouble> {
        let params = WatchParams::default().timeout(WATCH_SECONDS);
        let api = self.api(kind).await?;
        let events = self.ask(DEADLINE, api.watch(&params, version)).await?;
        let events = Box::pin(events);
        Ok(Box::pin(futures_util::stream::unfold(Some(events), move |events| async move {
            let mut events = events?;
            let next = match tokio::time::timeout(SILENCE_MAX, events.next()).await {
                Ok(next) => next?,
                Err(_) => return Some((Err(Trouble::unreachable("the watch has fallen silent")), None)),
            };
            let said = next.map_err(Trouble::new).and_then(|event| {
                let with_version = |object: &DynamicObject| object.resource_version();
                Ok(match event {
                    WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                        let version = with_version(&object);
                        (Change::Put(Item::new(kind, object)), version)
                    }
                    WatchEvent::Deleted(object) => {
                        let version = with_version(&object);
                        (Change::Removed(object.metadata.name.unwrap_or_default()), version)
                    }
                    WatchEvent::Bookmark(bookmark) => (Change::Nothing, Some(bookmark.metadata.resource_version)),
                    WatchEvent::Error(status) => return Err(Trouble::new(kube::Error::Api(status))),
                })
            });
            let rest = said.is_ok().then_some(events);
            Some((said, rest))
        })))
    }

    /// What the cluster knows of a node; `None` where it has none of that name.
    ///
    /// # Errors
    /// See [`TroubleKind`].
    pub async fn node(&self, name: &str) -> Result<Option<NodeFacts>, Trouble> {
        let api: Api<Node> = Api::all(self.client().await?);
        let found = self.ask(DEADLINE, api.get_metadata_opt(name)).await?;
        Ok(found.map(|node| NodeFacts {
            uid: node.metadata.uid.unwrap_or_default(),
            labels: node.metadata.labels.unwrap_or_default(),
        }))
    }

    /// Says how a node stands, in the `EdgeNode` of its name, which is made where it is missing. Its uid is returned.
    ///
    /// # Errors
    /// See [`TroubleKind`].
    pub async fn report(&self, node: &str, status: &NodeStatus) -> Result<Option<String>, Trouble> {
        match self.apply_status(Kind::EdgeNode, node, status).await {
            Err(trouble) if trouble.kind == TroubleKind::NotFound => {
                let api = self.api(Kind::EdgeNode).await?;
                let bare = object(Kind::EdgeNode, node);
                self.ask(DEADLINE, api.patch(node, &self.applying(), &Patch::Apply(&bare))).await?;
                self.apply_status(Kind::EdgeNode, node, status).await
            }
            outcome => outcome,
        }
    }

    /// Writes an object's status by server-side apply, and returns the object's uid. What another speaker has written beside
    /// it stays.
    ///
    /// # Errors
    /// See [`TroubleKind`].
    pub async fn apply_status(
        &self,
        kind: Kind,
        name: &str,
        status: &impl Serialize,
    ) -> Result<Option<String>, Trouble> {
        let mut patch = object(kind, name);
        patch["status"] = serde_json::to_value(status).unwrap_or_default();
        leave_out_empty(&mut patch["status"]);
        let api = self.api(kind).await?;
        let written = self.ask(DEADLINE, api.patch_status(name, &self.applying(), &Patch::Apply(&patch))).await?;
        Ok(written.metadata.uid)
    }

    fn applying(&self) -> PatchParams {
        PatchParams::apply(&self.reporter.controller).force()
    }

    /// Removes the very object that was looked at.
    ///
    /// # Errors
    /// See [`TroubleKind`].
    pub async fn delete(&self, kind: Kind, name: &str, uid: &str) -> Result<(), Trouble> {
        let preconditions = Preconditions { uid: Some(uid.to_owned()), resource_version: None };
        let params = DeleteParams::default().preconditions(preconditions);
        let api = self.api(kind).await?;
        self.ask(DEADLINE, api.delete(name, &params)).await.map(drop)
    }

    /// Says something about an object. The same thing said again soon is counted in the Event there is.
    ///
    /// # Errors
    /// See [`TroubleKind`].
    pub async fn say(&self, saying: &Saying) -> Result<(), Trouble> {
        let event = Event {
            type_: if saying.is_warning { EventType::Warning } else { EventType::Normal },
            reason: saying.reason.to_owned(),
            note: Some(shortened(&saying.note, NOTE_BYTES_MAX).to_owned()),
            action: "Observe".to_owned(),
            secondary: None,
        };
        let about = ObjectReference {
            api_version: Some(format!("{}/{}", kinds::GROUP, kinds::VERSION)),
            kind: Some(saying.kind.name().to_owned()),
            name: Some(saying.name.clone()),
            namespace: Some(self.namespace.clone()),
            uid: saying.uid.clone(),
            ..ObjectReference::default()
        };
        // The recorder counts what is said again by reason and object, whatever the words, and keeps the first words. Other
        // words are another Event, which a recorder makes that remembers nothing.
        let key = (saying.kind, saying.name.clone(), saying.reason);
        let is_same = {
            let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
            if notes.len() > NOTES_MAX {
                notes.clear();
            }
            notes.insert(key, saying.note.clone()).is_none_or(|before| before == saying.note)
        };
        let recorder = {
            let mut line = self.line.lock().await;
            let way = self.ready(&mut line).await?;
            let recorder = match is_same {
                true => way.recorder.clone(),
                false => Recorder::new(way.client.clone(), self.reporter.clone()),
            };
            if let Some(way) = &mut line.way {
                way.recorder = recorder.clone();
            }
            recorder
        };
        self.ask(DEADLINE, recorder.publish(&event, &about)).await
    }
}

fn object(kind: Kind, name: &str) -> Value {
    json!({
        "apiVersion": format!("{}/{}", kinds::GROUP, kinds::VERSION),
        "kind": kind.name(),
        "metadata": {"name": name},
    })
}

/// How to reach the cluster by one of its contexts.
async fn configuration(access: &Access, context: usize) -> Result<Config, Trouble> {
    let refused = |message: String| Trouble { kind: TroubleKind::Refused, message };
    let mut config = match &access.kubeconfig {
        None => {
            Config::incluster().map_err(|error| refused(format!("this is no pod with a service account: {error}")))?
        }
        Some(path) => {
            let named = |error: String| refused(format!("--kubeconfig {}: {error}", Path::new(path).display()));
            let kubeconfig = Kubeconfig::read_from(path).map_err(|error| named(error.to_string()))?;
            let options = KubeConfigOptions { context: access.contexts.get(context).cloned(), ..Default::default() };
            Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(|error| named(error.to_string()))?
        }
    };
    config.connect_timeout = Some(Duration::from_secs(5));
    config.write_timeout = Some(DEADLINE);
    // When to try again is decided by whoever asks.
    config.default_retry = false;
    Ok(config)
}

/// Makes connections in a thread of their own.
fn in_thread(config: Config) -> Result<oneshot::Receiver<kube::Result<Client>>, Trouble> {
    let (done, making) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    std::thread::Builder::new()
        .name("credentials".to_owned())
        .spawn(move || {
            let _inside = runtime.enter();
            // Nobody may wait for it any more.
            drop(done.send(Client::try_from(config)));
        })
        .map_err(|error| Trouble::unreachable(format!("no thread can be had: {error}")))?;
    Ok(making)
}

/// A list or map that server-side apply empties becomes null, which the schema may refuse. What is empty is not said.
fn leave_out_empty(value: &mut Value) {
    let is_empty = |value: &Value| {
        value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(serde_json::Map::is_empty)
    };
    if let Some(fields) = value.as_object_mut() {
        fields.values_mut().for_each(leave_out_empty);
        fields.retain(|_, value| !is_empty(value));
    }
}

/// The front of a text that has so many bytes at most.
fn shortened(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_lists_and_maps_are_not_said_and_texts_end_at_a_character() {
        let mut value = json!({"a": [], "b": {"c": {}, "d": 1}, "e": [{"f": []}], "g": ""});
        leave_out_empty(&mut value);
        assert_eq!(value, json!({"b": {"d": 1}, "e": [{"f": []}], "g": ""}));
        assert_eq!((shortened("aé", 2), shortened("aé", 3), shortened("", 5)), ("a", "aé", ""));
    }
}
