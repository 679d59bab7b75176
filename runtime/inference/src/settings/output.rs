//! How the outputs of a first run become a prediction.

use std::sync::Arc;

use super::{
    AnomalySettings, BoxLayout, ClassifySettings, DetectSettings, InputSettings, Labels, OutputSettings, TaskSettings,
    YOLOX_STRIDES, bad_spec, described,
};
use crate::Result;
use crate::graph::{Activation, GraphInfo};
use lineside_api::spec::{Decoder, ModelSpec, Task};
use lineside_api::tensor::{DataType, Tensor};

/// Boxes or classes in one result at most.
const TOP_K_MAX: u32 = 1000;

/// Decides how the outputs of a first run become a prediction.
///
/// # Errors
/// [`ErrorKind::BadSpec`] when the outputs do not look like the task, or labels and classes differ in number.
pub fn output(
    spec: &ModelSpec,
    graph: &GraphInfo,
    task: Task,
    input: &InputSettings,
    outputs: &[Tensor],
) -> Result<OutputSettings> {
    let known = KnownLabels::new(spec, graph);
    let fraction = |name: &str, asked: Option<f32>, otherwise: f32| match asked.unwrap_or(otherwise) {
        value if (0.0..=1.0).contains(&value) => Ok(value),
        value => Err(bad_spec(format!("spec.output.{name}: {value} is not within 0 and 1"))),
    };
    let top_k = |otherwise: u32| match spec.output.top_k.unwrap_or(otherwise) {
        asked if (1..=TOP_K_MAX).contains(&asked) => Ok(asked as usize),
        asked => Err(bad_spec(format!("spec.output.topK: {asked} is not within 1 and {TOP_K_MAX}"))),
    };
    let (task, classes) = match task {
        Task::Classify => {
            let classes = class_count(graph, outputs)?;
            let activation = match graph.activations.first().copied().unwrap_or(Activation::None) {
                Activation::None if are_probabilities(&outputs[0]) => Activation::Softmax,
                activation => activation,
            };
            let threshold = fraction("threshold", spec.output.threshold, 0.0)?;
            (TaskSettings::Classify(ClassifySettings { activation, threshold, top_k: top_k(5)? }), Some(classes))
        }
        Task::Detect => {
            let (layout, classes) = box_layout(spec.output.decoder, graph, &known, input, outputs)?;
            let settings = DetectSettings {
                layout,
                threshold: fraction("threshold", spec.output.threshold, 0.25)?,
                iou: fraction("iou", spec.output.iou, 0.45)?,
                top_k: top_k(100)?,
                classes: classes.unwrap_or(0),
                input_width: input.width,
                input_height: input.height,
            };
            (TaskSettings::Detect(settings), classes)
        }
        Task::Anomaly => (TaskSettings::Anomaly(anomaly(spec, graph, outputs)?), None),
        Task::Tensor | Task::Segment => (TaskSettings::Tensor, None),
    };
    Ok(OutputSettings {
        labels: known.for_classes(classes)?,
        names: graph.outputs.iter().map(|output| Arc::from(output.name.as_str())).collect(),
        task,
    })
}

/// Where the labels come from, for a message that names the right place.
struct KnownLabels {
    names: Option<Vec<String>>,
    place: &'static str,
}

impl KnownLabels {
    fn new(spec: &ModelSpec, graph: &GraphInfo) -> Self {
        match &spec.output.labels {
            Some(labels) => Self { names: Some(labels.clone()), place: "spec.output.labels" },
            None => Self { names: graph.labels(), place: "the model's metadata (override with spec.output.labels)" },
        }
    }

    fn count(&self) -> Option<usize> {
        self.names.as_ref().map(Vec::len)
    }

    fn for_classes(&self, classes: Option<usize>) -> Result<Labels> {
        match (&self.names, classes) {
            (Some(names), Some(classes)) if names.len() != classes => {
                Err(bad_spec(format!("{} has {} names, but the model has {classes} classes", self.place, names.len())))
            }
            (Some(names), _) => Ok(Labels::named(names)),
            (None, classes) => Ok(Labels::numbered(classes.unwrap_or(0))),
        }
    }
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

/// Which layout the boxes have, and of how many classes.
fn box_layout(
    decoder: Option<Decoder>,
    graph: &GraphInfo,
    known: &KnownLabels,
    input: &InputSettings,
    outputs: &[Tensor],
) -> Result<(BoxLayout, Option<usize>)> {
    let first = outputs.first().map(Tensor::shape).unwrap_or_default();
    let Some(decoder) = decoder.or_else(|| guess_decoder(known.count(), outputs)) else {
        return Err(bad_spec(format!(
            "the boxes in {} with shape {first:?} could be read in more than one way; set spec.output.decoder to \
             yolov8, yolov5, yolox or end2end",
            described(&graph.outputs)
        )));
    };
    let wrong = |expected: &str| {
        bad_spec(format!("spec.output.decoder: {decoder:?} reads {expected}, but the output has the shape {first:?}"))
    };
    match decoder {
        Decoder::Yolov8 | Decoder::Yolov11 => match *first {
            // There are far more anchors than classes; labels settle the rare case where that could mislead.
            [1, rows, anchors] if rows > 4 && (known.count() == Some(rows - 4) || rows < anchors) => {
                Ok((BoxLayout::ClassRows, Some(rows - 4)))
            }
            [1, _, columns] if columns > 4 => Ok((BoxLayout::AnchorRows { objectness: false }, Some(columns - 4))),
            _ => Err(wrong("[1, 4 + classes, anchors]")),
        },
        Decoder::Yolov5 => match *first {
            [1, _, columns] if columns > 5 => Ok((BoxLayout::AnchorRows { objectness: true }, Some(columns - 5))),
            _ => Err(wrong("[1, anchors, 5 + classes]")),
        },
        Decoder::Yolox => {
            let anchors: usize = YOLOX_STRIDES
                .iter()
                .map(|stride| (input.width / stride) as usize * (input.height / stride) as usize)
                .sum();
            match *first {
                [1, rows, columns] if columns > 5 && rows == anchors => Ok((BoxLayout::Grid, Some(columns - 5))),
                _ => Err(wrong(&format!(
                    "[1, {anchors}, 5 + classes] for an input of {}x{} (strides 8, 16 and 32)",
                    input.width, input.height
                ))),
            }
        }
        Decoder::End2end => match (outputs.len(), first.last()) {
            (1, Some(columns @ (6 | 7))) => Ok((BoxLayout::Sorted { columns: *columns }, None)),
            _ => split_outputs(graph, outputs).map(|layout| (layout, None)).ok_or_else(|| {
                wrong("[1, n, 6], [n, 7], or outputs of their own for boxes [.., 4], scores and classes")
            }),
        },
    }
}

/// The decoder, where shape and number of labels leave no doubt.
fn guess_decoder(labels: Option<usize>, outputs: &[Tensor]) -> Option<Decoder> {
    /// End-to-end models give a few hundred rows; a raw head has thousands of anchors.
    const SORTED_ROWS_MAX: usize = 1000;
    if outputs.len() >= 3 {
        return outputs.iter().any(|output| output.shape().last() == Some(&4)).then_some(Decoder::End2end);
    }
    match (outputs.first()?.shape(), labels) {
        ([1, rows, 6], _) if (7..=SORTED_ROWS_MAX).contains(rows) => Some(Decoder::End2end),
        ([_, 7], _) => Some(Decoder::End2end),
        ([1, rows, _], Some(classes)) if *rows == 4 + classes => Some(Decoder::Yolov8),
        ([1, _, columns], Some(classes)) if *columns == 5 + classes => Some(Decoder::Yolov5),
        ([1, rows, anchors], None) if *rows > 4 && rows < anchors => Some(Decoder::Yolov8),
        _ => None,
    }
}

/// Distinguishes separate outputs: boxes by their last dimension, the others by type, size and name.
fn split_outputs(graph: &GraphInfo, outputs: &[Tensor]) -> Option<BoxLayout> {
    let boxes = outputs.iter().position(|output| output.shape().last() == Some(&4))?;
    let named = |index: usize, parts: &[&str]| {
        let name = graph.outputs.get(index).map(|output| output.name.to_lowercase()).unwrap_or_default();
        parts.iter().any(|part| name.contains(part))
    };
    let is_integer = |output: &Tensor| {
        matches!(output.data().data_type(), DataType::I32 | DataType::I64 | DataType::U8 | DataType::U32)
    };
    let others = || outputs.iter().enumerate().filter(|(index, _)| *index != boxes);
    let count = others()
        .find(|(index, output)| output.data().len() == 1 && named(*index, &["num", "count"]))
        .map(|(index, _)| index);
    let rest = || others().filter(|(index, _)| Some(*index) != count);
    let classes =
        rest().find(|(index, output)| is_integer(output) || named(*index, &["label", "class"])).map(|(index, _)| index);
    let scores = rest().find(|(index, _)| Some(*index) != classes).map(|(index, _)| index)?;
    Some(BoxLayout::Split { boxes, scores, classes, count })
}

/// Which outputs of an anomaly model are its score and its map.
fn anomaly(spec: &ModelSpec, graph: &GraphInfo, outputs: &[Tensor]) -> Result<AnomalySettings> {
    let named = |index: &usize, part: &str| {
        graph.outputs.get(*index).is_some_and(|output| output.name.to_lowercase().contains(part))
    };
    let is_float =
        |index: &usize| matches!(outputs[*index].data().data_type(), DataType::F32 | DataType::F16 | DataType::F64);
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
