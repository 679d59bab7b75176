//! Admission: tests a model on this node before it may serve.
//!
//! A [child process](child) with limits on memory, processor time and wall time receives the verified bytes of the
//! model. It checks the file, loads and optimizes it, runs it on several images, compares the golden samples, and
//! measures. The result is kept in the store as an [`AdmissionRecord`] under the admission key, which covers everything
//! the result depends on, so that the next start does not repeat the admission:
//!
//! ```text
//! key = SHA-256 of { model digest, spec of the manifest, golden samples, engine, agent version, processor }
//! ```
//!
//! The optimized graph is not kept. Measured with tract 0.23.9 on EfficientNet-Lite0: loading from ONNX takes about 75
//! ms, from the NNEF form of tract about 54 ms; that does not justify a second copy of the weights on flash, and NNEF
//! cannot express every operator of ONNX. Skipping the admission is what makes a start fast.

mod child;
mod golden;
mod protocol;
mod report;

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use lineside_api::kinds::ModelManifest;
use lineside_api::spec::ModelSpec;
use lineside_common::child_process::{self, ChildOutput, ChildPriority, ProcessLimits};
use lineside_common::digest::Digest;
use lineside_common::files::read_bounded;

use crate::store::{DigestRecord, DigestRecordKind};

pub use child::{AdmissionChildError, main as child_main};
use protocol::{Answer, GoldenSample, Request, Response, TestImage};
pub use report::{AdmissionReport, GraphReport, ImageReport, PipelineReport, TensorReport};

/// The hidden subcommand of the child process.
pub const SUBCOMMAND: &str = "admission-child";
/// Upper bound of the image and of the expected output of one golden sample.
const GOLDEN_BYTES_MAX: u64 = 32 << 20;
/// The part of the stderr of a child that is included in an error message.
const STDERR_CHARACTERS_MAX: usize = 300;

/// The limits of an admission process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdmissionLimits {
    /// Memory that it may allocate, in bytes.
    pub memory_bytes: u64,
    /// Processor time and wall time in seconds.
    pub seconds: u64,
    /// Largest result message in bytes.
    pub result_bytes: u64,
}

impl AdmissionLimits {
    fn of_process(self) -> ProcessLimits {
        ProcessLimits {
            memory_bytes: self.memory_bytes,
            cpu_seconds: Some(self.seconds),
            priority: ChildPriority::Background,
        }
    }
}

/// The measurements of an admission.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Benchmark {
    /// Median time of one inference, in milliseconds.
    pub p50_ms: f64,
    /// 99th percentile of the time of one inference, in milliseconds.
    pub p99_ms: f64,
    /// Time to load and optimize the model, in milliseconds.
    pub load_ms: f64,
    /// Peak resident memory of the child process, in bytes.
    pub peak_memory_bytes: u64,
    /// Number of measured inferences.
    pub runs: u32,
}

/// The record of a model that was admitted. Kept in the store under the admission key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdmissionRecord {
    /// Digest of the model file.
    pub digest: Digest,
    /// The engine the model was admitted with.
    pub engine: String,
    /// The measurements. `figures` is the name on disk.
    #[serde(rename = "figures")]
    pub benchmark: Benchmark,
    /// When the model was admitted, RFC 3339.
    pub at: String,
}

impl DigestRecord for AdmissionRecord {
    const KIND: DigestRecordKind = DigestRecordKind::Admission;
}

/// Why a model was not admitted. The variant decides whether the failure counts against the model file.
#[derive(Debug, thiserror::Error)]
pub enum Rejection {
    /// The manifest does not fit the model. The failure does not count against the model file, which may be valid.
    #[error("{0}")]
    Manifest(String),
    /// The model cannot serve on this node.
    #[error("{0}")]
    Model(String),
    /// The node has less memory free than the admission may use, and that is not enough. Another time it may be.
    #[error(
        "it needs more than the {free_mib} MiB of memory that are free for models on this node; unload another model, raise the \
         memory limit, or set spec.runtime.stopFirst: true where the version before it is in the way"
    )]
    NodeMemory {
        /// Free memory in MiB.
        free_mib: u64,
    },
    /// The admission could not be completed. There is no result.
    #[error("{message}")]
    Unavailable {
        /// What happened.
        message: String,
        /// The error of the system, if there is one.
        source: Option<io::Error>,
    },
}

impl Rejection {
    fn unavailable(message: &str) -> Self {
        Self::Unavailable { message: message.to_owned(), source: None }
    }

    fn not_started(source: io::Error) -> Self {
        Self::Unavailable { message: "the admission process cannot be run".to_owned(), source: Some(source) }
    }
}

/// The outcome of an admission.
pub struct Examination {
    /// The measurements of a model that is admitted, or why it is not.
    pub verdict: Result<Benchmark, Rejection>,
    /// What was found out besides.
    pub report: AdmissionReport,
}

/// An admission that is ready to run.
pub struct Admission {
    request: Request,
    key: Digest,
}

impl Admission {
    /// Reads the golden samples and computes the admission key.
    ///
    /// # Errors
    /// [`Rejection::Manifest`] when a golden sample cannot be read.
    pub fn new(manifest: &ModelManifest, digest: &Digest, limits: AdmissionLimits) -> Result<Self, Rejection> {
        let mut samples = Vec::new();
        for golden in &manifest.golden {
            let expected = String::from_utf8(read_golden(&golden.output)?).map_err(|_| {
                Rejection::Manifest(format!("golden sample {} is not UTF-8 text", golden.output.display()))
            })?;
            samples.push(GoldenSample {
                name: golden.input.display().to_string(),
                image: golden::encode(&read_golden(&golden.input)?),
                expected,
                tolerance: golden.tolerance,
            });
        }
        Ok(Self::with_samples(&manifest.spec, digest, limits, samples))
    }

    /// An admission without golden samples.
    pub fn of_spec(spec: &ModelSpec, digest: &Digest, limits: AdmissionLimits) -> Self {
        Self::with_samples(spec, digest, limits, Vec::new())
    }

    fn with_samples(spec: &ModelSpec, digest: &Digest, limits: AdmissionLimits, samples: Vec<GoldenSample>) -> Self {
        let request = Request { spec: spec.clone(), limits, samples, image: None, reports_as_tensor: false };
        let key = admission_key(digest, &request, &processor());
        Self { request, key }
    }

    /// Measures a model that the manifest does not fit, because it states no task, with the task `tensor`.
    #[must_use]
    pub fn with_figures_as_tensor(mut self) -> Self {
        self.request.reports_as_tensor = true;
        self
    }

    /// Reports the answer to a picture, too. `name` is for messages.
    #[must_use]
    pub fn with_image(mut self, name: String, image: &[u8]) -> Self {
        self.request.image = Some(TestImage { name, image: golden::encode(image) });
        self
    }

    /// The admission key.
    pub fn key(&self) -> &Digest {
        &self.key
    }

    /// Runs the child process on the bytes of the model and waits for it. It may use `free_bytes` of memory at most, and no more
    /// than its limit. `is_cancelled` is polled in the meantime; the child is killed when it returns true.
    pub fn run(&self, model: &[u8], free_bytes: u64, is_cancelled: impl Fn() -> bool) -> Examination {
        match self.answer(model, free_bytes, is_cancelled) {
            Ok(Answer { response, report }) => {
                let verdict = match response {
                    Response::Admitted(benchmark) => Ok(benchmark),
                    Response::Manifest(reason) => Err(Rejection::Manifest(reason)),
                    Response::Model(reason) => Err(Rejection::Model(reason)),
                };
                Examination { verdict, report }
            }
            Err(rejection) => Examination { verdict: Err(rejection), report: AdmissionReport::default() },
        }
    }

    fn answer(&self, model: &[u8], free_bytes: u64, is_cancelled: impl Fn() -> bool) -> Result<Answer, Rejection> {
        let mut command = child_process::own_command(SUBCOMMAND);
        command.env_clear();
        let allowed = self.request.limits;
        let limits = AdmissionLimits { memory_bytes: allowed.memory_bytes.min(free_bytes), ..allowed };
        let request = Request { limits, ..self.request.clone() };
        let request = request.to_line().map_err(|error| Rejection::not_started(error.into()))?;
        let output =
            child_process::run(command, &[&request, model], Duration::from_secs(limits.seconds), &is_cancelled)
                .map_err(Rejection::not_started)?;
        match serde_json::from_slice(&output.stdout) {
            Ok(answer) => Ok(answer),
            Err(_) if is_cancelled() => Err(Rejection::unavailable("the admission was cancelled")),
            // A failed allocation aborts the process.
            Err(_) if limits != allowed && signal_of(&output) == Some(Signal::ABORT.as_raw()) => {
                Err(Rejection::NodeMemory { free_mib: limits.memory_bytes >> 20 })
            }
            Err(_) => Err(rejection_without_response(&output, limits)),
        }
    }
}

fn read_golden(path: &Path) -> Result<Vec<u8>, Rejection> {
    read_bounded(path, GOLDEN_BYTES_MAX)
        .map_err(|error| Rejection::Manifest(format!("golden sample {} cannot be read: {error}", path.display())))
}

/// The SHA-256 of everything the result of an admission depends on. The limits are not included: a model that was
/// admitted within other limits remains admitted. The JSON is part of the on-disk format, because records are found by
/// the key.
fn admission_key(digest: &Digest, request: &Request, processor: &str) -> Digest {
    let inputs = serde_json::json!({
        "model": digest,
        "spec": request.spec,
        "samples": request.samples,
        "engine": "tract",
        "agent": env!("CARGO_PKG_VERSION"),
        "processor": processor,
    });
    Digest::of(inputs.to_string().as_bytes())
}

fn signal_of(output: &ChildOutput) -> Option<i32> {
    output.status.and_then(|status| status.signal())
}

/// Why a child ended without a response.
fn rejection_without_response(output: &ChildOutput, limits: AdmissionLimits) -> Rejection {
    let signal = signal_of(output);
    // The child limits itself by other signals: SIGKILL comes from the system, or from an operator.
    if signal == Some(Signal::KILL.as_raw()) {
        return Rejection::unavailable("the admission process was killed, possibly because the node is out of memory");
    }
    let AdmissionLimits { memory_bytes, seconds, .. } = limits;
    // A failed allocation aborts the process, as other faults do; only the message of the standard library
    // distinguishes them. It selects the wording, not the outcome.
    if output.stderr.contains("memory allocation of") {
        let memory_mib = memory_bytes >> 20;
        return Rejection::Model(format!(
            "the model needs more than {memory_mib} MiB of memory (--admission-memory-mib)"
        ));
    }
    let Some(status) = output.status else {
        return Rejection::Model(format!("the model takes more than {seconds} s (--admission-seconds)"));
    };
    if signal == Some(Signal::XCPU.as_raw()) {
        let message = format!("the model takes more than {seconds} s of processor time (--admission-seconds)");
        return Rejection::Model(message);
    }
    let words: Vec<&str> = output.stderr.split_whitespace().collect();
    let stderr: String = words.join(" ").chars().take(STDERR_CHARACTERS_MAX).collect();
    let separator = if stderr.is_empty() { "" } else { ": " };
    Rejection::Model(format!("the admission process ended with {status}{separator}{stderr}"))
}

/// The fields of `/proc/cpuinfo` that distinguish processors on which a model may run differently.
fn processor() -> String {
    const FIELDS: [&str; 5] = ["model name", "flags", "Features", "CPU implementer", "CPU part"];
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let first_core = text.split("\n\n").next().unwrap_or_default();
    let is_relevant = |line: &&str| FIELDS.iter().any(|field| line.starts_with(field));
    first_core.lines().filter(is_relevant).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use std::process::ExitStatus;

    use super::*;

    const LIMITS: AdmissionLimits = AdmissionLimits { memory_bytes: 64 << 20, seconds: 7, result_bytes: 1 << 20 };

    fn request(expected: &str, limits: AdmissionLimits) -> Request {
        let sample =
            GoldenSample { name: "a.jpg".into(), image: String::new(), expected: expected.into(), tolerance: 0.1 };
        Request { spec: ModelSpec::default(), limits, samples: vec![sample], image: None, reports_as_tensor: false }
    }

    fn output(status: Option<i32>, stderr: &str) -> ChildOutput {
        ChildOutput { status: status.map(ExitStatus::from_raw), stdout: Vec::new(), stderr: stderr.into() }
    }

    #[test]
    fn the_key_covers_model_samples_and_processor_but_not_the_limits() {
        let key = admission_key(&Digest::of(b"a"), &request("{}", LIMITS), "x");
        let other_limits = AdmissionLimits { memory_bytes: 1, seconds: 1, result_bytes: 1 };
        assert_eq!(admission_key(&Digest::of(b"a"), &request("{}", other_limits), "x"), key);
        assert_ne!(admission_key(&Digest::of(b"b"), &request("{}", LIMITS), "x"), key);
        assert_ne!(admission_key(&Digest::of(b"a"), &request("[]", LIMITS), "x"), key);
        assert_ne!(admission_key(&Digest::of(b"a"), &request("{}", LIMITS), "y"), key);
    }

    #[test]
    fn a_child_without_a_response_is_explained() {
        let message = |status, stderr| match rejection_without_response(&output(status, stderr), LIMITS) {
            Rejection::Model(message) => message,
            other => panic!("{other:?}"),
        };
        assert!(message(None, "").contains("more than 7 s (--admission-seconds)"));
        assert!(message(Some(Signal::XCPU.as_raw()), "").contains("7 s of processor time"));
        let abort = Some(Signal::ABORT.as_raw());
        assert!(message(abort, "memory allocation of 9 bytes failed").contains("64 MiB of memory"));
        assert!(message(abort, "stack\noverflow").ends_with(": stack overflow"));
        let killed = rejection_without_response(&output(Some(Signal::KILL.as_raw()), ""), LIMITS);
        assert!(matches!(killed, Rejection::Unavailable { .. }));
    }

    /// The field names are those of the first build; a change of the type must not change them.
    #[test]
    fn records_of_an_earlier_build_are_read() {
        let digest = Digest::of(b"x");
        let text = format!(
            r#"{{"digest": "{digest}", "engine": "tract", "at": "2026-11-24T00:00:00Z",
                "figures": {{"p50_ms": 1.5, "p99_ms": 2.0, "load_ms": 75.0, "peak_memory_bytes": 9, "runs": 100}}}}"#
        );
        let benchmark = Benchmark { p50_ms: 1.5, p99_ms: 2.0, load_ms: 75.0, peak_memory_bytes: 9, runs: 100 };
        let expected = AdmissionRecord { digest, engine: "tract".into(), benchmark, at: "2026-11-24T00:00:00Z".into() };
        assert_eq!(serde_json::from_str::<AdmissionRecord>(&text).unwrap(), expected);
    }
}
