//! SparkplugConfig B 3.0: the node as an edge node, each stream as a device.
//!
//! ```text
//!   connect, Will = NDEATH(bdSeq)
//!      |  primary host online, or none configured
//!      v
//!   NBIRTH seq 0 --> DBIRTH of each stream --> DDATA, NDATA ... --> NDEATH before a deliberate disconnect
//!                        ^       |  stream gone: DDEATH
//!                        +-------+  Rebirth: all births once more
//! ```
//!
//! Births and data go out with QoS 0, as the specification wants it, so nobody acknowledges them. Therefore the publisher
//! sends a small message with QoS 1 behind them; MQTT keeps the order within a connection, so when that one is acknowledged
//! the broker has them all, and only then the spool forgets.
//!
//! Every result comes as metrics of its device, and whole as `Result/Json`. What was made before the connection is marked
//! historical and bears the time it was made.

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

use crate::connection::Message;
use lineside_api::state::StreamStates;
use lineside_spool::{Record, RecordKind};

const NAMESPACE: &str = "spBv1.0";
const REBIRTH: &str = "Node Control/Rebirth";
const BD_SEQ: &str = "bdSeq";

/// SparkplugConfig's numbers of the types in use (section 6.4.16).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Type {
    Int64 = 4,
    UInt64 = 8,
    Double = 10,
    Boolean = 11,
    String = 12,
}

/// The metrics of a device: name and type.
const DEVICE: [(&str, Type); 12] = [
    ("Stream/Up", Type::Boolean),
    ("Stream/Model", Type::String),
    ("Result/Id", Type::String),
    ("Result/Seq", Type::UInt64),
    ("Result/Verdict", Type::String),
    ("Result/Model", Type::String),
    ("Result/Model Version", Type::UInt64),
    ("Result/Label", Type::String),
    ("Result/Score", Type::Double),
    ("Result/Count", Type::UInt64),
    ("Result/Frame", Type::String),
    ("Result/Json", Type::String),
];
/// The metrics of the node besides those of every birth.
const NODE: [(&str, Type); 4] = [
    ("Agent/Version", Type::String),
    ("Agent/Site", Type::String),
    ("Event/Json", Type::String),
    ("Metrics/Json", Type::String),
];

/// What a message meant for us says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostSignal {
    /// Somebody wants to see all births again.
    Rebirth,
    /// The primary host listens.
    HostOnline,
    /// The primary host is gone.
    HostOffline,
    /// Nothing that matters.
    Nothing,
}

/// One connection.
pub struct Session {
    group: String,
    node: String,
    site: String,
    host: Option<String>,
    bd_seq: u8,
    seq: u8,
    /// The highest timestamp of the host's STATE messages; older ones are passed over.
    host_time: u64,
    is_host_online: bool,
    is_born: bool,
    /// First alias of each device that was born.
    devices: BTreeMap<String, Device>,
    next_alias: u64,
}

struct Device {
    first_alias: u64,
    is_alive: bool,
    up: bool,
    model: String,
}

impl Session {
    /// A session that has not begun.
    pub fn new(group: &str, node: &str, site: &str, host: Option<&str>, bd_seq: u8) -> Self {
        Self {
            group: group.to_owned(),
            node: node.to_owned(),
            site: site.to_owned(),
            host: host.map(str::to_owned),
            bd_seq,
            seq: 0,
            host_time: 0,
            is_host_online: host.is_none(),
            is_born: false,
            devices: BTreeMap::new(),
            next_alias: 1 + NODE.len() as u64,
        }
    }

    /// The node's death, which is the Will and also said before a deliberate disconnect.
    pub fn death(&self) -> Message {
        let metrics = vec![metric(BD_SEQ, Type::Int64, Some(MetricValue::LongValue(self.bd_seq.into())))];
        let payload = Payload { timestamp: Some(now_ms()), metrics, seq: None };
        self.message("NDEATH", None, &payload)
    }

    /// What to listen to.
    pub fn filters(&self) -> Vec<String> {
        let mut filters = vec![
            format!("{NAMESPACE}/{}/NCMD/{}", self.group, self.node),
            format!("{NAMESPACE}/{}/DCMD/{}/+", self.group, self.node),
        ];
        filters.extend(self.host.as_ref().map(|host| format!("{NAMESPACE}/STATE/{host}")));
        filters
    }

    /// Whether births have been said, so that data may follow.
    pub fn is_born(&self) -> bool {
        self.is_born
    }

    /// Whether births may be said.
    pub fn may_be_born(&self) -> bool {
        self.is_host_online
    }

    /// Makes sense of a message.
    pub fn hear(&mut self, message: &Message) -> HostSignal {
        let state = self.host.as_ref().map(|host| format!("{NAMESPACE}/STATE/{host}"));
        if state.as_deref() == Some(&*message.topic) {
            return self.hear_state(&message.payload);
        }
        if *message.topic != format!("{NAMESPACE}/{}/NCMD/{}", self.group, self.node) {
            return HostSignal::Nothing;
        }
        let Ok(payload) = Payload::decode(message.payload.clone()) else { return HostSignal::Nothing };
        let wants = |metric: &Metric| {
            metric.name.as_deref() == Some(REBIRTH) && metric.value == Some(MetricValue::BooleanValue(true))
        };
        if payload.metrics.iter().any(wants) { HostSignal::Rebirth } else { HostSignal::Nothing }
    }

    fn hear_state(&mut self, payload: &[u8]) -> HostSignal {
        let Ok(state) = serde_json::from_slice::<Value>(payload) else { return HostSignal::Nothing };
        let (Some(online), Some(time)) = (state["online"].as_bool(), state["timestamp"].as_u64()) else {
            return HostSignal::Nothing;
        };
        // A Will of an earlier session may come late; its time tells.
        if time < self.host_time || online == self.is_host_online {
            self.host_time = self.host_time.max(time);
            return HostSignal::Nothing;
        }
        (self.host_time, self.is_host_online) = (time, online);
        if online { HostSignal::HostOnline } else { HostSignal::HostOffline }
    }

    /// All births.
    pub fn births(&mut self, streams: &StreamStates) -> Vec<Message> {
        self.seq = 0;
        self.is_born = true;
        self.devices.values_mut().for_each(|device| device.is_alive = false);
        let now = now_ms();
        let mut metrics = vec![
            metric(BD_SEQ, Type::Int64, Some(MetricValue::LongValue(self.bd_seq.into()))),
            metric(REBIRTH, Type::Boolean, Some(MetricValue::BooleanValue(false))),
        ];
        let values = [Some(env!("CARGO_PKG_VERSION").to_owned()), Some(self.site.clone()), None, None];
        for (alias, ((name, kind), value)) in (1..).zip(NODE.into_iter().zip(values)) {
            metrics.push(Metric { alias: Some(alias), ..metric(name, kind, value.map(MetricValue::StringValue)) });
        }
        metrics.iter_mut().for_each(|metric| metric.timestamp = Some(now));
        let birth = self.numbered("NBIRTH", None, now, metrics);
        let mut messages = vec![birth];
        messages.extend(self.follow(streams));
        messages
    }

    /// Births and deaths of devices, and what has changed of them, since the last time. Nothing before the node's birth.
    pub fn follow(&mut self, streams: &StreamStates) -> Vec<Message> {
        if !self.is_born {
            return Vec::new();
        }
        let mut messages = Vec::new();
        let gone: Vec<String> = self
            .devices
            .iter()
            .filter(|(name, device)| device.is_alive && !streams.contains_key(*name))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
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

    /// A record as data; a device that was not born yet is born first.
    pub fn data(&mut self, record: &Record, historical: bool) -> Vec<Message> {
        let json: Value = serde_json::from_slice(&record.payload).unwrap_or_default();
        let time = json["ts"].as_str().and_then(|text| humantime::parse_rfc3339(text).ok()).map_or_else(now_ms, millis);
        let text = String::from_utf8_lossy(&record.payload).into_owned();
        let stream = json["stream"].as_str().unwrap_or_default().to_owned();
        let node_alias = match record.id.kind {
            RecordKind::Result => None,
            RecordKind::Event => Some(3),
            RecordKind::Metrics => Some(4),
        };
        if let Some(alias) = node_alias {
            let value = Some(MetricValue::StringValue(text));
            let metric = Metric { alias: Some(alias), ..typed(Type::String, value) };
            let metric = Metric { timestamp: Some(time), is_historical: historical.then_some(true), ..metric };
            return vec![self.numbered("NDATA", None, now_ms(), vec![metric])];
        }
        let mut messages = Vec::new();
        if !self.devices.get(&stream).is_some_and(|device| device.is_alive) {
            messages.push(self.device_birth(&stream, false, ""));
        }
        messages.push(self.device_data(&stream, result_values(&json, text), time, historical));
        messages
    }

    fn device_birth(&mut self, name: &str, up: bool, model: &str) -> Message {
        let next_alias = &mut self.next_alias;
        let device = self.devices.entry(name.to_owned()).or_insert_with(|| {
            let first_alias = *next_alias;
            *next_alias += DEVICE.len() as u64;
            Device { first_alias, is_alive: true, up, model: model.to_owned() }
        });
        (device.is_alive, device.up, device.model) = (true, up, model.to_owned());
        let now = now_ms();
        let metrics = (device.first_alias..).zip(DEVICE).map(|(alias, (name, kind))| {
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
        time: u64,
        historical: bool,
    ) -> Message {
        let first_alias = self.devices.get(name).map_or(0, |device| device.first_alias);
        let metrics = (first_alias..).zip(DEVICE).filter_map(|(alias, (name, kind))| {
            let value = values.get(name)?.clone();
            Some(Metric {
                alias: Some(alias),
                timestamp: Some(time),
                is_historical: historical.then_some(true),
                ..typed(kind, Some(value))
            })
        });
        let metrics = metrics.collect();
        self.numbered("DDATA", Some(name), now_ms(), metrics)
    }

    /// A message with the next sequence number.
    fn numbered(&mut self, kind: &str, device: Option<&str>, timestamp: u64, metrics: Vec<Metric>) -> Message {
        let payload = Payload { timestamp: Some(timestamp), metrics, seq: Some(self.seq.into()) };
        self.seq = self.seq.wrapping_add(1);
        self.message(kind, device, &payload)
    }

    fn message(&self, kind: &str, device: Option<&str>, payload: &Payload) -> Message {
        let topic = format!("{NAMESPACE}/{}/{kind}/{}", self.group, self.node);
        let topic = match device {
            Some(device) => format!("{topic}/{device}"),
            None => topic,
        };
        Message { topic: topic.into(), payload: payload.encode_to_vec().into(), retain: false }
    }
}

/// What a result says, by the metrics of a device. What it does not say is left as it was.
fn result_values(json: &Value, text: String) -> BTreeMap<&'static str, MetricValue> {
    let string = |pointer: &str| json.pointer(pointer)?.as_str().map(|text| MetricValue::StringValue(text.to_owned()));
    let number = |pointer: &str| json.pointer(pointer)?.as_u64().map(MetricValue::LongValue);
    let found = if json["detections"].is_array() { "/detections" } else { "/classes" };
    let score = json.pointer(&format!("{found}/0/score")).or_else(|| json.get("score"));
    let count = json["detections"].as_array().map(|found| MetricValue::LongValue(found.len() as u64));
    let values = [
        ("Result/Id", string("/id")),
        ("Result/Seq", number("/seq")),
        ("Result/Verdict", string("/verdict")),
        ("Result/Model", string("/model/name")),
        ("Result/Model Version", number("/model/version")),
        ("Result/Label", string(&format!("{found}/0/label"))),
        ("Result/Score", score.and_then(Value::as_f64).map(MetricValue::DoubleValue)),
        ("Result/Count", count),
        ("Result/Frame", string("/frame/name")),
        ("Result/Json", Some(MetricValue::StringValue(text))),
    ];
    values.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

fn metric(name: &str, kind: Type, value: Option<MetricValue>) -> Metric {
    Metric { name: Some(name.to_owned()), ..typed(kind, value) }
}

fn typed(kind: Type, value: Option<MetricValue>) -> Metric {
    Metric { datatype: Some(kind as u32), is_null: value.is_none().then_some(true), value, ..Metric::default() }
}

fn millis(time: SystemTime) -> u64 {
    u64::try_from(time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_millis()).unwrap_or(u64::MAX)
}

fn now_ms() -> u64 {
    millis(SystemTime::now())
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
            .map(|(name, up)| ((*name).to_owned(), StreamState { model: "m".to_owned(), up: *up, reason: None }))
            .collect()
    }

    fn sent(messages: &[Message]) -> Vec<(String, u64)> {
        let payload = |message: &Message| Payload::decode(message.payload.clone()).unwrap();
        messages
            .iter()
            .map(|message| {
                (message.topic.split('/').skip(2).collect::<Vec<_>>().join("/"), payload(message).seq.unwrap())
            })
            .collect()
    }

    #[test]
    fn births_come_first_and_numbers_run_on_and_wrap() {
        let mut session = Session::new("g", "n", "s", None, 7);
        assert!(session.follow(&streams(&[("a", true)])).is_empty(), "nothing before the node's birth");
        let births = session.births(&streams(&[("a", true), ("b", false)]));
        assert_eq!(sent(&births), [("NBIRTH/n".into(), 0), ("DBIRTH/n/a".into(), 1), ("DBIRTH/n/b".into(), 2)]);
        assert!(session.follow(&streams(&[("a", true), ("b", false)])).is_empty());
        assert_eq!(
            sent(&session.follow(&streams(&[("b", true)]))),
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
        assert_eq!(sent(&data), [("DBIRTH/n/a".into(), 5), ("DDATA/n/a".into(), 6)], "born before its data");
        let payload = Payload::decode(data[1].payload.clone()).unwrap();
        assert!(payload.metrics.iter().all(|metric| metric.is_historical == Some(true) && metric.name.is_none()));
        assert!(payload.metrics.iter().all(|metric| metric.timestamp == Some(1_795_458_956_123)));
        for expected in 7..=255u64 {
            assert_eq!(sent(&session.data(&record, false)).last().unwrap().1, expected);
        }
        assert_eq!(sent(&session.data(&record, false)).last().unwrap().1, 0, "and begin anew after 255");
    }

    #[test]
    fn the_host_is_believed_by_its_time_and_rebirth_is_a_command() {
        let mut session = Session::new("g", "n", "s", Some("scada"), 0);
        assert!(!session.may_be_born());
        let state = |online: bool, timestamp: u64| Message {
            topic: "spBv1.0/STATE/scada".into(),
            payload: format!("{{\"online\":{online},\"timestamp\":{timestamp}}}").into(),
            retain: true,
        };
        assert_eq!(session.hear(&state(true, 100)), HostSignal::HostOnline);
        assert_eq!(session.hear(&state(false, 50)), HostSignal::Nothing, "an old Will");
        assert!(session.may_be_born());
        assert_eq!(session.hear(&state(false, 100)), HostSignal::HostOffline);
        for rubbish in ["", "{}", "[1]", "{\"online\":1,\"timestamp\":-5}", "\u{0}"] {
            let message = Message { payload: rubbish.into(), ..state(true, 0) };
            assert_eq!(session.hear(&message), HostSignal::Nothing);
        }
        let metrics = vec![metric(REBIRTH, Type::Boolean, Some(MetricValue::BooleanValue(true)))];
        let payload = Payload { timestamp: None, metrics, seq: None }.encode_to_vec();
        let command = Message { topic: "spBv1.0/g/NCMD/n".into(), payload: payload.into(), retain: false };
        assert_eq!(session.hear(&command), HostSignal::Rebirth);
        assert_eq!(session.hear(&Message { payload: vec![0xFF; 9].into(), ..command }), HostSignal::Nothing);
    }

    #[test]
    fn the_generated_code_is_what_the_proto_file_says() {
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
