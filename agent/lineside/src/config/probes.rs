//! The settings of the probes: their listener, and what readiness means.

use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;

/// The listener for `/livez`, `/readyz` and `/metrics`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ProbesSetting {
    /// [`ProbesSetting::DEFAULT`], unless it is in use: several agents on one machine all start.
    #[default]
    Default,
    /// No listener; the HTTP server answers the probes.
    Off,
    /// This address, which must be free. Port 0 selects a free port.
    Address(SocketAddr),
}

impl ProbesSetting {
    /// The address that is used when none is configured.
    pub const DEFAULT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8082);
}

/// A text that is not a valid value of a setting in this file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {expected}")]
pub struct ProbesSettingError {
    text: String,
    expected: &'static str,
}

impl FromStr for ProbesSetting {
    type Err = ProbesSettingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected = "an address and port, such as 0.0.0.0:8082, or off";
        match text {
            "off" => Ok(Self::Off),
            text => {
                let address = text.parse().map_err(|_| ProbesSettingError { text: text.to_owned(), expected })?;
                Ok(Self::Address(address))
            }
        }
    }
}

/// What `/readyz` reports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ReadinessMode {
    /// The agent is ready once its desired state was read and what can serve was restored; models and streams never take this
    /// away. For a DaemonSet, which replaces all pods that are not ready at once.
    #[default]
    Agent,
    /// The agent is ready while every desired model serves, and there is at least one. For central serving.
    Models,
}

impl FromStr for ReadinessMode {
    type Err = ProbesSettingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "agent" => Ok(Self::Agent),
            "models" => Ok(Self::Models),
            text => Err(ProbesSettingError { text: text.to_owned(), expected: "agent or models" }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_listener_is_an_address_or_off() {
        assert_eq!("off".parse(), Ok(ProbesSetting::Off));
        assert_eq!("0.0.0.0:8082".parse(), Ok(ProbesSetting::Address(([0, 0, 0, 0], 8082).into())));
        for invalid in ["", "8082", "localhost:8082", "OFF", "0.0.0.0:65536"] {
            let error = invalid.parse::<ProbesSetting>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("`{invalid}` is not an address and port")), "{error}");
        }
    }

    #[test]
    fn readiness_is_that_of_the_agent_or_of_the_models() {
        assert_eq!(("agent".parse(), "models".parse()), (Ok(ReadinessMode::Agent), Ok(ReadinessMode::Models)));
        assert_eq!("streams".parse::<ReadinessMode>().unwrap_err().to_string(), "`streams` is not agent or models");
    }
}
