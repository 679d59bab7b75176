//! Everything that is counted, in one place. There is no global registry: whoever counts is handed this.
//!
//! Names follow the Prometheus conventions: prefix `lineside_`, base units, few labels. `docs/metrics.md` explains each.

use prometheus::core::Collector;
use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

const NAMESPACE: &str = "lineside";

/// Registers metrics under the prefix `lineside_`. Each crate registers the metrics of its own.
#[derive(Clone, Default)]
pub struct Registrar(Registry);

impl Registrar {
    /// Counters with labels.
    ///
    /// # Errors
    /// When the name is registered already.
    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
        registered(&self.0, IntCounterVec::new(Opts::new(name, help).namespace(NAMESPACE), labels)?)
    }

    /// A counter without labels.
    ///
    /// # Errors
    /// When the name is registered already.
    pub fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        registered(&self.0, IntCounter::with_opts(Opts::new(name, help).namespace(NAMESPACE))?)
    }

    /// Gauges with labels.
    ///
    /// # Errors
    /// When the name is registered already.
    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
        registered(&self.0, IntGaugeVec::new(Opts::new(name, help).namespace(NAMESPACE), labels)?)
    }

    /// A gauge without labels.
    ///
    /// # Errors
    /// When the name is registered already.
    pub fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        registered(&self.0, IntGauge::with_opts(Opts::new(name, help).namespace(NAMESPACE))?)
    }

    /// Histograms with labels and these upper bounds.
    ///
    /// # Errors
    /// When the name is registered already.
    pub fn histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> Result<HistogramVec, prometheus::Error> {
        let options = HistogramOpts::new(name, help).namespace(NAMESPACE).buckets(buckets.to_vec());
        registered(&self.0, HistogramVec::new(options, labels)?)
    }

    /// All metrics, as the `prometheus` crate describes them.
    pub fn gather(&self) -> Vec<prometheus::proto::MetricFamily> {
        self.0.gather()
    }

    /// All metrics in the Prometheus text format, version 0.0.4.
    ///
    /// # Errors
    /// When the encoder refuses, which it does not for metrics registered here.
    pub fn encode(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.0.gather())
    }
}

/// Upper bounds of the inference histogram, in seconds.
const DURATION_SECONDS: [f64; 14] =
    [0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0, 5.0];

/// What the agent counts.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    /// By model, version and outcome (`ok` or `error`).
    pub inference_requests: IntCounterVec,
    /// By model, version and phase (`queue`, `decode`, `preprocess`, `infer`, `postprocess`).
    pub inference_duration: HistogramVec,
    /// By stream and outcome (`processed`, `skipped`, `stale`, `failed`).
    pub frames: IntCounterVec,
    /// By stream: 1 while frames can be had.
    pub stream_up: IntGaugeVec,
    /// By stream.
    pub stream_reconnects: IntCounterVec,
    /// By stream and verdict.
    pub verdicts: IntCounterVec,
    /// By model, version and state: 1 for the state it is in.
    pub model_state: IntGaugeVec,
    /// By file: 1 while the manifest is refused.
    pub manifest_rejected: IntGaugeVec,
    /// Records waiting for the broker.
    pub spool_records: IntGauge,
    /// Bytes waiting for the broker.
    pub spool_bytes: IntGauge,
    /// Age of the oldest record that waits.
    pub spool_oldest_seconds: IntGauge,
    /// By reason.
    pub spool_dropped: IntCounterVec,
    /// Bytes written to the spool's files.
    pub spool_written_bytes: IntCounter,
    /// Times a file of the spool was synced.
    pub spool_syncs: IntCounter,
    /// 1 while the disk refuses what the spool writes.
    pub spool_degraded: IntGauge,
    /// Results that were not worth saying, by stream.
    pub results_suppressed: IntCounterVec,
    /// 1 while the broker is reached.
    pub mqtt_connected: IntGauge,
    /// Messages the broker has acknowledged.
    pub mqtt_published: IntCounter,
    /// Results the broker has acknowledged.
    pub mqtt_results: IntCounter,
    /// RecordId in the list of the broker that is reached, from 0.
    pub mqtt_broker_index: IntGauge,
    /// When our certificate for the broker ends, in seconds since 1970; 0 without one.
    pub mqtt_certificate_expiry: IntGauge,
    /// Messages received, by kind (`command`, `trigger`) and outcome.
    pub mqtt_received: IntCounterVec,
    /// Connections refused because there were too many.
    pub http_refused: IntCounter,
    /// Bytes the store takes.
    pub store_bytes: IntGauge,
    /// Bytes the store may take.
    pub store_quota_bytes: IntGauge,
    /// Blobs given up for others.
    pub store_evictions: IntCounter,
    /// Times the store's index was begun anew.
    pub store_index_rebuilt: IntCounter,
    /// By where it came from (`peer` or `source`).
    pub fetch_bytes: IntCounterVec,
    /// Fetches that failed.
    pub fetch_failures: IntCounter,
    /// Models that were vetted and failed.
    pub admission_failures: IntCounter,
    /// 1 while the cluster is heard.
    pub cluster_connected: IntGauge,
    /// Seconds since the cluster answered last.
    pub cluster_response_age: IntGauge,
    /// Times the cluster could not be listened to.
    pub cluster_watch_failures: IntCounter,
    /// By model and version: when its signature ends, in seconds since 1970.
    pub signature_expiry: IntGaugeVec,
}

impl Metrics {
    /// Metrics that start at zero.
    ///
    /// # Errors
    /// When two of them bear one name, which is a error in this file.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let options = |name: &str, help: &str| Opts::new(name, help).namespace(NAMESPACE);
        let counters = |name: &str, help: &str, labels: &[&str]| {
            registered(&registry, IntCounterVec::new(options(name, help), labels)?)
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            registered(&registry, IntGaugeVec::new(options(name, help), labels)?)
        };
        let counter = |name: &str, help: &str| registered(&registry, IntCounter::with_opts(options(name, help))?);
        let gauge = |name: &str, help: &str| registered(&registry, IntGauge::with_opts(options(name, help))?);
        let duration = HistogramOpts::new("inference_duration_seconds", "Time spent in each phase of an inspection.")
            .namespace(NAMESPACE)
            .buckets(DURATION_SECONDS.to_vec());
        let metrics = Self {
            inference_requests: counters(
                "inference_requests_total",
                "Inspections, by outcome.",
                &["model", "version", "outcome"],
            )?,
            inference_duration: registered(&registry, HistogramVec::new(duration, &["model", "version", "phase"])?)?,
            frames: counters("frames_total", "Frames that reached their stream, by outcome.", &["stream", "outcome"])?,
            stream_up: gauges("stream_up", "Whether frames can be had from the stream.", &["stream"])?,
            stream_reconnects: counters("stream_reconnects_total", "Attempts to reach a camera again.", &["stream"])?,
            verdicts: counters("verdicts_total", "Verdicts, by stream and kind.", &["stream", "verdict"])?,
            model_state: gauges(
                "model_state",
                "State of each model version: 1 for the one it is in.",
                &["model", "version", "state"],
            )?,
            manifest_rejected: gauges(
                "manifest_rejected",
                "Whether a manifest file is refused; its last good content stays in force.",
                &["file"],
            )?,
            spool_records: gauge("spool_records", "Records waiting to be acknowledged by the broker.")?,
            spool_bytes: gauge("spool_bytes", "Bytes waiting to be acknowledged by the broker.")?,
            spool_oldest_seconds: gauge("spool_oldest_seconds", "Age of the oldest record that waits.")?,
            spool_dropped: counters("spool_dropped_total", "Records given up, by reason.", &["reason"])?,
            spool_written_bytes: counter("spool_written_bytes_total", "Bytes written to the spool's files.")?,
            spool_syncs: counter("spool_syncs_total", "Times a file of the spool was synced.")?,
            spool_degraded: gauge("spool_degraded", "Whether the disk refuses what the spool writes.")?,
            results_suppressed: counters(
                "results_suppressed_total",
                "Results that report by exception did not find worth saying.",
                &["stream"],
            )?,
            mqtt_connected: gauge("mqtt_connected", "Whether the broker is reached.")?,
            mqtt_published: counter("mqtt_published_total", "Messages the broker has acknowledged.")?,
            mqtt_results: counter("mqtt_results_published_total", "Results the broker has acknowledged.")?,
            mqtt_broker_index: gauge(
                "mqtt_broker_index",
                "RecordId in the list of the broker that is reached, from 0.",
            )?,
            mqtt_certificate_expiry: gauge(
                "mqtt_certificate_expiry_timestamp_seconds",
                "When the certificate shown to the broker ends; 0 without one.",
            )?,
            mqtt_received: counters("mqtt_received_total", "Commands and triggers received.", &["kind", "outcome"])?,
            http_refused: counter("http_connections_refused_total", "Connections closed because there were too many.")?,
            store_bytes: gauge("store_bytes", "Bytes the store of models takes.")?,
            store_quota_bytes: gauge("store_quota_bytes", "Bytes the store of models may take.")?,
            store_evictions: counter("store_evictions_total", "Model files evicted from the store.")?,
            store_index_rebuilt: counter("store_index_rebuilt_total", "Times the store's index was begun anew.")?,
            fetch_bytes: counters("fetch_bytes_total", "Bytes of model files fetched.", &["from"])?,
            fetch_failures: counter("fetch_failures_total", "Fetches of model files that failed.")?,
            admission_failures: counter("admission_failures_total", "Models that were vetted and failed.")?,
            cluster_connected: gauge("cluster_connected", "Whether the cluster is heard.")?,
            cluster_response_age: gauge("cluster_last_response_age_seconds", "Time since the cluster answered last.")?,
            cluster_watch_failures: counter(
                "cluster_watch_failures_total",
                "Times the cluster could not be listened to.",
            )?,
            signature_expiry: gauges(
                "model_signature_expiry_timestamp_seconds",
                "When the signature of a serving model ends.",
                &["model", "version"],
            )?,
            registry: registry.clone(),
        };
        let build = registered(
            &registry,
            IntGaugeVec::new(options("build_info", "Always 1; the labels say what runs."), &["version"])?,
        )?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        for from in ["peer", "source"] {
            metrics.fetch_bytes.with_label_values(&[from]);
        }
        for reason in ["damaged", "disk", "expired", "full", "too_large"] {
            metrics.spool_dropped.with_label_values(&[reason]);
        }
        Ok(metrics)
    }

    /// All of them, as the `prometheus` crate describes them.
    pub fn gather(&self) -> Vec<prometheus::proto::MetricFamily> {
        self.registry.gather()
    }

    /// All of them in the Prometheus text format, version 0.0.4.
    ///
    /// # Errors
    /// When the encoder refuses, which it does not for metrics registered here.
    pub fn encode(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

fn registered<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> Result<C, prometheus::Error> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}
