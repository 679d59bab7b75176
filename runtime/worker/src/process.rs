//! The agent's side of a worker process.
//!
//! Starting it blocks until the child has loaded and warmed its model. A thread receives the replies; it reports the end of the
//! child once, with the exit status and the last output. Dropping the worker kills the child, so a version is drained before it
//! is dropped.

use std::collections::{BTreeSet, HashMap};
use std::io::{self, Read, Write};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use lineside_api::spec::ModelSpec;
use lineside_common::child_process::{ChildExit, ProcessLimits, own_command};
use lineside_common::supervised_child::{ChildError, ChildOptions, SupervisedChild};
use lineside_ipc::channel::{ChannelError, receive, receive_at_most, send, send_descriptor};
use lineside_ipc::shared_memory::{self, FrameSlots, SlotLayout};
use parking_lot::Mutex;

use crate::activity::{Activity, FileBoard};
use crate::in_process::{BATCHES_PER_INSTANCE, THREADS_PER_INSTANCE};
use crate::protocol::{HANDSHAKE, Item, RULES_MAX, Request, Response, Start};
use crate::{BatchId, EventSink, SUBCOMMAND, WorkError, WorkErrorKind, WorkItem, Worker, WorkerEvent};

/// Bytes of a frame slot: the largest encoded frame of a source, and an uncompressed picture of 32 megapixels.
const SLOT_BYTES: usize = 96 << 20;
/// Time from the start of the process to its handshake, before it loads the model.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// SIGKILL. The limits of the process end it by other signals.
const KILL: i32 = 9;
/// Time from the closing of its socket to the end of the process.
const END_GRACE: Duration = Duration::from_secs(1);
/// Longest time that a message waits for a child that does not read. Messages are small, so a child that works never fills the
/// socket; the scheduler must not wait for one that does not.
const WRITE_TIMEOUT: Duration = Duration::from_secs(1);

/// Largest message of a child that loads its model, in bytes.
const LOADED_BYTES_MAX: usize = 1 << 20;

/// How a worker process is started.
#[derive(Debug, Clone)]
pub struct ProcessOptions {
    /// Name of the model, for logs and threads.
    pub model: String,
    /// The manifest's settings.
    pub spec: ModelSpec,
    /// Limits of the process.
    pub limits: ProcessLimits,
    /// Time to load and warm the model.
    pub load_deadline: Duration,
}

/// Why a worker process could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The process cannot be started or does not speak the protocol.
    #[error(transparent)]
    Child(#[from] ChildError),
    /// Shared memory or the socket cannot be set up.
    #[error("the worker process cannot be set up")]
    SetUp(#[from] io::Error),
    /// The process ended or broke the protocol while it loaded the model.
    #[error("the worker process ended while it loaded the model: {reason}")]
    Ended {
        /// How it ended.
        reason: String,
        /// Whether something outside of the process killed it, such as the system because the node is out of memory.
        is_external: bool,
    },
    /// The model was not loaded within the deadline.
    #[error("the worker process did not load the model within {0:?}")]
    Deadline(Duration),
    /// The manifest does not fit the model.
    #[error("{0}")]
    Manifest(String),
    /// The model cannot be loaded.
    #[error("{0}")]
    Model(String),
}

/// The kind of a [`StartError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartErrorKind {
    /// The node is the reason: no process, no memory, no socket.
    Node,
    /// The manifest is the reason.
    Manifest,
    /// The model is the reason: it cannot be loaded, or ends or delays its process.
    Model,
}

impl StartError {
    /// The kind, to branch on.
    pub fn kind(&self) -> StartErrorKind {
        match self {
            Self::Child(_) | Self::SetUp(_) | Self::Ended { is_external: true, .. } => StartErrorKind::Node,
            Self::Manifest(_) => StartErrorKind::Manifest,
            Self::Ended { .. } | Self::Deadline(_) | Self::Model(_) => StartErrorKind::Model,
        }
    }
}

/// A version that is served by a process of its own.
pub struct ProcessWorker {
    shared: Arc<Shared>,
    board: FileBoard,
    engine: String,
    instances: usize,
}

struct Shared {
    socket: UnixStream,
    sending: Mutex<Sending>,
    child: Mutex<SupervisedChild>,
    pid: i32,
    /// Why the agent killed the child, where it did.
    killed: Mutex<Option<String>>,
}

/// A worker process, for what watches over processes. It does not keep the worker.
#[derive(Clone)]
pub struct ProcessHandle(Weak<Shared>);

impl ProcessHandle {
    /// Memory of the process in bytes; `None` when the worker is gone.
    pub fn memory_bytes(&self) -> Option<u64> {
        lineside_common::process_stats::private_bytes(self.0.upgrade()?.pid)
    }

    /// Kills the process. Its worker ends with this reason, as if the process had failed by itself.
    pub fn kill(&self, reason: String) {
        let Some(shared) = self.0.upgrade() else { return };
        *shared.killed.lock() = Some(reason);
        if let Err(error) = shared.child.lock().finish(Duration::ZERO) {
            tracing::error!(event = "worker_not_killed", pid = shared.pid, %error, "A worker process cannot be killed");
        }
    }
}

/// What belongs to the frames that the child holds.
struct Sending {
    slots: FrameSlots,
    free: Vec<usize>,
    /// Slot and length of each frame, by batch.
    batches: HashMap<BatchId, Vec<(usize, usize)>>,
    rules: SentRules,
}

/// The rules that the child knows.
#[derive(Default)]
struct SentRules {
    ids: HashMap<Arc<str>, u32>,
}

impl ProcessWorker {
    /// Starts a process and waits until it has loaded the model.
    ///
    /// # Errors
    /// [`StartErrorKind`]; the process has ended then.
    pub fn start(options: &ProcessOptions, model: &[u8], events: EventSink) -> Result<Self, StartError> {
        let mut command = own_command(SUBCOMMAND);
        command.env_clear().env("RUST_BACKTRACE", "1");
        let child = ChildOptions {
            name: format!("worker {}", options.model),
            limits: options.limits,
            handshake: HANDSHAKE,
            handshake_deadline: HANDSHAKE_DEADLINE,
            stop_grace: END_GRACE,
        };
        let (child, socket) = SupervisedChild::start_with_socket(command, &child)?;
        Self::connect(options, model, child, socket, events)
    }

    fn connect(
        options: &ProcessOptions,
        model: &[u8],
        child: SupervisedChild,
        socket: UnixStream,
        events: EventSink,
    ) -> Result<Self, StartError> {
        let runtime = &options.spec.runtime;
        let instances = runtime.instances.unwrap_or(1).max(1) as usize;
        let frames = instances * BATCHES_PER_INSTANCE * runtime.max_batch_size.unwrap_or(1).max(1) as usize;
        let layout = SlotLayout { slots: frames, slot_bytes: SLOT_BYTES };
        let slots = FrameSlots::new("lineside-frames", layout)?;
        let board = FileBoard::new(shared_memory::anonymous_file("lineside-activity")?);
        let start = Start {
            name: options.model.clone(),
            spec: serde_json::to_string(&options.spec).map_err(io::Error::from)?,
            model_bytes: model.len(),
            instances,
            slots: layout.slots,
            slot_bytes: layout.slot_bytes,
        };
        let pid = child.pid();
        socket.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let shared = Arc::new(Shared {
            socket,
            sending: Mutex::new(Sending {
                slots,
                free: (0..layout.slots).rev().collect(),
                batches: HashMap::new(),
                rules: SentRules::default(),
            }),
            child: Mutex::new(child),
            pid,
            killed: Mutex::new(None),
        });
        let engine = shared.load(&start, model, &board, options.load_deadline)?;
        let receiving = shared.clone();
        std::thread::Builder::new().name(format!("w-{}", options.model)).spawn(move || {
            let (reason, is_external) = receiving.receive_replies(&events);
            events(WorkerEvent::Ended { reason, is_external });
        })?;
        Ok(Self { shared, board, engine, instances })
    }
}

impl ProcessWorker {
    /// Its process.
    pub fn handle(&self) -> ProcessHandle {
        ProcessHandle(Arc::downgrade(&self.shared))
    }
}

impl Worker for ProcessWorker {
    fn submit(&self, batch: BatchId, items: Vec<WorkItem>) -> Result<(), WorkError> {
        if let Some(bytes) = items.iter().map(|item| item.frame.data.len()).find(|bytes| *bytes > SLOT_BYTES) {
            return Err(WorkError::new(
                WorkErrorKind::Frame,
                format!("the frame has {bytes} bytes; at most {SLOT_BYTES} fit"),
            ));
        }
        if let Err(error) = self.shared.submit(batch, &items) {
            // The thread that receives replies sees the end of the connection, ends the child, and reports how it ended and what
            // ended it. Both are not known here.
            let error = lineside_common::error_chain(&error);
            tracing::debug!(
                event = "batch_not_sent",
                pid = self.shared.pid,
                error,
                "A batch cannot be sent to a worker"
            );
            self.shared.socket.shutdown(std::net::Shutdown::Both).ok();
        }
        Ok(())
    }

    fn capacity(&self) -> usize {
        self.instances * BATCHES_PER_INSTANCE
    }

    fn instances(&self) -> usize {
        self.instances
    }

    fn engine(&self) -> &str {
        &self.engine
    }

    fn activity(&self) -> Vec<Activity> {
        self.board.read(self.instances * THREADS_PER_INSTANCE)
    }

    fn cpu_time(&self) -> Option<Duration> {
        lineside_common::process_stats::cpu_time(self.shared.pid)
    }
}

impl Drop for ProcessWorker {
    fn drop(&mut self) {
        // The thread that receives replies sees the end of the child and ends.
        self.shared.end(Duration::ZERO);
    }
}

impl Shared {
    /// Hands the descriptors and the model to the child and waits until it is ready. Returns the name of the engine.
    fn load(&self, start: &Start, model: &[u8], board: &FileBoard, deadline: Duration) -> Result<String, StartError> {
        let ended = |_| self.ended_while_loading();
        let mut file = FrameSlots::new("lineside-model", SlotLayout { slots: 1, slot_bytes: model.len() })?;
        file.write(0, model)?;
        let frames = self.sending.lock().slots.read_only_descriptor()?;
        send_descriptor(&self.socket, frames.as_fd()).map_err(ChannelError::Io).map_err(ended)?;
        send_descriptor(&self.socket, file.read_only_descriptor()?.as_fd()).map_err(ChannelError::Io).map_err(ended)?;
        send_descriptor(&self.socket, board.file().as_fd()).map_err(ChannelError::Io).map_err(ended)?;
        send(&self.socket, start).map_err(ended)?;
        let until = Instant::now() + deadline;
        let response = match receive_at_most(UntilDeadline { socket: &self.socket, until }, LOADED_BYTES_MAX) {
            Err(_) if Instant::now() >= until => {
                self.end(Duration::ZERO);
                return Err(StartError::Deadline(deadline));
            }
            response => response.map_err(ended)?,
        };
        self.socket.set_read_timeout(None)?;
        match response {
            Some(Response::Ready { engine }) => Ok(engine),
            Some(Response::Failed { is_manifest: true, reason }) => Err(StartError::Manifest(reason)),
            Some(Response::Failed { is_manifest: false, reason }) => Err(StartError::Model(reason)),
            Some(Response::Reply(_)) | None => Err(self.ended_while_loading()),
        }
    }

    fn ended_while_loading(&self) -> StartError {
        let (reason, is_external) = self.end(END_GRACE);
        StartError::Ended { reason, is_external }
    }

    fn submit(&self, batch: BatchId, items: &[WorkItem]) -> Result<(), ChannelError> {
        let mut sending = self.sending.lock();
        let mut used: Vec<(usize, usize)> = Vec::with_capacity(items.len());
        let mut wire = Vec::with_capacity(items.len());
        let now = Instant::now();
        sending.rules.define(items.iter().filter_map(|item| item.rule.as_ref()), &self.socket)?;
        for item in items {
            let rule = item.rule.as_ref().and_then(|rule| sending.rules.ids.get(rule)).copied();
            let bytes = &item.frame.data;
            let slot = sending.free.pop().ok_or_else(|| io::Error::other("the worker holds too many frames"))?;
            used.push((slot, bytes.len()));
            sending.slots.write(slot, bytes)?;
            wire.push(Item {
                slot,
                length: bytes.len(),
                format: item.frame.format.into(),
                name: item.frame.name.clone(),
                remaining_us: item.deadline.map(|at| at.saturating_duration_since(now).as_micros() as u64),
                rule,
            });
        }
        sending.batches.insert(batch, used);
        send(&self.socket, &Request::Batch { batch, items: wire })
    }

    /// Receives replies until the child has ended. Returns why, and whether it was killed from outside.
    fn receive_replies(&self, events: &EventSink) -> (String, bool) {
        loop {
            match receive::<Response>(&self.socket) {
                Ok(Some(Response::Reply(reply))) => {
                    self.sending.lock().release(reply.batch);
                    events(WorkerEvent::Reply(reply));
                }
                Ok(Some(_)) => {
                    self.end(Duration::ZERO);
                    return ("the worker process sent an unexpected message".to_owned(), false);
                }
                Ok(None) | Err(_) => return self.end(END_GRACE),
            }
        }
    }

    /// Waits for the end of the child, and kills it after the grace period. Returns how it ended, and whether something else
    /// had killed it.
    fn end(&self, grace: Duration) -> (String, bool) {
        // The child may be writing a large reply; from here on both sides see the end of the connection.
        self.socket.shutdown(std::net::Shutdown::Both).ok();
        let mut child = self.child.lock();
        let own_end = child.wait(grace);
        let killed = self.killed.lock().clone();
        let is_external = killed.is_none() && matches!(own_end, Ok(Some(ChildExit::Signal(signal))) if signal == KILL);
        match child.finish(Duration::ZERO) {
            Ok(_) if killed.is_some() => (killed.unwrap_or_default(), false),
            Ok(exit) => {
                let output = child.stderr();
                let separator = if output.is_empty() { "" } else { ": " };
                (format!("the worker process ended with {exit}{separator}{output}"), is_external)
            }
            Err(error) => (format!("the worker process cannot be ended: {error}"), false),
        }
    }
}

/// Reads from a socket until a moment, however the bytes are spread.
struct UntilDeadline<'a> {
    socket: &'a UnixStream,
    until: Instant,
}

impl Read for UntilDeadline<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.set_read_timeout(Some(left))?;
        self.socket.read(buffer)
    }
}

impl SentRules {
    /// Sends the rules of a batch that the child does not know. Where they do not fit beside the known ones, all of those are
    /// forgotten first, so that an id never changes its meaning within a batch; batches that the child received before have
    /// their rules already.
    fn define<'a>(
        &mut self,
        batch: impl Iterator<Item = &'a Arc<str>> + Clone,
        mut socket: impl Write,
    ) -> Result<(), ChannelError> {
        let unknown: BTreeSet<&Arc<str>> = batch.clone().filter(|rule| !self.ids.contains_key(*rule)).collect();
        if self.ids.len() + unknown.len() > RULES_MAX {
            send(&mut socket, &Request::ClearRules)?;
            self.ids.clear();
        }
        for rule in batch {
            if !self.ids.contains_key(rule) {
                let id = self.ids.len() as u32;
                send(&mut socket, &Request::Rule { id, text: rule.to_string() })?;
                self.ids.insert(rule.clone(), id);
            }
        }
        Ok(())
    }
}

impl Sending {
    fn release(&mut self, batch: BatchId) {
        for (slot, length) in self.batches.remove(&batch).unwrap_or_default() {
            self.slots.release(slot, length);
            self.free.push(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a child knows after it has received messages.
    fn known(messages: &[u8]) -> HashMap<u32, String> {
        let mut rules = HashMap::new();
        let mut messages = messages;
        while let Some(message) = receive::<Request>(&mut messages).unwrap() {
            match message {
                Request::Rule { id, text } => assert_eq!(rules.insert(id, text), None, "an id is defined twice"),
                Request::ClearRules => rules.clear(),
                Request::Batch { .. } => panic!("no batch was sent"),
            }
        }
        rules
    }

    #[test]
    fn every_rule_of_a_batch_keeps_its_id_when_earlier_rules_are_forgotten() {
        let (mut rules, mut sent) = (SentRules::default(), Vec::new());
        for index in 0..RULES_MAX {
            rules.define([&Arc::from(format!("rule {index}"))].into_iter(), &mut sent).unwrap();
        }
        assert_eq!(known(&sent).len(), RULES_MAX);
        let batch: Vec<Arc<str>> = ["rule 0", "new", "rule 1", "new", "newer"].map(Arc::from).into();
        rules.define(batch.iter(), &mut sent).unwrap();
        let known = known(&sent);
        assert_eq!(known.len(), 4, "{known:?}");
        for rule in &batch {
            assert_eq!(known[&rules.ids[rule]], **rule);
        }
    }

    #[test]
    fn a_kill_from_outside_is_not_a_fault_of_the_model() {
        let ended = |is_external| StartError::Ended { reason: String::new(), is_external }.kind();
        assert_eq!((ended(true), ended(false)), (StartErrorKind::Node, StartErrorKind::Model));
    }
}
