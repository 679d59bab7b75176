//! The states of models and streams.

use std::collections::BTreeMap;

/// Where a model version stands on this node, in the order of its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ModelState {
    /// Wanted, and waiting for its turn.
    Pending,
    /// Its file is on the way.
    Downloading,
    /// Its file is being read and compared with its digest.
    Verifying,
    /// A child process tries it.
    Vetting,
    /// Being loaded and run once.
    Warming,
    /// Serving.
    Ready,
    /// Could not be loaded; it is tried again.
    Failed,
    /// Failed too often; it is not tried again.
    Quarantined,
}

impl ModelState {
    /// Whether it was given up, for now or for good.
    pub fn has_failed(self) -> bool {
        matches!(self, Self::Failed | Self::Quarantined)
    }

    /// The state of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }

    const ALL: [Self; 8] = [
        Self::Pending,
        Self::Downloading,
        Self::Verifying,
        Self::Vetting,
        Self::Warming,
        Self::Ready,
        Self::Failed,
        Self::Quarantined,
    ];

    /// As it stands in status and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Downloading => "Downloading",
            Self::Verifying => "Verifying",
            Self::Vetting => "Vetting",
            Self::Warming => "Warming",
            Self::Ready => "Ready",
            Self::Failed => "Failed",
            Self::Quarantined => "Quarantined",
        }
    }
}

/// A stream that is played.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamState {
    /// The model that looks at its frames.
    pub model: String,
    /// Whether frames can be had.
    pub up: bool,
    /// Why not, as far as that was said.
    pub reason: Option<String>,
}

/// StreamStates by name.
pub type StreamStates = BTreeMap<String, StreamState>;
