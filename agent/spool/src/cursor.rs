//! What was delivered, in one small file for each partition, `cursor`.
//!
//! ```text
//! two slots of 4096 bytes, written in turn; the one that is whole and has the higher generation counts
//!
//! slot    0  4   "LSC1"
//!         4  8   generation
//!        12  8   the spool's clock in milliseconds
//!        20  8   the position the next record will get
//!        28  8   every position below this one is done with
//!        36  4   number of ranges of further positions that are done with, lowest first
//!        40  -   the ranges: first and last position, 8 bytes each
//!         -  4   CRC-32C of everything before
//! ```
//!
//! It is written after every change and left to the system to bring to the disk, so it outlasts the process at once and a
//! power cut within seconds. An older one only makes the spool send again what was delivered, which consumers know by its
//! id. Where there are more ranges than fit, the highest are left out, with the same effect.

use super::ranges::Ranges;

/// Bytes of a slot.
pub(super) const SLOT_BYTES: usize = 4096;
const MAGIC: &[u8; 4] = b"LSC1";
const HEAD_BYTES: usize = 40;
const RANGES_MAX: usize = (SLOT_BYTES - HEAD_BYTES - 4) / 16;

/// What is remembered of a partition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Cursor {
    /// Grows with every write.
    pub(super) generation: u64,
    /// The spool's clock.
    pub(super) clock_ms: u64,
    /// The position the next record will get.
    pub(super) next: u64,
    /// Every position below is done with.
    pub(super) floor: u64,
    /// Further positions that are done with.
    pub(super) done: Ranges,
}

impl Cursor {
    /// The offset of the slot that this generation belongs into.
    pub(super) fn offset(&self) -> u64 {
        self.generation % 2 * SLOT_BYTES as u64
    }

    /// The bytes of a slot; only as many as are needed.
    pub(super) fn encode(&self) -> Vec<u8> {
        let ranges: Vec<(u64, u64)> = self.done.iter().take(RANGES_MAX).collect();
        let mut bytes = MAGIC.to_vec();
        [self.generation, self.clock_ms, self.next, self.floor]
            .iter()
            .for_each(|number| bytes.extend_from_slice(&number.to_le_bytes()));
        bytes.extend_from_slice(&(ranges.len() as u32).to_le_bytes());
        for (first, last) in ranges {
            bytes.extend_from_slice(&first.to_le_bytes());
            bytes.extend_from_slice(&last.to_le_bytes());
        }
        let checksum = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The newer of the two slots of a file; none, where neither is whole.
    pub(super) fn read(file: &[u8]) -> Option<Self> {
        let slots = file.chunks(SLOT_BYTES).take(2).filter_map(Self::decode);
        slots.max_by_key(|cursor| cursor.generation)
    }

    fn decode(slot: &[u8]) -> Option<Self> {
        let number = |from: usize| Some(u32::from_le_bytes(slot.get(from..from + 4)?.try_into().ok()?));
        let wide = |from: usize| Some(u64::from_le_bytes(slot.get(from..from + 8)?.try_into().ok()?));
        let count = usize::try_from(number(36)?).ok().filter(|count| *count <= RANGES_MAX)?;
        let end = HEAD_BYTES + 16 * count;
        if slot.get(..4)? != MAGIC || crc32c::crc32c(slot.get(..end)?) != number(end)? {
            return None;
        }
        let mut done = Ranges::default();
        for at in (HEAD_BYTES..end).step_by(16) {
            done.insert(wide(at)?..=wide(at + 8)?);
        }
        Some(Self { generation: wide(4)?, clock_ms: wide(12)?, next: wide(20)?, floor: wide(28)?, done })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cursor(generation: u64, ranges: u64) -> Cursor {
        let mut done = Ranges::default();
        (0..ranges).for_each(|index| done.insert(100 + 3 * index..=101 + 3 * index));
        Cursor { generation, clock_ms: 5, next: 1000, floor: 90, done }
    }

    #[test]
    fn the_newer_whole_slot_counts() {
        let mut file = vec![0; 2 * SLOT_BYTES];
        assert_eq!(Cursor::read(&file), None);
        for generation in 1..=5 {
            let cursor = cursor(generation, generation);
            let (bytes, at) = (cursor.encode(), cursor.offset() as usize);
            file[at..at + bytes.len()].copy_from_slice(&bytes);
            assert_eq!(Cursor::read(&file), Some(cursor));
        }
        let newest = cursor(5, 5).offset() as usize;
        for bit in 0..cursor(5, 5).encode().len() * 8 {
            let mut damaged = file.clone();
            damaged[newest + bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Cursor::read(&damaged), Some(cursor(4, 4)), "bit {bit}");
        }
        for end in 0..file.len() {
            assert!(Cursor::read(&file[..end]).is_none_or(|found| found.generation >= 4));
        }
    }

    #[test]
    fn more_ranges_than_fit_leave_the_highest_out() {
        let many = cursor(1, 1000);
        let bytes = many.encode();
        assert!(bytes.len() <= SLOT_BYTES);
        let read = Cursor::read(&bytes).unwrap();
        assert_eq!(read.done.iter().collect::<Vec<_>>(), many.done.iter().take(RANGES_MAX).collect::<Vec<_>>());
    }
}
