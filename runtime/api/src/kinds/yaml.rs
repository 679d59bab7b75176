//! Reads typed values from YAML and collects all errors, while serde stops at the first one.
//!
//! Each wrong value is recorded with its path and removed from the document, and the document is read again without it. Raw
//! types have only optional fields, so a removed value causes no further error. Unknown keys are collected too.

use std::panic::catch_unwind;

use lineside_common::supervisor::panic_message;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::names::ConfigErrors;

/// Largest number of wrong values that are reported for one document.
const WRONG_VALUES_MAX: usize = 20;
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
    /// The parser panicked, which is a defect of the parser. The message of the panic.
    #[error("the text cannot be read: the YAML parser panicked: {0}")]
    Panicked(String),
}

/// The documents of a YAML or JSON text, without empty ones.
///
/// # Errors
/// [`YamlError`].
pub fn documents(text: &str) -> Result<Vec<Value>, YamlError> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(YamlError::TooLong { bytes: text.len() });
    }
    // A defect of the parser must cost this text only, and not the task that reads it.
    let documents: Vec<Value> = catch_unwind(|| serde_saphyr::from_multiple(text))
        .map_err(|panic| YamlError::Panicked(first_line(panic_message(&*panic))))?
        .map_err(|error| YamlError::Syntax(first_line(&error.to_string())))?;
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
        let mut unknown = ConfigErrors::of_object();
        let mut add_unknown = |path: serde_ignored::Path<'_>| {
            if unknown.has_room() {
                let path = path.to_string().replace("?.", "").replace(".?", "");
                unknown.add(join(place, &path), "is not a known key");
            } else {
                unknown.omit(1);
            }
        };
        let mut track = serde_path_to_error::Track::new();
        let tracked = serde_path_to_error::Deserializer::new(document.clone(), &mut track);
        match T::deserialize(serde_ignored::Deserializer::new(tracked, &mut add_unknown)) {
            Ok(value) => {
                errors.append(unknown);
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
    fn numbers_that_are_not_finite_are_errors_and_not_absent_values() {
        for number in [".nan", ".NaN", ".inf", "-.inf", "+.inf", "1e400", "-1e400"] {
            for text in
                [format!("number: {number}"), format!("inner: {{rate: {number}}}"), format!("words: [{number}]")]
            {
                match documents(&text) {
                    // Some notations are texts for the parser; a field that is a number rejects them.
                    Ok(documents) => assert!(!documents[0].to_string().contains("null"), "{text}: {documents:?}"),
                    Err(error) => assert!(!error.to_string().contains("panicked"), "{text}: {error}"),
                }
            }
        }
        let error = documents("inner: {rate: .nan}").unwrap_err().to_string();
        assert!(error.contains("non-finite"), "{error}");
        let numbers = documents("[18446744073709551615, -9223372036854775808, 5e-324, 0x10, -0.0, null]").unwrap();
        assert_eq!(numbers[0].to_string(), "[18446744073709551615,-9223372036854775808,5e-324,16,-0.0,null]");
    }

    #[test]
    fn unknown_keys_beyond_the_bound_are_counted() {
        let text: String = (0..60_000).map(|key| format!("k{key}: 1\n")).collect();
        let mut errors = ConfigErrors::of_object();
        let _sample: Sample = read("f", documents(&text).unwrap().remove(0), &mut errors);
        let list = errors.into_list();
        assert_eq!((list.len(), list[20].as_str()), (21, "and 59980 more errors"), "{:?}", list.last());
    }

    #[test]
    fn a_document_that_is_not_a_mapping_is_one_error() {
        let mut errors = ConfigErrors::default();
        let sample: Sample = read("f", serde_json::json!([1, 2]), &mut errors);
        assert_eq!(sample, Sample::default());
        assert_eq!(errors.into_list().len(), 1);
    }
}
