//! A copy of the versions' records that is quick to read, in sled; the only place that names it.
//!
//! The copy is never believed without a look at the file it was made from: an entry counts only while size and
//! modification time of the file are the ones it was made with. So it may be lost, stale, or written by an older agent.
//!
//! sled 0.34 can panic on a damaged file, or never return from opening it. Therefore a child process opens it first and
//! reads everything ([`probe`]); when the child fails or takes too long, the folder is thrown away and the index begins
//! anew. When even that fails, or another process has it open, the store works without.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::VersionRecord;
use lineside_common::digest::Digest;

/// Bytes sled may cache; the records of a store are far fewer.
const CACHE_BYTES: u64 = 1 << 20;
/// How often sled writes to disk. What is lost with it is read again from the files.
const FLUSH_EVERY_MS: u64 = 30_000;

/// How an index is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IndexState {
    /// It was opened as it was.
    Ok,
    /// It was thrown away and begun anew.
    Rebuilt,
    /// There is none.
    Off,
}

impl IndexState {
    /// As it stands in status.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Rebuilt => "rebuilt",
            Self::Off => "off",
        }
    }
}

/// An open index, or none.
pub struct Index {
    db: Option<sled::Db>,
    state: IndexState,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    size: u64,
    modified: (i64, i64),
    inode: u64,
    version: VersionRecord,
}

impl Index {
    /// No index; every look reads the files.
    pub fn off() -> Self {
        Self { db: None, state: IndexState::Off }
    }

    /// Opens the index in a folder. `check` decides whether what is there may be opened in this process; a rejection throws
    /// it away. The reason for anything but a plain opening is returned beside.
    pub fn open(folder: &Path, check: impl Fn(&Path) -> Result<(), String>) -> (Self, Option<String>) {
        let mut refused = None;
        if folder.exists()
            && let Err(reason) = check(folder)
        {
            if let Err(error) = fs::remove_dir_all(folder) {
                return (Self::off(), Some(format!("{reason}; and it cannot be removed: {error}")));
            }
            refused = Some(reason);
        }
        match open(folder) {
            Ok(db) => {
                let state = if refused.is_some() { IndexState::Rebuilt } else { IndexState::Ok };
                (Self { db: Some(db), state }, refused)
            }
            Err(reason) => (Self::off(), Some(reason)),
        }
    }

    pub(super) fn state(&self) -> IndexState {
        self.state
    }

    /// The record of a file, if it is the one the entry was made from.
    pub(super) fn get(&mut self, key: &Digest, facts: &fs::Metadata) -> Option<VersionRecord> {
        let found = self.asked(|db| db.get(key.hex()))??;
        let entry: Entry = serde_json::from_slice(&found).ok()?;
        let is_current = (entry.size, entry.modified, entry.inode)
            == (facts.size(), (facts.mtime(), facts.mtime_nsec()), facts.ino());
        is_current.then_some(entry.version)
    }

    pub(super) fn put(&mut self, key: &Digest, facts: &fs::Metadata, version: &VersionRecord) {
        let entry = Entry {
            size: facts.size(),
            modified: (facts.mtime(), facts.mtime_nsec()),
            inode: facts.ino(),
            version: version.clone(),
        };
        if let Ok(bytes) = serde_json::to_vec(&entry) {
            self.asked(|db| db.insert(key.hex(), bytes.as_slice()));
        }
    }

    pub(super) fn remove(&mut self, key: &Digest) {
        self.asked(|db| db.remove(key.hex()));
    }

    /// Asks sled; an index that answers with an error is not asked again.
    fn asked<T>(&mut self, question: impl FnOnce(&sled::Db) -> sled::Result<T>) -> Option<T> {
        match question(self.db.as_ref()?) {
            Ok(answer) => Some(answer),
            Err(error) => {
                tracing::warn!(%error, "the store's index has failed; the store goes on without it until the next start");
                *self = Self::off();
                None
            }
        }
    }
}

fn open(folder: &Path) -> Result<sled::Db, String> {
    sled::Config::new()
        .path(folder)
        .cache_capacity(CACHE_BYTES)
        .flush_every_ms(Some(FLUSH_EVERY_MS))
        .mode(sled::Mode::LowSpace)
        .open()
        .map_err(|error| error.to_string())
}

/// Opens the index and reads all of it. For a child process: on a damaged index this may panic, or never return.
///
/// # Errors
/// What sled says.
pub fn probe(folder: &Path) -> Result<(), String> {
    let db = open(folder)?;
    for entry in db.iter() {
        entry.map_err(|error| error.to_string())?;
    }
    Ok(())
}
