//! Names of objects and levels of MQTT topics, and the list of errors that is collected while a text is read.

use std::fmt::{Debug, Display};
use std::ops::RangeInclusive;

/// Longest topic level in bytes: the longest DNS subdomain, because node names are topic levels.
const TOPIC_LEVEL_BYTES_MAX: usize = 253;
/// The format that [`is_name`] checks, for error messages.
pub(crate) const NAME_FORMAT: &str = "at most 63 of a-z, 0-9 and -, beginning with a letter or digit";

/// Why a text cannot be a level of an MQTT topic.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The text is empty.
    #[error("must not be empty")]
    Empty,
    /// The text is longer than 253 bytes.
    #[error("must not be longer than {TOPIC_LEVEL_BYTES_MAX} bytes")]
    TooLong,
    /// The text contains characters with a meaning in MQTT, or control characters.
    #[error("`{}` must not begin with $ or contain +, #, / or control characters", .0.escape_debug())]
    Forbidden(String),
}

/// Whether a text is a valid name of an object, which is also used in topics, paths and labels: `[a-z0-9]([a-z0-9-]{0,62})`.
pub fn is_name(text: &str) -> bool {
    let is_alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    text.len() <= 63
        && text.bytes().next().is_some_and(is_alphanumeric)
        && text.bytes().all(|byte| is_alphanumeric(byte) || byte == b'-')
}

/// Checks that a text can be one level of an MQTT topic (MQTT 3.1.1, section 4.7).
///
/// # Errors
/// [`NameError`].
pub fn topic_segment(text: &str) -> Result<(), NameError> {
    let is_forbidden = |character: char| matches!(character, '+' | '#' | '/') || character.is_control();
    if text.is_empty() {
        Err(NameError::Empty)
    } else if text.len() > TOPIC_LEVEL_BYTES_MAX {
        Err(NameError::TooLong)
    } else if text.starts_with('$') || text.contains(is_forbidden) {
        Err(NameError::Forbidden(text.to_owned()))
    } else {
        Ok(())
    }
}

/// Most errors of one manifest object that are reported.
const OBJECT_ERRORS_MAX: usize = 20;
/// Longest error of a manifest object, in bytes. Keys and values of the object are part of it.
const OBJECT_ERROR_BYTES_MAX: usize = 512;
/// Most errors of a configuration that are reported: more than there are settings.
const CONFIG_ERRORS_MAX: usize = 100;
/// Longest error of a configuration, in bytes. The error of an unknown key lists all keys.
const CONFIG_ERROR_BYTES_MAX: usize = 4096;

/// The errors of a configuration or manifest, each with the field or option it is about. All errors are collected, so that one
/// attempt shows them all. Number and length are bounded, because a text of 1 MiB can contain 90,000 errors: further errors are
/// only counted, and longer ones are cut.
#[derive(Debug)]
pub struct ConfigErrors {
    listed: Vec<String>,
    /// Errors that are not listed.
    omitted: usize,
    listed_max: usize,
    bytes_max: usize,
}

impl Default for ConfigErrors {
    /// No errors, with the bounds of a configuration: 100 errors of 4 KiB.
    fn default() -> Self {
        Self { listed: Vec::new(), omitted: 0, listed_max: CONFIG_ERRORS_MAX, bytes_max: CONFIG_ERROR_BYTES_MAX }
    }
}

impl ConfigErrors {
    /// No errors, with the bounds of a manifest object: 20 errors of 512 bytes.
    pub fn of_object() -> Self {
        Self { listed_max: OBJECT_ERRORS_MAX, bytes_max: OBJECT_ERROR_BYTES_MAX, ..Self::default() }
    }

    /// Adds the error `what` of the field or option `place`.
    pub fn add(&mut self, place: impl Display, what: impl Display) {
        if self.has_room() {
            self.listed.push(cut(format!("{place}: {what}"), self.bytes_max));
        } else {
            self.omit(1);
        }
    }

    /// Whether a further error is listed and not only counted.
    pub fn has_room(&self) -> bool {
        self.listed.len() < self.listed_max
    }

    /// Counts errors that are not listed.
    pub fn omit(&mut self, count: usize) {
        self.omitted = self.omitted.saturating_add(count);
    }

    /// Adds the errors of another list, within the bounds of this one.
    pub fn append(&mut self, other: Self) {
        for error in other.listed {
            if self.has_room() {
                self.listed.push(cut(error, self.bytes_max));
            } else {
                self.omit(1);
            }
        }
        self.omit(other.omitted);
    }

    /// Returns the value, or adds its error.
    pub fn take<T>(&mut self, place: &str, value: Result<T, impl Display>) -> Option<T> {
        value.map_err(|what| self.add(place, what)).ok()
    }

    /// Adds an error when a required value is missing.
    pub fn require<T>(&mut self, place: &str, value: Option<T>) -> Option<T> {
        if value.is_none() {
            self.add(place, "is missing");
        }
        value
    }

    /// Adds an error when a value is outside of its range; NaN is outside of every range. A missing value is valid.
    pub fn check_range<T>(&mut self, place: &str, value: Option<&T>, range: &RangeInclusive<T>)
    where
        T: PartialOrd + Debug + Display,
    {
        if let Some(value) = value.filter(|value| !range.contains(value)) {
            // As `Debug`, 1e-300 is written without its 300 zeros.
            self.add(place, format!("{value:?} is not between {} and {}", range.start(), range.end()));
        }
    }

    /// Whether no error was added.
    pub fn is_empty(&self) -> bool {
        self.listed.is_empty() && self.omitted == 0
    }

    /// The listed errors, in the order in which they were added, and the number of the others as the last entry.
    pub fn into_list(self) -> Vec<String> {
        let mut list = self.listed;
        if self.omitted > 0 {
            list.push(format!("and {} more errors", self.omitted));
        }
        list
    }
}

/// Cuts a text to at most `bytes_max` bytes, between two characters.
fn cut(mut text: String, bytes_max: usize) -> String {
    if text.len() > bytes_max {
        text.truncate(text.floor_char_boundary(bytes_max.saturating_sub('…'.len_utf8())));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_lowercase_letters_digits_and_dashes() {
        for valid in ["a", "7", "cam7", "surface-defects", "a-", &"a".repeat(63)] {
            assert!(is_name(valid), "{valid}");
        }
        for invalid in ["", "-a", "A", "a_b", "a.b", "a/b", "a+", "#", "../x", "a\0", "é", &"a".repeat(64)] {
            assert!(!is_name(invalid), "{invalid}");
        }
    }

    #[test]
    fn number_and_length_of_errors_are_bounded() {
        let mut file = ConfigErrors::default();
        for object in 0..10 {
            let mut errors = ConfigErrors::of_object();
            (0..90_000).for_each(|key| errors.add(format!("EdgeModel m{object} spec.{key}"), "é".repeat(1000)));
            file.append(errors);
        }
        assert!(!file.is_empty());
        let list = file.into_list();
        assert_eq!((list.len(), list.last().unwrap().as_str()), (101, "and 899900 more errors"));
        assert!(list.iter().all(|error| error.len() <= CONFIG_ERROR_BYTES_MAX));
        let mut errors = ConfigErrors::of_object();
        errors.add("EdgeModel m spec", "é".repeat(1000));
        let list = errors.into_list();
        assert!(list[0].len() <= OBJECT_ERROR_BYTES_MAX && list[0].ends_with("é…"), "{list:?}");
    }

    #[test]
    fn nan_is_outside_of_every_range() {
        for (value, is_valid) in [(f64::NAN, false), (f64::INFINITY, false), (-0.0, true), (1.0, true), (1.1, false)] {
            let mut errors = ConfigErrors::default();
            errors.check_range("spec.x", Some(&value), &(0.0..=1.0));
            assert_eq!(errors.is_empty(), is_valid, "{value}");
        }
    }

    #[test]
    fn topic_levels_have_no_wildcards_and_no_separators() {
        for valid in ["plant-1", "edge.3", "Line A", "é", &"a".repeat(253)] {
            assert_eq!(topic_segment(valid), Ok(()), "{valid}");
        }
        assert_eq!(topic_segment(""), Err(NameError::Empty));
        assert_eq!(topic_segment(&"a".repeat(254)), Err(NameError::TooLong));
        for invalid in ["$SYS", "a/b", "a+", "#", "a\0"] {
            assert_eq!(topic_segment(invalid), Err(NameError::Forbidden(invalid.to_owned())));
        }
    }
}
