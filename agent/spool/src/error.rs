//! Errors of opening, reading and purging a spool.

use std::io;
use std::path::{Path, PathBuf};

use lineside_common::files;

/// Why a spool could not be opened, read or purged.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The folder does not contain a spool.
    #[error("{} does not contain a spool; check that it is the data folder of an agent", path.display())]
    NotFound {
        /// The folder of the spool.
        path: PathBuf,
    },
    /// The file system reported an error.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// The operation that failed, as a verb: `create`, `list`, `read`, `write`, `rename`, `remove`, `sync`.
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The error of the file system.
        #[source]
        source: io::Error,
    },
    /// The writer thread could not be started.
    #[error("cannot start the writer thread of the spool")]
    Thread(#[source] io::Error),
}

/// The kind of a [`SpoolError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpoolErrorKind {
    /// The spool, or a file of it, does not exist.
    NotFound,
    /// Any other error of the operating system.
    Io,
}

impl SpoolError {
    /// The kind, to branch on.
    pub fn kind(&self) -> SpoolErrorKind {
        match self {
            Self::NotFound { .. } => SpoolErrorKind::NotFound,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => SpoolErrorKind::NotFound,
            Self::Io { .. } | Self::Thread(_) => SpoolErrorKind::Io,
        }
    }
}

impl SpoolError {
    /// Whether the disk refuses writes, while reading may still work.
    pub(crate) fn refuses_writes(&self) -> bool {
        matches!(self, Self::Io { source, .. } if files::refuses_writes(source))
    }
}

/// Adds the operation and the path to an error of the file system.
pub(crate) trait IoContext<T> {
    /// Names what was done to which file.
    fn during(self, operation: &'static str, path: &Path) -> Result<T, SpoolError>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn during(self, operation: &'static str, path: &Path) -> Result<T, SpoolError> {
        self.map_err(|source| SpoolError::Io { operation, path: path.to_owned(), source })
    }
}

#[cfg(test)]
mod tests {
    use lineside_common::error_chain;

    use super::*;

    #[test]
    fn errors_name_the_file_and_keep_the_source() {
        let denied: io::Result<()> = Err(io::ErrorKind::PermissionDenied.into());
        let error = denied.during("read", Path::new("/data/spool/result/cursor")).unwrap_err();
        assert_eq!(error.kind(), SpoolErrorKind::Io);
        assert_eq!(error_chain(&error), "cannot read /data/spool/result/cursor: permission denied");
        let missing: io::Result<()> = Err(io::ErrorKind::NotFound.into());
        assert_eq!(missing.during("list", Path::new("x")).unwrap_err().kind(), SpoolErrorKind::NotFound);
    }
}
