//! The flags of `lineside run`: their names, their help, and which of them were given.
//!
//! A flag defines a setting. The variable (`LINESIDE_DATA_DIR`) and the key in the file (`dataDir`) follow from its name, so
//! that a setting is defined in one place. [`Settings`](super::settings) reads the values and states the defaults.

use std::collections::BTreeMap;

use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command, FromArgMatches};

/// The flags that were given, from setting to value.
#[derive(Debug, Default, Clone)]
pub struct Flags(pub BTreeMap<String, String>);

/// The names of all settings, such as `data-dir`.
pub fn setting_names() -> Vec<String> {
    let command = Definitions::augment_args(Command::new("run"));
    command.get_arguments().filter_map(|argument| argument.get_long().map(str::to_owned)).collect()
}

impl Args for Flags {
    fn augment_args(command: Command) -> Command {
        Definitions::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Definitions::augment_args_for_update(command)
    }
}

impl FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Self::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for setting in setting_names() {
            let id = setting.replace('-', "_");
            if matches.value_source(&id) != Some(ValueSource::CommandLine) {
                continue;
            }
            let value = match matches.try_get_one::<bool>(&id) {
                Ok(flag) => flag.map(bool::to_string),
                // Every other flag has a text.
                Err(_) => matches.get_one::<String>(&id).cloned(),
            };
            self.0.extend(value.map(|value| (setting, value)));
        }
        Ok(())
    }
}

#[derive(Args)]
struct Definitions {
    /// Folder of EdgeModel and CameraStream manifests. The agent watches it for changes.
    #[arg(long, value_name = "DIR")]
    manifests: Option<String>,
    /// Read EdgeModels and CameraStreams from the cluster that this pod runs in, instead of --manifests.
    #[arg(long)]
    in_cluster: bool,
    /// Read EdgeModels and CameraStreams from the cluster of this kubeconfig, instead of --manifests.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<String>,
    /// Contexts of the kubeconfig that lead to the same cluster, separated by commas, in order of preference
    /// [default: the current context].
    #[arg(long, value_name = "NAMES")]
    kube_contexts: Option<String>,
    /// Namespace of the objects [default: that of the pod or context, otherwise lineside].
    #[arg(long, value_name = "NAME")]
    kube_namespace: Option<String>,
    /// URL of the broker, such as mqtts://broker:8883 or mqtt://user:password@broker. Several URLs, separated by commas, are
    /// tried in order; the agent returns to an earlier one when it is reachable again.
    #[arg(long, value_name = "URLS")]
    mqtt: Option<String>,
    /// Folder for the spool, the model store and the state of the agent [default: /var/lib/lineside].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<String>,
    /// Name of the node, used in topics and ids [default: the host name].
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// Name of the site, used in topics [default: default].
    #[arg(long, value_name = "NAME")]
    site: Option<String>,
    /// First part of every topic [default: lineside].
    #[arg(long, value_name = "PREFIX")]
    prefix: Option<String>,
    /// Address of the HTTP server: /livez, /readyz, /metrics and /v1/status. With port 0, a free port is chosen and logged
    /// [default: 127.0.0.1:8080].
    #[arg(long, value_name = "ADDRESS")]
    http: Option<String>,
    /// Address of a listener for /livez, /readyz and /metrics only, which other machines may reach; `off` for none. With port 0,
    /// a free port is chosen and logged [default: 127.0.0.1:8082 if it is free].
    #[arg(long, value_name = "ADDRESS")]
    probes: Option<String>,
    /// What /readyz reports: agent (the desired state was read, and what can serve was restored) or models (every model
    /// serves) [default: agent].
    #[arg(long, value_name = "MODE")]
    readiness: Option<String>,
    /// Allow an address in --http that other machines can reach.
    #[arg(long)]
    insecure_bind: bool,
    /// Labels of this node for the node selectors of manifests: key=value,key=value.
    #[arg(long, value_name = "LABELS")]
    labels: Option<String>,
    #[command(flatten, next_help_heading = "Cameras")]
    cameras: CameraArguments,
    #[command(flatten, next_help_heading = "MQTT")]
    mqtt_more: MqttArguments,
    #[command(flatten, next_help_heading = "Spool")]
    spool: SpoolArguments,
    #[command(flatten, next_help_heading = "Models")]
    models: ModelArguments,
}

#[derive(Args)]
struct CameraArguments {
    /// Folders that file: models, and file: and dir: cameras may be read from, separated by commas [default: the data folder and, with
    /// --manifests, the folder that contains the manifests folder].
    #[arg(long, value_name = "DIRS")]
    file_roots: Option<String>,
    /// Hosts that cameras may have: host, host:port, or a network such as 10.20.0.0/16, separated by commas. This node must be
    /// listed as a host, such as 127.0.0.1:1984; * stands for every other host [default: *].
    #[arg(long, value_name = "HOSTS")]
    camera_hosts: Option<String>,
    /// Memory for all frames that are decoded at the same time [default: 256].
    #[arg(long, value_name = "MIB")]
    decode_mib: Option<String>,
}

#[derive(Args)]
struct MqttArguments {
    /// Folder of a mounted Secret with any of username, password, ca.crt, tls.crt and tls.key. The agent reads it at
    /// every connection, and reconnects when a file changes.
    #[arg(long, value_name = "DIR")]
    mqtt_secret: Option<String>,
    /// Commands that are accepted over MQTT, separated by commas: log-level, pause, reload, resume, snapshot
    /// [default: none].
    #[arg(long, value_name = "NAMES")]
    mqtt_commands: Option<String>,
    /// Maximum number of spooled results that are published per second; 0: unlimited [default: 2000].
    #[arg(long, value_name = "N")]
    mqtt_drain: Option<String>,
    /// Maximum size of a message in bytes that the broker accepts; larger ones are set aside; 0: unlimited [default: 0].
    #[arg(long, value_name = "BYTES")]
    mqtt_max_packet_bytes: Option<String>,
    /// MQTT keep-alive interval [default: 15].
    #[arg(long, value_name = "SECONDS")]
    mqtt_keep_alive_seconds: Option<String>,
    /// Interval at which metrics are published over MQTT; 0: never [default: 60].
    #[arg(long, value_name = "SECONDS")]
    mqtt_metrics_seconds: Option<String>,
    /// Publish Sparkplug B as an edge node of this group, instead of JSON.
    #[arg(long, value_name = "GROUP")]
    sparkplug_group: Option<String>,
    /// Primary host application of Sparkplug B. While it is offline, results remain in the spool.
    #[arg(long, value_name = "HOST")]
    sparkplug_host: Option<String>,
    /// Publish Home Assistant discovery messages below this prefix, usually homeassistant.
    #[arg(long, value_name = "PREFIX")]
    home_assistant: Option<String>,
}

#[derive(Args)]
struct SpoolArguments {
    /// Maximum size of the spool on disk [default: 512].
    #[arg(long, value_name = "MIB")]
    spool_mib: Option<String>,
    /// Maximum age of a spooled record, in hours of agent uptime; 0: unlimited [default: 0].
    #[arg(long, value_name = "HOURS")]
    spool_max_hours: Option<String>,
    /// Interval at which the spool is synced to disk. A power cut loses at most this time; longer intervals reduce flash wear
    /// [default: 200].
    #[arg(long, value_name = "MS")]
    spool_sync_ms: Option<String>,
    /// What is dropped when the spool is full: drop-oldest or drop-newest [default: drop-oldest].
    #[arg(long, value_name = "POLICY")]
    spool_when_full: Option<String>,
}

#[derive(Args)]
struct ModelArguments {
    /// Hosts that models may be downloaded from, also after redirects: host or host:port, separated by commas; * stands for
    /// every host except this node [default: *, without redirects to other hosts; none with a cluster].
    #[arg(long, value_name = "HOSTS")]
    source_hosts: Option<String>,
    /// Allow http: sources, and registries and object stores without TLS.
    #[arg(long)]
    source_http: bool,
    /// PEM file of additional root certificates for sources.
    #[arg(long, value_name = "FILE")]
    source_ca: Option<String>,
    /// Maximum bandwidth of all downloads together, in KiB per second; 0: unlimited [default: 0].
    #[arg(long, value_name = "KIB")]
    source_kib_per_second: Option<String>,
    /// Time without data after which a download is retried [default: 30].
    #[arg(long, value_name = "SECONDS")]
    source_stall_seconds: Option<String>,
    /// Maximum random delay before a download, which spreads the load of many nodes [default: 3].
    #[arg(long, value_name = "SECONDS")]
    source_jitter_seconds: Option<String>,
    /// Folder in which the Secrets of source.secretRef are mounted, one folder each [default: /var/run/lineside/secrets].
    #[arg(long, value_name = "DIR")]
    secrets_dir: Option<String>,
    /// Maximum size of a model file [default: 2048].
    #[arg(long, value_name = "MIB")]
    model_mib_max: Option<String>,
    /// Maximum size of the model store on disk; the least recently used models are evicted [default: 4096].
    #[arg(long, value_name = "MIB")]
    store_mib_max: Option<String>,
    /// PEM file of a public key, or a folder of such files. When set, unsigned models are rejected.
    #[arg(long, value_name = "PATH")]
    trusted_keys: Option<String>,
    /// Number of trusted keys that must have signed a model [default: 1].
    #[arg(long, value_name = "N")]
    signature_threshold: Option<String>,
    /// Agents of this site from which models are downloaded before the source is tried: host:port, separated by commas.
    #[arg(long, value_name = "PEERS")]
    peers: Option<String>,
    /// File with the token that the agents of the site share. When set, this agent serves its models to the others.
    #[arg(long, value_name = "FILE")]
    peer_token_file: Option<String>,
    /// Memory limit of the admission of a model [default: 2048].
    #[arg(long, value_name = "MIB")]
    admission_memory_mib: Option<String>,
    /// Time limit of the admission of a model [default: 120].
    #[arg(long, value_name = "SECONDS")]
    admission_seconds: Option<String>,
}
