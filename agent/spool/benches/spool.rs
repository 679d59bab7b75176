//! Benchmarks of the spool on the real disk: records per second that are appended, written and synced while no broker
//! answers, and records per second that are read back and acknowledged.

#![allow(missing_docs, clippy::expect_used, reason = "a benchmark that cannot run ends with a message")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lineside_common::metrics::Registrar;
use lineside_spool::{AppendOutcome, NewRecord, Options, RecordKind, Spool, SpoolConfig, SpoolMetrics, WhenFull};

const RECORDS: u64 = 20_000;
/// Size of a typical result.
const PAYLOAD_BYTES: usize = 700;

fn open(folder: &std::path::Path) -> Arc<Spool> {
    let metrics = SpoolMetrics::register(&Registrar::default()).expect("names are unique");
    let config = SpoolConfig { bytes_max: 1 << 30, ..SpoolConfig::default() };
    Spool::open(folder, Options::new(&config, metrics)).expect("a temporary folder")
}

fn fill(spool: &Spool, records: u64) {
    let topic: Arc<str> = "lineside/v1/plant/edge-1/line-1/result".into();
    let payload = Bytes::from(vec![b'x'; PAYLOAD_BYTES]);
    for _ in 0..records {
        let record = NewRecord {
            kind: RecordKind::Result,
            topic: topic.clone(),
            ttl_seconds: 0,
            when_full: WhenFull::Block,
            build_payload: |_| payload.clone(),
        };
        assert!(matches!(spool.append(record), AppendOutcome::Appended(_)));
    }
}

fn drain(spool: &Spool, records: u64) -> u64 {
    spool.connected();
    let mut taken = 0;
    while taken < records {
        match spool.take_backlog() {
            Some(record) => {
                spool.acknowledge(record.id);
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
    // From the first append until the last record is synced, which closing waits for.
    group.bench_function("append_write_sync", |bencher| {
        bencher.iter_custom(|rounds| {
            (0..rounds).fold(Duration::ZERO, |total, _| {
                let folder = tempfile::tempdir().expect("a temporary folder");
                let spool = open(folder.path());
                let started = Instant::now();
                fill(&spool, RECORDS);
                spool.close();
                total + started.elapsed()
            })
        });
    });
    // From opening the spool until the last record is acknowledged, as after a restart.
    group.bench_function("recover_read_acknowledge", |bencher| {
        bencher.iter_custom(|rounds| {
            (0..rounds).fold(Duration::ZERO, |total, _| {
                let folder = tempfile::tempdir().expect("a temporary folder");
                let spool = open(folder.path());
                fill(&spool, RECORDS);
                spool.close();
                drop(spool);
                let started = Instant::now();
                let spool = open(folder.path());
                assert_eq!(drain(&spool, RECORDS), RECORDS);
                total + started.elapsed()
            })
        });
    });
    group.finish();
}

/// A million records while no broker is connected: memory, bytes on disk, time to open the spool and to deliver all records.
/// Enabled by `LINESIDE_BENCH_MILLION=1`; needs 800 MB of disk.
fn million(_: &mut Criterion) {
    const MILLION: u64 = 1_000_000;
    if std::env::var_os("LINESIDE_BENCH_MILLION").is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let spool = open(folder.path());
    fill(&spool, 1000);
    let before = resident_kib();
    let started = Instant::now();
    fill(&spool, MILLION - 1000);
    let filled = started.elapsed();
    let growth = resident_kib().saturating_sub(before);
    let stats = spool.stats();
    spool.close();
    drop(spool);
    let started = Instant::now();
    let spool = open(folder.path());
    let opened = started.elapsed();
    assert_eq!(spool.stats().records, MILLION);
    let started = Instant::now();
    assert_eq!(drain(&spool, MILLION), MILLION);
    let drained = started.elapsed();
    eprintln!(
        "a million records: written in {filled:?}, {} bytes each on disk, {growth} KiB of additional memory, opened in \
         {opened:?}, delivered and acknowledged in {drained:?}",
        stats.bytes / MILLION
    );
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux provides the file");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("Linux provides the file");
    line.trim().trim_end_matches(" kB").trim().parse().expect("a number")
}

criterion_group!(benches, spool, million);
criterion_main!(benches);
