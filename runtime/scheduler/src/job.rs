//! Jobs: what a client asks of a deployment, and how each ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lineside_api::message::ModelInfo;
use lineside_api::prediction::Inspection;
use lineside_ipc::frame::Frame;

/// The order in which waiting jobs are dispatched, most urgent first. Lower priorities have a guaranteed share, see
/// [`queue`](crate::queue).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// A request to inspect one part by a deadline.
    Trigger,
    /// A frame of a camera stream.
    Stream,
    /// A request of the serving API.
    Request,
    /// A batch job.
    Batch,
    /// A copy for a shadow version; dropped first.
    Shadow,
}

impl Priority {
    /// All priorities, most urgent first.
    pub const ALL: [Self; 5] = [Self::Trigger, Self::Stream, Self::Request, Self::Batch, Self::Shadow];

    /// Position in [`Priority::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }
}

/// A frame that was inspected.
#[derive(Debug)]
pub struct Answer {
    /// What the model predicted, and how long each stage took.
    pub inspection: Inspection,
    /// The version that answered.
    pub model: Arc<ModelInfo>,
    /// Time from submission to the start of the batch.
    pub queued: Duration,
}

/// How a job ended. Every job ends exactly once.
#[derive(Debug)]
pub enum JobOutcome {
    /// The frame was inspected.
    Answered(Answer),
    /// The frame or the model failed; the version that failed, and why.
    Failed(Arc<ModelInfo>, lineside_worker::WorkError),
    /// The deadline passed before the model ran.
    Expired,
    /// The deployment was stopped first.
    Cancelled,
}

/// Receives the outcome of a job. Called once, on a thread of the scheduler or of a worker; it must not block for long.
pub type JobSink = Box<dyn FnOnce(JobOutcome) + Send>;

/// A frame to inspect.
pub struct Job {
    /// The frame.
    pub frame: Frame,
    /// The priority.
    pub priority: Priority,
    /// The job is dropped when it has not reached the engine by this moment.
    pub deadline: Option<Instant>,
    /// When the job was created, for the queue time.
    pub submitted: Instant,
    /// The verdict rule to evaluate on the prediction.
    pub(crate) rule: Option<Arc<str>>,
    /// Times that the job was executed again because its worker ended.
    pub(crate) retries: u32,
    pub(crate) sink: Sink,
}

impl Job {
    /// A job whose outcome goes to `sink`.
    pub fn new(frame: Frame, priority: Priority, deadline: Option<Instant>, sink: JobSink) -> Self {
        let sink = Sink(Some(sink));
        Self { frame, priority, deadline, submitted: Instant::now(), rule: None, retries: 0, sink }
    }

    /// The same job with a verdict rule, which is evaluated on the prediction.
    #[must_use]
    pub fn with_rule(self, rule: Option<Arc<str>>) -> Self {
        Self { rule, ..self }
    }

    /// Ends the job.
    pub(crate) fn end(self, outcome: JobOutcome) {
        self.sink.call(outcome);
    }

    /// Whether the deadline has passed.
    pub(crate) fn is_expired(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| now > deadline)
    }
}

/// A sink that is called exactly once: one that is dropped uncalled reports [`JobOutcome::Cancelled`].
pub(crate) struct Sink(Option<JobSink>);

impl Sink {
    pub(crate) fn call(mut self, outcome: JobOutcome) {
        if let Some(sink) = self.0.take() {
            sink(outcome);
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if let Some(sink) = self.0.take() {
            sink(JobOutcome::Cancelled);
        }
    }
}
