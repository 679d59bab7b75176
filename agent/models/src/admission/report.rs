//! What an admission finds out beside its verdict: the facts of the file, how it is used, and its answer to a picture. `lineside check` prints
//! it.

use lineside_inference::graph::{GraphInfo, TensorMetadata};
use lineside_inference::pipeline::Pipeline;
use lineside_inference::settings::TaskSettings;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Benchmark;

/// The findings. Absent parts were not reached.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct AdmissionReport {
    /// What the file states.
    pub graph: Option<GraphReport>,
    /// How the model is used.
    pub pipeline: Option<PipelineReport>,
    /// The answer to a picture.
    pub image: Option<ImageReport>,
    /// The measurements of a model that runs, but only with the task `tensor`: the manifest does not fit it.
    pub as_tensor: Option<Benchmark>,
    /// What people should know.
    pub notes: Vec<String>,
}

/// What a model file states.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GraphReport {
    /// Who wrote the file.
    pub producer: String,
    /// Version of the operator set.
    pub opset: i64,
    /// Number of operators.
    pub nodes: usize,
    /// Inputs.
    pub inputs: Vec<TensorReport>,
    /// Outputs.
    pub outputs: Vec<TensorReport>,
    /// Whether the file names its classes.
    pub has_labels: bool,
}

/// A declared tensor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TensorReport {
    /// Name in the graph.
    pub name: String,
    /// Element type as in the Open Inference Protocol, or `unknown`.
    pub datatype: String,
    /// Sizes; -1 is variable.
    pub shape: Vec<i64>,
}

/// How a model is used.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PipelineReport {
    /// Task.
    pub task: String,
    /// Width of the input in pixels.
    pub width: u32,
    /// Height of the input in pixels.
    pub height: u32,
    /// How pictures are fitted to it.
    pub resize: String,
    /// How pixels are computed.
    pub filter: String,
    /// Order of the channels.
    pub color: String,
    /// Mean of each channel.
    pub mean: [f32; 3],
    /// Standard deviation of each channel.
    pub std: [f32; 3],
    /// Meaning and unit of the numbers of a box, for `detect`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boxes: Option<String>,
    /// Names of the classes.
    pub labels: Vec<String>,
}

/// The answer to a picture. Times in milliseconds.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ImageReport {
    /// The file.
    pub file: String,
    /// Why the picture has no prediction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Width of the picture in pixels.
    pub width: u32,
    /// Height of the picture in pixels.
    pub height: u32,
    /// Time to decode it.
    pub decode_ms: f64,
    /// Time to fill the input tensor.
    pub preprocess_ms: f64,
    /// Time of the engine.
    pub infer_ms: f64,
    /// Time to read the outputs.
    pub postprocess_ms: f64,
    /// The prediction, as in results.
    pub prediction: Value,
}

impl From<&GraphInfo> for GraphReport {
    fn from(graph: &GraphInfo) -> Self {
        Self {
            producer: graph.producer.clone(),
            opset: graph.opset,
            nodes: graph.nodes,
            inputs: graph.inputs.iter().map(TensorReport::from).collect(),
            outputs: graph.outputs.iter().map(TensorReport::from).collect(),
            has_labels: graph.class_names().is_some(),
        }
    }
}

impl From<&TensorMetadata> for TensorReport {
    fn from(info: &TensorMetadata) -> Self {
        let datatype = info.data_type.map_or("unknown", |data_type| data_type.name());
        Self { name: info.name.clone(), datatype: datatype.to_owned(), shape: info.protocol_shape() }
    }
}

impl From<&Pipeline> for PipelineReport {
    fn from(pipeline: &Pipeline) -> Self {
        let (input, output) = (pipeline.input(), pipeline.output());
        let boxes = match &output.task {
            TaskSettings::Detect(detect) => {
                Some(format!("{} {}", detect.coordinates.format.name(), detect.coordinates.unit.name()))
            }
            _ => None,
        };
        Self {
            task: output.task.task().name().to_owned(),
            width: input.width,
            height: input.height,
            resize: input.resize.name().to_owned(),
            filter: input.filter.name().to_owned(),
            color: input.color.name().to_owned(),
            mean: input.mean,
            std: input.std,
            boxes,
            labels: output.labels.iter().map(str::to_owned).collect(),
        }
    }
}
