//! Heartbeats of the tasks that own a state, so that a state whose owner no longer runs is not taken for the truth.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How often a task sends heartbeats.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// Time without a heartbeat after which what a task has published is stale.
pub const STALE_AFTER: Duration = Duration::from_secs(10);

/// When a task reported last. Clones share the time.
#[derive(Debug, Clone)]
pub struct TaskHeartbeat {
    created: Instant,
    /// Milliseconds from `created` to the last heartbeat.
    last_ms: Arc<AtomicU64>,
}

impl TaskHeartbeat {
    /// A first heartbeat at `now`.
    pub fn new(now: Instant) -> Self {
        Self { created: now, last_ms: Arc::default() }
    }

    /// Records a heartbeat.
    pub fn beat(&self, now: Instant) {
        let ms = u64::try_from(now.saturating_duration_since(self.created).as_millis()).unwrap_or(u64::MAX);
        self.last_ms.fetch_max(ms, Ordering::Relaxed);
    }

    /// Time since the last heartbeat.
    pub fn age(&self, now: Instant) -> Duration {
        let last = Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
        now.saturating_duration_since(self.created).saturating_sub(last)
    }

    /// Whether the last heartbeat is too old for the state of its task to be trusted.
    pub fn is_stale(&self, now: Instant) -> bool {
        self.age(now) > STALE_AFTER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_of_a_task_without_heartbeats_is_stale() {
        let start = Instant::now();
        let heartbeat = TaskHeartbeat::new(start);
        assert!(!heartbeat.is_stale(start + STALE_AFTER));
        let later = start + STALE_AFTER + Duration::from_millis(1);
        assert!(heartbeat.is_stale(later));
        heartbeat.beat(later);
        assert!(!heartbeat.is_stale(later + STALE_AFTER));
        assert_eq!(heartbeat.age(later + Duration::from_secs(3)), Duration::from_secs(3));
        heartbeat.beat(start);
        assert_eq!(heartbeat.age(later), Duration::ZERO, "a late heartbeat does not make the task older");
    }
}
