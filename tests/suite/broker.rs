//! A broker that comes and goes.

use std::fs;

use lineside_tests::agent::{Agent, Start};
use lineside_tests::broker::{Broker, Subscriber};
use lineside_tests::paho::{Paho, check_sequence};
use lineside_tests::plant::status;
use lineside_tests::relay::{Mode, Relay};
use lineside_tests::wait::until_true;
use lineside_tests::{example, model_manifest, stream_manifest};
use tempfile::TempDir;

use crate::results::example_once;

fn looping() -> TempDir {
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
    Agent::start(&Start {
        manifests: &folder.path().join("manifests"),
        data: &folder.path().join("data"),
        mqtt,
        flags: &[],
    })
}

#[test]
fn a_broker_that_stops_and_starts_gets_every_result_and_is_complained_about_once() {
    let mut broker = Broker::start();
    let relay = Relay::start(broker.port());
    let subscriber = Paho::start(&broker.access(), "lineside/v1/plant/edge-1/#", Some("line"));
    let folder = looping();
    let mut agent = agent(&folder, &relay.url());
    subscriber.wait_for("/line-1/result", 20);
    let processed = "lineside_frames_total{outcome=\"processed\",stream=\"line-1\"}";

    for round in 1..=2usize {
        relay.set(Mode::Refuse);
        broker.stop();
        agent.wait_for_value("lineside_mqtt_connected", 0.0);
        let at_stop = agent.metric(processed);
        agent.wait_for_metric(processed, at_stop + 30.0);
        assert!(agent.metric("lineside_spool_records") >= 25.0, "the line goes on and its results wait");
        broker.restart();
        // The agent must not be faster than the subscriber: the broker has forgotten both.
        until_true("the subscriber to be back", || subscriber.subscriptions() > round);
        relay.set(Mode::Pass);
        agent.wait_for_value("lineside_mqtt_connected", 1.0);
        let made = agent.metric(processed) as usize;
        let results = subscriber.wait_for("/line-1/result", made);
        until_true("every result", || check_sequence(&subscriber.results()).gaps.is_empty());
        let late = results.iter().filter(|result| result["historical"] == true).count();
        assert!(late >= 25, "what was made meanwhile says so: {late} of {}", results.len());
        assert_eq!(agent.events("broker_disconnected").len(), round, "{:#?}", agent.logs());
        assert_eq!(agent.events("broker_connected").len(), round + 1);
    }
    // Live results are in order among themselves, and so are late ones of one outage.
    let live: Vec<u64> = subscriber
        .results()
        .iter()
        .filter(|result| result["historical"] == false)
        .map(|result| result["seq"].as_u64().unwrap())
        .collect();
    assert!(live.is_sorted(), "{live:?}");
    assert_eq!(agent.metric("lineside_spool_dropped_total{reason=\"full\"}"), 0.0);
    assert!(agent.end().success());
}

#[test]
fn a_broker_that_is_never_there_stops_nothing() {
    let folder = looping();
    let mut agent = agent(&folder, "mqtt://127.0.0.1:1");
    agent.wait_ready();
    agent.wait_for_metric("lineside_frames_total{outcome=\"processed\",stream=\"line-1\"}", 10.0);
    assert_eq!(agent.events("broker_disconnected").len(), 1, "{:#?}", agent.logs());
    assert!(agent.is_running());
    assert!(agent.end().success());
    assert_eq!(agent.events("records_left_in_spool").len(), 1);
}

#[test]
fn the_broker_says_offline_for_an_agent_that_vanished() {
    let broker = Broker::start();
    let folder = looping();
    let mut agent = agent(&folder, &broker.url());
    let subscriber = broker.subscribe("lineside/v1/plant/edge-1/status");
    subscriber.wait_for("/status", 1);
    // Whoever comes later is told too, by the message the broker has kept.
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
fn a_full_spool_drops_the_oldest_and_counts_them() {
    let mut broker = Broker::start();
    let folder = looping();
    let manifests = folder.path().join("manifests");
    let data = folder.path().join("data");
    let url = broker.url();
    broker.stop();
    let start = Start { manifests: &manifests, data: &data, mqtt: &url, flags: &["--spool-mib", "1"] };
    let text = fs::read_to_string(manifests.join("all.yaml")).unwrap().replace("fps: 50", "fps: 0");
    fs::write(manifests.join("all.yaml"), text).unwrap();
    let mut agent = Agent::start(&start);
    agent.wait_for_metric("lineside_spool_dropped_total{reason=\"full\"}", 100.0);
    assert!(agent.metric("lineside_spool_bytes") <= f64::from(1 << 20));
    until_true("the condition", || status(&agent)["conditions"].to_string().contains("SpoolFull"));
    broker.restart();
    let subscriber = broker.subscribe("lineside/v1/plant/edge-1/#");
    let results = subscriber.wait_for("/line-1/result", 200);
    assert!(results[0]["seq"].as_u64().unwrap() > 100, "the oldest are the ones that are gone");
    assert!(agent.end().success());
}

#[test]
fn the_end_waits_for_the_broker_to_take_what_is_left() {
    let broker = Broker::start();
    let subscriber: Subscriber = broker.subscribe("lineside/v1/plant/edge-1/#");
    let folder = example_once("");
    let mut agent = agent(&folder, &broker.url());
    subscriber.wait_for("/line-1/result", 5);
    assert!(agent.end().success());
    let lines = agent.logs();
    assert!(agent.events("records_left_in_spool").is_empty(), "{lines:#?}");
    let messages = subscriber.messages();
    let published = messages.iter().filter(|message| message.topic.ends_with("/result")).count() as u64;
    subscriber.wait_for("edge-1/status", 2);
    let results = subscriber.payloads("/line-1/result");
    assert_eq!(results.last().unwrap()["seq"].as_u64(), Some(results.len() as u64), "{published} had come at the end");
}
