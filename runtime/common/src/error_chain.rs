//! An error with its causes in one line, for logs and for status messages.

use std::error::Error;

/// The error and its sources, outermost first, joined by `: `. A source that the message before it already ends with is left
/// out: many libraries repeat their source in their own message.
pub fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Link {
        text: &'static str,
        source: Option<Box<Link>>,
    }

    #[test]
    fn causes_are_listed_once() {
        let inner = Link { text: "connection refused", source: None };
        let repeated = Link { text: "connect: connection refused", source: Some(Box::new(inner)) };
        let outer = Link { text: "the broker cannot be reached", source: Some(Box::new(repeated)) };
        assert_eq!(error_chain(&outer), "the broker cannot be reached: connect: connection refused");
    }
}
