//! The custom resources: `EdgeModel`, `CameraStream` and `EdgeNode`, and their definitions as `lineside crd` prints them.
//!
//! Specs and statuses are the types that the rest of the agent uses; what Kubernetes adds (names, columns, rules) stands here.
//! Whatever is read from a cluster goes through the same reading as a local file, so these types are for writing and for the
//! schemas, and a cluster with an older or newer definition is still understood.

use kube::{CustomResource, CustomResourceExt as _};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use lineside_api::kinds::manifest::{RawModelSpec, RawStreamSpec};
use lineside_api::status::{CameraStreamStatus, EdgeModelStatus, NodeStatus};

/// The group of our kinds.
pub(super) const GROUP: &str = "lineside.dev";
/// Their version.
pub(super) const VERSION: &str = "v1alpha1";

/// A model to run.
#[derive(CustomResource, Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "lineside.dev",
    version = "v1alpha1",
    kind = "EdgeModel",
    doc = "A model that nodes run: where its file comes from, what its answers mean, and which nodes it is for.",
    namespaced,
    status = "EdgeModelStatus",
    shortname = "em",
    category = "lineside",
    validation = Rule::new("self.metadata.name.matches('^[a-z0-9]([a-z0-9-]{0,62})$')")
        .message("a name has at most 63 of a-z, 0-9 and -, and begins with a letter or digit"),
    printcolumn = r#"{"name":"Version","type":"integer","jsonPath":".spec.version","description":"The version that is asked for."}"#,
    printcolumn = r#"{"name":"Ready","type":"integer","jsonPath":".status.nodes.ready","description":"Nodes where it serves."}"#,
    printcolumn = r#"{"name":"Nodes","type":"integer","jsonPath":".status.nodes.desired","description":"Nodes it is for."}"#,
    printcolumn = r#"{"name":"Candidate","type":"integer","jsonPath":".status.nodes.candidate","description":"Nodes that try it beside the version before."}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].reason","description":"Why it is ready or not."}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(transparent)]
pub(super) struct EdgeModelSpec(pub RawModelSpec);

/// A camera to inspect.
#[derive(CustomResource, Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "lineside.dev",
    version = "v1alpha1",
    kind = "CameraStream",
    doc = "A camera, the model that looks at its frames, and the rule that makes verdicts.",
    namespaced,
    status = "CameraStreamStatus",
    shortname = "cam",
    category = "lineside",
    validation = Rule::new("self.metadata.name.matches('^[a-z0-9]([a-z0-9-]{0,62})$')")
        .message("a name has at most 63 of a-z, 0-9 and -, and begins with a letter or digit"),
    printcolumn = r#"{"name":"Model","type":"string","jsonPath":".spec.model","description":"The model that looks at its frames."}"#,
    printcolumn = r#"{"name":"Ready","type":"integer","jsonPath":".status.nodes.ready","description":"Nodes where frames can be had."}"#,
    printcolumn = r#"{"name":"Nodes","type":"integer","jsonPath":".status.nodes.desired","description":"Nodes that play it."}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].reason","description":"Why it is ready or not."}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(transparent)]
pub(super) struct CameraStreamSpec(pub RawStreamSpec);

/// What a node says of itself.
#[derive(CustomResource, Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "lineside.dev",
    version = "v1alpha1",
    kind = "EdgeNode",
    doc = "How a node stands. It is named after the node and written by the node's agent alone.",
    namespaced,
    no_spec,
    status = "NodeStatus",
    shortname = "en",
    category = "lineside",
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status","description":"Whether every model that is asked for has a version that serves; Unknown when the node is silent."}"#,
    printcolumn = r#"{"name":"Broker","type":"string","jsonPath":".status.conditions[?(@.type==\"BrokerConnected\")].status","description":"Whether results reach the broker."}"#,
    printcolumn = r#"{"name":"Spooled","type":"integer","jsonPath":".status.spool.records","description":"Messages that wait for the broker."}"#,
    printcolumn = r#"{"name":"Degraded","type":"string","jsonPath":".status.conditions[?(@.type==\"Degraded\")].reason","description":"What works less well than it should."}"#,
    printcolumn = r#"{"name":"Agent","type":"string","jsonPath":".status.agent.version","description":"The agent's version."}"#,
    printcolumn = r#"{"name":"Heartbeat","type":"date","jsonPath":".status.agent.lastHeartbeatTime","description":"When the agent last wrote, by the node's clock."}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
pub(super) struct EdgeNodeSpec {}

/// The definitions of all kinds, as YAML documents.
///
/// # Errors
/// When they cannot be written down, which is a error in this file.
pub fn definitions() -> Result<Vec<Value>, serde_json::Error> {
    [EdgeModel::crd(), CameraStream::crd(), EdgeNode::crd()]
        .into_iter()
        .map(|crd| {
            let mut definition = serde_json::to_value(crd)?;
            if let Some(schema) = definition.pointer_mut("/spec/versions/0/schema/openAPIV3Schema") {
                tidy(schema);
                if let Some(status) = schema.pointer_mut("/properties/status") {
                    strip_defaults(status);
                }
            }
            Ok(definition)
        })
        .collect()
}

/// Makes a schema one that Kubernetes takes without warnings: formats that OpenAPI does not know go. So do the defaults that
/// Rust types have, `null` and empty objects; only a plain value that a spec names is a default of the kind. A status has
/// none: what nobody has said is not there.
fn tidy(schema: &mut Value) {
    let Value::Object(entries) = schema else {
        if let Value::Array(items) = schema {
            items.iter_mut().for_each(tidy);
        }
        return;
    };
    let known = ["int32", "int64", "float", "double"];
    if entries.get("type").is_some_and(|kind| kind.is_string())
        && entries.get("format").and_then(Value::as_str).is_some_and(|format| !known.contains(&format))
    {
        entries.remove("format");
    }
    // A null is as good as nothing, and the API server takes it out where it is not expressly allowed.
    entries.remove("nullable");
    if entries.get("default").is_some_and(|value| value.is_null() || value.is_object() || value.is_array()) {
        entries.remove("default");
    }
    // Rules and samples are texts, not schemas.
    let inside = |(key, value): (&String, &mut Value)| {
        if key != "x-kubernetes-validations" {
            tidy(value);
        }
    };
    Map::iter_mut(entries).for_each(inside);
}

fn strip_defaults(schema: &mut Value) {
    if let Value::Object(entries) = schema {
        entries.remove("default");
        entries.iter_mut().for_each(|(_, inner)| strip_defaults(inner));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every text, list and map of the schemas has a bound, so that no object can be arbitrarily large and the cost of the
    /// rules can be told beforehand.
    #[test]
    fn everything_is_bounded() {
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
