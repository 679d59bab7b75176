//! Names of objects and of topic levels, and the list of errors that reading a text collects.

/// Whether a name may stand in topics, paths and labels: `[a-z0-9]([a-z0-9-]{0,62})`.
pub fn is_name(text: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    text.len() <= 63
        && text.bytes().next().is_some_and(alphanumeric)
        && text.bytes().all(|byte| alphanumeric(byte) || byte == b'-')
}

/// Whether a text may be one level of an MQTT topic (MQTT 3.1.1, section 4.7).
///
/// # Errors
/// Why it may not.
pub fn topic_segment(text: &str) -> Result<(), String> {
    let forbidden = |character: char| matches!(character, '+' | '#' | '/') || character.is_control();
    match text {
        "" => Err("must not be empty".to_owned()),
        text if text.len() > 253 => Err("is longer than 253 bytes".to_owned()),
        text if text.starts_with('$') || text.contains(forbidden) => {
            Err(format!("`{}` may not begin with $ nor hold +, #, / or control characters", text.escape_debug()))
        }
        _ => Ok(()),
    }
}

/// The errors found in one text, each with its place.
#[derive(Debug, Default)]
pub struct ConfigErrors(Vec<String>);

impl ConfigErrors {
    /// Notes one.
    pub fn add(&mut self, place: impl std::fmt::Display, what: impl std::fmt::Display) {
        self.0.push(format!("{place}: {what}"));
    }

    /// Takes the value, or notes why there is none.
    pub fn take<T>(&mut self, place: &str, value: Result<T, String>) -> Option<T> {
        value.map_err(|what| self.add(place, what)).ok()
    }

    /// Notes a field that has to be there and is not.
    pub fn require<T>(&mut self, place: &str, value: Option<T>) -> Option<T> {
        if value.is_none() {
            self.add(place, "is missing");
        }
        value
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them.
    pub fn into_list(self) -> Vec<String> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_lowercase_and_plain() {
        for good in ["a", "7", "cam7", "surface-defects", "a-", &"a".repeat(63)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "-a", "A", "a_b", "a.b", "a/b", "a+", "#", "../x", "a\0", "é", &"a".repeat(64)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
