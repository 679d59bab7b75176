//! Waiting for a condition, with a bound.

use std::time::{Duration, Instant};

/// Long enough for anything a test waits for on a slow and busy machine.
pub const BOUND: Duration = Duration::from_secs(30);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Looks until there is something, and returns it.
///
/// # Panics
/// When the bound is over; `what` says what was waited for.
pub fn until<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    until_within(BOUND, what, look)
}

/// The same with a bound of one's own.
///
/// # Panics
/// As [`until`].
pub fn until_within<T>(bound: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < bound, "waited {bound:?} in vain for: {what}");
        std::thread::park_timeout(LOOK_EVERY);
    }
}

/// Looks until it is so.
///
/// # Panics
/// As [`until`].
pub fn until_true(what: &str, mut look: impl FnMut() -> bool) {
    until(what, || look().then_some(()));
}
