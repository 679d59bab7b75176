//! The worker that serves one model version.
