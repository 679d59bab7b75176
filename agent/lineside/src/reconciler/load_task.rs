//! One model version's way from its source to its slot.
//!
//! ```text
//! signature -> Downloading -> quarantined? -> Verifying -> Admission -> Warming -> serving
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

use crate::streams::inspector::{Inspector, StreamContext};
use lineside_api::kinds::ModelManifest;
use lineside_api::message::ModelInfo;
use lineside_api::state::ModelState;
use lineside_common::clock;
use lineside_common::digest::Digest;
use lineside_common::error_chain;
use lineside_common::metrics::Metrics;
use lineside_models::admission::{Admission, AdmissionLimits, AdmissionRecord, Benchmark, Rejection};
use lineside_models::fetch::{FetchError, Fetcher, Progress};
use lineside_models::signing::{Keyring, Statement, has_expired};
use lineside_models::store::{DigestRecordKind, FailureRecord, Store, StoreError, VersionRecord};
use lineside_scheduler::slot::{Deployment, Ready};

/// RetryState of one digest, one after the other, after which it is not tried again.
const TRIALS_MAX: u32 = 3;

/// What every version needs on its way.
pub(super) struct LoadContext {
    pub(super) store: Arc<Store>,
    pub(super) fetcher: Fetcher,
    pub(super) keys: Option<Keyring>,
    pub(super) limits: AdmissionLimits,
    pub(super) inspector: Arc<Inspector>,
    pub(super) metrics: Metrics,
    /// Taken from `Verifying` on: reading, admission and loading need memory.
    pub(super) one_at_a_time: Arc<Semaphore>,
}

/// What one version brings along.
pub(super) struct LoadRequest {
    pub(super) manifest: ModelManifest,
    pub(super) slot: Arc<Deployment<StreamContext>>,
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
pub(super) struct LoadedVersion {
    pub(super) info: Arc<ModelInfo>,
    pub(super) digest: Digest,
    pub(super) benchmark: Benchmark,
    pub(super) expires: Option<SystemTime>,
    pub(super) took: Duration,
}

/// Why a version does not serve.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct LoadFailure {
    pub(super) reason: String,
    /// How often it has failed, where it is not tried again.
    pub(super) quarantined_after: Option<u32>,
    /// Its file, where that is known.
    pub(super) digest: Option<Digest>,
}

impl From<String> for LoadFailure {
    fn from(reason: String) -> Self {
        Self { reason, quarantined_after: None, digest: None }
    }
}

impl From<StoreError> for LoadFailure {
    fn from(error: StoreError) -> Self {
        error_chain(&error).into()
    }
}

impl From<FetchError> for LoadFailure {
    fn from(error: FetchError) -> Self {
        error_chain(&error).into()
    }
}

/// Goes the whole way. `None` when the manifest had changed before the version could serve.
pub(super) async fn bring(way: Arc<LoadContext>, request: LoadRequest) -> Result<Option<LoadedVersion>, LoadFailure> {
    let started = Instant::now();
    let (manifest, stage) = (&request.manifest, &request.stage);
    let statement = statement(&way, &request)?;
    stage.set(ModelState::Downloading);
    let digest = match request.known_good.filter(|_| request.is_restored) {
        Some(digest) => digest,
        None => {
            let fetched = tokio::select! {
                fetched = way.fetcher.fetch(manifest, &request.protected, &stage.progress) => fetched?,
                () = request.superseded.cancelled() => return Ok(None),
            };
            if let Some(from) = &fetched.from {
                tracing::info!(
                    event = "model_downloaded", model = manifest.name,
                    version = manifest.version,
                    digest = %fetched.digest,
                    bytes = fetched.bytes,
                    took_ms = started.elapsed().as_millis() as u64,
                    from,
                    "model downloaded"
                );
            }
            let record = VersionRecord {
                name: manifest.name.clone(),
                version: manifest.version,
                digest: fetched.digest,
                size: fetched.bytes,
                source: manifest.source.to_string(),
                fetched: clock::rfc3339(SystemTime::now()),
                pinned: false,
                signature: manifest.signature.clone(),
            };
            tokio::task::block_in_place(|| way.store.put_version(record))?;
            fetched.digest
        }
    };
    let turn = tokio::select! {
        turn = way.one_at_a_time.clone().acquire_owned() => turn,
        () = request.superseded.cancelled() => return Ok(None),
    };
    let work = tokio::task::spawn_blocking(move || {
        let loaded = settle(&way, &request, &digest, statement.as_ref(), started);
        drop(turn);
        let source = &request.manifest.source;
        loaded.map_err(|failure| LoadFailure { reason: format!("{source}: {}", failure.reason), ..failure })
    });
    work.await.unwrap_or_else(|error| Err(format!("loading it panicked: {error}").into()))
}

/// What is vouched for, where keys are configured; a version that nobody vouches for goes no further.
fn statement(way: &LoadContext, request: &LoadRequest) -> Result<Option<Statement>, String> {
    let Some(keys) = &way.keys else { return Ok(None) };
    let manifest = &request.manifest;
    let envelope = manifest.signature.as_ref().ok_or(
        "it is not signed, and --trusted-keys are configured; sign it with `lineside sign` and put the result into \
         source.signature",
    )?;
    let statement = keys
        .verify_statement(envelope, &manifest.name, manifest.version)
        .map_err(|error| format!("its signature is refused: {}", error_chain(&error)))?;
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
    let expiry = statement.expiry().map_err(|error| error_chain(&error))?;
    let has_expired = expiry.is_some_and(|expiry| has_expired(expiry, SystemTime::now()));
    match has_expired && request.known_good != Some(statement.digest) {
        true => Err(format!(
            "its signature has expired ({}); sign it again",
            statement.expires.as_deref().unwrap_or_default()
        )),
        false => Ok(Some(statement)),
    }
}

/// From the file in the store to the slot, on a thread that may block.
fn settle(
    way: &LoadContext,
    request: &LoadRequest,
    digest: &Digest,
    statement: Option<&Statement>,
    started: Instant,
) -> Result<Option<LoadedVersion>, LoadFailure> {
    let (manifest, stage) = (&request.manifest, &request.stage);
    let is_superseded = || request.superseded.is_cancelled();
    if is_superseded() {
        return Ok(None);
    }
    stage.set(ModelState::Verifying);
    let bytes = way.store.read_verified(digest, way.fetcher.bytes_max())?;
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
    let admission = Admission::new(manifest, digest, way.limits)
        .map_err(|rejection| refused(way, request, digest, None, rejection))?;
    let failures_on_record: FailureRecord = way.store.read_digest_record(digest).unwrap_or_default();
    if failures_on_record.quarantined && failures_on_record.key.as_ref() == Some(admission.key()) {
        return Err(given_up(&failures_on_record, digest));
    }
    if failures_on_record.unfinished_loads >= TRIALS_MAX && request.has_alternative {
        let reason = format!("the agent ended {} times while it was loading it", failures_on_record.unfinished_loads);
        return Err(count(way, digest, Some(admission.key()), reason, TRIALS_MAX));
    }
    let known: Option<AdmissionRecord> =
        way.store.read_digest_record(admission.key()).filter(|verdict: &AdmissionRecord| {
            // After a load that never ended the verdict is doubted.
            verdict.digest == *digest && failures_on_record.unfinished_loads == 0
        });
    let benchmark = match known {
        Some(verdict) => verdict.benchmark,
        None => match vet(way, request, digest, &admission, &bytes)? {
            Some(benchmark) => benchmark,
            None => return Ok(None),
        },
    };
    stage.set(ModelState::Warming);
    if is_superseded() {
        return Ok(None);
    }
    let loading =
        FailureRecord { unfinished_loads: failures_on_record.unfinished_loads + 1, ..failures_on_record.clone() };
    way.store.write_digest_record(digest, &loading)?;
    if manifest.stop_first && request.slot.serving().is_some() {
        tracing::info!(model = manifest.name, version = manifest.version, "the version before is stopped first");
        request.slot.stop();
    }
    let loaded = load(manifest, digest, &bytes);
    drop(bytes);
    let ready = match loaded {
        Ok(ready) => ready,
        Err(reason) => {
            return Err(refused(way, request, digest, Some(admission.key()), Rejection::Model(reason)));
        }
    };
    // A success clears what went wrong before with this manifest; what went wrong with another one is remembered.
    match failures_on_record.key.is_none() || failures_on_record.key.as_ref() == Some(admission.key()) {
        true => way.store.delete_digest_record(DigestRecordKind::Failure, digest).map(drop)?,
        false => way.store.write_digest_record(digest, &FailureRecord { unfinished_loads: 0, ..failures_on_record })?,
    }
    if is_superseded() {
        return Ok(None);
    }
    let info = ready.info.clone();
    let inspector = way.inspector.clone();
    request
        .slot
        .serve(ready, move |pipeline, info, taken| inspector.inspect(pipeline, info, &taken))
        .map_err(|error| format!("its threads cannot be started: {error}"))?;
    way.store.touch(digest);
    let expires = statement.and_then(|statement| statement.expiry().ok().flatten());
    Ok(Some(LoadedVersion { info, digest: *digest, benchmark, expires, took: started.elapsed() }))
}

fn vet(
    way: &LoadContext,
    request: &LoadRequest,
    digest: &Digest,
    admission: &Admission,
    bytes: &[u8],
) -> Result<Option<Benchmark>, LoadFailure> {
    let manifest = &request.manifest;
    request.stage.set(ModelState::Vetting);
    let started = Instant::now();
    let benchmark = match admission.run(bytes, || request.superseded.is_cancelled()) {
        Ok(benchmark) => benchmark,
        Err(_) if request.superseded.is_cancelled() => return Ok(None),
        Err(rejection) => return Err(refused(way, request, digest, Some(admission.key()), rejection)),
    };
    tracing::info!(
        event = "model_admitted", model = manifest.name,
        version = manifest.version,
        %digest,
        p50_ms = benchmark.p50_ms,
        p99_ms = benchmark.p99_ms,
        peak_memory_mib = benchmark.peak_memory_bytes >> 20,
        took_ms = started.elapsed().as_millis() as u64,
        "model vetted"
    );
    let verdict = AdmissionRecord {
        digest: *digest,
        engine: "tract".to_owned(),
        benchmark: benchmark.clone(),
        at: clock::rfc3339(SystemTime::now()),
    };
    way.store.write_digest_record(admission.key(), &verdict)?;
    Ok(Some(benchmark))
}

/// Writes a failure down, and sees whether it was the last one. What has served before is not counted against: its
/// failures come from the node, which may be short of memory or busy, and not from the model.
fn refused(
    way: &LoadContext,
    request: &LoadRequest,
    digest: &Digest,
    key: Option<&Digest>,
    rejection: Rejection,
) -> LoadFailure {
    let reason = match rejection {
        rejection @ Rejection::Unavailable { .. } => return error_chain(&rejection).into(),
        Rejection::Manifest(reason) => {
            way.metrics.admission_failures.inc();
            return reason.into();
        }
        Rejection::Model(reason) => reason,
    };
    way.metrics.admission_failures.inc();
    if request.known_good.as_ref() == Some(digest) {
        return reason.into();
    }
    let before: FailureRecord = way.store.read_digest_record(digest).unwrap_or_default();
    // Another manifest may fare better, so its failures are counted by themselves.
    let failures = if before.key.as_ref() == key { before.failures } else { 0 } + 1;
    count(way, digest, key, reason, failures)
}

fn count(way: &LoadContext, digest: &Digest, key: Option<&Digest>, reason: String, failures: u32) -> LoadFailure {
    let failures_on_record = FailureRecord {
        failures,
        reason: reason.clone(),
        at: clock::rfc3339(SystemTime::now()),
        quarantined: failures >= TRIALS_MAX,
        key: key.copied(),
        unfinished_loads: 0,
    };
    if let Err(error) = way.store.write_digest_record(digest, &failures_on_record) {
        let reason = error_chain(&error);
        tracing::error!(event = "failure_record_not_written", reason, "Cannot write the failure record");
    }
    match failures_on_record.quarantined {
        true => given_up(&failures_on_record, digest),
        false => reason.into(),
    }
}

fn given_up(failures_on_record: &FailureRecord, digest: &Digest) -> LoadFailure {
    let reason = format!(
        "it failed {} times and is in quarantine (`lineside store release {digest}` ends it): {}",
        failures_on_record.failures, failures_on_record.reason
    );
    LoadFailure { reason, quarantined_after: Some(failures_on_record.failures), digest: Some(*digest) }
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
