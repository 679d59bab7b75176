//! The agent's own configuration.

pub mod agent;
pub mod mqtt;
