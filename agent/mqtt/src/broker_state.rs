//! The state of the broker connection: a `watch` value that the publisher owns and others observe.
//!
//! The publisher sends heartbeats while it runs. Without them the state is stale, and counts as disconnected. The gauge
//! `mqtt_connected` is computed from both at each scrape.

use std::time::{Instant, SystemTime};

use lineside_common::heartbeat::TaskHeartbeat;
use lineside_common::metrics::Registrar;
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

/// Reads the state, with regard to the age of the publisher's last heartbeat. Clones read the same state.
#[derive(Debug, Clone)]
pub struct BrokerStateReader {
    state: watch::Receiver<BrokerState>,
    heartbeat: TaskHeartbeat,
}

impl BrokerStateReader {
    /// The state at `now`: disconnected when the publisher has sent no heartbeat for too long.
    pub fn at(&self, now: Instant) -> BrokerState {
        let state = self.state.borrow().clone();
        if state.is_connected() && self.heartbeat.is_stale(now) {
            let age = self.heartbeat.age(now);
            let since = SystemTime::now().checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH);
            let reason = format!("the publisher has not reported for {} s", age.as_secs());
            return BrokerState::Disconnected { reason: Some(reason), since };
        }
        state
    }

    /// Registers the gauge `mqtt_connected`.
    ///
    /// # Errors
    /// When the name is registered already.
    pub fn register_gauge(&self, registrar: &Registrar) -> Result<(), prometheus::Error> {
        let reader = self.clone();
        registrar.computed_gauge("mqtt_connected", "Whether a broker connection is open.", move || {
            i64::from(reader.at(Instant::now()).is_connected())
        })
    }
}

/// Writes the state and the gauge `mqtt_broker_index`, which follows from it.
pub(crate) struct BrokerStateWriter {
    state: watch::Sender<BrokerState>,
    heartbeat: TaskHeartbeat,
    metrics: MqttMetrics,
}

impl BrokerStateWriter {
    pub(crate) fn new(metrics: MqttMetrics) -> Self {
        let disconnected = BrokerState::Disconnected { reason: None, since: SystemTime::now() };
        Self { state: watch::Sender::new(disconnected), heartbeat: TaskHeartbeat::new(Instant::now()), metrics }
    }

    pub(crate) fn reader(&self) -> BrokerStateReader {
        BrokerStateReader { state: self.state.subscribe(), heartbeat: self.heartbeat.clone() }
    }

    #[cfg(test)]
    pub(crate) fn subscribe(&self) -> watch::Receiver<BrokerState> {
        self.state.subscribe()
    }

    /// Records that the publisher runs.
    pub(crate) fn beat(&self, now: Instant) {
        self.heartbeat.beat(now);
    }

    pub(crate) fn set_connected(&self, index: usize, broker: &Broker) {
        self.metrics.broker_index.set(i64::try_from(index).unwrap_or(i64::MAX));
        let since = SystemTime::now();
        self.state.send_replace(BrokerState::Connected { index, broker: broker.to_string(), since });
    }

    /// Ends a connection, or notes why an attempt failed. `since` is kept while no connection is open.
    pub(crate) fn set_disconnected(&self, new_reason: Option<String>) {
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
    use lineside_common::heartbeat::STALE_AFTER;

    #[test]
    fn gauges_follow_the_state() {
        let registrar = Registrar::default();
        let metrics = MqttMetrics::register(&registrar).unwrap();
        let writer = BrokerStateWriter::new(metrics.clone());
        let state = writer.subscribe();
        writer.reader().register_gauge(&registrar).unwrap();
        let connected = |value: u8| registrar.encode().unwrap().contains(&format!("lineside_mqtt_connected {value}\n"));
        assert!(!state.borrow().is_connected() && connected(0));
        let broker =
            Broker { host: "b".to_owned(), port: 1883, tls: true, credentials: Some(("u".into(), "p".into())) };
        writer.set_connected(2, &broker);
        assert!(
            matches!(&*state.borrow(), BrokerState::Connected { index: 2, broker, .. } if broker == "mqtts://b:1883")
        );
        assert!(connected(1) && metrics.broker_index.get() == 2);
        writer.set_disconnected(Some("reset".to_owned()));
        assert!(connected(0) && metrics.broker_index.get() == 2);
        let BrokerState::Disconnected { since: first, .. } = *state.borrow() else { panic!("connected") };
        writer.set_disconnected(Some("refused".to_owned()));
        let expected = BrokerState::Disconnected { reason: Some("refused".to_owned()), since: first };
        assert_eq!(*state.borrow(), expected, "the time of the first failure is kept");
    }

    #[test]
    fn the_state_of_a_publisher_without_heartbeats_is_disconnected() {
        let writer = BrokerStateWriter::new(MqttMetrics::register(&Registrar::default()).unwrap());
        let (reader, start) = (writer.reader(), Instant::now());
        writer.set_connected(0, &Broker { host: "b".to_owned(), port: 1883, tls: false, credentials: None });
        assert!(reader.at(start + STALE_AFTER / 2).is_connected());
        let later = start + STALE_AFTER * 2;
        let BrokerState::Disconnected { reason: Some(reason), .. } = reader.at(later) else { panic!("connected") };
        assert!(reason.contains("has not reported"), "{reason}");
        writer.beat(later);
        assert!(reader.at(later).is_connected(), "the publisher runs again");
        writer.set_disconnected(Some("refused".to_owned()));
        let BrokerState::Disconnected { reason, .. } = reader.at(later + STALE_AFTER * 2) else { panic!("connected") };
        assert_eq!(reason.as_deref(), Some("refused"), "the reason of a lost connection is kept");
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
