//! Frames as they travel between camera sources, workers and the agent; the messages and the memory that the agent shares with
//! its child processes; and where a JPEG in a byte stream ends.

pub mod channel;
pub mod frame;
pub mod jpeg;
pub mod shared_memory;
