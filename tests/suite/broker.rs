//! Broker outages, the will, and the spool's limit.

use std::fs;

use lineside_tests::agent::{Agent, AgentOptions};
use lineside_tests::broker::{Broker, Subscriber, UNREACHABLE_BROKER};
use lineside_tests::paho::{Paho, check_sequence};
use lineside_tests::relay::{Mode, Relay};
use lineside_tests::site::status;
use lineside_tests::wait::until_true;
use lineside_tests::{example, model_manifest, stream_manifest};
use tempfile::TempDir;

use crate::results::example_once;

fn looping_example() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("manifests")).unwrap();
    let text = model_manifest("parts", 1, &format!("file://{}", example("surface-defects.onnx").display()), "")
        + "---\n"
        + &stream_manifest(
            "line-1",
            &format!("dir://{}?loop=true", example("frames").display()),
            "parts",
            "  fps: 50\n",
        );
    fs::write(folder.path().join("manifests/all.yaml"), text).unwrap();
    folder
}

fn agent(folder: &TempDir, mqtt: &str) -> Agent {
    Agent::start(&AgentOptions {
        manifests: &folder.path().join("manifests"),
        data: &folder.path().join("data"),
        mqtt,
        flags: &[],
    })
}

#[test]
fn every_result_survives_a_broker_restart_and_each_outage_is_logged_once() {
    let mut broker = Broker::start();
    let relay = Relay::start(broker.port());
    let subscriber = Paho::start(&broker.connect_options(), "lineside/v1/plant/edge-1/#", Some("line"));
    let folder = looping_example();
    let mut agent = agent(&folder, &relay.url());
    subscriber.wait_for("/line-1/result", 20);
    let processed = "lineside_frames_total{outcome=\"processed\",stream=\"line-1\"}";

    for round in 1..=2usize {
        relay.set(Mode::Refuse);
        broker.stop();
        agent.wait_for_metric_value("lineside_mqtt_connected", 0.0);
        let at_stop = agent.metric(processed);
        agent.wait_for_metric(processed, at_stop + 30.0);
        assert!(agent.metric("lineside_spool_records") >= 25.0, "inference continues and results are spooled");
        broker.restart();
        // The subscriber must reconnect before the agent, because the broker has lost the sessions of both.
        until_true("the subscriber to reconnect", || subscriber.subscriptions() > round);
        relay.set(Mode::Pass);
        agent.wait_for_metric_value("lineside_mqtt_connected", 1.0);
        let made = agent.metric(processed) as usize;
        let results = subscriber.wait_for("/line-1/result", made);
        until_true("every result", || check_sequence(&subscriber.results()).gaps.is_empty());
        let late = results.iter().filter(|result| result["historical"] == true).count();
        assert!(late >= 25, "results of the outage are marked as historical: {late} of {}", results.len());
        assert_eq!(agent.events("broker_disconnected").len(), round, "{:#?}", agent.logs());
        assert_eq!(agent.events("broker_connected").len(), round + 1);
    }
    // Live results arrive in order, and so do the late ones of one outage.
    let live: Vec<u64> = subscriber
        .results()
        .iter()
        .filter(|result| result["historical"] == false)
        .map(|result| result["seq"].as_u64().unwrap())
        .collect();
    assert!(live.is_sorted(), "{live:?}");
    assert_eq!(agent.metric("lineside_spool_dropped_total{reason=\"full\"}"), 0.0);
    assert!(agent.terminate().success());
}

#[test]
fn an_unreachable_broker_does_not_stop_inference() {
    let folder = looping_example();
    let mut agent = agent(&folder, UNREACHABLE_BROKER);
    agent.wait_until_ready();
    agent.wait_for_metric("lineside_frames_total{outcome=\"processed\",stream=\"line-1\"}", 10.0);
    assert_eq!(agent.events("broker_disconnected").len(), 1, "{:#?}", agent.logs());
    assert!(agent.is_running());
    assert!(agent.terminate().success());
    assert_eq!(agent.events("records_left_in_spool").len(), 1);
}

#[test]
fn the_mqtt_will_reports_a_killed_agent_as_offline() {
    let broker = Broker::start();
    let folder = looping_example();
    let mut agent = agent(&folder, &broker.url());
    let subscriber = broker.subscribe("lineside/v1/plant/edge-1/status");
    subscriber.wait_for("/status", 1);
    // A later subscriber receives the status as a retained message.
    let late = broker.subscribe("lineside/v1/plant/edge-1/status");
    late.wait_for("/status", 1);
    assert!(late.messages()[0].retained);
    assert_eq!(late.messages()[0].payload["state"], "online");
    agent.signal("KILL");
    agent.wait();
    let states: Vec<_> = subscriber.wait_for("/status", 2).iter().map(|status| status["state"].clone()).collect();
    assert_eq!(states.last().unwrap(), "offline");
}

#[test]
fn a_full_spool_drops_the_oldest_records_and_counts_them() {
    let mut broker = Broker::start();
    let folder = looping_example();
    let manifests = folder.path().join("manifests");
    let data = folder.path().join("data");
    let url = broker.url();
    broker.stop();
    let start = AgentOptions { manifests: &manifests, data: &data, mqtt: &url, flags: &["--spool-mib", "1"] };
    let text = fs::read_to_string(manifests.join("all.yaml")).unwrap().replace("fps: 50", "fps: 0");
    fs::write(manifests.join("all.yaml"), text).unwrap();
    let mut agent = Agent::start(&start);
    agent.wait_for_metric("lineside_spool_dropped_total{reason=\"full\"}", 100.0);
    assert!(agent.metric("lineside_spool_bytes") <= f64::from(1 << 20));
    until_true("the condition SpoolFull", || status(&agent)["conditions"].to_string().contains("SpoolFull"));
    broker.restart();
    let subscriber = broker.subscribe("lineside/v1/plant/edge-1/#");
    let results = subscriber.wait_for("/line-1/result", 200);
    assert!(results[0]["seq"].as_u64().unwrap() > 100, "the oldest records are dropped");
    assert!(agent.terminate().success());
}

#[test]
fn shutdown_waits_until_the_broker_has_acknowledged_the_spool() {
    let broker = Broker::start();
    let subscriber: Subscriber = broker.subscribe("lineside/v1/plant/edge-1/#");
    let folder = example_once("");
    let mut agent = agent(&folder, &broker.url());
    subscriber.wait_for("/line-1/result", 5);
    assert!(agent.terminate().success());
    let lines = agent.logs();
    assert!(agent.events("records_left_in_spool").is_empty(), "{lines:#?}");
    let messages = subscriber.messages();
    let published = messages.iter().filter(|message| message.topic.ends_with("/result")).count() as u64;
    subscriber.wait_for("edge-1/status", 2);
    let results = subscriber.payloads("/line-1/result");
    assert_eq!(
        results.last().unwrap()["seq"].as_u64(),
        Some(results.len() as u64),
        "{published} were received at the exit"
    );
}
