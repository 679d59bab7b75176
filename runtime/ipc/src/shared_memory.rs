//! Memory that the agent shares with one child process: slots for frames, written by the agent and read by the child.
//!
//! The region is an anonymous file in memory (`memfd_create(2)`). The agent maps it and seals it: it can neither shrink nor
//! grow. The child receives a read-only descriptor over its [socket](crate::channel), checks the seals, and maps it. Pages
//! exist only once they were written, so a slot may be as large as the largest frame. (The seal against later writable
//! mappings would also forbid the agent to give pages back.)
//!
//! Invariants:
//! - The agent does not write a slot between handing it to the child and the child's reply to it.
//! - Offsets and lengths from messages are checked before memory is read; a frame outside of its slot is an error.

#![expect(unsafe_code, reason = "mapping a file is unsafe; the proofs stand at the calls")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;

use bytes::Bytes;
use memmap2::{Mmap, MmapMut};
use rustix::fs::{MemfdFlags, SealFlags};

/// A slot that held a larger frame than this gives its memory back when it is released.
const KEPT_BYTES_MAX: usize = 1 << 20;

/// Number and size of the slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotLayout {
    /// Number of slots.
    pub slots: usize,
    /// Bytes of each slot.
    pub slot_bytes: usize,
}

impl SlotLayout {
    fn bytes(self) -> io::Result<usize> {
        let bytes = self.slots.checked_mul(self.slot_bytes).filter(|bytes| *bytes > 0);
        bytes.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the slots have no valid size"))
    }

    /// The position of the first `length` bytes of a slot; `None` outside of the slot.
    fn range(self, slot: usize, length: usize) -> Option<std::ops::Range<usize>> {
        let start = (slot < self.slots && length <= self.slot_bytes).then(|| slot * self.slot_bytes)?;
        Some(start..start + length)
    }
}

/// A file in memory that is not shared with anyone yet. `name` is shown in `/proc/PID/maps`.
///
/// # Errors
/// When the system refuses it.
pub fn anonymous_file(name: &str) -> io::Result<File> {
    Ok(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?.into())
}

/// The agent's side.
pub struct FrameSlots {
    file: File,
    map: MmapMut,
    layout: SlotLayout,
}

impl FrameSlots {
    /// New slots, all empty. `name` is shown in `/proc/PID/maps`.
    ///
    /// # Errors
    /// When the system refuses the memory or the seals.
    pub fn new(name: &str, layout: SlotLayout) -> io::Result<Self> {
        let file = anonymous_file(name)?;
        let bytes = layout.bytes()?;
        file.set_len(bytes as u64)?;
        // SAFETY: the file is anonymous and was created above. Nothing else has its descriptor before the seals are set, and
        // from then on it cannot shrink, so every page of the mapping stays valid.
        let map = unsafe { MmapMut::map_mut(&file)? };
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        Ok(Self { file, map, layout })
    }

    /// A descriptor for the child, through which nothing can be written.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn read_only_descriptor(&self) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(File::open(path)?.into())
    }

    /// Writes a frame into a slot.
    ///
    /// # Errors
    /// When the frame is larger than the slot.
    pub fn write(&mut self, slot: usize, frame: &[u8]) -> io::Result<()> {
        let range = self.layout.range(slot, frame.len());
        let target = range.and_then(|range| self.map.get_mut(range));
        let too_large = || io::Error::new(io::ErrorKind::InvalidInput, "the frame is larger than a slot");
        target.ok_or_else(too_large)?.copy_from_slice(frame);
        Ok(())
    }

    /// Marks a slot as empty. The memory of a large frame is given back to the system.
    pub fn release(&mut self, slot: usize, length: usize) {
        if length > KEPT_BYTES_MAX
            && let Some(range) = self.layout.range(slot, length)
        {
            // SAFETY: the slot is not in use; its pages read as zeros afterwards. Where the system refuses, the memory stays with
            // the slot, which costs memory and nothing else.
            let removed =
                unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::Remove, range.start, range.len()) };
            drop(removed);
        }
    }
}

/// The child's side.
#[derive(Clone)]
pub struct FrameSlotsReader {
    map: Arc<Mmap>,
    layout: SlotLayout,
}

/// One frame in shared memory, as the owner of a [`Bytes`].
struct SharedFrame {
    map: Arc<Mmap>,
    range: std::ops::Range<usize>,
}

impl AsRef<[u8]> for SharedFrame {
    fn as_ref(&self) -> &[u8] {
        self.map.get(self.range.clone()).unwrap_or_default()
    }
}

impl FrameSlotsReader {
    /// Maps slots that another process created.
    ///
    /// # Errors
    /// When the file is not sealed, is smaller than the layout, or cannot be mapped.
    pub fn map(descriptor: OwnedFd, layout: SlotLayout) -> io::Result<Self> {
        let file = File::from(descriptor);
        let invalid = |reason| io::Error::new(io::ErrorKind::InvalidData, reason);
        if !rustix::fs::fcntl_get_seals(&file)?.contains(SealFlags::SHRINK) {
            return Err(invalid("the shared memory is not sealed against shrinking"));
        }
        if file.metadata()?.len() < layout.bytes()? as u64 {
            return Err(invalid("the shared memory is smaller than its slots"));
        }
        // SAFETY: the seal above guarantees that the file never shrinks, so every page of the mapping stays valid. The agent
        // writes a slot only while this process holds no frame of it.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self { map: Arc::new(map), layout })
    }

    /// The first `length` bytes of a slot, without a copy; `None` when they lie outside of the slot.
    pub fn frame(&self, slot: usize, length: usize) -> Option<Bytes> {
        let range = self.layout.range(slot, length)?;
        Some(Bytes::from_owner(SharedFrame { map: self.map.clone(), range }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: SlotLayout = SlotLayout { slots: 3, slot_bytes: 4 << 20 };

    fn pair() -> (FrameSlots, FrameSlotsReader) {
        let slots = FrameSlots::new("test", LAYOUT).unwrap();
        let descriptor = slots.read_only_descriptor().unwrap();
        let reader = FrameSlotsReader::map(descriptor, LAYOUT).unwrap();
        (slots, reader)
    }

    #[test]
    fn frames_are_read_without_a_copy_and_never_outside_of_their_slot() {
        let (mut slots, reader) = pair();
        slots.write(1, b"frame").unwrap();
        assert_eq!(reader.frame(1, 5).unwrap().as_ref(), b"frame");
        assert!(reader.frame(3, 1).is_none() && reader.frame(usize::MAX, 1).is_none());
        assert!(reader.frame(0, LAYOUT.slot_bytes + 1).is_none() && reader.frame(0, usize::MAX).is_none());
        assert!(slots.write(0, &vec![0; LAYOUT.slot_bytes + 1]).is_err());
        assert!(slots.write(3, b"x").is_err());
    }

    #[test]
    fn the_memory_of_a_large_frame_is_given_back() {
        let (mut slots, reader) = pair();
        let frame = vec![7; 3 << 20];
        slots.write(2, &frame).unwrap();
        slots.write(0, b"small").unwrap();
        let blocks = || std::os::unix::fs::MetadataExt::blocks(&slots.file.metadata().unwrap()) * 512;
        assert!(blocks() >= 3 << 20);
        slots.release(2, frame.len());
        let blocks = std::os::unix::fs::MetadataExt::blocks(&slots.file.metadata().unwrap()) * 512;
        assert!(blocks < 1 << 20, "{blocks} bytes are left");
        assert_eq!(reader.frame(0, 5).unwrap().as_ref(), b"small");
    }

    #[test]
    fn memory_that_is_not_sealed_or_too_small_is_refused() {
        let loose = anonymous_file("loose").unwrap();
        loose.set_len(64).unwrap();
        let layout = SlotLayout { slots: 1, slot_bytes: 64 };
        assert!(FrameSlotsReader::map(loose.into(), layout).is_err());
        let small = FrameSlots::new("small", layout).unwrap();
        let descriptor = small.read_only_descriptor().unwrap();
        assert!(FrameSlotsReader::map(descriptor, SlotLayout { slots: 2, ..layout }).is_err());
        assert!(FrameSlots::new("none", SlotLayout { slots: 0, slot_bytes: 1 }).is_err());
        assert!(FrameSlots::new("overflow", SlotLayout { slots: usize::MAX, slot_bytes: 2 }).is_err());
    }

    #[test]
    fn the_child_cannot_map_it_writable() {
        let (slots, _) = pair();
        let descriptor = File::from(slots.read_only_descriptor().unwrap());
        // SAFETY: the call fails; nothing is mapped.
        assert!(unsafe { MmapMut::map_mut(&descriptor) }.is_err());
        assert!(std::os::unix::fs::FileExt::write_at(&descriptor, b"x", 0).is_err());
    }
}
