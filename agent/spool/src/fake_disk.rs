//! A file system in memory for tests, with faults and power cuts. In a power cut, writes that are not synced are kept, lost,
//! torn or reordered at random, and so are changes of names. The disk can refuse reads, writes and syncs, and panic. It has no tests
//! of its own: the tests of the spool fail when a power cut loses what was synced.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use crate::disk::{Disk, DiskFile};

/// The faults of the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct FaultMode {
    /// Writes fail, as on a full disk. Half of the bytes are written.
    pub(crate) refuses_writes: bool,
    /// Syncs fail, and everything written since the last sync is lost.
    pub(crate) refuses_syncs: bool,
    /// Nothing can be written, created, renamed or removed, as on a file system that turned read-only.
    pub(crate) is_read_only: bool,
    /// Reads fail, as on a damaged medium.
    pub(crate) refuses_reads: bool,
    /// Writes panic, as a defect in the writer would.
    pub(crate) panics_on_write: bool,
}

/// The disk. Clones are the same disk.
#[derive(Clone, Default)]
pub(crate) struct FakeDisk(Arc<Mutex<FakeState>>);

#[derive(Default)]
struct FakeState {
    /// The names that survive a power cut for certain.
    synced_names: BTreeMap<PathBuf, usize>,
    names: BTreeMap<PathBuf, usize>,
    files: Vec<Content>,
    faults: FaultMode,
    syncs: u64,
}

#[derive(Default, Clone)]
struct Content {
    /// The bytes that survive a power cut for certain.
    synced: Vec<u8>,
    current: Vec<u8>,
    /// Writes since the last sync: offset and bytes.
    unsynced: Vec<(u64, Vec<u8>)>,
}

fn apply(bytes: &mut Vec<u8>, offset: u64, written: &[u8]) {
    let (offset, end) = (offset as usize, offset as usize + written.len());
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[offset..end].copy_from_slice(written);
}

fn refused() -> io::Error {
    io::Error::from(io::ErrorKind::StorageFull)
}

#[allow(clippy::panic, reason = "this is the injected fault")]
fn injected_panic() {
    panic!("injected for a test");
}

impl FakeDisk {
    fn state(&self) -> MutexGuard<'_, FakeState> {
        self.0.lock()
    }

    /// Sets the faults of the disk.
    pub(crate) fn set_faults(&self, faults: FaultMode) {
        self.state().faults = faults;
    }

    /// Stores a file, synced.
    pub(crate) fn put(&self, path: &Path, content: &[u8]) {
        let mut state = self.state();
        let content = Content { synced: content.to_vec(), current: content.to_vec(), unsynced: Vec::new() };
        state.files.push(content);
        let id = state.files.len() - 1;
        state.names.insert(path.to_owned(), id);
        state.synced_names.insert(path.to_owned(), id);
    }
}

#[cfg(test)]
impl FakeDisk {
    /// Whether the disk has no faults.
    pub(crate) fn is_healthy(&self) -> bool {
        self.state().faults == FaultMode::default()
    }

    /// The number of syncs of files.
    pub(crate) fn syncs(&self) -> u64 {
        self.state().syncs
    }

    /// Bytes of all files in a folder and its subfolders.
    pub(crate) fn bytes(&self, folder: &Path) -> u64 {
        let state = self.state();
        let inside = state.names.iter().filter(|(path, _)| path.starts_with(folder));
        inside.map(|(_, id)| state.files[*id].current.len() as u64).sum()
    }

    /// The paths of all files.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        self.state().names.keys().cloned().collect()
    }

    /// Changes the bytes of a file, as a fault of the medium does.
    pub(crate) fn damage(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.state();
        let id = state.names[path];
        let content = &mut state.files[id];
        change(&mut content.current);
        (content.synced, content.unsynced) = (content.current.clone(), Vec::new());
    }

    /// Cuts the power. Each write since the last sync of its file survives whole, in part or not at all, independently of
    /// earlier writes. Each name that was created, changed or removed since the last sync of its folder survives or not.
    pub(crate) fn cut_power(&self, random: &mut fastrand::Rng) {
        let mut state = self.state();
        let (synced, current) = (state.synced_names.clone(), state.names.clone());
        let mut names = BTreeMap::new();
        for path in synced.keys().chain(current.keys()) {
            let id = if random.bool() { synced.get(path) } else { current.get(path) };
            if let Some(id) = id {
                // A file that was renamed has one of its names, never both.
                if !names.values().any(|other| other == id) {
                    names.insert(path.clone(), *id);
                }
            }
        }
        // An incomplete rename never loses a synced file: the file has the old name or the new one.
        for (path, id) in &synced {
            if current.values().any(|other| other == id) && !names.values().any(|other| other == id) {
                names.insert(path.clone(), *id);
            }
        }
        for content in &mut state.files {
            let mut survived = content.synced.clone();
            for (offset, written) in &content.unsynced {
                match random.u8(0..4) {
                    0 => {}
                    1 => apply(&mut survived, *offset, &written[..random.usize(0..=written.len())]),
                    _ => apply(&mut survived, *offset, written),
                }
            }
            *content = Content { synced: survived.clone(), current: survived, unsynced: Vec::new() };
        }
        state.names = names.clone();
        state.synced_names = names;
    }
}

struct Handle {
    disk: FakeDisk,
    id: usize,
}

impl DiskFile for Handle {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.disk.state();
        if state.faults.panics_on_write {
            drop(state);
            injected_panic();
            return Ok(());
        }
        let is_refused = state.faults.refuses_writes || state.faults.is_read_only;
        let written = if is_refused { &bytes[..bytes.len() / 2] } else { bytes };
        let content = &mut state.files[self.id];
        apply(&mut content.current, offset, written);
        content.unsynced.push((offset, written.to_vec()));
        if is_refused { Err(refused()) } else { Ok(()) }
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.disk.state();
        if state.faults.refuses_syncs || state.faults.is_read_only {
            let content = &mut state.files[self.id];
            (content.current, content.unsynced) = (content.synced.clone(), Vec::new());
            return Err(refused());
        }
        state.syncs += 1;
        let content = &mut state.files[self.id];
        (content.synced, content.unsynced) = (content.current.clone(), Vec::new());
        Ok(())
    }
}

impl Disk for FakeDisk {
    fn create_folder(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<(String, u64)>> {
        let state = self.state();
        let inside = state.names.iter().filter(|(path, _)| path.parent() == Some(folder));
        let entry = |(path, id): (&PathBuf, &usize)| {
            let name = path.file_name()?.to_str()?.to_owned();
            Some((name, state.files[*id].current.len() as u64))
        };
        Ok(inside.filter_map(entry).collect())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        if !self.state().faults.is_read_only {
            self.state().names.remove(path);
        }
        self.open(path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.state();
        let id = match state.names.get(path) {
            Some(id) => *id,
            None if state.faults.is_read_only => return Err(refused()),
            None => {
                state.files.push(Content::default());
                let id = state.files.len() - 1;
                state.names.insert(path.to_owned(), id);
                id
            }
        };
        Ok(Box::new(Handle { disk: self.clone(), id }))
    }

    fn read(&self, path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
        let state = self.state();
        let id = *state.names.get(path).ok_or(io::ErrorKind::NotFound)?;
        if state.faults.refuses_reads {
            return Err(io::Error::other("injected read error"));
        }
        let bytes = &state.files[id].current;
        Ok(bytes[..bytes.len().min(bytes_max as usize)].to_vec())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.faults.is_read_only {
            return Err(refused());
        }
        let id = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.to_owned(), id);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.faults.is_read_only {
            return Err(refused());
        }
        state.names.remove(path);
        Ok(())
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.faults.refuses_syncs || state.faults.is_read_only {
            return Err(refused());
        }
        let current: Vec<_> = state.names.iter().map(|(path, id)| (path.clone(), *id)).collect();
        state.synced_names.retain(|path, _| path.parent() != Some(folder));
        state.synced_names.extend(current.into_iter().filter(|(path, _)| path.parent() == Some(folder)));
        Ok(())
    }
}
