//! The metrics of the MQTT publisher.

use prometheus::{IntCounter, IntCounterVec, IntGauge};

use lineside_common::metrics::Registrar;

/// What the publisher counts. Clones share the values. Gauges are written from the publisher's state and never read back. The gauge
/// `mqtt_connected` is that of [`BrokerStateReader`](crate::broker_state::BrokerStateReader).
#[derive(Clone)]
pub struct MqttMetrics {
    /// `mqtt_published_total`: messages that the broker acknowledged.
    pub published: IntCounter,
    /// `mqtt_results_published_total`: results among them.
    pub results_published: IntCounter,
    /// `mqtt_broker_index`: position in the list of brokers, from 0, of the broker that was connected last.
    pub broker_index: IntGauge,
    /// `mqtt_certificate_expiry_timestamp_seconds`: seconds since 1970; 0 without a client certificate.
    pub certificate_expiry: IntGauge,
    /// `mqtt_received_total`.
    pub received: ReceivedCounters,
}

impl MqttMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// When one of the names is registered already.
    pub fn register(registrar: &Registrar) -> Result<Self, prometheus::Error> {
        let received =
            registrar.counters("mqtt_received_total", "Commands and triggers received.", &ReceivedCounters::LABELS)?;
        Ok(Self {
            published: registrar.counter("mqtt_published_total", "Messages acknowledged by the broker.")?,
            results_published: registrar
                .counter("mqtt_results_published_total", "Results acknowledged by the broker.")?,
            broker_index: registrar.gauge(
                "mqtt_broker_index",
                "Position in the list of brokers, from 0, of the broker that was connected last.",
            )?,
            certificate_expiry: registrar.gauge(
                "mqtt_certificate_expiry_timestamp_seconds",
                "When the client certificate for the broker expires; 0 without one.",
            )?,
            received: ReceivedCounters::new(&received),
        })
    }
}

/// The kinds of messages that are received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReceivedKind {
    Command,
    Trigger,
}

/// What happened to a received message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReceivedOutcome {
    /// The command completed.
    Ok,
    /// The command was rejected or failed.
    Refused,
    /// The message had been retained by the broker, and was ignored.
    Stale,
    /// Triggers are not implemented; the message was ignored.
    Unused,
}

impl ReceivedKind {
    fn label(self) -> &'static str {
        match self {
            Self::Command => "command",
            Self::Trigger => "trigger",
        }
    }
}

impl ReceivedOutcome {
    fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::Stale => "stale",
            Self::Unused => "unused",
        }
    }
}

/// The counters of received messages, one for each combination of kind and outcome that occurs.
#[derive(Clone)]
pub struct ReceivedCounters {
    /// Commands that completed.
    pub command_ok: IntCounter,
    /// Commands that were rejected or failed.
    pub command_refused: IntCounter,
    /// Retained commands, which are ignored.
    pub command_stale: IntCounter,
    /// Triggers, which are ignored.
    pub trigger_unused: IntCounter,
}

impl ReceivedCounters {
    /// The labels of the counter.
    pub const LABELS: [&str; 2] = ["kind", "outcome"];

    /// Looks the counters up in a counter with [`Self::LABELS`].
    pub fn new(received: &IntCounterVec) -> Self {
        let counter =
            |kind: ReceivedKind, outcome: ReceivedOutcome| received.with_label_values(&[kind.label(), outcome.label()]);
        Self {
            command_ok: counter(ReceivedKind::Command, ReceivedOutcome::Ok),
            command_refused: counter(ReceivedKind::Command, ReceivedOutcome::Refused),
            command_stale: counter(ReceivedKind::Command, ReceivedOutcome::Stale),
            trigger_unused: counter(ReceivedKind::Trigger, ReceivedOutcome::Unused),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_registered_with_their_public_names() {
        let registrar = Registrar::default();
        let metrics = MqttMetrics::register(&registrar).unwrap();
        metrics.received.command_stale.inc();
        let text = registrar.encode().unwrap();
        for line in [
            "lineside_mqtt_published_total 0",
            "lineside_mqtt_results_published_total 0",
            "lineside_mqtt_broker_index 0",
            "lineside_mqtt_certificate_expiry_timestamp_seconds 0",
            "lineside_mqtt_received_total{kind=\"command\",outcome=\"ok\"} 0",
            "lineside_mqtt_received_total{kind=\"command\",outcome=\"refused\"} 0",
            "lineside_mqtt_received_total{kind=\"command\",outcome=\"stale\"} 1",
            "lineside_mqtt_received_total{kind=\"trigger\",outcome=\"unused\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(MqttMetrics::register(&registrar).is_err());
    }
}
