//! Ending in order: the first signal asks, the second one ends.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit status of a process that was told twice.
const ABORTED: i32 = 1;

/// Cancels `stop` on the first SIGTERM or SIGINT and ends the process on the second.
///
/// # Errors
/// When the signals cannot be listened to.
pub fn on_signals(stop: CancellationToken) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        for told in 1.. {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if told > 1 {
                tracing::warn!(event = "shutdown_forced", signal = name, "told twice, ending at once");
                std::process::exit(ABORTED);
            }
            tracing::info!(event = "shutdown_requested", signal = name, "shutting down");
            stop.cancel();
        }
    });
    Ok(())
}
