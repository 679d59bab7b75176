//! Operator commands: how they are parsed, how the publisher hands them to the reconciler, and why a command fails.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use lineside_api::message::{CommandMessage, CommandOutcome};

/// Changes the log filter and returns the filter that is now in force. Takes a level such as `debug`, or a filter expression.
pub type SetLevel = Arc<dyn Fn(&str) -> Result<String, LogLevelError> + Send + Sync>;

/// A command that the reconciler executes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Read the manifests now, and retry models that failed.
    Reload,
    /// Stop the stream of this name until it is resumed or the agent restarts.
    Pause(String),
    /// Start the paused stream of this name.
    Resume(String),
    /// Return the next frame of the stream of this name.
    Snapshot(String),
}

/// Maximum size of a command's payload in bytes.
const COMMAND_BYTES_MAX: usize = 64 << 10;

/// What a valid command does.
#[derive(Debug, PartialEq, Eq)]
pub enum CommandAction {
    /// The reconciler executes the command.
    Execute(Command),
    /// The log filter is changed to this level or filter.
    SetLevel(String),
}

impl CommandAction {
    /// Parses the payload of the command `name`: the id of the request, and what it does if it is valid and in `allowed`.
    pub fn parse(
        name: &str,
        payload: &[u8],
        allowed: &BTreeSet<CommandName>,
    ) -> (Option<String>, Result<Self, CommandError>) {
        let request = if payload.is_empty() {
            Ok(CommandMessage::default())
        } else if payload.len() > COMMAND_BYTES_MAX {
            Err(CommandError::PayloadTooLarge { bytes: payload.len(), max: COMMAND_BYTES_MAX })
        } else {
            serde_json::from_slice(payload).map_err(CommandError::from)
        };
        match request {
            Ok(mut request) => (request.id.take(), Self::of(name, request, allowed)),
            Err(error) => (None, Err(error)),
        }
    }

    fn of(name: &str, request: CommandMessage, allowed: &BTreeSet<CommandName>) -> Result<Self, CommandError> {
        let name: CommandName = name.parse()?;
        if !allowed.contains(&name) {
            return Err(CommandError::NotAllowed(name));
        }
        let CommandMessage { stream, level, .. } = request;
        let stream = || stream.ok_or(CommandError::MissingField("stream"));
        Ok(match name {
            CommandName::LogLevel => Self::SetLevel(level.ok_or(CommandError::MissingField("level"))?),
            CommandName::Pause => Self::Execute(Command::Pause(stream()?)),
            CommandName::Resume => Self::Execute(Command::Resume(stream()?)),
            CommandName::Snapshot => Self::Execute(Command::Snapshot(stream()?)),
            CommandName::Reload => Self::Execute(Command::Reload),
        })
    }
}

/// A command and the channel for its outcome.
#[derive(Debug)]
pub struct CommandRequest {
    /// The command.
    pub command: Command,
    /// Receives the outcome. The receiving side may have been dropped after a timeout.
    pub reply: oneshot::Sender<Result<CommandOutcome, CommandError>>,
}

/// The names of all commands, as they appear in topics and in `--mqtt-commands`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CommandName {
    /// Changes the log filter.
    LogLevel,
    /// [`Command::Pause`].
    Pause,
    /// [`Command::Reload`].
    Reload,
    /// [`Command::Resume`].
    Resume,
    /// [`Command::Snapshot`].
    Snapshot,
}

impl CommandName {
    /// All commands, in alphabetical order of their names.
    pub const ALL: [Self; 5] = [Self::LogLevel, Self::Pause, Self::Reload, Self::Resume, Self::Snapshot];

    /// The name in topics and in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::LogLevel => "log-level",
            Self::Pause => "pause",
            Self::Reload => "reload",
            Self::Resume => "resume",
            Self::Snapshot => "snapshot",
        }
    }

    /// Whether the reply to a successful command is retained, so that later subscribers see the state it left.
    pub fn is_reply_retained(self) -> bool {
        matches!(self, Self::LogLevel | Self::Pause | Self::Resume)
    }
}

impl fmt::Display for CommandName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl FromStr for CommandName {
    type Err = CommandError;

    fn from_str(text: &str) -> Result<Self, CommandError> {
        Self::ALL.into_iter().find(|name| name.as_str() == text).ok_or(CommandError::UnknownCommand)
    }
}

/// The class of a [`CommandError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommandErrorKind {
    /// The request is malformed; it fails again if it is repeated.
    Invalid,
    /// The node's configuration does not allow the command.
    NotAllowed,
    /// The command, or the stream it names, does not exist.
    NotFound,
    /// The command could not be executed now; it may be repeated.
    Unavailable,
}

/// Why a command failed. The text is published as `error` in the reply.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The payload exceeds the limit.
    #[error("the payload has {bytes} bytes; a command has at most {max}")]
    PayloadTooLarge {
        /// Size of the payload.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The payload does not match the schema.
    #[error("the payload is not a valid command, such as {{\"stream\":\"cam7\"}}")]
    InvalidPayload {
        /// The parser's error.
        #[from]
        source: serde_json::Error,
    },
    /// A field that the command needs is absent.
    #[error("the field {0} is missing")]
    MissingField(&'static str),
    /// The log filter was rejected.
    #[error(transparent)]
    LogLevel(#[from] LogLevelError),
    /// There is no command of this name.
    #[error("the command does not exist; available commands: {}", CommandName::ALL.map(CommandName::as_str).join(", "))]
    UnknownCommand,
    /// The command is not in the configuration's list.
    #[error("this node does not allow the command {0}; add it to --mqtt-commands")]
    NotAllowed(CommandName),
    /// There is no stream of this name.
    #[error("the stream {stream} does not exist on this node; existing streams: {}", .existing.join(", "))]
    UnknownStream {
        /// The stream that was named.
        stream: String,
        /// The streams of this node.
        existing: Vec<String>,
    },
    /// The stream delivered no frame in time.
    #[error("the stream {stream} delivered no frame; check that its camera is up")]
    NoFrame {
        /// The stream that was named.
        stream: String,
    },
    /// The frame does not fit into a message.
    #[error("the frame has {bytes} bytes; at most {max} can be sent")]
    FrameTooLarge {
        /// Size of the frame.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The stream delivered bytes that are not a picture.
    #[error("the stream {stream} delivered no picture: {reason}")]
    NotAPicture {
        /// The stream that was named.
        stream: String,
        /// Why the bytes are not a picture, or could not be checked.
        reason: String,
    },
    /// Too many commands wait for their execution.
    #[error("too many commands are pending; try again later")]
    Busy,
    /// The command was dropped before it was executed.
    #[error("the command was cancelled because the agent is stopping or its stream has ended")]
    Cancelled,
    /// The command was not executed in time.
    #[error("the command did not complete within {} s", .0.as_secs())]
    Timeout(Duration),
}

impl CommandError {
    /// The class of the error.
    pub fn kind(&self) -> CommandErrorKind {
        match self {
            Self::PayloadTooLarge { .. } | Self::InvalidPayload { .. } | Self::MissingField(_) => {
                CommandErrorKind::Invalid
            }
            Self::LogLevel(LogLevelError::InvalidFilter { .. }) => CommandErrorKind::Invalid,
            Self::NotAllowed(_) => CommandErrorKind::NotAllowed,
            Self::UnknownCommand | Self::UnknownStream { .. } => CommandErrorKind::NotFound,
            Self::LogLevel(LogLevelError::NotApplied { .. })
            | Self::NoFrame { .. }
            | Self::FrameTooLarge { .. }
            | Self::NotAPicture { .. }
            | Self::Busy
            | Self::Cancelled
            | Self::Timeout(_) => CommandErrorKind::Unavailable,
        }
    }
}

/// Why the log filter was not changed.
#[derive(Debug, thiserror::Error)]
pub enum LogLevelError {
    /// The text is not a filter.
    #[error("`{filter}` is not a log filter; use a level such as info or debug")]
    InvalidFilter {
        /// The text.
        filter: String,
        /// The parser's error.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The logging system does not accept a change.
    #[error("the log filter cannot be changed")]
    NotApplied {
        /// The logging system's error.
        source: Box<dyn Error + Send + Sync>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_names_are_parsed_and_sorted() {
        for name in CommandName::ALL {
            assert_eq!(name.as_str().parse::<CommandName>().unwrap(), name);
        }
        assert!(CommandName::ALL.is_sorted() && CommandName::ALL.map(CommandName::as_str).is_sorted());
        let error = "explode".parse::<CommandName>().unwrap_err();
        assert_eq!(error.kind(), CommandErrorKind::NotFound);
        assert!(error.to_string().ends_with("log-level, pause, reload, resume, snapshot"), "{error}");
    }

    fn parsed(name: &str, payload: &str) -> Result<CommandAction, CommandErrorKind> {
        let allowed = CommandName::ALL.into_iter().filter(|name| *name != CommandName::Snapshot).collect();
        CommandAction::parse(name, payload.as_bytes(), &allowed).1.map_err(|error| error.kind())
    }

    #[test]
    fn valid_commands_are_parsed() {
        let stream = r#"{"id":"1","stream":"cam7"}"#;
        assert_eq!(parsed("pause", stream), Ok(CommandAction::Execute(Command::Pause("cam7".into()))));
        assert_eq!(parsed("resume", stream), Ok(CommandAction::Execute(Command::Resume("cam7".into()))));
        assert_eq!(parsed("reload", ""), Ok(CommandAction::Execute(Command::Reload)));
        assert_eq!(parsed("log-level", r#"{"level":"debug"}"#), Ok(CommandAction::SetLevel("debug".into())));
        let (id, _) = CommandAction::parse("explode", stream.as_bytes(), &BTreeSet::new());
        assert_eq!(id.as_deref(), Some("1"), "a command that is rejected is answered with its id");
    }

    #[test]
    fn invalid_commands_are_rejected() {
        for payload in ["{", "[1]", "{}", r#"{"speed":1}"#, &" ".repeat(COMMAND_BYTES_MAX + 1)] {
            assert_eq!(parsed("pause", payload), Err(CommandErrorKind::Invalid), "{payload:.20}");
        }
        assert_eq!(parsed("log-level", "{}"), Err(CommandErrorKind::Invalid));
        assert_eq!(parsed("explode", "{}"), Err(CommandErrorKind::NotFound));
        assert_eq!(parsed("snapshot", "{}"), Err(CommandErrorKind::NotAllowed));
    }

    #[test]
    fn errors_state_what_to_do() {
        let existing = vec!["line-1".to_owned(), "line-2".to_owned()];
        let error = CommandError::UnknownStream { stream: "cam".to_owned(), existing };
        assert_eq!(error.to_string(), "the stream cam does not exist on this node; existing streams: line-1, line-2");
        assert!(CommandError::NotAllowed(CommandName::Pause).to_string().contains("--mqtt-commands"));
        assert_eq!(CommandError::Timeout(Duration::from_secs(10)).kind(), CommandErrorKind::Unavailable);
    }
}
