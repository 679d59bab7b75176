//! The format of a segment.
//!
//! ```text
//! segment   "LSSEG01\n" record record ...
//!
//! record     0  4   "LSR1", a marker to find the next record after damaged bytes
//!            4  4   length of everything from byte 12 on
//!            8  4   CRC-32C (Castagnoli) of bytes 4 to 8 and of everything from byte 12 on
//!           12  8   position in the partition
//!           20  8   when the record was appended, in milliseconds of the clock of the spool
//!           28  4   time to live in seconds; 0: no limit
//!           32  2   length of the topic
//!           34  -   topic (UTF-8), then payload
//! ```
//!
//! Numbers are little-endian. A record is valid when its checksum is correct, its position and time are in range, and its
//! position is higher than the previous valid one. The scan skips everything else, byte by byte, up to the next valid record. So a flipped bit costs one record,
//! and a torn end costs only what was never synced.

use bytes::Bytes;

use crate::record::{POSITION_MAX, Record, RecordId, RecordKind, TIME_MS_MAX};

/// The first bytes of a segment.
pub(crate) const HEADER: &[u8; 8] = b"LSSEG01\n";
const MARKER: &[u8; 4] = b"LSR1";
/// Bytes of an encoded record before its topic.
const HEADER_BYTES: usize = 34;
/// Bytes that the length does not count.
const PREFIX_BYTES: usize = 12;

/// Size of an encoded record in bytes.
pub(crate) fn size(record: &Record) -> u64 {
    (HEADER_BYTES + record.topic.len() + record.payload.len()) as u64
}

/// Appends an encoded record to `out`.
pub(crate) fn encode(record: &Record, out: &mut Vec<u8>) {
    let start = out.len();
    let length = HEADER_BYTES - PREFIX_BYTES + record.topic.len() + record.payload.len();
    out.extend_from_slice(MARKER);
    // `RECORD_BYTES_MAX` and `TOPIC_BYTES_MAX` keep both lengths below these limits.
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&record.id.position.to_le_bytes());
    out.extend_from_slice(&record.created_ms.to_le_bytes());
    out.extend_from_slice(&record.ttl_seconds.to_le_bytes());
    out.extend_from_slice(&u16::try_from(record.topic.len()).unwrap_or(u16::MAX).to_le_bytes());
    out.extend_from_slice(record.topic.as_bytes());
    out.extend_from_slice(&record.payload);
    let checksum = checksum(&out[start..]);
    out[start + 8..start + PREFIX_BYTES].copy_from_slice(&checksum.to_le_bytes());
}

fn checksum(encoded: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&encoded[4..8]), &encoded[PREFIX_BYTES..])
}

/// The contents of a segment.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    /// The valid records in ascending order of position. Their payloads share memory with the scanned bytes.
    pub(crate) records: Vec<Record>,
    /// Whether the segment contains bytes that are not a valid record.
    pub(crate) is_damaged: bool,
}

/// Decodes a segment.
pub(crate) fn scan(kind: RecordKind, bytes: &Bytes) -> Scan {
    let mut found = Scan::default();
    let mut at = if bytes.starts_with(HEADER) {
        HEADER.len()
    } else {
        found.is_damaged = !bytes.is_empty();
        0
    };
    let mut last = None;
    while at < bytes.len() {
        match decode(kind, bytes, at) {
            Some((record, end)) if last.is_none_or(|last| record.id.position > last) => {
                last = Some(record.id.position);
                found.records.push(record);
                at = end;
            }
            _ => {
                found.is_damaged = true;
                at = match bytes[at + 1..].windows(MARKER.len()).position(|window| window == MARKER) {
                    Some(distance) => at + 1 + distance,
                    None => bytes.len(),
                };
            }
        }
    }
    found
}

/// Decodes the record at an offset. Returns the record and the offset of its end, or `None` when it is not valid.
fn decode(kind: RecordKind, bytes: &Bytes, at: usize) -> Option<(Record, usize)> {
    let rest = &bytes[at..];
    let read_u32 = |from: usize| Some(u32::from_le_bytes(rest.get(from..from + 4)?.try_into().ok()?));
    let read_u64 = |from: usize| Some(u64::from_le_bytes(rest.get(from..from + 8)?.try_into().ok()?));
    if rest.get(..4)? != MARKER {
        return None;
    }
    let end = PREFIX_BYTES.checked_add(read_u32(4)? as usize)?;
    let encoded = rest.get(..end).filter(|_| end >= HEADER_BYTES)?;
    if checksum(encoded) != read_u32(8)? {
        return None;
    }
    let topic_end = HEADER_BYTES + usize::from(u16::from_le_bytes([encoded[32], encoded[33]]));
    let topic = std::str::from_utf8(encoded.get(HEADER_BYTES..topic_end)?).ok()?;
    let record = Record {
        id: RecordId { kind, position: read_u64(12)? },
        created_ms: read_u64(20)?,
        ttl_seconds: read_u32(28)?,
        topic: topic.into(),
        payload: bytes.slice(at + topic_end..at + end),
    };
    let is_in_range = record.id.position <= POSITION_MAX && record.created_ms <= TIME_MS_MAX;
    is_in_range.then_some((record, at + end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(position: u64, payload: &str) -> Record {
        Record {
            id: RecordId { kind: RecordKind::Result, position },
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
        scan.records.iter().map(|record| record.id.position).collect()
    }

    #[test]
    fn encoded_records_are_decoded() {
        let records = [record(5, "one"), record(6, ""), record(9, "LSR1 in a payload is not a record")];
        let found = scan(RecordKind::Result, &segment(&records).into());
        assert!(!found.is_damaged);
        assert_eq!(found.records, records);
        let bytes: u64 = records.iter().map(size).sum();
        assert_eq!(segment(&records).len() as u64, bytes + HEADER.len() as u64);
    }

    #[test]
    fn the_format_is_stable() {
        let hex: String = segment(&[record(5, "one")]).iter().map(|byte| format!("{byte:02x}")).collect();
        let header_and_marker = "4c5353454730310a4c535231";
        let length_and_checksum = "1c00000053f6f0a5";
        let position_created_ttl = "0500000000000000070000000000000000000000";
        let topic_and_payload = "0300612f626f6e65";
        assert_eq!(hex, [header_and_marker, length_and_checksum, position_created_ttl, topic_and_payload].concat());
    }

    #[test]
    fn a_flipped_bit_costs_at_most_one_record_and_is_detected() {
        let records: Vec<Record> = (1..=4).map(|position| record(position, "payload")).collect();
        let good = segment(&records);
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let found = scan(RecordKind::Result, &bytes.into());
            assert!(found.is_damaged, "bit {bit}");
            assert!(found.records.len() >= 3, "bit {bit}: {:?}", positions(&found));
            assert!(
                found.records.iter().all(|record| records.contains(record)),
                "bit {bit} produced a record that was not encoded"
            );
        }
    }

    #[test]
    fn a_torn_end_leaves_the_records_before_it() {
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
    fn a_position_or_time_out_of_range_is_damage() {
        let late = Record { created_ms: TIME_MS_MAX + 1, ..record(3, "late") };
        let found =
            scan(RecordKind::Result, &segment(&[record(1, "a"), record(u64::MAX, "far"), late, record(4, "d")]).into());
        assert_eq!((positions(&found), found.is_damaged), (vec![1, 4], true));
    }

    #[test]
    fn a_repeated_record_is_decoded_once() {
        let bytes = segment(&[record(1, "a"), record(2, "b"), record(2, "b"), record(3, "c")]);
        assert_eq!(positions(&scan(RecordKind::Result, &bytes.into())), [1, 2, 3]);
    }
}
