//! The result of one inspection.

use std::time::{Duration, SystemTime};

use schemars::JsonSchema;
use serde::Serialize;

use super::prediction::PredictionInfo;
use crate::prediction::Timings;
use crate::spec::Task;
use crate::verdict::Verdict;
use lineside_common::clock;

/// The result of one inspection, published with QoS 1 on `{prefix}/v1/{site}/{node}/{stream}/result`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ResultMessage<'a> {
    /// Time of the result, RFC 3339 in UTC.
    pub ts: String,
    /// Name of the site.
    pub site: &'a str,
    /// Name of the node.
    pub node: &'a str,
    /// Name of the stream.
    pub stream: &'a str,
    /// The model version that inspected the frame.
    pub model: &'a ModelInfo,
    /// The task of the model, which determines the fields of the prediction.
    pub task: Task,
    /// The prediction; its fields depend on the task.
    #[serde(flatten)]
    pub prediction: PredictionInfo,
    /// The verdict of the stream's rule; `none` without a rule.
    pub verdict: Verdict,
    /// The inspected frame.
    pub frame: FrameInfo,
    /// Duration of each stage, in milliseconds.
    pub latency_ms: Latency,
    /// `false` while the clock of the node has never been set. `ts` is then meaningless.
    pub clock_synced: bool,
    /// Whether the result is older than the connection that delivers it. Always the last field.
    pub historical: bool,
}

/// The model version that inspected a frame.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct ModelInfo {
    /// Name of the model.
    pub name: String,
    /// Version of the model.
    pub version: u64,
    /// SHA-256 of the loaded file: `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// The inference engine: `tract` or `onnxruntime`.
    pub engine: String,
    /// The device: `cpu` or `gpu`.
    pub device: String,
}

/// The inspected frame.
#[derive(Debug, Serialize, JsonSchema)]
pub struct FrameInfo {
    /// Name of the frame, such as its file name. Absent when the source gives no names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Width of the source picture, in pixels.
    pub width: u32,
    /// Height of the source picture, in pixels.
    pub height: u32,
    /// Time at which the agent received the frame, RFC 3339 in UTC.
    pub captured_at: String,
}

impl FrameInfo {
    /// Describes an inspected frame.
    pub fn new(name: Option<String>, width: u32, height: u32, captured_at: SystemTime) -> Self {
        Self { name, width, height, captured_at: clock::rfc3339(captured_at) }
    }
}

/// Duration of each stage of an inspection, in milliseconds.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Latency {
    /// Waiting for the model.
    pub queue: f64,
    /// Decoding of the encoded picture.
    pub decode: f64,
    /// Conversion of the pixels to the input tensor.
    pub preprocess: f64,
    /// Execution of the graph by the engine.
    pub infer: f64,
    /// Conversion of the output tensors to the prediction.
    pub postprocess: f64,
    /// Time from the capture to the result.
    pub total: f64,
}

impl Latency {
    /// The latency of one frame that waited for `queue`, with `total` as the time from its capture to its result.
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
