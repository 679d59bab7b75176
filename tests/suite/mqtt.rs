//! What the agent says and hears on MQTT besides results, and how it gets in at brokers.

use std::fs;

use lineside_tests::agent::Agent;
use lineside_tests::broker::{Broker, Setup};
use lineside_tests::certificates::Certificates;
use lineside_tests::paho::{Paho, check_sequence};
use lineside_tests::plant::{Plant, until_late};
use lineside_tests::scripted_broker::{Script, ScriptedBroker};
use lineside_tests::wait::until_true;
use serde_json::{Value, json};

use crate::results::check_schema;

const ALL: &str = "lineside/v1/plant/edge-1/#";

fn reason(agent: &Agent) -> String {
    agent.wait_for_event("broker_disconnected")["reason"].as_str().unwrap().to_owned()
}

fn connected(agent: &Agent) {
    until_late(&format!("a connection\n{:#?}", agent.logs()), || {
        (agent.metric("lineside_mqtt_connected") == 1.0).then_some(())
    });
}

#[test]
fn events_tell_of_streams_and_models_and_metrics_of_how_things_stand() {
    let broker = Broker::start();
    let subscriber = Paho::start(&broker.access(), ALL, None);
    let plant = Plant::playing(50);
    let mut agent = plant.start_at(&broker.url(), &["--mqtt-metrics-seconds", "1"]);
    subscriber.wait_for("/line-1/event", 1);
    plant.withdraw("stream.yaml");
    let streams = subscriber.wait_for("/line-1/event", 2);
    let kinds: Vec<&str> = streams.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["StreamUp", "StreamDown"]);
    let models = subscriber.payloads("edge-1/event");
    let states: Vec<&str> = models.iter().map(|event| event["state"].as_str().unwrap()).collect();
    assert!(states.contains(&"Ready"), "{states:?}");
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
    assert!(agent.end().success());
    let qualities: Vec<_> = subscriber.messages().iter().map(|message| message["qos"].clone()).collect();
    assert!(qualities.iter().all(|qos| *qos == 1), "{qualities:?}");
}

#[test]
fn commands_are_carried_out_as_far_as_they_are_allowed() {
    let broker = Broker::start();
    let subscriber = Paho::start(&broker.access(), ALL, None);
    let plant = Plant::playing(50);
    let flags = ["--mqtt-commands", "pause,resume,snapshot,log-level,reload"];
    let agent = plant.start_at(&broker.url(), &flags);
    subscriber.wait_for("/result", 5);
    let mut number = 0;
    let mut command = |name: &str, payload: &str| -> Value {
        number += 1;
        let payload = payload.replace("ID", &number.to_string());
        broker.publish(&format!("lineside/v1/plant/edge-1/cmd/{name}/set"), &payload, false);
        let id = number.to_string();
        until_late(&format!("the answer to {name} {payload}"), || {
            let mut answers = subscriber.payloads("/state").into_iter();
            answers.find(|answer| answer["id"] == id.as_str())
        })
    };
    let paused = command("pause", r#"{"id":"ID","stream":"line-1"}"#);
    assert_eq!((&paused["ok"], &paused["paused"]), (&json!(true), &json!(["line-1"])));
    agent.wait_for_event("stream_stopped");
    let resumed = command("resume", r#"{"id":"ID","stream":"line-1"}"#);
    assert_eq!((&resumed["ok"], &resumed["paused"]), (&json!(true), &json!([])));
    until_true("the stream to be back", || agent.events("stream_started").len() == 2);
    let unknown = command("pause", r#"{"id":"ID","stream":"nobody"}"#);
    assert!(unknown["ok"] == false && unknown["error"].as_str().unwrap().contains("line-1"), "{unknown}");
    let level = command("log-level", r#"{"id":"ID","level":"error"}"#);
    assert_eq!(level["level"], "error");
    let logged = agent.logs().len();
    assert_eq!(command("pause", r#"{"id":"ID","stream":"line-1"}"#)["ok"], true);
    assert_eq!(command("resume", r#"{"id":"ID","stream":"line-1"}"#)["ok"], true);
    assert_eq!(agent.logs().len(), logged, "nothing of it is an error");
    assert_eq!(command("log-level", r#"{"id":"ID","level":"=="}"#)["ok"], false);
    assert_eq!(command("log-level", r#"{"id":"ID","level":"info"}"#)["ok"], true);
    assert_eq!(command("reload", r#"{"id":"ID"}"#)["ok"], true);
    let snapshot = command("snapshot", r#"{"id":"ID","stream":"line-1"}"#);
    assert!(snapshot["image"].as_str().unwrap().starts_with("/9j/"), "a JPEG in base64");
    check_schema("command-state.schema.json", &subscriber.payloads("/state"));

    // Rubbish, and what nobody knows, is answered and does no harm.
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
    until_late("more results", || (subscriber.count("/result") > made + 10).then_some(()));
}

#[test]
fn without_being_allowed_no_command_is_carried_out() {
    let broker = Broker::start();
    let subscriber = Paho::start(&broker.access(), ALL, None);
    let plant = Plant::playing(50);
    // A command that was kept by the broker is none of now.
    broker.publish("lineside/v1/plant/edge-1/cmd/pause/set", r#"{"stream":"line-1"}"#, true);
    let agent = plant.start_at(&broker.url(), &[]);
    subscriber.wait_for("/result", 5);
    broker.publish("lineside/v1/plant/edge-1/cmd/pause/set", r#"{"stream":"line-1"}"#, false);
    let answers = subscriber.wait_for("/cmd/pause/state", 1);
    assert!(answers[0]["error"].as_str().unwrap().contains("--mqtt-commands"), "{answers:?}");
    assert_eq!(agent.metric("lineside_mqtt_received_total{kind=\"command\",outcome=\"stale\"}"), 1.0);
    assert!(agent.events("stream_stopped").is_empty());
}

#[test]
fn tls_with_certificates_on_both_sides_and_their_rotation() {
    let certificates = Certificates::new();
    let setup = Setup { tls: Some(certificates.clone()), client_certificates: true, ..Setup::default() };
    let broker = Broker::with(setup);
    let subscriber = Paho::start(&broker.access(), ALL, None);
    let plant = Plant::playing(20);
    let secret = plant.path("secret");
    fs::create_dir(&secret).unwrap();

    // A stranger's authority: neither side believes the other.
    Certificates::new().client_secret(&secret, 100);
    let agent = plant.start_at(&broker.url(), &["--mqtt-secret", secret.to_str().unwrap()]);
    let why = reason(&agent);
    assert!(why.contains("certificate is not accepted") && why.contains("UnknownIssuer"), "{why}");

    // Our own certificate has expired.
    certificates.client_secret(&secret, -1);
    until_late("the broker's refusal", || {
        let told = agent.events("broker_disconnected");
        told.iter()
            .any(|entry| entry["reason"].as_str().unwrap().contains("does it accept our certificate"))
            .then_some(())
    });

    certificates.client_secret(&secret, 100);
    connected(&agent);
    subscriber.wait_for("/result", 10);
    let first = agent.metric("lineside_mqtt_certificate_expiry_timestamp_seconds");
    assert!(first > 1.7e9, "{first}");
    // A certificate that is renewed while the old one is still good is used without a restart, and costs no result.
    certificates.client_secret(&secret, 200);
    agent.wait_for_event("broker_credentials_changed");
    agent.wait_for_metric("lineside_mqtt_certificate_expiry_timestamp_seconds", first + 86_400.0);
    connected(&agent);
    let so_far = subscriber.results().len();
    let results = subscriber.wait_for("/result", so_far + 10);
    assert!(check_sequence(&results).gaps.is_empty());
    drop(broker);
}

#[test]
fn a_servers_certificate_that_has_expired_is_refused_and_believed_again_when_renewed() {
    let certificates = Certificates::new();
    certificates.certify_server(-1);
    let mut broker = Broker::with(Setup { tls: Some(certificates.clone()), ..Setup::default() });
    let plant = Plant::playing(20);
    let secret = plant.path("secret");
    fs::create_dir(&secret).unwrap();
    fs::copy(certificates.ca(), secret.join("ca.crt")).unwrap();
    let agent = plant.start_at(&broker.url(), &["--mqtt-secret", secret.to_str().unwrap()]);
    let why = reason(&agent);
    assert!(why.contains("expired") || why.contains("Expired"), "{why}");
    certificates.certify_server(100);
    broker.restart();
    // Something in the secret changes, as an operator's rotation would; it need not be the authority.
    fs::write(secret.join("username"), "line").unwrap();
    connected(&agent);
}

#[test]
fn a_refused_password_is_tried_rarely_and_a_new_one_at_once() {
    let scripted = ScriptedBroker::start(Script::RefuseConnect(5));
    let plant = Plant::playing(20);
    let secret = plant.path("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("username"), "line\n").unwrap();
    fs::write(secret.join("password"), "wrong\n").unwrap();
    let agent = plant.start_at(&scripted.url(), &["--mqtt-secret", secret.to_str().unwrap()]);
    assert!(reason(&agent).contains("refuses our user or password"));
    agent.wait_for_metric("lineside_frames_total{outcome=\"processed\",stream=\"line-1\"}", 60.0);
    assert_eq!(scripted.connections().len(), 1, "one try in half a minute");
    assert_eq!(scripted.connections()[0].user.as_deref(), Some("line"));
    scripted.set(Script::InOrder);
    fs::write(secret.join("password"), "right\n").unwrap();
    connected(&agent);
    assert_eq!(scripted.connections().len(), 2);
    assert!(!format!("{:?}", agent.logs()).contains("wrong"), "passwords are never logged");
}

#[test]
fn users_and_access_lists_of_a_real_broker() {
    let mut broker = Broker::with(Setup {
        users: vec![("kit".into(), "kit".into()), ("edge-1".into(), "secret word".into())],
        acl: Some("user kit\ntopic readwrite #\nuser edge-1\ntopic readwrite lineside/v1/plant/edge-1/#\n".into()),
        ..Setup::default()
    });
    let subscriber = Paho::start(&broker.access(), "lineside/#", None);
    let plant = Plant::playing(20);
    let secret = plant.path("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("username"), "edge-1").unwrap();
    fs::write(secret.join("password"), "secret word").unwrap();
    let mut agent = plant.start_at(&broker.url(), &["--mqtt-secret", secret.to_str().unwrap()]);
    subscriber.wait_for("/result", 5);
    assert!(agent.end().success());
    broker.stop();
}

#[test]
fn the_next_broker_serves_while_the_first_is_away_and_is_left_when_it_is_back() {
    let (mut first, second) = (Broker::start(), Broker::start());
    let at_second = Paho::start(&second.access(), ALL, None);
    let url = format!("{},{}", first.url(), second.url());
    first.stop();
    let plant = Plant::playing(20);
    let mut agent = plant.start_at(&url, &[]);
    at_second.wait_for("/result", 10);
    assert_eq!(agent.metric("lineside_mqtt_broker_index"), 1.0);
    first.restart();
    let at_first = Paho::start(&first.access(), ALL, None);
    until_late("results at the first broker", || (at_first.count("/result") > 10).then_some(()));
    assert_eq!(agent.metric("lineside_mqtt_broker_index"), 0.0);
    // The second one was told that we left.
    let told = at_second.payloads("/status");
    assert_eq!(told.last().unwrap()["state"], "offline");
    first.stop();
    let before = at_second.count("/result");
    until_late("results at the second broker", || (at_second.count("/result") > before + 10).then_some(()));
    let all: Vec<Value> = at_first.results().into_iter().chain(at_second.results()).collect();
    assert!(agent.end().success());
    // Each result went to one of them; what the first had taken when it was killed may have died with it.
    let summary = check_sequence(&all);
    let missing: u64 = summary.gaps.iter().map(|gap| gap.missing.end() - gap.missing.start() + 1).sum();
    assert!(missing <= 64, "{:?}", summary.gaps);
}

#[test]
fn home_assistant_is_told_of_streams_that_come_and_go() {
    let broker = Broker::start();
    let subscriber = Paho::start(&broker.access(), "homeassistant/#", None);
    let plant = Plant::playing(20);
    let agent = plant.start_at(&broker.url(), &["--home-assistant", "homeassistant"]);
    let configs = subscriber.wait_for("/config", 3);
    assert!(configs.iter().all(|config| config["unique_id"].is_string() && config["device"]["identifiers"].is_array()));
    assert!(configs.iter().any(|config| config["state_topic"] == "lineside/v1/plant/edge-1/line-1/result"));
    plant.withdraw("stream.yaml");
    agent.wait_for_event("stream_stopped");
    subscriber.wait_for("/config", 6);
    // Nothing is kept of a stream that is gone.
    let late = Paho::start(&broker.access(), "homeassistant/#", None);
    let fence = "homeassistant/fence";
    broker.publish(fence, "{}", false);
    late.wait_for("/fence", 1);
    assert!(late.payloads("/config").is_empty());
}
