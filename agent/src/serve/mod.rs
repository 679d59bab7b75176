//! What the agent serves to others.

pub mod health;
pub mod http;
