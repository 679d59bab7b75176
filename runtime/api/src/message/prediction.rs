//! The prediction in the JSON format of results: fields by task, raw tensors as in the Open Inference Protocol v2.

use std::sync::Arc;

use crate::prediction::{Class, Detection, NamedTensor, Prediction};
use crate::tensor::{Data, DataType};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use schemars::JsonSchema;
use serde::Serialize;

/// The prediction; the fields depend on the task.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum PredictionInfo {
    /// Task `classify`.
    Classify {
        /// The classes in descending order of their scores.
        classes: Vec<ClassInfo>,
    },
    /// Task `detect`.
    Detect {
        /// The objects in descending order of their scores.
        detections: Vec<DetectionInfo>,
    },
    /// Task `anomaly`.
    Anomaly {
        /// Anomaly score in the scale of the model; higher is more anomalous.
        score: f32,
        /// Anomaly score for each position. Present for a model that outputs a map, when `spec.output.map` is true.
        #[serde(skip_serializing_if = "Option::is_none")]
        map: Option<MapInfo>,
    },
    /// Task `tensor`.
    Tensor {
        /// The raw outputs, in the order of the graph.
        outputs: Vec<TensorInfo>,
    },
}

/// A class with its score.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ClassInfo {
    /// Name of the class.
    #[serde(serialize_with = "text")]
    pub label: Arc<str>,
    /// Index of the class in the output of the model, from 0.
    pub class: u32,
    /// Score, 0 to 1 for models that output probabilities.
    pub score: f32,
}

/// A detected object.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DetectionInfo {
    /// Name of the class.
    #[serde(serialize_with = "text")]
    pub label: Arc<str>,
    /// Index of the class in the output of the model, from 0.
    pub class: u32,
    /// Score, 0 to 1.
    pub score: f32,
    /// Left, top, right and bottom in pixels of the source picture, rounded to hundredths.
    #[serde(rename = "box")]
    pub bbox: [f32; 4],
}

/// An anomaly map, quantized to 256 steps: `value = min + byte / 255 * (max - min)`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct MapInfo {
    /// Number of columns.
    pub width: usize,
    /// Number of rows.
    pub height: usize,
    /// Value of byte 0.
    pub min: f32,
    /// Value of byte 255.
    pub max: f32,
    /// `width * height` bytes in row-major order, in base64.
    pub data: String,
}

/// A raw output in the tensor format of the Open Inference Protocol v2.
#[derive(Debug, Serialize, JsonSchema)]
pub struct TensorInfo {
    /// Name of the output in the graph.
    #[serde(serialize_with = "text")]
    pub name: Arc<str>,
    /// Type of the elements.
    pub datatype: DataType,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// The elements as a flat list in row-major order. `null` is a value that JSON cannot represent, such as infinity.
    pub data: Vec<serde_json::Value>,
}

/// Serializes a shared string. The feature `rc` of serde would do the same, and would rebuild half of the dependencies.
fn text<S: serde::Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text)
}

impl From<Prediction> for PredictionInfo {
    fn from(prediction: Prediction) -> Self {
        match prediction {
            Prediction::Classes(classes) => {
                Self::Classify { classes: classes.into_iter().map(ClassInfo::from).collect() }
            }
            Prediction::Detections(detections) => {
                Self::Detect { detections: detections.into_iter().map(DetectionInfo::from).collect() }
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
    fn from(detection: Detection) -> Self {
        let Class { label, class, score } = detection.class;
        Self { label, class, score, bbox: detection.bbox.map(|side| (side * 100.0).round() / 100.0) }
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

#[cfg(test)]
mod tests {
    use crate::prediction::AnomalyMap;
    use crate::tensor::Tensor;

    use super::*;

    #[test]
    fn a_map_is_quantized_to_256_steps_of_its_range() {
        let prediction =
            Prediction::Anomaly { score: 3.0, map: Some(AnomalyMap { width: 2, height: 1, values: vec![-1.0, 3.0] }) };
        let json = serde_json::to_value(PredictionInfo::from(prediction)).unwrap();
        let expected = serde_json::json!({"width": 2, "height": 1, "min": -1.0, "max": 3.0, "data": "AP8="});
        assert_eq!(json, serde_json::json!({"score": 3.0, "map": expected}));
        assert_eq!(MapInfo::new(1, 1, &[f32::INFINITY]).max, 0.0);
    }

    #[test]
    fn raw_outputs_have_the_format_of_the_open_inference_protocol() {
        let tensor = Tensor::new(vec![1, 2], Data::F32(vec![0.5, f32::INFINITY])).unwrap();
        let json = serde_json::to_value(TensorInfo::from(NamedTensor { name: "y".into(), tensor })).unwrap();
        assert_eq!(json, serde_json::json!({"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [0.5, null]}));
    }
}
