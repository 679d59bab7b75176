//! The spool against a model of it, on a disk that loses, tears and refuses: random sequences of appends, deliveries,
//! lost connections, full disks, killed processes and power cuts.
//!
//! After every step each record that was appended is in one of three states, and the counters agree: it waits, it was
//! delivered, or it was given up and counted. After a kill everything that was written is there; after a power cut
//! everything that was synced. `LINESIDE_SPOOL_SEQUENCES` sets how many sequences there are.

#![allow(dead_code, missing_docs, clippy::unwrap_used, reason = "test code, a part of which other crates use too")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::fake_disk::{FakeDisk, FaultMode};
use super::*;

/// Seeds that once failed.
const SEEDS: [u64; 3] = [8587, 56289, 264833];
const SEQUENCES: u64 = 10_000;
const STEPS: u64 = 90;
const ROOT: &str = "/spool";

pub fn options(bytes_max: u64) -> Options {
    let counter = |name: &str| IntCounter::new(name, name).unwrap();
    let dropped = IntCounterVec::new(prometheus::Opts::new("dropped", "dropped"), &["reason"]).unwrap();
    Options {
        segment_bytes: 600,
        memory_bytes_max: 1500,
        sync_interval: Duration::from_millis(20),
        ..Options::new(bytes_max, dropped, counter("written"), counter("syncs"))
    }
}

/// A spool driven by hand.
pub struct DrivenSpool {
    pub spool: Spool,
    writer: Writer,
    pub(super) disk: FakeDisk,
    time_ms: Arc<AtomicU64>,
    options: Options,
}

impl DrivenSpool {
    pub fn new(options: Options) -> Self {
        Self::on(FakeDisk::default(), options)
    }

    fn on(disk: FakeDisk, options: Options) -> Self {
        let time_ms = Arc::new(AtomicU64::new(0));
        let clock: Clock = {
            let time_ms = time_ms.clone();
            Arc::new(move || Duration::from_millis(time_ms.load(Ordering::Relaxed)))
        };
        let (spool, writer) =
            Spool::assemble(Arc::new(disk.clone()), Path::new(ROOT), options.clone(), clock, None).unwrap();
        Self { spool, writer, disk, time_ms, options }
    }

    /// The process ends without a word, and another begins.
    pub fn reopen(self) -> Self {
        Self::on(self.disk, self.options)
    }

    /// The process ends in order, and another begins.
    pub fn restart(mut self) -> Self {
        self.writer.finish(&self.spool.shared, self.spool.shared.now_ms());
        self.disk.set_mood(FaultMode::default());
        self.reopen()
    }

    pub fn pass(&mut self, ms: u64) {
        self.time_ms.fetch_add(ms, Ordering::Relaxed);
        self.writer.cycle(&self.spool.shared, self.spool.shared.now_ms());
    }

    pub fn append(&self, kind: RecordKind, payload: Bytes, ttl_seconds: u32) -> AppendOutcome {
        let when_full = WhenFull::DropOldest;
        self.spool.append(NewRecord { kind, topic: "t".into(), ttl_seconds, when_full, make: |_| payload.clone() })
    }

    pub fn dropped(&self, reason: &str) -> u64 {
        self.options.dropped.with_label_values(&[reason]).get()
    }

    fn dropped_total(&self) -> u64 {
        ["full", "expired", "damaged", "disk"].iter().map(|reason| self.dropped(reason)).sum()
    }

    /// Everything that is left, acknowledged as it comes.
    pub fn drain(&mut self) -> Vec<Record> {
        self.spool.connected();
        let mut taken = Vec::new();
        for _ in 0..3 {
            self.pass(1);
            while let Some(record) = self.spool.take().map(|(record, _)| record).or_else(|| self.spool.take_backlog()) {
                self.spool.acknowledge(record.place);
                taken.push(record);
                self.pass(0);
            }
        }
        taken
    }
}

/// What the model knows.
#[derive(Default)]
struct Model {
    /// Records that wait, by place.
    waiting: BTreeMap<RecordId, Bytes>,
    /// The last thing appended at each place.
    appended: BTreeMap<RecordId, Bytes>,
    /// Places that a power cut or a kill had to leave alone.
    promised: BTreeSet<RecordId>,
    /// Places that a power cut may have torn: they are there, or count as damaged when they are read.
    suspect: BTreeSet<RecordId>,
    in_flight: Vec<RecordId>,
    last_live: BTreeMap<RecordKind, u64>,
    last_backlog: BTreeMap<RecordKind, u64>,
    dropped_so_far: u64,
    damaged_so_far: u64,
    serial: u64,
}

impl Model {
    /// What went without being acknowledged was counted, exactly.
    fn reconcile(&mut self, driven: &DrivenSpool) {
        let mut state = driven.spool.shared.state();
        let mut is_gone = |place: &RecordId| state.partition(place.kind).is_gone(place.position);
        let gone: Vec<RecordId> = self.waiting.keys().copied().filter(|place| is_gone(place)).collect();
        drop(state);
        let (dropped, damaged) = (driven.dropped_total(), driven.dropped("damaged"));
        let newly = dropped - self.dropped_so_far;
        assert_eq!(gone.len() as u64, newly, "records went without being counted, or were counted twice");
        let on_purpose = newly - (damaged - self.damaged_so_far);
        (self.dropped_so_far, self.damaged_so_far) = (dropped, damaged);
        let broken = gone.iter().filter(|place| self.promised.remove(place)).count() as u64;
        assert!(broken <= on_purpose, "a record that was promised is damaged: {gone:?}");
        gone.iter().for_each(|place| drop(self.waiting.remove(place)));
        assert_eq!(driven.spool.stats().records, self.waiting.len() as u64);
    }

    fn take(&mut self, driven: &DrivenSpool) {
        let (record, is_live) = match driven.spool.take() {
            Some((record, is_live)) => (record, Some(is_live)),
            None => match driven.spool.take_backlog() {
                Some(record) => (record, None),
                None => return,
            },
        };
        let place = record.place;
        assert_eq!(self.waiting.get(&place), Some(&record.payload), "{place:?} is not what was appended");
        assert!(!self.in_flight.contains(&place), "{place:?} is on the way already");
        self.in_flight.push(place);
        let last = match is_live {
            Some(true) => &mut self.last_live,
            None => &mut self.last_backlog,
            Some(false) => return,
        };
        let last = last.insert(place.kind, place.position);
        assert!(last.is_none_or(|last| last < place.position), "{place:?} after {last:?}");
    }

    fn acknowledge(&mut self, driven: &DrivenSpool, random: &mut fastrand::Rng) {
        if self.in_flight.is_empty() {
            return;
        }
        // Brokers answer in order, mostly.
        let index = if random.u8(0..4) == 0 { random.usize(0..self.in_flight.len()) } else { 0 };
        let place = self.in_flight.remove(index);
        driven.spool.acknowledge(place);
        self.waiting.remove(&place);
        self.promised.remove(&place);
    }

    fn connect(&mut self, driven: &DrivenSpool) {
        driven.spool.connected();
        self.forget_flight();
    }

    /// What was on the way is so no more, and a new connection has an order of its own.
    fn forget_flight(&mut self) {
        self.in_flight.clear();
        self.last_live.clear();
        self.last_backlog.clear();
    }

    /// An orderly end. It brings everything to a disk that takes it; what only memory held is counted.
    fn restart(&mut self, driven: DrivenSpool) -> DrivenSpool {
        let is_well = driven.disk.is_well();
        let driven = driven.restart();
        self.forget_flight();
        let found = found(&driven);
        let lost = self.waiting.keys().filter(|place| !found.contains(place)).count() as u64;
        let back = found.iter().filter(|place| !self.waiting.contains_key(place)).count();
        let dropped = driven.dropped_total();
        assert!(!is_well || lost == dropped - self.dropped_so_far, "{lost} went at the end, {dropped} were counted");
        assert!(!is_well || back == 0, "{back} records that were delivered came back after an orderly end");
        self.waiting = found.iter().map(|place| (*place, self.appended[place].clone())).collect();
        (self.dropped_so_far, self.damaged_so_far) = (dropped, driven.dropped("damaged"));
        driven
    }

    fn crash(&mut self, driven: DrivenSpool, random: &mut fastrand::Rng) -> DrivenSpool {
        let is_power_cut = random.bool();
        let mut state = driven.spool.shared.state();
        let must_survive: BTreeSet<RecordId> = self
            .waiting
            .keys()
            .filter(|place| !self.suspect.contains(place))
            .filter(|place| match is_power_cut {
                true => state.partition(place.kind).is_promised(place.position),
                false => state.partition(place.kind).is_written(place.position),
            })
            .copied()
            .collect();
        drop(state);
        if is_power_cut {
            driven.disk.cut_power(random);
        }
        driven.disk.set_mood(FaultMode::default());
        let driven = driven.reopen();
        let found = found(&driven);
        let lost: Vec<_> = must_survive.difference(&found).collect();
        assert!(lost.is_empty(), "lost {lost:?} in a {}", if is_power_cut { "power cut" } else { "kill" });
        self.waiting = found.iter().map(|place| (*place, self.appended[place].clone())).collect();
        if is_power_cut {
            self.suspect = found.difference(&must_survive).copied().collect();
        }
        self.promised = must_survive;
        self.forget_flight();
        driven
    }
}

/// The records that a spool has just found on its disk.
fn found(driven: &DrivenSpool) -> BTreeSet<RecordId> {
    let mut state = driven.spool.shared.state();
    let mut found = BTreeSet::new();
    for kind in RecordKind::ALL {
        found.extend(state.partition(kind).positions().into_iter().map(|position| RecordId { kind, position }));
    }
    found
}

fn sequence(seed: u64) {
    let random = &mut fastrand::Rng::with_seed(seed);
    let mut driven = DrivenSpool::new(options(4000));
    let mut model = Model::default();
    for _ in 0..STEPS {
        match random.u8(0..24) {
            0..=8 => {
                let kind = RecordKind::ALL[random.usize(0..3).min(random.usize(0..3))];
                model.serial += 1;
                let length = if random.u8(0..20) == 0 { random.usize(300..900) } else { random.usize(1..60) };
                let payload = Bytes::from(format!("{:>length$}", model.serial));
                let ttl_seconds = if random.u8(0..6) == 0 { random.u32(1..30) } else { 0 };
                let position = driven.spool.shared.state().partition(kind).next();
                assert!(matches!(driven.append(kind, payload.clone(), ttl_seconds), AppendOutcome::Kept(_)));
                let place = RecordId { kind, position };
                model.waiting.insert(place, payload.clone());
                model.appended.insert(place, payload);
            }
            9..=13 => driven.pass(random.u64(0..30)),
            14..=16 => model.take(&driven),
            17..=19 => model.acknowledge(&driven, random),
            20 => model.connect(&driven),
            21 => match random.u8(0..4) {
                0 => driven.spool.disconnected(),
                1 => driven.pass(6000),
                2 => driven.pass(random.u64(1000..20_000)),
                _ => {
                    model.reconcile(&driven);
                    driven = model.restart(driven);
                }
            },
            22 => {
                let random_mood = FaultMode {
                    refuses_writes: random.bool(),
                    refuses_syncs: random.bool(),
                    is_read_only: random.u8(0..4) == 0,
                };
                driven.disk.set_mood(if random.bool() { FaultMode::default() } else { random_mood });
            }
            _ => {
                model.reconcile(&driven);
                driven = model.crash(driven, random);
            }
        }
        model.reconcile(&driven);
        let bytes_max = driven.options.bytes_max + 2 * (driven.options.segment_bytes + 900);
        assert!(driven.spool.shared.state().bytes() <= bytes_max);
    }
    // In the end the disk is well again, and everything that waits is delivered or counted.
    driven.disk.set_mood(FaultMode::default());
    driven.pass(2000);
    model.connect(&driven);
    for record in driven.drain() {
        assert_eq!(model.waiting.remove(&record.place), Some(record.payload));
    }
    model.reconcile(&driven);
    assert!(model.waiting.is_empty(), "{:?} never came", model.waiting.keys());
    driven.pass(20_000);
    driven.pass(20_000);
    let left = driven.disk.paths();
    assert!(left.len() <= 6, "an empty spool leaves {left:?}");
}

#[test]
fn random_sequences_lose_nothing_that_was_promised() {
    let sequences = std::env::var("LINESIDE_SPOOL_SEQUENCES").map_or(SEQUENCES, |text| text.parse().unwrap());
    for seed in SEEDS.into_iter().chain(0..sequences) {
        let ended = std::panic::catch_unwind(|| sequence(seed));
        assert!(ended.is_ok(), "seed {seed} fails; add it to SEEDS");
    }
}
