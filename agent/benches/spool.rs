//! The spool on the real disk: records per second that are appended, written and synced while no broker answers, and
//! records per second that are read back and acknowledged.

#![allow(missing_docs, clippy::expect_used, reason = "a benchmark that cannot run should say so and end")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lineside::base::metrics::Metrics;
use lineside::spool::{Appended, Draft, Kind, Options, Spool, WhenFull};

const RECORDS: u64 = 20_000;
/// Bytes of an ordinary result.
const PAYLOAD_BYTES: usize = 700;

fn open(folder: &std::path::Path) -> Arc<Spool> {
    let metrics = Metrics::new().expect("names are unique");
    let (dropped, written, syncs) = (metrics.spool_dropped, metrics.spool_written_bytes, metrics.spool_syncs);
    Spool::open(folder, Options::new(1 << 30, dropped, written, syncs)).expect("a temporary folder")
}

fn fill(spool: &Spool) {
    let topic: Arc<str> = "lineside/v1/plant/edge-1/line-1/result".into();
    let payload = Bytes::from(vec![b'x'; PAYLOAD_BYTES]);
    for _ in 0..RECORDS {
        let draft = Draft {
            kind: Kind::Result,
            topic: topic.clone(),
            ttl_seconds: 0,
            when_full: WhenFull::Block,
            make: |_| payload.clone(),
        };
        assert!(matches!(spool.append(draft), Appended::Kept(_)));
    }
}

fn drain(spool: &Spool) -> u64 {
    spool.connected();
    let mut taken = 0;
    while taken < RECORDS {
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
                fill(&spool);
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
                fill(&spool);
                spool.close();
                drop(spool);
                let begun = Instant::now();
                let spool = open(folder.path());
                assert_eq!(drain(&spool), RECORDS);
                total + begun.elapsed()
            })
        });
    });
    group.finish();
}

criterion_group!(benches, spool);
criterion_main!(benches);
