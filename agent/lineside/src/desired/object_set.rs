//! The objects of a cluster, maintained from list and watch results.
//!
//! When the new content of an object is invalid, its last valid content remains in effect and the errors are reported. An object
//! is removed only when it is deleted, or when another object with its name replaces it. An object is parsed only when it has
//! changed, so that a thousand objects need little CPU time.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Assignment, DesiredObject, DesiredState, Identity, Node, Refused};
use lineside_api::kinds::manifest::{Object, RuleCheck, read_object};

/// One object as the API server returns it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ApiObject {
    /// `EdgeModel` or `CameraStream`.
    pub kind: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`: distinguishes the object from earlier objects with the same name.
    pub uid: String,
    /// `metadata.generation`: increases with each change of the spec.
    pub generation: Option<i64>,
    /// The whole object, in the format of a manifest.
    pub document: Value,
}

impl ApiObject {
    fn identity(&self) -> Identity {
        Identity { uid: Some(self.uid.clone()), generation: self.generation }
    }
}

/// All known objects by kind and name, valid or not.
#[derive(Debug, Default)]
pub struct ObjectSet {
    objects: BTreeMap<(String, String), Entry>,
}

/// The state of one object.
#[derive(Debug)]
struct Entry {
    uid: String,
    generation: Option<i64>,
    /// The last valid content.
    last_valid: Option<(ApiObject, Object)>,
    /// The errors of the current content.
    refused: Option<Refused>,
}

impl ObjectSet {
    /// Inserts or updates an object, whose verdict rule `check_rule` checks. Returns `true` when the set has changed.
    pub fn put(&mut self, object: ApiObject, check_rule: RuleCheck<'_>) -> bool {
        let key = (object.kind.clone(), object.name.clone());
        let previous = self.objects.get(&key).filter(|entry| entry.uid == object.uid);
        let last_valid = match previous {
            Some(entry) if entry.generation == object.generation => {
                let is_valid_content = |(valid, _): &(ApiObject, Object)| *valid == object;
                if object.generation.is_some() || entry.last_valid.as_ref().is_some_and(is_valid_content) {
                    return false;
                }
                None
            }
            // The previous entry stays in the set while the new content is parsed.
            previous => previous.and_then(|entry| entry.last_valid.clone()),
        };
        self.parse(key, object, last_valid, check_rule)
    }

    /// Parses the content of an object. Keeps `last_valid` when the content is invalid.
    fn parse(
        &mut self,
        key: (String, String),
        object: ApiObject,
        last_valid: Option<(ApiObject, Object)>,
        check_rule: RuleCheck<'_>,
    ) -> bool {
        let (uid, generation) = (object.uid.clone(), object.generation);
        // A panic while the object is read is one of its errors.
        let entry = match read_object(object.document.clone(), check_rule) {
            Ok(parsed) => Entry { uid, generation, last_valid: Some((object, parsed)), refused: None },
            Err(errors) => {
                tracing::error!(
                    event = "object_rejected",
                    kind = object.kind,
                    name = object.name,
                    generation,
                    reason = %errors,
                    "Object rejected; its last valid content remains in effect"
                );
                let reasons = errors.into_list();
                let refused = Refused::new(&object.kind, &object.name, object.identity(), &object.document, reasons);
                Entry { uid, generation, last_valid, refused: Some(refused) }
            }
        };
        self.objects.insert(key, entry);
        true
    }

    /// Removes an object. Returns `true` when it was in the set.
    pub fn remove(&mut self, kind: &str, name: &str) -> bool {
        self.objects.remove(&(kind.to_owned(), name.to_owned())).is_some()
    }

    /// Replaces all objects of a kind with those of a full list. Returns `true` when the set has changed.
    pub fn replace(&mut self, kind: &str, all: Vec<ApiObject>, check_rule: RuleCheck<'_>) -> bool {
        let count = self.objects.len();
        let names: BTreeSet<&str> = all.iter().map(|object| object.name.as_str()).collect();
        self.objects.retain(|(other, name), _| other != kind || names.contains(name.as_str()));
        let has_fewer = self.objects.len() != count;
        all.into_iter().fold(has_fewer, |changed, object| self.put(object, check_rule) || changed)
    }

    /// The uid of an object.
    pub fn uid(&self, kind: &str, name: &str) -> Option<&str> {
        self.objects.get(&(kind.to_owned(), name.to_owned())).map(|entry| entry.uid.as_str())
    }

    /// The desired state of `node`: the objects that select it, with the labels of the node in the cluster.
    pub fn desired_state(
        &self,
        node: &Node,
        cluster_labels: &BTreeMap<String, String>,
        is_complete: bool,
    ) -> DesiredState {
        let valid = self.objects.values().filter_map(|entry| entry.last_valid.as_ref());
        let desired_object = |(source, object): &(ApiObject, Object)| DesiredObject {
            object: object.clone(),
            place: format!("the cluster's {} {}", source.kind, source.name),
            identity: source.identity(),
        };
        DesiredState {
            objects: valid.filter(|(_, object)| Assignment::concerns(object, node)).map(desired_object).collect(),
            refused: self
                .objects
                .values()
                .filter_map(|entry| entry.refused.clone())
                .filter(|refused| refused.concerns(node))
                .collect(),
            labels: cluster_labels.clone(),
            is_complete,
            ..DesiredState::default()
        }
    }

    /// The last valid content of the objects that select `node`, for the cache on disk.
    pub fn cacheable(&self, node: &Node) -> Vec<ApiObject> {
        let valid = self.objects.values().filter_map(|entry| entry.last_valid.as_ref());
        valid.filter(|(_, object)| Assignment::concerns(object, node)).map(|(source, _)| source.clone()).collect()
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

    fn valid_spec(fps: u32) -> Value {
        json!({"source": {"uri": "dir:///frames"}, "model": "m", "nodeName": "edge-1", "fps": fps})
    }

    fn node(name: &str) -> Node {
        Node { name: name.into(), labels: BTreeMap::new() }
    }

    /// The generations of the valid objects and of the refused ones.
    fn generations(objects: &ObjectSet) -> (Vec<i64>, Vec<i64>) {
        let desired_state = objects.desired_state(&node("edge-1"), &BTreeMap::new(), true);
        (
            desired_state.objects.iter().filter_map(|object| object.identity.generation).collect(),
            desired_state.refused.iter().filter_map(|refused| refused.identity.generation).collect(),
        )
    }

    #[test]
    fn an_invalid_edit_is_reported_and_the_last_valid_content_remains_in_effect() {
        let mut objects = ObjectSet::default();
        assert!(objects.put(stream("cam", "u1", 1, valid_spec(5)), &|_| Ok(())));
        assert!(!objects.put(stream("cam", "u1", 1, valid_spec(5)), &|_| Ok(())), "the object has not changed");
        assert!(objects.put(stream("cam", "u1", 2, json!({"fps": "many", "nodeName": "edge-1"})), &|_| Ok(())));
        assert_eq!(generations(&objects), (vec![1], vec![2]));
        assert!(objects.put(stream("cam", "u1", 3, valid_spec(6)), &|_| Ok(())));
        assert_eq!(generations(&objects), (vec![3], vec![]));
    }

    #[test]
    fn a_recreated_object_does_not_inherit_the_content_of_its_predecessor() {
        let mut objects = ObjectSet::default();
        objects.put(stream("cam", "u1", 1, valid_spec(5)), &|_| Ok(()));
        objects.put(stream("cam", "u2", 1, json!({"fps": "many"})), &|_| Ok(()));
        assert_eq!(generations(&objects), (vec![], vec![1]));
    }

    #[test]
    fn a_panic_while_one_object_is_read_rejects_this_object() {
        fn check(rule: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
            assert_ne!(rule, "panics", "injected for a test");
            Ok(())
        }
        let with_rule = |rule: &str| {
            let mut spec = valid_spec(5);
            spec["verdict"] = rule.into();
            spec
        };
        let mut objects = ObjectSet::default();
        objects.put(stream("a", "u1", 1, with_rule("x")), &check);
        let all = ["a", "b", "c"].map(|name| {
            let rule = if name == "c" { "x" } else { "panics" };
            stream(name, if name == "a" { "u1" } else { name }, 2, with_rule(rule))
        });
        assert!(objects.replace("CameraStream", all.into(), &check));
        let state = objects.desired_state(&node("edge-1"), &BTreeMap::new(), true);
        let valid: Vec<(&str, Option<i64>)> =
            state.objects.iter().map(|object| (object.object.key().1, object.identity.generation)).collect();
        assert_eq!(valid, [("a", Some(1)), ("c", Some(2))], "the last valid content of a, and c");
        let refused: Vec<&str> = state.refused.iter().map(|refused| refused.name.as_str()).collect();
        assert_eq!(refused, ["a", "b"]);
        assert!(state.refused[0].reasons[0].contains("panicked"), "{:?}", state.refused[0].reasons);
    }

    #[test]
    fn a_full_list_removes_missing_objects_of_its_kind_only() {
        let mut objects = ObjectSet::default();
        objects.put(stream("a", "u1", 1, valid_spec(5)), &|_| Ok(()));
        objects.put(stream("b", "u2", 2, valid_spec(5)), &|_| Ok(()));
        assert!(!objects.replace("EdgeModel", Vec::new(), &|_| Ok(())));
        assert!(objects.replace(
            "CameraStream",
            vec![stream("b", "u2", 2, valid_spec(5)), stream("c", "u3", 3, valid_spec(5))],
            &|_| Ok(())
        ));
        assert_eq!(generations(&objects), (vec![2, 3], vec![]));
        assert_eq!(objects.uid("CameraStream", "c"), Some("u3"));
        assert!(objects.remove("CameraStream", "b") && !objects.remove("CameraStream", "b"));
    }

    #[test]
    fn only_objects_that_select_the_node_are_desired_and_cached() {
        let mut objects = ObjectSet::default();
        objects.put(stream("a", "u1", 1, valid_spec(5)), &|_| Ok(()));
        assert_eq!(objects.cacheable(&node("edge-1")).len(), 1);
        assert!(objects.cacheable(&node("edge-2")).is_empty());
        assert!(objects.desired_state(&node("edge-2"), &BTreeMap::new(), true).objects.is_empty());
    }
}
