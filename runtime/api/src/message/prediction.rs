//! A model's answer as it is written: by task, with raw tensors as the Open Inference Protocol writes them.

use std::sync::Arc;

use crate::prediction::{Class, Detection, NamedTensor, Prediction};
use crate::tensor::{Data, DataType};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use schemars::JsonSchema;
use serde::Serialize;

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

/// A shared text as a string. serde's own way for these is a feature that half the dependencies would be rebuilt for.
fn text<S: serde::Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text)
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

#[cfg(test)]
mod tests {
    use crate::prediction::AnomalyMap;
    use crate::tensor::Tensor;

    use super::*;

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
