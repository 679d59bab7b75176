//! The fuzz target of the spool: files as an earlier process or a fault of the disk left them.
//!
//! The input describes up to eight files. Each begins with a byte that selects partition, kind of name and whether checksums
//! are corrected, so that damage is not only found by its checksum, and the numbers of the name follow.

use bytes::Bytes;
use lineside_fuzz::FuzzTarget;
use lineside_spool::simulation::{DrivenSpool, options};
use lineside_spool::{DropReason, RecordKind};

/// The targets of this file.
pub(crate) const TARGETS: &[FuzzTarget] = &[FuzzTarget { name: "spool", run: run_spool, seeds }];

const FILES_MAX: usize = 8;
/// Bit of the first byte of a file: checksums are corrected.
const CORRECTED: u8 = 0x80;

/// Splits the input into named files.
fn files(mut input: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    while let (Some((selector, rest)), true) = (input.split_first(), files.len() < FILES_MAX) {
        let folder = RecordKind::ALL[usize::from(selector % 3)].name();
        let (numbers, rest) = take(rest, [0, 8, 32, 20][usize::from(selector / 3 % 4)]);
        let number = |index: usize| {
            let bytes = numbers.get(index * 8..index * 8 + 8).unwrap_or_default();
            u64::from_le_bytes(bytes.try_into().unwrap_or_default())
        };
        let name = match selector / 3 % 4 {
            0 => "cursor".to_owned(),
            1 => format!("{:020}.open", number(0)),
            2 => format!("{:020}-{:020}-{:x}-{:x}.seg", number(0), number(1), number(2), number(3)),
            _ => String::from_utf8_lossy(numbers).replace('/', ""),
        };
        let (length, rest) = take(rest, 2);
        let length = usize::from(u16::from_le_bytes(length.try_into().unwrap_or_default()));
        let (content, rest) = take(rest, length);
        let mut content = content.to_vec();
        if selector & CORRECTED != 0 {
            correct_records(&mut content);
            correct_cursor(&mut content);
        }
        files.push((format!("{folder}/{name}"), content));
        input = rest;
    }
    files
}

fn take(bytes: &[u8], count: usize) -> (&[u8], &[u8]) {
    bytes.split_at(count.min(bytes.len()))
}

/// Corrects the checksums of everything that looks like a record (see `record_format.rs` of the spool).
fn correct_records(content: &mut [u8]) {
    let mut at = 0;
    while let Some(found) = content.get(at..).and_then(|rest| rest.windows(4).position(|window| window == b"LSR1")) {
        at += found;
        let length =
            content.get(at + 4..at + 8).map_or(0, |bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
        let end = at.saturating_add(12).saturating_add(length as usize);
        if let Some(record) = content.get_mut(at..end) {
            let checksum = crc32c(crc32c(0, &record[4..8]), &record[12..]);
            record[8..12].copy_from_slice(&checksum.to_le_bytes());
        }
        at += 4;
    }
}

/// Corrects the checksums of the slots of a cursor (see `cursor.rs` of the spool).
fn correct_cursor(content: &mut [u8]) {
    for slot in content.chunks_mut(4096).filter(|slot| slot.starts_with(b"LSC1") && slot.len() >= 44) {
        let count = u32::from_le_bytes([slot[36], slot[37], slot[38], slot[39]]) as usize;
        let end = count.saturating_mul(16).saturating_add(40);
        if end.saturating_add(4) <= slot.len() {
            let checksum = crc32c(0, &slot[..end]);
            slot[end..end + 4].copy_from_slice(&checksum.to_le_bytes());
        }
    }
}

/// CRC-32C (Castagnoli), bit by bit, so that the spool's implementation is not checked against itself.
fn crc32c(checksum: u32, bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!checksum, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82F6_3B78 & (crc & 1).wrapping_neg()))
    })
}

/// Opens the spool, takes everything, and continues to use it. Each record is delivered or counted, never both.
fn run_spool(input: &[u8]) {
    let files = files(input);
    let mut driven =
        DrivenSpool::recover(files.iter().map(|(path, content)| (path.as_str(), content.as_slice())), options(1 << 40));
    let pending = driven.spool.stats().records;
    let mut taken = driven.drain();
    let delivered = taken.len() as u64;
    taken.sort_by_key(|record| record.id);
    taken.dedup_by_key(|record| record.id);
    assert_eq!(taken.len() as u64, delivered, "no record is delivered twice");
    assert_eq!(delivered + driven.dropped_total(), pending, "each record is delivered or counted as dropped");
    assert_eq!(driven.spool.stats().records, 0);
    driven.append(RecordKind::Result, Bytes::from_static(b"new"), 0);
    assert_eq!(driven.drain().iter().map(|record| &record.payload[..]).collect::<Vec<_>>(), [b"new"]);
    let driven = driven.restart();
    assert_eq!(driven.spool.stats().records, 0, "acknowledged records do not return");
    assert_eq!(driven.dropped(DropReason::Full), 0);
}

fn seeds() -> Vec<Vec<u8>> {
    let open = |kind: u8, first: u64, content: &[u8]| file(kind + 3, &first.to_le_bytes(), content);
    let closed =
        |kind: u8, numbers: [u64; 4], content: &[u8]| file(kind + 6, &numbers.map(u64::to_le_bytes).concat(), content);
    let records = |positions: std::ops::RangeInclusive<u64>, ttl: u32| {
        positions
            .fold(b"LSSEG01\n".to_vec(), |bytes, position| [bytes, record(position, 1000 + position, ttl)].concat())
    };
    let cursor = cursor([4, 2000, 9, 3], &[(5, 6)]);
    let whole =
        [file(0, &[], &cursor), closed(0, [3, 6, 1003, u64::MAX], &records(3..=6, 0)), open(0, 7, &records(7..=9, 0))];
    vec![
        whole.concat(),
        open(1, 1, &records(1..=4, 60)),
        open(2, 1, &[]),
        [open(0, 1, &records(1..=5, 0)), open(0, 3, &records(3..=8, 0))].concat(),
        closed(0, [1, 1 << 40, 0, u64::MAX], b""),
        closed(1, [0, u64::MAX, 0, 0], b"LSSEG01\n"),
        file(9, b"README.txt..........", b"text"),
        open(0, u64::MAX, &record(u64::MAX, u64::MAX, u32::MAX)),
        file(0, &[], &self::cursor([u64::MAX; 4], &[(0, u64::MAX)])),
    ]
}

/// A file of an input, with corrected checksums.
fn file(selector: u8, numbers: &[u8], content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).unwrap_or(u16::MAX).to_le_bytes();
    [&[selector + 3 * 4 * 11][..], numbers, &length, content].concat()
}

fn record(position: u64, created_ms: u64, ttl_seconds: u32) -> Vec<u8> {
    let body =
        [&position.to_le_bytes()[..], &created_ms.to_le_bytes(), &ttl_seconds.to_le_bytes(), &[1, 0], b"tpayload"]
            .concat();
    let length = u32::try_from(body.len()).unwrap_or_default().to_le_bytes();
    [&b"LSR1"[..], &length, &[0; 4], &body].concat()
}

fn cursor([generation, clock_ms, next, floor]: [u64; 4], ranges: &[(u64, u64)]) -> Vec<u8> {
    let numbers = [generation, clock_ms, next, floor].map(u64::to_le_bytes).concat();
    let count = u32::try_from(ranges.len()).unwrap_or_default().to_le_bytes();
    let ranges: Vec<u8> =
        ranges.iter().flat_map(|(first, last)| [first.to_le_bytes(), last.to_le_bytes()].concat()).collect();
    [&b"LSC1"[..], &numbers, &count, &ranges, &[0; 4]].concat()
}
