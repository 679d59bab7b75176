//! The resolved stage of a `CameraStream`. Its tests are those of [`super::manifest`], which read complete files.

use std::collections::BTreeMap;
use std::time::Duration;

use super::StreamSource;
use super::manifest::{RawReport, RawStreamSpec, Reader, reject_unsupported};
use crate::names::{ConfigErrors, NAME_FORMAT, is_name};

/// Largest number of frames per second, above the rate of any supported camera.
const FPS_MAX: f64 = 1000.0;
/// Largest number of pixels of a frame, and the default; the decoder accepts no more.
const PIXELS_MAX: u64 = 40_000_000;
const DEADBAND_DEFAULT: f32 = 0.05;
/// Anomaly scores are in the scale of the model, so the bound only excludes infinity and NaN.
const DEADBAND_MAX: f32 = 1e6;
const HEARTBEAT_DEFAULT_SECONDS: u64 = 60;
const HEARTBEAT_MAX_SECONDS: u64 = 24 * 3600;

/// A validated `CameraStream`. Two manifests are equal when the running streams would not differ.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamManifest {
    /// Name of the stream.
    pub name: String,
    /// Source of the frames.
    pub source: StreamSource,
    /// Name of the model that inspects the frames.
    pub model: String,
    /// Shortest time between two frames; `None` means no limit.
    pub frame_interval: Option<Duration>,
    /// Largest age of a frame; older frames are dropped.
    pub age_max: Option<Duration>,
    /// Largest number of pixels of a frame; larger frames are not decoded.
    pub pixels_max: u64,
    /// The verdict rule: a CEL expression.
    pub verdict: Option<String>,
    /// Report by exception; `None` publishes every result.
    pub report: Option<Report>,
    /// Name of the only node that runs the stream.
    pub node_name: Option<String>,
    /// Labels of the nodes that run the stream.
    pub node_selector: BTreeMap<String, String>,
}

/// Which results report by exception publishes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// Change of a score above which a result is published, in units of the score.
    pub deadband: f32,
    /// Time without a published result after which the next result is published in any case.
    pub heartbeat: Duration,
}

impl Report {
    fn resolve(place: &str, raw: &RawReport, errors: &mut ConfigErrors) -> Option<Self> {
        let deadband = raw.deadband.unwrap_or(DEADBAND_DEFAULT);
        if !(0.0..=DEADBAND_MAX).contains(&deadband) {
            errors.add(format!("{place}.deadband"), format!("{deadband} is not between 0 and {DEADBAND_MAX}"));
        }
        let heartbeat = raw.heartbeat_seconds.unwrap_or(HEARTBEAT_DEFAULT_SECONDS);
        if !(1..=HEARTBEAT_MAX_SECONDS).contains(&heartbeat) {
            let what = format!("{heartbeat} is not between 1 and {HEARTBEAT_MAX_SECONDS}");
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
        reader: Reader<'_>,
        errors: &mut ConfigErrors,
    ) -> Option<Self> {
        let at = |field: &str| format!("{place} spec.{field}");
        reject_unsupported(place, "spec.pipeline", raw.pipeline.as_ref(), errors);
        reject_unsupported(place, "spec.roi", raw.roi.as_ref(), errors);
        reject_unsupported(place, "spec.trigger", raw.trigger.as_ref(), errors);
        reject_unsupported(place, "spec.evidence", raw.evidence.as_ref(), errors);
        let source = raw.source.unwrap_or_default();
        reject_unsupported(place, "spec.source.secretRef", source.secret_ref.as_ref(), errors);
        let uri = errors.require(&at("source.uri"), source.uri);
        let source = uri.and_then(|uri| errors.take(&at("source.uri"), StreamSource::parse(&uri, reader.folder)));
        let model = errors.require(&at("model"), raw.model);
        if model.as_deref().is_some_and(|model| !is_name(model)) {
            errors.add(at("model"), format!("is not a valid name: {NAME_FORMAT}"));
        }
        let fps = raw.fps.unwrap_or(0.0);
        if !(0.0..=FPS_MAX).contains(&fps) {
            errors.add(at("fps"), format!("{fps} is not between 0 and {FPS_MAX}"));
            return None;
        }
        if raw.max_age_ms == Some(0) {
            errors.add(at("maxAgeMs"), "0 would drop every frame; omit the field for no limit");
        }
        let pixels_max = raw.max_pixels.unwrap_or(PIXELS_MAX);
        if !(1..=PIXELS_MAX).contains(&pixels_max) {
            errors.add(at("maxPixels"), format!("{pixels_max} is not between 1 and {PIXELS_MAX}"));
        }
        let report = raw.report.and_then(|report| Report::resolve(&at("report"), &report, errors));
        let verdict = raw.verdict.filter(|rule| errors.take(&at("verdict"), (reader.check_rule)(rule)).is_some());
        Some(Self {
            name,
            source: source?,
            model: model?,
            frame_interval: (fps > 0.0).then(|| Duration::from_secs_f64(1.0 / fps)),
            age_max: raw.max_age_ms.map(Duration::from_millis),
            pixels_max,
            verdict,
            report,
            node_name: raw.node_name,
            node_selector: raw.node_selector.unwrap_or_default(),
        })
    }
}
