//! A file on its way into the store, which survives cuts and restarts.
//!
//! Bytes are appended, and synced every [`SYNC_EVERY_BYTES`]; only then does the note beside the file say so. Going on
//! after a crash or a power cut begins where the note says, never at the file's length, which may promise bytes that never
//! reached the disk. The digest is worked out on the way (and once more over what is there already, when going on), so
//! finishing costs no second pass.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{RECORD_BYTES_MAX, Result, StoreError, replace_json};
use lineside_common::digest::{Digest, Hasher};
use lineside_common::files;

/// What may have to be fetched again after a crash, at most.
const SYNC_EVERY_BYTES: u64 = 8 << 20;

/// What is known of a file on its way.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Note {
    /// Bytes that are safely on disk.
    synced_bytes: u64,
    /// Where they came from, so that another source begins anew.
    source: String,
    /// The strong ETag they came with.
    validator: Option<String>,
}

/// A file on its way.
pub struct Partial {
    path: PathBuf,
    target: PathBuf,
    file: File,
    digest: Digest,
    hasher: Hasher,
    bytes: u64,
    note: Note,
}

impl Partial {
    pub(super) fn open(path: &Path, digest: &Digest, target: PathBuf) -> Result<Self> {
        let at = StoreError::io(path);
        let note: Note = files::read_bounded(&note_path(path), RECORD_BYTES_MAX)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        let mut file = File::options().create(true).truncate(false).read(true).write(true).open(path).map_err(&at)?;
        // The agent and the command line must not write to one file; the lock goes with the last handle.
        if file.try_lock().is_err() {
            return Err(at(std::io::Error::other("another process is taking it in")));
        }
        let mut partial = Self {
            bytes: 0,
            hasher: Hasher::default(),
            digest: *digest,
            path: path.to_owned(),
            target,
            note,
            file: file.try_clone().map_err(&at)?,
        };
        let safe = partial.note.synced_bytes;
        if file.metadata().map_err(&at)?.len() < safe {
            partial.restart()?;
            return Ok(partial);
        }
        file.set_len(safe).map_err(&at)?;
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

    pub(super) fn remove(path: &Path) -> Result<()> {
        files::remove(path).map_err(StoreError::io(path))?;
        let note = note_path(path);
        files::remove(&note).map_err(StoreError::io(&note))
    }

    /// Bytes that are there.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The digest it is to have.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The validator to go on with when fetching from `source`; `None` when this has to begin anew.
    pub fn validator(&self, source: &str) -> Option<&str> {
        let validator = self.note.validator.as_deref();
        validator.filter(|_| self.bytes > 0 && self.note.source == source)
    }

    /// Throws away what is there.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn restart(&mut self) -> Result<()> {
        self.note = Note::default();
        replace_json(&note_path(&self.path), &self.note)?;
        self.file.set_len(0).map_err(StoreError::io(&self.path))?;
        self.file.seek(SeekFrom::Start(0)).map_err(StoreError::io(&self.path))?;
        (self.bytes, self.hasher) = (0, Hasher::default());
        Ok(())
    }

    /// Says where the bytes to come are from, and with which strong validator, if any.
    pub fn begin(&mut self, source: &str, validator: Option<&str>) {
        source.clone_into(&mut self.note.source);
        self.note.validator = validator.map(str::to_owned);
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(StoreError::io(&self.path))?;
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        match self.bytes - self.note.synced_bytes >= SYNC_EVERY_BYTES {
            true => self.sync(),
            false => Ok(()),
        }
    }

    /// Makes what is there outlast a power cut.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(StoreError::io(&self.path))?;
        self.note.synced_bytes = self.bytes;
        replace_json(&note_path(&self.path), &self.note)
    }

    /// Compares the digest and puts the file under its name. Returns its size.
    ///
    /// # Errors
    /// [`StoreError::WrongDigest`], after which everything fetched is thrown away; and whatever the file system says.
    pub fn finish(self) -> Result<u64> {
        let actual = self.hasher.finish();
        if actual != self.digest {
            Self::remove(&self.path)?;
            return Err(StoreError::WrongDigest(format!(
                "what came has the digest {actual}, but {} is asked for",
                self.digest
            )));
        }
        self.file.sync_all().map_err(StoreError::io(&self.path))?;
        std::fs::rename(&self.path, &self.target).map_err(StoreError::io(&self.target))?;
        files::sync_parent(&self.target).map_err(StoreError::io(&self.target))?;
        let note = note_path(&self.path);
        files::remove(&note).map_err(StoreError::io(&note))?;
        Ok(self.bytes)
    }
}

fn note_path(path: &Path) -> PathBuf {
    path.with_extension("json")
}
