//! How long to wait before trying again: doubling, capped, and jittered so that a site's agents do not march in step.

use std::time::Duration;

/// Waiting times between attempts. Each is between half and the whole of a value that doubles up to the cap.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    cap: Duration,
    attempts: u32,
}

impl Backoff {
    /// Starts at `first` and never exceeds `cap`.
    pub fn new(first: Duration, cap: Duration) -> Self {
        Self { first, cap, attempts: 0 }
    }

    /// The time to wait now.
    pub fn next_delay(&mut self) -> Duration {
        let whole = self.first.saturating_mul(2u32.saturating_pow(self.attempts)).min(self.cap);
        self.attempts = self.attempts.saturating_add(1);
        whole.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    /// How many times [`Self::next_delay`] was asked since the last success.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// After a success: the next wait is the first one again.
    pub fn reset(&mut self) {
        self.attempts = 0;
    }
}

/// A random duration from zero to `most`, to spread what many nodes do at the same time.
pub fn jitter(most: Duration) -> Duration {
    most.mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_cap_and_start_over_after_a_success() {
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
