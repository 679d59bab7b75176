//! The fields of an `EdgeModel` that the data plane uses: `spec.task`, `spec.input`, `spec.output` and `spec.runtime`.
//!
//! All fields are optional. `lineside_inference::settings` combines them with the graph and the metadata of the model.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the outputs of a model mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// One score per class for the whole picture.
    Classify,
    /// Objects as boxes, each with a class and a score.
    Detect,
    /// An anomaly score for the picture, optionally with a map.
    Anomaly,
    /// The raw outputs, without interpretation.
    Tensor,
}

impl Task {
    /// The name in manifests and results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Classify => "classify",
            Self::Detect => "detect",
            Self::Anomaly => "anomaly",
            Self::Tensor => "tensor",
        }
    }
}

/// How the source picture is resized to the input of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Resize {
    /// Scales each side to the input's, without keeping the aspect ratio.
    Stretch,
    /// Scales the whole picture with its aspect ratio, centres it and fills the rest with gray 114.
    Letterbox,
    /// Uses the largest centred part with the aspect ratio of the input.
    Crop,
}

impl Resize {
    /// The name in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stretch => "stretch",
            Self::Letterbox => "letterbox",
            Self::Crop => "crop",
        }
    }
}

/// Color channels of the model's input, in the order of its training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Color {
    /// Red, green, blue.
    Rgb,
    /// Blue, green, red: the order of OpenCV.
    Bgr,
    /// One channel: ITU-R BT.601 luma.
    Gray,
}

impl Color {
    /// The name in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rgb => "rgb",
            Self::Bgr => "bgr",
            Self::Gray => "gray",
        }
    }
}

/// Conversion of a picture to the input tensor: `x = (pixel - mean) / std` for each channel, in the color order of the model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InputSpec {
    /// How pixels are computed when the picture is resized. Default: `bilinear` for detect, `antialias` for other tasks.
    pub filter: Option<ResizeFilter>,
    /// Whether a picture is turned as its Exif metadata states. Default: true.
    pub auto_rotate: Option<bool>,
    /// How the picture is resized. Default: `crop` for classify, `letterbox` for detect, `stretch` for other tasks.
    pub resize: Option<Resize>,
    /// Color channels. Default: `gray` for a model with one channel, otherwise `rgb`.
    pub color: Option<Color>,
    /// Mean of each channel, in pixel values (0 to 255). Default: 0.
    #[schemars(length(min = 1, max = 4), inner(range(min = -1e6, max = 1e6)))]
    pub mean: Option<Vec<f32>>,
    /// Standard deviation of each channel, in pixel values; greater than 0. Default: 255 for an input of floats, 1 for
    /// integers.
    #[schemars(length(min = 1, max = 4), inner(range(min = 1e-6, max = 1e6)))]
    pub std: Option<Vec<f32>>,
    /// Width of the input in pixels. Required for a model whose input has a variable width.
    #[schemars(range(min = 1, max = 16_384))]
    pub width: Option<u32>,
    /// Height of the input in pixels. Required for a model whose input has a variable height.
    #[schemars(range(min = 1, max = 16_384))]
    pub height: Option<u32>,
}

/// Computation of pixels when a picture is resized. Choose the one that the model was trained with: scores change with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ResizeFilter {
    /// The mean of the source pixels that a pixel covers: `INTER_AREA` of OpenCV. A picture that is enlarged is interpolated.
    Area,
    /// Interpolation between four source pixels, also when the picture shrinks: `INTER_LINEAR` of OpenCV, with which Ultralytics, YOLOX,
    /// MMDetection and PaddleDetection train.
    Bilinear,
    /// Interpolation that covers all source pixels: `BILINEAR` of Pillow, and torchvision with `antialias=True`.
    Antialias,
}

impl ResizeFilter {
    /// The name in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Area => "area",
            Self::Bilinear => "bilinear",
            Self::Antialias => "antialias",
        }
    }
}

/// Output layout of a detection model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Decoder {
    /// `[1, 4 + classes, anchors]`: centre, size, class scores. Ultralytics YOLOv8.
    Yolov8,
    /// The layout of yolov8, under the name of Ultralytics YOLO11.
    Yolov11,
    /// `[1, anchors, 5 + classes]`: centre, size, objectness, class scores. Ultralytics YOLOv5.
    Yolov5,
    /// `[1, anchors, 5 + classes]`, relative to grid cells with the strides 8, 16 and 32. YOLOX.
    Yolox,
    /// Final boxes of a graph that contains its own suppression: `[1, n, 6]`, `[n, 7]`, or separate boxes, scores and classes.
    End2end,
    /// One box for each query, without suppression: `[1, n, 4 + classes]`, or boxes `[1, n, 4]` and scores `[1, n, classes]`. DETR,
    /// RT-DETR, RF-DETR.
    Detr,
}

impl Decoder {
    /// The name in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Yolov8 => "yolov8",
            Self::Yolov11 => "yolov11",
            Self::Yolov5 => "yolov5",
            Self::Yolox => "yolox",
            Self::End2end => "end2end",
            Self::Detr => "detr",
        }
    }
}

/// Meaning of the four numbers of a box.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BoxFormat {
    /// Left, top, right, bottom.
    Xyxy,
    /// Horizontal and vertical centre, width, height.
    Cxcywh,
    /// Top, left, bottom, right. TensorFlow Object Detection.
    Yxyx,
}

impl BoxFormat {
    /// The name in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Xyxy => "xyxy",
            Self::Cxcywh => "cxcywh",
            Self::Yxyx => "yxyx",
        }
    }
}

/// Unit of the numbers of a box.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BoxUnit {
    /// Pixels of the input of the model.
    Pixel,
    /// Parts of the width and height of the input, 0 to 1.
    Relative,
}

impl BoxUnit {
    /// The name in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pixel => "pixel",
            Self::Relative => "relative",
        }
    }
}

/// Conversion of the output tensors to a prediction.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OutputSpec {
    /// Output layout, for detect. Default: derived from the shape and the metadata where they are unambiguous.
    pub decoder: Option<Decoder>,
    /// Meaning of the four numbers of a box, for detect. Default: what the decoder and the boxes on test pictures show.
    pub box_format: Option<BoxFormat>,
    /// Unit of the numbers of a box, for detect. Default: what the boxes on test pictures show.
    pub box_unit: Option<BoxUnit>,
    /// Number of the first class, for detect with an output of class numbers: 1 for torchvision, where 0 is the background. Default:
    /// 0 where the exporter is known.
    #[schemars(range(max = 1000))]
    pub first_class: Option<u32>,
    /// Names of the classes by their index. Default: the metadata of the model, otherwise `class_0`, `class_1` and so on.
    #[schemars(length(max = 10_000), inner(length(max = 256)))]
    pub labels: Option<Vec<String>>,
    /// Lowest score that is reported, 0 to 1. Default: 0.25 for detect, 0 for other tasks.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub threshold: Option<f32>,
    /// Intersection over union above which two boxes of one class count as the same object, 0 to 1. Default: 0.45.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub iou: Option<f32>,
    /// Largest number of classes or boxes that are reported. Default: 5 for classify, 100 for detect.
    #[schemars(range(min = 1, max = 100_000))]
    pub top_k: Option<u32>,
    /// Whether the result contains the anomaly map, for anomaly. Default: false.
    pub map: Option<bool>,
}

/// The inference engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// The best engine of the node.
    #[default]
    Auto,
    /// tract, which is part of the agent.
    Tract,
    /// ONNX Runtime, on nodes with its library.
    OnnxRuntime,
}

/// The device for inference.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// The best device of the node.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A graphics processor.
    Gpu,
}

/// Where a version runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Isolation {
    /// In a worker process of its own.
    #[default]
    Auto,
    /// In a worker process of its own: a crash, a hang or an allocation of the model ends the worker and nothing else.
    Process,
    /// In the agent's process, for nodes with very little memory. A crash of the model ends the agent.
    InProcess,
}

/// Engine and resources of a model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RuntimeSpec {
    /// The inference engine. Default: `auto`.
    pub engine: Option<EngineChoice>,
    /// The device. Default: `auto`.
    pub device: Option<DeviceChoice>,
    /// Threads of one inference. Default: 1. tract always uses one thread; use `instances` to run on several cores.
    #[schemars(range(min = 1, max = 256))]
    pub threads: Option<u32>,
    /// Number of parallel inferences, each for a different stream. Default: 1.
    #[schemars(range(min = 1, max = 64))]
    pub instances: Option<u32>,
    /// Largest number of frames in one inference. More than 1 requires a model whose batch dimension is
    /// variable. Default: 1.
    #[schemars(range(min = 1, max = 1024))]
    pub max_batch_size: Option<u32>,
    /// Longest time in microseconds that a frame waits for further frames of its batch. Default: 0: a batch consists of
    /// the frames that are waiting already.
    #[schemars(range(min = 0, max = 10_000_000))]
    pub max_queue_delay_microseconds: Option<u32>,
    /// Whether the previous version is unloaded before this one is loaded, for nodes without memory for both. Frames
    /// that arrive in between are skipped. Default: false.
    pub stop_first: Option<bool>,
    /// Where the version runs. Default: `auto`.
    pub isolation: Option<Isolation>,
    /// Memory in MiB that the worker process may allocate; an allocation beyond it ends the worker. Default: four times what
    /// admission measured per instance, at least 256.
    #[schemars(range(min = 32, max = 1_048_576))]
    #[serde(rename = "memoryMiB")]
    pub memory_mib: Option<u32>,
}

/// The fields of an `EdgeModel` that the data plane uses.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// What the outputs mean. Default: the metadata of the model, or `classify` for a model whose only output is
    /// `[batch, classes]`.
    pub task: Option<Task>,
    /// Conversion of a picture to the input tensor.
    pub input: InputSpec,
    /// Conversion of the output tensors to a prediction.
    pub output: OutputSpec,
    /// Engine and resources.
    pub runtime: RuntimeSpec,
}
