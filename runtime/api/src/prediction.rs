//! The prediction of a model for one frame, as plain data.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::spec::Task;
use crate::tensor::Tensor;
use crate::verdict::RuleOutcome;

/// A class with its score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Class {
    /// Name of the class.
    #[serde(with = "shared_text")]
    pub label: Arc<str>,
    /// Index of the class in the output of the model, from 0.
    pub class: u32,
    /// Score, 0 to 1 for models that output probabilities.
    pub score: f32,
}

/// A detected object.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Detection {
    /// Class and score of the object.
    pub class: Class,
    /// Left, top, right and bottom in pixels of the source picture, clipped to the picture.
    pub bbox: [f32; 4],
}

/// An anomaly score for each position of the picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AnomalyMap {
    /// Number of columns.
    pub width: usize,
    /// Number of rows.
    pub height: usize,
    /// `width * height` values in row-major order, in the scale of the model.
    pub values: Vec<f32>,
}

/// A named raw output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NamedTensor {
    /// Name of the output in the graph.
    #[serde(with = "shared_text")]
    pub name: Arc<str>,
    /// Value of the output.
    pub tensor: Tensor,
}

/// The prediction for one frame; the variant depends on the task of the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Prediction {
    /// `classify`: the classes in descending order of their scores.
    Classes(Vec<Class>),
    /// `detect`: the objects in descending order of their scores.
    Detections(Vec<Detection>),
    /// `anomaly`.
    Anomaly {
        /// Anomaly score in the scale of the model; higher is more anomalous.
        score: f32,
        /// The map, for a model that outputs one, when `spec.output.map` is true.
        map: Option<AnomalyMap>,
    },
    /// `tensor`: the raw outputs in the order of the graph.
    Tensors(Vec<NamedTensor>),
}

impl Prediction {
    /// The task of the model that predicts this.
    pub fn task(&self) -> Task {
        match self {
            Self::Classes(_) => Task::Classify,
            Self::Detections(_) => Task::Detect,
            Self::Anomaly { .. } => Task::Anomaly,
            Self::Tensors(_) => Task::Tensor,
        }
    }
}

/// Duration of each stage of one inspection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// Decoding of the encoded picture.
    pub decode: Duration,
    /// Conversion of the pixels to the input tensor.
    pub preprocess: Duration,
    /// Execution of the graph by the engine.
    pub infer: Duration,
    /// Conversion of the output tensors to the prediction.
    pub postprocess: Duration,
}

/// The result of a model for one frame.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inspection {
    /// The prediction; coordinates are pixels of the source picture.
    pub prediction: Prediction,
    /// Width of the source picture, in pixels.
    pub width: u32,
    /// Height of the source picture, in pixels.
    pub height: u32,
    /// Duration of each stage.
    pub timings: Timings,
    /// What the verdict rule of the frame gave; `None` for a frame without a rule.
    pub rule: Option<RuleOutcome>,
}

/// Serializes text that many predictions share. The feature `rc` of serde would do the same for all types of the program.
mod shared_text {
    use std::sync::Arc;

    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<str>, D::Error> {
        String::deserialize(deserializer).map(Arc::from)
    }
}
