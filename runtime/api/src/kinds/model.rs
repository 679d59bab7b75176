//! The resolved stage of an `EdgeModel`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::spec::ModelSpec;

use super::manifest::{ManifestDocument, RawGolden, RawModelSource, RawModelSpec, not_built};
use super::source::ModelSource;
use crate::envelope::Envelope;
use crate::names::{ConfigErrors, is_name};
use lineside_common::digest::Digest;

/// Instances of one model at most. Each takes a thread and working memory of its own.
const INSTANCES_MAX: u32 = 64;
/// Golden samples of one model at most; each costs an inference when the model is vetted.
const GOLDEN_MAX: usize = 64;
/// How far a score may be off where the manifest does not say. Other decoders and resizers than those a model was
/// trained with move scores by a few thousandths.
const TOLERANCE_DEFAULT: f32 = 0.01;

/// A model to run, validated. Two of them are equal when nothing about the running model would differ.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelManifest {
    /// Its name.
    pub name: String,
    /// Its version, which grows.
    pub version: u64,
    /// Where its file comes from.
    pub source: ModelSource,
    /// What the file's digest must be; always there but for `file:`.
    pub digest: Option<Digest>,
    /// How many bytes the file must have, where the manifest says.
    pub size: Option<u64>,
    /// The folder of secrets that holds the source's credentials, by name.
    pub secret: Option<String>,
    /// Who vouches for it.
    pub signature: Option<Envelope>,
    /// Whether this version may replace a higher one.
    pub rollback: bool,
    /// How it runs.
    pub spec: ModelSpec,
    /// What it must reproduce before it serves.
    pub golden: Vec<Golden>,
    /// Inferences side by side.
    pub instances: u32,
    /// Whether the version before is freed before this one is loaded.
    pub stop_first: bool,
    /// Labels a node must bear.
    pub node_selector: BTreeMap<String, String>,
    /// As it was written.
    pub typed: ManifestDocument,
}

/// A picture and the answer a model has to give to it.
#[derive(Debug, Clone, PartialEq)]
pub struct Golden {
    /// The picture.
    pub input: PathBuf,
    /// The answer: JSON with the fields that a result has for the task, such as `classes`.
    pub output: PathBuf,
    /// How far a score may be off; boxes may be off by this share of the picture.
    pub tolerance: f32,
}

impl ModelManifest {
    pub(super) fn resolve(
        place: &str,
        name: String,
        raw: RawModelSpec,
        typed: ManifestDocument,
        errors: &mut ConfigErrors,
    ) -> Option<Self> {
        let at = |field: &str| format!("{place} spec.{field}");
        not_built(place, "spec.rollout", raw.rollout.as_ref(), errors);
        let version = errors.require(&at("version"), raw.version);
        let from = raw.source.unwrap_or_default();
        let uri = errors.require(&at("source.uri"), from.uri.clone());
        let source = uri.and_then(|uri| errors.take(&at("source.uri"), ModelSource::parse(&uri, typed.folder())));
        let (digest, secret, signature) = provenance(&at, &from, source.as_ref(), errors);
        let runtime = raw.runtime.unwrap_or_default();
        let instances = runtime.instances.unwrap_or(1);
        if !(1..=INSTANCES_MAX).contains(&instances) {
            errors.add(at("runtime.instances"), format!("{instances} is not within 1 and {INSTANCES_MAX}"));
        }
        if runtime.max_batch_size.is_some_and(|size| size != 1) {
            errors.add(at("runtime.maxBatchSize"), "batching is not built into this version yet; leave it at 1");
        }
        if runtime.max_queue_delay_microseconds.is_some_and(|delay| delay != 0) {
            errors.add(
                at("runtime.maxQueueDelayMicroseconds"),
                "batching is not built into this version yet; leave it at 0",
            );
        }
        let golden = golden(&at, raw.golden.unwrap_or_default(), &typed, errors);
        Some(Self {
            name,
            version: version?,
            source: source?,
            digest,
            size: from.size,
            secret,
            signature,
            rollback: raw.rollback.unwrap_or(false),
            golden,
            instances,
            stop_first: runtime.stop_first.unwrap_or(false),
            spec: ModelSpec {
                task: raw.task,
                input: raw.input.unwrap_or_default(),
                output: raw.output.unwrap_or_default(),
                runtime,
            },
            node_selector: raw.node_selector.unwrap_or_default(),
            typed,
        })
    }
}

fn provenance(
    at: &impl Fn(&str) -> String,
    from: &RawModelSource,
    source: Option<&ModelSource>,
    errors: &mut ConfigErrors,
) -> (Option<Digest>, Option<String>, Option<Envelope>) {
    let digest = from.digest.as_ref().and_then(|text| errors.take(&at("source.digest"), Digest::parse(text).map_err(|error| error.to_string())));
    if from.digest.is_none() && source.is_some_and(|source| !matches!(source, ModelSource::File(_))) {
        errors.add(at("source.digest"), "is missing; `sha256sum model.onnx` tells it (sha256:...)");
    }
    let secret = from.secret_ref.as_ref().and_then(|secret| {
        let name = errors.require(&at("source.secretRef.name"), secret.name.clone())?;
        // The name becomes a path, and Kubernetes' own names of Secrets may hold dots.
        let is_plain = name.split('.').all(is_name);
        errors.take(&at("source.secretRef.name"), is_plain.then_some(name).ok_or("is no name of a Secret".to_owned()))
    });
    let signature = from.signature.as_ref().filter(|value| !value.is_null()).and_then(|value| {
        let read = serde_json::from_value(value.clone());
        let advice = |error| format!("is no envelope as `lineside sign` prints it: {error}");
        errors.take(&at("source.signature"), read.map_err(advice))
    });
    (digest, secret, signature)
}

fn golden(
    at: &impl Fn(&str) -> String,
    raw: Vec<RawGolden>,
    typed: &ManifestDocument,
    errors: &mut ConfigErrors,
) -> Vec<Golden> {
    if raw.len() > GOLDEN_MAX {
        errors.add(at("golden"), format!("{} samples; at most {GOLDEN_MAX} are taken", raw.len()));
    }
    let mut samples = Vec::new();
    for (index, sample) in raw.into_iter().enumerate() {
        let at = |field: &str| at(&format!("golden[{index}].{field}"));
        let input = errors.require(&at("input"), sample.input);
        let output = errors.require(&at("output"), sample.output);
        let tolerance = sample.tolerance.unwrap_or(TOLERANCE_DEFAULT);
        if !(0.0..=1.0).contains(&tolerance) {
            errors.add(at("tolerance"), format!("{tolerance} is not within 0 and 1"));
        }
        if let (Some(input), Some(output)) = (input, output) {
            let path = |text: String| typed.folder().join(text.strip_prefix("file:").unwrap_or(&text));
            samples.push(Golden { input: path(input), output: path(output), tolerance });
        }
    }
    samples
}
