//! Sparkplug B, checked from outside by another implementation of its format and a checker of its rules.

use lineside_tests::broker::Broker;
use lineside_tests::plant::{Plant, until_late};
use lineside_tests::sparkplug::{Capture, REBIRTH};
use serde_json::Value;

const FLAGS: [&str; 2] = ["--sparkplug-group", "plant"];

fn count(capture: &Capture, kind: &str) -> usize {
    let topic = format!("/{kind}/");
    capture.messages().iter().filter(|message| message["topic"].as_str().is_some_and(|at| at.contains(&topic))).count()
}

#[test]
fn a_node_is_born_speaks_is_born_again_and_dies_by_the_rules() {
    let mut broker = Broker::start();
    let capture = Capture::start(broker.port());
    let plant = Plant::playing(50);
    let mut agent = plant.start_at(&broker.url(), &FLAGS);
    until_late("data", || (count(&capture, "DDATA") > 300).then_some(()));
    broker.publish("spBv1.0/plant/NCMD/edge-1", REBIRTH, false);
    until_late("another birth", || (count(&capture, "NBIRTH") > 1).then_some(()));
    // A killed agent's death is said by the broker; what was made meanwhile comes marked as historical.
    agent.signal("KILL");
    agent.wait();
    until_late("a death", || (count(&capture, "NDEATH") > 0).then_some(()));
    let agent_again = plant.start_at(&broker.url(), &FLAGS);
    until_late("a third birth", || (count(&capture, "NBIRTH") > 2).then_some(()));
    agent_again.wait_for_metric("lineside_mqtt_results_published_total", 50.0);
    plant.withdraw("stream.yaml");
    until_late("the device's death", || (count(&capture, "DDEATH") > 0).then_some(()));
    let mut agent = agent_again;
    until_late("an empty spool", || (agent.metric("lineside_spool_records") == 0.0).then_some(()));
    assert!(agent.end().success());
    until_late("a second death", || (count(&capture, "NDEATH") > 1).then_some(()));
    let report = capture.check();
    assert_eq!(report["violations"], Value::Array(Vec::new()), "{report}");
    assert!(report["data"].as_u64().unwrap() > 300, "{report}");
    broker.stop();
}

#[test]
fn results_wait_for_the_primary_host_and_are_replayed_as_historical() {
    let broker = Broker::start();
    let capture = Capture::start(broker.port());
    let plant = Plant::playing(50);
    let mut agent = plant.start_at(&broker.url(), &[&FLAGS[..], &["--sparkplug-host", "scada"]].concat());
    let state = |online: bool, time: u64| format!("{{\"online\":{online},\"timestamp\":{time}}}");
    agent.wait_for_value("lineside_mqtt_connected", 1.0);
    agent.wait_for_metric("lineside_spool_records", 30.0);
    assert_eq!(count(&capture, "NBIRTH"), 0, "nobody listens yet");
    broker.publish("spBv1.0/STATE/scada", state(true, 1000), true);
    until_late("data", || (count(&capture, "DDATA") > 60).then_some(()));
    broker.publish("spBv1.0/STATE/scada", state(false, 2000), true);
    until_late("a death", || (count(&capture, "NDEATH") > 0).then_some(()));
    agent.wait_for_metric("lineside_spool_records", 30.0);
    broker.publish("spBv1.0/STATE/scada", state(true, 3000), true);
    until_late("another birth", || (count(&capture, "NBIRTH") > 1).then_some(()));
    plant.withdraw("stream.yaml");
    agent.wait_for_event("stream_stopped");
    until_late("an empty spool", || (agent.metric("lineside_spool_records") == 0.0).then_some(()));
    let made = agent.metric("lineside_frames_total{outcome=\"processed\",stream=\"line-1\"}") as usize;
    assert!(agent.end().success());
    let report = capture.check();
    assert_eq!(report["violations"], Value::Array(Vec::new()), "{report}");
    assert!(report["historical"].as_u64().unwrap() >= 30, "{report}");
    // Every result came, whole, in one of the metrics.
    let ids: std::collections::BTreeSet<String> = capture
        .messages()
        .iter()
        .flat_map(|message| message["payload"]["metrics"].as_array().cloned().unwrap_or_default())
        .filter_map(|metric| serde_json::from_str::<Value>(metric["value"].as_str()?).ok())
        .filter(|json| json["verdict"].is_string())
        .filter_map(|json| json["id"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(ids.len(), made);
}
