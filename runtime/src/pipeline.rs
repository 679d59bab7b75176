//! One model, ready for frames: decode, preprocess, infer, postprocess, each of them timed.

use std::time::{Duration, Instant};

use crate::decode::{Limits, decode};
use crate::engine::{self, Engine, Session};
use crate::frame::Frame;
use crate::graph::GraphInfo;
use crate::postprocess;
use crate::prediction::Prediction;
use crate::preprocess::Preprocessor;
use crate::settings::{self, InputSettings, OutputSettings};
use crate::spec::ModelSpec;
use crate::{Error, ErrorKind, Result};

/// How long each stage of one frame took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// Encoded bytes to pixels.
    pub decode: Duration,
    /// Pixels to the input tensor.
    pub preprocess: Duration,
    /// The engine.
    pub infer: Duration,
    /// Output tensors to the prediction.
    pub postprocess: Duration,
}

/// The answer to one frame.
#[derive(Debug, Clone, PartialEq)]
pub struct Inspection {
    /// What the model says.
    pub prediction: Prediction,
    /// Width of the source picture, in pixels.
    pub width: u32,
    /// Height of the source picture, in pixels.
    pub height: u32,
    /// What each stage took.
    pub timings: Timings,
}

/// A loaded model with the working memory of one thread.
pub struct Pipeline {
    session: Box<dyn Session>,
    preprocessor: Preprocessor,
    input: InputSettings,
    output: OutputSettings,
    graph: GraphInfo,
    engine: &'static str,
    limits: Limits,
}

impl Pipeline {
    /// Loads a model and runs it once on a grey picture, which warms it up and shows what its outputs look like.
    ///
    /// # Errors
    /// Whatever [`engine::inspect`], [`Engine::load`], [`settings::input`] and [`settings::output`] refuse;
    /// [`ErrorKind::BadOutput`] for a model that answers NaN to a grey picture.
    pub fn load(engine: &dyn Engine, model: &[u8], spec: &ModelSpec) -> Result<Self> {
        let graph = engine::inspect(model)?;
        let task = settings::task(spec, &graph)?;
        let input = settings::input(spec, &graph, task)?;
        let mut session = engine.load(model, &[input.shape()])?;
        let mut preprocessor = Preprocessor::new(&input);
        let grey =
            Frame::from_rgb(input.width, input.height, vec![128; input.width as usize * input.height as usize * 3])?;
        let (tensor, placement) = preprocessor.run(&grey)?;
        let outputs = session.run(vec![tensor])?;
        let output = settings::output(spec, &graph, task, &input, &outputs)?;
        postprocess::run(&output, outputs, &placement)
            .map_err(|error| Error::new(error.kind(), format!("on a plain grey picture: {error}")))?;
        Ok(Self { session, preprocessor, input, output, graph, engine: engine.name(), limits: Limits::default() })
    }

    /// The same model for another thread; the weights are shared.
    ///
    /// # Errors
    /// [`ErrorKind::Inference`] when the engine refuses.
    pub fn fork(&self) -> Result<Self> {
        Ok(Self {
            session: self.session.fork()?,
            preprocessor: Preprocessor::new(&self.input),
            input: self.input.clone(),
            output: self.output.clone(),
            graph: self.graph.clone(),
            engine: self.engine,
            limits: self.limits,
        })
    }

    /// Inspects one JPEG or PNG.
    ///
    /// # Errors
    /// [`ErrorKind::BadFrame`] and [`ErrorKind::FrameTooLarge`] for the frame, [`ErrorKind::Inference`] and
    /// [`ErrorKind::BadOutput`] for the model. The pipeline stays usable after any of them.
    pub fn run(&mut self, encoded: &[u8]) -> Result<Inspection> {
        let started = Instant::now();
        let frame = decode(encoded, &self.limits)?;
        let decode = started.elapsed();
        let mut inspection = self.run_frame(&frame)?;
        inspection.timings.decode = decode;
        Ok(inspection)
    }

    /// Inspects a decoded picture.
    ///
    /// # Errors
    /// As [`Pipeline::run`], but for the frame's.
    pub fn run_frame(&mut self, frame: &Frame) -> Result<Inspection> {
        let started = Instant::now();
        let (tensor, placement) = self.preprocessor.run(frame)?;
        let preprocess = started.elapsed();
        let started = Instant::now();
        let outputs = self.session.run(vec![tensor])?;
        let infer = started.elapsed();
        let started = Instant::now();
        let prediction = postprocess::run(&self.output, outputs, &placement)?;
        let timings = Timings { decode: Duration::ZERO, preprocess, infer, postprocess: started.elapsed() };
        Ok(Inspection { prediction, width: frame.width(), height: frame.height(), timings })
    }

    /// Name of the engine that runs it.
    pub fn engine(&self) -> &'static str {
        self.engine
    }

    /// How pictures become its input.
    pub fn input(&self) -> &InputSettings {
        &self.input
    }

    /// How its outputs become predictions.
    pub fn output(&self) -> &OutputSettings {
        &self.output
    }

    /// What the file says of itself.
    pub fn graph(&self) -> &GraphInfo {
        &self.graph
    }
}

/// The engine to load a model with, by the manifest's wish.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for an engine or a device that this build does not have.
pub fn engine_for(spec: &ModelSpec) -> Result<&'static dyn Engine> {
    use crate::spec::{DeviceChoice, EngineChoice};
    if spec.runtime.device == Some(DeviceChoice::Gpu) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "spec.runtime.device: this version runs on the cpu only; use cpu or auto",
        ));
    }
    match spec.runtime.engine.unwrap_or_default() {
        EngineChoice::Auto | EngineChoice::Tract => Ok(&engine::Tract),
        EngineChoice::OnnxRuntime => Err(Error::new(
            ErrorKind::Unsupported,
            "spec.runtime.engine: onnxruntime is not built into this version; use tract or auto",
        )),
    }
}
