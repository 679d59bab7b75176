//! Small files that must never be found half written.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::Path;

/// Replaces a file so that after a power cut either the old or the new content is there, whole: written beside it,
/// synced, renamed over it, and the folder synced.
///
/// # Errors
/// Whatever the file system says.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".tmp");
    let mut file = File::create(&beside)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    sync_parent(path)
}

/// Makes what was renamed, created or removed in a file's folder outlast a power cut.
///
/// # Errors
/// Whatever the file system says.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    let folder = path.parent().ok_or_else(|| io::Error::other("the file has no folder"))?;
    File::open(folder)?.sync_all()
}

/// Removes a file; one that is not there is no error.
///
/// # Errors
/// Whatever else the file system says.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Opens a regular file for reading.
///
/// # Errors
/// Whatever the file system says; also for anything that is no regular file.
pub fn open_regular(path: &Path) -> io::Result<File> {
    // The kind is looked at before the file is opened, because opening a pipe waits for its writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    File::open(path)
}

/// Reads a whole regular file of at most `bytes_max`.
///
/// # Errors
/// Whatever the file system says; also for anything that is no regular file, and for one that is larger.
pub fn read_bounded(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        return Err(io::Error::other(format!("it has more than {bytes_max} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_leaves_nothing_beside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("epoch");
        replace(&path, b"1").unwrap();
        replace(&path, b"2").unwrap();
        assert_eq!(read_bounded(&path, 1).unwrap(), b"2");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn only_regular_files_within_the_bound_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, b"123").unwrap();
        assert!(read_bounded(&path, 2).unwrap_err().to_string().contains("more than 2 bytes"));
        assert!(read_bounded(folder.path(), 2).unwrap_err().to_string().contains("no regular file"));
        assert!(read_bounded(Path::new("/dev/zero"), 2).is_err());
    }
}
