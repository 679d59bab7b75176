//! Model artifacts: fetching, the model store, signatures, admission, bundles and last-good versions.
//!
//! ```text
//! signing (verify) -> fetch -> store -> admission -> (loaded by the reconciler) -> last_good
//!                     bundle (import) --^
//! ```
//!
//! The reconciler calls the modules in this order. A model file is loaded only after its digest was verified and
//! admission accepted it on this node.

pub mod admission;
pub mod bundle;
mod config;
pub mod fetch;
pub mod last_good;
mod metrics;
pub mod signing;
pub mod store;

pub use config::ModelsConfig;
pub use metrics::{AdmissionMetrics, FetchMetrics, StoreMetrics};
