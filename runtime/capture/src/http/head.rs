//! The head of an HTTP/1 response, as cameras write it.
//!
//! Cameras put blanks before colons, lines without a name, two status lines, no reason phrase, line feeds alone, lengths that are empty,
//! wrong or stated twice. Strict clients refuse these; curl and FFmpeg read them, and so does this parser, within bounds. What it cannot
//! use is ignored: where a picture ends is known from the picture.

/// Largest head, in bytes.
pub(super) const HEAD_BYTES_MAX: usize = 32 << 10;

/// A response is not HTTP.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum HeadError {
    /// The head does not end within [`HEAD_BYTES_MAX`].
    #[error("the head of the response has more than {HEAD_BYTES_MAX} bytes")]
    TooLong,
    /// The first line has no status.
    #[error("the response is not HTTP")]
    NotHttp,
}

/// How the end of a body is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    /// After so many bytes, as the camera states.
    Length(u64),
    /// After the last chunk.
    Chunked,
    /// When the camera closes the connection.
    UntilClose,
}

/// The head of a response.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Head {
    /// The status code.
    pub(super) status: u16,
    is_http_1_1: bool,
    headers: Vec<(String, String)>,
}

impl Head {
    /// Parses the head at the start of `bytes`. Returns it with its length; `None` until it is complete. Informational responses
    /// (1xx) are returned like others.
    ///
    /// # Errors
    /// [`HeadError`].
    pub(super) fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, HeadError> {
        // Rests of an earlier response.
        let start = bytes.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        let Some(end) = end_of_head(bytes, start) else {
            return if bytes.len() > HEAD_BYTES_MAX { Err(HeadError::TooLong) } else { Ok(None) };
        };
        let text: String = bytes[start..end].iter().map(|byte| char::from(*byte)).collect();
        let mut head = Self::default();
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default();
        head.read_status(first).ok_or(HeadError::NotHttp)?;
        for line in lines {
            // A second status line.
            if line.starts_with("HTTP/") && head.read_status(line).is_some() {
                continue;
            }
            let Some((name, value)) = line.split_once(':') else { continue };
            let name = name.trim();
            let is_name =
                !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
            if is_name {
                head.headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
            }
        }
        Ok(Some((head, end)))
    }

    fn read_status(&mut self, line: &str) -> Option<()> {
        let mut words = line.split_ascii_whitespace();
        let version = words.next()?;
        let status = words.next()?.parse().ok().filter(|status| (100..1000).contains(status))?;
        // Shoutcast servers answer with ICY.
        if !version.starts_with("HTTP/") && version != "ICY" {
            return None;
        }
        self.status = status;
        self.is_http_1_1 = version.starts_with("HTTP/1.1");
        Some(())
    }

    /// The values of a header, whose name is in lower case.
    pub(super) fn values<'a>(&'a self, name: &'a str) -> impl DoubleEndedIterator<Item = &'a str> {
        self.headers.iter().filter(move |(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// How the end of the body is known. Of several lengths the last number counts.
    pub(super) fn framing(&self) -> Framing {
        if self.values("transfer-encoding").any(|value| value.to_ascii_lowercase().contains("chunked")) {
            return Framing::Chunked;
        }
        let mut lengths = self.values("content-length").filter_map(|value| value.parse().ok());
        lengths.next_back().map_or(Framing::UntilClose, Framing::Length)
    }

    /// Whether the camera may take another request on the connection.
    pub(super) fn keeps_connection(&self) -> bool {
        let states = |word: &str| self.values("connection").any(|value| value.to_ascii_lowercase().contains(word));
        if self.is_http_1_1 { !states("close") } else { states("keep-alive") }
    }

    /// The media type that the camera states, for messages.
    pub(super) fn media_type(&self) -> String {
        let stated =
            self.values("content-type").next_back().and_then(|value| value.split(';').next()).unwrap_or_default();
        let is_plain = |character: &char| character.is_ascii_alphanumeric() || "/+-.".contains(*character);
        let media: String = stated.trim().chars().take_while(is_plain).take(60).collect();
        if media.is_empty() { "bytes of no stated type".to_owned() } else { media }
    }

    /// Whether the camera announces a stream of parts.
    pub(super) fn is_multipart(&self) -> bool {
        self.values("content-type").any(|value| value.to_ascii_lowercase().starts_with("multipart/"))
    }
}

/// The offset behind the blank line that ends a head.
fn end_of_head(bytes: &[u8], from: usize) -> Option<usize> {
    let mut at = from;
    loop {
        at += bytes.get(at..)?.iter().position(|byte| *byte == b'\n')? + 1;
        match bytes.get(at..)? {
            [b'\n', ..] => return Some(at + 1),
            [b'\r', b'\n', ..] => return Some(at + 2),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Head {
        let (head, length) = Head::parse(text.as_bytes()).unwrap().unwrap();
        assert_eq!(length, text.len(), "{text}");
        for cut in 0..text.len() {
            assert_eq!(Head::parse(&text.as_bytes()[..cut]), Ok(None), "{text} cut at {cut}");
        }
        head
    }

    #[test]
    fn heads_are_read_as_cameras_write_them() {
        for text in [
            "HTTP/1.1 200 OK\r\nX-Frame-Options : SAMEORIGIN\r\nContent-Length:7\r\n\r\n",
            "HTTP/1.1 200 OK\r\nDate: x\r\nTue, 12 Jun 2012 01:56:34 GMT\r\nContent-Length: 7\r\n\r\n",
            "HTTP/1.0 200 OK\r\nHTTP/1.0 200 OK\r\nContent-Length: 7\r\n\r\n",
            "HTTP/1.1 200 OK\nContent-Length: 7\n\n",
            "HTTP/1.0 200\r\nContent-length:7\r\n\r\n",
            "HTTP/1.1  200  OK\r\nContent-Length: 7\r\n\r\n",
            "ICY 200 OK\r\nContent-Length: 7\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 7\r\nContent-Length: many\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: \r\nContent-Length: 7\r\nA; B: c\r\n: nameless\r\n\r\n",
        ] {
            let head = parse(text);
            assert_eq!((head.status, head.framing()), (200, Framing::Length(7)), "{text}");
        }
        let latin = Head::parse(b"HTTP/1.1 200 OK\r\nServer: K\xE4mera\r\n\r\n").unwrap().unwrap().0;
        assert_eq!(latin.values("server").next(), Some("K\u{e4}mera"));
    }

    #[test]
    fn framing_and_connection_follow_the_head() {
        let chunked = parse("HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\nContent-Length: 7\r\n\r\n");
        assert_eq!(chunked.framing(), Framing::Chunked);
        for (length, expected) in [("-1", Framing::UntilClose), ("", Framing::UntilClose), ("0", Framing::Length(0))] {
            let head = parse(&format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n"));
            assert_eq!(head.framing(), expected, "{length}");
        }
        assert!(parse("HTTP/1.1 200 OK\r\n\r\n").keeps_connection());
        assert!(!parse("HTTP/1.1 200 OK\r\nConnection: Close\r\n\r\n").keeps_connection());
        assert!(!parse("HTTP/1.0 200 OK\r\n\r\n").keeps_connection());
        assert!(parse("HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n\r\n").keeps_connection());
        assert!(parse("HTTP/1.0 200 OK\r\nContent-Type: Multipart/x-mixed-replace\r\n\r\n").is_multipart());
    }

    #[test]
    fn what_is_not_http_or_has_no_end_is_refused() {
        for bytes in
            [&b"RTSP/1.0 200 OK\r\n\r\n"[..], b"\xFF\xD8\xFF\xE0\n\n", b"HTTP/1.1 OK\r\n\r\n", b"HTTP/1.1 20 OK\n\n"]
        {
            assert_eq!(Head::parse(bytes), Err(HeadError::NotHttp), "{bytes:?}");
        }
        assert_eq!(Head::parse(&[b'x'; HEAD_BYTES_MAX + 1]), Err(HeadError::TooLong));
        assert_eq!(Head::parse(b""), Ok(None));
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut random = fastrand::Rng::with_seed(5);
        let seed = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nTransfer-Encoding: chunked\r\n\r\n";
        for _ in 0..50_000 {
            let mut bytes = seed.to_vec();
            for _ in 0..random.usize(0..6) {
                let at = random.usize(..bytes.len());
                bytes[at] = random.u8(..);
            }
            bytes.truncate(random.usize(..=bytes.len()));
            drop(Head::parse(&bytes));
        }
    }
}
