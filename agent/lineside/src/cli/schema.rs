//! `lineside schema`: the JSON Schemas of the messages, for those who consume them.

use std::io::Write as _;

use anyhow::Context as _;
use clap::{Args, ValueEnum};

use super::Failure;
use lineside_api::message;

#[derive(Args)]
pub(super) struct Arguments {
    /// The message.
    #[arg(value_enum, default_value_t = Name::Result)]
    message: Name,
}

#[derive(Clone, Copy, ValueEnum)]
enum Name {
    /// One inspection's result.
    Result,
    /// Something that happened.
    Event,
    /// How things stood.
    Metrics,
    /// The agent's presence.
    Status,
    /// What an operator asks for.
    Command,
    /// What came of it.
    CommandState,
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    let file = match arguments.message {
        Name::Result => "result.schema.json",
        Name::Event => "event.schema.json",
        Name::Metrics => "metrics.schema.json",
        Name::Status => "status.schema.json",
        Name::Command => "command.schema.json",
        Name::CommandState => "command-state.schema.json",
    };
    for (_, schema) in message::schemas().into_iter().filter(|(name, _)| *name == file) {
        let text = serde_json::to_string_pretty(&schema).context("the schema cannot be written")?;
        writeln!(std::io::stdout(), "{text}").context("stdout")?;
    }
    Ok(())
}
