//! Keeps the current state of each stream as a retained message on the broker.
//!
//! Events wait in the spool while the broker is away, so a consumer may receive an old `StreamDown` behind a new `StreamUp`. The retained
//! message is always the newest state: all streams are published when a session starts, and each one when it changes. Where the send queue
//! has no room, the rest follows when it has.

use std::collections::BTreeMap;

use lineside_api::message::{StreamHealthMessage, Topics};
use lineside_api::state::{StreamState, StreamStates};

use crate::connection::MqttMessage;

/// What was published of each stream in this session.
#[derive(Default)]
pub(super) struct StreamHealth {
    published: BTreeMap<String, (bool, Option<String>)>,
    is_pending: bool,
}

/// The node whose streams are published.
pub(super) struct Origin<'a> {
    pub(super) topics: &'a Topics,
    pub(super) site: &'a str,
    pub(super) node: &'a str,
    pub(super) ts: String,
}

impl StreamHealth {
    /// Whether messages are left because there was no room.
    pub(super) fn is_pending(&self) -> bool {
        self.is_pending
    }

    /// Publishes what differs from the published state, as long as `publish` has room, which it states by its result. An empty retained
    /// message removes that of a stream that is gone.
    pub(super) fn update(
        &mut self,
        origin: &Origin<'_>,
        streams: &StreamStates,
        mut publish: impl FnMut(MqttMessage) -> bool,
    ) {
        self.is_pending = true;
        let topic = |stream: &str| origin.topics.health(stream).into();
        let gone: Vec<String> =
            self.published.keys().filter(|stream| !streams.contains_key(*stream)).cloned().collect();
        for stream in gone {
            if !publish(MqttMessage { topic: topic(&stream), payload: bytes::Bytes::new(), retain: true }) {
                return;
            }
            self.published.remove(&stream);
        }
        for (stream, state) in streams {
            let current = (state.up, reason(state));
            if self.published.get(stream) == Some(&current) {
                continue;
            }
            let message = StreamHealthMessage {
                up: state.up,
                reason: current.1.as_deref(),
                ts: origin.ts.clone(),
                site: origin.site,
                node: origin.node,
                stream,
            };
            // A message of texts and a boolean is always valid JSON.
            let payload = serde_json::to_vec(&message).unwrap_or_default().into();
            if !publish(MqttMessage { topic: topic(stream), payload, retain: true }) {
                return;
            }
            self.published.insert(stream.clone(), current);
        }
        self.is_pending = false;
    }
}

fn reason(state: &StreamState) -> Option<String> {
    state.reason.clone().filter(|_| !state.up)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn state(up: bool, reason: Option<&str>) -> StreamState {
        StreamState { model: "m".to_owned(), up, reason: reason.map(str::to_owned), rule_failure: None }
    }

    /// The messages of an update with room for so many.
    fn update(health: &mut StreamHealth, streams: &StreamStates, room: usize) -> Vec<(String, Value)> {
        let topics = Topics::new("p", "s", "n");
        let origin = Origin { topics: &topics, site: "s", node: "n", ts: "t".to_owned() };
        let mut messages = Vec::new();
        health.update(&origin, streams, |message| {
            assert!(message.retain);
            if messages.len() == room {
                return false;
            }
            messages.push((message.topic.to_string(), serde_json::from_slice(&message.payload).unwrap_or_default()));
            true
        });
        messages
    }

    #[test]
    fn all_streams_are_published_at_first_and_then_what_changes() {
        let mut health = StreamHealth::default();
        let mut streams = StreamStates::from([
            ("a".to_owned(), state(true, Some("old"))),
            ("b".to_owned(), state(false, Some("refused"))),
        ]);
        let first = update(&mut health, &streams, 9);
        assert_eq!(
            first.iter().map(|(topic, _)| topic.as_str()).collect::<Vec<_>>(),
            ["p/v1/s/n/a/health", "p/v1/s/n/b/health"]
        );
        assert_eq!((&first[0].1["up"], first[0].1.get("reason")), (&Value::Bool(true), None));
        assert_eq!(first[1].1["reason"], "refused");
        assert!(update(&mut health, &streams, 9).is_empty());
        streams.insert("a".to_owned(), state(false, None));
        streams.remove("b");
        let second = update(&mut health, &streams, 9);
        assert_eq!(
            second.iter().map(|(_, payload)| payload["up"].clone()).collect::<Vec<_>>(),
            [Value::Null, Value::Bool(false)]
        );
    }

    #[test]
    fn what_has_no_room_follows() {
        let mut health = StreamHealth::default();
        let streams: StreamStates = (0..5).map(|number| (format!("cam-{number}"), state(true, None))).collect();
        let mut sent = Vec::new();
        for room in [2, 0, 2, 9] {
            sent.extend(update(&mut health, &streams, room));
            assert_eq!(health.is_pending(), sent.len() < 5);
        }
        assert_eq!(sent.len(), 5, "none twice");
    }
}
