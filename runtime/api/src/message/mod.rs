//! What the agent says on MQTT and what it is told: results, events, metrics, its own presence, and commands. All of it is
//! JSON; the schemas under `docs/schemas/` are generated from these types.
//!
//! Results, events and metrics wait in the spool before they are sent. They are written before their number is known, and
//! sent when it is known how late they are. So they are kept as text: [`numbered`] puts the id in front, and
//! [`as_historical`] turns over the last field.

mod prediction;
mod topics;

use std::borrow::Cow;
use std::time::{Duration, SystemTime};

use crate::prediction::Timings;
use crate::spec::Task;
use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::verdict::Verdict;
use lineside_common::clock;
pub use prediction::{ClassInfo, DetectionInfo, MapInfo, PredictionInfo, TensorInfo};
pub use topics::{Incoming, Topics};

/// A message as it goes out: its number, and what it says.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Numbered<T> {
    /// `node:boot-epoch:number`, unique for ever; events have `e` before their number, metrics `m`. A message that is sent
    /// again carries the same id; consumers drop repeats.
    pub id: String,
    /// Grows by one with every message of its kind that this node has made since its agent was started.
    pub seq: u64,
    /// What it says.
    #[serde(flatten)]
    pub body: T,
}

/// The result of one inspection, published with QoS 1 on `{prefix}/v1/{site}/{node}/{stream}/result`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ResultBody<'a> {
    /// When the result was made, RFC 3339 in UTC.
    pub ts: String,
    /// The site's name.
    pub site: &'a str,
    /// The node's name.
    pub node: &'a str,
    /// The stream's name.
    pub stream: &'a str,
    /// What looked at the frame.
    pub model: &'a ModelInfo,
    /// What the model's answer means.
    pub task: Task,
    /// What the model says; which fields are there depends on the task.
    #[serde(flatten)]
    pub prediction: PredictionInfo,
    /// By the stream's rule.
    pub verdict: Verdict,
    /// The picture.
    pub frame: FrameInfo,
    /// Where the time went, in milliseconds.
    pub latency_ms: Latency,
    /// `false` when the node's clock was obviously never set, so that `ts` means nothing.
    pub clock_synced: bool,
    /// Whether it comes late: it was made before the connection it came over. Always the last field.
    pub historical: bool,
}

/// Something that happened, published with QoS 1 on `{prefix}/v1/{site}/{node}/{stream}/event`, or without the stream's
/// level where it concerns a model or the node.
#[derive(Debug, Serialize, JsonSchema)]
pub struct EventBody<'a> {
    /// When it happened, RFC 3339 in UTC.
    pub ts: String,
    /// The site's name.
    pub site: &'a str,
    /// The node's name.
    pub node: &'a str,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
    /// `false` when the node's clock was obviously never set, so that `ts` means nothing.
    pub clock_synced: bool,
    /// Whether it comes late: it happened before the connection it came over. Always the last field.
    pub historical: bool,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "event")]
pub enum Event {
    /// Frames can be had from a stream.
    StreamUp {
        /// The stream.
        stream: String,
    },
    /// No frames can be had from a stream.
    StreamDown {
        /// The stream.
        stream: String,
        /// Why, where there is a reason: a stream that ends or is taken away has none.
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// A model version stands somewhere else than before.
    ModelState {
        /// The model.
        model: String,
        /// The version that is asked for.
        version: u64,
        /// Where it stands: `Pending`, `Downloading`, `Verifying`, `Vetting`, `Warming`, `Ready`, `Failed`, `Quarantined`.
        state: Cow<'static, str>,
        /// The version that serves, which may be an earlier one.
        #[serde(skip_serializing_if = "Option::is_none")]
        serving: Option<u64>,
        /// Why it is not ready.
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
}

impl Event {
    /// The stream it concerns.
    pub fn stream(&self) -> Option<&str> {
        match self {
            Self::StreamUp { stream } | Self::StreamDown { stream, .. } => Some(stream),
            Self::ModelState { .. } => None,
        }
    }
}

/// How things stood, published with QoS 1 on `{prefix}/v1/{site}/{node}/metrics`: what `/metrics` gives, for sites without a
/// scraper, with what changed within the period.
#[derive(Debug, Serialize, JsonSchema)]
pub struct MetricsBody<'a> {
    /// The end of the period, RFC 3339 in UTC.
    pub ts: String,
    /// The site's name.
    pub site: &'a str,
    /// The node's name.
    pub node: &'a str,
    /// The length of the period.
    pub seconds: f64,
    /// Every series.
    pub series: Vec<Series>,
    /// `false` when the node's clock was obviously never set, so that `ts` means nothing.
    pub clock_synced: bool,
    /// Whether it comes late: it was made before the connection it came over. Always the last field.
    pub historical: bool,
}

/// One series.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Series {
    /// The metric's name, as on `/metrics`.
    pub name: String,
    /// Its labels.
    #[serde(skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    #[schemars(default)]
    pub labels: std::collections::BTreeMap<String, String>,
    /// What it shows.
    #[serde(flatten)]
    pub value: SeriesValue,
}

/// What a series shows.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum SeriesValue {
    /// A counter.
    Counter {
        /// Since the agent was started.
        total: f64,
        /// Within the period.
        increase: f64,
    },
    /// A gauge.
    Gauge {
        /// Now.
        value: f64,
    },
    /// A distribution of what was observed within the period; left out where nothing was.
    Distribution {
        /// Observations.
        count: u64,
        /// Their mean.
        mean: f64,
        /// Their median, interpolated within its bucket.
        p50: f64,
        /// Their 99th percentile, interpolated within its bucket.
        p99: f64,
    },
}

/// A command, received on `{prefix}/v1/{site}/{node}/cmd/{name}/set`. The name is one of those the node's configuration
/// allows; which fields it needs depends on the name.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CommandMessage {
    /// Comes back in the answer.
    pub id: Option<String>,
    /// `pause`, `resume`, `snapshot`: the stream.
    pub stream: Option<String>,
    /// `log-level`: a level such as `debug`, or a filter.
    pub level: Option<String>,
}

/// The answer to a command, published with QoS 1 on `{prefix}/v1/{site}/{node}/cmd/{name}/state`. It is retained for
/// `log-level`, `pause` and `resume`, so that whoever comes later knows how things stand.
#[derive(Debug, Serialize, JsonSchema)]
pub struct CommandState<'a> {
    /// When it was carried out, RFC 3339 in UTC.
    pub ts: String,
    /// The node's name.
    pub node: &'a str,
    /// The command.
    pub command: &'a str,
    /// The request's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Whether it was carried out.
    pub ok: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// How things stand now, where there is something to say.
    #[serde(flatten)]
    pub outcome: CommandOutcome,
}

/// How things stand after a command.
#[derive(Debug, Clone, Default, PartialEq, Serialize, JsonSchema)]
pub struct CommandOutcome {
    /// `pause`, `resume`: every stream that is paused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paused: Option<Vec<String>>,
    /// `log-level`: the filter in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<String>,
    /// `snapshot`: the stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream: Option<String>,
    /// `snapshot`: when the frame came, RFC 3339 in UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub captured_at: Option<String>,
    /// `snapshot`: the frame as the camera gave it, JPEG or PNG in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
}

/// How what waits in the spool ends, until it is late.
const LIVE_END: &[u8] = b"\"historical\":false}";
const LATE_END: &[u8] = b"\"historical\":true}";

/// Puts id and number in front of a message's JSON object.
pub fn numbered(id: &str, seq: u64, body: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(body.len() + id.len() + 40);
    out.extend_from_slice(b"{\"id\":");
    // A text always becomes JSON.
    out.extend_from_slice(&serde_json::to_vec(id).unwrap_or_default());
    out.extend_from_slice(format!(",\"seq\":{seq},").as_bytes());
    out.extend_from_slice(body.get(1..).unwrap_or_default());
    out.into()
}

/// Says of a message that it comes late.
pub fn as_historical(message: Bytes) -> Bytes {
    match message.strip_suffix(LIVE_END) {
        Some(front) => [front, LATE_END].concat().into(),
        None => message,
    }
}

/// What looked at a frame.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct ModelInfo {
    /// The model's name.
    pub name: String,
    /// Its version.
    pub version: u64,
    /// SHA-256 of the file that was loaded.
    pub digest: String,
    /// `tract` or `onnxruntime`.
    pub engine: String,
    /// `cpu` or `gpu`.
    pub device: String,
}

/// The picture that was looked at.
#[derive(Debug, Serialize, JsonSchema)]
pub struct FrameInfo {
    /// Its name, where the source gives names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// When the agent got it, RFC 3339 in UTC.
    pub captured_at: String,
}

/// Where the time went, in milliseconds.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Latency {
    /// Waiting for the model.
    pub queue: f64,
    /// Encoded bytes to pixels.
    pub decode: f64,
    /// Pixels to tensor.
    pub preprocess: f64,
    /// The engine.
    pub infer: f64,
    /// Tensors to prediction.
    pub postprocess: f64,
    /// From capture to result.
    pub total: f64,
}

impl Latency {
    /// Of one frame that waited for `queue` and took `total` in all.
    pub fn new(queue: Duration, timings: Timings, total: Duration) -> Self {
        let milliseconds = |duration: Duration| (duration.as_secs_f64() * 1e6).round() / 1e3;
        Self {
            queue: milliseconds(queue),
            decode: milliseconds(timings.decode),
            preprocess: milliseconds(timings.preprocess),
            infer: milliseconds(timings.infer),
            postprocess: milliseconds(timings.postprocess),
            total: milliseconds(total),
        }
    }
}

impl FrameInfo {
    /// Of an inspected picture.
    pub fn new(name: Option<String>, width: u32, height: u32, captured_at: SystemTime) -> Self {
        Self { name, width, height, captured_at: clock::rfc3339(captured_at) }
    }
}

/// The agent's presence, retained on `{prefix}/v1/{site}/{node}/status`. The broker itself says `offline` for an agent
/// that vanished: the message is left with it as the Will when connecting.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(title = "Lineside status")]
pub struct StatusMessage<'a> {
    /// Whether the agent is connected.
    pub state: AgentPresence,
    /// When this was written, RFC 3339 in UTC. In a Will that is the time of connecting, not of vanishing.
    pub ts: String,
    /// The site's name.
    pub site: &'a str,
    /// The node's name.
    pub node: &'a str,
    /// The agent's version.
    pub version: &'a str,
    /// How many times the agent has been started on this node.
    pub epoch: u64,
}

/// Whether an agent is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AgentPresence {
    /// Connected.
    Online,
    /// Ended, or vanished.
    Offline,
}

/// The committed schemas, by file name.
pub fn schemas() -> Vec<(&'static str, schemars::Schema)> {
    let titled = |mut schema: schemars::Schema, title: &str| {
        schema.insert("title".to_owned(), title.into());
        schema
    };
    vec![
        ("result.schema.json", titled(schemars::schema_for!(Numbered<ResultBody<'static>>), "Lineside result")),
        ("event.schema.json", titled(schemars::schema_for!(Numbered<EventBody<'static>>), "Lineside event")),
        ("metrics.schema.json", titled(schemars::schema_for!(Numbered<MetricsBody<'static>>), "Lineside metrics")),
        ("status.schema.json", schemars::schema_for!(StatusMessage<'static>)),
        ("command.schema.json", titled(schemars::schema_for!(CommandMessage), "Lineside command")),
        ("command-state.schema.json", titled(schemars::schema_for!(CommandState<'static>), "Lineside command state")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_schemas_are_what_the_types_say() {
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
    fn a_number_goes_in_front_and_lateness_is_told_at_the_end() {
        let body = EventBody {
            ts: "t".to_owned(),
            site: "s",
            node: "n",
            event: Event::StreamUp { stream: "cam".to_owned() },
            clock_synced: true,
            historical: false,
        };
        let text = serde_json::to_vec(&body).unwrap();
        let message = numbered("n\"1:2:e3", 3, &text);
        let whole = serde_json::to_value(Numbered { id: "n\"1:2:e3".to_owned(), seq: 3, body }).unwrap();
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&message).unwrap(), whole);
        let late: serde_json::Value = serde_json::from_slice(&as_historical(message)).unwrap();
        assert_eq!(
            (&late["historical"], &late["event"], &late["stream"]),
            (&true.into(), &"StreamUp".into(), &"cam".into())
        );
        assert_eq!(as_historical(Bytes::from_static(b"{}")), "{}");
    }
}
