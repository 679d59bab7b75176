//! The rate limit of log entries. Each kind of entry has a bucket of its own: entries with the same event code about the same
//! stream or model. A burst is logged completely; after it, one entry per [`INTERVAL`], and the number of entries that were left
//! out. Time is an argument.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use lineside_common::TokenBucket;

/// Entries of one kind that are logged at once.
const BURST: u32 = 20;
/// Time until one more entry of a kind is logged after a burst.
pub(super) const INTERVAL: Duration = Duration::from_secs(10);
/// Buckets that are kept. Above it, entries are distinguished by their event code only; the number of codes is fixed.
const KINDS_MAX: usize = 1024;

/// What distinguishes the kinds of entries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct LogKind {
    /// The event code, or the place in the code of an entry without one.
    pub(super) event: String,
    /// The stream that the entry is about; empty for none.
    pub(super) stream: String,
    /// The model that the entry is about; empty for none.
    pub(super) model: String,
}

struct Bucket {
    tokens: TokenBucket,
    suppressed: u64,
    used: Instant,
}

/// The buckets of all kinds.
#[derive(Default)]
pub(super) struct LogRateLimit {
    buckets: HashMap<LogKind, Bucket>,
}

impl LogRateLimit {
    /// Whether an entry of this kind is logged now. One that is not is counted.
    pub(super) fn admit(&mut self, kind: LogKind, now: Instant) -> bool {
        let kind =
            if self.has_room_for(&kind, now) { kind } else { LogKind { event: kind.event, ..LogKind::default() } };
        let bucket = self.buckets.entry(kind).or_insert_with(|| Bucket {
            tokens: TokenBucket::new(BURST, INTERVAL, now),
            suppressed: 0,
            used: now,
        });
        bucket.used = now;
        let is_admitted = bucket.tokens.take(now);
        bucket.suppressed += u64::from(!is_admitted);
        is_admitted
    }

    /// The kinds of which entries were left out since the last call, with their number, in order.
    pub(super) fn take_suppressed(&mut self) -> Vec<(LogKind, u64)> {
        let suppressed = self.buckets.iter_mut().filter(|(_, bucket)| bucket.suppressed > 0);
        let mut counts: Vec<(LogKind, u64)> =
            suppressed.map(|(kind, bucket)| (kind.clone(), std::mem::take(&mut bucket.suppressed))).collect();
        counts.sort();
        counts
    }

    /// Whether the kind has a bucket, or may have one. Buckets that are full again are forgotten when there are too many.
    fn has_room_for(&mut self, kind: &LogKind, now: Instant) -> bool {
        if self.buckets.len() < KINDS_MAX || self.buckets.contains_key(kind) {
            return true;
        }
        let full_after = INTERVAL * BURST;
        self.buckets
            .retain(|_, bucket| bucket.suppressed > 0 || now.saturating_duration_since(bucket.used) < full_after);
        self.buckets.len() < KINDS_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(event: &str, stream: &str) -> LogKind {
        LogKind { event: event.to_owned(), stream: stream.to_owned(), model: String::new() }
    }

    #[test]
    fn a_burst_is_logged_then_one_entry_per_interval_and_the_rest_is_counted() {
        let (mut limit, start) = (LogRateLimit::default(), Instant::now());
        // 1,000 entries per second for 150 s, as a broker that sends invalid commands causes.
        let admitted = (0..150_000)
            .filter(|ms| limit.admit(kind("command_refused", ""), start + Duration::from_millis(*ms)))
            .count();
        assert_eq!(admitted, 20 + 14);
        assert_eq!(limit.take_suppressed(), [(kind("command_refused", ""), 150_000 - 34)]);
        assert!(limit.take_suppressed().is_empty());
    }

    #[test]
    fn kinds_do_not_suppress_each_other() {
        let (mut limit, now) = (LogRateLimit::default(), Instant::now());
        assert_eq!((0..1_000).filter(|_| limit.admit(kind("frame_failed", "cam1"), now)).count(), 20);
        assert!(limit.admit(kind("frame_failed", "cam2"), now));
        assert!(limit.admit(kind("stream_down", "cam1"), now));
        assert!(limit.admit(LogKind { model: "m".to_owned(), ..kind("frame_failed", "cam1") }, now));
        assert_eq!(limit.take_suppressed(), [(kind("frame_failed", "cam1"), 980)]);
    }

    #[test]
    fn a_quiet_kind_is_logged_completely_again() {
        let (mut limit, start) = (LogRateLimit::default(), Instant::now());
        assert_eq!((0..30).filter(|_| limit.admit(kind("stream_down", "cam1"), start)).count(), 20);
        let later = start + INTERVAL * BURST;
        assert_eq!((0..30).filter(|_| limit.admit(kind("stream_down", "cam1"), later)).count(), 20);
    }

    #[test]
    fn the_number_of_buckets_is_bounded_and_every_event_keeps_one() {
        let (mut limit, start) = (LogRateLimit::default(), Instant::now());
        let admitted =
            (0..10_000).filter(|number| limit.admit(kind("result_late", &number.to_string()), start)).count();
        assert_eq!(admitted, KINDS_MAX + BURST as usize);
        assert!(limit.admit(kind("task_failed", "cam1"), start), "another event has a bucket of its own");
        assert!(limit.buckets.len() <= KINDS_MAX + 2);
        limit.take_suppressed();
        let later = start + INTERVAL * BURST;
        assert!(limit.admit(kind("result_late", "another"), later));
        assert_eq!(limit.buckets.len(), 1, "buckets that are full again are forgotten");
    }
}
