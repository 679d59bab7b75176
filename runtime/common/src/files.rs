//! Durable replacement of small files, and bounded reads of regular files.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::Path;

/// Replaces a file atomically and durably: after a power cut the file has either the old or the new content, complete. The
/// content is written to a temporary file in the same folder and synced, the file is renamed, and the folder is synced.
///
/// # Errors
/// The error of the file system, such as `StorageFull`.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    sync_parent(path)
}

/// Syncs the folder of a file, so that files renamed, created or removed in it stay so after a power cut.
///
/// # Errors
/// The error of the file system.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    let folder = path.parent().ok_or_else(|| io::Error::other("the path has no parent folder"))?;
    File::open(folder)?.sync_all()
}

/// Removes a file. A file that does not exist is not an error.
///
/// # Errors
/// Any other error of the file system.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Opens a regular file for reading.
///
/// # Errors
/// The error of the file system; also when the path is not a regular file.
pub fn open_regular(path: &Path) -> io::Result<File> {
    // The file type is checked before the file is opened, because opening a pipe waits for its writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    File::open(path)
}

/// Reads a complete regular file of at most `bytes_max` bytes.
///
/// # Errors
/// The error of the file system; also when the path is not a regular file, or the file is larger than `bytes_max`.
pub fn read_bounded(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        return Err(io::Error::other(format!("the file has more than {bytes_max} bytes")));
    }
    Ok(bytes)
}

/// Whether an error means that the disk accepts no writes at present: it is read-only or full, or writing is not permitted.
/// Reading may still work.
pub fn refuses_writes(error: &io::Error) -> bool {
    use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(error.kind(), PermissionDenied | QuotaExceeded | ReadOnlyFilesystem | StorageFull)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_and_no_temporary_file_remains() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("epoch");
        replace(&path, b"1").unwrap();
        replace(&path, b"2").unwrap();
        assert_eq!(read_bounded(&path, 1).unwrap(), b"2");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn errors_of_a_disk_that_accepts_no_writes_are_recognized() {
        for code in
            [rustix::io::Errno::ROFS, rustix::io::Errno::NOSPC, rustix::io::Errno::DQUOT, rustix::io::Errno::ACCESS]
        {
            assert!(refuses_writes(&code.into()), "{code}");
        }
        assert!(!refuses_writes(&io::ErrorKind::NotFound.into()) && !refuses_writes(&rustix::io::Errno::IO.into()));
    }

    #[test]
    fn only_regular_files_within_the_bound_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, b"123").unwrap();
        assert!(read_bounded(&path, 2).unwrap_err().to_string().contains("more than 2 bytes"));
        assert!(read_bounded(folder.path(), 2).unwrap_err().to_string().contains("not a regular file"));
        assert!(read_bounded(Path::new("/dev/zero"), 2).is_err());
    }
}
