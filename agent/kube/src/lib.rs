//! A Kubernetes cluster, as the agent and the controller need it. This folder is the only place that names `kube`.
//!
//! Objects are read as they come and handed on as JSON, so that one that this version does not understand is one refused
//! object and not the end of a list. Every call has a deadline. Nothing here tries again: whoever calls decides when, and
//! may have the connection made anew first ([`ClusterClient::renew`]), since a connection through a network that was gone for a
//! while can stay silent for a long time after it is back.
//!
//! ClusterConfig is by the pod's own service account or by a kubeconfig. A kubeconfig may name several contexts, which are ways
//! to the same objects: they are tried in order, and the first is gone back to when it can be had again.

mod config;
mod connection;
mod crds;
mod error;
mod lease;
pub mod reflector;
pub mod status_events;
pub mod status_writer;

use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1::{Node, ObjectReference};
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, Preconditions, WatchEvent, WatchParams,
};
use kube::runtime::events::{Event, EventType, Reporter};
use kube::{Api, Client, ResourceExt as _};
use serde::Serialize;
use serde_json::{Value, json};

pub use config::ClusterConfig;
use connection::{Connection, configuration};
pub use crds::definitions;
pub use error::{ClusterError, ClusterErrorKind};
pub use lease::{Leadership, Lease};
use lineside_api::condition::Reason;
use lineside_api::kinds::document;
use lineside_api::status::NodeStatus;

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
pub enum ResourceKind {
    /// `EdgeModel`.
    EdgeModel,
    /// `CameraStream`.
    CameraStream,
    /// `EdgeNode`.
    EdgeNode,
}

impl ResourceKind {
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
            Self::EdgeModel => ApiResource::erase::<crds::EdgeModel>(&()),
            Self::CameraStream => ApiResource::erase::<crds::CameraStream>(&()),
            Self::EdgeNode => ApiResource::erase::<crds::EdgeNode>(&()),
        }
    }
}

/// An object as the cluster holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct Resource {
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

impl Resource {
    fn new(kind: ResourceKind, object: DynamicObject) -> Self {
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
pub enum WatchChange {
    /// An object is new or not as it was.
    Updated(Resource),
    /// An object is gone.
    Deleted(String),
    /// Bookmark, but time has gone on.
    Bookmark,
}

/// The changes of a kind, each with the version of the whole from which to go on after it.
pub type WatchChanges = Pin<Box<dyn Stream<Item = Result<(WatchChange, Option<String>), ClusterError>> + Send>>;

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
pub struct ClusterEvent {
    /// Whether somebody should look.
    pub is_warning: bool,
    /// The Event's reason.
    pub reason: Reason,
    /// For people.
    pub note: String,
    /// The kind of the object it is about.
    pub kind: ResourceKind,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: Option<String>,
}

/// A way into a cluster.
pub struct ClusterClient {
    namespace: String,
    /// Who speaks.
    field_manager: String,
    line: Connection,
    /// What was said last, by object and reason.
    notes: Mutex<HashMap<(ResourceKind, String, Reason), String>>,
}

impl ClusterClient {
    /// Prepares the way; nothing is sent yet. `speaker` is who speaks, such as `lineside-agent`; `instance` says which of
    /// them.
    ///
    /// # Errors
    /// When there is no service account, or the kubeconfig cannot be read or lacks one of the contexts.
    pub async fn new(access: ClusterConfig, speaker: &str, instance: &str) -> Result<Self, ClusterError> {
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
        let instance = front(instance, INSTANCE_BYTES_MAX).to_owned();
        let reporter = Reporter { controller: speaker.to_owned(), instance: Some(instance) };
        let field_manager = speaker.to_owned();
        Ok(Self { namespace, field_manager, line: Connection::new(access, reporter), notes: Mutex::default() })
    }

    /// The namespace of our objects.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Counts how often another context was taken. What was heard before is then void.
    pub fn era(&self) -> u64 {
        self.line.era()
    }

    /// How long ago the server answered last.
    pub fn time_since_response(&self) -> Duration {
        self.line.time_since_response()
    }

    /// Gives up the connections there are and makes new ones, with credentials read anew. Where the present context has
    /// failed for a while and there are others, the next one is taken that can be had.
    pub async fn renew(&self) {
        self.line.renew().await;
    }

    /// Goes back to the first context where that can be had again.
    pub async fn try_preferred_context(&self) {
        let answers = async |client: Client| {
            let api: Api<DynamicObject> =
                Api::namespaced_with(client, &self.namespace, &ResourceKind::EdgeModel.resource());
            let one = ListParams::default().limit(1);
            matches!(tokio::time::timeout(DEADLINE, api.list(&one)).await, Ok(Ok(_)))
        };
        self.line.try_preferred_context(answers).await;
    }

    async fn client(&self) -> Result<Client, ClusterError> {
        self.line.client().await
    }

    async fn api(&self, kind: ResourceKind) -> Result<Api<DynamicObject>, ClusterError> {
        Ok(Api::namespaced_with(self.client().await?, &self.namespace, &kind.resource()))
    }

    /// Waits for an answer, but not for ever.
    async fn ask<T>(&self, deadline: Duration, call: impl Future<Output = kube::Result<T>>) -> Result<T, ClusterError> {
        let outcome = match tokio::time::timeout(deadline, call).await {
            Ok(outcome) => outcome.map_err(ClusterError::new),
            Err(_) => Err(ClusterError::unreachable(format!(
                "the API server has not answered within {} s",
                deadline.as_secs()
            ))),
        };
        match &outcome {
            Err(trouble) if matches!(trouble.kind, ClusterErrorKind::Unreachable | ClusterErrorKind::Busy(_)) => {
                self.line.failed();
            }
            _ => self.line.answered(),
        }
        outcome
    }

    /// All objects of a kind, and the version of the whole.
    ///
    /// # Errors
    /// See [`ClusterErrorKind`].
    pub async fn list(&self, kind: ResourceKind) -> Result<(Vec<Resource>, String), ClusterError> {
        let api = self.api(kind).await?;
        let mut params = ListParams::default().limit(PAGE);
        let mut items = Vec::new();
        loop {
            let page = self.ask(LIST_DEADLINE, api.list(&params)).await?;
            items.extend(page.items.into_iter().map(|object| Resource::new(kind, object)));
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
    /// See [`ClusterErrorKind`].
    pub async fn watch(&self, kind: ResourceKind, version: &str) -> Result<WatchChanges, ClusterError> {
        let params = WatchParams::default().timeout(WATCH_SECONDS);
        let api = self.api(kind).await?;
        let events = self.ask(DEADLINE, api.watch(&params, version)).await?;
        let events = Box::pin(events);
        Ok(Box::pin(futures_util::stream::unfold(Some(events), move |events| async move {
            let mut events = events?;
            let next = match tokio::time::timeout(SILENCE_MAX, events.next()).await {
                Ok(next) => next?,
                Err(_) => return Some((Err(ClusterError::unreachable("the watch has fallen silent")), None)),
            };
            let said = next.map_err(ClusterError::new).and_then(|event| {
                let with_version = |object: &DynamicObject| object.resource_version();
                Ok(match event {
                    WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                        let version = with_version(&object);
                        (WatchChange::Updated(Resource::new(kind, object)), version)
                    }
                    WatchEvent::Deleted(object) => {
                        let version = with_version(&object);
                        (WatchChange::Deleted(object.metadata.name.unwrap_or_default()), version)
                    }
                    WatchEvent::Bookmark(bookmark) => (WatchChange::Bookmark, Some(bookmark.metadata.resource_version)),
                    WatchEvent::Error(status) => return Err(ClusterError::new(kube::Error::Api(status))),
                })
            });
            let rest = said.is_ok().then_some(events);
            Some((said, rest))
        })))
    }

    /// What the cluster knows of a node; `None` where it has none of that name.
    ///
    /// # Errors
    /// See [`ClusterErrorKind`].
    pub async fn node(&self, name: &str) -> Result<Option<NodeFacts>, ClusterError> {
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
    /// See [`ClusterErrorKind`].
    pub async fn report(&self, node: &str, status: &NodeStatus) -> Result<Option<String>, ClusterError> {
        match self.apply_status(ResourceKind::EdgeNode, node, status).await {
            Err(trouble) if trouble.kind == ClusterErrorKind::NotFound => {
                let api = self.api(ResourceKind::EdgeNode).await?;
                let bare = object(ResourceKind::EdgeNode, node);
                self.ask(DEADLINE, api.patch(node, &self.applying(), &Patch::Apply(&bare))).await?;
                self.apply_status(ResourceKind::EdgeNode, node, status).await
            }
            outcome => outcome,
        }
    }

    /// Writes an object's status by server-side apply, and returns the object's uid. What another speaker has written beside
    /// it stays.
    ///
    /// # Errors
    /// See [`ClusterErrorKind`].
    pub async fn apply_status(
        &self,
        kind: ResourceKind,
        name: &str,
        status: &impl Serialize,
    ) -> Result<Option<String>, ClusterError> {
        let mut patch = object(kind, name);
        patch["status"] = serde_json::to_value(status).unwrap_or_default();
        leave_out_empty(&mut patch["status"]);
        let api = self.api(kind).await?;
        let written = self.ask(DEADLINE, api.patch_status(name, &self.applying(), &Patch::Apply(&patch))).await?;
        Ok(written.metadata.uid)
    }

    fn applying(&self) -> PatchParams {
        PatchParams::apply(&self.field_manager).force()
    }

    /// Removes the very object that was looked at.
    ///
    /// # Errors
    /// See [`ClusterErrorKind`].
    pub async fn delete(&self, kind: ResourceKind, name: &str, uid: &str) -> Result<(), ClusterError> {
        let preconditions = Preconditions { uid: Some(uid.to_owned()), resource_version: None };
        let params = DeleteParams::default().preconditions(preconditions);
        let api = self.api(kind).await?;
        self.ask(DEADLINE, api.delete(name, &params)).await.map(drop)
    }

    /// Says something about an object. The same thing said again soon is counted in the Event there is.
    ///
    /// # Errors
    /// See [`ClusterErrorKind`].
    pub async fn say(&self, saying: &ClusterEvent) -> Result<(), ClusterError> {
        let event = Event {
            type_: if saying.is_warning { EventType::Warning } else { EventType::Normal },
            reason: saying.reason.to_string(),
            note: Some(front(&saying.note, NOTE_BYTES_MAX).to_owned()),
            action: "Observe".to_owned(),
            secondary: None,
        };
        let about = ObjectReference {
            api_version: Some(format!("{}/{}", crds::GROUP, crds::VERSION)),
            kind: Some(saying.kind.name().to_owned()),
            name: Some(saying.name.clone()),
            namespace: Some(self.namespace.clone()),
            uid: saying.uid.clone(),
            ..ObjectReference::default()
        };
        // The recorder counts what is said again by reason and object, whatever the words, and keeps the first words. Other
        // words are another Event, which a recorder makes that remembers nothing.
        let key = (saying.kind, saying.name.clone(), saying.reason.clone());
        let is_same = {
            let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
            if notes.len() > NOTES_MAX {
                notes.clear();
            }
            notes.insert(key, saying.note.clone()).is_none_or(|before| before == saying.note)
        };
        let recorder = self.line.recorder(!is_same).await?;
        self.ask(DEADLINE, recorder.publish(&event, &about)).await
    }
}

fn object(kind: ResourceKind, name: &str) -> Value {
    json!({
        "apiVersion": format!("{}/{}", crds::GROUP, crds::VERSION),
        "kind": kind.name(),
        "metadata": {"name": name},
    })
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
fn front(text: &str, bytes_max: usize) -> &str {
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
        assert_eq!((front("aé", 2), front("aé", 3), front("", 5)), ("a", "aé", ""));
    }
}
