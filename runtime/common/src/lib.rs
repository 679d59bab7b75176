//! What every other crate may use and what uses none of them: backoff, clock, digests, durable files, child processes.

pub mod allocator;
pub mod backoff;
pub mod child_process;
pub mod clock;
pub mod digest;
mod error_chain;
pub mod files;
mod log_on_change;
pub mod metrics;
pub mod process_stats;
pub mod secrets;
pub mod shutdown;
pub mod supervisor;
mod token_bucket;

pub use error_chain::error_chain;
pub use log_on_change::LogOnChange;
pub use token_bucket::TokenBucket;
