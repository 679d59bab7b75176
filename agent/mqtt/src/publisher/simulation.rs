//! Simulation of days of operation: the real spool on a disk with faults, the real send window, a broker that stops, restarts,
//! answers slowly and forgets, and an agent that is killed and restarted. Time is simulated.
//!
//! Checks that every result that was made is received or counted as dropped. `LINESIDE_DAYS` sets the number of days.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::send_window::{SendWindow, packet_bytes};
use super::suspects::{LossCause, Suspects};
use lineside_spool::simulation::{DrivenSpool, options};
use lineside_spool::{AppendOutcome, Options, RecordId, RecordKind, SetAsideReason};

const DAY_MS: u64 = 24 * 3600 * 1000;
/// Mean time between two results.
const RESULT_INTERVAL_MS: u64 = 700;
const STEP_MS: u64 = 100;

/// The broker and its subscribers.
#[derive(Default)]
struct Broker {
    is_up: bool,
    /// Messages in transit to the broker: time of arrival, record, number, historical.
    publishes: VecDeque<(u64, RecordId, u64, bool)>,
    /// Acknowledgements in transit to the agent, with their time of arrival.
    acknowledgements: VecDeque<(u64, RecordId)>,
    /// How often subscribers received each number.
    received: BTreeMap<u64, u64>,
}

fn simulate_day(seed: u64) {
    let random = &mut fastrand::Rng::with_seed(seed);
    let mut driven =
        DrivenSpool::new(Options { segment_bytes: 16 << 10, memory_bytes_max: 1 << 20, ..options(2 << 20) });
    let mut broker = Broker::default();
    let mut window: Option<SendWindow> = None;
    let start = Instant::now();
    let (mut produced, mut kept) = (0u64, 0u64);
    let (mut next_result_ms, mut next_change_ms, mut latency_ms) = (0, 0, 20);
    let mut worst_live_ms = 0;
    let mut now_ms = 0;
    let mut produced_at: BTreeMap<u64, u64> = BTreeMap::new();
    while now_ms < DAY_MS || driven.spool.stats().records > 0 {
        now_ms += STEP_MS;
        let has_ended = now_ms >= DAY_MS;
        assert!(now_ms < 3 * DAY_MS, "{} results are never delivered", driven.spool.stats().records);
        if now_ms >= next_result_ms && !has_ended {
            produced += 1;
            next_result_ms = now_ms + random.u64(1..2 * RESULT_INTERVAL_MS);
            let payload = Bytes::from(format!("{produced:>200}"));
            kept += u64::from(matches!(driven.append(RecordKind::Result, payload, 0), AppendOutcome::Appended(_)));
            produced_at.insert(produced, now_ms);
        }
        if now_ms >= next_change_ms {
            next_change_ms = now_ms + random.u64(1000..30 * 60 * 1000);
            // The broker is down for seconds or hours, or the link to it becomes slow.
            broker.is_up = has_ended || random.u8(0..3) > 0;
            latency_ms = if random.u8(0..4) == 0 { random.u64(100..3000) } else { 20 };
            if !broker.is_up {
                if random.u8(0..4) == 0 {
                    next_change_ms += random.u64(0..4 * 3600 * 1000);
                }
                // Everything in transit is lost, also acknowledgements of messages that the broker has.
                broker.publishes.clear();
                broker.acknowledgements.clear();
                window = None;
                driven.spool.disconnected();
            }
            if random.u8(0..12) == 0 {
                // The agent is killed, or stops in order. Records that are only in memory would be lost, so write them first.
                driven.advance(0);
                driven = if random.bool() { driven.kill() } else { driven.restart() };
                broker.publishes.clear();
                broker.acknowledgements.clear();
                window = None;
            }
        }
        driven.advance(STEP_MS);
        let now = start + Duration::from_millis(now_ms);
        if broker.is_up && window.is_none() {
            driven.spool.connected();
            window = Some(SendWindow::new(Some(50), now));
        }
        let Some(window) = &mut window else { continue };
        while let Some((record, historical)) = window.next(&driven.spool, now) {
            let number: u64 = std::str::from_utf8(&record.payload).unwrap().trim().parse().unwrap();
            broker.publishes.push_back((now_ms + latency_ms, record.id, number, historical));
        }
        while broker.publishes.front().is_some_and(|(at, ..)| *at <= now_ms) {
            let (_, record, number, historical) = broker.publishes.pop_front().unwrap();
            *broker.received.entry(number).or_default() += 1;
            broker.acknowledgements.push_back((now_ms + latency_ms, record));
            if !historical {
                worst_live_ms = worst_live_ms.max(now_ms - produced_at[&number]);
            }
        }
        while broker.acknowledgements.front().is_some_and(|(at, _)| *at <= now_ms) {
            let (_, record) = broker.acknowledgements.pop_front().unwrap();
            window.acknowledged(record, now);
            driven.spool.acknowledge(record);
        }
    }
    let dropped = driven.dropped_total();
    let received = broker.received.len() as u64;
    let repeats: u64 = broker.received.values().sum::<u64>() - received;
    assert_eq!(kept, produced);
    assert_eq!(received + dropped, produced, "seed {seed}: {received} received, {dropped} dropped of {produced}");
    assert!(worst_live_ms <= 5000 + 3000 + STEP_MS, "a live result arrived after {worst_live_ms} ms");
    eprintln!(
        "seed {seed}: {produced} produced, {received} received, {dropped} dropped, {repeats} repeats, \
         live results after at most {worst_live_ms} ms"
    );
}

/// What a link and a broker do to connections.
struct Faults {
    /// The link breaks after this many bytes at the earliest and at the latest.
    break_after: Option<(u64, u64)>,
    /// The broker closes the connection on every n-th record.
    poison_every: u64,
    /// The broker closes the connection on larger packets.
    bytes_max: u64,
}

/// The numbers of the records that were received and those that were set aside.
#[derive(Default)]
struct Outcome {
    received: BTreeMap<u64, u64>,
    set_aside: BTreeMap<u64, u64>,
}

/// Sends records of 1 to 40 KB over connections that end early, until each one is received or set aside.
fn send_all(seed: u64, records: u64, faults: &Faults) -> Outcome {
    let random = &mut fastrand::Rng::with_seed(seed);
    let large = Options { segment_bytes: 256 << 10, memory_bytes_max: 8 << 20, ..options(64 << 20) };
    let mut driven = DrivenSpool::new(large);
    for number in 1..=records {
        let bytes = if random.u8(0..10) == 0 { random.usize(10_000..40_000) } else { 1000 };
        driven.append(RecordKind::Result, Bytes::from(format!("{number:>bytes$}")), 0);
    }
    driven.advance(0);
    let (mut outcome, mut suspects, start) = (Outcome::default(), Suspects::default(), Instant::now());
    let mut now_ms = 0;
    while driven.spool.stats().records > 0 {
        assert!(now_ms < DAY_MS, "seed {seed}: {} records are never delivered", driven.spool.stats().records);
        driven.spool.connected();
        let mut window = SendWindow::new(None, start + Duration::from_millis(now_ms));
        window.start(suspects, 0, start + Duration::from_millis(now_ms));
        let mut budget = faults.break_after.map_or(u64::MAX, |(min, max)| random.u64(min..max));
        let mut numbers: BTreeMap<RecordId, u64> = BTreeMap::new();
        let mut is_open = true;
        while is_open && driven.spool.stats().records > 0 {
            now_ms += STEP_MS;
            driven.advance(STEP_MS);
            let now = start + Duration::from_millis(now_ms);
            let mut burst = Vec::new();
            while let Some((record, _)) = window.next(&driven.spool, now) {
                let number = std::str::from_utf8(&record.payload).unwrap().trim().parse().unwrap();
                numbers.insert(record.id, number);
                if window.exceeds_limit(&record, None, now) {
                    window.requeue(record.id);
                    driven.spool.set_aside(record.id, SetAsideReason::TooLarge);
                    *outcome.set_aside.entry(number).or_default() += 1;
                } else {
                    burst.push((record.id, packet_bytes(&record), number));
                }
            }
            for (id, bytes, number) in burst {
                is_open = bytes <= budget && bytes <= faults.bytes_max && !number.is_multiple_of(faults.poison_every);
                if !is_open {
                    break;
                }
                budget -= bytes;
                *outcome.received.entry(number).or_default() += 1;
                window.acknowledged(id, now);
                driven.spool.acknowledge(id);
            }
        }
        let cause = if is_open { LossCause::Other } else { LossCause::Closed };
        let set_aside;
        (suspects, set_aside) = window.end(cause, start + Duration::from_millis(now_ms));
        if let Some(record) = set_aside {
            driven.spool.set_aside(record.id, record.reason);
            *outcome.set_aside.entry(numbers[&record.id]).or_default() += 1;
        }
        driven.spool.disconnected();
        driven.advance(STEP_MS);
    }
    outcome
}

#[test]
fn a_link_that_breaks_all_the_time_sets_no_record_aside() {
    for seed in 1..=20 {
        let faults = Faults { break_after: Some((5_000, 60_000)), poison_every: u64::MAX, bytes_max: u64::MAX };
        let outcome = send_all(seed, 600, &faults);
        assert_eq!(outcome.set_aside, BTreeMap::new(), "seed {seed}");
        assert_eq!(outcome.received.len(), 600);
    }
}

#[test]
fn exactly_the_records_that_the_broker_does_not_take_are_set_aside() {
    for seed in 1..=20 {
        let faults = Faults { break_after: None, poison_every: 97, bytes_max: u64::MAX };
        let outcome = send_all(seed, 600, &faults);
        let expected: Vec<u64> = (1..=600).filter(|number| number % 97 == 0).collect();
        assert_eq!(outcome.set_aside.into_keys().collect::<Vec<_>>(), expected, "seed {seed}");
        assert_eq!(outcome.received.len(), 600 - expected.len());
    }
}

#[test]
fn records_above_the_limit_of_the_broker_are_set_aside_and_the_others_pass() {
    for (seed, bytes_max) in [(1, 20_000), (2, 20_000), (3, 5_000), (4, 900)] {
        let faults = Faults { break_after: None, poison_every: u64::MAX, bytes_max };
        let outcome = send_all(seed, 600, &faults);
        assert_eq!(outcome.received.len() + outcome.set_aside.len(), 600, "seed {seed}");
        assert!(outcome.set_aside.keys().all(|number| !outcome.received.contains_key(number)));
        assert!((bytes_max < 1000) == outcome.received.is_empty(), "seed {seed}");
    }
}

#[test]
fn every_result_is_received_or_counted_as_dropped() {
    let days = std::env::var("LINESIDE_DAYS").map_or(4, |text| text.parse().unwrap());
    (1..=days).for_each(simulate_day);
}
