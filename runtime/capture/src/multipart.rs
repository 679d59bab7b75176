//! Cuts an endless `multipart/x-mixed-replace` body into its parts (RFC 2046, as cameras really send it).
//!
//! Cameras bend the format. Some declare the boundary with its leading dashes and some without, some give no
//! `Content-Length`, some put blank lines where none belong, and some declare no boundary at all. So: dashes are ignored
//! when boundaries are compared, a length is used where there is one, else the part ends at the next boundary, and
//! where no boundary is declared the first line that begins with two dashes is it. A part, a header and what stands
//! before the first boundary are all bounded.

use bytes::{Buf as _, Bytes, BytesMut};

/// Headers of one part at most, in bytes.
const HEADER_BYTES_MAX: usize = 8 << 10;

/// Bytes passed over in search of a boundary at most.
const PREAMBLE_BYTES_MAX: usize = 64 << 10;

/// A parser that is fed as bytes arrive.
pub(super) struct Multipart {
    boundary: Option<Vec<u8>>,
    part_bytes_max: usize,
    buffer: BytesMut,
    state: State,
}

enum State {
    /// Looking for the line with the boundary; so many bytes were none.
    Boundary { passed_over: usize },
    /// Reading header lines.
    Headers { length: Option<usize>, bytes: usize },
    /// Reading a body of known length.
    Counted(usize),
    /// Reading a body up to the next boundary; searched this far.
    Open { searched: usize },
}

impl Multipart {
    /// A parser for the boundary of the `Content-Type`, where that names one.
    pub(super) fn new(boundary: Option<&str>, part_bytes_max: usize) -> Self {
        let boundary = boundary
            .map(|text| text.trim_matches('"').trim_start_matches('-').as_bytes().to_vec())
            .filter(|boundary| !boundary.is_empty());
        Self { boundary, part_bytes_max, buffer: BytesMut::new(), state: State::Boundary { passed_over: 0 } }
    }

    /// Takes bytes as they come.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole part, where there is one.
    ///
    /// # Errors
    /// What is wrong with the body. The connection has to be made anew then.
    pub(super) fn next_part(&mut self) -> Result<Option<Bytes>, String> {
        loop {
            match self.state {
                State::Boundary { passed_over } => match self.line(HEADER_BYTES_MAX)? {
                    None => return Ok(None),
                    Some(line) if self.is_boundary(&line) => self.state = State::Headers { length: None, bytes: 0 },
                    Some(line) => {
                        let passed_over = passed_over + line.len() + 1;
                        if passed_over > PREAMBLE_BYTES_MAX {
                            return Err("the declared boundary does not come".to_owned());
                        }
                        self.state = State::Boundary { passed_over };
                    }
                },
                State::Headers { length, bytes } => {
                    let Some(line) = self.line(HEADER_BYTES_MAX)? else { return Ok(None) };
                    if line.is_empty() {
                        // A blank line right behind the boundary, before any header, is one of the bends.
                        self.state = match (length, bytes) {
                            (_, 0) => State::Headers { length, bytes: 1 },
                            (Some(length), _) => State::Counted(length),
                            (None, _) => State::Open { searched: 0 },
                        };
                        continue;
                    }
                    let bytes = bytes + line.len();
                    if bytes > HEADER_BYTES_MAX {
                        return Err(format!("a part has more than {HEADER_BYTES_MAX} bytes of headers"));
                    }
                    let length = content_length(&line)?.or(length);
                    if length.is_some_and(|length| length > self.part_bytes_max) {
                        return Err(format!("a part is announced larger than {} bytes", self.part_bytes_max));
                    }
                    self.state = State::Headers { length, bytes };
                }
                State::Counted(length) => {
                    if self.buffer.len() < length {
                        return Ok(None);
                    }
                    self.state = State::Boundary { passed_over: 0 };
                    return Ok(Some(self.buffer.split_to(length).freeze()));
                }
                State::Open { searched } => match self.find_boundary(searched) {
                    Some((end, next)) => {
                        let part = self.buffer.split_to(end).freeze();
                        self.buffer.advance(next - end);
                        self.state = State::Boundary { passed_over: 0 };
                        return Ok(Some(part));
                    }
                    None if self.buffer.len() > self.part_bytes_max => {
                        return Err(format!("a part is larger than {} bytes", self.part_bytes_max));
                    }
                    None => {
                        // The boundary may lie across the end of what has come.
                        let overlap = self.boundary.as_ref().map_or(0, Vec::len) + 8;
                        self.state = State::Open { searched: self.buffer.len().saturating_sub(overlap) };
                        return Ok(None);
                    }
                },
            }
        }
    }

    /// The next line without its end; `None` until it has come whole.
    fn line(&mut self, bytes_max: usize) -> Result<Option<Bytes>, String> {
        match self.buffer.iter().position(|byte| *byte == b'\n') {
            Some(end) => {
                let mut line = self.buffer.split_to(end + 1).freeze();
                line.truncate(end);
                if line.last() == Some(&b'\r') {
                    line.truncate(end - 1);
                }
                Ok(Some(line))
            }
            None if self.buffer.len() > bytes_max => {
                Err("this is no multipart body: a boundary or header was expected".to_owned())
            }
            None => Ok(None),
        }
    }

    /// Whether a line is the boundary. Where none was declared, the first that looks like one becomes it.
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

    /// Where the body that is being read ends, and where the boundary that ends it begins.
    fn find_boundary(&self, from: usize) -> Option<(usize, usize)> {
        let boundary = self.boundary.as_ref()?;
        let mut at = from;
        loop {
            at += self.buffer.get(at..)?.windows(boundary.len()).position(|window| window == boundary.as_slice())?;
            // Back over the dashes; a boundary stands at the start of a line.
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

fn content_length(header: &[u8]) -> Result<Option<usize>, String> {
    let Some(colon) = header.iter().position(|byte| *byte == b':') else { return Ok(None) };
    if !header[..colon].trim_ascii().eq_ignore_ascii_case(b"content-length") {
        return Ok(None);
    }
    let value = String::from_utf8_lossy(header[colon + 1..].trim_ascii()).into_owned();
    value.parse().map(Some).map_err(|_| format!("Content-Length `{}` is no number", value.escape_debug()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(boundary: Option<&str>, body: &[u8], step: usize) -> Result<Vec<Bytes>, String> {
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
    fn parts_are_found_however_the_bytes_arrive() {
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
    fn a_blank_line_before_the_headers_is_forgiven() {
        let body = b"--b\r\n\r\nContent-Length: 2\r\n\r\nab\r\n--b\r\n";
        assert_eq!(parts(Some("b"), body, 3).unwrap(), [&b"ab"[..]]);
    }

    #[test]
    fn endless_and_oversized_bodies_are_refused() {
        assert!(parts(Some("b"), &[b'x'; 20_000], 1000).is_err(), "never a line");
        let other = b"--c\r\nContent-Length: 3\r\n\r\nabc\r\n".repeat(3000);
        assert!(parts(Some("b"), &other, 1000).unwrap_err().contains("boundary"), "never the one that was declared");
        let announced = b"--b\r\nContent-Length: 101\r\n\r\n";
        assert!(parts(Some("b"), announced, 10).unwrap_err().contains("announced"));
        let open = [&b"--b\r\nX: y\r\n\r\n"[..], &[b'x'; 200]].concat();
        assert!(parts(Some("b"), &open, 10).unwrap_err().contains("larger than 100"));
        let headers = [&b"--b\r\n"[..], &b"X: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n".repeat(400)].concat();
        assert!(parts(Some("b"), &headers, 100).unwrap_err().contains("headers"));
        for length in ["-1", "many", "99999999999999999999999"] {
            let body = format!("--b\r\nContent-Length: {length}\r\n\r\n");
            assert!(parts(Some("b"), body.as_bytes(), 7).is_err(), "{length}");
        }
    }
}
