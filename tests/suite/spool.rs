//! The spool of a running agent: no result is lost when processes are killed, links are cut or disks are full. The
//! numbers of iterations are small here; `make experiments` sets larger ones.

use std::fs;
use std::time::{Duration, Instant};

use lineside_tests::agent::Agent;
use lineside_tests::broker::{Broker, BrokerOptions};
use lineside_tests::hostile::Random;
use lineside_tests::paho::{Paho, SequenceSummary, check_sequence};
use lineside_tests::process::output_text;
use lineside_tests::relay::{Mode, Relay};
use lineside_tests::scripted_broker::{BrokerScript, ScriptedBroker};
use lineside_tests::site::{TestSite, failed_inspections, folder_id, iterations, status};
use lineside_tests::stream_manifest;
use lineside_tests::wait::{until_long, until_true};
use serde_json::Value;

/// The maximum number of records in flight; this many may be sent twice per broken connection.
const SEND_WINDOW: usize = 64;
const PROCESSED: &str = "lineside_frames_total{outcome=\"processed\",stream=\"line-1\"}";
const RESULTS: &str = "lineside/v1/plant/edge-1/line-1/result";

fn pause(random: &mut Random, max_ms: usize) {
    std::thread::park_timeout(Duration::from_millis(random.below(max_ms) as u64));
}

/// Stops the stream after it has started, waits until every result has been received, and returns the sequence check.
fn drain_and_check(site: &TestSite, agent: &Agent, subscriber: &Paho) -> SequenceSummary {
    agent.wait_for_event("stream_started");
    site.delete("stream.yaml");
    agent.wait_for_event("stream_stopped");
    until_long("the spool to be empty", || (agent.metric("lineside_spool_records") == 0.0).then_some(()));
    let processed = agent.metric(PROCESSED) as u64;
    until_long("the last result", || {
        let summary = check_sequence(&subscriber.results());
        let last = summary.highest.iter().next_back().map_or(0, |(_, highest)| *highest);
        (last == processed).then_some(summary)
    })
}

/// The number of duplicates that the agent sent, without those of the broker.
fn duplicates_by_agent(subscriber: &Paho, summary: &SequenceSummary) -> usize {
    let by_broker = subscriber.messages().iter().filter(|message| message["dup"] == true).count();
    summary.duplicates.saturating_sub(by_broker)
}

/// Experiment 1: SIGKILL of the agent.
#[test]
fn repeated_agent_kills_lose_no_result() {
    let kills = iterations("LINESIDE_EXPERIMENT_AGENT_KILLS", 4);
    let broker = Broker::start();
    let subscriber = Paho::start(&broker.connect_options(), RESULTS, Some("line"));
    let site = TestSite::with_stream(100);
    let mut random = Random::new(1);
    for round in 0..kills {
        let mut agent = site.start_with_broker(&broker.url(), &[]);
        let before = subscriber.count("/result");
        until_long("results", || (subscriber.count("/result") > before + 20).then_some(()));
        pause(&mut random, 300);
        agent.signal("KILL");
        agent.wait();
        assert!(subscriber.count("/result") > before, "round {round}");
    }
    let agent = site.start_with_broker(&broker.url(), &[]);
    agent.wait_for_metric(PROCESSED, 20.0);
    let summary = drain_and_check(&site, &agent, &subscriber);
    assert!(summary.gaps.is_empty(), "{:?}", summary.gaps);
    assert_eq!(summary.highest.len() as u64, kills + 1, "one epoch per start");
    let duplicates = duplicates_by_agent(&subscriber, &summary);
    assert!(duplicates as u64 <= kills * SEND_WINDOW as u64, "{duplicates} duplicates in {kills} kills");
    eprintln!("{kills} kills of the agent: {} results, 0 lost, {duplicates} duplicates", summary.distinct);
}

/// Experiment 5: SIGKILL of the broker, with and without persistence.
#[test]
fn repeated_broker_kills_lose_no_result() {
    let kills = iterations("LINESIDE_EXPERIMENT_BROKER_KILLS", 3);
    for persistence in [false, true] {
        let mut broker = Broker::with(BrokerOptions { persistence, ..BrokerOptions::default() });
        let relay = Relay::start(broker.port());
        let subscriber = Paho::start(&broker.connect_options(), RESULTS, Some("line"));
        let site = TestSite::with_stream(100);
        let agent = site.start_with_broker(&relay.url(), &[]);
        let mut random = Random::new(5);
        for _ in 0..kills {
            let before = subscriber.count("/result");
            until_long("results", || (subscriber.count("/result") > before + 20).then_some(()));
            pause(&mut random, 200);
            let subscriptions = subscriber.subscriptions();
            if !persistence {
                // A broker without persistence would acknowledge results that no subscriber receives, so the agent must
                // wait.
                relay.set(Mode::Refuse);
            }
            broker.stop();
            broker.restart();
            until_long("the subscriber to reconnect", || (subscriber.subscriptions() > subscriptions).then_some(()));
            relay.set(Mode::Pass);
        }
        let summary = drain_and_check(&site, &agent, &subscriber);
        assert!(summary.gaps.is_empty(), "persistence {persistence}: {:?}", summary.gaps);
        let duplicates = duplicates_by_agent(&subscriber, &summary);
        assert!(duplicates as u64 <= kills * SEND_WINDOW as u64, "{duplicates} duplicates in {kills} kills");
        let results = summary.distinct;
        eprintln!(
            "{kills} kills of the broker, persistence {persistence}: {results} results, 0 lost, {duplicates} duplicates"
        );
    }
}

/// Experiment 6, scaled down: a link that is available half of the time.
#[test]
fn an_intermittent_link_loses_no_result() {
    let cycles = iterations("LINESIDE_EXPERIMENT_CYCLES", 2);
    let broker = Broker::start();
    let relay = Relay::start(broker.port());
    let subscriber = Paho::start(&broker.connect_options(), RESULTS, Some("line"));
    let site = TestSite::with_stream(50);
    let agent = site.start_with_broker(&relay.url(), &[]);
    for _ in 0..cycles {
        agent.wait_for_metric_value("lineside_mqtt_connected", 1.0);
        let processed = agent.metric(PROCESSED);
        agent.wait_for_metric(PROCESSED, processed + 75.0);
        relay.set(Mode::Refuse);
        let processed = agent.metric(PROCESSED);
        agent.wait_for_metric(PROCESSED, processed + 100.0);
        let backlog = agent.metric("lineside_spool_records");
        relay.set(Mode::Pass);
        agent.wait_for_metric_value("lineside_mqtt_connected", 1.0);
        let started = Instant::now();
        until_long("the backlog to be drained", || (agent.metric("lineside_spool_records") < 5.0).then_some(()));
        eprintln!("a backlog of {backlog} results was drained in {:?} at 50 new results per second", started.elapsed());
    }
    let summary = drain_and_check(&site, &agent, &subscriber);
    assert!(summary.gaps.is_empty(), "{:?}", summary.gaps);
    assert_eq!(failed_inspections(&agent), 0.0);
}

/// Experiment 8: the number of processed frames equals the number of delivered and dropped results.
#[test]
fn a_full_spool_counts_exactly_what_it_drops() {
    let mut broker = Broker::start();
    let url = broker.url();
    broker.stop();
    let site = TestSite::with_stream(0);
    let agent = site.start_with_broker(&url, &["--spool-mib", "1", "--mqtt-metrics-seconds", "0"]);
    let dropped = "lineside_spool_dropped_total{reason=\"full\"}";
    agent.wait_for_metric(dropped, 300.0);
    until_long("the condition SpoolFull", || {
        status(&agent)["conditions"].to_string().contains("SpoolFull").then_some(())
    });
    site.delete("stream.yaml");
    agent.wait_for_event("stream_stopped");
    broker.restart();
    let subscriber = Paho::start(&broker.connect_options(), RESULTS, None);
    // The agent may have published before the subscriber connected, so its own counter is used.
    until_long("the spool to be empty", || (agent.metric("lineside_spool_records") == 0.0).then_some(()));
    let delivered = agent.metric("lineside_mqtt_results_published_total");
    assert_eq!(agent.metric(PROCESSED), delivered + agent.metric(dropped));
    drop(subscriber);
}

/// Experiment 9: a full disk.
#[test]
fn a_full_disk_degrades_the_spool_until_space_is_available() {
    let site = TestSite::with_stream(50);
    let data = site.data();
    fs::create_dir_all(&data).unwrap();
    let mount = |arguments: &[&str]| std::process::Command::new("mount").args(arguments).output();
    let mounted = mount(&["-t", "tmpfs", "-o", "size=8m", "tmpfs", data.to_str().unwrap()]);
    if !mounted.is_ok_and(|output| output.status.success()) {
        return eprintln!("skipped: mounting a file system is not permitted");
    }
    struct Unmount(std::path::PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            drop(std::process::Command::new("umount").arg("-l").arg(&self.0).status());
        }
    }
    let _unmount = Unmount(data.clone());
    let mut broker = Broker::start();
    let url = broker.url();
    let subscriber = Paho::start(&broker.connect_options(), RESULTS, Some("line"));
    broker.stop();
    let mut agent = site.start_with_broker(&url, &["--spool-sync-ms", "20"]);
    agent.wait_for_metric(PROCESSED, 20.0);
    let filler = data.join("filler");
    drop(fs::write(&filler, vec![0; 16 << 20]).unwrap_err());
    agent.wait_for_metric_value("lineside_spool_degraded", 1.0);
    until_true("the status to report the spool", || status(&agent)["conditions"].to_string().contains("SpoolDegraded"));
    let processed = agent.metric(PROCESSED);
    agent.wait_for_metric(PROCESSED, processed + 50.0);
    fs::remove_file(&filler).unwrap();
    agent.wait_for_metric_value("lineside_spool_degraded", 0.0);
    assert_eq!(agent.metric("lineside_spool_dropped_total{reason=\"disk\"}"), 0.0);
    assert_eq!(agent.events("spool_disk_failed").len(), 1);
    // The records that were held in memory are on disk now, so they outlast the process.
    let processed = agent.metric(PROCESSED);
    agent.wait_for_metric(PROCESSED, processed + 20.0);
    agent.signal("KILL");
    agent.wait();
    broker.restart();
    until_long("the subscriber to reconnect", || (subscriber.subscriptions() > 1).then_some(()));
    let again = site.start_with_broker(&url, &[]);
    let summary = drain_and_check(&site, &again, &subscriber);
    assert!(summary.gaps.is_empty(), "{:?}", summary.gaps);
}

/// Experiment 10: a link that delivers nothing and is not closed.
#[test]
fn a_silent_broker_is_detected_and_disconnected() {
    let broker = Broker::start();
    let relay = Relay::start(broker.port());
    let site = TestSite::with_stream(20);
    let subscriber = Paho::start(&broker.connect_options(), RESULTS, Some("line"));
    let agent = site.start_with_broker(&relay.url(), &["--mqtt-keep-alive-seconds", "2"]);
    subscriber.wait_for("/result", 10);
    relay.set(Mode::Hold);
    let started = Instant::now();
    agent.wait_for_event("broker_disconnected");
    eprintln!("a silent broker was detected after {:?} with a keep-alive of 2 s", started.elapsed());
    relay.set(Mode::Refuse);
    relay.set(Mode::Pass);
    let summary = drain_and_check(&site, &agent, &subscriber);
    assert!(summary.gaps.is_empty(), "{:?}", summary.gaps);
}

/// Experiment 11: a broker that violates the protocol.
#[test]
fn broker_protocol_violations_do_not_block_the_publisher() {
    for script in [
        BrokerScript::Reversed(8),
        BrokerScript::Twice,
        BrokerScript::SkipOne,
        BrokerScript::Never,
        BrokerScript::Garbage,
        BrokerScript::WrongIdentifiers,
        BrokerScript::SilentConnect,
    ] {
        let broker = ScriptedBroker::start(script);
        let relay = Relay::start(broker.port());
        let site = TestSite::with_stream(50);
        let agent = site.start_with_broker(&relay.url(), &["--mqtt-keep-alive-seconds", "2"]);
        agent.wait_for_metric(PROCESSED, 150.0);
        if !matches!(script, BrokerScript::Reversed(_) | BrokerScript::Twice) {
            // The agent detects the violation: it reconnects before the broker behaves correctly again.
            until_long(&format!("another connection, {script:?}"), || (broker.connections().len() > 1).then_some(()));
        }
        broker.set(BrokerScript::InOrder);
        site.delete("stream.yaml");
        agent.wait_for_event("stream_stopped");
        until_long(&format!("the spool to be empty, {script:?}"), || {
            (agent.metric("lineside_spool_records") == 0.0).then_some(())
        });
        let acknowledged = broker.acknowledged();
        let results = acknowledged.iter().filter(|message| message.topic.ends_with("/result"));
        let results: Vec<Value> = results.map(|message| serde_json::from_slice(&message.payload).unwrap()).collect();
        let summary = check_sequence(&results);
        assert!(summary.gaps.is_empty(), "{script:?}: {:?}", summary.gaps);
        assert_eq!(summary.distinct as f64, agent.metric(PROCESSED), "{script:?}");
    }
}

/// Experiment 12, without measuring time: a link of 1 KB/s delays no frame.
#[test]
fn a_slow_link_does_not_delay_frames() {
    let broker = Broker::start();
    let relay = Relay::start(broker.port());
    relay.throttle(Some(1000));
    let site = TestSite::with_stream(100);
    let agent = site.start_with_broker(&relay.url(), &[]);
    agent.wait_for_metric(PROCESSED, 300.0);
    let skipped = agent.metric("lineside_frames_total{outcome=\"skipped\",stream=\"line-1\"}");
    assert!(agent.metric("lineside_spool_records") > 50.0, "most results are spooled");
    eprintln!("over 1 KB/s: {skipped} frames skipped of {}", agent.metric(PROCESSED));
}

/// Experiment 14: a clean shutdown at full speed.
#[test]
fn a_clean_shutdown_at_full_speed_loses_no_result() {
    let broker = Broker::start();
    let subscriber = Paho::start(&broker.connect_options(), RESULTS, Some("line"));
    let site = TestSite::with_stream(0);
    for _ in 0..2 {
        let mut agent = site.start_with_broker(&broker.url(), &[]);
        agent.wait_for_metric(PROCESSED, 100.0);
        let started = Instant::now();
        assert!(agent.terminate().success());
        eprintln!("the shutdown took {:?}", started.elapsed());
    }
    let agent = site.start_with_broker(&broker.url(), &[]);
    let summary = drain_and_check(&site, &agent, &subscriber);
    assert!(summary.gaps.is_empty(), "{:?}", summary.gaps);
    assert_eq!(duplicates_by_agent(&subscriber, &summary), 0, "a clean shutdown causes no duplicates");
}

#[test]
fn the_spool_command_lists_exports_and_purges_records() {
    let site = TestSite::with_stream(50);
    let mut agent = site.start(&[]);
    agent.wait_for_metric(PROCESSED, 30.0);
    let json = |arguments: &[&str]| -> Value {
        let output = site.spool(arguments);
        assert!(output.status.success(), "{}", output_text(&output));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", output_text(&output)))
    };
    // While the agent runs, the spool can be read but not purged.
    let partitions = json(&["stat", "--json"]);
    assert!(partitions["partitions"][0]["records"].as_u64().unwrap() >= 20, "{partitions}");
    let purge = site.spool(&["purge", "--yes"]);
    assert!(
        !purge.status.success() && output_text(&purge).contains(&format!("process {} (edge-1)", agent.pid())),
        "{}",
        output_text(&purge)
    );
    assert!(agent.terminate().success());
    let first_id = format!("edge-1:{}.1:1", folder_id(&site.data()));
    let processed = agent.events("records_left_in_spool")[0]["records"].as_u64().unwrap();

    let table = site.spool(&["ls", "--limit", "3"]);
    assert!(
        output_text(&table).contains(&format!("{first_id} ")) && output_text(&table).lines().count() == 4,
        "{}",
        output_text(&table)
    );
    let exported = site.path("saved.jsonl");
    site.spool(&["export", exported.to_str().unwrap()]);
    let lines = fs::read_to_string(&exported).unwrap();
    assert_eq!(lines.lines().count() as u64, processed);
    let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!((&first["topic"], &first["payload"]["id"]), (&RESULTS.into(), &first_id.into()));

    let unconfirmed = site.spool(&["purge"]);
    assert_eq!(unconfirmed.status.code(), Some(64));
    assert!(output_text(&unconfirmed).contains("--yes"), "{}", output_text(&unconfirmed));
    let events = json(&["purge", "--kind", "event", "--yes", "--json"])["purged"].as_u64().unwrap();
    let rest = json(&["purge", "--yes", "--json"])["purged"].as_u64().unwrap();
    assert!(events >= 2 && events + rest == processed, "{events} + {rest} of {processed}");
    let empty = site.spool(&["export", "-"]);
    assert!(empty.status.success() && empty.stdout.is_empty());
    let missing = lineside_tests::agent::lineside(&["spool", "stat", "--data-dir", "/no/such/folder"]);
    assert!(output_text(&missing).contains("does not contain a spool"), "{}", output_text(&missing));
}

#[test]
fn report_by_exception_publishes_only_changes() {
    let broker = Broker::start();
    let subscriber = Paho::start(&broker.connect_options(), RESULTS, None);
    let site = TestSite::with_stream(50);
    let frames = format!("dir://{}?loop=true", lineside_tests::example("frames").display());
    let report = "  fps: 50\n  report: {byException: true, deadband: 1.0, heartbeatSeconds: 3600}\n";
    site.apply("stream.yaml", &stream_manifest("line-1", &frames, "parts", report));
    let agent = site.start_with_broker(&broker.url(), &[]);
    let suppressed = "lineside_results_suppressed_total{stream=\"line-1\"}";
    agent.wait_for_metric(suppressed, 40.0);
    let results = subscriber.wait_for("/result", 10);
    let label = |result: &Value| result["classes"][0]["label"].clone();
    assert!(results.windows(2).all(|pair| label(&pair[0]) != label(&pair[1])), "only changes are published");
    assert!(check_sequence(&results).gaps.is_empty(), "suppressed results have no sequence number");
}
