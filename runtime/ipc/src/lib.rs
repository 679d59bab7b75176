//! Frames as they travel between camera sources, workers and the agent, and what an encoded picture states about itself before
//! it is decoded.

pub mod frame;
pub mod jpeg;
pub mod picture;
pub mod picture_header;
pub mod png;
