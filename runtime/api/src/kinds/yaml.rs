//! Reads a typed value out of YAML and collects every error on the way, where serde stops at the first.
//!
//! Each wrong value is noted with its path, taken out of the tree, and the reading starts again without it; raw types
//! have only optional fields, so that what is missing is no obstacle. Keys that nobody reads are collected too.

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::names::ConfigErrors;

/// Wrong values of one text that are listed before giving up on it.
const WRONG_VALUES_MAX: usize = 50;
/// Longest text taken, in bytes.
const TEXT_BYTES_MAX: usize = 1 << 20;

/// The documents of a YAML or JSON text, empty ones left out.
///
/// # Errors
/// What is wrong with the text, in one line with the place.
pub fn documents(text: &str) -> Result<Vec<Value>, String> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(format!("the text has {} bytes; at most {TEXT_BYTES_MAX} are taken", text.len()));
    }
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|error| first_line(&error.to_string()))?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

/// A value as a YAML document.
///
/// # Errors
/// When the value cannot be written down, which JSON always can.
pub fn to_yaml(value: &Value) -> Result<String, serde_saphyr::SerializeError> {
    serde_saphyr::to_string(value)
}

/// Reads one document. Whatever is wrong is noted under `place`, and the rest is read all the same.
pub fn read<T: DeserializeOwned + Default>(place: &str, mut document: Value, errors: &mut ConfigErrors) -> T {
    // serde would also take a list, field by field.
    if !document.is_object() {
        errors.add(place, "must be a mapping of keys to values");
        return T::default();
    }
    for _ in 0..WRONG_VALUES_MAX {
        let mut unknown = Vec::new();
        let mut note_unknown = |path: serde_ignored::Path<'_>| unknown.push(path.to_string());
        let mut track = serde_path_to_error::Track::new();
        let tracked = serde_path_to_error::Deserializer::new(document.clone(), &mut track);
        match T::deserialize(serde_ignored::Deserializer::new(tracked, &mut note_unknown)) {
            Ok(value) => {
                for path in unknown {
                    errors.add(joined(place, &path.replace("?.", "").replace(".?", "")), "is not a known key");
                }
                return value;
            }
            Err(error) => {
                let path = track.path();
                errors.add(joined(place, &path.to_string()), error);
                if !remove(&mut document, &path) {
                    return T::default();
                }
            }
        }
    }
    T::default()
}

fn joined(place: &str, path: &str) -> String {
    match (place, path) {
        (place, "." | "") => place.to_owned(),
        ("", path) => path.to_owned(),
        (place, path) => format!("{place} {path}"),
    }
}

/// Takes the value at `path` out of the tree; `false` where there is none to take.
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

/// YAML errors come with a drawing of the place; logs want the first line.
fn first_line(message: &str) -> String {
    message.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("it cannot be read").to_owned()
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
    fn every_mistake_is_reported_and_the_rest_is_read() {
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
    fn texts_that_are_no_yaml_are_refused_with_the_place() {
        for text in ["a: [1", "a: 1\na: 2", "{", "a: &x [*x]"] {
            let error = documents(text).unwrap_err();
            assert!(!error.is_empty() && !error.contains('\n'), "{error}");
        }
        assert_eq!(documents("").unwrap().len(), 0);
        assert_eq!(documents("# only a comment\n---\n").unwrap().len(), 0);
        assert_eq!(documents("a: 1\n---\nb: 2\n").unwrap().len(), 2);
        assert!(documents(&"x".repeat(2 << 20)).is_err());
    }

    #[test]
    fn a_document_of_the_wrong_kind_is_one_mistake() {
        let mut errors = ConfigErrors::default();
        let sample: Sample = read("f", serde_json::json!([1, 2]), &mut errors);
        assert_eq!(sample, Sample::default());
        assert_eq!(errors.into_list().len(), 1);
    }
}
