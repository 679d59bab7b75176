//! The configuration of the agent: flags override environment variables, which override the configuration file.
//!
//! A setting has the same name in each of them: the flag `--data-dir` is the variable `LINESIDE_DATA_DIR` and the key
//! `dataDir`. An error states the name under which the value was given.
//!
//! Unknown keys in the file are errors. Unknown `LINESIDE_` variables are not: for a Service with the name `lineside`,
//! Kubernetes sets such variables in every pod of the namespace (`LINESIDE_SERVICE_HOST`, `LINESIDE_PORT_8080_TCP`). For the same
//! reason no setting is called `port` or begins with `service`.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde_json::Value;
use url::Url;

use super::flags::{Flags, setting_names};
use super::mqtt;
use super::probes::{ProbesSetting, ReadinessMode};
use super::sources::{self, SourcesConfig};
use lineside_api::kinds::yaml;
use lineside_api::names::{ConfigErrors, NameError, is_name, topic_segment};
use lineside_common::net::AllowedHosts;
use lineside_kube::ClusterConfig;
use lineside_models::ModelsConfig;
use lineside_mqtt::config::MqttConfig;
use lineside_spool::SpoolConfig;

/// What the agent keeps in its data folder.
pub const DATA_FOLDER_ENTRIES: [&str; 9] = [
    "store",
    "spool",
    "boot-epoch",
    "identity.json",
    "desired.json",
    "last-good.json",
    "highest-versions.json",
    "sparkplug-bdseq",
    "lock",
];

const HTTP_DEFAULT: &str = "127.0.0.1:8080";
/// Longest `--prefix` in bytes.
const PREFIX_BYTES_MAX: usize = 253;

/// The validated configuration of the agent.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of the node, in topics and ids.
    pub node: String,
    /// Name of the site, in topics.
    pub site: String,
    /// First part of every topic.
    pub prefix: String,
    /// Source of the desired state.
    pub desired_state: DesiredSource,
    /// Folder of the agent's state.
    pub data_dir: PathBuf,
    /// Brokers and the format of messages.
    pub mqtt: MqttConfig,
    /// Address of the HTTP server.
    pub http: SocketAddr,
    /// The listener of the probes.
    pub probes: ProbesSetting,
    /// What `/readyz` reports.
    pub readiness: ReadinessMode,
    /// Labels of the node for node selectors.
    pub labels: BTreeMap<String, String>,
    /// The spool.
    pub spool: SpoolConfig,
    /// Sources, store, signatures and admission of models.
    pub models: ModelsConfig,
    /// Folders and hosts of camera sources, and the memory for decoding.
    pub sources: SourcesConfig,
}

/// Source of the desired state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DesiredSource {
    /// A folder of manifests.
    Folder(PathBuf),
    /// The API server of a cluster.
    Cluster(ClusterConfig),
}

impl std::fmt::Display for DesiredSource {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Folder(folder) => write!(formatter, "the folder {}", folder.display()),
            Self::Cluster(access) => write!(formatter, "{access}"),
        }
    }
}

/// The three sources of settings, each from setting to value as text.
#[derive(Debug, Default)]
pub struct ConfigLayers {
    /// The names of all settings.
    names: Vec<String>,
    flags: BTreeMap<String, String>,
    environment: BTreeMap<String, String>,
    file: BTreeMap<String, String>,
    file_name: String,
}

impl ConfigLayers {
    /// The layer of the flags; the others are empty.
    pub fn new(flags: Flags) -> Self {
        Self { names: setting_names(), flags: flags.0, ..Self::default() }
    }

    /// Reads the variables of the settings. An empty variable is ignored.
    pub fn environment(&mut self, variables: impl IntoIterator<Item = (String, String)>) {
        let variables: BTreeMap<String, String> = variables.into_iter().collect();
        for setting in &self.names {
            if let Some(value) = variables.get(&variable(setting)).filter(|value| !value.is_empty()) {
                self.environment.insert(setting.clone(), value.clone());
            }
        }
    }

    /// Reads the text of a configuration file.
    pub fn file(&mut self, name: &str, text: &str, errors: &mut ConfigErrors) {
        name.clone_into(&mut self.file_name);
        let documents = match yaml::documents(text) {
            Ok(documents) => documents,
            Err(error) => return errors.add(name, error),
        };
        for document in documents {
            let Value::Object(entries) = document else {
                errors.add(name, "must be a mapping of settings, one `key: value` per line");
                continue;
            };
            for (key, value) in entries {
                let Some(setting) = self.names.iter().find(|setting| file_key(setting) == key) else {
                    let known: Vec<String> = self.names.iter().map(|setting| file_key(setting)).collect();
                    errors
                        .add(format!("{name} {key}"), format!("is not a known key; the keys are {}", known.join(", ")));
                    continue;
                };
                match plain(&value) {
                    Some(text) => drop(self.file.insert(setting.clone(), text)),
                    None => errors.add(format!("{name} {key}"), "must be a single value"),
                }
            }
        }
    }

    /// The value that applies, and the name under which it was given.
    pub(super) fn get(&self, setting: &'static str) -> (Option<&str>, String) {
        if let Some(value) = self.flags.get(setting) {
            return (Some(value), format!("--{setting}"));
        }
        if let Some(value) = self.environment.get(setting) {
            return (Some(value), variable(setting));
        }
        match self.file.get(setting) {
            Some(value) => (Some(value), format!("{} {}", self.file_name, file_key(setting))),
            None => (None, format!("--{setting}")),
        }
    }

    /// Validates all settings.
    ///
    /// # Errors
    /// Every error, in the order of the settings.
    pub fn resolve(&self, mut errors: ConfigErrors, host_name: &str) -> Result<Config, Vec<String>> {
        let mut text = |setting: &'static str, otherwise: Option<&str>, check: fn(&str) -> Result<(), NameError>| {
            let (value, place) = self.get(setting);
            let value = value.or(otherwise).map(str::to_owned);
            let value = errors.require(&place, value)?;
            errors.take(&place, check(&value)).map(|()| value)
        };
        let any = |_: &str| Ok(());
        let node = text("node", Some(&host_name.to_lowercase()), topic_segment);
        let site = text("site", Some("default"), topic_segment);
        let prefix = text("prefix", Some("lineside"), check_prefix);
        let data_dir = text("data-dir", Some("/var/lib/lineside"), any);
        let http = text("http", Some(HTTP_DEFAULT), any);
        let insecure = text("insecure-bind", Some("false"), any);
        let labels = text("labels", Some(""), any);

        let insecure = insecure.and_then(|text| {
            let flag = text.parse::<bool>().map_err(|_| format!("`{text}` is not true or false"));
            errors.take(&self.get("insecure-bind").1, flag)
        });
        let http = http.and_then(|text| {
            let address = bind_address(&text, insecure.unwrap_or(false));
            errors.take(&self.get("http").1, address)
        });
        let probes = self.parsed::<ProbesSetting>("probes", &mut errors);
        let readiness = self.parsed::<ReadinessMode>("readiness", &mut errors);
        let labels = labels.and_then(|text| errors.take(&self.get("labels").1, labels_of(&text)));
        let desired_state = self.desired_source(&mut errors);
        let mqtt = mqtt::resolve(self, &mut errors);
        let spool = mqtt::spooling(self, &mut errors);
        let mut models = self.models(&mut errors);
        let sources = match (&desired_state, &data_dir) {
            (Some(desired_state), Some(data_dir)) => {
                self.source_hosts(&mut models, desired_state);
                Some(sources::resolve(self, desired_state, Path::new(data_dir), &mut errors))
            }
            _ => None,
        };
        if let Some(sources) = &sources {
            models.file_roots = sources.policy.files.clone();
        }
        let complete = || {
            Some(Config {
                node: node?,
                site: site?,
                prefix: prefix?,
                desired_state: desired_state?,
                data_dir: data_dir?.into(),
                mqtt: mqtt?,
                http: http?,
                probes,
                readiness,
                labels: labels?,
                spool,
                models,
                sources: sources?,
            })
        };
        match complete() {
            Some(config) if errors.is_empty() => Ok(config),
            _ => Err(errors.into_list()),
        }
    }
}

impl ConfigLayers {
    /// The value of a setting that is not empty.
    pub(super) fn text(&self, setting: &'static str) -> Option<&str> {
        self.get(setting).0.filter(|value| !value.is_empty())
    }

    /// The items of a setting that is a list.
    pub(super) fn list(&self, setting: &'static str) -> impl Iterator<Item = String> {
        self.text(setting).into_iter().flat_map(|value| value.split(',')).map(|item| item.trim().to_owned())
    }

    /// A number. An invalid one is added to the errors, and the default is returned.
    pub(super) fn number(
        &self,
        setting: &'static str,
        otherwise: u64,
        range: RangeInclusive<u64>,
        errors: &mut ConfigErrors,
    ) -> u64 {
        let Some(value) = self.text(setting) else { return otherwise };
        let read = value.parse::<u64>().ok().filter(|number| range.contains(number));
        let read =
            read.ok_or_else(|| format!("`{value}` is not a number between {} and {}", range.start(), range.end()));
        errors.take(&self.get(setting).1, read).unwrap_or(otherwise)
    }

    /// A setting of a type with a default. An invalid value is added to the errors.
    fn parsed<T: FromStr<Err: Display> + Default>(&self, setting: &'static str, errors: &mut ConfigErrors) -> T {
        let value = self.text(setting).map(str::parse);
        value.and_then(|value| errors.take(&self.get(setting).1, value)).unwrap_or_default()
    }

    /// The source of the desired state, of which there must be exactly one.
    fn desired_source(&self, errors: &mut ConfigErrors) -> Option<DesiredSource> {
        let in_cluster = match self.text("in-cluster") {
            None | Some("false") => false,
            Some("true") => true,
            Some(other) => {
                errors.add(self.get("in-cluster").1, format!("`{other}` is not true or false"));
                return None;
            }
        };
        let access = ClusterConfig {
            kubeconfig: self.text("kubeconfig").map(PathBuf::from),
            contexts: self.list("kube-contexts").collect(),
            namespace: self.text("kube-namespace").map(str::to_owned),
        };
        if let Some(namespace) = access.namespace.as_ref().filter(|name| !is_name(name)) {
            errors.add(self.get("kube-namespace").1, format!("`{namespace}` is not a valid namespace name"));
        }
        if !access.contexts.is_empty() && access.kubeconfig.is_none() {
            errors.add(self.get("kube-contexts").1, "--kubeconfig is required, because it contains the contexts");
        }
        match (self.text("manifests"), in_cluster, &access.kubeconfig) {
            (Some(folder), false, None) => {
                let folder = PathBuf::from(folder);
                let place = self.get("manifests").1;
                let found =
                    std::fs::metadata(&folder).map_err(|error| format!("{} cannot be read: {error}", folder.display()));
                match errors.take(&place, found)? {
                    found if found.is_dir() => Some(DesiredSource::Folder(folder)),
                    _ => {
                        errors.add(place, format!("{} is not a folder", folder.display()));
                        None
                    }
                }
            }
            (None, true, None) => Some(DesiredSource::Cluster(access)),
            (None, false, Some(file)) => {
                let place = self.get("kubeconfig").1;
                let found =
                    std::fs::metadata(file).map_err(|error| format!("{} cannot be read: {error}", file.display()));
                errors.take(&place, found)?;
                Some(DesiredSource::Cluster(access))
            }
            (None, false, None) => {
                errors.add(
                    self.get("manifests").1,
                    "is missing: set it to a folder of manifests, or set --in-cluster or --kubeconfig FILE to use a cluster",
                );
                None
            }
            _ => {
                errors
                    .add(self.get("manifests").1, "--manifests, --in-cluster and --kubeconfig are mutually exclusive");
                None
            }
        }
    }

    /// The settings of models. Invalid ones are added to the errors and have their default.
    fn models(&self, errors: &mut ConfigErrors) -> ModelsConfig {
        let defaults = ModelsConfig::default();
        let path = |setting: &'static str| self.text(setting).map(PathBuf::from);
        let mut number = |setting, otherwise, least, most| self.number(setting, otherwise, least..=most, errors);
        const MIB_MAX: u64 = 1 << 24;
        const SECONDS_MAX: u64 = 24 * 3600;
        let mut models = ModelsConfig {
            source_stall: Duration::from_secs(number("source-stall-seconds", 30, 1, SECONDS_MAX)),
            source_jitter: Duration::from_secs(number("source-jitter-seconds", 3, 0, SECONDS_MAX)),
            source_bytes_per_second: match number("source-kib-per-second", 0, 0, 1 << 30) {
                0 => None,
                kib => Some(kib << 10),
            },
            // The protobuf encoding of ONNX is limited to 2 GiB.
            model_bytes_max: number("model-mib-max", 2048, 1, 2048) << 20,
            store_bytes_max: number("store-mib-max", 4096, 1, MIB_MAX) << 20,
            signature_threshold: usize::try_from(number("signature-threshold", 1, 1, 100)).unwrap_or(1),
            admission_memory_bytes: number("admission-memory-mib", 2048, 64, MIB_MAX) << 20,
            admission_seconds: number("admission-seconds", 120, 1, SECONDS_MAX),
            source_ca: path("source-ca"),
            secrets_dir: path("secrets-dir").unwrap_or(defaults.secrets_dir.clone()),
            trusted_keys: path("trusted-keys"),
            peer_token: path("peer-token-file"),
            peers: self.list("peers").collect(),
            ..defaults
        };
        if let Some(flag) = self.text("source-http") {
            let read = flag.parse::<bool>().map_err(|_| format!("`{flag}` is not true or false"));
            models.source_http = errors.take(&self.get("source-http").1, read).unwrap_or(false);
        }
        for setting in ["source-hosts", "peers"] {
            for host in self.list(setting).filter(|host| setting == "peers" || host != AllowedHosts::ANY) {
                // A peer requires a port; for the host of a source the scheme implies it.
                let is_one = !host.contains(['/', '@', '?', '#', ' '])
                    && Url::parse(&format!("http://{host}/"))
                        .is_ok_and(|url| setting != "peers" || url.port().is_some() || host.ends_with(":80"));
                if !is_one {
                    errors.add(self.get(setting).1, format!("`{host}` is not host:port"));
                }
            }
        }
        if !models.peers.is_empty() && models.peer_token.is_none() {
            errors.add(
                self.get("peers").1,
                "--peer-token-file is required, because peers answer only requests with its token",
            );
        }
        models
    }

    /// The hosts and folders that the author of a manifest may name.
    ///
    /// In a cluster the authors of EdgeModels are usually not those who configure the agent, and a default of all hosts
    /// would let an author use the agent to reach the site's network. Hosts that follow from the applied models would allow
    /// the same. Therefore no host is allowed there unless it is listed; `file:` sources need no host.
    fn source_hosts(&self, models: &mut ModelsConfig, desired_state: &DesiredSource) {
        let is_cluster = matches!(desired_state, DesiredSource::Cluster(_));
        models.source_hosts = match self.text("source-hosts") {
            None if !is_cluster => AllowedHosts::any(),
            _ => self.list("source-hosts").collect(),
        };
    }
}

/// `data-dir` as `LINESIDE_DATA_DIR`.
fn variable(setting: &str) -> String {
    format!("LINESIDE_{}", setting.to_uppercase().replace('-', "_"))
}

/// `data-dir` as `dataDir`; the unit MiB keeps its spelling.
fn file_key(setting: &str) -> String {
    let mut words = setting.split('-');
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |key, word| match word {
        "mib" => key + "MiB",
        word => {
            let mut letters = word.chars();
            key + &letters.next().into_iter().flat_map(char::to_uppercase).collect::<String>() + letters.as_str()
        }
    })
}

/// A YAML value as the text of a flag; a mapping becomes `key=value,key=value`, a list `item,item`.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Number(number) => Some(number.to_string()),
        Value::Object(entries) => entries
            .iter()
            .map(|(key, value)| Some(format!("{key}={}", value.as_str()?)))
            .collect::<Option<Vec<_>>>()
            .map(|pairs| pairs.join(",")),
        Value::Array(items) => items.iter().map(Value::as_str).collect::<Option<Vec<_>>>().map(|items| items.join(",")),
        Value::Null => None,
    }
}

/// Checks the first levels of all topics. A topic has at most 65,535 bytes, of which each of the other levels has at most 253.
fn check_prefix(prefix: &str) -> Result<(), NameError> {
    if prefix.len() > PREFIX_BYTES_MAX {
        return Err(NameError::TooLong);
    }
    prefix.split('/').try_for_each(topic_segment)
}

/// Parses `address:port`. Addresses that other machines can reach are rejected unless `insecure`.
fn bind_address(text: &str, insecure: bool) -> Result<SocketAddr, String> {
    let address: SocketAddr = text
        .parse()
        .map_err(|_| format!("`{text}` is not an address and port, such as {HTTP_DEFAULT} or [::1]:8080"))?;
    let is_loopback = match address.ip() {
        IpAddr::V4(ip) => ip.is_loopback(),
        IpAddr::V6(ip) => ip.is_loopback(),
    };
    match is_loopback || insecure {
        true => Ok(address),
        false => Err(format!(
            "{address} can be reached from other machines without TLS or a token; use a loopback address, or \
             --insecure-bind where the network is trusted"
        )),
    }
}

fn labels_of(text: &str) -> Result<BTreeMap<String, String>, String> {
    text.split(',')
        .filter(|pair| !pair.trim().is_empty())
        .map(|pair| match pair.trim().split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
            _ => Err(format!("`{pair}` is not a label; expected key=value")),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(flags: &[(&str, &str)], environment: &[(&str, &str)], file: &str) -> Result<Config, Vec<String>> {
        let flags = flags.iter().map(|(setting, value)| ((*setting).to_owned(), (*value).to_owned()));
        let mut layers = ConfigLayers::new(Flags(flags.collect()));
        let mut errors = ConfigErrors::default();
        layers.environment(environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        layers.file("lineside.yaml", file, &mut errors);
        layers.resolve(errors, "Edge-3")
    }

    #[test]
    fn flags_override_the_environment_which_overrides_the_file() {
        let file = "manifests: /\nmqtt: mqtt://file\nsite: file\nnode: file\nlabels: {line: a, zone: b}\nspoolMiB: 7\n";
        let environment = [
            ("LINESIDE_SITE", "environment"),
            ("LINESIDE_NODE", "environment"),
            ("LINESIDE_PREFIX", ""),
            ("LINESIDE_SERVICE_HOST", "10.0.0.1"),
            ("LINESIDE_PORT", "tcp://10.0.0.1:8080"),
        ];
        let config = resolved(&[("node", "flag")], &environment, file).unwrap();
        assert_eq!((config.node.as_str(), config.site.as_str()), ("flag", "environment"));
        assert_eq!((config.mqtt.brokers[0].host.as_str(), config.prefix.as_str()), ("file", "lineside"));
        assert_eq!(config.labels.len(), 2);
        assert_eq!(config.spool.bytes_max, 7 << 20);
        let defaults = resolved(&[("manifests", "/"), ("mqtt", "mqtt://b")], &[], "").unwrap();
        assert_eq!((defaults.node.as_str(), defaults.http.port()), ("edge-3", 8080));
    }

    #[test]
    fn every_error_is_reported_with_the_name_of_the_setting_as_given() {
        let errors = resolved(
            &[("node", "a/b"), ("http", "nowhere")],
            &[("LINESIDE_SPOOL_MIB", "0"), ("LINESIDE_MANIFESTS", "/no/such/folder")],
            "mqtt: http://x\nspeed: 3\nsite: [1]\nlabels: novalue\n",
        )
        .unwrap_err();
        for expected in [
            "--node: `a/b`",
            "--http: `nowhere`",
            "LINESIDE_SPOOL_MIB: `0`",
            "LINESIDE_MANIFESTS: /no/such/folder cannot be read",
            "lineside.yaml mqtt: http: is not supported",
            "lineside.yaml speed: is not a known key",
            "lineside.yaml site: must be a single value",
            "lineside.yaml labels: `novalue`",
        ] {
            assert!(errors.iter().any(|error| error.starts_with(expected)), "{expected}\n{errors:#?}");
        }
        let missing = resolved(&[], &[], "").unwrap_err();
        assert_eq!(
            missing,
            [
                "--manifests: is missing: set it to a folder of manifests, or set --in-cluster or --kubeconfig FILE to use a cluster",
                "--mqtt: is missing"
            ]
        );
    }

    #[test]
    fn an_address_that_others_can_reach_requires_insecure_bind() {
        let with = |address: &str, insecure: &str| {
            resolved(
                &[("manifests", "/"), ("mqtt", "mqtt://b"), ("http", address), ("insecure-bind", insecure)],
                &[],
                "",
            )
        };
        assert!(with("127.0.0.1:0", "false").is_ok() && with("[::1]:8080", "false").is_ok());
        assert!(with("0.0.0.0:8080", "false").unwrap_err()[0].contains("--insecure-bind"));
        assert!(with("0.0.0.0:8080", "true").is_ok());
        assert!(with("0.0.0.0:8080", "maybe").is_err());
        let probes = |address: &str| {
            resolved(&[("manifests", "/"), ("mqtt", "mqtt://b"), ("probes", address)], &[], "readiness: models\n")
        };
        let config = probes("0.0.0.0:8082").unwrap();
        assert_eq!(config.probes, ProbesSetting::Address(([0, 0, 0, 0], 8082).into()), "probes are exempt");
        assert_eq!((config.readiness, probes("off").unwrap().probes), (ReadinessMode::Models, ProbesSetting::Off));
        assert!(probes("8082").unwrap_err()[0].starts_with("--probes: `8082` is not an address"));
    }

    /// No value of a setting makes the agent panic.
    #[test]
    fn every_setting_rejects_or_accepts_any_value() {
        let long = "a/".repeat(40_000);
        let values = [
            "",
            "0",
            "-1",
            "1",
            "18446744073709551615",
            "18446744073709551616",
            "9223372036854775807",
            "1e300",
            "nan",
            "inf",
            "true",
            ",",
            ",,,",
            "=",
            "a=b,=,",
            "://",
            "mqtt://",
            "mqtt://[",
            "http://[::1",
            "\u{0}",
            "é",
            "\u{feff}",
            "/",
            "//",
            "%",
            "%ff",
            "a:65536",
            "[::]:0",
            &long,
        ];
        for setting in setting_names() {
            for value in values {
                let flags =
                    [("manifests", "/"), ("mqtt", "mqtt://b")].map(|(name, value)| (name.to_owned(), value.to_owned()));
                let mut flags = BTreeMap::from(flags);
                flags.insert(setting.clone(), value.to_owned());
                if let Err(errors) = ConfigLayers::new(Flags(flags)).resolve(ConfigErrors::default(), "edge-3") {
                    assert!(!errors.is_empty(), "--{setting} {value:.20}");
                }
            }
        }
        let with_prefix =
            |prefix: &str| resolved(&[("manifests", "/"), ("mqtt", "mqtt://b"), ("prefix", prefix)], &[], "");
        assert!(with_prefix("factory/line").is_ok() && with_prefix(&long).is_err() && with_prefix("a//b").is_err());
    }

    #[test]
    fn a_setting_has_one_name_as_flag_variable_and_key() {
        assert_eq!(
            (variable("spool-mib"), file_key("spool-mib")),
            ("LINESIDE_SPOOL_MIB".to_owned(), "spoolMiB".to_owned())
        );
    }
}
