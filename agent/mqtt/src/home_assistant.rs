//! Home Assistant MQTT discovery: retained messages that describe the node's streams, so that Home Assistant shows them without
//! any configuration. They refer to the topics of the JSON encoding.

use serde_json::{Value, json};

use crate::connection::MqttMessage;
use lineside_api::message::Topics;
use lineside_api::state::StreamStates;

/// An entity of a stream: the Home Assistant component, the object id, and its configuration.
type Entity = (&'static str, &'static str, fn(&str, &Topics) -> Value);

const ENTITIES: [Entity; 3] = [
    ("sensor", "verdict", |stream, topics| {
        json!({
            "name": format!("{stream} verdict"),
            "state_topic": topics.result(stream),
            "value_template": "{{ this.state if value_json.historical else value_json.verdict }}",
            "device_class": "enum",
            "options": ["pass", "reject", "none"],
            "icon": "mdi:check-decagram",
        })
    }),
    ("sensor", "latency", |stream, topics| {
        json!({
            "name": format!("{stream} latency"),
            "state_topic": topics.result(stream),
            "value_template": "{{ this.state if value_json.historical else value_json.latency_ms.total }}",
            "device_class": "duration",
            "unit_of_measurement": "ms",
            "state_class": "measurement",
            "entity_category": "diagnostic",
        })
    }),
    ("binary_sensor", "up", |stream, topics| {
        json!({
            "name": format!("{stream} camera"),
            "state_topic": topics.health(stream),
            "value_template": "{{ 'ON' if value_json.up else 'OFF' }}",
            "device_class": "connectivity",
            "entity_category": "diagnostic",
        })
    }),
];

/// The messages for the difference between the `announced` streams and the `current` ones: a configuration for every new stream,
/// and an empty message, which deletes the configuration, for every stream that was removed.
pub fn discovery(
    prefix: &str,
    node: &str,
    topics: &Topics,
    announced: &StreamStates,
    current: &StreamStates,
) -> Vec<MqttMessage> {
    let safe_node = identifier(node);
    let topic = |component: &str, stream: &str, object: &str| -> std::sync::Arc<str> {
        format!("{prefix}/{component}/{safe_node}/{}_{object}/config", identifier(stream)).into()
    };
    let mut messages = Vec::new();
    for stream in announced.keys().filter(|stream| !current.contains_key(*stream)) {
        messages.extend(ENTITIES.map(|(component, object, _)| MqttMessage {
            topic: topic(component, stream, object),
            payload: bytes::Bytes::new(),
            retain: true,
        }));
    }
    for stream in current.keys().filter(|stream| !announced.contains_key(*stream)) {
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
            messages.push(MqttMessage { topic: topic(component, stream, object), payload, retain: true });
        }
    }
    messages
}

/// A name in the characters that discovery topics allow: `[a-zA-Z0-9_-]`. Others are replaced by `_`.
fn identifier(name: &str) -> String {
    let allowed = |character: char| character.is_ascii_alphanumeric() || matches!(character, '-' | '_');
    name.chars().map(|character| if allowed(character) { character } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lineside_api::state::StreamState;

    #[test]
    fn added_streams_are_announced_and_removed_streams_deleted() {
        let topics = Topics::new("lineside", "plant", "edge.1");
        let now = StreamStates::from([(
            "cam7".to_owned(),
            StreamState { model: "m".to_owned(), up: true, reason: None, rule_failure: None },
        )]);
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
