//! Logs a lasting condition once, and again only when it changes or ends.

/// The last value that was logged.
#[derive(Debug, Clone)]
pub struct LogOnChange<T>(Option<T>);

impl<T> Default for LogOnChange<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: PartialEq> LogOnChange<T> {
    /// Notes a value. `true` when it differs from the last one, and should be logged.
    pub fn set(&mut self, value: T) -> bool {
        let is_new = self.0.as_ref() != Some(&value);
        if is_new {
            self.0 = Some(value);
        }
        is_new
    }

    /// Notes that the condition has ended. `true` when one was logged before.
    pub fn clear(&mut self) -> bool {
        self.0.take().is_some()
    }

    /// The value that was logged last.
    pub fn last(&self) -> Option<&T> {
        self.0.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_new_once_until_it_changes_or_ends() {
        let mut logged = LogOnChange::default();
        assert!(logged.set("refused") && !logged.set("refused") && logged.set("unreachable"));
        assert_eq!(logged.last(), Some(&"unreachable"));
        assert!(logged.clear() && !logged.clear());
        assert!(logged.set("unreachable"));
    }
}
