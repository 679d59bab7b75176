//! One model, ready for frames: decode, preprocess, infer, postprocess, each of them timed.

use std::time::{Duration, Instant};

use crate::decode::{DecodeLimits, decode};
use crate::engine;
use crate::engine::{Engine, Session};
use crate::graph::GraphInfo;
use crate::postprocess;
use crate::preprocess::Preprocessor;
use crate::settings;
use crate::settings::{InputSettings, OutputSettings};
use crate::{Error, ErrorKind, Result};
pub use lineside_api::prediction::Inspection;
use lineside_api::prediction::Timings;
use lineside_api::spec::ModelSpec;
use lineside_ipc::frame::Frame;

/// A loaded model with the working memory of one thread.
pub struct Pipeline {
    session: Box<dyn Session>,
    preprocessor: Preprocessor,
    input: InputSettings,
    output: OutputSettings,
    graph: GraphInfo,
    engine: &'static str,
    limits: DecodeLimits,
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
        Ok(Self { session, preprocessor, input, output, graph, engine: engine.name(), limits: DecodeLimits::default() })
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
    use lineside_api::prediction::Prediction;
    use lineside_tests::onnx::{Attribute, Dim, FLOAT, Model, UINT8, mean_colour_classifier};

    use super::*;
    use crate::engine::Tract;
    use lineside_api::spec::{Color, OutputSpec, Resize, Task};

    fn flat(pixel: [u8; 3]) -> Frame {
        Frame::from_rgb(40, 20, pixel.repeat(800)).unwrap()
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
        let found = pipeline.run_frame(&flat([10, 200, 30])).unwrap();
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
        assert!(rejection(&model, &spec).contains("spec.input.width: 9 asked for, but the model is fixed at 8"));
        let spec = input(lineside_api::spec::InputSpec { color: Some(Color::Gray), ..Default::default() });
        assert!(rejection(&model, &spec).contains("spec.input.color"));
        let spec = input(lineside_api::spec::InputSpec { std: Some(vec![1.0, 0.0, 1.0]), ..Default::default() });
        assert!(rejection(&model, &spec).contains("spec.input.std"));
        let spec = input(lineside_api::spec::InputSpec { mean: Some(vec![1.0, 2.0]), ..Default::default() });
        assert!(rejection(&model, &spec).contains("spec.input.mean has 2 values"));
        let output = OutputSpec { threshold: Some(1.5), ..Default::default() };
        assert!(rejection(&model, &ModelSpec { output, ..ModelSpec::default() }).contains("spec.output.threshold"));
        assert!(rejection(&model, &of_task(Task::Detect)).contains("spec.output.decoder"));
        let segment = load(&model, &of_task(Task::Segment)).err().unwrap();
        assert_eq!(segment.kind(), ErrorKind::Unsupported);

        let vector = Model::new()
            .input("x", FLOAT, &[Dim::Size(1), Dim::Size(3)])
            .node("Relu", &["x"], &["y"], &[])
            .output("y", FLOAT, &[Dim::Size(1), Dim::Size(3)]);
        assert!(rejection(&vector, &ModelSpec::default()).contains("is no picture"));
        let batch = on_picture(FLOAT, &[Dim::Size(8), Dim::Size(3), Dim::Size(4), Dim::Size(4)], "Relu", &[]);
        assert!(rejection(&batch, &of_task(Task::Tensor)).contains("8 pictures at a time"));
        let untold = on_picture(FLOAT, &[Dim::Size(1), Dim::Size(3), Dim::Size(4), Dim::Size(4)], "Relu", &[]);
        assert!(rejection(&untold, &ModelSpec::default()).contains("set spec.task"));
    }

    #[test]
    fn bytes_in_nhwc_reach_the_model_as_they_are() {
        let shape = [Dim::Size(1), Dim::Size(2), Dim::Size(4), Dim::Size(3)];
        let model = on_picture(UINT8, &shape, "Cast", &[Attribute::Int("to", 1)]);
        let mut pipeline = load(&model, &of_task(Task::Tensor)).unwrap();
        let found = pipeline.run_frame(&flat([7, 8, 9])).unwrap();
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
            let found = pipeline.run_frame(&flat([255, 255, 255])).unwrap();
            let Prediction::Anomaly { score, map } = found.prediction else { panic!("{found:?}") };
            assert_eq!(score, 1.0);
            assert_eq!(map.map(|map| (map.width, map.height)), is_asked.then_some((6, 4)));
        }
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
