//! The folders that files named by a manifest may be read from.
//!
//! The author of a manifest chooses paths and must not be able to make the agent read what only the agent can read.
//! Therefore the *opened* file is checked, not the path that was given: symbolic links, `..` and renames between a check
//! and an open have no effect.
//!
//! 1. The path is opened with `O_PATH`, which reads nothing, waits for nothing and has no effect on a device.
//! 2. The kernel states the type and the file system of the opened file, and its path (`/proc/self/fd`).
//! 3. The same file is opened for reading through `/proc/self/fd`.
//!
//! Only regular files are opened. Files of file systems that the kernel generates, such as `/proc`, are refused also below
//! an allowed folder: they state what the kernel knows, and reading some of them waits for ever.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, fstatfs, openat};

/// The file systems that the kernel generates: procfs, sysfs, debugfs, tracefs, securityfs, configfs, cgroup, cgroup2, bpf,
/// efivarfs, pstore, selinuxfs (`linux/magic.h`).
const GENERATED: [u64; 12] = [
    0x9fa0,
    0x6265_6572,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0x6265_6570,
    0x0027_e0eb,
    0x6367_7270,
    0xcafe_4a11,
    0xde5e_81e4,
    0x6165_676c,
    0xf97c_ff8c,
];

/// The folders that files named by a manifest may be read from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileRoots {
    /// Allowed folders, with everything below them. Without any, no file is allowed.
    allowed: Vec<PathBuf>,
    /// Files and folders that are not allowed although they are below an allowed folder.
    excluded: Vec<PathBuf>,
}

/// Why a file named by a manifest is not read.
#[derive(Debug, thiserror::Error)]
pub enum FileRootsError {
    /// The file cannot be opened.
    #[error("the file cannot be read")]
    Io(#[source] io::Error),
    /// The file is not below an allowed folder. The message does not state whether the file exists.
    #[error("the path is not below an allowed folder ({}); list its folder in --file-roots to allow it", list(allowed))]
    NotAllowed {
        /// The allowed folders.
        allowed: Vec<PathBuf>,
    },
    /// The file or folder is state or a secret of the agent.
    #[error("the path belongs to the agent's own state or secrets, which manifests must not name")]
    Excluded,
    /// A pipe, a device, a socket or a file of a file system that the kernel generates.
    #[error("not a regular file")]
    NotRegular,
    /// Not a folder.
    #[error("not a folder")]
    NotFolder,
}

/// What a caller branches on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileRootsErrorKind {
    /// The file system reports an error; it may be temporary.
    Io,
    /// The path is refused.
    Refused,
}

impl FileRootsError {
    /// What a caller branches on.
    pub fn kind(&self) -> FileRootsErrorKind {
        match self {
            Self::Io(_) => FileRootsErrorKind::Io,
            Self::NotAllowed { .. } | Self::Excluded | Self::NotRegular | Self::NotFolder => {
                FileRootsErrorKind::Refused
            }
        }
    }
}

fn list(folders: &[PathBuf]) -> String {
    let folders: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
    if folders.is_empty() { "there is none".to_owned() } else { folders.join(", ") }
}

impl FileRoots {
    /// Allows the files below `allowed`, except `excluded` with everything below them. Symbolic links in both are followed
    /// at every check, because a volume may be mounted later.
    pub fn new(allowed: impl IntoIterator<Item = PathBuf>, excluded: impl IntoIterator<Item = PathBuf>) -> Self {
        Self { allowed: allowed.into_iter().collect(), excluded: excluded.into_iter().collect() }
    }

    /// Opens a regular file for reading.
    ///
    /// # Errors
    /// When the file cannot be opened, is not below an allowed folder, or is not a regular file.
    pub fn open(&self, path: &Path) -> Result<File, FileRootsError> {
        let handle = self.handle(path)?;
        let stat = fstat(&handle).map_err(|error| FileRootsError::Io(error.into()))?;
        if !FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(FileRootsError::NotRegular);
        }
        // Opening the link in /proc opens the file that was checked. Procfs is not followed anywhere else.
        let file =
            openat(CWD, descriptor_path(&handle), OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
                .map_err(|error| FileRootsError::Io(error.into()))?;
        Ok(File::from(file))
    }

    /// Checks a folder and returns its path without symbolic links. Every file in it has to be opened with
    /// [`FileRoots::open`] all the same, because it may be a link.
    ///
    /// # Errors
    /// When the folder cannot be opened, is not below an allowed folder, or is not a folder.
    pub fn folder(&self, path: &Path) -> Result<PathBuf, FileRootsError> {
        let handle = self.handle(path)?;
        let stat = fstat(&handle).map_err(|error| FileRootsError::Io(error.into()))?;
        if !FileType::from_raw_mode(stat.st_mode).is_dir() {
            return Err(FileRootsError::NotFolder);
        }
        fs::read_link(descriptor_path(&handle)).map_err(FileRootsError::Io)
    }

    /// A handle of a file or folder that is below an allowed folder. It cannot be read.
    fn handle(&self, path: &Path) -> Result<OwnedFd, FileRootsError> {
        // A path outside is refused before it is looked up, so that the answer does not reveal what exists. A link is
        // looked up, because only a writer of an allowed folder can create it.
        let absolute = lexically_absolute(path).map_err(FileRootsError::Io)?;
        let outside = || FileRootsError::NotAllowed { allowed: self.allowed.clone() };
        if !self.allowed.iter().any(|root| lexically_absolute(root).is_ok_and(|root| absolute.starts_with(root)))
            && !self.allowed.iter().any(|root| fs::canonicalize(root).is_ok_and(|root| absolute.starts_with(root)))
        {
            return Err(outside());
        }
        let handle = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| FileRootsError::Io(error.into()))?;
        let opened = fs::read_link(descriptor_path(&handle)).map_err(FileRootsError::Io)?;
        let is_below = |roots: &[PathBuf]| {
            roots.iter().any(|root| fs::canonicalize(root).is_ok_and(|root| opened.starts_with(root)))
        };
        if !is_below(&self.allowed) {
            return Err(outside());
        }
        if is_below(&self.excluded) {
            return Err(FileRootsError::Excluded);
        }
        let file_system = fstatfs(&handle).map_err(|error| FileRootsError::Io(error.into()))?;
        // The type is signed on some targets; only its 32 bits are compared.
        if GENERATED.contains(&(file_system.f_type as u64 & 0xffff_ffff)) {
            return Err(FileRootsError::NotRegular);
        }
        Ok(handle)
    }
}

fn descriptor_path(handle: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", handle.as_raw_fd()))
}

/// An absolute path without `.` and `..`, without looking anything up.
fn lexically_absolute(path: &Path) -> io::Result<PathBuf> {
    let mut absolute = PathBuf::new();
    for component in std::path::absolute(path)?.components() {
        match component {
            std::path::Component::ParentDir => drop(absolute.pop()),
            std::path::Component::CurDir => {}
            other => absolute.push(other),
        }
    }
    Ok(absolute)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::fs::symlink;

    use super::*;

    struct Site {
        folder: tempfile::TempDir,
    }

    impl Site {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            for name in ["allowed/own", "outside"] {
                fs::create_dir_all(folder.path().join(name)).unwrap();
            }
            for name in ["allowed/a", "allowed/own/state", "outside/secret", "allowed-not"] {
                fs::write(folder.path().join(name), name).unwrap();
            }
            Self { folder }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn roots(&self) -> FileRoots {
            FileRoots::new([self.path("allowed")], [self.path("allowed/own")])
        }

        fn refusal(&self, name: &str) -> FileRootsError {
            let error = self.roots().open(&self.path(name)).unwrap_err();
            assert_eq!(error.kind(), FileRootsErrorKind::Refused, "{name}: {error:?}");
            error
        }
    }

    #[test]
    fn only_files_below_an_allowed_folder_are_opened() {
        let site = Site::new();
        let mut text = String::new();
        site.roots().open(&site.path("allowed/../allowed/./a")).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "allowed/a");
        for name in ["outside/secret", "allowed/../outside/secret", "allowed-not", "outside/none", "/etc/shadow"] {
            assert!(matches!(site.refusal(name), FileRootsError::NotAllowed { .. }), "{name}");
        }
        assert!(matches!(site.refusal("allowed/own/state"), FileRootsError::Excluded));
        assert_eq!(site.roots().open(&site.path("allowed/none")).unwrap_err().kind(), FileRootsErrorKind::Io);
        assert!(FileRoots::default().open(&site.path("allowed/a")).is_err());
    }

    #[test]
    fn a_link_is_judged_by_where_it_leads() {
        let site = Site::new();
        symlink(site.path("outside/secret"), site.path("allowed/to-secret")).unwrap();
        symlink(site.path("outside"), site.path("allowed/to-folder")).unwrap();
        symlink("/etc/shadow", site.path("allowed/to-shadow")).unwrap();
        symlink(site.path("allowed/own/state"), site.path("allowed/to-state")).unwrap();
        symlink("a", site.path("allowed/to-a")).unwrap();
        symlink(site.path("allowed"), site.path("root")).unwrap();
        for name in ["allowed/to-secret", "allowed/to-folder/secret", "allowed/to-shadow"] {
            assert!(matches!(site.refusal(name), FileRootsError::NotAllowed { .. }), "{name}");
        }
        assert!(matches!(site.refusal("allowed/to-state"), FileRootsError::Excluded));
        assert!(site.roots().open(&site.path("allowed/to-a")).is_ok());
        // A root may be a link itself, as the folders of a mounted ConfigMap are.
        let by_link = FileRoots::new([site.path("root")], []);
        assert!(by_link.open(&site.path("root/a")).is_ok() && by_link.open(&site.path("allowed/a")).is_ok());
    }

    #[test]
    fn what_is_not_a_regular_file_is_refused_without_waiting() {
        let site = Site::new();
        rustix::fs::mknodat(CWD, site.path("allowed/pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        for name in ["allowed/pipe", "allowed"] {
            assert!(matches!(site.refusal(name), FileRootsError::NotRegular), "{name}");
        }
        let everything = FileRoots::new([PathBuf::from("/")], []);
        for path in ["/proc/self/environ", "/proc/kmsg", "/proc/self/fd/0", "/dev/zero", "/sys/kernel/notes"] {
            match everything.open(Path::new(path)) {
                Err(FileRootsError::NotRegular | FileRootsError::Io(_)) => {}
                other => panic!("{path}: {other:?}"),
            }
        }
        assert!(matches!(everything.open(Path::new("/proc/self/status")), Err(FileRootsError::NotRegular)));
    }

    #[test]
    fn a_folder_is_checked_like_a_file() {
        let site = Site::new();
        let folder = site.roots().folder(&site.path("allowed")).unwrap();
        assert_eq!(folder, fs::canonicalize(site.path("allowed")).unwrap());
        assert!(matches!(site.roots().folder(&site.path("allowed/a")), Err(FileRootsError::NotFolder)));
        assert!(matches!(site.roots().folder(&site.path("allowed/own")), Err(FileRootsError::Excluded)));
        assert!(site.roots().folder(&site.path("outside")).is_err());
    }
}
