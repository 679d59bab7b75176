//! Whether the controller's loop comes round.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A loop that has not come round for this long is stuck.
pub const BEAT_MAX: Duration = Duration::from_secs(60);

/// Whether the controller's loop comes round, and whether it knows everything.
pub struct Heartbeat(Mutex<(Instant, bool)>);

impl Heartbeat {
    /// A loop that has not come round yet.
    pub fn new(now: Instant) -> Self {
        Self(Mutex::new((now, false)))
    }

    /// The loop has come round; `is_ready` once all objects are known.
    pub fn beat(&self, is_ready: bool) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (Instant::now(), is_ready);
    }

    /// When the loop came round last, and whether everything is known.
    pub fn get(&self) -> (Instant, bool) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
