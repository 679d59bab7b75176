//! The streams this node plays and whether they are up, for those who tell others of it.

use std::sync::Arc;

use lineside_api::state::{Member, Streams};
use prometheus::IntGauge;
use tokio::sync::watch;

use crate::outbox::Outbox;
use lineside_api::message::Event;

/// The streams of this node.
pub struct Roster {
    streams: watch::Sender<Streams>,
    outbox: Arc<Outbox>,
}

impl Roster {
    /// A roster with nobody on it. Changes are said as events.
    pub fn new(outbox: Arc<Outbox>) -> Arc<Self> {
        Arc::new(Self { streams: watch::Sender::new(Streams::new()), outbox })
    }

    /// Follows the streams.
    pub fn follow(&self) -> watch::Receiver<Streams> {
        self.streams.subscribe()
    }

    /// A stream is played from now on, until its presence is dropped.
    pub fn begin(self: &Arc<Self>, stream: &str, model: &str, gauge: IntGauge) -> Arc<Presence> {
        gauge.set(0);
        self.streams.send_modify(|streams| {
            streams.insert(stream.to_owned(), Member { model: model.to_owned(), up: false, reason: None });
        });
        Arc::new(Presence { roster: self.clone(), stream: stream.to_owned(), gauge })
    }
}

/// Whether one stream is up.
pub struct Presence {
    roster: Arc<Roster>,
    stream: String,
    gauge: IntGauge,
}

impl lineside_capture::Presence for Presence {
    fn is_up(&self) -> bool {
        self.gauge.get() == 1
    }

    fn up(&self) -> bool {
        let is_news = self.change(true, None);
        if is_news {
            self.roster.outbox.event(Event::StreamUp { stream: self.stream.clone() });
        }
        is_news
    }

    fn down(&self, reason: Option<&str>) {
        if self.change(false, reason) {
            let (stream, reason) = (self.stream.clone(), reason.map(str::to_owned));
            self.roster.outbox.event(Event::StreamDown { stream, reason });
        }
    }
}

impl Presence {
    fn change(&self, up: bool, reason: Option<&str>) -> bool {
        let is_news = (self.gauge.get() == 1) != up;
        self.gauge.set(i64::from(up));
        self.roster.streams.send_if_modified(|streams| {
            let Some(member) = streams.get_mut(&self.stream) else { return false };
            member.reason = reason.map(str::to_owned);
            std::mem::replace(&mut member.up, up) != up
        });
        is_news
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        lineside_capture::Presence::down(self, None);
        self.roster.streams.send_modify(|streams| {
            streams.remove(&self.stream);
        });
    }
}
