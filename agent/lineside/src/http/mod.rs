//! The HTTP servers: probes, metrics, status and model files of the agent; probes and metrics of the controller.

mod blobs;
mod connection_table;
pub mod controller;
pub mod health;
pub mod routes;
pub mod server;
pub mod status_store;
mod tracked;
