//! The test suite: runs the built agent against real peers, and against scripted peers for faults. `make test` installs the
//! tools and runs it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the message")]

mod admission;
mod attack;
mod bad_input;
mod broker;
mod cameras;
mod cluster;
mod code_map;
mod command_line;
mod detect;
mod dialect;
mod endurance;
mod fetch;
mod manifests;
mod mqtt;
mod real_photos;
mod reported;
mod results;
mod signing;
mod sparkplug;
mod spool;
mod store;
mod structure;
mod swaps;
mod task_failures;
