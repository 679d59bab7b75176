//! The scheduler: a bounded queue, a batcher and workers for the versions of each model.
//!
//! ```text
//! client ──submit──> queue (bounded, priorities, deadlines) ──> batcher ──> worker of one version ──> outcome to the client
//! ```
//!
//! A [`Deployment`] is one model's place on this node: its live versions with their weights, and the thread that dispatches
//! their jobs. Clients are camera streams today; triggers, serving requests, batch jobs and shadow copies are clients of the
//! same kind. What is particular to a client, such as the order of a stream's results or that only its latest frame counts, is
//! the client's own policy and unknown here.
//!
//! The model is the queue and back-end thread of text-embeddings-inference, and the dynamic batcher of Triton.

mod decode_budget;
mod deployment;
mod dispatcher;
mod fault;
mod job;
mod metrics;
mod queue;

pub use decode_budget::{DecodeBudget, DecodePermit, FrameRefusal, FrameRefusalKind};
pub use deployment::{Deployment, FaultRecorder, QUEUE_MAX, VersionSpec, WorkerFactory};
pub use dispatcher::{BatchPolicy, SubmitErrorKind, VersionId};
pub use job::{Answer, Job, JobOutcome, JobSink, Priority};
pub use metrics::SchedulerMetrics;
