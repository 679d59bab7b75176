//! The metrics of the model store, of fetching and of admission.

use prometheus::{Error, IntCounter, IntGauge};

use lineside_common::metrics::Registrar;

use crate::store::Usage;

/// Metrics of the model store.
#[derive(Debug, Clone)]
pub struct StoreMetrics {
    /// `store_bytes`: bytes of blobs and partial files.
    pub bytes: IntGauge,
    /// `store_quota_bytes`: bytes the store may use.
    pub quota_bytes: IntGauge,
    /// `store_evictions_total`: evicted blobs.
    pub evictions: IntCounter,
    /// `store_index_rebuilt_total`: rebuilds of the index.
    pub index_rebuilt: IntCounter,
}

impl StoreMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// When a name is registered already.
    pub fn register(registrar: &Registrar) -> Result<Self, Error> {
        Ok(Self {
            bytes: registrar.gauge("store_bytes", "Bytes used by the model store.")?,
            quota_bytes: registrar.gauge("store_quota_bytes", "Bytes the model store may use.")?,
            evictions: registrar.counter("store_evictions_total", "Model files evicted from the store.")?,
            index_rebuilt: registrar.counter("store_index_rebuilt_total", "Rebuilds of the store index.")?,
        })
    }

    /// Sets the gauges to the usage of the store.
    pub fn set_usage(&self, usage: &Usage) {
        self.bytes.set(i64::try_from(usage.bytes).unwrap_or(i64::MAX));
        self.quota_bytes.set(i64::try_from(usage.quota_bytes).unwrap_or(i64::MAX));
    }
}

/// Metrics of fetching model files.
#[derive(Debug, Clone)]
pub struct FetchMetrics {
    /// `fetch_bytes_total{from="peer"}`: bytes of files fetched from peers.
    pub peer_bytes: IntCounter,
    /// `fetch_bytes_total{from="source"}`: bytes of files fetched from their source.
    pub source_bytes: IntCounter,
    /// `fetch_failures_total`: failed fetches.
    pub failures: IntCounter,
}

impl FetchMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// When a name is registered already.
    pub fn register(registrar: &Registrar) -> Result<Self, Error> {
        let bytes = registrar.counters("fetch_bytes_total", "Bytes of model files fetched.", &["from"])?;
        Ok(Self {
            peer_bytes: bytes.with_label_values(&["peer"]),
            source_bytes: bytes.with_label_values(&["source"]),
            failures: registrar.counter("fetch_failures_total", "Fetches of model files that failed.")?,
        })
    }
}

/// Metrics of admission.
#[derive(Debug, Clone)]
pub struct AdmissionMetrics {
    /// `admission_failures_total`: models that failed admission.
    pub failures: IntCounter,
}

impl AdmissionMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// When the name is registered already.
    pub fn register(registrar: &Registrar) -> Result<Self, Error> {
        Ok(Self { failures: registrar.counter("admission_failures_total", "Models that failed admission.")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_series_exist_before_the_first_event() {
        let registrar = Registrar::default();
        let store = StoreMetrics::register(&registrar).unwrap();
        FetchMetrics::register(&registrar).unwrap();
        AdmissionMetrics::register(&registrar).unwrap();
        store.set_usage(&Usage { bytes: 7, quota_bytes: 9, ..Usage::default() });
        let text = registrar.encode().unwrap();
        for series in [
            "lineside_store_bytes 7",
            "lineside_store_quota_bytes 9",
            "lineside_store_evictions_total 0",
            "lineside_store_index_rebuilt_total 0",
            "lineside_fetch_bytes_total{from=\"peer\"} 0",
            "lineside_fetch_bytes_total{from=\"source\"} 0",
            "lineside_fetch_failures_total 0",
            "lineside_admission_failures_total 0",
        ] {
            assert!(text.contains(series), "{series} in {text}");
        }
    }
}
