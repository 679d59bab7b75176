//! The engines behind one trait, so that nothing above knows which of them runs.
//!
//! A model goes through three steps: [`inspect`] reads what the file says of itself, [`Engine::load`] makes a
//! [`Session`] of it for given input shapes, and the session runs. Any engine has to pass the contract suite in
//! `contract.rs`.

#[cfg(test)]
mod contract;
mod tract;

use crate::Result;
use crate::graph::{GraphInfo, TensorMetadata};
use lineside_api::tensor::Tensor;

pub use tract::Tract;

/// Executes ONNX graphs.
pub trait Engine: Send + Sync {
    /// The engine's name in manifests, results and metrics.
    fn name(&self) -> &'static str;

    /// Prepares a model for inputs of exactly these shapes, one per input in the graph's order.
    ///
    /// # Errors
    /// [`crate::ErrorKind::BadModel`] for bytes that are no model, [`crate::ErrorKind::Unsupported`] for a model this
    /// engine cannot run; the message names the operator or the reason.
    fn load(&self, model: &[u8], input_shapes: &[Vec<usize>]) -> Result<Box<dyn Session>>;
}

/// A model ready to run, with working memory of its own. One thread uses it at a time.
pub trait Session: Send {
    /// Runs the model. Inputs in the graph's order, of the shapes and element types it was loaded with.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Inference`] when an input does not fit or the engine fails. The session stays usable.
    fn run(&mut self, inputs: Vec<Tensor>) -> Result<Vec<Tensor>>;

    /// Another session of the same model, sharing its weights.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Inference`] when the engine refuses.
    fn fork(&self) -> Result<Box<dyn Session>>;

    /// What people should know of how the model runs, such as a slower way than usual.
    fn notes(&self) -> &[String];
}

/// Reads what a model file says of itself. No weights are touched and nothing is executed.
///
/// # Errors
/// [`crate::ErrorKind::BadModel`] for bytes that are no ONNX model or keep their weights in other files.
pub fn inspect(model: &[u8]) -> Result<GraphInfo> {
    tract::inspect(model)
}

/// Whether a tensor fits a declared input: same type, same number of dimensions, same fixed sizes.
pub(crate) fn fits(declared: &TensorMetadata, tensor: &Tensor) -> bool {
    let same_type = declared.data_type == Some(tensor.data().data_type());
    let same_shape = declared.shape.as_ref().is_none_or(|shape| {
        shape.len() == tensor.shape().len()
            && shape.iter().zip(tensor.shape()).all(|(side, actual)| side.fixed().is_none_or(|size| size == *actual))
    });
    same_type && same_shape
}
