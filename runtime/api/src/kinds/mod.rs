//! The kinds of `lineside.dev` that users write: `EdgeModel` and `CameraStream`.
//!
//! A manifest is read in two stages. The raw stage (`manifest`) holds the fields as written, all optional; unknown keys and
//! wrong types are collected as errors and do not stop the reading. The resolved stage (`model`, `stream`, `source`) is
//! validated and complete. One attempt reports every error of a manifest, each with its object and field.

#[cfg(test)]
mod bounds_tests;
pub mod manifest;
mod model;
mod source;
mod stream;
pub mod yaml;

use std::collections::BTreeMap;

use serde_json::{Value, json};

pub use model::{Golden, ModelManifest};
pub use source::{ModelSource, ObjectAddress, OciAddress, Provider, StreamSource};
pub use stream::{Report, StreamManifest};

/// Whether a node's labels match a selector: the node has every label of the selector with the same value.
pub fn selects(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// An object in the form of a manifest file.
pub fn document(kind: &str, name: &str, spec: &Value) -> Value {
    json!({"apiVersion": manifest::API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec})
}
