//! Progress bars of the commands. They are drawn on stderr if it is a terminal, and hidden otherwise.

use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressStyle};

/// A progress bar in bytes, labelled with the operation.
pub(super) fn byte_bar(operation: &'static str) -> ProgressBar {
    bar(operation, "{msg} {bar:40} {bytes}/{total_bytes} {eta}")
}

/// A progress bar in messages, labelled with the operation.
pub(super) fn message_bar(operation: &'static str) -> ProgressBar {
    bar(operation, "{msg} {bar:40} {pos}/{len} messages {eta}")
}

fn bar(operation: &'static str, template: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style).with_message(operation)
}
