//! The raw stage of manifests: an `EdgeModel` or a `CameraStream` as typed, and the reading of a whole file of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lineside_runtime::spec::{InputSpec, OutputSpec, RuntimeSpec, Task};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Mistakes, ModelManifest, StreamManifest, lenient};

/// Group and version of our kinds.
pub const API_VERSION: &str = "lineside.dev/v1alpha1";

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
pub struct Typed {
    document: Value,
    folder: PathBuf,
}

impl PartialEq for Typed {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Typed {
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
    /// Every mistake in it.
    pub fn read(&self) -> Result<Object, Vec<String>> {
        let mut mistakes = Mistakes::default();
        match object(1, self.document.clone(), &self.folder, &mut mistakes) {
            Some(object) if mistakes.is_empty() => Ok(object),
            _ => Err(mistakes.into_list()),
        }
    }
}

/// Reads a file of manifests. Relative `file:` and `dir:` addresses are taken from `folder`.
///
/// # Errors
/// Every mistake in it; a file with any mistake is refused as a whole.
pub fn read(text: &str, folder: &Path) -> Result<Vec<Object>, Vec<String>> {
    let documents = lenient::documents(text).map_err(|mistake| vec![mistake])?;
    let mut mistakes = Mistakes::default();
    let mut objects: Vec<Object> = Vec::new();
    for (index, document) in documents.into_iter().enumerate() {
        let Some(object) = object(index + 1, document, folder, &mut mistakes) else { continue };
        match objects.iter().any(|other| other.key() == object.key()) {
            true => mistakes.add(place(object.key()), "stands in the file twice"),
            false => objects.push(object),
        }
    }
    match mistakes.is_empty() {
        true => Ok(objects),
        false => Err(mistakes.into_list()),
    }
}

fn object(number: usize, document: Value, folder: &Path, mistakes: &mut Mistakes) -> Option<Object> {
    let kind = document.get("kind").and_then(Value::as_str).unwrap_or_default().to_owned();
    let name = document.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default().to_owned();
    let place = match (kind.as_str(), name.as_str()) {
        ("", _) | (_, "") => format!("document {number}"),
        (kind, name) => place((kind, name)),
    };
    match kind.as_str() {
        "EdgeModel" => {
            let raw: RawObject<RawModelSpec> = lenient::read(&place, document.clone(), mistakes);
            let (name, spec) = raw.checked(&place, mistakes)?;
            let model = ModelManifest::resolve(&place, name, spec, Typed::new(document, folder), mistakes);
            model.map(|model| Object::Model(Box::new(model)))
        }
        "CameraStream" => {
            let raw: RawObject<RawStreamSpec> = lenient::read(&place, document, mistakes);
            let (name, spec) = raw.checked(&place, mistakes)?;
            StreamManifest::resolve(&place, name, spec, folder, mistakes).map(|stream| Object::Stream(Box::new(stream)))
        }
        "" => {
            mistakes.add(place, "kind is missing; expected EdgeModel or CameraStream");
            None
        }
        other => {
            mistakes.add(place, format!("kind {other} is not known; expected EdgeModel or CameraStream"));
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
    fn checked(self, place: &str, mistakes: &mut Mistakes) -> Option<(String, S)> {
        if self.api_version.as_deref() != Some(API_VERSION) {
            mistakes.add(format!("{place} apiVersion"), format!("must be {API_VERSION}"));
        }
        let name = self.metadata.and_then(|metadata| metadata.name);
        let name = mistakes.require(&format!("{place} metadata.name"), name);
        if name.as_deref().is_some_and(|name| !super::is_name(name)) {
            let what = "must be at most 63 of a-z, 0-9 and -, and begin with a letter or digit";
            mistakes.add(format!("{place} metadata.name"), what);
        }
        let spec = mistakes.require(&format!("{place} spec"), self.spec);
        Some((name?, spec?))
    }
}

/// `EdgeModel.spec` as typed.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RawModelSpec {
    pub(super) version: Option<u64>,
    pub(super) source: Option<RawModelSource>,
    pub(super) task: Option<Task>,
    pub(super) input: Option<InputSpec>,
    pub(super) output: Option<OutputSpec>,
    pub(super) runtime: Option<RuntimeSpec>,
    pub(super) rollback: Option<bool>,
    pub(super) node_selector: Option<BTreeMap<String, String>>,
    pub(super) golden: Option<Vec<RawGolden>>,
    pub(super) rollout: Option<Value>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RawModelSource {
    pub(super) uri: Option<String>,
    pub(super) digest: Option<String>,
    pub(super) size: Option<u64>,
    pub(super) secret_ref: Option<RawSecretRef>,
    pub(super) signature: Option<Value>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RawSecretRef {
    pub(super) name: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RawGolden {
    pub(super) input: Option<String>,
    pub(super) output: Option<String>,
    pub(super) tolerance: Option<f32>,
}

/// `CameraStream.spec` as typed.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RawStreamSpec {
    pub(super) source: Option<RawStreamSource>,
    pub(super) node_name: Option<String>,
    pub(super) node_selector: Option<BTreeMap<String, String>>,
    pub(super) model: Option<String>,
    pub(super) fps: Option<f64>,
    pub(super) max_age_ms: Option<u64>,
    pub(super) verdict: Option<String>,
    pub(super) pipeline: Option<Value>,
    pub(super) roi: Option<Value>,
    pub(super) trigger: Option<Value>,
    pub(super) evidence: Option<Value>,
    pub(super) report: Option<RawReport>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RawReport {
    pub(super) by_exception: Option<bool>,
    pub(super) deadband: Option<f32>,
    pub(super) heartbeat_seconds: Option<u64>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RawStreamSource {
    pub(super) uri: Option<String>,
    pub(super) secret_ref: Option<Value>,
}

/// Notes a field of the contract that this version does not act on. To pass over it in silence would be worse.
pub(super) fn not_built(place: &str, field: &str, value: Option<&Value>, mistakes: &mut Mistakes) {
    if value.is_some_and(|value| !value.is_null()) {
        mistakes.add(format!("{place} {field}"), "is not built into this version yet; remove it");
    }
}
