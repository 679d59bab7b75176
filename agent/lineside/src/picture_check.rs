//! Decides in a child process whether bytes are a picture.
//!
//! A snapshot sends the bytes of a camera source off the node. Where a manifest names something that is not a camera, these bytes
//! can be any file or any answer of a local service. Therefore only a picture that has been decoded is sent, and only as far as it
//! reaches: bytes behind its end are cut off. The agent itself decodes nothing: the child does, with limits on memory and time.

use std::io::{self, Read as _};
use std::time::Duration;

use bytes::Bytes;
use lineside_common::child_process::{self, ChildPriority, ProcessLimits};
use lineside_common::sandbox::restrict_myself;
use lineside_inference::decode::{DecodeOptions, decode};
use lineside_ipc::jpeg::{self, Extent};
use lineside_ipc::picture_header::{HeaderError, PictureFormat, PictureHeader};
use lineside_ipc::png;

/// The hidden subcommand of the child.
pub const SUBCOMMAND: &str = "picture-child";
/// Longest time to decode a picture.
const DEADLINE: Duration = Duration::from_secs(5);
/// Memory of the child apart from the picture, in bytes: the program with its libraries, and the encoded picture twice.
const BASE_BYTES: u64 = 512 << 20;
/// Longest processor time of the child, in seconds.
const CPU_SECONDS: u64 = 5;

/// Why bytes are not sent.
#[derive(Debug, thiserror::Error)]
pub enum PictureCheckError {
    /// The bytes do not begin as a picture, or are not complete.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The bytes cannot be decoded.
    #[error("the bytes are not a picture: {0}")]
    NotDecoded(&'static str),
    /// The child cannot be started or communicated with.
    #[error("the picture cannot be checked")]
    Io(#[from] io::Error),
}

/// What a caller branches on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PictureCheckErrorKind {
    /// The bytes are not a picture.
    NotAPicture,
    /// The check did not take place.
    Unavailable,
}

impl PictureCheckError {
    /// What a caller branches on.
    pub fn kind(&self) -> PictureCheckErrorKind {
        match self {
            Self::Header(_) | Self::NotDecoded(_) => PictureCheckErrorKind::NotAPicture,
            Self::Io(_) => PictureCheckErrorKind::Unavailable,
        }
    }
}

/// Returns the picture at the start of `bytes`, once a child process has decoded it. Waits up to 5 s.
///
/// # Errors
/// When the bytes are not a picture, or the child cannot be started.
pub fn check(bytes: &Bytes) -> Result<Bytes, PictureCheckError> {
    let picture = bytes.slice(..extent(bytes)?);
    let output = child_process::run(child_process::own_command(SUBCOMMAND), &[&picture], DEADLINE, || false)?;
    match output.status {
        Some(status) if status.success() => Ok(picture),
        // The output of a process that has decoded untrusted bytes is not trusted either, and does not leave the node.
        Some(status) if status.code().is_some() => Err(PictureCheckError::NotDecoded("they cannot be decoded")),
        Some(_) => Err(PictureCheckError::NotDecoded("decoding them ended the process")),
        None => Err(PictureCheckError::NotDecoded("decoding them took too long")),
    }
}

/// The length of the picture at the start of the bytes.
fn extent(bytes: &[u8]) -> Result<usize, HeaderError> {
    match PictureHeader::read(bytes)?.format {
        PictureFormat::Png => png::extent(bytes).ok_or(HeaderError::Truncated),
        PictureFormat::Jpeg => match jpeg::extent(bytes) {
            Extent::Complete(length) => Ok(length),
            Extent::Truncated | Extent::Interrupted(_) => Err(HeaderError::Truncated),
            Extent::NotJpeg => Err(HeaderError::NotAPicture),
        },
    }
}

/// The child: decodes the bytes of its standard input.
///
/// # Errors
/// When the bytes are not a picture, or the limits cannot be set.
pub fn child_main() -> Result<(), PictureCheckError> {
    let limits = DecodeOptions::default();
    let mut bytes = Vec::new();
    io::stdin().lock().take(limits.encoded_bytes_max as u64).read_to_end(&mut bytes)?;
    let memory_bytes = BASE_BYTES.saturating_add(PictureHeader::read(&bytes)?.decode_bytes());
    child_process::limit_myself(&ProcessLimits {
        memory_bytes,
        cpu_seconds: Some(CPU_SECONDS),
        priority: ChildPriority::Background,
    })?;
    restrict_myself();
    decode(&bytes, &limits).map(drop).map_err(|_| PictureCheckError::NotDecoded("they cannot be decoded"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_picture_is_refused_before_a_process_starts() {
        for bytes in [&b"root:x:0:0:root:/root:/bin/bash\n"[..], b"eyJhbGciOiJSUzI1NiJ9.e30.c2ln", b"{}", b""] {
            let error = check(&Bytes::from_static(bytes)).unwrap_err();
            assert_eq!(error.kind(), PictureCheckErrorKind::NotAPicture);
            assert!(error.to_string().contains("not a picture"), "{error}");
        }
    }

    #[test]
    fn bytes_behind_the_picture_do_not_belong_to_it() {
        let mut picture = vec![0xFF, 0xD8, 0xFF, 0xC0, 0, 11, 8, 0, 8, 0, 8, 1, 1, 0x11, 0];
        picture.extend([0xFF, 0xDA, 0, 8, 1, 1, 0, 0, 63, 0, 0x12, 0xFF, 0xD9]);
        let with_secret = [&picture[..], b"root:x:0:0"].concat();
        assert_eq!(extent(&with_secret), Ok(picture.len()));
        assert_eq!(extent(&picture[..picture.len() - 1]), Err(HeaderError::Truncated));
    }
}
