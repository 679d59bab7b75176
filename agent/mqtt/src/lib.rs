//! The MQTT publisher: connections, TLS, JSON, Sparkplug B, Home Assistant, commands.

pub mod access;
pub mod config;
pub mod connection;
pub mod home_assistant;
pub mod loopback;
pub mod order;
pub mod publisher;
pub mod sparkplug;
