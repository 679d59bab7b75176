//! The stream's client of the scheduler: its policies are order, latest frame first, and a bound on the frames in flight.
//!
//! Two frames of a stream may be in flight: while the engine infers one, the next is decoded, so that one stream uses two
//! cores. More would only make frames older. Results are processed in the order of the frames, whatever the order in which
//! instances and versions answer.
//!
//! A frame is decoded only when its header states a picture within the stream's limit, and when the node's budget of memory for
//! decoding has room for it.
//!
//! A frame of a live source that finds no version, or no room, is skipped. A frame that must be kept is submitted again.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use lineside_capture::{MailboxReceiver, TakenFrame};
use lineside_ipc::frame::Frame;
use lineside_scheduler::{DecodeBudget, DecodePermit, Deployment, Job, JobOutcome, Priority, SubmitErrorKind};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::inspector::Inspector;

/// Frames of one stream in flight.
const IN_FLIGHT_MAX: usize = 2;
/// Delay before a frame that must be kept is submitted again to a full queue.
const RETRY_DELAY: Duration = Duration::from_millis(20);
/// Longest time that a stopped client waits for its frames in flight.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// What belongs to a frame in flight. Dropping it makes room for the next one.
struct Pending {
    taken: TakenFrame,
    _permit: OwnedSemaphorePermit,
    /// The frame's share of the memory for decoding; `None` until it has one.
    decoding: Option<DecodePermit>,
}

/// Submits the frames of one stream.
pub(super) struct StreamClient {
    mailbox: MailboxReceiver,
    deployment: Arc<Deployment>,
    shared: Arc<Shared>,
    in_flight: Arc<Semaphore>,
    budget: DecodeBudget,
    /// Largest number of pixels of a frame.
    pixels_max: u64,
    next: u64,
    /// Frames that must be kept and were cancelled, with their sequence number.
    cancelled: mpsc::UnboundedReceiver<(u64, Pending)>,
}

/// What the outcomes need.
struct Shared {
    inspector: Arc<Inspector>,
    order: Mutex<ReorderBuffer<(Pending, JobOutcome)>>,
    /// Bounded by the frames in flight.
    retry: mpsc::UnboundedSender<(u64, Pending)>,
}

impl StreamClient {
    pub(super) fn new(
        mailbox: MailboxReceiver,
        deployment: Arc<Deployment>,
        inspector: Arc<Inspector>,
        budget: DecodeBudget,
        pixels_max: u64,
    ) -> Self {
        let (retry, cancelled) = mpsc::unbounded_channel();
        Self {
            mailbox,
            deployment,
            shared: Arc::new(Shared { inspector, order: Mutex::default(), retry }),
            in_flight: Arc::new(Semaphore::new(IN_FLIGHT_MAX)),
            budget,
            pixels_max,
            next: 0,
            cancelled,
        }
    }

    /// Submits frames until it is stopped, and then waits until those in flight have ended, at most [`DRAIN_TIMEOUT`]. A client
    /// that failed can be run again: frames in flight and their order are kept.
    pub(super) async fn run(&mut self, stop: CancellationToken) {
        tokio::select! {
            () = self.submit_frames(true) => {}
            () = stop.cancelled() => {}
        }
        let in_flight = self.in_flight.clone();
        let idle = in_flight.acquire_many(IN_FLIGHT_MAX as u32);
        tokio::select! {
            _ = tokio::time::timeout(DRAIN_TIMEOUT, idle) => {}
            () = self.submit_frames(false) => {}
        }
    }

    /// Submits frames that were cancelled and, unless the client is stopping, new ones.
    async fn submit_frames(&mut self, takes_new: bool) {
        let mut stable = self.deployment.stable();
        loop {
            // A version first, then a frame: while none serves, newer frames replace the one that waits.
            if stable.wait_for(Option::is_some).await.is_err() {
                return std::future::pending().await;
            }
            let (number, mut pending) = tokio::select! {
                biased;
                Some(again) = self.cancelled.recv() => again,
                pending = take(&self.mailbox, &self.in_flight), if takes_new => {
                    let number = self.next;
                    self.next += 1;
                    (number, pending)
                }
            };
            if pending.decoding.is_none() {
                match self.budget.acquire(&pending.taken.frame, self.pixels_max).await {
                    Ok(permit) => pending.decoding = Some(permit),
                    Err(refusal) => {
                        self.shared.inspector.on_refusal(&pending.taken.frame, &refusal.to_string());
                        self.shared.complete(number, pending, JobOutcome::Cancelled);
                        continue;
                    }
                }
            }
            self.submit(number, pending).await;
        }
    }

    async fn submit(&self, number: u64, pending: Pending) {
        let frame = pending.taken.frame.clone();
        let must_keep = frame.must_keep;
        let deadline = self.shared.inspector.age_max().filter(|_| !must_keep).map(|age_max| frame.arrived + age_max);
        let shared = self.shared.clone();
        // The outcome finds the pending frame here; it is put back where the job is not accepted.
        let slot = Arc::new(Mutex::new(Some(pending)));
        let own = slot.clone();
        let sink = Box::new(move |outcome| {
            if let Some(pending) = own.lock().take() {
                shared.on_outcome(number, pending, outcome);
            }
        });
        let job = Job::new(frame, Priority::Stream, deadline, sink).with_rule(self.shared.inspector.rule());
        match self.deployment.submit(job) {
            Ok(()) => {}
            Err((job, kind)) => {
                let Some(pending) = slot.lock().take() else { return };
                drop(job);
                if must_keep {
                    // The receiver is our own field. The frame is in the channel during the delay, so that a failure of the task
                    // does not lose it.
                    self.shared.retry(number, pending);
                    if kind == SubmitErrorKind::QueueFull {
                        tokio::time::sleep(RETRY_DELAY).await;
                    }
                } else {
                    self.shared.inspector.count_skipped();
                    self.shared.complete(number, pending, JobOutcome::Cancelled);
                }
            }
        }
    }
}

/// Waits for room in flight, then for a frame.
async fn take(mailbox: &MailboxReceiver, in_flight: &Arc<Semaphore>) -> Pending {
    match in_flight.clone().acquire_owned().await {
        Ok(permit) => Pending { taken: mailbox.take().await, _permit: permit, decoding: None },
        // The semaphore is never closed.
        Err(_) => std::future::pending().await,
    }
}

impl Shared {
    /// Puts a frame back. It gives up its share of the memory for decoding: no version may serve for a long time.
    fn retry(&self, number: u64, pending: Pending) {
        // The receiver belongs to the same client.
        self.retry.send((number, Pending { decoding: None, ..pending })).ok();
    }

    fn on_outcome(&self, number: u64, pending: Pending, outcome: JobOutcome) {
        match outcome {
            // A version was stopped under the frame. Where the stream is stopped as well, nobody receives it.
            JobOutcome::Cancelled if pending.taken.frame.must_keep => {
                self.retry(number, pending);
            }
            JobOutcome::Cancelled => {
                self.inspector.count_skipped();
                self.complete(number, pending, JobOutcome::Cancelled);
            }
            outcome => self.complete(number, pending, outcome),
        }
    }

    /// Processes this outcome and those that waited for it. The lock keeps the order.
    fn complete(&self, number: u64, pending: Pending, outcome: JobOutcome) {
        let mut order = self.order.lock();
        for (pending, outcome) in order.complete(number, (pending, outcome)) {
            let frame = &pending.taken.frame;
            // A panic, for example in a rule, costs this result and not those that are processed after it.
            if catch_unwind(AssertUnwindSafe(|| self.process(frame, outcome))).is_err() {
                self.inspector.count_failed();
                tracing::error!(event = "result_panicked", "Processing a result panicked");
            }
            drop(pending);
        }
    }

    fn process(&self, frame: &Frame, outcome: JobOutcome) {
        match outcome {
            JobOutcome::Answered(answer) => self.inspector.on_answer(frame, answer),
            JobOutcome::Failed(model, error) => self.inspector.on_failure(frame, &model, &error),
            JobOutcome::Expired => self.inspector.count_expired(),
            JobOutcome::Cancelled => {}
        }
    }
}

/// Puts values that are completed in any order back into the order of their numbers.
struct ReorderBuffer<T> {
    next: u64,
    waiting: BTreeMap<u64, T>,
}

impl<T> Default for ReorderBuffer<T> {
    fn default() -> Self {
        Self { next: 0, waiting: BTreeMap::new() }
    }
}

impl<T> ReorderBuffer<T> {
    /// Adds a value. Returns the values whose turn it is, in order.
    fn complete(&mut self, number: u64, value: T) -> Vec<T> {
        self.waiting.insert(number, value);
        let mut ready = Vec::new();
        while let Some(value) = self.waiting.remove(&self.next) {
            self.next += 1;
            ready.push(value);
        }
        ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_leave_in_the_order_of_their_numbers() {
        let mut buffer = ReorderBuffer::default();
        assert_eq!(buffer.complete(1, 'b'), Vec::<char>::new());
        assert_eq!(buffer.complete(0, 'a'), ['a', 'b']);
        assert_eq!(buffer.complete(3, 'd'), Vec::<char>::new());
        assert_eq!(buffer.complete(2, 'c'), ['c', 'd']);
    }
}
