//! What an operator asks of the loop.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::Reconciler;
use lineside_api::message::CommandOutcome;
use lineside_common::clock;
use lineside_mqtt::command::{Command, CommandError, CommandRequest};

/// Bytes of a frame that is shown at most; base64 makes four of three, and a message has to stay below 4 MiB.
const SNAPSHOT_BYTES_MAX: usize = 3 << 20;
/// How long to wait for a frame to be shown.
const SNAPSHOT_WAIT: Duration = Duration::from_secs(8);

impl Reconciler {
    /// Carries out an command. Whoever gave it may have gone.
    pub(super) fn on_command(&mut self, task: CommandRequest) {
        let CommandRequest { command, reply } = task;
        let outcome = match command {
            Command::Reload => {
                self.reload();
                Ok(CommandOutcome::default())
            }
            Command::Pause(stream) => self.pause(stream),
            Command::Resume(stream) => self.resume(&stream),
            Command::Snapshot(stream) => match self.captures.get(&stream) {
                None => Err(self.no_such_stream(&stream)),
                Some(capture) => {
                    let frame = capture.next_frame();
                    tokio::spawn(async move {
                        let frame = match tokio::time::timeout(SNAPSHOT_WAIT, frame).await {
                            Ok(Ok(frame)) if frame.encoded.len() <= SNAPSHOT_BYTES_MAX => Ok(CommandOutcome {
                                stream: Some(stream),
                                captured_at: Some(clock::rfc3339(frame.captured_at)),
                                image: Some(BASE64.encode(&frame.encoded)),
                                ..CommandOutcome::default()
                            }),
                            Ok(Ok(frame)) => {
                                Err(CommandError::FrameTooLarge { bytes: frame.encoded.len(), max: SNAPSHOT_BYTES_MAX })
                            }
                            _ => Err(CommandError::NoFrame { stream }),
                        };
                        drop(reply.send(frame));
                    });
                    return;
                }
            },
        };
        drop(reply.send(outcome));
    }

    /// Everything is looked at again at once: what is asked for, and models that failed.
    fn reload(&mut self) {
        self.again.notify_one();
        let now = Instant::now();
        for model in self.observed.models.values_mut() {
            if let Some((_, Some(retry_at))) = &mut model.failed {
                *retry_at = now;
            }
        }
    }

    fn pause(&mut self, stream: String) -> Result<CommandOutcome, CommandError> {
        if !self.paused.contains(&stream) {
            if self.desired.streams.remove(&stream).is_none() {
                return Err(self.no_such_stream(&stream));
            }
            self.paused.insert(stream);
        }
        Ok(self.paused())
    }

    fn resume(&mut self, stream: &str) -> Result<CommandOutcome, CommandError> {
        if self.paused.remove(stream) {
            if let Some(desired_state) = self.asked.clone() {
                self.gather(desired_state);
            }
        } else if !self.desired.streams.contains_key(stream) {
            return Err(self.no_such_stream(stream));
        }
        Ok(self.paused())
    }

    fn paused(&self) -> CommandOutcome {
        CommandOutcome { paused: Some(self.paused.iter().cloned().collect()), ..CommandOutcome::default() }
    }

    fn no_such_stream(&self, stream: &str) -> CommandError {
        let existing = self.desired.streams.keys().cloned().collect();
        CommandError::UnknownStream { stream: stream.to_owned(), existing }
    }
}
