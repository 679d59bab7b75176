//! Reads typed values from YAML and collects all errors, while serde stops at the first one.
//!
//! Each wrong value is recorded with its path and removed from the document, and the document is read again without it. Raw
//! types have only optional fields, so a removed value causes no further error. Unknown keys are collected too.

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::names::ConfigErrors;

/// Largest number of wrong values that are reported for one document.
const WRONG_VALUES_MAX: usize = 50;
/// Longest text in bytes.
const TEXT_BYTES_MAX: usize = 1 << 20;

/// Why a text cannot be read as YAML.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum YamlError {
    /// The text is longer than 1 MiB.
    #[error("the text has {bytes} bytes; at most {TEXT_BYTES_MAX} are accepted")]
    TooLong {
        /// Length of the text in bytes.
        bytes: usize,
    },
    /// The text is not valid YAML. The message of the parser, in one line with the position.
    #[error("{0}")]
    Syntax(String),
}

/// The documents of a YAML or JSON text, without empty ones.
///
/// # Errors
/// [`YamlError`].
pub fn documents(text: &str) -> Result<Vec<Value>, YamlError> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(YamlError::TooLong { bytes: text.len() });
    }
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(text).map_err(|error| YamlError::Syntax(first_line(&error.to_string())))?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

/// Formats a value as a YAML document.
///
/// # Errors
/// When the value cannot be formatted; JSON values always can.
pub fn to_yaml(value: &Value) -> Result<String, serde_saphyr::SerializeError> {
    serde_saphyr::to_string(value)
}

/// Reads one document. Errors are added under `place`; the other fields are read nevertheless.
pub fn read<T: DeserializeOwned + Default>(place: &str, mut document: Value, errors: &mut ConfigErrors) -> T {
    // serde would also accept a list, as the fields in their order.
    if !document.is_object() {
        errors.add(place, "must be a mapping of keys to values");
        return T::default();
    }
    for _ in 0..WRONG_VALUES_MAX {
        let mut unknown = Vec::new();
        let mut add_unknown = |path: serde_ignored::Path<'_>| unknown.push(path.to_string());
        let mut track = serde_path_to_error::Track::new();
        let tracked = serde_path_to_error::Deserializer::new(document.clone(), &mut track);
        match T::deserialize(serde_ignored::Deserializer::new(tracked, &mut add_unknown)) {
            Ok(value) => {
                for path in unknown {
                    errors.add(join(place, &path.replace("?.", "").replace(".?", "")), "is not a known key");
                }
                return value;
            }
            Err(error) => {
                let path = track.path();
                errors.add(join(place, &path.to_string()), error);
                if !remove(&mut document, &path) {
                    return T::default();
                }
            }
        }
    }
    T::default()
}

fn join(place: &str, path: &str) -> String {
    match (place, path) {
        (place, "." | "") => place.to_owned(),
        ("", path) => path.to_owned(),
        (place, path) => format!("{place} {path}"),
    }
}

/// Removes the value at `path` from the document. `false` when there is no such value.
fn remove(document: &mut Value, path: &serde_path_to_error::Path) -> bool {
    use serde_path_to_error::Segment;
    let segments: Vec<&Segment> =
        path.iter().filter(|segment| matches!(segment, Segment::Map { .. } | Segment::Seq { .. })).collect();
    let Some((last, parents)) = segments.split_last() else { return false };
    let mut at = document;
    for segment in parents {
        let next = match segment {
            Segment::Map { key } => at.get_mut(key),
            Segment::Seq { index } => at.get_mut(index),
            _ => None,
        };
        let Some(next) = next else { return false };
        at = next;
    }
    match (last, at) {
        (Segment::Map { key }, Value::Object(entries)) => entries.remove(key).is_some(),
        (Segment::Seq { index }, Value::Array(items)) if *index < items.len() => {
            items.remove(*index);
            true
        }
        _ => false,
    }
}

/// The first line of an error of the YAML parser; the other lines show an excerpt of the text, which does not belong in a log.
fn first_line(message: &str) -> String {
    message.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("the text cannot be read").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize, Default, Debug, PartialEq)]
    #[serde(rename_all = "camelCase", default)]
    struct Sample {
        number: Option<u32>,
        words: Option<Vec<String>>,
        inner: Option<Inner>,
    }

    #[derive(serde::Deserialize, Default, Debug, PartialEq)]
    #[serde(default)]
    struct Inner {
        flag: Option<bool>,
        rate: Option<f32>,
    }

    #[test]
    fn every_error_is_reported_and_the_other_fields_are_read() {
        let text = "number: many\nwords: [a, 3, b]\ninner: {flag: perhaps, rate: 2.5, fast: 1}\nspeed: 4\n";
        let mut errors = ConfigErrors::default();
        let document = documents(text).unwrap().remove(0);
        let sample: Sample = read("file.yaml", document, &mut errors);
        assert_eq!(sample.number, None);
        assert_eq!(sample.words, Some(vec!["a".to_owned(), "b".to_owned()]));
        assert_eq!(sample.inner, Some(Inner { flag: None, rate: Some(2.5) }));
        let list = errors.into_list();
        let expected = [
            "file.yaml number: ",
            "file.yaml words[1]: ",
            "file.yaml inner.flag: ",
            "file.yaml inner.fast: ",
            "file.yaml speed: ",
        ];
        assert_eq!(list.len(), expected.len(), "{list:#?}");
        for start in expected {
            assert!(list.iter().any(|error| error.starts_with(start)), "{start} in {list:#?}");
        }
    }

    #[test]
    fn invalid_yaml_is_rejected_in_one_line() {
        for text in ["a: [1", "a: 1\na: 2", "{", "a: &x [*x]"] {
            let error = documents(text).unwrap_err().to_string();
            assert!(!error.is_empty() && !error.contains('\n'), "{error}");
        }
        assert_eq!(documents("").unwrap().len(), 0);
        assert_eq!(documents("# only a comment\n---\n").unwrap().len(), 0);
        assert_eq!(documents("a: 1\n---\nb: 2\n").unwrap().len(), 2);
        assert_eq!(documents(&"x".repeat(2 << 20)), Err(YamlError::TooLong { bytes: 2 << 20 }));
    }

    #[test]
    fn a_document_that_is_not_a_mapping_is_one_error() {
        let mut errors = ConfigErrors::default();
        let sample: Sample = read("f", serde_json::json!([1, 2]), &mut errors);
        assert_eq!(sample, Sample::default());
        assert_eq!(errors.into_list().len(), 1);
    }
}
