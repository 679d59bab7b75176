//! What the agent says on MQTT: the result of one inspection, and its own presence. Both are JSON; the schemas under
//! `docs/schemas/` are generated from these types.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use lineside_runtime::pipeline::{Inspection, Timings};
use lineside_runtime::prediction::{Class, Detection, NamedTensor, Prediction};
use lineside_runtime::spec::Task;
use lineside_runtime::tensor::{Data, DataType};
use schemars::JsonSchema;
use serde::Serialize;

use crate::base::clock;
use crate::verdict::Verdict;

/// The result of one inspection, published with QoS 1 on `{prefix}/v1/{site}/{node}/{stream}/result`.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(title = "Lineside result")]
pub struct ResultMessage<'a> {
    /// `node:boot-epoch:seq`, unique for ever. A message that is sent again carries the same id; consumers drop repeats.
    pub id: String,
    /// When the result was made, RFC 3339 in UTC.
    pub ts: String,
    /// The site's name.
    pub site: &'a str,
    /// The node's name.
    pub node: &'a str,
    /// The stream's name.
    pub stream: &'a str,
    /// Grows by one with every result of this node since it booted the agent.
    pub seq: u64,
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
    /// Whether the result is older than the connection it came over.
    pub historical: bool,
    /// `false` when the node's clock was obviously never set, so that `ts` means nothing.
    pub clock_synced: bool,
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

    /// Everything the node says.
    pub fn all(&self) -> String {
        format!("{}/#", self.base)
    }
}

/// The committed schemas, by file name.
pub fn schemas() -> [(&'static str, schemars::Schema); 2] {
    [
        ("result.schema.json", schemars::schema_for!(ResultMessage<'static>)),
        ("status.schema.json", schemars::schema_for!(StatusMessage<'static>)),
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
