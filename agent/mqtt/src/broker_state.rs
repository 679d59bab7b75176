//! The state of the broker connection: a `watch` value that the publisher owns and others observe.
//!
//! The gauges `mqtt_connected` and `mqtt_broker_index` are written from this state and never read back.

use std::time::SystemTime;

use tokio::sync::watch;

use crate::config::Broker;
use crate::metrics::MqttMetrics;

/// The state of the broker connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BrokerState {
    /// No connection is open.
    Disconnected {
        /// Why the last connection or attempt ended; `None` before the first attempt and after an orderly end.
        reason: Option<String>,
        /// When the last connection ended, or when the publisher was created.
        since: SystemTime,
    },
    /// A broker has accepted the connection.
    Connected {
        /// The broker's position in the configuration, from 0.
        index: usize,
        /// The broker's address without credentials.
        broker: String,
        /// When the broker accepted the connection.
        since: SystemTime,
    },
}

impl BrokerState {
    /// Whether a connection is open.
    pub fn is_connected(&self) -> bool {
        matches!(self, Self::Connected { .. })
    }
}

/// Writes the state and the gauges that follow from it.
pub(crate) struct BrokerStateWriter {
    state: watch::Sender<BrokerState>,
    metrics: MqttMetrics,
}

impl BrokerStateWriter {
    pub(crate) fn new(metrics: MqttMetrics) -> Self {
        metrics.connected.set(0);
        let disconnected = BrokerState::Disconnected { reason: None, since: SystemTime::now() };
        Self { state: watch::Sender::new(disconnected), metrics }
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<BrokerState> {
        self.state.subscribe()
    }

    pub(crate) fn set_connected(&self, index: usize, broker: &Broker) {
        self.metrics.connected.set(1);
        self.metrics.broker_index.set(i64::try_from(index).unwrap_or(i64::MAX));
        let since = SystemTime::now();
        self.state.send_replace(BrokerState::Connected { index, broker: broker.to_string(), since });
    }

    /// Ends a connection, or notes why an attempt failed. `since` is kept while no connection is open.
    pub(crate) fn set_disconnected(&self, new_reason: Option<String>) {
        self.metrics.connected.set(0);
        self.state.send_if_modified(|state| {
            let since = match state {
                BrokerState::Disconnected { reason, .. } if *reason == new_reason => return false,
                BrokerState::Disconnected { since, .. } => *since,
                BrokerState::Connected { .. } => SystemTime::now(),
            };
            *state = BrokerState::Disconnected { reason: new_reason, since };
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lineside_common::metrics::Registrar;

    #[test]
    fn gauges_follow_the_state() {
        let metrics = MqttMetrics::register(&Registrar::default()).unwrap();
        let writer = BrokerStateWriter::new(metrics.clone());
        let state = writer.subscribe();
        assert!(!state.borrow().is_connected());
        let broker =
            Broker { host: "b".to_owned(), port: 1883, tls: true, credentials: Some(("u".into(), "p".into())) };
        writer.set_connected(2, &broker);
        assert!(
            matches!(&*state.borrow(), BrokerState::Connected { index: 2, broker, .. } if broker == "mqtts://b:1883")
        );
        assert_eq!((metrics.connected.get(), metrics.broker_index.get()), (1, 2));
        writer.set_disconnected(Some("reset".to_owned()));
        assert_eq!((metrics.connected.get(), metrics.broker_index.get()), (0, 2));
        let BrokerState::Disconnected { since: first, .. } = *state.borrow() else { panic!("connected") };
        writer.set_disconnected(Some("refused".to_owned()));
        let expected = BrokerState::Disconnected { reason: Some("refused".to_owned()), since: first };
        assert_eq!(*state.borrow(), expected, "the time of the first failure is kept");
    }

    #[test]
    fn a_repeated_reason_is_not_announced_again() {
        let writer = BrokerStateWriter::new(MqttMetrics::register(&Registrar::default()).unwrap());
        let mut state = writer.subscribe();
        writer.set_disconnected(Some("refused".to_owned()));
        assert!(state.has_changed().unwrap());
        state.mark_unchanged();
        writer.set_disconnected(Some("refused".to_owned()));
        assert!(!state.has_changed().unwrap());
    }
}
