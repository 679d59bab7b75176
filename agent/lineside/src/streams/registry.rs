//! The streams this node plays and whether they are up, for those who tell others of it.

use std::sync::Arc;

use lineside_api::state::{StreamState, StreamStates};
use prometheus::IntGauge;
use tokio::sync::watch;

use crate::message_writer::MessageWriter;
use lineside_api::message::NodeEvent;

/// The streams of this node.
pub struct StreamRegistry {
    streams: watch::Sender<StreamStates>,
    message_writer: Arc<MessageWriter>,
}

impl StreamRegistry {
    /// A registry with nobody on it. Changes are said as events.
    pub fn new(message_writer: Arc<MessageWriter>) -> Arc<Self> {
        Arc::new(Self { streams: watch::Sender::new(StreamStates::new()), message_writer })
    }

    /// Follows the streams.
    pub fn follow(&self) -> watch::Receiver<StreamStates> {
        self.streams.subscribe()
    }

    /// A stream is played from now on, until its presence is dropped.
    pub fn begin(self: &Arc<Self>, stream: &str, model: &str, gauge: IntGauge) -> Arc<Presence> {
        gauge.set(0);
        self.streams.send_modify(|streams| {
            streams.insert(stream.to_owned(), StreamState { model: model.to_owned(), up: false, reason: None });
        });
        Arc::new(Presence { registry: self.clone(), stream: stream.to_owned(), gauge })
    }
}

/// Whether one stream is up.
pub struct Presence {
    registry: Arc<StreamRegistry>,
    stream: String,
    gauge: IntGauge,
}

impl lineside_capture::StreamReporter for Presence {
    fn is_up(&self) -> bool {
        self.gauge.get() == 1
    }

    fn up(&self) -> bool {
        let is_news = self.change(true, None);
        if is_news {
            self.registry.message_writer.event(NodeEvent::StreamUp { stream: self.stream.clone() });
        }
        is_news
    }

    fn down(&self, reason: Option<&str>) {
        if self.change(false, reason) {
            let (stream, reason) = (self.stream.clone(), reason.map(str::to_owned));
            self.registry.message_writer.event(NodeEvent::StreamDown { stream, reason });
        }
    }
}

impl Presence {
    fn change(&self, up: bool, reason: Option<&str>) -> bool {
        let is_news = (self.gauge.get() == 1) != up;
        self.gauge.set(i64::from(up));
        self.registry.streams.send_if_modified(|streams| {
            let Some(member) = streams.get_mut(&self.stream) else { return false };
            member.reason = reason.map(str::to_owned);
            std::mem::replace(&mut member.up, up) != up
        });
        is_news
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        lineside_capture::StreamReporter::down(self, None);
        self.registry.streams.send_modify(|streams| {
            streams.remove(&self.stream);
        });
    }
}
