//! What an operator may ask of the running agent.

use tokio::sync::oneshot;

use lineside_api::message::CommandOutcome;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Look at the manifests now, and try models that failed once more.
    Reload,
    /// Stop a stream until it is resumed or the agent is started again.
    Pause(String),
    /// Play a paused stream again.
    Resume(String),
    /// Show the next frame of a stream.
    Snapshot(String),
}

/// An order and where its outcome goes.
#[derive(Debug)]
pub struct CommandRequest {
    /// What is asked for.
    pub command: Command,
    /// What came of it, or why nothing did.
    pub reply: oneshot::Sender<Result<CommandOutcome, String>>,
}
