//! What every other crate may use and what uses none of them: backoff, clock, digests, durable files, child processes.

pub mod allocator;
pub mod backoff;
pub mod child_process;
pub mod clock;
pub mod digest;
pub mod files;
pub mod metrics;
pub mod process_stats;
pub mod secrets;
pub mod shutdown;
