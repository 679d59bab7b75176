//! Where a JPEG ends, found by walking its markers (ITU-T T.81, annex B).
//!
//! Two callers need this. A decoder that meets a cut-off file fills the rest with grey and says nothing, so a truncated
//! frame has to be refused before it; and a recorded MJPEG file is nothing but JPEGs one after the other.
//!
//! A thumbnail inside an APPn segment carries an end marker of its own. Segments are therefore skipped by their length,
//! and only entropy-coded data is searched byte by byte: in there `FF 00` is a stuffed byte, `FF D0` to `FF D7` restart
//! the decoder, and any other marker ends the scan.

const SOI: u8 = 0xD8;
const EOI: u8 = 0xD9;
const SOS: u8 = 0xDA;

/// What the bytes hold, seen from their start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// One whole JPEG takes this many bytes.
    Complete(usize),
    /// It begins as a JPEG, and the bytes run out before its end marker.
    Truncated,
    /// It does not begin as a JPEG, or its markers make no sense.
    NotJpeg,
}

/// Finds where the JPEG at the start of `bytes` ends.
pub fn extent(bytes: &[u8]) -> Extent {
    match bytes {
        [0xFF, SOI, ..] => {}
        [] | [0xFF] => return Extent::Truncated,
        _ => return Extent::NotJpeg,
    }
    let mut at = 2;
    loop {
        let Some((marker, after)) = marker_at(bytes, at) else {
            return if at < bytes.len() && bytes[at] != 0xFF { Extent::NotJpeg } else { Extent::Truncated };
        };
        at = after;
        match marker {
            EOI => return Extent::Complete(at),
            // Markers that stand alone: TEM, RSTn, and a second SOI, which some cameras write.
            0x01 | 0xD0..=0xD8 => {}
            _ => {
                let Some(length) = bytes.get(at..at + 2) else { return Extent::Truncated };
                let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
                if length < 2 {
                    return Extent::NotJpeg;
                }
                at += length;
                if marker == SOS {
                    match end_of_scan(bytes, at) {
                        Some(next) => at = next,
                        None => return Extent::Truncated,
                    }
                }
            }
        }
    }
}

/// The marker at `at`, past any fill bytes, and the offset behind it.
fn marker_at(bytes: &[u8], at: usize) -> Option<(u8, usize)> {
    if bytes.get(at) != Some(&0xFF) {
        return None;
    }
    let fill = bytes[at..].iter().take_while(|byte| **byte == 0xFF).count();
    let code = *bytes.get(at + fill)?;
    Some((code, at + fill + 1))
}

/// The offset of the marker that ends the entropy-coded data starting at `from`.
fn end_of_scan(bytes: &[u8], from: usize) -> Option<usize> {
    let mut at = from;
    loop {
        at += bytes.get(at..)?.iter().position(|byte| *byte == 0xFF)?;
        match bytes.get(at + 1)? {
            0x00 | 0xD0..=0xD7 => at += 2,
            0xFF => at += 1,
            _ => return Some(at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SOI, an APP1 segment that hides an end marker, a scan with a stuffed byte and a restart, EOI.
    const SAMPLE: [u8; 24] = [
        0xFF, 0xD8, 0xFF, 0xE1, 0x00, 0x06, 0xFF, 0xD8, 0xFF, 0xD9, 0xFF, 0xDA, 0x00, 0x03, 0x01, 0x12, 0xFF, 0x00,
        0xFF, 0xD3, 0x34, 0xFF, 0xFF, 0xD9,
    ];

    #[test]
    fn the_end_is_found_behind_thumbnails_and_stuffed_bytes() {
        assert_eq!(extent(&SAMPLE), Extent::Complete(SAMPLE.len()));
        let two = [SAMPLE, SAMPLE].concat();
        assert_eq!(extent(&two), Extent::Complete(SAMPLE.len()));
    }

    #[test]
    fn every_proper_prefix_is_truncated() {
        for cut in 0..SAMPLE.len() {
            assert_eq!(extent(&SAMPLE[..cut]), Extent::Truncated, "cut at {cut}");
        }
    }

    #[test]
    fn what_is_no_jpeg_is_named_so() {
        assert_eq!(extent(b"GIF89a"), Extent::NotJpeg);
        assert_eq!(extent(&[0xFF, 0xD8, 0x12, 0x34]), Extent::NotJpeg);
        assert_eq!(extent(&[0xFF, 0xD8, 0xFF, 0xE0, 0x00, 0x00]), Extent::NotJpeg);
    }
}
