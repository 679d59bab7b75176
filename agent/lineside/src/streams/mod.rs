//! The streams of this node: from a camera frame to a result in the spool.

mod client;
mod health;
mod inspector;
mod metrics;
pub mod registry;
pub mod report_filter;
mod stream;

pub use metrics::StreamMetrics;
pub use registry::StreamRegistry;
pub use stream::{RunningStreams, StreamContext};
