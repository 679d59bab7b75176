//! Logs on stderr: JSON lines for machines, or plain text where a person looks at a terminal.

use std::io::IsTerminal as _;
use std::sync::Arc;

use tracing_subscriber::{EnvFilter, reload};

use lineside_mqtt::command::LogLevelError;
pub use lineside_mqtt::command::SetLevel;

/// Starts logging. What is returned changes the filter later.
///
/// # Errors
/// When the filter cannot be understood; the message says what was wrong with it.
pub fn start(filter: &str) -> Result<SetLevel, LogLevelError> {
    let builder = tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(parse(filter)?);
    let set: SetLevel = match std::io::stderr().is_terminal() {
        true => {
            let builder = builder.with_target(false).with_filter_reloading();
            let handle = builder.reload_handle();
            builder.init();
            Arc::new(move |wanted| change(wanted, |filter| handle.reload(filter)))
        }
        false => {
            let builder = builder.json().flatten_event(true).with_current_span(false).with_span_list(false);
            let builder = builder.with_filter_reloading();
            let handle = builder.reload_handle();
            builder.init();
            Arc::new(move |wanted| change(wanted, |filter| handle.reload(filter)))
        }
    };
    // A panic is an error like any other, and belongs into the log in one line.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let what = panic.payload_as_str().unwrap_or("no message");
        tracing::error!(event = "panic", place, what, "panic");
    }));
    Ok(set)
}

fn change(wanted: &str, reload: impl FnOnce(EnvFilter) -> Result<(), reload::Error>) -> Result<String, LogLevelError> {
    reload(parse(wanted)?).map_err(|error| LogLevelError::NotApplied { source: error.into() })?;
    Ok(wanted.to_owned())
}

/// tract reports every rewrite it makes; only its errors concern an operator.
fn parse(filter: &str) -> Result<EnvFilter, LogLevelError> {
    let quiet = format!("{filter},tract_core=error,tract_hir=error,tract_onnx=error,tract_linalg=error");
    EnvFilter::try_new(quiet)
        .map_err(|error| LogLevelError::InvalidFilter { filter: filter.to_owned(), source: error.into() })
}
