//! A day of a plant, simulated: the real spool on a disk with faults, the real decisions of what is sent when, a broker
//! that comes, goes, answers slowly and forgets, an agent that is killed and ended, and a clock that is turned by hand.
//!
//! In the end every result that was made was received, or was counted as dropped. `LINESIDE_DAYS` sets how many days.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;

use super::send_window::SendWindow;
use lineside_spool::model_test::{DrivenSpool, options};
use lineside_spool::{AppendOutcome, Options, RecordId, RecordKind};

const DAY_MS: u64 = 24 * 3600 * 1000;
/// The line makes a part about every so often.
const PART_EVERY_MS: u64 = 700;
const STEP_MS: u64 = 100;

/// What the broker and its consumers see.
#[derive(Default)]
struct Broker {
    is_up: bool,
    /// Publishes under way to the broker, with the time they arrive.
    arriving: VecDeque<(u64, RecordId, u64, bool)>,
    /// Acknowledgements under way to the agent.
    answering: VecDeque<(u64, RecordId)>,
    /// What subscribers got: how often, and whether it was late at first.
    received: BTreeMap<u64, u64>,
}

fn day(seed: u64) {
    let random = &mut fastrand::Rng::with_seed(seed);
    let mut driven =
        DrivenSpool::new(Options { segment_bytes: 16 << 10, memory_bytes_max: 1 << 20, ..options(2 << 20) });
    let mut broker = Broker::default();
    let mut flow: Option<SendWindow> = None;
    let (mut made, mut kept) = (0u64, 0u64);
    let (mut next_part_ms, mut next_change_ms, mut latency_ms) = (0, 0, 20);
    let mut worst_live_ms = 0;
    let mut now_ms = 0;
    let mut births: BTreeMap<u64, u64> = BTreeMap::new();
    while now_ms < DAY_MS || driven.spool.stats().records > 0 {
        now_ms += STEP_MS;
        let is_over = now_ms >= DAY_MS;
        assert!(now_ms < 3 * DAY_MS, "{} results never get across", driven.spool.stats().records);
        if now_ms >= next_part_ms && !is_over {
            made += 1;
            next_part_ms = now_ms + random.u64(1..2 * PART_EVERY_MS);
            let payload = Bytes::from(format!("{made:>200}"));
            kept += u64::from(matches!(driven.append(RecordKind::Result, payload, 0), AppendOutcome::Kept(_)));
            births.insert(made, now_ms);
        }
        if now_ms >= next_change_ms {
            next_change_ms = now_ms + random.u64(1000..30 * 60 * 1000);
            // The broker is away for seconds, sometimes for hours; or the line to it becomes slow.
            broker.is_up = is_over || random.u8(0..3) > 0;
            latency_ms = if random.u8(0..4) == 0 { random.u64(100..3000) } else { 20 };
            if !broker.is_up {
                if random.u8(0..4) == 0 {
                    next_change_ms += random.u64(0..4 * 3600 * 1000);
                }
                // What was on the way is lost, also answers to what the broker has.
                broker.arriving.clear();
                broker.answering.clear();
                flow = None;
                driven.spool.disconnected();
            }
            if random.u8(0..12) == 0 {
                // The agent is killed, or ends in order. What was not written dies with it, so let the disk have its turn.
                driven.pass(0);
                driven = if random.bool() { driven.reopen() } else { driven.restart() };
                broker.arriving.clear();
                broker.answering.clear();
                flow = None;
            }
        }
        driven.pass(STEP_MS);
        let since_start = Duration::from_millis(now_ms);
        if broker.is_up && flow.is_none() {
            driven.spool.connected();
            flow = Some(SendWindow::new(Some(50), since_start));
        }
        let Some(flow) = &mut flow else { continue };
        while let Some((record, historical)) = flow.next(&driven.spool, since_start) {
            let number: u64 = std::str::from_utf8(&record.payload).unwrap().trim().parse().unwrap();
            broker.arriving.push_back((now_ms + latency_ms, record.place, number, historical));
        }
        while broker.arriving.front().is_some_and(|(at, ..)| *at <= now_ms) {
            let (_, place, number, historical) = broker.arriving.pop_front().unwrap();
            *broker.received.entry(number).or_default() += 1;
            broker.answering.push_back((now_ms + latency_ms, place));
            if !historical {
                worst_live_ms = worst_live_ms.max(now_ms - births[&number]);
            }
        }
        while broker.answering.front().is_some_and(|(at, _)| *at <= now_ms) {
            let (_, place) = broker.answering.pop_front().unwrap();
            flow.acknowledged(place, since_start);
            driven.spool.acknowledge(place);
        }
    }
    let dropped: u64 = ["full", "expired", "damaged", "disk"].iter().map(|reason| driven.dropped(reason)).sum();
    let received = broker.received.len() as u64;
    let repeats: u64 = broker.received.values().sum::<u64>() - received;
    assert_eq!(kept, made);
    assert_eq!(received + dropped, made, "seed {seed}: {received} received, {dropped} dropped of {made}");
    assert!(worst_live_ms <= 5000 + 3000 + STEP_MS, "a live result was {worst_live_ms} ms old");
    eprintln!(
        "seed {seed}: {made} made, {received} received, {dropped} dropped, {repeats} repeats, live at most {worst_live_ms} ms old"
    );
}

#[test]
fn produced_is_received_and_counted_drops() {
    let days = std::env::var("LINESIDE_DAYS").map_or(4, |text| text.parse().unwrap());
    (1..=days).for_each(day);
}
