//! Receives operator commands over MQTT, checks whether they are allowed, has them executed, and publishes the replies.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, oneshot};

use super::context::PublisherContext;
use crate::command::{CommandAction, CommandError, CommandName, CommandRequest, SetLevel};
use crate::connection::MqttMessage;
use crate::metrics::MqttMetrics;
use lineside_api::message::{CommandOutcome, CommandState, IncomingTopic, Topics};
use lineside_common::{LogOnChange, clock, error_chain};

/// A command that has not completed within this time is answered with an error.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of replies that wait to be published. Further replies are dropped and logged.
const REPLIES_MAX: usize = 16;
/// The name under which commands that do not exist are answered, so that a sender cannot choose the topic.
const UNKNOWN_COMMAND_TOPIC: &str = "unknown";

/// Dispatches commands and collects their replies.
pub(super) struct Commands {
    allowed: BTreeSet<CommandName>,
    executor: CommandExecutor,
    responder: CommandResponder,
    replies: mpsc::Receiver<MqttMessage>,
    triggers_ignored: LogOnChange<()>,
}

impl Commands {
    pub(super) fn new(context: &PublisherContext) -> Self {
        let (sender, replies) = mpsc::channel(REPLIES_MAX);
        Self {
            allowed: context.mqtt.commands.clone(),
            executor: CommandExecutor { requests: context.commands.clone(), set_level: context.set_level.clone() },
            responder: CommandResponder {
                node: context.node.clone(),
                topics: context.topics.clone(),
                metrics: context.metrics.clone(),
                replies: sender,
            },
            replies,
            triggers_ignored: LogOnChange::default(),
        }
    }

    /// Waits for the next reply to publish.
    pub(super) async fn next_reply(&mut self) -> MqttMessage {
        match self.replies.recv().await {
            Some(message) => message,
            // `responder` holds a sender, so the channel is never closed.
            None => std::future::pending().await,
        }
    }

    /// Handles a message on one of the agent's topics. A message that the broker had retained is outdated and ignored.
    pub(super) fn handle(&mut self, message: &MqttMessage) {
        let received = &self.responder.metrics.received;
        match self.responder.topics.parse(&message.topic) {
            Some(IncomingTopic::Command(name)) if message.retain => {
                received.command_stale.inc();
                tracing::warn!(
                    event = "command_stale",
                    command = name,
                    "Retained command is ignored; publish commands without the retain flag"
                );
            }
            Some(IncomingTopic::Command(name)) => self.dispatch(name, &message.payload),
            Some(IncomingTopic::Trigger(stream)) => {
                received.trigger_unused.inc();
                if self.triggers_ignored.set(()) {
                    tracing::warn!(
                        event = "trigger_ignored",
                        stream,
                        "Triggers are not implemented in this version and are ignored"
                    );
                }
            }
            Some(IncomingTopic::Presence) | None => {}
        }
    }

    /// Starts a command. Its reply is published when it completes.
    fn dispatch(&self, name: &str, payload: &[u8]) {
        let (id, action) = CommandAction::parse(name, payload, &self.allowed);
        let (name, executor, responder) = (name.to_owned(), self.executor.clone(), self.responder.clone());
        tokio::spawn(async move {
            let result = match action {
                Ok(action) => executor.execute(action).await,
                Err(error) => Err(error),
            };
            responder.respond(&name, id, result);
        });
    }
}

/// Executes commands: the log filter directly, all others through the reconciler.
#[derive(Clone)]
struct CommandExecutor {
    requests: mpsc::Sender<CommandRequest>,
    set_level: SetLevel,
}

impl CommandExecutor {
    async fn execute(&self, action: CommandAction) -> Result<CommandOutcome, CommandError> {
        let command = match action {
            CommandAction::Execute(command) => command,
            CommandAction::SetLevel(level) => {
                let level = (self.set_level)(&level)?;
                return Ok(CommandOutcome { level: Some(level), ..CommandOutcome::default() });
            }
        };
        let (reply, outcome) = oneshot::channel();
        if self.requests.try_send(CommandRequest { command, reply }).is_err() {
            return Err(CommandError::Busy);
        }
        match tokio::time::timeout(COMMAND_TIMEOUT, outcome).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(CommandError::Cancelled),
            Err(_) => Err(CommandError::Timeout(COMMAND_TIMEOUT)),
        }
    }
}

/// Logs, counts and publishes the results of commands.
#[derive(Clone)]
struct CommandResponder {
    node: String,
    topics: Topics,
    metrics: MqttMetrics,
    replies: mpsc::Sender<MqttMessage>,
}

impl CommandResponder {
    fn respond(&self, name: &str, id: Option<String>, result: Result<CommandOutcome, CommandError>) {
        let error = result.as_ref().err().map(|error| error_chain(error));
        if let Some(error) = &error {
            self.metrics.received.command_refused.inc();
            tracing::warn!(event = "command_failed", command = name, id, error, "Command failed");
        } else {
            self.metrics.received.command_ok.inc();
            tracing::info!(event = "command_completed", command = name, id, "Command completed");
        }
        let known: Option<CommandName> = name.parse().ok();
        let topic = self.topics.command_state(known.map_or(UNKNOWN_COMMAND_TOPIC, CommandName::as_str));
        let retain = error.is_none() && known.is_some_and(CommandName::is_reply_retained);
        let state = CommandState {
            ts: clock::rfc3339(SystemTime::now()),
            node: &self.node,
            command: name,
            id,
            ok: error.is_none(),
            error,
            outcome: result.unwrap_or_default(),
        };
        // The serialization of a struct of strings and lists cannot fail.
        let payload = serde_json::to_vec(&state).unwrap_or_default().into();
        if self.replies.try_send(MqttMessage { topic: topic.into(), payload, retain }).is_err() {
            tracing::warn!(
                event = "command_reply_dropped",
                command = name,
                "Command reply is dropped because too many replies wait to be published"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Command;

    fn executor(capacity: usize) -> (CommandExecutor, mpsc::Receiver<CommandRequest>) {
        let (requests, receiver) = mpsc::channel(capacity);
        (CommandExecutor { requests, set_level: std::sync::Arc::new(|level: &str| Ok(level.to_owned())) }, receiver)
    }

    #[tokio::test(start_paused = true)]
    async fn commands_that_are_not_executed_end_with_an_error() {
        let (executor, mut requests) = executor(1);
        let execute = || executor.execute(CommandAction::Execute(Command::Reload));
        let (dropped, ()) = tokio::join!(execute(), async { drop(requests.recv().await) });
        assert!(matches!(dropped, Err(CommandError::Cancelled)), "{dropped:?}");
        let not_received = execute().await;
        assert!(matches!(not_received, Err(CommandError::Timeout(_))), "{not_received:?}");
        let queue_full = execute().await;
        assert!(matches!(queue_full, Err(CommandError::Busy)), "{queue_full:?}");
    }

    #[tokio::test]
    async fn the_log_filter_is_set_without_the_reconciler() {
        let (executor, _requests) = executor(1);
        let outcome = executor.execute(CommandAction::SetLevel("debug".to_owned())).await.unwrap();
        assert_eq!(outcome.level.as_deref(), Some("debug"));
    }
}
