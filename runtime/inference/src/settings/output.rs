//! How the outputs of the first runs become a prediction.

use std::sync::Arc;

use super::boxes::{BoxReading, Detector};
use super::labels::KnownLabels;
use super::{
    AnomalySettings, ClassifySettings, DetectSettings, InputSettings, Labels, OutputSettings, TaskSettings, bad_spec,
    described,
};
use crate::Result;
use crate::graph::{Activation, GraphInfo};
use lineside_api::spec::{ModelSpec, Task};
use lineside_api::tensor::Tensor;

/// Boxes or classes in one result at most.
const TOP_K_MAX: u32 = 1000;

/// Decides how outputs become a prediction, from the outputs of a run on each test picture. The first picture is grey.
///
/// # Errors
/// [`ErrorKind::BadSpec`] when the outputs do not look like the task, or labels and classes differ in number.
pub fn output(
    spec: &ModelSpec,
    graph: &GraphInfo,
    task: Task,
    input: &InputSettings,
    runs: &[Vec<Tensor>],
) -> Result<OutputSettings> {
    let outputs = runs.first().map(Vec::as_slice).unwrap_or_default();
    let known = KnownLabels::new(spec, graph);
    let mut assumptions = Vec::new();
    let fraction = |name: &str, asked: Option<f32>, otherwise: f32| match asked.unwrap_or(otherwise) {
        value if (0.0..=1.0).contains(&value) => Ok(value),
        value => Err(bad_spec(format!("spec.output.{name}: {value} is not within 0 and 1"))),
    };
    let top_k = |otherwise: u32| match spec.output.top_k.unwrap_or(otherwise) {
        asked if (1..=TOP_K_MAX).contains(&asked) => Ok(asked as usize),
        asked => Err(bad_spec(format!("spec.output.topK: {asked} is not within 1 and {TOP_K_MAX}"))),
    };
    let (task, labels) = match task {
        Task::Classify => {
            let classes = class_count(graph, outputs)?;
            let activation = match graph.activations.first().copied().unwrap_or(Activation::None) {
                Activation::None if are_probabilities(&outputs[0]) => Activation::Softmax,
                activation => activation,
            };
            let threshold = fraction("threshold", spec.output.threshold, 0.0)?;
            let settings = ClassifySettings { activation, threshold, top_k: top_k(5)? };
            (TaskSettings::Classify(settings), known.for_scores(classes, &mut assumptions)?)
        }
        Task::Detect => {
            let detector = Detector { spec: &spec.output, graph, labels: known.count(), input, runs };
            let reading = detector.read(&mut assumptions)?;
            let BoxReading { layout, coordinates, activation, suppresses, classes, first_class } = reading;
            let labels = match classes {
                Some(classes) => known.for_scores(classes, &mut assumptions)?,
                None => known.for_numbers(first_class)?,
            };
            let settings = DetectSettings {
                layout,
                coordinates,
                activation,
                suppresses,
                threshold: fraction("threshold", spec.output.threshold, 0.25)?,
                iou: fraction("iou", spec.output.iou, 0.45)?,
                top_k: top_k(100)?,
                classes: classes.unwrap_or(0),
                input_width: input.width,
                input_height: input.height,
            };
            (TaskSettings::Detect(settings), labels)
        }
        Task::Anomaly => (TaskSettings::Anomaly(anomaly(spec, graph, outputs)?), Labels::numbered(0)),
        Task::Tensor => (TaskSettings::Tensor, Labels::numbered(0)),
    };
    Ok(OutputSettings {
        labels,
        notes: assumptions,
        names: graph.outputs.iter().map(|output| Arc::from(output.name.as_str())).collect(),
        task,
    })
}

/// The number of classes of a classifier: its first output holds one score per class and nothing else.
fn class_count(graph: &GraphInfo, outputs: &[Tensor]) -> Result<usize> {
    let shape = outputs.first().map(Tensor::shape).unwrap_or_default();
    let classes = shape.iter().copied().max().unwrap_or(0);
    if classes == 0 || shape.iter().product::<usize>() != classes || shape.len() > 4 {
        return Err(bad_spec(format!(
            "task classify needs one score per class, but the output {} has the shape {shape:?}",
            described(graph.outputs.get(..1).unwrap_or_default())
        )));
    }
    Ok(classes)
}

/// Whether scores of more than one class are already probabilities, as those of a softmax that was exported in pieces.
fn are_probabilities(scores: &Tensor) -> bool {
    let scores = scores.to_f32();
    scores.len() > 1 && scores.iter().all(|score| *score >= 0.0) && (scores.iter().sum::<f32>() - 1.0).abs() < 1e-3
}

/// Which outputs of an anomaly model are its score and its map.
fn anomaly(spec: &ModelSpec, graph: &GraphInfo, outputs: &[Tensor]) -> Result<AnomalySettings> {
    let named = |index: &usize, part: &str| {
        graph.outputs.get(*index).is_some_and(|output| output.name.to_lowercase().contains(part))
    };
    let is_float = |index: &usize| outputs[*index].data().data_type().is_float();
    let scalars = || (0..outputs.len()).filter(is_float).filter(|index| outputs[*index].data().len() == 1);
    let pictures = || {
        (0..outputs.len()).filter(is_float).filter(|index| match *outputs[*index].shape() {
            [.., height, width] => height > 1 && width > 1 && height * width == outputs[*index].data().len(),
            _ => false,
        })
    };
    let score_output = scalars().find(|index| named(index, "score")).or_else(|| scalars().next());
    let map_output = pictures().find(|index| named(index, "map")).or_else(|| pictures().next());
    let with_map = spec.output.map.unwrap_or(false);
    if score_output.is_none() && map_output.is_none() {
        return Err(bad_spec(format!(
            "task anomaly needs an output with one score or with one map, but the model gives {}",
            described(&graph.outputs)
        )));
    }
    if with_map && map_output.is_none() {
        return Err(bad_spec("spec.output.map: the model gives a score and no map".to_owned()));
    }
    Ok(AnomalySettings { score_output, map_output, with_map })
}
