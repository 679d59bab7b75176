//! Durable replacement of small files, bounded reads of regular files, and the access rights of the data folder.
//!
//! The data folder holds secrets, such as the passwords of cameras in the cached desired state. Folders have the mode
//! 0700 and files 0600: [`private_by_default`] restricts everything that the process creates, [`replace`] restricts the
//! files that it writes, and [`make_private`] restricts what an earlier version created.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use rustix::fs::Mode;

/// Mode of a private folder.
const FOLDER_MODE: u32 = 0o700;
/// Mode of a private file.
const FILE_MODE: u32 = 0o600;

/// Restricts the files and folders that this process creates from now on to its user. Called once at the start, because
/// the mask belongs to the process and not to a thread.
pub fn private_by_default() {
    rustix::process::umask(Mode::from_raw_mode(0o077));
}

/// Creates a private folder and its missing parents. An existing folder is left as it is.
///
/// # Errors
/// The error of the file system.
pub fn create_private_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(path)
}

/// Restricts a file, or a folder with everything in it, to its user. Symbolic links are not followed. A path that does not
/// exist is not an error.
///
/// # Errors
/// The first error of the file system, after everything else was restricted; `PermissionDenied` when another user owns
/// the file.
pub fn make_private(path: &Path) -> io::Result<()> {
    let kind = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !kind.is_dir() && !kind.is_file() {
        return Ok(());
    }
    let mode = if kind.is_dir() { FOLDER_MODE } else { FILE_MODE };
    let mut outcome = restrict(path, mode);
    if kind.is_dir() {
        for entry in fs::read_dir(path)? {
            outcome = outcome.and(make_private(&entry?.path()));
        }
    }
    outcome
}

/// Restricts a folder to its user, without what is in it.
///
/// # Errors
/// The error of the file system; `PermissionDenied` when another user owns the folder.
pub fn make_folder_private(path: &Path) -> io::Result<()> {
    restrict(path, FOLDER_MODE)
}

fn restrict(path: &Path, mode: u32) -> io::Result<()> {
    // An unchanged mode is not written, to spare the flash.
    if fs::symlink_metadata(path)?.permissions().mode() & 0o7777 == mode {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Replaces a file atomically and durably: after a power cut the file has either the old or the new content, complete. The
/// file can be read by its user only. The content is written to a temporary file in the same folder and synced, the file is renamed, and the folder is synced.
///
/// # Errors
/// The error of the file system, such as `StorageFull`.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let mut file = File::options().write(true).create(true).truncate(true).mode(FILE_MODE).open(&temporary)?;
    // The mode above applies only to a file that did not exist.
    file.set_permissions(Permissions::from_mode(FILE_MODE))?;
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
    let not_regular = || io::Error::other("not a regular file");
    // The file type is checked before the file is opened, because opening a device can have an effect, and once more after it:
    // the file can have been replaced. Without NONBLOCK, opening a pipe would wait for its writer.
    if !fs::metadata(path)?.is_file() {
        return Err(not_regular());
    }
    let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(not_regular()) }
}

/// Reads a complete regular file of at most `bytes_max` bytes.
///
/// # Errors
/// The error of the file system; also when the path is not a regular file, or the file is larger than `bytes_max`.
pub fn read_bounded(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    read_opened(open_regular(path)?, bytes_max)
}

/// As [`read_bounded`], of a file that was opened and checked already.
///
/// # Errors
/// As [`read_bounded`].
pub fn read_opened(file: File, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes)?;
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
    fn files_and_folders_are_private_also_those_of_an_earlier_version() {
        let folder = tempfile::tempdir().unwrap();
        let mode = |name: &str| fs::metadata(folder.path().join(name)).unwrap().permissions().mode() & 0o7777;
        fs::create_dir_all(folder.path().join("store/blobs")).unwrap();
        fs::write(folder.path().join("store/blobs/a"), "a").unwrap();
        fs::write(folder.path().join("outside"), "a").unwrap();
        fs::write(folder.path().join("state.tmp"), "left behind").unwrap();
        for name in ["store", "store/blobs"] {
            fs::set_permissions(folder.path().join(name), Permissions::from_mode(0o755)).unwrap();
        }
        for name in ["store/blobs/a", "outside", "state.tmp"] {
            fs::set_permissions(folder.path().join(name), Permissions::from_mode(0o644)).unwrap();
        }
        std::os::unix::fs::symlink(folder.path().join("outside"), folder.path().join("store/link")).unwrap();
        make_private(&folder.path().join("store")).unwrap();
        make_private(&folder.path().join("none")).unwrap();
        assert_eq!((mode("store"), mode("store/blobs"), mode("store/blobs/a")), (0o700, 0o700, 0o600));
        assert_eq!(mode("outside"), 0o644, "links are not followed");
        replace(&folder.path().join("state"), b"new").unwrap();
        assert_eq!(mode("state"), 0o600);
        create_private_folder(&folder.path().join("x/y")).unwrap();
        assert_eq!((mode("x"), mode("x/y")), (0o700, 0o700));
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
        assert_eq!(read_bounded(&path, u64::MAX).unwrap(), b"123");
        assert!(read_bounded(Path::new("/dev/zero"), 2).is_err());
    }
}
