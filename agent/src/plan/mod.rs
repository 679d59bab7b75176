//! Decisions. Everything in here is a pure function of what it is given: no async, no I/O, and time is an argument.

pub mod desired;
pub mod diff;
