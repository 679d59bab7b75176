//! `lineside run`: the agent.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::Failure;
use crate::app::App;
use crate::base::files::read_bounded;
use crate::base::shutdown;
use crate::config::Mistakes;
use crate::config::agent::Layers;

const CONFIG_BYTES_MAX: u64 = 1 << 20;

#[derive(Args)]
#[command(after_help = "\
Every setting can also be given as a variable (--data-dir as LINESIDE_DATA_DIR) or in the file of --config
(dataDir: ...). Flags override variables, which override the file.

Example:
  lineside run --manifests ./manifests --mqtt mqtt://broker:1883 --data-dir ./data --http 127.0.0.1:0")]
pub(super) struct Arguments {
    /// A YAML file of settings.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The folder of EdgeModel and CameraStream manifests; it is watched.
    #[arg(long, value_name = "DIR")]
    manifests: Option<String>,
    /// The broker, such as mqtt://broker:1883 or mqtt://user:password@broker.
    #[arg(long, value_name = "URL")]
    mqtt: Option<String>,
    /// The folder the agent keeps its own state in [default: /var/lib/lineside].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<String>,
    /// The node's name in topics and ids [default: the host name].
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// The site's name in topics [default: default].
    #[arg(long, value_name = "NAME")]
    site: Option<String>,
    /// What every topic begins with [default: lineside].
    #[arg(long, value_name = "PREFIX")]
    prefix: Option<String>,
    /// Where /livez, /readyz and /metrics are served; port 0 takes a free one and logs it [default: 127.0.0.1:8080].
    #[arg(long, value_name = "ADDRESS")]
    http: Option<String>,
    /// Allow --http to be an address that other machines can reach.
    #[arg(long)]
    insecure_bind: bool,
    /// Labels of this node, which manifests select by: key=value,key=value.
    #[arg(long, value_name = "LABELS")]
    labels: Option<String>,
    /// MiB of results held in memory while the broker is away; the oldest give way [default: 64].
    #[arg(long, value_name = "MIB")]
    spool_memory_mib: Option<String>,
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    let mut layers = Layers::new();
    let mut mistakes = Mistakes::default();
    if let Some(path) = &arguments.config {
        let text = read_bounded(path, CONFIG_BYTES_MAX)
            .and_then(|bytes| String::from_utf8(bytes).map_err(std::io::Error::other));
        match text {
            Ok(text) => layers.file(&path.display().to_string(), &text, &mut mistakes),
            Err(error) => mistakes.add(format!("--config {}", path.display()), error),
        }
    }
    layers.environment(
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))),
    );
    layers.flag("manifests", arguments.manifests);
    layers.flag("mqtt", arguments.mqtt);
    layers.flag("data-dir", arguments.data_dir);
    layers.flag("node", arguments.node);
    layers.flag("site", arguments.site);
    layers.flag("prefix", arguments.prefix);
    layers.flag("http", arguments.http);
    layers.flag("insecure-bind", arguments.insecure_bind.then(|| "true".to_owned()));
    layers.flag("labels", arguments.labels);
    layers.flag("spool-memory-mib", arguments.spool_memory_mib);
    let host_name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let config = layers.resolve(mistakes, host_name.trim()).map_err(Failure::Usage)?;
    let runtime = super::runtime()?;
    let ended = runtime.block_on(async {
        let stop = CancellationToken::new();
        shutdown::on_signals(stop.clone()).context("signals cannot be listened to")?;
        let app = App::start(config).await?;
        stop.cancelled().await;
        app.end().await;
        Ok(())
    });
    // Everything has ended in order; a model that is still being loaded, or a folder that hangs, is not waited for.
    runtime.shutdown_background();
    ended.map_err(Failure::Failed)
}
