//! A file of records, and its name. The name of a closed one says what must be known without reading the file, so that a
//! million records are there again in no time: first and last position, when the first was appended and when all have
//! expired.

/// A file of records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    /// Its file's name.
    pub(super) name: String,
    /// The position of its first record.
    pub(super) first: u64,
    /// The position of its last record.
    pub(super) last: u64,
    /// Bytes of the file.
    pub(super) bytes: u64,
    /// When its first record was appended.
    pub(super) created_ms: u64,
    /// When all of its records will have expired; `u64::MAX` is never.
    pub(super) expires_ms: u64,
    /// Records that are not done with.
    pub(super) waiting: u64,
}

/// The name of a segment that records are still appended to.
pub(super) fn open_name(first: u64) -> String {
    format!("{first:020}.open")
}

/// The name of a closed segment.
pub(super) fn closed_name(segment: &Segment) -> String {
    format!("{:020}-{:020}-{:x}-{:x}.seg", segment.first, segment.last, segment.created_ms, segment.expires_ms)
}

/// A closed segment from its name.
pub(super) fn from_name(name: &str, bytes: u64) -> Option<Segment> {
    let mut parts = name.strip_suffix(".seg")?.split('-');
    let (first, last) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let created_ms = u64::from_str_radix(parts.next()?, 16).ok()?;
    let expires_ms = u64::from_str_radix(parts.next()?, 16).ok()?;
    let is_one = parts.next().is_none() && first <= last && last < u64::MAX / 2;
    is_one.then(|| Segment { name: name.to_owned(), first, last, bytes, created_ms, expires_ms, waiting: 0 })
}
