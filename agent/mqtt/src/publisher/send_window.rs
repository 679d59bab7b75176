//! Decides which record is sent next, and when. Pure: time is an argument and there is no I/O, so that the decision can be
//! simulated over long times.
//!
//! Order: records that were unacknowledged when the last connection ended, then live records, then the backlog. The backlog is
//! limited in two ways: by a rate, and by a number of unacknowledged records that adapts so that the broker answers within about
//! half a second. Both ensure that a live result never waits behind hours of backlog on a slow link. A record that the
//! broker may not take is sent while no other record is unacknowledged; `suspects` defines when.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::suspects::{LossCause, Sent, Suspects};
use lineside_common::TokenBucket;
use lineside_spool::{Record, RecordId, SetAsideReason, Spool};

/// Maximum number of unacknowledged records.
pub(super) const WINDOW: usize = 64;
/// Maximum number of unacknowledged records of the backlog.
const BACKLOG_WINDOW_MAX: usize = 48;
const BACKLOG_WINDOW_INITIAL: usize = 8;
/// An acknowledgement within this time enlarges the backlog window by one.
const FAST_ACKNOWLEDGEMENT: Duration = Duration::from_millis(250);
/// An acknowledgement after more than this time halves the backlog window.
const SLOW_ACKNOWLEDGEMENT: Duration = Duration::from_secs(1);
/// Bytes of a PUBLISH packet besides topic and payload: type, remaining length, length of the topic, packet identifier.
const PACKET_OVERHEAD_BYTES: usize = 9;
/// Time from the start of a session until an isolated record is sent, so that the others pass first.
const ALONE_DELAY: Duration = Duration::from_secs(5);
/// Time between two isolated records, for live records.
const BETWEEN_ALONE: Duration = Duration::from_millis(100);
/// Bursts per second: the rate limit lets a tenth of the rate pass at once.
const BURSTS_PER_SECOND: u64 = 10;

/// The unacknowledged records of one connection and the limits of the backlog.
pub(super) struct SendWindow {
    in_flight: HashMap<RecordId, InFlight>,
    backlog_in_flight: usize,
    backlog_window: usize,
    /// Limits the backlog; `None` is unlimited.
    rate_limit: Option<TokenBucket>,
    suspects: Suspects,
    /// The index of the broker.
    broker: usize,
    /// Isolated records that were taken and are not sent yet, and whether each is historical.
    held: VecDeque<(Record, bool)>,
    /// The isolated record that was sent, while it is unacknowledged.
    alone: Option<RecordId>,
    /// When the next isolated record is sent. Other records are not sent from then on, until it is acknowledged.
    alone_at: Instant,
}

struct InFlight {
    sent_at: Instant,
    is_backlog: bool,
    /// Size of the packet.
    bytes: u64,
    topic: Arc<str>,
}

/// A record that the broker does not take.
#[derive(Debug)]
pub(super) struct Undeliverable {
    pub(super) id: RecordId,
    /// Size of the packet in bytes.
    pub(super) bytes: u64,
    pub(super) topic: Arc<str>,
    pub(super) reason: SetAsideReason,
}

/// Size of the packet that publishes a record in JSON, in bytes.
pub(super) fn packet_bytes(record: &Record) -> u64 {
    (PACKET_OVERHEAD_BYTES + record.topic.len() + record.payload.len()) as u64
}

impl InFlight {
    fn new(record: &Record, is_backlog: bool, now: Instant) -> Self {
        Self { sent_at: now, is_backlog, bytes: packet_bytes(record), topic: record.topic.clone() }
    }
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
            suspects: Suspects::default(),
            broker: 0,
            held: VecDeque::new(),
            alone: None,
            alone_at: now,
        }
    }

    /// Starts a session with a broker, with what is known from earlier ones.
    pub(super) fn start(&mut self, suspects: Suspects, broker: usize, now: Instant) {
        self.alone_at = if suspects.starts_alone() { now } else { now + ALONE_DELAY };
        (self.suspects, self.broker) = (suspects, broker);
    }

    /// Ends the session. Returns what is known about suspects, and the record to set aside, if any.
    pub(super) fn end(&mut self, cause: LossCause, now: Instant) -> (Suspects, Option<Undeliverable>) {
        let mut suspects = std::mem::take(&mut self.suspects);
        let sent: Vec<Sent> = self.in_flight.iter().map(|(id, sent)| Sent { id: *id, bytes: sent.bytes }).collect();
        let alone = sent.iter().find(|sent| Some(sent.id) == self.alone).copied();
        let set_aside = match (cause, alone) {
            (LossCause::Other, _) => None,
            (_, Some(alone)) => {
                let reason = suspects.lost_alone(self.broker, alone, cause, now);
                let topic = self.in_flight.get(&alone.id).map(|sent| sent.topic.clone()).unwrap_or_default();
                reason.map(|reason| Undeliverable { id: alone.id, bytes: alone.bytes, topic, reason })
            }
            (_, None) => {
                suspects.lost(self.broker, &sent, now);
                None
            }
        };
        (suspects, set_aside)
    }

    /// Whether the broker takes no message of this size: it exceeds the configured limit or the learnt one.
    pub(super) fn exceeds_limit(&self, record: &Record, bytes_max: Option<u64>, now: Instant) -> bool {
        let bytes = packet_bytes(record);
        bytes_max.is_some_and(|max| bytes > max)
            || self.suspects.learnt_limit(self.broker, now).is_some_and(|limit| bytes >= limit)
    }

    /// When the next isolated record is due, while there is one to send.
    pub(super) fn alone_at(&self) -> Option<Instant> {
        let is_waiting = !self.held.is_empty() && self.alone.is_none() && self.in_flight.is_empty();
        is_waiting.then_some(self.alone_at)
    }

    /// When the oldest unacknowledged record was sent.
    pub(super) fn oldest_sent_at(&self) -> Option<Instant> {
        self.in_flight.values().map(|sent| sent.sent_at).min()
    }

    /// The number of records that were sent at or before this time and are unacknowledged.
    pub(super) fn unacknowledged_since(&self, sent_before: Instant) -> usize {
        self.in_flight.values().filter(|sent| sent.sent_at <= sent_before).count()
    }

    /// Number of unacknowledged records.
    pub(super) fn unacknowledged(&self) -> usize {
        self.in_flight.len()
    }

    /// The next record to send now, and whether it is historical.
    pub(super) fn next(&mut self, spool: &Spool, now: Instant) -> Option<(Record, bool)> {
        loop {
            if self.alone.is_some() {
                return None;
            }
            if !self.held.is_empty() && now >= self.alone_at {
                return self.next_alone(now);
            }
            let (record, historical) = self.next_unchecked(spool, now)?;
            if !self.suspects.is_isolated(record.id) {
                return Some((record, historical));
            }
            self.requeue(record.id);
            self.held.push_back((record, historical));
        }
    }

    /// The next isolated record, once everything else is acknowledged.
    fn next_alone(&mut self, now: Instant) -> Option<(Record, bool)> {
        if !self.in_flight.is_empty() {
            return None;
        }
        let (record, historical) = self.held.pop_front()?;
        self.alone = Some(record.id);
        self.in_flight.insert(record.id, InFlight::new(&record, false, now));
        Some((record, historical))
    }

    fn next_unchecked(&mut self, spool: &Spool, now: Instant) -> Option<(Record, bool)> {
        if self.in_flight.len() >= WINDOW {
            return None;
        }
        if let Some((record, origin)) = spool.take() {
            self.in_flight.insert(record.id, InFlight::new(&record, false, now));
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
        self.in_flight.insert(record.id, InFlight::new(&record, true, now));
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
        self.suspects.acknowledged(self.broker, Sent { id: record, bytes: sent.bytes });
        if self.alone == Some(record) {
            self.alone = None;
            self.alone_at = now + BETWEEN_ALONE;
        }
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
        self.alone = self.alone.filter(|alone| *alone != record);
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
