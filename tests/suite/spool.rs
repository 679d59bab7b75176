//! The spool in the running agent: nothing is lost whatever is killed, cut or filled. The numbers of rounds are small here;
//! `make experiments` sets larger ones.

use std::fs;
use std::time::{Duration, Instant};

use lineside_tests::agent::Agent;
use lineside_tests::broker::{Broker, Setup};
use lineside_tests::hostile::Random;
use lineside_tests::paho::{Paho, Summary, check_sequence};
use lineside_tests::plant::{Plant, failures, rounds, said, status, until_late};
use lineside_tests::relay::{Mode, Relay};
use lineside_tests::scripted_broker::{Script, ScriptedBroker};
use lineside_tests::stream_manifest;
use serde_json::Value;

/// Records on the way at most; so many may come twice for each connection that breaks.
const WINDOW: usize = 64;
const PROCESSED: &str = "lineside_frames_total{outcome=\"processed\",stream=\"line-1\"}";
const RESULTS: &str = "lineside/v1/plant/edge-1/line-1/result";

fn pause(random: &mut Random, most_ms: usize) {
    std::thread::park_timeout(Duration::from_millis(random.below(most_ms) as u64));
}

/// Stops the stream, once it plays, and waits until everything that was made has been received; how it stands then.
fn settle(plant: &Plant, agent: &Agent, subscriber: &Paho) -> Summary {
    agent.wait_for_event("stream_started");
    plant.withdraw("stream.yaml");
    agent.wait_for_event("stream_stopped");
    until_late("the spool to be empty", || (agent.metric("lineside_spool_records") == 0.0).then_some(()));
    let made = agent.metric(PROCESSED) as u64;
    until_late("the last result", || {
        let summary = check_sequence(&subscriber.results());
        let last = summary.highest.iter().next_back().map_or(0, |(_, highest)| *highest);
        (last == made).then_some(summary)
    })
}

/// Repeats that are the agent's, and not the broker's own.
fn repeats(subscriber: &Paho, summary: &Summary) -> usize {
    let by_broker = subscriber.messages().iter().filter(|message| message["dup"] == true).count();
    summary.duplicates.saturating_sub(by_broker)
}

/// Experiment 1.
#[test]
fn an_agent_that_is_killed_again_and_again_loses_nothing() {
    let kills = rounds("LINESIDE_EXPERIMENT_AGENT_KILLS", 4);
    let broker = Broker::start();
    let subscriber = Paho::start(&broker.access(), RESULTS, Some("line"));
    let plant = Plant::playing(100);
    let mut random = Random::new(1);
    for round in 0..kills {
        let mut agent = plant.start_at(&broker.url(), &[]);
        let before = subscriber.count("/result");
        until_late("results", || (subscriber.count("/result") > before + 20).then_some(()));
        pause(&mut random, 300);
        agent.signal("KILL");
        agent.wait();
        assert!(subscriber.count("/result") > before, "round {round}");
    }
    let agent = plant.start_at(&broker.url(), &[]);
    agent.wait_for_metric(PROCESSED, 20.0);
    let summary = settle(&plant, &agent, &subscriber);
    assert!(summary.gaps.is_empty(), "{:?}", summary.gaps);
    assert_eq!(summary.highest.len() as u64, kills + 1, "an epoch for each start");
    let repeats = repeats(&subscriber, &summary);
    assert!(repeats as u64 <= kills * WINDOW as u64, "{repeats} repeats in {kills} kills");
    eprintln!("{kills} kills of the agent: {} results, 0 lost, {repeats} repeats", summary.distinct);
}

/// Experiment 5, for brokers that remember and brokers that forget.
#[test]
fn a_broker_that_is_killed_again_and_again_loses_nothing() {
    let kills = rounds("LINESIDE_EXPERIMENT_BROKER_KILLS", 3);
    for persistence in [false, true] {
        let mut broker = Broker::with(Setup { persistence, ..Setup::default() });
        let relay = Relay::start(broker.port());
        let subscriber = Paho::start(&broker.access(), RESULTS, Some("line"));
        let plant = Plant::playing(100);
        let agent = plant.start_at(&relay.url(), &[]);
        let mut random = Random::new(5);
        for _ in 0..kills {
            let before = subscriber.count("/result");
            until_late("results", || (subscriber.count("/result") > before + 20).then_some(()));
            pause(&mut random, 200);
            let subscriptions = subscriber.subscriptions();
            if !persistence {
                // A broker that forgets would acknowledge to nobody while its subscriber is away.
                relay.set(Mode::Refuse);
            }
            broker.stop();
            broker.restart();
            until_late("the subscriber to be back", || (subscriber.subscriptions() > subscriptions).then_some(()));
            relay.set(Mode::Pass);
        }
        let summary = settle(&plant, &agent, &subscriber);
        assert!(summary.gaps.is_empty(), "persistence {persistence}: {:?}", summary.gaps);
        let repeats = repeats(&subscriber, &summary);
        assert!(repeats as u64 <= kills * WINDOW as u64, "{repeats} repeats in {kills} kills");
        let results = summary.distinct;
        eprintln!(
            "{kills} kills of the broker, persistence {persistence}: {results} results, 0 lost, {repeats} repeats"
        );
    }
}

/// Experiment 6, scaled down: a link that is there half of the time.
#[test]
fn a_link_that_comes_and_goes_leaves_no_gap() {
    let cycles = rounds("LINESIDE_EXPERIMENT_CYCLES", 2);
    let broker = Broker::start();
    let relay = Relay::start(broker.port());
    let subscriber = Paho::start(&broker.access(), RESULTS, Some("line"));
    let plant = Plant::playing(50);
    let agent = plant.start_at(&relay.url(), &[]);
    for _ in 0..cycles {
        agent.wait_for_value("lineside_mqtt_connected", 1.0);
        let made = agent.metric(PROCESSED);
        agent.wait_for_metric(PROCESSED, made + 75.0);
        relay.set(Mode::Refuse);
        let made = agent.metric(PROCESSED);
        agent.wait_for_metric(PROCESSED, made + 100.0);
        let waiting = agent.metric("lineside_spool_records");
        relay.set(Mode::Pass);
        agent.wait_for_value("lineside_mqtt_connected", 1.0);
        let begun = Instant::now();
        until_late("the backlog to be gone", || (agent.metric("lineside_spool_records") < 5.0).then_some(()));
        eprintln!("{waiting} results were drained in {:?} while 50 a second were made", begun.elapsed());
    }
    let summary = settle(&plant, &agent, &subscriber);
    assert!(summary.gaps.is_empty(), "{:?}", summary.gaps);
    assert_eq!(failures(&agent), 0.0);
}

/// Experiment 8: what was made is what was received and what was counted as dropped.
#[test]
fn a_full_spool_counts_exactly_what_it_gives_up() {
    let mut broker = Broker::start();
    let url = broker.url();
    broker.stop();
    let plant = Plant::playing(0);
    let agent = plant.start_at(&url, &["--spool-mib", "1", "--mqtt-metrics-seconds", "0"]);
    let dropped = "lineside_spool_dropped_total{reason=\"full\"}";
    agent.wait_for_metric(dropped, 300.0);
    until_late("the condition", || status(&agent)["conditions"].to_string().contains("SpoolFull").then_some(()));
    plant.withdraw("stream.yaml");
    agent.wait_for_event("stream_stopped");
    broker.restart();
    let subscriber = Paho::start(&broker.access(), RESULTS, None);
    // The agent may have been faster than the subscriber, so it is asked what it has got across.
    until_late("the spool to be empty", || (agent.metric("lineside_spool_records") == 0.0).then_some(()));
    let delivered = agent.metric("lineside_mqtt_results_published_total");
    assert_eq!(agent.metric(PROCESSED), delivered + agent.metric(dropped));
    drop(subscriber);
}

/// Experiment 9.
#[test]
fn a_full_disk_stops_nothing_and_is_used_again_when_there_is_room() {
    let plant = Plant::playing(50);
    let data = plant.data();
    fs::create_dir_all(&data).unwrap();
    let mount = |arguments: &[&str]| std::process::Command::new("mount").args(arguments).output();
    let mounted = mount(&["-t", "tmpfs", "-o", "size=8m", "tmpfs", data.to_str().unwrap()]);
    if !mounted.is_ok_and(|output| output.status.success()) {
        return eprintln!("passed over: mounting is not permitted here");
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
    let subscriber = Paho::start(&broker.access(), RESULTS, Some("line"));
    broker.stop();
    let mut agent = plant.start_at(&url, &["--spool-sync-ms", "20"]);
    agent.wait_for_metric(PROCESSED, 20.0);
    let filler = data.join("filler");
    drop(fs::write(&filler, vec![0; 16 << 20]).unwrap_err());
    agent.wait_for_value("lineside_spool_degraded", 1.0);
    assert!(status(&agent)["conditions"].to_string().contains("SpoolDegraded"));
    let made = agent.metric(PROCESSED);
    agent.wait_for_metric(PROCESSED, made + 50.0);
    fs::remove_file(&filler).unwrap();
    agent.wait_for_value("lineside_spool_degraded", 0.0);
    assert_eq!(agent.metric("lineside_spool_dropped_total{reason=\"disk\"}"), 0.0);
    assert_eq!(agent.events("spool_disk_failed").len(), 1);
    // What memory held is on the disk now: it outlasts the process.
    let made = agent.metric(PROCESSED);
    agent.wait_for_metric(PROCESSED, made + 20.0);
    agent.signal("KILL");
    agent.wait();
    broker.restart();
    until_late("the subscriber to be back", || (subscriber.subscriptions() > 1).then_some(()));
    let again = plant.start_at(&url, &[]);
    let summary = settle(&plant, &again, &subscriber);
    assert!(summary.gaps.is_empty(), "{:?}", summary.gaps);
}

/// Experiment 10: a link over which nothing comes, and which nobody closes.
#[test]
fn a_silent_broker_is_noticed_and_left() {
    let broker = Broker::start();
    let relay = Relay::start(broker.port());
    let plant = Plant::playing(20);
    let subscriber = Paho::start(&broker.access(), RESULTS, Some("line"));
    let agent = plant.start_at(&relay.url(), &["--mqtt-keep-alive-seconds", "2"]);
    subscriber.wait_for("/result", 10);
    relay.set(Mode::Hold);
    let begun = Instant::now();
    agent.wait_for_event("broker_disconnected");
    eprintln!("a silent broker was noticed after {:?}, with a keep-alive of 2 s", begun.elapsed());
    relay.set(Mode::Refuse);
    relay.set(Mode::Pass);
    let summary = settle(&plant, &agent, &subscriber);
    assert!(summary.gaps.is_empty(), "{:?}", summary.gaps);
}

/// Experiment 11.
#[test]
fn a_broker_that_answers_wrongly_wedges_nobody() {
    for script in [
        Script::Reversed(8),
        Script::Twice,
        Script::SkipOne,
        Script::Never,
        Script::Garbage,
        Script::WrongIdentifiers,
        Script::SilentConnect,
    ] {
        let broker = ScriptedBroker::start(script);
        let relay = Relay::start(broker.port());
        let plant = Plant::playing(50);
        let agent = plant.start_at(&relay.url(), &["--mqtt-keep-alive-seconds", "2"]);
        agent.wait_for_metric(PROCESSED, 150.0);
        if !matches!(script, Script::Reversed(_) | Script::Twice) {
            // It notices by itself: there is a second connection before the broker is mended.
            until_late(&format!("another connection, {script:?}"), || (broker.connections().len() > 1).then_some(()));
        }
        broker.set(Script::InOrder);
        plant.withdraw("stream.yaml");
        agent.wait_for_event("stream_stopped");
        until_late(&format!("the spool to be empty, {script:?}"), || {
            (agent.metric("lineside_spool_records") == 0.0).then_some(())
        });
        let taken = broker.acknowledged();
        let results = taken.iter().filter(|message| message.topic.ends_with("/result"));
        let results: Vec<Value> = results.map(|message| serde_json::from_slice(&message.payload).unwrap()).collect();
        let summary = check_sequence(&results);
        assert!(summary.gaps.is_empty(), "{script:?}: {:?}", summary.gaps);
        assert_eq!(summary.distinct as f64, agent.metric(PROCESSED), "{script:?}");
    }
}

/// Experiment 12, as far as it can be told without a clock: a line of 1 KB/s holds up no frame.
#[test]
fn a_thin_line_holds_up_no_frame() {
    let broker = Broker::start();
    let relay = Relay::start(broker.port());
    relay.throttle(Some(1000));
    let plant = Plant::playing(100);
    let agent = plant.start_at(&relay.url(), &[]);
    agent.wait_for_metric(PROCESSED, 300.0);
    let skipped = agent.metric("lineside_frames_total{outcome=\"skipped\",stream=\"line-1\"}");
    assert!(agent.metric("lineside_spool_records") > 50.0, "most of it waits");
    eprintln!("over 1 KB/s: {skipped} frames skipped of {}", agent.metric(PROCESSED));
}

/// Experiment 14.
#[test]
fn an_orderly_end_at_full_speed_loses_nothing() {
    let broker = Broker::start();
    let subscriber = Paho::start(&broker.access(), RESULTS, Some("line"));
    let plant = Plant::playing(0);
    for _ in 0..2 {
        let mut agent = plant.start_at(&broker.url(), &[]);
        agent.wait_for_metric(PROCESSED, 100.0);
        let begun = Instant::now();
        assert!(agent.end().success());
        eprintln!("the end took {:?}", begun.elapsed());
    }
    let agent = plant.start_at(&broker.url(), &[]);
    let summary = settle(&plant, &agent, &subscriber);
    assert!(summary.gaps.is_empty(), "{:?}", summary.gaps);
    assert_eq!(repeats(&subscriber, &summary), 0, "and sends nothing twice");
}

#[test]
fn the_tool_shows_saves_and_throws_away_what_waits() {
    let plant = Plant::playing(50);
    let mut agent = plant.start(&[]);
    agent.wait_for_metric(PROCESSED, 30.0);
    let json = |arguments: &[&str]| -> Value {
        let output = plant.spool(arguments);
        assert!(output.status.success(), "{}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", said(&output)))
    };
    // While the agent runs it can be looked at, and not thrown away.
    let lanes = json(&["stat", "--json"]);
    assert!(lanes["lanes"][0]["records"].as_u64().unwrap() >= 20, "{lanes}");
    let purge = plant.spool(&["purge", "--yes"]);
    assert!(!purge.status.success() && said(&purge).contains("another agent"), "{}", said(&purge));
    assert!(agent.end().success());
    let made = agent.events("records_left_in_spool")[0]["records"].as_u64().unwrap();

    let table = plant.spool(&["ls", "--limit", "3"]);
    assert!(said(&table).contains("edge-1:1:1 ") && said(&table).lines().count() == 4, "{}", said(&table));
    let exported = plant.path("saved.jsonl");
    plant.spool(&["export", exported.to_str().unwrap()]);
    let lines = fs::read_to_string(&exported).unwrap();
    assert_eq!(lines.lines().count() as u64, made);
    let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!((&first["topic"], &first["payload"]["id"]), (&RESULTS.into(), &"edge-1:1:1".into()));

    let refused = plant.spool(&["purge"]);
    assert_eq!(refused.status.code(), Some(64));
    assert!(said(&refused).contains("--yes"), "{}", said(&refused));
    let events = json(&["purge", "--kind", "event", "--yes", "--json"])["purged"].as_u64().unwrap();
    let rest = json(&["purge", "--yes", "--json"])["purged"].as_u64().unwrap();
    assert!(events >= 2 && events + rest == made, "{events} + {rest} of {made}");
    let nothing = plant.spool(&["export", "-"]);
    assert!(nothing.status.success() && nothing.stdout.is_empty());
    let elsewhere = lineside_tests::agent::lineside(&["spool", "stat", "--data-dir", "/no/such/folder"]);
    assert!(said(&elsewhere).contains("does not contain a spool"), "{}", said(&elsewhere));
}

#[test]
fn report_by_exception_says_what_is_news() {
    let broker = Broker::start();
    let subscriber = Paho::start(&broker.access(), RESULTS, None);
    let plant = Plant::playing(50);
    let frames = format!("dir://{}?loop=true", lineside_tests::example("frames").display());
    let report = "  fps: 50\n  report: {byException: true, deadband: 1.0, heartbeatSeconds: 3600}\n";
    plant.apply("stream.yaml", &stream_manifest("line-1", &frames, "parts", report));
    let agent = plant.start_at(&broker.url(), &[]);
    let suppressed = "lineside_results_suppressed_total{stream=\"line-1\"}";
    agent.wait_for_metric(suppressed, 40.0);
    let results = subscriber.wait_for("/result", 10);
    let label = |result: &Value| result["classes"][0]["label"].clone();
    assert!(results.windows(2).all(|pair| label(&pair[0]) != label(&pair[1])), "only what changed");
    assert!(check_sequence(&results).gaps.is_empty(), "what is not said uses no number");
}
