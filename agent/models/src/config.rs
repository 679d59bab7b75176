//! The settings of models.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

/// How models come to a node, and what they have to show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelsConfig {
    /// Hosts that may be fetched from, `host` or `host:port`; empty allows any but this node itself.
    pub source_hosts: BTreeSet<String>,
    /// Whether sources may be unencrypted.
    pub source_http: bool,
    /// A PEM file of further root certificates.
    pub source_ca: Option<PathBuf>,
    /// A cap on the bandwidth of downloads.
    pub source_bytes_per_second: Option<u64>,
    /// A source that says nothing for this long is given up.
    pub source_stall: Duration,
    /// Downloads begin within this time, at random.
    pub source_jitter: Duration,
    /// The folder of mounted secrets.
    pub secrets_dir: PathBuf,
    /// Bytes of one model's file at most.
    pub model_bytes_max: u64,
    /// Bytes the store may take.
    pub store_bytes_max: u64,
    /// The keys that are believed: a PEM file or a folder of them.
    pub trusted_keys: Option<PathBuf>,
    /// How many of them have to sign.
    pub signature_threshold: usize,
    /// `host:port` of agents that are asked first.
    pub peers: Vec<String>,
    /// The file with the secret that the site's agents share.
    pub peer_token: Option<PathBuf>,
    /// Bytes of memory that admission may take.
    pub admission_memory_bytes: u64,
    /// Seconds that admission may take.
    pub admission_seconds: u64,
}

impl Default for ModelsConfig {
    fn default() -> Self {
        Self {
            source_hosts: BTreeSet::new(),
            source_http: false,
            source_ca: None,
            source_bytes_per_second: None,
            source_stall: Duration::from_secs(30),
            source_jitter: Duration::from_secs(3),
            secrets_dir: "/var/run/lineside/secrets".into(),
            model_bytes_max: 2048 << 20,
            store_bytes_max: 4096 << 20,
            trusted_keys: None,
            signature_threshold: 1,
            peers: Vec::new(),
            peer_token: None,
            admission_memory_bytes: 2048 << 20,
            admission_seconds: 120,
        }
    }
}
