//! `lineside schema`: prints the JSON Schema of a message type, for the consumers of the messages.

use std::io::Write as _;

use anyhow::Context as _;
use clap::{Args, ValueEnum};

use super::Failure;
use lineside_api::message;

#[derive(Args)]
pub(super) struct Arguments {
    /// Message type whose schema is printed.
    #[arg(value_enum, default_value_t = MessageType::Result)]
    message: MessageType,
}

#[derive(Clone, Copy, ValueEnum)]
enum MessageType {
    /// Result of the inspection of one frame.
    Result,
    /// Event of a model, a stream or the agent.
    Event,
    /// Metrics of the agent, with the changes since the previous message.
    Metrics,
    /// Retained online or offline status of the agent.
    Status,
    /// Retained current state of a stream.
    Health,
    /// Operator command.
    Command,
    /// Outcome of an operator command.
    CommandState,
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    let file = match arguments.message {
        MessageType::Result => "result.schema.json",
        MessageType::Event => "event.schema.json",
        MessageType::Metrics => "metrics.schema.json",
        MessageType::Status => "status.schema.json",
        MessageType::Health => "health.schema.json",
        MessageType::Command => "command.schema.json",
        MessageType::CommandState => "command-state.schema.json",
    };
    for (_, schema) in message::schemas().into_iter().filter(|(name, _)| *name == file) {
        let text = serde_json::to_string_pretty(&schema).context("cannot serialize the schema")?;
        writeln!(std::io::stdout(), "{text}").context("cannot write to stdout")?;
    }
    Ok(())
}
