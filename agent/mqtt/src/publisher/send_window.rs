//! Decides which record is sent next, and when. Pure: time is an argument and there is no I/O, so that the decision can be
//! simulated over long times.
//!
//! Order: records that were unacknowledged when the last connection ended, then live records, then the backlog. The backlog is
//! limited in two ways: by a rate, and by a number of unacknowledged records that adapts so that the broker answers within about
//! half a second. Both ensure that a live result never waits behind hours of backlog on a slow link.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use lineside_common::TokenBucket;
use lineside_spool::{Record, RecordId, Spool};

/// Maximum number of unacknowledged records.
pub(super) const WINDOW: usize = 64;
/// Maximum number of unacknowledged records of the backlog.
const BACKLOG_WINDOW_MAX: usize = 48;
const BACKLOG_WINDOW_INITIAL: usize = 8;
/// An acknowledgement within this time enlarges the backlog window by one.
const FAST_ACKNOWLEDGEMENT: Duration = Duration::from_millis(250);
/// An acknowledgement after more than this time halves the backlog window.
const SLOW_ACKNOWLEDGEMENT: Duration = Duration::from_secs(1);
/// Bursts per second: the rate limit lets a tenth of the rate pass at once.
const BURSTS_PER_SECOND: u64 = 10;

/// The unacknowledged records of one connection and the limits of the backlog.
pub(super) struct SendWindow {
    in_flight: HashMap<RecordId, InFlight>,
    backlog_in_flight: usize,
    backlog_window: usize,
    /// Limits the backlog; `None` is unlimited.
    rate_limit: Option<TokenBucket>,
}

struct InFlight {
    sent_at: Instant,
    is_backlog: bool,
}

impl SendWindow {
    /// The window of a new connection, with a rate limit for the backlog in records per second.
    pub(super) fn new(rate: Option<u64>, now: Instant) -> Self {
        let bucket = |rate: u64| {
            let burst = u32::try_from((rate / BURSTS_PER_SECOND).max(1)).unwrap_or(u32::MAX);
            TokenBucket::new(burst, Duration::from_secs_f64(1.0 / rate.max(1) as f64), now)
        };
        Self {
            in_flight: HashMap::new(),
            backlog_in_flight: 0,
            backlog_window: BACKLOG_WINDOW_INITIAL,
            rate_limit: rate.map(bucket),
        }
    }

    /// Number of unacknowledged records.
    pub(super) fn unacknowledged(&self) -> usize {
        self.in_flight.len()
    }

    /// The next record to send now, and whether it is historical.
    pub(super) fn next(&mut self, spool: &Spool, now: Instant) -> Option<(Record, bool)> {
        if self.in_flight.len() >= WINDOW {
            return None;
        }
        if let Some((record, origin)) = spool.take() {
            self.in_flight.insert(record.id, InFlight { sent_at: now, is_backlog: false });
            return Some((record, origin != lineside_spool::RecordOrigin::Live));
        }
        if !self.is_backlog_window_open() || self.rate_limit_delay(now) > Duration::ZERO {
            return None;
        }
        let record = spool.take_backlog()?;
        if let Some(limit) = &mut self.rate_limit {
            limit.take(now);
        }
        self.backlog_in_flight += 1;
        self.in_flight.insert(record.id, InFlight { sent_at: now, is_backlog: true });
        Some((record, true))
    }

    fn is_backlog_window_open(&self) -> bool {
        self.backlog_in_flight < self.backlog_window
    }

    fn rate_limit_delay(&self, now: Instant) -> Duration {
        self.rate_limit.as_ref().map_or(Duration::ZERO, |limit| limit.time_until_token(now))
    }

    /// Time until the rate limit admits the next record of the backlog; `None` when the rate limit does not delay it.
    pub(super) fn backlog_delay(&self, now: Instant) -> Option<Duration> {
        let delay = self.rate_limit_delay(now);
        (delay > Duration::ZERO && self.is_backlog_window_open()).then(|| delay.max(Duration::from_millis(1)))
    }

    /// Removes a record that the broker acknowledged, and adapts the backlog window to the time it took.
    pub(super) fn acknowledged(&mut self, record: RecordId, now: Instant) {
        let Some(sent) = self.in_flight.remove(&record) else { return };
        if !sent.is_backlog {
            return;
        }
        self.backlog_in_flight -= 1;
        let elapsed = now.saturating_duration_since(sent.sent_at);
        if elapsed <= FAST_ACKNOWLEDGEMENT {
            self.backlog_window = (self.backlog_window + 1).min(BACKLOG_WINDOW_MAX);
        } else if elapsed > SLOW_ACKNOWLEDGEMENT {
            self.backlog_window = (self.backlog_window / 2).max(1);
        }
    }

    /// Removes a record that could not be sent.
    pub(super) fn requeue(&mut self, record: RecordId) {
        if let Some(sent) = self.in_flight.remove(&record) {
            self.backlog_in_flight -= usize::from(sent.is_backlog);
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use lineside_spool::simulation::{DrivenSpool, options};
    use lineside_spool::{AppendOutcome, RecordKind};

    /// A spool with this many records of backlog that are ready to be taken.
    fn backlog(records: u64) -> DrivenSpool {
        let mut driven = DrivenSpool::new(options(1 << 20));
        for _ in 0..records {
            let outcome = driven.append(RecordKind::Result, Bytes::from_static(b"x"), 0);
            assert!(matches!(outcome, AppendOutcome::Appended(_)));
        }
        driven.advance(0);
        driven.spool.connected();
        driven.advance(0);
        driven
    }

    #[test]
    fn the_backlog_window_adapts_to_the_time_of_acknowledgements() {
        let (driven, start) = (backlog(12), Instant::now());
        let mut window = SendWindow::new(None, start);
        let sent: Vec<RecordId> = std::iter::from_fn(|| window.next(&driven.spool, start))
            .map(|(record, historical)| {
                assert!(historical);
                record.id
            })
            .collect();
        assert_eq!(sent.len(), BACKLOG_WINDOW_INITIAL);
        window.acknowledged(sent[0], start + FAST_ACKNOWLEDGEMENT);
        assert_eq!(window.backlog_window, BACKLOG_WINDOW_INITIAL + 1);
        window.acknowledged(sent[1], start + SLOW_ACKNOWLEDGEMENT + Duration::from_millis(1));
        assert_eq!(window.backlog_window, BACKLOG_WINDOW_INITIAL.div_ceil(2));
        assert!(window.next(&driven.spool, start).is_none(), "the window is full");
    }

    #[test]
    fn the_backlog_is_sent_at_the_configured_rate() {
        let (driven, start) = (backlog(12), Instant::now());
        let mut window = SendWindow::new(Some(2), start);
        assert_eq!(window.backlog_delay(start), None);
        assert!(window.next(&driven.spool, start).is_some());
        assert!(window.next(&driven.spool, start).is_none());
        let delay = window.backlog_delay(start).unwrap();
        assert!(delay > Duration::from_millis(490) && delay <= Duration::from_millis(500), "{delay:?}");
        assert!(window.next(&driven.spool, start + Duration::from_millis(501)).is_some());
        assert!(window.next(&driven.spool, start + Duration::from_millis(502)).is_none());
    }
}
