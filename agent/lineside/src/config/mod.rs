//! The agent's own configuration.

pub mod mqtt;
pub mod settings;
