//! The test kit: the agent as a process, real peers (mosquitto, Paho, docker-registry, moto, ffmpeg, Kubernetes), scripted
//! peers for faults that real ones do not produce on demand, and hand-written ONNX models.
//!
//! The kit uses no crate of the product, only the built program, so the product is never checked against itself. Nothing
//! here waits for a fixed time: every wait has a condition and a limit (`wait`). Every child process ends with the test
//! that started it (`process`). The kit has no unit tests: the suite exercises all of it.

#![allow(clippy::expect_used, reason = "in a test a panic is the message")]

pub mod agent;
pub mod broker;
pub mod camera;
pub mod certificates;
pub mod file_server;
pub mod hostile;
pub mod http;
pub mod lab;
pub mod onnx;
pub mod paho;
pub mod png;
pub mod process;
pub mod relay;
pub mod scripted_api;
pub mod scripted_broker;
pub mod site;
pub mod source;
pub mod sparkplug;
pub mod wait;

use std::path::{Path, PathBuf};

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A path in the bundled example, which holds a model, frames and golden samples.
pub fn example(path: &str) -> PathBuf {
    root().join("examples/surface-defects").join(path)
}

/// A frame of the bundled example as JPEG bytes.
pub fn frame(name: &str) -> Vec<u8> {
    std::fs::read(example("frames").join(name)).expect("the example's frames are committed")
}

/// The Python interpreter with the packages of `tests/requirements.txt`, which `make test` installs.
pub fn python() -> PathBuf {
    let python = root().join(".venv/bin/python");
    assert!(python.exists(), "{} is missing; run `make test-tools` once", python.display());
    python
}

/// A path as text.
///
/// # Panics
/// If the path is not UTF-8.
pub fn utf8(path: &Path) -> &str {
    path.to_str().expect("temporary folders have UTF-8 names")
}

/// An `EdgeModel` manifest; `more` is further YAML of its spec, indented by two spaces.
pub fn model_manifest(name: &str, version: u64, uri: &str, more: &str) -> String {
    format!(
        "apiVersion: lineside.dev/v1alpha1\nkind: EdgeModel\nmetadata: {{name: {name}}}\nspec:\n  version: {version}\n  \
         source: {{uri: '{uri}'}}\n{more}"
    )
}

/// A `CameraStream` manifest; `more` is further YAML of its spec, indented by two spaces.
pub fn stream_manifest(name: &str, uri: &str, model: &str, more: &str) -> String {
    format!(
        "apiVersion: lineside.dev/v1alpha1\nkind: CameraStream\nmetadata: {{name: {name}}}\nspec:\n  \
         source: {{uri: '{uri}'}}\n  model: {model}\n{more}"
    )
}
