//! The MQTT configuration. It is validated, and tested, where the command line is parsed.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::command::CommandName;

/// Default of [`MqttConfig::drain_per_second`].
pub const DRAIN_DEFAULT: u64 = 2000;
/// Default of [`MqttConfig::keep_alive`] in seconds.
pub const KEEP_ALIVE_DEFAULT: u64 = 15;
const METRICS_INTERVAL_DEFAULT: Duration = Duration::from_secs(60);

/// The names of all commands, for messages about the configuration.
pub const COMMANDS: [&str; 5] = {
    let mut names = [""; 5];
    let mut index = 0;
    while index < names.len() {
        names[index] = CommandName::ALL[index].as_str();
        index += 1;
    }
    names
};

/// The brokers and how the agent publishes to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MqttConfig {
    /// At least one broker, the preferred one first.
    pub brokers: Vec<Broker>,
    /// A folder such as Kubernetes mounts for a Secret, with any of `username`, `password`, `ca.crt`, `tls.crt`, `tls.key`.
    pub secret: Option<PathBuf>,
    /// The commands that the node executes; all others are rejected. Default: none.
    pub commands: BTreeSet<CommandName>,
    /// Maximum rate at which the spool's backlog is sent, in records per second; `None` is unlimited. Default: 2000.
    pub drain_per_second: Option<u64>,
    /// Time without traffic after which a keep-alive request is sent. Default: 15 s.
    pub keep_alive: Duration,
    /// Maximum size of a message in bytes, as a packet with its topic. A larger record is set aside. Default: `None`, no limit.
    pub packet_bytes_max: Option<u64>,
    /// Interval between metrics messages; `None` sends none. Default: 60 s.
    pub metrics_every: Option<Duration>,
    /// Publishes in Sparkplug B instead of JSON. Default: `None`, JSON.
    pub sparkplug: Option<SparkplugConfig>,
    /// The prefix of Home Assistant's discovery topics; `None` publishes no discovery messages. Default: `None`.
    pub home_assistant: Option<String>,
}

impl MqttConfig {
    /// A configuration with one broker and the defaults.
    pub fn new(broker: Broker) -> Self {
        Self {
            brokers: vec![broker],
            secret: None,
            commands: BTreeSet::new(),
            drain_per_second: Some(DRAIN_DEFAULT),
            keep_alive: Duration::from_secs(KEEP_ALIVE_DEFAULT),
            packet_bytes_max: None,
            metrics_every: Some(METRICS_INTERVAL_DEFAULT),
            sparkplug: None,
            home_assistant: None,
        }
    }
}

/// The node's identity as a Sparkplug B edge node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SparkplugConfig {
    /// The group id, one topic level.
    pub group: String,
    /// The id of the primary host. While it is offline, records wait in the spool. `None`: records are sent in any case.
    pub host: Option<String>,
}

/// The address of an MQTT broker.
#[derive(Clone, PartialEq, Eq)]
pub struct Broker {
    /// Host name or IP address, an IPv6 address without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Whether the connection uses TLS.
    pub tls: bool,
    /// User name and password from the address.
    pub credentials: Option<(String, String)>,
}

/// Shows the address without the password.
impl fmt::Debug for Broker {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{self}")
    }
}

impl fmt::Display for Broker {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "mqtts" } else { "mqtt" };
        if self.host.contains(':') {
            write!(formatter, "{scheme}://[{}]:{}", self.host, self.port)
        } else {
            write!(formatter, "{scheme}://{}:{}", self.host, self.port)
        }
    }
}
