//! `lineside check`: whether the agent would run a model, how fast, and what it answers to a picture.
//!
//! The model goes through the admission of the agent, in the same child process with limits of memory and time, so that the answer is that
//! of `lineside run` and a hostile file costs no more than there. `tests/suite/command_line.rs` tests it as a whole process.

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use lineside_api::kinds::manifest::{Object, read};
use lineside_api::kinds::{ModelManifest, ModelSource};
use lineside_api::spec::ModelSpec;
use lineside_common::digest::Digest;
use lineside_common::files::read_bounded;
use lineside_models::admission::{
    Admission, AdmissionLimits, AdmissionReport, Benchmark, Examination, GraphReport, ImageReport, PipelineReport,
    Rejection,
};
use lineside_spool::RECORD_BYTES_MAX;
use serde::Serialize;
use serde_json::Value;

use super::Failure;
use super::spec_arguments::SpecArguments;

/// Maximum size of the model file, in bytes.
const MODEL_BYTES_MAX: u64 = 2 << 30;
/// Maximum size of the image file, in bytes.
const IMAGE_BYTES_MAX: u64 = 64 << 20;
/// Maximum size of the manifest file, in bytes.
const MANIFEST_BYTES_MAX: u64 = 4 << 20;
/// Values of an output that are printed for people.
const VALUES_SHOWN: usize = 8;
/// Labels that are printed for people.
const LABELS_SHOWN: usize = 12;

#[derive(Args)]
#[command(after_help = "\
Exit status: 0 when the agent would run the model, 1 when it would not, 64 for a wrong command line.

Examples:
  lineside check model.onnx
  lineside check model.onnx --image part.jpg
  lineside check model.onnx --width 640 --height 640 --labels scratch,dent
  lineside check --manifest model.yaml --image part.jpg
  lineside check model.onnx --json | jq .engines")]
pub(super) struct Arguments {
    /// ONNX file of the model [default: the file that the manifest names].
    #[arg(required_unless_present = "manifest")]
    model: Option<PathBuf>,
    /// Take the fields of the EdgeModel in this YAML file. Flags override them.
    #[arg(long, value_name = "FILE")]
    manifest: Option<PathBuf>,
    /// Name of the EdgeModel, where the file of --manifest has several.
    #[arg(long, value_name = "NAME", requires = "manifest")]
    name: Option<String>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
    /// Also run the model on this JPEG or PNG file and print its prediction.
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Longest time of the check, in seconds.
    #[arg(long, value_name = "N", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Most memory of the check, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 2048, value_parser = clap::value_parser!(u64).range(64..=1_048_576))]
    memory_mib: u64,
    #[command(flatten)]
    spec: SpecArguments,
}

/// The report, with the field names of `--json`.
#[derive(Serialize)]
struct CheckReport {
    file: String,
    bytes: usize,
    digest: String,
    /// Whether the agent would run the model with these settings.
    accepted: bool,
    /// Why it would not.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// What the file states. Absent when it cannot be read.
    #[serde(flatten)]
    graph: Option<GraphReport>,
    engines: Vec<EngineReport>,
    /// Absent when the model is not accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pipeline: Option<PipelineReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<ImageReport>,
    /// What people should know.
    notes: Vec<String>,
}

#[derive(Serialize)]
struct EngineReport {
    engine: &'static str,
    device: &'static str,
    /// Whether it runs the model with these settings.
    runs: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// The measurements.
    #[serde(skip_serializing_if = "Option::is_none")]
    benchmark: Option<Benchmark>,
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    let is_json = arguments.json;
    let checked = check(arguments);
    let text = match &checked {
        Ok(report) if is_json => serde_json::to_string_pretty(report).context("cannot serialize the report")?,
        Ok(report) => format_report(report),
        Err(error) if is_json => serde_json::json!({"accepted": false, "reason": format!("{error:#}")}).to_string(),
        Err(_) => String::new(),
    };
    if !text.is_empty() {
        writeln!(std::io::stdout(), "{text}").context("cannot write to stdout")?;
    }
    let report = checked?;
    if let Some(reason) = report.reason {
        return Err(Failure::Failed(anyhow!("{}: the agent would not run this model: {reason}", report.file)));
    }
    match report.image.and_then(|image| image.error.map(|error| (image.file, error))) {
        Some((file, error)) => Err(Failure::Failed(anyhow!("{file}: {error}"))),
        None => Ok(()),
    }
}

fn check(arguments: Arguments) -> anyhow::Result<CheckReport> {
    let manifest = match &arguments.manifest {
        Some(path) => Some(read_manifest(path, arguments.name.as_deref())?),
        None => None,
    };
    let path = match (arguments.model, &manifest) {
        (Some(path), _) => path,
        (None, Some(ModelManifest { source: ModelSource::File(path), .. })) => path.clone(),
        (None, Some(manifest)) => {
            bail!("the model of the manifest is at {}; download it and name the file", manifest.source)
        }
        (None, None) => bail!("no model file is given"),
    };
    let file = path.display().to_string();
    let model = read_bounded(&path, MODEL_BYTES_MAX).with_context(|| file.clone())?;
    let digest = Digest::of(&model);
    let limits = AdmissionLimits {
        memory_bytes: arguments.memory_mib << 20,
        seconds: arguments.seconds,
        result_bytes: RECORD_BYTES_MAX,
    };
    let stated = manifest.as_ref().map(|manifest| manifest.spec.clone()).unwrap_or_default();
    let spec: ModelSpec = arguments.spec.apply(stated);
    let mut admission = match manifest {
        Some(manifest) => Admission::new(&ModelManifest { spec, ..manifest }, &digest, limits)
            .map_err(|rejection| anyhow!("{rejection}"))?,
        None => Admission::of_spec(&spec, &digest, limits),
    };
    admission = admission.with_figures_as_tensor();
    if let Some(path) = &arguments.image {
        let name = path.display().to_string();
        let image = read_bounded(path, IMAGE_BYTES_MAX).with_context(|| name.clone())?;
        admission = admission.with_image(name, &image);
    }
    if std::io::stderr().is_terminal() {
        eprintln!("checking {file} ({} s at most)", arguments.seconds);
    }
    let examination = admission.run(&model, u64::MAX, || false);
    Ok(report(file, model.len(), &digest, examination))
}

/// The only EdgeModel of a file, or the one with a name.
fn read_manifest(path: &Path, name: Option<&str>) -> anyhow::Result<ModelManifest> {
    let file = path.display().to_string();
    let text = read_bounded(path, MANIFEST_BYTES_MAX).with_context(|| file.clone())?;
    let text = String::from_utf8(text).with_context(|| file.clone())?;
    let path = std::path::absolute(path).with_context(|| file.clone())?;
    // Rules belong to streams, which are not checked here.
    let objects = read(&text, path.parent().unwrap_or(Path::new("/")), &|_| Ok(()));
    let objects = objects.map_err(|errors| anyhow!("{file}: {errors}"))?;
    let models = objects.into_iter().filter_map(|object| match object {
        Object::Model(manifest) if name.is_none_or(|name| name == manifest.name) => Some(*manifest),
        _ => None,
    });
    match <[ModelManifest; 1]>::try_from(models.collect::<Vec<_>>()) {
        Ok([manifest]) => Ok(manifest),
        Err(models) if models.is_empty() => {
            bail!("{file}: it has no EdgeModel{}", name.map(|name| format!(" {name}")).unwrap_or_default())
        }
        Err(models) => {
            let names: Vec<&str> = models.iter().map(|manifest| manifest.name.as_str()).collect();
            bail!("{file}: it has several models; choose one with --name: {}", names.join(", "))
        }
    }
}

fn report(file: String, bytes: usize, digest: &Digest, examination: Examination) -> CheckReport {
    let Examination { verdict, report } = examination;
    let AdmissionReport { graph, pipeline, image, as_tensor, mut notes } = report;
    if verdict.is_err() && as_tensor.is_some() {
        notes.push("the figures are those of the task tensor, with which the agent would run the model".to_owned());
    }
    let reason = verdict.as_ref().err().map(Rejection::to_string);
    let accepted = verdict.is_ok();
    let tract = EngineReport {
        engine: "tract",
        device: "cpu",
        runs: accepted,
        reason: reason.clone(),
        benchmark: verdict.ok().or(as_tensor),
    };
    let onnxruntime = EngineReport {
        engine: "onnxruntime",
        device: "cpu",
        runs: false,
        reason: Some("not built into this version".to_owned()),
        benchmark: None,
    };
    CheckReport {
        file,
        bytes,
        digest: digest.to_string(),
        accepted,
        reason,
        graph,
        engines: vec![tract, onnxruntime],
        pipeline: pipeline.filter(|_| accepted),
        image,
        notes,
    }
}

/// Formats the report for a terminal.
fn format_report(report: &CheckReport) -> String {
    let mut lines = vec![format!("{}   {} bytes, {}", report.file, report.bytes, report.digest)];
    if let Some(graph) = &report.graph {
        let producer = if graph.producer.is_empty() { "unknown" } else { &graph.producer };
        lines.push(format!("  producer  {producer}, opset {}, {} operators", graph.opset, graph.nodes));
        for (direction, tensors) in [("input", &graph.inputs), ("output", &graph.outputs)] {
            let line = |tensor: &lineside_models::admission::TensorReport| {
                format!("  {direction:<9} {} {} {:?}", tensor.name, tensor.datatype, tensor.shape)
            };
            lines.extend(tensors.iter().map(line));
        }
    }
    if let Some(pipeline) = &report.pipeline {
        lines.extend(format_pipeline(pipeline, report.graph.as_ref().is_some_and(|graph| graph.has_labels)));
    }
    lines.push(String::new());
    lines.push(format!(
        "  {:<12} {:<7} {:<5} {:>9} {:>9} {:>9} {:>11}",
        "ENGINE", "DEVICE", "RUNS", "LOAD ms", "P50 ms", "P99 ms", "MEMORY MiB"
    ));
    for engine in &report.engines {
        let runs = if engine.runs { "yes" } else { "no" };
        let figures = engine.benchmark.as_ref().map(|benchmark| {
            format!(
                "{:>9.1} {:>9.2} {:>9.2} {:>11.1}",
                benchmark.load_ms,
                benchmark.p50_ms,
                benchmark.p99_ms,
                benchmark.peak_memory_bytes as f64 / f64::from(1 << 20)
            )
        });
        let rest = figures.or_else(|| engine.reason.clone()).unwrap_or_default();
        lines.push(format!("  {:<12} {:<7} {runs:<5} {rest}", engine.engine, engine.device));
    }
    if let Some(image) = report.image.as_ref().filter(|image| image.error.is_none()) {
        lines.push(String::new());
        lines.push(format!(
            "  {} {}x{}: decode {:.1} ms, preprocess {:.1} ms, infer {:.1} ms, postprocess {:.2} ms",
            image.file,
            image.width,
            image.height,
            image.decode_ms,
            image.preprocess_ms,
            image.infer_ms,
            image.postprocess_ms
        ));
        lines.extend(format_prediction(&image.prediction).into_iter().map(|line| format!("    {line}")));
    }
    lines.extend(report.notes.iter().map(|note| format!("\n  note: {note}")));
    lines.join("\n")
}

fn format_pipeline(pipeline: &PipelineReport, has_labels: bool) -> Vec<String> {
    let mut lines = vec![format!(
        "  task      {}, image {} to {}x{} {}, filter {}, mean {:?}, std {:?}",
        pipeline.task,
        pipeline.resize,
        pipeline.width,
        pipeline.height,
        pipeline.color,
        pipeline.filter,
        pipeline.mean,
        pipeline.std
    )];
    lines.extend(pipeline.boxes.iter().map(|boxes| format!("  boxes     {boxes}")));
    let shown = pipeline.labels.iter().take(LABELS_SHOWN).cloned().collect::<Vec<_>>().join(", ");
    let more = pipeline.labels.len().saturating_sub(LABELS_SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let origin = if has_labels { "" } else { "   (not in the model's metadata)" };
    if !pipeline.labels.is_empty() {
        lines.push(format!("  labels    {shown}{more}{origin}"));
    }
    lines
}

/// Formats a prediction in the form of results.
fn format_prediction(prediction: &Value) -> Vec<String> {
    let score = |value: &Value| value["score"].as_f64().unwrap_or_default();
    let label = |value: &Value| value["label"].as_str().unwrap_or_default().to_owned();
    if prediction.get("score").is_some() {
        return vec![format!("score {:.4}", score(prediction))];
    }
    if let Some(classes) = prediction.get("classes").and_then(Value::as_array) {
        return classes.iter().map(|class| format!("{:<20} {:.3}", label(class), score(class))).collect();
    }
    if let Some(detections) = prediction.get("detections").and_then(Value::as_array) {
        let line = |found: &Value| format!("{:<20} {:.3}  {}", label(found), score(found), found["box"]);
        let lines: Vec<String> = detections.iter().map(line).collect();
        return if lines.is_empty() { vec!["no detections".to_owned()] } else { lines };
    }
    let line = |output: &Value| {
        let values = output["data"].as_array().map(Vec::as_slice).unwrap_or_default();
        let head: Vec<String> = values.iter().take(VALUES_SHOWN).map(ToString::to_string).collect();
        let more = if values.len() > VALUES_SHOWN { ", ..." } else { "" };
        let text = |field: &str| output[field].as_str().unwrap_or_default().to_owned();
        format!("{} {} {}: {}{more}", text("name"), text("datatype"), output["shape"], head.join(", "))
    };
    prediction["outputs"].as_array().map(Vec::as_slice).unwrap_or_default().iter().map(line).collect()
}
