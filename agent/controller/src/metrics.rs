//! The metrics of the controller. This file has no tests: it only registers.

use lineside_common::metrics::Registrar;
use prometheus::{IntCounter, IntGauge};

/// The metrics of the controller.
#[derive(Clone)]
pub struct ControllerMetrics {
    /// 1 while this controller leads.
    pub leader: IntGauge,
    /// Nodes whose agents report.
    pub reporting_nodes: IntGauge,
    /// Nodes whose agents do not report.
    pub unreachable_nodes: IntGauge,
    /// Statuses written.
    pub status_writes: IntCounter,
    /// Writes and deletions that failed.
    pub failures: IntCounter,
}

impl ControllerMetrics {
    /// Registers the metrics, which start at zero.
    ///
    /// # Errors
    /// When a name is registered already.
    pub fn register(registrar: &Registrar) -> Result<Self, prometheus::Error> {
        let nodes = registrar.gauges("controller_nodes", "EdgeNodes, by whether their agents report.", &["state"])?;
        Ok(Self {
            leader: registrar.gauge("controller_leader", "Whether this controller leads.")?,
            reporting_nodes: nodes.with_label_values(&["reporting"]),
            unreachable_nodes: nodes.with_label_values(&["unreachable"]),
            status_writes: registrar.counter("controller_status_writes_total", "Statuses written.")?,
            failures: registrar.counter("controller_failures_total", "Writes and deletions that failed.")?,
        })
    }
}
