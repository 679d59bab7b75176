//! Manifest files, and the raw stage of their objects: the fields of an `EdgeModel` or a `CameraStream` as written. The
//! doc comments of the `Raw` types are the descriptions in the custom resource definitions.

use std::collections::BTreeMap;
use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use crate::spec::{InputSpec, OutputSpec, RuntimeSpec, Task};
use lineside_common::supervisor::panic_message;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{ModelManifest, StreamManifest, yaml};
use crate::names::{ConfigErrors, NAME_FORMAT};
use crate::verdict::OnError;

/// API group and version of the kinds.
pub const API_VERSION: &str = "lineside.dev/v1alpha1";

/// Checks a verdict rule. The error's message is a single line.
pub type RuleCheck<'a> = &'a dyn Fn(&str) -> Result<(), Box<dyn Error + Send + Sync>>;

/// The errors of a manifest file or of one object: one line each, which begins with the object and the field. Of one object at
/// most 20 are listed, of a file at most 100, each of at most 512 bytes; the last line states how many were left out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("; "))]
pub struct ManifestErrors(Vec<String>);

impl ManifestErrors {
    /// The errors, at least one.
    pub fn list(&self) -> &[String] {
        &self.0
    }

    /// The errors, at least one.
    pub fn into_list(self) -> Vec<String> {
        self.0
    }
}

/// One validated object of a manifest file.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    /// An `EdgeModel`.
    Model(Box<ModelManifest>),
    /// A `CameraStream`.
    Stream(Box<StreamManifest>),
}

impl Object {
    /// Kind and name, which together identify an object.
    pub fn key(&self) -> (&'static str, &str) {
        match self {
            Self::Model(model) => ("EdgeModel", &model.name),
            Self::Stream(stream) => ("CameraStream", &stream.name),
        }
    }
}

/// An object as it was written. It is stored with the last good version, so that a later version of this program can read it
/// again. All documents are equal: manifests are compared by their resolved fields, not by the way they are written.
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

    /// The folder that relative paths of the object refer to.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Reads the object.
    ///
    /// # Errors
    /// [`ManifestErrors`] with every error of the object.
    pub fn read(&self, check_rule: RuleCheck<'_>) -> Result<Object, ManifestErrors> {
        let mut errors = ConfigErrors::of_object();
        let reader = Reader { folder: &self.folder, check_rule };
        match reader.object(1, self.document.clone(), &mut errors) {
            Some(object) if errors.is_empty() => Ok(object),
            _ => Err(ManifestErrors(errors.into_list())),
        }
    }
}

/// Reads an object of a cluster. Its paths are absolute.
///
/// # Errors
/// [`ManifestErrors`] with every error of the object.
pub fn read_object(document: Value, check_rule: RuleCheck<'_>) -> Result<Object, ManifestErrors> {
    ManifestDocument::new(document, Path::new("/")).read(check_rule)
}

/// Reads a manifest file. Relative `file:` and `dir:` addresses refer to `folder`.
///
/// # Errors
/// [`ManifestErrors`] with every error of the file; a file with an error is rejected as a whole.
pub fn read(text: &str, folder: &Path, check_rule: RuleCheck<'_>) -> Result<Vec<Object>, ManifestErrors> {
    let documents = yaml::documents(text).map_err(|error| ManifestErrors(vec![error.to_string()]))?;
    let mut errors = ConfigErrors::default();
    let mut objects: Vec<Object> = Vec::new();
    let reader = Reader { folder, check_rule };
    for (index, document) in documents.into_iter().enumerate() {
        let Some(object) = reader.object(index + 1, document, &mut errors) else { continue };
        if objects.iter().any(|other| other.key() == object.key()) {
            errors.add(place(object.key()), "is defined twice in the file");
        } else {
            objects.push(object);
        }
    }
    if errors.is_empty() { Ok(objects) } else { Err(ManifestErrors(errors.into_list())) }
}

/// What the objects of a manifest are read with.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    /// The folder that relative paths refer to.
    pub(super) folder: &'a Path,
    /// Checks verdict rules.
    pub(super) check_rule: RuleCheck<'a>,
}

impl Reader<'_> {
    /// Reads the document with this number in its file, from 1. A panic is an error of this object, and of no other one.
    fn object(self, number: usize, document: Value, errors: &mut ConfigErrors) -> Option<Object> {
        let kind = document.get("kind").and_then(Value::as_str).unwrap_or_default().to_owned();
        let name = document.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default().to_owned();
        let place = match (kind.as_str(), name.as_str()) {
            ("", _) | (_, "") => format!("document {number}"),
            (kind, name) => place((kind, name)),
        };
        let mut own = ConfigErrors::of_object();
        let read = catch_unwind(AssertUnwindSafe(|| self.object_of_kind(&kind, &place, document, &mut own)));
        let object = read.unwrap_or_else(|panic| {
            let message = panic_message(&*panic).lines().next().unwrap_or_default();
            own.add(&place, format!("cannot be read, because of a defect of the agent: reading panicked: {message}"));
            None
        });
        errors.append(own);
        object
    }

    fn object_of_kind(self, kind: &str, place: &str, document: Value, errors: &mut ConfigErrors) -> Option<Object> {
        match kind {
            "EdgeModel" => {
                let raw: RawObject<RawModelSpec> = yaml::read(place, document.clone(), errors);
                let (name, spec) = raw.checked(place, errors)?;
                let document = ManifestDocument::new(document, self.folder);
                ModelManifest::resolve(place, name, spec, document, errors).map(|model| Object::Model(Box::new(model)))
            }
            "CameraStream" => {
                let raw: RawObject<RawStreamSpec> = yaml::read(place, document, errors);
                let (name, spec) = raw.checked(place, errors)?;
                StreamManifest::resolve(place, name, spec, self, errors).map(|stream| Object::Stream(Box::new(stream)))
            }
            "" => {
                errors.add(place, "kind is missing; expected EdgeModel or CameraStream");
                None
            }
            other => {
                errors.add(place, format!("unknown kind {other}; expected EdgeModel or CameraStream"));
                None
            }
        }
    }
}

/// The prefix of errors about an object.
fn place((kind, name): (&str, &str)) -> String {
    format!("{kind} {name}")
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawObject<S> {
    api_version: Option<String>,
    #[allow(dead_code)] // Read from the document before the other fields, because their type depends on it.
    kind: Option<String>,
    metadata: Option<RawMetadata>,
    spec: Option<S>,
    /// Accepted and ignored, so that an object read from a cluster is a valid manifest.
    #[allow(dead_code)]
    status: Option<Value>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawMetadata {
    name: Option<String>,
    /// Other fields of Kubernetes, accepted and ignored.
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
            errors.add(format!("{place} metadata.name"), format!("must be {NAME_FORMAT}"));
        }
        let spec = errors.require(&format!("{place} spec"), self.spec);
        Some((name?, spec?))
    }
}

/// The schema of a field that is planned and not supported yet: the schema accepts any object, and a validation rule
/// rejects it with an explanation.
fn unsupported_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

fn unsupported_steps(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array", "maxItems": 16,
        "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}
    })
}

fn unsupported_points(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array", "maxItems": 64,
        "items": {"type": "array", "maxItems": 2, "items": {"type": "number"}}
    })
}

/// Labels that a node must have, with the bounds of Kubernetes.
fn selector(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object", "maxProperties": 16, "additionalProperties": {"type": "string", "maxLength": 63}})
}

/// A DSSE envelope; the agent checks its content.
fn envelope(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

/// A model: its file, its version and how it runs.
#[derive(Debug, Clone, Serialize, Deserialize, Default, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["version", "source"], "x-kubernetes-validations" = [
    {
        "rule": "self.version >= oldSelf.version || (has(self.rollback) && self.rollback)",
        "message": "spec.version must not decrease; set spec.rollback: true to go back to an earlier version"
    },
    {
        "rule": "self.version != oldSelf.version || !has(self.source.digest) || !has(oldSelf.source.digest) || \
                 self.source.digest == oldSelf.source.digest",
        "message": "the digest of a version must not change; increase spec.version together with it"
    },
    {"rule": "!has(self.rollout)", "message": "spec.rollout is not supported by this version; remove it"}
]))]
pub struct RawModelSpec {
    /// Version number, which must increase. A node rejects a version that is lower than the highest it has served,
    /// unless rollback is true.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_u64))]
    pub version: Option<u64>,
    /// Location of the model file.
    pub source: Option<RawModelSource>,
    /// What the outputs mean. Default: the metadata of the model, or classify for a model whose only output is
    /// [batch, classes].
    pub task: Option<Task>,
    /// Conversion of a picture to the input tensor.
    pub input: Option<InputSpec>,
    /// Conversion of the output tensors to a prediction.
    pub output: Option<OutputSpec>,
    /// Engine and resources.
    pub runtime: Option<RuntimeSpec>,
    /// Whether this version may replace a higher one. Default: false.
    #[schemars(extend("default" = false))]
    pub rollback: Option<bool>,
    /// Labels of the nodes that run the model. Default: every node.
    #[schemars(schema_with = "selector")]
    pub node_selector: Option<BTreeMap<String, String>>,
    /// Golden samples: pictures with the predictions that the model has to reproduce on the node before it serves.
    /// Default: none.
    #[schemars(length(max = 64))]
    pub golden: Option<Vec<RawGolden>>,
    /// Planned; not supported by this version.
    #[schemars(schema_with = "unsupported_object")]
    pub rollout: Option<Value>,
}

/// Location of a model file.
#[derive(Debug, Clone, Serialize, Deserialize, Default, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["uri"], "x-kubernetes-validations" = [
    {
        "rule": "has(self.digest) || self.uri.startsWith('file:')",
        "message": "digest is required; write what `sha256sum model.onnx` prints as sha256:..."
    },
    {
        "rule": "!self.uri.startsWith('file:') || self.uri.startsWith('file:///')",
        "message": "a file needs its absolute path on the node, such as file:///models/model.onnx"
    },
    {
        "rule": "self.uri.matches('^((https?|s3|gs|az|oci)://.|file:)')",
        "message": "is not the address of a model; supported schemes are https, http, s3, gs, az, oci and file"
    }
]))]
pub struct RawModelSource {
    /// Address of the file: https://, s3://, gs://, az://, oci:// or file:///; http:// only if the agent allows it
    /// (--source-http).
    #[schemars(length(min = 1, max = 2048))]
    pub uri: Option<String>,
    /// SHA-256 of the file: sha256: and 64 hexadecimal digits. Required except for file:.
    #[schemars(length(max = 71), regex(pattern = "^sha256:[0-9a-f]{64}$"))]
    pub digest: Option<String>,
    /// Size of the file in bytes. Default: not checked.
    #[schemars(range(min = 1, max = 9_007_199_254_740_991_u64))]
    pub size: Option<u64>,
    /// Secret with the credentials for the address. It has to be mounted into the agent's pod, because the agent has no
    /// permission to read Secrets.
    pub secret_ref: Option<RawSecretRef>,
    /// Signature of this version, as `lineside sign` prints it. Required if the agent has trusted keys.
    #[schemars(schema_with = "envelope")]
    pub signature: Option<Value>,
}

/// Reference to a Secret.
#[derive(Debug, Clone, Serialize, Deserialize, Default, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["name"]))]
pub struct RawSecretRef {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: Option<String>,
}

/// A golden sample: a picture with the prediction that a model has to reproduce.
#[derive(Debug, Clone, Serialize, Deserialize, Default, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["input", "output"]))]
pub struct RawGolden {
    /// Path of the picture on the node.
    #[schemars(length(min = 1, max = 2048))]
    pub input: Option<String>,
    /// Path of the expected prediction on the node: JSON with the fields of a result for the task, such as classes.
    #[schemars(length(min = 1, max = 2048))]
    pub output: Option<String>,
    /// Largest accepted difference of a score, 0 to 1. Boxes may differ by this fraction of the picture. Default: 0.01.
    // Not a default of the schema: the API server would write it into the list, and each `kubectl apply` would remove it.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub tolerance: Option<f32>,
}

/// A camera stream: the source of its frames, the model that inspects them and the verdict rule.
#[derive(Debug, Clone, Serialize, Deserialize, Default, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["source", "model"], "x-kubernetes-validations" = [
    {
        "rule": "!(has(self.nodeName) && has(self.nodeSelector))",
        "message": "spec.nodeName and spec.nodeSelector are mutually exclusive"
    },
    {
        "rule": "has(self.nodeName) || has(self.nodeSelector)",
        "message": "the node of the camera is required; set spec.nodeName or spec.nodeSelector"
    },
    {
        "rule": "!has(self.fps) || self.fps == 0.0 || self.fps >= 0.0000115",
        "message": "spec.fps must be 0 (no limit) or at least 0.0000115, which is one frame per day"
    },
    {"rule": "!has(self.pipeline)", "message": "spec.pipeline is not supported by this version; name one model in spec.model"},
    {"rule": "!has(self.roi)", "message": "spec.roi is not supported by this version; remove it"},
    {"rule": "!has(self.trigger)", "message": "spec.trigger is not supported by this version; remove it"},
    {"rule": "!has(self.evidence)", "message": "spec.evidence is not supported by this version; remove it"}
]))]
pub struct RawStreamSpec {
    /// Source of the frames.
    pub source: Option<RawStreamSource>,
    /// Name of the node that runs the stream. Mutually exclusive with nodeSelector.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: Option<String>,
    /// Labels of the nodes that run the stream. Mutually exclusive with nodeName.
    #[schemars(schema_with = "selector")]
    pub node_selector: Option<BTreeMap<String, String>>,
    /// Name of the EdgeModel that inspects the frames.
    #[schemars(length(max = 63), regex(pattern = "^[a-z0-9]([a-z0-9-]{0,62})$"))]
    pub model: Option<String>,
    /// Largest number of frames per second: 0.0000115 (one frame per day) to 1000, or 0 for no limit. Default: 0.
    #[schemars(range(min = 0.0, max = 1000.0), extend("default" = 0))]
    pub fps: Option<f64>,
    /// Largest age of a frame in milliseconds when its inference starts. Older frames are dropped and counted as stale.
    /// Default: no limit.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub max_age_ms: Option<u64>,
    /// Largest number of pixels of a frame, width times height. A larger frame is not decoded and is counted as failed.
    /// Default: 40000000.
    #[schemars(range(min = 1, max = 40_000_000), extend("default" = 40_000_000))]
    pub max_pixels: Option<u64>,
    /// CEL expression over the prediction, whose value is "pass", "reject" or "none". Default: every verdict is none.
    #[schemars(length(max = 4096))]
    pub verdict: Option<String>,
    /// Verdict on a frame for which the rule fails or exceeds its bounds. Default: `none`.
    pub on_error: Option<OnError>,
    /// Planned; not supported by this version.
    #[schemars(schema_with = "unsupported_steps")]
    pub pipeline: Option<Value>,
    /// Planned; not supported by this version.
    #[schemars(schema_with = "unsupported_points")]
    pub roi: Option<Value>,
    /// Planned; not supported by this version.
    #[schemars(schema_with = "unsupported_object")]
    pub trigger: Option<Value>,
    /// Planned; not supported by this version.
    #[schemars(schema_with = "unsupported_object")]
    pub evidence: Option<Value>,
    /// Report by exception. Default: every result is published.
    pub report: Option<RawReport>,
}

/// Report by exception: only results that differ from the last published one are published.
#[derive(Debug, Clone, Serialize, Deserialize, Default, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RawReport {
    /// Whether report by exception is enabled. Default: false.
    pub by_exception: Option<bool>,
    /// Change of a score above which a result is published, in units of the score. Default: 0.05.
    #[schemars(range(min = 0.0, max = 1e6))]
    pub deadband: Option<f32>,
    /// Seconds without a published result after which the next result is published in any case. Default: 60.
    #[schemars(range(min = 1, max = 86_400))]
    pub heartbeat_seconds: Option<u64>,
}

/// Source of the frames of a stream.
#[derive(Debug, Clone, Serialize, Deserialize, Default, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["uri"], "x-kubernetes-validations" = [
    {
        "rule": "!(self.uri.startsWith('file:') || self.uri.startsWith('dir:')) || self.uri.matches('^(file|dir):///')",
        "message": "a file or folder needs its absolute path on the node, such as dir:///frames"
    },
    {
        "rule": "self.uri.matches('^(https?://.|file:|dir:)')",
        "message": "supported schemes are http, https, dir and file; rtsp, v4l2 and push are not supported by this version"
    },
    {"rule": "!has(self.secretRef)", "message": "secretRef is not supported by this version; remove it"}
]))]
pub struct RawStreamSource {
    /// Address of the source: http:// or https:// of a camera that serves MJPEG or single pictures, dir:/// of a folder
    /// or file:/// of a file on the node.
    #[schemars(length(min = 1, max = 2048))]
    pub uri: Option<String>,
    /// Planned; not supported by this version.
    #[schemars(schema_with = "unsupported_object")]
    pub secret_ref: Option<Value>,
}

/// Adds an error for a planned field that this version does not support. Ignoring the field would hide that it has no effect.
pub(super) fn reject_unsupported(place: &str, field: &str, value: Option<&Value>, errors: &mut ConfigErrors) {
    if value.is_some_and(|value| !value.is_null()) {
        errors.add(format!("{place} {field}"), "is not supported by this version; remove it");
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const HEAD: &str = "apiVersion: lineside.dev/v1alpha1\n";

    fn check_rule(rule: &str) -> Result<(), Box<dyn Error + Send + Sync>> {
        if rule.ends_with('(') { Err("unfinished".into()) } else { Ok(()) }
    }

    #[test]
    fn a_complete_manifest_is_read() {
        let text = format!(
            "{HEAD}kind: EdgeModel\nmetadata: {{name: m, labels: {{a: b}}}}\nspec:\n  version: 3\n  source: {{uri: 'file:m.onnx'}}\n\
             ---\n{HEAD}kind: CameraStream\nmetadata: {{name: s}}\nspec:\n  source: {{uri: 'dir:frames'}}\n  model: m\n  \
             fps: 10\n  maxAgeMs: 200\n  maxPixels: 2000000\n  verdict: 'classes.size() > 0 ? \"pass\" : \"none\"'\n  onError: reject\n"
        );
        let objects = read(&text, Path::new("/m"), &|_| Ok(())).unwrap();
        let [Object::Model(model), Object::Stream(stream)] = objects.as_slice() else { panic!("{objects:?}") };
        assert_eq!((model.version, model.instances), (3, 1));
        assert_eq!(model.source.to_string(), "file:/m/m.onnx");
        assert_eq!(stream.frame_interval, Some(Duration::from_millis(100)));
        assert_eq!(stream.age_max, Some(Duration::from_millis(200)));
        assert_eq!(stream.on_error, OnError::Reject);
        let without = read(&text.replace("onError: reject", "onError: none"), Path::new("/m"), &|_| Ok(())).unwrap();
        assert!(matches!(&without[1], Object::Stream(stream) if stream.on_error == OnError::None));
        assert_eq!(stream.pixels_max, 2_000_000);
    }

    #[test]
    fn every_error_of_a_file_names_its_object_and_field() {
        let text = format!(
            "{HEAD}kind: EdgeModel\nmetadata: {{name: Bad_Name}}\nspec: {{version: -1, source: {{digest: x}}, engine: fast}}\n\
             ---\n{HEAD}kind: CameraStream\nmetadata: {{name: s}}\nspec:\n  source: {{uri: 'ftp://x'}}\n  fps: fast\n  maxPixels: 0\n  \
             verdict: 'nonsense('\n  onError: pass\n  roi: [[0, 0]]\n---\nkind: Pod\nmetadata: {{name: p}}\n---\n{{}}\n"
        );
        let errors = read(&text, Path::new("/"), &check_rule).unwrap_err().into_list();
        for expected in [
            "EdgeModel Bad_Name spec.version: ",
            "EdgeModel Bad_Name spec.engine: is not a known key",
            "EdgeModel Bad_Name metadata.name: must be",
            "EdgeModel Bad_Name spec.source.uri: is missing",
            "EdgeModel Bad_Name spec.source.digest: ",
            "CameraStream s spec.source.uri: the scheme ftp: is not supported",
            "CameraStream s spec.fps: ",
            "CameraStream s spec.maxPixels: 0 is not between 1 and 40000000",
            "CameraStream s spec.model: is missing",
            "CameraStream s spec.verdict: ",
            "CameraStream s spec.onError: ",
            "CameraStream s spec.roi: is not supported",
            "Pod p: unknown kind Pod",
            "document 4: kind is missing",
        ] {
            assert!(errors.iter().any(|error| error.starts_with(expected)), "{expected}\n{errors:#?}");
        }
    }

    #[test]
    fn a_panic_while_one_object_is_read_is_an_error_of_this_object() {
        let stream = |name: &str| {
            format!(
                "{HEAD}kind: CameraStream\nmetadata: {{name: {name}}}\nspec: {{source: {{uri: 'dir:f'}}, model: m, \
                 verdict: {name}}}\n---\n"
            )
        };
        let check: RuleCheck<'_> = &|rule| if rule == "b" { panic!("injected\nfor a test") } else { Ok(()) };
        let errors = read(&(stream("a") + &stream("b") + &stream("c")), Path::new("/"), check).unwrap_err();
        let [error] = errors.list() else { panic!("{errors:?}") };
        assert!(
            error.starts_with("CameraStream b: cannot be read") && error.ends_with("panicked: injected"),
            "{error}"
        );
        let document = yaml::documents(&stream("b")).unwrap().remove(0);
        assert_eq!(read_object(document, check).unwrap_err(), errors);
    }

    #[test]
    fn the_number_of_errors_of_an_object_and_of_a_file_is_bounded() {
        let keys = |count: usize| (0..count).map(|key| format!("  k{key}: 1\n")).collect::<String>();
        let object = format!("{HEAD}kind: EdgeModel\nmetadata: {{name: m}}\nspec:\n{}", keys(60_000));
        let errors = read(&object, Path::new("/"), &check_rule).unwrap_err().into_list();
        assert_eq!(errors.len(), 21, "{errors:?}");
        assert_eq!(errors.last().unwrap(), "and 59982 more errors", "two required fields are missing as well");
        let errors = read(&"--- {}\n".repeat(1000), Path::new("/"), &check_rule).unwrap_err().into_list();
        assert_eq!((errors.len(), errors.last().unwrap().as_str()), (101, "and 900 more errors"));
    }

    #[test]
    fn an_object_defined_twice_in_a_file_is_an_error() {
        let one =
            format!("{HEAD}kind: EdgeModel\nmetadata: {{name: m}}\nspec: {{version: 1, source: {{uri: 'file:m'}}}}\n");
        let errors = read(&format!("{one}---\n{one}"), Path::new("/"), &check_rule).unwrap_err();
        assert_eq!(errors.list(), ["EdgeModel m: is defined twice in the file"]);
    }
}
