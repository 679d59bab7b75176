//! Executes operator commands: reload, pause, resume, snapshot.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use lineside_api::message::CommandOutcome;
use lineside_common::{clock, error_chain};
use lineside_ipc::frame::Frame;
use lineside_mqtt::command::{Command, CommandError, CommandRequest};
use lineside_scheduler::DecodeBudget;
use tokio::sync::oneshot;

use super::Reconciler;
use crate::picture_check;
use crate::stream_runner::StreamRunner;

/// Largest frame of a snapshot, in bytes. Base64 makes four bytes of three, and a message has at most 4 MiB.
const SNAPSHOT_BYTES_MAX: usize = 3 << 20;
/// Longest wait for the frame of a snapshot.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(8);

impl<S: StreamRunner> Reconciler<S> {
    /// Executes a command and replies. The requester may have given up.
    pub(super) fn on_command(&mut self, request: CommandRequest) {
        let CommandRequest { command, reply } = request;
        let outcome = match command {
            Command::Reload => {
                self.relist.notify_one();
                self.core.retry_now(Instant::now());
                Ok(CommandOutcome::default())
            }
            Command::Pause(stream) => self.core.pause(&stream).then(|| self.paused()).ok_or(stream),
            Command::Resume(stream) => self.core.resume(&stream).then(|| self.paused()).ok_or(stream),
            Command::Snapshot(stream) => match self.streams.next_frame(&stream) {
                Some(frame) => {
                    tokio::spawn(snapshot(stream, frame, self.decode_budget.clone(), reply));
                    return;
                }
                None => Err(stream),
            },
        };
        let existing = || self.core.stream_names();
        drop(reply.send(outcome.map_err(|stream| CommandError::UnknownStream { stream, existing: existing() })));
    }

    fn paused(&self) -> CommandOutcome {
        CommandOutcome { paused: Some(self.core.paused()), ..CommandOutcome::default() }
    }
}

/// Replies with the next frame of a stream, if it is a picture.
async fn snapshot(
    stream: String,
    frame: oneshot::Receiver<Frame>,
    budget: DecodeBudget,
    reply: oneshot::Sender<Result<CommandOutcome, CommandError>>,
) {
    let outcome = match tokio::time::timeout(SNAPSHOT_TIMEOUT, frame).await {
        Ok(Ok(frame)) => picture(stream, frame, &budget).await,
        _ => Err(CommandError::NoFrame { stream }),
    };
    drop(reply.send(outcome));
}

/// The frame as the outcome of a snapshot. The camera source may be anything that a manifest names; only what a child process
/// decoded as a picture leaves the node.
async fn picture(stream: String, frame: Frame, budget: &DecodeBudget) -> Result<CommandOutcome, CommandError> {
    if frame.data.len() > SNAPSHOT_BYTES_MAX {
        return Err(CommandError::FrameTooLarge { bytes: frame.data.len(), max: SNAPSHOT_BYTES_MAX });
    }
    let refused = |reason: String| CommandError::NotAPicture { stream: stream.clone(), reason };
    let permit = budget.acquire(&frame, u64::MAX).await.map_err(|refusal| refused(refusal.to_string()))?;
    let data = frame.data.clone();
    let checked = tokio::task::spawn_blocking(move || {
        let checked = picture_check::check(&data);
        drop(permit);
        checked
    });
    let picture = match checked.await {
        Ok(checked) => checked.map_err(|error| refused(error_chain(&error)))?,
        Err(error) => return Err(refused(error.to_string())),
    };
    Ok(CommandOutcome {
        stream: Some(stream),
        captured_at: Some(clock::rfc3339(frame.captured_at)),
        image: Some(BASE64.encode(&picture)),
        ..CommandOutcome::default()
    })
}
