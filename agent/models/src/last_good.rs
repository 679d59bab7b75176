//! What served last on this node, and the highest version that ever did: two small files in the data folder.
//!
//! `last-good.json` holds the manifests of the models that served last, as they were written, with the digests of their
//! files. A start without a network, or beside a new version that is no good, begins with them. `highest-versions.json`
//! outlives them: a model that was taken away and comes back must not come back older.
//!
//! A file that cannot be read is passed over with a warning: the agent starts as on its first day.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use lineside_api::kinds::ModelManifest;
use lineside_api::kinds::manifest::{ManifestDocument, Object};
use lineside_common::digest::Digest;
use lineside_common::files;

const LAST_GOOD: &str = "last-good.json";
const HIGHEST: &str = "highest-versions.json";
const BYTES_MAX: u64 = 64 << 20;

/// What served last, by model.
pub struct LastGood {
    folder: PathBuf,
    models: BTreeMap<String, Good>,
    highest: BTreeMap<String, u64>,
}

/// A version that has served.
#[derive(Debug, Clone, PartialEq)]
pub struct Good {
    /// How it was asked for.
    pub manifest: ModelManifest,
    /// Its file.
    pub digest: Digest,
}

#[derive(Serialize, Deserialize)]
struct Written {
    models: BTreeMap<String, WrittenModel>,
}

#[derive(Serialize, Deserialize)]
struct WrittenModel {
    version: u64,
    digest: Digest,
    manifest: ManifestDocument,
}

impl LastGood {
    /// Reads what an earlier run left.
    pub fn read(folder: &Path) -> Self {
        let written: Option<Written> = read(&folder.join(LAST_GOOD));
        let mut models = BTreeMap::new();
        for (name, model) in written.map(|written| written.models).unwrap_or_default() {
            match model.manifest.read(&|_| Ok(())) {
                Ok(Object::Model(manifest)) if manifest.name == name => {
                    models.insert(name, Good { manifest: *manifest, digest: model.digest });
                }
                Ok(_) => tracing::warn!(model = name, "what served last is no manifest of it, and is passed over"),
                Err(errors) => {
                    tracing::warn!(
                        model = name,
                        reason = %errors,
                        "the manifest that served last cannot be read"
                    );
                }
            }
        }
        Self { highest: read(&folder.join(HIGHEST)).unwrap_or_default(), folder: folder.to_owned(), models }
    }

    /// What served last under a name.
    pub fn get(&self, name: &str) -> Option<&Good> {
        self.models.get(name)
    }

    /// The models there are.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.models.keys()
    }

    /// The highest version that ever served under a name.
    pub fn highest(&self, name: &str) -> Option<u64> {
        self.highest.get(name).copied()
    }

    /// The files that are needed to start again.
    pub fn digests(&self) -> BTreeSet<Digest> {
        self.models.values().map(|good| good.digest).collect()
    }

    /// A version serves now.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn served(&mut self, manifest: &ModelManifest, digest: Digest) -> std::io::Result<()> {
        // The highest version first: between the two writes, the worse error would be to forget it.
        let highest = self.highest.entry(manifest.name.clone()).or_default();
        if *highest < manifest.version {
            *highest = manifest.version;
            write(&self.folder.join(HIGHEST), &self.highest)?;
        }
        let good = Good { manifest: manifest.clone(), digest };
        match self.models.insert(manifest.name.clone(), good.clone()) {
            Some(before) if before == good => Ok(()),
            _ => self.save(),
        }
    }

    /// A model is not wanted any more.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn forget(&mut self, name: &str) -> std::io::Result<()> {
        match self.models.remove(name) {
            Some(_) => self.save(),
            None => Ok(()),
        }
    }

    fn save(&self) -> std::io::Result<()> {
        let written = |good: &Good| WrittenModel {
            version: good.manifest.version,
            digest: good.digest,
            manifest: good.manifest.document.clone(),
        };
        let models = self.models.iter().map(|(name, good)| (name.clone(), written(good))).collect();
        write(&self.folder.join(LAST_GOOD), &Written { models })
    }
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = match files::read_bounded(path, BYTES_MAX) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(file = %path.display(), %error, "what served last cannot be read");
            return None;
        }
    };
    let read = serde_json::from_slice(&bytes);
    if let Err(error) = &read {
        tracing::warn!(file = %path.display(), %error, "what served last cannot be read");
    }
    read.ok()
}

fn write<T: Serialize>(path: &Path, value: &T) -> std::io::Result<()> {
    files::replace(path, &serde_json::to_vec_pretty(value)?)
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
            Object::Stream(_) => unreachable!("a model was written"),
        }
    }

    #[test]
    fn what_served_is_remembered_as_it_was_written_and_the_highest_version_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let mut last_good = LastGood::read(folder.path());
        assert_eq!(last_good.get("m"), None);
        last_good.served(&manifest(3), Digest::of(b"3")).unwrap();
        last_good.served(&manifest(2), Digest::of(b"2")).unwrap();
        let mut again = LastGood::read(folder.path());
        assert_eq!(again.get("m"), Some(&Good { manifest: manifest(2), digest: Digest::of(b"2") }));
        assert_eq!((again.highest("m"), again.digests().len()), (Some(3), 1));
        again.forget("m").unwrap();
        let again = LastGood::read(folder.path());
        assert_eq!((again.get("m"), again.highest("m")), (None, Some(3)));
        std::fs::write(folder.path().join(LAST_GOOD), "{").unwrap();
        std::fs::write(folder.path().join(HIGHEST), "[]").unwrap();
        assert_eq!(LastGood::read(folder.path()).highest("m"), None);
    }
}
