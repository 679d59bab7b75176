//! The streams that run on this node, and whether they are up.
//!
//! The registry owns the state of every stream. It is a `watch` value: the publisher announces it, the reconciler puts it into
//! the node's status, and the gauge `lineside_stream_up` is written from it and never read.
//!
//! A stream is up while its source reports no error and its frames are [healthy](super::health). Both are evaluated when they change,
//! and by [`StreamRegistry::evaluate`], because a stream also becomes unhealthy when nothing happens.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lineside_api::message::NodeEvent;
use lineside_api::state::{StreamState, StreamStates};
use lineside_capture::StreamReporter;
use parking_lot::Mutex;
use prometheus::{IntGauge, IntGaugeVec};
use tokio::sync::watch;

use super::health::StreamHealth;
use crate::message_writer::MessageWriter;

/// The streams of this node.
pub struct StreamRegistry {
    states: watch::Sender<StreamStates>,
    monitors: Mutex<BTreeMap<String, Arc<StreamMonitor>>>,
    events: Arc<MessageWriter>,
    up: IntGaugeVec,
}

impl StreamRegistry {
    /// A registry without streams. Changes of a stream are published as events; `up` is the gauge with the label `stream`.
    pub fn new(events: Arc<MessageWriter>, up: IntGaugeVec) -> Arc<Self> {
        Arc::new(Self { states: watch::Sender::new(StreamStates::new()), monitors: Mutex::default(), events, up })
    }

    /// The states of all streams, by name.
    pub fn subscribe(&self) -> watch::Receiver<StreamStates> {
        self.states.subscribe()
    }

    /// Determines which streams have become unhealthy because nothing has happened.
    pub fn evaluate(&self, now: Instant) {
        let monitors: Vec<Arc<StreamMonitor>> = self.monitors.lock().values().cloned().collect();
        for monitor in monitors {
            monitor.publish(&mut monitor.observed.lock(), now);
        }
    }

    /// Adds a stream that is not up yet. It is removed when the handle is dropped. `interval` is the shortest time between two of
    /// its frames, if it is limited.
    pub(super) fn register(self: &Arc<Self>, stream: &str, model: &str, interval: Option<Duration>) -> StreamHandle {
        let gauge = self.up.with_label_values(&[stream]);
        gauge.set(0);
        self.states.send_modify(|states| {
            let state = StreamState { model: model.to_owned(), up: false, reason: None, rule_failure: None };
            states.insert(stream.to_owned(), state);
        });
        let observed = Observed {
            is_source_up: false,
            source_reason: None,
            health: StreamHealth::new(interval),
            published: PublishedState { up: false, reason: None, is_unhealthy: false },
            is_removed: false,
        };
        let monitor = Arc::new(StreamMonitor {
            registry: self.clone(),
            stream: stream.to_owned(),
            gauge,
            observed: Mutex::new(observed),
        });
        self.monitors.lock().insert(stream.to_owned(), monitor.clone());
        StreamHandle { monitor }
    }
}

/// What is known of one stream, and what of it is published.
struct Observed {
    is_source_up: bool,
    source_reason: Option<String>,
    health: StreamHealth,
    published: PublishedState,
    is_removed: bool,
}

#[derive(Clone, PartialEq)]
struct PublishedState {
    up: bool,
    reason: Option<String>,
    /// Whether the source reports no error, and the frames are unhealthy.
    is_unhealthy: bool,
}

/// Observes the frames of one stream and publishes its state.
pub(super) struct StreamMonitor {
    registry: Arc<StreamRegistry>,
    stream: String,
    gauge: IntGauge,
    /// Held while a change is published, so that changes are published in their order.
    observed: Mutex<Observed>,
}

impl StreamMonitor {
    /// A frame was inspected and has a result.
    pub(super) fn on_result(&self) {
        let mut observed = self.observed.lock();
        observed.health.on_result();
        self.publish(&mut observed, Instant::now());
    }

    /// A frame could not be inspected.
    pub(super) fn on_failure(&self, reason: &str) {
        let mut observed = self.observed.lock();
        observed.health.on_failure(reason);
        self.publish(&mut observed, Instant::now());
    }

    /// The verdict rule has begun to fail, for this reason, or succeeds again.
    pub(super) fn on_rule(&self, failure: Option<&str>) {
        let (stream, failure) = (self.stream.clone(), failure.map(str::to_owned));
        self.registry.states.send_modify(|states| {
            if let Some(state) = states.get_mut(&stream) {
                state.rule_failure.clone_from(&failure);
            }
        });
        let event = match failure {
            Some(reason) => NodeEvent::RuleFailed { stream, reason },
            None => NodeEvent::RuleRecovered { stream },
        };
        self.registry.events.event(event);
    }

    /// Publishes the state if it has changed. Returns whether the stream went up or down.
    fn publish(&self, observed: &mut Observed, now: Instant) -> bool {
        let problem = observed.health.problem(now).filter(|_| observed.is_source_up).map(|problem| problem.to_string());
        let current = PublishedState {
            up: observed.is_source_up && problem.is_none(),
            is_unhealthy: problem.is_some(),
            reason: problem.or_else(|| observed.source_reason.clone()),
        };
        // A frame of a stream that is up changes nothing, and wakes nobody.
        if observed.is_removed || current == observed.published {
            return false;
        }
        let before = std::mem::replace(&mut observed.published, current.clone());
        let (up, reason, stream) = (current.up, current.reason, self.stream.clone());
        self.registry.states.send_modify(|states| {
            if let Some(state) = states.get_mut(&stream) {
                (state.up, state.reason) = (up, reason.clone());
            }
        });
        if current.is_unhealthy && !before.is_unhealthy {
            tracing::warn!(event = "stream_unhealthy", stream, reason, "Stream is unhealthy");
        } else if up && before.is_unhealthy {
            tracing::info!(event = "stream_recovered", stream, "Stream is healthy again");
        }
        if up == before.up {
            return false;
        }
        self.gauge.set(i64::from(up));
        let event = if up { NodeEvent::StreamUp { stream } } else { NodeEvent::StreamDown { stream, reason } };
        self.registry.events.event(event);
        true
    }
}

/// One registered stream, for its source.
pub(super) struct StreamHandle {
    monitor: Arc<StreamMonitor>,
}

impl StreamHandle {
    /// What observes the frames of the stream after its source.
    pub(super) fn monitor(&self) -> Arc<StreamMonitor> {
        self.monitor.clone()
    }
}

impl StreamReporter for StreamHandle {
    fn is_up(&self) -> bool {
        self.monitor.observed.lock().is_source_up
    }

    fn up(&self) -> bool {
        let mut observed = self.monitor.observed.lock();
        let now = Instant::now();
        observed.health.on_frame(now);
        let was_source_up = std::mem::replace(&mut observed.is_source_up, true);
        observed.source_reason = None;
        self.monitor.publish(&mut observed, now) && !was_source_up
    }

    fn down(&self, reason: Option<&str>) {
        let mut observed = self.monitor.observed.lock();
        observed.health.on_source_down();
        (observed.is_source_up, observed.source_reason) = (false, reason.map(str::to_owned));
        self.monitor.publish(&mut observed, Instant::now());
    }
}

impl Drop for StreamHandle {
    fn drop(&mut self) {
        self.down(None);
        let monitor = &self.monitor;
        // A frame that is still in flight changes nothing any more.
        monitor.observed.lock().is_removed = true;
        let registry = &monitor.registry;
        registry.monitors.lock().remove(&monitor.stream);
        registry.states.send_modify(|states| {
            states.remove(&monitor.stream);
        });
        // A stream that does not run is neither up nor down. The series may be missing already.
        registry.up.remove_label_values(&[&monitor.stream]).ok();
    }
}
