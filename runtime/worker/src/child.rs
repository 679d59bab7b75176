//! The worker process: loads one model version and serves it until the agent closes the socket.

use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lineside_api::spec::ModelSpec;
use lineside_common::sandbox::restrict_myself;
use lineside_common::supervised_child::limit_from_environment;
use lineside_inference::ErrorKind;
use lineside_inference::pipeline::{Pipeline, engine_for};
use lineside_ipc::channel::{ChannelError, receive, receive_descriptor, send};
use lineside_ipc::frame::Frame;
use lineside_ipc::shared_memory::{FrameSlotsReader, SlotLayout};
use parking_lot::Mutex;

use crate::activity::FileBoard;
use crate::in_process::InProcessWorker;
use crate::protocol::{HANDSHAKE, Item, RULES_MAX, Request, Response, Start};
use crate::{BatchReply, EventSink, WorkError, WorkErrorKind, WorkItem, Worker as _, WorkerEvent};

/// Why a worker process ends early.
#[derive(Debug, thiserror::Error)]
pub enum WorkerChildError {
    /// The limits cannot be set, or standard input is not the socket of the agent.
    #[error("the worker process cannot be set up")]
    SetUp(#[from] io::Error),
    /// The agent sent something that is not valid.
    #[error("the worker process cannot communicate with the agent")]
    Channel(#[from] ChannelError),
    /// The first message is missing, or names something that does not exist.
    #[error("the agent sent an invalid request: {reason}")]
    Request {
        /// What is invalid.
        reason: &'static str,
    },
    /// The threads of the worker cannot be started, or have ended.
    #[error("the threads of the worker have ended")]
    Threads(#[from] WorkError),
}

/// Runs a worker process: standard input is the socket of the agent, which is closed to end it.
///
/// # Errors
/// [`WorkerChildError`].
pub fn main() -> Result<(), WorkerChildError> {
    limit_from_environment()?;
    restrict_myself();
    let mut stdout = io::stdout();
    stdout.write_all(format!("{HANDSHAKE}\n").as_bytes())?;
    stdout.flush()?;
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    serve(&socket)
}

/// Serves a version over a socket.
pub(crate) fn serve(socket: &UnixStream) -> Result<(), WorkerChildError> {
    let (frames, model, board) =
        (receive_descriptor(socket)?, receive_descriptor(socket)?, receive_descriptor(socket)?);
    let start: Start = receive(socket)?.ok_or(WorkerChildError::Request { reason: "no first message" })?;
    let slots = FrameSlotsReader::map(frames, SlotLayout { slots: start.slots, slot_bytes: start.slot_bytes })?;
    let model = FrameSlotsReader::map(model, SlotLayout { slots: 1, slot_bytes: start.model_bytes })?;
    let pipelines = match load(&start, &model) {
        Ok(pipelines) => pipelines,
        Err(response) => return Ok(send(socket, &response)?),
    };
    drop(model);
    let replies = Mutex::new(socket.try_clone()?);
    let events: EventSink = Box::new(move |event| {
        if let WorkerEvent::Reply(reply) = event {
            answer(&mut replies.lock(), reply);
        }
    });
    let board = Arc::new(FileBoard::new(board.into()));
    let worker = InProcessWorker::start_with_board(&start.name, pipelines, board, events)?;
    send(socket, &Response::Ready { engine: worker.engine().to_owned() })?;
    let mut rules: Vec<(u32, Arc<str>)> = Vec::new();
    while let Some(request) = receive::<Request>(socket)? {
        match request {
            Request::Rule { id, text } if rules.len() < RULES_MAX => rules.push((id, text.into())),
            Request::Rule { .. } => return Err(WorkerChildError::Request { reason: "too many rules" }),
            Request::ClearRules => rules.clear(),
            Request::Batch { batch, items } => {
                let items = items.into_iter().map(|item| work_item(item, &slots, &rules)).collect::<Result<_, _>>()?;
                worker.submit(batch, items)?;
            }
        }
    }
    Ok(())
}

/// Sends a reply. One that cannot be sent because of its size fails frame by frame.
fn answer(socket: &mut UnixStream, reply: BatchReply) {
    let (batch, count) = (reply.batch, reply.results.len());
    let outcome = match send(&mut *socket, &Response::Reply(reply)) {
        Err(ChannelError::TooLarge { bytes }) => {
            let reason = format!("the prediction has {bytes} bytes, which is too large");
            let results = vec![Err(WorkError::new(WorkErrorKind::Model, reason)); count];
            send(socket, &Response::Reply(BatchReply { batch, results }))
        }
        outcome => outcome,
    };
    if outcome.is_err() {
        // The agent is gone, and nobody is left to serve. The main thread may hang in a driver.
        std::process::exit(0);
    }
}

fn load(start: &Start, model: &FrameSlotsReader) -> Result<Vec<Pipeline>, Response> {
    let manifest = |reason: String| Response::Failed { is_manifest: true, reason };
    let spec: ModelSpec = serde_json::from_str(&start.spec).map_err(|error| manifest(error.to_string()))?;
    let failed = |error: lineside_inference::Error| Response::Failed {
        is_manifest: error.kind() == ErrorKind::BadSpec,
        reason: error.to_string(),
    };
    let bytes = model.frame(0, start.model_bytes).ok_or_else(|| manifest("the model is missing".to_owned()))?;
    let first = Pipeline::load(engine_for(&spec).map_err(failed)?, &bytes, &spec).map_err(failed)?;
    let forks = (1..start.instances.max(1)).map(|_| first.fork().map_err(failed));
    let mut pipelines = forks.collect::<Result<Vec<_>, _>>()?;
    pipelines.push(first);
    Ok(pipelines)
}

fn work_item(item: Item, slots: &FrameSlotsReader, rules: &[(u32, Arc<str>)]) -> Result<WorkItem, WorkerChildError> {
    let data = slots.frame(item.slot, item.length);
    let data = data.ok_or(WorkerChildError::Request { reason: "a frame outside of its slot" })?;
    let rule = |id| rules.iter().find(|(known, _)| *known == id).map(|(_, text)| text.clone());
    let rule = match item.rule {
        Some(id) => Some(rule(id).ok_or(WorkerChildError::Request { reason: "an unknown rule" })?),
        None => None,
    };
    let frame = Frame { format: item.format.into(), ..Frame::encoded(data, item.name, false) };
    let deadline = item.remaining_us.and_then(|us| Instant::now().checked_add(Duration::from_micros(us)));
    Ok(WorkItem { frame, deadline, rule })
}
