//! Frames as they travel between camera sources, workers and the agent; the messages and the memory that the agent shares with
//! its child processes; and what an encoded picture states about itself before it is decoded.

pub mod channel;
pub mod frame;
pub mod jpeg;
pub mod picture;
pub mod picture_header;
pub mod png;
pub mod shared_memory;
