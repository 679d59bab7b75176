//! The Lineside agent: desired models and streams in, results out over MQTT.
//!
//! The modules stand on floors, and a lower one never imports a higher one (a test sees to it):
//!
//! ```text
//! 6  app, telemetry, commands           wiring
//! 5  tasks                              the loops, one owner each
//! 4  camera, fetch, mqtt, serve, vet    one folder per outside world
//! 3  spool, outbox, roster, slot,        where the planes meet, and what is kept on disk
//!    frames, store
//! 2  plan                               decisions: pure, no I/O, time as an argument
//! 1  config, message, status, trust,     what is written down, and what is said
//!    verdict
//! 0  base                               clock, shutdown, backoff, digest, metrics
//! ```

pub mod app;
pub mod base;
pub mod bundle;
pub mod camera;
pub mod cluster;
pub mod commands;
pub mod config;
pub mod fetch;
pub mod frames;
pub mod last_good;
pub mod manifests;
pub mod message;
pub mod mqtt;
pub mod outbox;
pub mod plan;
pub mod roster;
pub mod serve;
pub mod slot;
pub mod spool;
pub mod status;
pub mod store;
pub mod tasks;
pub mod telemetry;
pub mod trust;
pub mod verdict;
pub mod vet;
