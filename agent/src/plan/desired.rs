//! What this node should be running: all manifests, less those meant for other nodes.

use std::collections::BTreeMap;

use crate::config::manifest::Object;
use crate::config::{ModelManifest, StreamManifest};

/// The node that manifests are matched against.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// What should run, by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Desired {
    /// Models.
    pub models: BTreeMap<String, ModelManifest>,
    /// Streams.
    pub streams: BTreeMap<String, StreamManifest>,
}

impl Desired {
    /// Takes the objects that are meant for `node`. Of two objects with one name the first wins; see [`Desired::add`].
    pub fn new(objects: impl IntoIterator<Item = Object>, node: &Node) -> Self {
        let mut desired = Self::default();
        objects.into_iter().for_each(|object| {
            desired.add(object, node);
        });
        desired
    }

    /// Adds one object. `false` when one of its name is there already, which then stays.
    pub fn add(&mut self, object: Object, node: &Node) -> bool {
        match object {
            Object::Model(model) if selects(&model.node_selector, node) => {
                add(&mut self.models, model.name.clone(), *model)
            }
            Object::Stream(stream)
                if selects(&stream.node_selector, node)
                    && stream.node_name.as_ref().is_none_or(|name| *name == node.name) =>
            {
                add(&mut self.streams, stream.name.clone(), *stream)
            }
            Object::Model(_) | Object::Stream(_) => true,
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

/// Whether the node bears every label asked for.
fn selects(selector: &BTreeMap<String, String>, node: &Node) -> bool {
    selector.iter().all(|(key, value)| node.labels.get(key) == Some(value))
}
