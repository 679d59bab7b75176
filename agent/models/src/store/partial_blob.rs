//! A file that is being received into the store. It survives interruptions and restarts.
//!
//! Received bytes are appended to the file and synced every [`SYNC_INTERVAL_BYTES`]; the checkpoint beside the file is
//! written only after the sync. Resuming after a crash or a power cut starts at the checkpoint, never at the length of
//! the file, because the file system may report bytes that never reached the disk. The digest is computed while bytes
//! are appended (and over the existing bytes when a file is resumed), so committing needs no second pass.
//!
//! Its tests are in `tests.rs`, because they need an open store.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use lineside_common::digest::{Digest, Hasher};
use lineside_common::files;

use super::error::{Result, StoreError};
use super::json;

/// Upper bound of the bytes that are fetched again after a crash.
const SYNC_INTERVAL_BYTES: u64 = 8 << 20;

/// Where a partial file can be resumed. Stored as JSON beside it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Checkpoint {
    /// Bytes that are synced to disk.
    synced_bytes: u64,
    /// The source of the bytes. Another source starts from the beginning.
    source: String,
    /// The strong ETag the source sent with them.
    validator: Option<String>,
}

/// A file that is being received into the store.
pub struct PartialBlob {
    path: PathBuf,
    blob_path: PathBuf,
    file: File,
    digest: Digest,
    hasher: Hasher,
    bytes: u64,
    checkpoint: Checkpoint,
}

impl PartialBlob {
    /// Opens the partial file at `path`, or creates it, and reads what was received before.
    pub(super) fn open(path: &Path, digest: &Digest, blob_path: PathBuf) -> Result<Self> {
        let at = StoreError::io(path);
        let checkpoint: Checkpoint = json::read(&checkpoint_path(path)).unwrap_or_default();
        let mut file = File::options().create(true).truncate(false).read(true).write(true).open(path).map_err(&at)?;
        // The agent and the command line must not write the same file. The lock is released with the last handle.
        if file.try_lock().is_err() {
            return Err(StoreError::Locked { path: path.to_owned() });
        }
        let mut partial = Self {
            bytes: 0,
            hasher: Hasher::default(),
            digest: *digest,
            path: path.to_owned(),
            blob_path,
            checkpoint,
            file: file.try_clone().map_err(&at)?,
        };
        let synced_bytes = partial.checkpoint.synced_bytes;
        if file.metadata().map_err(&at)?.len() < synced_bytes {
            partial.reset()?;
            return Ok(partial);
        }
        file.set_len(synced_bytes).map_err(&at)?;
        let mut buffer = vec![0; 256 << 10];
        loop {
            match file.read(&mut buffer).map_err(&at)? {
                0 => break,
                read => {
                    partial.hasher.update(&buffer[..read]);
                    partial.bytes += read as u64;
                }
            }
        }
        Ok(partial)
    }

    /// Removes a partial file and its checkpoint.
    pub(super) fn remove(path: &Path) -> Result<()> {
        files::remove(path).map_err(StoreError::io(path))?;
        let checkpoint = checkpoint_path(path);
        files::remove(&checkpoint).map_err(StoreError::io(&checkpoint))
    }

    /// Bytes received so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The digest the complete file must have.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The strong ETag to resume with from `source`. `None` when nothing was received, or from another source.
    pub fn validator(&self, source: &str) -> Option<&str> {
        let validator = self.checkpoint.validator.as_deref();
        validator.filter(|_| self.bytes > 0 && self.checkpoint.source == source)
    }

    /// Discards the received bytes.
    ///
    /// # Errors
    /// When the file or its checkpoint cannot be written.
    pub fn reset(&mut self) -> Result<()> {
        self.checkpoint = Checkpoint::default();
        json::replace(&checkpoint_path(&self.path), &self.checkpoint)?;
        self.file.set_len(0).map_err(StoreError::io(&self.path))?;
        self.file.seek(SeekFrom::Start(0)).map_err(StoreError::io(&self.path))?;
        (self.bytes, self.hasher) = (0, Hasher::default());
        Ok(())
    }

    /// Sets the source of the bytes that follow and its strong ETag. The next sync writes both to the checkpoint.
    pub fn set_source(&mut self, source: &str, validator: Option<&str>) {
        source.clone_into(&mut self.checkpoint.source);
        self.checkpoint.validator = validator.map(str::to_owned);
    }

    /// Appends bytes, and syncs when the interval is reached.
    ///
    /// # Errors
    /// When the file or its checkpoint cannot be written.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(StoreError::io(&self.path))?;
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        if self.bytes - self.checkpoint.synced_bytes >= SYNC_INTERVAL_BYTES { self.sync() } else { Ok(()) }
    }

    /// Syncs the received bytes to disk, then writes the checkpoint.
    ///
    /// # Errors
    /// When the file or its checkpoint cannot be written.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(StoreError::io(&self.path))?;
        self.checkpoint.synced_bytes = self.bytes;
        json::replace(&checkpoint_path(&self.path), &self.checkpoint)
    }

    /// Verifies the digest and renames the file to its blob. Returns its size in bytes.
    ///
    /// # Errors
    /// [`StoreError::DigestMismatch`], after which the received bytes are removed, or when the file system reports an
    /// error.
    pub fn commit(self) -> Result<u64> {
        let actual = self.hasher.finish();
        if actual != self.digest {
            Self::remove(&self.path)?;
            return Err(StoreError::DigestMismatch { expected: self.digest, actual });
        }
        self.file.sync_all().map_err(StoreError::io(&self.path))?;
        std::fs::rename(&self.path, &self.blob_path).map_err(StoreError::io(&self.blob_path))?;
        files::sync_parent(&self.blob_path).map_err(StoreError::io(&self.blob_path))?;
        let checkpoint = checkpoint_path(&self.path);
        files::remove(&checkpoint).map_err(StoreError::io(&checkpoint))?;
        Ok(self.bytes)
    }
}

fn checkpoint_path(path: &Path) -> PathBuf {
    path.with_extension("json")
}
