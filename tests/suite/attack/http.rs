//! Slow clients, stalled tasks and failing frames: what an operator sees over HTTP must be answered, and true.

use std::io::{Read as _, Write as _};
use std::net::TcpStream as StdTcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lineside_tests::agent::{Agent, AgentOptions};
use lineside_tests::broker::UNREACHABLE_BROKER;
use lineside_tests::http;
use lineside_tests::wait::{TIMEOUT, until_true};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;

/// Connections of the attack.
const SLOW_CLIENTS: usize = 2_000;
/// Probes of each listener during the attack.
const PROBES: usize = 200;
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

/// Sends probes one after another. Returns how many failed, and the longest time until a response.
fn probe(address: &str) -> (usize, Duration) {
    let (mut failed, mut worst) = (0, Duration::ZERO);
    for _ in 0..PROBES {
        let started = Instant::now();
        match http::get(address, "/livez") {
            Ok((200, _)) => worst = worst.max(started.elapsed()),
            _ => failed += 1,
        }
    }
    (failed, worst)
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
            let (failed, worst) = probe(probed);
            eprintln!(
                "attack on {name}, {} connections so far: {failed} of {PROBES} probes of {target} failed, \
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
