//! What every other crate may use and what uses none of them: backoff, clock, digests, durable files, child processes.

pub mod allocator;
pub mod backoff;
pub mod child;
pub mod clock;
pub mod digest;
pub mod files;
pub mod measure;
pub mod metrics;
pub mod secrets;
pub mod shutdown;
