//! The kinds of `lineside.dev`: what a manifest of an `EdgeModel` or a `CameraStream` says.
//!
//! Reading goes through two stages. The raw stage holds what was typed, field by field, all optional; unknown keys and wrong
//! types are collected, not stopped at. The resolved stage is validated and complete, and every error found on the way
//! is reported in one go, each with the place it stands in.

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

/// Whether a node with these labels bears every label asked for.
pub fn selects(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// A document as a file of manifests has it.
pub fn document(kind: &str, name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "lineside.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}
