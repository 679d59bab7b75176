//! The metrics of the spool.

use lineside_common::metrics::Registrar;
use prometheus::{IntCounter, IntCounterVec, IntGauge};

use crate::set_aside::SetAsideReason;
use crate::stats::Stats;

/// Why a record was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DropReason {
    /// The record could not be read from its segment.
    Damaged,
    /// The disk refused the record, and memory was full.
    Disk,
    /// The record exceeded its time to live.
    Expired,
    /// The spool was full.
    Full,
    /// Too many records were set aside; the oldest was dropped.
    SetAsideFull,
    /// The record was too large to append.
    TooLarge,
}

impl DropReason {
    /// All reasons in the order of their labels.
    pub const ALL: [Self; 6] =
        [Self::Damaged, Self::Disk, Self::Expired, Self::Full, Self::SetAsideFull, Self::TooLarge];

    /// The value of the label `reason`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Damaged => "damaged",
            Self::Disk => "disk",
            Self::Expired => "expired",
            Self::Full => "full",
            Self::SetAsideFull => "set_aside_full",
            Self::TooLarge => "too_large",
        }
    }
}

/// The counter of dropped records, with one child for each [`DropReason`].
#[derive(Clone)]
pub struct DropCounters([IntCounter; 6]);

impl DropCounters {
    /// Looks up the children of a counter with the label `reason`, so that each reason is exported from the start.
    pub fn new(counters: &IntCounterVec) -> Self {
        Self(DropReason::ALL.map(|reason| counters.with_label_values(&[reason.as_str()])))
    }

    pub(crate) fn add(&self, reason: DropReason, records: u64) {
        self.0[reason as usize].inc_by(records);
    }

    #[cfg(any(test, feature = "simulation"))]
    pub(crate) fn count(&self, reason: DropReason) -> u64 {
        self.0[reason as usize].get()
    }
}

/// The counter of records that were set aside, with one child for each [`SetAsideReason`].
#[derive(Clone)]
pub struct SetAsideCounters([IntCounter; 3]);

impl SetAsideCounters {
    /// Looks up the children of a counter with the label `reason`, so that each reason is exported from the start.
    pub fn new(counters: &IntCounterVec) -> Self {
        Self(SetAsideReason::ALL.map(|reason| counters.with_label_values(&[reason.as_str()])))
    }

    pub(crate) fn inc(&self, reason: SetAsideReason) {
        self.0[reason as usize].inc();
    }
}

/// The metrics of the spool. Clones share their values.
#[derive(Clone)]
pub struct SpoolMetrics {
    /// Pending records.
    pub records: IntGauge,
    /// Bytes of pending records, on disk and in memory.
    pub bytes: IntGauge,
    /// Age of the oldest pending record, in seconds.
    pub oldest_seconds: IntGauge,
    /// Dropped records, by reason.
    pub dropped: DropCounters,
    /// Records set aside because the broker does not take them, by reason.
    pub set_aside: SetAsideCounters,
    /// Records that are set aside now.
    pub set_aside_records: IntGauge,
    /// Bytes written to segments.
    pub written_bytes: IntCounter,
    /// Syncs of segments.
    pub syncs: IntCounter,
    /// 1 while the disk refuses writes, else 0.
    pub degraded: IntGauge,
}

impl SpoolMetrics {
    /// Registers the metrics of the spool.
    ///
    /// # Errors
    /// When one of the names is registered already.
    pub fn register(registrar: &Registrar) -> Result<Self, prometheus::Error> {
        Ok(Self {
            records: registrar.gauge("spool_records", "Records waiting to be acknowledged by the broker.")?,
            bytes: registrar.gauge("spool_bytes", "Bytes waiting to be acknowledged by the broker.")?,
            oldest_seconds: registrar.gauge("spool_oldest_seconds", "Age of the oldest waiting record.")?,
            dropped: DropCounters::new(&registrar.counters(
                "spool_dropped_total",
                "Records dropped, by reason.",
                &["reason"],
            )?),
            set_aside: SetAsideCounters::new(&registrar.counters(
                "spool_set_aside_total",
                "Records set aside because the broker does not take them, by reason.",
                &["reason"],
            )?),
            set_aside_records: registrar.gauge("spool_set_aside_records", "Records that are set aside.")?,
            written_bytes: registrar
                .counter("spool_written_bytes_total", "Bytes written to the files of the spool.")?,
            syncs: registrar.counter("spool_syncs_total", "Times a file of the spool was synced.")?,
            degraded: registrar.gauge("spool_degraded", "Whether the disk refuses what the spool writes.")?,
        })
    }

    /// Sets the gauges.
    pub(crate) fn set(&self, stats: &Stats) {
        let gauge_value = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        self.records.set(gauge_value(stats.records));
        self.bytes.set(gauge_value(stats.bytes));
        self.oldest_seconds.set(gauge_value(stats.oldest.unwrap_or_default().as_secs()));
        self.set_aside_records.set(gauge_value(stats.set_aside.records));
        self.degraded.set(i64::from(stats.degraded.is_some()));
    }
}

/// Records that one operation dropped, by reason. They are collected while the state is locked and counted afterwards.
#[derive(Debug, Default)]
pub(crate) struct DropCounts([u64; 6]);

impl DropCounts {
    pub(crate) fn add(&mut self, reason: DropReason, records: u64) {
        self.0[reason as usize] += records;
    }

    /// Records dropped for any reason.
    pub(crate) fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Whether records were dropped for lack of room on disk or in memory.
    pub(crate) fn is_overflow(&self) -> bool {
        self.0[DropReason::Full as usize] + self.0[DropReason::Disk as usize] > 0
    }

    /// Adds the records to the counters.
    pub(crate) fn record(&self, counters: &DropCounters) {
        for reason in DropReason::ALL {
            let records = self.0[reason as usize];
            if records > 0 {
                counters.add(reason, records);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_drop_reason_is_exported_from_the_start() {
        let registrar = Registrar::default();
        let metrics = SpoolMetrics::register(&registrar).unwrap();
        let mut dropped = DropCounts::default();
        dropped.add(DropReason::Full, 2);
        dropped.add(DropReason::TooLarge, 1);
        dropped.record(&metrics.dropped);
        let text = registrar.encode().unwrap();
        for (label, count) in [("damaged", 0), ("disk", 0), ("expired", 0), ("full", 2), ("too_large", 1)] {
            let line = format!("lineside_spool_dropped_total{{reason=\"{label}\"}} {count}");
            assert!(text.contains(&line), "{line} is missing in {text}");
        }
        assert!(SpoolMetrics::register(&registrar).is_err(), "the names are taken");
    }
}
