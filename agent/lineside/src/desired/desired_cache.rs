//! The last good word of the cluster, kept on disk, so that an agent that starts while the cluster is away knows what to
//! run.
//!
//! File `desired.json` in the data folder: `{"labels": {...}, "nodeUid": "...", "objects": [...]}`, replaced as a whole. It
//! holds the objects that concern this node, each with the last content that could be followed. A file that cannot be
//! read counts as none: the agent then waits for the cluster.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::desired::object_set::ApiObject;
use lineside_common::files;

const FILE: &str = "desired.json";
const BYTES_MAX: u64 = 64 << 20;

/// What is remembered.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct CachedState {
    /// Labels that the node bore.
    pub(super) labels: BTreeMap<String, String>,
    /// The uid of the node.
    pub(super) node_uid: Option<String>,
    /// What was asked of it.
    pub(super) objects: Vec<ApiObject>,
}

/// The file.
pub(super) struct DesiredCache {
    path: PathBuf,
    written: Option<CachedState>,
}

impl DesiredCache {
    /// Reads it.
    pub(super) fn open(data_dir: &Path) -> Self {
        let path = data_dir.join(FILE);
        let written = match files::read_bounded(&path, BYTES_MAX) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| tracing::error!(file = %path.display(), %error, "what the cluster asked for last cannot be read"))
                .ok(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::error!(file = %path.display(), %error, "what the cluster asked for last cannot be read");
                None
            }
        };
        Self { path, written }
    }

    /// What is remembered.
    pub(super) fn get(&self) -> Option<&CachedState> {
        self.written.as_ref()
    }

    /// Writes it down where it is news. A disk that refuses is told of, and tried again at the next news.
    pub(super) fn write(&mut self, remembered: CachedState) {
        if self.written.as_ref() == Some(&remembered) {
            return;
        }
        let written = serde_json::to_vec(&remembered)
            .map_err(std::io::Error::other)
            .and_then(|bytes| files::replace(&self.path, &bytes));
        match written {
            Ok(()) => self.written = Some(remembered),
            Err(error) => {
                tracing::error!(file = %self.path.display(), %error, "what the cluster asks for could not be written down");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_read_and_what_is_damaged_counts_as_none() {
        let folder = tempfile::tempdir().unwrap();
        let mut memory = DesiredCache::open(folder.path());
        assert!(memory.get().is_none());
        let remembered = CachedState { labels: BTreeMap::from([("a".into(), "b".into())]), ..CachedState::default() };
        memory.write(remembered.clone());
        assert_eq!(DesiredCache::open(folder.path()).get(), Some(&remembered));
        std::fs::write(folder.path().join(FILE), b"{\"labels\": 3").unwrap();
        assert!(DesiredCache::open(folder.path()).get().is_none());
    }
}
