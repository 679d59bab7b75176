//! Home Assistant's MQTT discovery: retained messages that describe the node's streams, so that Home Assistant shows them
//! without being configured. The topics they point to are the ordinary ones.

use serde_json::{Value, json};

use crate::connection::Message;
use lineside_api::message::Topics;
use lineside_api::state::StreamStates;

/// The entities of a stream: component, object and how it is described.
type Entity = (&'static str, &'static str, fn(&str, &Topics) -> Value);

const ENTITIES: [Entity; 3] = [
    ("sensor", "verdict", |stream, topics| {
        json!({
            "name": format!("{stream} verdict"),
            "state_topic": topics.result(stream),
            "value_template": "{{ value_json.verdict }}",
            "device_class": "enum",
            "options": ["pass", "reject", "none"],
            "icon": "mdi:check-decagram",
        })
    }),
    ("sensor", "latency", |stream, topics| {
        json!({
            "name": format!("{stream} latency"),
            "state_topic": topics.result(stream),
            "value_template": "{{ value_json.latency_ms.total }}",
            "device_class": "duration",
            "unit_of_measurement": "ms",
            "state_class": "measurement",
            "entity_category": "diagnostic",
        })
    }),
    ("binary_sensor", "up", |stream, topics| {
        json!({
            "name": format!("{stream} camera"),
            "state_topic": topics.event(Some(stream)),
            "value_template": "{{ 'ON' if value_json.event == 'StreamUp' else 'OFF' }}",
            "device_class": "connectivity",
            "entity_category": "diagnostic",
        })
    }),
];

/// The messages for what has changed from `before` to `now`: descriptions of streams that came, and empty ones, which
/// remove the old, for streams that went.
pub fn discovery(prefix: &str, node: &str, topics: &Topics, before: &StreamStates, now: &StreamStates) -> Vec<Message> {
    let safe_node = identifier(node);
    let topic = |component: &str, stream: &str, object: &str| -> std::sync::Arc<str> {
        format!("{prefix}/{component}/{safe_node}/{}_{object}/config", identifier(stream)).into()
    };
    let mut messages = Vec::new();
    for stream in before.keys().filter(|stream| !now.contains_key(*stream)) {
        messages.extend(ENTITIES.map(|(component, object, _)| Message {
            topic: topic(component, stream, object),
            payload: bytes::Bytes::new(),
            retain: true,
        }));
    }
    for stream in now.keys().filter(|stream| !before.contains_key(*stream)) {
        for (component, object, describe) in ENTITIES {
            let mut config = describe(stream, topics);
            config["unique_id"] = format!("lineside_{safe_node}_{}_{object}", identifier(stream)).into();
            config["availability"] = json!([{
                "topic": topics.status(),
                "value_template": "{{ value_json.state }}",
                "payload_available": "online",
                "payload_not_available": "offline",
            }]);
            config["device"] = json!({
                "identifiers": [format!("lineside_{safe_node}")],
                "name": format!("Lineside {node}"),
                "manufacturer": "Lineside",
                "model": "Edge inference agent",
                "sw_version": env!("CARGO_PKG_VERSION"),
            });
            config["origin"] = json!({"name": "lineside", "sw_version": env!("CARGO_PKG_VERSION")});
            let payload = config.to_string().into();
            messages.push(Message { topic: topic(component, stream, object), payload, retain: true });
        }
    }
    messages
}

/// Discovery topics take `[a-zA-Z0-9_-]` only.
fn identifier(name: &str) -> String {
    let allowed = |character: char| character.is_ascii_alphanumeric() || matches!(character, '-' | '_');
    name.chars().map(|character| if allowed(character) { character } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lineside_api::state::StreamState;

    #[test]
    fn streams_are_described_when_they_come_and_removed_when_they_go() {
        let topics = Topics::new("lineside", "plant", "edge.1");
        let now =
            StreamStates::from([("cam7".to_owned(), StreamState { model: "m".to_owned(), up: true, reason: None })]);
        let messages = discovery("homeassistant", "edge.1", &topics, &StreamStates::new(), &now);
        let names: Vec<&str> = messages.iter().map(|message| &*message.topic).collect();
        assert_eq!(
            names,
            [
                "homeassistant/sensor/edge_1/cam7_verdict/config",
                "homeassistant/sensor/edge_1/cam7_latency/config",
                "homeassistant/binary_sensor/edge_1/cam7_up/config",
            ]
        );
        let config: Value = serde_json::from_slice(&messages[0].payload).unwrap();
        assert_eq!(config["state_topic"], "lineside/v1/plant/edge.1/cam7/result");
        assert_eq!(config["device"]["identifiers"][0], "lineside_edge_1");
        assert!(messages.iter().all(|message| message.retain));
        assert!(discovery("homeassistant", "edge.1", &topics, &now, &now).is_empty());
        let gone = discovery("homeassistant", "edge.1", &topics, &now, &StreamStates::new());
        assert!(gone.len() == 3 && gone.iter().all(|message| message.payload.is_empty() && message.retain));
    }
}
