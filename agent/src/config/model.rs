//! The resolved stage of an `EdgeModel`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lineside_runtime::spec::ModelSpec;

use super::manifest::{RawModelSpec, not_built};
use super::{Mistakes, source};
use crate::base::digest::Digest;

/// Instances of one model at most. Each takes a thread and working memory of its own.
const INSTANCES_MAX: u32 = 64;

/// A model to run, validated. Two of them are equal when nothing about the running model would differ.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelManifest {
    /// Its name.
    pub name: String,
    /// Its version, which grows.
    pub version: u64,
    /// Where its file lies.
    pub file: PathBuf,
    /// What the file's digest must be, where the manifest says.
    pub digest: Option<Digest>,
    /// Whether this version may replace a higher one.
    pub rollback: bool,
    /// How it runs.
    pub spec: ModelSpec,
    /// Inferences side by side.
    pub instances: u32,
    /// Labels a node must bear.
    pub node_selector: BTreeMap<String, String>,
}

impl ModelManifest {
    pub(super) fn resolve(
        place: &str,
        name: String,
        raw: RawModelSpec,
        folder: &Path,
        mistakes: &mut Mistakes,
    ) -> Option<Self> {
        let at = |field: &str| format!("{place} spec.{field}");
        not_built(place, "spec.golden", raw.golden.as_ref(), mistakes);
        not_built(place, "spec.rollout", raw.rollout.as_ref(), mistakes);
        let version = mistakes.require(&at("version"), raw.version);
        let source = raw.source.unwrap_or_default();
        not_built(place, "spec.source.secretRef", source.secret_ref.as_ref(), mistakes);
        let uri = mistakes.require(&at("source.uri"), source.uri);
        let file = uri.and_then(|uri| mistakes.take(&at("source.uri"), source::model_file(&uri, folder)));
        let digest = match source.digest {
            Some(text) => Some(mistakes.take(&at("source.digest"), Digest::parse(&text))?),
            None => None,
        };
        let runtime = raw.runtime.unwrap_or_default();
        let instances = runtime.instances.unwrap_or(1);
        if !(1..=INSTANCES_MAX).contains(&instances) {
            mistakes.add(at("runtime.instances"), format!("{instances} is not within 1 and {INSTANCES_MAX}"));
        }
        if runtime.max_batch_size.is_some_and(|size| size != 1) {
            mistakes.add(at("runtime.maxBatchSize"), "batching is not built into this version yet; leave it at 1");
        }
        if runtime.max_queue_delay_microseconds.is_some_and(|delay| delay != 0) {
            mistakes.add(
                at("runtime.maxQueueDelayMicroseconds"),
                "batching is not built into this version yet; leave it at 0",
            );
        }
        Some(Self {
            name,
            version: version?,
            file: file?,
            digest,
            rollback: raw.rollback.unwrap_or(false),
            spec: ModelSpec {
                task: raw.task,
                input: raw.input.unwrap_or_default(),
                output: raw.output.unwrap_or_default(),
                runtime,
            },
            instances,
            node_selector: raw.node_selector.unwrap_or_default(),
        })
    }
}
