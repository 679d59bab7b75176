//! Publishes the spool's records to an MQTT broker and receives operator commands.
//!
//! [`publisher::Publisher`] owns the connection: it selects a broker, opens one session at a time, sends records in JSON or
//! Sparkplug B, and reports its state as [`broker_state::BrokerState`]. [`connection`] wraps the MQTT client library.

pub mod broker_state;
pub mod command;
pub mod config;
pub mod connection;
pub mod credentials;
pub mod home_assistant;
#[cfg(any(test, feature = "loopback"))]
pub mod loopback;
pub mod metrics;
pub mod node_clash;
pub mod publisher;
pub mod sparkplug;
