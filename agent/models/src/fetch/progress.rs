//! How far a download is: written by the transfer, read by whoever shows it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lineside_api::status::Download;

/// Between two lines of the log about one download.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// A download that is under way.
pub struct Progress {
    model: String,
    version: u64,
    state: Mutex<(Download, Instant)>,
}

impl Progress {
    /// Of a model version.
    pub fn new(model: &str, version: u64) -> Self {
        Self { model: model.to_owned(), version, state: Mutex::new((Download::default(), Instant::now())) }
    }

    /// How far it is.
    pub fn snapshot(&self) -> Download {
        self.state().0.clone()
    }

    fn state(&self) -> MutexGuard<'_, (Download, Instant)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self, from: &str, bytes: u64, total: Option<u64>) {
        let mut state = self.state();
        state.0 = Download { bytes, total, percent: percent(bytes, total), from: from.to_owned() };
    }

    pub(super) fn add(&self, bytes: u64) {
        let mut state = self.state();
        state.0.bytes += bytes;
        state.0.percent = percent(state.0.bytes, state.0.total);
        if state.1.elapsed() >= TELL_EVERY {
            state.1 = Instant::now();
            let Download { bytes, total, percent, from } = state.0.clone();
            drop(state);
            tracing::info!(model = self.model, version = self.version, bytes, total, percent, from, "downloading");
        }
    }
}

fn percent(bytes: u64, total: Option<u64>) -> Option<u8> {
    let total = total.filter(|total| *total > 0)?;
    u8::try_from(u128::from(bytes) * 100 / u128::from(total)).ok()
}
