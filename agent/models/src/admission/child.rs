//! The admission process. It reads the request from stdin and writes the response to stdout. A model may end it at any
//! point in any way, which is why it is a process.

use std::io::{self, BufRead as _, Read as _, Write as _};
use std::time::{Duration, Instant};

use lineside_api::message::PredictionInfo;
use lineside_api::prediction::Prediction;
use lineside_api::spec::{ModelSpec, Task};
use lineside_common::child_process::limit_myself;
use lineside_common::process_stats::{MemoryStatus, p50_p99};
use lineside_common::sandbox::restrict_myself;
use lineside_inference::engine::inspect;
use lineside_inference::picture::Picture;
use lineside_inference::pipeline::{Pipeline, engine_for};
use lineside_inference::synthetic;
use lineside_inference::{Error, ErrorKind};

use super::Benchmark;
use super::golden;
use super::protocol::{Answer, GoldenSample, Request, Response, TestImage};
use super::report::{AdmissionReport, GraphReport, ImageReport, PipelineReport};

/// Upper bound of the measured inferences.
const RUNS_MAX: u32 = 100;
/// Lower bound of the measured inferences.
const RUNS_MIN: u32 = 5;
/// The measurement ends after this time, once the lower bound is reached.
const MEASUREMENT_TIME: Duration = Duration::from_millis(500);

/// Width and height of a picture of a common camera, in pixels.
const CAMERA_SIZE: (u32, u32) = (1920, 1080);
/// Bytes of a result message beside its prediction.
const MESSAGE_BYTES: u64 = 2048;

/// Why the admission process ends without a response.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionChildError {
    /// The request cannot be read, the limits cannot be set, or the response cannot be written.
    #[error("the admission process cannot communicate with the agent or limit itself")]
    Io(#[from] io::Error),
    /// The request is not valid, or the response cannot be serialized.
    #[error("the request or the response of the admission is not valid JSON")]
    Json(#[from] serde_json::Error),
    /// Loading or running the model panicked.
    #[error("the model made the admission process panic")]
    Panicked,
}

/// Reads the request and the model, runs the admission, and writes the response.
///
/// # Errors
/// When there is no response: the agent derives the reason from the exit status and stderr.
pub fn main() -> Result<(), AdmissionChildError> {
    let mut stdin = io::stdin().lock();
    let mut line = Vec::new();
    stdin.read_until(b'\n', &mut line)?;
    let request: Request = serde_json::from_slice(&line)?;
    drop(line);
    limit_myself(&request.limits.of_process())?;
    let mut memory = MemoryStatus::open()?;
    restrict_myself();
    let mut model = Vec::new();
    stdin.read_to_end(&mut model)?;
    // The agent loads and runs models on threads, so the stack must be as small here as there.
    let answer = std::thread::spawn(move || answer(&request, &model, &mut memory));
    let answer = answer.join().map_err(|_| AdmissionChildError::Panicked)?;
    let mut stdout = io::stdout().lock();
    serde_json::to_writer(&mut stdout, &answer)?;
    stdout.flush()?;
    Ok(())
}

fn answer(request: &Request, model: &[u8], memory: &mut MemoryStatus) -> Answer {
    let mut report = AdmissionReport::default();
    let response = match admit(request, model, memory, &mut report) {
        Ok(benchmark) => Response::Admitted(benchmark),
        Err(error) if error.kind() == ErrorKind::BadSpec => {
            // For `lineside check`: whether the engine runs the model at all.
            if request.reports_as_tensor && request.spec.task.is_none() {
                let spec = ModelSpec { task: Some(Task::Tensor), ..request.spec.clone() };
                let as_tensor = Request { spec, samples: Vec::new(), image: None, ..request.clone() };
                report.as_tensor = admit(&as_tensor, model, memory, &mut AdmissionReport::default()).ok();
            }
            Response::Manifest(error.to_string())
        }
        Err(error) => Response::Model(error.to_string()),
    };
    Answer { response, report }
}

/// Loads the model, runs it on synthetic images and on the golden samples, and measures it.
fn admit(
    request: &Request,
    model: &[u8],
    memory: &mut MemoryStatus,
    report: &mut AdmissionReport,
) -> Result<Benchmark, Error> {
    let started = Instant::now();
    let loaded = engine_for(&request.spec).and_then(|engine| Pipeline::load(engine, model, &request.spec));
    let load_ms = milliseconds(started.elapsed());
    report.graph = match &loaded {
        Ok(pipeline) => Some(GraphReport::from(pipeline.graph())),
        Err(_) => inspect(model).ok().map(|graph| GraphReport::from(&graph)),
    };
    let mut pipeline = loaded?;
    report.pipeline = Some(PipelineReport::from(&pipeline));
    report.notes.clone_from(&pipeline.output().notes);
    let (width, height) = (pipeline.input().width, pipeline.input().height);
    for picture in
        [(width, height), CAMERA_SIZE].into_iter().flat_map(|(width, height)| synthetic::pictures(width, height))
    {
        let inference = run_picture(&mut pipeline, &Picture::from_rgb(picture.width, picture.height, picture.rgb)?)
            .map_err(|error| Error::new(error.kind(), format!("on a {} picture: {error}", picture.name)))?;
        check_finite(&inference.prediction)?;
        check_size(inference.prediction, request.limits.result_bytes)?;
    }
    for sample in &request.samples {
        check_sample(&mut pipeline, sample)?;
    }
    let natural = synthetic::natural(width, height);
    let picture = Picture::from_rgb(width, height, natural)?;
    let mut times_ms = Vec::new();
    let started = Instant::now();
    while times_ms.len() < RUNS_MIN as usize
        || (times_ms.len() < RUNS_MAX as usize && started.elapsed() < MEASUREMENT_TIME)
    {
        times_ms.push(milliseconds(run_picture(&mut pipeline, &picture)?.infer_time));
    }
    let (p50_ms, p99_ms) = p50_p99(&mut times_ms);
    report.image = request.image.as_ref().map(|image| image_report(&mut pipeline, image));
    Ok(Benchmark { p50_ms, p99_ms, load_ms, peak_memory_bytes: memory.bytes("VmHWM"), runs: times_ms.len() as u32 })
}

/// The answer to a picture that is not part of the admission.
fn image_report(pipeline: &mut Pipeline, image: &TestImage) -> ImageReport {
    let mut answer = || -> Result<ImageReport, String> {
        let bytes = golden::decode(&image.image).map_err(|error| error.to_string())?;
        let inspection = pipeline.run(&bytes).map_err(|error| error.to_string())?;
        let prediction = serde_json::to_value(PredictionInfo::from(inspection.prediction));
        Ok(ImageReport {
            file: image.name.clone(),
            error: None,
            width: inspection.width,
            height: inspection.height,
            decode_ms: milliseconds(inspection.timings.decode),
            preprocess_ms: milliseconds(inspection.timings.preprocess),
            infer_ms: milliseconds(inspection.timings.infer),
            postprocess_ms: milliseconds(inspection.timings.postprocess),
            prediction: prediction.map_err(|error| error.to_string())?,
        })
    };
    answer().unwrap_or_else(|error| ImageReport {
        file: image.name.clone(),
        error: Some(error),
        ..ImageReport::default()
    })
}

/// What the admission uses of one inference.
struct Inference {
    prediction: Prediction,
    /// Width and height of the source image in pixels.
    image_size: (u32, u32),
    infer_time: Duration,
}

/// Runs the pipeline on a decoded picture.
fn run_picture(pipeline: &mut Pipeline, picture: &Picture) -> Result<Inference, Error> {
    let output = pipeline.run_picture(picture)?;
    Ok(Inference {
        image_size: (output.width, output.height),
        infer_time: output.timings.infer,
        prediction: output.prediction,
    })
}

/// Runs the pipeline on an encoded image.
fn run_encoded(pipeline: &mut Pipeline, image: &[u8]) -> Result<Inference, Error> {
    let output = pipeline.run(image)?;
    Ok(Inference {
        image_size: (output.width, output.height),
        infer_time: output.timings.infer,
        prediction: output.prediction,
    })
}

/// Compares the output for a golden sample with the expected one.
fn check_sample(pipeline: &mut Pipeline, sample: &GoldenSample) -> Result<(), Error> {
    let error = |kind, reason: String| Error::new(kind, format!("golden sample {}: {reason}", sample.name));
    let image = golden::decode(&sample.image).map_err(|reason| error(ErrorKind::BadSpec, reason.to_string()))?;
    let inference = run_encoded(pipeline, &image).map_err(|reason| error(reason.kind(), reason.to_string()))?;
    let actual = serde_json::to_value(PredictionInfo::from(inference.prediction))
        .map_err(|reason| error(ErrorKind::BadOutput, reason.to_string()))?;
    golden::compare(&sample.expected, actual, sample.tolerance, inference.image_size)
        .map_err(|reason| error(reason.kind(), reason.to_string()))
}

/// Checks that the result of a frame can be sent. The rest of the message is small, and counted generously.
fn check_size(prediction: Prediction, result_bytes: u64) -> Result<(), Error> {
    let encoded = serde_json::to_vec(&PredictionInfo::from(prediction))
        .map_err(|reason| Error::new(ErrorKind::BadOutput, reason.to_string()))?;
    let bytes = encoded.len() as u64 + MESSAGE_BYTES;
    if bytes > result_bytes {
        return Err(Error::new(
            ErrorKind::BadSpec,
            format!(
                "a result has {bytes} bytes, and at most {result_bytes} can be sent; reduce it by spec.output.topK, \
                 spec.output.map: false, or another spec.task"
            ),
        ));
    }
    Ok(())
}

/// Checks raw tensors for NaN and infinity. The other tasks reject NaN themselves.
fn check_finite(prediction: &Prediction) -> Result<(), Error> {
    let Prediction::Tensors(outputs) = prediction else { return Ok(()) };
    for output in outputs {
        if output.tensor.to_f32().iter().any(|value| !value.is_finite()) {
            let message = format!("output `{}` contains NaN or infinity for a synthetic image", output.name);
            return Err(Error::new(ErrorKind::BadOutput, message));
        }
    }
    Ok(())
}

fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}
