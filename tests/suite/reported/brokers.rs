//! Brokers and their consumers as they really behave.

use lineside_tests::broker::{Broker, BrokerOptions, Subscriber};
use lineside_tests::paho::check_sequence;
use lineside_tests::site::{TestSite, status};
use lineside_tests::wait::until_true;

/// Results per second of the stream.
const FPS: u32 = 10;

#[test]
fn a_message_that_the_broker_never_takes_is_set_aside_and_the_results_pass() {
    let broker = Broker::with(BrokerOptions { extra: "max_packet_size 2000".to_owned(), ..BrokerOptions::default() });
    let subscriber = broker.subscribe("lineside/v1/plant/edge-1/#");
    let site = TestSite::with_stream(FPS);
    // The metrics message, and no other, is larger than the broker accepts.
    let mut agent = site.start_with_broker(&broker.url(), &["--mqtt-metrics-seconds", "1"]);
    agent.wait_for_metric("lineside_spool_set_aside_total{reason=\"connection_lost\"}", 1.0);
    let made = agent.metric("lineside_frames_total{outcome=\"processed\",stream=\"line-1\"}");
    subscriber.wait_for("/line-1/result", made as usize);
    let set_aside = &agent.events("record_set_aside")[0];
    assert!(set_aside.to_string().contains("/metrics"), "{set_aside}");
    until_true("the condition", || status(&agent)["conditions"].to_string().contains("MessagesSetAside"));
    // Two refusals teach the limit, and later messages of this size are not sent at all.
    agent.wait_for_metric("lineside_spool_set_aside_total{reason=\"too_large\"}", 1.0);
    assert!(agent.terminate().success());
    let results = subscriber.payloads("/line-1/result");
    assert!(check_sequence(&results).gaps.is_empty(), "{:?}", check_sequence(&results).gaps);
}

/// Somebody has put a picture on a topic that the agent subscribes to, and the broker retains it.
#[test]
fn a_large_retained_message_on_a_subscribed_topic_is_skipped() {
    let broker = Broker::start();
    let topic = "lineside/v1/plant/edge-1/line-1/trigger";
    broker.publish(topic, vec![b'x'; 9 << 20], true);
    let subscriber = broker.subscribe("lineside/v1/plant/edge-1/line-1/result");
    let site = TestSite::with_stream(FPS);
    let mut agent = site.start_with_broker(&broker.url(), &[]);
    let skipped = agent.wait_for_event("message_skipped");
    assert_eq!((&skipped["topic"], &skipped["bytes"]), (&topic.into(), &(9 << 20).into()));
    subscriber.wait_for("/line-1/result", 5);
    assert_eq!(agent.events("broker_connected").len(), 1, "the connection lasts");
    assert!(agent.terminate().success());
}

/// Brokers in clusters, and those with a delay of Wills, publish the Will of an earlier connection behind the presence of the next one.
#[test]
fn a_late_will_does_not_leave_the_agent_offline() {
    let broker = Broker::start();
    let site = TestSite::with_stream(FPS);
    let mut agent = site.start_with_broker(&broker.url(), &[]);
    let subscriber = broker.subscribe("lineside/v1/plant/edge-1/status");
    until_true("the agent to be online", || last_state(&subscriber) == Some("online".to_owned()));
    for count in 1..4 {
        broker.publish("lineside/v1/plant/edge-1/status", "{\"state\":\"offline\"}", true);
        until_true("the contradiction", || {
            let states = subscriber.payloads("/status");
            states.iter().filter(|status| status["state"] == "offline").count() == count
        });
        until_true("the agent to be online again", || last_state(&subscriber) == Some("online".to_owned()));
    }
    assert!(agent.terminate().success());
    until_true("the agent to be offline in the end", || last_state(&subscriber) == Some("offline".to_owned()));
}

fn last_state(subscriber: &Subscriber) -> Option<String> {
    subscriber.payloads("/status").last().and_then(|status| status["state"].as_str().map(str::to_owned))
}

#[test]
fn a_configured_limit_sets_a_larger_message_aside_without_an_attempt() {
    let broker = Broker::with(BrokerOptions { extra: "max_packet_size 2000".to_owned(), ..BrokerOptions::default() });
    let site = TestSite::with_stream(FPS);
    let flags = ["--mqtt-metrics-seconds", "1", "--mqtt-max-packet-bytes", "2000"];
    let mut agent = site.start_with_broker(&broker.url(), &flags);
    agent.wait_for_metric("lineside_spool_set_aside_total{reason=\"too_large\"}", 2.0);
    assert_eq!(agent.events("broker_connected").len(), 1);
    assert!(agent.terminate().success());
}
