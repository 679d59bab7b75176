//! The raw stage of manifests: an `EdgeModel` or a `CameraStream` as typed, and the reading of a whole file of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::spec::{InputSpec, OutputSpec, RuntimeSpec, Task};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{ModelManifest, StreamManifest, yaml};
use crate::names::ConfigErrors;

/// Group and version of our kinds.
pub const API_VERSION: &str = "lineside.dev/v1alpha1";

/// Checks a verdict rule: what is wrong with it, in one line.
pub type RuleCheck<'a> = &'a dyn Fn(&str) -> Result<(), String>;

/// One object of a manifest file, validated.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    /// A model to run.
    Model(Box<ModelManifest>),
    /// A stream to inspect.
    Stream(Box<StreamManifest>),
}

impl Object {
    /// Kind and name, which together are unique.
    pub fn key(&self) -> (&'static str, &str) {
        match self {
            Self::Model(model) => ("EdgeModel", &model.name),
            Self::Stream(stream) => ("CameraStream", &stream.name),
        }
    }
}

/// An object as it was typed, kept so that it can be written down and read again by a later version of this program. It
/// takes no part in comparisons: what two manifests mean is compared, not how they are written.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ManifestDocument {
    document: Value,
    folder: PathBuf,
}

impl PartialEq for ManifestDocument {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl ManifestDocument {
    pub(super) fn new(document: Value, folder: &Path) -> Self {
        Self { document, folder: folder.to_owned() }
    }

    /// Where relative addresses of the object begin.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Reads the object again.
    ///
    /// # Errors
    /// Every error in it.
    pub fn read(&self, check_rule: RuleCheck<'_>) -> Result<Object, Vec<String>> {
        let mut errors = ConfigErrors::default();
        match object(1, self.document.clone(), &self.folder, check_rule, &mut errors) {
            Some(object) if errors.is_empty() => Ok(object),
            _ => Err(errors.into_list()),
        }
    }
}

/// Reads an object as a cluster gives it. Its files are named by whole paths.
///
/// # Errors
/// Every error in it.
pub fn read_object(document: Value, check_rule: RuleCheck<'_>) -> Result<Object, Vec<String>> {
    ManifestDocument::new(document, Path::new("/")).read(check_rule)
}

/// Reads a file of manifests. Relative `file:` and `dir:` addresses are taken from `folder`.
///
/// # Errors
/// Every error in it; a file with any error is refused as a whole.
pub fn read(text: &str, folder: &Path, check_rule: RuleCheck<'_>) -> Result<Vec<Object>, Vec<String>> {
    let documents = yaml::documents(text).map_err(|error| vec![error])?;
    let mut errors = ConfigErrors::default();
    let mut objects: Vec<Object> = Vec::new();
    for (index, document) in documents.into_iter().enumerate() {
        let Some(object) = object(index + 1, document, folder, check_rule, &mut errors) else { continue };
        match objects.iter().any(|other| other.key() == object.key()) {
            true => errors.add(place(object.key()), "stands in the file twice"),
            false => objects.push(object),
        }
    }
    match errors.is_empty() {
        true => Ok(objects),
        false => Err(errors.into_list()),
    }
}

fn object(
    number: usize,
    document: Value,
    folder: &Path,
    check_rule: RuleCheck<'_>,
    errors: &mut ConfigErrors,
) -> Option<Object> {
    let kind = document.get("kind").and_then(Value::as_str).unwrap_or_default().to_owned();
    let name = document.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default().to_owned();
    let place = match (kind.as_str(), name.as_str()) {
        ("", _) | (_, "") => format!("document {number}"),
        (kind, name) => place((kind, name)),
    };
    match kind.as_str() {
        "EdgeModel" => {
            let raw: RawObject<RawModelSpec> = yaml::read(&place, document.clone(), errors);
            let (name, spec) = raw.checked(&place, errors)?;
            let model = ModelManifest::resolve(&place, name, spec, ManifestDocument::new(document, folder), errors);
            model.map(|model| Object::Model(Box::new(model)))
        }
        "CameraStream" => {
            let raw: RawObject<RawStreamSpec> = yaml::read(&place, document, errors);
            let (name, spec) = raw.checked(&place, errors)?;
            StreamManifest::resolve(&place, name, spec, folder, check_rule, errors)
                .map(|stream| Object::Stream(Box::new(stream)))
        }
        "" => {
            errors.add(place, "kind is missing; expected EdgeModel or CameraStream");
            None
        }
        other => {
            errors.add(place, format!("kind {other} is not known; expected EdgeModel or CameraStream"));
            None
        }
    }
}

fn place((kind, name): (&str, &str)) -> String {
    format!("{kind} {name}")
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawObject<S> {
    api_version: Option<String>,
    #[allow(dead_code)] // Read before the rest, to know what the rest is.
    kind: Option<String>,
    metadata: Option<RawMetadata>,
    spec: Option<S>,
    /// Written by the cluster; a manifest taken from there may carry it.
    #[allow(dead_code)]
    status: Option<Value>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawMetadata {
    name: Option<String>,
    /// The rest is Kubernetes' and not ours to judge.
    #[serde(flatten)]
    #[allow(dead_code)]
    rest: BTreeMap<String, Value>,
}

impl<S> RawObject<S> {
    fn checked(self, place: &str, errors: &mut ConfigErrors) -> Option<(String, S)> {
        if self.api_version.as_deref() != Some(API_VERSION) {
            errors.add(format!("{place} apiVersion"), format!("must be {API_VERSION}"));
        }
        let name = self.metadata.and_then(|metadata| metadata.name);
        let name = errors.require(&format!("{place} metadata.name"), name);
        if name.as_deref().is_some_and(|name| !crate::names::is_name(name)) {
            let what = "must be at most 63 of a-z, 0-9 and -, and begin with a letter or digit";
            errors.add(format!("{place} metadata.name"), what);
        }
        let spec = errors.require(&format!("{place} spec"), self.spec);
        Some((name?, spec?))
    }
}

/// A field of the contract that this version does not act on yet: any value is taken into the schema, and refused.
fn later_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

fn later_steps(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array", "maxItems": 16,
        "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}
    })
}

fn later_points(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array", "maxItems": 64,
        "items": {"type": "array", "maxItems": 2, "items": {"type": "number"}}
    })
}

/// Labels a node must bear, with Kubernetes' own bounds.
fn selector(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object", "maxProperties": 16, "additionalProperties": {"type": "string", "maxLength": 63}})
}

/// A DSSE envelope; its inside is checked by the agent.
fn envelope(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

/// What a model is and how it runs.
#[derive(Debug, Clone, Serialize, Deserialize, Default, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["version", "source"], "x-kubernetes-validations" = [
    {
        "rule": "self.version >= oldSelf.version || (has(self.rollback) && self.rollback)",
        "message": "spec.version may not go down; set spec.rollback: true to go back to an earlier version"
    },
    {
        "rule": "self.version != oldSelf.version || !has(self.source.digest) || !has(oldSelf.source.digest) || \
                 self.source.digest == oldSelf.source.digest",
        "message": "the digest of a version does not change; raise spec.version with it"
    },
    {"rule": "!has(self.rollout)", "message": "spec.rollout is not built into this version yet; remove it"}
]))]
pub struct RawModelSpec {
    /// The version, which grows. A node refuses one that is lower than what it has served, unless rollback is true.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_u64))]
    pub version: Option<u64>,
    /// Where the model's file comes from.
    pub source: Option<RawModelSource>,
    /// What the model's answer means. Default: the model's metadata, or classify where its only output is [batch, classes].
    pub task: Option<Task>,
    /// From picture to tensor.
    pub input: Option<InputSpec>,
    /// From tensor to prediction.
    pub output: Option<OutputSpec>,
    /// Engine, device, threads.
    pub runtime: Option<RuntimeSpec>,
    /// Whether this version may replace a higher one.
    #[schemars(extend("default" = false))]
    pub rollback: Option<bool>,
    /// Labels a node must bear to be given the model; without any, every node is.
    #[schemars(schema_with = "selector")]
    pub node_selector: Option<BTreeMap<String, String>>,
    /// Pictures with the answers that the model has to reproduce on the node before it serves.
    #[schemars(length(max = 64))]
    pub golden: Option<Vec<RawGolden>>,
    /// Not built yet.
    #[schemars(schema_with = "later_object")]
    pub rollout: Option<Value>,
}

/// Where a model's file comes from.
#[derive(Debug, Clone, Serialize, Deserialize, Default, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["uri"], "x-kubernetes-validations" = [
    {
        "rule": "has(self.digest) || self.uri.startsWith('file:')",
        "message": "digest is missing; `sha256sum model.onnx` tells it, write it as sha256:..."
    },
    {
        "rule": "!self.uri.startsWith('file:') || self.uri.startsWith('file:///')",
        "message": "a file is named by its whole path on the node, as file:///models/model.onnx"
    },
    {
        "rule": "self.uri.matches('^((https?|s3|gs|az|oci)://.|file:)')",
        "message": "is no address of a model; there are https, http, s3, gs, az, oci and file"
    }
]))]
pub struct RawModelSource {
    /// https://, s3://, gs://, az://, oci:// or file:///; http:// only where the agent allows it.
    #[schemars(length(min = 1, max = 2048))]
    pub uri: Option<String>,
    /// sha256 of the file, as sha256: and 64 hexadecimal digits. Required except for file:.
    #[schemars(length(max = 71), regex(pattern = "^sha256:[0-9a-f]{64}$"))]
    pub digest: Option<String>,
    /// Bytes of the file.
    #[schemars(range(min = 1, max = 9_007_199_254_740_991_u64))]
    pub size: Option<u64>,
    /// The Secret with the credentials, which has to be mounted into the agent's pod: the agent may not read Secrets.
    pub secret_ref: Option<RawSecretRef>,
    /// What `lineside sign` printed for this version.
    #[schemars(schema_with = "envelope")]
    pub signature: Option<Value>,
}

/// A Secret, by name.
#[derive(Debug, Clone, Serialize, Deserialize, Default, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["name"]))]
pub struct RawSecretRef {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: Option<String>,
}

/// A picture with the answer that a model has to give.
#[derive(Debug, Clone, Serialize, Deserialize, Default, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["input", "output"]))]
pub struct RawGolden {
    /// The picture's path.
    #[schemars(length(min = 1, max = 2048))]
    pub input: Option<String>,
    /// The path of the answer: JSON with the fields that a result has for the task.
    #[schemars(length(min = 1, max = 2048))]
    pub output: Option<String>,
    /// How far a score may be off, 0 to 1. Default: 0.01.
    #[schemars(range(min = 0.0, max = 1.0), extend("default" = 0.01))]
    pub tolerance: Option<f32>,
}

/// A camera, the model that looks at its frames, and the rule that judges them.
#[derive(Debug, Clone, Serialize, Deserialize, Default, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["source", "model"], "x-kubernetes-validations" = [
    {
        "rule": "!(has(self.nodeName) && has(self.nodeSelector))",
        "message": "spec.nodeName and spec.nodeSelector exclude each other"
    },
    {
        "rule": "has(self.nodeName) || has(self.nodeSelector)",
        "message": "say where the camera is: spec.nodeName, or spec.nodeSelector"
    },
    {"rule": "!has(self.pipeline)", "message": "spec.pipeline is not built into this version yet; name one model in spec.model"},
    {"rule": "!has(self.roi)", "message": "spec.roi is not built into this version yet; remove it"},
    {"rule": "!has(self.trigger)", "message": "spec.trigger is not built into this version yet; remove it"},
    {"rule": "!has(self.evidence)", "message": "spec.evidence is not built into this version yet; remove it"}
]))]
pub struct RawStreamSpec {
    /// Where the frames come from.
    pub source: Option<RawStreamSource>,
    /// The node that plays the stream.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: Option<String>,
    /// Labels of the nodes that play it.
    #[schemars(schema_with = "selector")]
    pub node_selector: Option<BTreeMap<String, String>>,
    /// The EdgeModel that looks at the frames.
    #[schemars(length(max = 63), regex(pattern = "^[a-z0-9]([a-z0-9-]{0,62})$"))]
    pub model: Option<String>,
    /// Frames per second; 0 takes them as they come. Default: 0.
    #[schemars(range(min = 0.0, max = 1000.0), extend("default" = 0))]
    pub fps: Option<f64>,
    /// Older frames are dropped, and counted. Default: none is.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub max_age_ms: Option<u64>,
    /// A CEL expression over the prediction that gives "pass", "reject" or "none".
    #[schemars(length(max = 4096))]
    pub verdict: Option<String>,
    /// Not built yet.
    #[schemars(schema_with = "later_steps")]
    pub pipeline: Option<Value>,
    /// Not built yet.
    #[schemars(schema_with = "later_points")]
    pub roi: Option<Value>,
    /// Not built yet.
    #[schemars(schema_with = "later_object")]
    pub trigger: Option<Value>,
    /// Not built yet.
    #[schemars(schema_with = "later_object")]
    pub evidence: Option<Value>,
    /// Report by exception.
    pub report: Option<RawReport>,
}

/// Report by exception: only what is news is published.
#[derive(Debug, Clone, Serialize, Deserialize, Default, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RawReport {
    /// Whether only news is published. Default: false.
    pub by_exception: Option<bool>,
    /// A score that moved by more than this is news. Default: 0.05.
    #[schemars(range(min = 0.0, max = 1e6))]
    pub deadband: Option<f32>,
    /// After so many seconds without one, any result is published. Default: 60.
    #[schemars(range(min = 1, max = 86_400))]
    pub heartbeat_seconds: Option<u64>,
}

/// Where a stream's frames come from.
#[derive(Debug, Clone, Serialize, Deserialize, Default, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["uri"], "x-kubernetes-validations" = [
    {
        "rule": "!(self.uri.startsWith('file:') || self.uri.startsWith('dir:')) || self.uri.matches('^(file|dir):///')",
        "message": "a file or folder is named by its whole path on the node, as dir:///frames"
    },
    {
        "rule": "self.uri.matches('^(https?://.|file:|dir:)')",
        "message": "there are http, https, dir and file; rtsp, v4l2 and push are not built into this version yet"
    },
    {"rule": "!has(self.secretRef)", "message": "secretRef is not built into this version yet; remove it"}
]))]
pub struct RawStreamSource {
    /// http:// or https:// of a camera that gives a snapshot or MJPEG; dir:/// or file:/// of the node.
    #[schemars(length(min = 1, max = 2048))]
    pub uri: Option<String>,
    /// Not built yet.
    #[schemars(schema_with = "later_object")]
    pub secret_ref: Option<Value>,
}

/// Notes a field of the contract that this version does not act on. To pass over it in silence would be worse.
pub(super) fn not_built(place: &str, field: &str, value: Option<&Value>, errors: &mut ConfigErrors) {
    if value.is_some_and(|value| !value.is_null()) {
        errors.add(format!("{place} {field}"), "is not built into this version yet; remove it");
    }
}
