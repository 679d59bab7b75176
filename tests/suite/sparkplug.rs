//! Sparkplug B, decoded by an independent implementation and checked against the rules of the specification.

use lineside_tests::broker::Broker;
use lineside_tests::site::TestSite;
use lineside_tests::sparkplug::{Capture, REBIRTH};
use lineside_tests::wait::until_long;
use serde_json::Value;

const FLAGS: [&str; 2] = ["--sparkplug-group", "plant"];

fn count(capture: &Capture, kind: &str) -> usize {
    let topic = format!("/{kind}/");
    capture.messages().iter().filter(|message| message["topic"].as_str().is_some_and(|at| at.contains(&topic))).count()
}

#[test]
fn births_data_rebirths_and_deaths_follow_the_specification() {
    let mut broker = Broker::start();
    let capture = Capture::start(broker.port());
    let site = TestSite::with_stream(50);
    let mut agent = site.start_with_broker(&broker.url(), &FLAGS);
    until_long("data", || (count(&capture, "DDATA") > 300).then_some(()));
    broker.publish("spBv1.0/plant/NCMD/edge-1", REBIRTH, false);
    until_long("another birth", || (count(&capture, "NBIRTH") > 1).then_some(()));
    // The broker publishes the death of a killed agent as its will; results of the outage are marked as historical.
    agent.signal("KILL");
    agent.wait();
    until_long("a death", || (count(&capture, "NDEATH") > 0).then_some(()));
    let agent_again = site.start_with_broker(&broker.url(), &FLAGS);
    until_long("a third birth", || (count(&capture, "NBIRTH") > 2).then_some(()));
    agent_again.wait_for_metric("lineside_mqtt_results_published_total", 50.0);
    site.delete("stream.yaml");
    until_long("the device's death", || (count(&capture, "DDEATH") > 0).then_some(()));
    let mut agent = agent_again;
    until_long("an empty spool", || (agent.metric("lineside_spool_records") == 0.0).then_some(()));
    assert!(agent.terminate().success());
    until_long("a second death", || (count(&capture, "NDEATH") > 1).then_some(()));
    let report = capture.check();
    assert_eq!(report["violations"], Value::Array(Vec::new()), "{report}");
    assert!(report["data"].as_u64().unwrap() > 300, "{report}");
    broker.stop();
}

#[test]
fn results_wait_for_the_primary_host_and_are_replayed_as_historical() {
    let broker = Broker::start();
    let capture = Capture::start(broker.port());
    let site = TestSite::with_stream(50);
    let mut agent = site.start_with_broker(&broker.url(), &[&FLAGS[..], &["--sparkplug-host", "scada"]].concat());
    let state = |online: bool, time: u64| format!("{{\"online\":{online},\"timestamp\":{time}}}");
    agent.wait_for_metric_value("lineside_mqtt_connected", 1.0);
    agent.wait_for_metric("lineside_spool_records", 30.0);
    assert_eq!(count(&capture, "NBIRTH"), 0, "the primary host is not online yet");
    broker.publish("spBv1.0/STATE/scada", state(true, 1000), true);
    until_long("data", || (count(&capture, "DDATA") > 60).then_some(()));
    broker.publish("spBv1.0/STATE/scada", state(false, 2000), true);
    until_long("a death", || (count(&capture, "NDEATH") > 0).then_some(()));
    agent.wait_for_metric("lineside_spool_records", 30.0);
    broker.publish("spBv1.0/STATE/scada", state(true, 3000), true);
    until_long("another birth", || (count(&capture, "NBIRTH") > 1).then_some(()));
    site.delete("stream.yaml");
    agent.wait_for_event("stream_stopped");
    until_long("an empty spool", || (agent.metric("lineside_spool_records") == 0.0).then_some(()));
    let processed = agent.metric("lineside_frames_total{outcome=\"processed\",stream=\"line-1\"}") as usize;
    assert!(agent.terminate().success());
    let report = capture.check();
    assert_eq!(report["violations"], Value::Array(Vec::new()), "{report}");
    assert!(report["historical"].as_u64().unwrap() >= 30, "{report}");
    // Every result was received, complete, as the value of one metric.
    let ids: std::collections::BTreeSet<String> = capture
        .messages()
        .iter()
        .flat_map(|message| message["payload"]["metrics"].as_array().cloned().unwrap_or_default())
        .filter_map(|metric| serde_json::from_str::<Value>(metric["value"].as_str()?).ok())
        .filter(|json| json["verdict"].is_string())
        .filter_map(|json| json["id"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(ids.len(), processed);
}
