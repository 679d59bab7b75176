//! The desired state of the cluster, cached on disk, so that an agent that starts while the API server is unreachable runs the
//! last known models and streams.
//!
//! File `desired.json` in the data folder: `{"labels": {...}, "nodeUid": "...", "objects": [...]}`, replaced atomically. It
//! contains the objects that select this node, each with its last valid content. An object that cannot be read is left out. A
//! file that cannot be read is treated as missing: the agent then waits for the cluster, with the last-good versions.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

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
    #[serde(deserialize_with = "readable_objects")]
    pub(super) objects: Vec<ApiObject>,
}

/// Reads the objects one by one, so that one that cannot be read does not cost the others.
fn readable_objects<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ApiObject>, D::Error> {
    let objects: Vec<Value> = Vec::deserialize(deserializer)?;
    let read = |object: Value| {
        let name = object.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
        serde_json::from_value(object)
            .map_err(|error| {
                tracing::error!(
                    event = "cached_object_unreadable",
                    name,
                    %error,
                    "An object of the cached desired state cannot be read; the cluster's object applies once it is listed"
                );
            })
            .ok()
    };
    Ok(objects.into_iter().filter_map(read).collect())
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

    #[test]
    fn an_object_that_cannot_be_read_does_not_cost_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let object = |name: &str| ApiObject {
            kind: "EdgeModel".into(),
            name: name.into(),
            uid: "u".into(),
            generation: Some(i64::MIN),
            document: Value::Null,
        };
        let mut cache = DesiredCache::open(folder.path());
        cache.write(CachedState { objects: ["a", "b", "c"].map(object).into(), ..CachedState::default() });
        let text = std::fs::read_to_string(folder.path().join(FILE)).unwrap();
        let damaged =
            text.replacen("-9223372036854775808", "1e400", 2).replacen("1e400", "7.5", 1).replacen("1e400", "{}", 1);
        std::fs::write(folder.path().join(FILE), damaged).unwrap();
        let cache = DesiredCache::open(folder.path());
        assert_eq!(cache.get().unwrap().objects, [object("c")]);
    }
}
