//! An agent outside the cluster: several kubeconfig contexts, and clock changes while it is disconnected.

use std::path::{Path, PathBuf};

use lineside_tests::agent::{Agent, AgentOptions, program};
use lineside_tests::lab::{Lab, NAMESPACE, NODE};
use lineside_tests::utf8;
use serde_json::{Value, json};

/// A kubeconfig with two contexts. `near` refers to a port of the API server's address on which nothing listens
/// initially.
fn kubeconfig(lab: &Lab, folder: &Path, token: &str) -> PathBuf {
    let ca = lab.folder().join("certificates/apiserver.crt");
    let cluster = |name: &str, port: u16| json!({"name": name, "cluster": {"server": format!("https://10.99.0.1:{port}"), "certificate-authority": ca}});
    let context =
        |name: &str| json!({"name": name, "context": {"cluster": name, "user": "far-1", "namespace": NAMESPACE}});
    let text = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "near",
        "clusters": [cluster("near", 7443), cluster("central", 6443)],
        "users": [{"name": "far-1", "user": {"token": token}}],
        "contexts": [context("near"), context("central")],
    });
    let path = folder.join("kubeconfig");
    std::fs::write(&path, text.to_string()).unwrap();
    path
}

/// The library that gives a program its own clock.
fn libfaketime() -> PathBuf {
    let folders = std::fs::read_dir("/usr/lib").unwrap().flatten();
    let mut found = folders.map(|folder| folder.path().join("faketime/libfaketime.so.1")).filter(|path| path.exists());
    found.next().expect("Debian's libfaketime is installed")
}

/// The difference between the last heartbeat of the agent and the current time, in seconds.
fn heartbeat_offset(status: &Value) -> i64 {
    let date = status["agent"]["lastHeartbeatTime"].as_str().unwrap_or_default();
    let output = std::process::Command::new("date").args(["-u", "+%s", "-d", date]).output().unwrap();
    let heartbeat: i64 = String::from_utf8_lossy(&output.stdout).trim().parse().unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    heartbeat - i64::try_from(now).unwrap()
}

#[test]
fn an_external_agent_switches_contexts_and_tolerates_clock_changes() {
    let Some(lab) = Lab::exclusive_local() else { return };
    lab.install();
    let token = lab.external_account_token("far-1");
    let folder = tempfile::tempdir().unwrap();
    let (kubeconfig, data, clock) =
        (kubeconfig(&lab, folder.path(), &token), folder.path().join("data"), folder.path().join("clock"));
    std::fs::write(&clock, "+0\n").unwrap();
    let request_version = |version: u64| {
        let model = lineside_tests::example("surface-defects.onnx");
        lab.apply_ok(
            &json!({
                "apiVersion": "lineside.dev/v1alpha1", "kind": "EdgeModel",
                "metadata": {"name": "far", "namespace": NAMESPACE},
                "spec": {"version": version, "nodeSelector": {"site": "far"}, "source": {"uri": format!("file://{}", model.display())}},
            })
            .to_string(),
        );
    };
    request_version(1);
    let status = || lab.get(&["edgenode", "far-1", "-n", NAMESPACE])["status"].clone();
    let wait_until_serving = |version: u64| {
        lab.until(&format!("version {version} to serve"), || {
            let status = status();
            (status["models"][0]["serving"]["version"] == version).then_some(status)
        })
    };

    let program_with_clock = [
        "env".to_owned(),
        format!("LD_PRELOAD={}", libfaketime().display()),
        format!("FAKETIME_TIMESTAMP_FILE={}", clock.display()),
        "FAKETIME_NO_CACHE=1".to_owned(),
        "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
        utf8(&program()).to_owned(),
    ];
    let command = lab.command_in(NODE, &program_with_clock.each_ref().map(String::as_str));
    let flags = ["--kube-contexts", "near,central", "--labels", "site=far", "--mqtt-commands", "reload"];
    let agent = Agent::start_command(
        command,
        "far-1",
        &AgentOptions { manifests: &kubeconfig, data: &data, mqtt: &lab.broker(), flags: &flags },
    );
    wait_until_serving(1);
    assert_eq!(agent.wait_for_event("cluster_context_switched")["context"], "central");

    // The first context becomes reachable, and an operator requests a reload.
    let nft = |rules: &str| {
        let done = lab.command_in("center", &["nft", rules]).status().unwrap();
        assert!(done.success(), "{rules}");
    };
    nft("add table ip near; add chain ip near in { type nat hook prerouting priority -100; }; \
         add rule ip near in ip daddr 10.99.0.1 tcp dport 7443 dnat to 10.99.0.1:6443");
    let publish = [
        "mosquitto_pub",
        "-h",
        lab.broker_host(),
        "-t",
        "lineside/v1/plant/far-1/cmd/reload/set",
        "-m",
        "{\"id\":\"1\"}",
    ];
    assert!(lab.command_in(NODE, &publish).status().unwrap().success());
    lab.until("the switch to the first context", || {
        agent.events("cluster_context_switched").iter().any(|entry| entry["context"] == "near").then_some(())
    });
    request_version(2);
    wait_until_serving(2);

    // The clock and the spec change while the link is down.
    for (version, offset, expected) in [(3, "+2h", 7200), (4, "-30m", -1800), (5, "+0", 0)] {
        lab.wan("down");
        std::fs::write(&clock, format!("{offset}\n")).unwrap();
        request_version(version);
        lab.wan("up");
        let status = wait_until_serving(version);
        assert!((heartbeat_offset(&status) - expected).abs() < 120, "{offset}: {}", heartbeat_offset(&status));
    }
    assert_eq!(lab.ready_condition("edgenode", "far-1").0, "True");
    lab.until("the aggregated status", || {
        (lab.ready_condition("em", "far") == ("True".into(), "AllNodesReady".into())).then_some(())
    });
    nft("delete table ip near");
    drop(agent);
    lab.kubectl_ok(&["delete", "edgenode", "far-1", "-n", NAMESPACE]);
}
