//! Camera sources, one file per kind, and the mailbox in which they leave their frames.
//!
//! A source runs until it is cancelled or reaches its end. It never gives up on a camera that may return: it reports once that
//! the stream is down, retries with a capped and jittered backoff, and reports when the stream is up again.

mod dir;
mod file;
mod http;
mod mailbox;
mod pictures;
mod policy;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prometheus::IntCounter;
use tokio::time::MissedTickBehavior;

use lineside_api::kinds::{StreamManifest, StreamSource};
use lineside_common::backoff::Backoff;
use lineside_ipc::frame::Frame;

pub use mailbox::{Mailbox, MailboxReceiver, TakenFrame, mailbox};
pub use pictures::{Found, PictureScanner, PictureTooLarge};
pub use policy::{CameraHostError, CameraHosts, InvalidCameraHost, SourcePolicy};

/// Largest encoded frame, in bytes.
const FRAME_BYTES_MAX: usize = 16 << 20;
/// First delay before a retry.
const RETRY_FIRST: Duration = Duration::from_millis(250);
/// Longest delay before a retry, so that frames are received again within seconds of the camera's return.
const RETRY_CAP: Duration = Duration::from_secs(4);

/// A source that ran for this long was healthy: its next retry is quick again.
const STEADY_AFTER: Duration = Duration::from_secs(5);
/// Failures in a row after which a stream that was up is down. A single failed request or cut picture is not a lost camera.
const FAILURES_MAX: u32 = 3;

/// Receives the state of a stream from its source.
pub trait StreamReporter: Send + Sync {
    /// Whether the stream is up.
    fn is_up(&self) -> bool;
    /// A frame was received. Returns `true` when the stream was down before.
    fn up(&self) -> bool;
    /// No frames are being received, for this reason; a stream that ends or is stopped has none.
    fn down(&self, reason: Option<&str>);
}

/// What a source reports to.
#[derive(Clone)]
pub struct SourceMetrics {
    /// The state of the stream.
    pub reporter: Arc<dyn StreamReporter>,
    /// Attempts to reconnect to the camera.
    pub reconnects: IntCounter,
    /// Frames that could not be read.
    pub failed: IntCounter,
}

/// Runs a stream's source: frames go to the mailbox. Returns at the end of a source that has one. A source that `policy` does not
/// allow is down, with the reason.
pub async fn play(stream: &StreamManifest, policy: &SourcePolicy, mailbox: &Mailbox, metrics: &SourceMetrics) {
    let health = Health { stream: stream.name.clone(), metrics: metrics.clone(), frames: AtomicU64::new(0) };
    let interval = stream.frame_interval;
    match &stream.source {
        StreamSource::Dir { folder, repeat } => {
            dir::FolderSource::new(folder, *repeat, policy, interval, &health).play(mailbox).await;
        }
        StreamSource::File(path) => file::play(path, policy, interval, mailbox, &health).await,
        StreamSource::Http(url) => http::play(url, policy, interval, mailbox, &health).await,
    }
    metrics.reporter.down(None);
}

/// Reports the state of a stream, and logs each change once.
struct Health {
    stream: String,
    metrics: SourceMetrics,
    /// Frames received so far.
    frames: AtomicU64,
}

impl Health {
    fn up(&self) {
        self.frames.fetch_add(1, Ordering::Relaxed);
        if self.metrics.reporter.up() {
            tracing::info!(event = "stream_up", stream = self.stream, "Stream is up");
        }
    }

    fn ended(&self) {
        tracing::info!(event = "stream_ended", stream = self.stream, "Stream has ended: all frames were read");
    }
}

/// Why a source delivers no frames.
#[derive(Debug, Clone, PartialEq, Eq)]
enum CameraError {
    /// The camera cannot be reached, closed the connection, or does not answer.
    Unreachable(String),
    /// The camera answers with something that is not usable.
    Rejected(String),
    /// The camera is busy and asks to wait for so long.
    Busy(String, Duration),
}

impl CameraError {
    /// Whether this should be logged after the other was. The exact reason why a camera cannot be reached differs from one
    /// attempt to the next, so two of these count as the same.
    fn differs_from(&self, other: &Self) -> bool {
        !matches!((self, other), (Self::Unreachable(_), Self::Unreachable(_))) && self != other
    }
}

/// Runs `attempt` until it ends without an error, with a backoff in between. A source that goes down is logged once, and again
/// only when it fails in another way.
async fn retry<F: Future<Output = Result<(), CameraError>>>(health: &Health, mut attempt: impl FnMut() -> F) {
    let mut backoff = Backoff::new(RETRY_FIRST, RETRY_CAP);
    let mut logged: Option<CameraError> = None;
    let mut failures = 0;
    loop {
        let (started, frames) = (Instant::now(), health.frames.load(Ordering::Relaxed));
        let Err(error) = attempt().await else { return };
        // A camera that delivers one frame and fails again gets no quick retry and no further log line.
        if health.metrics.reporter.is_up() && started.elapsed() >= STEADY_AFTER {
            backoff.reset();
            logged = None;
        }
        let has_delivered = health.frames.load(Ordering::Relaxed) > frames;
        failures = if has_delivered { 1 } else { failures + 1 };
        let mut delay = backoff.next_delay();
        if let CameraError::Busy(_, least) = &error {
            delay = delay.max(*least);
        }
        let (CameraError::Unreachable(reason) | CameraError::Rejected(reason) | CameraError::Busy(reason, _)) = &error;
        if health.metrics.reporter.is_up() && failures < FAILURES_MAX {
            tracing::debug!(stream = health.stream, reason, failures, "Request to the camera failed, retrying");
            tokio::time::sleep(delay).await;
            health.metrics.reconnects.inc();
            continue;
        }
        health.metrics.reporter.down(Some(reason));
        if logged.as_ref().is_none_or(|logged| error.differs_from(logged)) {
            tracing::warn!(event = "stream_down", stream = health.stream, reason, "Stream is down, retrying");
            logged = Some(error);
        } else {
            tracing::debug!(stream = health.stream, reason, attempts = backoff.attempts(), "Stream is still down");
        }
        tokio::time::sleep(delay).await;
        health.metrics.reconnects.inc();
    }
}

/// Paces frames to the interval of the stream.
struct Pace(Option<tokio::time::Interval>);

impl Pace {
    fn new(interval: Option<Duration>) -> Self {
        Self(interval.map(|period| {
            let mut ticks = tokio::time::interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
            ticks
        }))
    }

    /// Waits until the next frame is due; returns at once for a stream without an interval.
    async fn tick(&mut self) {
        if let Some(ticks) = &mut self.0 {
            ticks.tick().await;
        }
    }
}

/// A frame that was received now.
fn captured(encoded: Bytes, name: Option<String>, may_be_stale: bool) -> Frame {
    Frame::encoded(encoded, name, !may_be_stale)
}
