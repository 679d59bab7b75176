//! Metrics of streams. The children of a stream are looked up once, when it starts.

use lineside_api::verdict::Verdict;
use lineside_common::metrics::Registrar;
use prometheus::{IntCounter, IntCounterVec, IntGaugeVec};

/// What is counted of all streams.
#[derive(Clone)]
pub struct StreamMetrics {
    frames: IntCounterVec,
    verdicts: IntCounterVec,
    reconnects: IntCounterVec,
    suppressed: IntCounterVec,
    /// By stream: 1 while frames are received.
    pub up: IntGaugeVec,
}

impl StreamMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// When a name is registered already.
    pub fn register(registrar: &Registrar) -> Result<Self, prometheus::Error> {
        Ok(Self {
            frames: registrar.counters(
                "frames_total",
                "Frames by outcome: processed, skipped, stale, failed.",
                &["stream", "outcome"],
            )?,
            verdicts: registrar.counters("verdicts_total", "Verdicts by kind.", &["stream", "verdict"])?,
            reconnects: registrar.counters(
                "stream_reconnects_total",
                "Attempts to reconnect to a camera.",
                &["stream"],
            )?,
            suppressed: registrar.counters(
                "results_suppressed_total",
                "Results that report by exception did not publish.",
                &["stream"],
            )?,
            up: registrar.gauges("stream_up", "Whether frames of the stream are received.", &["stream"])?,
        })
    }

    /// The children of one stream.
    pub(super) fn of_stream(&self, stream: &str) -> StreamChildren {
        let frames = |outcome: &str| self.frames.with_label_values(&[stream, outcome]);
        let verdicts = |verdict: Verdict| self.verdicts.with_label_values(&[stream, verdict.name()]);
        StreamChildren {
            processed: frames("processed"),
            skipped: frames("skipped"),
            stale: frames("stale"),
            failed: frames("failed"),
            passed: verdicts(Verdict::Pass),
            rejected: verdicts(Verdict::Reject),
            unjudged: verdicts(Verdict::None),
            reconnects: self.reconnects.with_label_values(&[stream]),
            suppressed: self.suppressed.with_label_values(&[stream]),
        }
    }
}

/// What is counted of one stream.
#[derive(Clone)]
pub(super) struct StreamChildren {
    processed: IntCounter,
    pub(super) skipped: IntCounter,
    pub(super) stale: IntCounter,
    pub(super) failed: IntCounter,
    passed: IntCounter,
    rejected: IntCounter,
    unjudged: IntCounter,
    pub(super) reconnects: IntCounter,
    pub(super) suppressed: IntCounter,
}

impl StreamChildren {
    /// Counts a frame that was inspected.
    pub(super) fn count(&self, verdict: Verdict) {
        self.processed.inc();
        match verdict {
            Verdict::Pass => self.passed.inc(),
            Verdict::Reject => self.rejected.inc(),
            Verdict::None => self.unjudged.inc(),
        }
    }
}
