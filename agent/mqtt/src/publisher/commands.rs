//! Commands that come over MQTT: which are allowed, what they mean, and what is answered.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, oneshot};

use crate::command::{Command, CommandRequest};
use crate::connection::Message;
use lineside_api::message::{CommandMessage, CommandOutcome, CommandState, IncomingTopic, Topics};
use lineside_common::clock;
use lineside_common::metrics::Metrics;

/// Bytes of a command at most.
const COMMAND_BYTES_MAX: usize = 64 << 10;
/// A command that has not been carried out within this is answered as failed.
const DEADLINE: Duration = Duration::from_secs(10);
/// Answers that wait to be sent.
const ANSWERS_MAX: usize = 16;

/// Changes what is logged, and says what is logged now.
pub type SetLevel = Arc<dyn Fn(&str) -> Result<String, String> + Send + Sync>;

/// Takes commands in and gives answers out.
pub(super) struct Commands {
    node: String,
    topics: Topics,
    allowed: BTreeSet<String>,
    commands: mpsc::Sender<CommandRequest>,
    set_level: SetLevel,
    metrics: Metrics,
    answer: mpsc::Sender<Message>,
    answers: mpsc::Receiver<Message>,
    has_told_of_triggers: bool,
}

impl Commands {
    pub(super) fn new(
        node: &str,
        topics: Topics,
        allowed: BTreeSet<String>,
        commands: mpsc::Sender<CommandRequest>,
        set_level: SetLevel,
        metrics: Metrics,
    ) -> Self {
        let (answer, answers) = mpsc::channel(ANSWERS_MAX);
        Self {
            node: node.to_owned(),
            topics,
            allowed,
            commands,
            set_level,
            metrics,
            answer,
            answers,
            has_told_of_triggers: false,
        }
    }

    /// The next answer to be sent.
    pub(super) async fn answered(&mut self) -> Message {
        match self.answers.recv().await {
            Some(message) => message,
            // We hold a sender ourselves, so this never ends.
            None => std::future::pending().await,
        }
    }

    /// Takes in what came on a topic. A message that the broker had kept is no command of now.
    pub(super) fn take(&mut self, message: &Message) {
        let received = |kind: &str, outcome: &str| self.metrics.mqtt_received.with_label_values(&[kind, outcome]).inc();
        match self.topics.parse(&message.topic) {
            Some(IncomingTopic::Command(name)) if message.retain => {
                received("command", "stale");
                tracing::warn!(command = name, "a retained command is passed over; publish commands without retain");
            }
            Some(IncomingTopic::Command(name)) => {
                let name = name.to_owned();
                self.carry_out(&name, message);
            }
            Some(IncomingTopic::Trigger(stream)) => {
                received("trigger", "unused");
                if !self.has_told_of_triggers {
                    tracing::warn!(stream, "triggers are not built into this version yet, they are passed over");
                    self.has_told_of_triggers = true;
                }
            }
            None => {}
        }
    }

    fn carry_out(&self, name: &str, message: &Message) {
        let read = match message.payload.len() {
            0 => Ok(CommandMessage::default()),
            bytes if bytes > COMMAND_BYTES_MAX => Err(format!("{bytes} bytes are too many for a command")),
            _ => serde_json::from_slice::<CommandMessage>(&message.payload)
                .map_err(|error| format!("this is no command: {error}; an example is {{\"stream\":\"cam7\"}}")),
        };
        let (id, command) = match read {
            Ok(request) => (request.id.clone(), self.command(name, request)),
            Err(error) => (None, Err(error)),
        };
        let (node, topics, name) = (self.node.clone(), self.topics.clone(), name.to_owned());
        let (answer, metrics) = (self.answer.clone(), self.metrics.clone());
        let (commands, set_level) = (self.commands.clone(), self.set_level.clone());
        tokio::spawn(async move {
            let outcome = match command {
                Err(error) => Err(error),
                Ok(Wanted::Level(level)) => {
                    set_level(&level).map(|level| CommandOutcome { level: Some(level), ..CommandOutcome::default() })
                }
                Ok(Wanted::Command(command)) => ask(&commands, command).await,
            };
            metrics.mqtt_received.with_label_values(&["command", if outcome.is_ok() { "ok" } else { "refused" }]).inc();
            match &outcome {
                Ok(_) => tracing::info!(command = name, id, "command carried out"),
                Err(error) => tracing::warn!(command = name, id, error, "command refused"),
            }
            // A name that is none of ours gets its answer under a fixed one, not in a topic of somebody's choice.
            let is_known = crate::config::COMMANDS.contains(&name.as_str());
            let keeps = outcome.is_ok() && matches!(name.as_str(), "log-level" | "pause" | "resume");
            let topic = topics.command_state(if is_known { &name } else { "unknown" });
            let state = CommandState {
                ts: clock::rfc3339(SystemTime::now()),
                node: &node,
                command: &name,
                id,
                ok: outcome.is_ok(),
                error: outcome.as_ref().err().cloned(),
                outcome: outcome.unwrap_or_default(),
            };
            // A structure of texts and lists always becomes JSON.
            let payload = serde_json::to_vec(&state).unwrap_or_default().into();
            if answer.try_send(Message { topic: topic.into(), payload, retain: keeps }).is_err() {
                tracing::warn!(command = name, "the answer to a command found no room");
            }
        });
    }

    fn command(&self, name: &str, request: CommandMessage) -> Result<Wanted, String> {
        if !crate::config::COMMANDS.contains(&name) {
            return Err(format!("there is no such command; there are {}", crate::config::COMMANDS.join(", ")));
        }
        if !self.allowed.contains(name) {
            return Err(format!("this node does not carry out {name}; --mqtt-commands says what it does"));
        }
        let CommandMessage { stream, level, .. } = request;
        let stream = || stream.ok_or_else(|| "stream is missing".to_owned());
        Ok(match name {
            "pause" => Wanted::Command(Command::Pause(stream()?)),
            "resume" => Wanted::Command(Command::Resume(stream()?)),
            "snapshot" => Wanted::Command(Command::Snapshot(stream()?)),
            "log-level" => Wanted::Level(level.ok_or("level is missing")?),
            _ => Wanted::Command(Command::Reload),
        })
    }
}

/// What a command wants.
enum Wanted {
    Command(Command),
    Level(String),
}

async fn ask(commands: &mpsc::Sender<CommandRequest>, command: Command) -> Result<CommandOutcome, String> {
    let (reply, answer) = oneshot::channel();
    if commands.try_send(CommandRequest { command, reply }).is_err() {
        return Err("too many commands at once; try again".to_owned());
    }
    match tokio::time::timeout(DEADLINE, answer).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) => Err("the command could not be carried out: no frame came, or the agent is ending".to_owned()),
        Err(_) => Err(format!("nothing came of it within {} s", DEADLINE.as_secs())),
    }
}
