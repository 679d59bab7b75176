//! Exponential backoff with a cap and jitter. The jitter keeps the agents of a site from retrying at the same moment.

use std::time::Duration;

/// Delays between attempts. Each delay is random between half and the whole of a value that doubles up to the cap.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    cap: Duration,
    attempts: u32,
}

impl Backoff {
    /// A backoff whose first delay is at most `first`, and whose delays never exceed `cap`.
    pub fn new(first: Duration, cap: Duration) -> Self {
        Self { first, cap, attempts: 0 }
    }

    /// Counts one attempt and returns the delay before the next one.
    pub fn next_delay(&mut self) -> Duration {
        let whole = self.first.saturating_mul(2u32.saturating_pow(self.attempts)).min(self.cap);
        self.attempts = self.attempts.saturating_add(1);
        whole.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    /// Number of calls of [`Self::next_delay`] since the last [`Self::reset`].
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Notes a success: the next delay is the first one again.
    pub fn reset(&mut self) {
        self.attempts = 0;
    }
}

/// A random duration between zero and `max`, which spreads actions that many nodes would take at the same time.
pub fn jitter(max: Duration) -> Duration {
    max.mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_cap_and_restart_after_a_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        for attempt in 0..2000u32 {
            let whole =
                Duration::from_millis(100).saturating_mul(2u32.saturating_pow(attempt)).min(Duration::from_secs(5));
            let delay = backoff.next_delay();
            assert!(delay >= whole / 2 && delay <= whole, "attempt {attempt}: {delay:?} of {whole:?}");
        }
        backoff.reset();
        assert!(backoff.next_delay() <= Duration::from_millis(100));
    }
}
