//! Verdict rules that would overflow the stack, exhaust the memory or never end are refused when they are read, in a child
//! process, while a stream beside them serves.

use std::fs;
use std::io::{BufRead as _, Write as _};
use std::process::Command;
use std::time::Duration;

use lineside::rules_child::{RuleCheckErrorKind, RuleChecker, SUBCOMMAND};
use lineside_common::child_process::{ChildPriority, ProcessLimits};
use lineside_common::supervised_child::{ChildOptions, SupervisedChild};
use lineside_tests::agent::{Agent, AgentOptions, program};
use lineside_tests::broker::Broker;
use lineside_tests::wait::until_true;
use lineside_tests::{example, model_manifest, stream_manifest};
use serde_json::{Value, json};

const GOOD: &str = r#"classes[0].label == "good" ? "pass" : "reject""#;

/// The rules of the attack that stopped the agent: a stack overflow, 2 to the power of 50 copies, and 100 to the power of 5
/// rounds.
fn attack() -> [String; 3] {
    let list = vec!["1"; 100].join(",");
    let nested = (0..5).fold("true".to_owned(), |inner, depth| format!("[{list}].all(v{depth},{inner})"));
    [
        format!("1{} > 0 ? \"pass\" : \"none\"", "+1".repeat(1360)),
        format!("[\"a\"]{}.size() > 0 ? \"pass\" : \"none\"", ".map(s, s+s)".repeat(50)),
        format!("{nested} ? \"pass\" : \"none\""),
    ]
}

fn child_command() -> Command {
    let mut command = Command::new(program());
    command.arg(SUBCOMMAND);
    command
}

#[test]
fn hostile_rules_are_refused_beside_a_stream_that_serves() {
    let broker = Broker::start();
    let subscriber = broker.subscribe("lineside/v1/plant/#");
    let folder = tempfile::tempdir().unwrap();
    let manifests = folder.path().join("manifests");
    fs::create_dir(&manifests).unwrap();
    let stream = |name: &str, rule: &str, more: &str| {
        let source = format!("dir://{}?loop=true", example("frames").display());
        // Single quotes of YAML.
        let verdict = format!("  fps: 20\n  verdict: '{}'\n{more}", rule.replace('\'', "''"));
        stream_manifest(name, &source, "parts", &verdict)
    };
    let model = model_manifest("parts", 1, &format!("file://{}", example("surface-defects.onnx").display()), "");
    fs::write(manifests.join("model.yaml"), model).unwrap();
    fs::write(manifests.join("good.yaml"), stream("good", GOOD, "  onError: reject\n")).unwrap();
    let hostile = attack().into_iter().chain([
        "detections.all(a, detections.all(b, detections == detections)) ? \"pass\" : \"none\"".to_owned(),
        "detections.exists(d, d.score > \"x\") ? \"reject\" : \"pass\"".to_owned(),
        "score > 0.5 ? reject : pass".to_owned(),
    ]);
    let files: Vec<String> = hostile
        .enumerate()
        .map(|(number, rule)| {
            let file = format!("hostile-{number}.yaml");
            fs::write(manifests.join(&file), stream(&format!("hostile-{number}"), &rule, "")).unwrap();
            file
        })
        .collect();
    let data = folder.path().join("data");
    let start = || Agent::start(&AgentOptions { manifests: &manifests, data: &data, mqtt: &broker.url(), flags: &[] });
    // The second agent is the restart after which the attack stopped the agent again.
    for _ in 0..2 {
        let mut agent = start();
        let before = subscriber.payloads("/good/result").len();
        for file in &files {
            agent.wait_for_metric_value(&format!("lineside_manifest_rejected{{file=\"{file}\"}}"), 1.0);
        }
        agent.wait_for_metric_value("lineside_manifest_rejected{file=\"good.yaml\"}", 0.0);
        let rejected = agent.events("manifest_rejected");
        assert_eq!(rejected.len(), files.len(), "{rejected:#?}");
        let names_field =
            |entry: &Value| entry["reason"].as_str().is_some_and(|reason| reason.contains("spec.verdict: "));
        assert!(rejected.iter().all(names_field), "{rejected:#?}");
        until_true("results of the good stream", || subscriber.payloads("/good/result").len() >= before + 3);
        let results = subscriber.payloads("/good/result");
        assert!(results.iter().all(|result| result["verdict"] == "pass" || result["verdict"] == "reject"));
        for event in ["panic", "rules_child_failed", "rule_check_unavailable"] {
            assert!(agent.events(event).is_empty(), "{event}: {:#?}", agent.events(event));
        }
        assert!(agent.is_running());
        assert!(agent.terminate().success());
    }
}

#[test]
fn the_built_child_checks_rules_within_its_limits() {
    let checker = RuleChecker::new(|| Ok(child_command()));
    let pairs =
        "detections.all(a, detections.all(b, a.label == b.label || a.box[2] < b.box[0])) ? \"pass\" : \"reject\"";
    for rule in [GOOD, pairs, "\"none\""] {
        assert_eq!(checker.check(rule), Ok(()), "{rule}");
    }
    for rule in attack() {
        assert_eq!(checker.check(&rule).unwrap_err().kind(), RuleCheckErrorKind::Scan, "{rule}");
    }
    for rule in
        ["score", "scores > 1.0 ? \"pass\" : \"none\"", "detections.map(a, detections.map(b, detections)) == []"]
    {
        assert_eq!(checker.check(rule).unwrap_err().kind(), RuleCheckErrorKind::Refused, "{rule}");
    }
    checker.release();
}

#[test]
fn the_child_refuses_the_rules_of_the_attack_without_the_scan_of_the_agent() {
    let long = Duration::from_secs(60);
    let options = ChildOptions {
        name: "rules child".to_owned(),
        limits: ProcessLimits { memory_bytes: 256 << 20, cpu_seconds: Some(60), priority: ChildPriority::Normal },
        handshake: "lineside-rules 1",
        handshake_deadline: long,
        stop_grace: long,
    };
    let mut child = SupervisedChild::start(child_command(), &options).unwrap();
    let (mut requests, mut replies) = (child.take_stdin().unwrap(), child.take_stdout().unwrap());
    let mut ask = |rule: &str| -> Value {
        writeln!(requests, "{}", json!({"rule": rule})).unwrap();
        let mut line = String::new();
        replies.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    };
    for rule in attack() {
        assert!(ask(&rule)["refused"].is_string(), "{rule}");
    }
    assert_eq!(ask(GOOD), "accepted");
    drop(requests);
    assert!(child.wait(long).unwrap().is_some(), "the child ends with its input");
}
