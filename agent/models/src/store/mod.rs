//! The model store: the model files and their records on the disk of this node.
//!
//! ```text
//! store/blobs/sha256/<hex>     a model file; complete and verified, or absent
//! store/partial/<hex>          a file that is being received; <hex>.json is its checkpoint
//! store/versions/<hex>.json    one record per model version; <hex> is the SHA-256 of "name:version"
//! store/verdicts/<hex>.json    admission records; <hex> is the admission key
//! store/trials/<hex>.json      failure records; <hex> is the digest of the model file
//! store/index/                 sled; a copy of versions/ that can be deleted at any time
//! store/lock                   locked while blobs are evicted or version records are rewritten
//! ```
//!
//! Terms: a *blob* is a model file in the store, named by its digest. A *version record* maps a model version to a
//! blob. The *admission key* is the SHA-256 of everything the result of an admission depends on (see `admission`). The
//! *protected* digests are those of the active, last-good and desired versions; the caller passes them, because the
//! store does not know the desired state.
//!
//! Invariants:
//! - Every file name is derived from a digest, never from user input.
//! - A blob gets its name by a rename, after its bytes were synced and its digest was verified. Every other file is
//!   replaced by [`files::replace`]: after a power cut either the old or the new content is there.
//! - Protected and pinned blobs are never evicted. Of the others, the least recently used blob is evicted first; the
//!   modification time of a blob is the time of its last use.
//! - The files are authoritative. The index may be missing, stale or damaged; that costs only time (see `index.rs`).
//!
//! Errors name the file and the reason. The store never panics on the content of the disk.

mod cleanup;
mod error;
mod evict;
mod index;
mod json;
mod listing;
mod partial_blob;
mod records;
mod versions;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use parking_lot::Mutex;

use lineside_common::digest::Digest;
use lineside_common::files;

pub use error::{Result, StoreError, StoreErrorKind};
pub use evict::{Blob, EvictionPlan, NoSpaceError, format_mib};
pub use index::{Index, IndexError, IndexState, probe};
pub use partial_blob::PartialBlob;
pub use records::{DigestRecord, DigestRecordKind, FailureRecord, VersionRecord};

use evict::Capacity;
use versions::version_key;

/// Bytes of free disk space that the store leaves to other users of the disk.
const DISK_RESERVE_BYTES: u64 = 4 << 20;
/// The folder of the blobs.
const BLOBS_FOLDER: &str = "blobs/sha256";
/// Records that memory holds while the disk accepts no writes.
const UNWRITTEN_MAX: usize = 1000;
/// The folders whose files are replaced atomically. The names are part of the on-disk format.
const RECORD_FOLDERS: [&str; 4] = ["partial", "versions", "verdicts", "trials"];

/// The model store of one node.
pub struct Store {
    root: PathBuf,
    quota_bytes: u64,
    index: Mutex<Index>,
    /// Digest records that the disk refused, by path, as JSON; `None` for one that could not be deleted. They replace those on
    /// disk until the end of the process, so that models in the store can be loaded from a disk that accepts no writes.
    unwritten: Mutex<BTreeMap<PathBuf, Option<Vec<u8>>>>,
}

/// The space the store uses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of blobs and partial files.
    pub bytes: u64,
    /// Bytes the store may use.
    pub quota_bytes: u64,
    /// Number of blobs.
    pub blobs: usize,
    /// Number of model versions.
    pub versions: usize,
}

impl Store {
    /// Opens the store in a folder and creates missing folders. `index` is the index opened in its `index/`.
    ///
    /// # Errors
    /// When a folder cannot be created.
    pub fn open(root: &Path, quota_bytes: u64, index: Index) -> Result<Self> {
        for name in [BLOBS_FOLDER].iter().chain(&RECORD_FOLDERS) {
            let folder = root.join(name);
            fs::create_dir_all(&folder).map_err(StoreError::io(&folder))?;
        }
        let unwritten = Mutex::default();
        Ok(Self { root: root.to_owned(), quota_bytes, index: Mutex::new(index), unwritten })
    }

    /// The folder of the index below the folder of a store.
    pub fn index_folder(root: &Path) -> PathBuf {
        root.join("index")
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The path of a blob, whether it exists or not.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.folder(BLOBS_FOLDER).join(digest.hex())
    }

    /// Opens a blob for reading. `None` when it cannot be opened.
    pub fn open_blob(&self, digest: &Digest) -> Option<File> {
        files::open_regular(&self.blob_path(digest)).ok()
    }

    /// Whether a blob can be opened.
    pub fn contains_blob(&self, digest: &Digest) -> bool {
        self.open_blob(digest).is_some()
    }

    /// Reads a blob of at most `bytes_max` bytes and verifies its digest. A damaged blob is removed, so that it is
    /// fetched again.
    ///
    /// # Errors
    /// When the blob cannot be read, or with the kind [`StoreErrorKind::DigestMismatch`] when it is damaged.
    pub fn read_verified(&self, digest: &Digest, bytes_max: u64) -> Result<Vec<u8>> {
        let path = self.blob_path(digest);
        let bytes = files::read_bounded(&path, bytes_max).map_err(StoreError::io(&path))?;
        let actual = Digest::of(&bytes);
        if actual == *digest { Ok(bytes) } else { Err(self.remove_damaged(digest, actual)) }
    }

    /// Reads every blob, verifies its digest, and removes damaged blobs. `progress` receives the size of each blob that
    /// was read. Returns the digest of each blob with its size, or with the error.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn verify(&self, mut progress: impl FnMut(u64)) -> Result<Vec<(Digest, Result<u64>)>> {
        let mut verified = Vec::new();
        for blob in self.blobs()? {
            let path = self.blob_path(&blob.digest);
            let read = File::open(&path).and_then(Digest::of_reader).map_err(StoreError::io(&path));
            let outcome = read.and_then(|(actual, bytes)| {
                if actual == blob.digest { Ok(bytes) } else { Err(self.remove_damaged(&blob.digest, actual)) }
            });
            progress(blob.bytes);
            verified.push((blob.digest, outcome));
        }
        Ok(verified)
    }

    fn remove_damaged(&self, digest: &Digest, actual: Digest) -> StoreError {
        let path = self.blob_path(digest);
        match files::remove(&path) {
            Ok(()) => StoreError::DamagedBlob { path, actual },
            Err(source) => StoreError::UndeletableBlob { path, actual, source },
        }
    }

    /// Sets the time of the last use of a blob to now, so that it is evicted late.
    pub fn touch(&self, digest: &Digest) {
        let path = self.blob_path(digest);
        let touched = File::options().append(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        if let Err(error) = touched {
            tracing::debug!(file = %path.display(), %error, "Cannot set the time of the last use of a blob");
        }
    }

    /// Opens the partial file of a blob that is to be received. It resumes at the checkpoint of an earlier attempt.
    ///
    /// # Errors
    /// When the file cannot be opened, or with [`StoreError::Locked`] when another process writes it.
    pub fn open_partial(&self, digest: &Digest) -> Result<PartialBlob> {
        PartialBlob::open(&self.folder("partial").join(digest.hex()), digest, self.blob_path(digest))
    }

    /// All blobs, with the versions that use them.
    ///
    /// # Errors
    /// When a folder cannot be read.
    pub fn blobs(&self) -> Result<Vec<Blob>> {
        let mut versions: BTreeMap<Digest, Vec<VersionRecord>> = BTreeMap::new();
        for version in self.versions()? {
            versions.entry(version.digest).or_default().push(version);
        }
        let listed = listing::digest_files(&self.folder(BLOBS_FOLDER))?;
        let blob = |(digest, metadata): (Digest, fs::Metadata)| Blob {
            digest,
            bytes: metadata.len(),
            last_used: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
            versions: versions.remove(&digest).unwrap_or_default(),
        };
        Ok(listed.into_iter().map(blob).collect())
    }

    /// The space the store uses.
    ///
    /// # Errors
    /// When a folder cannot be read.
    pub fn usage(&self) -> Result<Usage> {
        let sum = |files: &[(Digest, fs::Metadata)]| files.iter().map(|(_, metadata)| metadata.len()).sum::<u64>();
        let blobs = listing::digest_files(&self.folder(BLOBS_FOLDER))?;
        let partial_bytes = sum(&listing::digest_files(&self.folder("partial"))?);
        Ok(Usage {
            bytes: sum(&blobs) + partial_bytes,
            quota_bytes: self.quota_bytes,
            blobs: blobs.len(),
            versions: self.versions()?.len(),
        })
    }

    /// Plans which blobs to evict so that `incoming` more bytes fit. Removes nothing.
    ///
    /// # Errors
    /// [`StoreError::NoSpace`] when evicting every unprotected blob does not free enough space. The message names what
    /// holds the space and what to do.
    pub fn plan_eviction(&self, incoming: u64, protected: &BTreeSet<Digest>) -> Result<EvictionPlan> {
        let disk = rustix::fs::statvfs(&self.root)
            .map_err(|error| StoreError::Io { path: self.root.clone(), source: error.into() })?;
        let capacity = Capacity {
            quota: self.quota_bytes,
            used: self.usage()?.bytes,
            disk_free: disk.f_bavail.saturating_mul(disk.f_frsize).saturating_sub(DISK_RESERVE_BYTES),
        };
        Ok(evict::plan(self.blobs()?, capacity, incoming, protected)?)
    }

    /// Evicts blobs so that `incoming` more bytes fit. Returns the evicted blobs.
    ///
    /// # Errors
    /// As [`Store::plan_eviction`], and when a file cannot be removed.
    pub fn free_space(&self, incoming: u64, protected: &BTreeSet<Digest>) -> Result<Vec<Blob>> {
        let _lock = self.lock()?;
        let plan = self.plan_eviction(incoming, protected)?;
        for blob in &plan.evicted {
            self.evict(blob)?;
        }
        Ok(plan.evicted)
    }

    /// Removes the version records before the blob: a version record must not refer to a missing blob.
    fn evict(&self, blob: &Blob) -> Result<()> {
        for version in &blob.versions {
            let path = self.version_path(&version.name, version.version);
            files::remove(&path).map_err(StoreError::io(&path))?;
            self.index.lock().remove(&version_key(&version.name, version.version));
        }
        let path = self.blob_path(&blob.digest);
        files::remove(&path).map_err(StoreError::io(&path))?;
        files::sync_parent(&path).map_err(StoreError::io(&path))
    }

    /// Reads the record under a digest. `None` when it does not exist or, with a warning, cannot be read.
    pub fn read_digest_record<T: DigestRecord>(&self, key: &Digest) -> Option<T> {
        let path = self.digest_record_path(T::KIND, key);
        match self.unwritten.lock().get(&path) {
            Some(text) => serde_json::from_slice(text.as_deref()?).ok(),
            None => json::read(&path),
        }
    }

    /// Writes the record under a digest. Memory holds it, until the end of the process, while the disk accepts no writes.
    ///
    /// # Errors
    /// When it cannot be written for another reason.
    pub fn write_digest_record<T: DigestRecord>(&self, key: &Digest, record: &T) -> Result<()> {
        let path = self.digest_record_path(T::KIND, key);
        let written = json::replace(&path, record);
        let text = serde_json::to_vec(record).map_err(io::Error::other).map_err(StoreError::io(&path))?;
        self.settle(path, Some(text), written)
    }

    /// Keeps in memory what the disk refused, and forgets what it now holds.
    fn settle(&self, path: PathBuf, text: Option<Vec<u8>>, written: Result<()>) -> Result<()> {
        let mut unwritten = self.unwritten.lock();
        match written {
            Err(StoreError::Io { source, .. }) if files::refuses_writes(&source) => {
                if unwritten.len() >= UNWRITTEN_MAX && !unwritten.contains_key(&path) {
                    return Err(StoreError::Io { path, source });
                }
                tracing::debug!(file = %path.display(), error = %source, "Memory holds a record that the disk refuses");
                unwritten.insert(path, text);
                Ok(())
            }
            written => {
                unwritten.remove(&path);
                written
            }
        }
    }

    /// Deletes the record under a digest. `false` when it did not exist.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn delete_digest_record(&self, kind: DigestRecordKind, key: &Digest) -> Result<bool> {
        let path = self.digest_record_path(kind, key);
        let existed = self.unwritten.lock().get(&path).map_or_else(|| path.exists(), Option::is_some);
        let removed = files::remove(&path).map_err(StoreError::io(&path));
        self.settle(path, None, removed)?;
        Ok(existed)
    }

    fn digest_record_path(&self, kind: DigestRecordKind, key: &Digest) -> PathBuf {
        self.folder(kind.folder()).join(format!("{}.json", key.hex()))
    }

    /// The state of the index.
    pub fn index_state(&self) -> IndexState {
        self.index.lock().state()
    }

    /// Locks the store between processes, so that the agent and the command line do not remove or rewrite at the same
    /// time. Dropping the file releases the lock.
    fn lock(&self) -> Result<File> {
        let path = self.folder("lock");
        let file = match File::options().create(true).append(true).open(&path) {
            Err(error) if files::refuses_writes(&error) => File::open(&self.root),
            opened => opened,
        };
        let file = file.map_err(StoreError::io(&path))?;
        file.lock().map_err(StoreError::io(&path))?;
        Ok(file)
    }
}

#[cfg(test)]
mod tests;
