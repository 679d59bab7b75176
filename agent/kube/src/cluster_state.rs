//! The state of the connection to the cluster: a `watch` value with one owner, which reports once a second. What is shown is
//! computed from the last report and its age; the gauges are computed at each scrape.

use std::time::{Duration, Instant};

use lineside_common::heartbeat::STALE_AFTER;
use lineside_common::metrics::Registrar;
use tokio::sync::watch;

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
    /// The API server has not answered for [too long](DISCONNECTED_AFTER), a followed kind has not been listed yet, or the
    /// task that follows the cluster does not report.
    Disconnected {
        /// When the API server answered last.
        last_response: Instant,
    },
}

impl ClusterState {
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

/// What the owner reported last.
#[derive(Debug, Clone, Copy)]
struct ClusterReport {
    last_response: Instant,
    is_synced: bool,
    reported_at: Instant,
}

impl ClusterReport {
    fn state(self, now: Instant) -> ClusterState {
        let Self { last_response, is_synced, reported_at } = self;
        let is_answered = now.saturating_duration_since(last_response) <= DISCONNECTED_AFTER;
        let is_reported = now.saturating_duration_since(reported_at) <= STALE_AFTER;
        if is_synced && is_answered && is_reported {
            ClusterState::Connected { last_response }
        } else {
            ClusterState::Disconnected { last_response }
        }
    }
}

/// Reads the state, with regard to its age. Clones read the same state.
#[derive(Debug, Clone)]
pub struct ClusterStateReader(watch::Receiver<ClusterReport>);

impl ClusterStateReader {
    /// The state at `now`.
    pub fn at(&self, now: Instant) -> ClusterState {
        self.0.borrow().state(now)
    }

    /// Registers the gauges `cluster_connected` and `cluster_last_response_age_seconds`.
    ///
    /// # Errors
    /// When a name is registered already.
    pub fn register_gauges(&self, registrar: &Registrar) -> Result<(), prometheus::Error> {
        let (connected, age) = (self.clone(), self.clone());
        registrar.computed_gauge(
            "cluster_connected",
            "Whether the API server answers and the desired state has been listed completely.",
            move || i64::from(connected.at(Instant::now()).is_connected()),
        )?;
        registrar.computed_gauge(
            "cluster_last_response_age_seconds",
            "Time since the API server answered last.",
            move || {
                let now = Instant::now();
                let age = now.saturating_duration_since(age.at(now).last_response());
                i64::try_from(age.as_secs()).unwrap_or(i64::MAX)
            },
        )
    }
}

/// The owner of the [`ClusterState`].
pub struct ClusterStatePublisher(watch::Sender<ClusterReport>);

impl ClusterStatePublisher {
    /// Disconnected since `now`, until the first [`update`](Self::update).
    pub fn new(now: Instant) -> Self {
        Self(watch::Sender::new(ClusterReport { last_response: now, is_synced: false, reported_at: now }))
    }

    /// A reader of the state.
    pub fn reader(&self) -> ClusterStateReader {
        ClusterStateReader(self.0.subscribe())
    }

    /// Reports the state. It is stale unless it is reported [in time](STALE_AFTER) again. `is_synced`: every followed kind has
    /// been listed completely.
    pub fn update(&self, last_response: Instant, is_synced: bool, now: Instant) {
        self.0.send_replace(ClusterReport { last_response, is_synced, reported_at: now });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_follows_the_last_report_and_its_age() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let publisher = ClusterStatePublisher::new(start);
        let reader = publisher.reader();
        assert!(!reader.at(start).is_connected(), "nothing has been listed yet");
        publisher.update(after(1), false, after(2));
        assert!(!reader.at(after(2)).is_connected());
        publisher.update(after(1), true, after(2));
        assert!(reader.at(after(2)).is_connected());
        assert_eq!(reader.at(after(2)).last_response(), after(1));
        for seconds in 3..=76 {
            publisher.update(after(1), true, after(seconds));
            assert!(reader.at(after(seconds)).is_connected());
        }
        publisher.update(after(1), true, after(77));
        assert!(!reader.at(after(77)).is_connected(), "the API server does not answer");
    }

    #[test]
    fn a_state_that_is_not_reported_any_more_is_disconnected() {
        let start = Instant::now();
        let publisher = ClusterStatePublisher::new(start);
        let reader = publisher.reader();
        publisher.update(start, true, start);
        assert!(reader.at(start + STALE_AFTER).is_connected());
        assert!(!reader.at(start + STALE_AFTER + Duration::from_millis(1)).is_connected());
        publisher.update(start, true, start + STALE_AFTER * 2);
        assert!(reader.at(start + STALE_AFTER * 2).is_connected(), "the task runs again");
    }

    #[test]
    fn gauges_are_computed_at_the_scrape() {
        let (registrar, start) = (Registrar::default(), Instant::now());
        let publisher = ClusterStatePublisher::new(start);
        publisher.reader().register_gauges(&registrar).unwrap();
        assert!(registrar.encode().unwrap().contains("lineside_cluster_connected 0\n"));
        publisher.update(start, true, Instant::now());
        assert!(registrar.encode().unwrap().contains("lineside_cluster_connected 1\n"));
        let stale = start.checked_sub(STALE_AFTER * 2).unwrap();
        publisher.update(stale, true, stale);
        let text = registrar.encode().unwrap();
        assert!(text.contains("lineside_cluster_connected 0\n"), "{text}");
        assert!(text.contains("lineside_cluster_last_response_age_seconds 2"), "{text}");
    }
}
