//! Tests of the spool by example. `model_test.rs` searches for the cases that are missing here.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use lineside_common::supervisor::Supervisor;

use crate::fake_disk::{FakeDisk, FaultMode};
use crate::simulation::{DrivenSpool, ROOT, options};
use crate::*;

fn text(number: u64) -> Bytes {
    Bytes::from(format!("{number:04}"))
}

fn fill(driven: &DrivenSpool, numbers: impl IntoIterator<Item = u64>) {
    for number in numbers {
        assert!(matches!(driven.append(RecordKind::Result, text(number), 0), AppendOutcome::Appended(_)));
    }
}

fn texts(records: &[Record]) -> Vec<u64> {
    records.iter().map(|record| std::str::from_utf8(&record.payload).unwrap().parse().unwrap()).collect()
}

/// Bounds that are not reached.
fn unbounded() -> Options {
    bounded(1 << 20)
}

/// A bound on disk, and none in memory.
fn bounded(bytes_max: u64) -> Options {
    Options { memory_bytes_max: 1 << 20, ..options(bytes_max) }
}

#[test]
fn records_are_recovered_in_order_and_removed_when_acknowledged() {
    let mut driven = DrivenSpool::new(unbounded());
    fill(&driven, 1..=50);
    driven.advance(10);
    let mut driven = driven.kill();
    assert_eq!(driven.spool.stats().records, 50, "records are written at once, so a kill loses none");
    assert_eq!(texts(&driven.drain()), Vec::from_iter(1..=50));
    assert_eq!(driven.spool.stats().records, 0);
    let mut driven = driven.restart();
    assert!(driven.drain().is_empty(), "acknowledged records are not delivered again");
}

#[test]
fn a_kill_repeats_only_unacknowledged_records() {
    let mut driven = DrivenSpool::new(unbounded());
    fill(&driven, 1..=20);
    driven.spool.connected();
    driven.advance(1);
    let taken: Vec<Record> = (0..12).map(|_| driven.spool.take_backlog().unwrap()).collect();
    // In any order, repeated, and unknown records.
    for index in [3, 0, 1, 2, 3, 7] {
        driven.spool.acknowledge(taken[index].id);
    }
    driven.spool.acknowledge(RecordId { kind: RecordKind::Event, position: 99 });
    driven.advance(1);
    let mut driven = driven.kill();
    assert_eq!(texts(&driven.drain()), [5, 6, 7].into_iter().chain(9..=20).collect::<Vec<_>>());
}

#[test]
fn resends_precede_live_records_and_live_records_precede_the_backlog() {
    let mut driven = DrivenSpool::new(unbounded());
    fill(&driven, 1..=5);
    driven.spool.connected();
    fill(&driven, 6..=7);
    driven.advance(1);
    let order = |driven: &DrivenSpool| {
        let live_or_resend = || driven.spool.take().map(|(record, origin)| (record, Some(origin)));
        let next = || live_or_resend().or_else(|| driven.spool.take_backlog().map(|record| (record, None)));
        let taken: Vec<(Record, Option<RecordOrigin>)> = std::iter::from_fn(next).collect();
        taken.iter().map(|(record, origin)| (texts(std::slice::from_ref(record))[0], *origin)).collect::<Vec<_>>()
    };
    let live = |number: u64| (number, Some(RecordOrigin::Live));
    let resend = |number: u64| (number, Some(RecordOrigin::Resend));
    let backlog = |number: u64| (number, None);
    let expected: Vec<_> = (6..=7).map(live).chain((1..=5).map(backlog)).collect();
    assert_eq!(order(&driven), expected);
    driven.spool.disconnected();
    fill(&driven, 8..=8);
    driven.spool.connected();
    fill(&driven, 9..=9);
    driven.advance(1);
    let expected: Vec<_> = (1..=7).map(resend).chain([live(9), backlog(8)]).collect();
    assert_eq!(order(&driven), expected);
}

#[test]
fn a_live_record_becomes_backlog_after_five_seconds() {
    let mut driven = DrivenSpool::new(unbounded());
    driven.spool.connected();
    fill(&driven, 1..=3);
    driven.advance(6000);
    assert!(driven.spool.take().is_none(), "too old to be live");
    fill(&driven, 4..=4);
    assert_eq!(texts(&[driven.spool.take().unwrap().0]), [4]);
    driven.advance(1);
    assert_eq!(texts(&[driven.spool.take_backlog().unwrap()]), [1], "it is delivered as backlog");
}

#[test]
fn a_record_acknowledged_before_the_sync_interval_is_not_synced() {
    let mut driven =
        DrivenSpool::new(Options { sync_interval: Duration::from_millis(200), segment_bytes: 1 << 20, ..unbounded() });
    driven.spool.connected();
    let at_start = driven.disk.syncs();
    for number in 1..=100 {
        fill(&driven, [number]);
        driven.advance(5);
        let (record, _) = driven.spool.take().unwrap();
        driven.spool.acknowledge(record.id);
        driven.advance(95);
    }
    assert_eq!(driven.disk.syncs(), at_start);
    fill(&driven, [101]);
    driven.advance(100);
    assert_eq!(driven.disk.syncs(), at_start, "not yet due");
    driven.advance(150);
    assert!(driven.disk.syncs() > at_start, "a pending record is synced");
}

#[test]
fn a_full_spool_drops_metrics_first_and_then_the_oldest_results() {
    let mut driven = DrivenSpool::new(bounded(6000));
    let big = |fill: u8| Bytes::from(vec![fill; 260]);
    driven.append(RecordKind::Event, big(b'e'), 0);
    (0..4).for_each(|_| assert!(driven.append(RecordKind::Metrics, big(b'm'), 0) != AppendOutcome::Full));
    for _ in 0..60 {
        driven.append(RecordKind::Result, big(b'r'), 0);
        driven.advance(1);
        assert!(driven.disk.bytes(Path::new(ROOT)) <= 6000 + 600 + 3 * 8192, "the bound, one segment and the cursors");
    }
    let dropped = driven.dropped(DropReason::Full);
    let stats = driven.spool.stats();
    assert!(stats.is_overflowing && stats.bytes <= 6000);
    assert_eq!(stats.records + dropped, 65, "each record is pending or dropped");
    let left = driven.drain();
    assert_eq!(left.iter().filter(|record| record.id.kind == RecordKind::Metrics).count(), 0);
    assert_eq!(left.iter().filter(|record| record.id.kind == RecordKind::Event).count(), 1);
    let results: Vec<u64> =
        left.iter().filter(|record| record.id.kind == RecordKind::Result).map(|record| record.id.position).collect();
    assert_eq!(*results.last().unwrap(), 60, "the newest are kept");
    assert!(results.windows(2).all(|pair| pair[0] + 1 == pair[1]));
}

#[test]
fn drop_newest_drops_the_new_record_and_uses_no_sequence_number() {
    let mut driven = DrivenSpool::new(bounded(2000));
    let append = |driven: &DrivenSpool| {
        let when_full = WhenFull::DropNewest;
        let build_payload = |_| Bytes::from(vec![b'x'; 300]);
        driven.spool.append(NewRecord {
            kind: RecordKind::Result,
            topic: "t".into(),
            ttl_seconds: 0,
            when_full,
            build_payload,
        })
    };
    let kept =
        std::iter::repeat_with(|| append(&driven)).take_while(|kept| *kept != AppendOutcome::Full).count() as u64;
    assert!((4..=7).contains(&kept), "{kept}");
    assert_eq!(append(&driven), AppendOutcome::Full);
    assert_eq!(driven.dropped(DropReason::Full), 2);
    assert_eq!(driven.drain().len() as u64, kept, "the oldest are kept");
    driven.advance(20_000);
    driven.advance(20_000);
    assert_eq!(append(&driven), AppendOutcome::Appended(kept + 1));
}

#[test]
fn block_blocks_the_caller_until_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(folder.path(), bounded(2000)).unwrap();
    let append = |spool: &Spool| {
        let build_payload = |_| Bytes::from(vec![b'x'; 300]);
        let when_full = WhenFull::Block;
        spool.append(NewRecord {
            kind: RecordKind::Result,
            topic: "t".into(),
            ttl_seconds: 0,
            when_full,
            build_payload,
        })
    };
    let (appended, appends) = std::sync::mpsc::channel();
    let producer = std::thread::spawn({
        let spool = spool.clone();
        move || {
            for _ in 0..20 {
                assert!(matches!(append(&spool), AppendOutcome::Appended(_)));
                appended.send(()).unwrap();
            }
        }
    });
    assert_eq!(appends.iter().take(5).count(), 5);
    spool.connected();
    let mut taken = 0;
    while taken < 20 {
        match spool.take().map(|(record, _)| record).or_else(|| spool.take_backlog()) {
            Some(record) => {
                spool.acknowledge(record.id);
                taken += 1;
            }
            None => std::thread::yield_now(),
        }
    }
    producer.join().unwrap();
    assert_eq!(spool.stats().records, 0);
}

#[test]
fn a_record_that_is_too_large_is_dropped_and_displaces_no_other() {
    let driven = DrivenSpool::new(bounded(2000));
    fill(&driven, 1..=3);
    assert_eq!(driven.append(RecordKind::Result, vec![0; 2000].into(), 0), AppendOutcome::TooLarge);
    assert_eq!(driven.dropped(DropReason::TooLarge), 1);
    assert_eq!(
        driven.append(RecordKind::Result, text(4), 0),
        AppendOutcome::Appended(4),
        "no sequence number was used"
    );
    let unlimited = DrivenSpool::new(options(u64::MAX));
    assert_eq!(
        unlimited.append(RecordKind::Result, vec![0; RECORD_BYTES_MAX as usize].into(), 0),
        AppendOutcome::TooLarge
    );
}

#[test]
fn age_is_time_during_which_the_agent_runs() {
    let mut driven = DrivenSpool::new(unbounded());
    driven.append(RecordKind::Result, text(1), 60);
    driven.append(RecordKind::Result, text(2), 0);
    driven.advance(50_000);
    // Records do not age while the process is stopped, whatever the wall clock shows.
    let mut driven = driven.restart();
    driven.advance(5_000);
    assert_eq!(driven.spool.stats().records, 2);
    let mut driven = driven.restart();
    driven.advance(20_000);
    assert_eq!(texts(&driven.drain()), [2]);
    assert_eq!(driven.dropped(DropReason::Expired), 1);
}

#[test]
fn an_expired_segment_is_removed_without_being_read() {
    let mut driven = DrivenSpool::new(Options { age_max_seconds: 100, ..unbounded() });
    fill(&driven, 1..=100);
    driven.advance(1);
    let mut driven = driven.restart();
    driven.advance(50_000);
    assert_eq!(driven.spool.stats().records, 100);
    driven.advance(60_000);
    assert_eq!((driven.spool.stats().records, driven.dropped(DropReason::Expired)), (0, 100));
    driven.advance(10_001);
    assert!(driven.disk.paths().iter().all(|path| path.ends_with("cursor")), "{:?}", driven.disk.paths());
}

#[test]
fn records_are_delivered_from_memory_while_the_disk_refuses_writes() {
    for faults in [
        FaultMode { refuses_writes: true, ..FaultMode::default() },
        FaultMode { refuses_syncs: true, ..FaultMode::default() },
        FaultMode { is_read_only: true, ..FaultMode::default() },
    ] {
        let mut driven = DrivenSpool::new(unbounded());
        fill(&driven, 1..=3);
        driven.advance(30);
        driven.disk.set_faults(faults);
        fill(&driven, 4..=9);
        driven.advance(30);
        driven.advance(30);
        assert!(driven.spool.stats().degraded.is_some(), "{faults:?}");
        // New records are accepted and delivered.
        driven.spool.connected();
        fill(&driven, 10..=12);
        assert_eq!(texts(&[driven.spool.take().unwrap().0]), [10]);
        driven.disk.set_faults(FaultMode::default());
        driven.advance(1001);
        assert_eq!(driven.spool.stats().degraded, None, "{faults:?}");
        let mut driven = driven.kill();
        assert_eq!(texts(&driven.drain()), Vec::from_iter(1..=12), "{faults:?}");
        assert_eq!(driven.dropped(DropReason::Disk), 0);
    }
}

#[test]
fn memory_is_bounded_while_the_disk_refuses_writes() {
    let mut driven = DrivenSpool::new(Options { memory_bytes_max: 10_000, ..unbounded() });
    driven.disk.set_faults(FaultMode { is_read_only: true, ..FaultMode::default() });
    fill(&driven, 1..=1000);
    driven.advance(1);
    let (kept, dropped) = (driven.spool.stats().records, driven.dropped(DropReason::Disk));
    assert_eq!(kept + dropped, 1000);
    assert!(kept > 200 && kept < 300, "{kept}");
    driven.disk.set_faults(FaultMode::default());
    driven.advance(1001);
    let left = texts(&driven.kill().drain());
    assert_eq!(left, Vec::from_iter(dropped + 1..=1000), "the newest are kept");
}

/// Faults of the medium, in each file and at random offsets.
#[test]
fn damage_loses_only_damaged_records_and_is_counted() {
    let rounds = std::env::var("LINESIDE_SPOOL_DAMAGE").map_or(300, |text| text.parse().unwrap());
    let mut random = fastrand::Rng::with_seed(3);
    for round in 0..rounds {
        let mut driven = DrivenSpool::new(unbounded());
        for first in [1, 21, 41] {
            fill(&driven, first..first + 20);
            driven.advance(1);
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
        let mut driven = driven.kill();
        let left: BTreeSet<u64> = texts(&driven.drain()).into_iter().collect();
        assert!(left.iter().all(|number| (1..=60).contains(number)));
        let lost = 60 - left.len() as u64;
        assert_eq!(driven.dropped(DropReason::Damaged), lost, "round {round}, {}", path.display());
        // A zeroed range of 80 bytes touches three records of 42 bytes at most; a cut takes the rest of one file.
        let most = if kind == 2 { 30 } else { 3 };
        assert!(lost <= most, "round {round}: {lost} of 60 are lost");
        assert_eq!(driven.spool.stats().records, 0);
    }
}

#[test]
fn an_unreadable_segment_is_dropped_after_three_attempts() {
    let mut driven = DrivenSpool::new(unbounded());
    fill(&driven, 1..=10);
    driven.advance(1);
    let mut driven = driven.restart();
    driven.spool.connected();
    driven.disk.set_faults(FaultMode { refuses_reads: true, ..FaultMode::default() });
    for _ in 0..2 {
        driven.advance(1);
        assert_eq!((driven.spool.stats().records, driven.dropped(DropReason::Damaged)), (10, 0));
    }
    fill(&driven, 11..=12);
    driven.advance(1);
    assert_eq!((driven.spool.stats().records, driven.dropped(DropReason::Damaged)), (2, 10));
    assert_eq!(texts(&driven.drain()), [11, 12], "records in memory are delivered");
}

#[test]
fn foreign_and_empty_files_are_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let partition = folder.path().join("result");
    std::fs::create_dir_all(&partition).unwrap();
    for name in ["README", "1-2.seg", "9-1-0-0.seg", "x.open", "00000000000000000007.open", "..seg", "1-2-3-4-5.seg"] {
        std::fs::write(partition.join(name), if name == "README" { "mine" } else { "" }).unwrap();
    }
    let name = format!("{:020}-{:020}-0-ffffffffffffffff.seg", 3, 4);
    std::fs::write(partition.join(name), [0xFF; 100]).unwrap();
    let options = unbounded();
    let metrics = options.metrics.clone();
    let spool = Spool::open(folder.path(), options).unwrap();
    assert_eq!(spool.stats().records, 2, "the name of the segment gives the number of records");
    spool.connected();
    let started = Instant::now();
    while spool.stats().records > 0 {
        assert!(started.elapsed() < Duration::from_secs(30));
        std::thread::yield_now();
    }
    assert_eq!(metrics.dropped.count(DropReason::Damaged), 2);
    assert!(partition.join("README").exists());
}

#[test]
fn a_spool_can_be_read_while_it_is_open_and_purged_when_it_is_closed() {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(folder.path(), unbounded()).unwrap();
    let build_payload = |_| Bytes::from_static(b"{\"id\":\"a:1:1\"}");
    let when_full = WhenFull::DropOldest;
    spool.append(NewRecord { kind: RecordKind::Event, topic: "t".into(), ttl_seconds: 0, when_full, build_payload });
    assert!(SpoolView::open(folder.path()).is_ok());
    spool.close();
    let view = SpoolView::open(folder.path()).unwrap();
    let counts: Vec<u64> = view.partitions().map(|partition| partition.records).collect();
    assert_eq!(counts, [0, 1, 0]);
    assert_eq!(view.records().count(), 1);
    drop(spool);
    assert_eq!(purge(folder.path(), |kind| kind == RecordKind::Result).unwrap(), 0);
    assert_eq!(purge(folder.path(), |_| true).unwrap(), 1);
    assert_eq!(Spool::open(folder.path(), unbounded()).unwrap().stats().records, 0);
    let missing = SpoolView::open(&folder.path().join("elsewhere")).err().map(|error| error.kind());
    assert_eq!(missing, Some(SpoolErrorKind::NotFound));
}

#[test]
fn a_spool_on_a_disk_that_refuses_writes_opens_delivers_and_recovers() {
    let mut driven = DrivenSpool::new(unbounded());
    fill(&driven, 1..=3);
    driven.advance(1);
    driven.advance(60_000);
    driven.disk.set_faults(FaultMode { is_read_only: true, ..FaultMode::default() });
    let mut driven = driven.kill();
    assert_eq!(driven.spool.stats().records, 3, "the disk can still be read");
    driven.advance(10);
    assert!(driven.spool.stats().degraded.is_some());
    fill(&driven, 4..=6);
    driven.advance(10);
    assert_eq!(driven.spool.stats().records, 6, "memory holds the new records");
    driven.disk.set_faults(FaultMode::default());
    driven.advance(2000);
    assert_eq!(driven.spool.stats().degraded, None);
    let mut driven = driven.kill();
    assert_eq!(texts(&driven.drain()), [1, 2, 3, 4, 5, 6]);
    assert_eq!(driven.dropped_total(), 0);
}

#[test]
fn records_that_were_completed_on_a_read_only_disk_are_not_delivered_after_it_recovers() {
    let mut driven = DrivenSpool::new(unbounded());
    fill(&driven, 1..=3);
    driven.advance(1);
    driven.advance(60_000);
    driven.disk.set_faults(FaultMode { is_read_only: true, ..FaultMode::default() });
    let mut driven = driven.kill();
    fill(&driven, 4..=5);
    assert_eq!(texts(&driven.drain()).len(), 5);
    driven.disk.set_faults(FaultMode::default());
    driven.advance(2000);
    fill(&driven, [6]);
    driven.advance(1000);
    let mut driven = driven.kill();
    assert_eq!(texts(&driven.drain()), [6]);
}

#[test]
fn missing_folders_are_created_when_the_disk_accepts_writes() {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(folder.path(), unbounded()).unwrap();
    std::fs::remove_dir_all(folder.path().join("result")).unwrap();
    let build_payload = |_| text(1);
    let when_full = WhenFull::DropOldest;
    spool.append(NewRecord { kind: RecordKind::Result, topic: "t".into(), ttl_seconds: 0, when_full, build_payload });
    spool.close();
    drop(spool);
    assert_eq!(Spool::open(folder.path(), unbounded()).unwrap().stats().records, 1);
}

fn supervisor() -> Supervisor {
    let restarts = prometheus::IntCounterVec::new(prometheus::Opts::new("restarts", "restarts"), &["task"]).unwrap();
    Supervisor::new(restarts)
}

#[test]
fn a_panic_of_the_writer_is_reported() {
    let (supervisor, disk) = (supervisor(), FakeDisk::default());
    let started = Instant::now();
    let clock: crate::shared::Clock = Arc::new(move || started.elapsed());
    let (spool, writer) = Spool::assemble(Arc::new(disk.clone()), Path::new(ROOT), &unbounded(), clock).unwrap();
    disk.set_faults(FaultMode { panics_on_write: true, ..FaultMode::default() });
    let spool = spool.start(writer, Some(supervisor.reporter("spool-writer"))).unwrap();
    let build_payload = |_| text(1);
    let when_full = WhenFull::DropOldest;
    spool.append(NewRecord { kind: RecordKind::Result, topic: "t".into(), ttl_seconds: 0, when_full, build_payload });
    // Closing waits for the end of the writer, which panics at the latest when it writes the record now.
    spool.close();
    let failure = supervisor.failure().unwrap();
    assert_eq!((failure.task.as_str(), failure.reason.as_str()), ("spool-writer", "panicked"));
    assert_eq!(spool.stats().records, 1, "the state is readable after the panic");
}

#[test]
fn an_orderly_end_and_a_refused_open_are_not_reported_as_failures() {
    let (supervisor, folder) = (supervisor(), tempfile::tempdir().unwrap());
    let options = || Options { failure_reporter: Some(supervisor.reporter("spool-writer")), ..unbounded() };
    Spool::open(folder.path(), options()).unwrap().close();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(Spool::open(&file, options()).is_err());
    assert_eq!(supervisor.failure(), None);
}

#[test]
fn metrics_follow_the_state() {
    let mut driven = DrivenSpool::new(unbounded());
    fill(&driven, 1..=3);
    driven.advance(1000);
    driven.advance(1000);
    driven.spool.update_metrics();
    let metrics = driven.options.metrics.clone();
    assert_eq!((metrics.records.get(), metrics.oldest_seconds.get(), metrics.degraded.get()), (3, 2, 0));
    assert_eq!(metrics.bytes.get(), i64::try_from(driven.spool.stats().bytes).unwrap());
    assert!(metrics.written_bytes.get() > 0 && metrics.syncs.get() > 0);
    driven.disk.set_faults(FaultMode { is_read_only: true, ..FaultMode::default() });
    fill(&driven, [4]);
    driven.advance(30);
    assert_eq!(metrics.degraded.get(), 1);
    assert_eq!(driven.spool.stats().degraded.unwrap().kind, std::io::ErrorKind::StorageFull);
}

#[test]
fn a_file_name_that_claims_many_records_is_read_at_once() {
    let name = format!("result/{:020}-{:020}-0-ffffffffffffffff.seg", 1, 1u64 << 52);
    let mut driven = DrivenSpool::recover([(name.as_str(), &b""[..])], unbounded());
    fill(&driven, [1]);
    assert_eq!(driven.drain().len(), 1);
    assert_eq!(driven.dropped(DropReason::Damaged), 1 << 52);
    assert_eq!(driven.kill().spool.stats().records, 0);
}
