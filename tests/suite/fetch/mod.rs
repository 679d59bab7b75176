//! Model downloads from real servers, from faulty servers, and from peers.

mod peers;
mod registries;
mod web_servers;

use std::fs;
use std::path::PathBuf;

use lineside_tests::agent::Agent;
use lineside_tests::example;
use lineside_tests::site::{TestSite, digest, manifest_with_source, wait_until_serving, with_other_digest};
use lineside_tests::wait::until_true;
use serde_json::json;

/// The offset at which the scripted servers interrupt a download; it occurs twice within the bundled model.
const CUT_BYTES: usize = 60_000;

/// The bundled model with one of ten digests, so that the models of a test do not share a blob.
fn variant(tag: u8) -> Vec<u8> {
    with_other_digest(&fs::read(example("surface-defects.onnx")).unwrap(), tag)
}

/// Applies version 1 of a model; the file has the name of the model.
fn apply(site: &TestSite, name: &str, uri: &str, digest: &str) {
    site.apply(&format!("{name}.yaml"), &manifest_with_source(name, 1, &json!({"uri": uri, "digest": digest}), ""));
}

/// Like [`apply`], with a secret.
fn apply_with_secret(site: &TestSite, name: &str, uri: &str, digest: &str, secret: &str) {
    let source = json!({"uri": uri, "digest": digest, "secretRef": {"name": secret}});
    site.apply(&format!("{name}.yaml"), &manifest_with_source(name, 1, &source, ""));
}

/// Waits until version 1 of the model serves with exactly these bytes.
fn expect_serving(agent: &Agent, name: &str, bytes: &[u8]) {
    assert_eq!(wait_until_serving(agent, name, 1)["serving"]["digest"], digest(bytes), "{name}");
}

/// Waits until the model is rejected for a reason that contains one of these words. Other failures may precede it, such
/// as an interrupted connection.
fn expect_rejection(agent: &Agent, name: &str, words: &[&str]) {
    until_true(&format!("{name} to be rejected with one of {words:?}"), || {
        let entries = agent.events("model_load_failed");
        let mut reasons =
            entries.iter().filter(|entry| entry["model"] == name).map(|entry| entry["reason"].to_string());
        reasons.any(|reason| contains_any(&reason, words))
    });
}

/// Whether the text contains one of these words, ignoring case.
fn contains_any(text: &str, words: &[&str]) -> bool {
    words.iter().any(|word| text.to_lowercase().contains(&word.to_lowercase()))
}

/// Checks that the store contains exactly these files, each with the digest in its name.
fn assert_stored(site: &TestSite, files: &[&[u8]]) {
    site.verify_blobs();
    let mut expected: Vec<PathBuf> = files.iter().map(|bytes| site.blob_path(&digest(bytes))).collect();
    let mut found = site.blobs();
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
}

/// The origin of a download according to the log.
fn download_origin(agent: &Agent, name: &str) -> String {
    let entries = agent.events("model_downloaded");
    let entry = entries.iter().find(|entry| entry["model"] == name).unwrap();
    entry["from"].as_str().unwrap().to_owned()
}

/// An address at which nothing listens.
fn unreachable_host() -> String {
    format!("127.0.0.1:{}", lineside_tests::broker::free_port())
}
