//! Many version changes in a row, a long outage of the broker, and repeated signals.

use std::fs;
use std::time::Duration;

use lineside_tests::agent::{Agent, AgentOptions};
use lineside_tests::broker::{Broker, UNREACHABLE_BROKER};
use lineside_tests::site::{TestSite, iterations};
use lineside_tests::wait::until_within;
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

/// The resident memory of a process in MiB.
fn resident_mib(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

/// Waits for this many results of three streams, and returns the highest resident memory meanwhile.
fn peak_during(agent: &Agent, results: f64) -> f64 {
    let processed = || -> f64 {
        let of = |line| agent.metric(&format!("lineside_frames_total{{outcome=\"processed\",stream=\"line-{line}\"}}"));
        (1..=3).map(of).sum()
    };
    let (start, mut peak) = (processed(), 0.0_f64);
    until_within(Duration::from_secs(600), "results", || {
        peak = peak.max(resident_mib(agent.pid()));
        (processed() >= start + results).then_some(())
    });
    peak
}

/// In the short form, the outage lasts for 2,000 results; `LINESIDE_OUTAGE_RESULTS=12600` is a minute at 210 results per second.
#[test]
fn memory_stays_flat_while_the_broker_is_unreachable() {
    let mut broker = Broker::start();
    let site = TestSite::with_stream(70);
    for line in 2..=3 {
        let frames = format!("dir://{}?loop=true", example("frames").display());
        site.apply(
            &format!("stream-{line}.yaml"),
            &stream_manifest(&format!("line-{line}"), &frames, "parts", "  fps: 70\n"),
        );
    }
    let mut agent = site.start_with_broker(&broker.url(), &[]);
    agent.wait_for_metric("lineside_frames_total{outcome=\"processed\",stream=\"line-3\"}", 200.0);
    let before = peak_during(&agent, 500.0);
    broker.stop();
    let outage = peak_during(&agent, iterations("LINESIDE_OUTAGE_RESULTS", 2000) as f64);
    eprintln!("resident memory: {before:.1} MiB before the outage, at most {outage:.1} MiB during it");
    assert!(outage <= before + 8.0, "{before:.1} MiB before, {outage:.1} MiB during the outage");
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
