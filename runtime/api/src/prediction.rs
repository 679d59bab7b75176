//! What a model says of a frame.

use std::sync::Arc;
use std::time::Duration;

use crate::tensor::Tensor;

/// A class with its score.
#[derive(Debug, Clone, PartialEq)]
pub struct Class {
    /// The class's name.
    pub label: Arc<str>,
    /// Its index in the model's output.
    pub class: u32,
    /// 0 to 1 where the model gives probabilities.
    pub score: f32,
}

/// A found object.
#[derive(Debug, Clone, PartialEq)]
pub struct Detection {
    /// What it is, and how certain.
    pub class: Class,
    /// Left, top, right, bottom in pixels of the source picture, clipped to it.
    pub bbox: [f32; 4],
}

/// How far each place of the picture is from what the model has learned as normal.
#[derive(Debug, Clone, PartialEq)]
pub struct AnomalyMap {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Row-major values, in the model's own scale.
    pub values: Vec<f32>,
}

/// A named raw output.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor {
    /// The output's name in the graph.
    pub name: Arc<str>,
    /// Its value.
    pub tensor: Tensor,
}

/// The answer to one frame, by task.
#[derive(Debug, Clone, PartialEq)]
pub enum Prediction {
    /// `classify`: best first.
    Classes(Vec<Class>),
    /// `detect`: best first.
    Detections(Vec<Detection>),
    /// `anomaly`.
    Anomaly {
        /// Higher is stranger, in the model's own scale.
        score: f32,
        /// Present where the model gives one and the manifest asks for it.
        map: Option<AnomalyMap>,
    },
    /// `tensor`.
    Tensors(Vec<NamedTensor>),
}

/// How long each stage of one frame took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// Encoded bytes to pixels.
    pub decode: Duration,
    /// Pixels to the input tensor.
    pub preprocess: Duration,
    /// The engine.
    pub infer: Duration,
    /// Output tensors to the prediction.
    pub postprocess: Duration,
}

/// The answer of a model to one frame.
#[derive(Debug, Clone, PartialEq)]
pub struct Inspection {
    /// The prediction, in pixels of the source picture where it has coordinates.
    pub prediction: Prediction,
    /// Width of the source picture, in pixels.
    pub width: u32,
    /// Height of the source picture, in pixels.
    pub height: u32,
    /// Duration of each stage.
    pub timings: Timings,
}
