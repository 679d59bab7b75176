//! The header of a JPEG, and where it ends, found by walking its markers (ITU-T T.81, annex B).
//!
//! Two callers need the end. A decoder that meets a cut-off file fills the rest with grey and says nothing, so a truncated
//! frame has to be refused before it; and a recorded MJPEG file is nothing but JPEGs one after the other.
//!
//! A thumbnail inside an APPn segment carries an end marker of its own. Segments are therefore skipped by their length,
//! and only entropy-coded data is searched byte by byte: in there `FF 00` is a stuffed byte, `FF D0` to `FF D7` restart
//! the decoder, and any other marker ends the scan. A few bytes of junk between two segments are skipped, as libjpeg skips them.

use crate::picture_header::{HeaderError, PictureFormat, PictureHeader};

const SOI: u8 = 0xD8;
const EOI: u8 = 0xD9;
const SOS: u8 = 0xDA;
const DHT: u8 = 0xC4;
const APP1: u8 = 0xE1;
/// Bytes of junk between two segments that are skipped.
const JUNK_MAX: usize = 4096;
/// Largest side of a minimum coded unit in pixels: a block of 8 with a sampling factor of 4.
const MCU_SIDE_MAX: u64 = 32;

/// What the bytes hold, seen from their start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// One whole JPEG takes this many bytes.
    Complete(usize),
    /// It begins as a JPEG, and the bytes run out before its end marker.
    Truncated,
    /// It begins as a JPEG, and another one begins at this offset before its end: it was cut off.
    Interrupted(usize),
    /// It does not begin as a JPEG, or its markers make no sense.
    NotJpeg,
}

/// Finds where the JPEG at the start of `bytes` ends.
pub fn extent(bytes: &[u8]) -> Extent {
    ExtentScanner::default().scan(bytes)
}

/// Finds the end of a JPEG that arrives in pieces, without looking at a byte twice.
#[derive(Debug, Clone, Default)]
pub struct ExtentScanner {
    /// Offset of the next marker, or of entropy-coded data.
    at: usize,
    is_in_scan: bool,
    /// Offset of the last segment that began.
    segment: usize,
}

impl ExtentScanner {
    /// Looks at the bytes that have arrived, from the start of the JPEG on. They begin with those of the last call.
    pub fn scan(&mut self, bytes: &[u8]) -> Extent {
        if self.at == 0 {
            match bytes {
                [0xFF, SOI, ..] => self.at = 2,
                [] | [0xFF] => return Extent::Truncated,
                _ => return Extent::NotJpeg,
            }
        }
        loop {
            if self.is_in_scan {
                match end_of_scan(bytes, self.at) {
                    Ok(marker) => (self.at, self.is_in_scan) = (marker, false),
                    Err(searched) => {
                        self.at = searched;
                        return Extent::Truncated;
                    }
                }
            }
            let Some((marker, after)) = next_marker(bytes, self.at) else {
                return if lacks_marker(bytes, self.at) { Extent::NotJpeg } else { Extent::Truncated };
            };
            match marker {
                EOI => return Extent::Complete(after),
                // Some cameras write it twice.
                SOI if self.at == 2 => self.at = after,
                SOI => return Extent::Interrupted(after - 2),
                // Markers that stand alone: TEM and RSTn.
                0x01 | 0xD0..=0xD7 => self.at = after,
                _ => {
                    self.segment = after - 2;
                    let Some(length) = bytes.get(after..after + 2) else { return Extent::Truncated };
                    let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
                    if length < 2 {
                        return Extent::NotJpeg;
                    }
                    if after + length > bytes.len() {
                        return Extent::Truncated;
                    }
                    (self.at, self.is_in_scan) = (after + length, marker == SOS);
                }
            }
        }
    }

    /// Offset of the last segment that began. What follows it may be another picture, if this one was cut off within it.
    pub fn last_segment(&self) -> usize {
        self.segment
    }
}

/// What a JPEG states before its first scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JpegHeader {
    /// Width in pixels, at least 1.
    pub width: u32,
    /// Height in pixels, at least 1.
    pub height: u32,
    /// Whether its coefficients come in several scans of growing precision.
    pub is_progressive: bool,
    /// Whether it is coded arithmetically instead of with Huffman tables.
    pub is_arithmetic: bool,
    /// Horizontal and vertical sampling factor of each component.
    pub samplings: Vec<[u8; 2]>,
    /// Components in the first scan.
    pub scan_components: u8,
    /// Whether it has Huffman tables. Those of motion JPEG from many cameras do not: the standard ones are meant.
    pub has_huffman_tables: bool,
    /// Whether it has Exif metadata.
    pub has_exif: bool,
    /// Whether bytes that belong to no segment stand between segments.
    pub has_junk: bool,
    /// Offset of the marker of the first scan.
    pub scan_at: usize,
}

impl JpegHeader {
    /// Whether it is of the kind that nearly every camera writes: all components interleaved in one scan, or progressive, with the
    /// luminance at least as fine as the other components, and nothing between its segments.
    pub fn is_plain(&self) -> bool {
        let [luminance, others @ ..] = self.samplings.as_slice() else { return false };
        let is_power = |factors: &[u8; 2]| factors.iter().all(|factor| factor.is_power_of_two());
        let is_coarser = |other: &[u8; 2]| is_power(other) && other[0] <= luminance[0] && other[1] <= luminance[1];
        let is_interleaved = self.is_progressive || usize::from(self.scan_components) == self.samplings.len();
        is_interleaved && is_power(luminance) && others.iter().all(is_coarser) && !self.has_junk
    }

    /// Reads the header up to the first scan.
    ///
    /// # Errors
    /// For bytes that are no JPEG, that end before the first scan, or whose header decoders could read in two ways.
    pub fn read(bytes: &[u8]) -> Result<Self, HeaderError> {
        let mut at = 2;
        let mut frame: Option<Self> = None;
        let (mut has_huffman_tables, mut has_exif, mut has_junk) = (false, false, false);
        loop {
            let start = at;
            let Some((marker, after)) = next_marker(bytes, at) else {
                return Err(if lacks_marker(bytes, at) { HeaderError::NotAPicture } else { HeaderError::Truncated });
            };
            has_junk |= bytes.get(start) != Some(&0xFF);
            at = after;
            match marker {
                SOI if start == 2 => continue,
                0x01 | 0xD0..=0xD7 => continue,
                // Pixels never come, or this is not a marker, or another picture begins.
                EOI | SOI | 0x00 => return Err(HeaderError::NotAPicture),
                _ => {}
            }
            let length = bytes.get(at..).and_then(|rest| rest.first_chunk::<2>()).ok_or(HeaderError::Truncated)?;
            let length = usize::from(u16::from_be_bytes(*length));
            if length < 2 {
                return Err(HeaderError::NotAPicture);
            }
            let segment = bytes.get(at + 2..at + length).ok_or(HeaderError::Truncated)?;
            match (marker, frame.take()) {
                (SOS, Some(frame)) => {
                    let scan_components = *segment.first().ok_or(HeaderError::NotAPicture)?;
                    let scan_at = after - 2;
                    return Ok(Self { scan_components, has_huffman_tables, has_exif, has_junk, scan_at, ..frame });
                }
                // Decoders differ in which of two frame headers they use.
                (SOS, None) | (0xC0..=0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF, Some(_)) => {
                    return Err(HeaderError::NotAPicture);
                }
                (0xC0..=0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF, None) => {
                    frame = Some(Self::of_frame(marker, segment)?);
                }
                (_, seen) => frame = seen,
            }
            has_huffman_tables |= marker == DHT;
            has_exif |= marker == APP1 && segment.starts_with(b"Exif\0\0");
            at += length;
        }
    }

    /// Reads a frame header (SOF).
    fn of_frame(marker: u8, segment: &[u8]) -> Result<Self, HeaderError> {
        let [_, h0, h1, w0, w1, components @ 1..=4, rest @ ..] = segment else { return Err(HeaderError::NotAPicture) };
        let width = u32::from(u16::from_be_bytes([*w0, *w1]));
        let height = u32::from(u16::from_be_bytes([*h0, *h1]));
        let parts = rest.chunks_exact(3).take(usize::from(*components));
        let samplings: Vec<[u8; 2]> = parts.map(|part| [part[1] >> 4, part[1] & 0x0F]).collect();
        let is_valid = |factors: &[u8; 2]| factors.iter().all(|factor| (1..=4).contains(factor));
        // A height of 0 is stated behind the first scan (DNL), which no decoder here supports.
        if width == 0 || height == 0 || samplings.len() < usize::from(*components) || !samplings.iter().all(is_valid) {
            return Err(HeaderError::NotAPicture);
        }
        Ok(Self {
            width,
            height,
            is_progressive: !matches!(marker, 0xC0 | 0xC1 | 0xC9),
            is_arithmetic: marker >= 0xC9,
            samplings,
            scan_components: 0,
            has_huffman_tables: false,
            has_exif: false,
            has_junk: false,
            scan_at: 0,
        })
    }
}

/// Reads the header of a JPEG up to its first scan.
pub(crate) fn header(bytes: &[u8]) -> Result<PictureHeader, HeaderError> {
    let header = JpegHeader::read(bytes)?;
    let components = header.samplings.len() as u64;
    // A grey picture is decoded to one byte per pixel and copied as RGB.
    let decoded = if components == 1 { 4 } else { 3 };
    // With several scans, the coefficients of all components, two bytes each, are held until the last one. The general decoder
    // holds all planes besides the pixels.
    let has_scans = header.is_progressive || u64::from(header.scan_components) < components;
    let coefficients = if has_scans { 2 * components } else { 0 };
    let planes = if header.is_plain() { 0 } else { components };
    // Turning the picture takes a copy.
    let turned = if header.has_exif { 3 } else { 0 };
    let padded = |side: u32| u64::from(side).next_multiple_of(MCU_SIDE_MAX);
    let pixels = u64::from(header.width) * u64::from(header.height);
    let decode_bytes =
        pixels * (decoded + turned) + padded(header.width) * padded(header.height) * (coefficients + planes);
    Ok(PictureHeader { format: PictureFormat::Jpeg, width: header.width, height: header.height, decode_bytes })
}

/// As [`marker_at`], past a few bytes of junk, which only follow a segment.
fn next_marker(bytes: &[u8], at: usize) -> Option<(u8, usize)> {
    let junk = bytes.get(at..)?.iter().take(JUNK_MAX + 1).take_while(|byte| **byte != 0xFF).count();
    if junk > JUNK_MAX || (junk > 0 && at == 2) {
        return None;
    }
    marker_at(bytes, at + junk)
}

/// Whether the bytes at `at` can never become a marker, however many follow.
fn lacks_marker(bytes: &[u8], at: usize) -> bool {
    let junk = bytes.get(at..).unwrap_or_default().iter().take_while(|byte| **byte != 0xFF).count();
    junk > JUNK_MAX || (junk > 0 && at == 2)
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

/// The offset of the marker that ends the entropy-coded data starting at `from`; an error with the offset up to which there is none.
fn end_of_scan(bytes: &[u8], from: usize) -> Result<usize, usize> {
    let mut at = from;
    loop {
        let rest = bytes.get(at..).unwrap_or_default();
        at += rest.iter().position(|byte| *byte == 0xFF).ok_or(at + rest.len())?;
        match bytes.get(at + 1) {
            None => return Err(at),
            Some(0x00 | 0xD0..=0xD7) => at += 2,
            Some(0xFF) => at += 1,
            Some(_) => return Ok(at),
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
    fn pieces_of_any_size_give_the_same_end() {
        for step in 1..SAMPLE.len() {
            let mut scanner = ExtentScanner::default();
            let two = [SAMPLE, SAMPLE].concat();
            let found = (step..two.len())
                .step_by(step)
                .map(|end| scanner.scan(&two[..end]))
                .find(|found| *found != Extent::Truncated);
            assert_eq!(found.unwrap_or(scanner.scan(&two)), Extent::Complete(SAMPLE.len()), "in pieces of {step}");
        }
    }

    #[test]
    fn a_picture_that_is_cut_off_by_the_next_is_named_so() {
        // Within the scan, and between segments.
        let envelope = b"\r\n--b\r\nContent-Type: image/jpeg\r\n\r\n";
        for (cut, between) in [(16, &envelope[..]), (18, envelope), (10, b"")] {
            let bytes = [&SAMPLE[..cut], between, &SAMPLE].concat();
            let next = bytes.len() - SAMPLE.len();
            assert_eq!(extent(&bytes), Extent::Interrupted(next), "cut at {cut}");
        }
        let twice = [&SAMPLE[..2], &SAMPLE].concat();
        assert_eq!(extent(&twice), Extent::Complete(twice.len()), "a start that is written twice");
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
        bytes.extend([1, 0x11, 0].repeat(usize::from(components)));
        bytes.extend([0xFF, SOS, 0, 3, scan_components]);
        bytes
    }

    fn with_sampling(factors: u8) -> Vec<u8> {
        let mut bytes = with_frame(0xC0, [8, 8], 1, 1);
        bytes[13] = factors;
        bytes
    }

    #[test]
    fn junk_between_segments_is_skipped_within_bounds() {
        let plain = with_frame(0xC0, [64, 32], 3, 3);
        let at = plain.len() - 5;
        let with_junk = |count| [&plain[..at], &vec![0x2A; count], &plain[at..], &[0x12, 0xFF, EOI]].concat();
        let header = JpegHeader::read(&with_junk(3)).unwrap();
        assert!(header.has_junk && !header.is_plain());
        assert_eq!((header.width, header.height, header.scan_at), (64, 32, at + 3));
        assert!(JpegHeader::read(&plain).unwrap().is_plain());
        assert_eq!(extent(&with_junk(JUNK_MAX)), Extent::Complete(plain.len() + JUNK_MAX + 3));
        assert_eq!(extent(&with_junk(JUNK_MAX + 1)), Extent::NotJpeg);
        assert_eq!(JpegHeader::read(&with_junk(JUNK_MAX + 1)), Err(HeaderError::NotAPicture));
        assert_eq!(extent(&[&plain[..at], &[0x2A; 9]].concat()), Extent::Truncated);
    }

    #[test]
    fn plain_pictures_are_interleaved_with_a_fine_luminance() {
        let with = |sof, scan, factors: [u8; 3]| {
            let mut bytes = with_frame(sof, [8, 8], 3, scan);
            for (component, factors) in factors.into_iter().enumerate() {
                bytes[13 + 3 * component] = factors;
            }
            JpegHeader::read(&bytes).unwrap().is_plain()
        };
        assert!(with(0xC0, 3, [0x22, 0x11, 0x11]) && with(0xC2, 1, [0x21, 0x11, 0x11]));
        assert!(!with(0xC0, 1, [0x22, 0x11, 0x11]), "several scans");
        assert!(!with(0xC0, 3, [0x11, 0x21, 0x11]), "a finer component");
        assert!(!with(0xC0, 3, [0x31, 0x11, 0x11]), "a factor of three");
    }

    #[test]
    fn the_memory_includes_the_coefficients_of_several_scans() {
        let bytes =
            |sof, components, scan| header(&with_frame(sof, [64, 32], components, scan)).unwrap().decode_bytes();
        let pixels = 64 * 32;
        assert_eq!(bytes(0xC0, 3, 3), pixels * 3);
        assert_eq!(bytes(0xC0, 1, 1), pixels * 4);
        assert_eq!(bytes(0xC0, 3, 1), pixels * 12, "a baseline JPEG whose components are not interleaved");
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
            // A null byte in the place of a marker, which some decoders skip, and sampling factors that do not exist.
            with_sampling(0x51),
            with_sampling(0x10),
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
