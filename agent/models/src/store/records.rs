//! The small files of the store, as they stand on disk. Fields may be added; what an older agent wrote stays readable.

use std::fmt;

use serde::{Deserialize, Serialize};

use lineside_api::envelope::Envelope;
use lineside_common::digest::Digest;

/// A model version whose file the store holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VersionRecord {
    /// The model's name.
    pub name: String,
    /// Its version.
    pub version: u64,
    /// Its file.
    pub digest: Digest,
    /// Bytes of its file.
    pub size: u64,
    /// Where it came from, without secrets.
    pub source: String,
    /// When it came, RFC 3339.
    pub fetched: String,
    /// Whether it is never evicted.
    #[serde(default)]
    pub pinned: bool,
    /// Who vouches for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<Envelope>,
}

/// `name:version`, as the command line takes it.
impl fmt::Display for VersionRecord {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.name, self.version)
    }
}

/// What went wrong with a digest so far.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FailureRecord {
    /// Attempts that failed, one after the other.
    pub failures: u32,
    /// Why the last one did.
    pub reason: String,
    /// When, RFC 3339.
    pub at: String,
    /// Whether it is tried no more.
    pub quarantined: bool,
    /// What the verdict depended on; another manifest may fare better.
    pub key: Option<Digest>,
    /// Times the agent ended while it was loading this model, one after the other.
    #[serde(default)]
    pub unfinished_loads: u32,
}
