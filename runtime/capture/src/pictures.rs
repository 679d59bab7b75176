//! Finds the pictures in a stream of bytes by their own beginnings and ends.
//!
//! Cameras surround pictures with multipart boundaries and headers, declare other boundaries than they send, state wrong lengths, or
//! send text parts and padding in between. A JPEG begins with FF D8 FF and ends with its end marker; a PNG begins with its signature and
//! ends with IEND. Whatever stands between pictures is skipped, so a picture is complete when its last byte has arrived, and not when
//! what follows it begins. OpenCV (through FFmpeg) reads such streams in the same way.
//!
//! A picture that is cut off, because the next one begins before its end, is dropped and counted; the next one is not lost with it. If it
//! was cut within its metadata, a thumbnail in those of the next one could be taken for a picture, so a picture of other sides than before
//! is not taken behind a broken one. A cut within the segments in front of the pixels can
//! swallow the beginning of the next picture, and is noticed by the decoder at the latest, or not at all where the parts fit each other.

use bytes::{Buf as _, Bytes, BytesMut};
use lineside_ipc::jpeg::{Extent, ExtentScanner};
use lineside_ipc::picture_header::PictureHeader;
use lineside_ipc::png;

/// What the scanner has found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A whole picture.
    Picture(Bytes),
    /// A picture was cut off or is damaged.
    Broken,
}

/// A picture is larger than allowed. The connection has to be closed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a picture has more than {bytes_max} bytes")]
pub struct PictureTooLarge {
    bytes_max: usize,
}

/// A scanner that receives the stream in pieces.
pub struct PictureScanner {
    bytes_max: usize,
    /// Begins with a picture, if there is one.
    buffer: BytesMut,
    state: State,
    /// Width and height of the last picture.
    sides: Option<(u32, u32)>,
    is_behind_broken: bool,
}

enum State {
    /// No picture has begun.
    Between,
    Jpeg(ExtentScanner),
    Png,
}

impl PictureScanner {
    /// A scanner for pictures of at most so many bytes.
    pub fn new(bytes_max: usize) -> Self {
        Self { bytes_max, buffer: BytesMut::new(), state: State::Between, sides: None, is_behind_broken: false }
    }

    /// Appends received bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether a picture has begun and is not complete.
    pub fn is_within_picture(&self) -> bool {
        !matches!(self.state, State::Between)
    }

    /// Removes the next picture, or the next broken one. `None` until one has been received.
    ///
    /// # Errors
    /// [`PictureTooLarge`].
    pub fn next_found(&mut self) -> Result<Option<Found>, PictureTooLarge> {
        loop {
            match &mut self.state {
                State::Between => {
                    if !self.skip_to_picture() {
                        return Ok(None);
                    }
                }
                State::Jpeg(scanner) => match scanner.scan(&self.buffer) {
                    Extent::Complete(length) => return Ok(Some(self.take(length))),
                    Extent::Truncated => return self.wait(),
                    Extent::Interrupted(next) => {
                        self.buffer.advance(next);
                        self.state = State::Jpeg(ExtentScanner::default());
                        self.is_behind_broken = true;
                        return Ok(Some(Found::Broken));
                    }
                    Extent::NotJpeg => {
                        // The rest of the last segment may hold the beginning of the next picture.
                        let skipped = scanner.last_segment().max(2).min(self.buffer.len());
                        self.buffer.advance(skipped);
                        self.state = State::Between;
                        self.is_behind_broken = true;
                        return Ok(Some(Found::Broken));
                    }
                },
                State::Png if self.buffer.len() >= png::SIGNATURE.len() && !self.buffer.starts_with(png::SIGNATURE) => {
                    self.buffer.advance(1);
                    self.state = State::Between;
                }
                State::Png => match png::extent(&self.buffer) {
                    Some(length) => return Ok(Some(self.take(length))),
                    None => return self.wait(),
                },
            }
        }
    }

    /// Drops what belongs to no picture, and begins the next one.
    fn skip_to_picture(&mut self) -> bool {
        let is_start = |bytes: &[u8]| bytes == [0xFF, 0xD8, 0xFF] || bytes == &png::SIGNATURE[..3];
        let start = self.buffer.windows(3).position(is_start);
        // The last two bytes may begin a picture.
        let skipped = start.unwrap_or(self.buffer.len().saturating_sub(2));
        self.buffer.advance(skipped);
        if start.is_some() {
            let is_jpeg = self.buffer.starts_with(&[0xFF]);
            self.state = if is_jpeg { State::Jpeg(ExtentScanner::default()) } else { State::Png };
        }
        start.is_some()
    }

    fn take(&mut self, length: usize) -> Found {
        self.state = State::Between;
        let picture = self.buffer.split_to(length).freeze();
        let sides = PictureHeader::read(&picture).ok().map(|header| (header.width, header.height));
        if self.is_behind_broken && self.sides.is_some() && self.sides != sides {
            // Another one of these sides shows that the camera has changed them.
            (self.sides, self.is_behind_broken) = (sides, false);
            return Found::Broken;
        }
        (self.sides, self.is_behind_broken) = (sides, false);
        Found::Picture(picture)
    }

    fn wait(&self) -> Result<Option<Found>, PictureTooLarge> {
        if self.buffer.len() > self.bytes_max {
            return Err(PictureTooLarge { bytes_max: self.bytes_max });
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SOI, an APP1 segment that hides the beginning and the end of a thumbnail, a scan, EOI.
    const JPEG: [u8; 22] = [
        0xFF, 0xD8, 0xFF, 0xE1, 0x00, 0x07, 0xFF, 0xD8, 0xFF, 0xFF, 0xD9, 0xFF, 0xDA, 0x00, 0x03, 0x01, 0x12, 0xFF,
        0x00, 0x34, 0xFF, 0xD9,
    ];

    /// All that is found in a stream that arrives in pieces of this size.
    fn found(stream: &[u8], step: usize) -> Vec<Found> {
        let mut scanner = PictureScanner::new(200_000);
        let mut found = Vec::new();
        for piece in stream.chunks(step) {
            scanner.feed(piece);
            while let Some(one) = scanner.next_found().unwrap() {
                found.push(one);
            }
        }
        found
    }

    fn picture() -> Found {
        Found::Picture(Bytes::from_static(&JPEG))
    }

    #[test]
    fn pictures_are_found_in_every_envelope_and_complete_with_their_last_byte() {
        let head = b"--b\r\nContent-Type: image/jpeg\r\nContent-Length: 5\r\n\r\n";
        let text = b"\r\n--other\r\nContent-Type: text/plain\r\n\r\nHeartbeat\r\n";
        let part = [&head[..], &JPEG].concat();
        for stream in [
            [&part[..], b"\r\n", &part].concat(),
            [&JPEG[..], &JPEG].concat(),
            [&text[..], &part, text, &part].concat(),
            [&part[..], &[0; 512], b"\r\n", &part].concat(),
            [&part[..], &[0xFF; 512], &part].concat(),
            // The rest of an older picture behind the end.
            [&part[..], &JPEG[15..], &part].concat(),
        ] {
            for step in [1, 2, 3, 7, 100, stream.len()] {
                assert_eq!(found(&stream, step), [picture(), picture()], "in pieces of {step}: {stream:?}");
            }
            let cut = &stream[..stream.len() - 1];
            assert_eq!(found(cut, 9), [picture()], "before its last byte");
        }
    }

    #[test]
    fn a_cut_picture_does_not_take_the_next_one_with_it() {
        for cut in 1..JPEG.len() {
            for between in [&b""[..], b"\r\n--b\r\nContent-Type: image/jpeg\r\n\r\n"] {
                let stream = [&JPEG[..cut], between, &JPEG, &[0; 70_000], &JPEG].concat();
                let found = found(&stream, 50);
                let pictures = found.iter().filter(|one| **one == picture()).count();
                // A cut within the length of a segment makes that segment swallow what follows; the one after it is found.
                assert!(pictures >= 1, "cut at {cut}: {found:?}");
                let whole = |one: &Found| !matches!(one, Found::Picture(bytes) if !bytes.ends_with(&JPEG));
                // Without sides, the thumbnail behind a cut within the first segment cannot be distinguished from a picture.
                assert!(
                    (6..=10).contains(&cut) || found.iter().all(whole),
                    "cut at {cut}: only whole pictures: {found:?}"
                );
            }
        }
        let stream = [&JPEG[..17], b"\r\n--b\r\n\r\n", &JPEG].concat();
        assert_eq!(found(&stream, 4), [Found::Broken, picture()]);
    }

    /// A picture with these sides, and with metadata that hide a thumbnail of 8x8.
    fn with_thumbnail(side: u8) -> Vec<u8> {
        let plain = |side: u8| {
            let frame = [0xFF, 0xC0, 0, 11, 8, 0, side, 0, side, 1, 1, 0x11, 0];
            [&[0xFF, 0xD8][..], &frame, &[0xFF, 0xDA, 0, 3, 1, 0x12, 0x34, 0xFF, 0xD9]].concat()
        };
        let thumbnail = plain(8);
        let metadata = [&[0xFF, 0xE1, 0, thumbnail.len() as u8 + 2][..], &thumbnail].concat();
        let picture = plain(side);
        [&picture[..2], &metadata, &picture[2..]].concat()
    }

    #[test]
    fn a_thumbnail_is_never_taken_for_a_picture() {
        let whole = with_thumbnail(64);
        // A cut within a segment in front of the pixels makes the beginning of the next picture a part of it.
        let pixels = whole.windows(2).rposition(|marker| marker == [0xFF, 0xDA]).unwrap();
        for cut in (1..4).chain(pixels + 5..whole.len()) {
            for between in [&b""[..], b"\r\n--b\r\nContent-Type: image/jpeg\r\n\r\n"] {
                let stream = [&whole[..], &whole[..cut], between, &whole, &[0; 70_000], between, &whole].concat();
                let found = found(&stream, 13);
                let pictures: Vec<&Found> = found.iter().filter(|one| **one != Found::Broken).collect();
                assert!(pictures.len() >= 2, "cut at {cut}: {found:?}");
                let is_whole = |one: &&Found| matches!(one, Found::Picture(bytes) if bytes.ends_with(&whole));
                assert!(pictures.iter().all(is_whole), "cut at {cut}: {found:?}");
            }
        }
    }

    #[test]
    fn png_pictures_are_found_and_sizes_are_bounded() {
        let png = [&png::SIGNATURE[..], b"\0\0\0\x02IHDRab....", b"\0\0\0\0IEND...."].concat();
        let stream = [b"--b\r\n\r\n", &png[..], b"\r\n", &JPEG].concat();
        assert_eq!(found(&stream, 3), [Found::Picture(png.into()), picture()]);
        let mut scanner = PictureScanner::new(100);
        scanner.feed(&JPEG[..17]);
        scanner.feed(&[0x55; 100]);
        assert_eq!(scanner.next_found(), Err(PictureTooLarge { bytes_max: 100 }));
    }
}
