//! The index: a copy of the version records in sled that is fast to read. Only this module uses sled. The tests are in
//! `tests.rs`, because they need an open store.
//!
//! An index entry is valid only while size, modification time and inode of the record file are those it was made from.
//! The index may therefore be lost, stale, or written by an earlier build.
//!
//! sled 0.34 can panic on a damaged file, or never return from opening it. Therefore a child process opens the index
//! first and reads all of it ([`probe`]). When the child fails or exceeds its deadline, the folder is deleted and the
//! index is rebuilt. When that fails too, or another process has the index open, the store works without it.

use std::error::Error;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use lineside_common::digest::Digest;

use super::records::VersionRecord;

/// Bytes sled may cache. The records of a store are far smaller.
const CACHE_BYTES: u64 = 1 << 20;
/// How often sled flushes to disk. Entries that are lost are read from the record files again.
const FLUSH_INTERVAL_MS: u64 = 30_000;

/// The state of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IndexState {
    /// The existing index is used.
    Ok,
    /// The index was damaged, and was rebuilt.
    Rebuilt,
    /// The store works without an index.
    Off,
}

impl IndexState {
    /// The value in the node status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Rebuilt => "rebuilt",
            Self::Off => "off",
        }
    }
}

/// Why an index was rebuilt or cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The check rejected the existing index. It was deleted and rebuilt.
    #[error("the index of the store is damaged")]
    Damaged(#[source] Box<dyn Error + Send + Sync>),
    /// The check rejected the existing index, and its folder cannot be deleted.
    #[error("the damaged index of the store in {} cannot be deleted", path.display())]
    NotDeletable {
        /// The folder of the index.
        path: PathBuf,
        /// Why it cannot be deleted.
        source: io::Error,
    },
    /// sled cannot open or read the index, for example because another process has it open.
    #[error("the index of the store cannot be opened")]
    Sled(#[from] sled::Error),
}

/// An open index, or none.
pub struct Index {
    db: Option<sled::Db>,
    state: IndexState,
}

/// The value of an index entry, as JSON.
#[derive(Serialize, Deserialize)]
struct Entry {
    size: u64,
    modified: (i64, i64),
    inode: u64,
    version: VersionRecord,
}

impl Index {
    /// No index: every lookup reads the record files.
    pub fn off() -> Self {
        Self { db: None, state: IndexState::Off }
    }

    /// Opens the index in a folder. `check` decides whether an existing index is safe to open in this process; one that
    /// it rejects is deleted. Returns the index, and the error when it was rebuilt or cannot be used.
    pub fn open<E>(folder: &Path, check: impl Fn(&Path) -> Result<(), E>) -> (Self, Option<IndexError>)
    where
        E: Into<Box<dyn Error + Send + Sync>>,
    {
        let mut damage = None;
        if folder.exists()
            && let Err(error) = check(folder)
        {
            if let Err(source) = fs::remove_dir_all(folder) {
                return (Self::off(), Some(IndexError::NotDeletable { path: folder.to_owned(), source }));
            }
            damage = Some(IndexError::Damaged(error.into()));
        }
        match open_sled(folder) {
            Ok(db) => {
                let state = if damage.is_some() { IndexState::Rebuilt } else { IndexState::Ok };
                (Self { db: Some(db), state }, damage)
            }
            Err(error) => (Self::off(), Some(error.into())),
        }
    }

    pub(super) fn state(&self) -> IndexState {
        self.state
    }

    /// The version record of a file, when the entry was made from this very file.
    pub(super) fn get(&mut self, key: &Digest, metadata: &Metadata) -> Option<VersionRecord> {
        let value = self.query(|db| db.get(key.hex()))??;
        let entry: Entry = serde_json::from_slice(&value).ok()?;
        let is_current = (entry.size, entry.modified, entry.inode)
            == (metadata.size(), (metadata.mtime(), metadata.mtime_nsec()), metadata.ino());
        is_current.then_some(entry.version)
    }

    /// Adds the version record that was read from a file.
    pub(super) fn put(&mut self, key: &Digest, metadata: &Metadata, version: &VersionRecord) {
        let entry = Entry {
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            inode: metadata.ino(),
            version: version.clone(),
        };
        if let Ok(value) = serde_json::to_vec(&entry) {
            self.query(|db| db.insert(key.hex(), value.as_slice()));
        }
    }

    pub(super) fn remove(&mut self, key: &Digest) {
        self.query(|db| db.remove(key.hex()));
    }

    /// Runs an operation on sled. The first error turns the index off.
    fn query<T>(&mut self, operation: impl FnOnce(&sled::Db) -> sled::Result<T>) -> Option<T> {
        match operation(self.db.as_ref()?) {
            Ok(value) => Some(value),
            Err(error) => {
                tracing::warn!(
                    event = "store_index_failed",
                    %error,
                    "The store index failed; the store works without it until the next start"
                );
                *self = Self::off();
                None
            }
        }
    }
}

fn open_sled(folder: &Path) -> sled::Result<sled::Db> {
    sled::Config::new()
        .path(folder)
        .cache_capacity(CACHE_BYTES)
        .flush_every_ms(Some(FLUSH_INTERVAL_MS))
        .mode(sled::Mode::LowSpace)
        .open()
}

/// Opens the index and reads all of it. Runs in a child process, because on a damaged index it may panic or never
/// return.
///
/// # Errors
/// [`IndexError::Sled`] when sled reports an error.
pub fn probe(folder: &Path) -> Result<(), IndexError> {
    let db = open_sled(folder)?;
    for entry in db.iter() {
        entry?;
    }
    Ok(())
}
