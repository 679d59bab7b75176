//! SHA-256 digests in the format of manifests and results: `sha256:` and 64 lowercase hexadecimal digits.

use std::fmt;
use std::io::{self, Read};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

const PREFIX: &str = "sha256:";

/// A SHA-256 digest, serialized as `sha256:` and 64 lowercase hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Digest([u8; 32]);

/// A text that is not a SHA-256 digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a digest; expected sha256: and 64 hexadecimal digits")]
pub struct DigestError {
    text: String,
}

/// Computes a digest incrementally.
#[derive(Default, Clone)]
pub struct Hasher(Sha256);

impl Hasher {
    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all bytes added.
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Reads `reader` to its end and returns the digest and the number of bytes.
    ///
    /// # Errors
    /// The reader's error.
    pub fn of_reader(reader: impl Read) -> io::Result<(Self, u64)> {
        Self::of_pieces(reader, |_| Ok(()))
    }

    /// As [`Digest::of_reader`], and passes each piece that was read to `consume`.
    ///
    /// # Errors
    /// The first error of the reader or of `consume`.
    pub fn of_pieces<E: From<io::Error>>(
        mut reader: impl Read,
        mut consume: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(Self, u64), E> {
        let mut hasher = Hasher::default();
        let mut buffer = vec![0; 256 << 10];
        let mut bytes = 0;
        loop {
            match reader.read(&mut buffer)? {
                0 => return Ok((hasher.finish(), bytes)),
                read => {
                    hasher.update(&buffer[..read]);
                    consume(&buffer[..read])?;
                    bytes += read as u64;
                }
            }
        }
    }

    /// The 64 hexadecimal digits without the prefix; the file names of the store use this form.
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Parses 64 hexadecimal digits without the prefix.
    ///
    /// # Errors
    /// As [`Digest::parse`].
    pub fn from_hex(digits: &str) -> Result<Self, DigestError> {
        Self::parse(&format!("{PREFIX}{digits}"))
    }

    /// Parses `sha256:` and 64 hexadecimal digits of either case.
    ///
    /// # Errors
    /// [`DigestError`] for any other text.
    pub fn parse(text: &str) -> Result<Self, DigestError> {
        let invalid = || DigestError { text: text.to_owned() };
        let digits = text.strip_prefix(PREFIX).ok_or_else(invalid)?.as_bytes();
        if digits.len() != 64 {
            return Err(invalid());
        }
        let mut digest = [0; 32];
        for (byte, pair) in digest.iter_mut().zip(digits.chunks_exact(2)) {
            let nibble = |digit: u8| (digit as char).to_digit(16).ok_or_else(invalid);
            *byte = (nibble(pair[0])? * 16 + nibble(pair[1])?) as u8;
        }
        Ok(Self(digest))
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, DigestError> {
        Self::parse(&text)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(PREFIX)?;
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_digests_are_parsed() {
        let digest = Digest::of(b"");
        let text = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(digest.to_string(), text);
        assert_eq!(Digest::from_hex(&digest.hex()), Ok(digest));
        assert_eq!(Digest::of_reader(&b"abc"[..]).unwrap(), (Digest::of(b"abc"), 3));
        assert_eq!(Digest::parse(text).unwrap(), digest);
        assert_eq!(Digest::parse(&text.to_uppercase().replace("SHA", "sha")).unwrap(), digest);
        for invalid in ["", "sha256:", "md5:00", &text[..70], &text.replace('e', "g"), &format!("{text}0"), "sha256:é"]
        {
            assert!(Digest::parse(invalid).is_err(), "{invalid}");
        }
    }
}
