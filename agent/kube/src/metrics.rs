//! The metrics of the connection to the cluster. This file has no tests: it only registers.

use lineside_common::metrics::Registrar;
use prometheus::{IntCounter, IntGauge};

/// The metrics of the connection to the cluster.
#[derive(Clone)]
pub struct KubeMetrics {
    /// 1 while the cluster is [connected](crate::ClusterState::Connected).
    pub cluster_connected: IntGauge,
    /// Seconds since the API server answered last.
    pub cluster_last_response_age: IntGauge,
    /// Failed lists and watches.
    pub cluster_watch_failures: IntCounter,
}

impl KubeMetrics {
    /// Registers the metrics, which start at zero.
    ///
    /// # Errors
    /// When a name is registered already.
    pub fn register(registrar: &Registrar) -> Result<Self, prometheus::Error> {
        Ok(Self {
            cluster_connected: registrar.gauge(
                "cluster_connected",
                "Whether the API server answers and the desired state has been listed completely.",
            )?,
            cluster_last_response_age: registrar
                .gauge("cluster_last_response_age_seconds", "Time since the API server answered last.")?,
            cluster_watch_failures: registrar
                .counter("cluster_watch_failures_total", "Lists and watches of the API server that failed.")?,
        })
    }
}
