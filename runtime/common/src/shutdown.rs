//! Termination by signals. The first signal starts an orderly shutdown, the second one ends the process at once.
//!
//! This file has no unit tests: signals concern the whole process. The tests of the program send them.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit status after a second signal.
const ABORTED: i32 = 1;

/// Cancels `stop` on the first SIGTERM or SIGINT and ends the process on the second.
///
/// # Errors
/// When a signal handler cannot be installed.
pub fn on_signals(stop: CancellationToken) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        for received in 1.. {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if received > 1 {
                tracing::warn!(event = "shutdown_forced", signal = name, "Second signal, ending at once");
                std::process::exit(ABORTED);
            }
            tracing::info!(event = "shutdown_requested", signal = name, "Shutting down");
            stop.cancel();
        }
    });
    Ok(())
}
