//! Configuration of model artifacts.

use std::path::PathBuf;
use std::time::Duration;

use lineside_common::file_roots::FileRoots;
use lineside_common::net::AllowedHosts;

/// How model files are fetched, stored, verified and admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelsConfig {
    /// Hosts that files may be fetched from. Default: every host but this node itself.
    pub source_hosts: AllowedHosts,
    /// Folders that `file:` sources may be below. Default: none.
    pub file_roots: FileRoots,
    /// Whether sources may use unencrypted HTTP. Default: false.
    pub source_http: bool,
    /// A PEM file of root certificates in addition to those of the system.
    pub source_ca: Option<PathBuf>,
    /// Upper bound of the bandwidth of all downloads together. Default: unlimited.
    pub source_bytes_per_second: Option<u64>,
    /// A source that sends nothing for this long is abandoned. Default: 30 s.
    pub source_stall: Duration,
    /// Downloads start after a random delay of up to this, so that the nodes of a site do not start together. Default:
    /// 3 s.
    pub source_jitter: Duration,
    /// The folder of the mounted secrets. Default: `/var/run/lineside/secrets`.
    pub secrets_dir: PathBuf,
    /// Upper bound of the size of one model file. Default: 2 GiB.
    pub model_bytes_max: u64,
    /// Quota of the model store. Default: 4 GiB.
    pub store_bytes_max: u64,
    /// Trusted public keys: a PEM file or a folder of PEM files. Without them, signatures are not verified.
    pub trusted_keys: Option<PathBuf>,
    /// Number of trusted keys that must have signed a model. At least 1. Default: 1.
    pub signature_threshold: usize,
    /// `host:port` of the agents that are queried before the source.
    pub peers: Vec<String>,
    /// The file with the token that the agents of a site share.
    pub peer_token: Option<PathBuf>,
    /// Address space of the admission process, in bytes. Default: 2 GiB.
    pub admission_memory_bytes: u64,
    /// Processor time and wall time of the admission process, in seconds. Default: 120.
    pub admission_seconds: u64,
}

impl Default for ModelsConfig {
    fn default() -> Self {
        Self {
            source_hosts: AllowedHosts::any(),
            file_roots: FileRoots::default(),
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
