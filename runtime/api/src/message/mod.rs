//! The messages of the agent on MQTT: results, events, metrics, presence and commands. All of them are JSON; the schemas in
//! `docs/schemas/` are generated from these types.
//!
//! Results, events and metrics are serialized before they are appended to the spool. Their id is assigned when they are
//! appended, and whether they are historical is known only when they are sent. Therefore both are edited in the serialized
//! text: [`with_id`] inserts the id at the front, and [`mark_historical`] changes the last field.

mod command;
mod event;
mod metrics;
mod prediction;
mod presence;
mod result;
mod topics;

use bytes::Bytes;
use schemars::{JsonSchema, Schema, schema_for};
use serde::Serialize;

pub use command::{CommandMessage, CommandOutcome, CommandState};
pub use event::{EventMessage, NodeEvent};
pub use metrics::{MetricsMessage, Series, SeriesValue};
pub use prediction::{ClassInfo, DetectionInfo, MapInfo, PredictionInfo, TensorInfo};
pub use presence::{AgentPresence, PresenceMessage, StreamHealthMessage};
pub use result::{FrameInfo, Latency, ModelInfo, ResultMessage};
pub use topics::{IncomingTopic, Topics};

/// The end of a serialized message that is not historical.
const LIVE_END: &[u8] = b"\"historical\":false}";
/// The end of a serialized message that is historical.
const HISTORICAL_END: &[u8] = b"\"historical\":true}";

/// A published result, event or metrics message: its id, its sequence number and its content.
#[derive(Debug, Serialize, JsonSchema)]
pub struct IdentifiedMessage<T> {
    /// `node:folder.epoch:number`, unique for all time. `folder` is the random id of the agent's data folder, `epoch` counts the
    /// starts with this folder. Events have `e` and metrics have `m` in front of the number. A repeated message has the same
    /// id; consumers discard repetitions. Messages that an earlier build left in the spool have no `folder.`.
    #[schemars(regex(pattern = r"^[^:]+:([a-z2-7]{8}\.)?[0-9]+:[em]?[0-9]+$"))]
    pub id: String,
    /// Sequence number within the kind of message, since the start of the agent. It increases by one with each message.
    pub seq: u64,
    /// Content of the message.
    #[serde(flatten)]
    pub content: T,
}

/// Inserts id and sequence number at the front of a serialized message.
pub fn with_id(id: &str, seq: u64, content: &[u8]) -> Bytes {
    let mut message = Vec::with_capacity(content.len() + id.len() + 40);
    message.extend_from_slice(b"{\"id\":");
    // The serialization of a string cannot fail.
    message.extend_from_slice(&serde_json::to_vec(id).unwrap_or_default());
    message.extend_from_slice(format!(",\"seq\":{seq},").as_bytes());
    message.extend_from_slice(content.get(1..).unwrap_or_default());
    message.into()
}

/// Marks a serialized message as historical. A message without that field is returned unchanged.
pub fn mark_historical(message: Bytes) -> Bytes {
    match message.strip_suffix(LIVE_END) {
        Some(front) => [front, HISTORICAL_END].concat().into(),
        None => message,
    }
}

/// The schemas of all messages, by file name in `docs/schemas/`.
pub fn schemas() -> Vec<(&'static str, Schema)> {
    let titled = |mut schema: Schema, title: &str| {
        schema.insert("title".to_owned(), title.into());
        schema
    };
    vec![
        ("result.schema.json", titled(schema_for!(IdentifiedMessage<ResultMessage<'static>>), "Lineside result")),
        ("event.schema.json", titled(schema_for!(IdentifiedMessage<EventMessage<'static>>), "Lineside event")),
        ("metrics.schema.json", titled(schema_for!(IdentifiedMessage<MetricsMessage<'static>>), "Lineside metrics")),
        ("status.schema.json", schema_for!(PresenceMessage<'static>)),
        ("health.schema.json", schema_for!(StreamHealthMessage<'static>)),
        ("command.schema.json", titled(schema_for!(CommandMessage), "Lineside command")),
        ("command-state.schema.json", titled(schema_for!(CommandState<'static>), "Lineside command state")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_schemas_match_the_types() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/schemas");
        for (name, schema) in schemas() {
            let generated = serde_json::to_string_pretty(&schema).unwrap() + "\n";
            if std::env::var_os("LINESIDE_UPDATE_GENERATED").is_some() {
                std::fs::create_dir_all(&folder).unwrap();
                std::fs::write(folder.join(name), &generated).unwrap();
            }
            let committed = std::fs::read_to_string(folder.join(name)).unwrap_or_default();
            assert!(committed == generated, "docs/schemas/{name} is stale; run `make generate`");
        }
    }

    #[test]
    fn the_id_is_inserted_at_the_front_and_historical_is_set_at_the_end() {
        let content = EventMessage {
            ts: "t".to_owned(),
            site: "s",
            node: "n",
            event: NodeEvent::StreamUp { stream: "cam".to_owned() },
            clock_synced: true,
            historical: false,
        };
        let text = serde_json::to_vec(&content).unwrap();
        let message = with_id("n\"1:2:e3", 3, &text);
        let whole = IdentifiedMessage { id: "n\"1:2:e3".to_owned(), seq: 3, content };
        assert_eq!(message, serde_json::to_vec(&whole).unwrap());
        let expected = r#"{"id":"n\"1:2:e3","seq":3,"ts":"t","site":"s","node":"n","event":"StreamUp","stream":"cam","clock_synced":true,"historical":true}"#;
        assert_eq!(mark_historical(message), expected);
        assert_eq!(mark_historical(Bytes::from_static(b"{}")), "{}");
    }
}
