//! What a spool has to do, case by case. What nobody thought of is looked for in `model.rs`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::fake_disk::FaultMode;
use super::model_test::{DrivenSpool, options};
use super::*;

fn text(number: u64) -> Bytes {
    Bytes::from(format!("{number:04}"))
}

fn fill(driven: &DrivenSpool, numbers: impl IntoIterator<Item = u64>) {
    for number in numbers {
        assert!(matches!(driven.append(RecordKind::Result, text(number), 0), AppendOutcome::Kept(_)));
    }
}

fn texts(records: &[Record]) -> Vec<u64> {
    records.iter().map(|record| std::str::from_utf8(&record.payload).unwrap().parse().unwrap()).collect()
}

/// Bounds that are not met.
fn large() -> Options {
    bounded(1 << 20)
}

/// A bound of the disk, and none of memory.
fn bounded(bytes_max: u64) -> Options {
    Options { memory_bytes_max: 1 << 20, ..options(bytes_max) }
}

#[test]
fn records_come_back_in_order_after_a_restart_and_are_forgotten_when_acknowledged() {
    let mut driven = DrivenSpool::new(large());
    fill(&driven, 1..=50);
    driven.pass(10);
    let mut driven = driven.reopen();
    assert_eq!(driven.spool.stats().records, 50, "written at once, so a killed process loses nothing");
    assert_eq!(texts(&driven.drain()), Vec::from_iter(1..=50));
    assert_eq!(driven.spool.stats().records, 0);
    let mut driven = driven.restart();
    assert!(driven.drain().is_empty(), "what was acknowledged does not come again");
}

#[test]
fn a_killed_process_sends_again_only_what_was_on_the_way() {
    let mut driven = DrivenSpool::new(large());
    fill(&driven, 1..=20);
    driven.spool.connected();
    driven.pass(1);
    let taken: Vec<Record> = (0..12).map(|_| driven.spool.take_backlog().unwrap()).collect();
    // In any order, twice, and unknown ones.
    for index in [3, 0, 1, 2, 3, 7] {
        driven.spool.acknowledge(taken[index].place);
    }
    driven.spool.acknowledge(RecordId { kind: RecordKind::Event, position: 99 });
    driven.pass(1);
    let mut driven = driven.reopen();
    assert_eq!(texts(&driven.drain()), [5, 6, 7].into_iter().chain(9..=20).collect::<Vec<_>>());
}

#[test]
fn live_records_go_before_the_backlog_and_what_was_on_the_way_before_both() {
    let mut driven = DrivenSpool::new(large());
    fill(&driven, 1..=5);
    driven.spool.connected();
    fill(&driven, 6..=7);
    driven.pass(1);
    let order = |driven: &DrivenSpool| {
        let next = || driven.spool.take().or_else(|| driven.spool.take_backlog().map(|record| (record, false)));
        let taken: Vec<(Record, bool)> = std::iter::from_fn(next).collect();
        taken.iter().map(|(record, is_live)| (texts(std::slice::from_ref(record))[0], *is_live)).collect::<Vec<_>>()
    };
    let late = |number: u64| (number, false);
    assert_eq!(order(&driven), [(6, true), (7, true), late(1), late(2), late(3), late(4), late(5)]);
    driven.spool.disconnected();
    fill(&driven, 8..=8);
    driven.spool.connected();
    fill(&driven, 9..=9);
    driven.pass(1);
    let again = order(&driven);
    assert_eq!(again, (1..=7).map(late).chain([(9, true), late(8)]).collect::<Vec<_>>());
}

#[test]
fn a_live_record_that_nobody_sent_in_time_gives_way_to_newer_ones() {
    let mut driven = DrivenSpool::new(large());
    driven.spool.connected();
    fill(&driven, 1..=3);
    driven.pass(6000);
    assert!(driven.spool.take().is_none(), "too old to be live");
    fill(&driven, 4..=4);
    assert_eq!(texts(&[driven.spool.take().unwrap().0]), [4]);
    driven.pass(1);
    assert_eq!(texts(&[driven.spool.take_backlog().unwrap()]), [1], "and comes as backlog");
}

#[test]
fn a_record_that_is_acknowledged_soon_costs_no_sync() {
    let mut driven =
        DrivenSpool::new(Options { sync_interval: Duration::from_millis(200), segment_bytes: 1 << 20, ..large() });
    driven.spool.connected();
    let at_start = driven.disk.syncs();
    for number in 1..=100 {
        fill(&driven, [number]);
        driven.pass(5);
        let (record, _) = driven.spool.take().unwrap();
        driven.spool.acknowledge(record.place);
        driven.pass(95);
    }
    assert_eq!(driven.disk.syncs(), at_start);
    fill(&driven, [101]);
    driven.pass(100);
    assert_eq!(driven.disk.syncs(), at_start, "not yet due");
    driven.pass(150);
    assert!(driven.disk.syncs() > at_start, "one that waits is synced");
}

#[test]
fn a_full_spool_gives_up_metrics_first_and_then_the_oldest_results() {
    let mut driven = DrivenSpool::new(bounded(6000));
    let big = |fill: u8| Bytes::from(vec![fill; 260]);
    driven.append(RecordKind::Event, big(b'e'), 0);
    (0..4).for_each(|_| assert!(driven.append(RecordKind::Metrics, big(b'm'), 0) != AppendOutcome::Full));
    for _ in 0..60 {
        driven.append(RecordKind::Result, big(b'r'), 0);
        driven.pass(1);
        assert!(driven.disk.bytes(Path::new("/spool")) <= 6000 + 600 + 3 * 8192, "the bound, a segment, the cursors");
    }
    let dropped = driven.dropped("full");
    let stats = driven.spool.stats();
    assert!(stats.is_overflowing && stats.bytes <= 6000);
    assert_eq!(stats.records + dropped, 65, "waiting and given up");
    let left = driven.drain();
    assert_eq!(left.iter().filter(|record| record.place.kind == RecordKind::Metrics).count(), 0);
    assert_eq!(left.iter().filter(|record| record.place.kind == RecordKind::Event).count(), 1);
    let results: Vec<u64> = left
        .iter()
        .filter(|record| record.place.kind == RecordKind::Result)
        .map(|record| record.place.position)
        .collect();
    assert_eq!(*results.last().unwrap(), 60, "the newest are there");
    assert!(results.windows(2).all(|pair| pair[0] + 1 == pair[1]));
}

#[test]
fn drop_newest_refuses_and_uses_no_number() {
    let mut driven = DrivenSpool::new(bounded(2000));
    let put = |driven: &DrivenSpool| {
        let when_full = WhenFull::DropNewest;
        let make = |_| Bytes::from(vec![b'x'; 300]);
        driven.spool.append(NewRecord { kind: RecordKind::Result, topic: "t".into(), ttl_seconds: 0, when_full, make })
    };
    let kept = std::iter::repeat_with(|| put(&driven)).take_while(|kept| *kept != AppendOutcome::Full).count() as u64;
    assert!((4..=7).contains(&kept), "{kept}");
    assert_eq!(put(&driven), AppendOutcome::Full);
    assert_eq!(driven.dropped("full"), 2);
    assert_eq!(driven.drain().len() as u64, kept, "the oldest stay");
    driven.pass(20_000);
    driven.pass(20_000);
    assert_eq!(put(&driven), AppendOutcome::Kept(kept + 1));
}

#[test]
fn batch_work_waits_for_room() {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(folder.path(), bounded(2000)).unwrap();
    let put = |spool: &Spool| {
        let make = |_| Bytes::from(vec![b'x'; 300]);
        let when_full = WhenFull::Block;
        spool.append(NewRecord { kind: RecordKind::Result, topic: "t".into(), ttl_seconds: 0, when_full, make })
    };
    let (done, waiting) = std::sync::mpsc::channel();
    let writer = std::thread::spawn({
        let spool = spool.clone();
        move || {
            for _ in 0..20 {
                assert!(matches!(put(&spool), AppendOutcome::Kept(_)));
                done.send(()).unwrap();
            }
        }
    });
    let before = waiting.iter().take(5).count();
    assert_eq!(before, 5);
    spool.connected();
    let mut taken = 0;
    while taken < 20 {
        match spool.take().map(|(record, _)| record).or_else(|| spool.take_backlog()) {
            Some(record) => {
                spool.acknowledge(record.place);
                taken += 1;
            }
            None => std::thread::yield_now(),
        }
    }
    writer.join().unwrap();
    assert_eq!(spool.stats().records, 0);
}

#[test]
fn what_is_too_large_costs_nobody_else() {
    let driven = DrivenSpool::new(bounded(2000));
    fill(&driven, 1..=3);
    assert_eq!(driven.append(RecordKind::Result, vec![0; 2000].into(), 0), AppendOutcome::TooLarge);
    assert_eq!(driven.dropped("too_large"), 1);
    assert_eq!(driven.append(RecordKind::Result, text(4), 0), AppendOutcome::Kept(4), "and no number");
    let large = DrivenSpool::new(options(u64::MAX));
    assert_eq!(large.append(RecordKind::Result, vec![0; RECORD_BYTES_MAX as usize].into(), 0), AppendOutcome::TooLarge);
}

#[test]
fn age_is_the_time_the_agent_ran() {
    let mut driven = DrivenSpool::new(large());
    driven.append(RecordKind::Result, text(1), 60);
    driven.append(RecordKind::Result, text(2), 0);
    driven.pass(50_000);
    // The process is gone for however long; nothing grows older meanwhile, whatever the wall clock says.
    let mut driven = driven.restart();
    driven.pass(5_000);
    assert_eq!(driven.spool.stats().records, 2);
    let mut driven = driven.restart();
    driven.pass(20_000);
    assert_eq!(texts(&driven.drain()), [2]);
    assert_eq!(driven.dropped("expired"), 1);
}

#[test]
fn a_whole_segment_that_has_expired_goes_without_being_read() {
    let mut driven = DrivenSpool::new(Options { age_max_seconds: 100, ..large() });
    fill(&driven, 1..=100);
    driven.pass(1);
    let mut driven = driven.restart();
    driven.pass(50_000);
    assert_eq!(driven.spool.stats().records, 100);
    driven.pass(60_000);
    assert_eq!((driven.spool.stats().records, driven.dropped("expired")), (0, 100));
    driven.pass(10_001);
    assert!(driven.disk.paths().iter().all(|path| path.ends_with("cursor")), "{:?}", driven.disk.paths());
}

#[test]
fn a_disk_that_refuses_stops_nothing_and_is_used_again_when_it_takes_records() {
    for mood in [
        FaultMode { refuses_writes: true, ..FaultMode::default() },
        FaultMode { refuses_syncs: true, ..FaultMode::default() },
        FaultMode { is_read_only: true, ..FaultMode::default() },
    ] {
        let mut driven = DrivenSpool::new(large());
        fill(&driven, 1..=3);
        driven.pass(30);
        driven.disk.set_mood(mood);
        fill(&driven, 4..=9);
        driven.pass(30);
        driven.pass(30);
        assert!(driven.spool.stats().trouble.is_some(), "{mood:?}");
        // The line goes on, and what it makes gets across.
        driven.spool.connected();
        fill(&driven, 10..=12);
        assert_eq!(texts(&[driven.spool.take().unwrap().0]), [10]);
        driven.disk.set_mood(FaultMode::default());
        driven.pass(1001);
        assert_eq!(driven.spool.stats().trouble, None, "{mood:?}");
        let mut driven = driven.reopen();
        assert_eq!(texts(&driven.drain()), Vec::from_iter(1..=12), "{mood:?}");
        assert_eq!(driven.dropped("disk"), 0);
    }
}

#[test]
fn memory_is_bounded_while_the_disk_refuses() {
    let mut driven = DrivenSpool::new(Options { memory_bytes_max: 10_000, ..large() });
    driven.disk.set_mood(FaultMode { is_read_only: true, ..FaultMode::default() });
    fill(&driven, 1..=1000);
    driven.pass(1);
    let (kept, dropped) = (driven.spool.stats().records, driven.dropped("disk"));
    assert_eq!(kept + dropped, 1000);
    assert!(kept > 200 && kept < 300, "{kept}");
    driven.disk.set_mood(FaultMode::default());
    driven.pass(1001);
    let left = texts(&driven.reopen().drain());
    assert_eq!(left, Vec::from_iter(dropped + 1..=1000), "the newest are kept");
}

/// Faults of the medium: of every file, at every place that chance chooses.
#[test]
fn damage_costs_what_is_damaged_and_the_counter_says_how_much() {
    let rounds = std::env::var("LINESIDE_SPOOL_DAMAGE").map_or(300, |text| text.parse().unwrap());
    let mut random = fastrand::Rng::with_seed(3);
    for round in 0..rounds {
        let mut driven = DrivenSpool::new(large());
        for first in [1, 21, 41] {
            fill(&driven, first..first + 20);
            driven.pass(1);
        }
        let driven = driven.restart();
        let files: Vec<PathBuf> = driven.disk.paths().into_iter().filter(|path| !path.ends_with("cursor")).collect();
        assert_eq!(files.len(), 3);
        let cursor = PathBuf::from("/spool/result/cursor");
        let path = if round % 10 == 0 { &cursor } else { &files[random.usize(0..files.len())] };
        let kind = round % 3;
        driven.disk.damage(path, |bytes| {
            let at = random.usize(0..bytes.len());
            let end = (at + random.usize(1..80)).min(bytes.len());
            match kind {
                0 => bytes[at] ^= 1 << random.u8(0..8),
                1 => bytes[at..end].fill(0),
                _ => bytes.truncate(at),
            }
        });
        let mut driven = driven.reopen();
        let left: BTreeSet<u64> = texts(&driven.drain()).into_iter().collect();
        assert!(left.iter().all(|number| (1..=60).contains(number)));
        let lost = 60 - left.len() as u64;
        assert_eq!(driven.dropped("damaged"), lost, "round {round}, {}", path.display());
        // A zeroed range of 80 bytes touches three records of 42 bytes at most; a cut takes the rest of one file.
        let most = if kind == 2 { 30 } else { 3 };
        assert!(lost <= most, "round {round}: {lost} of 60 are lost");
        assert_eq!(driven.spool.stats().records, 0);
    }
}

#[test]
fn files_of_others_and_empty_ones_are_left_alone_or_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let partition = folder.path().join("result");
    std::fs::create_dir_all(&partition).unwrap();
    for name in ["README", "1-2.seg", "9-1-0-0.seg", "x.open", "00000000000000000007.open", "..seg", "1-2-3-4-5.seg"] {
        std::fs::write(partition.join(name), if name == "README" { "mine" } else { "" }).unwrap();
    }
    let name = format!("{:020}-{:020}-0-ffffffffffffffff.seg", 3, 4);
    std::fs::write(partition.join(name), [0xFF; 100]).unwrap();
    let spool = Spool::open(folder.path(), large()).unwrap();
    assert_eq!(spool.stats().records, 2, "its name says so");
    spool.connected();
    let begun = std::time::Instant::now();
    while spool.stats().records > 0 {
        assert!(begun.elapsed() < Duration::from_secs(30));
        std::thread::yield_now();
    }
    assert_eq!(spool.options.dropped.with_label_values(&["damaged"]).get(), 2);
    assert!(partition.join("README").exists());
}

#[test]
fn one_agent_at_a_time_has_a_spool_and_others_may_look() {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(folder.path(), large()).unwrap();
    let make = |_| Bytes::from_static(b"{\"id\":\"a:1:1\"}");
    let when_full = WhenFull::DropOldest;
    spool.append(NewRecord { kind: RecordKind::Event, topic: "t".into(), ttl_seconds: 0, when_full, make });
    let refused = lock(folder.path(), Duration::ZERO).unwrap_err().to_string();
    assert!(refused.contains("another agent"), "{refused}");
    assert!(View::purge(folder.path(), |_| true).is_err());
    spool.close();
    let view = View::open(folder.path()).unwrap();
    let counts: Vec<u64> = view.partitions().map(|partition| partition.records).collect();
    assert_eq!(counts, [0, 1, 0]);
    assert_eq!(view.records().count(), 1);
    drop(spool);
    assert_eq!(View::purge(folder.path(), |kind| kind == RecordKind::Result).unwrap(), 0);
    assert_eq!(View::purge(folder.path(), |_| true).unwrap(), 1);
    assert_eq!(Spool::open(folder.path(), large()).unwrap().stats().records, 0);
    assert!(View::open(&folder.path().join("elsewhere")).is_err());
}
