//! `lineside check`: loads an ONNX model with each engine of this build and reports which engines can run it, the latency and
//! memory they need, and the inputs and outputs of the model. `tests/suite/command_line.rs` tests it as a whole process.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use clap::Args;
use lineside_api::spec::{ModelSpec, Task};
use lineside_inference::ErrorKind;
use lineside_inference::engine;
use lineside_inference::engine::Engine;
use lineside_inference::graph::{GraphInfo, TensorMetadata};
use lineside_inference::picture::Picture;
use lineside_inference::pipeline::Pipeline;
use serde::Serialize;

use super::Failure;
use lineside_api::message::PredictionInfo;
use lineside_common::digest::Digest;
use lineside_common::files::read_bounded;
use lineside_common::process_stats::{memory_bytes, p50_p99};

/// Maximum size of the model file, in bytes.
const MODEL_BYTES_MAX: u64 = 2 << 30;
/// Maximum size of the image file, in bytes.
const IMAGE_BYTES_MAX: u64 = 64 << 20;

#[derive(Args)]
#[command(after_help = "\
Exit status: 0 when at least one engine can run the model, 1 when none can, 64 for a wrong command line.

Examples:
  lineside check model.onnx
  lineside check model.onnx --image part.jpg
  lineside check model.onnx --json | jq .engines")]
pub(super) struct Arguments {
    /// ONNX file of the model.
    model: PathBuf,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
    /// Task of the model: classify, detect, anomaly or tensor [default: the task in the model's metadata].
    #[arg(long, value_parser = parse_task)]
    task: Option<Task>,
    /// Also run the model on this JPEG or PNG file and print its prediction.
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Number of timed inference runs.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: u32,
}

/// Parses the value of `--task`.
fn parse_task(text: &str) -> Result<Task, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

/// The report, with the field names of `--json`.
#[derive(Serialize)]
struct Report {
    file: String,
    bytes: usize,
    digest: String,
    producer: String,
    opset: i64,
    nodes: usize,
    inputs: Vec<TensorReport>,
    outputs: Vec<TensorReport>,
    engines: Vec<EngineReport>,
    /// Absent when no engine can run the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pipeline: Option<PipelineReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<ImageReport>,
    /// What a manifest has to specify so that the agent can run the model.
    notes: Vec<String>,
}

#[derive(Serialize)]
struct TensorReport {
    name: String,
    datatype: &'static str,
    shape: Vec<i64>,
}

impl From<&TensorMetadata> for TensorReport {
    fn from(info: &TensorMetadata) -> Self {
        let datatype = info.data_type.map_or("unknown", |data_type| data_type.name());
        Self { name: info.name.clone(), datatype, shape: info.protocol_shape() }
    }
}

#[derive(Serialize)]
struct EngineReport {
    engine: &'static str,
    device: &'static str,
    runs: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// The measurements.
    #[serde(skip_serializing_if = "Option::is_none")]
    benchmark: Option<Benchmark>,
}

#[derive(Serialize)]
struct Benchmark {
    load_ms: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// Growth of the resident memory of this process while the model was loaded, in bytes.
    memory_bytes: u64,
    timed_runs: u32,
}

#[derive(Serialize)]
struct PipelineReport {
    task: &'static str,
    width: u32,
    height: u32,
    resize: String,
    color: String,
    mean: [f32; 3],
    std: [f32; 3],
    labels: Vec<String>,
}

#[derive(Serialize)]
struct ImageReport {
    file: String,
    width: u32,
    height: u32,
    decode_ms: f64,
    preprocess_ms: f64,
    infer_ms: f64,
    postprocess_ms: f64,
    prediction: PredictionInfo,
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    let file = arguments.model.display().to_string();
    let bytes = read_bounded(&arguments.model, MODEL_BYTES_MAX).with_context(|| file.clone())?;
    let graph = engine::inspect(&bytes).with_context(|| file.clone())?;
    let mut notes = Vec::new();
    let (tract, mut pipeline) = try_engine(&engine::Tract, &bytes, &arguments, &mut notes);
    let engines = vec![
        tract,
        EngineReport {
            engine: "onnxruntime",
            device: "cpu",
            runs: false,
            reason: Some("not built into this version".to_owned()),
            benchmark: None,
        },
    ];
    let image = match (&arguments.image, &mut pipeline) {
        (Some(path), Some(pipeline)) => Some(run_image(path, pipeline)?),
        _ => None,
    };
    let report = Report {
        bytes: bytes.len(),
        digest: Digest::of(&bytes).to_string(),
        producer: graph.producer.clone(),
        opset: graph.opset,
        nodes: graph.nodes,
        inputs: graph.inputs.iter().map(TensorReport::from).collect(),
        outputs: graph.outputs.iter().map(TensorReport::from).collect(),
        pipeline: pipeline.as_ref().map(pipeline_report),
        file,
        engines,
        image,
        notes,
    };
    let text = if arguments.json {
        serde_json::to_string_pretty(&report).context("cannot serialize the report")?
    } else {
        format_report(&report, &graph)
    };
    writeln!(std::io::stdout(), "{text}").context("cannot write to stdout")?;
    match pipeline {
        Some(_) => Ok(()),
        None => Err(Failure::Failed(anyhow::anyhow!("no engine can run {}", report.file))),
    }
}

/// Loads the model with `engine` and measures it. A model whose task is unknown is loaded with the task `tensor`, and a note is
/// added to the report.
fn try_engine(
    engine: &dyn Engine,
    bytes: &[u8],
    arguments: &Arguments,
    notes: &mut Vec<String>,
) -> (EngineReport, Option<Pipeline>) {
    let report = |reason, benchmark: Option<Benchmark>| EngineReport {
        engine: engine.name(),
        device: "cpu",
        runs: benchmark.is_some(),
        reason,
        benchmark,
    };
    let memory_before = memory_bytes("VmRSS");
    let started = Instant::now();
    let spec = ModelSpec { task: arguments.task, ..ModelSpec::default() };
    let loaded = Pipeline::load(engine, bytes, &spec).or_else(|error| {
        if error.kind() != ErrorKind::BadSpec || arguments.task.is_some() {
            return Err(error);
        }
        notes.push(format!("{error}; this report uses the task tensor"));
        Pipeline::load(engine, bytes, &ModelSpec { task: Some(Task::Tensor), ..ModelSpec::default() })
    });
    let mut pipeline = match loaded {
        Ok(pipeline) => pipeline,
        Err(error) => return (report(Some(error.to_string()), None), None),
    };
    let load_ms = elapsed_ms(started);
    let memory_bytes = memory_bytes("VmRSS").saturating_sub(memory_before);
    match measure_latency(&mut pipeline, arguments.runs) {
        Ok((p50_ms, p99_ms)) => {
            let benchmark = Benchmark { load_ms, p50_ms, p99_ms, memory_bytes, timed_runs: arguments.runs };
            (report(None, Some(benchmark)), Some(pipeline))
        }
        Err(error) => (report(Some(error.to_string()), None), None),
    }
}

/// Median and 99th percentile of the inference time in milliseconds, without decoding and preprocessing, on a grey image.
fn measure_latency(pipeline: &mut Pipeline, runs: u32) -> lineside_inference::Result<(f64, f64)> {
    let (width, height) = (pipeline.input().width, pipeline.input().height);
    let grey = Picture::from_rgb(width, height, vec![128; width as usize * height as usize * 3])?;
    let mut times = Vec::new();
    for _ in 0..runs {
        times.push(pipeline.run_picture(&grey)?.timings.infer.as_secs_f64() * 1e3);
    }
    Ok(p50_p99(&mut times))
}

/// Runs the pipeline on one image file.
fn run_image(path: &Path, pipeline: &mut Pipeline) -> anyhow::Result<ImageReport> {
    let file = path.display().to_string();
    let bytes = read_bounded(path, IMAGE_BYTES_MAX).with_context(|| file.clone())?;
    let inspection = pipeline.run(&bytes).with_context(|| file.clone())?;
    let ms = |duration: std::time::Duration| duration.as_secs_f64() * 1e3;
    Ok(ImageReport {
        file,
        width: inspection.width,
        height: inspection.height,
        decode_ms: ms(inspection.timings.decode),
        preprocess_ms: ms(inspection.timings.preprocess),
        infer_ms: ms(inspection.timings.infer),
        postprocess_ms: ms(inspection.timings.postprocess),
        prediction: inspection.prediction.into(),
    })
}

fn pipeline_report(pipeline: &Pipeline) -> PipelineReport {
    let input = pipeline.input();
    PipelineReport {
        task: pipeline.output().task.task().name(),
        width: input.width,
        height: input.height,
        resize: format!("{:?}", input.resize).to_lowercase(),
        color: format!("{:?}", input.color).to_lowercase(),
        mean: input.mean,
        std: input.std,
        labels: pipeline.output().labels.iter().map(str::to_owned).collect(),
    }
}

/// Formats the report for a terminal.
fn format_report(report: &Report, graph: &GraphInfo) -> String {
    const LABELS_SHOWN: usize = 12;
    let mut lines = vec![format!("{}   {} bytes, {}", report.file, report.bytes, report.digest)];
    let producer = if report.producer.is_empty() { "unknown" } else { &report.producer };
    lines.push(format!("  producer  {producer}, opset {}, {} operators", report.opset, report.nodes));
    for (direction, tensors) in [("input", &report.inputs), ("output", &report.outputs)] {
        for tensor in tensors {
            lines.push(format!("  {direction:<9} {} {} {:?}", tensor.name, tensor.datatype, tensor.shape));
        }
    }
    if let Some(pipeline) = &report.pipeline {
        lines.push(format!(
            "  task      {}, image {} to {}x{} {}, mean {:?}, std {:?}",
            pipeline.task,
            pipeline.resize,
            pipeline.width,
            pipeline.height,
            pipeline.color,
            pipeline.mean,
            pipeline.std
        ));
        let shown = pipeline.labels.iter().take(LABELS_SHOWN).cloned().collect::<Vec<_>>().join(", ");
        let more = pipeline.labels.len().saturating_sub(LABELS_SHOWN);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let origin = if graph.class_names().is_some() { "" } else { "   (not in the model's metadata)" };
        if !pipeline.labels.is_empty() {
            lines.push(format!("  labels    {shown}{more}{origin}"));
        }
    }
    lines.push(String::new());
    lines.push(format!(
        "  {:<12} {:<7} {:<5} {:>9} {:>9} {:>9} {:>11}",
        "ENGINE", "DEVICE", "RUNS", "LOAD ms", "P50 ms", "P99 ms", "MEMORY MiB"
    ));
    for engine in &report.engines {
        let runs = if engine.runs { "yes" } else { "no" };
        let rest = match (&engine.benchmark, &engine.reason) {
            (Some(benchmark), _) => format!(
                "{:>9.1} {:>9.2} {:>9.2} {:>11.1}",
                benchmark.load_ms,
                benchmark.p50_ms,
                benchmark.p99_ms,
                benchmark.memory_bytes as f64 / f64::from(1 << 20)
            ),
            (None, reason) => reason.clone().unwrap_or_default(),
        };
        lines.push(format!("  {:<12} {:<7} {runs:<5} {rest}", engine.engine, engine.device));
    }
    if let Some(image) = &report.image {
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

fn format_prediction(prediction: &PredictionInfo) -> Vec<String> {
    match prediction {
        PredictionInfo::Classify { classes } => {
            classes.iter().map(|class| format!("{:<20} {:.3}", class.label, class.score)).collect()
        }
        PredictionInfo::Detect { detections } if detections.is_empty() => vec!["no detections".to_owned()],
        PredictionInfo::Detect { detections } => detections
            .iter()
            .map(|detection| format!("{:<20} {:.3}  {:?}", detection.label, detection.score, detection.bbox))
            .collect(),
        PredictionInfo::Anomaly { score, .. } => vec![format!("score {score:.4}")],
        PredictionInfo::Tensor { outputs } => outputs
            .iter()
            .map(|output| {
                let head: Vec<String> = output.data.iter().take(8).map(ToString::to_string).collect();
                let more = if output.data.len() > 8 { ", ..." } else { "" };
                format!("{} {} {:?}: {}{more}", output.name, output.datatype.name(), output.shape, head.join(", "))
            })
            .collect(),
    }
}

fn elapsed_ms(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1e3
}
