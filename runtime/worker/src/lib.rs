//! The worker that serves one model version.
//!
//! A [`Worker`] takes batches of frames and answers each batch once. Only plain data crosses the trait, so that a worker can
//! be a thread of the agent ([`InProcessWorker`]) or, later, a process of its own.
//!
//! The in-process worker runs two threads for each instance. The first decodes the frames and fills the input tensor, the
//! second runs the engine and decodes its outputs; one batch can be prepared while the previous one is inferred:
//!
//! ```text
//! submit ──> [ prepare: decode, preprocess ] ──> [ infer: engine, postprocess ] ──> reply
//! ```

mod in_process;

use std::time::Instant;

use lineside_api::prediction::Inspection;
use lineside_ipc::frame::Frame;

pub use in_process::InProcessWorker;

/// Identifies a batch among all batches of one worker.
pub type BatchId = u64;

/// One frame of a batch.
#[derive(Debug, Clone)]
pub struct WorkItem {
    /// The frame.
    pub frame: Frame,
    /// The frame is dropped when a stage would begin after this moment.
    pub deadline: Option<Instant>,
}

/// Why a frame was not inspected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkErrorKind {
    /// The frame could not be decoded or exceeds a limit.
    Frame,
    /// The engine failed, or its outputs have no meaning.
    Model,
    /// The deadline had passed before the next stage began.
    Expired,
    /// The worker panicked, exceeded its execution limit, or ended.
    Worker,
}

/// A frame that was not inspected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct WorkError {
    kind: WorkErrorKind,
    message: String,
}

impl WorkError {
    /// An error of this kind; the message is for people.
    pub fn new(kind: WorkErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// What a caller branches on.
    pub fn kind(&self) -> WorkErrorKind {
        self.kind
    }
}

/// The answer to a batch: one result for each item, in the order of the items.
#[derive(Debug)]
pub struct BatchReply {
    /// The batch that this answers.
    pub batch: BatchId,
    /// One result per item.
    pub results: Vec<Result<Inspection, WorkError>>,
}

/// Receives the replies of a worker, on a thread of the worker.
pub type ReplySink = Box<dyn Fn(BatchReply) + Send + Sync>;

/// Serves one model version.
pub trait Worker: Send {
    /// Hands over a batch. The reply comes through the [`ReplySink`] that the worker was started with, exactly once unless
    /// the worker ends first. Must not block while fewer than [`Worker::capacity`] batches are unanswered.
    ///
    /// # Errors
    /// [`WorkErrorKind::Worker`] when the worker has ended.
    fn submit(&self, batch: BatchId, items: Vec<WorkItem>) -> Result<(), WorkError>;

    /// Batches that the worker can hold at once.
    fn capacity(&self) -> usize;
}
