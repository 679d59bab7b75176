//! Frames as they travel between camera sources, workers and the agent, and where a JPEG in a byte stream ends.

pub mod frame;
pub mod jpeg;
