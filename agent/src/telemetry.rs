//! Logs on stderr: JSON lines for machines, or plain text where a person looks at a terminal.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// Starts logging.
///
/// # Errors
/// When the filter cannot be understood; the message says what was wrong with it.
pub fn start(filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|error| format!("`{filter}` is no log filter: {error}; use a level such as info or debug"))?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match std::io::stderr().is_terminal() {
        true => subscriber.with_target(false).init(),
        false => subscriber.json().flatten_event(true).with_current_span(false).with_span_list(false).init(),
    }
    // A panic is an error like any other, and belongs into the log in one line.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let what = panic.payload_as_str().unwrap_or("no message");
        tracing::error!(place, what, "panic");
    }));
    Ok(())
}
