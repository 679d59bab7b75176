//! The store: the models this node keeps on its own disk.
//!
//! ```text
//! store/blobs/sha256/<hex>     a model's file; complete and verified, or not there
//! store/partial/<hex>          a file on its way; <hex>.json says how far it is safely on disk and how to go on
//! store/versions/<hex>.json    one for each model version; <hex> is the SHA-256 of "name:version"
//! store/verdicts/<hex>.json    what admission found; <hex> is the SHA-256 of everything the verdict depends on
//! store/failures_on_record/<hex>.json      failed attempts of a digest, and whether it is in quarantine
//! store/index/                 sled; a copy of versions/ that can be thrown away at any time
//! store/lock                   held while blobs are evicted or versions rewritten
//! ```
//!
//! Invariants:
//! - The name of every file comes from a digest, never from what somebody typed.
//! - A blob appears under its name by a rename, after its bytes were synced and their digest compared. Every other file
//!   is replaced as [`files::replace`](lineside_common::files::replace) does: after a power cut the old or the new one is there.
//! - Versions that are active, last good, wanted or pinned are never evicted. Of the others the blob goes that was not
//!   used for longest; a blob's modification time is when it was last used.
//! - The files are the truth. The index may be missing, stale or damaged; nothing but time is lost (see `index.rs`).
//!
//! Errors name the file and the reason. Nothing in here panics on what it finds on disk.

mod evict;
mod index;
mod partial;
mod records;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

pub use evict::{Blob, mib};
use evict::{EvictionPlan, Marks};
pub use index::{Index, IndexState, probe};
pub use partial::Partial;
pub use records::{FailureRecord, VersionRecord};

use lineside_common::digest::Digest;
use lineside_common::files;

/// Bytes of free space the store leaves to everything else on its disk.
const DISK_RESERVE_BYTES: u64 = 4 << 20;
/// Bytes of one of the small files at most.
const RECORD_BYTES_MAX: u64 = 1 << 20;
/// Digests whose failures are remembered; the oldest give way.
const TRIALS_MAX: usize = 1000;

/// A download that nobody went on with for so long is given up.
const PARTIAL_AGE_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// The result of everything in here.
pub type Result<T> = std::result::Result<T, StoreError>;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("{path}: {error}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// There is no place, and nothing that may be evicted makes enough of it.
    #[error("{0}")]
    NoRoom(String),
    /// Bytes that do not have the digest they should have. Fetch them again.
    #[error("{0}")]
    WrongDigest(String),
}

impl StoreError {
    fn io(path: &Path) -> impl Fn(io::Error) -> Self + '_ {
        move |error| Self::Io { path: path.to_owned(), error }
    }
}

/// The store of one node.
pub struct Store {
    root: PathBuf,
    quota_bytes: u64,
    index: Mutex<Index>,
}

/// How full the store is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of blobs and of files on their way.
    pub bytes: u64,
    /// What it may grow to.
    pub quota_bytes: u64,
    /// Blobs.
    pub blobs: usize,
    /// Model versions.
    pub versions: usize,
}

impl Store {
    /// Opens the store in a folder, which is made where it is missing. `index` is what was opened in its `index/`.
    ///
    /// # Errors
    /// When the folder cannot be used.
    pub fn open(root: &Path, quota_bytes: u64, index: Index) -> Result<Self> {
        for inner in ["blobs/sha256", "partial", "versions", "verdicts", "failures_on_record"] {
            let folder = root.join(inner);
            fs::create_dir_all(&folder).map_err(StoreError::io(&folder))?;
        }
        Ok(Self { root: root.to_owned(), quota_bytes, index: Mutex::new(index) })
    }

    /// The folder of the index below a store's.
    pub fn index_folder(root: &Path) -> PathBuf {
        root.join("index")
    }

    /// Where a blob lies, whether it is there or not.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    /// Opens a blob for reading.
    pub fn blob(&self, digest: &Digest) -> Option<File> {
        files::open_regular(&self.blob_path(digest)).ok()
    }

    /// The bytes of a blob, verified. One that is damaged is removed, so that it is fetched again.
    ///
    /// # Errors
    /// [`StoreError::WrongDigest`] for a damaged one.
    pub fn read(&self, digest: &Digest, bytes_max: u64) -> Result<Vec<u8>> {
        let path = self.blob_path(digest);
        let bytes = files::read_bounded(&path, bytes_max).map_err(StoreError::io(&path))?;
        let actual = Digest::of(&bytes);
        match actual == *digest {
            true => Ok(bytes),
            false => Err(self.set_aside(digest, &actual)),
        }
    }

    /// Reads every blob and removes the damaged ones. `progress` is told each blob's bytes.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn verify(&self, mut progress: impl FnMut(u64)) -> Result<Vec<(Digest, std::result::Result<u64, StoreError>)>> {
        let mut found = Vec::new();
        for blob in self.blobs()? {
            let path = self.blob_path(&blob.digest);
            let read = File::open(&path).and_then(Digest::of_reader).map_err(StoreError::io(&path));
            let outcome = read.and_then(|(actual, bytes)| match actual == blob.digest {
                true => Ok(bytes),
                false => Err(self.set_aside(&blob.digest, &actual)),
            });
            progress(blob.bytes);
            found.push((blob.digest, outcome));
        }
        Ok(found)
    }

    fn set_aside(&self, digest: &Digest, actual: &Digest) -> StoreError {
        let path = self.blob_path(digest);
        let removed = match files::remove(&path) {
            Ok(()) => "it was removed and will be fetched again".to_owned(),
            Err(error) => format!("and it cannot be removed: {error}"),
        };
        StoreError::WrongDigest(format!("{} is damaged, its digest is {actual}; {removed}", path.display()))
    }

    /// Marks a blob as used now, so that it is evicted late.
    pub fn touch(&self, digest: &Digest) {
        let path = self.blob_path(digest);
        let touched = File::options().append(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        if let Err(error) = touched {
            tracing::debug!(file = %path.display(), %error, "a blob could not be marked as used");
        }
    }

    /// Begins to take in a file, or goes on where a former attempt safely stopped.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn partial(&self, digest: &Digest) -> Result<Partial> {
        Partial::open(&self.root.join("partial").join(digest.hex()), digest, self.blob_path(digest))
    }

    /// All blobs, with the versions that need them.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn blobs(&self) -> Result<Vec<Blob>> {
        let mut versions: BTreeMap<Digest, Vec<VersionRecord>> = BTreeMap::new();
        for version in self.versions()? {
            versions.entry(version.digest).or_default().push(version);
        }
        let folder = self.root.join("blobs/sha256");
        let mut found = Vec::new();
        for (digest, facts) in listed(&folder)? {
            let last_used = facts.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            let versions = versions.remove(&digest).unwrap_or_default();
            found.push(Blob { digest, bytes: facts.len(), last_used, versions });
        }
        Ok(found)
    }

    /// How full the store is.
    ///
    /// # Errors
    /// When a folder cannot be read.
    pub fn usage(&self) -> Result<Usage> {
        let blobs = listed(&self.root.join("blobs/sha256"))?;
        let sum = |found: &[(Digest, fs::Metadata)]| found.iter().map(|(_, facts)| facts.len()).sum::<u64>();
        let beside = sum(&listed(&self.root.join("partial"))?);
        Ok(Usage {
            bytes: sum(&blobs) + beside,
            quota_bytes: self.quota_bytes,
            blobs: blobs.len(),
            versions: self.versions()?.len(),
        })
    }

    /// What has to go so that `incoming` more bytes fit. Nothing is removed yet.
    ///
    /// # Errors
    /// [`StoreError::NoRoom`] when even that is not enough; the message says what holds the place and what to do.
    pub fn plan(&self, incoming: u64, protected: &BTreeSet<Digest>) -> Result<EvictionPlan> {
        let facts = rustix::fs::statvfs(&self.root)
            .map_err(|error| StoreError::Io { path: self.root.clone(), error: error.into() })?;
        let free = facts.f_bavail.saturating_mul(facts.f_frsize).saturating_sub(DISK_RESERVE_BYTES);
        let used = self.usage()?.bytes;
        evict::plan(self.blobs()?, used, incoming, free, Marks::of(self.quota_bytes), protected)
            .map_err(StoreError::NoRoom)
    }

    /// Makes room for `incoming` more bytes and says what was evicted.
    ///
    /// # Errors
    /// As [`Store::plan`], and when something cannot be removed.
    pub fn make_room(&self, incoming: u64, protected: &BTreeSet<Digest>) -> Result<Vec<Blob>> {
        let _lock = self.lock()?;
        let plan = self.plan(incoming, protected)?;
        for blob in &plan.evicted {
            self.evict(blob)?;
        }
        Ok(plan.evicted)
    }

    /// The versions go first: a version without its blob would promise what is not there.
    fn evict(&self, blob: &Blob) -> Result<()> {
        for version in &blob.versions {
            let path = self.version_path(&version.name, version.version);
            files::remove(&path).map_err(StoreError::io(&path))?;
            self.index().remove(&version_key(&version.name, version.version));
        }
        let path = self.blob_path(&blob.digest);
        files::remove(&path).map_err(StoreError::io(&path))?;
        files::sync_parent(&path).map_err(StoreError::io(&path))
    }

    /// All versions, by name and number.
    ///
    /// # Errors
    /// When the folder cannot be read. A version whose file cannot be read is left out, and logged.
    pub fn versions(&self) -> Result<Vec<VersionRecord>> {
        let folder = self.root.join("versions");
        let mut index = self.index();
        let mut found = Vec::new();
        for (key, facts) in listed(&folder)? {
            let path = folder.join(format!("{}.json", key.hex()));
            if let Some(version) = index.get(&key, &facts) {
                found.push(version);
                continue;
            }
            match files::read_bounded(&path, RECORD_BYTES_MAX)
                .map_err(|error| error.to_string())
                .and_then(|bytes| serde_json::from_slice::<VersionRecord>(&bytes).map_err(|error| error.to_string()))
            {
                Ok(version) => {
                    index.put(&key, &facts, &version);
                    found.push(version);
                }
                Err(reason) => {
                    tracing::warn!(file = %path.display(), reason, "a version's record cannot be read and is passed over");
                }
            }
        }
        found.sort_by(|a, b| (&a.name, a.version).cmp(&(&b.name, b.version)));
        Ok(found)
    }

    /// One version.
    ///
    /// # Errors
    /// As [`Store::versions`].
    pub fn version(&self, name: &str, version: u64) -> Result<Option<VersionRecord>> {
        Ok(self.versions()?.into_iter().find(|found| found.name == name && found.version == version))
    }

    /// Writes a version down; one that was pinned stays so.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn record(&self, mut version: VersionRecord) -> Result<()> {
        let _lock = self.lock()?;
        if let Some(before) = self.version(&version.name, version.version)? {
            version.pinned |= before.pinned;
            let same = VersionRecord { fetched: before.fetched.clone(), ..version.clone() };
            if same == before {
                return Ok(());
            }
        }
        self.write(&version)
    }

    /// Pins a version, or unpins it. `false` when there is no such version.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn pin(&self, name: &str, version: u64, pinned: bool) -> Result<bool> {
        let _lock = self.lock()?;
        match self.version(name, version)? {
            Some(version) => self.write(&VersionRecord { pinned, ..version }).map(|()| true),
            None => Ok(false),
        }
    }

    fn write(&self, version: &VersionRecord) -> Result<()> {
        let path = self.version_path(&version.name, version.version);
        replace_json(&path, version)
    }

    fn version_path(&self, name: &str, version: u64) -> PathBuf {
        self.root.join("versions").join(format!("{}.json", version_key(name, version).hex()))
    }

    /// A small JSON file of `kind` (a folder's name) under a digest; `None` where there is none that can be read.
    pub fn recall<T: serde::de::DeserializeOwned>(&self, kind: NoteKind, key: &Digest) -> Option<T> {
        let path = self.root.join(kind.folder()).join(format!("{}.json", key.hex()));
        let bytes = files::read_bounded(&path, RECORD_BYTES_MAX).ok()?;
        let read = serde_json::from_slice(&bytes);
        if let Err(error) = &read {
            tracing::warn!(file = %path.display(), %error, "a file of the store cannot be read and is passed over");
        }
        read.ok()
    }

    /// Writes such a file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn remember<T: serde::Serialize>(&self, kind: NoteKind, key: &Digest, value: &T) -> Result<()> {
        replace_json(&self.root.join(kind.folder()).join(format!("{}.json", key.hex())), value)
    }

    /// Removes such a file. `false` when there was none.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn forget(&self, kind: NoteKind, key: &Digest) -> Result<bool> {
        let path = self.root.join(kind.folder()).join(format!("{}.json", key.hex()));
        let was_there = path.exists();
        files::remove(&path).map_err(StoreError::io(&path))?;
        Ok(was_there)
    }

    /// How the index is.
    pub fn index_state(&self) -> IndexState {
        self.index().state()
    }

    fn index(&self) -> std::sync::MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held while blobs or versions are removed or rewritten, so that the agent and the command line do not meet.
    fn lock(&self) -> Result<File> {
        let path = self.root.join("lock");
        let file = File::options().create(true).append(true).open(&path).map_err(StoreError::io(&path))?;
        file.lock().map_err(StoreError::io(&path))?;
        Ok(file)
    }

    /// Removes what earlier runs left behind: half-written files, downloads that nobody went on with, and records that
    /// nobody needs any more. Only the agent does this, and before it begins to write.
    ///
    /// # Errors
    /// When a folder cannot be read or a file not removed.
    pub fn tidy(&self) -> Result<()> {
        let _lock = self.lock()?;
        for inner in ["partial", "versions", "verdicts", "failures_on_record"] {
            let folder = self.root.join(inner);
            for entry in fs::read_dir(&folder).map_err(StoreError::io(&folder))?.filter_map(io::Result::ok) {
                if entry.path().extension().is_some_and(|suffix| suffix == "tmp") {
                    files::remove(&entry.path()).map_err(StoreError::io(&entry.path()))?;
                }
            }
        }
        let folder = self.root.join("partial");
        for (digest, facts) in listed(&folder)? {
            let age = facts.modified().ok().and_then(|modified| modified.elapsed().ok()).unwrap_or_default();
            if age > PARTIAL_AGE_MAX {
                Partial::remove(&folder.join(digest.hex()))?;
            }
        }
        for (key, _) in listed(&self.root.join("verdicts"))? {
            #[derive(serde::Deserialize)]
            struct Subject {
                digest: Digest,
            }
            let subject: Option<Subject> = self.recall(NoteKind::Verdicts, &key);
            if subject.is_none_or(|subject| self.blob(&subject.digest).is_none()) {
                self.forget(NoteKind::Verdicts, &key)?;
            }
        }
        let folder = self.root.join("failures_on_record");
        let mut failures_on_record = listed(&folder)?;
        if failures_on_record.len() > TRIALS_MAX {
            failures_on_record.sort_by_key(|(_, facts)| facts.modified().ok());
            for (digest, _) in &failures_on_record[..failures_on_record.len() - TRIALS_MAX] {
                self.forget(NoteKind::FailureRecord, digest)?;
            }
        }
        Ok(())
    }
}

/// The kinds of small files that are kept under a digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoteKind {
    /// What admission found.
    Verdicts,
    /// Failed attempts.
    FailureRecord,
}

impl NoteKind {
    fn folder(self) -> &'static str {
        match self {
            Self::Verdicts => "verdicts",
            Self::FailureRecord => "failures_on_record",
        }
    }
}

fn version_key(name: &str, version: u64) -> Digest {
    Digest::of(format!("{name}:{version}").as_bytes())
}

/// The files of a folder that are called by a digest, with or without `.json`; anything else is not ours to touch.
fn listed(folder: &Path) -> Result<Vec<(Digest, fs::Metadata)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(StoreError::io(folder))? {
        let entry = entry.map_err(StoreError::io(folder))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let Ok(digest) = Digest::from_hex(name.strip_suffix(".json").unwrap_or(name)) else { continue };
        match entry.metadata() {
            Ok(facts) if facts.is_file() => found.push((digest, facts)),
            // It vanished while we looked, or is something nobody of ours has put there.
            _ => {}
        }
    }
    Ok(found)
}

fn replace_json<T: serde::Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(io::Error::other).map_err(StoreError::io(path))?;
    files::replace(path, &text).map_err(StoreError::io(path))
}

#[cfg(test)]
mod tests;
