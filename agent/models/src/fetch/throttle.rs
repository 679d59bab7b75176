//! The bandwidth limit that all downloads of the node share.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Spaces received bytes so that all transfers together stay below a rate. A token bucket does not fit: a piece of a
/// body has thousands of bytes, and its cost is known only after it was received.
pub(super) struct Throttle {
    bytes_per_second: Option<u64>,
    /// When the bytes received so far are paid for.
    free_at: Mutex<Instant>,
}

impl Throttle {
    /// A limit of `bytes_per_second`. `None` does not limit.
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` more comply with the rate.
    pub(super) async fn wait(&self, bytes: u64) {
        let Some(rate) = self.bytes_per_second else { return };
        let until = {
            let mut free_at = self.free_at.lock();
            *free_at = (*free_at).max(Instant::now()) + Duration::from_secs_f64(bytes as f64 / rate as f64);
            *free_at
        };
        tokio::time::sleep_until(until.into()).await;
    }
}
