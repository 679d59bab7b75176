//! The numbers of a detector to boxes in source pixels.
//!
//! Layouts, by the exporters that write them (A anchors, C classes, boxes in pixels of the model's input):
//!
//! ```text
//! yolov8, yolov11  [1, 4 + C, A]   centre x, centre y, width, height, class scores         (Ultralytics)
//! yolov5           [1, A, 5 + C]   the same four, objectness, class scores                 (Ultralytics YOLOv5)
//! yolox            [1, A, 5 + C]   centre in cells of the grid, log of the size in strides (Megvii YOLOX)
//! end2end          [1, n, 6]       left, top, right, bottom, score, class                  (YOLOv10, nms=True exports)
//!                  [n, 7]          batch, left, top, right, bottom, class, score           (YOLOv7)
//!                  boxes [.., 4], scores, classes and sometimes a count, as outputs of their own
//!                  boxes with scores [1, n, 5] and classes                             (MMDetection, Geti)
//! detr             [1, n, 4 + C]    a box for each query, class scores                 (RT-DETR)
//!                  boxes [1, n, 4] and class scores [1, n, C]                          (DETR, RF-DETR)
//! ```
//!
//! An anchor speaks for its best class only. Suppression runs on boxes in input pixels, class by class; end-to-end models
//! have done it themselves, and the others need none. The meaning of the four numbers, and what makes probabilities of the scores, were
//! decided when the model was loaded ([`crate::settings`]). A frame whose boxes contradict that fails, so that a layout that only looks
//! like a known one never gives wrong boxes in silence.

use crate::preprocess::Placement;
use crate::settings::{BoxLayout, DetectSettings, Labels, RELATIVE_MAX, ScoreActivation, YOLOX_STRIDES};
use crate::{Error, ErrorKind, Result};
use lineside_api::prediction::Detection;
use lineside_api::spec::{BoxFormat, BoxUnit};
use lineside_api::tensor::Tensor;

use super::nms::{Candidate, suppress};
use super::{changed_shape, numbers};

/// Candidates looked at by suppression at most, the best ones first. Ultralytics' own limit is the same.
const CANDIDATES_MAX: usize = 30_000;

/// The boxes at or above the threshold, best first, at most `top_k`.
pub(super) fn run(
    settings: &DetectSettings,
    labels: &Labels,
    outputs: &[Tensor],
    placement: &Placement,
) -> Result<Vec<Detection>> {
    let found = match settings.layout {
        BoxLayout::ClassRows => class_rows(settings, outputs)?,
        BoxLayout::AnchorRows { objectness } => anchor_rows(settings, objectness, outputs)?,
        BoxLayout::Grid => on_grid(settings, anchor_rows(settings, true, outputs)?),
        BoxLayout::Sorted { columns } => sorted_rows(settings, columns, outputs)?,
        BoxLayout::Split { boxes, scores, classes, count } => split(settings, outputs, boxes, scores, classes, count)?,
        BoxLayout::Scored { boxes, classes } => scored(settings, outputs, boxes, classes)?,
        BoxLayout::Queries { boxes, scores } => queries(settings, outputs, boxes, scores)?,
    };
    // Rows of zeros are padding.
    let is_used = |candidate: &Candidate| candidate.bbox != [0.0; 4];
    let mut found: Vec<Candidate> = found.into_iter().map(|(_, candidate)| candidate).filter(is_used).collect();
    // Infinite sides can make a box that is nowhere.
    if found.iter().any(|candidate| candidate.bbox.iter().any(|side| side.is_nan())) {
        return Err(Error::new(ErrorKind::BadOutput, "a box the model gave is infinite"));
    }
    check_meaning(settings, &found)?;
    let kept = if !settings.suppresses {
        found.sort_by(|left, right| right.score.total_cmp(&left.score));
        found.truncate(settings.top_k);
        found
    } else {
        if found.len() > CANDIDATES_MAX {
            found.select_nth_unstable_by(CANDIDATES_MAX, |left, right| right.score.total_cmp(&left.score));
            found.truncate(CANDIDATES_MAX);
        }
        suppress(found, settings.iou, settings.top_k)
    };
    Ok(kept
        .into_iter()
        .map(|candidate| Detection {
            class: labels.class(candidate.class as usize, candidate.score),
            bbox: placement.to_source(candidate.bbox),
        })
        .collect())
}

/// Checks that the boxes can be what the settings say. A box is at least a few pixels wide, and has its right side right of its left one.
fn check_meaning(settings: &DetectSettings, found: &[Candidate]) -> Result<()> {
    let contradiction = |why: &str, remedy: &str| {
        Err(Error::new(
            ErrorKind::BadOutput,
            format!("the boxes cannot be {why}; set {remedy} in spec.output of the model"),
        ))
    };
    if settings.layout == BoxLayout::Grid || found.is_empty() {
        return Ok(());
    }
    let is_inverted = |bbox: [f32; 4]| bbox[2] < bbox[0] - 1.0 || bbox[3] < bbox[1] - 1.0;
    if settings.coordinates.format != BoxFormat::Cxcywh && found.iter().any(|candidate| is_inverted(candidate.bbox)) {
        return contradiction("corners: a right side is left of its left side", "boxFormat");
    }
    let is_pixel = settings.coordinates.unit == BoxUnit::Pixel;
    let is_small = |candidate: &Candidate| candidate.bbox.iter().all(|side| side.abs() <= RELATIVE_MAX);
    if is_pixel && settings.input_width.min(settings.input_height) > 8 && found.iter().all(is_small) {
        return contradiction("in pixels: all are within the first pixel", "boxUnit: relative");
    }
    Ok(())
}

/// A candidate with the index of its anchor.
type Found = Vec<(usize, Candidate)>;

/// `[1, 4 + C, A]`: the scores of one class lie side by side, so classes are the outer loop.
fn class_rows(settings: &DetectSettings, outputs: &[Tensor]) -> Result<Found> {
    let values = numbers(outputs, 0)?;
    let shape = outputs[0].shape();
    let &[1, rows, anchors] = shape else { return Err(changed_shape(shape)) };
    if rows != 4 + settings.classes {
        return Err(changed_shape(shape));
    }
    let row = |index: usize| &values[index * anchors..(index + 1) * anchors];
    let mut best = vec![f32::NEG_INFINITY; anchors];
    let mut class_of = vec![0u32; anchors];
    for class in 0..settings.classes {
        for ((score, best), class_of) in row(4 + class).iter().zip(&mut best).zip(&mut class_of) {
            if *score > *best {
                *best = *score;
                *class_of = class as u32;
            }
        }
    }
    let kept = (0..anchors).filter(|anchor| best[*anchor] >= settings.threshold);
    Ok(kept
        .map(|anchor| {
            let bbox = settings.corners(std::array::from_fn(|index| row(index)[anchor]));
            (anchor, Candidate { bbox, class: class_of[anchor], score: best[anchor] })
        })
        .collect())
}

/// `[1, A, 4 + C]` or, with an objectness that scales the class scores, `[1, A, 5 + C]`.
fn anchor_rows(settings: &DetectSettings, objectness: bool, outputs: &[Tensor]) -> Result<Found> {
    let values = numbers(outputs, 0)?;
    let shape = outputs[0].shape();
    let head = if objectness { 5 } else { 4 };
    let &[1, anchors, columns] = shape else { return Err(changed_shape(shape)) };
    // The last score of a softmax stands for no object.
    let no_object = usize::from(settings.activation == ScoreActivation::Softmax);
    if columns != head + settings.classes + no_object || anchors * columns != values.len() {
        return Err(changed_shape(shape));
    }
    let mut found = Found::new();
    for (anchor, row) in values.chunks_exact(columns).enumerate() {
        let weight = if objectness { row[4] } else { 1.0 };
        // No class score exceeds 1, so most anchors are dismissed by their objectness alone.
        if weight < settings.threshold {
            continue;
        }
        let best = best_class(settings.activation, &row[head..]);
        let score = best.1 * weight;
        if score >= settings.threshold {
            let bbox = settings.corners([row[0], row[1], row[2], row[3]]);
            found.push((anchor, Candidate { bbox, class: best.0, score }));
        }
    }
    Ok(found)
}

/// The class with the largest score, and its probability.
fn best_class(activation: ScoreActivation, scores: &[f32]) -> (u32, f32) {
    let objects =
        if activation == ScoreActivation::Softmax { &scores[..scores.len().saturating_sub(1)] } else { scores };
    let mut best = (0, f32::NEG_INFINITY);
    for (class, score) in objects.iter().enumerate() {
        if *score > best.1 {
            best = (class as u32, *score);
        }
    }
    let probability = match activation {
        ScoreActivation::None => best.1,
        ScoreActivation::Sigmoid => 1.0 / (1.0 + (-best.1).exp()),
        ScoreActivation::Softmax => {
            let largest = scores.iter().copied().fold(best.1, f32::max);
            (best.1 - largest).exp() / scores.iter().map(|score| (score - largest).exp()).sum::<f32>()
        }
    };
    (best.0, probability)
}

/// YOLOX leaves the last step to the caller: the centre is relative to the anchor's cell, the size is a logarithm.
fn on_grid(settings: &DetectSettings, found: Found) -> Found {
    let cells = |stride: u32| ((settings.input_width / stride) as usize, (settings.input_height / stride) as usize);
    let place = |anchor: usize| {
        let mut first = 0;
        for stride in YOLOX_STRIDES {
            let (columns, rows) = cells(stride);
            if anchor < first + columns * rows {
                let cell = anchor - first;
                return Some(((cell % columns) as f32, (cell / columns) as f32, stride as f32));
            }
            first += columns * rows;
        }
        None
    };
    found
        .into_iter()
        .filter_map(|(anchor, candidate)| {
            let (column, row, stride) = place(anchor)?;
            let [left, top, right, bottom] = candidate.bbox;
            let (x, y) = ((left + right) / 2.0, (top + bottom) / 2.0);
            let bbox = settings.corners([
                (x + column) * stride,
                (y + row) * stride,
                (right - left).exp() * stride,
                (bottom - top).exp() * stride,
            ]);
            Some((anchor, Candidate { bbox, ..candidate }))
        })
        .collect()
}

/// `[1, n, 6]`, `[n, 6]` or `[n, 7]`; `n` may differ from run to run and may be 0.
fn sorted_rows(settings: &DetectSettings, columns: usize, outputs: &[Tensor]) -> Result<Found> {
    let values = numbers(outputs, 0)?;
    let shape = outputs[0].shape();
    if shape.last() != Some(&columns) {
        return Err(changed_shape(shape));
    }
    Ok(values
        .chunks_exact(columns)
        .map(|row| match *row {
            [_, left, top, right, bottom, class, score] => ([left, top, right, bottom], class, score),
            _ => ([row[0], row[1], row[2], row[3]], row[5], row[4]),
        })
        .filter(|(_, _, score)| *score >= settings.threshold)
        .map(|(bbox, class, score)| Candidate { bbox: settings.corners(bbox), class: class.max(0.0) as u32, score })
        .enumerate()
        .collect())
}

/// Boxes, scores and classes as outputs of their own.
fn split(
    settings: &DetectSettings,
    outputs: &[Tensor],
    boxes: usize,
    scores: usize,
    classes: Option<usize>,
    count: Option<usize>,
) -> Result<Found> {
    let (coordinates, scores) = (numbers(outputs, boxes)?, numbers(outputs, scores)?);
    let classes = classes.map(|index| numbers(outputs, index)).transpose()?;
    if coordinates.len() != scores.len() * 4 || classes.as_ref().is_some_and(|classes| classes.len() != scores.len()) {
        return Err(changed_shape(outputs[boxes].shape()));
    }
    let count = match count {
        Some(index) => numbers(outputs, index)?.first().map_or(0, |count| count.max(0.0) as usize),
        None => scores.len(),
    };
    Ok(coordinates
        .chunks_exact(4)
        .zip(scores.iter())
        .enumerate()
        .take(count)
        .filter(|(_, (_, score))| **score >= settings.threshold)
        .map(|(index, (bbox, score))| {
            let class = classes.as_ref().map_or(0, |classes| classes[index].max(0.0) as u32);
            let bbox = settings.corners([bbox[0], bbox[1], bbox[2], bbox[3]]);
            (index, Candidate { bbox, class, score: *score })
        })
        .collect())
}

/// Boxes with their scores, and classes.
fn scored(settings: &DetectSettings, outputs: &[Tensor], boxes: usize, classes: usize) -> Result<Found> {
    let (rows, classes) = (numbers(outputs, boxes)?, numbers(outputs, classes)?);
    if rows.len() != classes.len() * 5 {
        return Err(changed_shape(outputs[boxes].shape()));
    }
    let rows =
        rows.chunks_exact(5).zip(classes.iter()).enumerate().filter(|(_, (row, _))| row[4] >= settings.threshold);
    Ok(rows
        .map(|(index, (row, class))| {
            let bbox = settings.corners([row[0], row[1], row[2], row[3]]);
            (index, Candidate { bbox, class: class.max(0.0) as u32, score: row[4] })
        })
        .collect())
}

/// A box and class scores for each query.
fn queries(settings: &DetectSettings, outputs: &[Tensor], boxes: usize, scores: usize) -> Result<Found> {
    let shape = outputs.get(scores).map(Tensor::shape).unwrap_or_default();
    let columns = shape.last().copied().unwrap_or_default().max(1);
    let (coordinates, scores) = (numbers(outputs, boxes)?, numbers(outputs, scores)?);
    if coordinates.len() / 4 != scores.len() / columns {
        return Err(changed_shape(shape));
    }
    let rows = coordinates.chunks_exact(4).zip(scores.chunks_exact(columns)).enumerate();
    let found = rows.filter_map(|(index, (bbox, scores))| {
        let (class, score) = best_class(settings.activation, scores);
        let bbox = settings.corners([bbox[0], bbox[1], bbox[2], bbox[3]]);
        (score >= settings.threshold).then_some((index, Candidate { bbox, class, score }))
    });
    Ok(found.collect())
}

impl DetectSettings {
    /// A box as left, top, right, bottom in input pixels.
    fn corners(&self, bbox: [f32; 4]) -> [f32; 4] {
        self.coordinates.corners(bbox, self.input_width, self.input_height)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::Picture;
    use crate::preprocess::Preprocessor;
    use crate::settings::{BoxCoordinates, InputSettings};
    use lineside_api::tensor::Data;

    const SIDE: u32 = 64;

    fn settings(layout: BoxLayout) -> DetectSettings {
        let format = if layout.has_class_numbers() { BoxFormat::Xyxy } else { BoxFormat::Cxcywh };
        DetectSettings {
            layout,
            coordinates: BoxCoordinates { format, unit: BoxUnit::Pixel },
            activation: ScoreActivation::None,
            suppresses: !layout.has_class_numbers(),
            threshold: 0.25,
            iou: 0.5,
            top_k: 10,
            classes: 2,
            input_width: SIDE,
            input_height: SIDE,
        }
    }

    fn detect(settings: &DetectSettings, outputs: &[Tensor]) -> Result<Vec<(u32, f32, [f32; 4])>> {
        let input = InputSettings::of_pixel_values(SIDE, SIDE);
        let frame = Picture::from_rgb(SIDE, SIDE, vec![0; (SIDE * SIDE * 3) as usize]).unwrap();
        let (_, placement) = Preprocessor::new(&input).run(&frame).unwrap();
        let found = run(settings, &Labels::numbered(2), outputs, &placement)?;
        Ok(found.into_iter().map(|found| (found.class.class, found.class.score, found.bbox)).collect())
    }

    fn tensor(shape: &[usize], values: &[f32]) -> Tensor {
        Tensor::new(shape.to_vec(), Data::F32(values.to_vec())).unwrap()
    }

    #[test]
    fn class_rows_and_anchor_rows_hold_the_same_boxes() {
        // Two anchors: one clear box of class 1, one below the threshold.
        let columns = tensor(&[1, 6, 2], &[20.0, 5.0, 30.0, 5.0, 10.0, 2.0, 20.0, 2.0, 0.1, 0.2, 0.9, 0.1]);
        let expected = [(1, 0.9, [15.0, 20.0, 25.0, 40.0])];
        assert_eq!(detect(&settings(BoxLayout::ClassRows), &[columns]).unwrap(), expected);
        let rows = tensor(&[1, 2, 6], &[20.0, 30.0, 10.0, 20.0, 0.1, 0.9, 5.0, 5.0, 2.0, 2.0, 0.2, 0.1]);
        assert_eq!(detect(&settings(BoxLayout::AnchorRows { objectness: false }), &[rows]).unwrap(), expected);
        let weighed = tensor(&[1, 1, 7], &[20.0, 30.0, 10.0, 20.0, 0.5, 0.2, 0.8]);
        let found = detect(&settings(BoxLayout::AnchorRows { objectness: true }), &[weighed]).unwrap();
        assert_eq!(found, [(1, 0.4, [15.0, 20.0, 25.0, 40.0])]);
    }

    #[test]
    fn end_to_end_layouts_agree_and_may_be_empty() {
        let expected = [(1, 0.9, [1.0, 2.0, 3.0, 4.0]), (0, 0.5, [5.0, 6.0, 7.0, 8.0])];
        let six = tensor(
            &[1, 3, 6],
            &[5.0, 6.0, 7.0, 8.0, 0.5, 0.0, 1.0, 2.0, 3.0, 4.0, 0.9, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        );
        assert_eq!(detect(&settings(BoxLayout::Sorted { columns: 6 }), &[six]).unwrap(), expected);
        let seven = tensor(&[2, 7], &[0.0, 5.0, 6.0, 7.0, 8.0, 0.0, 0.5, 0.0, 1.0, 2.0, 3.0, 4.0, 1.0, 0.9]);
        assert_eq!(detect(&settings(BoxLayout::Sorted { columns: 7 }), &[seven]).unwrap(), expected);
        assert_eq!(detect(&settings(BoxLayout::Sorted { columns: 7 }), &[tensor(&[0, 7], &[])]).unwrap(), []);
        let outputs = [
            tensor(&[1, 3, 4], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 0.0, 0.0, 9.0, 9.0]),
            tensor(&[1, 3], &[0.9, 0.5, 0.9]),
            Tensor::new(vec![1, 3], Data::I32(vec![1, 0, 1])).unwrap(),
            Tensor::new(vec![1, 1], Data::I32(vec![2])).unwrap(),
        ];
        let split = BoxLayout::Split { boxes: 0, scores: 1, classes: Some(2), count: Some(3) };
        assert_eq!(detect(&settings(split), &outputs).unwrap(), expected, "the third row lies beyond the count");
    }

    #[test]
    fn queries_give_one_box_each_in_every_spelling() {
        let relative = BoxCoordinates { format: BoxFormat::Cxcywh, unit: BoxUnit::Relative };
        let expected = [(1, 0.9, [16.0, 8.0, 48.0, 24.0])];
        // The centre and size of the expected box as parts of 64 pixels.
        let bbox = [0.5, 0.25, 0.5, 0.25];
        let row = |values: &[f32]| [&bbox[..], values].concat();
        let with = |layout, activation| {
            let settings = settings(layout);
            DetectSettings { coordinates: relative, activation, suppresses: false, ..settings }
        };
        let anchors = with(BoxLayout::AnchorRows { objectness: false }, ScoreActivation::None);
        let twice = [row(&[0.1, 0.9]), row(&[0.1, 0.9])].concat();
        let found = detect(&anchors, &[tensor(&[1, 2, 6], &twice)]).unwrap();
        assert_eq!(found, [expected[0], expected[0]], "equal boxes of two queries stay");
        let sorted = with(BoxLayout::Sorted { columns: 6 }, ScoreActivation::None);
        assert_eq!(detect(&sorted, &[tensor(&[1, 1, 6], &row(&[0.9, 1.0]))]).unwrap(), expected);
        let queries = BoxLayout::Queries { boxes: 1, scores: 0 };
        let logits = tensor(&[1, 1, 2], &[-3.0, 9.0f32.ln()]);
        let found = detect(&with(queries, ScoreActivation::Sigmoid), &[logits, tensor(&[1, 1, 4], &bbox)]).unwrap();
        assert!((found[0].1 - 0.9).abs() < 1e-6 && found[0].2 == expected[0].2, "{found:?}");
        // The last of three scores stands for the absence of an object.
        let logits = tensor(&[1, 1, 3], &[0.0, 2.0, 1.0]);
        let found = detect(&with(queries, ScoreActivation::Softmax), &[logits, tensor(&[1, 1, 4], &bbox)]).unwrap();
        assert_eq!(found[0].0, 1);
        assert!((found[0].1 - 0.665).abs() < 1e-3, "{found:?}");
        let scored = tensor(&[1, 1, 5], &[16.0, 8.0, 48.0, 24.0, 0.9]);
        let classes = Tensor::new(vec![1, 1], Data::I64(vec![1])).unwrap();
        let layout = settings(BoxLayout::Scored { boxes: 0, classes: 1 });
        assert_eq!(detect(&layout, &[scored, classes]).unwrap(), expected);
        let tensorflow = BoxCoordinates { format: BoxFormat::Yxyx, unit: BoxUnit::Relative };
        let layout = settings(BoxLayout::Split { boxes: 0, scores: 1, classes: None, count: None });
        let outputs = [tensor(&[1, 1, 4], &[0.125, 0.25, 0.375, 0.75]), tensor(&[1, 1], &[0.9])];
        let found = detect(&DetectSettings { coordinates: tensorflow, ..layout }, &outputs).unwrap();
        assert_eq!(found, [(0, 0.9, [16.0, 8.0, 48.0, 24.0])]);
    }

    #[test]
    fn boxes_that_contradict_the_settings_fail_the_frame() {
        let sorted = settings(BoxLayout::Sorted { columns: 6 });
        let error = |row: &[f32]| detect(&sorted, &[tensor(&[1, 1, 6], row)]).unwrap_err();
        let inverted = error(&[44.0, 22.0, 20.0, 10.0, 0.9, 1.0]);
        assert!(inverted.kind() == ErrorKind::BadOutput && inverted.to_string().contains("boxFormat"), "{inverted}");
        let relative = error(&[0.1, 0.2, 0.6, 0.7, 0.9, 1.0]);
        assert!(relative.to_string().contains("boxUnit"), "{relative}");
        let below = tensor(&[1, 1, 6], &[44.0, 22.0, 20.0, 10.0, 0.1, 1.0]);
        assert_eq!(detect(&sorted, &[below]).unwrap(), [], "rows below the threshold say nothing");
    }

    #[test]
    fn boxes_are_clipped_and_yolox_cells_are_placed() {
        let wide = tensor(&[1, 6, 1], &[32.0, 32.0, 500.0, 8.0, 0.0, 0.9]);
        let found = detect(&settings(BoxLayout::ClassRows), &[wide]).unwrap();
        assert_eq!(found[0].2, [0.0, 28.0, 64.0, 36.0]);
        // 8x8 cells of stride 8, 4x4 of 16, 2x2 of 32: anchor 64 + 5 is the cell (1, 1) of stride 16.
        let mut values = vec![0.0; 84 * 7];
        values[69 * 7..70 * 7].copy_from_slice(&[0.5, 0.5, 0.0, 2.0f32.ln(), 1.0, 0.0, 0.9]);
        let found = detect(&settings(BoxLayout::Grid), &[tensor(&[1, 84, 7], &values)]).unwrap();
        assert_eq!((found.len(), found[0].0), (1, 1));
        let expected = [16.0, 8.0, 32.0, 40.0];
        assert!(found[0].2.iter().zip(expected).all(|(side, expected)| (side - expected).abs() < 1e-3), "{found:?}");
    }

    #[test]
    fn nan_and_a_changed_shape_are_faults_of_the_model() {
        let nan = tensor(&[1, 6, 1], &[32.0, f32::NAN, 5.0, 8.0, 0.0, 0.9]);
        let fewer = tensor(&[1, 5, 1], &[32.0, 1.0, 5.0, 8.0, 0.9]);
        for output in [nan, fewer] {
            let error = detect(&settings(BoxLayout::ClassRows), &[output]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::BadOutput, "{error}");
        }
    }
}
