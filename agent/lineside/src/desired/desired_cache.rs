//! The desired state of the cluster, cached on disk, so that an agent that starts while the API server is unreachable runs the
//! last known models and streams.
//!
//! File `desired.json` in the data folder: `{"labels": {...}, "nodeUid": "...", "objects": [...]}`, replaced atomically. It
//! contains the objects that select this node, each with its last valid content. A file that cannot be read is treated as
//! missing: the agent then waits for the cluster.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::desired::object_set::ApiObject;
use lineside_common::files;

const FILE: &str = "desired.json";
/// Maximum size of the file, in bytes.
const BYTES_MAX: u64 = 64 << 20;

/// The cached state.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct CachedState {
    /// Labels of the node in the cluster.
    pub(super) labels: BTreeMap<String, String>,
    /// `metadata.uid` of the node.
    pub(super) node_uid: Option<String>,
    /// The objects that select the node.
    pub(super) objects: Vec<ApiObject>,
}

/// The cache file and its last content.
pub(super) struct DesiredCache {
    path: PathBuf,
    written: Option<CachedState>,
}

impl DesiredCache {
    /// Reads the file. Logs an error when it exists and cannot be read.
    pub(super) fn open(data_dir: &Path) -> Self {
        let path = data_dir.join(FILE);
        let written = match files::read_bounded(&path, BYTES_MAX) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| {
                    tracing::error!(
                        event = "desired_cache_unreadable",
                        file = %path.display(),
                        %error,
                        "Cannot parse the cached desired state; the agent waits for the cluster"
                    );
                })
                .ok(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::error!(
                    event = "desired_cache_unreadable",
                    file = %path.display(),
                    %error,
                    "Cannot read the cached desired state; the agent waits for the cluster"
                );
                None
            }
        };
        Self { path, written }
    }

    /// The state that was read or written last.
    pub(super) fn get(&self) -> Option<&CachedState> {
        self.written.as_ref()
    }

    /// Writes the state if it has changed. A failed write is logged, and retried at the next call.
    pub(super) fn write(&mut self, state: CachedState) {
        if self.written.as_ref() == Some(&state) {
            return;
        }
        let written = serde_json::to_vec(&state)
            .map_err(std::io::Error::other)
            .and_then(|bytes| files::replace(&self.path, &bytes));
        match written {
            Ok(()) => self.written = Some(state),
            Err(error) => {
                tracing::error!(
                    event = "desired_cache_not_written",
                    file = %self.path.display(),
                    %error,
                    "Cannot write the cached desired state"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_state_is_read_back_and_a_damaged_file_is_ignored() {
        let folder = tempfile::tempdir().unwrap();
        let mut cache = DesiredCache::open(folder.path());
        assert!(cache.get().is_none());
        let state = CachedState { labels: BTreeMap::from([("a".into(), "b".into())]), ..CachedState::default() };
        cache.write(state.clone());
        assert_eq!(DesiredCache::open(folder.path()).get(), Some(&state));
        std::fs::write(folder.path().join(FILE), b"{\"labels\": 3").unwrap();
        assert!(DesiredCache::open(folder.path()).get().is_none());
    }
}
