//! `lineside run`: the agent.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::Failure;
use crate::app::App;
use crate::config::settings::ConfigLayers;
use crate::telemetry::SetLevel;
use lineside_api::names::ConfigErrors;
use lineside_common::files::read_bounded;
use lineside_common::{allocator, shutdown};

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
    /// Follow the EdgeModels and CameraStreams of the cluster that this pod runs in, instead of --manifests.
    #[arg(long)]
    in_cluster: bool,
    /// Follow those of the cluster that this kubeconfig names, instead of --manifests.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<String>,
    /// Contexts of the kubeconfig, as ways to the same objects, with commas: the first that answers is used, and the
    /// first is gone back to [default: its current one].
    #[arg(long, value_name = "NAMES")]
    kube_contexts: Option<String>,
    /// The namespace of our objects [default: the pod's or context's own, else lineside].
    #[arg(long, value_name = "NAME")]
    kube_namespace: Option<String>,
    /// The broker, such as mqtts://broker:8883 or mqtt://user:password@broker. Several with commas: the first that is
    /// reached is used, and the earlier ones are gone back to.
    #[arg(long, value_name = "URLS")]
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
    /// Where /livez, /readyz, /metrics and /v1/status are served; port 0 takes a free one and logs it [default: 127.0.0.1:8080].
    #[arg(long, value_name = "ADDRESS")]
    http: Option<String>,
    /// Allow --http to be an address that other machines can reach.
    #[arg(long)]
    insecure_bind: bool,
    /// Labels of this node, which manifests select by: key=value,key=value.
    #[arg(long, value_name = "LABELS")]
    labels: Option<String>,
    #[command(flatten, next_help_heading = "MQTT")]
    mqtt_more: MqttArguments,
    #[command(flatten, next_help_heading = "Spool")]
    spool: SpoolArguments,
    #[command(flatten, next_help_heading = "Models")]
    models: ModelArguments,
}

#[derive(Args)]
struct MqttArguments {
    /// The folder of a mounted secret with what the broker asks for: username, password, ca.crt, tls.crt, tls.key, each
    /// where it is needed. The files are read at every connection; when they change, the agent connects anew.
    #[arg(long, value_name = "DIR")]
    mqtt_secret: Option<String>,
    /// Commands that are carried out when they come over MQTT: log-level, pause, reload, resume, snapshot, with commas
    /// [default: none].
    #[arg(long, value_name = "NAMES")]
    mqtt_commands: Option<String>,
    /// Results of the backlog sent per second at most; 0 is as fast as the broker takes them [default: 2000].
    #[arg(long, value_name = "N")]
    mqtt_drain: Option<String>,
    /// Silence after which the broker is asked whether it is still there [default: 15].
    #[arg(long, value_name = "SECONDS")]
    mqtt_keep_alive_seconds: Option<String>,
    /// How often the metrics are published; 0 is never [default: 60].
    #[arg(long, value_name = "SECONDS")]
    mqtt_metrics_seconds: Option<String>,
    /// Speak SparkplugConfig B as an edge node of this group, instead of JSON.
    #[arg(long, value_name = "GROUP")]
    sparkplug_group: Option<String>,
    /// The primary host of SparkplugConfig B; while it is offline, results wait.
    #[arg(long, value_name = "HOST")]
    sparkplug_host: Option<String>,
    /// Announce the streams to Home Assistant, below this prefix; Home Assistant's own is homeassistant.
    #[arg(long, value_name = "PREFIX")]
    home_assistant: Option<String>,
}

#[derive(Args)]
struct SpoolArguments {
    /// What the results that wait for the broker may take on disk [default: 512].
    #[arg(long, value_name = "MIB")]
    spool_mib: Option<String>,
    /// How long a result may wait, in hours the agent runs; 0 is for ever [default: 0].
    #[arg(long, value_name = "HOURS")]
    spool_max_hours: Option<String>,
    /// A result that waits is safe from a power cut within this; longer spares the flash [default: 200].
    #[arg(long, value_name = "MS")]
    spool_sync_ms: Option<String>,
    /// What gives way when there is no room: drop-oldest or drop-newest [default: drop-oldest].
    #[arg(long, value_name = "POLICY")]
    spool_when_full: Option<String>,
}

#[derive(Args)]
struct ModelArguments {
    /// Hosts that models may be fetched from and redirected to: host or host:port, with commas. Without it, any host but
    /// this node itself, and no redirects to other hosts.
    #[arg(long, value_name = "HOSTS")]
    source_hosts: Option<String>,
    /// Allow http: sources, and registries and object stores without TLS.
    #[arg(long)]
    source_http: bool,
    /// A PEM file of further root certificates for sources.
    #[arg(long, value_name = "FILE")]
    source_ca: Option<String>,
    /// A cap on the bandwidth of all downloads together; 0 is none [default: 0].
    #[arg(long, value_name = "KIB")]
    source_kib_per_second: Option<String>,
    /// Give up a source that says nothing for this long, and try again [default: 30].
    #[arg(long, value_name = "SECONDS")]
    source_stall_seconds: Option<String>,
    /// Begin a download within this time at random, so that nodes do not all begin at once [default: 3].
    #[arg(long, value_name = "SECONDS")]
    source_jitter_seconds: Option<String>,
    /// Where the Secrets that source.secretRef names are mounted, a folder each [default: /var/run/lineside/secrets].
    #[arg(long, value_name = "DIR")]
    secrets_dir: Option<String>,
    /// The largest model file that is taken [default: 2048].
    #[arg(long, value_name = "MIB")]
    model_mib_max: Option<String>,
    /// What the store of models may take on disk; the least recently used give way [default: 4096].
    #[arg(long, value_name = "MIB")]
    store_mib_max: Option<String>,
    /// A PEM file of a public key, or a folder of them. With keys, nothing unsigned is loaded.
    #[arg(long, value_name = "PATH")]
    trusted_keys: Option<String>,
    /// How many of the trusted keys have to sign [default: 1].
    #[arg(long, value_name = "N")]
    signature_threshold: Option<String>,
    /// Agents of this site that are asked for a model before its source: host:port, with commas.
    #[arg(long, value_name = "PEERS")]
    peers: Option<String>,
    /// The file with the secret that the site's agents share. With it, this agent offers its models to the others.
    #[arg(long, value_name = "FILE")]
    peer_token_file: Option<String>,
    /// DesiredCache that admission a model may take [default: 2048].
    #[arg(long, value_name = "MIB")]
    admission_memory_mib: Option<String>,
    /// Time that admission a model may take [default: 120].
    #[arg(long, value_name = "SECONDS")]
    admission_seconds: Option<String>,
}

pub(super) fn run(arguments: Arguments, set_level: SetLevel) -> Result<(), Failure> {
    allocator::share_one_heap();
    let mut layers = ConfigLayers::new();
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
    layers.flag("manifests", arguments.manifests);
    layers.flag("in-cluster", arguments.in_cluster.then(|| "true".to_owned()));
    layers.flag("kubeconfig", arguments.kubeconfig);
    layers.flag("kube-contexts", arguments.kube_contexts);
    layers.flag("kube-namespace", arguments.kube_namespace);
    layers.flag("mqtt", arguments.mqtt);
    layers.flag("data-dir", arguments.data_dir);
    layers.flag("node", arguments.node);
    layers.flag("site", arguments.site);
    layers.flag("prefix", arguments.prefix);
    layers.flag("http", arguments.http);
    layers.flag("insecure-bind", arguments.insecure_bind.then(|| "true".to_owned()));
    layers.flag("labels", arguments.labels);
    let mqtt = arguments.mqtt_more;
    layers.flag("mqtt-secret", mqtt.mqtt_secret);
    layers.flag("mqtt-commands", mqtt.mqtt_commands);
    layers.flag("mqtt-drain", mqtt.mqtt_drain);
    layers.flag("mqtt-keep-alive-seconds", mqtt.mqtt_keep_alive_seconds);
    layers.flag("mqtt-metrics-seconds", mqtt.mqtt_metrics_seconds);
    layers.flag("sparkplug-group", mqtt.sparkplug_group);
    layers.flag("sparkplug-host", mqtt.sparkplug_host);
    layers.flag("home-assistant", mqtt.home_assistant);
    let spool = arguments.spool;
    layers.flag("spool-mib", spool.spool_mib);
    layers.flag("spool-max-hours", spool.spool_max_hours);
    layers.flag("spool-sync-ms", spool.spool_sync_ms);
    layers.flag("spool-when-full", spool.spool_when_full);
    let models = arguments.models;
    layers.flag("source-hosts", models.source_hosts);
    layers.flag("source-http", models.source_http.then(|| "true".to_owned()));
    layers.flag("source-ca", models.source_ca);
    layers.flag("source-kib-per-second", models.source_kib_per_second);
    layers.flag("source-stall-seconds", models.source_stall_seconds);
    layers.flag("source-jitter-seconds", models.source_jitter_seconds);
    layers.flag("secrets-dir", models.secrets_dir);
    layers.flag("model-mib-max", models.model_mib_max);
    layers.flag("store-mib-max", models.store_mib_max);
    layers.flag("trusted-keys", models.trusted_keys);
    layers.flag("signature-threshold", models.signature_threshold);
    layers.flag("peers", models.peers);
    layers.flag("peer-token-file", models.peer_token_file);
    layers.flag("admission-memory-mib", models.admission_memory_mib);
    layers.flag("admission-seconds", models.admission_seconds);
    let host_name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let config = layers.resolve(errors, host_name.trim()).map_err(Failure::Usage)?;
    let runtime = super::runtime()?;
    let ended = runtime.block_on(async {
        let stop = CancellationToken::new();
        shutdown::on_signals(stop.clone()).context("signals cannot be listened to")?;
        let app = App::start(config, set_level).await?;
        let outcome = tokio::select! {
            () = stop.cancelled() => Ok(()),
            failure = app.failed() => Err(failure.into()),
        };
        app.stop().await;
        outcome
    });
    // Everything has ended in order; a model that is still being loaded, or a folder that hangs, is not waited for.
    runtime.shutdown_background();
    ended.map_err(Failure::Failed)
}
