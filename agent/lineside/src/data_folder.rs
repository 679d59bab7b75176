//! The agent's data folder: its lock, which is taken before anything in the folder is touched, and its identity, which makes
//! message ids unique for all time.
//!
//! The file `identity.json` holds the folder's random id, the number of starts (the boot epoch), and where the folder is: the
//! node's name, the machine's id, and the inode of the folder. It is replaced durably at every start, before the first message
//! is written. A message id is `node:folder.epoch:seq`, so an id repeats only if the folder id and the epoch repeat. Therefore a
//! new folder id is drawn, and the epoch starts at 1, when the file is missing or damaged, and when the folder is elsewhere than
//! it states: a copy on another machine, or beside the original, never reuses an id of the original.
//!
//! A disk that accepts no writes does not prevent the start: the folder id is then drawn for this run only. A new folder that
//! belongs to another user does.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lineside_common::folder_lock::{FolderLock, FolderLockError};
use lineside_common::{error_chain, files};
use serde::{Deserialize, Serialize};

/// The file that holds the identity.
const IDENTITY_FILE: &str = "identity.json";
const IDENTITY_BYTES_MAX: u64 = 64 << 10;
/// The file of earlier builds that holds the number of starts.
const EPOCH_FILE: &str = "boot-epoch";
/// How long a start waits for another agent to release the lock: a replaced pod overlaps with its successor.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// Digits of base32 (RFC 4648, lower case).
const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
/// Number of digits of a folder id.
const FOLDER_ID_DIGITS: usize = 8;

/// The locked data folder of this process.
#[derive(Debug)]
pub struct DataFolder {
    path: PathBuf,
    identity: FolderIdentity,
    refused_write: Option<String>,
    /// Held as long as the folder is used.
    _lock: FolderLock,
}

/// What makes the message ids of one run of the agent unique.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FolderIdentity {
    /// The random id of the data folder: 8 digits of base32.
    pub folder: String,
    /// The number of starts with this folder id, from 1.
    pub epoch: u64,
}

/// Why a data folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataFolderError {
    /// Another process uses the folder, or it cannot be locked.
    #[error(transparent)]
    Lock(#[from] FolderLockError),
    /// The user of this process may not use the folder. The message has the command that makes it usable.
    #[error("permission denied; {remedy}")]
    Denied {
        /// Who owns the folder, and the command that gives it to the user of this process.
        remedy: String,
    },
    /// The file system reported another error.
    #[error("cannot use {}", path.display())]
    Io {
        /// The folder, or the file in it.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
}

/// A user and a group, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Owner {
    user: u32,
    group: u32,
}

impl Owner {
    /// The effective user of this process: the kernel gives it the files of the process in /proc.
    fn of_process() -> Option<Self> {
        Self::of(Path::new("/proc/self"))
    }

    /// The owner of a file; `None` if that cannot be read.
    fn of(path: &Path) -> Option<Self> {
        std::fs::metadata(path).ok().map(|metadata| Self { user: metadata.uid(), group: metadata.gid() })
    }
}

/// The content of `identity.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct StoredIdentity {
    folder: String,
    epoch: u64,
    #[serde(flatten)]
    place: Place,
}

/// Where a data folder is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    /// The node's name.
    node: String,
    /// Content of `/etc/machine-id`; empty where there is none, as in a container.
    machine: String,
    /// Inode of the folder.
    inode: u64,
}

/// Why a new folder id is drawn.
#[derive(Debug, Clone, PartialEq, Eq)]
enum NewFolder {
    /// The folder has no identity yet.
    First,
    /// The identity cannot be read.
    Damaged(String),
    /// The identity was written elsewhere.
    Copied,
    /// The epoch cannot be counted further.
    Exhausted,
}

impl DataFolderError {
    fn from_io(path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::Denied { remedy: ownership_remedy(path) },
            _ => Self::Io { path: path.to_owned(), source },
        }
    }

    fn from_lock(path: &Path, error: FolderLockError) -> Self {
        match error {
            FolderLockError::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Self::from_io(path, source)
            }
            error => Self::Lock(error),
        }
    }
}

impl DataFolder {
    /// Creates the folder if necessary, locks it, and counts this start.
    ///
    /// # Errors
    /// When another process holds the lock for longer than 10 seconds, the folder cannot be created or read, or it is new and
    /// this process may not write to it.
    pub fn open(path: &Path, node: &str) -> Result<Self, DataFolderError> {
        let io_error = |source| DataFolderError::from_io(path, source);
        std::fs::create_dir_all(path).map_err(io_error)?;
        let lock =
            FolderLock::acquire(path, node, LOCK_TIMEOUT).map_err(|error| DataFolderError::from_lock(path, error))?;
        let inode = std::fs::metadata(path).map_err(io_error)?.ino();
        let machine = files::read_bounded(Path::new("/etc/machine-id"), IDENTITY_BYTES_MAX).unwrap_or_default();
        let machine = String::from_utf8_lossy(&machine).trim().to_owned();
        let place = Place { node: node.to_owned(), machine, inode };
        let (stored, reason) = next_identity(read_identity(path), place, draw_folder_id);
        match write_identity(path, &stored) {
            Ok(()) => {
                log_new_folder(&stored, reason.as_ref());
                Ok(Self { path: path.to_owned(), identity: stored.into(), refused_write: None, _lock: lock })
            }
            // Nothing can be served from a folder that was never used, and it may be made usable at any moment: the start fails,
            // and is repeated by who runs the agent.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && reason == Some(NewFolder::First) => {
                Err(io_error(error))
            }
            // Without a write, the next start would count the same epoch again. So the folder id is for this run only.
            Err(error) => {
                let refused_write = match error.kind() {
                    io::ErrorKind::PermissionDenied => format!("{error}; {}", ownership_remedy(path)),
                    _ => error_chain(&error),
                };
                let identity = FolderIdentity { folder: draw_folder_id(), epoch: 1 };
                tracing::error!(
                    event = "data_folder_unwritable",
                    folder = %path.display(),
                    reason = refused_write,
                    "The data folder accepts no writes; message ids use a folder id of this run, and memory holds new records"
                );
                Ok(Self { path: path.to_owned(), identity, refused_write: Some(refused_write), _lock: lock })
            }
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What makes the ids of this run unique.
    pub fn identity(&self) -> &FolderIdentity {
        &self.identity
    }

    /// Why the folder accepted no writes when it was opened; `None` if it did.
    pub fn refused_write(&self) -> Option<&str> {
        self.refused_write.as_deref()
    }
}

impl FolderIdentity {
    /// The front of the ids of a node's messages, `node:folder.epoch`.
    pub fn id_prefix(&self, node: &str) -> String {
        format!("{node}:{}.{}", self.folder, self.epoch)
    }
}

impl From<StoredIdentity> for FolderIdentity {
    fn from(stored: StoredIdentity) -> Self {
        Self { folder: stored.folder, epoch: stored.epoch }
    }
}

/// What makes a folder usable that the user of this process may not write to.
fn ownership_remedy(path: &Path) -> String {
    remedy_for(path, Owner::of(path), Owner::of_process())
}

fn remedy_for(path: &Path, owner: Option<Owner>, process: Option<Owner>) -> String {
    let is_owned =
        owner.map_or_else(String::new, |owner| format!("{} belongs to user {}, and ", path.display(), owner.user));
    let Some(process) = process else {
        return format!("{is_owned}the agent needs a folder of its own user with the mode 0700");
    };
    let Owner { user, group } = process;
    format!(
        "{is_owned}the agent runs as user {user}; as root on the node: install -d -o {user} -g {group} -m 0700 {}",
        path.display()
    )
}

/// Reads the identity. `None` for a folder that has none, `Err` with the reason for one that cannot be read.
fn read_identity(path: &Path) -> Result<Option<StoredIdentity>, String> {
    match files::read_bounded(&path.join(IDENTITY_FILE), IDENTITY_BYTES_MAX) {
        Ok(text) => {
            let stored: StoredIdentity = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
            if is_folder_id(&stored.folder) { Ok(Some(stored)) } else { Err("it has no valid folder id".to_owned()) }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

fn write_identity(path: &Path, identity: &StoredIdentity) -> io::Result<()> {
    let text = serde_json::to_vec(identity).map_err(io::Error::other)?;
    files::replace(&path.join(IDENTITY_FILE), &text)?;
    // An earlier build would continue to count in it, under ids without a folder.
    files::remove(&path.join(EPOCH_FILE))
}

/// The identity of the next start, and why a new folder id was drawn if it was.
fn next_identity(
    stored: Result<Option<StoredIdentity>, String>,
    place: Place,
    draw: impl Fn() -> String,
) -> (StoredIdentity, Option<NewFolder>) {
    let reason = match stored {
        Ok(Some(stored)) if stored.place != place => NewFolder::Copied,
        Ok(Some(stored)) => match stored.epoch.checked_add(1) {
            Some(epoch) => return (StoredIdentity { epoch, ..stored }, None),
            None => NewFolder::Exhausted,
        },
        Ok(None) => NewFolder::First,
        Err(reason) => NewFolder::Damaged(reason),
    };
    (StoredIdentity { folder: draw(), epoch: 1, place }, Some(reason))
}

fn log_new_folder(identity: &StoredIdentity, reason: Option<&NewFolder>) {
    let reason = match reason {
        None => return,
        Some(NewFolder::First) => {
            tracing::info!(event = "folder_id_created", folder_id = identity.folder, "The data folder has a new id");
            return;
        }
        Some(NewFolder::Damaged(reason)) => format!("{IDENTITY_FILE} cannot be read: {reason}"),
        Some(NewFolder::Copied) => "the data folder was copied or moved, or the node was renamed".to_owned(),
        Some(NewFolder::Exhausted) => "the boot epoch has reached its maximum".to_owned(),
    };
    tracing::warn!(
        event = "folder_id_replaced",
        folder_id = identity.folder,
        reason,
        "The data folder has a new id, so that no message id is used twice; nothing in it is lost"
    );
}

/// Draws a folder id from the random keys that the operating system gives to each hash map.
fn draw_folder_id() -> String {
    let mut random = RandomState::new().hash_one(std::process::id());
    let digits = (0..FOLDER_ID_DIGITS).map(|_| {
        let digit = DIGITS[(random % 32) as usize];
        random /= 32;
        char::from(digit)
    });
    digits.collect()
}

fn is_folder_id(text: &str) -> bool {
    text.len() == FOLDER_ID_DIGITS && text.bytes().all(|byte| DIGITS.contains(&byte))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;

    use super::*;

    fn open(path: &Path, node: &str) -> FolderIdentity {
        let folder = DataFolder::open(path, node).unwrap();
        assert_eq!((folder.refused_write(), folder.path()), (None, path));
        folder.identity().clone()
    }

    #[test]
    fn each_start_has_the_same_folder_and_the_next_epoch() {
        let folder = tempfile::tempdir().unwrap();
        let first = open(folder.path(), "edge-1");
        assert!(is_folder_id(&first.folder), "{first:?}");
        let second = open(folder.path(), "edge-1");
        assert_eq!((&second.folder, second.epoch), (&first.folder, 2));
        assert_eq!(second.id_prefix("edge-1"), format!("edge-1:{}.2", first.folder));
    }

    #[test]
    fn a_damaged_identity_is_replaced_and_never_stops_the_start() {
        let folder = tempfile::tempdir().unwrap();
        let mut prefixes = BTreeSet::from([open(folder.path(), "edge-1").id_prefix("edge-1")]);
        let path = folder.path().join(IDENTITY_FILE);
        for damage in
            ["", "many", "{}", "{\"folder\":\"../../..\",\"epoch\":1,\"node\":\"edge-1\",\"machine\":\"\",\"inode\":1}"]
        {
            fs::write(&path, damage).unwrap();
            assert!(prefixes.insert(open(folder.path(), "edge-1").id_prefix("edge-1")), "{damage}");
        }
        fs::remove_file(&path).unwrap();
        assert!(prefixes.insert(open(folder.path(), "edge-1").id_prefix("edge-1")));
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let unwritable = DataFolder::open(folder.path(), "edge-1").unwrap();
        assert!(unwritable.refused_write().is_some());
        assert!(prefixes.insert(unwritable.identity().id_prefix("edge-1")));
    }

    #[test]
    fn a_copied_folder_has_a_new_id() {
        let place = |node: &str, machine: &str, inode| Place { node: node.into(), machine: machine.into(), inode };
        let stored = StoredIdentity { folder: "aaaaaaaa".into(), epoch: 7, place: place("edge-1", "m", 1) };
        let next = |place, epoch| {
            next_identity(Ok(Some(StoredIdentity { epoch, ..stored.clone() })), place, || "bbbbbbbb".to_owned())
        };
        assert_eq!(next(place("edge-1", "m", 1), 7), (StoredIdentity { epoch: 8, ..stored.clone() }, None));
        for elsewhere in [place("edge-2", "m", 1), place("edge-1", "other", 1), place("edge-1", "m", 2)] {
            let (identity, reason) = next(elsewhere.clone(), 7);
            assert_eq!((identity.folder.as_str(), identity.epoch), ("bbbbbbbb", 1));
            assert_eq!((identity.place, reason), (elsewhere, Some(NewFolder::Copied)));
        }
        let (identity, reason) = next(place("edge-1", "m", 1), u64::MAX);
        assert_eq!((identity.epoch, reason), (1, Some(NewFolder::Exhausted)));
    }

    #[test]
    fn the_epoch_of_an_earlier_build_is_superseded() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(EPOCH_FILE), "many").unwrap();
        assert_eq!(open(folder.path(), "edge-1").epoch, 1);
        assert!(!folder.path().join(EPOCH_FILE).exists());
    }

    #[test]
    fn a_denied_folder_names_its_owner_and_the_remedy() {
        let folder = Path::new("/srv/inspection");
        let owner = |user, group| Some(Owner { user, group });
        assert_eq!(
            remedy_for(folder, owner(0, 0), owner(65532, 65533)),
            "/srv/inspection belongs to user 0, and the agent runs as user 65532; as root on the node: \
             install -d -o 65532 -g 65533 -m 0700 /srv/inspection"
        );
        assert!(remedy_for(folder, None, owner(7, 8)).contains("install -d -o 7 -g 8 -m 0700 /srv/inspection"));
        assert!(remedy_for(folder, None, None).contains("0700"));
        let denied = || io::Error::from(io::ErrorKind::PermissionDenied);
        let locked = FolderLockError::Io { path: folder.join("lock"), source: denied() };
        for error in [DataFolderError::from_io(folder, denied()), DataFolderError::from_lock(folder, locked)] {
            assert!(matches!(&error, DataFolderError::Denied { remedy } if remedy.contains("install -d")), "{error}");
        }
        let full = DataFolderError::from_io(folder, io::ErrorKind::StorageFull.into());
        assert!(matches!(full, DataFolderError::Io { .. }));
        let metadata = fs::metadata("/proc/self").unwrap();
        assert_eq!(Owner::of_process(), owner(metadata.uid(), metadata.gid()));
    }

    #[test]
    fn folder_ids_are_random() {
        let drawn: BTreeSet<String> = (0..1000).map(|_| draw_folder_id()).collect();
        assert!(drawn.len() > 990 && drawn.iter().all(|id| is_folder_id(id)));
    }
}
