//! A spool on a disk in memory, with a clock that is advanced by hand and no writer thread: for the tests of this crate and,
//! with the feature `simulation`, of other crates.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use lineside_common::metrics::Registrar;

use crate::config::SpoolConfig;
use crate::fake_disk::{FakeDisk, FaultMode};
use crate::metrics::{DropReason, SpoolMetrics};
use crate::options::Options;
use crate::record::{AppendOutcome, NewRecord, Record, RecordKind, WhenFull};
#[cfg(test)]
use crate::set_aside::{SetAsideFolder, SetAsideRecord};
use crate::shared::Clock;
use crate::spool::Spool;
use crate::writer::Writer;

/// The folder of the spool on the simulated disk.
pub(crate) const ROOT: &str = "/spool";

/// Options with small segments and bounds, so that few records exercise all of them.
#[allow(clippy::expect_used, reason = "test support: a new registrar has no names that could collide")]
pub fn options(bytes_max: u64) -> Options {
    let metrics = SpoolMetrics::register(&Registrar::default()).expect("the registrar is empty");
    let config = SpoolConfig { bytes_max, sync_interval: Duration::from_millis(20), ..SpoolConfig::default() };
    Options { segment_bytes: 600, memory_bytes_max: 1500, ..Options::new(&config, metrics) }
}

/// A spool whose writer runs when the test advances the clock.
pub struct DrivenSpool {
    /// The spool.
    pub spool: Spool,
    pub(crate) disk: FakeDisk,
    pub(crate) options: Options,
    writer: Writer,
    time_ms: Arc<AtomicU64>,
}

impl DrivenSpool {
    /// A spool on an empty disk.
    pub fn new(options: Options) -> Self {
        Self::open(FakeDisk::default(), options)
    }

    /// Starts a process on a disk with these files, each with its path below the folder of the spool, such as
    /// `result/00000000000000000001.open`.
    pub fn recover<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>, options: Options) -> Self {
        let disk = FakeDisk::default();
        for (path, content) in files {
            disk.put(&Path::new(ROOT).join(path), content);
        }
        Self::open(disk, options)
    }

    #[allow(clippy::expect_used, reason = "test support: the simulated disk has no faults when a spool is opened")]
    fn open(disk: FakeDisk, options: Options) -> Self {
        let time_ms = Arc::new(AtomicU64::new(0));
        let clock: Clock = {
            let time_ms = time_ms.clone();
            Arc::new(move || Duration::from_millis(time_ms.load(Ordering::Relaxed)))
        };
        let (spool, writer) = Spool::assemble(Arc::new(disk.clone()), Path::new(ROOT), &options, clock)
            .expect("the simulated disk can be read");
        Self { spool, disk, options, writer, time_ms }
    }

    /// Kills the process, and starts another one on the same disk.
    pub fn kill(self) -> Self {
        Self::open(self.disk, self.options)
    }

    /// Ends the process in order, removes the faults of the disk, and starts another process on the same disk.
    pub fn restart(mut self) -> Self {
        self.writer.finish(&self.spool.shared, self.spool.shared.now_ms());
        self.disk.set_faults(FaultMode::default());
        self.kill()
    }

    /// Advances the clock, and runs one cycle of the writer.
    pub fn advance(&mut self, ms: u64) {
        self.time_ms.fetch_add(ms, Ordering::Relaxed);
        self.writer.cycle(&self.spool.shared, self.spool.shared.now_ms());
    }

    /// Appends a record with [`WhenFull::DropOldest`].
    pub fn append(&self, kind: RecordKind, payload: Bytes, ttl_seconds: u32) -> AppendOutcome {
        let when_full = WhenFull::DropOldest;
        let build_payload = |_| payload.clone();
        self.spool.append(NewRecord { kind, topic: "t".into(), ttl_seconds, when_full, build_payload })
    }

    /// The records that are set aside, oldest first.
    #[cfg(test)]
    pub(crate) fn set_aside(&self) -> Vec<SetAsideRecord> {
        SetAsideFolder::new(Arc::new(self.disk.clone()), Path::new(ROOT)).records()
    }

    /// Records dropped for one reason since the first process started.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.options.metrics.dropped.count(reason)
    }

    /// Records that were appended and dropped later, since the first process started.
    pub fn dropped_total(&self) -> u64 {
        let is_pending_before =
            |reason: &DropReason| !matches!(reason, DropReason::TooLarge | DropReason::SetAsideFull);
        let reasons = DropReason::ALL.into_iter().filter(is_pending_before);
        reasons.map(|reason| self.dropped(reason)).sum()
    }

    /// Takes and acknowledges all records.
    pub fn drain(&mut self) -> Vec<Record> {
        self.spool.connected();
        let mut taken = Vec::new();
        for _ in 0..3 {
            self.advance(1);
            while let Some(record) = self.spool.take().map(|(record, _)| record).or_else(|| self.spool.take_backlog()) {
                self.spool.acknowledge(record.id);
                taken.push(record);
                self.advance(0);
            }
        }
        taken
    }
}
