//! Publishes metrics over MQTT, for sites without a Prometheus server. Each message contains the series of `/metrics` and their
//! changes since the previous message.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lineside_api::message::{Series, SeriesValue};
use lineside_common::metrics::Registrar;
use prometheus::proto::{Metric, MetricFamily, MetricType};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::message_writer::MessageWriter;

/// Publishes a message at each interval until `stop`. `refresh` updates the gauges that are only set on demand.
pub async fn publish_metrics(
    registrar: Registrar,
    messages: Arc<MessageWriter>,
    interval: Duration,
    refresh: impl Fn(),
    stop: CancellationToken,
) {
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + interval, interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut deltas = SeriesDeltas::default();
    deltas.update(&registrar.gather());
    let mut last_publish = Instant::now();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        refresh();
        let series = deltas.update(&registrar.gather());
        let now = Instant::now();
        messages.metrics(now.duration_since(last_publish).as_secs_f64(), series);
        last_publish = now;
    }
}

/// Name and labels of a series.
type Key = (String, BTreeMap<String, String>);

/// The values of the previous message, from which the changes are computed.
#[derive(Default)]
struct SeriesDeltas {
    counters: HashMap<Key, f64>,
    /// Cumulative bucket counts, and the sum of the observations.
    distributions: HashMap<Key, (Vec<u64>, f64)>,
}

impl SeriesDeltas {
    /// All series with their changes since the last call.
    fn update(&mut self, families: &[MetricFamily]) -> Vec<Series> {
        let mut series = Vec::new();
        for family in families {
            for metric in family.get_metric() {
                let labels: BTreeMap<String, String> =
                    metric.get_label().iter().map(|pair| (pair.name().to_owned(), pair.value().to_owned())).collect();
                let name = family.name().to_owned();
                let value = match family.get_field_type() {
                    MetricType::COUNTER => Some(self.counter(&name, &labels, metric.get_counter().get_value())),
                    MetricType::GAUGE => Some(SeriesValue::Gauge { value: metric.get_gauge().get_value() }),
                    _ => self.distribution(&name, &labels, metric),
                };
                series.extend(value.map(|value| Series { name, labels, value }));
            }
        }
        series
    }

    fn counter(&mut self, name: &str, labels: &BTreeMap<String, String>, total: f64) -> SeriesValue {
        let before = self.counters.insert((name.to_owned(), labels.clone()), total).unwrap_or(0.0);
        SeriesValue::Counter { total, increase: total - before }
    }

    fn distribution(&mut self, name: &str, labels: &BTreeMap<String, String>, metric: &Metric) -> Option<SeriesValue> {
        let histogram = metric.get_histogram();
        let bounds: Vec<f64> = histogram.get_bucket().iter().map(|bucket| bucket.upper_bound()).collect();
        let mut counts: Vec<u64> = histogram.get_bucket().iter().map(|bucket| bucket.cumulative_count()).collect();
        counts.push(histogram.get_sample_count());
        let sum = histogram.get_sample_sum();
        let (before, sum_before) = self
            .distributions
            .insert((name.to_owned(), labels.clone()), (counts.clone(), sum))
            .unwrap_or_else(|| (vec![0; counts.len()], 0.0));
        let increase: Vec<u64> =
            counts.iter().zip(before).map(|(count, before)| count.saturating_sub(before)).collect();
        let count = *increase.last()?;
        (count > 0).then(|| SeriesValue::Distribution {
            count,
            mean: (sum - sum_before) / count as f64,
            p50: quantile(&bounds, &increase, 0.5),
            p99: quantile(&bounds, &increase, 0.99),
        })
    }
}

/// Estimates a quantile from cumulative bucket counts, of which the last one is the count of all observations. Interpolates within
/// the bucket, as `histogram_quantile` of Prometheus does. Above the last bound the result is that bound.
fn quantile(bounds: &[f64], cumulative: &[u64], quantile: f64) -> f64 {
    let total = cumulative.last().copied().unwrap_or(0);
    let rank = quantile * total as f64;
    let index = cumulative.iter().position(|count| *count as f64 >= rank).unwrap_or(0);
    let Some(upper) = bounds.get(index) else { return bounds.last().copied().unwrap_or(0.0) };
    let (lower, below) = match index.checked_sub(1) {
        Some(before) => (bounds[before], cumulative[before]),
        None => (0.0, 0),
    };
    let within = (cumulative[index] - below).max(1) as f64;
    lower + (upper - lower) * (rank - below as f64) / within
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(series: &[Series], name: &str) -> Option<SeriesValue> {
        series.iter().find(|series| series.name == name).map(|series| series.value.clone())
    }

    #[test]
    fn update_returns_the_changes_of_the_period() {
        let registrar = Registrar::default();
        let results = registrar.counter("results_total", "results").unwrap();
        let connected = registrar.gauge("connected", "connected").unwrap();
        let durations = registrar.histograms("duration_seconds", "duration", &["phase"], &[0.002, 0.004]).unwrap();
        let mut deltas = SeriesDeltas::default();
        results.inc_by(5);
        deltas.update(&registrar.gather());
        results.inc_by(2);
        connected.set(1);
        let phase = durations.with_label_values(&["infer"]);
        (0..100).for_each(|_| phase.observe(0.003));
        let series = deltas.update(&registrar.gather());
        let counter = SeriesValue::Counter { total: 7.0, increase: 2.0 };
        assert_eq!(find(&series, "lineside_results_total"), Some(counter));
        assert_eq!(find(&series, "lineside_connected"), Some(SeriesValue::Gauge { value: 1.0 }));
        let Some(SeriesValue::Distribution { count, mean, p50, p99 }) = find(&series, "lineside_duration_seconds")
        else {
            panic!("no distribution")
        };
        assert!(count == 100 && (mean - 0.003).abs() < 1e-9);
        assert!((0.002..=0.004).contains(&p50) && p99 > p50 && p99 <= 0.004, "{p50} {p99}");
        let quiet = deltas.update(&registrar.gather());
        assert_eq!(find(&quiet, "lineside_duration_seconds"), None, "nothing was observed");
    }

    #[test]
    fn quantiles_are_interpolated_as_in_prometheus() {
        let bounds = [1.0, 2.0, 4.0];
        assert_eq!(quantile(&bounds, &[10, 10, 10, 10], 0.5), 0.5);
        assert_eq!(quantile(&bounds, &[0, 5, 10, 10], 0.5), 2.0);
        assert_eq!(quantile(&bounds, &[0, 0, 0, 10], 0.99), 4.0, "above the last bound");
    }
}
