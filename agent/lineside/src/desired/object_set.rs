//! What a cluster asks for, put together object by object.
//!
//! An object that cannot be followed does not take away what it asked for before: its last good content stays in force,
//! and what is wrong with the new one is told. Only an object that is gone, or was replaced by another of its name, is
//! forgotten. Objects are read when they change and not otherwise, so that a thousand of them cost little.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Assignment, DesiredObject, DesiredState, Identity, Node, Refused};
use lineside_api::kinds::manifest::{Object, read_object};

/// One object as the cluster holds it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ApiObject {
    /// `EdgeModel` or `CameraStream`.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Which of all objects that ever bore its name it is.
    pub uid: String,
    /// How often its spec was changed.
    pub generation: Option<i64>,
    /// All of it, as a file of manifests has it.
    pub document: Value,
}

impl ApiObject {
    fn identity(&self) -> Identity {
        Identity { uid: Some(self.uid.clone()), generation: self.generation }
    }
}

/// Everything that was heard of.
#[derive(Debug, Default)]
pub struct ObjectSet {
    objects: BTreeMap<(String, String), Known>,
}

#[derive(Debug)]
struct Known {
    uid: String,
    generation: Option<i64>,
    good: Option<(ApiObject, Object)>,
    refused: Option<Refused>,
}

impl ObjectSet {
    /// Takes in an object. `true` when that changes anything.
    pub fn put(&mut self, given: ApiObject) -> bool {
        let key = (given.kind.clone(), given.name.clone());
        let before = self.objects.remove(&key).filter(|known| known.uid == given.uid);
        if let Some(known) = before.as_ref().filter(|known| known.generation == given.generation) {
            let is_same = given.generation.is_some() || known.good.as_ref().is_some_and(|(good, _)| *good == given);
            if let (true, Some(known)) = (is_same, before) {
                self.objects.insert(key, known);
                return false;
            }
            return self.read(key, given, None);
        }
        self.read(key, given, before.and_then(|known| known.good))
    }

    fn read(&mut self, key: (String, String), given: ApiObject, before: Option<(ApiObject, Object)>) -> bool {
        let (uid, generation) = (given.uid.clone(), given.generation);
        let known = match read_object(given.document.clone(), &super::check_rule) {
            Ok(object) => Known { uid, generation, good: Some((given, object)), refused: None },
            Err(errors) => {
                let reasons = errors.into_list();
                let refused = Refused::new(&given.kind, &given.name, given.identity(), &given.document, reasons);
                Known { uid, generation, good: before, refused: Some(refused) }
            }
        };
        self.objects.insert(key, known);
        true
    }

    /// Forgets an object. `true` when it was known.
    pub fn remove(&mut self, kind: &str, name: &str) -> bool {
        self.objects.remove(&(kind.to_owned(), name.to_owned())).is_some()
    }

    /// Takes in all objects of a kind: those that are not among them are gone. `true` when that changes anything.
    pub fn replace(&mut self, kind: &str, all: Vec<ApiObject>) -> bool {
        let count = self.objects.len();
        self.objects.retain(|(known, name), _| known != kind || all.iter().any(|given| given.name == *name));
        let has_fewer = self.objects.len() != count;
        all.into_iter().fold(has_fewer, |changed, given| self.put(given) || changed)
    }

    /// The uid of an object.
    pub fn uid(&self, kind: &str, name: &str) -> Option<&str> {
        self.objects.get(&(kind.to_owned(), name.to_owned())).map(|known| known.uid.as_str())
    }

    /// What is asked of a node, with what `labels` the cluster has given it.
    pub fn desired_state(
        &self,
        node: &Node,
        cluster_labels: &BTreeMap<String, String>,
        is_complete: bool,
    ) -> DesiredState {
        let good = self.objects.values().filter_map(|known| known.good.as_ref());
        let wish = |(given, object): &(ApiObject, Object)| DesiredObject {
            object: object.clone(),
            place: format!("the cluster's {} {}", given.kind, given.name),
            identity: given.identity(),
        };
        DesiredState {
            objects: good.filter(|(_, object)| Assignment::concerns(object, node)).map(wish).collect(),
            refused: self
                .objects
                .values()
                .filter_map(|known| known.refused.clone())
                .filter(|refused| refused.concerns(node))
                .collect(),
            labels: cluster_labels.clone(),
            is_complete,
        }
    }

    /// The good objects that concern a node, to be remembered.
    pub fn cacheable(&self, node: &Node) -> Vec<ApiObject> {
        let good = self.objects.values().filter_map(|known| known.good.as_ref());
        good.filter(|(_, object)| Assignment::concerns(object, node)).map(|(given, _)| given.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use lineside_api::kinds::document;
    use serde_json::json;

    use super::*;

    fn stream(name: &str, uid: &str, generation: i64, spec: Value) -> ApiObject {
        let document = document("CameraStream", name, &spec);
        ApiObject {
            kind: "CameraStream".into(),
            name: name.into(),
            uid: uid.into(),
            generation: Some(generation),
            document,
        }
    }

    fn good(fps: u32) -> Value {
        json!({"source": {"uri": "dir:///frames"}, "model": "m", "nodeName": "edge-1", "fps": fps})
    }

    fn node(name: &str) -> Node {
        Node { name: name.into(), labels: BTreeMap::new() }
    }

    fn desired_state(asked: &ObjectSet) -> (Vec<i64>, Vec<i64>) {
        let desired_state = asked.desired_state(&node("edge-1"), &BTreeMap::new(), true);
        (
            desired_state.objects.iter().filter_map(|wish| wish.identity.generation).collect(),
            desired_state.refused.iter().filter_map(|refused| refused.identity.generation).collect(),
        )
    }

    #[test]
    fn a_bad_edit_leaves_the_last_good_content_in_force_and_is_told() {
        let mut asked = ObjectSet::default();
        assert!(asked.put(stream("cam", "u1", 1, good(5))));
        assert!(!asked.put(stream("cam", "u1", 1, good(5))), "nothing has changed");
        assert!(asked.put(stream("cam", "u1", 2, json!({"fps": "many", "nodeName": "edge-1"}))));
        assert_eq!(desired_state(&asked), (vec![1], vec![2]));
        assert!(asked.put(stream("cam", "u1", 3, good(6))));
        assert_eq!(desired_state(&asked), (vec![3], vec![]));
    }

    #[test]
    fn another_object_of_the_name_does_not_inherit_the_content() {
        let mut asked = ObjectSet::default();
        asked.put(stream("cam", "u1", 1, good(5)));
        asked.put(stream("cam", "u2", 1, json!({"fps": "many"})));
        assert_eq!(desired_state(&asked), (vec![], vec![1]));
    }

    #[test]
    fn what_a_full_list_does_not_name_is_gone_but_only_of_its_kind() {
        let mut asked = ObjectSet::default();
        asked.put(stream("a", "u1", 1, good(5)));
        asked.put(stream("b", "u2", 2, good(5)));
        assert!(!asked.replace("EdgeModel", Vec::new()));
        assert!(asked.replace("CameraStream", vec![stream("b", "u2", 2, good(5)), stream("c", "u3", 3, good(5))]));
        assert_eq!(desired_state(&asked), (vec![2, 3], vec![]));
        assert_eq!(asked.uid("CameraStream", "c"), Some("u3"));
        assert!(asked.remove("CameraStream", "b") && !asked.remove("CameraStream", "b"));
    }

    #[test]
    fn only_what_concerns_the_node_is_asked_of_it_and_remembered() {
        let mut asked = ObjectSet::default();
        asked.put(stream("a", "u1", 1, good(5)));
        assert_eq!(asked.cacheable(&node("edge-1")).len(), 1);
        assert!(asked.cacheable(&node("edge-2")).is_empty());
        assert!(asked.desired_state(&node("edge-2"), &BTreeMap::new(), true).objects.is_empty());
    }
}
