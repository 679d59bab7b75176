//! The HTTP servers: probes, metrics, status and model files of the agent; probes and metrics of the controller.

mod blobs;
pub mod controller;
pub mod health;
pub mod server;
pub mod status_store;
