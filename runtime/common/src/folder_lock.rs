//! Exclusive use of a folder by one process.
//!
//! The lock is a `flock` of the folder itself, so it needs no write and also works on a disk that is read-only or full. The
//! kernel releases it when the process ends, however it ends. File systems that cannot lock a folder, such as NFS, lock the
//! file `lock` in it instead.
//!
//! The same file states who holds the lock, as JSON, for the message of a process that waits in vain. It decides nothing: a
//! file that is missing, outdated or damaged has no effect on the lock.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use crate::{clock, files};

/// The file that states the holder.
const HOLDER_FILE: &str = "lock";
const HOLDER_BYTES_MAX: u64 = 4096;
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// A locked folder. Dropping it releases the lock.
#[derive(Debug)]
pub struct FolderLock {
    _locked: File,
}

/// The process that holds the lock of a folder, as it states itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockHolder {
    /// Process id, in the holder's PID namespace.
    pub pid: u32,
    /// Name of the holder's node, or its command.
    pub name: String,
    /// When the holder locked the folder, RFC 3339 in UTC.
    pub since: String,
}

/// Why a folder could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum FolderLockError {
    /// Another process holds the lock.
    #[error("{} is in use by {}; stop it first, or use a different data folder", path.display(), describe(holder.as_ref()))]
    Held {
        /// The folder.
        path: PathBuf,
        /// The holder, if it could state itself.
        holder: Option<LockHolder>,
    },
    /// The file system reported an error.
    #[error("cannot lock {}", path.display())]
    Io {
        /// The folder, or the file in it.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
}

/// What a caller branches on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FolderLockErrorKind {
    /// Another process holds the lock.
    Held,
    /// The file system reported an error.
    Io,
}

impl FolderLockError {
    /// What a caller branches on.
    pub fn kind(&self) -> FolderLockErrorKind {
        match self {
            Self::Held { .. } => FolderLockErrorKind::Held,
            Self::Io { .. } => FolderLockErrorKind::Io,
        }
    }
}

fn describe(holder: Option<&LockHolder>) -> String {
    match holder {
        Some(LockHolder { pid, name, since }) => format!("process {pid} ({name}) since {since}"),
        None => "another process".to_owned(),
    }
}

impl FolderLock {
    /// Locks a folder for the process `name`, which is the name of a node or of a command. Waits up to `timeout` for another
    /// process to release the lock: a replaced pod may overlap with its successor for a moment.
    ///
    /// # Errors
    /// When another process still holds the lock, or the folder cannot be opened.
    pub fn acquire(folder: &Path, name: &str, timeout: Duration) -> Result<Self, FolderLockError> {
        let holder_path = folder.join(HOLDER_FILE);
        let started = Instant::now();
        let locked = loop {
            match try_lock(folder, &holder_path)? {
                Some(locked) => break locked,
                None if started.elapsed() < timeout => std::thread::park_timeout(RETRY_INTERVAL),
                None => {
                    return Err(FolderLockError::Held { path: folder.to_owned(), holder: read_holder(&holder_path) });
                }
            }
        };
        let holder =
            LockHolder { pid: std::process::id(), name: name.to_owned(), since: clock::rfc3339(SystemTime::now()) };
        // Written in place: the file may be the one that is locked.
        let written = serde_json::to_vec(&holder).map_err(io::Error::other);
        if let Err(error) = written.and_then(|text| std::fs::write(&holder_path, text)) {
            tracing::debug!(file = %holder_path.display(), %error, "Cannot write who holds the lock");
        }
        Ok(Self { _locked: locked })
    }
}

/// Tries to lock the folder, or the file in it where a folder cannot be locked. `None` while another process holds the lock.
fn try_lock(folder: &Path, holder_path: &Path) -> Result<Option<File>, FolderLockError> {
    let io_error = |path: &Path| {
        let path = path.to_owned();
        |source| FolderLockError::Io { path, source }
    };
    let file = File::open(folder).map_err(io_error(folder))?;
    match file.try_lock() {
        Ok(()) => return Ok(Some(file)),
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(_)) => {}
    }
    let options = File::options().create(true).truncate(false).write(true).open(holder_path);
    let file = options.map_err(io_error(holder_path))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(io_error(holder_path)(error)),
    }
}

fn read_holder(path: &Path) -> Option<LockHolder> {
    let bytes = files::read_bounded(path, HOLDER_BYTES_MAX).ok()?;
    serde_json::from_slice(&bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_process_learns_who_holds_the_lock_and_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let lock = FolderLock::acquire(folder.path(), "edge-1", Duration::ZERO).unwrap();
        let stated = std::fs::read(folder.path().join(HOLDER_FILE)).unwrap();
        let error = FolderLock::acquire(folder.path(), "edge-2", Duration::ZERO).unwrap_err();
        assert_eq!(error.kind(), FolderLockErrorKind::Held);
        let text = error.to_string();
        assert!(text.contains(&format!("process {} (edge-1) since 2", std::process::id())), "{text}");
        assert_eq!(std::fs::read(folder.path().join(HOLDER_FILE)).unwrap(), stated);
        drop(lock);
        FolderLock::acquire(folder.path(), "edge-2", Duration::ZERO).unwrap();
    }

    #[test]
    fn the_lock_is_awaited() {
        let folder = tempfile::tempdir().unwrap();
        let lock = FolderLock::acquire(folder.path(), "edge-1", Duration::ZERO).unwrap();
        let path = folder.path().to_owned();
        let waiting = std::thread::spawn(move || FolderLock::acquire(&path, "edge-1", Duration::from_secs(60)));
        drop(lock);
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn the_statement_of_the_holder_decides_nothing() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(HOLDER_FILE), "{\"pid\":1").unwrap();
        let lock = FolderLock::acquire(folder.path(), "edge-1", Duration::ZERO).unwrap();
        std::fs::write(folder.path().join(HOLDER_FILE), "damaged").unwrap();
        let error = FolderLock::acquire(folder.path(), "edge-2", Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("in use by another process"), "{error}");
        drop(lock);
        let missing = FolderLock::acquire(&folder.path().join("missing"), "edge-1", Duration::ZERO).unwrap_err();
        assert_eq!(missing.kind(), FolderLockErrorKind::Io);
    }
}
