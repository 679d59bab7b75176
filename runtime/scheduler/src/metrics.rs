//! Metrics of the scheduler. The children of a model and of a version are looked up once and kept.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use lineside_api::message::ModelInfo;
use lineside_api::prediction::Timings;
use lineside_common::metrics::Registrar;
use parking_lot::Mutex;
use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use crate::job::JobOutcome;

/// Upper bounds of the duration histogram, in seconds.
const DURATION_SECONDS: [f64; 14] =
    [0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0, 5.0];
/// Upper bounds of the batch size histogram.
const BATCH_SIZES: [f64; 8] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0];

/// What is counted of all deployments.
#[derive(Clone)]
pub struct SchedulerMetrics {
    requests: IntCounterVec,
    duration: HistogramVec,
    queue_length: IntGaugeVec,
    batch_size: HistogramVec,
    rejected: IntCounterVec,
    replaced: IntCounterVec,
}

impl SchedulerMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// When a name is registered already.
    pub fn register(registrar: &Registrar) -> Result<Self, prometheus::Error> {
        Ok(Self {
            requests: registrar.counters(
                "inference_requests_total",
                "Jobs by outcome: ok, error, expired, cancelled.",
                &["model", "version", "outcome"],
            )?,
            duration: registrar.histograms(
                "inference_duration_seconds",
                "Time spent in each phase of an inference.",
                &["model", "version", "phase"],
                &DURATION_SECONDS,
            )?,
            queue_length: registrar.gauges("inference_queue_length", "Jobs that wait for a worker.", &["model"])?,
            batch_size: registrar.histograms(
                "inference_batch_size",
                "Jobs in each batch.",
                &["model"],
                &BATCH_SIZES,
            )?,
            rejected: registrar.counters(
                "inference_rejected_total",
                "Jobs that were refused or dropped because the queue was full.",
                &["model"],
            )?,
            replaced: registrar.counters(
                "worker_replacements_total",
                "Workers that were replaced because they hung or ended.",
                &["model", "version"],
            )?,
        })
    }

    /// The children of one model.
    pub(crate) fn of_model(&self, model: &str) -> DeploymentMetrics {
        DeploymentMetrics {
            queue_length: self.queue_length.with_label_values(&[model]),
            batch_size: self.batch_size.with_label_values(&[model]),
            rejected: self.rejected.with_label_values(&[model]),
            versions: Mutex::default(),
            all: self.clone(),
        }
    }
}

/// The metrics of one deployment.
pub(crate) struct DeploymentMetrics {
    queue_length: IntGauge,
    pub(crate) batch_size: Histogram,
    pub(crate) rejected: IntCounter,
    versions: Mutex<HashMap<u64, Arc<VersionMetrics>>>,
    all: SchedulerMetrics,
}

struct VersionMetrics {
    answered: IntCounter,
    failed: IntCounter,
    queue: Histogram,
    decode: Histogram,
    preprocess: Histogram,
    infer: Histogram,
    postprocess: Histogram,
}

impl DeploymentMetrics {
    /// Counts an outcome. Jobs that expired or were cancelled produced no result and are counted by version `none`.
    pub(crate) fn count(&self, model: &str, outcome: &JobOutcome) {
        match outcome {
            JobOutcome::Answered(answer) => {
                let metrics = self.version(&answer.model);
                metrics.answered.inc();
                metrics.observe(answer.queued, &answer.inspection.timings);
            }
            JobOutcome::Failed(info, _) => self.version(info).failed.inc(),
            JobOutcome::Expired => self.all.requests.with_label_values(&[model, "none", "expired"]).inc(),
            JobOutcome::Cancelled => self.all.requests.with_label_values(&[model, "none", "cancelled"]).inc(),
        }
    }

    /// Shows how many jobs wait.
    pub(crate) fn set_waiting(&self, jobs: usize) {
        self.queue_length.set(i64::try_from(jobs).unwrap_or(i64::MAX));
    }

    /// Counts a replaced worker.
    pub(crate) fn count_replacement(&self, info: &ModelInfo) {
        self.all.replaced.with_label_values(&[info.name.as_str(), &info.version.to_string()]).inc();
    }

    fn version(&self, info: &ModelInfo) -> Arc<VersionMetrics> {
        let mut versions = self.versions.lock();
        let new = || {
            let version = info.version.to_string();
            let labels = |last: &'static str| [info.name.clone(), version.clone(), last.to_owned()];
            let requests = |outcome| self.all.requests.with_label_values(&labels(outcome));
            let duration = |phase| self.all.duration.with_label_values(&labels(phase));
            Arc::new(VersionMetrics {
                answered: requests("ok"),
                failed: requests("error"),
                queue: duration("queue"),
                decode: duration("decode"),
                preprocess: duration("preprocess"),
                infer: duration("infer"),
                postprocess: duration("postprocess"),
            })
        };
        versions.entry(info.version).or_insert_with(new).clone()
    }
}

impl VersionMetrics {
    fn observe(&self, queued: Duration, timings: &Timings) {
        for (histogram, duration) in [
            (&self.queue, queued),
            (&self.decode, timings.decode),
            (&self.preprocess, timings.preprocess),
            (&self.infer, timings.infer),
            (&self.postprocess, timings.postprocess),
        ] {
            histogram.observe(duration.as_secs_f64());
        }
    }
}
