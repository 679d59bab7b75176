//! What the reconciler shows of itself: plain data, from which the status, the probes and the events are built.

use std::collections::BTreeMap;

use lineside_api::state::ModelState;
use lineside_api::status::Download;
use lineside_common::digest::Digest;

use super::load_task::LoadedVersion;
use crate::desired::{Identity, Refused, RejectedFiles};

/// The state of the reconciler at one moment.
#[derive(Debug, Clone, Default)]
pub(super) struct Snapshot {
    /// Whether a desired state is known; without one no agent is ready.
    pub is_configured: bool,
    /// Why the source of the desired state cannot be read now.
    pub unreadable: Option<String>,
    /// Manifest files whose present content is invalid.
    pub rejected_files: RejectedFiles,
    /// Whether no model waits for the restoration of the version that served last.
    pub is_restored: bool,
    /// The labels that selectors are matched with.
    pub labels: BTreeMap<String, String>,
    /// The models that are assigned to this node, by name.
    pub models: Vec<ModelSnapshot>,
    /// The streams that are assigned to this node, the paused ones last.
    pub streams: Vec<StreamSnapshot>,
    /// Objects for this node whose present content is invalid.
    pub refused: Vec<Refused>,
    /// The versions that serve, by model.
    pub serving: BTreeMap<String, LoadedVersion>,
}

impl Snapshot {
    /// Why the desired state is not known, or cannot be read now.
    pub(super) fn config_error(&self) -> Option<String> {
        let pending = (!self.is_configured).then_some("the desired state is not known yet");
        match (pending, &self.unreadable) {
            (None, None) => None,
            (Some(pending), None) => Some(pending.to_owned()),
            (None, Some(unreadable)) => Some(format!("{unreadable}; the last desired state applies")),
            (Some(pending), Some(unreadable)) => Some(format!("{pending}: {unreadable}")),
        }
    }
}

/// A model that is assigned to this node.
#[derive(Debug, Clone)]
pub(super) struct ModelSnapshot {
    /// The model's name.
    pub name: String,
    /// The wanted version.
    pub version: u64,
    /// The wanted digest, where the manifest states one.
    pub digest: Option<Digest>,
    /// The object in the cluster.
    pub identity: Identity,
    /// The state of the wanted version.
    pub state: ModelState,
    /// Why the wanted version is not ready.
    pub reason: Option<String>,
    /// How far the wanted version came when it failed last.
    pub failed_phase: Option<ModelState>,
    /// The progress of its download.
    pub download: Option<Download>,
}

/// A stream that is assigned to this node.
#[derive(Debug, Clone)]
pub(super) struct StreamSnapshot {
    /// The stream's name.
    pub name: String,
    /// Its model; not known of a paused stream.
    pub model: Option<String>,
    /// The object in the cluster.
    pub identity: Identity,
    /// Whether its model is assigned to this node.
    pub has_model: bool,
    /// Whether an operator has paused it.
    pub is_paused: bool,
}
