//! The foundation of the workspace, which uses no other crate of it: backoff, clock, digests, durable files, address and
//! file policies, supervised tasks and child processes, heartbeats, metrics, rate limits.

pub mod backoff;
pub mod child_process;
pub mod clock;
pub mod digest;
mod error_chain;
pub mod file_roots;
pub mod files;
pub mod folder_lock;
pub mod heartbeat;
mod log_on_change;
pub mod metrics;
pub mod net;
pub mod node_memory;
pub mod process_stats;
pub mod sandbox;
pub mod secrets;
pub mod shutdown;
pub mod supervised_child;
pub mod supervisor;
pub mod tls_roots;
mod token_bucket;

pub use error_chain::error_chain;
pub use log_on_change::LogOnChange;
pub use token_bucket::TokenBucket;
