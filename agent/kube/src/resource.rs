//! The objects that are read from the API server, and their kinds.

use std::collections::BTreeMap;
use std::pin::Pin;

use futures_util::Stream;
use kube::api::{ApiResource, DynamicObject};
use serde_json::Value;

use crate::crds;
use crate::error::ClusterError;
use lineside_api::kinds::document;

/// A kind of custom resource that can be listed and watched.
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
    /// The kind's name, as in a manifest.
    pub fn name(self) -> &'static str {
        match self {
            Self::EdgeModel => "EdgeModel",
            Self::CameraStream => "CameraStream",
            Self::EdgeNode => "EdgeNode",
        }
    }

    pub(crate) fn api_resource(self) -> ApiResource {
        match self {
            Self::EdgeModel => ApiResource::erase::<crds::EdgeModel>(&()),
            Self::CameraStream => ApiResource::erase::<crds::CameraStream>(&()),
            Self::EdgeNode => ApiResource::erase::<crds::EdgeNode>(&()),
        }
    }
}

/// An object as the API server returned it.
#[derive(Debug, Clone, PartialEq)]
pub struct Resource {
    /// The object's name.
    pub name: String,
    /// The object's uid. An object that is deleted and created again has another one.
    pub uid: String,
    /// The generation of the object's spec.
    pub generation: Option<i64>,
    /// `apiVersion`, `kind`, `metadata.name` and `spec`, in the form of a manifest file.
    pub document: Value,
    /// The object's status; null when it has none.
    pub status: Value,
}

impl Resource {
    pub(crate) fn new(kind: ResourceKind, object: DynamicObject) -> Self {
        let mut data = object.data;
        // Indexing would panic where the data is not an object.
        let mut take = |field: &str| data.get_mut(field).map(Value::take).unwrap_or_default();
        let (spec, status) = (take("spec"), take("status"));
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

/// A change that a watch delivers.
#[derive(Debug)]
pub enum WatchChange {
    /// The object was created or modified.
    Updated(Resource),
    /// The object of this name was deleted.
    Deleted(String),
    /// No object changed; the resource version advanced.
    Bookmark,
}

/// The changes of a kind. Each comes with the resource version from which a later watch continues after it.
pub type WatchChanges = Pin<Box<dyn Stream<Item = Result<(WatchChange, Option<String>), ClusterError>> + Send>>;

/// The metadata of a Kubernetes `Node`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NodeMetadata {
    /// The node's uid. A node that is deleted and registered again has another one.
    pub uid: String,
    /// The node's labels.
    pub labels: BTreeMap<String, String>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_object_without_fields_has_no_spec_and_no_status() {
        for data in [Value::Null, json!([1]), json!("text"), json!({}), json!({"spec": 7})] {
            let spec = data.get("spec").cloned().unwrap_or_default();
            let object = DynamicObject { data, ..serde_json::from_value(json!({"metadata": {}})).unwrap() };
            let resource = Resource::new(ResourceKind::CameraStream, object);
            assert_eq!((&resource.document["spec"], &resource.status), (&spec, &Value::Null));
        }
    }

    #[test]
    fn an_object_is_split_into_manifest_and_status() {
        let object: DynamicObject = serde_json::from_value(json!({
            "apiVersion": "lineside.dev/v1alpha1", "kind": "EdgeModel",
            "metadata": {"name": "m", "uid": "u", "generation": 3},
            "spec": {"version": 1}, "status": {"nodes": {}},
        }))
        .unwrap();
        let resource = Resource::new(ResourceKind::EdgeModel, object);
        assert_eq!((resource.name.as_str(), resource.uid.as_str(), resource.generation), ("m", "u", Some(3)));
        assert_eq!(resource.document["spec"], json!({"version": 1}));
        assert_eq!((&resource.document["status"], &resource.status), (&Value::Null, &json!({"nodes": {}})));
        assert_eq!(ResourceKind::CameraStream.api_resource().plural, "camerastreams");
    }
}
