//! The child's side of admission. It reads from stdin, answers on stdout, and may die in any way at any point.

use std::io::{BufRead as _, Read as _, Write as _};
use std::time::{Duration, Instant};

use lineside_api::prediction::Prediction;
use lineside_inference::pipeline::{Pipeline, engine_for};
use lineside_inference::{Error, ErrorKind};
use lineside_inference::picture::Picture;

use super::golden::compare;
use super::{Answer, Benchmark, Request};
use lineside_api::message::PredictionInfo;
use lineside_common::child_process::limit_myself;
use lineside_common::process_stats::{memory_bytes, p50_p99};

/// Timed runs at most.
const RUNS_MAX: u32 = 100;
/// Time spent on timed runs at most, once there were a few.
const TIMED_FOR: Duration = Duration::from_millis(500);
const RUNS_MIN: u32 = 5;

/// Reads the request and the model, vets, and answers.
///
/// # Errors
/// When nobody has asked properly.
pub fn main() -> anyhow::Result<()> {
    let mut stdin = std::io::stdin().lock();
    let mut line = Vec::new();
    stdin.read_until(b'\n', &mut line)?;
    let request: Request = serde_json::from_slice(&line)?;
    drop(line);
    limit_myself(&request.limits.of_process())?;
    let mut model = Vec::new();
    stdin.read_to_end(&mut model)?;
    // On a thread, whose stack is as small as that of the threads the agent will load and run it on.
    let answer = std::thread::spawn(move || match vet(&request, &model) {
        Ok(benchmark) => Answer::Fit(benchmark),
        Err(error) if error.kind() == ErrorKind::BadSpec => Answer::Manifest(error.to_string()),
        Err(error) => Answer::Model(error.to_string()),
    });
    let answer = answer.join().map_err(|_| anyhow::anyhow!("admission panicked"))?;
    let mut stdout = std::io::stdout().lock();
    serde_json::to_writer(&mut stdout, &answer)?;
    stdout.flush()?;
    Ok(())
}

fn vet(request: &Request, model: &[u8]) -> Result<Benchmark, Error> {
    let started = Instant::now();
    let mut pipeline = Pipeline::load(engine_for(&request.spec)?, model, &request.spec)?;
    let load_ms = milliseconds(started.elapsed());
    let (width, height) = (pipeline.input().width, pipeline.input().height);
    let bytes = width as usize * height as usize * 3;
    let mut noise = fastrand::Rng::with_seed(7);
    let pictures = [vec![128; bytes], vec![0; bytes], (0..bytes).map(|_| noise.u8(..)).collect()];
    for picture in &pictures {
        let frame = Picture::from_rgb(width, height, picture.clone())?;
        finite(&pipeline.run_picture(&frame)?.prediction)?;
    }
    for sample in &request.samples {
        let picture = super::golden::decoded(&sample.picture)?;
        let found = pipeline
            .run(&picture)
            .map_err(|error| Error::new(error.kind(), format!("golden sample {}: {error}", sample.name)))?;
        let size = (found.width, found.height);
        let answer = serde_json::to_value(PredictionInfo::from(found.prediction))
            .map_err(|error| Error::new(ErrorKind::BadOutput, error.to_string()))?;
        compare(&sample.answer, &answer, sample.tolerance, size)
            .map_err(|reason| Error::new(ErrorKind::BadOutput, format!("golden sample {}: {reason}", sample.name)))?;
    }
    let frame = Picture::from_rgb(width, height, pictures[2].clone())?;
    let mut times = Vec::new();
    let started = Instant::now();
    while times.len() < RUNS_MIN as usize || (times.len() < RUNS_MAX as usize && started.elapsed() < TIMED_FOR) {
        times.push(milliseconds(pipeline.run_picture(&frame)?.timings.infer));
    }
    let (p50_ms, p99_ms) = p50_p99(&mut times);
    Ok(Benchmark { p50_ms, p99_ms, load_ms, peak_memory_bytes: memory_bytes("VmHWM"), runs: times.len() as u32 })
}

/// The tasks with a meaning refuse NaN by themselves; raw tensors are looked at here.
fn finite(prediction: &Prediction) -> Result<(), Error> {
    let Prediction::Tensors(outputs) = prediction else { return Ok(()) };
    for output in outputs {
        if output.tensor.to_f32().iter().any(|value| !value.is_finite()) {
            let why = format!("output `{}` holds NaN or infinity for a plain picture", output.name);
            return Err(Error::new(ErrorKind::BadOutput, why));
        }
    }
    Ok(())
}

fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}
