//! The JSON records of the store, as they are on disk. Fields may be added with a default; records of earlier builds
//! stay readable.

use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use lineside_api::envelope::Envelope;
use lineside_common::digest::Digest;

/// A model version whose file is in the store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VersionRecord {
    /// Name of the model.
    pub name: String,
    /// Version number.
    pub version: u64,
    /// Digest of the model file.
    pub digest: Digest,
    /// Size of the model file in bytes.
    pub size: u64,
    /// Address the file was fetched from, without credentials.
    pub source: String,
    /// When the file was fetched, RFC 3339.
    pub fetched: String,
    /// Whether the version is never evicted. Default: false.
    #[serde(default)]
    pub pinned: bool,
    /// The signature of the manifest, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<Envelope>,
}

/// `name:version`, the form the command line takes.
impl fmt::Display for VersionRecord {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.name, self.version)
    }
}

/// The kind of a record that is kept beside the blobs under a digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DigestRecordKind {
    /// The result of an admission, under the admission key.
    Admission,
    /// The failed attempts of a model file, under the digest of the file.
    Failure,
}

impl DigestRecordKind {
    /// The folder below the store. The names are part of the on-disk format.
    pub(super) fn folder(self) -> &'static str {
        match self {
            Self::Admission => "verdicts",
            Self::Failure => "trials",
        }
    }
}

/// A record that is kept beside the blobs under a digest.
pub trait DigestRecord: Serialize + DeserializeOwned {
    /// The kind of the record, which selects its folder.
    const KIND: DigestRecordKind;
}

/// The failed attempts of a model file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FailureRecord {
    /// Number of consecutive failed attempts.
    pub failures: u32,
    /// Reason of the last failure.
    pub reason: String,
    /// When the last attempt failed, RFC 3339.
    pub at: String,
    /// Whether the file is quarantined and no further attempt is made.
    pub quarantined: bool,
    /// The admission key of the failed attempts. Failures under another key are not counted with these, because another
    /// manifest may be valid for the same file.
    pub key: Option<Digest>,
    /// Number of consecutive times the agent ended while it was loading this file. Default: 0.
    #[serde(default)]
    pub unfinished_loads: u32,
    /// When the model made its worker end or hang within the last hour, in seconds since the epoch. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub faults: Vec<u64>,
}

impl DigestRecord for FailureRecord {
    const KIND: DigestRecordKind = DigestRecordKind::Failure;
}
