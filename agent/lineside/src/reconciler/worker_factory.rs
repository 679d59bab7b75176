//! How an admitted version is served: its worker, its batching and limits, and what happens when it makes its worker end.
//!
//! Three ends or hangs of its worker within an hour that the model itself caused put the file into quarantine. They are counted
//! in the store, so a restart of the agent does not forget them.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lineside_api::kinds::ModelManifest;
use lineside_api::message::ModelInfo;
use lineside_api::spec::Isolation;
use lineside_common::child_process::{ChildPriority, ProcessLimits};
use lineside_common::digest::Digest;
use lineside_common::error_chain;
use lineside_inference::pipeline::{Pipeline, engine_for};
use lineside_inference::{Error, ErrorKind};
use lineside_models::admission::Benchmark;
use lineside_models::store::{FailureRecord, Store};
use lineside_scheduler::{BatchPolicy, FaultRecorder, VersionSpec, WorkerFactory};
use lineside_worker::{EventSink, InProcessWorker, ProcessOptions, ProcessWorker, StartError, Worker};

use super::memory_budget::Reservation;

/// Faults of one digest within [`FAULT_PERIOD`] after which it is quarantined.
const FAULTS_MAX: usize = 3;
/// How long a fault counts.
const FAULT_PERIOD: Duration = Duration::from_secs(3600);
/// Shortest execution limit of a batch. A worker that exceeds its limit is replaced.
const EXECUTION_LIMIT_MIN: Duration = Duration::from_secs(1);
/// Longest execution limit.
const EXECUTION_LIMIT_MAX: Duration = Duration::from_secs(86_400);
/// The execution limit as a multiple of the 99th percentile that admission measured.
const EXECUTION_LIMIT_P99: f64 = 10.0;
/// Memory that a worker may allocate beyond a multiple of what admission measured, in bytes. Pictures are decoded in it, so the
/// budget for decoding is added.
const WORKER_BYTES: u64 = 256 << 20;
/// The multiple.
const WORKER_PEAKS: u64 = 3;
/// Time to load a model that admission has loaded, as a multiple of what admission measured, and the least.
const LOAD_DEADLINE: (f64, Duration) = (20.0, Duration::from_secs(60));

/// An admitted version.
pub(super) struct Admitted<'a> {
    pub(super) manifest: &'a ModelManifest,
    pub(super) digest: Digest,
    /// The key under which it was admitted.
    pub(super) key: Digest,
    pub(super) benchmark: &'a Benchmark,
    /// The bytes of the file.
    pub(super) model: Vec<u8>,
    /// Bytes of pictures that may be decoded at once on this node.
    pub(super) decode_bytes: u64,
}

/// The version as the scheduler serves it. Its reservation is kept until its worker is gone.
pub(super) fn version_spec(admitted: Admitted<'_>, store: &Arc<Store>, reservation: Reservation) -> VersionSpec {
    let Admitted { manifest, digest, key, benchmark, model, decode_bytes } = admitted;
    let info = ModelInfo {
        name: manifest.name.clone(),
        version: manifest.version,
        digest: digest.to_string(),
        engine: String::new(),
        device: "cpu".to_owned(),
    };
    let runtime = &manifest.spec.runtime;
    let max_batch_size = runtime.max_batch_size.unwrap_or(1);
    let policy = BatchPolicy {
        max_batch_size: max_batch_size as usize,
        max_queue_delay: Duration::from_micros(u64::from(runtime.max_queue_delay_microseconds.unwrap_or(0))),
        execution_limit: execution_limit(benchmark, max_batch_size),
    };
    let worker = match runtime.isolation.unwrap_or_default() {
        Isolation::InProcess => in_process(manifest, model, reservation),
        Isolation::Auto | Isolation::Process => {
            let source = ModelSource::new(model, digest, store.clone());
            let memory_bytes = memory_wanted(manifest, benchmark, decode_bytes);
            process(process_options(manifest, benchmark, memory_bytes), source, reservation)
        }
    };
    VersionSpec { info, weight: 1, policy, worker, on_fault: fault_recorder(store.clone(), digest, key) }
}

fn execution_limit(benchmark: &Benchmark, max_batch_size: u32) -> Duration {
    let seconds = benchmark.p99_ms / 1e3 * EXECUTION_LIMIT_P99 * f64::from(max_batch_size);
    let measured = Duration::try_from_secs_f64(seconds).unwrap_or(EXECUTION_LIMIT_MAX);
    measured.clamp(EXECUTION_LIMIT_MIN, EXECUTION_LIMIT_MAX)
}

/// Where a worker gets the model: the bytes that were verified for the first one, and the store for those that replace it, so
/// that the agent does not keep a copy.
struct ModelSource {
    first: parking_lot::Mutex<Option<Vec<u8>>>,
    bytes: u64,
    digest: Digest,
    store: Arc<Store>,
}

impl ModelSource {
    fn new(model: Vec<u8>, digest: Digest, store: Arc<Store>) -> Self {
        Self { bytes: model.len() as u64, first: parking_lot::Mutex::new(Some(model)), digest, store }
    }

    fn read(&self) -> Result<Vec<u8>, StartError> {
        let first = self.first.lock().take();
        let read = || self.store.read_verified(&self.digest, self.bytes).map_err(std::io::Error::other);
        Ok(first.map_or_else(read, Ok)?)
    }
}

/// Memory that a worker may allocate on a node that has plenty, in bytes.
fn memory_wanted(manifest: &ModelManifest, benchmark: &Benchmark, decode_bytes: u64) -> u64 {
    let runtime = &manifest.spec.runtime;
    let instances = u64::from(runtime.instances.unwrap_or(1).max(1));
    let expected = benchmark.peak_memory_bytes.saturating_mul(WORKER_PEAKS * instances);
    let wanted = expected.saturating_add(WORKER_BYTES).saturating_add(decode_bytes);
    runtime.memory_mib.map_or(wanted, |mib| u64::from(mib) << 20)
}

fn process_options(manifest: &ModelManifest, benchmark: &Benchmark, memory_bytes: u64) -> ProcessOptions {
    let (factor, least) = LOAD_DEADLINE;
    let measured = Duration::try_from_secs_f64(benchmark.load_ms / 1e3 * factor).unwrap_or(least);
    ProcessOptions {
        model: manifest.name.clone(),
        spec: manifest.spec.clone(),
        limits: ProcessLimits { memory_bytes, cpu_seconds: None, priority: ChildPriority::Normal },
        load_deadline: measured.max(least),
    }
}

fn process(options: ProcessOptions, source: ModelSource, reservation: Reservation) -> WorkerFactory {
    Box::new(move |events: EventSink| {
        let model = source.read()?;
        let memory_bytes = reservation.limit_bytes(options.limits.memory_bytes);
        let limits = ProcessLimits { memory_bytes, ..options.limits };
        let worker = ProcessWorker::start(&ProcessOptions { limits, ..options.clone() }, &model, events)?;
        // The reservation lives as long as the version.
        reservation.set_process(worker.handle());
        Ok(Box::new(worker) as Box<dyn Worker>)
    })
}

fn in_process(manifest: &ModelManifest, model: Vec<u8>, reservation: Reservation) -> WorkerFactory {
    let (name, spec) = (manifest.name.clone(), manifest.spec.clone());
    let instances = spec.runtime.instances.unwrap_or(1).max(1);
    Box::new(move |events: EventSink| {
        let _reserved = &reservation;
        let first = engine_for(&spec).and_then(|engine| Pipeline::load(engine, &model, &spec)).map_err(load_error)?;
        let forks = (1..instances).map(|_| first.fork().map_err(load_error));
        let mut pipelines = forks.collect::<Result<Vec<Pipeline>, StartError>>()?;
        pipelines.push(first);
        Ok(Box::new(InProcessWorker::start(&name, pipelines, events)?) as Box<dyn Worker>)
    })
}

fn load_error(error: Error) -> StartError {
    match error.kind() {
        ErrorKind::BadSpec => StartError::Manifest(error.to_string()),
        _ => StartError::Model(error.to_string()),
    }
}

/// Counts the faults of a digest in the store.
fn fault_recorder(store: Arc<Store>, digest: Digest, key: Digest) -> FaultRecorder {
    Box::new(move |why| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let before: FailureRecord = store.read_digest_record(&digest).unwrap_or_default();
        let record = with_fault(before, key, why, now);
        if let Err(error) = store.write_digest_record(&digest, &record) {
            let error = error_chain(&error);
            tracing::error!(event = "failure_not_recorded", error, "A fault of a model cannot be recorded");
        }
        record.quarantined.then_some(record.reason)
    })
}

/// The record after one more fault, at a time in seconds since the epoch.
fn with_fault(mut record: FailureRecord, key: Digest, why: &str, now: u64) -> FailureRecord {
    // A time in the future comes from a clock that was set back; it counts as recent.
    record.faults.retain(|at| now.saturating_sub(*at) < FAULT_PERIOD.as_secs());
    record.faults.push(now);
    if record.faults.len() >= FAULTS_MAX {
        record.quarantined = true;
        record.failures = record.faults.len() as u32;
        record.key = Some(key);
        record.reason = format!("it ended its worker {} times within an hour: {why}", record.faults.len());
        record.at = lineside_common::clock::rfc3339(UNIX_EPOCH + Duration::from_secs(now));
        record.faults.clear();
    }
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    fn benchmark(p99_ms: f64) -> Benchmark {
        Benchmark { p50_ms: 1.0, p99_ms, load_ms: 1.0, peak_memory_bytes: 1, runs: 1 }
    }

    #[test]
    fn the_execution_limit_follows_the_measurement_within_bounds() {
        assert_eq!(execution_limit(&benchmark(5.0), 1), EXECUTION_LIMIT_MIN);
        assert_eq!(execution_limit(&benchmark(400.0), 1), Duration::from_secs(4));
        assert_eq!(execution_limit(&benchmark(400.0), 8), Duration::from_secs(32));
        assert_eq!(execution_limit(&benchmark(f64::INFINITY), 1), EXECUTION_LIMIT_MAX);
        assert_eq!(execution_limit(&benchmark(f64::NAN), 1), EXECUTION_LIMIT_MAX);
    }

    #[test]
    fn three_faults_within_an_hour_quarantine_a_file() {
        let key = Digest::of(b"key");
        let fault = |record, now| with_fault(record, key, "signal 11", now);
        let two = fault(fault(FailureRecord::default(), 1000), 1001);
        assert!(!two.quarantined);
        let three = fault(two.clone(), 4599);
        assert!(three.quarantined && three.key == Some(key) && three.reason.contains("3 times"), "{three:?}");
        assert!(!fault(two.clone(), 4601).quarantined, "the first one is too old");
        assert!(fault(two, 10).quarantined, "the clock was set back");
    }
}
