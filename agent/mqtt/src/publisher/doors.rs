//! The brokers: which one is tried next, and when.
//!
//! The first in the list that may be tried is. A broker that is not reached is left alone for a growing time, one that
//! refuses us for half a minute at least; meanwhile the next one serves. While it does, the better ones are knocked at
//! from time to time, and more rarely the more often a return to them went wrong.

use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::config::Broker;
use crate::connection::Loss;
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
pub(super) struct Doors(Vec<Door>);

struct Door {
    broker: Broker,
    backoff: Backoff,
    not_before: Option<Instant>,
    told: Option<Loss>,
}

impl Doors {
    pub(super) fn new(brokers: &[Broker]) -> Self {
        let door = |broker: &Broker| Door {
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
        let is_free = |door: &Door| door.not_before.is_none_or(|until| until <= now);
        match self.0.iter().position(is_free) {
            Some(index) => Ok(index),
            None => Err(self.0.iter().filter_map(|door| door.not_before).min().unwrap_or(now)),
        }
    }

    /// A connection got records across.
    pub(super) fn praise(&mut self, index: usize) {
        self.0[index].backoff.reset();
    }

    /// A connection was lost, or not had. `true` when that is news.
    pub(super) fn blame(&mut self, index: usize, loss: &Loss, was_open: bool, now: Instant) -> bool {
        let door = &mut self.0[index];
        let delay = match loss {
            Loss::Unreachable(_) => door.backoff.next_delay(),
            // Jittered upwards: a site's agents should not all come back at once, and never before.
            Loss::Refused(_) => REFUSED_FOR + door.backoff.next_delay(),
        };
        door.not_before = Some(now + delay);
        let is_news = was_open || door.told.as_ref().is_none_or(|told| loss.is_news_after(told));
        if is_news {
            door.told = Some(loss.clone());
        }
        is_news
    }

    /// Our credentials have changed: every broker may be tried.
    pub(super) fn forgive(&mut self) {
        self.0.iter_mut().for_each(|door| door.not_before = None);
    }

    /// Whether there are brokers better than this one.
    pub(super) fn has_better(&self, index: usize) -> bool {
        index > 0
    }

    /// How long to wait before the better ones are knocked at: twice as long for every time a return went wrong.
    pub(super) fn until_return(&self, index: usize) -> Duration {
        let attempts = self.0.iter().take(index).map(|door| door.backoff.attempts()).min().unwrap_or(0);
        let whole = RETURN_FIRST.saturating_mul(2u32.saturating_pow(attempts.saturating_sub(1))).min(RETURN_CAP);
        whole.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    /// The addresses of the brokers better than this one that may be tried.
    pub(super) fn better(&self, index: usize, now: Instant) -> Vec<(String, u16)> {
        let is_free = |door: &&Door| door.not_before.is_none_or(|until| until <= now);
        self.0.iter().take(index).filter(is_free).map(|door| (door.broker.host.clone(), door.broker.port)).collect()
    }
}

/// Whether anybody opens.
pub(super) async fn knock(addresses: Vec<(String, u16)>) -> bool {
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

    fn doors(count: u16) -> Doors {
        let broker = |port| Broker { host: "b".to_owned(), port, tls: false, credentials: None };
        Doors::new(&(0..count).map(broker).collect::<Vec<_>>())
    }

    fn lost() -> Loss {
        Loss::Unreachable("gone".to_owned())
    }

    #[test]
    fn the_first_that_may_be_tried_is_tried() {
        let now = Instant::now();
        let mut doors = doors(2);
        assert_eq!(doors.choose(now), Ok(0));
        assert!(doors.blame(0, &lost(), false, now), "the first time is news");
        assert_eq!(doors.choose(now), Ok(1));
        assert!(doors.blame(1, &Loss::Refused("no".to_owned()), false, now));
        let until = doors.choose(now).unwrap_err();
        assert!(until > now && until <= now + RETRY_CAP, "the one that was not reached is tried first");
        assert_eq!(doors.choose(now + RETRY_CAP), Ok(0));
        assert!(!doors.blame(0, &lost(), false, now), "the second time is none");
        doors.forgive();
        assert_eq!(doors.choose(now), Ok(0));
    }

    #[test]
    fn a_refusal_keeps_away_for_half_a_minute() {
        let now = Instant::now();
        let mut doors = doors(1);
        for _ in 0..5 {
            doors.blame(0, &Loss::Refused("no".to_owned()), false, now);
            assert!(doors.choose(now + REFUSED_FOR).is_err());
            assert_eq!(doors.choose(now + REFUSED_FOR + RETRY_CAP), Ok(0));
        }
    }

    #[test]
    fn returns_that_go_wrong_grow_rare() {
        let now = Instant::now();
        let mut doors = doors(2);
        for attempt in 0..20u32 {
            doors.blame(0, &lost(), false, now);
            let whole = RETURN_FIRST.saturating_mul(2u32.saturating_pow(attempt)).min(RETURN_CAP);
            let wait = doors.until_return(1);
            assert!(wait >= whole / 2 && wait <= whole, "{attempt}: {wait:?}");
        }
        assert!(doors.better(1, now).is_empty(), "it is not to be tried yet");
        assert_eq!(doors.better(1, now + RETRY_CAP).len(), 1);
        doors.praise(0);
        assert!(doors.until_return(1) <= RETURN_FIRST);
    }
}
