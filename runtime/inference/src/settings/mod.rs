//! What the pipeline does for one model: the manifest's desired_state joined with the facts of the graph.
//!
//! This happens in two steps, because the shape of an output is certain only once the model has run. [`input`] decides
//! how a picture becomes a tensor and with which input size the engine is to load the model; [`output`] then reads how
//! the tensors of a first run become a prediction. Whatever does not fit is refused here, with the field to change, so
//! that nothing is left to find out on the line.

mod boxes;
mod input;
mod labels;
mod output;

use std::sync::Arc;

use crate::graph::{Activation, TensorMetadata};
use crate::{Error, ErrorKind};
use lineside_api::spec::{BoxFormat, BoxUnit, Color, Resize, ResizeFilter, Task};
use lineside_api::tensor::DataType;

pub(crate) use boxes::RELATIVE_MAX;
pub use input::{input, task};
pub use labels::Labels;
pub use output::output;

/// The strides of the grids that YOLOX's anchors lie on.
pub(crate) const YOLOX_STRIDES: [u32; 3] = [8, 16, 32];

/// Where the channels of the input stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Batch, channels, height, width.
    Nchw,
    /// Batch, height, width, channels.
    Nhwc,
}

/// How a picture becomes the model's input.
#[derive(Debug, Clone, PartialEq)]
pub struct InputSettings {
    /// Element type of the input.
    pub data_type: DataType,
    /// Order of its dimensions.
    pub layout: Layout,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// How the picture is loaded to that size.
    pub resize: Resize,
    /// Order of the channels.
    pub color: Color,
    /// How pixels are computed at that size.
    pub filter: ResizeFilter,
    /// Whether a picture is turned as its metadata states.
    pub auto_rotate: bool,
    /// Per channel, in pixel units.
    pub mean: [f32; 3],
    /// Per channel, in pixel units.
    pub std: [f32; 3],
}

impl InputSettings {
    /// 1 for grey, else 3.
    pub fn channels(&self) -> usize {
        if self.color == Color::Gray { 1 } else { 3 }
    }

    /// The shape of the input tensor.
    pub fn shape(&self) -> Vec<usize> {
        let (height, width) = (self.height as usize, self.width as usize);
        match self.layout {
            Layout::Nchw => vec![1, self.channels(), height, width],
            Layout::Nhwc => vec![1, height, width, self.channels()],
        }
    }
}

#[cfg(test)]
impl InputSettings {
    /// RGB floats that are the pixel values, for tests.
    pub(crate) fn of_pixel_values(width: u32, height: u32) -> Self {
        Self {
            data_type: DataType::F32,
            layout: Layout::Nchw,
            width,
            height,
            resize: Resize::Stretch,
            filter: ResizeFilter::Bilinear,
            auto_rotate: true,
            color: Color::Rgb,
            mean: [0.0; 3],
            std: [1.0; 3],
        }
    }
}

/// How output tensors become a prediction.
#[derive(Debug, Clone, PartialEq)]
pub struct OutputSettings {
    /// By task.
    pub task: TaskSettings,
    /// Names of the classes.
    pub labels: Labels,
    /// Names of the outputs.
    pub names: Vec<Arc<str>>,
    /// What people should know: what neither the manifest nor the file states and is assumed, and how the engine runs the model.
    pub notes: Vec<String>,
}

/// The part of the output settings that depends on the task.
#[derive(Debug, Clone, PartialEq)]
pub enum TaskSettings {
    /// Class scores.
    Classify(ClassifySettings),
    /// Boxes.
    Detect(DetectSettings),
    /// Strangeness.
    Anomaly(AnomalySettings),
    /// Raw outputs.
    Tensor,
}

impl TaskSettings {
    /// The task these settings are for.
    pub fn task(&self) -> Task {
        match self {
            Self::Classify(_) => Task::Classify,
            Self::Detect(_) => Task::Detect,
            Self::Anomaly(_) => Task::Anomaly,
            Self::Tensor => Task::Tensor,
        }
    }
}

/// Settings of `classify`.
#[derive(Debug, Clone, PartialEq)]
pub struct ClassifySettings {
    /// How the graph ends.
    pub activation: Activation,
    /// Lowest score reported.
    pub threshold: f32,
    /// Most classes reported.
    pub top_k: usize,
}

/// How boxes lie in the outputs; see [`crate::postprocess`] for the layouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BoxLayout {
    /// `[1, 4 + classes, anchors]`.
    ClassRows,
    /// `[1, anchors, 4 + classes]`, or 5 with an objectness.
    AnchorRows {
        /// Whether an objectness stands before the class scores.
        objectness: bool,
    },
    /// `[1, anchors, 5 + classes]` relative to a grid.
    Grid,
    /// Rows of ready boxes.
    Sorted {
        /// 6 or 7.
        columns: usize,
    },
    /// Ready boxes in outputs of their own; the numbers are the outputs' indices.
    Split {
        /// Output of boxes.
        boxes: usize,
        /// Output of scores.
        scores: usize,
        /// Output of class numbers; one class only where there is none.
        classes: Option<usize>,
        /// Output with the number of boxes; all of them where there is none.
        count: Option<usize>,
    },
    /// Ready boxes with their scores, `[1, n, 5]`, and class numbers; the numbers are the outputs' indices.
    Scored {
        /// Output of boxes and scores.
        boxes: usize,
        /// Output of class numbers.
        classes: usize,
    },
    /// Boxes `[1, n, 4]` and class scores `[1, n, classes]`; the numbers are the outputs' indices.
    Queries {
        /// Output of boxes.
        boxes: usize,
        /// Output of class scores.
        scores: usize,
    },
}

impl BoxLayout {
    /// Whether the model gives class numbers, and not one score for each class.
    pub fn has_class_numbers(self) -> bool {
        matches!(self, Self::Sorted { .. } | Self::Split { .. } | Self::Scored { .. })
    }
}

/// What the four numbers of a box mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BoxCoordinates {
    /// Which numbers they are.
    pub format: BoxFormat,
    /// Their unit.
    pub unit: BoxUnit,
}

impl BoxCoordinates {
    /// Centre and size in pixels.
    pub(crate) const CENTRES: Self = Self { format: BoxFormat::Cxcywh, unit: BoxUnit::Pixel };

    /// A box as left, top, right, bottom in pixels of an input with these sides.
    pub fn corners(self, [a, b, c, d]: [f32; 4], width: u32, height: u32) -> [f32; 4] {
        let [left, top, right, bottom] = match self.format {
            BoxFormat::Xyxy => [a, b, c, d],
            BoxFormat::Yxyx => [b, a, d, c],
            BoxFormat::Cxcywh => [a - c / 2.0, b - d / 2.0, a + c / 2.0, b + d / 2.0],
        };
        let [x, y] = match self.unit {
            BoxUnit::Pixel => [1.0, 1.0],
            BoxUnit::Relative => [width as f32, height as f32],
        };
        [left * x, top * y, right * x, bottom * y]
    }
}

/// Settings of `detect`.
#[derive(Debug, Clone, PartialEq)]
pub struct DetectSettings {
    /// Where the boxes stand.
    pub layout: BoxLayout,
    /// What the numbers of a box mean.
    pub coordinates: BoxCoordinates,
    /// What makes probabilities of the class scores.
    pub activation: ScoreActivation,
    /// Whether overlapping boxes are still to be suppressed.
    pub suppresses: bool,
    /// Lowest score reported.
    pub threshold: f32,
    /// Overlap beyond which two boxes of a class are one.
    pub iou: f32,
    /// Most boxes reported.
    pub top_k: usize,
    /// Number of classes; 0 where the output does not tell.
    pub classes: usize,
    /// Width of the model's input, in pixels.
    pub input_width: u32,
    /// Height of the model's input, in pixels.
    pub input_height: u32,
}

/// What makes probabilities of class scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScoreActivation {
    /// They are probabilities.
    None,
    /// A sigmoid of each.
    Sigmoid,
    /// A softmax over all, of which the last stands for no object.
    Softmax,
}

/// Settings of `anomaly`. At least one of the outputs is there.
#[derive(Debug, Clone, PartialEq)]
pub struct AnomalySettings {
    /// Index of the output with the score.
    pub score_output: Option<usize>,
    /// Index of the output with the map.
    pub map_output: Option<usize>,
    /// Whether the map is reported.
    pub with_map: bool,
}

/// Tensors in words: `images FP32 [-1, 3, 320, 320]`.
pub(crate) fn described(tensors: &[TensorMetadata]) -> String {
    let one = |tensor: &TensorMetadata| {
        let kind = tensor.data_type.map_or("of another type", DataType::name);
        match &tensor.shape {
            Some(_) => format!("`{}` {kind} {:?}", tensor.name, tensor.protocol_shape()),
            None => format!("`{}` {kind} of any shape", tensor.name),
        }
    };
    tensors.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn bad_spec(message: String) -> Error {
    Error::new(ErrorKind::BadSpec, message)
}
