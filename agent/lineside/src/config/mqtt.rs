//! The settings of MQTT and of the spool.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use percent_encoding::percent_decode_str;
use url::Url;

use super::settings::ConfigLayers;
use lineside_api::names::{ConfigErrors, topic_segment};
use lineside_mqtt::config::{Broker, COMMANDS, DRAIN_DEFAULT, KEEP_ALIVE_DEFAULT, MqttConfig, SparkplugConfig};
use lineside_spool::{SPOOL_MIB_DEFAULT, SpoolConfig, WhenFull};

const MQTT_PORT: u16 = 1883;
const MQTTS_PORT: u16 = 8883;
/// The maximum that MQTT defines.
const PACKET_BYTES_MAX: u64 = 256 << 20;
const BROKERS_MAX: usize = 8;
const SPOOL_MIB_MAX: u64 = 1 << 20;
const HOURS_MAX: u64 = 24 * 3660;

/// The settings of MQTT; `None` when there is no broker.
pub(super) fn resolve(layers: &ConfigLayers, errors: &mut ConfigErrors) -> Option<MqttConfig> {
    let place = |setting: &'static str| layers.get(setting).1;
    let (_, mqtt) = (errors.require(&place("mqtt"), layers.text("mqtt")), place("mqtt"));
    let brokers: Vec<Broker> = layers.list("mqtt").filter_map(|url| errors.take(&mqtt, broker(&url))).collect();
    if brokers.len() > BROKERS_MAX {
        errors.add(&mqtt, format!("has {} brokers; at most {BROKERS_MAX} are allowed", brokers.len()));
    }
    let secret = layers.text("mqtt-secret").map(PathBuf::from);
    if let Some(folder) = secret.as_ref().filter(|folder| !folder.is_dir()) {
        errors.add(place("mqtt-secret"), format!("{} is not a folder; mount the Secret there", folder.display()));
    }
    let commands: BTreeSet<String> = layers.list("mqtt-commands").collect();
    for unknown in commands.iter().filter(|name| !COMMANDS.contains(&name.as_str())) {
        errors.add(
            place("mqtt-commands"),
            format!("`{unknown}` is not a command; the commands are {}", COMMANDS.join(", ")),
        );
    }
    let mut segment = |setting: &'static str| {
        let text = layers.text(setting)?.to_owned();
        errors.take(&layers.get(setting).1, topic_segment(&text)).map(|()| text)
    };
    let (group, host) = (segment("sparkplug-group"), segment("sparkplug-host"));
    let home_assistant = segment("home-assistant");
    if host.is_some() && group.is_none() {
        errors.add(place("sparkplug-host"), "--sparkplug-group is required, because it enables Sparkplug B");
    }
    if home_assistant.is_some() && group.is_some() {
        errors.add(
            place("home-assistant"),
            "cannot be combined with --sparkplug-group, because discovery describes the JSON topics",
        );
    }
    let drain_per_second = match layers.number("mqtt-drain", DRAIN_DEFAULT, 0..=1_000_000, errors) {
        0 => None,
        rate => Some(rate),
    };
    let metrics_every = match layers.number("mqtt-metrics-seconds", 60, 0..=86_400, errors) {
        0 => None,
        seconds => Some(Duration::from_secs(seconds)),
    };
    let packet_bytes_max = match layers.number("mqtt-max-packet-bytes", 0, 0..=PACKET_BYTES_MAX, errors) {
        0 => None,
        bytes => Some(bytes),
    };
    let keep_alive = layers.number("mqtt-keep-alive-seconds", KEEP_ALIVE_DEFAULT, 2..=3600, errors);
    let mqtt = MqttConfig {
        brokers,
        secret,
        commands: commands.iter().filter_map(|name| name.parse().ok()).collect(),
        drain_per_second,
        keep_alive: Duration::from_secs(keep_alive),
        packet_bytes_max,
        metrics_every,
        sparkplug: group.map(|group| SparkplugConfig { group, host }),
        home_assistant,
    };
    (!mqtt.brokers.is_empty()).then_some(mqtt)
}

/// The settings of the spool. Invalid ones are added to the errors and have their default.
pub(super) fn spooling(layers: &ConfigLayers, errors: &mut ConfigErrors) -> SpoolConfig {
    let hours = layers.number("spool-max-hours", 0, 0..=HOURS_MAX, errors);
    let when_full = match layers.text("spool-when-full") {
        None | Some("drop-oldest") => WhenFull::DropOldest,
        Some("drop-newest") => WhenFull::DropNewest,
        Some(other) => {
            errors.add(layers.get("spool-when-full").1, format!("`{other}` is not drop-oldest or drop-newest"));
            WhenFull::DropOldest
        }
    };
    SpoolConfig {
        bytes_max: layers.number("spool-mib", SPOOL_MIB_DEFAULT, 1..=SPOOL_MIB_MAX, errors) << 20,
        age_max_seconds: u32::try_from(hours * 3600).unwrap_or(u32::MAX),
        sync_interval: Duration::from_millis(layers.number("spool-sync-ms", 200, 0..=60_000, errors)),
        when_full,
    }
}

fn broker(text: &str) -> Result<Broker, String> {
    let url = Url::parse(text).map_err(|error| format!("is not a URL such as mqtt://broker:1883: {error}"))?;
    let (tls, port) = match url.scheme() {
        "mqtt" => (false, MQTT_PORT),
        "mqtts" => (true, MQTTS_PORT),
        other => return Err(format!("{other}: is not supported; use mqtt://broker:1883 or mqtts://broker:8883")),
    };
    if !matches!(url.path(), "" | "/") || url.query().is_some() {
        return Err("must contain only a host and a port".to_owned());
    }
    let host = url.host_str().filter(|host| !host.is_empty()).ok_or("has no host")?;
    let decoded = |text: &str| {
        let text = percent_decode_str(text).decode_utf8();
        text.map(Cow::into_owned).map_err(|_| "has a user or password that is not UTF-8")
    };
    let credentials = match (url.username(), url.password()) {
        ("", None) => None,
        (user, password) => Some((decoded(user)?, decoded(password.unwrap_or_default())?)),
    };
    Ok(Broker {
        host: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
        port: url.port().unwrap_or(port),
        tls,
        credentials,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::flags::Flags;

    fn read(flags: &[(&str, &str)]) -> (Option<MqttConfig>, SpoolConfig, Vec<String>) {
        let flags = flags.iter().map(|(setting, value)| ((*setting).to_owned(), (*value).to_owned()));
        let layers = ConfigLayers::new(Flags(flags.collect()));
        let mut errors = ConfigErrors::default();
        (resolve(&layers, &mut errors), spooling(&layers, &mut errors), errors.into_list())
    }

    #[test]
    fn brokers_are_in_the_given_order() {
        let (mqtt, spooling, errors) = read(&[("mqtt", "mqtts://a, mqtt://b:1884,mqtt://[::1]")]);
        assert!(errors.is_empty(), "{errors:?}");
        let shown: Vec<String> = mqtt.unwrap().brokers.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["mqtts://a:8883", "mqtt://b:1884", "mqtt://[::1]:1883"]);
        assert_eq!(spooling, SpoolConfig::default());
    }

    #[test]
    fn the_password_of_a_broker_is_decoded_and_never_printed() {
        let broker = broker("mqtt://line:s%40crt@[::1]:1884").unwrap();
        assert_eq!(broker.credentials, Some(("line".to_owned(), "s@crt".to_owned())));
        assert_eq!(format!("{broker} {broker:?}"), "mqtt://[::1]:1884 mqtt://[::1]:1884");
        for wrong in ["", "broker", "mqtt://", "mqtt:///x", "http://b", "mqtt://b/topic", "mqtt://b:99999"] {
            assert!(super::broker(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_error_has_the_name_of_its_setting() {
        let (mqtt, _, errors) = read(&[
            ("mqtt", "mqtt://a,ftp://b"),
            ("mqtt-secret", "/no/such/folder"),
            ("mqtt-commands", "pause,explode"),
            ("mqtt-drain", "-1"),
            ("sparkplug-host", "scada"),
            ("home-assistant", "a/b"),
            ("spool-mib", "0"),
            ("spool-when-full", "block"),
        ]);
        assert!(mqtt.is_some());
        for expected in [
            "--mqtt: ftp: is not supported",
            "--mqtt-secret: /no/such/folder is not a folder",
            "--mqtt-commands: `explode` is not a command",
            "--mqtt-drain: `-1`",
            "--sparkplug-host: --sparkplug-group is required",
            "--home-assistant: `a/b`",
            "--spool-mib: `0`",
            "--spool-when-full: `block`",
        ] {
            assert!(errors.iter().any(|error| error.starts_with(expected)), "{expected}\n{errors:#?}");
        }
        assert_eq!(read(&[]).2, ["--mqtt: is missing"]);
    }
}
