//! The progress of a download: written by the transfer, read by the status.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use lineside_api::status::Download;

/// Interval between log messages about one download.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// The progress of the download of one model version.
pub struct Progress {
    model: String,
    version: u64,
    state: Mutex<State>,
}

struct State {
    download: Download,
    logged_at: Instant,
}

impl Progress {
    /// The progress of a model version that has not started to download.
    pub fn new(model: &str, version: u64) -> Self {
        let state = State { download: Download::default(), logged_at: Instant::now() };
        Self { model: model.to_owned(), version, state: Mutex::new(state) }
    }

    /// The current progress.
    pub fn snapshot(&self) -> Download {
        self.state.lock().download.clone()
    }

    /// Starts a transfer from `from`, with `bytes` received before.
    pub(super) fn start(&self, from: &str, bytes: u64, total: Option<u64>) {
        let download = Download { bytes, total, percent: percent(bytes, total), from: from.to_owned() };
        self.state.lock().download = download;
    }

    /// Adds received bytes.
    pub(super) fn add(&self, bytes: u64) {
        let mut state = self.state.lock();
        state.download.bytes += bytes;
        state.download.percent = percent(state.download.bytes, state.download.total);
        if state.logged_at.elapsed() >= LOG_INTERVAL {
            state.logged_at = Instant::now();
            let Download { bytes, total, percent, from } = state.download.clone();
            drop(state);
            tracing::info!(
                event = "model_downloading",
                model = self.model,
                version = self.version,
                bytes,
                total,
                percent,
                from,
                "Downloading model"
            );
        }
    }
}

fn percent(bytes: u64, total: Option<u64>) -> Option<u8> {
    let total = total.filter(|total| *total > 0)?;
    u8::try_from(u128::from(bytes) * 100 / u128::from(total)).ok()
}
