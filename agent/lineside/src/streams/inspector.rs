//! From an answer of the model to the result message: rule, report filter, counters.
//!
//! It runs on the thread that delivers the outcome, in the order of the stream's frames, and waits for nothing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use lineside_api::kinds::StreamManifest;
use lineside_api::message::{FrameInfo, Latency, ModelInfo, PredictionInfo, ResultMessage};
use lineside_api::prediction::Inspection;
use lineside_api::verdict::{OnError, RuleOutcome, Verdict};
use lineside_common::clock;
use lineside_ipc::frame::Frame;
use lineside_scheduler::Answer;
use lineside_spool::{AppendOutcome, RECORD_BYTES_MAX};
use lineside_worker::WorkError;
use parking_lot::Mutex;

use super::metrics::StreamChildren;
use super::registry::StreamMonitor;
use super::report_filter::ReportFilter;
use crate::message_writer::MessageWriter;

/// Good frames in a row after which the last failure of a stream counts as over.
const RECOVERED_AFTER: u32 = 30;
/// Distinct reasons that are logged until frames are good again.
const REASONS_MAX: usize = 8;

/// Judges and reports the frames of one stream.
pub(super) struct Inspector {
    stream: String,
    model: String,
    rule: Option<Arc<str>>,
    on_error: OnError,
    age_max: Option<Duration>,
    metrics: StreamChildren,
    messages: Arc<MessageWriter>,
    monitor: Arc<StreamMonitor>,
    state: Mutex<State>,
}

/// What changes from frame to frame.
#[derive(Default)]
struct State {
    /// The reasons that were logged since frames were good last, so that a camera that sends garbage at full rate is not logged
    /// at full rate. At most [`REASONS_MAX`], because a reason may differ from frame to frame.
    logged: BTreeSet<String>,
    good_frames: u32,
    rule_fails: bool,
    filter: Option<ReportFilter>,
}

impl Inspector {
    /// The inspector of a stream.
    pub(super) fn new(
        manifest: &StreamManifest,
        metrics: StreamChildren,
        messages: Arc<MessageWriter>,
        monitor: Arc<StreamMonitor>,
    ) -> Self {
        Self {
            stream: manifest.name.clone(),
            model: manifest.model.clone(),
            rule: manifest.verdict.as_deref().map(Arc::from),
            on_error: manifest.on_error,
            age_max: manifest.age_max,
            metrics,
            messages,
            monitor,
            state: Mutex::new(State { filter: manifest.report.map(ReportFilter::new), ..State::default() }),
        }
    }

    /// Frames of a live source that are older than this are dropped.
    pub(super) fn age_max(&self) -> Option<Duration> {
        self.age_max
    }

    /// The verdict rule, which the worker evaluates.
    pub(super) fn rule(&self) -> Option<Arc<str>> {
        self.rule.clone()
    }

    /// Counts a frame that found no version or no room.
    pub(super) fn count_skipped(&self) {
        self.metrics.skipped.inc();
    }

    /// Counts a frame whose result could not be processed.
    pub(super) fn count_failed(&self) {
        self.metrics.failed.inc();
        self.monitor.on_failure("processing its result panicked");
    }

    /// Counts a frame that became too old.
    pub(super) fn count_expired(&self) {
        self.metrics.stale.inc();
    }

    /// Counts a frame that could not be inspected, and logs a new reason.
    pub(super) fn on_failure(&self, frame: &Frame, model: &ModelInfo, error: &WorkError) {
        self.metrics.failed.inc();
        self.monitor.on_failure(&error.to_string());
        self.log_failure(&error.to_string(), frame, &model.name);
    }

    /// Counts a frame that no model received, because its header is refused, and logs a new reason.
    pub(super) fn on_refusal(&self, frame: &Frame, reason: &str) {
        self.metrics.failed.inc();
        self.monitor.on_failure(reason);
        self.log_failure(reason, frame, &self.model);
    }

    /// Judges a prediction and writes the result.
    pub(super) fn on_answer(&self, frame: &Frame, answer: Answer) {
        let Answer { inspection, model, queued } = answer;
        self.monitor.on_result();
        let mut state = self.state.lock();
        self.note_good_frame(&mut state);
        let task = inspection.prediction.task();
        let verdict = self.verdict(&mut state, inspection.rule.as_ref());
        self.metrics.count(verdict);
        let is_reported = state
            .filter
            .as_mut()
            .is_none_or(|filter| filter.should_report(&inspection.prediction, verdict, model.version, Instant::now()));
        drop(state);
        if !is_reported {
            self.metrics.suppressed.inc();
            return;
        }
        let now = SystemTime::now();
        let Inspection { prediction, width, height, timings, .. } = inspection;
        let body = ResultMessage {
            ts: clock::rfc3339(now),
            site: self.messages.site(),
            node: self.messages.node(),
            stream: &self.stream,
            model: &model,
            task,
            frame: FrameInfo::new(frame.name.clone(), width, height, frame.captured_at),
            latency_ms: Latency::new(queued, timings, frame.arrived.elapsed()),
            prediction: PredictionInfo::from(prediction),
            verdict,
            clock_synced: clock::is_plausible(now),
            historical: false,
        };
        // Records that were dropped for room are counted by the spool.
        if self.messages.result(&body) == AppendOutcome::TooLarge {
            let reason = format!("the result is larger than {RECORD_BYTES_MAX} bytes and cannot be sent");
            self.log_failure(&reason, frame, &model.name);
        }
    }

    fn log_failure(&self, reason: &str, frame: &Frame, model: &str) {
        let mut state = self.state.lock();
        state.good_frames = 0;
        if state.logged.len() < REASONS_MAX && state.logged.insert(reason.to_owned()) {
            tracing::warn!(
                event = "frame_failed",
                stream = self.stream,
                model,
                frame = frame.name.as_deref().unwrap_or_default(),
                reason,
                "Frame failed"
            );
        }
    }

    fn note_good_frame(&self, state: &mut State) {
        if !state.logged.is_empty() {
            state.good_frames += 1;
            if state.good_frames >= RECOVERED_AFTER {
                state.logged.clear();
                state.good_frames = 0;
                tracing::info!(event = "frames_recovered", stream = self.stream, "Frames are good again");
            }
        }
    }

    /// The verdict of the rule. A rule that failed is logged once until it succeeds again.
    fn verdict(&self, state: &mut State, outcome: Option<&RuleOutcome>) -> Verdict {
        match outcome {
            None => Verdict::None,
            Some(RuleOutcome::Verdict(verdict)) => {
                if std::mem::replace(&mut state.rule_fails, false) {
                    tracing::info!(event = "rule_recovered", stream = self.stream, "The verdict rule succeeds again");
                    self.monitor.on_rule(None);
                }
                *verdict
            }
            Some(RuleOutcome::Failed(reason)) => {
                if !std::mem::replace(&mut state.rule_fails, true) {
                    tracing::warn!(
                        event = "rule_failed",
                        stream = self.stream,
                        verdict = self.on_error.verdict().name(),
                        reason,
                        "The verdict rule failed; the verdict is that of onError"
                    );
                    self.monitor.on_rule(Some(reason));
                }
                self.on_error.verdict()
            }
        }
    }
}
