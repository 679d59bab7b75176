//! The names of the classes: where they come from, and which number each has.
//!
//! A list names the classes in order. A dictionary of the model's metadata names them by number, which may begin with 1 or have gaps.
//! Names are never shifted without a word: what can be read in two ways is refused with the setting that decides it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::bad_spec;
use crate::Result;
use crate::graph::GraphInfo;
use lineside_api::prediction::Class;
use lineside_api::spec::ModelSpec;

/// Names of the classes, shared by every result that mentions them.
#[derive(Debug, Clone, PartialEq)]
pub struct Labels {
    /// The number of the first name.
    first: usize,
    names: Arc<[Arc<str>]>,
}

impl Labels {
    /// Names for the classes from number `first` on.
    pub fn named(first: usize, names: &[String]) -> Self {
        Self { first, names: names.iter().map(|name| Arc::from(name.as_str())).collect() }
    }

    /// `class_0`, `class_1` and so on.
    pub fn numbered(count: usize) -> Self {
        Self { first: 0, names: (0..count).map(|class| Arc::from(numbered(class))).collect() }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The names, in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(AsRef::as_ref)
    }

    /// A class with its name; one without a name is numbered.
    pub fn class(&self, class: usize, score: f32) -> Class {
        let name = class.checked_sub(self.first).and_then(|index| self.names.get(index));
        let label = name.cloned().unwrap_or_else(|| Arc::from(numbered(class)));
        Class { label, class: class as u32, score }
    }
}

fn numbered(class: usize) -> String {
    format!("class_{class}")
}

/// The names that the manifest or the file states.
pub(super) struct KnownLabels {
    names: Option<Names>,
}

enum Names {
    /// Of the manifest, in order.
    Manifest(Vec<String>),
    /// Of the file, in order.
    List(Vec<String>),
    /// Of the file, by number.
    Numbered(BTreeMap<usize, String>),
}

impl Names {
    fn len(&self) -> usize {
        match self {
            Self::Manifest(names) | Self::List(names) => names.len(),
            Self::Numbered(names) => names.len(),
        }
    }

    /// Where they come from, for messages.
    fn place(&self) -> &'static str {
        match self {
            Self::Manifest(_) => "spec.output.labels",
            Self::List(_) | Self::Numbered(_) => "the model's metadata (override with spec.output.labels)",
        }
    }
}

impl KnownLabels {
    pub(super) fn new(spec: &ModelSpec, graph: &GraphInfo) -> Self {
        let names = match (&spec.output.labels, graph.class_names()) {
            (Some(labels), _) => Some(Names::Manifest(labels.clone())),
            (None, Some(names)) if names.has_numbers => Some(Names::Numbered(names.by_number)),
            (None, Some(names)) => Some(Names::List(names.by_number.into_values().collect())),
            (None, None) => None,
        };
        Self { names }
    }

    /// The number of names.
    pub(super) fn count(&self) -> Option<usize> {
        self.names.as_ref().map(Names::len)
    }

    /// The names for a model with one score for each of so many classes.
    ///
    /// # Errors
    /// When the number of names differs, or their own numbers are not those of the classes.
    pub(super) fn for_scores(&self, classes: usize, assumptions: &mut Vec<String>) -> Result<Labels> {
        let Some(names) = &self.names else { return Ok(Labels::numbered(classes)) };
        let wrong_count =
            || bad_spec(format!("{} has {} names, but the model has {classes} classes", names.place(), names.len()));
        match names {
            Names::Manifest(list) | Names::List(list) if list.len() == classes => Ok(Labels::named(0, list)),
            Names::Manifest(_) | Names::List(_) => Err(wrong_count()),
            Names::Numbered(by_number) => {
                let last = by_number.last_key_value().map_or(0, |(number, _)| *number);
                let is_from_one = by_number.contains_key(&1) && !by_number.contains_key(&0) && last == by_number.len();
                if last + 1 == classes {
                    Ok(Labels::named(0, &dense(by_number)))
                } else if is_from_one && last == classes {
                    assumptions.push(
                        "the model's metadata numbers the classes from 1; the first name is taken for the first score"
                            .to_owned(),
                    );
                    Ok(Labels::named(0, &by_number.values().cloned().collect::<Vec<_>>()))
                } else if by_number.len() == classes {
                    Err(bad_spec(format!(
                        "the model's metadata numbers its {classes} classes with gaps, up to {last}; state the names in the order of \
                         the scores in spec.output.labels"
                    )))
                } else {
                    Err(wrong_count())
                }
            }
        }
    }

    /// The names for a model that gives class numbers. `first_class` is the number of the first class, where it is known.
    ///
    /// # Errors
    /// When a list of names needs that number and it is not known.
    pub(super) fn for_numbers(&self, first_class: Option<usize>) -> Result<Labels> {
        match (&self.names, first_class) {
            (None, _) => Ok(Labels::numbered(0)),
            // The file states the numbers, so they are those of the model.
            (Some(Names::Numbered(names)), _) => Ok(Labels::named(0, &dense(names))),
            (Some(Names::Manifest(names) | Names::List(names)), Some(first)) => Ok(Labels::named(first, names)),
            (Some(names @ (Names::Manifest(_) | Names::List(_))), None) => Err(bad_spec(format!(
                "the model gives class numbers, and {} does not say which number the first name has; set spec.output.firstClass to \
                 0, or to 1 where 0 is the background as in torchvision",
                names.place()
            ))),
        }
    }
}

/// The names by number, with `class_N` in the gaps.
fn dense(names: &BTreeMap<usize, String>) -> Vec<String> {
    let last = names.last_key_value().map_or(0, |(number, _)| *number);
    (0..=last).map(|number| names.get(&number).cloned().unwrap_or_else(|| numbered(number))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered_names(pairs: &[(usize, &str)]) -> KnownLabels {
        let names = pairs.iter().map(|(number, name)| (*number, (*name).to_owned())).collect();
        KnownLabels { names: Some(Names::Numbered(names)) }
    }

    fn listed(names: &[&str]) -> KnownLabels {
        KnownLabels { names: Some(Names::Manifest(names.iter().map(|name| (*name).to_owned()).collect())) }
    }

    fn names(labels: &Labels) -> Vec<&str> {
        labels.iter().collect()
    }

    #[test]
    fn numbers_of_the_metadata_are_kept() {
        let mut assumptions = Vec::new();
        let gap = numbered_names(&[(0, "good"), (2, "dent")]);
        assert_eq!(names(&gap.for_scores(3, &mut assumptions).unwrap()), ["good", "class_1", "dent"]);
        assert_eq!(&*gap.for_numbers(None).unwrap().class(2, 1.0).label, "dent");
        let error = gap.for_scores(2, &mut assumptions).unwrap_err().to_string();
        assert!(error.contains("with gaps, up to 2"), "{error}");
        assert!(assumptions.is_empty());
        let from_one = numbered_names(&[(1, "scratch"), (2, "dent")]);
        assert_eq!(names(&from_one.for_scores(2, &mut assumptions).unwrap()), ["scratch", "dent"]);
        assert_eq!(assumptions.len(), 1, "{assumptions:?}");
        assert_eq!(names(&from_one.for_scores(3, &mut assumptions).unwrap()), ["class_0", "scratch", "dent"]);
        assert_eq!(&*from_one.for_numbers(None).unwrap().class(2, 1.0).label, "dent");
        assert_eq!(&*from_one.for_numbers(Some(0)).unwrap().class(1, 1.0).label, "scratch");
        assert!(from_one.for_scores(4, &mut assumptions).is_err());
    }

    #[test]
    fn a_list_for_class_numbers_needs_the_number_of_its_first_name() {
        let labels = listed(&["scratch", "dent", "stain"]);
        let error = labels.for_numbers(None).unwrap_err().to_string();
        assert!(error.contains("spec.output.firstClass"), "{error}");
        let torchvision = labels.for_numbers(Some(1)).unwrap();
        assert_eq!(&*torchvision.class(2, 1.0).label, "dent");
        assert_eq!(&*torchvision.class(0, 1.0).label, "class_0");
        assert_eq!(&*torchvision.class(4, 1.0).label, "class_4");
        assert_eq!(&*labels.for_numbers(Some(0)).unwrap().class(2, 1.0).label, "stain");
        assert!(labels.for_scores(4, &mut Vec::new()).is_err());
    }
}
