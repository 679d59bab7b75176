//! Many version changes in a row, and repeated signals.

use std::fs;

use lineside_tests::agent::{Agent, AgentOptions};
use lineside_tests::broker::{Broker, UNREACHABLE_BROKER};
use lineside_tests::{example, model_manifest, stream_manifest};

#[test]
fn twenty_version_changes_lose_no_result_and_leak_no_thread() {
    const CHANGES: u64 = 20;
    let broker = Broker::start();
    let subscriber = broker.subscribe("lineside/v1/plant/#");
    let folder = tempfile::tempdir().unwrap();
    let manifests = folder.path().join("manifests");
    fs::create_dir(&manifests).unwrap();
    let model = |version: u64| {
        let more = format!("  output: {{topK: {}}}\n", version % 4 + 1);
        model_manifest("parts", version, &format!("file://{}", example("surface-defects.onnx").display()), &more)
    };
    fs::write(manifests.join("model.yaml"), model(1)).unwrap();
    let stream =
        stream_manifest("line-1", &format!("dir://{}?loop=true", example("frames").display()), "parts", "  fps: 0\n");
    fs::write(manifests.join("stream.yaml"), stream).unwrap();
    let mut agent = Agent::start(&AgentOptions {
        manifests: &manifests,
        data: &folder.path().join("data"),
        mqtt: &broker.url(),
        flags: &[],
    });
    subscriber.wait_for("/line-1/result", 10);
    let threads = |agent: &Agent| fs::read_dir(format!("/proc/{}/task", agent.pid())).unwrap().count();
    let before = threads(&agent);
    for version in 2..=CHANGES + 1 {
        fs::write(manifests.join("model.yaml"), model(version)).unwrap();
        agent.wait_for_metric_value(
            &format!("lineside_model_state{{model=\"parts\",state=\"Ready\",version=\"{version}\"}}"),
            1.0,
        );
    }
    let so_far = subscriber.payloads("/line-1/result").len();
    let results = subscriber.wait_for("/line-1/result", so_far + 20);
    for (index, result) in results.iter().enumerate() {
        assert_eq!(result["seq"].as_u64(), Some(index as u64 + 1), "no sequence number is missing");
        let version = result["model"]["version"].as_u64().unwrap();
        let classes = result["classes"].as_array().unwrap().len() as u64;
        assert_eq!(classes, version % 4 + 1, "a result names the version that produced it");
    }
    let versions: Vec<u64> = results.iter().map(|result| result["model"]["version"].as_u64().unwrap()).collect();
    assert!(versions.is_sorted());
    assert_eq!(versions.last(), Some(&(CHANGES + 1)));
    // The number of blocking threads of the runtime varies; instances of previous versions must not accumulate.
    assert!(threads(&agent) <= before + 6, "{before} threads before, {} after", threads(&agent));
    assert!(agent.terminate().success());
}

#[test]
fn a_second_signal_aborts_the_shutdown() {
    use std::io::Write as _;
    let folder = tempfile::tempdir().unwrap();
    let manifests = folder.path().join("manifests");
    fs::create_dir(&manifests).unwrap();
    let start =
        AgentOptions { manifests: &manifests, data: &folder.path().join("data"), mqtt: UNREACHABLE_BROKER, flags: &[] };
    let mut agent = Agent::start(&start);
    agent.wait_until_ready();
    // An incomplete request delays the shutdown.
    let mut request = std::net::TcpStream::connect(agent.http()).unwrap();
    request.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow: ").unwrap();
    agent.wait_for_metric("lineside_build_info{version=\"0.1.0\"}", 1.0);
    agent.signal("TERM");
    agent.wait_for_event("shutdown_requested");
    agent.signal("INT");
    assert_eq!(agent.wait().code(), Some(1));
    assert!(agent.events("agent_stopped").is_empty());
    assert_eq!(agent.events("shutdown_forced").len(), 1);
}
