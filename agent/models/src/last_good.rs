//! Last-good versions: the model versions that served last on this node, and the highest version of each model that
//! ever served. Both are kept in small files in the data folder.
//!
//! `last-good.json` holds the manifests of the versions that served last, as they were written, with the digests of
//! their files, and those of the versions before them. The agent restores them at a start without a network, or when a
//! new version fails; the version before replaces one that serves and fails then.
//! `highest-versions.json` is kept when a model is removed: a model that is added again must not serve an older
//! version.
//!
//! A `last-good.json` that cannot be read is ignored with a warning, and the agent starts without it. A
//! `highest-versions.json` that cannot be read fails closed: of no model it is known whether a version is a downgrade, so
//! only what served last is accepted, until the file is restored or reset ([`LastGoodVersions::reset_highest`]).

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
    /// `None` when the file cannot be read. It is not written then.
    highest: Option<BTreeMap<String, u64>>,
}

/// The highest version of a model that ever served on this node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HighestVersion {
    /// No version served yet.
    #[default]
    None,
    /// This version.
    Version(u64),
    /// The file cannot be read.
    Unknown,
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
        let path = folder.join(HIGHEST_VERSIONS_FILE);
        let highest = match try_read_json(&path) {
            Ok(highest) => Some(highest),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some(BTreeMap::new()),
            Err(error) => {
                tracing::error!(
                    event = "highest_versions_unreadable",
                    file = %path.display(),
                    %error,
                    "The highest versions cannot be read; only last-good versions and rollbacks are loaded until \
                     `lineside store reset-highest-versions` and a restart"
                );
                None
            }
        };
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
    pub fn highest_version(&self, name: &str) -> HighestVersion {
        let Some(highest) = &self.highest else { return HighestVersion::Unknown };
        // A version that served last is known also when the other file was removed.
        let last_good = self.models.get(name).map(|version| version.manifest.version);
        match highest.get(name).copied().max(last_good) {
            Some(version) => HighestVersion::Version(version),
            None => HighestVersion::None,
        }
    }

    /// Replaces the highest versions by those that served last. A lower version that served earlier is not known any more.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn reset_highest(&mut self) -> Result<&BTreeMap<String, u64>, LastGoodError> {
        let highest = self.models.iter().map(|(name, version)| (name.clone(), version.manifest.version)).collect();
        let highest = self.highest.insert(highest);
        write_json(&self.folder.join(HIGHEST_VERSIONS_FILE), highest)?;
        Ok(highest)
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
        if let Some(all) = &mut self.highest {
            let highest = all.entry(manifest.name.clone()).or_default();
            if *highest < manifest.version {
                *highest = manifest.version;
                write_json(&self.folder.join(HIGHEST_VERSIONS_FILE), all)?;
            }
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
    match try_read_json(path) {
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

fn try_read_json<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    files::read_bounded(path, BYTES_MAX).and_then(|bytes| Ok(serde_json::from_slice(&bytes)?))
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
        assert_eq!((reread.highest_version("m"), reread.digests().len()), (HighestVersion::Version(3), 2));
        reread.remove("m").unwrap();
        let reread = LastGoodVersions::read(folder.path());
        assert_eq!((reread.get("m"), reread.highest_version("m")), (None, HighestVersion::Version(3)));
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
    fn unreadable_last_good_versions_are_ignored() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(LAST_GOOD_FILE), "{").unwrap();
        let versions = LastGoodVersions::read(folder.path());
        assert_eq!((versions.names().count(), versions.highest_version("m")), (0, HighestVersion::None));
    }

    #[test]
    fn unreadable_highest_versions_are_unknown_until_they_are_reset() {
        let folder = tempfile::tempdir().unwrap();
        LastGoodVersions::read(folder.path()).record(&manifest(3), Digest::of(b"3")).unwrap();
        let path = folder.path().join(HIGHEST_VERSIONS_FILE);
        for damaged in ["", "garbage", "[]", "null", "3", r#"{"m": "3"}"#, r#"{"m": -1}"#, r#"{"m": 3"#] {
            std::fs::write(&path, damaged).unwrap();
            let mut versions = LastGoodVersions::read(folder.path());
            assert_eq!(versions.highest_version("m"), HighestVersion::Unknown, "{damaged}");
            assert_eq!(versions.highest_version("other"), HighestVersion::Unknown, "{damaged}");
            // What serves meanwhile does not replace the evidence.
            versions.record(&manifest(3), Digest::of(b"3")).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), damaged);
        }
        LastGoodVersions::read(folder.path()).reset_highest().unwrap();
        let versions = LastGoodVersions::read(folder.path());
        assert_eq!(versions.highest_version("m"), HighestVersion::Version(3));
        assert_eq!(versions.highest_version("other"), HighestVersion::None);
        std::fs::remove_file(&path).unwrap();
        let versions = LastGoodVersions::read(folder.path());
        assert_eq!(versions.highest_version("m"), HighestVersion::Version(3), "it served last");
    }

    #[test]
    fn a_write_error_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let mut versions = LastGoodVersions::read(&folder.path().join("missing"));
        let error = versions.record(&manifest(1), Digest::of(b"1")).unwrap_err();
        assert!(error.to_string().contains(HIGHEST_VERSIONS_FILE), "{error}");
    }
}
