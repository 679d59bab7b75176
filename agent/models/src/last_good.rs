//! Last-good versions: the model versions that served last on this node, and the highest version of each model that
//! ever served. Both are kept in small files in the data folder.
//!
//! `last-good.json` holds the manifests of the versions that served last, as they were written, with the digests of
//! their files, and those of the versions before them. The agent restores them at a start without a network, or when a
//! new version fails; the version before replaces one that serves and fails then.
//! `highest-versions.json` is kept when a model is removed: a model that is added again must not serve an older
//! version.
//!
//! A file that cannot be read is ignored with a warning, and the agent starts without it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use lineside_api::kinds::ModelManifest;
use lineside_api::kinds::manifest::{ManifestDocument, Object};
use lineside_common::digest::Digest;
use lineside_common::files;

const LAST_GOOD_FILE: &str = "last-good.json";
const HIGHEST_VERSIONS_FILE: &str = "highest-versions.json";
const BYTES_MAX: u64 = 64 << 20;

/// The last-good version of each model, and its highest version.
pub struct LastGoodVersions {
    folder: PathBuf,
    models: BTreeMap<String, LastGoodVersion>,
    /// The versions that served before those in `models`.
    previous: BTreeMap<String, LastGoodVersion>,
    highest: BTreeMap<String, u64>,
}

/// A version that has served on this node.
#[derive(Debug, Clone, PartialEq)]
pub struct LastGoodVersion {
    /// The manifest it served with.
    pub manifest: ModelManifest,
    /// The digest of its file.
    pub digest: Digest,
}

/// A file of the last-good versions could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}", path.display())]
pub struct LastGoodError {
    path: PathBuf,
    source: io::Error,
}

/// The content of `last-good.json`.
#[derive(Serialize, Deserialize)]
struct LastGoodFile {
    models: BTreeMap<String, LastGoodEntry>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    previous: BTreeMap<String, LastGoodEntry>,
}

#[derive(Serialize, Deserialize)]
struct LastGoodEntry {
    version: u64,
    digest: Digest,
    manifest: ManifestDocument,
}

/// The entries whose manifests can be read.
fn versions(entries: BTreeMap<String, LastGoodEntry>) -> BTreeMap<String, LastGoodVersion> {
    let mut versions = BTreeMap::new();
    for (name, entry) in entries {
        match entry.manifest.read(&|_| Ok(())) {
            Ok(Object::Model(manifest)) if manifest.name == name => {
                versions.insert(name, LastGoodVersion { manifest: *manifest, digest: entry.digest });
            }
            Ok(_) => tracing::warn!(
                event = "last_good_unreadable",
                model = name,
                "Ignoring a last-good entry whose manifest is not of this model"
            ),
            Err(reasons) => tracing::warn!(
                event = "last_good_unreadable",
                model = name,
                reason = %reasons,
                "Ignoring an unreadable last-good manifest"
            ),
        }
    }
    versions
}

impl LastGoodVersions {
    /// Reads the files in the data folder.
    pub fn read(folder: &Path) -> Self {
        let file: Option<LastGoodFile> = read_json(&folder.join(LAST_GOOD_FILE));
        let (models, previous) = file.map(|file| (file.models, file.previous)).unwrap_or_default();
        let (models, previous) = (versions(models), versions(previous));
        let highest = read_json(&folder.join(HIGHEST_VERSIONS_FILE)).unwrap_or_default();
        Self { highest, folder: folder.to_owned(), models, previous }
    }

    /// The last-good version of a model.
    pub fn get(&self, name: &str) -> Option<&LastGoodVersion> {
        self.models.get(name)
    }

    /// The names of the models that have a last-good version.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.models.keys()
    }

    /// The highest version of a model that ever served on this node.
    pub fn highest_version(&self, name: &str) -> Option<u64> {
        self.highest.get(name).copied()
    }

    /// The digests of the last-good versions and of the versions before them.
    pub fn digests(&self) -> BTreeSet<Digest> {
        self.models.values().chain(self.previous.values()).map(|version| version.digest).collect()
    }

    /// Makes the version before the last-good version of a model the last-good version. Returns it; `None` when there is
    /// none.
    ///
    /// # Errors
    /// When the file cannot be written. The change is made in memory.
    pub fn fall_back(&mut self, name: &str) -> Result<Option<LastGoodVersion>, LastGoodError> {
        let Some(previous) = self.previous.remove(name) else { return Ok(None) };
        self.models.insert(name.to_owned(), previous.clone());
        self.write()?;
        Ok(Some(previous))
    }

    /// Records that a version serves now.
    ///
    /// # Errors
    /// When a file cannot be written. The version is recorded in memory.
    pub fn record(&mut self, manifest: &ModelManifest, digest: Digest) -> Result<(), LastGoodError> {
        // The highest version is written first: after a crash between the two writes, a missing highest version would
        // allow a downgrade.
        let highest = self.highest.entry(manifest.name.clone()).or_default();
        if *highest < manifest.version {
            *highest = manifest.version;
            write_json(&self.folder.join(HIGHEST_VERSIONS_FILE), &self.highest)?;
        }
        let version = LastGoodVersion { manifest: manifest.clone(), digest };
        match self.models.insert(manifest.name.clone(), version.clone()) {
            Some(previous) if previous == version => Ok(()),
            Some(previous) => {
                self.previous.insert(manifest.name.clone(), previous);
                self.write()
            }
            None => self.write(),
        }
    }

    /// Removes the last-good version of a model. The highest version is kept.
    ///
    /// # Errors
    /// When the file cannot be written. The version is removed from memory.
    pub fn remove(&mut self, name: &str) -> Result<(), LastGoodError> {
        self.previous.remove(name);
        match self.models.remove(name) {
            Some(_) => self.write(),
            None => Ok(()),
        }
    }

    fn write(&self) -> Result<(), LastGoodError> {
        let entry = |version: &LastGoodVersion| LastGoodEntry {
            version: version.manifest.version,
            digest: version.digest,
            manifest: version.manifest.document.clone(),
        };
        let entries = |versions: &BTreeMap<String, LastGoodVersion>| {
            versions.iter().map(|(name, version)| (name.clone(), entry(version))).collect()
        };
        let file = LastGoodFile { models: entries(&self.models), previous: entries(&self.previous) };
        write_json(&self.folder.join(LAST_GOOD_FILE), &file)
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let value = files::read_bounded(path, BYTES_MAX).and_then(|bytes| Ok(serde_json::from_slice(&bytes)?));
    match value {
        Ok(value) => Some(value),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(
                event = "last_good_unreadable",
                file = %path.display(),
                %error,
                "Ignoring an unreadable file of the last-good versions"
            );
            None
        }
    }
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), LastGoodError> {
    let write = || files::replace(path, &serde_json::to_vec_pretty(value)?);
    write().map_err(|source| LastGoodError { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(version: u64) -> ModelManifest {
        let text = format!(
            "apiVersion: lineside.dev/v1alpha1\nkind: EdgeModel\nmetadata: {{name: m}}\n\
             spec: {{version: {version}, source: {{uri: 'file:m.onnx'}}}}\n"
        );
        match lineside_api::kinds::manifest::read(&text, Path::new("/models"), &|_| Ok(())).unwrap().remove(0) {
            Object::Model(model) => *model,
            Object::Stream(_) => unreachable!("the manifest is an EdgeModel"),
        }
    }

    #[test]
    fn the_last_good_version_survives_a_restart_and_the_highest_version_a_removal() {
        let folder = tempfile::tempdir().unwrap();
        let mut versions = LastGoodVersions::read(folder.path());
        assert_eq!(versions.get("m"), None);
        versions.record(&manifest(3), Digest::of(b"3")).unwrap();
        versions.record(&manifest(2), Digest::of(b"2")).unwrap();
        let mut reread = LastGoodVersions::read(folder.path());
        let expected = LastGoodVersion { manifest: manifest(2), digest: Digest::of(b"2") };
        assert_eq!(reread.get("m"), Some(&expected));
        assert_eq!((reread.highest_version("m"), reread.digests().len()), (Some(3), 2));
        reread.remove("m").unwrap();
        let reread = LastGoodVersions::read(folder.path());
        assert_eq!((reread.get("m"), reread.highest_version("m")), (None, Some(3)));
    }

    #[test]
    fn the_version_before_can_become_the_last_good_version_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut versions = LastGoodVersions::read(folder.path());
        assert_eq!(versions.fall_back("m").unwrap(), None);
        versions.record(&manifest(1), Digest::of(b"1")).unwrap();
        versions.record(&manifest(2), Digest::of(b"2")).unwrap();
        versions.record(&manifest(2), Digest::of(b"2")).unwrap();
        let mut reread = LastGoodVersions::read(folder.path());
        let before = LastGoodVersion { manifest: manifest(1), digest: Digest::of(b"1") };
        assert_eq!(reread.fall_back("m").unwrap(), Some(before.clone()));
        assert_eq!(reread.fall_back("m").unwrap(), None);
        let reread = LastGoodVersions::read(folder.path());
        assert_eq!((reread.get("m"), reread.digests().len()), (Some(&before), 1));
    }

    #[test]
    fn unreadable_files_are_ignored() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(LAST_GOOD_FILE), "{").unwrap();
        std::fs::write(folder.path().join(HIGHEST_VERSIONS_FILE), "[]").unwrap();
        let versions = LastGoodVersions::read(folder.path());
        assert_eq!((versions.names().count(), versions.highest_version("m")), (0, None));
    }

    #[test]
    fn a_write_error_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let mut versions = LastGoodVersions::read(&folder.path().join("missing"));
        let error = versions.record(&manifest(1), Digest::of(b"1")).unwrap_err();
        assert!(error.to_string().contains(HIGHEST_VERSIONS_FILE), "{error}");
    }
}
