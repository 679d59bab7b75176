//! The streams that run on this node, and whether they are up.
//!
//! The registry owns the state of every stream. It is a `watch` value: the publisher announces it, the reconciler puts it into
//! the node's status, and the gauge `lineside_stream_up` is written from it and never read.

use std::sync::Arc;

use lineside_api::message::NodeEvent;
use lineside_api::state::{StreamState, StreamStates};
use lineside_capture::StreamReporter;
use prometheus::{IntGauge, IntGaugeVec};
use tokio::sync::watch;

use crate::message_writer::MessageWriter;

/// The streams of this node.
pub struct StreamRegistry {
    states: watch::Sender<StreamStates>,
    events: Arc<MessageWriter>,
    up: IntGaugeVec,
}

impl StreamRegistry {
    /// A registry without streams. Changes of a stream are published as events; `up` is the gauge with the label `stream`.
    pub fn new(events: Arc<MessageWriter>, up: IntGaugeVec) -> Arc<Self> {
        Arc::new(Self { states: watch::Sender::new(StreamStates::new()), events, up })
    }

    /// The states of all streams, by name.
    pub fn subscribe(&self) -> watch::Receiver<StreamStates> {
        self.states.subscribe()
    }

    /// Adds a stream that is not up yet. It is removed when the handle is dropped.
    pub fn register(self: &Arc<Self>, stream: &str, model: &str) -> StreamHandle {
        let gauge = self.up.with_label_values(&[stream]);
        gauge.set(0);
        self.states.send_modify(|states| {
            states.insert(stream.to_owned(), StreamState { model: model.to_owned(), up: false, reason: None });
        });
        StreamHandle { registry: self.clone(), stream: stream.to_owned(), gauge }
    }

    /// Sets the state of a stream. Returns whether `up` changed.
    fn set(&self, stream: &str, up: bool, reason: Option<&str>) -> bool {
        let mut has_changed = false;
        // A frame of a stream that is up changes nothing, and wakes nobody.
        self.states.send_if_modified(|states| {
            let Some(state) = states.get_mut(stream) else { return false };
            let reason = reason.map(str::to_owned);
            has_changed = state.up != up;
            let is_new = has_changed || state.reason != reason;
            (state.up, state.reason) = (up, reason);
            is_new
        });
        has_changed
    }
}

/// One registered stream.
pub struct StreamHandle {
    registry: Arc<StreamRegistry>,
    stream: String,
    gauge: IntGauge,
}

impl StreamHandle {
    fn set(&self, up: bool, reason: Option<&str>) -> bool {
        let has_changed = self.registry.set(&self.stream, up, reason);
        if has_changed {
            self.gauge.set(i64::from(up));
        }
        has_changed
    }
}

impl StreamReporter for StreamHandle {
    fn is_up(&self) -> bool {
        self.registry.states.borrow().get(&self.stream).is_some_and(|state| state.up)
    }

    fn up(&self) -> bool {
        let has_changed = self.set(true, None);
        if has_changed {
            self.registry.events.event(NodeEvent::StreamUp { stream: self.stream.clone() });
        }
        has_changed
    }

    fn down(&self, reason: Option<&str>) {
        if self.set(false, reason) {
            let (stream, reason) = (self.stream.clone(), reason.map(str::to_owned));
            self.registry.events.event(NodeEvent::StreamDown { stream, reason });
        }
    }
}

impl Drop for StreamHandle {
    fn drop(&mut self) {
        self.down(None);
        self.registry.states.send_modify(|states| {
            states.remove(&self.stream);
        });
        // A stream that does not run is neither up nor down. The series may be missing already.
        self.registry.up.remove_label_values(&[&self.stream]).ok();
    }
}
