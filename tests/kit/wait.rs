//! Waits for conditions, each with a time limit. A test never waits for a fixed time.

use std::time::{Duration, Instant};

/// The default limit; sufficient for any single step on a slow, busy machine.
pub const TIMEOUT: Duration = Duration::from_secs(30);
/// The limit for operations that are retried with backoff, or that compute for a long time.
pub const LONG_TIMEOUT: Duration = Duration::from_secs(180);
/// The time between two evaluations of a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Evaluates a condition until it returns a value, and returns the value.
///
/// # Panics
/// If [`TIMEOUT`] expires; `what` names the condition in the message.
pub fn until<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    until_within(TIMEOUT, what, condition)
}

/// Like [`until`], with [`LONG_TIMEOUT`].
///
/// # Panics
/// If the limit expires.
pub fn until_long<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    until_within(LONG_TIMEOUT, what, condition)
}

/// Like [`until`], with another limit.
///
/// # Panics
/// If the limit expires.
pub fn until_within<T>(limit: Duration, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(started.elapsed() < limit, "timed out after {limit:?} waiting for {what}");
        std::thread::park_timeout(POLL_INTERVAL);
    }
}

/// Evaluates a condition until it is true.
///
/// # Panics
/// If [`TIMEOUT`] expires.
pub fn until_true(what: &str, mut condition: impl FnMut() -> bool) {
    until(what, || condition().then_some(()));
}
