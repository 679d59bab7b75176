//! A kit of peers and parts for tests. It uses nothing of the product's, so that nothing is checked against itself.

pub mod onnx;
