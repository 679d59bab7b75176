//! Reads what a JPEG or PNG states about itself before it is decoded.
//!
//! The agent reads the header and nothing else of an encoded picture. It does so before it hands a frame to a worker, so that
//! a small file that expands to a large picture is refused, or waits, before anything is allocated for it. Every function is
//! total: no input makes it panic, and the time is linear in the length of the input.
//!
//! The functions read what the decoder reads. Where the two could see different sides, the header is refused: a second frame
//! header of a JPEG, and markers that are not valid. The decoder in turn refuses a picture whose sides differ from this header.

use crate::picture_header::{HeaderError, PictureHeader};
use crate::{jpeg, png};

impl PictureHeader {
    /// Reads the header of a JPEG or PNG.
    ///
    /// # Errors
    /// For bytes that are neither, and for a header that is not complete or not valid.
    pub fn read(bytes: &[u8]) -> Result<Self, HeaderError> {
        match bytes {
            [0xFF, 0xD8, ..] => jpeg::header(bytes),
            [0x89, ..] if png::SIGNATURE.starts_with(&bytes[..bytes.len().min(8)]) && bytes.len() < 8 => {
                Err(HeaderError::Truncated)
            }
            _ => png::header(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture_header::PictureFormat;

    /// SOI, APP0, SOF0 with 640x480 and three components, SOS with three components, a byte of data, EOI.
    fn jpeg() -> Vec<u8> {
        let mut bytes = vec![0xFF, 0xD8, 0xFF, 0xE0, 0, 4, 1, 2];
        bytes.extend([0xFF, 0xC0, 0, 17, 8, 1, 0xE0, 2, 0x80, 3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0]);
        bytes.extend([0xFF, 0xDA, 0, 12, 3, 1, 0, 2, 0, 3, 0, 0, 63, 0, 0x12, 0xFF, 0xD9]);
        bytes
    }

    fn png() -> Vec<u8> {
        let mut bytes = png::SIGNATURE.to_vec();
        bytes.extend([0, 0, 0, 13]);
        bytes.extend(b"IHDR\0\0\x02\x80\0\0\x01\xE0\x08\x02\0\0\0....");
        bytes.extend(b"\0\0\0\0IDAT....\0\0\0\0IEND....");
        bytes
    }

    #[test]
    fn sides_are_read_from_both_formats() {
        for (bytes, format) in [(jpeg(), PictureFormat::Jpeg), (png(), PictureFormat::Png)] {
            let header = PictureHeader::read(&bytes).unwrap();
            assert_eq!((header.format, header.width, header.height), (format, 640, 480));
            assert_eq!(header.pixels(), 640 * 480);
            assert_eq!(header.decode_bytes(), 640 * 480 * 3);
        }
    }

    #[test]
    fn other_bytes_are_not_a_picture() {
        for bytes in
            [&b"root:x:0:0:root:/root:/bin/bash\n"[..], b"GIF89a", b"<html>", b"eyJhbGciOi", b"\xFF", b"\0", b""]
        {
            assert_eq!(PictureHeader::read(bytes), Err(HeaderError::NotAPicture), "{bytes:?}");
        }
    }

    #[test]
    fn a_prefix_is_cut_off_until_the_pixels_begin() {
        for (bytes, first) in [(jpeg(), 2), (png(), 1)] {
            for cut in first..bytes.len() {
                let read = PictureHeader::read(&bytes[..cut]);
                assert!(matches!(read, Err(HeaderError::Truncated) | Ok(_)), "cut at {cut}: {read:?}");
            }
        }
    }

    /// A bounded fuzz run: pictures with random bytes changed, inserted, removed and cut off, and random bytes behind the
    /// signatures. No input may panic, and what is read has sides.
    #[test]
    fn no_input_panics() {
        let mut random = fastrand::Rng::with_seed(13);
        let seeds = [jpeg(), png(), vec![0xFF, 0xD8], png::SIGNATURE.to_vec()];
        let mut read = 0;
        for _ in 0..200_000 {
            let mut bytes = seeds[random.usize(..seeds.len())].clone();
            for _ in 0..random.usize(0..6) {
                let at = random.usize(..bytes.len());
                match random.u8(0..5) {
                    0 => bytes[at] = random.u8(..),
                    1 => bytes[at] = *random.choice(&[0x00, 0xFF, 0xC0, 0xC2, 0xDA, 0xD9, 0x7F, 0x80]).unwrap(),
                    2 => bytes.insert(at, random.u8(..)),
                    3 => bytes.extend((0..random.usize(0..40)).map(|_| random.u8(..)).collect::<Vec<_>>()),
                    _ => bytes.truncate(at.max(1)),
                }
            }
            if let Ok(header) = PictureHeader::read(&bytes) {
                read += 1;
                assert!(header.width > 0 && header.height > 0 && header.decode_bytes() >= header.pixels());
            }
            let extents = (jpeg::extent(&bytes), png::extent(&bytes));
            if let (jpeg::Extent::Complete(length), _) | (_, Some(length)) = extents {
                assert!(length <= bytes.len());
            }
        }
        assert!(read > 10_000, "only {read} inputs had a valid header");
    }
}
