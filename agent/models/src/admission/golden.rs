//! Compares the output of a model with the expected output of a golden sample.
//!
//! The expected output is JSON with the fields of a result for the task (`classes`, `detections`, `score` or
//! `outputs`), or the output of `lineside check --image ... --json`. Fields that the sample leaves out are not
//! compared. Classes are matched by label, so that two classes with nearly equal scores may change places; every
//! detection must match one of the same label at the same place.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use lineside_inference::ErrorKind;
use serde::Deserialize;
use serde_json::Value;

/// Encodes an image for the request.
pub(super) fn encode(bytes: &[u8]) -> String {
    BASE64.encode(bytes)
}

/// Decodes an image of the request.
pub(super) fn decode(text: &str) -> Result<Vec<u8>, base64::DecodeError> {
    BASE64.decode(text)
}

/// Why an output does not match its golden sample.
#[derive(Debug, thiserror::Error)]
pub(super) enum GoldenMismatch {
    /// The expected output of the sample is not valid.
    #[error("its expected output is not valid: {0}")]
    InvalidSample(#[source] serde_json::Error),
    /// The output of the model cannot be compared.
    #[error("the output of the model cannot be compared: {0}")]
    InvalidOutput(#[source] serde_json::Error),
    /// The sample has no field that the model outputs.
    #[error("its expected output has no field that the model outputs")]
    NoCommonField,
    /// A value differs by more than the tolerance.
    #[error(
        "{what} is {actual:.4}, which differs from {expected:.4} by {:.4}; the tolerance is {tolerance}",
        (actual - expected).abs()
    )]
    Value { what: String, expected: f64, actual: f64, tolerance: f64 },
    /// Another difference.
    #[error("{0}")]
    Different(String),
}

impl GoldenMismatch {
    /// The kind of the error: a sample that is not valid is an error of the manifest and not of the model.
    pub(super) fn kind(&self) -> ErrorKind {
        match self {
            Self::InvalidSample(_) => ErrorKind::BadSpec,
            Self::InvalidOutput(_) | Self::NoCommonField | Self::Value { .. } | Self::Different(_) => {
                ErrorKind::BadOutput
            }
        }
    }
}

/// The compared fields of a result. A field is `None` where the JSON leaves it out.
#[derive(Debug, Default, Deserialize)]
struct TaskOutput {
    classes: Option<Vec<Class>>,
    detections: Option<Vec<Detection>>,
    score: Option<f64>,
    outputs: Option<Vec<Output>>,
}

#[derive(Debug, Deserialize)]
struct Class {
    label: String,
    score: f64,
}

#[derive(Debug, Deserialize)]
struct Detection {
    label: String,
    score: f64,
    /// Left, top, right, bottom in pixels of the source image.
    #[serde(rename = "box")]
    bbox: [f64; 4],
}

#[derive(Debug, Deserialize)]
struct Output {
    name: String,
    data: Vec<Element>,
}

/// An element of a raw output. Only numbers can be compared: `null` stands for NaN or infinity.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Element {
    Number(f64),
    Other(Value),
}

/// Compares `actual` with the `expected` JSON. `image_size` is width and height of the image in pixels.
pub(super) fn compare(
    expected: &str,
    actual: Value,
    tolerance: f32,
    image_size: (u32, u32),
) -> Result<(), GoldenMismatch> {
    let expected = parse_expected(expected).map_err(GoldenMismatch::InvalidSample)?;
    let actual = TaskOutput::deserialize(actual).map_err(GoldenMismatch::InvalidOutput)?;
    let tolerance = f64::from(tolerance);
    // A sample may have fields of several tasks; those that this task does not output are not compared.
    let mut has_compared = false;
    if let (Some(expected), Some(actual)) = (&expected.classes, &actual.classes) {
        compare_classes(expected, actual, tolerance)?;
        has_compared = true;
    }
    if let (Some(expected), Some(actual)) = (&expected.detections, &actual.detections) {
        compare_detections(expected, actual, tolerance, image_size)?;
        has_compared = true;
    }
    if let (Some(expected), Some(actual)) = (expected.score, actual.score) {
        compare_value("the score", expected, actual, tolerance)?;
        has_compared = true;
    }
    if let (Some(expected), Some(actual)) = (&expected.outputs, &actual.outputs) {
        compare_outputs(expected, actual, tolerance)?;
        has_compared = true;
    }
    if has_compared { Ok(()) } else { Err(GoldenMismatch::NoCommonField) }
}

/// Parses the expected output, which may be nested in a report of `lineside check`.
fn parse_expected(text: &str) -> serde_json::Result<TaskOutput> {
    let mut document: Value = serde_json::from_str(text)?;
    for pointer in ["/image/prediction", "/prediction"] {
        if let Some(nested) = document.pointer_mut(pointer) {
            document = nested.take();
            break;
        }
    }
    TaskOutput::deserialize(document)
}

fn is_near(expected: f64, actual: f64, tolerance: f64) -> bool {
    (expected - actual).abs() <= tolerance
}

fn compare_value(what: &str, expected: f64, actual: f64, tolerance: f64) -> Result<(), GoldenMismatch> {
    if is_near(expected, actual, tolerance) {
        Ok(())
    } else {
        Err(GoldenMismatch::Value { what: what.to_owned(), expected, actual, tolerance })
    }
}

fn compare_classes(expected: &[Class], actual: &[Class], tolerance: f64) -> Result<(), GoldenMismatch> {
    if let (Some(expected), Some(actual)) = (expected.first(), actual.first())
        && expected.label != actual.label
        && !is_near(expected.score, actual.score, tolerance)
    {
        let message = format!("the best class of the model is {}, expected {}", actual.label, expected.label);
        return Err(GoldenMismatch::Different(message));
    }
    for class in expected {
        match actual.iter().find(|actual| actual.label == class.label) {
            Some(actual) => {
                compare_value(&format!("the score of {}", class.label), class.score, actual.score, tolerance)?;
            }
            // Only the best classes are in a result; a class with a score within the tolerance of 0 may be missing.
            None if class.score <= tolerance => {}
            None => {
                return Err(GoldenMismatch::Different(format!("the model does not output the class {}", class.label)));
            }
        }
    }
    Ok(())
}

fn compare_detections(
    expected: &[Detection],
    actual: &[Detection],
    tolerance: f64,
    (width, height): (u32, u32),
) -> Result<(), GoldenMismatch> {
    if expected.len() != actual.len() {
        let message = format!("the model finds {} objects, expected {}", actual.len(), expected.len());
        return Err(GoldenMismatch::Different(message));
    }
    let box_tolerances = [width, height, width, height].map(|side| f64::from(side) * tolerance);
    let mut unmatched: Vec<&Detection> = actual.iter().collect();
    for detection in expected {
        let matches = |actual: &&Detection| {
            let mut sides = detection.bbox.iter().zip(actual.bbox).zip(box_tolerances);
            actual.label == detection.label
                && is_near(detection.score, actual.score, tolerance)
                && sides.all(|((expected, actual), tolerance)| is_near(*expected, actual, tolerance))
        };
        let Some(index) = unmatched.iter().position(matches) else {
            let Detection { label, score, bbox } = detection;
            let message = format!("the model does not find {label} with score {score} at {bbox:?}");
            return Err(GoldenMismatch::Different(message));
        };
        unmatched.swap_remove(index);
    }
    Ok(())
}

fn compare_outputs(expected: &[Output], actual: &[Output], tolerance: f64) -> Result<(), GoldenMismatch> {
    for output in expected {
        let name = &output.name;
        let Some(actual) = actual.iter().find(|actual| actual.name == *name) else {
            return Err(GoldenMismatch::Different(format!("the model does not have an output `{name}`")));
        };
        let (expected_len, actual_len) = (output.data.len(), actual.data.len());
        if expected_len != actual_len {
            let message = format!("output `{name}` has {actual_len} values, expected {expected_len}");
            return Err(GoldenMismatch::Different(message));
        }
        for (index, (expected, actual)) in output.data.iter().zip(&actual.data).enumerate() {
            let what = format!("value {index} of output `{name}`");
            match (expected, actual) {
                (Element::Number(expected), Element::Number(actual)) => {
                    compare_value(&what, *expected, *actual, tolerance)?;
                }
                (_, Element::Other(value)) | (Element::Other(value), _) => {
                    return Err(GoldenMismatch::Different(format!("{what} is {value}, which is not a number")));
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(expected: &Value, actual: &Value) -> Result<(), String> {
        compare(&expected.to_string(), actual.clone(), 0.01, (100, 50)).map_err(|error| error.to_string())
    }

    fn class(label: &str, score: f64) -> Value {
        json!({"label": label, "score": score})
    }

    #[test]
    fn classes_are_compared_by_label() {
        let actual = json!({"classes": [class("a", 0.5), class("b", 0.495)]});
        assert_eq!(check(&json!({"classes": [class("b", 0.5), class("a", 0.495)]}), &actual), Ok(()));
        assert_eq!(check(&json!({"classes": [class("a", 0.5), class("c", 0.001)]}), &actual), Ok(()));
        assert!(check(&json!({"classes": [class("b", 0.9)]}), &actual).unwrap_err().contains('b'));
        assert!(check(&json!({"classes": [class("a", 0.52)]}), &actual).unwrap_err().contains("0.02"));
        assert!(check(&json!({"classes": [class("c", 0.5)]}), &actual).is_err());
    }

    #[test]
    fn the_expected_output_may_be_a_report_of_the_check_command() {
        let actual = json!({"classes": [class("a", 0.5)]});
        for report in [
            json!({"image": {"prediction": {"classes": [class("a", 0.5)]}}}),
            json!({"prediction": {"classes": [class("a", 0.5)]}}),
        ] {
            assert_eq!(check(&report, &actual), Ok(()), "{report}");
        }
        assert!(check(&json!({}), &actual).unwrap_err().contains("no field"));
        let error = compare("{", actual.clone(), 0.1, (1, 1)).unwrap_err();
        assert!(matches!(error, GoldenMismatch::InvalidSample(_)));
        // It does not count against the model.
        assert_eq!(error.kind(), ErrorKind::BadSpec);
        let error = compare(r#"{"classes": []}"#, json!({"score": 1}), 0.1, (1, 1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadOutput);
        assert!(check(&json!({"classes": 7}), &actual).unwrap_err().contains("not valid"));
    }

    #[test]
    fn every_detection_matches_another_one() {
        let detections = |boxes: &[[f64; 4]]| {
            let all: Vec<Value> = boxes.iter().map(|b| json!({"label": "a", "score": 0.5, "box": b})).collect();
            json!({"detections": all})
        };
        let one = [10.0, 10.0, 20.0, 20.0];
        assert_eq!(check(&detections(&[one]), &detections(&[[10.9, 10.4, 20.0, 20.0]])), Ok(()));
        assert!(check(&detections(&[one]), &detections(&[[11.1, 10.0, 20.0, 20.0]])).is_err());
        assert!(check(&detections(&[one, one]), &detections(&[one])).unwrap_err().contains("finds 1"));
        assert!(check(&detections(&[one, one]), &detections(&[one, [50.0, 10.0, 60.0, 20.0]])).is_err());
        assert_eq!(check(&detections(&[]), &detections(&[])), Ok(()));
    }

    #[test]
    fn scores_and_raw_outputs_are_compared_as_numbers() {
        assert_eq!(check(&json!({"score": 1.0}), &json!({"score": 1.005})), Ok(()));
        assert!(check(&json!({"score": 1.0}), &json!({"score": 1.02})).unwrap_err().contains("tolerance"));
        assert!(check(&json!({"score": 1.0}), &json!({"score": null})).is_err());
        let output = |data: Value| json!({"outputs": [{"name": "y", "data": data}]});
        assert_eq!(check(&output(json!([1, 2.0])), &output(json!([1.0, 2.009]))), Ok(()));
        assert!(check(&output(json!([1.0])), &output(json!([1.0, 2.0]))).is_err());
        assert!(check(&output(json!([1.0, 2.0])), &output(json!([1.0, 2.1]))).unwrap_err().contains("value 1"));
        assert!(check(&output(json!([1.0])), &output(json!([null]))).unwrap_err().contains("not a number"));
    }

    #[test]
    fn outputs_that_are_not_numbers_do_not_prevent_the_comparison_of_others() {
        let actual = json!({"outputs": [{"name": "flags", "data": [true]}, {"name": "y", "data": [1.0]}]});
        assert_eq!(check(&json!({"outputs": [{"name": "y", "data": [1.0]}]}), &actual), Ok(()));
    }
}
