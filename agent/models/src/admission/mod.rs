//! Admission: a model is proven on this node before it may serve.
//!
//! A child process ([`child`]) with limits on memory, processor time and wall time is given the verified bytes. It checks
//! the file, loads and optimises it, runs it on several pictures, compares the golden samples, and measures. What it says
//! is kept beside the model under a key of everything it depends on, so that the next start need not ask again:
//!
//! ```text
//! key = SHA-256 of { model digest, manifest's spec, golden samples, engine, agent version, processor }
//! ```
//!
//! No artifact of the optimised graph is kept. Measured with tract 0.23.9 on EfficientNet-Lite0: loading from ONNX takes
//! about 75 ms, from tract's own NNEF form about 54 ms; that does not pay for a second copy of the weights on flash, and
//! NNEF cannot express every operator that ONNX has. Skipping the admission is what makes a start fast.

mod child;
mod golden;

use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use lineside_api::spec::ModelSpec;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

pub use child::main as child_main;

use lineside_api::kinds::ModelManifest;
use lineside_common::child_process::{self as process, ChildOutput};
use lineside_common::digest::Digest;
use lineside_common::files::read_bounded;

/// The hidden subcommand of the child.
pub const SUBCOMMAND: &str = "admission-child";
/// Bytes of one golden sample's picture or answer at most.
const GOLDEN_BYTES_MAX: u64 = 32 << 20;
/// The part of what a child printed before it died that is shown.
const LAST_WORDS_CHARACTERS: usize = 300;

/// AdmissionLimits of a admission, as configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdmissionLimits {
    /// Bytes of address space.
    pub memory_bytes: u64,
    /// Seconds of processor time, and of wall time.
    pub seconds: u64,
}

impl AdmissionLimits {
    fn of_process(self) -> process::ProcessLimits {
        process::ProcessLimits {
            memory_bytes: self.memory_bytes,
            cpu_seconds: Some(self.seconds),
            priority: process::ChildPriority::Background,
        }
    }
}

/// What admission measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Benchmark {
    /// Median time of one inference, in milliseconds.
    pub p50_ms: f64,
    /// 99th percentile of one inference, in milliseconds.
    pub p99_ms: f64,
    /// Time to load and optimise, in milliseconds.
    pub load_ms: f64,
    /// Most memory the child had resident, in bytes.
    pub peak_memory_bytes: u64,
    /// Timed runs.
    pub runs: u32,
}

/// A model that was found fit, as it is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdmissionRecord {
    /// The model's file.
    pub digest: Digest,
    /// The engine it was vetted with.
    pub engine: String,
    /// What was measured.
    pub benchmark: Benchmark,
    /// When, RFC 3339.
    pub at: String,
}

/// Why a model was not found fit.
#[derive(Debug, Clone, PartialEq)]
pub enum Rejection {
    /// The manifest and the model do not fit each other. The model may be sound; it does not count against it.
    Manifest(String),
    /// The model is no good on this node.
    Model(String),
    /// The child could not be run at all, or was told to stop; nothing is known.
    Unknown(String),
}

/// A golden sample with its files' content.
#[derive(Serialize, Deserialize)]
struct Sample {
    name: String,
    /// In base64.
    picture: String,
    answer: String,
    tolerance: f32,
}

/// What the child is asked: one line of JSON on stdin, followed by the model's bytes.
#[derive(Serialize, Deserialize)]
struct Request {
    spec: ModelSpec,
    limits: AdmissionLimits,
    samples: Vec<Sample>,
}

/// What the child answers on stdout.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Fit(Benchmark),
    Manifest(String),
    Model(String),
}

/// A admission that is ready to be run.
pub struct Admission {
    request: Request,
    key: Digest,
}

impl Admission {
    /// Reads the golden samples and works out the key.
    ///
    /// # Errors
    /// [`Rejection::Manifest`] for a golden sample that cannot be read.
    pub fn new(manifest: &ModelManifest, digest: &Digest, limits: AdmissionLimits) -> Result<Self, Rejection> {
        let mut samples = Vec::new();
        for golden in &manifest.golden {
            let read = |path: &PathBuf| {
                read_bounded(path, GOLDEN_BYTES_MAX)
                    .map_err(|error| Rejection::Manifest(format!("golden sample {}: {error}", path.display())))
            };
            let answer = String::from_utf8(read(&golden.output)?)
                .map_err(|_| Rejection::Manifest(format!("golden sample {} is no text", golden.output.display())))?;
            samples.push(Sample {
                name: golden.input.display().to_string(),
                picture: golden::encoded(&read(&golden.input)?),
                answer,
                tolerance: golden.tolerance,
            });
        }
        let request = Request { spec: manifest.spec.clone(), limits, samples };
        // AdmissionLimits take no part: a model that was found fit within others is still fit.
        let depends_on = serde_json::json!({
            "model": digest,
            "spec": request.spec,
            "samples": request.samples,
            "engine": "tract",
            "agent": env!("CARGO_PKG_VERSION"),
            "processor": processor(),
        });
        Ok(Self { request, key: Digest::of(depends_on.to_string().as_bytes()) })
    }

    /// What the verdict is kept under.
    pub fn key(&self) -> &Digest {
        &self.key
    }

    /// Runs the child on a model's bytes and waits for it. `cancelled` is asked meanwhile.
    ///
    /// # Errors
    /// Why the model is not fit, or why nobody knows.
    pub fn run(&self, model: &[u8], cancelled: impl Fn() -> bool) -> Result<Benchmark, Rejection> {
        let unknown = |error: String| Rejection::Unknown(format!("admission cannot be run: {error}"));
        let program = std::env::current_exe().map_err(|error| unknown(error.to_string()))?;
        let mut command = Command::new(program);
        command.arg(SUBCOMMAND).env_clear();
        let mut request = serde_json::to_vec(&self.request).map_err(|error| unknown(error.to_string()))?;
        request.push(b'\n');
        let limits = self.request.limits;
        let ended = process::run(command, &[&request, model], Duration::from_secs(limits.seconds), &cancelled)
            .map_err(|error| unknown(error.to_string()))?;
        if let Ok(answer) = serde_json::from_slice::<Answer>(&ended.stdout) {
            return match answer {
                Answer::Fit(benchmark) => Ok(benchmark),
                Answer::Manifest(reason) => Err(Rejection::Manifest(reason)),
                Answer::Model(reason) => Err(Rejection::Model(reason)),
            };
        }
        if cancelled() {
            return Err(Rejection::Unknown("admission was stopped".to_owned()));
        }
        // The child limits itself in other ways; this is the system, which was short of memory, or somebody else.
        if ended.status.is_some_and(|status| status.signal() == Some(Signal::KILL.as_raw())) {
            return Err(Rejection::Unknown(
                "admission was killed, perhaps because the node has too little memory".to_owned(),
            ));
        }
        Err(Rejection::Model(last_words(&ended, limits)))
    }
}

/// Why a child that gave no answer died.
fn last_words(ended: &ChildOutput, limits: AdmissionLimits) -> String {
    let memory_mib = limits.memory_bytes >> 20;
    if ended.stderr.contains("memory allocation of") {
        return format!("admission it takes more than {memory_mib} MiB of memory (--admission-memory-mib)");
    }
    let Some(status) = ended.status else {
        return format!("admission it takes more than {} s (--admission-seconds)", limits.seconds);
    };
    if status.signal() == Some(Signal::XCPU.as_raw()) {
        return format!("admission it takes more than {} s of processor time (--admission-seconds)", limits.seconds);
    }
    let words: Vec<&str> = ended.stderr.split_whitespace().collect();
    let words: String = words.join(" ").chars().take(LAST_WORDS_CHARACTERS).collect();
    format!("admission it ended with {status}{}{words}", if words.is_empty() { "" } else { ": " })
}

/// What tells processors apart on which a model may run differently.
fn processor() -> String {
    const TELLING: [&str; 5] = ["model name", "flags", "Features", "CPU implementer", "CPU part"];
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let first = text.split("\n\n").next().unwrap_or_default();
    let telling = |line: &&str| TELLING.iter().any(|key| line.starts_with(key));
    first.lines().filter(telling).collect::<Vec<_>>().join("\n")
}
