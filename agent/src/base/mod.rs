//! What every floor above may use and what knows none of them.

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
