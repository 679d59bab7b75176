//! The resolved stage of a `CameraStream`.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use super::StreamSource;
use super::manifest::{RawReport, RawStreamSpec, RuleCheck, not_built};
use crate::names::{ConfigErrors, is_name};

/// Frames per second at most; no camera here is faster.
const FPS_MAX: f64 = 1000.0;
const DEADBAND_DEFAULT: f32 = 0.05;
/// Anomaly scores are in the model's own scale, so this only keeps out what is no number.
const DEADBAND_MAX: f32 = 1e6;
const HEARTBEAT_DEFAULT_SECONDS: u64 = 60;
const HEARTBEAT_MAX_SECONDS: u64 = 24 * 3600;

/// A stream to inspect, validated. Two of them are equal when nothing about the running stream would differ.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamManifest {
    /// Its name.
    pub name: String,
    /// Where its frames come from.
    pub source: StreamSource,
    /// The model that looks at them.
    pub model: String,
    /// The shortest time between two frames; `None` takes them as they come.
    pub frame_interval: Option<Duration>,
    /// Frames older than this are dropped.
    pub age_max: Option<Duration>,
    /// The rule that makes a verdict of a prediction: a CEL expression.
    pub verdict: Option<String>,
    /// Report by exception, where it is wanted; otherwise every result is said.
    pub report: Option<Report>,
    /// The one node it runs on, where it is pinned.
    pub node_name: Option<String>,
    /// Labels a node must bear.
    pub node_selector: BTreeMap<String, String>,
}

/// What counts as news in report by exception.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// A score that moved by more than this is news.
    pub deadband: f32,
    /// After this long without one, any result is said.
    pub heartbeat: Duration,
}

impl Report {
    fn resolve(place: &str, raw: &RawReport, errors: &mut ConfigErrors) -> Option<Self> {
        let deadband = raw.deadband.unwrap_or(DEADBAND_DEFAULT);
        if !(0.0..=DEADBAND_MAX).contains(&deadband) {
            errors.add(format!("{place}.deadband"), format!("{deadband} is not within 0 and {DEADBAND_MAX}"));
        }
        let heartbeat = raw.heartbeat_seconds.unwrap_or(HEARTBEAT_DEFAULT_SECONDS);
        if !(1..=HEARTBEAT_MAX_SECONDS).contains(&heartbeat) {
            let what = format!("{heartbeat} is not within 1 and {HEARTBEAT_MAX_SECONDS}");
            errors.add(format!("{place}.heartbeatSeconds"), what);
        }
        raw.by_exception.unwrap_or(false).then(|| Self { deadband, heartbeat: Duration::from_secs(heartbeat) })
    }
}

impl StreamManifest {
    pub(super) fn resolve(
        place: &str,
        name: String,
        raw: RawStreamSpec,
        folder: &Path,
        check_rule: RuleCheck<'_>,
        errors: &mut ConfigErrors,
    ) -> Option<Self> {
        let at = |field: &str| format!("{place} spec.{field}");
        not_built(place, "spec.pipeline", raw.pipeline.as_ref(), errors);
        not_built(place, "spec.roi", raw.roi.as_ref(), errors);
        not_built(place, "spec.trigger", raw.trigger.as_ref(), errors);
        not_built(place, "spec.evidence", raw.evidence.as_ref(), errors);
        let source = raw.source.unwrap_or_default();
        not_built(place, "spec.source.secretRef", source.secret_ref.as_ref(), errors);
        let uri = errors.require(&at("source.uri"), source.uri);
        let source = uri.and_then(|uri| errors.take(&at("source.uri"), StreamSource::parse(&uri, folder)));
        let model = errors.require(&at("model"), raw.model);
        if model.as_deref().is_some_and(|model| !is_name(model)) {
            errors.add(at("model"), "is no name of a model: at most 63 of a-z, 0-9 and -");
        }
        let fps = raw.fps.unwrap_or(0.0);
        if !(0.0..=FPS_MAX).contains(&fps) {
            errors.add(at("fps"), format!("{fps} is not within 0 and {FPS_MAX}"));
            return None;
        }
        if raw.max_age_ms == Some(0) {
            errors.add(at("maxAgeMs"), "0 would drop every frame; leave it out to drop none");
        }
        let report = raw.report.and_then(|report| Report::resolve(&at("report"), &report, errors));
        let verdict = raw.verdict.filter(|rule| errors.take(&at("verdict"), check_rule(rule)).is_some());
        Some(Self {
            name,
            source: source?,
            model: model?,
            frame_interval: (fps > 0.0).then(|| Duration::from_secs_f64(1.0 / fps)),
            age_max: raw.max_age_ms.map(Duration::from_millis),
            verdict,
            report,
            node_name: raw.node_name,
            node_selector: raw.node_selector.unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::kinds::manifest::{Object, read};

    use super::*;

    const HEAD: &str = "apiVersion: lineside.dev/v1alpha1\n";

    #[test]
    fn a_whole_manifest_is_read() {
        let text = format!(
            "{HEAD}kind: EdgeModel\nmetadata: {{name: m, labels: {{a: b}}}}\nspec:\n  version: 3\n  source: {{uri: 'file:m.onnx'}}\n\
             ---\n{HEAD}kind: CameraStream\nmetadata: {{name: s}}\nspec:\n  source: {{uri: 'dir:frames'}}\n  model: m\n  \
             fps: 10\n  maxAgeMs: 200\n  verdict: 'classes.size() > 0 ? \"pass\" : \"none\"'\n"
        );
        let objects = read(&text, Path::new("/m"), &|_| Ok(())).unwrap();
        let [Object::Model(model), Object::Stream(stream)] = objects.as_slice() else { panic!("{objects:?}") };
        assert_eq!((model.version, model.instances), (3, 1));
        assert_eq!(model.source.to_string(), "file:/m/m.onnx");
        assert_eq!(stream.frame_interval, Some(Duration::from_millis(100)));
        assert_eq!(stream.age_max, Some(Duration::from_millis(200)));
    }

    #[test]
    fn every_mistake_in_a_file_is_named_with_its_object_and_field() {
        let text = format!(
            "{HEAD}kind: EdgeModel\nmetadata: {{name: Bad_Name}}\nspec: {{version: -1, source: {{digest: x}}, engine: fast}}\n\
             ---\n{HEAD}kind: CameraStream\nmetadata: {{name: s}}\nspec:\n  source: {{uri: 'ftp://x'}}\n  fps: fast\n  \
             verdict: 'nonsense('\n  roi: [[0, 0]]\n---\nkind: Pod\nmetadata: {{name: p}}\n---\n{{}}\n"
        );
        let errors = read(&text, Path::new("/"), &|rule| {
            if rule.ends_with('(') { Err("unfinished".to_owned()) } else { Ok(()) }
        })
        .unwrap_err();
        for expected in [
            "EdgeModel Bad_Name spec.version: ",
            "EdgeModel Bad_Name spec.engine: is not a known key",
            "EdgeModel Bad_Name metadata.name: must be",
            "EdgeModel Bad_Name spec.source.uri: is missing",
            "EdgeModel Bad_Name spec.source.digest: ",
            "CameraStream s spec.source.uri: ftp: is not known",
            "CameraStream s spec.fps: ",
            "CameraStream s spec.model: is missing",
            "CameraStream s spec.verdict: ",
            "CameraStream s spec.roi: is not built",
            "Pod p: kind Pod is not known",
            "document 4: kind is missing",
        ] {
            assert!(errors.iter().any(|error| error.starts_with(expected)), "{expected}\n{errors:#?}");
        }
    }

    #[test]
    fn one_file_may_not_define_an_object_twice() {
        let one =
            format!("{HEAD}kind: EdgeModel\nmetadata: {{name: m}}\nspec: {{version: 1, source: {{uri: 'file:m'}}}}\n");
        let errors = read(&format!("{one}---\n{one}"), Path::new("/"), &|rule| {
            if rule.ends_with('(') { Err("unfinished".to_owned()) } else { Ok(()) }
        })
        .unwrap_err();
        assert_eq!(errors, ["EdgeModel m: stands in the file twice"]);
    }
}
