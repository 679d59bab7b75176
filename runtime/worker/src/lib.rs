//! The worker that serves one model version.
//!
//! A [`Worker`] takes batches of frames and answers each batch once. Only plain data crosses the trait. There are two kinds:
//!
//! - [`ProcessWorker`]: a child process for each version, the default. A model that crashes, hangs or allocates without bound
//!   ends its own process and nothing else. The child runs [`child_main`].
//! - [`InProcessWorker`]: threads of the calling process. The child uses it, and the agent for `isolation: inProcess`.
//!
//! ```text
//! agent                                          child
//! submit ──> frame slots (shared memory) ──────> [ prepare: decode, preprocess ] ──> [ infer: engine, postprocess, rule ]
//!        ──> batch message (socket) ───────────>                                                        │
//! EventSink <── reply message (socket) <────────────────────────────────────────────────────────────────┘
//! activity() <── the stage of each thread (file in memory, written by the child)
//! ```
//!
//! When a worker ends or is given up, [`Worker::activity`] states which batch was in which stage, so that the fault is
//! attributed to the frame, the rule or the model.

mod activity;
mod child;
mod in_process;
mod process;
mod protocol;
mod rule_cache;

use std::sync::Arc;
use std::time::{Duration, Instant};

use lineside_api::prediction::Inspection;
use lineside_ipc::frame::Frame;

pub use activity::{Activity, ActivityBoard, MemoryBoard, Stage};
pub use child::{WorkerChildError, main as child_main};
pub use in_process::InProcessWorker;
pub use process::{ProcessHandle, ProcessOptions, ProcessWorker, StartError, StartErrorKind};

/// The hidden subcommand that runs [`child_main`].
pub const SUBCOMMAND: &str = "worker-child";

/// Identifies a batch among all batches of one worker.
pub type BatchId = u64;

/// One frame of a batch.
#[derive(Debug, Clone)]
pub struct WorkItem {
    /// The frame.
    pub frame: Frame,
    /// The frame is dropped when a stage would begin after this moment.
    pub deadline: Option<Instant>,
    /// The verdict rule to evaluate on the prediction.
    pub rule: Option<Arc<str>>,
}

/// Why a frame was not inspected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
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
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub struct BatchReply {
    /// The batch that this answers.
    pub batch: BatchId,
    /// One result per item.
    pub results: Vec<Result<Inspection, WorkError>>,
}

/// What a worker reports.
#[derive(Debug)]
pub enum WorkerEvent {
    /// A batch was answered.
    Reply(BatchReply),
    /// The worker has ended. Batches without a reply get none.
    Ended {
        /// The reason, in one line.
        reason: String,
        /// Whether something outside of the worker killed it, such as the system because the node is out of memory.
        is_external: bool,
    },
}

/// Receives the events of a worker, on a thread of the worker.
pub type EventSink = Box<dyn Fn(WorkerEvent) + Send + Sync>;

/// Serves one model version.
pub trait Worker: Send + Sync {
    /// Hands over a batch. The reply comes through the [`EventSink`] that the worker was started with, exactly once unless
    /// the worker ends first. Must not block while fewer than [`Worker::capacity`] batches are unanswered.
    ///
    /// # Errors
    /// [`WorkErrorKind::Worker`] when the worker has ended and will not report it; [`WorkErrorKind::Frame`] for a frame that it cannot take, which
    /// fails this batch only.
    fn submit(&self, batch: BatchId, items: Vec<WorkItem>) -> Result<(), WorkError>;

    /// Batches that the worker can hold at once.
    fn capacity(&self) -> usize;

    /// Batches that the worker executes at once, at most [`Worker::capacity`].
    fn instances(&self) -> usize;

    /// Name of the engine that runs the model.
    fn engine(&self) -> &str;

    /// What each busy thread does now, or did when the worker ended.
    fn activity(&self) -> Vec<Activity>;

    /// Processor time that the worker has used. `None` for a worker without a process of its own.
    fn cpu_time(&self) -> Option<Duration>;
}
