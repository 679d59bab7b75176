//! The spool on the real disk: records per second that are appended, written and synced while no broker answers, and
//! records per second that are read back and acknowledged.

#![allow(missing_docs, clippy::expect_used, reason = "a benchmark that cannot run should say so and end")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lineside_common::metrics::Metrics;
use lineside_spool::{AppendOutcome, NewRecord, Options, RecordKind, Spool, WhenFull};

const RECORDS: u64 = 20_000;
/// Bytes of an ordinary result.
const PAYLOAD_BYTES: usize = 700;

fn open(folder: &std::path::Path) -> Arc<Spool> {
    let metrics = Metrics::new().expect("names are unique");
    let (dropped, written, syncs) = (metrics.spool_dropped, metrics.spool_written_bytes, metrics.spool_syncs);
    Spool::open(folder, Options::new(1 << 30, dropped, written, syncs)).expect("a temporary folder")
}

fn fill(spool: &Spool, records: u64) {
    let topic: Arc<str> = "lineside/v1/plant/edge-1/line-1/result".into();
    let payload = Bytes::from(vec![b'x'; PAYLOAD_BYTES]);
    for _ in 0..records {
        let draft = NewRecord {
            kind: RecordKind::Result,
            topic: topic.clone(),
            ttl_seconds: 0,
            when_full: WhenFull::Block,
            make: |_| payload.clone(),
        };
        assert!(matches!(spool.append(draft), AppendOutcome::Kept(_)));
    }
}

fn drain(spool: &Spool, records: u64) -> u64 {
    spool.connected();
    let mut taken = 0;
    while taken < records {
        match spool.take_backlog() {
            Some(record) => {
                spool.acknowledge(record.place);
                taken += 1;
            }
            None => std::thread::yield_now(),
        }
    }
    taken
}

fn spool(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("spool");
    group.sample_size(10).throughput(Throughput::Elements(RECORDS));
    // From the first append until the last record is synced: closing waits for that.
    group.bench_function("append_write_sync", |bencher| {
        bencher.iter_custom(|rounds| {
            (0..rounds).fold(Duration::ZERO, |total, _| {
                let folder = tempfile::tempdir().expect("a temporary folder");
                let spool = open(folder.path());
                let begun = Instant::now();
                fill(&spool, RECORDS);
                spool.close();
                total + begun.elapsed()
            })
        });
    });
    // From the names on the disk to the last record acknowledged, as after a restart.
    group.bench_function("recover_read_acknowledge", |bencher| {
        bencher.iter_custom(|rounds| {
            (0..rounds).fold(Duration::ZERO, |total, _| {
                let folder = tempfile::tempdir().expect("a temporary folder");
                let spool = open(folder.path());
                fill(&spool, RECORDS);
                spool.close();
                drop(spool);
                let begun = Instant::now();
                let spool = open(folder.path());
                assert_eq!(drain(&spool, RECORDS), RECORDS);
                total + begun.elapsed()
            })
        });
    });
    group.finish();
}

/// A million records while nobody takes them: memory, bytes on the disk, time to open and to hand all of them over.
/// `LINESIDE_BENCH_MILLION=1` asks for it; it takes 800 MB of disk.
fn million(_: &mut Criterion) {
    const MILLION: u64 = 1_000_000;
    if std::env::var_os("LINESIDE_BENCH_MILLION").is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let spool = open(folder.path());
    fill(&spool, 1000);
    let before = resident_kib();
    let begun = Instant::now();
    fill(&spool, MILLION - 1000);
    let filled = begun.elapsed();
    let growth = resident_kib().saturating_sub(before);
    let stats = spool.stats();
    spool.close();
    drop(spool);
    let begun = Instant::now();
    let spool = open(folder.path());
    let opened = begun.elapsed();
    assert_eq!(spool.stats().records, MILLION);
    let begun = Instant::now();
    assert_eq!(drain(&spool, MILLION), MILLION);
    let drained = begun.elapsed();
    eprintln!(
        "a million records: written in {filled:?}, {} bytes each on the disk, {growth} KiB of memory more, opened in \
         {opened:?}, handed over and acknowledged in {drained:?}",
        stats.bytes / MILLION
    );
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux tells");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("Linux tells");
    line.trim().trim_end_matches(" kB").trim().parse().expect("a number")
}

criterion_group!(benches, spool, million);
criterion_main!(benches);
