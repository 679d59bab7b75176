//! What each thread of a worker does: the batch, the item and the stage.
//!
//! Every thread has one entry on a board. The board of a child process is a file in memory that the agent reads after the
//! child has ended. An entry has 24 bytes, little endian: batch (`u64`), item (`u64`), stage (`u64`, 0 for an idle thread). The
//! thread that owns an entry overwrites it as a whole, so a reader sees at worst the previous entry.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use parking_lot::Mutex;

use crate::BatchId;

/// Bytes of one entry.
const ENTRY_BYTES: usize = 24;

/// The stages of an inspection, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Decoding of the picture.
    Decode,
    /// Filling of the input tensor.
    Preprocess,
    /// The engine and the decoding of its outputs.
    Infer,
    /// The verdict rule.
    Rule,
}

impl Stage {
    const ALL: [Self; 4] = [Self::Decode, Self::Preprocess, Self::Infer, Self::Rule];

    /// The name for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Decode => "decoding the frame",
            Self::Preprocess => "preprocessing the frame",
            Self::Infer => "inference",
            Self::Rule => "the verdict rule",
        }
    }
}

/// What one thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Activity {
    /// The batch.
    pub batch: BatchId,
    /// Index of the item in the batch. In [`Stage::Infer`] the thread works on the whole batch, and this is 0.
    pub item: usize,
    /// The stage.
    pub stage: Stage,
}

/// Where the threads of a worker state what they do.
pub trait ActivityBoard: Send + Sync {
    /// Sets the entry of a thread; `None` when it is idle.
    fn set(&self, entry: usize, activity: Option<Activity>);
}

/// A board in the memory of this process.
#[derive(Default)]
pub struct MemoryBoard(Mutex<Vec<Option<Activity>>>);

impl MemoryBoard {
    /// The entries of the threads that are busy.
    pub fn read(&self) -> Vec<Activity> {
        self.0.lock().iter().flatten().copied().collect()
    }
}

impl ActivityBoard for MemoryBoard {
    fn set(&self, entry: usize, activity: Option<Activity>) {
        let mut entries = self.0.lock();
        if entries.len() <= entry {
            entries.resize(entry + 1, None);
        }
        if let Some(own) = entries.get_mut(entry) {
            *own = activity;
        }
    }
}

/// A board in a file that two processes share.
pub(crate) struct FileBoard(File);

impl FileBoard {
    pub(crate) fn new(file: File) -> Self {
        Self(file)
    }

    pub(crate) fn file(&self) -> &File {
        &self.0
    }

    /// The entries of the threads that are busy. An entry that makes no sense is left out: the child may have been damaged.
    pub(crate) fn read(&self, entries: usize) -> Vec<Activity> {
        let mut bytes = vec![0; entries.saturating_mul(ENTRY_BYTES)];
        let mut length = 0;
        while let Some(rest) = bytes.get_mut(length..).filter(|rest| !rest.is_empty()) {
            match self.0.read_at(rest, length as u64) {
                Ok(read) if read > 0 => length += read,
                _ => break,
            }
        }
        bytes.chunks_exact(ENTRY_BYTES).filter_map(decode).collect()
    }
}

impl ActivityBoard for FileBoard {
    fn set(&self, entry: usize, activity: Option<Activity>) {
        let position = entry.saturating_mul(ENTRY_BYTES) as u64;
        // A board that cannot be written costs the attribution of a fault, and nothing else.
        self.0.write_all_at(&encode(activity), position).ok();
    }
}

fn encode(activity: Option<Activity>) -> [u8; ENTRY_BYTES] {
    let Some(Activity { batch, item, stage }) = activity else { return [0; ENTRY_BYTES] };
    let mut bytes = [0; ENTRY_BYTES];
    let fields = [batch, item as u64, stage as u64 + 1];
    for (target, field) in bytes.chunks_exact_mut(8).zip(fields) {
        target.copy_from_slice(&field.to_le_bytes());
    }
    bytes
}

fn decode(bytes: &[u8]) -> Option<Activity> {
    let field =
        |index: usize| bytes.chunks_exact(8).nth(index).and_then(|field| field.try_into().ok()).map(u64::from_le_bytes);
    let stage = *Stage::ALL.get(usize::try_from(field(2)?.checked_sub(1)?).ok()?)?;
    Some(Activity { batch: field(0)?, item: usize::try_from(field(1)?).ok()?, stage })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_boards_return_what_busy_threads_state() {
        let file = FileBoard::new(tempfile::tempfile().unwrap());
        let memory = MemoryBoard::default();
        let one = Activity { batch: u64::MAX, item: 3, stage: Stage::Rule };
        let two = Activity { batch: 8, item: 0, stage: Stage::Decode };
        for board in [&file as &dyn ActivityBoard, &memory] {
            board.set(3, Some(one));
            board.set(0, Some(two));
            board.set(1, Some(two));
            board.set(1, None);
        }
        assert_eq!(file.read(4), [two, one]);
        assert_eq!(memory.read(), [two, one]);
        assert_eq!(file.read(100), [two, one], "a file that is too short is read as far as it goes");
    }

    #[test]
    fn damaged_entries_are_left_out() {
        let board = FileBoard::new(tempfile::tempfile().unwrap());
        board.0.write_all_at(&[0xff; 3 * ENTRY_BYTES], 0).unwrap();
        assert_eq!(board.read(3), []);
    }
}
