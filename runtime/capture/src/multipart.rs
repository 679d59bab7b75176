//! An incremental parser of endless `multipart/x-mixed-replace` bodies (RFC 2046), tolerant of the deviations of cameras.
//!
//! Cameras declare the boundary with or without its leading dashes, or not at all, omit `Content-Length`, or insert blank
//! lines. Therefore:
//!
//! - Leading dashes are ignored when boundaries are compared.
//! - Without a declared boundary, the first line that begins with two dashes is the boundary.
//! - A part ends after its `Content-Length`, or without one at the next boundary.
//! - A blank line between the boundary and the headers is ignored.
//!
//! The sizes of a part, of its headers and of the data before the first boundary are bounded.

use bytes::{Buf as _, Bytes, BytesMut};

/// Largest size of the headers of one part, in bytes.
const HEADER_BYTES_MAX: usize = 8 << 10;

/// Largest number of bytes that are skipped in search of a boundary.
const PREAMBLE_BYTES_MAX: usize = 64 << 10;

/// Why a body cannot be parsed. The connection has to be closed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MultipartError {
    /// No boundary within the first 64 KiB.
    #[error("the response does not contain the declared boundary")]
    MissingBoundary,
    /// A line is longer than 8 KiB where a boundary or a header is expected.
    #[error("the response is not a multipart body: a boundary or header was expected")]
    NotMultipart,
    /// The headers of a part are too long.
    #[error("the headers of a part have more than {HEADER_BYTES_MAX} bytes")]
    HeadersTooLong,
    /// A part, or its `Content-Length`, exceeds the limit.
    #[error("a part is larger than {bytes_max} bytes")]
    PartTooLarge {
        /// The limit in bytes.
        bytes_max: usize,
    },
    /// The value of `Content-Length` is not a number.
    #[error("Content-Length `{}` is not a number", .0.escape_debug())]
    InvalidLength(String),
}

/// A parser that receives the body in pieces.
pub struct Multipart {
    boundary: Option<Vec<u8>>,
    part_bytes_max: usize,
    buffer: BytesMut,
    state: State,
}

enum State {
    /// Searching for the line with the boundary; `skipped` bytes did not contain it.
    Boundary { skipped: usize },
    /// Reading header lines; `bytes` were read.
    Headers { length: Option<usize>, bytes: usize },
    /// Reading a body with this `Content-Length`.
    Counted(usize),
    /// Reading a body up to the next boundary; the first `searched` bytes do not contain it.
    Open { searched: usize },
}

impl Multipart {
    /// A parser for the boundary of the `Content-Type`, if it has one.
    pub fn new(boundary: Option<&str>, part_bytes_max: usize) -> Self {
        let boundary = boundary
            .map(|text| text.trim_matches('"').trim_start_matches('-').as_bytes().to_vec())
            .filter(|boundary| !boundary.is_empty());
        Self { boundary, part_bytes_max, buffer: BytesMut::new(), state: State::Boundary { skipped: 0 } }
    }

    /// Appends received bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Removes the next complete part. `None` until it has been received.
    ///
    /// # Errors
    /// [`MultipartError`].
    pub fn next_part(&mut self) -> Result<Option<Bytes>, MultipartError> {
        loop {
            match self.state {
                State::Boundary { skipped } => match self.line(HEADER_BYTES_MAX)? {
                    None => return Ok(None),
                    Some(line) if self.is_boundary(&line) => self.state = State::Headers { length: None, bytes: 0 },
                    Some(line) => {
                        let skipped = skipped + line.len() + 1;
                        if skipped > PREAMBLE_BYTES_MAX {
                            return Err(MultipartError::MissingBoundary);
                        }
                        self.state = State::Boundary { skipped };
                    }
                },
                State::Headers { length, bytes } => {
                    let Some(line) = self.line(HEADER_BYTES_MAX)? else { return Ok(None) };
                    if line.is_empty() {
                        // A blank line between the boundary and the first header is ignored.
                        self.state = match (length, bytes) {
                            (_, 0) => State::Headers { length, bytes: 1 },
                            (Some(length), _) => State::Counted(length),
                            (None, _) => State::Open { searched: 0 },
                        };
                        continue;
                    }
                    let bytes = bytes + line.len();
                    if bytes > HEADER_BYTES_MAX {
                        return Err(MultipartError::HeadersTooLong);
                    }
                    let length = content_length(&line)?.or(length);
                    if length.is_some_and(|length| length > self.part_bytes_max) {
                        return Err(self.too_large());
                    }
                    self.state = State::Headers { length, bytes };
                }
                State::Counted(length) => {
                    if self.buffer.len() < length {
                        return Ok(None);
                    }
                    self.state = State::Boundary { skipped: 0 };
                    return Ok(Some(self.buffer.split_to(length).freeze()));
                }
                State::Open { searched } => match self.find_boundary(searched) {
                    Some((end, next)) => {
                        let part = self.buffer.split_to(end).freeze();
                        self.buffer.advance(next - end);
                        self.state = State::Boundary { skipped: 0 };
                        return Ok(Some(part));
                    }
                    None if self.buffer.len() > self.part_bytes_max => {
                        return Err(self.too_large());
                    }
                    None => {
                        // The boundary may have been received partially.
                        let overlap = self.boundary.as_ref().map_or(0, Vec::len) + 8;
                        self.state = State::Open { searched: self.buffer.len().saturating_sub(overlap) };
                        return Ok(None);
                    }
                },
            }
        }
    }

    fn too_large(&self) -> MultipartError {
        MultipartError::PartTooLarge { bytes_max: self.part_bytes_max }
    }

    /// Removes the next line and returns it without its end. `None` until it has been received completely.
    fn line(&mut self, bytes_max: usize) -> Result<Option<Bytes>, MultipartError> {
        match self.buffer.iter().position(|byte| *byte == b'\n') {
            Some(end) => {
                let mut line = self.buffer.split_to(end + 1).freeze();
                line.truncate(end);
                if line.last() == Some(&b'\r') {
                    line.truncate(end - 1);
                }
                Ok(Some(line))
            }
            None if self.buffer.len() > bytes_max => Err(MultipartError::NotMultipart),
            None => Ok(None),
        }
    }

    /// Whether a line is the boundary. If none is declared, the first line in the format of a boundary declares it.
    fn is_boundary(&mut self, line: &[u8]) -> bool {
        let Some(rest) = line.strip_prefix(b"--") else { return false };
        let name = rest.trim_ascii_end();
        let dashes = name.iter().take_while(|byte| **byte == b'-').count();
        let name = &name[dashes..];
        match &self.boundary {
            Some(boundary) => name == boundary.as_slice() || name.strip_suffix(b"--") == Some(boundary.as_slice()),
            None if name.is_empty() => false,
            None => {
                self.boundary = Some(name.to_vec());
                true
            }
        }
    }

    /// The end of the current body, and the start of the boundary behind it.
    fn find_boundary(&self, from: usize) -> Option<(usize, usize)> {
        let boundary = self.boundary.as_ref()?;
        let mut at = from;
        loop {
            at += self.buffer.get(at..)?.windows(boundary.len()).position(|window| window == boundary.as_slice())?;
            // The boundary begins with its dashes, at the start of a line.
            let dashes = self.buffer[..at].iter().rev().take_while(|byte| **byte == b'-').count();
            let start = at - dashes;
            let before = &self.buffer[..start];
            if dashes >= 2 && (before.is_empty() || before.ends_with(b"\n")) {
                let end = before.strip_suffix(b"\r\n").or_else(|| before.strip_suffix(b"\n")).unwrap_or(before).len();
                return Some((end, start));
            }
            at += 1;
        }
    }
}

/// The value of a header line, if it is `Content-Length`.
fn content_length(header: &[u8]) -> Result<Option<usize>, MultipartError> {
    let Some(colon) = header.iter().position(|byte| *byte == b':') else { return Ok(None) };
    if !header[..colon].trim_ascii().eq_ignore_ascii_case(b"content-length") {
        return Ok(None);
    }
    let value = String::from_utf8_lossy(header[colon + 1..].trim_ascii()).into_owned();
    value.parse().map(Some).map_err(|_| MultipartError::InvalidLength(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(boundary: Option<&str>, body: &[u8], step: usize) -> Result<Vec<Bytes>, MultipartError> {
        let mut parser = Multipart::new(boundary, 100);
        let mut found = Vec::new();
        for chunk in body.chunks(step) {
            parser.feed(chunk);
            while let Some(part) = parser.next_part()? {
                found.push(part);
            }
        }
        Ok(found)
    }

    #[test]
    fn parts_do_not_depend_on_the_size_of_the_pieces() {
        let counted = b"--b\r\nContent-Type: image/jpeg\r\nContent-Length: 5\r\n\r\n--b\r\n\r\n--b\r\nContent-length:3\r\n\r\nabc\r\n--b";
        let open = b"--b\r\nContent-Type: image/jpeg\r\n\r\none--b\r\n--b\r\nX: y\r\n\r\ntwo\r\n\r\n--b--\r\n";
        let bare = b"preamble\n--b\nX: y\n\nthree\n--b\n";
        for step in 1..counted.len() {
            assert_eq!(parts(Some("b"), counted, step).unwrap(), [&b"--b\r\n"[..], b"abc"], "step {step}");
            assert_eq!(parts(Some("--b"), open, step).unwrap(), [&b"one--b"[..], b"two\r\n"], "step {step}");
            assert_eq!(parts(None, bare, step).unwrap(), [&b"three"[..]], "step {step}");
            assert_eq!(parts(Some("\"b\""), counted, step).unwrap().len(), 2, "step {step}");
        }
    }

    #[test]
    fn a_blank_line_before_the_headers_is_ignored() {
        let body = b"--b\r\n\r\nContent-Length: 2\r\n\r\nab\r\n--b\r\n";
        assert_eq!(parts(Some("b"), body, 3).unwrap(), [&b"ab"[..]]);
    }

    #[test]
    fn endless_and_oversized_bodies_are_rejected() {
        assert_eq!(parts(Some("b"), &[b'x'; 20_000], 1000), Err(MultipartError::NotMultipart));
        let other = b"--c\r\nContent-Length: 3\r\n\r\nabc\r\n".repeat(3000);
        assert_eq!(parts(Some("b"), &other, 1000), Err(MultipartError::MissingBoundary));
        let announced = b"--b\r\nContent-Length: 101\r\n\r\n";
        assert_eq!(parts(Some("b"), announced, 10), Err(MultipartError::PartTooLarge { bytes_max: 100 }));
        let open = [&b"--b\r\nX: y\r\n\r\n"[..], &[b'x'; 200]].concat();
        assert_eq!(parts(Some("b"), &open, 10), Err(MultipartError::PartTooLarge { bytes_max: 100 }));
        let headers = [&b"--b\r\n"[..], &b"X: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n".repeat(400)].concat();
        assert_eq!(parts(Some("b"), &headers, 100), Err(MultipartError::HeadersTooLong));
        for length in ["-1", "many", "99999999999999999999999"] {
            let body = format!("--b\r\nContent-Length: {length}\r\n\r\n");
            assert_eq!(parts(Some("b"), body.as_bytes(), 7), Err(MultipartError::InvalidLength(length.to_owned())));
        }
    }
}
