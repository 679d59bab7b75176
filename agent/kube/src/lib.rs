//! A Kubernetes cluster, as the agent and the controller need it. This folder is the only place that names `kube`.
//!
//! Objects are read as they come and handed on as JSON, so that one that this version does not understand is one refused
//! object and not the end of a list. Every call has a deadline. Nothing here tries again: whoever calls decides when, and
//! may have the connection made anew first ([`Cluster::renew`]), since a connection through a network that was gone for a
//! while can stay silent for a long time after it is back.
//!
//! Access is by the pod's own service account or by a kubeconfig. A kubeconfig may name several contexts, which are ways
//! to the same objects: they are tried in order, and the first is gone back to when it can be had again.

mod access;
mod kinds;
mod lease;
mod line;
pub mod mirror;
pub mod notices;
pub mod tell;
mod trouble;

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

pub use access::Access;
pub use kinds::definitions;
pub use lease::{Lease, Term};
use line::{Line, configuration};
use lineside_api::kinds::document;
use lineside_api::status::NodeStatus;
pub use trouble::{Trouble, TroubleKind};

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
    namespace: String,
    /// Who speaks.
    field_manager: String,
    line: Line,
    /// What was said last, by object and reason.
    notes: Mutex<HashMap<(Kind, String, &'static str), String>>,
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
        let instance = front(instance, INSTANCE_BYTES_MAX).to_owned();
        let reporter = Reporter { controller: speaker.to_owned(), instance: Some(instance) };
        let field_manager = speaker.to_owned();
        Ok(Self { namespace, field_manager, line: Line::new(access, reporter), notes: Mutex::default() })
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
    pub fn silent_for(&self) -> Duration {
        self.line.silent_for()
    }

    /// Gives up the connections there are and makes new ones, with credentials read anew. Where the present context has
    /// failed for a while and there are others, the next one is taken that can be had.
    pub async fn renew(&self) {
        self.line.renew().await;
    }

    /// Goes back to the first context where that can be had again.
    pub async fn prefer_first(&self) {
        let answers = async |client: Client| {
            let api: Api<DynamicObject> = Api::namespaced_with(client, &self.namespace, &Kind::EdgeModel.resource());
            let one = ListParams::default().limit(1);
            matches!(tokio::time::timeout(DEADLINE, api.list(&one)).await, Ok(Ok(_)))
        };
        self.line.prefer_first(answers).await;
    }

    async fn client(&self) -> Result<Client, Trouble> {
        self.line.client().await
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
            Err(trouble) if matches!(trouble.kind, TroubleKind::Unreachable | TroubleKind::Busy(_)) => {
                self.line.failed();
            }
            _ => self.line.answered(),
        }
        outcome
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
        PatchParams::apply(&self.field_manager).force()
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
            note: Some(front(&saying.note, NOTE_BYTES_MAX).to_owned()),
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
        let recorder = self.line.recorder(!is_same).await?;
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
