//! One loaded model: decode, preprocess, infer, postprocess, each of them timed.
//!
//! The four stages form two halves that can run on two threads, so that one frame is prepared while the one before it is
//! inferred:
//!
//! ```text
//! Frame ──> PrepareStage: decode, preprocess ──> Prepared ──> InferStage: engine, postprocess ──> Inspection
//! ```
//!
//! A model that was loaded for batches infers several prepared frames in one run of the engine. The answer to each frame is
//! the one it would get alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lineside_api::prediction::Timings;
use lineside_api::spec::{ModelSpec, Task};
use lineside_api::tensor::Tensor;
use lineside_ipc::frame::Frame;

pub use lineside_api::prediction::Inspection;

use crate::batch;
use crate::decode::{DecodeOptions, decode, to_picture};
use crate::engine::{self, Engine, Session};
use crate::graph::GraphInfo;
use crate::picture::Picture;
use crate::postprocess;
use crate::preprocess::{Placement, Preprocessor};
use crate::settings::{self, InputSettings, OutputSettings};
use crate::synthetic;
use crate::{Error, ErrorKind, Result};

/// A frame that is ready for the engine.
#[derive(Debug)]
pub struct Prepared {
    input: Tensor,
    placement: Placement,
    width: u32,
    height: u32,
    decode: Duration,
    preprocess: Duration,
}

/// The first half: frames to input tensors. Owns its working memory, so one thread uses it at a time.
pub struct PrepareStage {
    preprocessor: Preprocessor,
    options: DecodeOptions,
}

impl PrepareStage {
    /// Decodes a frame and fills the input tensor. `on_decoded` is called between the two.
    ///
    /// # Errors
    /// [`ErrorKind::BadFrame`] and [`ErrorKind::FrameTooLarge`]. The stage stays usable.
    pub fn run(&mut self, frame: &Frame, on_decoded: impl FnOnce()) -> Result<Prepared> {
        self.timed(|options| to_picture(frame, options).inspect(|_| on_decoded()))
    }

    fn timed(&mut self, decode: impl FnOnce(&DecodeOptions) -> Result<Picture>) -> Result<Prepared> {
        let started = Instant::now();
        let picture = decode(&self.options)?;
        let decoded = Instant::now();
        let (input, placement) = self.preprocessor.run(&picture)?;
        Ok(Prepared {
            input,
            placement,
            width: picture.width(),
            height: picture.height(),
            decode: decoded - started,
            preprocess: decoded.elapsed(),
        })
    }

    fn prepare_picture(&mut self, picture: &Picture) -> Result<Prepared> {
        let started = Instant::now();
        let (input, placement) = self.preprocessor.run(picture)?;
        Ok(Prepared {
            input,
            placement,
            width: picture.width(),
            height: picture.height(),
            decode: Duration::ZERO,
            preprocess: started.elapsed(),
        })
    }
}

/// The second half: input tensors to predictions. Owns its working memory, so one thread uses it at a time.
pub struct InferStage {
    session: Box<dyn Session>,
    /// The same model for batches of this size, where it was loaded for batches.
    batched: Option<(usize, Box<dyn Session>)>,
    output: Arc<OutputSettings>,
}

impl InferStage {
    /// Infers prepared frames: one result for each, in order.
    ///
    /// # Errors
    /// By frame: [`ErrorKind::Inference`] and [`ErrorKind::BadOutput`]. The stage stays usable.
    pub fn run(&mut self, prepared: Vec<Prepared>) -> Vec<Result<Inspection>> {
        let mut results = Vec::with_capacity(prepared.len());
        let mut waiting = prepared.into_iter().peekable();
        while waiting.peek().is_some() {
            let size = self.batched.as_ref().map_or(1, |(size, _)| *size);
            let chunk: Vec<Prepared> = waiting.by_ref().take(size).collect();
            // A batch less than half full costs more than its frames one by one.
            match &mut self.batched {
                Some((size, session)) if chunk.len() > 1 && chunk.len() * 2 > *size => {
                    results.extend(infer_batch(session.as_mut(), *size, &self.output, chunk));
                }
                _ => results.extend(chunk.into_iter().map(|one| self.infer_one(one))),
            }
        }
        results
    }

    fn infer_one(&mut self, prepared: Prepared) -> Result<Inspection> {
        let started = Instant::now();
        let outputs = self.session.run(vec![prepared.input])?;
        let infer = started.elapsed();
        finish(
            &self.output,
            outputs,
            &prepared.placement,
            [prepared.width, prepared.height],
            Timings { decode: prepared.decode, preprocess: prepared.preprocess, infer, postprocess: Duration::ZERO },
        )
    }

    fn fork(&self) -> Result<Self> {
        let batched = self.batched.as_ref().map(|(size, session)| session.fork().map(|fork| (*size, fork)));
        Ok(Self { session: self.session.fork()?, batched: batched.transpose()?, output: self.output.clone() })
    }
}

fn infer_batch(
    session: &mut dyn Session,
    size: usize,
    output: &OutputSettings,
    chunk: Vec<Prepared>,
) -> Vec<Result<Inspection>> {
    let started = Instant::now();
    let count = chunk.len();
    let (inputs, facts): (Vec<Tensor>, Vec<_>) = chunk
        .into_iter()
        .map(|one| (one.input, (one.placement, [one.width, one.height], one.decode, one.preprocess)))
        .unzip();
    let answers = batch::stack(&inputs, size)
        .and_then(|input| session.run(vec![input]))
        .and_then(|outputs| batch::split(&outputs, size, count));
    let infer = started.elapsed();
    match answers {
        Err(error) => facts.iter().map(|_| Err(error.clone())).collect(),
        Ok(answers) => answers
            .into_iter()
            .zip(facts)
            .map(|(outputs, (placement, sides, decode, preprocess))| {
                let timings = Timings { decode, preprocess, infer, postprocess: Duration::ZERO };
                finish(output, outputs, &placement, sides, timings)
            })
            .collect(),
    }
}

fn finish(
    output: &OutputSettings,
    outputs: Vec<Tensor>,
    placement: &Placement,
    [width, height]: [u32; 2],
    timings: Timings,
) -> Result<Inspection> {
    let started = Instant::now();
    let prediction = postprocess::run(output, outputs, placement)?;
    let timings = Timings { postprocess: started.elapsed(), ..timings };
    Ok(Inspection { prediction, width, height, timings, rule: None })
}

/// A loaded model with the working memory of one instance.
pub struct Pipeline {
    prepare: PrepareStage,
    infer: InferStage,
    input: InputSettings,
    graph: Arc<GraphInfo>,
    engine: &'static str,
}

impl Pipeline {
    /// Loads a model and runs it on a grey picture, a detector on a natural one as well, which warms it up and shows its outputs. With
    /// `runtime.maxBatchSize` above 1 it is loaded for batches of that size too, which takes the memory of a second copy.
    ///
    /// # Errors
    /// Whatever [`engine::inspect`], [`Engine::load`], [`settings::input`] and [`settings::output`] refuse;
    /// [`ErrorKind::BadOutput`] for a model that answers NaN to a grey picture; [`ErrorKind::BadSpec`] for a batch size that
    /// the model cannot take.
    pub fn load(engine: &dyn Engine, model: &[u8], spec: &ModelSpec) -> Result<Self> {
        let graph = engine::inspect(model)?;
        let task = settings::task(spec, &graph)?;
        let input = settings::input(spec, &graph, task)?;
        let mut session = engine.load(model, &[input.shape()])?;
        let options = DecodeOptions { auto_rotate: input.auto_rotate, ..DecodeOptions::default() };
        let mut prepare = PrepareStage { preprocessor: Preprocessor::new(&input), options };
        let (width, height) = (input.width, input.height);
        let grey = Picture::from_rgb(width, height, vec![128; width as usize * height as usize * 3])?;
        let warm_up = prepare.prepare_picture(&grey)?;
        let mut runs = vec![session.run(vec![warm_up.input])?];
        if task == Task::Detect {
            // A grey picture shows no boxes.
            let natural = Picture::from_rgb(width, height, synthetic::natural(width, height))?;
            runs.push(session.run(vec![prepare.prepare_picture(&natural)?.input])?);
        }
        let mut output = settings::output(spec, &graph, task, &input, &runs)?;
        output.notes.extend_from_slice(session.notes());
        postprocess::run(&output, runs.swap_remove(0), &warm_up.placement)
            .map_err(|error| Error::new(error.kind(), format!("on a plain grey picture: {error}")))?;
        let mut infer = InferStage { session, batched: None, output: Arc::new(output) };
        let size = spec.runtime.max_batch_size.unwrap_or(1) as usize;
        if size > 1 {
            infer.batched = Some((size, batched_session(engine, model, &input, size)?));
            let grey_batch = (0..size).map(|_| prepare.prepare_picture(&grey)).collect::<Result<Vec<_>>>()?;
            for result in infer.run(grey_batch) {
                result.map_err(|error| bad_batch(size, &error))?;
            }
        }
        Ok(Self { prepare, infer, input, graph: Arc::new(graph), engine: engine.name() })
    }

    /// The same model for another instance; the weights are shared.
    ///
    /// # Errors
    /// [`ErrorKind::Inference`] when the engine refuses.
    pub fn fork(&self) -> Result<Self> {
        Ok(Self {
            prepare: PrepareStage { preprocessor: Preprocessor::new(&self.input), options: self.prepare.options },
            infer: self.infer.fork()?,
            input: self.input.clone(),
            graph: self.graph.clone(),
            engine: self.engine,
        })
    }

    /// The two halves, for two threads.
    pub fn into_stages(self) -> (PrepareStage, InferStage) {
        (self.prepare, self.infer)
    }

    /// Inspects one JPEG or PNG.
    ///
    /// # Errors
    /// [`ErrorKind::BadFrame`] and [`ErrorKind::FrameTooLarge`] for the frame, [`ErrorKind::Inference`] and
    /// [`ErrorKind::BadOutput`] for the model. The pipeline stays usable after any of them.
    pub fn run(&mut self, encoded: &[u8]) -> Result<Inspection> {
        let prepared = self.prepare.timed(|options| decode(encoded, options))?;
        self.infer.infer_one(prepared)
    }

    /// Inspects a decoded picture.
    ///
    /// # Errors
    /// As [`Pipeline::run`], but for the frame's.
    pub fn run_picture(&mut self, picture: &Picture) -> Result<Inspection> {
        let prepared = self.prepare.prepare_picture(picture)?;
        self.infer.infer_one(prepared)
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
        &self.infer.output
    }

    /// What the model file declares.
    pub fn graph(&self) -> &GraphInfo {
        &self.graph
    }
}

/// Loads the model for a batch.
fn batched_session(engine: &dyn Engine, model: &[u8], input: &InputSettings, size: usize) -> Result<Box<dyn Session>> {
    let mut shape = input.shape();
    shape[0] = size;
    engine.load(model, &[shape]).map_err(|error| bad_batch(size, &error))
}

fn bad_batch(size: usize, error: &Error) -> Error {
    Error::new(
        ErrorKind::BadSpec,
        format!(
            "spec.runtime.maxBatchSize: the model cannot take batches of {size}: {error}; export it with a dynamic batch"
        ),
    )
}

/// The engine that the manifest asks for.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for an engine or a device that this build does not have.
pub fn engine_for(spec: &ModelSpec) -> Result<&'static dyn Engine> {
    use lineside_api::spec::{DeviceChoice, EngineChoice};
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

#[cfg(test)]
mod tests {
    use lineside_tests::onnx::{Attribute, Dim, FLOAT, Model, UINT8, mean_colour_classifier};

    use super::*;
    use crate::engine::Tract;
    use lineside_api::prediction::Prediction;
    use lineside_api::spec::{Color, OutputSpec, Resize, Task};

    fn flat(pixel: [u8; 3]) -> Picture {
        Picture::from_rgb(40, 20, pixel.repeat(800)).unwrap()
    }

    fn load(model: &Model, spec: &ModelSpec) -> Result<Pipeline> {
        Pipeline::load(&Tract, &model.build(), spec)
    }

    fn rejection(model: &Model, spec: &ModelSpec) -> String {
        let error = load(model, spec).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::BadSpec, "{error}");
        error.to_string()
    }

    fn of_task(task: Task) -> ModelSpec {
        ModelSpec { task: Some(task), ..ModelSpec::default() }
    }

    /// One operator on a picture of these dimensions.
    fn on_picture(element_type: u64, shape: &[Dim; 4], operator: &str, attributes: &[Attribute]) -> Model {
        Model::new().input("picture", element_type, shape).node(operator, &["picture"], &["out"], attributes).output(
            "out",
            FLOAT,
            &[Dim::Named("any")],
        )
    }

    #[test]
    fn task_labels_and_an_open_size_come_from_the_model() {
        let open = |metadata: &[(&str, &str)]| {
            let model = Model::new()
                .input("image", FLOAT, &[Dim::Named("n"), Dim::Size(3), Dim::Named("h"), Dim::Named("w")])
                .node("GlobalAveragePool", &["image"], &["pooled"], &[])
                .node("Flatten", &["pooled"], &["logits"], &[Attribute::Int("axis", 1)])
                .output("logits", FLOAT, &[Dim::Named("n"), Dim::Size(3)]);
            metadata.iter().fold(model, |model, (key, value)| model.metadata(key, value))
        };
        let names = ("names", "{0: 'red', 1: 'green', 2: 'blue'}");
        let mut pipeline = load(&open(&[names, ("imgsz", "[16, 24]")]), &ModelSpec::default()).unwrap();
        assert_eq!((pipeline.input().height, pipeline.input().width), (16, 24));
        assert_eq!(pipeline.input().resize, Resize::Crop);
        let found = pipeline.run_picture(&flat([10, 200, 30])).unwrap();
        let Prediction::Classes(classes) = found.prediction else { panic!("{found:?}") };
        assert_eq!((&*classes[0].label, classes.len()), ("green", 3));

        assert!(rejection(&open(&[names]), &ModelSpec::default()).contains("spec.input.height"));
        let input = lineside_api::spec::InputSpec { height: Some(8), width: Some(8), ..Default::default() };
        let sized = ModelSpec { input, ..ModelSpec::default() };
        assert_eq!(load(&open(&[names]), &sized).unwrap().input().shape(), [1, 3, 8, 8]);
    }

    #[test]
    fn what_does_not_fit_is_refused_by_field() {
        let model = mean_colour_classifier(8, 8, 3);
        let labels = OutputSpec { labels: Some(vec!["one".to_owned()]), ..Default::default() };
        let spec = ModelSpec { output: labels, ..ModelSpec::default() };
        assert!(rejection(&model, &spec).contains("spec.output.labels has 1 names, but the model has 3 classes"));
        let input = |input| ModelSpec { input, ..ModelSpec::default() };
        let spec = input(lineside_api::spec::InputSpec { width: Some(9), ..Default::default() });
        assert!(rejection(&model, &spec).contains("spec.input.width: 9 is requested, but the model is fixed at 8"));
        let spec = input(lineside_api::spec::InputSpec { color: Some(Color::Gray), ..Default::default() });
        assert!(rejection(&model, &spec).contains("spec.input.color"));
        let spec = input(lineside_api::spec::InputSpec { std: Some(vec![1.0, 0.0, 1.0]), ..Default::default() });
        assert!(rejection(&model, &spec).contains("spec.input.std"));
        let spec = input(lineside_api::spec::InputSpec { mean: Some(vec![1.0, 2.0]), ..Default::default() });
        assert!(rejection(&model, &spec).contains("spec.input.mean has 2 values"));
        let output = OutputSpec { threshold: Some(1.5), ..Default::default() };
        assert!(rejection(&model, &ModelSpec { output, ..ModelSpec::default() }).contains("spec.output.threshold"));
        assert!(rejection(&model, &of_task(Task::Detect)).contains("no decoder reads boxes"));
        for task in ["segment", "obb", "pose"] {
            let stated = mean_colour_classifier(8, 8, 3).metadata("task", task);
            let error = load(&stated, &ModelSpec::default()).err().unwrap();
            assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains(task), "{error}");
            assert!(load(&stated, &of_task(Task::Tensor)).is_ok());
        }
        let stated = mean_colour_classifier(8, 8, 3).metadata("task", "paint");
        assert!(rejection(&stated, &ModelSpec::default()).contains("the task paint, which is unknown"));

        let vector = Model::new()
            .input("x", FLOAT, &[Dim::Size(1), Dim::Size(3)])
            .node("Relu", &["x"], &["y"], &[])
            .output("y", FLOAT, &[Dim::Size(1), Dim::Size(3)]);
        assert!(rejection(&vector, &ModelSpec::default()).contains("is no picture"));
        let batch = on_picture(FLOAT, &[Dim::Size(8), Dim::Size(3), Dim::Size(4), Dim::Size(4)], "Relu", &[]);
        assert!(rejection(&batch, &of_task(Task::Tensor)).contains("8 pictures at a time"));
        let without_task = on_picture(FLOAT, &[Dim::Size(1), Dim::Size(3), Dim::Size(4), Dim::Size(4)], "Relu", &[]);
        assert!(rejection(&without_task, &ModelSpec::default()).contains("set spec.task"));
    }

    #[test]
    fn bytes_in_nhwc_reach_the_model_as_they_are() {
        let shape = [Dim::Size(1), Dim::Size(2), Dim::Size(4), Dim::Size(3)];
        let model = on_picture(UINT8, &shape, "Cast", &[Attribute::Int("to", 1)]);
        let mut pipeline = load(&model, &of_task(Task::Tensor)).unwrap();
        let found = pipeline.run_picture(&flat([7, 8, 9])).unwrap();
        let Prediction::Tensors(outputs) = found.prediction else { panic!("{found:?}") };
        assert_eq!((&*outputs[0].name, outputs[0].tensor.shape()), ("out", &[1, 2, 4, 3][..]));
        assert_eq!(&outputs[0].tensor.to_f32()[..6], [7.0, 8.0, 9.0, 7.0, 8.0, 9.0]);
    }

    #[test]
    fn an_anomaly_model_in_grey_gives_its_score_and_its_map() {
        let picture = [Dim::Named("n"), Dim::Size(1), Dim::Size(4), Dim::Size(6)];
        let model = Model::new()
            .input("picture", FLOAT, &picture)
            .node("Relu", &["picture"], &["anomaly_map"], &[])
            .node("GlobalMaxPool", &["anomaly_map"], &["peak"], &[])
            .node("Flatten", &["peak"], &["pred_score"], &[Attribute::Int("axis", 1)])
            .output("anomaly_map", FLOAT, &picture)
            .output("pred_score", FLOAT, &[Dim::Named("n"), Dim::Size(1)]);
        let with_map =
            |map| ModelSpec { output: OutputSpec { map: Some(map), ..Default::default() }, ..of_task(Task::Anomaly) };
        for is_asked in [true, false] {
            let mut pipeline = load(&model, &with_map(is_asked)).unwrap();
            assert_eq!(pipeline.input().color, Color::Gray);
            let found = pipeline.run_picture(&flat([255, 255, 255])).unwrap();
            let Prediction::Anomaly { score, map } = found.prediction else { panic!("{found:?}") };
            assert_eq!(score, 1.0);
            assert_eq!(map.map(|map| (map.width, map.height)), is_asked.then_some((6, 4)));
        }
    }

    /// Twelve frames in batches of up to `size`: the best class of each is the colour of its own frame.
    #[test]
    fn every_frame_of_a_batch_gets_its_own_answer() {
        let model = mean_colour_classifier(8, 8, 3);
        let runtime = lineside_api::spec::RuntimeSpec { max_batch_size: Some(4), ..Default::default() };
        let pipeline = load(&model, &ModelSpec { runtime, ..ModelSpec::default() }).unwrap();
        let mut alone = load(&model, &ModelSpec::default()).unwrap();
        let (mut prepare, mut infer) = pipeline.fork().unwrap().into_stages();
        for count in [1, 2, 3, 4, 5, 12] {
            let pictures: Vec<Picture> = (0..count)
                .map(|index| {
                    let mut pixel = [10, 20, 30];
                    pixel[index % 3] = 200;
                    flat(pixel)
                })
                .collect();
            let prepared = pictures.iter().map(|picture| prepare.prepare_picture(picture).unwrap()).collect();
            let found = infer.run(prepared);
            assert_eq!(found.len(), count);
            for (picture, found) in pictures.iter().zip(found) {
                assert_eq!(found.unwrap().prediction, alone.run_picture(picture).unwrap().prediction);
            }
        }
    }

    #[test]
    fn a_model_that_merges_the_pictures_of_a_batch_is_refused_for_batches() {
        let shape = [Dim::Size(1), Dim::Size(3), Dim::Size(4), Dim::Size(4)];
        let model = on_picture(FLOAT, &shape, "Flatten", &[Attribute::Int("axis", 0)]);
        let runtime = lineside_api::spec::RuntimeSpec { max_batch_size: Some(2), ..Default::default() };
        let spec = ModelSpec { runtime, ..of_task(Task::Tensor) };
        assert!(rejection(&model, &spec).contains("spec.runtime.maxBatchSize"));
    }

    #[test]
    fn a_model_that_answers_nan_does_not_load() {
        let shape = [Dim::Size(1), Dim::Size(3), Dim::Size(4), Dim::Size(4)];
        let model = Model::new()
            .input("x", FLOAT, &shape)
            .node("Sub", &["x", "x"], &["zero"], &[])
            .node("Div", &["zero", "zero"], &["nan"], &[])
            .node("GlobalAveragePool", &["nan"], &["pooled"], &[])
            .node("Flatten", &["pooled"], &["y"], &[Attribute::Int("axis", 1)])
            .output("y", FLOAT, &[Dim::Size(1), Dim::Size(3)]);
        let error = load(&model, &ModelSpec::default()).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::BadOutput, "{error}");
        assert!(error.to_string().contains("NaN"), "{error}");
    }
}
