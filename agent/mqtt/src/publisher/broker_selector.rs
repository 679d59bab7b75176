//! Selects the broker to connect to.
//!
//! Brokers are tried in the configured order. A broker that cannot be reached is skipped for a growing delay, and one that
//! refuses the agent for at least half a minute; meanwhile the next broker serves. While it does, preferred brokers are probed
//! periodically, at intervals that grow with their consecutive failures.

use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::config::Broker;
use crate::connection::{ConnectionLoss, LossKind};
use lineside_common::LogOnChange;
use lineside_common::backoff::{Backoff, jitter};

const RETRY_INITIAL: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// A broker that refuses the agent is not tried for this long, unless the credentials change.
const REFUSED_DELAY: Duration = Duration::from_secs(30);
/// The interval between probes of preferred brokers: initially, and at most.
const PROBE_INTERVAL_INITIAL: Duration = Duration::from_secs(20);
const PROBE_INTERVAL_MAX: Duration = Duration::from_secs(1800);
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// All brokers with their retry state, in the configured order.
pub(super) struct BrokerSelector(Vec<BrokerEntry>);

struct BrokerEntry {
    broker: Broker,
    backoff: Backoff,
    /// When the broker may be tried again; `None`: at once.
    retry_at: Option<Instant>,
    logged: LogOnChange<LoggedLoss>,
}

impl BrokerEntry {
    fn is_available(&self, now: Instant) -> bool {
        self.retry_at.is_none_or(|retry_at| retry_at <= now)
    }
}

/// What distinguishes one loss from another in the log. The exact network error varies between attempts, so it does not count.
#[derive(Debug, Clone, PartialEq, Eq)]
enum LoggedLoss {
    Unreachable,
    Refused(String),
}

impl LoggedLoss {
    fn of(loss: &ConnectionLoss) -> Self {
        match loss.kind() {
            LossKind::Unreachable => Self::Unreachable,
            LossKind::Refused => Self::Refused(loss.reason()),
        }
    }
}

/// The selector's decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Selection {
    /// Connect to the broker with this index.
    Connect(usize),
    /// No broker may be tried before this time.
    Wait(Instant),
}

impl BrokerSelector {
    pub(super) fn new(brokers: &[Broker]) -> Self {
        let entry = |broker: &Broker| BrokerEntry {
            broker: broker.clone(),
            backoff: Backoff::new(RETRY_INITIAL, RETRY_MAX),
            retry_at: None,
            logged: LogOnChange::default(),
        };
        Self(brokers.iter().map(entry).collect())
    }

    pub(super) fn broker(&self, index: usize) -> &Broker {
        &self.0[index].broker
    }

    /// The first broker that may be tried, or when there is one.
    pub(super) fn select(&self, now: Instant) -> Selection {
        match self.0.iter().position(|entry| entry.is_available(now)) {
            Some(index) => Selection::Connect(index),
            None => Selection::Wait(self.0.iter().filter_map(|entry| entry.retry_at).min().unwrap_or(now)),
        }
    }

    /// Records that a connection delivered results: the next retry is quick again.
    pub(super) fn record_success(&mut self, index: usize) {
        self.0[index].backoff.reset();
    }

    /// Records that a connection was lost or could not be opened. Returns whether to log it: always after an open connection,
    /// otherwise when the loss differs from the last one.
    pub(super) fn record_failure(
        &mut self,
        index: usize,
        loss: &ConnectionLoss,
        was_connected: bool,
        now: Instant,
    ) -> bool {
        let entry = &mut self.0[index];
        let delay = match loss.kind() {
            LossKind::Unreachable => entry.backoff.next_delay(),
            // The jitter is added: the agents of a site must not return at the same time, and none before the delay is over.
            LossKind::Refused => REFUSED_DELAY + entry.backoff.next_delay(),
        };
        entry.retry_at = Some(now + delay);
        if was_connected {
            entry.logged.clear();
        }
        entry.logged.set(LoggedLoss::of(loss))
    }

    /// Makes every broker available at once, after the credentials have changed.
    pub(super) fn reset(&mut self) {
        self.0.iter_mut().for_each(|entry| entry.retry_at = None);
    }

    /// Whether there is a broker that is preferred to this one.
    pub(super) fn has_preferred(&self, index: usize) -> bool {
        index > 0
    }

    /// Time until the preferred brokers are probed. It doubles with every consecutive failure of the preferred broker that
    /// failed least.
    pub(super) fn failback_delay(&self, index: usize) -> Duration {
        let attempts = self.0.iter().take(index).map(|entry| entry.backoff.attempts()).min().unwrap_or(0);
        let factor = 2u32.saturating_pow(attempts.saturating_sub(1));
        let half = PROBE_INTERVAL_INITIAL.saturating_mul(factor).min(PROBE_INTERVAL_MAX) / 2;
        half + jitter(half)
    }

    /// The addresses of the brokers that are preferred to this one and may be tried.
    pub(super) fn preferred(&self, index: usize, now: Instant) -> Vec<(String, u16)> {
        let available = self.0.iter().take(index).filter(|entry| entry.is_available(now));
        available.map(|entry| (entry.broker.host.clone(), entry.broker.port)).collect()
    }
}

/// Whether one of the addresses accepts a TCP connection.
pub(super) async fn probe(addresses: Vec<(String, u16)>) -> bool {
    for (host, port) in addresses {
        let connected = tokio::time::timeout(PROBE_TIMEOUT, TcpStream::connect((host.as_str(), port))).await;
        if matches!(connected, Ok(Ok(_))) {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(count: u16) -> BrokerSelector {
        let broker = |port| Broker { host: "b".to_owned(), port, tls: false, credentials: None };
        BrokerSelector::new(&(0..count).map(broker).collect::<Vec<_>>())
    }

    fn unreachable() -> ConnectionLoss {
        ConnectionLoss::unreachable("connection reset")
    }

    fn refused() -> ConnectionLoss {
        ConnectionLoss::refused("not authorized")
    }

    #[test]
    fn the_first_available_broker_is_selected() {
        let now = Instant::now();
        let mut selector = selector(2);
        assert_eq!(selector.select(now), Selection::Connect(0));
        selector.record_failure(0, &unreachable(), false, now);
        assert_eq!(selector.select(now), Selection::Connect(1));
        selector.record_failure(1, &refused(), false, now);
        let Selection::Wait(until) = selector.select(now) else { panic!("no broker is available") };
        assert!(until > now && until <= now + RETRY_MAX, "the unreachable broker is tried before the one that refuses");
        assert_eq!(selector.select(now + RETRY_MAX), Selection::Connect(0));
        selector.record_failure(0, &unreachable(), false, now);
        selector.reset();
        assert_eq!(selector.select(now), Selection::Connect(0));
    }

    #[test]
    fn a_loss_is_logged_once_until_it_changes_or_a_connection_was_open() {
        let now = Instant::now();
        let mut selector = selector(1);
        assert!(selector.record_failure(0, &unreachable(), false, now));
        assert!(!selector.record_failure(0, &ConnectionLoss::unreachable("timed out"), false, now));
        assert!(selector.record_failure(0, &refused(), false, now));
        assert!(!selector.record_failure(0, &refused(), false, now));
        assert!(selector.record_failure(0, &ConnectionLoss::refused("expired"), false, now));
        assert!(selector.record_failure(0, &ConnectionLoss::refused("expired"), true, now));
    }

    #[test]
    fn a_broker_that_refuses_is_skipped_for_half_a_minute() {
        let now = Instant::now();
        let mut selector = selector(1);
        for _ in 0..5 {
            selector.record_failure(0, &refused(), false, now);
            assert!(matches!(selector.select(now + REFUSED_DELAY), Selection::Wait(_)));
            assert_eq!(selector.select(now + REFUSED_DELAY + RETRY_MAX), Selection::Connect(0));
        }
    }

    #[test]
    fn the_probe_interval_grows_with_failures_of_the_preferred_broker() {
        let now = Instant::now();
        let mut selector = selector(2);
        for attempt in 0..20u32 {
            selector.record_failure(0, &unreachable(), false, now);
            let whole = PROBE_INTERVAL_INITIAL.saturating_mul(2u32.saturating_pow(attempt)).min(PROBE_INTERVAL_MAX);
            let delay = selector.failback_delay(1);
            assert!(delay >= whole / 2 && delay <= whole, "{attempt}: {delay:?}");
        }
        assert!(selector.preferred(1, now).is_empty(), "its retry delay is not over");
        assert_eq!(selector.preferred(1, now + RETRY_MAX).len(), 1);
        selector.record_success(0);
        assert!(selector.failback_delay(1) <= PROBE_INTERVAL_INITIAL);
    }
}
