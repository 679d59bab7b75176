//! Names of objects and levels of MQTT topics, and the list of errors that is collected while a text is read.

use std::fmt::Display;

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

/// The errors of a configuration or manifest, each with the field or option it is about. All errors are collected, so that one
/// attempt shows them all.
#[derive(Debug, Default)]
pub struct ConfigErrors(Vec<String>);

impl ConfigErrors {
    /// Adds the error `what` of the field or option `place`.
    pub fn add(&mut self, place: impl Display, what: impl Display) {
        self.0.push(format!("{place}: {what}"));
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

    /// Whether no error was added.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All errors, in the order in which they were added.
    pub fn into_list(self) -> Vec<String> {
        self.0
    }
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
