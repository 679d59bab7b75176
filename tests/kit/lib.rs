//! A kit of peers and parts for tests: the agent as a process, a real broker, cameras, and models written by hand.
//!
//! It uses nothing of the product's but the built program, so that nothing is checked against itself. Nothing in here
//! waits for a fixed time or uses a fixed port: whatever is waited for has a condition and a generous bound, and what is
//! started is ended by its own id when the test is over.

#![allow(clippy::expect_used, reason = "in a test a panic is the message")]

pub mod agent;
pub mod broker;
pub mod camera;
pub mod certificates;
pub mod hostile;
pub mod http;
pub mod lab;
pub mod onnx;
pub mod paho;
pub mod plant;
pub mod relay;
pub mod scripted_api;
pub mod scripted_broker;
pub mod source;
pub mod sparkplug;
pub mod wait;

use std::path::{Path, PathBuf};

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The bundled example: model, frames and golden samples.
pub fn example(path: &str) -> PathBuf {
    root().join("examples/surface-defects").join(path)
}

/// A frame of the bundled example, as JPEG.
pub fn frame(name: &str) -> Vec<u8> {
    std::fs::read(example("frames").join(name)).expect("the example's frames are committed")
}

/// The Python with the packages of `tests/requirements.txt`, which `make test` sets up.
pub fn python() -> PathBuf {
    let python = root().join(".venv/bin/python");
    assert!(python.exists(), "{} is missing; run `make test-tools` once", python.display());
    python
}

/// An `EdgeModel` manifest; `more` is further YAML of its spec, two spaces deep.
pub fn model_manifest(name: &str, version: u64, uri: &str, more: &str) -> String {
    format!(
        "apiVersion: lineside.dev/v1alpha1\nkind: EdgeModel\nmetadata: {{name: {name}}}\nspec:\n  version: {version}\n  \
         source: {{uri: '{uri}'}}\n{more}"
    )
}

/// A `CameraStream` manifest; `more` is further YAML of its spec, two spaces deep.
pub fn stream_manifest(name: &str, uri: &str, model: &str, more: &str) -> String {
    format!(
        "apiVersion: lineside.dev/v1alpha1\nkind: CameraStream\nmetadata: {{name: {name}}}\nspec:\n  \
         source: {{uri: '{uri}'}}\n  model: {model}\n{more}"
    )
}
