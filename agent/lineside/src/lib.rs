//! The Lineside agent: desired models and streams in, results out over MQTT.
//!
//! This crate joins the others: it reads the configuration, follows the desired state, reconciles models and streams, and
//! serves health, metrics and status. [`app::App`] assembles it.

pub mod app;
pub mod cli;
pub mod config;
pub mod data_folder;
pub mod desired;
pub mod http;
pub mod message_writer;
pub mod metrics_publisher;
pub mod picture_check;
pub mod reconciler;
pub mod rules_child;
pub mod stream_runner;
pub mod streams;
pub mod telemetry;
