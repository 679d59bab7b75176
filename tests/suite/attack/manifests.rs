//! Attacks by manifests and cluster objects: one bad number, entry or object costs only itself.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::process::Command;

use lineside_tests::agent::{Agent, AgentOptions};
use lineside_tests::broker::UNREACHABLE_BROKER;
use lineside_tests::scripted_api::{ApiScript, ScriptedApi};
use lineside_tests::site::{TestSite, model_status, status, wait_until_serving};
use lineside_tests::wait::{until, until_long, until_true};
use lineside_tests::{example, http, stream_manifest};
use serde_json::{Value, json};

fn stream(name: &str, more: &str) -> String {
    stream_manifest(name, &format!("dir://{}?loop=true", example("frames").display()), "parts", more)
}

fn condition(agent: &Agent, kind: &str) -> Value {
    let status = status(agent);
    let mut conditions = status["conditions"].as_array().into_iter().flatten();
    conditions.find(|condition| condition["type"] == kind).cloned().unwrap_or_default()
}

/// Waits until the condition `Degraded` has this text in its reason and messages, and returns the message.
fn wait_until_degraded(agent: &Agent, text: &str) -> String {
    until_long(&format!("Degraded with {text}"), || {
        let degraded = condition(agent, "Degraded");
        let message = format!("{}: {}", degraded["reason"].as_str()?, degraded["message"].as_str()?);
        (degraded["status"] == "True" && message.contains(text)).then_some(message)
    })
}

/// Waits until a stream has started.
fn wait_until_started(agent: &Agent, stream: &str) {
    until_true(&format!("{stream} to start"), || {
        agent.events("stream_started").iter().any(|entry| entry["stream"] == stream)
    });
}

/// The status code of `/readyz` and the reason in its body.
fn readiness(agent: &Agent) -> (u16, String) {
    let (code, body) = http::get(agent.http(), "/readyz").unwrap();
    let body: Value = serde_json::from_str(&body).unwrap();
    (code, body["reason"].as_str().unwrap_or_default().to_owned())
}

/// The reason of the last rejection of a manifest file.
fn rejection(agent: &Agent, file: &str) -> String {
    agent.wait_for_metric_value(&format!("lineside_manifest_rejected{{file=\"{file}\"}}"), 1.0);
    until(&format!("the rejection of {file}"), || {
        let entries = agent.events("manifest_rejected");
        let entry = entries.iter().rfind(|entry| entry["file"].as_str().is_some_and(|path| path.ends_with(file)))?;
        entry["reason"].as_str().map(str::to_owned)
    })
}

/// Checks that no task of the agent has failed.
fn assert_no_failure(agent: &Agent) {
    assert_eq!(agent.events("panic"), Vec::<Value>::new());
    let (_, metrics) = http::get(agent.http(), "/metrics").unwrap();
    let restarts = metrics.lines().filter(|line| line.starts_with("lineside_task_restarts_total"));
    assert!(restarts.clone().all(|line| line.ends_with(" 0")), "{:?}", restarts.collect::<Vec<_>>());
}

#[test]
fn a_number_out_of_range_rejects_its_file_and_later_files_are_followed() {
    let site = TestSite::with_broker_and_stream(20);
    let mut agent = site.start(&[]);
    site.wait_for_new_results(3);
    let numbers = ["1e-300", "5.4e-20", "1e-20", "5e-324", "-1", "1e300", ".nan", ".inf", "1e400"];
    for (index, fps) in numbers.into_iter().enumerate() {
        site.apply(&format!("bad-{index}.yaml"), &stream(&format!("bad-{index}"), &format!("  fps: {fps}\n")));
    }
    site.apply("age.yaml", &stream("age", &format!("  maxAgeMs: {}\n", u64::MAX)));
    for index in 0..numbers.len() {
        rejection(&agent, &format!("bad-{index}.yaml"));
    }
    assert!(rejection(&agent, "bad-0.yaml").contains("spec.fps: 1e-300 is neither 0 (no limit) nor between"));
    assert!(rejection(&agent, "age.yaml").contains("spec.maxAgeMs"), "{}", rejection(&agent, "age.yaml"));
    wait_until_degraded(&agent, "ConfigRejected: 10 manifest files are rejected: age.yaml, bad-0.yaml");

    site.apply("good.yaml", &stream("good", "  fps: 20\n"));
    wait_until_started(&agent, "good");
    site.wait_for_new_results(10);
    assert_eq!(readiness(&agent), (200, String::new()));
    assert_no_failure(&agent);
    assert!(agent.terminate().success());
}

#[test]
fn an_entry_that_cannot_be_read_is_rejected_and_the_others_are_followed() {
    let site = TestSite::with_broker_and_stream(20);
    let entry = |name: &str| site.path("manifests").join(name);
    symlink("loop.yaml", entry("loop.yaml")).unwrap();
    symlink("/etc/passwd/x", entry("not-a-dir.yaml")).unwrap();
    symlink("n".repeat(300), entry("long.yaml")).unwrap();
    symlink("nowhere", entry("nowhere.yaml")).unwrap();
    symlink("/dev/zero", entry("device.yaml")).unwrap();
    fs::create_dir(entry("folder.yaml")).unwrap();
    assert!(Command::new("mkfifo").arg(entry("pipe.yaml")).status().unwrap().success());
    fs::create_dir(site.path("locked")).unwrap();
    fs::copy(entry("stream.yaml"), site.path("locked/stream.yaml")).unwrap();
    fs::set_permissions(site.path("locked"), fs::Permissions::from_mode(0o000)).unwrap();
    symlink("../locked/stream.yaml", entry("locked.yaml")).unwrap();

    let mut agent = Agent::start_without_file_capabilities(&AgentOptions {
        manifests: &site.path("manifests"),
        data: &site.data(),
        mqtt: &site.broker_url(),
        flags: &[],
    });
    site.wait_for_new_results(3);
    for (file, reason) in [
        ("loop.yaml", "symbolic link"),
        ("not-a-dir.yaml", "Not a directory"),
        ("long.yaml", "name too long"),
        ("nowhere.yaml", "does not exist"),
        ("device.yaml", "not a regular file"),
        ("folder.yaml", "not a regular file"),
        ("pipe.yaml", "not a regular file"),
        ("locked.yaml", "Permission denied"),
    ] {
        assert!(rejection(&agent, file).contains(reason), "{file}: {}", rejection(&agent, file));
    }
    wait_until_degraded(&agent, "ConfigRejected: 8 manifest files are rejected: device.yaml, folder.yaml");
    assert_eq!(readiness(&agent), (200, String::new()));
    site.apply("good.yaml", &stream("good", "  fps: 20\n"));
    wait_until_started(&agent, "good");
    assert_eq!(agent.events("manifest_rejected").len(), 8, "each is logged once");

    // A permission that is given later needs no change of the file.
    fs::set_permissions(site.path("locked"), fs::Permissions::from_mode(0o755)).unwrap();
    agent.wait_for_metric_value("lineside_manifest_rejected{file=\"locked.yaml\"}", 0.0);
    assert_no_failure(&agent);
    assert!(agent.terminate().success());
}

#[test]
fn an_agent_that_cannot_read_its_folder_is_not_ready_and_restores_the_last_good_versions() {
    let site = TestSite::with_broker_and_stream(20);
    let mut agent = site.start(&[]);
    site.wait_for_new_results(3);
    assert!(agent.terminate().success());

    let permit = |mode| fs::set_permissions(site.path("manifests"), fs::Permissions::from_mode(mode)).unwrap();
    // The folder can be passed through, since the path of the model leads through it, and cannot be listed.
    permit(0o311);
    let mut agent = Agent::start_without_file_capabilities(&AgentOptions {
        manifests: &site.path("manifests"),
        data: &site.data(),
        mqtt: &site.broker_url(),
        flags: &[],
    });
    let message = wait_until_degraded(&agent, "ConfigUnreadable");
    assert!(message.contains("the folder of manifests cannot be read: Permission denied"), "{message}");
    wait_until_serving(&agent, "parts", 1);
    let (code, reason) = readiness(&agent);
    assert!(code == 503 && reason.contains("not known yet") && reason.contains("Permission denied"), "{code} {reason}");
    assert_eq!(condition(&agent, "Ready")["reason"], "ConfigPending");
    assert_eq!(agent.metric("lineside_manifests_unreadable"), 1.0);
    assert_eq!(agent.events("manifests_unreadable").len(), 1, "it is logged once");

    permit(0o755);
    site.wait_for_new_results(3);
    until_true("readiness", || readiness(&agent) == (200, String::new()));
    assert_eq!(agent.events("model_serving").len(), 1, "the restored version is the desired one");

    // Later the last desired state stays in force.
    permit(0o311);
    wait_until_degraded(&agent, "ConfigUnreadable");
    let (code, reason) = readiness(&agent);
    assert!(code == 200 && reason.contains("the last desired state applies"), "{code} {reason}");
    site.wait_for_new_results(10);
    permit(0o755);
    until_true("the folder to be readable", || condition(&agent, "Degraded")["status"] == "False");
    assert_eq!(agent.metric("lineside_manifests_unreadable"), 0.0);
    assert_no_failure(&agent);
    assert!(agent.terminate().success());
}

#[test]
fn ninety_thousand_unknown_keys_are_one_log_entry() {
    let site = TestSite::with_stream(5);
    let agent = site.start(&[]);
    agent.wait_until_ready();
    let keys: String = (0..90_000).map(|key| format!("  k{key:05}:\n")).collect();
    let text = stream("keys", &keys);
    assert!(text.len() < 1 << 20, "{} bytes", text.len());
    site.apply("keys.yaml", &text);
    let reason = rejection(&agent, "keys.yaml");
    assert!(reason.len() < 12_000 && reason.contains("spec.k00000: is not a known key"), "{reason}");
    assert!(reason.ends_with("and 89980 more errors"), "{reason}");
    assert_eq!(agent.events("manifest_rejected").len(), 1);
}

#[test]
fn ten_thousand_rejected_files_are_a_condition_with_their_number() {
    let site = TestSite::with_broker_and_stream(20);
    for number in 0..10_000 {
        fs::write(site.path("manifests").join(format!("x{number:04}.yaml")), "kind: Pod\n").unwrap();
    }
    let mut agent = site.start(&[]);
    site.wait_for_new_results(3);
    let message = wait_until_degraded(&agent, "ConfigRejected: 10000 manifest files are rejected: x0000.yaml");
    assert!(message.len() < 1100, "{message}");
    assert_eq!(readiness(&agent).0, 200);
    // Entries of one kind are limited; a summary counts the others.
    agent.wait_for_event("logs_suppressed");
    assert!(agent.events("manifest_rejected").len() < 200);
    assert!(agent.terminate().success());
}

#[test]
fn an_invalid_object_of_the_cluster_is_rejected_alone() {
    let site = TestSite::with_broker_and_stream(20);
    let api = ScriptedApi::start();
    let uri = format!("file://{}", site.path("parts.onnx").display());
    api.put("edgemodels", "parts", 1, &json!({"version": 1, "source": {"uri": uri}}));
    let frames = format!("dir://{}?loop=true", example("frames").display());
    let spec = |fps: Value| json!({"source": {"uri": frames}, "model": "parts", "fps": fps, "nodeName": "edge-1"});
    api.put("camerastreams", "bad", 1, &spec(json!(1e-300)));
    api.put("camerastreams", "line-1", 1, &spec(json!(20)));
    let kubeconfig = api.kubeconfig(&site.path(""));
    let mut agent = Agent::start_with_kubeconfig(&kubeconfig, &site.data(), &site.broker_url());
    site.wait_for_new_results(3);
    let entry = agent.wait_for_event("object_rejected");
    assert_eq!((&entry["kind"], &entry["name"]), (&json!("CameraStream"), &json!("bad")));
    wait_until_degraded(&agent, "bad: refused: CameraStream bad spec.fps: 1e-300");
    api.put("camerastreams", "later", 1, &spec(json!(20)));
    // The scripted watch delivers no events; an expired one makes the agent list again, after at least ten seconds.
    api.set(ApiScript::Expired);
    until_long("the later stream to start", || {
        agent.events("stream_started").iter().any(|entry| entry["stream"] == "later").then_some(())
    });
    api.set(ApiScript::Healthy);
    assert_no_failure(&agent);
    assert!(agent.terminate().success());

    // Without the cached desired state and without the cluster, the last-good version serves, and the agent is not ready.
    fs::remove_file(site.data().join("desired.json")).unwrap();
    let text = fs::read_to_string(&kubeconfig).unwrap().replace("127.0.0.1:", "127.0.0.2:");
    fs::write(&kubeconfig, text).unwrap();
    let agent = Agent::start_with_kubeconfig(&kubeconfig, &site.data(), UNREACHABLE_BROKER);
    wait_until_serving(&agent, "parts", 1);
    assert_eq!(model_status(&agent, "parts")["state"], "Ready");
    assert_eq!(readiness(&agent), (503, "the desired state is not known yet".to_owned()));
}
