//! What the agent says on MQTT and what it is told: results, events, metrics, its own presence, and commands. All of it is
//! JSON; the schemas under `docs/schemas/` are generated from these types.
//!
//! Results, events and metrics wait in the spool before they are sent. They are written before their number is known, and
//! sent when it is known how late they are. So they are kept as text: [`numbered`] puts the id in front, and
//! [`as_historical`] turns over the last field.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use lineside_runtime::pipeline::{Inspection, Timings};
use lineside_runtime::prediction::{Class, Detection, NamedTensor, Prediction};
use lineside_runtime::spec::Task;
use lineside_runtime::tensor::{Data, DataType};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::clock;
use crate::config::is_name;
use crate::verdict::Verdict;

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
pub struct CommandRequest {
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

/// The model's answer, by task.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum PredictionInfo {
    /// classify
    Classify {
        /// Best first.
        classes: Vec<ClassInfo>,
    },
    /// detect
    Detect {
        /// Best first.
        detections: Vec<DetectionInfo>,
    },
    /// anomaly
    Anomaly {
        /// Higher is stranger, in the model's own scale.
        score: f32,
        /// Where it is strange.
        #[serde(skip_serializing_if = "Option::is_none")]
        map: Option<MapInfo>,
    },
    /// tensor
    Tensor {
        /// The raw outputs, in the graph's order.
        outputs: Vec<TensorInfo>,
    },
}

/// A class with its score.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ClassInfo {
    /// Its name.
    #[serde(serialize_with = "text")]
    pub label: Arc<str>,
    /// Its index in the model's output.
    pub class: u32,
    /// 0 to 1 where the model gives probabilities.
    pub score: f32,
}

/// A found object.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DetectionInfo {
    /// Its class's name.
    #[serde(serialize_with = "text")]
    pub label: Arc<str>,
    /// Its class's index.
    pub class: u32,
    /// 0 to 1.
    pub score: f32,
    /// Left, top, right, bottom in pixels of the source picture.
    #[serde(rename = "box")]
    pub bbox: [f32; 4],
}

/// An anomaly map in 256 steps: `value = min + byte / 255 * (max - min)`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct MapInfo {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// The value of byte 0.
    pub min: f32,
    /// The value of byte 255.
    pub max: f32,
    /// `width * height` bytes, row by row, in base64.
    pub data: String,
}

/// A raw output, written as the Open Inference Protocol writes tensors.
#[derive(Debug, Serialize, JsonSchema)]
pub struct TensorInfo {
    /// The output's name.
    #[serde(serialize_with = "text")]
    pub name: Arc<str>,
    /// Type of its elements.
    pub datatype: DataType,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// The elements, row-major and flat. `null` stands for a value that JSON cannot write, such as infinity.
    pub data: Vec<serde_json::Value>,
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

/// A shared text as a string. serde's own way for these is a feature that half the dependencies would be rebuilt for.
fn text<S: serde::Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text)
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
    pub fn new(name: Option<String>, inspection: &Inspection, captured_at: SystemTime) -> Self {
        let captured_at = clock::rfc3339(captured_at);
        Self { name, width: inspection.width, height: inspection.height, captured_at }
    }
}

impl From<Prediction> for PredictionInfo {
    fn from(prediction: Prediction) -> Self {
        match prediction {
            Prediction::Classes(classes) => {
                Self::Classify { classes: classes.into_iter().map(ClassInfo::from).collect() }
            }
            Prediction::Detections(found) => {
                Self::Detect { detections: found.into_iter().map(DetectionInfo::from).collect() }
            }
            Prediction::Anomaly { score, map } => {
                Self::Anomaly { score, map: map.map(|map| MapInfo::new(map.width, map.height, &map.values)) }
            }
            Prediction::Tensors(outputs) => {
                Self::Tensor { outputs: outputs.into_iter().map(TensorInfo::from).collect() }
            }
        }
    }
}

impl From<Class> for ClassInfo {
    fn from(class: Class) -> Self {
        Self { label: class.label, class: class.class, score: class.score }
    }
}

impl From<Detection> for DetectionInfo {
    fn from(found: Detection) -> Self {
        let Class { label, class, score } = found.class;
        Self { label, class, score, bbox: found.bbox.map(|side| (side * 100.0).round() / 100.0) }
    }
}

impl MapInfo {
    fn new(width: usize, height: usize, values: &[f32]) -> Self {
        let finite = || values.iter().copied().filter(|value| value.is_finite());
        let min = finite().fold(f32::INFINITY, f32::min);
        let max = finite().fold(f32::NEG_INFINITY, f32::max);
        let (min, max) = if min <= max { (min, max) } else { (0.0, 0.0) };
        let step = if max > min { 255.0 / (max - min) } else { 0.0 };
        let bytes: Vec<u8> = values.iter().map(|value| ((value - min) * step).round() as u8).collect();
        Self { width, height, min, max, data: BASE64.encode(bytes) }
    }
}

impl From<NamedTensor> for TensorInfo {
    fn from(output: NamedTensor) -> Self {
        let (shape, data) = output.tensor.into_parts();
        let datatype = data.data_type();
        Self { name: output.name, datatype, shape, data: json_values(data) }
    }
}

fn json_values(data: Data) -> Vec<serde_json::Value> {
    fn all<T: Into<serde_json::Value>>(values: Vec<T>) -> Vec<serde_json::Value> {
        values.into_iter().map(Into::into).collect()
    }
    match data {
        Data::Bool(values) => all(values),
        Data::U8(values) => all(values),
        Data::U16(values) => all(values),
        Data::U32(values) => all(values),
        Data::U64(values) => all(values),
        Data::I8(values) => all(values),
        Data::I16(values) => all(values),
        Data::I32(values) => all(values),
        Data::I64(values) => all(values),
        Data::F16(values) => all(values.into_iter().map(|value| value.to_f32()).collect()),
        Data::F32(values) => all(values),
        Data::F64(values) => all(values),
    }
}

/// The agent's presence, retained on `{prefix}/v1/{site}/{node}/status`. The broker itself says `offline` for an agent
/// that vanished: the message is left with it as the Will when connecting.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(title = "Lineside status")]
pub struct StatusMessage<'a> {
    /// Whether the agent is connected.
    pub state: Presence,
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
pub enum Presence {
    /// Connected.
    Online,
    /// Ended, or vanished.
    Offline,
}

/// The topics of one node.
#[derive(Debug, Clone)]
pub struct Topics {
    base: String,
}

impl Topics {
    /// `{prefix}/v1/{site}/{node}`.
    pub fn new(prefix: &str, site: &str, node: &str) -> Self {
        Self { base: format!("{prefix}/v1/{site}/{node}") }
    }

    /// Where the node says whether it is there.
    pub fn status(&self) -> String {
        format!("{}/status", self.base)
    }

    /// Where a stream's results go.
    pub fn result(&self, stream: &str) -> String {
        format!("{}/{stream}/result", self.base)
    }

    /// Where an event goes.
    pub fn event(&self, stream: Option<&str>) -> String {
        match stream {
            Some(stream) => format!("{}/{stream}/event", self.base),
            None => format!("{}/event", self.base),
        }
    }

    /// Where metrics go.
    pub fn metrics(&self) -> String {
        format!("{}/metrics", self.base)
    }

    /// Where the message goes whose acknowledgement counts for messages with QoS 0 before it (Sparkplug B only).
    pub fn fence(&self) -> String {
        format!("{}/fence", self.base)
    }

    /// Where the answers to a command go.
    pub fn command_state(&self, name: &str) -> String {
        format!("{}/cmd/{name}/state", self.base)
    }

    /// Where a command is given.
    pub fn command_set(&self, name: &str) -> String {
        format!("{}/cmd/{name}/set", self.base)
    }

    /// What the agent listens to.
    pub fn incoming(&self) -> [String; 2] {
        [self.command_set("+"), format!("{}/+/trigger", self.base)]
    }

    /// What came in on a topic.
    pub fn understand<'a>(&self, topic: &'a str) -> Option<Incoming<'a>> {
        let levels: Vec<&str> = topic.strip_prefix(&self.base)?.strip_prefix('/')?.split('/').collect();
        match levels.as_slice() {
            ["cmd", name, "set"] => Some(Incoming::Command(name)),
            [stream, "trigger"] if is_name(stream) => Some(Incoming::Trigger(stream)),
            _ => None,
        }
    }

    /// Everything the node says.
    pub fn all(&self) -> String {
        format!("{}/#", self.base)
    }
}

/// What a topic that the agent listens to means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Incoming<'a> {
    /// A command of this name.
    Command(&'a str),
    /// A request to inspect one part in front of this stream.
    Trigger(&'a str),
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
        ("command.schema.json", titled(schemars::schema_for!(CommandRequest), "Lineside command")),
        ("command-state.schema.json", titled(schemars::schema_for!(CommandState<'static>), "Lineside command state")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use lineside_runtime::prediction::AnomalyMap;
    use lineside_runtime::tensor::Tensor;

    #[test]
    fn the_committed_schemas_are_what_the_types_say() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/schemas");
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

    #[test]
    fn only_commands_and_triggers_of_this_node_are_understood() {
        let topics = Topics::new("lineside", "plant", "edge-1");
        let mine = |rest: &str| format!("lineside/v1/plant/edge-1/{rest}");
        assert_eq!(topics.understand(&mine("cmd/pause/set")), Some(Incoming::Command("pause")));
        assert_eq!(topics.understand(&mine("cam7/trigger")), Some(Incoming::Trigger("cam7")));
        for other in ["cmd/pause/state", "cmd/a/b/set", "cam7/result", "Cam_7/trigger", "trigger", "", "cmd/set"] {
            assert_eq!(topics.understand(&mine(other)), None, "{other}");
        }
        assert_eq!(topics.understand("lineside/v1/plant/edge-2/cmd/pause/set"), None);
        assert_eq!(topics.understand("lineside/v1/plant/edge-1cmd/pause/set"), None);
    }

    #[test]
    fn a_map_is_written_in_256_steps_of_its_own_range() {
        let prediction =
            Prediction::Anomaly { score: 3.0, map: Some(AnomalyMap { width: 2, height: 1, values: vec![-1.0, 3.0] }) };
        let json = serde_json::to_value(PredictionInfo::from(prediction)).unwrap();
        let expected = serde_json::json!({"width": 2, "height": 1, "min": -1.0, "max": 3.0, "data": "AP8="});
        assert_eq!(json, serde_json::json!({"score": 3.0, "map": expected}));
        assert_eq!(MapInfo::new(1, 1, &[f32::INFINITY]).max, 0.0);
    }

    #[test]
    fn raw_outputs_are_written_as_the_open_inference_protocol_does() {
        let tensor = Tensor::new(vec![1, 2], Data::F32(vec![0.5, f32::INFINITY])).unwrap();
        let json = serde_json::to_value(TensorInfo::from(NamedTensor { name: "y".into(), tensor })).unwrap();
        assert_eq!(json, serde_json::json!({"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [0.5, null]}));
    }
}
