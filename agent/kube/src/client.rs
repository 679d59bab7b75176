//! The client of the API server: lists, watches, status writes and Events, each with a time limit.
//!
//! Unit tests cover the pure functions; the calls are tested against a scripted API server in `tests/suite/cluster`.

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Node;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, Preconditions, WatchEvent, WatchParams};
use kube::runtime::events::Reporter;
use kube::{Api, Client, ResourceExt as _};
use serde::Serialize;
use serde_json::{Value, json};

use crate::config::ClusterConfig;
use crate::connection::{CALL_TIMEOUT, Connection, client_config};
use crate::crds;
use crate::error::{ClusterError, ClusterErrorKind};
use crate::event::{ClusterEvent, LastNotes, truncated_to_bytes};
use crate::resource::{NodeMetadata, Resource, ResourceKind, WatchChange, WatchChanges};
use lineside_api::status::NodeStatus;

/// The time limit of one page of a list.
const LIST_TIMEOUT: Duration = Duration::from_secs(30);
/// The number of objects in one page of a list.
const PAGE: u32 = 500;
/// The server ends a watch after this time.
const WATCH_SECONDS: u32 = 60;
/// A watch without a message for this long is broken: the server should have ended it.
const WATCH_SILENCE_MAX: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 5);
/// The longest reporting instance of an Event that the API server accepts, in bytes.
const INSTANCE_BYTES_MAX: usize = 128;
/// The namespace of the objects where the configuration names none.
const DEFAULT_NAMESPACE: &str = "lineside";
/// The file with the namespace of the pod.
const POD_NAMESPACE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";

/// A client of one cluster.
pub struct ClusterClient {
    namespace: String,
    field_manager: String,
    connection: Connection,
    last_notes: LastNotes,
}

impl ClusterClient {
    /// Checks the configuration and creates a client. Nothing is sent yet. `component` is the field manager of
    /// server-side apply and the source of Events, such as `lineside-agent`; `instance` distinguishes several processes
    /// of it.
    ///
    /// # Errors
    /// When there is no service account, or the kubeconfig cannot be read or lacks one of the contexts.
    pub async fn new(config: ClusterConfig, component: &str, instance: &str) -> Result<Self, ClusterError> {
        let first = client_config(&config, 0).await?;
        for context in 1..config.contexts.len() {
            client_config(&config, context).await?;
        }
        let namespace = match (&config.namespace, &config.kubeconfig) {
            (Some(namespace), _) => namespace.clone(),
            (None, Some(_)) if first.default_namespace != "default" => first.default_namespace,
            (None, Some(_)) => DEFAULT_NAMESPACE.to_owned(),
            (None, None) => std::fs::read_to_string(POD_NAMESPACE)
                .map_or_else(|_| DEFAULT_NAMESPACE.to_owned(), |text| text.trim().to_owned()),
        };
        let instance = truncated_to_bytes(instance, INSTANCE_BYTES_MAX).to_owned();
        let reporter = Reporter { controller: component.to_owned(), instance: Some(instance) };
        Ok(Self {
            namespace,
            field_manager: component.to_owned(),
            connection: Connection::new(config, reporter),
            last_notes: LastNotes::default(),
        })
    }

    /// The namespace of the objects.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The number of context switches so far. A switch invalidates resource versions and cached objects: the other
    /// context may lead to another API server.
    pub fn context_generation(&self) -> u64 {
        self.connection.context_generation()
    }

    /// When the API server answered last; before the first answer, when the client was created.
    pub fn last_response(&self) -> Instant {
        self.connection.last_response()
    }

    /// The time since [`last_response`](Self::last_response).
    pub fn time_since_response(&self) -> Duration {
        self.last_response().elapsed()
    }

    /// Replaces the connection, with credentials read again from disk. If the context in use has only failed for a
    /// while, the next context that can be opened is used. Calls in quick succession have no effect.
    pub async fn reconnect(&self) {
        self.connection.reconnect().await;
    }

    /// Switches back to the first context if another one is in use and the first one answers.
    pub async fn try_preferred_context(&self) {
        let is_answering = async |client: Client| {
            let api: Api<DynamicObject> =
                Api::namespaced_with(client, &self.namespace, &ResourceKind::EdgeModel.api_resource());
            let one = ListParams::default().limit(1);
            matches!(tokio::time::timeout(CALL_TIMEOUT, api.list(&one)).await, Ok(Ok(_)))
        };
        self.connection.try_preferred_context(is_answering).await;
    }

    pub(crate) async fn client(&self) -> Result<Client, ClusterError> {
        self.connection.client().await
    }

    async fn api(&self, kind: ResourceKind) -> Result<Api<DynamicObject>, ClusterError> {
        Ok(Api::namespaced_with(self.client().await?, &self.namespace, &kind.api_resource()))
    }

    /// Awaits a call for at most `timeout`, and records whether the API server answered.
    pub(crate) async fn call<T>(
        &self,
        timeout: Duration,
        call: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, ClusterError> {
        let outcome = match tokio::time::timeout(timeout, call).await {
            Ok(outcome) => outcome.map_err(ClusterError::from),
            Err(_) => {
                let seconds = timeout.as_secs();
                Err(ClusterError::unreachable(format!("the API server has not answered within {seconds} s")))
            }
        };
        match outcome.as_ref().map_err(ClusterError::kind) {
            Err(ClusterErrorKind::Unreachable | ClusterErrorKind::Busy(_)) => self.connection.record_failure(),
            _ => self.connection.record_response(),
        }
        outcome
    }

    /// Lists all objects of a kind, page by page, and returns them with the resource version of the list.
    ///
    /// # Errors
    /// See [`ClusterErrorKind`].
    pub async fn list(&self, kind: ResourceKind) -> Result<(Vec<Resource>, String), ClusterError> {
        let api = self.api(kind).await?;
        let mut params = ListParams::default().limit(PAGE);
        let mut items = Vec::new();
        loop {
            let page = self.call(LIST_TIMEOUT, api.list(&params)).await?;
            items.extend(page.items.into_iter().map(|object| Resource::new(kind, object)));
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok((items, page.metadata.resource_version.unwrap_or_default())),
            }
        }
    }

    /// Watches the objects of a kind from a resource version on. The server ends the watch after a minute, which ends
    /// the stream without an error; a watch that is silent for longer ends with an error.
    ///
    /// # Errors
    /// See [`ClusterErrorKind`].
    pub async fn watch(&self, kind: ResourceKind, resource_version: &str) -> Result<WatchChanges, ClusterError> {
        let params = WatchParams::default().timeout(WATCH_SECONDS);
        let api = self.api(kind).await?;
        let events = Box::pin(self.call(CALL_TIMEOUT, api.watch(&params, resource_version)).await?);
        Ok(Box::pin(futures_util::stream::unfold(Some(events), move |events| async move {
            let mut events = events?;
            let change = match tokio::time::timeout(WATCH_SILENCE_MAX, events.next()).await {
                Ok(next) => next?.map_err(ClusterError::from).and_then(|event| change(kind, event)),
                Err(_) => Err(ClusterError::unreachable("the watch has delivered nothing for too long")),
            };
            let rest = change.is_ok().then_some(events);
            Some((change, rest))
        })))
    }

    /// The metadata of the Kubernetes `Node` of this name; `None` when the cluster has no such node.
    ///
    /// # Errors
    /// See [`ClusterErrorKind`].
    pub async fn node_metadata(&self, name: &str) -> Result<Option<NodeMetadata>, ClusterError> {
        let api: Api<Node> = Api::all(self.client().await?);
        let node = self.call(CALL_TIMEOUT, api.get_metadata_opt(name)).await?;
        Ok(node.map(|node| NodeMetadata {
            uid: node.metadata.uid.unwrap_or_default(),
            labels: node.metadata.labels.unwrap_or_default(),
        }))
    }

    /// Writes a node's status to the `EdgeNode` of its name, which is created if it does not exist. Returns the
    /// object's uid.
    ///
    /// # Errors
    /// See [`ClusterErrorKind`].
    pub async fn apply_node_status(&self, node: &str, status: &NodeStatus) -> Result<Option<String>, ClusterError> {
        match self.apply_status(ResourceKind::EdgeNode, node, status).await {
            Err(error) if error.kind() == ClusterErrorKind::NotFound => {
                let api = self.api(ResourceKind::EdgeNode).await?;
                let bare = manifest(ResourceKind::EdgeNode, node);
                self.call(CALL_TIMEOUT, api.patch(node, &self.apply_params(), &Patch::Apply(&bare))).await?;
                self.apply_status(ResourceKind::EdgeNode, node, status).await
            }
            outcome => outcome,
        }
    }

    /// Writes an object's status by server-side apply, and returns the object's uid. Fields that other field managers
    /// own stay as they are.
    ///
    /// # Errors
    /// See [`ClusterErrorKind`].
    pub async fn apply_status(
        &self,
        kind: ResourceKind,
        name: &str,
        status: &impl Serialize,
    ) -> Result<Option<String>, ClusterError> {
        let mut patch = manifest(kind, name);
        patch["status"] = serde_json::to_value(status).unwrap_or_default();
        remove_empty(&mut patch["status"]);
        let api = self.api(kind).await?;
        let patched =
            self.call(CALL_TIMEOUT, api.patch_status(name, &self.apply_params(), &Patch::Apply(&patch))).await?;
        Ok(patched.metadata.uid)
    }

    fn apply_params(&self) -> PatchParams {
        PatchParams::apply(&self.field_manager).force()
    }

    /// Deletes the object if it still has this uid.
    ///
    /// # Errors
    /// See [`ClusterErrorKind`]; [`ClusterErrorKind::Conflict`] when the object has another uid.
    pub async fn delete(&self, kind: ResourceKind, name: &str, uid: &str) -> Result<(), ClusterError> {
        let preconditions = Preconditions { uid: Some(uid.to_owned()), resource_version: None };
        let params = DeleteParams::default().preconditions(preconditions);
        let api = self.api(kind).await?;
        self.call(CALL_TIMEOUT, api.delete(name, &params)).await.map(drop)
    }

    /// Publishes an Event. An Event that is repeated soon with the same note increments the count of the existing one.
    ///
    /// # Errors
    /// See [`ClusterErrorKind`].
    pub async fn publish_event(&self, event: &ClusterEvent) -> Result<(), ClusterError> {
        let recorder = self.connection.recorder(self.last_notes.is_changed(event)).await?;
        let (event, object) = (event.event(), event.object_reference(&self.namespace));
        self.call(CALL_TIMEOUT, recorder.publish(&event, &object)).await
    }
}

/// Parses a message of a watch as the API server sends it, one JSON object: the change, and the resource version after it.
///
/// # Errors
/// [`ClusterErrorKind::Unreachable`] for bytes that are not such a message; the kind of the status in an error message.
pub fn parse_watch_message(kind: ResourceKind, message: &[u8]) -> Result<(WatchChange, Option<String>), ClusterError> {
    let event = serde_json::from_slice(message).map_err(kube::Error::SerdeError)?;
    change(kind, event)
}

/// The change in a message of a watch, and the resource version after it.
fn change(kind: ResourceKind, event: WatchEvent<DynamicObject>) -> Result<(WatchChange, Option<String>), ClusterError> {
    match event {
        WatchEvent::Added(object) | WatchEvent::Modified(object) => {
            let version = object.resource_version();
            Ok((WatchChange::Updated(Resource::new(kind, object)), version))
        }
        WatchEvent::Deleted(object) => {
            let version = object.resource_version();
            Ok((WatchChange::Deleted(object.metadata.name.unwrap_or_default()), version))
        }
        WatchEvent::Bookmark(bookmark) => Ok((WatchChange::Bookmark, Some(bookmark.metadata.resource_version))),
        WatchEvent::Error(status) => Err(kube::Error::Api(status).into()),
    }
}

/// An object without a spec or status.
fn manifest(kind: ResourceKind, name: &str) -> Value {
    json!({"apiVersion": crds::api_version(), "kind": kind.name(), "metadata": {"name": name}})
}

/// Removes empty lists and maps. A list or map that server-side apply empties becomes null, which the schema may
/// reject.
fn remove_empty(value: &mut Value) {
    let is_empty = |value: &Value| {
        value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(serde_json::Map::is_empty)
    };
    if let Some(fields) = value.as_object_mut() {
        fields.values_mut().for_each(remove_empty);
        fields.retain(|_, value| !is_empty(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_lists_and_maps_are_not_written() {
        let mut value = json!({"a": [], "b": {"c": {}, "d": 1}, "e": [{"f": []}], "g": ""});
        remove_empty(&mut value);
        assert_eq!(value, json!({"b": {"d": 1}, "e": [{"f": []}], "g": ""}));
    }

    #[test]
    fn messages_of_a_watch_carry_the_resource_version() {
        let read = |message: Value| parse_watch_message(ResourceKind::EdgeModel, message.to_string().as_bytes());
        let object = json!({"apiVersion": "lineside.dev/v1alpha1", "kind": "EdgeModel",
            "metadata": {"name": "m", "resourceVersion": "7"}});
        let (added, version) = read(json!({"type": "ADDED", "object": object})).unwrap();
        assert!(matches!(added, WatchChange::Updated(resource) if resource.name == "m"));
        assert_eq!(version.as_deref(), Some("7"));
        let (deleted, _) = read(json!({"type": "DELETED", "object": object})).unwrap();
        assert!(matches!(deleted, WatchChange::Deleted(name) if name == "m"));
        let expired =
            json!({"kind": "Status", "code": 410, "status": "Failure", "message": "too old", "reason": "Expired"});
        let error = read(json!({"type": "ERROR", "object": expired})).unwrap_err();
        assert_eq!(error.kind(), ClusterErrorKind::Expired);
        assert_eq!(read(json!([])).unwrap_err().kind(), ClusterErrorKind::Unreachable);
    }
}
