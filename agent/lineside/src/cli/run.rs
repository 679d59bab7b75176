//! `lineside run`: resolves the configuration and runs the agent until a signal arrives or a task fails.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::Failure;
use crate::app::App;
use crate::config::flags::Flags;
use crate::config::settings::ConfigLayers;
use crate::telemetry::SetLevel;
use lineside_api::names::ConfigErrors;
use lineside_common::files::read_bounded;
use lineside_common::{files, shutdown};

/// Maximum size of the configuration file, in bytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

#[derive(Args)]
#[command(after_help = "\
Every setting can also be set by an environment variable (--data-dir as LINESIDE_DATA_DIR) or in the file of
--config (dataDir: ...). Flags override variables, which override the file.

Example:
  lineside run --manifests ./manifests --mqtt mqtt://broker:1883 --data-dir ./data --http 127.0.0.1:0")]
pub(super) struct Arguments {
    /// YAML file of settings.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
}

pub(super) fn run(arguments: Arguments, set_level: SetLevel) -> Result<(), Failure> {
    files::private_by_default();
    let mut layers = ConfigLayers::new(arguments.flags);
    let mut errors = ConfigErrors::default();
    if let Some(path) = &arguments.config {
        let text = read_bounded(path, CONFIG_BYTES_MAX)
            .and_then(|bytes| String::from_utf8(bytes).map_err(std::io::Error::other));
        match text {
            Ok(text) => layers.file(&path.display().to_string(), &text, &mut errors),
            Err(error) => errors.add(format!("--config {}", path.display()), error),
        }
    }
    layers.environment(
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))),
    );
    let host_name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let config = layers.resolve(errors, host_name.trim()).map_err(Failure::Usage)?;
    let runtime = super::runtime()?;
    let outcome = runtime.block_on(async {
        let stop = CancellationToken::new();
        shutdown::on_signals(stop.clone()).context("cannot install the signal handlers")?;
        let app = App::start(config, set_level).await?;
        let outcome = tokio::select! {
            () = stop.cancelled() => Ok(()),
            failure = app.failed() => Err(failure.into()),
        };
        app.stop().await;
        outcome
    });
    // All tasks have stopped. The process does not wait for blocking threads: a model load can take minutes, and a network file
    // system can hang.
    runtime.shutdown_background();
    outcome.map_err(Failure::Failed)
}
