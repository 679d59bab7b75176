//! The configurations of Fluentd and Fluent Bit read the logs of a real agent, as a container runtime stores them.

use lineside_tests::agent::{Agent, AgentOptions};
use lineside_tests::process::{command, output_text};
use lineside_tests::{root, utf8};
use serde_json::{Value, json};

/// The length at which the test splits lines. Container runtimes split at 16 KiB.
const PART_BYTES: usize = 90;
/// An error on the command line is not JSON.
const PLAIN: &str = "lineside: --site is required";

/// The lines of a log file in the format of CRI for one entry.
fn cri_lines(entry: &str, file: &mut String) {
    let parts: Vec<&[u8]> = entry.as_bytes().chunks(PART_BYTES).collect();
    for (number, part) in parts.iter().enumerate() {
        let tag = if number + 1 == parts.len() { 'F' } else { 'P' };
        let text = std::str::from_utf8(part).expect("the entries are ASCII");
        *file += &format!("2026-11-27T09:15:00.12345678{}Z stderr {tag} {text}\n", number % 10);
    }
}

#[test]
fn collectors_read_entries_that_the_runtime_has_split() {
    let folder = tempfile::tempdir().unwrap();
    let (manifests, data) = (folder.path().join("manifests"), folder.path().join("data"));
    std::fs::create_dir(&manifests).unwrap();
    let options = AgentOptions { manifests: &manifests, data: &data, mqtt: "mqtt://127.0.0.1:1", flags: &[] };
    let mut agent = Agent::start(&options);
    agent.wait_for_event("broker_disconnected");
    agent.terminate();
    let mut expected = agent.logs();
    assert!(expected.len() >= 4, "{expected:#?}");
    expected.push(json!({ "log": PLAIN }));

    let mut file = String::new();
    for entry in &expected {
        cri_lines(&entry.get("log").map_or_else(|| entry.to_string(), |_| PLAIN.to_owned()), &mut file);
    }
    assert!(file.contains(" stderr P ") && file.contains(" stderr F "));
    let path = folder.path().join("pod.log");
    std::fs::write(&path, file).unwrap();
    let mut program = command("python3");
    program.arg(root().join("tests/suite/log_collectors.py")).arg(utf8(&path));
    let output = program.arg(root().join("edge-manifests/logging")).output().unwrap();
    assert!(output.status.success(), "{}", output_text(&output));
    let read: Value = serde_json::from_slice(&output.stdout).unwrap();
    for collector in ["fluentd", "fluent-bit"] {
        assert_eq!(read[collector], Value::from(expected.clone()), "{collector}");
    }
}
