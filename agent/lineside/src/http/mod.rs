//! What the agent serves to others.

mod blobs;
pub mod controller;
pub mod health;
pub mod server;
pub mod status_store;
