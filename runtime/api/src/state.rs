//! The states of models and streams.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The state of a model version on a node. The order of the variants is the order in which a version passes through
/// them.
///
/// A state that this version does not know, which a newer agent may report, reads as [`ModelState::Pending`]: not
/// ready, not failed, and still in transition.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "String")]
pub enum ModelState {
    /// The version is desired and waits for a load task.
    #[default]
    Pending,
    /// The version's file is being downloaded.
    Downloading,
    /// The version's file is being compared with its digest.
    Verifying,
    /// The version is tested by the admission in a child process.
    Vetting,
    /// The version is loaded and runs its first inference.
    Warming,
    /// The version serves.
    Ready,
    /// The version could not be loaded; it is retried.
    Failed,
    /// The version failed too often; it is not retried.
    Quarantined,
}

impl ModelState {
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

    /// Whether the last attempt to load the version failed and none is in progress.
    pub fn has_failed(self) -> bool {
        matches!(self, Self::Failed | Self::Quarantined)
    }

    /// The name in statuses, messages and metric labels.
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

impl From<String> for ModelState {
    fn from(name: String) -> Self {
        Self::ALL.into_iter().find(|state| state.name() == name).unwrap_or_default()
    }
}

/// The state of a stream on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamState {
    /// The model that processes the stream's frames.
    pub model: String,
    /// Whether the camera delivers frames and most of them are inspected.
    pub up: bool,
    /// Why the stream is not up; absent while it is up, and until the first connection attempt has ended.
    pub reason: Option<String>,
    /// Why the verdict rule of the last frame failed; absent while it succeeds.
    pub rule_failure: Option<String>,
}

/// The states of all running streams, by name.
pub type StreamStates = BTreeMap<String, StreamState>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_written_as_their_names_and_unknown_ones_read_as_pending() {
        for state in ModelState::ALL {
            let text = serde_json::to_value(state).unwrap();
            assert_eq!(text, state.name());
            assert_eq!(serde_json::from_value::<ModelState>(text).unwrap(), state);
        }
        assert_eq!(serde_json::from_str::<ModelState>("\"Judging\"").unwrap(), ModelState::Pending);
        assert!(ModelState::Verifying < ModelState::Vetting && ModelState::Warming < ModelState::Ready);
    }
}
