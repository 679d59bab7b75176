//! Slow clients, stalled tasks and failing frames: what an operator sees over HTTP must be answered, and true.

use std::io::{Read as _, Write as _};
use std::net::TcpStream as StdTcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{collections::BTreeMap, fs};

use lineside::app::App;
use lineside::config::flags::Flags;
use lineside::config::settings::ConfigLayers;
use lineside_api::names::ConfigErrors;
use lineside_tests::agent::{Agent, AgentOptions};
use lineside_tests::broker::{Broker, UNREACHABLE_BROKER};
use lineside_tests::scripted_api::ScriptedApi;
use lineside_tests::site::{TestSite, status};
use lineside_tests::wait::{TIMEOUT, until, until_long, until_true};
use lineside_tests::{frame, http, stream_manifest, utf8};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;

/// Connections of the attack.
const SLOW_CLIENTS: usize = 2_000;
/// Least number of probes of each listener during the attack.
const PROBES: usize = 200;
/// Connections that the slow clients open while each listener is probed.
const RECONNECTS: u64 = 5_000;
/// Time between two lines of headers of a slow client.
const DRIP_INTERVAL: Duration = Duration::from_secs(1);

/// Clients that never complete the headers of their requests, and reconnect when they are disconnected.
struct SlowClients {
    /// Ends the clients when it is dropped.
    _runtime: Runtime,
    connections: Arc<AtomicU64>,
}

impl SlowClients {
    fn start(address: &str, count: usize) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let connections = Arc::new(AtomicU64::new(0));
        for _ in 0..count {
            let (address, connections) = (address.to_owned(), connections.clone());
            runtime.spawn(async move {
                loop {
                    drip(&address, &connections).await;
                    tokio::task::yield_now().await;
                }
            });
        }
        Self { _runtime: runtime, connections }
    }

    fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }
}

/// One connection of a slow client, until it fails.
async fn drip(address: &str, connections: &AtomicU64) {
    let Ok(mut stream) = TcpStream::connect(address).await else { return };
    connections.fetch_add(1, Ordering::Relaxed);
    if stream.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n").await.is_err() {
        return;
    }
    let mut buffer = [0; 64];
    loop {
        tokio::select! {
            read = stream.read(&mut buffer) => {
                if !matches!(read, Ok(bytes) if bytes > 0) {
                    return;
                }
            }
            () = tokio::time::sleep(DRIP_INTERVAL) => {
                if stream.write_all(b"X-Slow: 1\r\n").await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Sends probes one after another, at least [`PROBES`], until the slow clients have opened [`RECONNECTS`] more connections. Returns
/// how many were sent and how many failed, and the longest time until a response.
fn probe(address: &str, slow: &SlowClients) -> (usize, usize, Duration) {
    let (mut sent, mut failed, mut worst) = (0, 0, Duration::ZERO);
    let end = slow.connections() + RECONNECTS;
    while sent < PROBES || slow.connections() < end {
        sent += 1;
        let started = Instant::now();
        match http::get(address, "/livez") {
            Ok((200, _)) => worst = worst.max(started.elapsed()),
            _ => failed += 1,
        }
    }
    (sent, failed, worst)
}

fn agent(folder: &std::path::Path, flags: &[&str]) -> Agent {
    let data = folder.join("data");
    Agent::start(&AgentOptions { manifests: folder, data: &data, mqtt: UNREACHABLE_BROKER, flags })
}

#[test]
fn slow_clients_do_not_keep_probes_from_being_answered() {
    let folder = tempfile::tempdir().unwrap();
    let mut agent = agent(folder.path(), &["--probes", "127.0.0.1:0"]);
    agent.wait_until_ready();
    let (main, probes) = (agent.http().to_owned(), agent.probes().unwrap().to_owned());
    // The clients of the attack have the same address as those of the probes, which is the hardest case.
    for (attacked, name) in [(&main, "the HTTP server"), (&probes, "the probe server")] {
        let before = agent.metric("lineside_http_connections_evicted_total");
        let slow = SlowClients::start(attacked, SLOW_CLIENTS);
        until_true("the attack to be under way", || slow.connections() > SLOW_CLIENTS as u64);
        for (probed, target) in [(&main, "the HTTP server"), (&probes, "the probe server")] {
            let (sent, failed, worst) = probe(probed, &slow);
            eprintln!(
                "attack on {name}, {} connections so far: {failed} of {sent} probes of {target} failed, \
                 the slowest took {worst:?}",
                slow.connections()
            );
            assert_eq!(failed, 0, "attack on {name}, probes of {target}");
        }
        drop(slow);
        assert!(agent.metric("lineside_http_connections_evicted_total") - before >= SLOW_CLIENTS as f64 / 2.0);
    }
    assert!(agent.terminate().success());
}

#[test]
fn a_client_that_completes_no_request_is_disconnected() {
    let folder = tempfile::tempdir().unwrap();
    let mut agent = agent(folder.path(), &["--probes", "off"]);
    assert_eq!(agent.probes(), None);
    let mut slow = StdTcpStream::connect(agent.http()).unwrap();
    slow.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow: ").unwrap();
    slow.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut rest = Vec::new();
    drop(slow.read_to_end(&mut rest));
    assert!(!String::from_utf8_lossy(&rest).starts_with("HTTP/1.1 200"));
    agent.wait_until_ready();
    assert!(agent.terminate().success());
}

#[test]
fn the_probe_server_serves_the_probes_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    // An address that other machines can reach needs no permission here.
    let mut agent = agent(folder.path(), &["--probes", "0.0.0.0:0"]);
    agent.wait_until_ready();
    let port = agent.probes().unwrap().rsplit_once(':').unwrap().1.to_owned();
    let address = format!("127.0.0.1:{port}");
    for (path, expected) in [("/livez", 200), ("/readyz", 200), ("/metrics", 200), ("/v1/status", 404), ("/", 404)] {
        assert_eq!(http::get(&address, path).unwrap().0, expected, "{path}");
    }
    assert_eq!(http::get(agent.http(), "/livez").unwrap().0, 200, "also answered by the HTTP server");
    assert!(agent.terminate().success());
}

#[test]
fn a_second_agent_starts_although_the_default_address_of_the_probes_is_in_use() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let agents: Vec<Agent> = folders.iter().map(|folder| agent(folder.path(), &[])).collect();
    agents.iter().for_each(Agent::wait_until_ready);
    let (with, without): (Vec<&Agent>, Vec<&Agent>) = agents.iter().partition(|agent| agent.probes().is_some());
    assert!(with.len() <= 1, "another agent of this machine may have the address");
    assert!(without.iter().all(|agent| agent.events("probes_not_bound").len() == 1));
}

/// Status and reason of a condition in a status document.
fn condition(status: &Value, kind: &str) -> (String, String) {
    let mut conditions = status["conditions"].as_array().into_iter().flatten();
    let found = conditions.find(|condition| condition["type"] == kind).cloned().unwrap_or_default();
    let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
    (text("status"), text("message"))
}

#[test]
fn connections_of_stalled_tasks_are_not_shown_as_connected() {
    let (site, api) = (TestSite::with_broker(), ScriptedApi::start());
    let (kubeconfig, data) = (api.kubeconfig(&site.path("")), site.data());
    let flags = [
        ("node", "edge-1"),
        ("http", "127.0.0.1:0"),
        ("probes", "off"),
        ("mqtt", &site.broker_url()),
        ("kubeconfig", utf8(&kubeconfig)),
        ("data-dir", utf8(&data)),
    ];
    let flags: BTreeMap<String, String> = flags.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let config = ConfigLayers::new(Flags(flags)).resolve(ConfigErrors::default(), "edge-1").unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let app = runtime.block_on(App::start(config, Arc::new(|level: &str| Ok(level.to_owned())))).unwrap();
    let address = app.http().to_string();
    // The message of the condition, once metric and condition show the expected state.
    let shown = |name: &str, kind: &str, is_connected: bool| {
        let (_, metrics) = http::get(&address, "/metrics").ok()?;
        let (_, body) = http::get(&address, "/v1/status").ok()?;
        let (status, message) = condition(&serde_json::from_str(&body).ok()?, kind);
        let gauge = format!("lineside_{name}_connected {}\n", u8::from(is_connected));
        let expected = if is_connected { "True" } else { "False" };
        (metrics.contains(&gauge) && status == expected).then_some(message)
    };
    let connections = [("mqtt", "BrokerConnected", "publisher"), ("cluster", "ClusterConnected", "cluster-follower")];
    for (name, kind, _) in connections {
        until_long(&format!("{kind} to be true"), || shown(name, kind, true));
    }
    for (name, kind, task) in connections {
        // The task does not end, so that nothing but the missing heartbeats shows that it does not work.
        assert!(app.supervisor().inject_stall(task));
        let message = until_long(&format!("{kind} to be false"), || shown(name, kind, false));
        eprintln!("{task} stalled: {message}");
    }
    assert_eq!(app.supervisor().failure(), None);
    runtime.block_on(app.stop());
}

#[test]
fn a_stream_whose_frames_fail_is_not_up_and_does_not_take_readiness_away() {
    let site = TestSite::with_broker_and_stream(20);
    let folder = site.path("pictures");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("a.jpg"), b"not a picture").unwrap();
    let uri = format!("dir://{}?loop=true", folder.display());
    site.apply("stream.yaml", &stream_manifest("line-1", &uri, "parts", "  fps: 20\n"));
    let mut agent = site.start(&[]);
    let stream = |agent: &Agent| status(agent)["streams"][0].clone();
    agent.wait_for_event("stream_unhealthy");
    let down = until("the stream to be down", || Some(stream(&agent)).filter(|stream| stream["up"] == false));
    assert!(down["reason"].as_str().unwrap().starts_with("most of the last 20 frames failed, such as: "), "{down}");
    assert_eq!(agent.metric("lineside_stream_up{stream=\"line-1\"}"), 0.0);
    let (degraded, message) = condition(&status(&agent), "Degraded");
    assert!(degraded == "True" && message.contains("line-1"), "{message}");
    agent.wait_until_ready();
    // The camera delivers pictures again.
    fs::write(folder.join(".b"), frame("part-001-good.jpg")).unwrap();
    fs::rename(folder.join(".b"), folder.join("a.jpg")).unwrap();
    agent.wait_for_event("stream_recovered");
    agent.wait_for_metric_value("lineside_stream_up{stream=\"line-1\"}", 1.0);
    until_true("the status to show the stream up", || stream(&agent)["up"] == true);
    site.wait_for_new_results(5);
    assert!(agent.terminate().success());
}

#[test]
fn log_entries_of_one_kind_are_limited_and_counted() {
    const COMMANDS: usize = 3_000;
    let (folder, broker) = (tempfile::tempdir().unwrap(), Broker::start());
    let data = folder.path().join("data");
    let flags = ["--mqtt-commands", "pause"];
    let options = AgentOptions { manifests: folder.path(), data: &data, mqtt: &broker.url(), flags: &flags };
    let mut agent = Agent::start(&options);
    agent.wait_for_metric_value("lineside_mqtt_connected", 1.0);
    broker.publish_repeatedly("lineside/v1/plant/edge-1/cmd/pause/set", "{", COMMANDS);
    agent.wait_for_metric("lineside_mqtt_received_total{kind=\"command\",outcome=\"refused\"}", COMMANDS as f64);
    assert!(agent.terminate().success());
    let (logged, left_out) = until("every command to be logged or counted", || {
        let summaries = agent.events("logs_suppressed").into_iter().filter(|entry| entry["of"] == "command_failed");
        let left_out: u64 = summaries.filter_map(|entry| entry["count"].as_u64()).sum();
        let logged = agent.events("command_failed").len();
        (logged as u64 + left_out == COMMANDS as u64).then_some((logged, left_out))
    });
    eprintln!("{COMMANDS} invalid commands: {logged} log entries, {left_out} left out");
    assert!((20..100).contains(&logged), "{logged}");
}
