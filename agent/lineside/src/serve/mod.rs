//! What the agent serves to others.

mod blobs;
pub mod controller;
pub mod health;
pub mod http;
pub mod status;
