//! Fetches model files into the store: from a file of this node, from a peer of the site, or from the source.
//!
//! ```text
//! in the store?  -> done
//! file:          -> read, verified against source.digest, copied
//! otherwise      -> the peers, in random order -> the source
//! ```
//!
//! One task at a time fetches a digest; other tasks that need it wait and then find it in the store. Every byte goes
//! through a [`PartialBlob`](crate::store::PartialBlob), so an interruption or a restart costs little, and no file gets
//! the name of a digest that it does not have. Dropping the future cancels a fetch; the received bytes are kept.
//!
//! The tests of this file are in `tests/suite/fetch.rs`, against real and scripted servers.

mod credentials;
mod error;
mod object;
mod oci;
mod policy;
mod progress;
mod throttle;
mod transfer;

use std::collections::{BTreeSet, HashMap};
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::header::HeaderMap;
use reqwest::{Certificate, Client, Url};

use lineside_api::kinds::{ModelManifest, ModelSource};
use lineside_common::backoff::jitter;
use lineside_common::digest::Digest;
use lineside_common::secrets::Secret;
use lineside_common::{error_chain, files};

use crate::store::{PartialBlob, Store, StoreError, StoreErrorKind};
use crate::{FetchMetrics, ModelsConfig, StoreMetrics};

use credentials::authorization;
pub use credentials::{PeerTokenError, read_peer_token};
use error::TransferError;
pub use error::{FetchError, FetchErrorKind};
pub use policy::{AddressPolicy, PolicyError};
pub use progress::Progress;
use throttle::Throttle;
use transfer::{Origin, TransferLimits};

/// Upper bound of the file with additional root certificates.
const ROOTS_BYTES_MAX: u64 = 4 << 20;
/// A peer that sends nothing for this long is abandoned for the next one.
const PEER_STALL: Duration = Duration::from_secs(5);

/// Fetches model files into the store.
pub struct Fetcher {
    store: Arc<Store>,
    config: ModelsConfig,
    policy: AddressPolicy,
    throttle: Throttle,
    metrics: FetchMetrics,
    store_metrics: StoreMetrics,
    /// One lock per digest that is being fetched.
    in_progress: Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
}

/// A file that is in the store.
#[derive(Debug, Clone, PartialEq)]
pub struct Fetched {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub bytes: u64,
    /// The address it was fetched from, without credentials. `None` when it was in the store already.
    pub from: Option<String>,
}

impl Fetcher {
    /// A fetcher for `store`.
    pub fn new(store: Arc<Store>, config: ModelsConfig, metrics: FetchMetrics, store_metrics: StoreMetrics) -> Self {
        let throttle = Throttle::new(config.source_bytes_per_second);
        let policy = AddressPolicy { hosts: config.source_hosts.clone(), allow_http: config.source_http };
        Self { store, config, policy, throttle, metrics, store_metrics, in_progress: Mutex::default() }
    }

    /// Upper bound of the size of a model file, in bytes.
    pub fn bytes_max(&self) -> u64 {
        self.config.model_bytes_max
    }

    /// Fetches the file of a model version, unless it is in the store. Blobs in `protected` are not evicted for it.
    ///
    /// # Errors
    /// When the file cannot be fetched. The message names the source, the cause, and what to do.
    pub async fn fetch(
        &self,
        manifest: &ModelManifest,
        protected: &BTreeSet<Digest>,
        progress: &Progress,
    ) -> Result<Fetched, FetchError> {
        if let Some(digest) = manifest.digest
            && let Some(bytes) = self.stored_bytes(&digest)
        {
            return Ok(Fetched { digest, bytes, from: None });
        }
        let fetched = match (&manifest.source, manifest.digest) {
            (ModelSource::File(path), _) => {
                let copied = tokio::task::block_in_place(|| self.copy(path, manifest, protected, progress));
                copied.map_err(|error| FetchError::new(path.display().to_string(), error))
            }
            (source, Some(digest)) => self
                .download(manifest, &digest, protected, progress)
                .await
                .map_err(|error| FetchError::new(source.to_string(), error)),
            (source, None) => {
                let error = TransferError::permanent(FetchErrorKind::Configuration, "set source.digest");
                Err(FetchError::new(source.to_string(), error))
            }
        };
        if fetched.is_err() {
            self.metrics.failures.inc();
        }
        fetched
    }

    /// The size of a blob that is in the store.
    fn stored_bytes(&self, digest: &Digest) -> Option<u64> {
        self.store.open_blob(digest)?.metadata().ok().map(|metadata| metadata.len())
    }

    /// Copies a file of this node. Reads it once for its digest, and a second time to copy it when the store does not
    /// have it.
    fn copy(
        &self,
        path: &Path,
        manifest: &ModelManifest,
        protected: &BTreeSet<Digest>,
        progress: &Progress,
    ) -> Result<Fetched, TransferError> {
        let unreadable = |error| TransferError::io("the file cannot be read", error);
        let from = manifest.source.to_string();
        let file = self.config.file_roots.open(path)?;
        let metadata = file.metadata().map_err(unreadable)?;
        self.check_size(metadata.len(), manifest.size)?;
        let (digest, bytes) =
            Digest::of_reader(file.take(self.config.model_bytes_max.saturating_add(1))).map_err(unreadable)?;
        self.check_size(bytes, manifest.size)?;
        if let Some(expected) = manifest.digest.filter(|expected| *expected != digest) {
            let message = format!("the file has the digest {digest}, but spec.source.digest is {expected}");
            return Err(TransferError::permanent(FetchErrorKind::DigestMismatch, message));
        }
        if self.stored_bytes(&digest).is_some() {
            return Ok(Fetched { digest, bytes, from: None });
        }
        let lock = self.lock_of(&digest);
        let _guard = lock.blocking_lock();
        if self.stored_bytes(&digest).is_none() {
            self.free_space(bytes, protected)?;
            let mut partial = self.store.open_partial(&digest)?;
            partial.reset()?;
            progress.start(&from, 0, Some(bytes));
            let file = self.config.file_roots.open(path)?;
            let copied = Digest::of_pieces(file, |piece| {
                progress.add(piece.len() as u64);
                partial.append(piece).map_err(io::Error::other)
            });
            copied.map_err(|error| TransferError::io("the file cannot be copied", error))?;
            partial.commit().map_err(|error| {
                let error = TransferError::from(error);
                TransferError::permanent(error.kind, "the file was changed while it was copied").caused_by(error)
            })?;
        }
        Ok(Fetched { digest, bytes, from: Some(from) })
    }

    fn check_size(&self, bytes: u64, expected: Option<u64>) -> Result<(), TransferError> {
        let limit = self.config.model_bytes_max;
        match expected {
            Some(expected) if expected != bytes => Err(TransferError::permanent(
                FetchErrorKind::DigestMismatch,
                format!("the file has {bytes} bytes, but source.size is {expected}"),
            )),
            _ if bytes > limit => Err(TransferError::permanent(
                FetchErrorKind::TooLarge,
                format!("the file has {bytes} bytes, the limit is {limit}; raise --model-mib-max"),
            )),
            _ => Ok(()),
        }
    }

    async fn download(
        &self,
        manifest: &ModelManifest,
        digest: &Digest,
        protected: &BTreeSet<Digest>,
        progress: &Progress,
    ) -> Result<Fetched, TransferError> {
        let lock = self.lock_of(digest);
        let _guard = lock.lock().await;
        if let Some(bytes) = self.stored_bytes(digest) {
            return Ok(Fetched { digest: *digest, bytes, from: None });
        }
        let free_space = |bytes: u64| self.free_space(bytes, protected);
        // Transfers from peers are not throttled: they stay in the network of the site.
        let unthrottled = Throttle::new(None);
        let mut limits = TransferLimits {
            bytes_max: self.config.model_bytes_max,
            expected_size: manifest.size,
            throttle: &unthrottled,
            free_space: &free_space,
            progress,
        };
        if let Some((peer, bytes)) = self.download_from_peers(digest, &limits).await {
            self.metrics.peer_bytes.inc_by(bytes);
            return Ok(Fetched { digest: *digest, bytes, from: Some(peer) });
        }
        tokio::time::sleep(jitter(self.config.source_jitter)).await;
        limits.throttle = &self.throttle;
        let bytes = self.download_from_source(manifest, digest, &mut limits).await?;
        self.metrics.source_bytes.inc_by(bytes);
        Ok(Fetched { digest: *digest, bytes, from: Some(manifest.source.to_string()) })
    }

    /// Queries the peers in random order. Returns the first one that has the file, and the size of the file.
    async fn download_from_peers(&self, digest: &Digest, limits: &TransferLimits<'_>) -> Option<(String, u64)> {
        let mut peers = self.config.peers.clone();
        fastrand::shuffle(&mut peers);
        for peer in peers {
            match self.download_from_peer(&peer, digest, limits).await {
                Ok(bytes) => return Some((peer, bytes)),
                Err(error) => {
                    let reason = error_chain(&error);
                    tracing::info!(
                        event = "peer_fetch_failed",
                        peer,
                        %digest,
                        reason,
                        "Cannot fetch the file from a peer"
                    );
                }
            }
        }
        None
    }

    async fn download_from_peer(
        &self,
        peer: &str,
        digest: &Digest,
        limits: &TransferLimits<'_>,
    ) -> Result<u64, TransferError> {
        let url = Url::parse(&format!("http://{peer}/v1/blobs/sha256/{}", digest.hex())).map_err(|error| {
            TransferError::permanent(FetchErrorKind::Configuration, "the address of the peer is not valid")
                .caused_by(error)
        })?;
        let headers = match &self.config.peer_token {
            Some(path) => {
                let token = read_peer_token(path).map_err(|error| {
                    TransferError::permanent(FetchErrorKind::Configuration, "the peer token cannot be used")
                        .caused_by(error)
                })?;
                authorization(&format!("Bearer {token}"))?
            }
            None => HeaderMap::new(),
        };
        // The operator names the peers, not a manifest.
        let policy = AddressPolicy { hosts: [peer].into_iter().collect(), allow_http: true };
        let client = client(&policy, &[], PEER_STALL)?;
        self.transfer(&Origin::Http { client, url, headers }, peer, digest, limits).await
    }

    async fn download_from_source(
        &self,
        manifest: &ModelManifest,
        digest: &Digest,
        limits: &mut TransferLimits<'_>,
    ) -> Result<u64, TransferError> {
        let policy = &self.policy;
        let ModelsConfig { secrets_dir, source_stall, .. } = &self.config;
        let secret = Secret::open(secrets_dir, manifest.secret.as_deref()).map_err(TransferError::secret)?;
        let client = client(policy, &self.roots()?, *source_stall)?;
        let origin = match &manifest.source {
            ModelSource::Http(url) => {
                policy.check(url)?;
                Origin::Http { client, url: url.clone(), headers: credentials::web_server(&secret)? }
            }
            ModelSource::Object(address) => object::origin(&client, policy, address, &secret)?,
            ModelSource::Oci(address) => {
                let (origin, size) = oci::origin(&client, policy, address, &secret, digest).await?;
                limits.expected_size = limits.expected_size.or(Some(size));
                origin
            }
            ModelSource::File(_) => {
                let message = "a local file is copied, not downloaded";
                return Err(TransferError::permanent(FetchErrorKind::Configuration, message));
            }
        };
        self.transfer(&origin, &manifest.source.to_string(), digest, limits).await
    }

    /// Transfers the file and commits it. When the digest does not match and the transfer had resumed, the bytes of the
    /// earlier attempt may be the cause: the complete file is transferred once more.
    async fn transfer(
        &self,
        origin: &Origin,
        from: &str,
        digest: &Digest,
        limits: &TransferLimits<'_>,
    ) -> Result<u64, TransferError> {
        let open = || tokio::task::block_in_place(|| self.store.open_partial(digest));
        let mut partial = open()?;
        let has_resumed = partial.bytes() > 0;
        transfer::run(origin, from, &mut partial, limits).await?;
        match commit(partial) {
            Err(error) if has_resumed && error.kind() == StoreErrorKind::DigestMismatch => {
                partial = open()?;
                transfer::run(origin, from, &mut partial, limits).await?;
                Ok(commit(partial)?)
            }
            committed => Ok(committed?),
        }
    }

    fn free_space(&self, bytes: u64, protected: &BTreeSet<Digest>) -> Result<(), TransferError> {
        let evicted = tokio::task::block_in_place(|| self.store.free_space(bytes, protected))?;
        for blob in evicted {
            self.store_metrics.evictions.inc();
            tracing::info!(event = "blob_evicted", digest = %blob.digest, bytes = blob.bytes, "Blob evicted");
        }
        Ok(())
    }

    /// The additional root certificates of `--source-ca`. The file is read for each fetch.
    fn roots(&self) -> Result<Vec<Certificate>, TransferError> {
        let Some(path) = &self.config.source_ca else { return Ok(Vec::new()) };
        let invalid = |what: &str| {
            TransferError::permanent(FetchErrorKind::Configuration, format!("--source-ca {} {what}", path.display()))
        };
        let pem =
            files::read_bounded(path, ROOTS_BYTES_MAX).map_err(|error| invalid("cannot be read").caused_by(error))?;
        let roots = Certificate::from_pem_bundle(&pem).unwrap_or_default();
        if roots.is_empty() { Err(invalid("does not contain a PEM certificate")) } else { Ok(roots) }
    }

    /// The lock of a digest. Locks that no task uses are removed.
    fn lock_of(&self, digest: &Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.in_progress.lock();
        locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        locks.entry(*digest).or_default().clone()
    }
}

fn client(policy: &AddressPolicy, roots: &[Certificate], stall: Duration) -> Result<Client, TransferError> {
    policy.client(roots, stall).map_err(|error| {
        TransferError::permanent(FetchErrorKind::Configuration, "the HTTPS client cannot be created").caused_by(error)
    })
}

fn commit(partial: PartialBlob) -> Result<u64, StoreError> {
    tokio::task::block_in_place(|| partial.commit())
}
