//! Bringing a model's file into the store: from a file of this node, from a peer of the site, or from its source.
//!
//! ```text
//! in the store?  -> done
//! file:          -> read, compared with the digest that is asked for, copied
//! anything else  -> the peers, in random order -> the source
//! ```
//!
//! One digest is fetched by one task at a time; whoever else wants it waits and then finds it. Every byte goes through
//! [`Partial`](crate::store::Partial), so a cut or a restart costs little, and nothing bears a digest's name that does not
//! have it. Dropping the future ends a fetch; what came is kept.

mod object;
mod oci;
mod policy;
mod progress;

mod transfer;

use std::collections::{BTreeSet, HashMap};
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::{Certificate, Url};

use lineside_common::error_chain;
use lineside_common::secrets::{Secret, SecretError};
pub use policy::Policy;
pub use progress::Progress;
use transfer::{Failure, Origin, Terms, Throttle, authorization, basic};

use crate::ModelsConfig;
use crate::store::{Partial, Store};
use lineside_api::kinds::{ModelManifest, ModelSource};
use lineside_common::digest::Digest;
use lineside_common::files;
use lineside_common::metrics::Metrics;

/// Bytes of the file with further certificates at most.
const ROOTS_BYTES_MAX: u64 = 4 << 20;
/// A peer that says nothing for this long is left for the next.
const PEER_STALL: Duration = Duration::from_secs(5);

/// Brings files into the store.
pub struct Fetcher {
    store: Arc<Store>,
    settings: ModelsConfig,
    policy: Policy,
    throttle: Throttle,
    metrics: Metrics,
    busy: Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
}

/// A file that is in the store now.
#[derive(Debug, Clone, PartialEq)]
pub struct Fetched {
    /// Its digest.
    pub digest: Digest,
    /// Its size.
    pub bytes: u64,
    /// Where it came from, without secrets; `None` when it was there already.
    pub from: Option<String>,
}

impl Fetcher {
    /// Fetches into `store`.
    pub fn new(store: Arc<Store>, settings: ModelsConfig, metrics: Metrics) -> Self {
        // Peers are not slowed down.
        let throttle = Throttle::new(settings.source_bytes_per_second);
        let policy = Policy { hosts: settings.source_hosts.clone(), allow_http: settings.source_http };
        Self { store, settings, policy, throttle, metrics, busy: Mutex::default() }
    }

    /// Most bytes a model's file may have.
    pub fn bytes_max(&self) -> u64 {
        self.settings.model_bytes_max
    }

    /// Sees to it that a model's file is in the store. `protected` are the digests that must not give way to it.
    ///
    /// # Errors
    /// What went wrong, for people: which source, why, and what to do.
    pub async fn fetch(
        &self,
        manifest: &ModelManifest,
        protected: &BTreeSet<Digest>,
        progress: &Progress,
    ) -> Result<Fetched, String> {
        if let Some(digest) = manifest.digest
            && let Some(bytes) = self.there(&digest)
        {
            return Ok(Fetched { digest, bytes, from: None });
        }
        let fetched = match (&manifest.source, manifest.digest) {
            (ModelSource::File(path), _) => {
                let work = || self.copy(path, manifest, protected, progress);
                tokio::task::block_in_place(work).map_err(|why| format!("{}: {why}", path.display()))
            }
            (_, Some(digest)) => self.download(manifest, &digest, protected, progress).await,
            (source, None) => Err(format!("{source}: a digest is needed")),
        };
        if fetched.is_err() {
            self.metrics.fetch_failures.inc();
        }
        fetched
    }

    fn there(&self, digest: &Digest) -> Option<u64> {
        self.store.blob(digest)?.metadata().ok().map(|facts| facts.len())
    }

    /// Takes in a file of this node. It is read once to know its digest, and once more to copy it where that is new.
    fn copy(
        &self,
        path: &Path,
        manifest: &ModelManifest,
        protected: &BTreeSet<Digest>,
        progress: &Progress,
    ) -> Result<Fetched, String> {
        let shown = manifest.source.to_string();
        let file = files::open_regular(path).map_err(|error| error.to_string())?;
        let facts = file.metadata().map_err(|error| error.to_string())?;
        self.check_size(facts.len(), manifest.size)?;
        let (digest, bytes) =
            Digest::of_reader(file.take(self.settings.model_bytes_max + 1)).map_err(|error| error.to_string())?;
        self.check_size(bytes, manifest.size)?;
        if let Some(wanted) = manifest.digest.filter(|wanted| *wanted != digest) {
            return Err(format!("it has the digest {digest}, but spec.source.digest asks for {wanted}"));
        }
        if self.there(&digest).is_some() {
            return Ok(Fetched { digest, bytes, from: None });
        }
        let busy = self.busy(&digest);
        let _turn = busy.blocking_lock();
        if self.there(&digest).is_none() {
            self.make_room(bytes, protected).map_err(|failure| failure.reason)?;
            let mut partial = self.store.partial(&digest).map_err(|error| error.to_string())?;
            partial.restart().map_err(|error| error.to_string())?;
            progress.begin(&shown, 0, Some(bytes));
            let file = files::open_regular(path).map_err(|error| error.to_string())?;
            let copied = Digest::of_pieces(file, |piece| {
                progress.add(piece.len() as u64);
                partial.append(piece).map_err(io::Error::other)
            });
            copied.map_err(|error| error.to_string())?;
            partial.finish().map_err(|error| format!("it changed while it was read: {error}"))?;
        }
        Ok(Fetched { digest, bytes, from: Some(shown) })
    }

    fn check_size(&self, bytes: u64, wanted: Option<u64>) -> Result<(), String> {
        match wanted {
            Some(wanted) if wanted != bytes => Err(format!("it has {bytes} bytes, but source.size asks for {wanted}")),
            _ if bytes > self.settings.model_bytes_max => Err(format!(
                "it has {bytes} bytes, and at most {} are taken; raise --model-mib-max",
                self.settings.model_bytes_max
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
    ) -> Result<Fetched, String> {
        let busy = self.busy(digest);
        let _turn = busy.lock().await;
        if let Some(bytes) = self.there(digest) {
            return Ok(Fetched { digest: *digest, bytes, from: None });
        }
        let make_room = |bytes: u64| self.make_room(bytes, protected);
        let mut terms = Terms {
            bytes_max: self.settings.model_bytes_max,
            size: manifest.size,
            throttle: &Throttle::new(None),
            make_room: &make_room,
            progress,
        };
        let mut peers = self.settings.peers.clone();
        fastrand::shuffle(&mut peers);
        for peer in peers {
            match self.peer_gives(&peer, digest, &terms).await {
                Ok(bytes) => {
                    self.metrics.fetch_bytes.with_label_values(&["peer"]).inc_by(bytes);
                    return Ok(Fetched { digest: *digest, bytes, from: Some(peer) });
                }
                Err(failure) => {
                    tracing::info!(peer, %digest, reason = failure.reason, "a peer could not give the file");
                }
            }
        }
        let shown = manifest.source.to_string();
        tokio::time::sleep(self.settings.source_jitter.mul_f64(fastrand::f64())).await;
        terms.throttle = &self.throttle;
        match self.source_gives(manifest, digest, &shown, &mut terms).await {
            Ok(bytes) => {
                self.metrics.fetch_bytes.with_label_values(&["source"]).inc_by(bytes);
                Ok(Fetched { digest: *digest, bytes, from: Some(shown) })
            }
            Err(failure) => Err(format!("{shown}: {}", failure.reason)),
        }
    }

    async fn peer_gives(&self, peer: &str, digest: &Digest, terms: &Terms<'_>) -> Result<u64, Failure> {
        let url = Url::parse(&format!("http://{peer}/v1/blobs/sha256/{}", digest.hex()))
            .map_err(|error| Failure::lasting(error.to_string()))?;
        let headers = match &self.settings.peer_token {
            Some(path) => {
                let token = read_token(path).map_err(Failure::lasting)?;
                authorization(&format!("Bearer {token}")).map_err(Failure::lasting)?
            }
            None => reqwest::header::HeaderMap::new(),
        };
        // Peers are named by the operator, not by a manifest.
        let policy = Policy { hosts: BTreeSet::from([peer.to_owned()]), allow_http: true };
        let client = policy.client(&[], PEER_STALL).map_err(Failure::lasting)?;
        self.take_in(&Origin::Http { client, url, headers }, peer, digest, terms).await
    }

    async fn source_gives(
        &self,
        manifest: &ModelManifest,
        digest: &Digest,
        shown: &str,
        terms: &mut Terms<'_>,
    ) -> Result<u64, Failure> {
        let policy = &self.policy;
        let ModelsConfig { secrets_dir, source_stall, .. } = &self.settings;
        let secret = Secret::open(secrets_dir, manifest.secret.as_deref())
            .map_err(|error| Failure::lasting(error_chain(&error)))?;
        let client =
            policy.client(&self.roots().map_err(Failure::lasting)?, *source_stall).map_err(Failure::lasting)?;
        let origin = match &manifest.source {
            ModelSource::Http(url) => {
                policy.check(url).map_err(Failure::lasting)?;
                let headers = web_login(&secret).map_err(Failure::lasting)?;
                Origin::Http { client, url: url.clone(), headers }
            }
            ModelSource::Object(address) => {
                object::origin(&client, policy, address, &secret).map_err(Failure::lasting)?
            }
            ModelSource::Oci(address) => {
                let (origin, size) = oci::origin(&client, policy, address, &secret, digest).await?;
                terms.size = terms.size.or(Some(size));
                origin
            }
            ModelSource::File(_) => return Err(Failure::lasting("a file is copied, not downloaded")),
        };
        self.take_in(&origin, shown, digest, terms).await
    }

    /// Transfers and compares. A wrong digest may come from the part that an earlier, cut attempt left: then the whole is
    /// fetched once more.
    async fn take_in(&self, origin: &Origin, from: &str, digest: &Digest, terms: &Terms<'_>) -> Result<u64, Failure> {
        let partial = || tokio::task::block_in_place(|| self.store.partial(digest));
        let mut file = partial()?;
        let went_on = file.bytes() > 0;
        transfer::run(origin, from, &mut file, terms).await?;
        match finish(file) {
            Err(crate::store::StoreError::WrongDigest(_)) if went_on => {
                file = partial()?;
                transfer::run(origin, from, &mut file, terms).await?;
                Ok(finish(file)?)
            }
            finished => Ok(finished?),
        }
    }

    fn make_room(&self, bytes: u64, protected: &BTreeSet<Digest>) -> Result<(), Failure> {
        let evicted = tokio::task::block_in_place(|| self.store.make_room(bytes, protected))?;
        for blob in evicted {
            self.metrics.store_evictions.inc();
            tracing::info!(digest = %blob.digest, bytes = blob.bytes, "blob evicted");
        }
        Ok(())
    }

    fn roots(&self) -> Result<Vec<Certificate>, String> {
        let Some(path) = &self.settings.source_ca else { return Ok(Vec::new()) };
        let wrong = |why: String| format!("--source-ca {}: {why}", path.display());
        let pem = files::read_bounded(path, ROOTS_BYTES_MAX).map_err(|error| wrong(error.to_string()))?;
        match Certificate::from_pem_bundle(&pem) {
            Ok(roots) if !roots.is_empty() => Ok(roots),
            _ => Err(wrong("it holds no PEM certificate".to_owned())),
        }
    }

    fn busy(&self, digest: &Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.retain(|_, turn| Arc::strong_count(turn) > 1);
        busy.entry(*digest).or_default().clone()
    }
}

fn finish(partial: Partial) -> Result<u64, crate::store::StoreError> {
    tokio::task::block_in_place(|| partial.finish())
}

fn web_login(secret: &Secret) -> Result<reqwest::header::HeaderMap, String> {
    let text = |error: SecretError| error_chain(&error);
    if let Some(token) = secret.get("token").map_err(text)? {
        return authorization(&format!("Bearer {token}"));
    }
    match secret.login(None).map_err(text)? {
        Some(login) => authorization(&basic(&login)),
        None if secret.is_named() => Err(text(secret.missing("token"))),
        None => Ok(reqwest::header::HeaderMap::new()),
    }
}

/// The secret that a site's agents share, read whenever it is needed.
///
/// # Errors
/// When there is none.
pub fn read_token(path: &Path) -> Result<String, String> {
    let wrong = |why: &str| format!("--peer-token-file {}: {why}", path.display());
    let bytes = files::read_bounded(path, 4096).map_err(|error| wrong(&error.to_string()))?;
    let text = String::from_utf8(bytes).map_err(|_| wrong("it is no text"))?;
    match text.trim() {
        "" => Err(wrong("it is empty")),
        token => Ok(token.to_owned()),
    }
}
