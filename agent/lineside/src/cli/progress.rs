//! Progress bars on stderr for people, and none for scripts.

use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressStyle};

/// A bar that counts bytes.
pub(super) fn of_bytes(doing: &'static str) -> ProgressBar {
    bar(doing, "{msg} {bar:40} {bytes}/{total_bytes} {eta}")
}

/// A bar that counts messages.
pub(super) fn of_messages(doing: &'static str) -> ProgressBar {
    bar(doing, "{msg} {bar:40} {pos}/{len} messages {eta}")
}

fn bar(doing: &'static str, template: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style).with_message(doing)
}
