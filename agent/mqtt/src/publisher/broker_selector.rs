//! The brokers: which one is tried next, and when.
//!
//! The first in the list that may be tried is. A broker that is not reached is left alone for a growing time, one that
//! refuses us for half a minute at least; meanwhile the next one serves. While it does, the better ones are knocked at
//! from time to time, and more rarely the more often a return to them went wrong.

use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::config::Broker;
use crate::connection::ConnectionLoss;
use lineside_common::backoff::Backoff;

const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_CAP: Duration = Duration::from_secs(10);
/// A broker that refuses us is not asked again for this long, unless our credentials change.
const REFUSED_FOR: Duration = Duration::from_secs(30);
/// How often a better broker is knocked at, at first and at most.
const RETURN_FIRST: Duration = Duration::from_secs(20);
const RETURN_CAP: Duration = Duration::from_secs(1800);
const KNOCK_TIMEOUT: Duration = Duration::from_secs(3);

/// All brokers.
pub(super) struct BrokerSelector(Vec<BrokerEntry>);

struct BrokerEntry {
    broker: Broker,
    backoff: Backoff,
    not_before: Option<Instant>,
    told: Option<ConnectionLoss>,
}

impl BrokerSelector {
    pub(super) fn new(brokers: &[Broker]) -> Self {
        let door = |broker: &Broker| BrokerEntry {
            broker: broker.clone(),
            backoff: Backoff::new(RETRY_FIRST, RETRY_CAP),
            not_before: None,
            told: None,
        };
        Self(brokers.iter().map(door).collect())
    }

    pub(super) fn broker(&self, index: usize) -> &Broker {
        &self.0[index].broker
    }

    /// The broker to be tried now, or when there will be one.
    pub(super) fn choose(&self, now: Instant) -> Result<usize, Instant> {
        let is_free = |door: &BrokerEntry| door.not_before.is_none_or(|until| until <= now);
        match self.0.iter().position(is_free) {
            Some(index) => Ok(index),
            None => Err(self.0.iter().filter_map(|door| door.not_before).min().unwrap_or(now)),
        }
    }

    /// A connection got records across.
    pub(super) fn record_success(&mut self, index: usize) {
        self.0[index].backoff.reset();
    }

    /// A connection was lost, or not had. `true` when that is news.
    pub(super) fn record_failure(&mut self, index: usize, loss: &ConnectionLoss, was_open: bool, now: Instant) -> bool {
        let door = &mut self.0[index];
        let delay = match loss {
            ConnectionLoss::Unreachable(_) => door.backoff.next_delay(),
            // Jittered upwards: a site's agents should not all come back at once, and never before.
            ConnectionLoss::Refused(_) => REFUSED_FOR + door.backoff.next_delay(),
        };
        door.not_before = Some(now + delay);
        let is_news = was_open || door.told.as_ref().is_none_or(|told| loss.is_news_after(told));
        if is_news {
            door.told = Some(loss.clone());
        }
        is_news
    }

    /// Our credentials have changed: every broker may be tried.
    pub(super) fn reset(&mut self) {
        self.0.iter_mut().for_each(|door| door.not_before = None);
    }

    /// Whether there are brokers better than this one.
    pub(super) fn has_preferred(&self, index: usize) -> bool {
        index > 0
    }

    /// How long to wait before the better ones are knocked at: twice as long for every time a return went wrong.
    pub(super) fn failback_delay(&self, index: usize) -> Duration {
        let attempts = self.0.iter().take(index).map(|door| door.backoff.attempts()).min().unwrap_or(0);
        let whole = RETURN_FIRST.saturating_mul(2u32.saturating_pow(attempts.saturating_sub(1))).min(RETURN_CAP);
        whole.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    /// The addresses of the brokers better than this one that may be tried.
    pub(super) fn better(&self, index: usize, now: Instant) -> Vec<(String, u16)> {
        let is_free = |door: &&BrokerEntry| door.not_before.is_none_or(|until| until <= now);
        self.0.iter().take(index).filter(is_free).map(|door| (door.broker.host.clone(), door.broker.port)).collect()
    }
}

/// Whether anybody opens.
pub(super) async fn probe(addresses: Vec<(String, u16)>) -> bool {
    for (host, port) in addresses {
        let opened = tokio::time::timeout(KNOCK_TIMEOUT, TcpStream::connect((host.as_str(), port))).await;
        if matches!(opened, Ok(Ok(_))) {
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

    fn lost() -> ConnectionLoss {
        ConnectionLoss::Unreachable("gone".to_owned())
    }

    #[test]
    fn the_first_that_may_be_tried_is_tried() {
        let now = Instant::now();
        let mut selector = selector(2);
        assert_eq!(selector.choose(now), Ok(0));
        assert!(selector.record_failure(0, &lost(), false, now), "the first time is news");
        assert_eq!(selector.choose(now), Ok(1));
        assert!(selector.record_failure(1, &ConnectionLoss::Refused("no".to_owned()), false, now));
        let until = selector.choose(now).unwrap_err();
        assert!(until > now && until <= now + RETRY_CAP, "the one that was not reached is tried first");
        assert_eq!(selector.choose(now + RETRY_CAP), Ok(0));
        assert!(!selector.record_failure(0, &lost(), false, now), "the second time is none");
        selector.reset();
        assert_eq!(selector.choose(now), Ok(0));
    }

    #[test]
    fn a_refusal_keeps_away_for_half_a_minute() {
        let now = Instant::now();
        let mut selector = selector(1);
        for _ in 0..5 {
            selector.record_failure(0, &ConnectionLoss::Refused("no".to_owned()), false, now);
            assert!(selector.choose(now + REFUSED_FOR).is_err());
            assert_eq!(selector.choose(now + REFUSED_FOR + RETRY_CAP), Ok(0));
        }
    }

    #[test]
    fn returns_that_go_wrong_grow_rare() {
        let now = Instant::now();
        let mut selector = selector(2);
        for attempt in 0..20u32 {
            selector.record_failure(0, &lost(), false, now);
            let whole = RETURN_FIRST.saturating_mul(2u32.saturating_pow(attempt)).min(RETURN_CAP);
            let wait = selector.failback_delay(1);
            assert!(wait >= whole / 2 && wait <= whole, "{attempt}: {wait:?}");
        }
        assert!(selector.better(1, now).is_empty(), "it is not to be tried yet");
        assert_eq!(selector.better(1, now + RETRY_CAP).len(), 1);
        selector.record_success(0);
        assert!(selector.failback_delay(1) <= RETURN_FIRST);
    }
}
