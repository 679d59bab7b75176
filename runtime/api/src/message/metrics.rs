//! The metrics of a node, for sites without a Prometheus server.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Serialize;

/// The metrics of `/metrics` with their changes within a period, published with QoS 1 on `{prefix}/v1/{site}/{node}/metrics`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct MetricsMessage<'a> {
    /// End of the period, RFC 3339 in UTC.
    pub ts: String,
    /// Name of the site.
    pub site: &'a str,
    /// Name of the node.
    pub node: &'a str,
    /// Length of the period in seconds.
    pub seconds: f64,
    /// All series.
    pub series: Vec<Series>,
    /// `false` while the clock of the node has never been set. `ts` is then meaningless.
    pub clock_synced: bool,
    /// Whether the message is older than the connection that delivers it. Always the last field.
    pub historical: bool,
}

/// One series: a metric with one combination of labels.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Series {
    /// Name of the metric, as on `/metrics`.
    pub name: String,
    /// Labels of the series.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(default)]
    pub labels: BTreeMap<String, String>,
    /// Value of the series; its fields depend on the type of the metric.
    #[serde(flatten)]
    pub value: SeriesValue,
}

/// The value of a series.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum SeriesValue {
    /// A counter.
    Counter {
        /// Value since the start of the agent.
        total: f64,
        /// Increase within the period.
        increase: f64,
    },
    /// A gauge.
    Gauge {
        /// Value at the end of the period.
        value: f64,
    },
    /// A distribution of the observations within the period. A series without observations is absent.
    Distribution {
        /// Number of observations.
        count: u64,
        /// Mean of the observations.
        mean: f64,
        /// Median, interpolated within its bucket.
        p50: f64,
        /// 99th percentile, interpolated within its bucket.
        p99: f64,
    },
}
