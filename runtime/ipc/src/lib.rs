//! Frames as they travel between cameras, workers and the agent.

pub mod frame;
