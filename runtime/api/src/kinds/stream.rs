//! The resolved stage of a `CameraStream`. Its tests are those of [`super::manifest`], which read complete files.

use std::collections::BTreeMap;
use std::time::Duration;

use super::StreamSource;
use super::manifest::{RawReport, RawStreamSpec, Reader, reject_unsupported};
use crate::names::{ConfigErrors, NAME_FORMAT, is_name};
use crate::verdict::OnError;

/// Lowest number of frames per second: about one frame per day. The custom resource definition has the same bound.
const FPS_MIN: f64 = 0.000_011_5;
/// Largest number of frames per second, above the rate of any supported camera.
const FPS_MAX: f64 = 1000.0;
/// Largest age of a frame: one day.
const AGE_MAX_MS: u64 = 86_400_000;
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
    /// The verdict when the rule fails or exceeds its bounds.
    pub on_error: OnError,
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
        errors.check_range(&format!("{place}.deadband"), Some(&deadband), &(0.0..=DEADBAND_MAX));
        let heartbeat = raw.heartbeat_seconds.unwrap_or(HEARTBEAT_DEFAULT_SECONDS);
        errors.check_range(&format!("{place}.heartbeatSeconds"), Some(&heartbeat), &(1..=HEARTBEAT_MAX_SECONDS));
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
        let frame_interval = errors.take(&at("fps"), frame_interval(raw.fps.unwrap_or(0.0)));
        if raw.max_age_ms == Some(0) {
            errors.add(at("maxAgeMs"), "0 would drop every frame; omit the field for no limit");
        } else {
            errors.check_range(&at("maxAgeMs"), raw.max_age_ms.as_ref(), &(1..=AGE_MAX_MS));
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
            frame_interval: frame_interval?,
            age_max: raw.max_age_ms.map(Duration::from_millis),
            pixels_max,
            verdict,
            on_error: raw.on_error.unwrap_or_default(),
            report,
            node_name: raw.node_name,
            node_selector: raw.node_selector.unwrap_or_default(),
        })
    }
}

/// The shortest time between two frames; `None` for 0 frames per second, which means no limit.
fn frame_interval(fps: f64) -> Result<Option<Duration>, String> {
    // -0.0 equals 0.0.
    if fps == 0.0 {
        return Ok(None);
    }
    let interval = Duration::try_from_secs_f64(fps.recip()).ok().filter(|_| (FPS_MIN..=FPS_MAX).contains(&fps));
    let invalid = || format!("{fps:?} is neither 0 (no limit) nor between {FPS_MIN} (one frame per day) and {FPS_MAX}");
    interval.map(Some).ok_or_else(invalid)
}
