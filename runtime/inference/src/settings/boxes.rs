//! How the outputs of a detector are read: the layout by shape, names and metadata, and the meaning of the four numbers of a box by the
//! boxes that the model gave for test pictures.
//!
//! A shape alone does not tell left, top, right, bottom from centre and size, or pixels from parts of the picture. What the boxes on test
//! pictures contradict is refused or read differently; what they cannot show is stated as an assumption. The numbers are looked at with
//! every frame as well (see [`crate::postprocess`]), because a test picture may show no object.

use lineside_api::spec::{BoxFormat, BoxUnit, Decoder, OutputSpec};
use lineside_api::tensor::{DataType, Tensor};

use super::{BoxCoordinates, BoxLayout, InputSettings, ScoreActivation, YOLOX_STRIDES, bad_spec, described};
use crate::Result;
use crate::graph::GraphInfo;

/// Numbers beyond this are pixels: boxes that are parts of a picture reach a little beyond it at most.
pub(crate) const RELATIVE_MAX: f32 = 1.5;
/// Boxes from which the meaning of their numbers is concluded.
const BOXES_MIN: usize = 3;
/// Part of the boxes that may have their right side left of their left side and still count as corners: an untrained model.
const INVERTED_MAX: f32 = 0.1;
/// Rows of a model that suppresses by itself, or has one for each query. A raw head has thousands of anchors.
const ROWS_MAX: usize = 1000;

/// How a detector is read.
pub(super) struct BoxReading {
    pub(super) layout: BoxLayout,
    pub(super) coordinates: BoxCoordinates,
    pub(super) activation: ScoreActivation,
    pub(super) suppresses: bool,
    /// `None` for a model that gives class numbers.
    pub(super) classes: Option<usize>,
    /// The number of the first class, for a model that gives class numbers, where it is known.
    pub(super) first_class: Option<usize>,
}

/// What is known of a detector before its boxes are looked at.
pub(super) struct Detector<'a> {
    pub(super) spec: &'a OutputSpec,
    pub(super) graph: &'a GraphInfo,
    /// Number of names of classes.
    pub(super) labels: Option<usize>,
    pub(super) input: &'a InputSettings,
    /// The outputs of a run on each test picture.
    pub(super) runs: &'a [Vec<Tensor>],
}

impl Detector<'_> {
    /// Decides how the outputs are read.
    ///
    /// # Errors
    /// With the setting to change, when no decoder reads the outputs, several do, or the boxes contradict the manifest.
    pub(super) fn read(&self, assumptions: &mut Vec<String>) -> Result<BoxReading> {
        let decoder = match self.spec.decoder {
            Some(decoder) => decoder,
            None => self.guess_decoder()?,
        };
        let (layout, classes) = self.layout(decoder)?;
        let coordinates = self.coordinates(decoder, layout, assumptions)?;
        let activation = self.activation(decoder, layout, classes)?;
        let classes = if activation == ScoreActivation::Softmax { classes.map(|classes| classes - 1) } else { classes };
        let first_class = match (self.spec.first_class, layout) {
            (Some(first), _) if layout.has_class_numbers() => Some(first as usize),
            (Some(_), _) => {
                return Err(bad_spec(
                    "spec.output.firstClass: the model gives one score for each class and no class numbers".to_owned(),
                ));
            }
            (None, BoxLayout::Split { classes: Some(classes), .. }) => self.known_first_class(classes),
            (None, _) => Some(0),
        };
        let suppresses = !layout.has_class_numbers() && decoder != Decoder::Detr;
        Ok(BoxReading { layout, coordinates, activation, suppresses, classes, first_class })
    }

    fn first_run(&self) -> &[Tensor] {
        self.runs.first().map(Vec::as_slice).unwrap_or_default()
    }

    fn shape(&self, index: usize) -> &[usize] {
        self.first_run().get(index).map(Tensor::shape).unwrap_or_default()
    }

    fn name(&self, index: usize) -> String {
        self.graph.outputs.get(index).map(|output| output.name.to_lowercase()).unwrap_or_default()
    }

    /// TensorFlow Object Detection numbers classes from 1, EfficientNMS of TensorRT from 0. Others use other names for both.
    fn known_first_class(&self, classes: usize) -> Option<usize> {
        match self.name(classes).as_str() {
            name if name.contains("detection_classes") => Some(1),
            name if name.contains("det_classes") || name.contains("detected_classes") => Some(0),
            _ => None,
        }
    }

    /// The only decoder that reads the outputs.
    fn guess_decoder(&self) -> Result<Decoder> {
        let candidates = self.candidates();
        match candidates.as_slice() {
            [decoder] => Ok(*decoder),
            [] => Err(bad_spec(format!(
                "no decoder reads boxes from the outputs {}{}; it looks for [1, 4 + classes, anchors] (yolov8), [1, anchors, 5 + classes] \
                 (yolov5, yolox), [1, n, 6] or separate boxes, scores and classes (end2end), and one box for each query (detr); use task \
                 tensor to get the raw outputs",
                described(&self.graph.outputs),
                self.labels.map(|labels| format!(" and {labels} classes")).unwrap_or_default(),
            ))),
            several => Err(bad_spec(format!(
                "the boxes in {} with shape {:?} could be read in more than one way; set spec.output.decoder to {}",
                described(&self.graph.outputs),
                self.shape(0),
                several.iter().map(|decoder| decoder.name()).collect::<Vec<_>>().join(" or ")
            ))),
        }
    }

    fn candidates(&self) -> Vec<Decoder> {
        if self.graph.metadata.get("head").is_some_and(|head| head.to_lowercase().contains("rtdetr")) {
            return vec![Decoder::Detr];
        }
        if self.first_run().len() >= 2 {
            let fits = [Decoder::Detr, Decoder::End2end].into_iter().filter(|decoder| self.layout(*decoder).is_ok());
            return fits.collect();
        }
        match (self.shape(0), self.labels) {
            ([1, rows, 6], labels) if (7..=ROWS_MAX).contains(rows) => {
                // Two class scores behind a box, or a score and a class number: the last column shows which, where there are boxes.
                match self.has_class_numbers_in_rows() {
                    Some(false) if labels == Some(2) => vec![Decoder::Detr],
                    _ => vec![Decoder::End2end],
                }
            }
            ([_, 7], _) => vec![Decoder::End2end],
            ([1, rows, columns], Some(classes))
                if *columns == 4 + classes && *rows <= ROWS_MAX && *rows != 4 + classes =>
            {
                vec![Decoder::Detr]
            }
            ([1, rows, _], Some(classes)) if *rows == 4 + classes => vec![Decoder::Yolov8],
            ([1, _, columns], Some(classes)) if *columns == 4 + classes => vec![Decoder::Yolov8],
            ([1, _, columns], Some(classes)) if *columns == 5 + classes => vec![Decoder::Yolov5],
            ([1, rows, anchors], None) if *rows > 4 && rows < anchors => vec![Decoder::Yolov8],
            ([1, rows, columns], None) if *columns > 5 && columns < rows => vec![Decoder::Yolov5, Decoder::Yolov8],
            _ => Vec::new(),
        }
    }

    /// Whether the last of six columns holds whole numbers; `None` without rows.
    fn has_class_numbers_in_rows(&self) -> Option<bool> {
        let last: Vec<f32> =
            self.rows_of(0, 6).filter(|row| row[4] != 0.0 || row[5] != 0.0).map(|row| row[5]).collect();
        if last.iter().any(|value| value.fract() != 0.0) {
            return Some(false);
        }
        (last.len() >= BOXES_MIN).then_some(true)
    }

    /// The rows of an output with so many columns, of all runs.
    fn rows_of(&self, index: usize, columns: usize) -> impl Iterator<Item = Vec<f32>> {
        let outputs = self.runs.iter().filter_map(move |run| run.get(index));
        outputs.flat_map(move |output| {
            let values = output.to_f32();
            values.chunks_exact(columns).map(<[f32]>::to_vec).collect::<Vec<_>>()
        })
    }

    /// Where a decoder finds the boxes, and the number of classes where the shape states it.
    fn layout(&self, decoder: Decoder) -> Result<(BoxLayout, Option<usize>)> {
        let first = self.shape(0);
        let outputs = self.first_run().len();
        let wrong = |expected: &str| {
            bad_spec(format!(
                "spec.output.decoder: {} reads {expected}, but the output has the shape {first:?}",
                decoder.name()
            ))
        };
        match decoder {
            Decoder::Yolov8 | Decoder::Yolov11 => match *first {
                // There are far more anchors than classes; labels settle the rare case where that could mislead.
                [1, rows, anchors] if rows > 4 && (self.labels == Some(rows - 4) || rows < anchors) => {
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
                let cells = |stride: &u32| (self.input.width / stride) as usize * (self.input.height / stride) as usize;
                let anchors: usize = YOLOX_STRIDES.iter().map(cells).sum();
                match *first {
                    [1, rows, columns] if columns > 5 && rows == anchors => Ok((BoxLayout::Grid, Some(columns - 5))),
                    _ => Err(wrong(&format!(
                        "[1, {anchors}, 5 + classes] for an input of {}x{} (strides 8, 16 and 32)",
                        self.input.width, self.input.height
                    ))),
                }
            }
            Decoder::End2end => match (outputs, first) {
                (1, [.., 6]) => Ok((BoxLayout::Sorted { columns: 6 }, None)),
                // Seven columns behind a batch are those of rotated boxes.
                (1, [_, 7]) => Ok((BoxLayout::Sorted { columns: 7 }, None)),
                _ => self.separate_outputs().map(|layout| (layout, None)).ok_or_else(|| {
                    wrong("[1, n, 6], [n, 7], or outputs of their own for boxes [.., 4], scores and classes")
                }),
            },
            Decoder::Detr => self.queries().ok_or_else(|| {
                wrong("[1, n, 4 + classes], or outputs of their own for boxes [1, n, 4] and scores [1, n, classes]")
            }),
        }
    }

    /// One box for each query: `[1, n, 4 + classes]`, `[1, n, 6]` with score and class number, or two outputs.
    fn queries(&self) -> Option<(BoxLayout, Option<usize>)> {
        let outputs = self.first_run();
        if let [only] = outputs {
            return match *only.shape() {
                [1, _, 6] if self.labels != Some(2) || self.has_class_numbers_in_rows() == Some(true) => {
                    Some((BoxLayout::Sorted { columns: 6 }, None))
                }
                [1, _, columns] if columns > 4 => {
                    Some((BoxLayout::AnchorRows { objectness: false }, Some(columns - 4)))
                }
                _ => None,
            };
        }
        let is_float = |output: &Tensor| output.data().data_type().is_float();
        let boxes = outputs.iter().position(|output| matches!(output.shape(), [1, _, 4]) && is_float(output))?;
        let rows = *outputs.get(boxes)?.shape().get(1)?;
        let scores = outputs.iter().enumerate().position(|(index, output)| {
            index != boxes && is_float(output) && matches!(*output.shape(), [1, n, classes] if n == rows && classes > 1)
        })?;
        let classes = *outputs.get(scores)?.shape().last()?;
        Some((BoxLayout::Queries { boxes, scores }, Some(classes)))
    }

    /// Distinguishes separate outputs: boxes by their last dimension, the others by type, size and name.
    fn separate_outputs(&self) -> Option<BoxLayout> {
        let outputs = self.first_run();
        let named = |index: usize, parts: &[&str]| {
            let name = self.name(index);
            parts.iter().any(|part| name.contains(part))
        };
        let is_integer = |output: &Tensor| {
            matches!(output.data().data_type(), DataType::I32 | DataType::I64 | DataType::U8 | DataType::U32)
        };
        if let [one, other] = outputs {
            // Boxes with their scores, and class numbers.
            let pairs = [(0, one, 1, other), (1, other, 0, one)];
            let scored = pairs.iter().find(|(_, boxes, _, classes)| {
                matches!(*boxes.shape(), [.., n, 5] if classes.data().len() == n && is_integer(classes))
            });
            if let Some((boxes, _, classes, _)) = scored {
                return Some(BoxLayout::Scored { boxes: *boxes, classes: *classes });
            }
        }
        let boxes = outputs.iter().position(|output| output.shape().last() == Some(&4))?;
        let rows = outputs.get(boxes)?.data().len() / 4;
        let others = || outputs.iter().enumerate().filter(|(index, _)| *index != boxes);
        let count = others()
            .find(|(index, output)| output.data().len() == 1 && named(*index, &["num", "count"]))
            .map(|(index, _)| index);
        let rest = || others().filter(|(index, output)| Some(*index) != count && output.data().len() == rows);
        let classes = rest()
            .find(|(index, output)| is_integer(output) || named(*index, &["label", "class"]))
            .map(|(index, _)| index);
        let scores = rest().find(|(index, _)| Some(*index) != classes).map(|(index, _)| index)?;
        Some(BoxLayout::Split { boxes, scores, classes, count })
    }

    /// What the numbers of a box mean.
    fn coordinates(
        &self,
        decoder: Decoder,
        layout: BoxLayout,
        assumptions: &mut Vec<String>,
    ) -> Result<BoxCoordinates> {
        if layout == BoxLayout::Grid {
            // The numbers of a cell, which are placed on the grid later.
            return Ok(BoxCoordinates::CENTRES);
        }
        let boxes = self.boxes(layout);
        let evidence = Evidence::of(&boxes);
        let is_tensorflow =
            self.graph.outputs.iter().any(|output| output.name.to_lowercase().contains("detection_boxes"));
        let has_corners = layout.has_class_numbers() && decoder != Decoder::Detr;
        let unit = match (self.spec.box_unit, &evidence) {
            (Some(unit), _) => unit,
            (None, Some(evidence)) if evidence.is_relative => BoxUnit::Relative,
            (None, Some(_)) => BoxUnit::Pixel,
            (None, None) if is_tensorflow || decoder == Decoder::Detr => BoxUnit::Relative,
            (None, None) => BoxUnit::Pixel,
        };
        let usual = match (has_corners, is_tensorflow) {
            (true, true) => BoxFormat::Yxyx,
            (true, false) => BoxFormat::Xyxy,
            (false, _) => BoxFormat::Cxcywh,
        };
        if let (None, Some(evidence)) = (self.spec.box_format, &evidence)
            && has_corners
        {
            if evidence.inverted > INVERTED_MAX {
                return Err(bad_spec(format!(
                    "{} of {} boxes on test pictures have their right side left of their left side, or their bottom above their top, so \
                     they are not corners; set spec.output.boxFormat to cxcywh, or spec.output.decoder",
                    (evidence.inverted * evidence.boxes as f32).round(),
                    evidence.boxes
                )));
            }
            if evidence.is_relative && !is_tensorflow {
                return Err(bad_spec(
                    "the boxes on test pictures are parts of the picture, and their shape does not show in which order; set \
                     spec.output.boxFormat to xyxy or yxyx"
                        .to_owned(),
                ));
            }
        }
        let coordinates = BoxCoordinates { format: self.spec.box_format.unwrap_or(usual), unit };
        let is_stated = self.spec.box_format.is_some() && self.spec.box_unit.is_some();
        let is_unusual = unit == BoxUnit::Relative && decoder != Decoder::Detr;
        if !is_stated && (evidence.is_none() || is_unusual) {
            let (format, unit) = (coordinates.format.name(), unit.name());
            let reason =
                if evidence.is_none() { "the test pictures show no boxes" } else { "as the test pictures show" };
            assumptions.push(format!("boxes are read as boxFormat {format} and boxUnit {unit} ({reason})"));
        }
        Ok(coordinates)
    }

    /// The boxes of all runs. Rows of zeros are padding.
    fn boxes(&self, layout: BoxLayout) -> Vec<[f32; 4]> {
        let first_four = |row: Vec<f32>| row.first_chunk::<4>().copied();
        let boxes: Vec<[f32; 4]> = match layout {
            BoxLayout::ClassRows => self.runs.iter().filter_map(|run| run.first()).flat_map(columns_of).collect(),
            BoxLayout::AnchorRows { .. } => {
                self.rows_of(0, self.shape(0).last().copied().unwrap_or(1).max(1)).filter_map(first_four).collect()
            }
            // Relative to cells of a grid.
            BoxLayout::Grid => Vec::new(),
            BoxLayout::Sorted { columns: 7 } => {
                self.rows_of(0, 7).filter_map(|row| row.get(1..)?.first_chunk::<4>().copied()).collect()
            }
            BoxLayout::Sorted { columns } => self.rows_of(0, columns).filter_map(first_four).collect(),
            BoxLayout::Scored { boxes, .. } => self.rows_of(boxes, 5).filter_map(first_four).collect(),
            BoxLayout::Split { boxes, .. } | BoxLayout::Queries { boxes, .. } => {
                self.rows_of(boxes, 4).filter_map(first_four).collect()
            }
        };
        boxes.into_iter().filter(|row| row.iter().any(|value| *value != 0.0)).collect()
    }

    /// What makes probabilities of the class scores.
    fn activation(&self, decoder: Decoder, layout: BoxLayout, classes: Option<usize>) -> Result<ScoreActivation> {
        let (index, skipped) = match layout {
            BoxLayout::Queries { scores, .. } => (scores, 0),
            BoxLayout::ClassRows | BoxLayout::AnchorRows { .. } | BoxLayout::Grid => (0, 4),
            BoxLayout::Sorted { .. } | BoxLayout::Split { .. } | BoxLayout::Scored { .. } => {
                return Ok(ScoreActivation::None);
            }
        };
        let outputs = self.runs.iter().filter_map(|run| run.get(index));
        let are_probabilities = outputs.clone().all(|output| {
            let values = output.to_f32();
            let columns = output.shape().last().copied().unwrap_or(1).max(1);
            let scores: Box<dyn Iterator<Item = &f32>> = match layout {
                BoxLayout::ClassRows => Box::new(values.iter().skip(4 * columns)),
                _ => Box::new(values.chunks_exact(columns).flat_map(|row| row.iter().skip(skipped))),
            };
            scores.into_iter().all(|score| (-0.01..=1.01).contains(score))
        });
        match (are_probabilities, decoder) {
            (true, _) => Ok(ScoreActivation::None),
            (false, Decoder::Detr) if classes.is_some_and(|classes| self.labels == Some(classes.saturating_sub(1))) => {
                Ok(ScoreActivation::Softmax)
            }
            (false, Decoder::Detr) => Ok(ScoreActivation::Sigmoid),
            (false, _) => Err(bad_spec(format!(
                "the class scores on test pictures are not within 0 and 1, so {} does not read them; export the model with its final \
                 sigmoid, or use task tensor",
                decoder.name()
            ))),
        }
    }
}

/// The first four rows of `[1, rows, columns]`, column by column.
fn columns_of(output: &Tensor) -> Vec<[f32; 4]> {
    let values = output.to_f32();
    let columns = output.shape().last().copied().unwrap_or_default();
    let value = |row: usize, column: usize| values.get(row * columns + column).copied().unwrap_or_default();
    (0..columns).map(|column| std::array::from_fn(|row| value(row, column))).collect()
}

/// What boxes show of the meaning of their numbers.
struct Evidence {
    boxes: usize,
    is_relative: bool,
    /// Part of the boxes whose third number is below the first, or the fourth below the second.
    inverted: f32,
}

impl Evidence {
    /// `None` for too few boxes.
    fn of(boxes: &[[f32; 4]]) -> Option<Self> {
        if boxes.len() < BOXES_MIN {
            return None;
        }
        let is_relative = boxes.iter().flatten().all(|value| value.abs() <= RELATIVE_MAX);
        let tolerance = if is_relative { 0.001 } else { 1.0 };
        let is_inverted = |row: &&[f32; 4]| row[2] < row[0] - tolerance || row[3] < row[1] - tolerance;
        let inverted = boxes.iter().filter(is_inverted).count() as f32 / boxes.len() as f32;
        Some(Self { boxes: boxes.len(), is_relative, inverted })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lineside_api::tensor::Data;

    use super::*;
    use crate::graph::TensorMetadata;

    fn floats(shape: &[usize], values: Vec<f32>) -> Tensor {
        Tensor::new(shape.to_vec(), Data::F32(values)).unwrap()
    }

    fn integers(shape: &[usize], values: Vec<i64>) -> Tensor {
        Tensor::new(shape.to_vec(), Data::I64(values)).unwrap()
    }

    /// Rows whose first four numbers are these, with the rest behind them.
    fn rows(count: usize, bbox: [f32; 4], rest: &[f32]) -> Vec<f32> {
        (0..count).flat_map(|_| [&bbox[..], rest].concat()).collect()
    }

    struct Case {
        names: &'static [&'static str],
        metadata: &'static [(&'static str, &'static str)],
        labels: Option<usize>,
        spec: OutputSpec,
        outputs: Vec<Tensor>,
    }

    fn case(outputs: Vec<Tensor>, labels: Option<usize>) -> Case {
        Case { names: &["a", "b", "c", "d"], metadata: &[], labels, spec: OutputSpec::default(), outputs }
    }

    fn read(case: &Case) -> Result<(BoxReading, Vec<String>)> {
        let output = |name: &&str| TensorMetadata { name: (*name).to_owned(), data_type: None, shape: None };
        let metadata = case.metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let graph = GraphInfo {
            inputs: vec![],
            outputs: case.names.iter().take(case.outputs.len()).map(output).collect(),
            activations: vec![],
            metadata: metadata.collect::<BTreeMap<_, _>>(),
            producer: String::new(),
            opset: 17,
            nodes: 1,
        };
        let input = InputSettings::of_pixel_values(64, 64);
        let runs = [case.outputs.clone()];
        let detector = Detector { spec: &case.spec, graph: &graph, labels: case.labels, input: &input, runs: &runs };
        let mut assumptions = Vec::new();
        detector.read(&mut assumptions).map(|reading| (reading, assumptions))
    }

    const PIXEL: BoxCoordinates = BoxCoordinates { format: BoxFormat::Xyxy, unit: BoxUnit::Pixel };
    const RELATIVE_CENTRES: BoxCoordinates = BoxCoordinates { format: BoxFormat::Cxcywh, unit: BoxUnit::Relative };

    #[test]
    fn rows_of_six_are_read_by_what_they_hold() {
        let corners = case(vec![floats(&[1, 20, 6], rows(20, [4.0, 5.0, 30.0, 40.0], &[0.9, 1.0]))], Some(2));
        let (reading, assumptions) = read(&corners).unwrap();
        assert_eq!((reading.layout, reading.coordinates), (BoxLayout::Sorted { columns: 6 }, PIXEL));
        assert!(assumptions.is_empty() && !reading.suppresses && reading.classes.is_none(), "{assumptions:?}");

        // RT-DETR: centres and sizes as parts of the picture, then a score and a class number.
        let relative = || vec![floats(&[1, 20, 6], rows(20, [0.5, 0.6, 0.2, 0.3], &[0.9, 1.0]))];
        let error = read(&case(relative(), Some(2))).err().unwrap().to_string();
        assert!(error.contains("boxFormat"), "{error}");
        let stated = Case { metadata: &[("head", "RTDETRDecoder")], ..case(relative(), Some(2)) };
        let (reading, _) = read(&stated).unwrap();
        assert_eq!((reading.layout, reading.coordinates), (BoxLayout::Sorted { columns: 6 }, RELATIVE_CENTRES));
        // Two class scores instead.
        let scores = vec![floats(&[1, 20, 6], rows(20, [0.5, 0.6, 0.2, 0.3], &[0.25, 0.75]))];
        let (reading, _) = read(&case(scores, Some(2))).unwrap();
        assert_eq!((reading.layout, reading.classes), (BoxLayout::AnchorRows { objectness: false }, Some(2)));
        assert_eq!(reading.coordinates, RELATIVE_CENTRES);
        assert!(!reading.suppresses);

        let nothing = case(vec![floats(&[1, 20, 6], vec![0.0; 120])], None);
        let (reading, assumptions) = read(&nothing).unwrap();
        assert_eq!(reading.coordinates, PIXEL);
        assert!(assumptions[0].contains("boxFormat xyxy and boxUnit pixel"), "{assumptions:?}");
    }

    #[test]
    fn separate_outputs_are_distinguished() {
        let boxes = || floats(&[1, 4, 4], rows(4, [4.0, 5.0, 30.0, 40.0], &[]));
        let (scores, classes) = (floats(&[1, 4], vec![0.9; 4]), integers(&[1, 4], vec![2; 4]));
        // torchvision does not say where its numbers begin, others do.
        let torchvision = Case {
            names: &["boxes", "labels", "scores"],
            ..case(vec![boxes(), classes.clone(), scores.clone()], Some(3))
        };
        assert_eq!(read(&torchvision).unwrap().0.first_class, None);
        let spec = OutputSpec { first_class: Some(1), ..OutputSpec::default() };
        assert_eq!(read(&Case { spec, ..torchvision }).unwrap().0.first_class, Some(1));
        let count = integers(&[1, 1], vec![4]);
        let names = &["num_dets", "det_boxes", "det_scores", "det_classes"];
        let tensorrt = Case { names, ..case(vec![count, boxes(), scores, classes.clone()], Some(3)) };
        let (reading, _) = read(&tensorrt).unwrap();
        assert_eq!(reading.first_class, Some(0));
        assert_eq!(reading.layout, BoxLayout::Split { boxes: 1, scores: 2, classes: Some(3), count: Some(0) });

        let relative = floats(&[1, 4, 4], rows(4, [0.1, 0.2, 0.3, 0.4], &[]));
        let names = &["detection_boxes", "detection_classes", "detection_scores"];
        let tensorflow = vec![relative.clone(), floats(&[1, 4], vec![1.0; 4]), floats(&[1, 4], vec![0.9; 4])];
        let (reading, assumptions) = read(&Case { names, ..case(tensorflow, Some(3)) }).unwrap();
        assert_eq!(reading.first_class, Some(1));
        assert_eq!(reading.coordinates, BoxCoordinates { format: BoxFormat::Yxyx, unit: BoxUnit::Relative });
        assert_eq!(assumptions.len(), 1);

        let logits = floats(&[1, 4, 3], vec![-4.0; 12]);
        let (reading, _) = read(&case(vec![relative.clone(), logits.clone()], Some(3))).unwrap();
        assert_eq!(
            (reading.layout, reading.activation),
            (BoxLayout::Queries { boxes: 0, scores: 1 }, ScoreActivation::Sigmoid)
        );
        let (reading, _) = read(&case(vec![logits, relative], Some(2))).unwrap();
        assert_eq!((reading.activation, reading.classes), (ScoreActivation::Softmax, Some(2)));

        let scored = floats(&[1, 4, 5], rows(4, [4.0, 5.0, 30.0, 40.0], &[0.9]));
        let (reading, _) = read(&case(vec![scored, classes], Some(3))).unwrap();
        assert_eq!((reading.layout, reading.first_class), (BoxLayout::Scored { boxes: 0, classes: 1 }, Some(0)));
    }

    #[test]
    fn what_no_decoder_or_several_read_is_refused_by_name() {
        let error = |case: &Case| read(case).err().unwrap().to_string();
        // Rotated boxes: four numbers, three scores and an angle.
        let rotated = case(vec![floats(&[1, 8, 2000], vec![0.5; 16_000])], Some(3));
        assert!(error(&rotated).contains("no decoder reads boxes"), "{}", error(&rotated));
        let rotated = OutputSpec { decoder: Some(Decoder::End2end), ..OutputSpec::default() };
        let rotated = Case { spec: rotated, ..case(vec![floats(&[1, 300, 7], vec![0.5; 2100])], Some(3)) };
        assert!(error(&rotated).contains("end2end reads"), "{}", error(&rotated));
        let anchors = case(vec![floats(&[1, 2000, 8], vec![0.5; 16_000])], None);
        assert!(error(&anchors).contains("yolov5 or yolov8"), "{}", error(&anchors));
        let image = case(vec![floats(&[1, 3, 16, 16], vec![0.5; 768])], None);
        assert!(error(&image).contains("no decoder reads boxes"), "{}", error(&image));
        let logits = case(vec![floats(&[1, 6, 2000], vec![-3.0; 12_000])], Some(2));
        assert!(error(&logits).contains("final sigmoid"), "{}", error(&logits));
        let inverted = case(vec![floats(&[1, 20, 6], rows(20, [40.0, 5.0, 30.0, 40.0], &[0.9, 1.0]))], Some(2));
        assert!(error(&inverted).contains("20 of 20 boxes"), "{}", error(&inverted));
        let spec = OutputSpec { box_format: Some(BoxFormat::Cxcywh), ..OutputSpec::default() };
        let (reading, _) = read(&Case { spec, ..inverted }).unwrap();
        assert_eq!(reading.coordinates.format, BoxFormat::Cxcywh);
    }

    #[test]
    fn a_raw_head_may_give_parts_of_the_picture() {
        let head = |bbox: [f32; 4]| {
            let columns = [bbox[0], bbox[1], bbox[2], bbox[3], 0.1, 0.2];
            case(vec![floats(&[1, 6, 2000], columns.iter().flat_map(|value| vec![*value; 2000]).collect())], Some(2))
        };
        let (reading, assumptions) = read(&head([20.0, 30.0, 5.0, 6.0])).unwrap();
        assert_eq!((reading.coordinates.unit, reading.suppresses), (BoxUnit::Pixel, true));
        assert!(assumptions.is_empty());
        let (reading, assumptions) = read(&head([0.5, 0.5, 0.1, 0.2])).unwrap();
        assert_eq!((reading.coordinates, reading.suppresses), (RELATIVE_CENTRES, true));
        assert_eq!(assumptions.len(), 1);
    }
}
