//! MQTT messages other than results, and authentication and failover between brokers.

use std::fs;

use lineside_tests::agent::Agent;
use lineside_tests::broker::{Broker, BrokerOptions};
use lineside_tests::certificates::Certificates;
use lineside_tests::paho::{Paho, check_sequence};
use lineside_tests::scripted_broker::{BrokerScript, ScriptedBroker};
use lineside_tests::site::TestSite;
use lineside_tests::wait::{until_long, until_true};
use serde_json::{Value, json};

use crate::results::check_schema;

const ALL: &str = "lineside/v1/plant/edge-1/#";

fn disconnect_reason(agent: &Agent) -> String {
    agent.wait_for_event("broker_disconnected")["reason"].as_str().unwrap().to_owned()
}

fn wait_for_connection(agent: &Agent) {
    until_long(&format!("a connection\n{:#?}", agent.logs()), || {
        (agent.metric("lineside_mqtt_connected") == 1.0).then_some(())
    });
}

#[test]
fn events_report_stream_and_model_changes_and_metrics_are_published() {
    let broker = Broker::start();
    let subscriber = Paho::start(&broker.connect_options(), ALL, None);
    let site = TestSite::with_stream(50);
    let mut agent = site.start_with_broker(&broker.url(), &["--mqtt-metrics-seconds", "1"]);
    subscriber.wait_for("/line-1/event", 1);
    let models = until_long("the event of the serving model", || {
        let models = subscriber.payloads("edge-1/event");
        models.iter().any(|event| event["state"] == "Ready").then_some(models)
    });
    site.delete("stream.yaml");
    let streams = subscriber.wait_for("/line-1/event", 2);
    let kinds: Vec<&str> = streams.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["StreamUp", "StreamDown"]);
    assert!(models.iter().all(|event| event["model"] == "parts" && event["version"] == 1));
    let all: Vec<Value> = models.into_iter().chain(streams).collect();
    check_schema("event.schema.json", &all);
    let metrics = subscriber.wait_for("edge-1/metrics", 3);
    check_schema("metrics.schema.json", &metrics);
    let inspections = |message: &Value| -> f64 {
        let series = message["series"].as_array().unwrap().iter();
        let mut found = series.filter(|series| series["name"] == "lineside_inference_requests_total");
        found
            .find(|series| series["labels"]["outcome"] == "ok")
            .map_or(0.0, |series| series["increase"].as_f64().unwrap())
    };
    let increases: f64 = metrics.iter().map(inspections).sum();
    assert!(increases > 0.0, "{increases}");
    assert!(agent.terminate().success());
    let qualities: Vec<_> = subscriber.messages().iter().map(|message| message["qos"].clone()).collect();
    assert!(qualities.iter().all(|qos| *qos == 1), "{qualities:?}");
}

#[test]
fn enabled_commands_are_executed_and_invalid_ones_are_answered() {
    let broker = Broker::start();
    let subscriber = Paho::start(&broker.connect_options(), ALL, None);
    let site = TestSite::with_stream(50);
    let flags = ["--mqtt-commands", "pause,resume,snapshot,log-level,reload"];
    let agent = site.start_with_broker(&broker.url(), &flags);
    subscriber.wait_for("/result", 5);
    let mut number = 0;
    let mut command = |name: &str, payload: &str| -> Value {
        number += 1;
        let payload = payload.replace("ID", &number.to_string());
        broker.publish(&format!("lineside/v1/plant/edge-1/cmd/{name}/set"), &payload, false);
        let id = number.to_string();
        until_long(&format!("the response to {name} {payload}"), || {
            let mut responses = subscriber.payloads("/state").into_iter();
            responses.find(|response| response["id"] == id.as_str())
        })
    };
    let paused = command("pause", r#"{"id":"ID","stream":"line-1"}"#);
    assert_eq!((&paused["ok"], &paused["paused"]), (&json!(true), &json!(["line-1"])));
    agent.wait_for_event("stream_stopped");
    let resumed = command("resume", r#"{"id":"ID","stream":"line-1"}"#);
    assert_eq!((&resumed["ok"], &resumed["paused"]), (&json!(true), &json!([])));
    until_true("the stream to restart", || agent.events("stream_started").len() == 2);
    let unknown = command("pause", r#"{"id":"ID","stream":"nobody"}"#);
    assert!(unknown["ok"] == false && unknown["error"].as_str().unwrap().contains("line-1"), "{unknown}");
    let level = command("log-level", r#"{"id":"ID","level":"error"}"#);
    assert_eq!(level["level"], "error");
    let logged = agent.logs().len();
    assert_eq!(command("pause", r#"{"id":"ID","stream":"line-1"}"#)["ok"], true);
    assert_eq!(command("resume", r#"{"id":"ID","stream":"line-1"}"#)["ok"], true);
    assert_eq!(agent.logs().len(), logged, "none of the commands logs an error");
    assert_eq!(command("log-level", r#"{"id":"ID","level":"=="}"#)["ok"], false);
    assert_eq!(command("log-level", r#"{"id":"ID","level":"info"}"#)["ok"], true);
    assert_eq!(command("reload", r#"{"id":"ID"}"#)["ok"], true);
    let snapshot = command("snapshot", r#"{"id":"ID","stream":"line-1"}"#);
    assert!(snapshot["image"].as_str().unwrap().starts_with("/9j/"), "a JPEG in base64");
    check_schema("command-state.schema.json", &subscriber.payloads("/state"));

    // Invalid and unknown commands are rejected and have no effect.
    let refused = "lineside_mqtt_received_total{kind=\"command\",outcome=\"refused\"}";
    let before = agent.metric(refused);
    for (name, payload) in
        [("pause", "{"), ("pause", "[1]"), ("reload", "{\"x\":1}"), ("explode", "{}"), ("pause", "{}")]
    {
        broker.publish(&format!("lineside/v1/plant/edge-1/cmd/{name}/set"), payload, false);
    }
    agent.wait_for_metric(refused, before + 5.0);
    broker.publish("lineside/v1/plant/edge-1/line-1/trigger", "{}", false);
    agent.wait_for_metric("lineside_mqtt_received_total{kind=\"trigger\",outcome=\"unused\"}", 1.0);
    let made = subscriber.count("/result");
    until_long("more results", || (subscriber.count("/result") > made + 10).then_some(()));
}

#[test]
fn commands_that_are_not_enabled_are_rejected() {
    let broker = Broker::start();
    let subscriber = Paho::start(&broker.connect_options(), ALL, None);
    let site = TestSite::with_stream(50);
    // A retained command is stale and must not be executed.
    broker.publish("lineside/v1/plant/edge-1/cmd/pause/set", r#"{"stream":"line-1"}"#, true);
    let agent = site.start_with_broker(&broker.url(), &[]);
    subscriber.wait_for("/result", 5);
    broker.publish("lineside/v1/plant/edge-1/cmd/pause/set", r#"{"stream":"line-1"}"#, false);
    let responses = subscriber.wait_for("/cmd/pause/state", 1);
    assert!(responses[0]["error"].as_str().unwrap().contains("--mqtt-commands"), "{responses:?}");
    assert_eq!(agent.metric("lineside_mqtt_received_total{kind=\"command\",outcome=\"stale\"}"), 1.0);
    assert!(agent.events("stream_stopped").is_empty());
}

#[test]
fn mutual_tls_works_and_certificates_are_rotated_without_a_restart() {
    let certificates = Certificates::new();
    let setup =
        BrokerOptions { tls: Some(certificates.clone()), client_certificates: true, ..BrokerOptions::default() };
    let broker = Broker::with(setup);
    let subscriber = Paho::start(&broker.connect_options(), ALL, None);
    let site = TestSite::with_stream(20);
    let secret = site.path("secret");
    fs::create_dir(&secret).unwrap();

    // A certificate of another authority: neither side trusts the other.
    Certificates::new().client_secret(&secret, 100);
    let agent = site.start_with_broker(&broker.url(), &["--mqtt-secret", secret.to_str().unwrap()]);
    let why = disconnect_reason(&agent);
    assert!(why.contains("certificate is not accepted") && why.contains("UnknownIssuer"), "{why}");

    // The client's own certificate has expired.
    certificates.client_secret(&secret, -1);
    until_long("the rejection by the broker", || {
        let entries = agent.events("broker_disconnected");
        entries
            .iter()
            .any(|entry| entry["reason"].as_str().unwrap().contains("does it accept our certificate"))
            .then_some(())
    });

    certificates.client_secret(&secret, 100);
    wait_for_connection(&agent);
    subscriber.wait_for("/result", 10);
    let first = agent.metric("lineside_mqtt_certificate_expiry_timestamp_seconds");
    assert!(first > 1.7e9, "{first}");
    // A certificate that is renewed while the previous one is still valid is used without a restart, and no result is
    // lost.
    certificates.client_secret(&secret, 200);
    agent.wait_for_event("broker_credentials_changed");
    agent.wait_for_metric("lineside_mqtt_certificate_expiry_timestamp_seconds", first + 86_400.0);
    wait_for_connection(&agent);
    let so_far = subscriber.results().len();
    let results = subscriber.wait_for("/result", so_far + 10);
    assert!(check_sequence(&results).gaps.is_empty());
    drop(broker);
}

#[test]
fn an_expired_server_certificate_is_rejected_until_it_is_renewed() {
    let certificates = Certificates::new();
    certificates.certify_server(-1);
    let mut broker = Broker::with(BrokerOptions { tls: Some(certificates.clone()), ..BrokerOptions::default() });
    let site = TestSite::with_stream(20);
    let secret = site.path("secret");
    fs::create_dir(&secret).unwrap();
    fs::copy(certificates.ca(), secret.join("ca.crt")).unwrap();
    let agent = site.start_with_broker(&broker.url(), &["--mqtt-secret", secret.to_str().unwrap()]);
    let why = disconnect_reason(&agent);
    assert!(why.contains("expired") || why.contains("Expired"), "{why}");
    certificates.certify_server(100);
    broker.restart();
    // The agent retries once any file of the secret changes; it need not be the certificate of the authority.
    fs::write(secret.join("username"), "line").unwrap();
    wait_for_connection(&agent);
}

#[test]
fn a_rejected_password_is_retried_rarely_and_a_new_one_immediately() {
    let scripted = ScriptedBroker::start(BrokerScript::RefuseConnect(5));
    let site = TestSite::with_stream(20);
    let secret = site.path("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("username"), "line\n").unwrap();
    fs::write(secret.join("password"), "wrong\n").unwrap();
    let agent = site.start_with_broker(&scripted.url(), &["--mqtt-secret", secret.to_str().unwrap()]);
    assert!(disconnect_reason(&agent).contains("refuses our user or password"));
    agent.wait_for_metric("lineside_frames_total{outcome=\"processed\",stream=\"line-1\"}", 60.0);
    assert_eq!(scripted.connections().len(), 1, "one attempt in half a minute");
    assert_eq!(scripted.connections()[0].user.as_deref(), Some("line"));
    scripted.set(BrokerScript::InOrder);
    fs::write(secret.join("password"), "right\n").unwrap();
    wait_for_connection(&agent);
    assert_eq!(scripted.connections().len(), 2);
    assert!(!format!("{:?}", agent.logs()).contains("wrong"), "passwords are never logged");
}

#[test]
fn a_broker_with_users_and_access_lists_is_supported() {
    let mut broker = Broker::with(BrokerOptions {
        users: vec![("kit".into(), "kit".into()), ("edge-1".into(), "secret word".into())],
        acl: Some("user kit\ntopic readwrite #\nuser edge-1\ntopic readwrite lineside/v1/plant/edge-1/#\n".into()),
        ..BrokerOptions::default()
    });
    let subscriber = Paho::start(&broker.connect_options(), "lineside/#", None);
    let site = TestSite::with_stream(20);
    let secret = site.path("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("username"), "edge-1").unwrap();
    fs::write(secret.join("password"), "secret word").unwrap();
    let mut agent = site.start_with_broker(&broker.url(), &["--mqtt-secret", secret.to_str().unwrap()]);
    subscriber.wait_for("/result", 5);
    assert!(agent.terminate().success());
    broker.stop();
}

#[test]
fn the_agent_fails_over_to_the_next_broker_and_returns_to_the_first() {
    let (mut first, second) = (Broker::start(), Broker::start());
    let at_second = Paho::start(&second.connect_options(), ALL, None);
    let url = format!("{},{}", first.url(), second.url());
    first.stop();
    let site = TestSite::with_stream(20);
    let mut agent = site.start_with_broker(&url, &[]);
    at_second.wait_for("/result", 10);
    assert_eq!(agent.metric("lineside_mqtt_broker_index"), 1.0);
    first.restart();
    let at_first = Paho::start(&first.connect_options(), ALL, None);
    until_long("results at the first broker", || (at_first.count("/result") > 10).then_some(()));
    assert_eq!(agent.metric("lineside_mqtt_broker_index"), 0.0);
    // The second broker has received the status `offline`.
    let states = at_second.payloads("/status");
    assert_eq!(states.last().unwrap()["state"], "offline");
    first.stop();
    let before = at_second.count("/result");
    until_long("results at the second broker", || (at_second.count("/result") > before + 10).then_some(()));
    let all: Vec<Value> = at_first.results().into_iter().chain(at_second.results()).collect();
    assert!(agent.terminate().success());
    // Each result was acknowledged by one of the brokers. Results that the first one had acknowledged before it was
    // killed may be lost with it.
    let summary = check_sequence(&all);
    let missing: u64 = summary.gaps.iter().map(|gap| gap.missing.end() - gap.missing.start() + 1).sum();
    assert!(missing <= 64, "{:?}", summary.gaps);
}

#[test]
fn home_assistant_discovery_follows_added_and_removed_streams() {
    let broker = Broker::start();
    let subscriber = Paho::start(&broker.connect_options(), "homeassistant/#", None);
    let site = TestSite::with_stream(20);
    let agent = site.start_with_broker(&broker.url(), &["--home-assistant", "homeassistant"]);
    let configs = subscriber.wait_for("/config", 3);
    assert!(configs.iter().all(|config| config["unique_id"].is_string() && config["device"]["identifiers"].is_array()));
    assert!(configs.iter().any(|config| config["state_topic"] == "lineside/v1/plant/edge-1/line-1/result"));
    // The camera's state is there for a consumer that subscribes late.
    let health = "lineside/v1/plant/edge-1/line-1/health";
    assert!(configs.iter().any(|config| config["state_topic"] == health));
    until_true("the stream to be up on the broker", || {
        let late = Paho::start(&broker.connect_options(), health, None);
        late.wait_for("/health", 1)[0]["up"] == true
    });
    site.delete("stream.yaml");
    agent.wait_for_event("stream_stopped");
    subscriber.wait_for("/config", 6);
    // No retained message of a removed stream remains.
    let late = Paho::start(&broker.connect_options(), "homeassistant/#", None);
    let fence = "homeassistant/fence";
    broker.publish(fence, "{}", false);
    late.wait_for("/fence", 1);
    assert!(late.payloads("/config").is_empty());
}
