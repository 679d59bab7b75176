//! Model artifacts: fetch, store, signatures, admission, bundles, last-good versions.

pub mod admission;
pub mod bundle;
mod config;
pub mod fetch;
pub mod last_good;
pub mod signing;
pub mod store;

pub use config::ModelsConfig;
