//! The custom resources `EdgeModel`, `CameraStream` and `EdgeNode`, and their definitions, which `lineside crd` prints.
//!
//! The specs and statuses are the types of `lineside-api`; this file adds what only Kubernetes needs: names, printer
//! columns and validation rules. The types serve the schemas alone: objects are read as dynamic objects and parsed like
//! manifest files, so that an agent works with a cluster whose definitions are older or newer.

use kube::{CustomResource, CustomResourceExt as _};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use lineside_api::kinds::manifest::{RawModelSpec, RawStreamSpec};
use lineside_api::status::{CameraStreamStatus, EdgeModelStatus, NodeStatus};

/// The API group of the custom resources.
const GROUP: &str = "lineside.dev";
/// The served version of the API group.
const VERSION: &str = "v1alpha1";

/// The `apiVersion` of the custom resources.
pub(crate) fn api_version() -> String {
    format!("{GROUP}/{VERSION}")
}

/// The spec of an `EdgeModel`.
#[derive(CustomResource, Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "lineside.dev",
    version = "v1alpha1",
    kind = "EdgeModel",
    doc = "A model that nodes serve: the source of its file, the meaning of its output, and the nodes that it is for.",
    namespaced,
    status = "EdgeModelStatus",
    shortname = "em",
    category = "lineside",
    validation = Rule::new("self.metadata.name.matches('^[a-z0-9]([a-z0-9-]{0,62})$')")
        .message("a name consists of at most 63 of a-z, 0-9 and -, and starts with a letter or digit"),
    printcolumn = r#"{"name":"Version","type":"integer","jsonPath":".spec.version","description":"The desired version."}"#,
    printcolumn = r#"{"name":"Ready","type":"integer","jsonPath":".status.nodes.ready","description":"Nodes where the desired version is ready."}"#,
    printcolumn = r#"{"name":"Nodes","type":"integer","jsonPath":".status.nodes.desired","description":"Nodes that the selector matches."}"#,
    printcolumn = r#"{"name":"Candidate","type":"integer","jsonPath":".status.nodes.candidate","description":"Nodes that run the desired version as a candidate beside the previous one."}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].reason","description":"The reason of the condition Ready."}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(transparent)]
pub(crate) struct EdgeModelSpec(pub RawModelSpec);

/// The spec of a `CameraStream`.
#[derive(CustomResource, Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "lineside.dev",
    version = "v1alpha1",
    kind = "CameraStream",
    doc = "A camera, the model that processes its frames, and the rule that computes verdicts.",
    namespaced,
    status = "CameraStreamStatus",
    shortname = "cam",
    category = "lineside",
    validation = Rule::new("self.metadata.name.matches('^[a-z0-9]([a-z0-9-]{0,62})$')")
        .message("a name consists of at most 63 of a-z, 0-9 and -, and starts with a letter or digit"),
    printcolumn = r#"{"name":"Model","type":"string","jsonPath":".spec.model","description":"The model that processes the frames."}"#,
    printcolumn = r#"{"name":"Ready","type":"integer","jsonPath":".status.nodes.ready","description":"Nodes where the camera delivers frames."}"#,
    printcolumn = r#"{"name":"Nodes","type":"integer","jsonPath":".status.nodes.desired","description":"Nodes that run the stream."}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].reason","description":"The reason of the condition Ready."}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(transparent)]
pub(crate) struct CameraStreamSpec(pub RawStreamSpec);

/// An `EdgeNode` has no spec; it carries the status of its node.
#[derive(CustomResource, Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "lineside.dev",
    version = "v1alpha1",
    kind = "EdgeNode",
    doc = "The status of a node. It has the name of the node; only the node's agent writes it, except that the controller marks a node whose agent does not report.",
    namespaced,
    no_spec,
    status = "NodeStatus",
    shortname = "en",
    category = "lineside",
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status","description":"Whether every desired model has a version that serves; Unknown when the agent does not report."}"#,
    printcolumn = r#"{"name":"Broker","type":"string","jsonPath":".status.conditions[?(@.type==\"BrokerConnected\")].status","description":"Whether the agent is connected to an MQTT broker."}"#,
    printcolumn = r#"{"name":"Spooled","type":"integer","jsonPath":".status.spool.records","description":"Messages in the spool."}"#,
    printcolumn = r#"{"name":"Degraded","type":"string","jsonPath":".status.conditions[?(@.type==\"Degraded\")].reason","description":"The reason of the condition Degraded."}"#,
    printcolumn = r#"{"name":"Agent","type":"string","jsonPath":".status.agent.version","description":"The agent's version."}"#,
    printcolumn = r#"{"name":"Heartbeat","type":"string","jsonPath":".status.agent.lastHeartbeatTime","description":"When the agent last wrote its status, by the node's clock."}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
pub(crate) struct EdgeNodeSpec {}

/// The custom resource definitions of all kinds.
///
/// # Errors
/// When a definition cannot be serialised, which is an error in this file.
pub fn definitions() -> Result<Vec<Value>, serde_json::Error> {
    [EdgeModel::crd(), CameraStream::crd(), EdgeNode::crd()]
        .into_iter()
        .map(|crd| {
            let mut definition = serde_json::to_value(crd)?;
            if let Some(schema) = definition.pointer_mut("/spec/versions/0/schema/openAPIV3Schema") {
                normalize(schema);
                if let Some(status) = schema.pointer_mut("/properties/status") {
                    remove_defaults(status);
                    // Tools that read kstatus take an object without a status for one that is as desired. This default says that no
                    // generation has been observed yet.
                    if status.pointer("/properties/observedGeneration").is_some() {
                        status["default"] = serde_json::json!({"observedGeneration": -1});
                    }
                }
            }
            Ok(definition)
        })
        .collect()
}

/// Makes a schema one that Kubernetes accepts without warnings. Formats that OpenAPI does not define are removed, and
/// so are the defaults that come from Rust types: null, empty lists and empty objects. Only a plain value that a spec
/// names is a default of the kind. A status has no defaults at all (see [`remove_defaults`]): a field that no writer
/// set stays absent.
fn normalize(schema: &mut Value) {
    let Value::Object(entries) = schema else {
        if let Value::Array(items) = schema {
            items.iter_mut().for_each(normalize);
        }
        return;
    };
    let formats = ["int32", "int64", "float", "double"];
    if entries.get("type").is_some_and(Value::is_string)
        && entries.get("format").and_then(Value::as_str).is_some_and(|format| !formats.contains(&format))
    {
        entries.remove("format");
    }
    // A null means the same as an absent field, and the API server removes it where it is not expressly allowed.
    entries.remove("nullable");
    if entries.get("default").is_some_and(|value| value.is_null() || value.is_object() || value.is_array()) {
        entries.remove("default");
    }
    for (key, value) in Map::iter_mut(entries) {
        // Validation rules are not schemas.
        if key != "x-kubernetes-validations" {
            normalize(value);
        }
    }
}

fn remove_defaults(schema: &mut Value) {
    if let Value::Object(entries) = schema {
        entries.remove("default");
        entries.iter_mut().for_each(|(_, inner)| remove_defaults(inner));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bounds keep objects from growing without limit, and let the API server estimate the cost of validation rules.
    #[test]
    fn every_string_list_and_map_has_a_bound() {
        for definition in definitions().unwrap() {
            let versions = definition["spec"]["versions"].as_array().unwrap();
            let properties = &versions[0]["schema"]["openAPIV3Schema"]["properties"];
            for part in ["spec", "status"] {
                check(&format!("{}.{part}", definition["metadata"]["name"]), &properties[part]);
            }
        }
    }

    fn check(place: &str, schema: &Value) {
        if schema["x-kubernetes-preserve-unknown-fields"] == true {
            return;
        }
        match schema["type"].as_str() {
            Some("string") => {
                assert!(schema["maxLength"].is_number() || schema["enum"].is_array(), "{place} has no maxLength");
            }
            Some("array") => {
                assert!(schema["maxItems"].is_number(), "{place} has no maxItems");
                check(&format!("{place}[]"), &schema["items"]);
            }
            Some("object") => {
                let properties = schema["properties"].as_object();
                assert!(properties.is_some() || schema["maxProperties"].is_number(), "{place} has no maxProperties");
                if properties.is_none() {
                    check(&format!("{place}[]"), &schema["additionalProperties"]);
                }
                for (name, inner) in properties.into_iter().flatten() {
                    check(&format!("{place}.{name}"), inner);
                }
            }
            _ => {}
        }
    }
}
