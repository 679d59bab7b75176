//! The desired state: the models and streams that this node should run, from a folder of manifests or from a cluster.
//!
//! A source ([`folder_watcher`], [`cluster`]) publishes a [`DesiredState`] after each change. An [`Assignment`] contains the
//! objects of it that select this node, by name. The unit tests are in [`object_set`] and [`manifest_folder`].

pub mod cluster;
mod desired_cache;
pub mod folder_watcher;
pub mod manifest_folder;
pub mod object_set;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde_json::Value;

use lineside_api::kinds::manifest::Object;
use lineside_api::kinds::{ModelManifest, StreamManifest, selects};

/// The node that node selectors are matched against.
#[derive(Debug, Clone)]
pub struct Node {
    /// Name of the node.
    pub name: String,
    /// Labels of the node: those of the cluster, overridden by those of the configuration.
    pub labels: BTreeMap<String, String>,
}

/// The desired state at one moment, from a folder of manifests or from a cluster.
#[derive(Debug, Clone, Default)]
pub struct DesiredState {
    /// The valid objects, in order of precedence: of two objects of one kind with the same name the first one applies.
    pub objects: Vec<DesiredObject>,
    /// The objects whose current content is invalid. Their last valid content, if any, is in `objects`.
    pub refused: Vec<Refused>,
    /// Labels of the node in the cluster. The labels of the agent's configuration override them.
    pub labels: BTreeMap<String, String>,
    /// Whether the state is complete, so that a model or stream that is not in it must not run.
    pub is_complete: bool,
    /// Whether the source of the desired state has not been read yet, since the agent started. Then there are no objects, and the
    /// last-good versions are restored meanwhile.
    pub is_pending: bool,
    /// Why the source of the desired state cannot be read now. The objects are those that were read last.
    pub unreadable: Option<String>,
    /// The manifest files whose current content is not in effect.
    pub rejected_files: RejectedFiles,
}

impl DesiredState {
    /// The desired state of a source that has not been read yet, with the reason if reading has failed.
    pub fn pending(unreadable: Option<String>) -> Self {
        Self { is_pending: true, unreadable, ..Self::default() }
    }
}

/// Most rejected files that a message names.
const REJECTED_NAMES_MAX: usize = 5;

/// Manifest files that are rejected: their number, and the names of the first ones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RejectedFiles {
    /// The number of files.
    pub count: usize,
    /// The names of the first files, at most five.
    pub first: Vec<String>,
}

impl RejectedFiles {
    fn new<'a>(paths: impl ExactSizeIterator<Item = &'a Path>) -> Self {
        let count = paths.len();
        Self { count, first: paths.take(REJECTED_NAMES_MAX).map(file_name).collect() }
    }
}

impl fmt::Display for RejectedFiles {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rest = if self.count > self.first.len() { ", ..." } else { "" };
        let files = if self.count == 1 { "file is" } else { "files are" };
        write!(formatter, "{} manifest {files} rejected: {}{rest}", self.count, self.first.join(", "))
    }
}

/// The name of a file without its folder.
fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// One valid object of the desired state.
#[derive(Debug, Clone)]
pub struct DesiredObject {
    /// The model or stream.
    pub object: Object,
    /// Where the object is defined, for messages: the path of the file, or the object in the cluster.
    pub place: String,
    /// The uid and generation of the object in the cluster.
    pub identity: Identity,
}

/// Identifies one revision of an object in a cluster. Both fields are `None` for an object from a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// `metadata.uid`: distinguishes the object from earlier objects with the same name.
    pub uid: Option<String>,
    /// `metadata.generation`: increases with each change of the spec.
    pub generation: Option<i64>,
}

/// One object whose current content is invalid.
#[derive(Debug, Clone, PartialEq)]
pub struct Refused {
    /// Kind of the object, such as `EdgeModel`.
    pub kind: String,
    /// Name of the object.
    pub name: String,
    /// The uid and generation of the object in the cluster.
    pub identity: Identity,
    /// `spec.version`, if it is present and valid.
    pub version: Option<u64>,
    /// Every error in the content.
    pub reasons: Vec<String>,
    selector: BTreeMap<String, String>,
    node_name: Option<String>,
}

impl Refused {
    /// An invalid object. The version and the node selection are read from `document` as far as they are valid.
    pub fn new(kind: &str, name: &str, identity: Identity, document: &Value, reasons: Vec<String>) -> Self {
        let spec = |pointer: &str| document.pointer(&format!("/spec/{pointer}"));
        let selector = spec("nodeSelector").and_then(Value::as_object).into_iter().flatten();
        Self {
            kind: kind.to_owned(),
            name: name.to_owned(),
            identity,
            version: spec("version").and_then(Value::as_u64),
            reasons,
            selector: selector.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect(),
            node_name: spec("nodeName").and_then(Value::as_str).map(str::to_owned),
        }
    }

    /// Whether the object selects `node`, as far as its content is valid.
    pub fn concerns(&self, node: &Node) -> bool {
        selects(&self.selector, &node.labels) && self.node_name.as_ref().is_none_or(|name| *name == node.name)
    }
}

/// The models and streams that a node should run, by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Assignment {
    /// The models.
    pub models: BTreeMap<String, ModelManifest>,
    /// The streams.
    pub streams: BTreeMap<String, StreamManifest>,
}

impl Assignment {
    /// Selects the objects for `node`. Of two objects of one kind with the same name the first one applies.
    pub fn new(objects: impl IntoIterator<Item = Object>, node: &Node) -> Self {
        let mut assignment = Self::default();
        objects.into_iter().for_each(|object| {
            assignment.add(object, node);
        });
        assignment
    }

    /// Whether an object selects `node`.
    pub fn concerns(object: &Object, node: &Node) -> bool {
        let (selector, node_name) = match object {
            Object::Model(model) => (&model.node_selector, None),
            Object::Stream(stream) => (&stream.node_selector, stream.node_name.as_ref()),
        };
        selects(selector, &node.labels) && node_name.is_none_or(|name| *name == node.name)
    }

    /// Adds one object if it selects `node`. Returns `false`, and adds nothing, when an object with this kind and name exists.
    pub fn add(&mut self, object: Object, node: &Node) -> bool {
        if !Self::concerns(&object, node) {
            return true;
        }
        match object {
            Object::Model(model) => insert_new(&mut self.models, model.name.clone(), *model),
            Object::Stream(stream) => insert_new(&mut self.streams, stream.name.clone(), *stream),
        }
    }
}

/// Inserts an entry unless the name exists. Returns whether it was inserted.
fn insert_new<T>(map: &mut BTreeMap<String, T>, name: String, value: T) -> bool {
    match map.entry(name) {
        std::collections::btree_map::Entry::Vacant(entry) => {
            entry.insert(value);
            true
        }
        std::collections::btree_map::Entry::Occupied(_) => false,
    }
}
