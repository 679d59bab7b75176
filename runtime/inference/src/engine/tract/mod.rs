//! tract, and the only door to `tract_onnx`.
//!
//! tract is pure Rust and needs nothing on the node. Two habits keep it honest here. Declared output shapes and
//! intermediate shapes are ignored: exporters leave symbolic names in them that contradict the input shape we fix, and
//! tract works all of them out by itself. And every call into it is fenced, because a malformed model can make it panic:
//! the panic becomes an error and the session is created again.

mod proto;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tract_onnx::prelude::{
    DatumType, Framework as _, InferenceFact, InferenceModelExt as _, IntoRunnable as _, TValue, TVec, TractResult,
    TypedModel, TypedRunnableModel, TypedSimpleState,
};
use tract_onnx::tract_core::floats::FloatPrecisionTranslator;
use tract_onnx::tract_core::optim::Optimizer;
use tract_onnx::tract_core::prelude::Tensor as TractTensor;
use tract_onnx::tract_core::transform::ModelTransform as _;

use super::{Engine, Session, fits};
use crate::graph::{Dimension, GraphInfo, TensorMetadata};
use crate::{Error, ErrorKind, Result};
use lineside_api::tensor::{Data, DataType, Tensor};

/// The pure Rust engine.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tract;

impl Engine for Tract {
    fn name(&self) -> &'static str {
        "tract"
    }

    fn load(&self, model: &[u8], input_shapes: &[Vec<usize>]) -> Result<Box<dyn Session>> {
        let mut proto = proto::parse(model)?;
        if let Some(graph) = &mut proto.graph {
            proto::give_limits_one_dimension(graph);
            proto::end_slices_with_their_tensor(graph);
        }
        let graph = proto.graph.as_ref().ok_or_else(|| Error::new(ErrorKind::BadModel, "the model holds no graph"))?;
        let unknown = proto::unknown_operators(graph);
        if !unknown.is_empty() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "tract does not know the operator{} {}; export the model without, or use another engine",
                    if unknown.len() == 1 { "" } else { "s" },
                    unknown.join(", ")
                ),
            ));
        }
        let declared = proto::info(&proto, graph).inputs;
        if declared.len() != input_shapes.len() {
            return Err(Error::new(
                ErrorKind::BadSpec,
                format!("the model has {} inputs and {} shapes were given", declared.len(), input_shapes.len()),
            ));
        }
        let mut inputs = Vec::with_capacity(declared.len());
        let mut facts = Vec::with_capacity(declared.len());
        for (input, shape) in declared.iter().zip(input_shapes) {
            let data_type = input.data_type.ok_or_else(|| {
                Error::new(ErrorKind::Unsupported, format!("input `{}` is of a type tract does not take", input.name))
            })?;
            facts.push(InferenceFact::dt_shape(datum_type(data_type), shape));
            inputs.push(TensorMetadata {
                shape: Some(shape.iter().copied().map(Dimension::Fixed).collect()),
                ..input.clone()
            });
        }
        let outputs = proto::info(&proto, graph).outputs.into_iter().map(|output| output.data_type).collect();
        let (plan, notes) = fenced("loading the model", || optimised(&proto, facts))
            .map_err(|error| Error::new(ErrorKind::Unsupported, format!("tract cannot run this model: {error}")))?;
        drop(proto);
        Ok(Box::new(TractSession { plan, state: None, inputs: inputs.into(), outputs, notes }))
    }
}

/// Parses, fixes the inputs, lets tract work out every shape, and optimises. Returns notes for people as well.
fn optimised(
    proto: &tract_onnx::pb::ModelProto,
    facts: Vec<InferenceFact>,
) -> TractResult<(Arc<TypedRunnableModel>, Vec<String>)> {
    let parser = tract_onnx::onnx().with_ignore_output_shapes(true).with_ignore_value_info(true);
    let mut model = parser.model_for_proto_model(proto)?;
    for (index, fact) in facts.into_iter().enumerate() {
        model.set_input_fact(index, fact)?;
    }
    let mut model = model.into_typed()?;
    let mut notes = Vec::new();
    if has_half_floats(&model) {
        // Processors compute with half floats in software, about a hundred times slower.
        model = FloatPrecisionTranslator::new(DatumType::F16, DatumType::F32).transform_into(model)?;
        notes.push(
            "the weights are half floats; they are computed with in single precision and take twice their size"
                .to_owned(),
        );
    }
    match fenced("optimising the model", || model.clone().into_optimized()?.into_runnable()) {
        Ok(plan) => Ok((plan, notes)),
        Err(error) => {
            let plan = partly_optimised(model, &error)?;
            notes.push(format!("tract cannot optimise this model in full, so it is slower than it could be: {error}"));
            Ok((plan, notes))
        }
    }
}

/// The passes of the optimiser fail on some valid graphs. The model is tried without the one that moves axes, and then without those that
/// rewrite operators.
fn partly_optimised(model: TypedModel, first_error: &str) -> TractResult<Arc<TypedRunnableModel>> {
    let without_axes = || -> TractResult<Arc<TypedRunnableModel>> {
        let mut model = model.clone();
        let mut passes = Optimizer::declutter();
        passes.passes.retain(|pass| format!("{pass:?}") != "ChangeAxes");
        passes.optimize(&mut model)?;
        model.optimize()?;
        model.into_runnable()
    };
    let constants_only = || -> TractResult<Arc<TypedRunnableModel>> {
        let mut model = model.clone();
        model.prop_consts()?;
        model.into_runnable()
    };
    let plain = || model.clone().into_runnable();
    let tries: [&dyn Fn() -> TractResult<Arc<TypedRunnableModel>>; 3] = [&without_axes, &constants_only, &plain];
    let plan = tries.into_iter().find_map(|attempt| fenced("optimising the model in part", attempt).ok());
    plan.ok_or_else(|| tract_onnx::prelude::TractError::msg(first_error.to_owned()))
}

fn has_half_floats(model: &TypedModel) -> bool {
    let outlets = model.nodes().iter().flat_map(|node| &node.outputs);
    outlets.into_iter().any(|outlet| outlet.fact.datum_type == DatumType::F16)
}

/// See [`super::inspect`].
pub(super) fn inspect(model: &[u8]) -> Result<GraphInfo> {
    let proto = proto::parse(model)?;
    let graph = proto.graph.as_ref().ok_or_else(|| Error::new(ErrorKind::BadModel, "the model holds no graph"))?;
    Ok(proto::info(&proto, graph))
}

struct TractSession {
    plan: Arc<TypedRunnableModel>,
    /// Working memory, kept between runs. `None` after a failure, when it may be half written, and for a graph with operators that
    /// keep a state (LSTM, GRU, RNN, Scan, Loop): each run begins with the initial state of the model.
    state: Option<TypedSimpleState>,
    inputs: Arc<[TensorMetadata]>,
    /// The declared element types; `None` for those that are not declared.
    outputs: Arc<[Option<DataType>]>,
    notes: Vec<String>,
}

impl Session for TractSession {
    fn run(&mut self, inputs: Vec<Tensor>) -> Result<Vec<Tensor>> {
        if inputs.len() != self.inputs.len() {
            return Err(inference(format!("the model takes {} inputs, not {}", self.inputs.len(), inputs.len())));
        }
        for (declared, tensor) in self.inputs.iter().zip(&inputs) {
            if !fits(declared, tensor) {
                return Err(inference(format!(
                    "input `{}` is {:?} {:?}, not {:?} {:?}",
                    declared.name,
                    declared.data_type,
                    declared.protocol_shape(),
                    tensor.data().data_type(),
                    tensor.shape()
                )));
            }
        }
        let mut state = self.state.take();
        let outputs = fenced("running the model", || {
            let state = match &mut state {
                Some(state) => state,
                None => state.insert(self.plan.spawn()?),
            };
            let inputs = inputs.into_iter().enumerate().map(|(index, tensor)| {
                // Half floats are computed in single precision.
                let data_type = self.plan.model().input_fact(index)?.datum_type;
                let value = into_tract(tensor)?;
                if value.datum_type() == data_type {
                    Ok(value)
                } else {
                    Ok(value.cast_to_dt(data_type)?.into_owned().into())
                }
            });
            let inputs = inputs.collect::<TractResult<TVec<TValue>>>()?;
            let outputs = state.run(inputs)?.into_iter().zip(self.outputs.iter()).map(|(value, declared)| {
                let is_half = *declared == Some(DataType::F16) && value.datum_type() == DatumType::F32;
                let value = if is_half { value.cast_to::<half::f16>()?.into_owned().into() } else { value };
                from_tract(value)
            });
            outputs.collect::<TractResult<Vec<Tensor>>>()
        })
        .map_err(|error| inference(format!("tract failed on this input: {error}")))?;
        self.state = state.filter(|state| state.op_states.iter().all(Option::is_none));
        debug_assert_eq!(outputs.len(), self.outputs.len());
        Ok(outputs)
    }

    fn fork(&self) -> Result<Box<dyn Session>> {
        let (plan, inputs, notes) = (self.plan.clone(), self.inputs.clone(), self.notes.clone());
        Ok(Box::new(Self { plan, state: None, inputs, outputs: self.outputs.clone(), notes }))
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }
}

fn inference(message: String) -> Error {
    Error::new(ErrorKind::Inference, message)
}

/// Runs tract and turns a panic of its into an error. The panic's own message goes to the hook of the process.
fn fenced<T>(doing: &str, work: impl FnOnce() -> TractResult<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(innermost(&error)),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            Err(format!("the engine panicked while {doing}: {text}"))
        }
    }
}

/// tract's errors are chains that repeat whole operators; the ends say where and why.
fn innermost(error: &tract_onnx::prelude::TractError) -> String {
    const CHARACTERS_MAX: usize = 400;
    let outermost = error.to_string();
    let root = error.root_cause().to_string();
    let mut text = if outermost == root { root } else { format!("{outermost}: {root}") };
    text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if text.chars().count() > CHARACTERS_MAX {
        text = text.chars().take(CHARACTERS_MAX).chain("...".chars()).collect();
    }
    text
}

macro_rules! element_types {
    ($($variant:ident, $datum:ident;)*) => {
        fn datum_type(data_type: DataType) -> DatumType {
            match data_type { $(DataType::$variant => DatumType::$datum,)* }
        }

        fn into_tract(tensor: Tensor) -> TractResult<TValue> {
            let (shape, data) = tensor.into_parts();
            let tensor = match data { $(Data::$variant(values) => TractTensor::from_shape(&shape, &values)?,)* };
            Ok(tensor.into())
        }

        fn from_tract(value: TValue) -> TractResult<Tensor> {
            let plain = value.try_as_plain_ram()?;
            let data = match value.datum_type() {
                $(DatumType::$datum => Data::$variant(plain.as_slice()?.to_vec()),)*
                // Symbolic sizes that tract computes with come out as plain integers.
                DatumType::TDim => {
                    let integers = value.cast_to::<i64>()?;
                    Data::I64(integers.try_as_plain_ram()?.as_slice::<i64>()?.to_vec())
                }
                other => return Err(tract_onnx::prelude::TractError::msg(format!("an output is of type {other:?}"))),
            };
            Tensor::new(value.shape().to_vec(), data).map_err(tract_onnx::prelude::TractError::msg)
        }
    };
}

element_types! {
    Bool, Bool;
    U8, U8;
    U16, U16;
    U32, U32;
    U64, U64;
    I8, I8;
    I16, I16;
    I32, I32;
    I64, I64;
    F16, F16;
    F32, F32;
    F64, F64;
}
