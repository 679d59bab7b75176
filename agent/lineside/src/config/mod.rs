//! The configuration of the agent: its flags, and how they are read together with variables and the configuration file.

pub mod flags;
pub mod mqtt;
pub mod probes;
pub mod settings;
pub mod sources;
