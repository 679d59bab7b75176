//! One node's folder: manifests, models, the agent's data and a broker, with short ways to what tests look at.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::agent::{Agent, Start, lineside};
use crate::broker::{Broker, Subscriber};
use crate::onnx::mean_colour_classifier;
use crate::wait::until_within;
use crate::{example, http, model_manifest, stream_manifest};

/// Long enough for what is tried several times with pauses in between.
const LATE: Duration = Duration::from_secs(180);
/// A broker that is never there.
const NO_BROKER: &str = "mqtt://127.0.0.1:1";

/// A folder with all that an agent needs. It outlives the agents that are started in it.
pub struct Plant {
    folder: TempDir,
    broker: Option<(Broker, Subscriber)>,
}

impl Plant {
    /// One without a broker.
    ///
    /// # Panics
    /// When the folder cannot be made.
    pub fn offline() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir(folder.path().join("manifests")).expect("the folder is ours");
        Self { folder, broker: None }
    }

    /// One with a broker and a subscriber to all results.
    pub fn online() -> Self {
        let broker = Broker::start();
        let subscriber = broker.subscribe("lineside/v1/plant/#");
        Self { broker: Some((broker, subscriber)), ..Self::offline() }
    }

    /// One with a broker, the bundled model `parts` and a stream `line-1` of the bundled frames at this rate.
    pub fn with_stream(fps: u32) -> Self {
        Self { broker: Self::online().broker, ..Self::playing(fps) }
    }

    /// The same without a broker.
    ///
    /// # Panics
    /// When the folder cannot be written.
    pub fn playing(fps: u32) -> Self {
        let plant = Self::offline();
        plant.put("parts.onnx", &fs::read(example("surface-defects.onnx")).expect("the example's model is committed"));
        plant.apply("model.yaml", &model_manifest("parts", 1, "file:../parts.onnx", ""));
        let frames = format!("dir://{}?loop=true", example("frames").display());
        plant.apply("stream.yaml", &stream_manifest("line-1", &frames, "parts", &format!("  fps: {fps}\n")));
        plant
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The agent's own folder.
    pub fn data(&self) -> PathBuf {
        self.path("data")
    }

    /// Writes a file into the folder, whole, and returns its digest.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn put(&self, name: &str, bytes: &[u8]) -> String {
        let beside = self.path(".beside");
        fs::write(&beside, bytes).expect("the folder is ours");
        fs::rename(&beside, self.path(name)).expect("the folder is ours");
        digest(bytes)
    }

    /// Writes a manifest file.
    pub fn apply(&self, file: &str, text: &str) {
        self.put(&format!("manifests/{file}"), text.as_bytes());
    }

    /// Removes a manifest file.
    ///
    /// # Panics
    /// When it is not there.
    pub fn withdraw(&self, file: &str) {
        fs::remove_file(self.path("manifests").join(file)).expect("it was applied");
    }

    /// The broker's address.
    ///
    /// # Panics
    /// When the plant has none.
    pub fn broker_url(&self) -> String {
        self.broker.as_ref().expect("this plant is online").0.url()
    }

    /// Starts an agent.
    pub fn start(&self, flags: &[&str]) -> Agent {
        let url = self.broker.as_ref().map(|(broker, _)| broker.url());
        self.start_at(url.as_deref().unwrap_or(NO_BROKER), flags)
    }

    /// Starts an agent with other brokers than the plant's.
    pub fn start_at(&self, mqtt: &str, flags: &[&str]) -> Agent {
        Agent::start(&Start { manifests: &self.path("manifests"), data: &self.data(), mqtt, flags })
    }

    /// Runs `lineside store` on the agent's folder.
    pub fn store(&self, arguments: &[&str]) -> Output {
        let data = self.data();
        lineside(&[&["store"], arguments, &["--data-dir", utf8(&data)]].concat())
    }

    /// Runs `lineside spool` on the agent's folder.
    pub fn spool(&self, arguments: &[&str]) -> Output {
        let data = self.data();
        lineside(&[&["spool"], arguments, &["--data-dir", utf8(&data)]].concat())
    }

    /// The same, for what must succeed; returns what it prints.
    ///
    /// # Panics
    /// When it fails.
    pub fn store_done(&self, arguments: &[&str]) -> String {
        let output = self.store(arguments);
        assert!(output.status.success(), "store {arguments:?}: {}", said(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Where the store keeps this digest.
    pub fn blob(&self, digest: &str) -> PathBuf {
        self.data().join("store/blobs/sha256").join(digest.trim_start_matches("sha256:"))
    }

    /// The files that the store shows as complete.
    ///
    /// # Panics
    /// When the folder cannot be read.
    pub fn blobs(&self) -> Vec<PathBuf> {
        let folder = self.blob("");
        match folder.exists() {
            true => fs::read_dir(folder).expect("it is there").map(|entry| entry.expect("an entry").path()).collect(),
            false => Vec::new(),
        }
    }

    /// Whatever the store shows as complete has the digest it is named by.
    ///
    /// # Panics
    /// When one has another.
    pub fn check_blobs(&self) {
        for path in self.blobs() {
            let found = digest(&fs::read(&path).expect("a blob is a file"));
            assert!(path.ends_with(found.trim_start_matches("sha256:")), "{} holds {found}", path.display());
        }
    }

    /// All results of `line-1` so far.
    ///
    /// # Panics
    /// When the plant has no broker.
    pub fn results(&self) -> Vec<Value> {
        self.broker.as_ref().expect("this plant is online").1.payloads("/line-1/result")
    }

    /// Waits until the results of `line-1` have grown by so many, and returns the new ones.
    pub fn more_results(&self, count: usize) -> Vec<Value> {
        let before = self.results().len();
        until_late("more results", || (self.results().len() >= before + count).then_some(()));
        self.results().split_off(before)
    }
}

/// Looks until there is something, for what takes several tries or much work.
///
/// # Panics
/// When a generous bound is over; `what` says what was waited for.
pub fn until_late<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    until_within(LATE, what, look)
}

/// `GET /v1/status`.
///
/// # Panics
/// When the agent does not answer with JSON.
pub fn status(agent: &Agent) -> Value {
    let (code, body) = http::get(agent.http(), "/v1/status").expect("the agent answers");
    assert_eq!(code, 200, "{body}");
    serde_json::from_str(&body).expect("the status is JSON")
}

/// A model in the status; null where it is not there.
pub fn model(agent: &Agent, name: &str) -> Value {
    let status = status(agent);
    let mut models = status["models"].as_array().into_iter().flatten();
    models.find(|model| model["name"] == name).cloned().unwrap_or_default()
}

/// Waits until this version serves, and returns the model's status.
pub fn serves(agent: &Agent, name: &str, version: u64) -> Value {
    until_late(&format!("{name} {version} to serve; {}", status(agent)), || {
        let model = model(agent, name);
        (model["serving"]["version"] == version).then_some(model)
    })
}

/// Waits until the version that is asked for stands there as failed or quarantined, and returns the reason.
///
/// # Panics
/// When no reason is given.
pub fn refusal(agent: &Agent, name: &str) -> String {
    let model = until_late(&format!("{name} to be refused; {}", status(agent)), || {
        let model = model(agent, name);
        (model["state"] == "Failed" || model["state"] == "Quarantined").then_some(model)
    });
    let reason = model["reason"].as_str().unwrap_or_default();
    assert!(!reason.is_empty(), "no reason in {model}");
    reason.to_owned()
}

/// Inspections and frames that failed, of all models and streams.
///
/// # Panics
/// When the metrics cannot be had.
pub fn failures(agent: &Agent) -> f64 {
    let (_, text) = http::get(agent.http(), "/metrics").expect("the agent answers");
    text.lines()
        .filter(|line| {
            line.starts_with("lineside_inference_requests_total{") && line.contains("outcome=\"error\"")
                || line.starts_with("lineside_frames_total{") && line.contains("outcome=\"failed\"")
        })
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// How many rounds an experiment has: few, or what its variable says for the long form.
///
/// # Panics
/// When the variable holds no number.
pub fn rounds(variable: &str, short: u64) -> u64 {
    std::env::var(variable).map_or(short, |text| text.parse().expect("the variable holds a number"))
}

/// Feeds bytes to a program of the machine and returns what it prints.
///
/// # Panics
/// When it is not installed or fails.
pub fn feed(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut command = Command::new(program);
    let mut child =
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it is installed");
    child.stdin.take().expect("stdin is piped").write_all(input).expect("it reads its input");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{program} {arguments:?} fails");
    output.stdout
}

/// The digest of these bytes as manifests write it, by another program than ours.
pub fn digest(bytes: &[u8]) -> String {
    let printed = feed("sha256sum", &[], bytes);
    format!("sha256:{}", String::from_utf8_lossy(&printed[..64]))
}

/// What a program printed, for messages.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// A path as text.
///
/// # Panics
/// When it is not UTF-8.
pub fn utf8(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}

/// An `EdgeModel` manifest whose source is this JSON; `more` is further YAML of its spec, two spaces deep.
pub fn sourced(name: &str, version: u64, source: &Value, more: &str) -> String {
    format!(
        "apiVersion: lineside.dev/v1alpha1\nkind: EdgeModel\nmetadata: {{name: {name}}}\nspec:\n  version: {version}\n  \
         source: {source}\n{more}"
    )
}

/// A good classifier of so many MiB; the tag makes it a file of its own.
pub fn heavy(mib: usize, tag: u64) -> Vec<u8> {
    let ballast: Vec<f32> = (0..mib << 18).map(|index| (index as u64 ^ tag) as f32).collect();
    mean_colour_classifier(32, 32, 3)
        .floats("ballast", &[ballast.len() as u64], &ballast)
        .metadata("tag", &tag.to_string())
        .build()
}

/// The same model under another digest: with a further entry in its metadata.
pub fn twin(model: &[u8], tag: u8) -> Vec<u8> {
    [model, &[0x72, 6, 0x0A, 1, b't', 0x12, 1, b'0' + tag % 10]].concat()
}

/// A classifier that loads and answers nothing but NaN.
pub fn not_a_number() -> Vec<u8> {
    use crate::onnx::{Attribute, Dim, FLOAT, Model};
    let size = [1, 3, 128, 128].map(Dim::Size);
    Model::new()
        .input("image", FLOAT, &size)
        .node("GlobalAveragePool", &["image"], &["pooled"], &[])
        .node("Flatten", &["pooled"], &["means"], &[Attribute::Int("axis", 1)])
        .floats("weights", &[3, 4], &[f32::NAN; 12])
        .node("MatMul", &["means", "weights"], &["logits"], &[])
        .output("logits", FLOAT, &[Dim::Size(1), Dim::Size(4)])
        .build()
}
