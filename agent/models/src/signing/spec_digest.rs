//! The digest of the fields of a manifest that decide what a prediction says.
//!
//! A signature covers `spec.task`, `spec.input` and `spec.output`: with permuted labels, another decoder or another
//! threshold the same model file reports something else. It does not cover `spec.runtime` (resources of the node),
//! `spec.nodeSelector`, `spec.source.uri` (the digest of the file is signed) and `spec.golden` (samples that the node
//! checks in addition), which operators may change without the key.
//!
//! The digest is the SHA-256 of the canonical JSON of `{"input": ..., "output": ..., "task": ...}`: without white space, keys
//! sorted, without fields that are absent or null, and without objects that are empty for that reason. Fields that a later
//! version adds therefore do not change the digest of a manifest that does not use them.

use std::collections::BTreeMap;

use serde_json::Value;

use lineside_api::spec::ModelSpec;
use lineside_common::digest::Digest;

use super::error::SigningError;

/// The digest of the fields that decide what a prediction says.
///
/// # Errors
/// [`SigningError::NotFinite`] and [`SigningError::Spec`] when the fields cannot be written as JSON.
pub fn spec_digest(spec: &ModelSpec) -> Result<Digest, SigningError> {
    let (input, output) = (&spec.input, &spec.output);
    let numbers = [&input.mean, &input.std].into_iter().flatten().flatten().chain(&output.threshold).chain(&output.iou);
    if numbers.into_iter().any(|number| !number.is_finite()) {
        return Err(SigningError::NotFinite);
    }
    let fields = || -> serde_json::Result<String> {
        // Through text, so that a number with single precision has its shortest form.
        let text = serde_json::to_string(&(spec.task, input, output))?;
        let [task, input, output]: [Value; 3] = serde_json::from_str(&text)?;
        let fields = [("task", task), ("input", input), ("output", output)];
        canonical(Value::Object(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()))
    };
    Ok(Digest::of(fields().map_err(SigningError::Spec)?.as_bytes()))
}

/// JSON without white space, with sorted keys, and without null or empty members.
fn canonical(value: Value) -> serde_json::Result<String> {
    match value {
        Value::Object(members) => {
            let mut sorted = BTreeMap::new();
            for (name, member) in members {
                let text = canonical(member)?;
                if text != "null" && text != "{}" {
                    sorted.insert(serde_json::to_string(&name)?, text);
                }
            }
            let members: Vec<String> = sorted.into_iter().map(|(name, text)| format!("{name}:{text}")).collect();
            Ok(format!("{{{}}}", members.join(",")))
        }
        Value::Array(items) => {
            let items = items.into_iter().map(canonical).collect::<serde_json::Result<Vec<String>>>()?;
            Ok(format!("[{}]", items.join(",")))
        }
        other => serde_json::to_string(&other),
    }
}

#[cfg(test)]
mod tests {
    use lineside_api::spec::{Decoder, InputSpec, OutputSpec, Resize, RuntimeSpec, Task};

    use super::*;

    fn spec() -> ModelSpec {
        ModelSpec {
            task: Some(Task::Detect),
            input: InputSpec { mean: Some(vec![0.5]), resize: Some(Resize::Letterbox), ..InputSpec::default() },
            output: OutputSpec {
                labels: Some(vec!["dent".into(), "scratch".into()]),
                threshold: Some(0.4),
                ..OutputSpec::default()
            },
            runtime: RuntimeSpec::default(),
        }
    }

    #[test]
    fn the_canonical_form_is_stable() {
        let json = r#"{"input":{"mean":[0.5],"resize":"letterbox"},"output":{"labels":["dent","scratch"],"threshold":0.4},"task":"detect"}"#;
        assert_eq!(spec_digest(&spec()).unwrap(), Digest::of(json.as_bytes()));
        assert_eq!(spec_digest(&ModelSpec::default()).unwrap(), Digest::of(b"{}"));
    }

    #[test]
    fn every_field_that_decides_changes_the_digest_and_resources_do_not() {
        type Change = fn(&mut ModelSpec);
        let deciding: [Change; 9] = [
            |spec| spec.task = Some(Task::Classify),
            |spec| spec.task = None,
            |spec| spec.output.labels = Some(vec!["scratch".into(), "dent".into()]),
            |spec| spec.output.labels = Some(Vec::new()),
            |spec| spec.output.decoder = Some(Decoder::Yolov5),
            |spec| spec.output.threshold = Some(0.41),
            |spec| spec.output.top_k = Some(1),
            |spec| spec.input.mean = Some(vec![0.0]),
            |spec| spec.input.resize = Some(Resize::Crop),
        ];
        let signed = spec_digest(&spec()).unwrap();
        for (index, change) in deciding.into_iter().enumerate() {
            let mut changed = spec();
            change(&mut changed);
            assert_ne!(spec_digest(&changed).unwrap(), signed, "change {index}");
        }
        let mut infinite = spec();
        infinite.output.threshold = Some(f32::INFINITY);
        assert!(matches!(spec_digest(&infinite), Err(SigningError::NotFinite)), "it would be written as null");
        let mut resources = spec();
        resources.runtime.instances = Some(4);
        assert_eq!(spec_digest(&resources).unwrap(), signed);
    }
}
