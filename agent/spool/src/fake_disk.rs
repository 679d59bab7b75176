//! A file system in memory for tests, with power cuts: what was written and not synced is kept, lost, torn or kept out of
//! order, as chance will have it, and so are names. It can refuse to write and to sync.

#![allow(dead_code, missing_docs, clippy::unwrap_used, reason = "test code, a part of which other crates use too")]

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use super::disk::{Disk, DiskFile};

/// What the disk does besides working.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct FaultMode {
    /// Writing fails, as on a full disk; half of what was to be written may have been.
    pub(super) refuses_writes: bool,
    /// Syncing fails, and what was written since the last sync is gone.
    pub(super) refuses_syncs: bool,
    /// Nothing can be made, renamed or removed, as on a file system that turned read-only.
    pub(super) is_read_only: bool,
}

/// The disk. Clones are the same disk.
#[derive(Clone, Default)]
pub(super) struct FakeDisk(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Names as they would be after a power cut now, if nothing that is on the way arrived.
    synced_names: BTreeMap<PathBuf, usize>,
    names: BTreeMap<PathBuf, usize>,
    files: Vec<Content>,
    mood: FaultMode,
    syncs: u64,
}

#[derive(Default, Clone)]
struct Content {
    synced: Vec<u8>,
    now: Vec<u8>,
    /// Writes since the last sync.
    pending: Vec<(u64, Vec<u8>)>,
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

impl FakeDisk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Changes what the disk does besides working.
    pub(super) fn set_mood(&self, mood: FaultMode) {
        self.state().mood = mood;
    }

    /// Whether it does nothing besides working.
    pub(super) fn is_well(&self) -> bool {
        self.state().mood == FaultMode::default()
    }

    /// How often a file was synced.
    pub(super) fn syncs(&self) -> u64 {
        self.state().syncs
    }

    /// Bytes of all files in a folder and below.
    pub(super) fn bytes(&self, folder: &Path) -> u64 {
        let state = self.state();
        let inside = state.names.iter().filter(|(path, _)| path.starts_with(folder));
        inside.map(|(_, id)| state.files[*id].now.len() as u64).sum()
    }

    /// The paths of all files.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.state().names.keys().cloned().collect()
    }

    /// Changes the bytes of a file behind everybody's back.
    pub(super) fn damage(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.state();
        let id = state.names[path];
        let content = &mut state.files[id];
        change(&mut content.now);
        (content.synced, content.pending) = (content.now.clone(), Vec::new());
    }

    /// A power cut. Every write since the last sync of its file arrives whole, in part or not at all, whatever came of
    /// those before it; names made, given and removed since the last sync of their folder count or do not.
    pub(super) fn cut_power(&self, random: &mut fastrand::Rng) {
        let mut state = self.state();
        let (synced, now) = (state.synced_names.clone(), state.names.clone());
        let mut names = BTreeMap::new();
        for path in synced.keys().chain(now.keys()) {
            let id = if random.bool() { synced.get(path) } else { now.get(path) };
            if let Some(id) = id {
                // A file that was renamed has one of its names, never both.
                if !names.values().any(|other| other == id) {
                    names.insert(path.clone(), *id);
                }
            }
        }
        // A synced file is never lost by a rename that is half done: it has the old name or the new one.
        for (path, id) in &synced {
            if now.values().any(|other| other == id) && !names.values().any(|other| other == id) {
                names.insert(path.clone(), *id);
            }
        }
        for content in &mut state.files {
            let mut survived = content.synced.clone();
            for (offset, written) in &content.pending {
                match random.u8(0..4) {
                    0 => {}
                    1 => apply(&mut survived, *offset, &written[..random.usize(0..=written.len())]),
                    _ => apply(&mut survived, *offset, written),
                }
            }
            *content = Content { synced: survived.clone(), now: survived, pending: Vec::new() };
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
        let is_refused = state.mood.refuses_writes || state.mood.is_read_only;
        let written = if is_refused { &bytes[..bytes.len() / 2] } else { bytes };
        let content = &mut state.files[self.id];
        apply(&mut content.now, offset, written);
        content.pending.push((offset, written.to_vec()));
        if is_refused { Err(refused()) } else { Ok(()) }
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.disk.state();
        if state.mood.refuses_syncs || state.mood.is_read_only {
            let content = &mut state.files[self.id];
            (content.now, content.pending) = (content.synced.clone(), Vec::new());
            return Err(refused());
        }
        state.syncs += 1;
        let content = &mut state.files[self.id];
        (content.synced, content.pending) = (content.now.clone(), Vec::new());
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
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        Ok(inside.map(|(path, id)| (name(path), state.files[*id].now.len() as u64)).collect())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        if !self.state().mood.is_read_only {
            self.state().names.remove(path);
        }
        self.open(path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.state();
        let id = match state.names.get(path) {
            Some(id) => *id,
            None if state.mood.is_read_only => return Err(refused()),
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
        let bytes = &state.files[id].now;
        Ok(bytes[..bytes.len().min(bytes_max as usize)].to_vec())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.mood.is_read_only {
            return Err(refused());
        }
        let id = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.to_owned(), id);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.mood.is_read_only {
            return Err(refused());
        }
        state.names.remove(path);
        Ok(())
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.mood.refuses_syncs || state.mood.is_read_only {
            return Err(refused());
        }
        let now: Vec<_> = state.names.iter().map(|(path, id)| (path.clone(), *id)).collect();
        state.synced_names.retain(|path, _| path.parent() != Some(folder));
        state.synced_names.extend(now.into_iter().filter(|(path, _)| path.parent() == Some(folder)));
        Ok(())
    }
}
