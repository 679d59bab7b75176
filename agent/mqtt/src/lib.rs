//! The MQTT publisher: connections, TLS, JSON, SparkplugConfig B, Home Assistant, commands.

pub mod command;
pub mod config;
pub mod connection;
pub mod credentials;
pub mod home_assistant;
pub mod loopback;
pub mod publisher;
pub mod sparkplug;
