//! The header of a JPEG, and where it ends, found by walking its markers (ITU-T T.81, annex B).
//!
//! Two callers need the end. A decoder that meets a cut-off file fills the rest with grey and says nothing, so a truncated
//! frame has to be refused before it; and a recorded MJPEG file is nothing but JPEGs one after the other.
//!
//! A thumbnail inside an APPn segment carries an end marker of its own. Segments are therefore skipped by their length,
//! and only entropy-coded data is searched byte by byte: in there `FF 00` is a stuffed byte, `FF D0` to `FF D7` restart
//! the decoder, and any other marker ends the scan.

use crate::picture_header::{HeaderError, PictureFormat, PictureHeader};

const SOI: u8 = 0xD8;
const EOI: u8 = 0xD9;
const SOS: u8 = 0xDA;
/// Largest side of a minimum coded unit in pixels: a block of 8 with a sampling factor of 4.
const MCU_SIDE_MAX: u64 = 32;

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

/// A frame header (SOF), as far as it is used.
struct FrameHeader {
    width: u32,
    height: u32,
    components: u8,
    is_progressive: bool,
}

/// Reads the header of a JPEG up to its first scan.
pub(crate) fn header(bytes: &[u8]) -> Result<PictureHeader, HeaderError> {
    let mut at = 2;
    let mut frame: Option<FrameHeader> = None;
    loop {
        let Some((marker, after)) = marker_at(bytes, at) else {
            let is_marker = bytes.get(at).is_none_or(|byte| *byte == 0xFF);
            return Err(if is_marker { HeaderError::Truncated } else { HeaderError::NotAPicture });
        };
        at = after;
        match marker {
            0x01 | 0xD0..=0xD8 => continue,
            // Pixels never come, or this is not a marker.
            EOI | 0x00 => return Err(HeaderError::NotAPicture),
            _ => {}
        }
        let length = bytes.get(at..).and_then(|rest| rest.first_chunk::<2>()).ok_or(HeaderError::Truncated)?;
        let length = usize::from(u16::from_be_bytes(*length));
        if length < 2 {
            return Err(HeaderError::NotAPicture);
        }
        let segment = bytes.get(at + 2..at + length).ok_or(HeaderError::Truncated)?;
        match (marker, frame.take()) {
            (SOS, Some(frame)) => return picture_header(&frame, segment),
            // Decoders differ in which of two frame headers they use.
            (SOS, None) | (0xC0..=0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF, Some(_)) => {
                return Err(HeaderError::NotAPicture);
            }
            (0xC0..=0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF, None) => {
                frame = Some(frame_header(marker, segment)?);
            }
            (_, seen) => frame = seen,
        }
        at += length;
    }
}

fn frame_header(marker: u8, segment: &[u8]) -> Result<FrameHeader, HeaderError> {
    match segment {
        [_, h0, h1, w0, w1, components @ 1..=4, ..] => {
            let width = u32::from(u16::from_be_bytes([*w0, *w1]));
            let height = u32::from(u16::from_be_bytes([*h0, *h1]));
            // A height of 0 is stated behind the first scan (DNL), which no decoder here supports.
            if width == 0 || height == 0 {
                return Err(HeaderError::NotAPicture);
            }
            let is_progressive = !matches!(marker, 0xC0 | 0xC1);
            Ok(FrameHeader { width, height, components: *components, is_progressive })
        }
        _ => Err(HeaderError::NotAPicture),
    }
}

/// Computes the memory from the frame header and the header of the first scan.
fn picture_header(frame: &FrameHeader, scan: &[u8]) -> Result<PictureHeader, HeaderError> {
    let scan_components = *scan.first().ok_or(HeaderError::NotAPicture)?;
    let components = u64::from(frame.components);
    // A grey picture is decoded to one byte per pixel and copied as RGB.
    let decoded = if frame.components == 1 { 4 } else { 3 };
    // With several scans, the coefficients of all components, two bytes each, are held until the last one.
    let coefficients = if frame.is_progressive || scan_components < frame.components { 2 * components } else { 0 };
    let padded = |side: u32| u64::from(side).next_multiple_of(MCU_SIDE_MAX);
    let pixels = u64::from(frame.width) * u64::from(frame.height);
    let decode_bytes = pixels * decoded + padded(frame.width) * padded(frame.height) * coefficients;
    Ok(PictureHeader { format: PictureFormat::Jpeg, width: frame.width, height: frame.height, decode_bytes })
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

    /// SOI, a frame header, and a scan header with this number of components.
    fn with_frame(sof: u8, [width, height]: [u16; 2], components: u8, scan_components: u8) -> Vec<u8> {
        let ([w0, w1], [h0, h1]) = (width.to_be_bytes(), height.to_be_bytes());
        let mut bytes = vec![0xFF, SOI, 0xFF, sof, 0, 8 + 3 * components, 8, h0, h1, w0, w1, components];
        bytes.extend(vec![1; 3 * usize::from(components)]);
        bytes.extend([0xFF, SOS, 0, 3, scan_components]);
        bytes
    }

    #[test]
    fn the_memory_includes_the_coefficients_of_several_scans() {
        let bytes =
            |sof, components, scan| header(&with_frame(sof, [64, 32], components, scan)).unwrap().decode_bytes();
        let pixels = 64 * 32;
        assert_eq!(bytes(0xC0, 3, 3), pixels * 3);
        assert_eq!(bytes(0xC0, 1, 1), pixels * 4);
        assert_eq!(bytes(0xC0, 3, 1), pixels * 9, "a baseline JPEG whose components are not interleaved");
        assert_eq!(bytes(0xC2, 3, 3), pixels * 9);
        assert_eq!(bytes(0xC2, 4, 1), pixels * 11);
        let wide = header(&with_frame(0xC2, [65535, 1], 3, 3)).unwrap();
        assert_eq!((wide.pixels(), wide.decode_bytes()), (65535, 65535 * 3 + 65536 * 32 * 6));
    }

    #[test]
    fn a_header_that_decoders_could_read_in_two_ways_is_rejected() {
        let small = with_frame(0xC0, [8, 8], 3, 3);
        let large = with_frame(0xC0, [60_000, 60_000], 3, 3);
        let both = [&small[..small.len() - 5], &large[2..]].concat();
        for bytes in [
            both,
            // A null byte in the place of a marker, which some decoders skip.
            [&small[..2], &[0xFF, 0x00], &large[2..]].concat(),
            // Neither pixels nor a frame header before them.
            vec![0xFF, SOI, 0xFF, EOI],
            vec![0xFF, SOI, 0xFF, SOS, 0, 3, 1],
            with_frame(0xC0, [0, 8], 3, 3),
            with_frame(0xC0, [8, 0], 3, 3),
            with_frame(0xC0, [8, 8], 0, 0),
            with_frame(0xC0, [8, 8], 5, 5),
        ] {
            assert_eq!(header(&bytes), Err(HeaderError::NotAPicture), "{bytes:?}");
        }
    }
}
