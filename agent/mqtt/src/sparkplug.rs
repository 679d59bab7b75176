//! Sparkplug B 3.0: the node is an edge node, each stream a device.
//!
//! ```text
//!   connect, Will = NDEATH(bdSeq)
//!      |  primary host online, or none configured
//!      v
//!   NBIRTH seq 0 --> DBIRTH of each stream --> DDATA, NDATA ... --> NDEATH before an orderly disconnect
//!                        ^       |  stream removed: DDEATH
//!                        +-------+  Rebirth: all births again
//! ```
//!
//! The specification requires QoS 0 for births and data, so the broker does not acknowledge them. Therefore the publisher sends a
//! small fence message with QoS 1 after them. MQTT keeps the order within a connection: when the fence is acknowledged, the
//! broker has received the messages before it, and only then the spool deletes their records.
//!
//! A result is published as metrics of its device, and as a whole in `Result/Json`. A historical record carries the flag
//! `is_historical` and the time it was made.

mod wire {
    #![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated from sparkplug_b.proto")]
    include!("sparkplug_b.rs");
}

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost::Message as _;
use serde_json::Value;
use wire::Payload;
use wire::payload::Metric;
use wire::payload::metric::Value as MetricValue;

use crate::connection::MqttMessage;
use lineside_api::state::StreamStates;
use lineside_spool::{Record, RecordKind};

const NAMESPACE: &str = "spBv1.0";
const REBIRTH: &str = "Node Control/Rebirth";
const BD_SEQ: &str = "bdSeq";

/// The Sparkplug data types in use, with their numbers (section 6.4.16).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum DataType {
    Int64 = 4,
    UInt64 = 8,
    Double = 10,
    Boolean = 11,
    String = 12,
}

/// The metrics of a device, in the order of their aliases.
const DEVICE_METRICS: [(&str, DataType); 12] = [
    ("Stream/Up", DataType::Boolean),
    ("Stream/Model", DataType::String),
    ("Result/Id", DataType::String),
    ("Result/Seq", DataType::UInt64),
    ("Result/Verdict", DataType::String),
    ("Result/Model", DataType::String),
    ("Result/Model Version", DataType::UInt64),
    ("Result/Label", DataType::String),
    ("Result/Score", DataType::Double),
    ("Result/Count", DataType::UInt64),
    ("Result/Frame", DataType::String),
    ("Result/Json", DataType::String),
];
/// The metrics of the node in the order of their aliases, which start at 1. `bdSeq` and Rebirth have none.
const NODE_METRICS: [(&str, DataType); 4] = [
    ("Agent/Version", DataType::String),
    ("Agent/Site", DataType::String),
    ("Event/Json", DataType::String),
    ("Metrics/Json", DataType::String),
];
/// The aliases of `Event/Json` and `Metrics/Json` in [`NODE_METRICS`].
const EVENT_ALIAS: u64 = 3;
const METRICS_ALIAS: u64 = 4;

/// What a received message means for the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostSignal {
    /// A host requests all births again.
    Rebirth,
    /// The primary host is online.
    HostOnline,
    /// The primary host is offline.
    HostOffline,
    /// The message needs no action.
    Ignored,
}

/// The births, deaths and sequence numbers of one MQTT session.
pub struct SparkplugSession {
    group: String,
    node: String,
    site: String,
    host: Option<String>,
    bd_seq: u8,
    seq: u8,
    /// The highest timestamp of the host's STATE messages. Older messages are ignored.
    host_timestamp_ms: u64,
    is_host_online: bool,
    is_born: bool,
    /// The devices that had a birth in this session, by stream.
    devices: BTreeMap<String, Device>,
    next_alias: u64,
}

struct Device {
    /// The alias of its first metric; the others follow in the order of [`DEVICE_METRICS`].
    first_alias: u64,
    is_alive: bool,
    up: bool,
    model: String,
}

impl SparkplugSession {
    /// A session without births. `host` is the primary host; without one it counts as online.
    pub fn new(group: &str, node: &str, site: &str, host: Option<&str>, bd_seq: u8) -> Self {
        Self {
            group: group.to_owned(),
            node: node.to_owned(),
            site: site.to_owned(),
            host: host.map(str::to_owned),
            bd_seq,
            seq: 0,
            host_timestamp_ms: 0,
            is_host_online: host.is_none(),
            is_born: false,
            devices: BTreeMap::new(),
            next_alias: 1 + NODE_METRICS.len() as u64,
        }
    }

    /// NDEATH, which is the Will and is also published before an orderly disconnect.
    pub fn death(&self) -> MqttMessage {
        let metrics = vec![metric(BD_SEQ, DataType::Int64, Some(MetricValue::LongValue(self.bd_seq.into())))];
        let payload = Payload { timestamp: Some(now_ms()), metrics, seq: None };
        self.message("NDEATH", None, &payload)
    }

    /// The topic filters to subscribe to.
    pub fn filters(&self) -> Vec<String> {
        let mut filters = vec![
            format!("{NAMESPACE}/{}/NCMD/{}", self.group, self.node),
            format!("{NAMESPACE}/{}/DCMD/{}/+", self.group, self.node),
        ];
        filters.extend(self.host.as_ref().map(|host| format!("{NAMESPACE}/STATE/{host}")));
        filters
    }

    /// Whether NBIRTH was published. Data may only follow after it.
    pub fn is_born(&self) -> bool {
        self.is_born
    }

    /// Whether the primary host is online, so that births may be published.
    pub fn is_host_online(&self) -> bool {
        self.is_host_online
    }

    /// Handles a received message: a state of the primary host, or a node command.
    pub fn handle_message(&mut self, message: &MqttMessage) -> HostSignal {
        let state = self.host.as_ref().map(|host| format!("{NAMESPACE}/STATE/{host}"));
        if state.as_deref() == Some(&*message.topic) {
            return self.handle_state(&message.payload);
        }
        if *message.topic != format!("{NAMESPACE}/{}/NCMD/{}", self.group, self.node) {
            return HostSignal::Ignored;
        }
        let Ok(payload) = Payload::decode(message.payload.clone()) else { return HostSignal::Ignored };
        let is_rebirth = |metric: &Metric| {
            metric.name.as_deref() == Some(REBIRTH) && metric.value == Some(MetricValue::BooleanValue(true))
        };
        if payload.metrics.iter().any(is_rebirth) { HostSignal::Rebirth } else { HostSignal::Ignored }
    }

    fn handle_state(&mut self, payload: &[u8]) -> HostSignal {
        let Ok(state) = serde_json::from_slice::<Value>(payload) else { return HostSignal::Ignored };
        let (Some(online), Some(timestamp_ms)) = (state["online"].as_bool(), state["timestamp"].as_u64()) else {
            return HostSignal::Ignored;
        };
        // The Will of an earlier session of the host may arrive late. Its timestamp shows that it is outdated.
        if timestamp_ms < self.host_timestamp_ms || online == self.is_host_online {
            self.host_timestamp_ms = self.host_timestamp_ms.max(timestamp_ms);
            return HostSignal::Ignored;
        }
        (self.host_timestamp_ms, self.is_host_online) = (timestamp_ms, online);
        if online { HostSignal::HostOnline } else { HostSignal::HostOffline }
    }

    /// NBIRTH, and DBIRTH of every stream. The sequence number restarts at 0.
    pub fn births(&mut self, streams: &StreamStates) -> Vec<MqttMessage> {
        self.seq = 0;
        self.is_born = true;
        self.devices.values_mut().for_each(|device| device.is_alive = false);
        let now = now_ms();
        let mut metrics = vec![
            metric(BD_SEQ, DataType::Int64, Some(MetricValue::LongValue(self.bd_seq.into()))),
            metric(REBIRTH, DataType::Boolean, Some(MetricValue::BooleanValue(false))),
        ];
        let values = [Some(env!("CARGO_PKG_VERSION").to_owned()), Some(self.site.clone()), None, None];
        for (alias, ((name, kind), value)) in (1..).zip(NODE_METRICS.into_iter().zip(values)) {
            metrics.push(Metric { alias: Some(alias), ..metric(name, kind, value.map(MetricValue::StringValue)) });
        }
        metrics.iter_mut().for_each(|metric| metric.timestamp = Some(now));
        let birth = self.numbered("NBIRTH", None, now, metrics);
        let mut messages = vec![birth];
        messages.extend(self.update_devices(streams));
        messages
    }

    /// The difference to the streams of the last call: births of new devices, deaths of removed ones, and changed values. Empty
    /// before NBIRTH.
    pub fn update_devices(&mut self, streams: &StreamStates) -> Vec<MqttMessage> {
        if !self.is_born {
            return Vec::new();
        }
        let mut messages = Vec::new();
        let removed: Vec<String> = self
            .devices
            .iter()
            .filter(|(name, device)| device.is_alive && !streams.contains_key(*name))
            .map(|(name, _)| name.clone())
            .collect();
        for name in removed {
            if let Some(device) = self.devices.get_mut(&name) {
                device.is_alive = false;
            }
            messages.push(self.numbered("DDEATH", Some(&name), now_ms(), Vec::new()));
        }
        for (name, stream) in streams {
            match self.devices.get_mut(name).filter(|device| device.is_alive) {
                Some(device) if (device.up, &device.model) == (stream.up, &stream.model) => {}
                Some(device) => {
                    (device.up, device.model) = (stream.up, stream.model.clone());
                    let values = [
                        ("Stream/Up", MetricValue::BooleanValue(stream.up)),
                        ("Stream/Model", MetricValue::StringValue(stream.model.clone())),
                    ];
                    messages.push(self.device_data(name, values.into(), now_ms(), false));
                }
                None => messages.push(self.device_birth(name, stream.up, &stream.model)),
            }
        }
        messages
    }

    /// A record as data, preceded by DBIRTH when its device has no birth yet.
    pub fn data(&mut self, record: &Record, historical: bool) -> Vec<MqttMessage> {
        let json: Value = serde_json::from_slice(&record.payload).unwrap_or_default();
        let timestamp_ms =
            json["ts"].as_str().and_then(|text| humantime::parse_rfc3339(text).ok()).map_or_else(now_ms, unix_ms);
        let text = String::from_utf8_lossy(&record.payload).into_owned();
        let stream = json["stream"].as_str().unwrap_or_default().to_owned();
        let node_alias = match record.id.kind {
            RecordKind::Result => None,
            RecordKind::Event => Some(EVENT_ALIAS),
            RecordKind::Metrics => Some(METRICS_ALIAS),
        };
        if let Some(alias) = node_alias {
            let value = Some(MetricValue::StringValue(text));
            let metric = Metric { alias: Some(alias), ..typed(DataType::String, value) };
            let metric = Metric { timestamp: Some(timestamp_ms), is_historical: historical.then_some(true), ..metric };
            return vec![self.numbered("NDATA", None, now_ms(), vec![metric])];
        }
        let mut messages = Vec::new();
        if !self.devices.get(&stream).is_some_and(|device| device.is_alive) {
            messages.push(self.device_birth(&stream, false, ""));
        }
        messages.push(self.device_data(&stream, result_values(&json, text), timestamp_ms, historical));
        messages
    }

    fn device_birth(&mut self, name: &str, up: bool, model: &str) -> MqttMessage {
        let next_alias = &mut self.next_alias;
        let device = self.devices.entry(name.to_owned()).or_insert_with(|| {
            let first_alias = *next_alias;
            *next_alias += DEVICE_METRICS.len() as u64;
            Device { first_alias, is_alive: true, up, model: model.to_owned() }
        });
        (device.is_alive, device.up, device.model) = (true, up, model.to_owned());
        let now = now_ms();
        let metrics = (device.first_alias..).zip(DEVICE_METRICS).map(|(alias, (name, kind))| {
            let value = match name {
                "Stream/Up" => Some(MetricValue::BooleanValue(up)),
                "Stream/Model" => Some(MetricValue::StringValue(model.to_owned())),
                _ => None,
            };
            Metric { alias: Some(alias), timestamp: Some(now), ..metric(name, kind, value) }
        });
        let metrics = metrics.collect();
        self.numbered("DBIRTH", Some(name), now, metrics)
    }

    fn device_data(
        &mut self,
        name: &str,
        values: BTreeMap<&'static str, MetricValue>,
        timestamp_ms: u64,
        historical: bool,
    ) -> MqttMessage {
        let first_alias = self.devices.get(name).map_or(0, |device| device.first_alias);
        let metrics = (first_alias..).zip(DEVICE_METRICS).filter_map(|(alias, (name, kind))| {
            let value = values.get(name)?.clone();
            Some(Metric {
                alias: Some(alias),
                timestamp: Some(timestamp_ms),
                is_historical: historical.then_some(true),
                ..typed(kind, Some(value))
            })
        });
        let metrics = metrics.collect();
        self.numbered("DDATA", Some(name), now_ms(), metrics)
    }

    /// A message with the next sequence number.
    fn numbered(&mut self, kind: &str, device: Option<&str>, timestamp: u64, metrics: Vec<Metric>) -> MqttMessage {
        let payload = Payload { timestamp: Some(timestamp), metrics, seq: Some(self.seq.into()) };
        self.seq = self.seq.wrapping_add(1);
        self.message(kind, device, &payload)
    }

    fn message(&self, kind: &str, device: Option<&str>, payload: &Payload) -> MqttMessage {
        let topic = format!("{NAMESPACE}/{}/{kind}/{}", self.group, self.node);
        let topic = match device {
            Some(device) => format!("{topic}/{device}"),
            None => topic,
        };
        MqttMessage { topic: topic.into(), payload: payload.encode_to_vec().into(), retain: false }
    }
}

/// The values of a result by metric of its device. Metrics without a value in the result are left out and keep their last value.
fn result_values(json: &Value, text: String) -> BTreeMap<&'static str, MetricValue> {
    let string = |pointer: &str| json.pointer(pointer)?.as_str().map(|text| MetricValue::StringValue(text.to_owned()));
    let number = |pointer: &str| json.pointer(pointer)?.as_u64().map(MetricValue::LongValue);
    let list = if json["detections"].is_array() { "/detections" } else { "/classes" };
    let score = json.pointer(&format!("{list}/0/score")).or_else(|| json.get("score"));
    let count = json["detections"].as_array().map(|detections| MetricValue::LongValue(detections.len() as u64));
    let values = [
        ("Result/Id", string("/id")),
        ("Result/Seq", number("/seq")),
        ("Result/Verdict", string("/verdict")),
        ("Result/Model", string("/model/name")),
        ("Result/Model Version", number("/model/version")),
        ("Result/Label", string(&format!("{list}/0/label"))),
        ("Result/Score", score.and_then(Value::as_f64).map(MetricValue::DoubleValue)),
        ("Result/Count", count),
        ("Result/Frame", string("/frame/name")),
        ("Result/Json", Some(MetricValue::StringValue(text))),
    ];
    values.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

fn metric(name: &str, kind: DataType, value: Option<MetricValue>) -> Metric {
    Metric { name: Some(name.to_owned()), ..typed(kind, value) }
}

fn typed(kind: DataType, value: Option<MetricValue>) -> Metric {
    Metric { datatype: Some(kind as u32), is_null: value.is_none().then_some(true), value, ..Metric::default() }
}

fn unix_ms(time: SystemTime) -> u64 {
    u64::try_from(time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_millis()).unwrap_or(u64::MAX)
}

fn now_ms() -> u64 {
    unix_ms(SystemTime::now())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use lineside_api::state::StreamState;
    use lineside_spool::RecordId;

    fn streams(names: &[(&str, bool)]) -> StreamStates {
        names
            .iter()
            .map(|(name, up)| {
                ((*name).to_owned(), StreamState { model: "m".to_owned(), up: *up, reason: None, rule_failure: None })
            })
            .collect()
    }

    fn topics_and_seqs(messages: &[MqttMessage]) -> Vec<(String, u64)> {
        let payload = |message: &MqttMessage| Payload::decode(message.payload.clone()).unwrap();
        messages
            .iter()
            .map(|message| {
                (message.topic.split('/').skip(2).collect::<Vec<_>>().join("/"), payload(message).seq.unwrap())
            })
            .collect()
    }

    #[test]
    fn births_precede_data_and_sequence_numbers_wrap() {
        let mut session = SparkplugSession::new("g", "n", "s", None, 7);
        assert!(session.update_devices(&streams(&[("a", true)])).is_empty(), "there are no devices before NBIRTH");
        let births = session.births(&streams(&[("a", true), ("b", false)]));
        assert_eq!(
            topics_and_seqs(&births),
            [("NBIRTH/n".into(), 0), ("DBIRTH/n/a".into(), 1), ("DBIRTH/n/b".into(), 2)]
        );
        assert!(session.update_devices(&streams(&[("a", true), ("b", false)])).is_empty());
        assert_eq!(
            topics_and_seqs(&session.update_devices(&streams(&[("b", true)]))),
            [("DDEATH/n/a".into(), 3), ("DDATA/n/b".into(), 4)]
        );
        let record = Record {
            id: RecordId { kind: RecordKind::Result, position: 1 },
            topic: "t".into(),
            payload: Bytes::from_static(
                br#"{"id":"n:1:1","seq":1,"ts":"2026-11-23T18:35:56.123Z","stream":"a","verdict":"pass"}"#,
            ),
            created_ms: 0,
            ttl_seconds: 0,
        };
        let data = session.data(&record, true);
        assert_eq!(
            topics_and_seqs(&data),
            [("DBIRTH/n/a".into(), 5), ("DDATA/n/a".into(), 6)],
            "DBIRTH precedes the data"
        );
        let payload = Payload::decode(data[1].payload.clone()).unwrap();
        assert!(payload.metrics.iter().all(|metric| metric.is_historical == Some(true) && metric.name.is_none()));
        assert!(payload.metrics.iter().all(|metric| metric.timestamp == Some(1_795_458_956_123)));
        for expected in 7..=255u64 {
            assert_eq!(topics_and_seqs(&session.data(&record, false)).last().unwrap().1, expected);
        }
        assert_eq!(topics_and_seqs(&session.data(&record, false)).last().unwrap().1, 0, "0 follows 255");
    }

    #[test]
    fn outdated_host_states_are_ignored_and_rebirth_is_recognized() {
        let mut session = SparkplugSession::new("g", "n", "s", Some("scada"), 0);
        assert!(!session.is_host_online());
        let state = |online: bool, timestamp: u64| MqttMessage {
            topic: "spBv1.0/STATE/scada".into(),
            payload: format!("{{\"online\":{online},\"timestamp\":{timestamp}}}").into(),
            retain: true,
        };
        assert_eq!(session.handle_message(&state(true, 100)), HostSignal::HostOnline);
        assert_eq!(session.handle_message(&state(false, 50)), HostSignal::Ignored, "an outdated Will");
        assert!(session.is_host_online());
        assert_eq!(session.handle_message(&state(false, 100)), HostSignal::HostOffline);
        for invalid in ["", "{}", "[1]", "{\"online\":1,\"timestamp\":-5}", "\u{0}"] {
            let message = MqttMessage { payload: invalid.into(), ..state(true, 0) };
            assert_eq!(session.handle_message(&message), HostSignal::Ignored);
        }
        let metrics = vec![metric(REBIRTH, DataType::Boolean, Some(MetricValue::BooleanValue(true)))];
        let payload = Payload { timestamp: None, metrics, seq: None }.encode_to_vec();
        let command = MqttMessage { topic: "spBv1.0/g/NCMD/n".into(), payload: payload.into(), retain: false };
        assert_eq!(session.handle_message(&command), HostSignal::Rebirth);
        assert_eq!(
            session.handle_message(&MqttMessage { payload: vec![0xFF; 9].into(), ..command }),
            HostSignal::Ignored
        );
    }

    #[test]
    fn the_generated_code_matches_the_proto_file() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let out = tempfile::tempdir().unwrap();
        let descriptors = protox::compile([folder.join("sparkplug_b.proto")], [&folder]).unwrap();
        prost_build::Config::new().out_dir(out.path()).compile_fds(descriptors).unwrap();
        let generated = std::fs::read_to_string(out.path().join("sparkplug_b.rs")).unwrap();
        let path = folder.join("sparkplug_b.rs");
        if std::env::var_os("LINESIDE_UPDATE_GENERATED").is_some() {
            std::fs::write(&path, &generated).unwrap();
        }
        assert!(std::fs::read_to_string(path).unwrap() == generated, "sparkplug_b.rs is stale; run `make generate`");
    }
}
