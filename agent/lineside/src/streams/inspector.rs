//! What an instance does with one frame: look at it, judge, and leave the result in the spool. It runs on the instance's
//! own thread and never waits for anything but the engine.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use lineside_api::prediction::Prediction;
use lineside_inference::pipeline::{Inspection, Pipeline};
use prometheus::IntCounter;

use crate::message_writer::MessageWriter;
use crate::streams::report_filter::ReportFilter;
use lineside_api::kinds::StreamManifest;
use lineside_api::message::{FrameInfo, Latency, ModelInfo, PredictionInfo, ResultMessage};
use lineside_api::verdict::Verdict;
use lineside_common::clock;
use lineside_common::metrics::Metrics;
use lineside_rules::{FrameFacts, Rule};
use lineside_scheduler::frames::Taken;
use lineside_spool::{AppendOutcome, RECORD_BYTES_MAX};

/// Good frames in a row after which a stream's last failure counts as over.
const GOOD_AGAIN_FRAMES: u32 = 30;

/// What was last logged of a stream's failures, so that a camera sending rubbish at full speed is not logged at full speed.
#[derive(Default)]
struct FailureLog {
    kind: Option<String>,
    good_frames: u32,
}

/// What an instance needs to know of a stream.
pub struct StreamContext {
    name: String,
    rule: Option<Rule>,
    age_max: Option<Duration>,
    processed: IntCounter,
    stale: IntCounter,
    failed: IntCounter,
    passed: IntCounter,
    rejected: IntCounter,
    unjudged: IntCounter,
    complaint: Mutex<FailureLog>,
    rule_fails: AtomicBool,
    reporting: Option<Mutex<ReportFilter>>,
    suppressed: IntCounter,
}

impl StreamContext {
    /// The context of a stream.
    pub fn new(manifest: &StreamManifest, metrics: &Metrics) -> Self {
        let frames = |outcome: &str| metrics.frames.with_label_values(&[manifest.name.as_str(), outcome]);
        let verdicts = |verdict: Verdict| metrics.verdicts.with_label_values(&[manifest.name.as_str(), verdict.name()]);
        Self {
            name: manifest.name.clone(),
            // It was checked when the manifest was read.
            rule: manifest.verdict.as_deref().and_then(|rule| Rule::compile(rule).ok()),
            age_max: manifest.age_max,
            processed: frames("processed"),
            stale: frames("stale"),
            failed: frames("failed"),
            passed: verdicts(Verdict::Pass),
            rejected: verdicts(Verdict::Reject),
            unjudged: verdicts(Verdict::None),
            complaint: Mutex::default(),
            rule_fails: AtomicBool::new(false),
            reporting: manifest.report.map(|report| Mutex::new(ReportFilter::new(report))),
            suppressed: metrics.results_suppressed.with_label_values(&[&manifest.name]),
        }
    }

    fn failed(&self, reason: &str, frame: Option<&str>, model: &ModelInfo) {
        self.failed.inc();
        self.complain(reason, frame, model);
    }

    /// Logs a failure, unless it is of the kind that was logged last. Numbers make no new kind: a truncated frame has
    /// another length every time.
    fn complain(&self, reason: &str, frame: Option<&str>, model: &ModelInfo) {
        let kind: String = reason.chars().filter(|character| !character.is_ascii_digit()).collect();
        let mut complaint = self.complaint.lock().unwrap_or_else(PoisonError::into_inner);
        complaint.good_frames = 0;
        if complaint.kind.as_ref() != Some(&kind) {
            let frame = frame.unwrap_or_default();
            tracing::warn!(
                event = "frame_failed",
                stream = self.name,
                model = model.name,
                frame,
                reason,
                "frame failed, going on"
            );
            complaint.kind = Some(kind);
        }
    }

    /// A good frame. After enough of them in a row the last failure counts as over.
    fn recovered(&self) {
        let mut complaint = self.complaint.lock().unwrap_or_else(PoisonError::into_inner);
        if complaint.kind.is_some() {
            complaint.good_frames += 1;
            if complaint.good_frames >= GOOD_AGAIN_FRAMES {
                *complaint = FailureLog::default();
                tracing::info!(stream = self.name, "frames are good again");
            }
        }
    }

    fn judge(&self, task: &str, inspection: &Inspection, name: Option<&str>) -> Verdict {
        let Some(rule) = &self.rule else { return Verdict::None };
        let subject = FrameFacts { width: inspection.width, height: inspection.height, name };
        match rule.evaluate(task, &inspection.prediction, subject) {
            Ok(verdict) => {
                self.rule_fails.store(false, Ordering::Relaxed);
                verdict
            }
            Err(error) => {
                if !self.rule_fails.swap(true, Ordering::Relaxed) {
                    tracing::warn!(stream = self.name, reason = %error, "spec.verdict failed; the verdict is none");
                }
                Verdict::None
            }
        }
    }

    /// Whether a result is said. What is not, is counted.
    fn should_report(&self, prediction: &Prediction, verdict: Verdict, model: &ModelInfo) -> bool {
        let Some(reporting) = &self.reporting else { return true };
        let mut reporting = reporting.lock().unwrap_or_else(PoisonError::into_inner);
        let is_worth_it = reporting.should_report(prediction, verdict, model.version, Instant::now());
        if !is_worth_it {
            self.suppressed.inc();
        }
        is_worth_it
    }

    fn count(&self, verdict: Verdict) {
        self.processed.inc();
        match verdict {
            Verdict::Pass => self.passed.inc(),
            Verdict::Reject => self.rejected.inc(),
            Verdict::None => self.unjudged.inc(),
        }
    }
}

/// What all instances share.
pub struct Inspector {
    message_writer: Arc<MessageWriter>,
    metrics: Metrics,
}

impl Inspector {
    /// An inspector that says its results here.
    pub fn new(message_writer: Arc<MessageWriter>, metrics: Metrics) -> Self {
        Self { message_writer, metrics }
    }

    /// Looks at one frame.
    pub fn inspect(&self, pipeline: &mut Pipeline, model: &ModelInfo, taken: &Taken<StreamContext>) {
        let (stream, frame) = (&*taken.stream, &taken.frame);
        let started = Instant::now();
        let queued = started.saturating_duration_since(frame.arrived);
        if frame.may_be_stale && stream.age_max.is_some_and(|age_max| queued > age_max) {
            stream.stale.inc();
            return;
        }
        let version = model.version.to_string();
        let requests = |outcome: &str| {
            self.metrics.inference_requests.with_label_values(&[model.name.as_str(), &version, outcome]).inc();
        };
        // Decoders and engines are other people's code, met here with whatever a camera sends. A panic in there costs the
        // frame, not the instance.
        let looked = catch_unwind(AssertUnwindSafe(|| pipeline.run(&frame.encoded)))
            .map_err(|_| "looking at the frame panicked; the log holds the place".to_owned())
            .and_then(|inspection| inspection.map_err(|error| error.to_string()));
        let inspection = match looked {
            Ok(inspection) => inspection,
            Err(reason) => {
                requests("error");
                return stream.failed(&reason, frame.name.as_deref(), model);
            }
        };
        requests("ok");
        stream.recovered();
        let timings = inspection.timings;
        for (phase, duration) in [
            ("queue", queued),
            ("decode", timings.decode),
            ("preprocess", timings.preprocess),
            ("infer", timings.infer),
            ("postprocess", timings.postprocess),
        ] {
            let histogram = self.metrics.inference_duration.with_label_values(&[model.name.as_str(), &version, phase]);
            histogram.observe(duration.as_secs_f64());
        }
        let task = pipeline.output().task.task();
        let verdict = stream.judge(task.name(), &inspection, frame.name.as_deref());
        let now = SystemTime::now();
        stream.count(verdict);
        if !stream.should_report(&inspection.prediction, verdict, model) {
            return;
        }
        let body = ResultMessage {
            ts: clock::rfc3339(now),
            site: self.message_writer.site(),
            node: self.message_writer.node(),
            stream: &stream.name,
            model,
            task,
            frame: FrameInfo::new(frame.name.clone(), inspection.width, inspection.height, frame.captured_at),
            latency_ms: Latency::new(queued, timings, frame.arrived.elapsed()),
            prediction: PredictionInfo::from(inspection.prediction),
            verdict,
            clock_synced: clock::is_plausible(now),
            historical: false,
        };
        // What gave way for room was counted by the spool.
        if self.message_writer.result(&body) == AppendOutcome::TooLarge {
            let reason = format!("the result is larger than {RECORD_BYTES_MAX} bytes and cannot be sent");
            stream.complain(&reason, frame.name.as_deref(), model);
        }
    }
}
