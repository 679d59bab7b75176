//! The fleet controller: aggregates the statuses of all nodes into those of `EdgeModel`s and `CameraStream`s, marks
//! nodes whose agents do not report, and deletes the `EdgeNode`s of nodes that the cluster no longer has.
//!
//! Several controllers run and one leads. The followers watch everything too, so that a new leader knows at once since
//! when each agent has not reported. Only differences are written, so a change of leader by itself writes nothing.

pub mod aggregate;
mod controller;
mod heartbeat;
mod liveness;
mod metrics;

pub use controller::{Controller, LEASE};
pub use heartbeat::Heartbeat;
pub use liveness::Timeouts;
pub use metrics::ControllerMetrics;
