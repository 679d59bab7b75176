//! The version records of the store. Its tests are in `tests.rs`, because they need an open store.

use std::path::PathBuf;

use lineside_common::digest::Digest;
use lineside_common::files;

use super::error::{Result, StoreError};
use super::records::VersionRecord;
use super::{Store, json, listing};

impl Store {
    /// All versions, sorted by name and version number. A version whose record cannot be read is left out with a
    /// warning.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn versions(&self) -> Result<Vec<VersionRecord>> {
        let folder = self.folder("versions");
        let mut index = self.index.lock();
        let mut versions = Vec::new();
        for (key, metadata) in listing::digest_files(&folder)? {
            let path = folder.join(format!("{}.json", key.hex()));
            if let Some(version) = index.get(&key, &metadata) {
                versions.push(version);
                continue;
            }
            match json::try_read::<VersionRecord>(&path) {
                Ok(version) => {
                    index.put(&key, &metadata, &version);
                    versions.push(version);
                }
                Err(error) => {
                    tracing::warn!(
                        event = "version_record_unreadable",
                        file = %path.display(),
                        %error,
                        "Ignoring an unreadable version record"
                    );
                }
            }
        }
        versions.sort_by(|a, b| (&a.name, a.version).cmp(&(&b.name, b.version)));
        Ok(versions)
    }

    /// One version. `None` when the store does not have it.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn version(&self, name: &str, version: u64) -> Result<Option<VersionRecord>> {
        Ok(self.versions()?.into_iter().find(|found| found.name == name && found.version == version))
    }

    /// Writes the record of a version. A version that was pinned stays pinned. The record on disk is not rewritten when
    /// only the time of the fetch differs, to spare the flash. A disk that accepts no writes is not an error: the record names the
    /// version for people and bundles, and is written by the next start.
    ///
    /// # Errors
    /// When the record cannot be written for another reason.
    pub fn put_version(&self, mut version: VersionRecord) -> Result<()> {
        let _lock = self.lock()?;
        if let Some(existing) = self.version(&version.name, version.version)? {
            version.pinned |= existing.pinned;
            let same = VersionRecord { fetched: existing.fetched.clone(), ..version.clone() };
            if same == existing {
                return Ok(());
            }
        }
        match self.write_version(&version) {
            Err(StoreError::Io { path, source }) if files::refuses_writes(&source) => {
                tracing::warn!(event = "version_not_recorded", file = %path.display(), error = %source, "The disk accepts no writes");
                Ok(())
            }
            written => written,
        }
    }

    /// Pins or unpins a version. `false` when the store does not have it.
    ///
    /// # Errors
    /// When the record cannot be written.
    pub fn set_pinned(&self, name: &str, version: u64, pinned: bool) -> Result<bool> {
        let _lock = self.lock()?;
        match self.version(name, version)? {
            Some(version) => self.write_version(&VersionRecord { pinned, ..version }).map(|()| true),
            None => Ok(false),
        }
    }

    fn write_version(&self, version: &VersionRecord) -> Result<()> {
        json::replace(&self.version_path(&version.name, version.version), version)
    }

    pub(super) fn version_path(&self, name: &str, version: u64) -> PathBuf {
        self.folder("versions").join(format!("{}.json", version_key(name, version).hex()))
    }
}

/// The digest that names the record of a version.
pub(super) fn version_key(name: &str, version: u64) -> Digest {
    Digest::of(format!("{name}:{version}").as_bytes())
}
