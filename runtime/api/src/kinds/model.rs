//! The resolved stage of an `EdgeModel`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::spec::{InputSpec, ModelSpec, OutputSpec, RuntimeSpec};

use super::manifest::{ManifestDocument, RawGolden, RawModelSource, RawModelSpec, reject_unsupported};
use super::source::ModelSource;
use crate::envelope::Envelope;
use crate::names::{ConfigErrors, is_name};
use lineside_common::digest::Digest;

/// Largest version, and largest size of a file in bytes: the largest integer that every JSON reader represents exactly.
const INTEGER_MAX: u64 = 9_007_199_254_740_991;
/// Largest number of threads of one inference.
const THREADS_MAX: u32 = 256;
/// Largest side of the input in pixels.
const SIDE_PIXELS_MAX: u32 = 16_384;
/// Largest number of channels of the input.
const CHANNELS_MAX: usize = 4;
/// Bounds of a mean and of a standard deviation, in pixel values. They exclude infinity, NaN, and divisors so small that every
/// quotient is infinite.
const MEAN_MAX: f32 = 1e6;
const STD_MIN: f32 = 1e-6;
/// Largest number of classes or boxes that are reported.
const TOP_K_MAX: u32 = 100_000;
/// Largest number of the first class.
const FIRST_CLASS_MAX: u32 = 1000;
/// Largest number of labels.
const LABELS_MAX: usize = 10_000;
/// Memory of a worker in MiB. The custom resource definition has the same bounds.
const MEMORY_MIB: std::ops::RangeInclusive<u32> = 32..=1_048_576;
/// Largest number of instances. Each has its own thread and working memory.
const INSTANCES_MAX: u32 = 64;
/// Largest number of frames in a batch.
const BATCH_SIZE_MAX: u32 = 1024;
/// Largest delay of a batch: 10 s.
const QUEUE_DELAY_MAX_MICROSECONDS: u32 = 10_000_000;
/// Largest number of golden samples. Each takes one inference during admission.
const GOLDEN_MAX: usize = 64;
/// Default tolerance of a score. Decoders and resizers other than those of the training change scores by a few thousandths.
const TOLERANCE_DEFAULT: f32 = 0.01;

/// A validated `EdgeModel`. Two manifests are equal when the running models would not differ.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelManifest {
    /// Name of the model.
    pub name: String,
    /// Version number, which must increase.
    pub version: u64,
    /// Location of the file.
    pub source: ModelSource,
    /// Expected digest of the file. `None` only for `file:`.
    pub digest: Option<Digest>,
    /// Expected size of the file in bytes.
    pub size: Option<u64>,
    /// Name of the Secret with the credentials for the source.
    pub secret: Option<String>,
    /// Signature of the version.
    pub signature: Option<Envelope>,
    /// Whether this version may replace a higher one.
    pub rollback: bool,
    /// The fields for the data plane.
    pub spec: ModelSpec,
    /// Golden samples that the model must reproduce before it serves.
    pub golden: Vec<Golden>,
    /// Number of parallel inferences, 1 to 64.
    pub instances: u32,
    /// Whether the previous version is unloaded before this one is loaded.
    pub stop_first: bool,
    /// Labels of the nodes that run the model.
    pub node_selector: BTreeMap<String, String>,
    /// The object as it was written.
    pub document: ManifestDocument,
}

/// A golden sample: a picture with the prediction that a model has to reproduce.
#[derive(Debug, Clone, PartialEq)]
pub struct Golden {
    /// Path of the picture.
    pub input: PathBuf,
    /// Path of the expected prediction: JSON with the fields of a result for the task, such as `classes`.
    pub output: PathBuf,
    /// Largest accepted difference of a score, 0 to 1; boxes may differ by this fraction of the picture.
    pub tolerance: f32,
}

impl ModelManifest {
    pub(super) fn resolve(
        place: &str,
        name: String,
        raw: RawModelSpec,
        document: ManifestDocument,
        errors: &mut ConfigErrors,
    ) -> Option<Self> {
        let at = |field: &str| format!("{place} spec.{field}");
        reject_unsupported(place, "spec.rollout", raw.rollout.as_ref(), errors);
        let version = errors.require(&at("version"), raw.version);
        errors.check_range(&at("version"), version.as_ref(), &(0..=INTEGER_MAX));
        let from = raw.source.unwrap_or_default();
        let uri = errors.require(&at("source.uri"), from.uri.clone());
        let source = uri.and_then(|uri| errors.take(&at("source.uri"), ModelSource::parse(&uri, document.folder())));
        let (digest, secret, signature) = provenance(&at, &from, source.as_ref(), errors);
        errors.check_range(&at("source.size"), from.size.as_ref(), &(1..=INTEGER_MAX));
        let runtime = raw.runtime.unwrap_or_default();
        check_runtime(&at, &runtime, errors);
        let (input, output) = (raw.input.unwrap_or_default(), raw.output.unwrap_or_default());
        check_input(&at, &input, errors);
        check_output(&at, &output, errors);
        let golden = golden(&at, raw.golden.unwrap_or_default(), &document, errors);
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
            instances: runtime.instances.unwrap_or(1),
            stop_first: runtime.stop_first.unwrap_or(false),
            spec: ModelSpec { task: raw.task, input, output, runtime },
            node_selector: raw.node_selector.unwrap_or_default(),
            document,
        })
    }
}

/// Digest, name of the Secret and signature of a model's source.
fn provenance(
    at: &impl Fn(&str) -> String,
    from: &RawModelSource,
    source: Option<&ModelSource>,
    errors: &mut ConfigErrors,
) -> (Option<Digest>, Option<String>, Option<Envelope>) {
    let digest = from.digest.as_ref().and_then(|text| errors.take(&at("source.digest"), Digest::parse(text)));
    if from.digest.is_none() && source.is_some_and(|source| !matches!(source, ModelSource::File(_))) {
        errors.add(at("source.digest"), "is missing; write what `sha256sum model.onnx` prints as sha256:...");
    }
    let secret = from.secret_ref.as_ref().and_then(|secret| {
        let name = errors.require(&at("source.secretRef.name"), secret.name.clone())?;
        // The name is used as a path. Names of Secrets may contain dots.
        let is_valid = name.split('.').all(is_name);
        errors.take(&at("source.secretRef.name"), is_valid.then_some(name).ok_or("is not a valid name of a Secret"))
    });
    let signature = from.signature.as_ref().filter(|value| !value.is_null()).and_then(|value| {
        let read = serde_json::from_value(value.clone());
        let advice = |error| format!("is not a signature as `lineside sign` prints it: {error}");
        errors.take(&at("source.signature"), read.map_err(advice))
    });
    (digest, secret, signature)
}

/// Checks the bounds of the resources. Whether the model supports the batch size is known only when it is loaded.
fn check_runtime(at: &impl Fn(&str) -> String, runtime: &RuntimeSpec, errors: &mut ConfigErrors) {
    let delay = runtime.max_queue_delay_microseconds.as_ref();
    errors.check_range(&at("runtime.threads"), runtime.threads.as_ref(), &(1..=THREADS_MAX));
    errors.check_range(&at("runtime.instances"), runtime.instances.as_ref(), &(1..=INSTANCES_MAX));
    errors.check_range(&at("runtime.maxBatchSize"), runtime.max_batch_size.as_ref(), &(1..=BATCH_SIZE_MAX));
    errors.check_range(&at("runtime.memoryMiB"), runtime.memory_mib.as_ref(), &MEMORY_MIB);
    errors.check_range(&at("runtime.maxQueueDelayMicroseconds"), delay, &(0..=QUEUE_DELAY_MAX_MICROSECONDS));
}

/// Checks the bounds of the input. Whether they fit the model is known only when it is loaded.
fn check_input(at: &impl Fn(&str) -> String, input: &InputSpec, errors: &mut ConfigErrors) {
    errors.check_range(&at("input.width"), input.width.as_ref(), &(1..=SIDE_PIXELS_MAX));
    errors.check_range(&at("input.height"), input.height.as_ref(), &(1..=SIDE_PIXELS_MAX));
    for (field, values, least) in [("input.mean", &input.mean, -MEAN_MAX), ("input.std", &input.std, STD_MIN)] {
        let values = values.as_deref();
        let count = values.map(<[f32]>::len);
        errors.check_range(&format!("{} (number of values)", at(field)), count.as_ref(), &(1..=CHANNELS_MAX));
        for (index, value) in values.unwrap_or_default().iter().enumerate() {
            errors.check_range(&at(&format!("{field}[{index}]")), Some(value), &(least..=MEAN_MAX));
        }
    }
}

fn check_output(at: &impl Fn(&str) -> String, output: &OutputSpec, errors: &mut ConfigErrors) {
    errors.check_range(&at("output.threshold"), output.threshold.as_ref(), &(0.0..=1.0));
    errors.check_range(&at("output.iou"), output.iou.as_ref(), &(0.0..=1.0));
    errors.check_range(&at("output.topK"), output.top_k.as_ref(), &(1..=TOP_K_MAX));
    errors.check_range(&at("output.firstClass"), output.first_class.as_ref(), &(0..=FIRST_CLASS_MAX));
    let labels = output.labels.as_ref().map(Vec::len);
    errors.check_range(&format!("{} (number of labels)", at("output.labels")), labels.as_ref(), &(0..=LABELS_MAX));
}

fn golden(
    at: &impl Fn(&str) -> String,
    raw: Vec<RawGolden>,
    document: &ManifestDocument,
    errors: &mut ConfigErrors,
) -> Vec<Golden> {
    if raw.len() > GOLDEN_MAX {
        errors.add(at("golden"), format!("has {} samples; at most {GOLDEN_MAX} are accepted", raw.len()));
    }
    let mut samples = Vec::new();
    for (index, sample) in raw.into_iter().enumerate() {
        let at = |field: &str| at(&format!("golden[{index}].{field}"));
        let input = errors.require(&at("input"), sample.input);
        let output = errors.require(&at("output"), sample.output);
        let tolerance = sample.tolerance.unwrap_or(TOLERANCE_DEFAULT);
        errors.check_range(&at("tolerance"), Some(&tolerance), &(0.0..=1.0));
        if let (Some(input), Some(output)) = (input, output) {
            let path = |text: String| document.folder().join(text.strip_prefix("file:").unwrap_or(&text));
            samples.push(Golden { input: path(input), output: path(output), tolerance });
        }
    }
    samples
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::kinds::manifest::{ManifestErrors, Object, read};

    use super::*;

    fn model(spec: &str) -> Result<ModelManifest, ManifestErrors> {
        let text = format!(
            "apiVersion: lineside.dev/v1alpha1\nkind: EdgeModel\nmetadata: {{name: m}}\n\
             spec: {{version: 1, source: {{uri: 'file:m.onnx'}}, {spec}}}\n"
        );
        let object = read(&text, Path::new("/models"), &|_| Ok(()))?.remove(0);
        let Object::Model(model) = object else { panic!("{object:?}") };
        Ok(*model)
    }

    #[test]
    fn resources_are_bounded() {
        let runtime = "runtime: {instances: 2, maxBatchSize: 8, maxQueueDelayMicroseconds: 2000}";
        let batched = model(runtime).unwrap();
        assert_eq!((batched.instances, batched.spec.runtime.max_batch_size), (2, Some(8)));
        for field in ["instances: 65", "maxBatchSize: 0", "maxBatchSize: 1025", "maxQueueDelayMicroseconds: 10000001"] {
            let errors = model(&format!("runtime: {{{field}}}")).unwrap_err();
            let name = field.split(':').next().unwrap();
            assert!(errors.list()[0].starts_with(&format!("EdgeModel m spec.runtime.{name}: ")), "{errors}");
        }
    }

    #[test]
    fn paths_of_golden_samples_are_relative_to_the_manifest() {
        let sample = &model("golden: [{input: a.jpg, output: 'file:a.json'}]").unwrap().golden[0];
        assert_eq!((&*sample.input, &*sample.output), (Path::new("/models/a.jpg"), Path::new("/models/a.json")));
        let errors = model("golden: [{input: a.jpg, tolerance: 2}]").unwrap_err();
        assert_eq!(errors.list().len(), 2, "{errors}");
    }

    #[test]
    fn manifests_are_equal_when_they_differ_only_in_notation() {
        assert_eq!(model("rollback: false").unwrap(), model("input: {}").unwrap());
        assert_ne!(model("rollback: true").unwrap(), model("rollback: false").unwrap());
    }
}
