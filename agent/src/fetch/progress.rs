//! How far a download is: written by the transfer, read by whoever shows it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Between two lines of the log about one download.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// One moment of a download.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize)]
pub struct Snapshot {
    /// Bytes that have come.
    pub bytes: u64,
    /// Bytes there will be, where the source tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// Of the total.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub percent: Option<u8>,
    /// Where they come from, without secrets.
    pub from: String,
}

/// A download that is under way.
pub struct Progress {
    model: String,
    version: u64,
    state: Mutex<(Snapshot, Instant)>,
}

impl Progress {
    /// Of a model version.
    pub fn new(model: &str, version: u64) -> Self {
        Self { model: model.to_owned(), version, state: Mutex::new((Snapshot::default(), Instant::now())) }
    }

    /// How far it is.
    pub fn snapshot(&self) -> Snapshot {
        self.state().0.clone()
    }

    fn state(&self) -> MutexGuard<'_, (Snapshot, Instant)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self, from: &str, bytes: u64, total: Option<u64>) {
        let mut state = self.state();
        state.0 = Snapshot { bytes, total, percent: percent(bytes, total), from: from.to_owned() };
    }

    pub(super) fn add(&self, bytes: u64) {
        let mut state = self.state();
        state.0.bytes += bytes;
        state.0.percent = percent(state.0.bytes, state.0.total);
        if state.1.elapsed() >= TELL_EVERY {
            state.1 = Instant::now();
            let Snapshot { bytes, total, percent, from } = state.0.clone();
            drop(state);
            tracing::info!(model = self.model, version = self.version, bytes, total, percent, from, "downloading");
        }
    }
}

fn percent(bytes: u64, total: Option<u64>) -> Option<u8> {
    let total = total.filter(|total| *total > 0)?;
    u8::try_from(u128::from(bytes) * 100 / u128::from(total)).ok()
}
