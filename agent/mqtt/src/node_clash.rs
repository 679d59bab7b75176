//! Detects a second agent with the same site and node name on the broker.
//!
//! Both agents use the same client id, so the broker closes the connection of the one when the other connects, and neither
//! publishes for long. Every agent publishes its presence, with the id of its data folder, on the status topic of the node, and
//! the agent subscribes to that topic before it publishes there. A presence with another folder id is a sighting of a second
//! agent, unless it announces the end of one. One sighting proves nothing: the node's data folder may have been replaced, and the
//! retained message is of the former one. Two different sightings within ten minutes are a clash.

use std::time::{Duration, SystemTime};

use serde_json::Value;
use tokio::sync::watch;
use tokio::time::Instant;

/// Time between sightings of one clash, and time without a sighting after which a clash has ended.
const WINDOW: Duration = Duration::from_secs(600);
/// Maximum size of a presence message in bytes.
const BYTES_MAX: usize = 4096;
/// Maximum length of a folder id.
const FOLDER_CHARS_MAX: usize = 32;

/// Another agent uses the node's name on the same broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeClash {
    /// The id of the other agent's data folder.
    pub folder: String,
    /// When the clash was detected.
    pub since: SystemTime,
}

/// The last sighting of another agent.
struct Sighting {
    folder: String,
    ts: String,
    at: Instant,
}

/// Observes the presence messages of the node.
pub(crate) struct ClashDetector {
    own_folder: String,
    last: Option<Sighting>,
    clash: watch::Sender<Option<NodeClash>>,
}

impl ClashDetector {
    /// A detector for the agent with this data folder. It publishes to `clash`.
    pub(crate) fn new(own_folder: &str, clash: watch::Sender<Option<NodeClash>>) -> Self {
        Self { own_folder: own_folder.to_owned(), last: None, clash }
    }

    /// Handles a message on the status topic. Ignores what is not a presence message.
    pub(crate) fn observe(&mut self, payload: &[u8], is_retained: bool, now: Instant) {
        if payload.len() > BYTES_MAX {
            return;
        }
        let presence: Value = serde_json::from_slice(payload).unwrap_or_default();
        let field = |name: &str| presence[name].as_str();
        let (Some(state), Some(ts), Some(folder)) = (field("state"), field("ts"), field("folder")) else { return };
        let is_folder_id = folder.len() <= FOLDER_CHARS_MAX
            && folder.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        // A retained `offline` is also a sighting: the broker publishes the Will of an agent whose connection this one has taken.
        let is_sighting = is_folder_id && folder != self.own_folder && (is_retained || state == "online");
        if !is_sighting {
            return;
        }
        let is_new = |last: &Sighting| (last.folder.as_str(), last.ts.as_str()) != (folder, ts);
        let is_clash = self.last.as_ref().is_some_and(|last| is_new(last) && now - last.at < WINDOW);
        if self.last.as_ref().is_none_or(is_new) {
            self.last = Some(Sighting { folder: folder.to_owned(), ts: ts.to_owned(), at: now });
        }
        if is_clash && self.clash.borrow().is_none() {
            tracing::error!(
                event = "node_name_clash",
                other_folder_id = folder,
                "Another agent uses the same site and node name on the broker; each disconnects the other. Rename one of them"
            );
            self.clash.send_replace(Some(NodeClash { folder: folder.to_owned(), since: SystemTime::now() }));
        }
    }

    /// Ends a clash that was not observed for ten minutes.
    pub(crate) fn expire(&mut self, now: Instant) {
        if self.clash.borrow().is_some() && self.last.as_ref().is_none_or(|last| now - last.at >= WINDOW) {
            tracing::info!(event = "node_name_clash_ended", "No other agent uses the node's name any more");
            self.clash.send_replace(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn presence(state: &str, folder: &str, ts: &str) -> Vec<u8> {
        serde_json::to_vec(&serde_json::json!({"state": state, "ts": ts, "folder": folder, "epoch": 1})).unwrap()
    }

    fn detector() -> (ClashDetector, watch::Receiver<Option<NodeClash>>) {
        let (sender, receiver) = watch::channel(None);
        (ClashDetector::new("aaaaaaaa", sender), receiver)
    }

    #[test]
    fn agents_that_take_the_connection_from_each_other_are_a_clash_until_one_is_gone() {
        let (mut detector, clash) = detector();
        let start = Instant::now();
        // Each session begins with the Will of the other agent.
        detector.observe(&presence("offline", "bbbbbbbb", "t1"), true, start);
        assert_eq!(*clash.borrow(), None);
        detector.observe(&presence("online", "aaaaaaaa", "t2"), false, start);
        detector.observe(&presence("offline", "bbbbbbbb", "t3"), true, start + Duration::from_secs(20));
        assert_eq!(clash.borrow().as_ref().map(|clash| clash.folder.clone()).as_deref(), Some("bbbbbbbb"));
        detector.expire(start + Duration::from_secs(619));
        assert!(clash.borrow().is_some());
        detector.expire(start + Duration::from_secs(620));
        assert_eq!(*clash.borrow(), None);
    }

    #[test]
    fn a_replaced_data_folder_and_an_overlapping_pod_are_no_clash() {
        let (mut detector, clash) = detector();
        let now = Instant::now();
        // The retained message of the former folder, also when it is delivered again.
        detector.observe(&presence("online", "bbbbbbbb", "t1"), true, now);
        detector.observe(&presence("online", "bbbbbbbb", "t1"), true, now);
        // The former pod ends.
        detector.observe(&presence("offline", "bbbbbbbb", "t2"), false, now);
        assert_eq!(*clash.borrow(), None);
        // Hours later the folder is replaced again.
        detector.observe(&presence("online", "cccccccc", "t3"), true, now + WINDOW);
        assert_eq!(*clash.borrow(), None);
    }

    #[test]
    fn other_messages_are_ignored() {
        let (mut detector, clash) = detector();
        let now = Instant::now();
        let long = presence("online", &"b".repeat(5000), "t");
        let earlier_build = br#"{"state":"online","ts":"t","epoch":1}"#.to_vec();
        for payload in [Vec::new(), b"online".to_vec(), earlier_build, long, presence("online", "../\n", "t")] {
            (0..3).for_each(|_| detector.observe(&payload, true, now));
            assert!(detector.last.is_none());
        }
        assert_eq!(*clash.borrow(), None);
    }
}
