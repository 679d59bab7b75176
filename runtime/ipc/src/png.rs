//! The chunks of a PNG (ISO/IEC 15948): the header, and where the picture ends.
//!
//! A PNG is a signature of eight bytes and a sequence of chunks. Each chunk has a length of four bytes, a type of four bytes,
//! data, and a CRC of four bytes, which is not checked here: the decoder does that. `IHDR` is the first chunk, `IEND` the
//! last.

use crate::picture_header::{HeaderError, PictureFormat, PictureHeader};

/// The first eight bytes of every PNG.
pub const SIGNATURE: &[u8; 8] = b"\x89PNG\r\n\x1a\n";

/// Bytes of a chunk apart from its data: length, type and CRC.
const CHUNK_OVERHEAD: usize = 12;
/// Bytes per pixel of the copy that is made when the decoded pixels are not 8-bit RGB.
const RGB_BYTES: u64 = 3;

/// One chunk, with the offset behind it.
struct Chunk<'a> {
    kind: &'a [u8],
    data: &'a [u8],
    end: usize,
}

/// The chunk at `at`; `None` where the bytes run out.
fn chunk_at(bytes: &[u8], at: usize) -> Option<Chunk<'_>> {
    let rest = bytes.get(at..)?;
    let length = usize::try_from(u32::from_be_bytes(*rest.first_chunk::<4>()?)).ok()?;
    let end = at.checked_add(length)?.checked_add(CHUNK_OVERHEAD)?;
    let data = rest.get(8..length.checked_add(8)?)?;
    // The CRC must be there, too.
    bytes.get(..end)?;
    Some(Chunk { kind: &rest[4..8], data, end })
}

/// The length of the PNG at the start of `bytes`, up to the end of its `IEND` chunk. `None` if it is not a PNG, or not
/// complete.
pub fn extent(bytes: &[u8]) -> Option<usize> {
    if !bytes.starts_with(SIGNATURE) {
        return None;
    }
    let mut at = SIGNATURE.len();
    loop {
        let chunk = chunk_at(bytes, at)?;
        at = chunk.end;
        if chunk.kind == b"IEND" {
            return Some(at);
        }
    }
}

/// Reads the header of a PNG.
pub(crate) fn header(bytes: &[u8]) -> Result<PictureHeader, HeaderError> {
    if !bytes.starts_with(SIGNATURE) {
        return Err(HeaderError::NotAPicture);
    }
    let first = chunk_at(bytes, SIGNATURE.len()).ok_or(HeaderError::Truncated)?;
    let (b"IHDR", [w0, w1, w2, w3, h0, h1, h2, h3, depth, color, _, _, _]) = (first.kind, first.data) else {
        return Err(HeaderError::NotAPicture);
    };
    let width = u32::from_be_bytes([*w0, *w1, *w2, *w3]);
    let height = u32::from_be_bytes([*h0, *h1, *h2, *h3]);
    if width == 0 || height == 0 {
        return Err(HeaderError::NotAPicture);
    }
    let has_transparency = has_before_pixels(bytes, first.end, b"tRNS");
    // Turning the picture takes a copy.
    let turned = if has_before_pixels(bytes, first.end, b"eXIf") { RGB_BYTES } else { 0 };
    // Samples per pixel of the decoded picture; a palette is expanded, and `tRNS` becomes an alpha channel.
    let samples = match color {
        0 | 4 => 1 + u64::from(*color == 4 || has_transparency),
        2 | 3 | 6 => 3 + u64::from(*color == 6 || has_transparency),
        _ => return Err(HeaderError::NotAPicture),
    };
    let decoded = match depth {
        1 | 2 | 4 | 8 => samples,
        16 => samples * 2,
        _ => return Err(HeaderError::NotAPicture),
    };
    let copy = if decoded == RGB_BYTES { 0 } else { RGB_BYTES };
    let pixels = u64::from(width) * u64::from(height);
    let decode_bytes = pixels.saturating_mul(decoded + copy + turned);
    Ok(PictureHeader { format: PictureFormat::Png, width, height, decode_bytes })
}

/// Whether a chunk of this kind stands before the pixels.
fn has_before_pixels(bytes: &[u8], mut at: usize, kind: &[u8; 4]) -> bool {
    while let Some(chunk) = chunk_at(bytes, at) {
        match chunk.kind {
            found if found == kind => return true,
            b"IDAT" | b"IEND" => return false,
            _ => at = chunk.end,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
        let length = u32::try_from(data.len()).unwrap();
        [&length.to_be_bytes()[..], kind, data, &[0; 4]].concat()
    }

    fn png(width: u32, height: u32, depth: u8, color: u8, more: &[u8]) -> Vec<u8> {
        let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[depth, color, 0, 0, 0]].concat();
        [&SIGNATURE[..], &chunk(b"IHDR", &header), more, &chunk(b"IDAT", &[1, 2, 3]), &chunk(b"IEND", &[])].concat()
    }

    #[test]
    fn the_memory_depends_on_depth_color_and_transparency() {
        let bytes = |depth, color, more: &[u8]| header(&png(10, 10, depth, color, more)).unwrap().decode_bytes();
        let transparency = chunk(b"tRNS", &[0, 0]);
        assert_eq!(bytes(8, 2, &[]), 300, "RGB is not copied");
        assert_eq!(bytes(8, 2, &transparency), 700);
        assert_eq!(bytes(16, 6, &[]), 1100);
        assert_eq!(bytes(1, 0, &[]), 400);
        assert_eq!(bytes(8, 4, &[]), 500);
        assert_eq!(bytes(8, 3, &[]), 300);
        let largest = header(&png(u32::MAX, u32::MAX, 16, 6, &[])).unwrap();
        assert_eq!(largest.decode_bytes(), u64::MAX);
        assert_eq!(largest.pixels(), u64::from(u32::MAX) * u64::from(u32::MAX));
    }

    #[test]
    fn a_header_that_makes_no_sense_is_rejected() {
        for (width, height, depth, color) in [(0, 1, 8, 2), (1, 0, 8, 2), (1, 1, 3, 2), (1, 1, 8, 1), (1, 1, 8, 7)] {
            assert_eq!(header(&png(width, height, depth, color, &[])), Err(HeaderError::NotAPicture));
        }
        assert_eq!(header(&png(1, 1, 8, 2, &[])[..32]), Err(HeaderError::Truncated));
        assert_eq!(header(&[&SIGNATURE[..], &chunk(b"IDAT", &[])].concat()), Err(HeaderError::NotAPicture));
    }

    #[test]
    fn the_extent_ends_behind_the_last_chunk() {
        let picture = png(1, 1, 8, 2, &[]);
        assert_eq!(extent(&[&picture[..], b"root:x:0:0"].concat()), Some(picture.len()));
        for cut in 0..picture.len() {
            assert_eq!(extent(&picture[..cut]), None, "cut at {cut}");
        }
        assert_eq!(extent(&[&SIGNATURE[..], &[0xFF; 8]].concat()), None, "a length beyond the end");
    }
}
