//! Kubernetes Events about objects.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType};
use parking_lot::Mutex;

use crate::crds;
use crate::resource::ResourceKind;
use lineside_api::condition::Reason;

/// The longest note that the API server accepts, in bytes.
const NOTE_BYTES_MAX: usize = 1024;
/// The most objects and reasons whose last note is remembered.
const NOTES_MAX: usize = 1024;

/// An Event about an object.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterEvent {
    /// Whether the Event is of type `Warning`; otherwise it is `Normal`.
    pub is_warning: bool,
    /// The Event's reason.
    pub reason: Reason,
    /// Details for people; truncated to 1024 bytes.
    pub note: String,
    /// The kind of the object that the Event is about.
    pub kind: ResourceKind,
    /// The name of that object.
    pub name: String,
    /// The uid of that object; `kubectl describe` lists only Events with it.
    pub uid: Option<String>,
}

impl ClusterEvent {
    pub(crate) fn event(&self) -> Event {
        Event {
            type_: if self.is_warning { EventType::Warning } else { EventType::Normal },
            reason: self.reason.to_string(),
            note: Some(truncated_to_bytes(&self.note, NOTE_BYTES_MAX).to_owned()),
            action: "Observe".to_owned(),
            secondary: None,
        }
    }

    pub(crate) fn object_reference(&self, namespace: &str) -> ObjectReference {
        ObjectReference {
            api_version: Some(crds::api_version()),
            kind: Some(self.kind.name().to_owned()),
            name: Some(self.name.clone()),
            namespace: Some(namespace.to_owned()),
            uid: self.uid.clone(),
            ..ObjectReference::default()
        }
    }
}

/// The last note of each object and reason.
///
/// A recorder of `kube` recognises a repeated Event by its object and reason alone, and keeps the first note. An Event
/// with another note has to be published with a new recorder, which has no memory.
#[derive(Default)]
pub(crate) struct LastNotes(Mutex<HashMap<(ResourceKind, String, Reason), String>>);

impl LastNotes {
    /// Remembers the Event's note. `true` when the last note for the same object and reason was another one.
    pub(crate) fn is_changed(&self, event: &ClusterEvent) -> bool {
        let mut notes = self.0.lock();
        if notes.len() > NOTES_MAX {
            notes.clear();
        }
        let key = (event.kind, event.name.clone(), event.reason.clone());
        notes.insert(key, event.note.clone()).is_some_and(|last| last != event.note)
    }
}

/// The longest prefix of whole characters that has at most `bytes_max` bytes.
pub(crate) fn truncated_to_bytes(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(note: &str) -> ClusterEvent {
        ClusterEvent {
            is_warning: true,
            reason: Reason::StreamDown,
            note: note.to_owned(),
            kind: ResourceKind::CameraStream,
            name: "cam7".to_owned(),
            uid: None,
        }
    }

    #[test]
    fn another_note_for_the_same_object_and_reason_is_a_change() {
        let notes = LastNotes::default();
        assert!(!notes.is_changed(&event("refused")) && !notes.is_changed(&event("refused")));
        assert!(notes.is_changed(&event("timeout")) && !notes.is_changed(&event("timeout")));
        let other = ClusterEvent { name: "cam8".to_owned(), ..event("refused") };
        assert!(!notes.is_changed(&other));
    }

    #[test]
    fn notes_are_truncated_between_characters() {
        assert_eq!((truncated_to_bytes("aé", 2), truncated_to_bytes("aé", 3)), ("a", "aé"));
        assert_eq!(truncated_to_bytes("", 5), "");
        assert_eq!(event(&"é".repeat(600)).event().note.unwrap().len(), 1024);
    }
}
