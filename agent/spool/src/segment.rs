//! Segments, the files that hold the records of a partition, and their names.
//!
//! The name of a closed segment carries what is needed without reading the file: first and last position, when the first
//! record was appended, and when all records have expired. So a spool of a million records opens by reading names only.

use crate::record::{POSITION_MAX, TIME_MS_MAX};

/// A segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    /// The name of the file.
    pub(crate) name: String,
    /// The position of the first record.
    pub(crate) first: u64,
    /// The position of the last record.
    pub(crate) last: u64,
    /// Size of the file in bytes.
    pub(crate) bytes: u64,
    /// When the first record was appended, in milliseconds.
    pub(crate) created_ms: u64,
    /// When all records have expired, in milliseconds; `u64::MAX`: never.
    pub(crate) expires_ms: u64,
    /// Number of records that are not completed.
    pub(crate) pending: u64,
}

/// The name of a segment that is open for appending.
pub(crate) fn open_name(first: u64) -> String {
    format!("{first:020}.open")
}

/// The first position of an open segment, from its name.
pub(crate) fn first_of_open(name: &str) -> Option<u64> {
    name.strip_suffix(".open")?.parse().ok().filter(|first| *first <= POSITION_MAX)
}

/// The name of a closed segment.
pub(crate) fn closed_name(segment: &Segment) -> String {
    format!("{:020}-{:020}-{:x}-{:x}.seg", segment.first, segment.last, segment.created_ms, segment.expires_ms)
}

/// A closed segment, from its name. `None` for any other file.
pub(crate) fn from_name(name: &str, bytes: u64) -> Option<Segment> {
    let mut parts = name.strip_suffix(".seg")?.split('-');
    let (first, last) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let created_ms = u64::from_str_radix(parts.next()?, 16).ok().filter(|created_ms| *created_ms <= TIME_MS_MAX)?;
    let expires_ms = u64::from_str_radix(parts.next()?, 16).ok()?;
    let is_valid = parts.next().is_none() && first <= last && last <= POSITION_MAX;
    is_valid.then(|| Segment { name: name.to_owned(), first, last, bytes, created_ms, expires_ms, pending: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_carry_the_facts_of_a_segment() {
        let segment = Segment {
            name: String::new(),
            first: 7,
            last: 9,
            bytes: 100,
            created_ms: 0xab,
            expires_ms: u64::MAX,
            pending: 0,
        };
        let name = closed_name(&segment);
        assert_eq!(name, "00000000000000000007-00000000000000000009-ab-ffffffffffffffff.seg");
        assert_eq!(from_name(&name, 100), Some(Segment { name, ..segment }));
        assert_eq!(first_of_open(&open_name(7)), Some(7));
        assert_eq!(first_of_open(&open_name(u64::MAX)), None);
        for other in [
            "README",
            "1-2.seg",
            "9-1-0-0.seg",
            "..seg",
            "1-2-3-4-5.seg",
            "00000000000000000007.open",
            "1-18446744073709551615-0-0.seg",
            "1-2-ffffffffffffffff-0.seg",
        ] {
            assert_eq!(from_name(other, 0), None, "{other}");
        }
    }
}
