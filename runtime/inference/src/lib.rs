//! Lineside's data plane: the bytes of one camera frame in, a typed prediction out.
//!
//! ```text
//! encoded frame -> decode -> Frame -> preprocess -> Tensor -> engine -> Tensors -> postprocess -> Prediction
//! ```
//!
//! The crate promises to stay small and predictable: it is synchronous, it knows no network, and it opens no file (a
//! model reaches it as bytes). Every size that an outsider can choose is bounded before memory is taken for it, and what
//! goes wrong comes back as an [`Error`] that says what to do; nothing in here panics on input.
//!
//! [`pipeline::Pipeline`] is the door most callers want.

mod batch;
pub mod decode;
pub mod engine;
mod error;
pub mod graph;
pub mod picture;
pub mod pipeline;
pub mod postprocess;
pub mod preprocess;
pub mod settings;
pub mod synthetic;

pub use error::{Error, ErrorKind, Result};
