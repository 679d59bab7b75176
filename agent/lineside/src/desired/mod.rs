//! What this node should be running: everything that is asked for, less what is meant for other nodes.

pub mod cluster;
mod desired_cache;
pub mod folder_watcher;
pub mod manifest_folder;
pub mod object_set;

use std::collections::BTreeMap;

use serde_json::Value;

use lineside_api::kinds::manifest::Object;
use lineside_api::kinds::{ModelManifest, StreamManifest, selects};

/// Checks a verdict rule as manifests are read.
///
/// # Errors
/// [`lineside_rules::RuleError`].
pub fn check_rule(rule: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    Ok(lineside_rules::Rule::compile(rule).map(drop)?)
}

/// The node that manifests are matched against.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// Everything that is asked for at one moment, by a folder of manifests or by a cluster.
#[derive(Debug, Clone, Default)]
pub struct DesiredState {
    /// What is asked for, in the order in which it counts: of two objects with one name the first one does.
    pub objects: Vec<DesiredObject>,
    /// Objects whose present content cannot be followed. What they said well before, if anything, is among `objects`.
    pub refused: Vec<Refused>,
    /// Labels that the node bears in the cluster; those of the agent's configuration come on top.
    pub labels: BTreeMap<String, String>,
    /// Whether this is all: what is not named is not wanted.
    pub is_complete: bool,
}

/// One object that is asked for.
#[derive(Debug, Clone)]
pub struct DesiredObject {
    /// What is asked for.
    pub object: Object,
    /// Where it stands, for people.
    pub place: String,
    /// Which object of a cluster it is.
    pub identity: Identity,
}

/// Which of all objects that ever bore a name is meant, and how often its spec had been changed; nothing without a cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// The object.
    pub uid: Option<String>,
    /// Its generation.
    pub generation: Option<i64>,
}

/// One object whose content cannot be followed.
#[derive(Debug, Clone, PartialEq)]
pub struct Refused {
    /// Its kind.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Which object of a cluster it is.
    pub identity: Identity,
    /// The version it asks for, where it says.
    pub version: Option<u64>,
    /// Every error in it.
    pub reasons: Vec<String>,
    selector: BTreeMap<String, String>,
    node_name: Option<String>,
}

impl Refused {
    /// An object as it came, with what is wrong with it.
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

    /// Whether it is meant for this node, as far as can be told.
    pub fn concerns(&self, node: &Node) -> bool {
        selects(&self.selector, &node.labels) && self.node_name.as_ref().is_none_or(|name| *name == node.name)
    }
}

/// What should run, by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Assignment {
    /// Models.
    pub models: BTreeMap<String, ModelManifest>,
    /// StreamStates.
    pub streams: BTreeMap<String, StreamManifest>,
}

impl Assignment {
    /// Takes what is meant for `node`. Of two objects with one name the first wins; see [`Assignment::add`].
    pub fn new(objects: impl IntoIterator<Item = Object>, node: &Node) -> Self {
        let mut desired = Self::default();
        objects.into_iter().for_each(|object| {
            desired.add(object, node);
        });
        desired
    }

    /// Whether an object is meant for `node`.
    pub fn concerns(object: &Object, node: &Node) -> bool {
        let (selector, node_name) = match object {
            Object::Model(model) => (&model.node_selector, None),
            Object::Stream(stream) => (&stream.node_selector, stream.node_name.as_ref()),
        };
        selects(selector, &node.labels) && node_name.is_none_or(|name| *name == node.name)
    }

    /// Adds one object. `false` when one of its name is there already, which then stays.
    pub fn add(&mut self, object: Object, node: &Node) -> bool {
        if !Self::concerns(&object, node) {
            return true;
        }
        match object {
            Object::Model(model) => add(&mut self.models, model.name.clone(), *model),
            Object::Stream(stream) => add(&mut self.streams, stream.name.clone(), *stream),
        }
    }
}

fn add<T>(map: &mut BTreeMap<String, T>, name: String, value: T) -> bool {
    match map.entry(name) {
        std::collections::btree_map::Entry::Vacant(entry) => {
            entry.insert(value);
            true
        }
        std::collections::btree_map::Entry::Occupied(_) => false,
    }
}
