//! From the model's output tensors to a [`Prediction`], one file per task.

mod anomaly;
mod classify;
mod detect;
mod nms;

use crate::preprocess::Placement;
use crate::settings::{OutputSettings, TaskSettings};
use crate::{Error, ErrorKind, Result};
use lineside_api::prediction::{NamedTensor, Prediction};
use lineside_api::tensor::Tensor;

/// Reads a prediction out of the outputs of one run.
///
/// # Errors
/// [`ErrorKind::BadOutput`] when the outputs have changed their shape since the model was loaded, or hold NaN.
pub fn run(settings: &OutputSettings, outputs: Vec<Tensor>, placement: &Placement) -> Result<Prediction> {
    match &settings.task {
        TaskSettings::Classify(classify) => {
            classify::run(classify, &settings.labels, &outputs).map(Prediction::Classes)
        }
        TaskSettings::Detect(detect) => {
            detect::run(detect, &settings.labels, &outputs, placement).map(Prediction::Detections)
        }
        TaskSettings::Anomaly(anomaly) => anomaly::run(anomaly, &outputs),
        TaskSettings::Tensor => Ok(Prediction::Tensors(
            settings
                .names
                .iter()
                .zip(outputs)
                .map(|(name, tensor)| NamedTensor { name: name.clone(), tensor })
                .collect(),
        )),
    }
}

/// The output at `index`, with values that are numbers.
fn numbers(outputs: &[Tensor], index: usize) -> Result<std::borrow::Cow<'_, [f32]>> {
    let output = outputs
        .get(index)
        .ok_or_else(|| Error::new(ErrorKind::BadOutput, format!("the model gave no output {index}")))?;
    let values = output.to_f32();
    // Summing comparisons instead of stopping at the first lets the compiler use vectors.
    let strange: usize = values.iter().map(|value| usize::from(value.is_nan())).sum();
    if strange > 0 {
        return Err(Error::new(
            ErrorKind::BadOutput,
            format!("{strange} of the {} values the model gave are not numbers (NaN)", values.len()),
        ));
    }
    Ok(values)
}

/// The error for an output whose shape is not the one the settings were made for.
fn changed_shape(shape: &[usize]) -> Error {
    Error::new(ErrorKind::BadOutput, format!("the model's output changed its shape to {shape:?} while it ran"))
}
