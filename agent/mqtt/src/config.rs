//! The settings of MQTT.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Records of the backlog sent per second where the configuration does not say.
pub const DRAIN_DEFAULT: u64 = 2000;
/// Seconds of silence after which a broker is probed where the configuration does not say.
pub const KEEP_ALIVE_DEFAULT: u64 = 15;

/// The commands there are.
pub const COMMANDS: [&str; 5] = ["log-level", "pause", "reload", "resume", "snapshot"];

/// Brokers, and what is said to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MqttConfig {
    /// Brokers, the preferred one first; at least one.
    pub brokers: Vec<Broker>,
    /// The folder of a mounted secret: `username`, `password`, `ca.crt`, `tls.crt`, `tls.key`, each where it is needed.
    pub secret: Option<PathBuf>,
    /// Commands that are carried out.
    pub commands: BTreeSet<String>,
    /// Records of the backlog sent per second at most; `None` is as fast as the broker takes them.
    pub drain_per_second: Option<u64>,
    /// Silence after which the connection is probed.
    pub keep_alive: Duration,
    /// How often the metrics are sent; `None` is never.
    pub metrics_every: Option<Duration>,
    /// SparkplugConfig B instead of JSON.
    pub sparkplug: Option<SparkplugConfig>,
    /// The prefix of Home Assistant's discovery topics, where it is wanted.
    pub home_assistant: Option<String>,
}

impl MqttConfig {
    /// One broker, and everything else as it usually is.
    pub fn to(broker: Broker) -> Self {
        Self {
            brokers: vec![broker],
            secret: None,
            commands: BTreeSet::new(),
            drain_per_second: Some(DRAIN_DEFAULT),
            keep_alive: Duration::from_secs(KEEP_ALIVE_DEFAULT),
            metrics_every: Some(Duration::from_secs(60)),
            sparkplug: None,
            home_assistant: None,
        }
    }
}

/// Who the node is in SparkplugConfig B.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SparkplugConfig {
    /// The group it belongs to.
    pub group: String,
    /// The primary host; while it is offline, results wait.
    pub host: Option<String>,
}

/// An MQTT broker's address.
#[derive(Clone, PartialEq, Eq)]
pub struct Broker {
    /// Host name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Whether the connection is encrypted.
    pub tls: bool,
    /// User and password, where they stand in the address.
    pub credentials: Option<(String, String)>,
}

/// Shown without the password.
impl fmt::Debug for Broker {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{self}")
    }
}

impl fmt::Display for Broker {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "mqtts" } else { "mqtt" };
        match self.host.contains(':') {
            true => write!(formatter, "{scheme}://[{}]:{}", self.host, self.port),
            false => write!(formatter, "{scheme}://{}:{}", self.host, self.port),
        }
    }
}
