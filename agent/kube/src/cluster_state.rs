//! The state of the connection to the cluster, as a `watch` value with one owner. The gauges are written from it and
//! never read.

use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::metrics::KubeMetrics;

/// The cluster counts as disconnected after this long without an answer. The server ends a watch after 60 s, so a
/// healthy connection has an answer more often.
const DISCONNECTED_AFTER: Duration = Duration::from_secs(75);

/// Whether the cluster is connected. `last_response` is when the API server answered last; before the first answer it
/// is when the client was created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterState {
    /// The API server answers, and every followed kind has been listed completely.
    Connected {
        /// When the API server answered last.
        last_response: Instant,
    },
    /// The API server has not answered for [too long](DISCONNECTED_AFTER), or a followed kind has not been listed yet.
    Disconnected {
        /// When the API server answered last.
        last_response: Instant,
    },
}

impl ClusterState {
    fn new(last_response: Instant, is_synced: bool, now: Instant) -> Self {
        let silence = now.saturating_duration_since(last_response);
        if is_synced && silence <= DISCONNECTED_AFTER {
            Self::Connected { last_response }
        } else {
            Self::Disconnected { last_response }
        }
    }

    /// Whether the cluster is connected.
    pub fn is_connected(self) -> bool {
        matches!(self, Self::Connected { .. })
    }

    /// When the API server answered last.
    pub fn last_response(self) -> Instant {
        match self {
            Self::Connected { last_response } | Self::Disconnected { last_response } => last_response,
        }
    }
}

/// The owner of the [`ClusterState`].
pub struct ClusterStatePublisher {
    state: watch::Sender<ClusterState>,
    metrics: KubeMetrics,
}

impl ClusterStatePublisher {
    /// Disconnected since `now`, until the first [`update`](Self::update).
    pub fn new(metrics: KubeMetrics, now: Instant) -> Self {
        Self { state: watch::Sender::new(ClusterState::Disconnected { last_response: now }), metrics }
    }

    /// A receiver of the state. It is notified when the cluster connects or disconnects, and not of every answer.
    pub fn subscribe(&self) -> watch::Receiver<ClusterState> {
        self.state.subscribe()
    }

    /// Recomputes the state and writes the gauges. `is_synced`: every followed kind has been listed completely.
    pub fn update(&self, last_response: Instant, is_synced: bool, now: Instant) {
        let state = ClusterState::new(last_response, is_synced, now);
        self.state.send_if_modified(|current| {
            let is_transition = current.is_connected() != state.is_connected();
            *current = state;
            is_transition
        });
        let age = now.saturating_duration_since(last_response).as_secs();
        self.metrics.cluster_connected.set(i64::from(state.is_connected()));
        self.metrics.cluster_last_response_age.set(i64::try_from(age).unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lineside_common::metrics::Registrar;

    #[test]
    fn receivers_are_notified_of_transitions_only_and_the_gauges_follow() {
        let metrics = KubeMetrics::register(&Registrar::default()).unwrap();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let publisher = ClusterStatePublisher::new(metrics.clone(), start);
        let mut state = publisher.subscribe();
        publisher.update(start, false, after(1));
        assert!(!state.has_changed().unwrap(), "nothing has been listed yet");
        publisher.update(after(1), true, after(2));
        assert!(state.has_changed().unwrap() && state.borrow_and_update().is_connected());
        publisher.update(after(5), true, after(9));
        assert!(!state.has_changed().unwrap(), "another answer is not a transition");
        assert_eq!(state.borrow().last_response(), after(5));
        assert_eq!((metrics.cluster_connected.get(), metrics.cluster_last_response_age.get()), (1, 4));
        publisher.update(after(5), true, after(81));
        assert!(state.has_changed().unwrap() && !state.borrow_and_update().is_connected());
        assert_eq!((metrics.cluster_connected.get(), metrics.cluster_last_response_age.get()), (0, 76));
    }
}
