//! One version after the other under load: no result is lost or bears the wrong name, and memory comes back.

use std::fs;

use lineside_tests::agent::Agent;
use lineside_tests::plant::{Plant, failures, not_a_number, refusal, rounds, serves, sourced, twin};
use serde_json::{Value, json};

/// Swaps after which memory is measured first, when both versions have had their turn.
const SETTLED: u64 = 4;
/// What memory may have grown by at the end, in MiB.
const GROWTH_MIB: f64 = 40.0;

/// Two versions of the bundled model: their digests.
fn two_versions(plant: &Plant) -> [String; 2] {
    let model = fs::read(plant.path("parts.onnx")).unwrap();
    [plant.put("parts-1.onnx", &model), plant.put("parts-2.onnx", &twin(&model, 2))]
}

/// Asks for a version, be it a lower one.
fn ask_for(plant: &Plant, version: u64, digests: &[String; 2], more: &str) {
    let source = json!({"uri": format!("file:../parts-{version}.onnx"), "digest": digests[version as usize - 1]});
    plant.apply("model.yaml", &sourced("parts", version, &source, &format!("  rollback: true\n{more}")));
}

/// Every result came once, in order, from the file that its version stands for.
fn check(results: &[Value], digests: &[String; 2]) {
    for (index, result) in results.iter().enumerate() {
        assert_eq!(result["seq"].as_u64(), Some(index as u64 + 1), "without a gap");
        let version = result["model"]["version"].as_u64().unwrap();
        assert_eq!(result["model"]["digest"], digests[version as usize - 1], "of version {version}");
    }
}

/// Memory of the agent that is in use, in MiB.
fn memory(agent: &Agent) -> f64 {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

#[test]
fn flipping_between_two_versions_loses_no_result_and_no_memory() {
    let swaps = rounds("LINESIDE_EXPERIMENT_SWAPS", 20);
    let plant = Plant::with_stream(0);
    let digests = two_versions(&plant);
    ask_for(&plant, 1, &digests, "");
    let mut agent = plant.start(&[]);
    serves(&agent, "parts", 1);
    plant.more_results(20);
    let mut settled = 0.0;
    for swap in 1..=swaps {
        let version = swap % 2 + 1;
        ask_for(&plant, version, &digests, "");
        serves(&agent, "parts", version);
        if swap == SETTLED.min(swaps) {
            settled = memory(&agent);
        }
    }
    let last = plant.more_results(20);
    assert_eq!(last.last().unwrap()["model"]["version"], swaps % 2 + 1);
    let now = memory(&agent);
    eprintln!("memory after {SETTLED} swaps {settled:.1} MiB, after {swaps} {now:.1} MiB");
    assert!(now <= settled + GROWTH_MIB, "memory has grown from {settled:.1} to {now:.1} MiB");
    let results = plant.results();
    check(&results, &digests);
    let changes = results.windows(2).filter(|pair| pair[0]["model"] != pair[1]["model"]).count() as u64;
    assert!(changes <= swaps, "{changes} changes of version in {swaps} swaps: one came back after its time");
    assert!(changes > 0);
    assert_eq!(failures(&agent), 0.0);
    assert_eq!(agent.events("model_admitted").len(), 2, "each file was vetted once");
    assert!(agent.end().success());
}

#[test]
fn stopping_first_loses_no_result_either_and_a_bad_version_stops_nothing() {
    let plant = Plant::with_stream(0);
    let digests = two_versions(&plant);
    let more = "  runtime: {stopFirst: true}\n";
    ask_for(&plant, 1, &digests, more);
    let mut agent = plant.start(&[]);
    serves(&agent, "parts", 1);
    plant.more_results(20);
    for version in [2, 1, 2] {
        ask_for(&plant, version, &digests, more);
        serves(&agent, "parts", version);
        plant.more_results(5);
    }
    plant.put("nan.onnx", &not_a_number());
    plant.apply("model.yaml", &sourced("parts", 3, &json!({"uri": "file:../nan.onnx"}), more));
    refusal(&agent, "parts");
    serves(&agent, "parts", 2);
    plant.more_results(20);
    check(&plant.results(), &digests);
    assert_eq!(failures(&agent), 0.0);
    assert!(agent.end().success());
}
