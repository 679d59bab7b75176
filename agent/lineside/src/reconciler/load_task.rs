//! Loads one version of a model: from its source to a worker that serves.
//!
//! ```text
//! signature -> Downloading -> Verifying -> quarantined? -> Vetting -> Warming -> serving
//!              (no network     (the bytes    (digest and     (child     (loaded beside the
//!               if stored)      that load)    manifest)       process)   version before)
//! ```
//!
//! Downloads run in parallel; from `Verifying` on, one version at a time, because reading, admission and loading need memory.
//! The bytes are read once: those whose digest was compared are those that are admitted and loaded. Before each long step the
//! task checks whether the manifest has changed. A failure leaves the version that serves alone, unless the manifest asks for
//! it to be stopped first.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use lineside_api::kinds::ModelManifest;
use lineside_api::message::ModelInfo;
use lineside_api::spec::Isolation;
use lineside_api::state::ModelState;
use lineside_api::status::Download;
use lineside_common::digest::Digest;
use lineside_common::{clock, error_chain};
use lineside_models::AdmissionMetrics;
use lineside_models::admission::{Admission, AdmissionLimits, AdmissionRecord, Benchmark, Rejection};
use lineside_models::fetch::{FetchError, Fetcher, Progress};
use lineside_models::signing::{Keyring, Statement, has_expired, spec_digest};
use lineside_models::store::{DigestRecordKind, FailureRecord, Store, StoreError, VersionRecord};
use lineside_scheduler::{Deployment, VersionId};
use lineside_worker::{StartError, StartErrorKind};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::memory_budget::MemoryBudget;
use super::worker_factory::{Admitted, version_spec};

/// Failures of one digest in a row after which it is quarantined.
const FAILURES_MAX: u32 = 3;
/// Least memory of the admission child, in bytes.
const ADMISSION_BYTES_MIN: u64 = 64 << 20;

/// Loads versions. The reconciler's tests have one of their own.
pub trait VersionLoader: Send + Sync {
    /// Loads a version and lets it take over in its deployment. `None` when the manifest changed before it could serve.
    fn load(&self, request: LoadRequest, deployment: Arc<Deployment>) -> LoadFuture;
}

/// The outcome of a load, in time.
pub type LoadFuture = Pin<Box<dyn Future<Output = Result<Option<LoadedVersion>, LoadFailure>> + Send>>;

/// What every load needs.
pub struct LoadContext {
    /// Model files and records.
    pub store: Arc<Store>,
    /// Downloads model files.
    pub fetcher: Fetcher,
    /// Trusted keys; without them signatures are not checked.
    pub keys: Option<Keyring>,
    /// Limits of the admission child.
    pub limits: AdmissionLimits,
    /// Counts admissions that failed.
    pub metrics: AdmissionMetrics,
    /// The memory that all workers share.
    pub memory: Arc<MemoryBudget>,
    /// Bytes of pictures that may be decoded at once.
    pub decode_bytes: u64,
    /// Held from `Verifying` on.
    pub turn: Arc<Semaphore>,
}

/// A version to load.
pub struct LoadRequest {
    pub(super) manifest: ModelManifest,
    /// The digest under which this very version has served before: it is taken from the store, and its signature may have
    /// expired since.
    pub(super) known_good: Option<Digest>,
    /// Whether it may be taken from the store only.
    pub(super) is_restored: bool,
    /// Whether another version could serve instead.
    pub(super) has_alternative: bool,
    /// Digests that must not be evicted for it.
    pub(super) protected: BTreeSet<Digest>,
    /// Cancelled when the manifest has changed.
    pub(super) superseded: CancellationToken,
    pub(super) progress: Arc<LoadProgress>,
}

/// How far a load has come.
pub(super) struct LoadProgress {
    state: Mutex<ModelState>,
    download: Progress,
}

impl LoadProgress {
    pub(super) fn new(manifest: &ModelManifest) -> Self {
        Self { state: Mutex::new(ModelState::Pending), download: Progress::new(&manifest.name, manifest.version) }
    }

    /// The state of the version.
    pub(super) fn state(&self) -> ModelState {
        *self.state.lock()
    }

    /// The progress of the download.
    pub(super) fn download(&self) -> Download {
        self.download.snapshot()
    }

    pub(super) fn set(&self, state: ModelState) {
        *self.state.lock() = state;
    }
}

/// A version that serves.
#[derive(Debug, Clone)]
pub struct LoadedVersion {
    /// What results say of it.
    pub info: Arc<ModelInfo>,
    /// Its id in the deployment.
    pub id: VersionId,
    /// SHA-256 of its file.
    pub digest: Digest,
    /// What admission measured.
    pub benchmark: Benchmark,
    /// When its signature expires.
    pub expires: Option<SystemTime>,
    /// Time from the start of the load to serving.
    pub took: Duration,
}

/// Why a version does not serve.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{reason}")]
pub struct LoadFailure {
    /// The reason, for people.
    pub reason: String,
    /// The number of failures, where the digest is quarantined.
    pub quarantined_after: Option<u32>,
    /// SHA-256 of its file, where it is known.
    pub digest: Option<Digest>,
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

impl VersionLoader for Arc<LoadContext> {
    fn load(&self, request: LoadRequest, deployment: Arc<Deployment>) -> LoadFuture {
        Box::pin(load(self.clone(), request, deployment))
    }
}

async fn load(
    context: Arc<LoadContext>,
    request: LoadRequest,
    deployment: Arc<Deployment>,
) -> Result<Option<LoadedVersion>, LoadFailure> {
    let started = Instant::now();
    let manifest = &request.manifest;
    let statement = statement(&context, &request)?;
    request.progress.set(ModelState::Downloading);
    let digest = match request.known_good.filter(|_| request.is_restored) {
        Some(digest) => digest,
        None => match fetch(&context, &request, started).await? {
            Some(digest) => digest,
            None => return Ok(None),
        },
    };
    let turn = tokio::select! {
        turn = context.turn.clone().acquire_owned() => turn,
        () = request.superseded.cancelled() => return Ok(None),
    };
    let source = manifest.source.to_string();
    let work = tokio::task::spawn_blocking(move || {
        let loaded = admit_and_serve(&context, &request, &deployment, &digest, statement.as_ref());
        drop(turn);
        loaded.map(|loaded| loaded.map(|loaded| LoadedVersion { took: started.elapsed(), ..loaded }))
    });
    work.await
        .unwrap_or_else(|error| Err(format!("loading panicked: {error}").into()))
        .map_err(|failure| LoadFailure { reason: format!("{source}: {}", failure.reason), ..failure })
}

/// Brings the file into the store. `None` when the manifest changed meanwhile.
async fn fetch(context: &LoadContext, request: &LoadRequest, started: Instant) -> Result<Option<Digest>, LoadFailure> {
    let manifest = &request.manifest;
    let fetched = tokio::select! {
        fetched = context.fetcher.fetch(manifest, &request.protected, &request.progress.download) => fetched?,
        () = request.superseded.cancelled() => return Ok(None),
    };
    if let Some(from) = &fetched.from {
        tracing::info!(
            event = "model_downloaded",
            model = manifest.name,
            version = manifest.version,
            digest = %fetched.digest,
            bytes = fetched.bytes,
            took_ms = started.elapsed().as_millis() as u64,
            from,
            "Model downloaded"
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
    tokio::task::block_in_place(|| context.store.put_version(record))?;
    Ok(Some(fetched.digest))
}

/// The verified statement of the signature, where keys are configured; an unsigned version is refused.
fn statement(context: &LoadContext, request: &LoadRequest) -> Result<Option<Statement>, String> {
    let Some(keys) = &context.keys else { return Ok(None) };
    let manifest = &request.manifest;
    let envelope = manifest.signature.as_ref().ok_or(
        "it is not signed, and --trusted-keys is set; sign it with `lineside sign` and put the output into \
         source.signature",
    )?;
    let statement = keys
        .verify_statement(envelope, &manifest.name, manifest.version)
        .map_err(|error| format!("its signature is refused: {}", error_chain(&error)))?;
    if let Some(digest) = manifest.digest.filter(|digest| *digest != statement.digest) {
        return Err(format!("its signature is refused: it is for {}, but source.digest is {digest}", statement.digest));
    }
    if let Some(size) = manifest.size.filter(|size| *size != statement.size) {
        return Err(format!("its signature is refused: it is for {} bytes, but source.size is {size}", statement.size));
    }
    let spec = spec_digest(&manifest.spec).map_err(|error| error_chain(&error))?;
    if spec != statement.spec_digest {
        return Err(format!(
            "its signature is refused: spec.task, spec.input or spec.output of the manifest is not what was signed \
             (specDigest {}, the manifest has {spec}); sign the manifest again with `lineside sign --manifest`",
            statement.spec_digest
        ));
    }
    if manifest.rollback && !statement.rollback {
        return Err("its signature is refused: the manifest sets rollback: true, which was not signed; sign it with \
                    `lineside sign --rollback`"
            .to_owned());
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

/// From the file in the store to a worker that serves, on a thread that may block.
fn admit_and_serve(
    context: &LoadContext,
    request: &LoadRequest,
    deployment: &Deployment,
    digest: &Digest,
    statement: Option<&Statement>,
) -> Result<Option<LoadedVersion>, LoadFailure> {
    let (manifest, progress) = (&request.manifest, &request.progress);
    let is_superseded = || request.superseded.is_cancelled();
    if is_superseded() {
        return Ok(None);
    }
    progress.set(ModelState::Verifying);
    let bytes = context.store.read_verified(digest, context.fetcher.bytes_max())?;
    if let Some(statement) =
        statement.filter(|statement| (statement.digest, statement.size) != (*digest, bytes.len() as u64))
    {
        return Err(format!(
            "its signature is refused: it is for {} with {} bytes, but the file is {digest} with {} bytes",
            statement.digest,
            statement.size,
            bytes.len()
        )
        .into());
    }
    // Whatever fails from here on is a fault of the model, its manifest or its golden samples.
    progress.set(ModelState::Vetting);
    let admission = Admission::new(manifest, digest, context.limits)
        .map_err(|rejection| refused(context, request, digest, None, rejection))?;
    let record: FailureRecord = context.store.read_digest_record(digest).unwrap_or_default();
    if record.quarantined && record.key.as_ref() == Some(admission.key()) {
        return Err(quarantined(&record, digest));
    }
    if record.unfinished_loads >= FAILURES_MAX && request.has_alternative {
        let reason = format!("the agent ended {} times while it loaded this file", record.unfinished_loads);
        return Err(record_failure(context, digest, Some(admission.key()), reason, FAILURES_MAX));
    }
    let known: Option<AdmissionRecord> =
        context.store.read_digest_record(admission.key()).filter(|verdict: &AdmissionRecord| {
            // After a load that never finished, the earlier admission is not trusted.
            verdict.digest == *digest && record.unfinished_loads == 0
        });
    let benchmark = match known {
        Some(verdict) => verdict.benchmark,
        None => match run_admission(context, request, digest, deployment, &admission, &bytes)? {
            Some(benchmark) => benchmark,
            None => return Ok(None),
        },
    };
    progress.set(ModelState::Warming);
    if is_superseded() {
        return Ok(None);
    }
    if manifest.stop_first {
        stop_serving(manifest, deployment);
    }
    let instances = manifest.spec.runtime.instances.unwrap_or(1);
    let reservation =
        context.memory.reserve(benchmark.peak_memory_bytes, instances).map_err(|error| error.to_string())?;
    // A load in a process of its own cannot end the agent.
    if manifest.spec.runtime.isolation == Some(Isolation::InProcess) {
        let loading = FailureRecord { unfinished_loads: record.unfinished_loads + 1, ..record };
        context.store.write_digest_record(digest, &loading)?;
    }
    let admitted = Admitted {
        manifest,
        digest: *digest,
        key: *admission.key(),
        benchmark: &benchmark,
        model: bytes,
        decode_bytes: context.decode_bytes,
    };
    let spec = version_spec(admitted, &context.store, reservation);
    let (id, info) = match deployment.replace(spec) {
        Ok(replaced) => replaced,
        Err(error) => {
            let rejection = rejection(&error);
            return Err(refused(context, request, digest, Some(admission.key()), rejection));
        }
    };
    // Faults of the worker while it serves are recorded by another thread.
    let after: FailureRecord = context.store.read_digest_record(digest).unwrap_or_default();
    if after.quarantined && after.key.as_ref() == Some(admission.key()) {
        return Err(quarantined(&after, digest));
    }
    // A success clears the failures of this manifest; those of another manifest are kept, and so are faults while serving.
    let is_own = after.key.is_none() || after.key.as_ref() == Some(admission.key());
    let kept = if is_own {
        FailureRecord { faults: after.faults, ..FailureRecord::default() }
    } else {
        FailureRecord { unfinished_loads: 0, ..after }
    };
    match kept == FailureRecord::default() {
        true => context.store.delete_digest_record(DigestRecordKind::Failure, digest).map(drop)?,
        false => context.store.write_digest_record(digest, &kept)?,
    }
    context.store.touch(digest);
    let expires = statement.and_then(|statement| statement.expiry().ok().flatten());
    Ok(Some(LoadedVersion { info, id, digest: *digest, benchmark, expires, took: Duration::ZERO }))
}

/// Why a worker that could not be started counts against the model, or does not.
fn rejection(error: &StartError) -> Rejection {
    match error.kind() {
        StartErrorKind::Model => Rejection::Model(error_chain(error)),
        StartErrorKind::Manifest => Rejection::Manifest(error_chain(error)),
        StartErrorKind::Node => Rejection::Unavailable { message: error_chain(error), source: None },
    }
}

/// Ends the version that serves, because its memory is needed.
fn stop_serving(manifest: &ModelManifest, deployment: &Deployment) -> bool {
    let serves = deployment.serving().is_some();
    if serves {
        tracing::info!(
            event = "version_stopped_first",
            model = manifest.name,
            version = manifest.version,
            "The version before is stopped first"
        );
        deployment.stop();
    }
    serves
}

/// Runs the admission in the memory that is free. `None` when the manifest changed meanwhile.
fn run_admission(
    context: &LoadContext,
    request: &LoadRequest,
    digest: &Digest,
    deployment: &Deployment,
    admission: &Admission,
    bytes: &[u8],
) -> Result<Option<Benchmark>, LoadFailure> {
    let manifest = &request.manifest;
    request.progress.set(ModelState::Vetting);
    let started = Instant::now();
    let run = || {
        // A child that is allowed more than the node has makes the system kill the agent instead.
        let free_bytes = context.memory.free_bytes().unwrap_or(u64::MAX).max(ADMISSION_BYTES_MIN);
        admission.run(bytes, free_bytes, || request.superseded.is_cancelled())
    };
    let mut outcome = run();
    if manifest.stop_first
        && matches!(outcome.verdict, Err(Rejection::NodeMemory { .. }))
        && !request.superseded.is_cancelled()
        && stop_serving(manifest, deployment)
    {
        outcome = run();
    }
    let benchmark = match outcome.verdict {
        Ok(benchmark) => benchmark,
        Err(_) if request.superseded.is_cancelled() => return Ok(None),
        Err(rejection) => return Err(refused(context, request, digest, Some(admission.key()), rejection)),
    };
    tracing::info!(
        event = "model_admitted", model = manifest.name,
        version = manifest.version,
        %digest,
        p50_ms = benchmark.p50_ms,
        p99_ms = benchmark.p99_ms,
        peak_memory_mib = benchmark.peak_memory_bytes >> 20,
        took_ms = started.elapsed().as_millis() as u64,
        notes = outcome.report.notes.join("; "),
        "Model admitted"
    );
    let verdict = AdmissionRecord {
        digest: *digest,
        engine: "tract".to_owned(),
        benchmark: benchmark.clone(),
        at: clock::rfc3339(SystemTime::now()),
    };
    context.store.write_digest_record(admission.key(), &verdict)?;
    Ok(Some(benchmark))
}

/// Records a failure, and quarantines the digest after the last one. A version that has served before is not counted: its
/// failures come from the node, which may be short of memory or busy, and not from the model.
fn refused(
    context: &LoadContext,
    request: &LoadRequest,
    digest: &Digest,
    key: Option<&Digest>,
    rejection: Rejection,
) -> LoadFailure {
    let reason = match rejection {
        rejection @ (Rejection::Unavailable { .. } | Rejection::NodeMemory { .. }) => {
            return error_chain(&rejection).into();
        }
        Rejection::Manifest(reason) => {
            context.metrics.failures.inc();
            return reason.into();
        }
        Rejection::Model(reason) => reason,
    };
    context.metrics.failures.inc();
    if request.known_good.as_ref() == Some(digest) {
        return reason.into();
    }
    let before: FailureRecord = context.store.read_digest_record(digest).unwrap_or_default();
    // Another manifest may succeed, so its failures are counted separately.
    let failures = if before.key.as_ref() == key { before.failures } else { 0 } + 1;
    record_failure(context, digest, key, reason, failures)
}

fn record_failure(
    context: &LoadContext,
    digest: &Digest,
    key: Option<&Digest>,
    reason: String,
    failures: u32,
) -> LoadFailure {
    let before: FailureRecord = context.store.read_digest_record(digest).unwrap_or_default();
    let record = FailureRecord {
        failures,
        reason: reason.clone(),
        at: clock::rfc3339(SystemTime::now()),
        quarantined: failures >= FAILURES_MAX,
        key: key.copied(),
        unfinished_loads: 0,
        faults: before.faults,
    };
    if let Err(error) = context.store.write_digest_record(digest, &record) {
        tracing::error!(event = "failure_not_recorded", %error, "A failure cannot be recorded");
    }
    match record.quarantined {
        true => quarantined(&record, digest),
        false => reason.into(),
    }
}

fn quarantined(record: &FailureRecord, digest: &Digest) -> LoadFailure {
    let reason = format!(
        "it failed {} times and is quarantined (`lineside store release {digest}` releases it): {}",
        record.failures, record.reason
    );
    LoadFailure { reason, quarantined_after: Some(record.failures), digest: Some(*digest) }
}
