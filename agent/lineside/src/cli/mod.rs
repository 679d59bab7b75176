//! The command line: one file per command.

mod check;
mod controller;
mod crd;
mod demo;
mod progress;
mod run;
mod schema;
mod sign;
mod spool;
mod store;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::telemetry::SetLevel;
use crate::{app, telemetry};
use lineside_models::admission;
use lineside_models::store::probe;

/// Exit status for a command line or a configuration that is wrong (`EX_USAGE` of sysexits.h).
const USAGE: u8 = 64;

/// Runs ONNX models on factory-line cameras and reports over MQTT.
#[derive(Parser)]
#[command(
    name = "lineside",
    version,
    about,
    after_help = "Try `lineside demo` first: it shows the whole thing on this machine alone."
)]
struct Cli {
    /// What is logged on stderr: a level (error, warn, info, debug) or a filter such as lineside=debug.
    #[arg(long, global = true, env = "LINESIDE_LOG", hide_env = true, value_name = "FILTER")]
    log: Option<String>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent.
    Run(Box<run::Arguments>),
    /// Show the whole main job on this machine alone: broker, model and frames included.
    Demo(demo::Arguments),
    /// Add up how all nodes stand, for the whole cluster.
    Controller(controller::Arguments),
    /// Print the definitions of our kinds for a cluster.
    Crd(crd::Arguments),
    /// Say whether a model can run here, how fast, and what it takes and gives.
    Check(check::Arguments),
    /// Look at the models this node keeps, and put them in order.
    Store(store::Arguments),
    /// Look at the results that wait for the broker, save them, or throw them away.
    Spool(spool::Arguments),
    /// Vouch for a model version with a signature.
    Sign(sign::SignArguments),
    /// Make a key to sign with.
    Keygen(sign::KeygenArguments),
    /// Print the JSON Schema of a message.
    Schema(schema::Arguments),
    /// The agent's own child that tries a model.
    #[command(name = admission::SUBCOMMAND, hide = true)]
    AdmissionChild,
    /// The agent's own child that tries the store's index.
    #[command(name = app::INDEX_SUBCOMMAND, hide = true)]
    IndexChild {
        /// The index.
        folder: PathBuf,
    },
}

/// What went wrong with a command, by exit status.
enum Failure {
    /// 64: the command line or the configuration is wrong. Every error, a line each.
    Usage(Vec<String>),
    /// 1: it could not be done.
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors and go to stdout. When that is gone there is nobody to tell.
            drop(error.print());
            return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    let ended = logging(&cli).and_then(|set_level| match cli.command {
        Command::Run(arguments) => run::run(*arguments, set_level),
        Command::Demo(arguments) => demo::run(arguments, set_level),
        Command::Controller(arguments) => controller::run(arguments),
        Command::Crd(arguments) => crd::run(&arguments),
        Command::Check(arguments) => check::run(arguments),
        Command::Spool(arguments) => spool::run(arguments),
        Command::Store(arguments) => store::run(arguments),
        Command::Sign(arguments) => sign::sign(&arguments),
        Command::Keygen(arguments) => sign::keygen(&arguments),
        Command::Schema(arguments) => schema::run(arguments),
        Command::AdmissionChild => admission::child_main().map_err(|error| Failure::Failed(error.into())),
        Command::IndexChild { folder } => probe(&folder).map_err(|error| Failure::Failed(error.into())),
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(errors)) => {
            errors.iter().for_each(|error| eprintln!("lineside: {error}"));
            eprintln!("lineside: see `lineside help`");
            ExitCode::from(USAGE)
        }
        Err(Failure::Failed(error)) => {
            eprintln!("lineside: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints a line on stdout. Whoever reads our output may leave at any time, as `head` does.
fn write_out(text: &str) {
    use std::io::Write as _;
    drop(writeln!(std::io::stdout(), "{text}"));
}

fn logging(cli: &Cli) -> Result<SetLevel, Failure> {
    // The tools talk to people on stdout; their logs only matter when something is wrong.
    let otherwise = if matches!(cli.command, Command::Run(_) | Command::Controller(_)) { "info" } else { "warn" };
    telemetry::start(cli.log.as_deref().unwrap_or(otherwise))
        .map_err(|error| Failure::Usage(vec![format!("--log: {}", lineside_common::error_chain(&error))]))
}

/// The async runtime. Inference has threads of its own, so two are plenty for cameras, broker and probes.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}
