//! The metrics of the connection to the cluster. This file has no tests: it only registers.

use lineside_common::metrics::Registrar;
use prometheus::IntCounter;

/// The counters of the connection to the cluster. Its gauges are those of [`ClusterStateReader`](crate::ClusterStateReader).
#[derive(Clone)]
pub struct KubeMetrics {
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
            cluster_watch_failures: registrar
                .counter("cluster_watch_failures_total", "Lists and watches of the API server that failed.")?,
        })
    }
}
