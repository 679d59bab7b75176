//! Simulation of days of operation: the real spool on a disk with faults, the real send window, a broker that stops, restarts,
//! answers slowly and forgets, and an agent that is killed and restarted. Time is simulated.
//!
//! Checks that every result that was made is received or counted as dropped. `LINESIDE_DAYS` sets the number of days.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::send_window::SendWindow;
use lineside_spool::simulation::{DrivenSpool, options};
use lineside_spool::{AppendOutcome, Options, RecordId, RecordKind};

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

#[test]
fn every_result_is_received_or_counted_as_dropped() {
    let days = std::env::var("LINESIDE_DAYS").map_or(4, |text| text.parse().unwrap());
    (1..=days).for_each(simulate_day);
}
