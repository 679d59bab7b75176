//! One model version's way from its source to its slot.
//!
//! ```text
//! signature -> Downloading -> quarantined? -> Verifying -> Vetting -> Warming -> serving
//!              (no network      (digest)      (the bytes   (a child;   (loaded beside what serves,
//!               if stored)                     that load)   once)       run once, then the flip)
//! ```
//!
//! Downloads go side by side; from `Verifying` on, one model at a time. The bytes are read once: those whose digest was
//! compared are those that are vetted and those that are loaded. Before each long step it is asked whether the manifest
//! has changed meanwhile. Whatever fails leaves what serves alone, unless the manifest asked to stop that first.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use lineside_inference::pipeline::{Pipeline, engine_for};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::streams::infer::{Inspector, StreamContext};
use lineside_api::kinds::ModelManifest;
use lineside_api::message::ModelInfo;
use lineside_api::state::ModelState;
use lineside_common::clock;
use lineside_common::digest::Digest;
use lineside_common::metrics::Metrics;
use lineside_models::fetch::{Fetcher, Progress};
use lineside_models::store;
use lineside_models::store::{Kind, Store, Trials, Version};
use lineside_models::trust::{Keyring, Statement, has_expired};
use lineside_models::vet::{Figures, Limits, Refusal, Verdict, Vetting};
use lineside_scheduler::slot::{Ready, Slot};

/// Failures of one digest, one after the other, after which it is not tried again.
const TRIALS_MAX: u32 = 3;

/// What every version needs on its way.
pub(super) struct Way {
    pub(super) store: Arc<Store>,
    pub(super) fetcher: Fetcher,
    pub(super) keys: Option<Keyring>,
    pub(super) limits: Limits,
    pub(super) inspector: Arc<Inspector>,
    pub(super) metrics: Metrics,
    /// Taken from `Verifying` on: reading, vetting and loading need memory.
    pub(super) one_at_a_time: Arc<Semaphore>,
}

/// What one version brings along.
pub(super) struct Errand {
    pub(super) manifest: ModelManifest,
    pub(super) slot: Arc<Slot<StreamContext>>,
    /// The digest under which this very version has served before: it is taken from the store, and its signature may
    /// have expired since.
    pub(super) known_good: Option<Digest>,
    /// Whether it is only to be taken from the store.
    pub(super) is_restored: bool,
    /// Whether something else could serve in its place.
    pub(super) has_alternative: bool,
    /// Digests that must not give way to it.
    pub(super) protected: BTreeSet<Digest>,
    /// Cancelled when the manifest has changed.
    pub(super) superseded: CancellationToken,
    pub(super) stage: Arc<Stage>,
}

/// Where a version is on its way.
pub(super) struct Stage {
    state: Mutex<ModelState>,
    pub(super) progress: Progress,
}

impl Stage {
    pub(super) fn new(manifest: &ModelManifest) -> Self {
        Self { state: Mutex::new(ModelState::Pending), progress: Progress::new(&manifest.name, manifest.version) }
    }

    pub(super) fn get(&self) -> ModelState {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: ModelState) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }
}

/// A version that serves now.
#[derive(Debug, Clone)]
pub(super) struct Brought {
    pub(super) info: Arc<ModelInfo>,
    pub(super) digest: Digest,
    pub(super) figures: Figures,
    pub(super) expires: Option<SystemTime>,
    pub(super) took: Duration,
}

/// Why a version does not serve.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Setback {
    pub(super) reason: String,
    /// How often it has failed, where it is not tried again.
    pub(super) quarantined_after: Option<u32>,
    /// Its file, where that is known.
    pub(super) digest: Option<Digest>,
}

impl From<String> for Setback {
    fn from(reason: String) -> Self {
        Self { reason, quarantined_after: None, digest: None }
    }
}

impl From<store::Error> for Setback {
    fn from(error: store::Error) -> Self {
        error.to_string().into()
    }
}

/// Goes the whole way. `None` when the manifest had changed before the version could serve.
pub(super) async fn bring(way: Arc<Way>, errand: Errand) -> Result<Option<Brought>, Setback> {
    let started = Instant::now();
    let (manifest, stage) = (&errand.manifest, &errand.stage);
    let statement = statement(&way, &errand)?;
    stage.set(ModelState::Downloading);
    let digest = match errand.known_good.filter(|_| errand.is_restored) {
        Some(digest) => digest,
        None => {
            let fetched = tokio::select! {
                fetched = way.fetcher.fetch(manifest, &errand.protected, &stage.progress) => fetched?,
                () = errand.superseded.cancelled() => return Ok(None),
            };
            if let Some(from) = &fetched.from {
                tracing::info!(
                    model = manifest.name,
                    version = manifest.version,
                    digest = %fetched.digest,
                    bytes = fetched.bytes,
                    took_ms = started.elapsed().as_millis() as u64,
                    from,
                    "model downloaded"
                );
            }
            let record = Version {
                name: manifest.name.clone(),
                version: manifest.version,
                digest: fetched.digest,
                size: fetched.bytes,
                source: manifest.source.to_string(),
                fetched: clock::rfc3339(SystemTime::now()),
                pinned: false,
                signature: manifest.signature.clone(),
            };
            tokio::task::block_in_place(|| way.store.record(record))?;
            fetched.digest
        }
    };
    let turn = tokio::select! {
        turn = way.one_at_a_time.clone().acquire_owned() => turn,
        () = errand.superseded.cancelled() => return Ok(None),
    };
    let work = tokio::task::spawn_blocking(move || {
        let brought = settle(&way, &errand, &digest, statement.as_ref(), started);
        drop(turn);
        let source = &errand.manifest.source;
        brought.map_err(|setback| Setback { reason: format!("{source}: {}", setback.reason), ..setback })
    });
    work.await.unwrap_or_else(|error| Err(format!("loading it panicked: {error}").into()))
}

/// What is vouched for, where keys are configured; a version that nobody vouches for goes no further.
fn statement(way: &Way, errand: &Errand) -> Result<Option<Statement>, String> {
    let Some(keys) = &way.keys else { return Ok(None) };
    let manifest = &errand.manifest;
    let envelope = manifest.signature.as_ref().ok_or(
        "it is not signed, and --trusted-keys are configured; sign it with `lineside sign` and put the result into \
         source.signature",
    )?;
    let statement = keys
        .statement(envelope, &manifest.name, manifest.version)
        .map_err(|reason| format!("its signature is refused: {reason}"))?;
    if let Some(digest) = manifest.digest.filter(|digest| *digest != statement.digest) {
        return Err(format!(
            "its signature is refused: it is signed for {}, and source.digest asks for {digest}",
            statement.digest
        ));
    }
    if let Some(size) = manifest.size.filter(|size| *size != statement.size) {
        return Err(format!(
            "its signature is refused: it is signed for {} bytes, and source.size asks for {size}",
            statement.size
        ));
    }
    let expiry = statement.expiry()?;
    let has_expired = expiry.is_some_and(|expiry| has_expired(expiry, SystemTime::now()));
    match has_expired && errand.known_good != Some(statement.digest) {
        true => Err(format!(
            "its signature has expired ({}); sign it again",
            statement.expires.as_deref().unwrap_or_default()
        )),
        false => Ok(Some(statement)),
    }
}

/// From the file in the store to the slot, on a thread that may block.
fn settle(
    way: &Way,
    errand: &Errand,
    digest: &Digest,
    statement: Option<&Statement>,
    started: Instant,
) -> Result<Option<Brought>, Setback> {
    let (manifest, stage) = (&errand.manifest, &errand.stage);
    let is_superseded = || errand.superseded.is_cancelled();
    if is_superseded() {
        return Ok(None);
    }
    stage.set(ModelState::Verifying);
    let bytes = way.store.read(digest, way.fetcher.bytes_max())?;
    if let Some(statement) =
        statement.filter(|statement| (statement.digest, statement.size) != (*digest, bytes.len() as u64))
    {
        return Err(format!(
            "its signature is refused: it is signed for {} with {} bytes, and this is {digest} with {} bytes",
            statement.digest,
            statement.size,
            bytes.len()
        )
        .into());
    }
    // From here on it is the model, its manifest or its golden samples.
    stage.set(ModelState::Vetting);
    let vetting =
        Vetting::new(manifest, digest, way.limits).map_err(|refusal| refused(way, errand, digest, None, refusal))?;
    let trials: Trials = way.store.recall(Kind::Trials, digest).unwrap_or_default();
    if trials.quarantined && trials.key.as_ref() == Some(vetting.key()) {
        return Err(given_up(&trials, digest));
    }
    if trials.unfinished_loads >= TRIALS_MAX && errand.has_alternative {
        let reason = format!("the agent ended {} times while it was loading it", trials.unfinished_loads);
        return Err(count(way, digest, Some(vetting.key()), reason, TRIALS_MAX));
    }
    let known: Option<Verdict> = way.store.recall(Kind::Verdicts, vetting.key()).filter(|verdict: &Verdict| {
        // After a load that never ended the verdict is doubted.
        verdict.digest == *digest && trials.unfinished_loads == 0
    });
    let figures = match known {
        Some(verdict) => verdict.figures,
        None => match vet(way, errand, digest, &vetting, &bytes)? {
            Some(figures) => figures,
            None => return Ok(None),
        },
    };
    stage.set(ModelState::Warming);
    if is_superseded() {
        return Ok(None);
    }
    let loading = Trials { unfinished_loads: trials.unfinished_loads + 1, ..trials.clone() };
    way.store.remember(Kind::Trials, digest, &loading)?;
    if manifest.stop_first && errand.slot.serving().is_some() {
        tracing::info!(model = manifest.name, version = manifest.version, "the version before is stopped first");
        errand.slot.stop();
    }
    let loaded = load(manifest, digest, &bytes);
    drop(bytes);
    let ready = match loaded {
        Ok(ready) => ready,
        Err(reason) => {
            return Err(refused(way, errand, digest, Some(vetting.key()), Refusal::Model(reason)));
        }
    };
    // A success clears what went wrong before with this manifest; what went wrong with another one is remembered.
    match trials.key.is_none() || trials.key.as_ref() == Some(vetting.key()) {
        true => way.store.forget(Kind::Trials, digest).map(drop)?,
        false => way.store.remember(Kind::Trials, digest, &Trials { unfinished_loads: 0, ..trials })?,
    }
    if is_superseded() {
        return Ok(None);
    }
    let info = ready.info.clone();
    let inspector = way.inspector.clone();
    errand
        .slot
        .serve(ready, move |pipeline, info, taken| inspector.inspect(pipeline, info, &taken))
        .map_err(|error| format!("its threads cannot be started: {error}"))?;
    way.store.touch(digest);
    let expires = statement.and_then(|statement| statement.expiry().ok().flatten());
    Ok(Some(Brought { info, digest: *digest, figures, expires, took: started.elapsed() }))
}

fn vet(
    way: &Way,
    errand: &Errand,
    digest: &Digest,
    vetting: &Vetting,
    bytes: &[u8],
) -> Result<Option<Figures>, Setback> {
    let manifest = &errand.manifest;
    errand.stage.set(ModelState::Vetting);
    let started = Instant::now();
    let figures = match vetting.run(bytes, || errand.superseded.is_cancelled()) {
        Ok(figures) => figures,
        Err(_) if errand.superseded.is_cancelled() => return Ok(None),
        Err(refusal) => return Err(refused(way, errand, digest, Some(vetting.key()), refusal)),
    };
    tracing::info!(
        model = manifest.name,
        version = manifest.version,
        %digest,
        p50_ms = figures.p50_ms,
        p99_ms = figures.p99_ms,
        peak_memory_mib = figures.peak_memory_bytes >> 20,
        took_ms = started.elapsed().as_millis() as u64,
        "model vetted"
    );
    let verdict = Verdict {
        digest: *digest,
        engine: "tract".to_owned(),
        figures: figures.clone(),
        at: clock::rfc3339(SystemTime::now()),
    };
    way.store.remember(Kind::Verdicts, vetting.key(), &verdict)?;
    Ok(Some(figures))
}

/// Writes a failure down, and sees whether it was the last one. What has served before is not counted against: its
/// failures come from the node, which may be short of memory or busy, and not from the model.
fn refused(way: &Way, errand: &Errand, digest: &Digest, key: Option<&Digest>, refusal: Refusal) -> Setback {
    let reason = match refusal {
        Refusal::Unknown(reason) => return reason.into(),
        Refusal::Manifest(reason) => {
            way.metrics.vet_failures.inc();
            return reason.into();
        }
        Refusal::Model(reason) => reason,
    };
    way.metrics.vet_failures.inc();
    if errand.known_good.as_ref() == Some(digest) {
        return reason.into();
    }
    let before: Trials = way.store.recall(Kind::Trials, digest).unwrap_or_default();
    // Another manifest may fare better, so its failures are counted by themselves.
    let failures = if before.key.as_ref() == key { before.failures } else { 0 } + 1;
    count(way, digest, key, reason, failures)
}

fn count(way: &Way, digest: &Digest, key: Option<&Digest>, reason: String, failures: u32) -> Setback {
    let trials = Trials {
        failures,
        reason: reason.clone(),
        at: clock::rfc3339(SystemTime::now()),
        quarantined: failures >= TRIALS_MAX,
        key: key.copied(),
        unfinished_loads: 0,
    };
    if let Err(error) = way.store.remember(Kind::Trials, digest, &trials) {
        tracing::error!(%error, "a failed attempt could not be written down");
    }
    match trials.quarantined {
        true => given_up(&trials, digest),
        false => reason.into(),
    }
}

fn given_up(trials: &Trials, digest: &Digest) -> Setback {
    let reason = format!(
        "it failed {} times and is in quarantine (`lineside store release {digest}` ends it): {}",
        trials.failures, trials.reason
    );
    Setback { reason, quarantined_after: Some(trials.failures), digest: Some(*digest) }
}

/// Loads a model, with a warm pipeline for each instance.
fn load(manifest: &ModelManifest, digest: &Digest, bytes: &[u8]) -> Result<Ready, String> {
    let engine = engine_for(&manifest.spec).map_err(|error| error.to_string())?;
    let first = Pipeline::load(engine, bytes, &manifest.spec).map_err(|error| error.to_string())?;
    let info = ModelInfo {
        name: manifest.name.clone(),
        version: manifest.version,
        digest: digest.to_string(),
        engine: first.engine().to_owned(),
        device: "cpu".to_owned(),
    };
    let mut pipelines = vec![first];
    for _ in 1..manifest.instances {
        let fork = pipelines[0].fork().map_err(|error| error.to_string())?;
        pipelines.push(fork);
    }
    Ok(Ready { info: Arc::new(info), pipelines })
}
