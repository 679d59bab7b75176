//! Model artifacts: fetch, store, signatures, admission, bundles, last-good versions.

pub mod bundle;
mod config;
pub mod fetch;
pub mod last_good;
pub mod store;
pub mod trust;
pub mod vet;

pub use config::ModelsConfig;
