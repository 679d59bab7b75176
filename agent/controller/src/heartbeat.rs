//! The state of the controller's loop, for its probes.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// A loop that has not completed an iteration for this long is stuck. An iteration takes at most a few call timeouts.
const STUCK_AFTER: Duration = Duration::from_secs(60);

/// When the controller's loop completed its last iteration, and whether it has listed all objects.
pub struct Heartbeat(Mutex<Beat>);

struct Beat {
    at: Instant,
    is_synced: bool,
}

impl Heartbeat {
    /// A loop that starts at `now` and has listed nothing.
    pub fn new(now: Instant) -> Self {
        Self(Mutex::new(Beat { at: now, is_synced: false }))
    }

    /// Records an iteration. `is_synced`: all kinds have been listed completely.
    pub fn beat(&self, is_synced: bool, now: Instant) {
        *self.0.lock() = Beat { at: now, is_synced };
    }

    /// Whether the loop completed an iteration recently, for liveness probes.
    pub fn is_alive(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.0.lock().at) <= STUCK_AFTER
    }

    /// Whether all kinds have been listed completely, for readiness probes.
    pub fn is_synced(&self) -> bool {
        self.0.lock().is_synced
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_without_a_beat_is_stuck_after_a_minute() {
        let start = Instant::now();
        let heartbeat = Heartbeat::new(start);
        assert!(heartbeat.is_alive(start + STUCK_AFTER) && !heartbeat.is_synced());
        assert!(!heartbeat.is_alive(start + STUCK_AFTER + Duration::from_secs(1)));
        heartbeat.beat(true, start + STUCK_AFTER);
        assert!(heartbeat.is_alive(start + STUCK_AFTER * 2) && heartbeat.is_synced());
    }
}
