//! The streams of this node: capture, inspection, results.

pub mod capture;
pub mod inspector;
pub mod registry;
pub mod report_filter;
