//! Whether a model's answer is the one a golden sample asks for.
//!
//! The sample's JSON has the fields a result has for the task (`classes`, `detections`, `score` or `outputs`), or is what
//! `lineside check --image ... --json` prints. Fields it leaves out are not compared. Classes are found by their label, so
//! that two that score alike may change places; every detection needs one of the same label at the same place.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use lineside_inference::{Error, ErrorKind};
use serde_json::Value;

pub(super) fn encoded(bytes: &[u8]) -> String {
    BASE64.encode(bytes)
}

pub(super) fn decoded(text: &str) -> Result<Vec<u8>, Error> {
    BASE64.decode(text).map_err(|error| Error::new(ErrorKind::BadSpec, error.to_string()))
}

/// Compares an answer with the one that is asked for; `size` is the picture's, in pixels.
pub(super) fn compare(wanted: &str, answer: &Value, tolerance: f32, size: (u32, u32)) -> Result<(), String> {
    let wanted: Value = serde_json::from_str(wanted).map_err(|error| format!("its answer is no JSON: {error}"))?;
    let wanted = ["/image/prediction", "/prediction"].iter().find_map(|at| wanted.pointer(at)).unwrap_or(&wanted);
    let tolerance = f64::from(tolerance);
    let mut compared = 0;
    for (field, wanted) in wanted.as_object().into_iter().flatten() {
        // A sample may serve several tasks; what this one does not answer is not compared.
        let Some(found) = answer.get(field) else { continue };
        match field.as_str() {
            "classes" => classes(list(wanted), list(found), tolerance)?,
            "detections" => detections(list(wanted), list(found), tolerance, size)?,
            "score" => near("the score", wanted, found, tolerance)?,
            "outputs" => outputs(list(wanted), list(found), tolerance)?,
            _ => continue,
        }
        compared += 1;
    }
    match compared {
        0 => Err("its answer has nothing that the model answers".to_owned()),
        _ => Ok(()),
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn label(value: &Value) -> &str {
    value["label"].as_str().unwrap_or_default()
}

fn near(what: &str, wanted: &Value, found: &Value, tolerance: f64) -> Result<(), String> {
    match (wanted.as_f64(), found.as_f64()) {
        (Some(wanted), Some(found)) if (wanted - found).abs() <= tolerance => Ok(()),
        (Some(wanted), Some(found)) => Err(format!(
            "{what} is {found:.4}, which differs from {wanted:.4} by {:.4}; the tolerance is {tolerance}",
            (wanted - found).abs()
        )),
        _ => Err(format!("{what} is {found}, and {wanted} is asked for")),
    }
}

fn classes(wanted: &[Value], found: &[Value], tolerance: f64) -> Result<(), String> {
    if let (Some(first), Some(best)) = (wanted.first(), found.first()) {
        let close = |class: &Value| class["score"].as_f64().unwrap_or_default();
        if label(first) != label(best) && (close(best) - close(first)).abs() > tolerance {
            return Err(format!("the model says {}, and {} is asked for", label(best), label(first)));
        }
    }
    for class in wanted {
        let same = found.iter().find(|found| label(found) == label(class));
        match same {
            Some(same) => near(&format!("the score of {}", label(class)), &class["score"], &same["score"], tolerance)?,
            // Only the best are reported; what scores next to nothing may be missing.
            None if class["score"].as_f64().is_some_and(|score| score <= tolerance) => {}
            None => return Err(format!("the model does not say {}", label(class))),
        }
    }
    Ok(())
}

fn detections(wanted: &[Value], found: &[Value], tolerance: f64, size: (u32, u32)) -> Result<(), String> {
    if wanted.len() != found.len() {
        return Err(format!("the model finds {}, and {} are asked for", found.len(), wanted.len()));
    }
    let limits = [size.0, size.1, size.0, size.1].map(|side| f64::from(side) * tolerance);
    let mut free: Vec<&Value> = found.iter().collect();
    for one in wanted {
        let fits = |found: &&Value| {
            let sides = list(&one["box"]).iter().zip(list(&found["box"])).zip(limits);
            label(found) == label(one)
                && near("", &one["score"], &found["score"], tolerance).is_ok()
                && sides.clone().count() == limits.len()
                && sides.clone().all(|((wanted, found), limit)| near("", wanted, found, limit).is_ok())
        };
        match free.iter().position(fits) {
            Some(at) => drop(free.swap_remove(at)),
            None => return Err(format!("the model does not find {} {} at {}", label(one), one["score"], one["box"])),
        }
    }
    Ok(())
}

fn outputs(wanted: &[Value], found: &[Value], tolerance: f64) -> Result<(), String> {
    for output in wanted {
        let name = output["name"].as_str().unwrap_or_default();
        let Some(same) = found.iter().find(|found| found["name"] == output["name"]) else {
            return Err(format!("the model has no output `{name}`"));
        };
        let (values, others) = (list(&output["data"]), list(&same["data"]));
        if values.len() != others.len() {
            return Err(format!("output `{name}` has {} values, and {} are asked for", others.len(), values.len()));
        }
        for (index, (value, other)) in values.iter().zip(others).enumerate() {
            near(&format!("value {index} of output `{name}`"), value, other, tolerance)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(wanted: Value, found: Value) -> Result<(), String> {
        compare(&wanted.to_string(), &found, 0.01, (100, 50))
    }

    fn class(label: &str, score: f64) -> Value {
        json!({"label": label, "score": score})
    }

    #[test]
    fn classes_are_compared_by_label() {
        let found = json!({"classes": [class("a", 0.5), class("b", 0.495)]});
        assert_eq!(check(json!({"classes": [class("b", 0.5), class("a", 0.495)]}), found.clone()), Ok(()));
        assert_eq!(check(json!({"classes": [class("a", 0.5), class("c", 0.001)]}), found.clone()), Ok(()));
        assert!(check(json!({"classes": [class("b", 0.9)]}), found.clone()).unwrap_err().contains('b'));
        assert!(check(json!({"classes": [class("a", 0.52)]}), found.clone()).unwrap_err().contains("0.02"));
        assert!(check(json!({"classes": [class("c", 0.5)]}), found.clone()).is_err());
        let printed = json!({"image": {"prediction": {"classes": [class("a", 0.5)]}}});
        assert_eq!(check(printed, found.clone()), Ok(()));
        assert!(check(json!({}), found.clone()).is_err() && compare("{", &found, 0.1, (1, 1)).is_err());
    }

    #[test]
    fn every_detection_needs_one_of_its_own() {
        let found = |boxes: &[[f64; 4]]| {
            let all: Vec<Value> = boxes.iter().map(|b| json!({"label": "a", "score": 0.5, "box": b})).collect();
            json!({"detections": all})
        };
        let one = [10.0, 10.0, 20.0, 20.0];
        assert_eq!(check(found(&[one]), found(&[[10.9, 10.4, 20.0, 20.0]])), Ok(()));
        assert!(check(found(&[one]), found(&[[11.1, 10.0, 20.0, 20.0]])).is_err());
        assert!(check(found(&[one, one]), found(&[one])).unwrap_err().contains("finds 1"));
        assert!(check(found(&[one, one]), found(&[one, [50.0, 10.0, 60.0, 20.0]])).is_err());
        assert_eq!(check(found(&[]), found(&[])), Ok(()));
    }

    #[test]
    fn scores_and_raw_outputs_are_compared_as_numbers() {
        assert_eq!(check(json!({"score": 1.0}), json!({"score": 1.005})), Ok(()));
        assert!(check(json!({"score": 1.0}), json!({"score": null})).is_err());
        let output = |data: &[f64]| json!({"outputs": [{"name": "y", "data": data}]});
        assert_eq!(check(output(&[1.0, 2.0]), output(&[1.0, 2.009])), Ok(()));
        assert!(check(output(&[1.0]), output(&[1.0, 2.0])).is_err());
        assert!(check(output(&[1.0, 2.0]), output(&[1.0, 2.1])).unwrap_err().contains("value 1"));
    }
}
