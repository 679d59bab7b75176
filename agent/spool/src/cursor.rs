//! The cursor: the file `cursor` of a partition, which stores the positions that are completed.
//!
//! ```text
//! two slots of 4096 bytes, written alternately; the valid slot with the higher generation is current
//!
//! slot    0  4   "LSC1"
//!         4  8   generation
//!        12  8   clock of the spool in milliseconds
//!        20  8   next position to assign
//!        28  8   floor: every position below it is completed
//!        36  4   number of ranges of further completed positions, in ascending order
//!        40  -   the ranges: first and last position, 8 bytes each
//!         -  4   CRC-32C of all bytes before
//! ```
//!
//! Numbers are little-endian. A slot is valid when its checksum is correct, its numbers are in range, and no completed position is
//! one that is still to be assigned. The writer writes the cursor after every change and does not sync it, so the cursor survives the
//! end of the process at once and a power cut within seconds. An outdated cursor only causes the spool to send delivered
//! records again, which consumers recognise by their id. When there are more ranges than fit, the highest are omitted, with
//! the same effect.

use crate::position_set::PositionSet;
use crate::record::{POSITION_MAX, TIME_MS_MAX};

/// Size of a slot in bytes.
pub(crate) const SLOT_BYTES: usize = 4096;
const MAGIC: &[u8; 4] = b"LSC1";
const HEADER_BYTES: usize = 40;
const RANGES_MAX: usize = (SLOT_BYTES - HEADER_BYTES - 4) / 16;

/// The durable state of a partition besides its records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Cursor {
    /// Incremented with every write.
    pub(crate) generation: u64,
    /// The clock of the spool, in milliseconds.
    pub(crate) clock_ms: u64,
    /// The next position to assign.
    pub(crate) next: u64,
    /// Every position below it is completed.
    pub(crate) floor: u64,
    /// Further completed positions.
    pub(crate) completed: PositionSet,
}

impl Cursor {
    /// The offset of the slot for this generation.
    pub(crate) fn offset(&self) -> u64 {
        self.generation % 2 * SLOT_BYTES as u64
    }

    /// Encodes a slot, without padding.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let ranges: Vec<(u64, u64)> = self.completed.ranges().take(RANGES_MAX).collect();
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

    /// Decodes the newer valid slot of a file. `None` when neither slot is valid.
    pub(crate) fn read(file: &[u8]) -> Option<Self> {
        let slots = file.chunks(SLOT_BYTES).take(2).filter_map(Self::decode);
        slots.max_by_key(|cursor| cursor.generation)
    }

    fn decode(slot: &[u8]) -> Option<Self> {
        let read_u32 = |from: usize| Some(u32::from_le_bytes(slot.get(from..from + 4)?.try_into().ok()?));
        let read_u64 = |from: usize| Some(u64::from_le_bytes(slot.get(from..from + 8)?.try_into().ok()?));
        let count = usize::try_from(read_u32(36)?).ok().filter(|count| *count <= RANGES_MAX)?;
        let end = HEADER_BYTES + 16 * count;
        if slot.get(..4)? != MAGIC || crc32c::crc32c(slot.get(..end)?) != read_u32(end)? {
            return None;
        }
        let mut completed = PositionSet::default();
        let mut highest = 0;
        for at in (HEADER_BYTES..end).step_by(16) {
            completed.insert(read_u64(at)?..=read_u64(at + 8)?);
            highest = read_u64(at + 8)?.max(highest);
        }
        let cursor = Self {
            generation: read_u64(4)?,
            clock_ms: read_u64(12)?,
            next: read_u64(20)?,
            floor: read_u64(28)?,
            completed,
        };
        let is_valid = cursor.generation < u64::MAX
            && cursor.clock_ms <= TIME_MS_MAX
            && cursor.next <= POSITION_MAX + 1
            && cursor.floor <= cursor.next
            && (count == 0 || highest < cursor.next);
        is_valid.then_some(cursor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cursor(generation: u64, ranges: u64) -> Cursor {
        let mut completed = PositionSet::default();
        (0..ranges).for_each(|index| completed.insert(100 + 3 * index..=101 + 3 * index));
        Cursor { generation, clock_ms: 5, next: 1000, floor: 90, completed }
    }

    #[test]
    fn the_format_is_stable() {
        let hex: String = cursor(3, 1).encode().iter().map(|byte| format!("{byte:02x}")).collect();
        let marker_generation_clock = "4c53433103000000000000000500000000000000";
        let next_floor = "e8030000000000005a00000000000000";
        let one_range_and_checksum = "010000006400000000000000650000000000000016fd3ff7";
        assert_eq!(hex, [marker_generation_clock, next_floor, one_range_and_checksum].concat());
    }

    #[test]
    fn the_newer_valid_slot_is_read() {
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
    fn numbers_out_of_range_make_a_slot_invalid() {
        assert!(Cursor::read(&cursor(3, 1).encode()).is_some());
        for invalid in [
            Cursor { generation: u64::MAX, ..cursor(3, 1) },
            Cursor { clock_ms: u64::MAX, ..cursor(3, 1) },
            Cursor { next: u64::MAX, ..cursor(3, 1) },
            Cursor { floor: 1001, ..cursor(3, 1) },
            Cursor { next: 100, ..cursor(3, 1) },
        ] {
            assert_eq!(Cursor::read(&invalid.encode()), None, "{invalid:?}");
        }
    }

    #[test]
    fn ranges_that_do_not_fit_are_omitted_from_the_highest() {
        let many = cursor(1, 1000);
        let bytes = many.encode();
        assert!(bytes.len() <= SLOT_BYTES);
        let read = Cursor::read(&bytes).unwrap();
        assert_eq!(
            read.completed.ranges().collect::<Vec<_>>(),
            many.completed.ranges().take(RANGES_MAX).collect::<Vec<_>>()
        );
    }
}
