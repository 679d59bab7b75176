//! The suite: the built agent against real peers. `make test` installs what it needs and runs it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the message")]

mod bad_input;
mod broker;
mod cameras;
mod cluster;
mod command_line;
mod detect;
mod endurance;
mod fetch;
mod manifests;
mod mqtt;
mod photos;
mod results;
mod sparkplug;
mod spool;
mod store;
mod structure;
mod swaps;
mod trust;
mod vet;
