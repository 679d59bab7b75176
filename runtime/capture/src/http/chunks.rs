//! Decodes a body in chunks (RFC 9112, section 7.1).

use bytes::{Buf as _, BytesMut};

/// Longest line with the size of a chunk, in bytes.
const LINE_BYTES_MAX: usize = 1 << 10;

/// The size of a chunk is not a hexadecimal number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the chunks of the response are damaged")]
pub(super) struct DamagedChunks;

/// A decoder that receives the body in pieces.
#[derive(Default)]
pub(super) struct Chunks {
    buffer: BytesMut,
    /// Bytes of the current chunk that are still to come.
    left: u64,
    has_ended: bool,
}

impl Chunks {
    /// Decodes a piece into `out`. Returns whether the last chunk has been received.
    pub(super) fn decode(&mut self, piece: &[u8], out: &mut BytesMut) -> Result<bool, DamagedChunks> {
        self.buffer.extend_from_slice(piece);
        while !self.has_ended {
            if self.left > 0 {
                let taken = usize::try_from(self.left).unwrap_or(usize::MAX).min(self.buffer.len());
                out.extend_from_slice(&self.buffer.split_to(taken));
                self.left -= taken as u64;
                if self.left > 0 {
                    return Ok(false);
                }
            }
            let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') else {
                return if self.buffer.len() > LINE_BYTES_MAX { Err(DamagedChunks) } else { Ok(false) };
            };
            let line = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
            self.buffer.advance(end + 1);
            let size = line.split(';').next().unwrap_or_default().trim();
            // The line that ends the chunk before.
            if size.is_empty() {
                continue;
            }
            self.left = u64::from_str_radix(size, 16).map_err(|_| DamagedChunks)?;
            self.has_ended = self.left == 0;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_joined_in_pieces_of_any_size() {
        let body = b"3\r\nabc\r\n0A;name=value\r\ndefghijklm\r\n0\r\n\r\n";
        for step in 1..body.len() {
            let (mut chunks, mut out) = (Chunks::default(), BytesMut::new());
            let ended: Vec<bool> = body.chunks(step).map(|piece| chunks.decode(piece, &mut out).unwrap()).collect();
            assert_eq!((&out[..], ended.last()), (&b"abcdefghijklm"[..], Some(&true)), "in pieces of {step}");
        }
        for damaged in [&b"xyz\r\n"[..], b"-1\r\n", b"fffffffffffffffff\r\n", &[b'1'; 2000]] {
            assert_eq!(Chunks::default().decode(damaged, &mut BytesMut::new()), Err(DamagedChunks), "{damaged:?}");
        }
    }
}
