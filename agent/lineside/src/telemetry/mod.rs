//! The logs on stderr: plain text if stderr is a terminal, JSON lines otherwise. An operator command changes the filter at run
//! time.
//!
//! Entries of the levels `error`, `warn` and `info` are limited in rate by kind ([`rate_limit`]); `logs_suppressed` states how many
//! were left out. `debug` and `trace` are not limited, because they are enabled on purpose.

mod rate_limit;

use std::fmt;
use std::io::IsTerminal as _;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, fmt as format, reload};

use self::rate_limit::{INTERVAL, LogKind, LogRateLimit};
use lineside_mqtt::command::LogLevelError;
pub use lineside_mqtt::command::SetLevel;

/// The event code of the entry that counts those that were left out. It is not limited itself: there is at most one for each kind
/// and interval.
const SUMMARY_EVENT: &str = "logs_suppressed";

/// The logs of this process.
pub struct Telemetry {
    /// Changes the filter.
    pub set_level: SetLevel,
    limit: RateLimitLayer,
}

/// Installs the global log subscriber and a panic hook that logs panics.
///
/// # Errors
/// When the filter is invalid. The message names the error.
pub fn start(filter: &str) -> Result<Telemetry, LogLevelError> {
    let (filter, handle) = reload::Layer::new(parse_filter(filter)?);
    let writer = format::layer().with_writer(std::io::stderr);
    let writer = if std::io::stderr().is_terminal() {
        writer.with_target(false).boxed()
    } else {
        writer.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed()
    };
    let limit = RateLimitLayer::default();
    tracing_subscriber::registry().with(filter).with(limit.clone()).with(writer).init();
    // Panics are logged like other errors, as one entry.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let what = panic.payload_as_str().unwrap_or("no message");
        tracing::error!(event = "panic", place, what, "A thread panicked");
    }));
    let set_level: SetLevel = Arc::new(move |filter| {
        let new = parse_filter(filter)?;
        handle.reload(new).map_err(|error| LogLevelError::NotApplied { source: error.into() })?;
        Ok(filter.to_owned())
    });
    Ok(Telemetry { set_level, limit })
}

impl Telemetry {
    /// Starts a thread that logs at each interval how many entries were left out. It runs as long as the process.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn report_suppressed_periodically(&self) -> std::io::Result<()> {
        let limit = self.limit.clone();
        let report = move || {
            loop {
                std::thread::park_timeout(INTERVAL);
                limit.report_suppressed();
            }
        };
        std::thread::Builder::new().name("log-summary".to_owned()).spawn(report).map(drop)
    }
}

/// What was left out last is reported at the end of the process.
impl Drop for Telemetry {
    fn drop(&mut self) {
        self.limit.report_suppressed();
    }
}

/// Parses a filter. Of tract only errors are logged, because it logs each step of its graph optimization.
fn parse_filter(filter: &str) -> Result<EnvFilter, LogLevelError> {
    let directives = format!("{filter},tract_core=error,tract_hir=error,tract_onnx=error,tract_linalg=error");
    EnvFilter::try_new(directives)
        .map_err(|error| LogLevelError::InvalidFilter { filter: filter.to_owned(), source: error.into() })
}

/// Drops the entries that exceed the rate limit of their kind. Clones share the limit.
#[derive(Clone, Default)]
struct RateLimitLayer(Arc<Mutex<LogRateLimit>>);

impl RateLimitLayer {
    /// Logs how many entries of each kind were left out since the last call.
    fn report_suppressed(&self) {
        let suppressed = self.0.lock().take_suppressed();
        for (kind, count) in suppressed {
            let named = |name: &str| (!name.is_empty()).then(|| name.to_owned());
            tracing::warn!(
                event = SUMMARY_EVENT,
                of = kind.event,
                stream = named(&kind.stream),
                model = named(&kind.model),
                count,
                "Log entries were left out, because there were too many of one kind"
            );
        }
    }
}

impl<S: Subscriber> Layer<S> for RateLimitLayer {
    fn event_enabled(&self, event: &Event<'_>, _context: Context<'_, S>) -> bool {
        if *event.metadata().level() > Level::INFO {
            return true;
        }
        let mut kind = KindVisitor::default();
        event.record(&mut kind);
        let KindVisitor(mut kind) = kind;
        if kind.event == SUMMARY_EVENT {
            return true;
        }
        if kind.event.is_empty() {
            // An entry of a library: its file and line.
            event.metadata().name().clone_into(&mut kind.event);
        }
        self.0.lock().admit(kind, Instant::now())
    }
}

/// Reads the kind of an entry from its fields.
#[derive(Default)]
struct KindVisitor(LogKind);

impl KindVisitor {
    fn field(&mut self, field: &Field) -> Option<&mut String> {
        match field.name() {
            "event" => Some(&mut self.0.event),
            "stream" => Some(&mut self.0.stream),
            "model" => Some(&mut self.0.model),
            _ => None,
        }
    }
}

impl Visit for KindVisitor {
    fn record_str(&mut self, field: &Field, value: &str) {
        if let Some(text) = self.field(field) {
            value.clone_into(text);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if let Some(text) = self.field(field) {
            *text = format!("{value:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    /// The lines that a subscriber has written.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn entries_of_one_kind_are_limited_and_the_summary_states_their_number() {
        let (lines, limit) = (Lines::default(), RateLimitLayer::default());
        let writer = lines.clone();
        let subscriber = tracing_subscriber::registry()
            .with(EnvFilter::new("debug"))
            .with(limit.clone())
            .with(format::layer().json().flatten_event(true).with_writer(move || writer.clone()));
        tracing::subscriber::with_default(subscriber, || {
            for number in 0..500 {
                tracing::warn!(event = "command_refused", number, "refused");
                tracing::warn!(event = "frame_failed", stream = "cam1", "failed");
                tracing::debug!(event = "attempt", "not limited");
                tracing::error!("a library without event codes");
            }
            tracing::warn!(event = "frame_failed", stream = %"cam2", "failed");
            limit.report_suppressed();
            limit.report_suppressed();
        });
        let text = String::from_utf8(lines.0.lock().clone()).unwrap();
        let entries: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let of = |event: &str| entries.iter().filter(|entry| entry["event"] == event).count();
        assert_eq!((of("command_refused"), of("frame_failed"), of("attempt"), of(SUMMARY_EVENT)), (20, 21, 500, 3));
        let summary = |of: &str| entries.iter().find(|entry| entry["of"] == of).unwrap();
        assert_eq!(summary("command_refused")["count"], 480);
        assert_eq!(
            (&summary("frame_failed")["stream"], &summary("frame_failed")["count"]),
            (&"cam1".into(), &480.into())
        );
        let library = entries.iter().filter(|entry| entry["level"] == "ERROR").count();
        assert_eq!(library, 20);
    }
}
