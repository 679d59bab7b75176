//! The registry of metrics. It is not global: each part registers its own metrics with the [`Registrar`] that it is given.
//!
//! Names follow the Prometheus conventions: prefix `lineside_`, base units, few labels. `docs/metrics.md` describes each metric.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

const NAMESPACE: &str = "lineside";

/// Registers metrics under the prefix `lineside_`. Each crate registers the metrics of its own.
#[derive(Clone, Default)]
pub struct Registrar(Registry);

impl Registrar {
    /// Counters with labels.
    ///
    /// # Errors
    /// When the name is registered already.
    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
        registered(&self.0, IntCounterVec::new(Opts::new(name, help).namespace(NAMESPACE), labels)?)
    }

    /// A counter without labels.
    ///
    /// # Errors
    /// When the name is registered already.
    pub fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        registered(&self.0, IntCounter::with_opts(Opts::new(name, help).namespace(NAMESPACE))?)
    }

    /// Gauges with labels.
    ///
    /// # Errors
    /// When the name is registered already.
    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
        registered(&self.0, IntGaugeVec::new(Opts::new(name, help).namespace(NAMESPACE), labels)?)
    }

    /// A gauge without labels.
    ///
    /// # Errors
    /// When the name is registered already.
    pub fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        registered(&self.0, IntGauge::with_opts(Opts::new(name, help).namespace(NAMESPACE))?)
    }

    /// A gauge whose value is computed by `compute` whenever the metrics are gathered, so that it is never older than the scrape.
    ///
    /// # Errors
    /// When the name is registered already.
    pub fn computed_gauge(
        &self,
        name: &str,
        help: &str,
        compute: impl Fn() -> i64 + Send + Sync + 'static,
    ) -> Result<(), prometheus::Error> {
        let gauge = IntGauge::with_opts(Opts::new(name, help).namespace(NAMESPACE))?;
        self.0.register(Box::new(ComputedGauge { gauge, compute }))
    }

    /// Histograms with labels and these upper bounds.
    ///
    /// # Errors
    /// When the name is registered already.
    pub fn histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> Result<HistogramVec, prometheus::Error> {
        let options = HistogramOpts::new(name, help).namespace(NAMESPACE).buckets(buckets.to_vec());
        registered(&self.0, HistogramVec::new(options, labels)?)
    }

    /// All metrics, as the `prometheus` crate describes them.
    pub fn gather(&self) -> Vec<MetricFamily> {
        self.0.gather()
    }

    /// All metrics in the Prometheus text format, version 0.0.4.
    ///
    /// # Errors
    /// When the encoder refuses, which it does not for metrics registered here.
    pub fn encode(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.0.gather())
    }
}

fn registered<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> Result<C, prometheus::Error> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

/// A gauge that is computed when it is collected.
struct ComputedGauge<F> {
    gauge: IntGauge,
    compute: F,
}

impl<F: Fn() -> i64 + Send + Sync> Collector for ComputedGauge<F> {
    fn desc(&self) -> Vec<&Desc> {
        self.gauge.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.gauge.set((self.compute)());
        self.gauge.collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicI64, Ordering};

    use super::*;

    #[test]
    fn a_computed_gauge_has_its_value_at_the_time_of_the_scrape() {
        let (registrar, value) = (Registrar::default(), Arc::new(AtomicI64::new(1)));
        let source = value.clone();
        registrar.computed_gauge("connected", "help", move || source.load(Ordering::Relaxed)).unwrap();
        assert!(registrar.encode().unwrap().contains("lineside_connected 1\n"));
        value.store(0, Ordering::Relaxed);
        assert!(registrar.encode().unwrap().contains("lineside_connected 0\n"));
        assert!(registrar.computed_gauge("connected", "help", || 0).is_err());
    }
}
