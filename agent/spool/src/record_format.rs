//! The bytes of a segment.
//!
//! ```text
//! segment   "LSSEG01\n" frame frame ...
//!
//! frame      0  4   "LSR1", so that the next frame is found behind a damaged one
//!            4  4   length of everything from byte 12 on
//!            8  4   CRC-32C (Castagnoli) of bytes 4 to 8 and of everything from byte 12 on
//!           12  8   position in the partition
//!           20  8   when it was appended, in milliseconds of the spool's own clock
//!           28  4   time to live in seconds; 0 is for ever
//!           32  2   length of the topic
//!           34  -   topic (UTF-8), then payload
//! ```
//!
//! Numbers are little-endian. A frame is taken when its checksum is right and its position is higher than the last one
//! taken; everything else is passed over byte by byte up to the next frame that is right. So a flipped bit costs one
//! record, and a torn end costs what was never synced.

use bytes::Bytes;

use super::{Record, RecordId, RecordKind};

/// What a segment begins with.
pub(super) const HEADER: &[u8; 8] = b"LSSEG01\n";
const MARKER: &[u8; 4] = b"LSR1";
/// Bytes of a frame before its topic.
const HEAD_BYTES: usize = 34;
/// Bytes before what the length counts.
const PREFIX_BYTES: usize = 12;

/// Bytes that a record takes in a segment.
pub(super) fn size(record: &Record) -> u64 {
    (HEAD_BYTES + record.topic.len() + record.payload.len()) as u64
}

/// Appends a record's frame to `out`.
pub(super) fn encode(record: &Record, out: &mut Vec<u8>) {
    let begin = out.len();
    let length = HEAD_BYTES - PREFIX_BYTES + record.topic.len() + record.payload.len();
    out.extend_from_slice(MARKER);
    // Records and topics are bounded long before they reach these limits.
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&record.place.position.to_le_bytes());
    out.extend_from_slice(&record.created_ms.to_le_bytes());
    out.extend_from_slice(&record.ttl_seconds.to_le_bytes());
    out.extend_from_slice(&u16::try_from(record.topic.len()).unwrap_or(u16::MAX).to_le_bytes());
    out.extend_from_slice(record.topic.as_bytes());
    out.extend_from_slice(&record.payload);
    let checksum = checksum(&out[begin..]);
    out[begin + 8..begin + PREFIX_BYTES].copy_from_slice(&checksum.to_le_bytes());
}

fn checksum(frame: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&frame[4..8]), &frame[PREFIX_BYTES..])
}

/// What a segment holds.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Its records, in the order of their positions. Their payloads are parts of the bytes that were scanned.
    pub(super) records: Vec<Record>,
    /// Whether something in it was no record.
    pub(super) is_damaged: bool,
}

/// Reads a segment's bytes.
pub(super) fn scan(kind: RecordKind, bytes: &Bytes) -> Scan {
    let mut found = Scan::default();
    let mut at = match bytes.starts_with(HEADER) {
        true => HEADER.len(),
        false => {
            found.is_damaged = !bytes.is_empty();
            0
        }
    };
    let mut last = None;
    while at < bytes.len() {
        match decode(kind, bytes, at) {
            Some((record, end)) if last.is_none_or(|last| record.place.position > last) => {
                last = Some(record.place.position);
                found.records.push(record);
                at = end;
            }
            _ => {
                found.is_damaged = true;
                at = match bytes[at + 1..].windows(MARKER.len()).position(|window| window == MARKER) {
                    Some(ahead) => at + 1 + ahead,
                    None => bytes.len(),
                };
            }
        }
    }
    found
}

/// The record at an offset and where it ends, if there is one.
fn decode(kind: RecordKind, bytes: &Bytes, at: usize) -> Option<(Record, usize)> {
    let rest = &bytes[at..];
    let number = |from: usize| Some(u32::from_le_bytes(rest.get(from..from + 4)?.try_into().ok()?));
    let wide = |from: usize| Some(u64::from_le_bytes(rest.get(from..from + 8)?.try_into().ok()?));
    if rest.get(..4)? != MARKER {
        return None;
    }
    let end = PREFIX_BYTES.checked_add(number(4)? as usize)?;
    let frame = rest.get(..end).filter(|_| end >= HEAD_BYTES)?;
    if checksum(frame) != number(8)? {
        return None;
    }
    let topic_end = HEAD_BYTES + usize::from(u16::from_le_bytes([frame[32], frame[33]]));
    let topic = std::str::from_utf8(frame.get(HEAD_BYTES..topic_end)?).ok()?;
    let record = Record {
        place: RecordId { kind, position: wide(12)? },
        created_ms: wide(20)?,
        ttl_seconds: number(28)?,
        topic: topic.into(),
        payload: bytes.slice(at + topic_end..at + end),
    };
    Some((record, at + end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(position: u64, payload: &str) -> Record {
        Record {
            place: RecordId { kind: RecordKind::Result, position },
            topic: "a/b".into(),
            payload: Bytes::copy_from_slice(payload.as_bytes()),
            created_ms: 7,
            ttl_seconds: 0,
        }
    }

    fn segment(records: &[Record]) -> Vec<u8> {
        let mut bytes = HEADER.to_vec();
        records.iter().for_each(|record| encode(record, &mut bytes));
        bytes
    }

    fn positions(scan: &Scan) -> Vec<u64> {
        scan.records.iter().map(|record| record.place.position).collect()
    }

    #[test]
    fn what_is_written_is_read() {
        let records = [record(5, "one"), record(6, ""), record(9, "LSR1 in a payload is no frame")];
        let found = scan(RecordKind::Result, &segment(&records).into());
        assert!(!found.is_damaged);
        assert_eq!(found.records, records);
        let bytes: u64 = records.iter().map(size).sum();
        assert_eq!(segment(&records).len() as u64, bytes + HEADER.len() as u64);
    }

    #[test]
    fn any_flipped_bit_costs_one_record_at_most_and_is_noticed() {
        let records: Vec<Record> = (1..=4).map(|position| record(position, "payload")).collect();
        let good = segment(&records);
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let found = scan(RecordKind::Result, &bytes.into());
            assert!(found.is_damaged, "bit {bit}");
            assert!(found.records.len() >= 3, "bit {bit}: {:?}", positions(&found));
            assert!(found.records.iter().all(|record| records.contains(record)), "bit {bit} made up a record");
        }
    }

    #[test]
    fn a_torn_end_and_rubbish_leave_what_came_before() {
        let records: Vec<Record> = (1..=3).map(|position| record(position, "payload")).collect();
        let good = segment(&records);
        for end in 0..good.len() {
            let found = scan(RecordKind::Result, &good[..end].to_vec().into());
            assert!(records.starts_with(&found.records), "cut at {end}");
        }
        let zeroed = [good.as_slice(), &[0; 4096]].concat();
        assert_eq!(positions(&scan(RecordKind::Result, &zeroed.into())), [1, 2, 3]);
        assert!(positions(&scan(RecordKind::Result, &vec![0xFF; 1 << 16].into())).is_empty());
        let markers = b"LSR1".repeat(1 << 14);
        assert!(positions(&scan(RecordKind::Result, &markers.into())).is_empty());
    }

    #[test]
    fn a_record_that_stands_there_twice_is_taken_once() {
        let bytes = segment(&[record(1, "a"), record(2, "b"), record(2, "b"), record(3, "c")]);
        assert_eq!(positions(&scan(RecordKind::Result, &bytes.into())), [1, 2, 3]);
    }
}
