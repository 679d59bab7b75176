//! The Lineside agent.

pub mod app;
pub mod cli;
pub mod config;
pub mod desired;
pub mod http;
pub mod message_writer;
pub mod metrics_publisher;
pub mod reconciler;
pub mod streams;
pub mod telemetry;
