//! The streams of this node: capture, inspection, results.

pub mod capture;
pub mod exception;
pub mod infer;
pub mod roster;
