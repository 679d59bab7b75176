//! What is sent next, and when: a decision of its own, so that it can be tried through a simulated year. Time is an
//! argument, and nothing in here knows of a network.
//!
//! First goes what was on the way when the last connection broke, then what is live, then the backlog. The backlog is held
//! back in two ways: to a rate, and to so many messages on the way that the broker answers within about half a second;
//! both so that a live result never waits behind hours of old ones on a thin line.

use std::collections::HashMap;
use std::time::Duration;

use lineside_spool::{Record, RecordId, RecordOrigin, Spool};

/// Records on the way at most.
pub(super) const WINDOW: usize = 64;
/// Of these, records of the backlog at most, and at first.
const BACKLOG_WINDOW_MAX: usize = 48;
const BACKLOG_WINDOW_FIRST: usize = 8;
/// An answer within this time lets more of the backlog be on the way.
const QUICK: Duration = Duration::from_millis(250);
/// An answer that takes longer halves it.
const SLOW: Duration = Duration::from_secs(1);
/// So much of a second's rate may go in one burst.
const BURST: Duration = Duration::from_millis(100);

/// The flow over one connection.
pub(super) struct SendWindow {
    on_the_way: HashMap<RecordId, Sent>,
    backlog_on_the_way: usize,
    backlog_window: usize,
    /// Records of the backlog per second.
    rate: Option<f64>,
    allowance: f64,
    refilled_at: Duration,
}

struct Sent {
    at: Duration,
    is_backlog: bool,
}

impl SendWindow {
    /// A flow over a connection that was just made. `now` is the time since anything that is always before.
    pub(super) fn new(rate: Option<u64>, now: Duration) -> Self {
        Self {
            on_the_way: HashMap::new(),
            backlog_on_the_way: 0,
            backlog_window: BACKLOG_WINDOW_FIRST,
            rate: rate.map(|rate| rate as f64),
            allowance: 1.0,
            refilled_at: now,
        }
    }

    /// Records on the way.
    pub(super) fn unacknowledged(&self) -> usize {
        self.on_the_way.len()
    }

    /// The next record to be sent now, and whether it comes late.
    pub(super) fn next(&mut self, spool: &Spool, now: Duration) -> Option<(Record, bool)> {
        if self.on_the_way.len() >= WINDOW {
            return None;
        }
        if let Some((record, origin)) = spool.take() {
            self.on_the_way.insert(record.id, Sent { at: now, is_backlog: false });
            return Some((record, origin != RecordOrigin::Live));
        }
        if self.backlog_on_the_way >= self.backlog_window || !self.may_go(now) {
            return None;
        }
        let record = spool.take_backlog()?;
        self.allowance -= 1.0;
        self.backlog_on_the_way += 1;
        self.on_the_way.insert(record.id, Sent { at: now, is_backlog: true });
        Some((record, true))
    }

    /// Whether the rate lets a record of the backlog go.
    fn may_go(&mut self, now: Duration) -> bool {
        let Some(rate) = self.rate else {
            self.allowance = 1.0;
            return true;
        };
        let passed = now.saturating_sub(self.refilled_at).as_secs_f64();
        self.allowance = (self.allowance + passed * rate).min((rate * BURST.as_secs_f64()).max(1.0));
        self.refilled_at = now;
        self.allowance >= 1.0
    }

    /// How long until the rate lets the next record of the backlog go, where that is what holds it back.
    pub(super) fn wait(&self) -> Option<Duration> {
        let rate = self.rate?;
        let is_held = self.allowance < 1.0 && self.backlog_on_the_way < self.backlog_window;
        is_held.then(|| Duration::from_secs_f64((1.0 - self.allowance) / rate).max(Duration::from_millis(1)))
    }

    /// The broker has a record. `true` when it was one of the backlog.
    pub(super) fn acknowledged(&mut self, place: RecordId, now: Duration) {
        let Some(sent) = self.on_the_way.remove(&place) else { return };
        if !sent.is_backlog {
            return;
        }
        self.backlog_on_the_way -= 1;
        let took = now.saturating_sub(sent.at);
        if took <= QUICK {
            self.backlog_window = (self.backlog_window + 1).min(BACKLOG_WINDOW_MAX);
        } else if took > SLOW {
            self.backlog_window = (self.backlog_window / 2).max(1);
        }
    }

    /// A record could not be handed over after all.
    pub(super) fn requeue(&mut self, place: RecordId) {
        if let Some(sent) = self.on_the_way.remove(&place) {
            self.backlog_on_the_way -= usize::from(sent.is_backlog);
        }
    }
}
