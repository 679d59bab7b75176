//! The command line. Each command has one file; `main` parses the arguments, starts the logs, runs the command and maps its
//! failure to the exit status: 0 for success, 1 for a failure, 64 for a wrong command line or configuration.

mod check;
mod controller;
mod crd;
#[cfg(feature = "demo")]
mod demo;
mod prepare_folder;
mod progress;
mod run;
mod schema;
mod sign;
mod spec_arguments;
mod spool;
mod store;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};

use crate::telemetry::Telemetry;
use crate::{app, picture_check, rules_child, telemetry};
use lineside_models::admission;
use lineside_models::store::probe;

#[cfg(feature = "demo")]
const AFTER_HELP: &str = "Run `lineside demo` to see the agent work on this machine, with no setup.";
#[cfg(not(feature = "demo"))]
const AFTER_HELP: &str = "Run `lineside run --help` for the settings of the agent.";

/// Exit status for a command line or a configuration that is wrong (`EX_USAGE` of sysexits.h).
const USAGE: u8 = 64;

/// Runs ONNX models on factory-line cameras and reports over MQTT.
#[derive(Parser)]
#[command(
    name = "lineside",
    version,
    about,
    after_help = AFTER_HELP
)]
struct Cli {
    /// Log filter for stderr: a level (error, warn, info, debug, trace) or directives such as lineside=debug
    /// [default: info for run and controller, otherwise warn].
    #[arg(long, global = true, env = "LINESIDE_LOG", hide_env = true, value_name = "FILTER")]
    log: Option<String>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent.
    Run(Box<run::Arguments>),
    /// Run the agent with a bundled broker, model and frames, and print the results.
    #[cfg(feature = "demo")]
    Demo(demo::Arguments),
    /// Run the cluster controller, which aggregates the status of all nodes.
    Controller(controller::Arguments),
    /// Print the CustomResourceDefinitions for a cluster.
    Crd(crd::Arguments),
    /// Check whether a model can run on this machine, and measure its latency and memory.
    Check(Box<check::Arguments>),
    /// List, verify, evict, pin, export and import the models in the store of this node.
    Store(store::Arguments),
    /// List, export and delete the messages that wait for the broker.
    Spool(spool::Arguments),
    /// Give the data folder of this node to the user of the agent.
    PrepareFolder(prepare_folder::Arguments),
    /// Sign a model version.
    Sign(sign::SignArguments),
    /// Generate a key pair for signing.
    Keygen(sign::KeygenArguments),
    /// Print the JSON Schema of a message type.
    Schema(schema::Arguments),
    /// Admit a model version. The agent starts this command as its child process.
    #[command(name = admission::SUBCOMMAND, hide = true)]
    AdmissionChild,
    /// Serve a model version. The agent starts this command as its child process.
    #[command(name = lineside_worker::SUBCOMMAND, hide = true)]
    WorkerChild,
    /// Check verdict rules. The agent starts this command as its child process.
    #[command(name = rules_child::SUBCOMMAND, hide = true)]
    RulesChild,
    /// Decode a picture. The agent starts this command as its child process.
    #[command(name = picture_check::SUBCOMMAND, hide = true)]
    PictureChild,
    /// Open the index of the store. The agent starts this command as its child process.
    #[command(name = app::INDEX_SUBCOMMAND, hide = true)]
    IndexChild {
        /// Folder of the index.
        folder: PathBuf,
    },
}

/// The option of the commands that read the data folder.
#[derive(Args)]
struct DataDir {
    /// Data folder of the agent.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/lineside", env = "LINESIDE_DATA_DIR", global = true)]
    data_dir: PathBuf,
}

/// The failure of a command, by exit status.
enum Failure {
    /// Exit status 64: the command line or the configuration is wrong. One line per error.
    Usage(Vec<String>),
    /// Exit status 1: the command failed.
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
            // clap reports --help and --version as errors that go to stdout. A failed write cannot be reported anywhere.
            drop(error.print());
            return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    let outcome = start_logs(&cli).and_then(|telemetry| match cli.command {
        Command::Run(arguments) => run::run(*arguments, telemetry.set_level.clone()),
        #[cfg(feature = "demo")]
        Command::Demo(arguments) => demo::run(arguments, telemetry.set_level.clone()),
        Command::Controller(arguments) => controller::run(arguments),
        Command::Crd(arguments) => crd::run(&arguments),
        Command::Check(arguments) => check::run(*arguments),
        Command::Spool(arguments) => spool::run(arguments),
        Command::Store(arguments) => store::run(arguments),
        Command::PrepareFolder(arguments) => prepare_folder::run(&arguments),
        Command::Sign(arguments) => sign::sign(&arguments),
        Command::Keygen(arguments) => sign::keygen(&arguments),
        Command::Schema(arguments) => schema::run(arguments),
        Command::AdmissionChild => admission::child_main().map_err(|error| Failure::Failed(error.into())),
        Command::WorkerChild => lineside_worker::child_main().map_err(|error| Failure::Failed(error.into())),
        Command::RulesChild => rules_child::child_main().map_err(|error| Failure::Failed(error.into())),
        Command::PictureChild => picture_check::child_main().map_err(|error| Failure::Failed(error.into())),
        Command::IndexChild { folder } => probe(&folder).map_err(|error| Failure::Failed(error.into())),
    });
    match outcome {
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

/// Prints a line on stdout. Ignores errors: the reader may close the pipe at any time, as `head` does.
fn write_out(text: &str) {
    use std::io::Write as _;
    drop(writeln!(std::io::stdout(), "{text}"));
}

/// Starts the logs with the filter of `--log`, or with the default of the command.
fn start_logs(cli: &Cli) -> Result<Telemetry, Failure> {
    let is_service = matches!(cli.command, Command::Run(_) | Command::Controller(_));
    // The other commands print to stdout; their logs are only useful when something fails.
    let default_filter = if is_service { "info" } else { "warn" };
    let telemetry = telemetry::start(cli.log.as_deref().unwrap_or(default_filter))
        .map_err(|error| Failure::Usage(vec![format!("--log: {}", lineside_common::error_chain(&error))]))?;
    if is_service {
        telemetry.report_suppressed_periodically().context("cannot start the thread that reports suppressed logs")?;
    }
    Ok(telemetry)
}

/// The async runtime. Inference has its own threads, so two threads are enough for the cameras, the broker and HTTP.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}
