//! A token bucket: a bounded burst, then a steady rate. Time is an argument.

use std::time::{Duration, Instant};

/// Tokens that refill with time, up to a burst.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    burst: f64,
    interval: Duration,
    tokens: f64,
    refilled: Instant,
}

impl TokenBucket {
    /// A full bucket of `burst` tokens that gains one token per `interval`.
    pub fn new(burst: u32, interval: Duration, now: Instant) -> Self {
        Self { burst: f64::from(burst), interval, tokens: f64::from(burst), refilled: now }
    }

    /// Takes one token. `false` when there is none.
    pub fn take(&mut self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.refilled);
        let gained = elapsed.as_secs_f64() / self.interval.as_secs_f64().max(f64::MIN_POSITIVE);
        (self.tokens, self.refilled) = ((self.tokens + gained).min(self.burst), now);
        let has_one = self.tokens >= 1.0;
        if has_one {
            self.tokens -= 1.0;
        }
        has_one
    }

    /// Time until [`Self::take`] succeeds; zero when a token is available.
    pub fn time_until_token(&self, now: Instant) -> Duration {
        let missing = (1.0 - self.tokens).max(0.0);
        self.interval.mul_f64(missing).saturating_sub(now.saturating_duration_since(self.refilled))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_followed_by_a_steady_rate() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(3, Duration::from_secs(10), start);
        assert_eq!((0..5).filter(|_| bucket.take(start)).count(), 3);
        assert!(!bucket.take(start + Duration::from_secs(9)));
        assert_eq!(bucket.time_until_token(start + Duration::from_secs(9)), Duration::from_secs(1));
        assert_eq!(bucket.time_until_token(start + Duration::from_secs(11)), Duration::ZERO);
        assert!(bucket.take(start + Duration::from_secs(11)));
        assert!(!bucket.take(start + Duration::from_secs(12)));
        let later = start + Duration::from_secs(10_000);
        assert_eq!((0..9).filter(|_| bucket.take(later)).count(), 3, "never more than the burst");
    }
}
