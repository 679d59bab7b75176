//! The Lineside agent.

pub mod app;
pub mod commands;
pub mod config;
pub mod deploy;
pub mod desired;
pub mod measure;
pub mod outbox;
pub mod serve;
pub mod streams;
pub mod telemetry;
