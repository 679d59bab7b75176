//! Repeated version changes under load: no result is lost or attributed to the wrong version, and memory is released.

use std::fs;

use lineside_tests::agent::Agent;
use lineside_tests::site::{
    TestSite, failed_inspections, iterations, manifest_with_source, nan_model, wait_for_rejection, wait_until_serving,
    with_other_digest,
};
use serde_json::{Value, json};

/// The number of swaps before the baseline of the memory, when both versions have been loaded.
const BASELINE_SWAPS: u64 = 4;
/// The maximum growth of the memory, in MiB.
const MAX_GROWTH_MIB: f64 = 40.0;

/// Writes two versions of the bundled model, and returns their digests.
fn two_versions(site: &TestSite) -> [String; 2] {
    let model = fs::read(site.path("parts.onnx")).unwrap();
    [site.write("parts-1.onnx", &model), site.write("parts-2.onnx", &with_other_digest(&model, 2))]
}

/// Sets the desired version, which may be lower than the current one.
fn request_version(site: &TestSite, version: u64, digests: &[String; 2], more: &str) {
    let source = json!({"uri": format!("file:../parts-{version}.onnx"), "digest": digests[version as usize - 1]});
    site.apply("model.yaml", &manifest_with_source("parts", version, &source, &format!("  rollback: true\n{more}")));
}

/// Checks that every result was received once and in order, with the digest of its version.
fn check(results: &[Value], digests: &[String; 2]) {
    for (index, result) in results.iter().enumerate() {
        assert_eq!(result["seq"].as_u64(), Some(index as u64 + 1), "no sequence number is missing");
        let version = result["model"]["version"].as_u64().unwrap();
        assert_eq!(result["model"]["digest"], digests[version as usize - 1], "the digest of version {version}");
    }
}

/// The resident memory of the agent, in MiB.
fn memory(agent: &Agent) -> f64 {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

#[test]
fn alternating_versions_lose_no_result_and_leak_no_memory() {
    let swaps = iterations("LINESIDE_EXPERIMENT_SWAPS", 20);
    let site = TestSite::with_broker_and_stream(0);
    let digests = two_versions(&site);
    request_version(&site, 1, &digests, "");
    let mut agent = site.start(&[]);
    wait_until_serving(&agent, "parts", 1);
    site.wait_for_new_results(20);
    let mut baseline = 0.0;
    for swap in 1..=swaps {
        let version = swap % 2 + 1;
        request_version(&site, version, &digests, "");
        wait_until_serving(&agent, "parts", version);
        if swap == BASELINE_SWAPS.min(swaps) {
            baseline = memory(&agent);
        }
    }
    let last = site.wait_for_new_results(20);
    assert_eq!(last.last().unwrap()["model"]["version"], swaps % 2 + 1);
    let now = memory(&agent);
    eprintln!("memory after {BASELINE_SWAPS} swaps {baseline:.1} MiB, after {swaps} {now:.1} MiB");
    assert!(now <= baseline + MAX_GROWTH_MIB, "memory has grown from {baseline:.1} to {now:.1} MiB");
    let results = site.results();
    check(&results, &digests);
    let changes = results.windows(2).filter(|pair| pair[0]["model"] != pair[1]["model"]).count() as u64;
    assert!(changes <= swaps, "{changes} version changes in {swaps} swaps: a replaced version produced a result");
    assert!(changes > 0);
    assert_eq!(failed_inspections(&agent), 0.0);
    assert_eq!(agent.events("model_admitted").len(), 2, "each file was admitted once");
    assert!(agent.terminate().success());
}

#[test]
fn stop_first_loses_no_result_and_a_rejected_version_stops_nothing() {
    let site = TestSite::with_broker_and_stream(0);
    let digests = two_versions(&site);
    let more = "  runtime: {stopFirst: true}\n";
    request_version(&site, 1, &digests, more);
    let mut agent = site.start(&[]);
    wait_until_serving(&agent, "parts", 1);
    site.wait_for_new_results(20);
    for version in [2, 1, 2] {
        request_version(&site, version, &digests, more);
        wait_until_serving(&agent, "parts", version);
        site.wait_for_new_results(5);
    }
    site.write("nan.onnx", &nan_model());
    site.apply("model.yaml", &manifest_with_source("parts", 3, &json!({"uri": "file:../nan.onnx"}), more));
    wait_for_rejection(&agent, "parts");
    wait_until_serving(&agent, "parts", 2);
    site.wait_for_new_results(20);
    check(&site.results(), &digests);
    assert_eq!(failed_inspections(&agent), 0.0);
    assert!(agent.terminate().success());
}
