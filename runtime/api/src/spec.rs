//! What a manifest may say of a model, as typed by its author. Whatever is left out comes from the model itself.
//!
//! These are the `spec.task`, `spec.input`, `spec.output` and `spec.runtime` parts of an `EdgeModel`, with the field
//! names of the manifest. [`lineside_inference::settings`] turns them, together with the model's graph, into what the pipeline does.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the model's answer means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// One score per class for the whole picture.
    Classify,
    /// Boxes with a class and a score each.
    Detect,
    /// A class per pixel. Not built yet; refused with a clear error.
    Segment,
    /// How unusual the picture is, and where.
    Anomaly,
    /// No meaning of ours: the raw outputs.
    Tensor,
}

impl Task {
    /// As it stands in manifests and results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Classify => "classify",
            Self::Detect => "detect",
            Self::Segment => "segment",
            Self::Anomaly => "anomaly",
            Self::Tensor => "tensor",
        }
    }
}

/// How the source picture is loaded to the size of the model's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Resize {
    /// Both sides to the input's, without regard to proportions.
    Stretch,
    /// The whole picture, in proportion, centred; the rest filled with grey 114.
    Letterbox,
    /// The largest centred part that has the input's proportions.
    Crop,
}

/// The order of colours the model was trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Color {
    /// Red, green, blue.
    Rgb,
    /// Blue, green, red, as OpenCV reads pictures.
    Bgr,
    /// One channel: ITU-R BT.601 luma.
    Gray,
}

/// `spec.input`: from picture to tensor, `x = (pixel - mean) / std` per channel, in the model's colour order.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InputSpec {
    /// Default: `crop` for classify, `letterbox` for detect, `stretch` for the rest.
    pub resize: Option<Resize>,
    /// Default: `gray` for a model with one channel, else `rgb`.
    pub color: Option<Color>,
    /// One value per channel, in pixel units (0 to 255). Default: 0.
    #[schemars(length(min = 1, max = 4))]
    pub mean: Option<Vec<f32>>,
    /// One value per channel, in pixel units. Default: 255 for a float input, 1 for an integer one.
    #[schemars(length(min = 1, max = 4))]
    pub std: Option<Vec<f32>>,
    /// Input width in pixels, for a model that leaves it open.
    #[schemars(range(min = 1, max = 16_384))]
    pub width: Option<u32>,
    /// Input height in pixels, for a model that leaves it open.
    #[schemars(range(min = 1, max = 16_384))]
    pub height: Option<u32>,
}

/// How the numbers of a detector become boxes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Decoder {
    /// `[1, 4 + classes, anchors]`: centre, size, class scores. Ultralytics YOLOv8.
    Yolov8,
    /// The same layout under the name of Ultralytics YOLO11.
    Yolov11,
    /// `[1, anchors, 5 + classes]`: centre, size, objectness, class scores.
    Yolov5,
    /// `[1, anchors, 5 + classes]` relative to the grid cell, strides 8, 16 and 32.
    Yolox,
    /// Boxes that the graph has already sorted out: `[1, n, 6]`, `[n, 7]`, or separate boxes, scores and classes.
    End2end,
}

/// `spec.output`: from tensor to prediction.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OutputSpec {
    /// For detect. Default: told from the shape and the metadata where that is certain.
    pub decoder: Option<Decoder>,
    /// Names of the classes, in order. Default: the model's metadata, else `class_0` and so on.
    #[schemars(length(max = 10_000), inner(length(max = 256)))]
    pub labels: Option<Vec<String>>,
    /// Lowest score reported, 0 to 1. Default: 0.25 for detect, 0 for the rest.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub threshold: Option<f32>,
    /// Two boxes of one class that overlap by more than this are one, 0 to 1. Default: 0.45.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub iou: Option<f32>,
    /// Most classes or boxes reported. Default: 5 for classify, 100 for detect.
    #[schemars(range(min = 1, max = 100_000))]
    pub top_k: Option<u32>,
    /// For anomaly: send the map too. Default: false.
    pub map: Option<bool>,
}

/// Which engine is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// The best one this node has.
    #[default]
    Auto,
    /// tract, always there.
    Tract,
    /// ONNX Runtime, where its library is installed.
    OnnxRuntime,
}

/// Which device is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// The best one this node has.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A graphics processor.
    Gpu,
}

/// `spec.runtime`: with what, and with how much, the model runs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RuntimeSpec {
    /// Default: `auto`.
    pub engine: Option<EngineChoice>,
    /// Default: `auto`.
    pub device: Option<DeviceChoice>,
    /// Threads within one inference. Default: 1. tract runs one; raise `instances` instead.
    #[schemars(range(min = 1, max = 256))]
    pub threads: Option<u32>,
    /// Inferences side by side, each for another stream. Default: 1.
    #[schemars(range(min = 1, max = 64))]
    pub instances: Option<u32>,
    /// Default: 1.
    #[schemars(range(min = 1, max = 1024))]
    pub max_batch_size: Option<u32>,
    /// Default: 0.
    #[schemars(range(min = 0, max = 10_000_000))]
    pub max_queue_delay_microseconds: Option<u32>,
    /// Free the version before ahead of loading this one, for a node without the memory for two. Frames of the time
    /// between are skipped. Default: false.
    pub stop_first: Option<bool>,
}

/// Everything a manifest may say that the data plane acts on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// Default: the model's metadata, or `classify` for a model whose only output is `[batch, classes]`.
    pub task: Option<Task>,
    /// From picture to tensor.
    pub input: InputSpec,
    /// From tensor to prediction.
    pub output: OutputSpec,
    /// Engine, device, threads.
    pub runtime: RuntimeSpec,
}
