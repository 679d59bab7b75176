//! The cameras: everything that gives frames, one file per kind of source.
//!
//! A source runs until it is cancelled or comes to its end. It never gives up on a camera that may come back: it reports
//! that the stream is down, once, waits with a capped and jittered backoff, and reports when it is up again.

mod dir;
mod file;
mod http;
mod multipart;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use prometheus::IntCounter;
use tokio::time::MissedTickBehavior;

use lineside_api::kinds::{StreamManifest, StreamSource};
use lineside_common::backoff::Backoff;
use lineside_scheduler::frames::{CapturedFrame, Mailbox};

/// Bytes of one encoded frame at most.
const FRAME_BYTES_MAX: usize = 16 << 20;
/// First wait before a camera is tried again.
const RETRY_FIRST: Duration = Duration::from_millis(250);
/// Longest wait, so that frames come back within seconds of a camera.
const RETRY_CAP: Duration = Duration::from_secs(4);

/// A source that lasted this long was in good health before it went down.
const STEADY_AFTER: Duration = Duration::from_secs(5);

/// Where it is said whether a stream is up.
pub trait StreamReporter: Send + Sync {
    /// Whether frames can be had.
    fn is_up(&self) -> bool;
    /// Frames can be had. `true` when that is news.
    fn up(&self) -> bool;
    /// No frames can be had.
    fn down(&self, reason: Option<&str>);
}

/// What is counted of a stream's source.
#[derive(Clone)]
pub struct SourceMetrics {
    /// Whether frames can be had.
    pub presence: Arc<dyn StreamReporter>,
    /// Attempts to reach the camera again.
    pub reconnects: IntCounter,
    /// Frames that could not be used.
    pub failed: IntCounter,
}

/// Plays a stream's source into its mailbox. Returns at the end of a source that has one.
pub async fn play<S>(stream: &StreamManifest, mailbox: &Mailbox<S>, metrics: &SourceMetrics) {
    let health = Health { stream: stream.name.clone(), metrics: metrics.clone() };
    let interval = stream.frame_interval;
    match &stream.source {
        StreamSource::Dir { folder, repeat } => dir::play(folder, *repeat, interval, mailbox, health).await,
        StreamSource::File(path) => file::play(path, interval, mailbox, health).await,
        StreamSource::Http(url) => http::play(url, interval, mailbox, health).await,
    }
    metrics.presence.down(None);
}

/// Says whether a stream is up, in the log once per change and in the metrics.
struct Health {
    stream: String,
    metrics: SourceMetrics,
}

impl Health {
    fn up(&self) {
        if self.metrics.presence.up() {
            tracing::info!(event = "stream_up", stream = self.stream, "stream is up");
        }
    }

    fn ended(&self) {
        tracing::info!(event = "stream_ended", stream = self.stream, "stream has ended: all its frames were played");
    }
}

/// Why a source gives no frames.
#[derive(Debug, Clone, PartialEq, Eq)]
enum CameraError {
    /// It is not there, went away, or does not answer.
    Gone(String),
    /// It is there, and what it gives cannot be used.
    Wrong(String),
}

impl CameraError {
    /// Whether this is news to somebody who was told the other. How exactly a camera is gone differs from one attempt to
    /// the next and is none.
    fn is_news_after(&self, other: &Self) -> bool {
        !matches!((self, other), (Self::Gone(_), Self::Gone(_))) && self != other
    }
}

/// Runs `attempt` again and again until it ends well, waiting in between. A source that goes down is logged once, and
/// again only when it is in trouble of another kind.
async fn persist<F: Future<Output = Result<(), CameraError>>>(health: &Health, mut attempt: impl FnMut() -> F) {
    let mut backoff = Backoff::new(RETRY_FIRST, RETRY_CAP);
    let mut told: Option<CameraError> = None;
    loop {
        let begun = Instant::now();
        let Err(trouble) = attempt().await else { return };
        // A camera that gives a frame and goes away again has not earned a quick next try, nor another line in the log.
        if health.metrics.presence.is_up() && begun.elapsed() >= STEADY_AFTER {
            backoff.reset();
            told = None;
        }
        let delay = backoff.next_delay();
        let (CameraError::Gone(reason) | CameraError::Wrong(reason)) = &trouble;
        health.metrics.presence.down(Some(reason));
        if told.as_ref().is_none_or(|told| trouble.is_news_after(told)) {
            tracing::warn!(event = "stream_down", stream = health.stream, reason, "stream is down, trying again");
            told = Some(trouble);
        } else {
            tracing::debug!(stream = health.stream, reason, attempts = backoff.attempts(), "stream is still down");
        }
        tokio::time::sleep(delay).await;
        health.metrics.reconnects.inc();
    }
}

/// Lets frames through at a stream's pace.
struct Pace(Option<tokio::time::Interval>);

impl Pace {
    fn new(interval: Option<Duration>) -> Self {
        Self(interval.map(|period| {
            let mut ticks = tokio::time::interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
            ticks
        }))
    }

    /// Waits for the next frame's time; at once where frames come as they come.
    async fn tick(&mut self) {
        if let Some(ticks) = &mut self.0 {
            ticks.tick().await;
        }
    }
}

/// A frame that came just now.
fn captured(encoded: Bytes, name: Option<String>, may_be_stale: bool) -> CapturedFrame {
    CapturedFrame { encoded, name, captured_at: SystemTime::now(), arrived: Instant::now(), may_be_stale }
}
