//! The logs on stderr: plain text if stderr is a terminal, JSON lines otherwise. An operator command changes the filter at run
//! time.

use std::io::IsTerminal as _;
use std::sync::Arc;

use tracing_subscriber::{EnvFilter, reload};

use lineside_mqtt::command::LogLevelError;
pub use lineside_mqtt::command::SetLevel;

/// Installs the global log subscriber and a panic hook that logs panics. Returns a function that changes the filter.
///
/// # Errors
/// When the filter is invalid. The message names the error.
pub fn start(filter: &str) -> Result<SetLevel, LogLevelError> {
    let builder = tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(parse_filter(filter)?);
    let set_level: SetLevel = if std::io::stderr().is_terminal() {
        let builder = builder.with_target(false).with_filter_reloading();
        let handle = builder.reload_handle();
        builder.init();
        Arc::new(move |filter| change_filter(filter, |filter| handle.reload(filter)))
    } else {
        let builder = builder.json().flatten_event(true).with_current_span(false).with_span_list(false);
        let builder = builder.with_filter_reloading();
        let handle = builder.reload_handle();
        builder.init();
        Arc::new(move |filter| change_filter(filter, |filter| handle.reload(filter)))
    };
    // Panics are logged like other errors, as one entry.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let what = panic.payload_as_str().unwrap_or("no message");
        tracing::error!(event = "panic", place, what, "A thread panicked");
    }));
    Ok(set_level)
}

/// Applies a filter and returns it.
fn change_filter(
    filter: &str,
    reload: impl FnOnce(EnvFilter) -> Result<(), reload::Error>,
) -> Result<String, LogLevelError> {
    reload(parse_filter(filter)?).map_err(|error| LogLevelError::NotApplied { source: error.into() })?;
    Ok(filter.to_owned())
}

/// Parses a filter. Of tract only errors are logged, because it logs each step of its graph optimization.
fn parse_filter(filter: &str) -> Result<EnvFilter, LogLevelError> {
    let directives = format!("{filter},tract_core=error,tract_hir=error,tract_onnx=error,tract_linalg=error");
    EnvFilter::try_new(directives)
        .map_err(|error| LogLevelError::InvalidFilter { filter: filter.to_owned(), source: error.into() })
}
