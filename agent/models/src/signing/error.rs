//! The error of signatures and keys.

use std::error::Error;
use std::io;
use std::path::PathBuf;

/// What a caller branches on when signing or verifying fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SigningErrorKind {
    /// A key file cannot be read or written.
    Io,
    /// A key file does not contain a usable key, or the threshold does not match the keys.
    Keys,
    /// The payload of an envelope is not valid.
    Payload,
    /// A signature of a trusted key does not verify.
    InvalidSignature,
    /// Fewer trusted keys than required have signed.
    Untrusted,
    /// The signature is valid, but for another payload type or model version.
    OtherSubject,
    /// A text is not a date or time.
    Time,
}

/// Why signing or verifying failed. The message names the file or the key.
#[derive(Debug, thiserror::Error)]
pub enum SigningError {
    /// A key file cannot be read or written.
    #[error("cannot access {}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
    /// A file is not an Ed25519 public key.
    #[error("{} is not a PEM-encoded Ed25519 public key", path.display())]
    NotPublicKey {
        /// The file.
        path: PathBuf,
    },
    /// A file is not an Ed25519 private key.
    #[error("{} is not a PEM-encoded Ed25519 private key; `lineside keygen` creates one", path.display())]
    NotPrivateKey {
        /// The file.
        path: PathBuf,
    },
    /// A folder has no keys.
    #[error("{} does not contain a .pem or .pub file", path.display())]
    NoKeys {
        /// The folder.
        path: PathBuf,
    },
    /// The threshold is 0 or exceeds the number of keys.
    #[error("the signature threshold is {threshold}, but {} contains {keys} keys", path.display())]
    Threshold {
        /// The file or folder of the keys.
        path: PathBuf,
        /// How many keys must sign.
        threshold: usize,
        /// How many keys there are.
        keys: usize,
    },
    /// A key file exists already. Keys are never overwritten.
    #[error("{} exists already and is not overwritten", path.display())]
    KeyExists {
        /// The file.
        path: PathBuf,
    },
    /// The system does not provide random numbers.
    #[error("the system does not provide random numbers")]
    Random,
    /// The payload of an envelope is not valid.
    #[error("the signed payload is not valid")]
    Payload(#[source] Box<dyn Error + Send + Sync>),
    /// The payload is that of an earlier version, which did not state what else decides.
    #[error(
        "the signed payload does not state `rollback` and `specDigest`, as signatures of earlier versions; sign it again with \
         `lineside sign --manifest`"
    )]
    FormerPayload,
    /// A manifest cannot be represented in the signed form.
    #[error("the digest of the spec cannot be computed")]
    Spec(#[source] serde_json::Error),
    /// A number of the spec is not finite, which JSON cannot represent.
    #[error("the spec contains a number that is not finite")]
    NotFinite,
    /// The envelope has another payload type.
    #[error("the signature is for a payload of type {actual}, expected {expected}")]
    PayloadType {
        /// The type that is expected.
        expected: String,
        /// The type of the envelope.
        actual: String,
    },
    /// A signature of a trusted key does not verify.
    #[error("the signature of key {key} is not valid")]
    InvalidSignature {
        /// The first digits of the key id.
        key: String,
    },
    /// Fewer trusted keys than required have signed.
    #[error("{trusted} of {threshold} required signatures by trusted keys; signed by {signed_by}")]
    NotEnoughSignatures {
        /// Valid signatures by trusted keys.
        trusted: usize,
        /// Required signatures.
        threshold: usize,
        /// The first digits of the ids of all keys that have signed.
        signed_by: String,
    },
    /// The signature is for another model version.
    #[error("the signature is for {signed}, expected {expected}")]
    OtherVersion {
        /// The signed model version.
        signed: String,
        /// The model version of the manifest.
        expected: String,
    },
    /// A text is not a date or time.
    #[error("`{text}` is not a date such as 2027-12-31 or 2027-12-31T12:00:00Z")]
    Time {
        /// The text.
        text: String,
        /// Why it is not a time.
        source: humantime::TimestampError,
    },
}

impl SigningError {
    /// What a caller branches on.
    pub fn kind(&self) -> SigningErrorKind {
        match self {
            Self::Io { .. } | Self::KeyExists { .. } | Self::Random => SigningErrorKind::Io,
            Self::NotPublicKey { .. } | Self::NotPrivateKey { .. } | Self::NoKeys { .. } | Self::Threshold { .. } => {
                SigningErrorKind::Keys
            }
            Self::Payload(_) | Self::FormerPayload | Self::Spec(_) | Self::NotFinite => SigningErrorKind::Payload,
            Self::InvalidSignature { .. } => SigningErrorKind::InvalidSignature,
            Self::NotEnoughSignatures { .. } => SigningErrorKind::Untrusted,
            Self::PayloadType { .. } | Self::OtherVersion { .. } => SigningErrorKind::OtherSubject,
            Self::Time { .. } => SigningErrorKind::Time,
        }
    }
}
