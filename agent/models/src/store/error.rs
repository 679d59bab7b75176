//! The error of the model store.

use std::io;
use std::path::{Path, PathBuf};

use lineside_common::digest::Digest;

use super::evict::NoSpaceError;

/// The result of a store operation.
pub type Result<T> = std::result::Result<T, StoreError>;

/// What a caller branches on when a store operation fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreErrorKind {
    /// The file system reported an error. Retrying may help.
    Io,
    /// Evicting every unprotected blob does not free enough space.
    NoSpace,
    /// A file does not have the expected digest. The store has removed it, so it can be fetched again.
    DigestMismatch,
    /// Another process holds the lock of the file.
    Locked,
}

/// Why a store operation failed. The message names the file.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system reported an error.
    #[error("cannot access {}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
    /// Evicting every unprotected blob does not free enough space.
    #[error(transparent)]
    NoSpace(#[from] NoSpaceError),
    /// A blob in the store is damaged and has been removed.
    #[error("{} is damaged: its digest is {actual}; it has been removed and will be fetched again", path.display())]
    DamagedBlob {
        /// The file of the blob.
        path: PathBuf,
        /// The digest of its content.
        actual: Digest,
    },
    /// A blob in the store is damaged and cannot be removed.
    #[error("{} is damaged: its digest is {actual}; it cannot be removed", path.display())]
    UndeletableBlob {
        /// The file of the blob.
        path: PathBuf,
        /// The digest of its content.
        actual: Digest,
        /// Why it cannot be removed.
        source: io::Error,
    },
    /// A received file does not have the expected digest. It has been removed.
    #[error("the received file has the digest {actual}, expected {expected}")]
    DigestMismatch {
        /// The digest the file must have.
        expected: Digest,
        /// The digest of the received bytes.
        actual: Digest,
    },
    /// Another process is writing the same partial file.
    #[error("{} is being written by another process", path.display())]
    Locked {
        /// The partial file.
        path: PathBuf,
    },
}

impl StoreError {
    /// What a caller branches on.
    pub fn kind(&self) -> StoreErrorKind {
        match self {
            Self::Io { .. } => StoreErrorKind::Io,
            Self::NoSpace(_) => StoreErrorKind::NoSpace,
            Self::DamagedBlob { .. } | Self::UndeletableBlob { .. } | Self::DigestMismatch { .. } => {
                StoreErrorKind::DigestMismatch
            }
            Self::Locked { .. } => StoreErrorKind::Locked,
        }
    }

    /// Converts an I/O error on `path`.
    pub(super) fn io(path: &Path) -> impl Fn(io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}
