//! A test site: a temporary folder with manifests, models and the agent's data, optionally with a broker, and functions that
//! read the state of an agent that runs in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;
use tempfile::TempDir;

use crate::agent::{Agent, AgentOptions, lineside};
use crate::broker::{Broker, Subscriber, UNREACHABLE_BROKER};
use crate::onnx::mean_colour_classifier;
use crate::process::{output_text, run_with_input};
use crate::wait::until_long;
use crate::{example, http, model_manifest, stream_manifest, utf8};

/// The random id of an agent's data folder.
///
/// # Panics
/// If the folder has no identity.
pub fn folder_id(data: &Path) -> String {
    let text = fs::read(data.join("identity.json")).expect("the agent has written its identity");
    let identity: Value = serde_json::from_slice(&text).expect("the identity is JSON");
    identity["folder"].as_str().expect("the folder id is a string").to_owned()
}

/// A folder with everything that an agent needs. It outlives the agents that run in it.
pub struct TestSite {
    folder: TempDir,
    broker: Option<(Broker, Subscriber)>,
}

impl TestSite {
    /// A site without a broker.
    ///
    /// # Panics
    /// If the folder cannot be created.
    pub fn offline() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir(folder.path().join("manifests")).expect("the folder is writable");
        Self { folder, broker: None }
    }

    /// A site with a broker and a subscriber to all results.
    pub fn with_broker() -> Self {
        let broker = Broker::start();
        let subscriber = broker.subscribe("lineside/v1/plant/#");
        Self { broker: Some((broker, subscriber)), ..Self::offline() }
    }

    /// A site with a broker, the bundled model `parts`, and a stream `line-1` that loops over the bundled frames at `fps`
    /// frames per second (0: as fast as the model).
    pub fn with_broker_and_stream(fps: u32) -> Self {
        Self { broker: Self::with_broker().broker, ..Self::with_stream(fps) }
    }

    /// Like [`TestSite::with_broker_and_stream`], without the broker.
    ///
    /// # Panics
    /// If the folder cannot be written.
    pub fn with_stream(fps: u32) -> Self {
        let site = Self::offline();
        site.write("parts.onnx", &fs::read(example("surface-defects.onnx")).expect("the example's model is committed"));
        site.apply("model.yaml", &model_manifest("parts", 1, "file:../parts.onnx", ""));
        let frames = format!("dir://{}?loop=true", example("frames").display());
        site.apply("stream.yaml", &stream_manifest("line-1", &frames, "parts", &format!("  fps: {fps}\n")));
        site
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The agent's data folder.
    pub fn data(&self) -> PathBuf {
        self.path("data")
    }

    /// Writes a file into the folder atomically, and returns its digest.
    ///
    /// # Panics
    /// If the file cannot be written.
    pub fn write(&self, name: &str, bytes: &[u8]) -> String {
        let partial = self.path(".partial");
        fs::write(&partial, bytes).expect("the folder is writable");
        fs::rename(&partial, self.path(name)).expect("the folder is writable");
        digest(bytes)
    }

    /// Writes a manifest file.
    pub fn apply(&self, file: &str, text: &str) {
        self.write(&format!("manifests/{file}"), text.as_bytes());
    }

    /// Removes a manifest file.
    ///
    /// # Panics
    /// If the file does not exist.
    pub fn delete(&self, file: &str) {
        fs::remove_file(self.path("manifests").join(file)).expect("the manifest exists");
    }

    /// The broker's URL.
    ///
    /// # Panics
    /// If the site has no broker.
    pub fn broker_url(&self) -> String {
        self.broker.as_ref().expect("the site has a broker").0.url()
    }

    /// Starts an agent that publishes to the site's broker, or to one that is unreachable if the site has none.
    pub fn start(&self, flags: &[&str]) -> Agent {
        let url = self.broker.as_ref().map(|(broker, _)| broker.url());
        self.start_with_broker(url.as_deref().unwrap_or(UNREACHABLE_BROKER), flags)
    }

    /// Starts an agent that publishes to other brokers than the site's.
    pub fn start_with_broker(&self, mqtt: &str, flags: &[&str]) -> Agent {
        Agent::start(&AgentOptions { manifests: &self.path("manifests"), data: &self.data(), mqtt, flags })
    }

    /// Runs `lineside store` on the agent's data folder.
    pub fn store(&self, arguments: &[&str]) -> Output {
        let data = self.data();
        lineside(&[&["store"], arguments, &["--data-dir", utf8(&data)]].concat())
    }

    /// Runs `lineside store`, which must succeed, and returns its standard output.
    ///
    /// # Panics
    /// If the command fails.
    pub fn store_ok(&self, arguments: &[&str]) -> String {
        let output = self.store(arguments);
        assert!(output.status.success(), "store {arguments:?}: {}", output_text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs `lineside spool` on the agent's data folder.
    pub fn spool(&self, arguments: &[&str]) -> Output {
        let data = self.data();
        lineside(&[&["spool"], arguments, &["--data-dir", utf8(&data)]].concat())
    }

    /// The path of a digest's blob in the store.
    pub fn blob_path(&self, digest: &str) -> PathBuf {
        self.data().join("store/blobs/sha256").join(digest.trim_start_matches("sha256:"))
    }

    /// The complete blobs of the store.
    ///
    /// # Panics
    /// If the folder cannot be read.
    pub fn blobs(&self) -> Vec<PathBuf> {
        let folder = self.blob_path("");
        if !folder.exists() {
            return Vec::new();
        }
        let entries = fs::read_dir(folder).expect("the folder is readable");
        entries.map(|entry| entry.expect("a folder entry").path()).collect()
    }

    /// Checks that every complete blob has the digest in its name.
    ///
    /// # Panics
    /// If a blob has another digest.
    pub fn verify_blobs(&self) {
        for path in self.blobs() {
            let found = digest(&fs::read(&path).expect("a blob is a file"));
            assert!(path.ends_with(found.trim_start_matches("sha256:")), "{} has digest {found}", path.display());
        }
    }

    /// All results of `line-1` so far.
    ///
    /// # Panics
    /// If the site has no broker.
    pub fn results(&self) -> Vec<Value> {
        self.broker.as_ref().expect("the site has a broker").1.payloads("/line-1/result")
    }

    /// Waits for at least `count` further results of `line-1`, and returns them.
    pub fn wait_for_new_results(&self, count: usize) -> Vec<Value> {
        let before = self.results().len();
        until_long("new results", || (self.results().len() >= before + count).then_some(()));
        self.results().split_off(before)
    }
}

/// `GET /v1/status`.
///
/// # Panics
/// If the agent does not respond with JSON.
pub fn status(agent: &Agent) -> Value {
    let (code, body) = http::get(agent.http(), "/v1/status").expect("the agent responds");
    assert_eq!(code, 200, "{body}");
    serde_json::from_str(&body).expect("the status is JSON")
}

/// A model of the status; null if it is not listed.
pub fn model_status(agent: &Agent, name: &str) -> Value {
    let status = status(agent);
    let mut models = status["models"].as_array().into_iter().flatten();
    models.find(|model| model["name"] == name).cloned().unwrap_or_default()
}

/// Waits until this version serves, and returns the model's status.
pub fn wait_until_serving(agent: &Agent, name: &str, version: u64) -> Value {
    until_long(&format!("{name} version {version} to serve; {}", status(agent)), || {
        let model = model_status(agent, name);
        (model["serving"]["version"] == version).then_some(model)
    })
}

/// Waits until the desired version is `Failed` or `Quarantined`, and returns the reason.
///
/// # Panics
/// If the status gives no reason.
pub fn wait_for_rejection(agent: &Agent, name: &str) -> String {
    let model = until_long(&format!("{name} to be rejected; {}", status(agent)), || {
        let model = model_status(agent, name);
        (model["state"] == "Failed" || model["state"] == "Quarantined").then_some(model)
    });
    let reason = model["reason"].as_str().unwrap_or_default();
    assert!(!reason.is_empty(), "no reason in {model}");
    reason.to_owned()
}

/// The number of failed inference requests and failed frames, of all models and streams.
///
/// # Panics
/// If the agent does not respond.
pub fn failed_inspections(agent: &Agent) -> f64 {
    let (_, text) = http::get(agent.http(), "/metrics").expect("the agent responds");
    text.lines()
        .filter(|line| {
            line.starts_with("lineside_inference_requests_total{") && line.contains("outcome=\"error\"")
                || line.starts_with("lineside_frames_total{") && line.contains("outcome=\"failed\"")
        })
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// The number of iterations of an experiment: the value of an environment variable, or `default` if it is not set.
///
/// # Panics
/// If the variable does not contain a number.
pub fn iterations(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("the variable contains a number"))
}

/// The digest of these bytes as manifests write it, computed by another program than the product.
pub fn digest(bytes: &[u8]) -> String {
    let printed = run_with_input("sha256sum", &[], bytes);
    format!("sha256:{}", String::from_utf8_lossy(&printed[..64]))
}

/// An `EdgeModel` manifest with this JSON as its source; `more` is further YAML of its spec, indented by two spaces.
pub fn manifest_with_source(name: &str, version: u64, source: &Value, more: &str) -> String {
    format!(
        "apiVersion: lineside.dev/v1alpha1\nkind: EdgeModel\nmetadata: {{name: {name}}}\nspec:\n  version: {version}\n  \
         source: {source}\n{more}"
    )
}

/// A valid classifier with a size of about `mib` MiB. Each tag gives another digest.
pub fn large_model(mib: usize, tag: u64) -> Vec<u8> {
    let ballast: Vec<f32> = (0..mib << 18).map(|index| (index as u64 ^ tag) as f32).collect();
    mean_colour_classifier(32, 32, 3)
        .floats("ballast", &[ballast.len() as u64], &ballast)
        .metadata("tag", &tag.to_string())
        .build()
}

/// The same model with another digest: an additional metadata entry (field 14 of `ModelProto`). There are ten tags, 0 to 9.
pub fn with_other_digest(model: &[u8], tag: u8) -> Vec<u8> {
    [model, &[0x72, 6, 0x0A, 1, b't', 0x12, 1, b'0' + tag % 10]].concat()
}

/// A classifier that loads and returns NaN for every input.
pub fn nan_model() -> Vec<u8> {
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
