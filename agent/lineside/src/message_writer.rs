//! Where everything that is said goes first: it is given its id and its topic, and put into the spool. Whoever has
//! something to say hands it over here and goes on.

use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;

use lineside_api::message::{EventMessage, MetricsMessage, NodeEvent, ResultMessage, Series, Topics, with_id};
use lineside_common::clock;
use lineside_spool::{AppendOutcome, NewRecord, RecordKind, Spool, WhenFull};

/// Seconds that metrics are kept while the broker is away: a day. Older ones are of no use to anybody.
const METRICS_TTL_SECONDS: u32 = 24 * 3600;

/// The way to the spool.
pub struct MessageWriter {
    node: String,
    site: String,
    epoch: u64,
    topics: Topics,
    spool: Arc<Spool>,
    when_full: WhenFull,
}

impl MessageWriter {
    /// The message_writer of this node in this boot epoch.
    pub fn new(node: &str, site: &str, epoch: u64, topics: Topics, spool: Arc<Spool>, when_full: WhenFull) -> Self {
        Self { node: node.to_owned(), site: site.to_owned(), epoch, topics, spool, when_full }
    }

    /// The node's name.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The site's name.
    pub fn site(&self) -> &str {
        &self.site
    }

    /// Says what came of an inspection.
    pub fn result(&self, body: &ResultMessage<'_>) -> AppendOutcome {
        self.put(RecordKind::Result, self.topics.result(body.stream), 0, body)
    }

    /// Says that something happened.
    pub fn event(&self, event: NodeEvent) {
        let now = SystemTime::now();
        let topic = self.topics.event(event.stream());
        let body = EventMessage {
            ts: clock::rfc3339(now),
            site: &self.site,
            node: &self.node,
            event,
            clock_synced: clock::is_plausible(now),
            historical: false,
        };
        // What does not fit is counted by the spool.
        self.put(RecordKind::Event, topic, 0, &body);
    }

    /// Says how things stand after a period of so many seconds.
    pub fn metrics(&self, seconds: f64, series: Vec<Series>) {
        let now = SystemTime::now();
        let body = MetricsMessage {
            ts: clock::rfc3339(now),
            site: &self.site,
            node: &self.node,
            seconds: (seconds * 1e3).round() / 1e3,
            series,
            clock_synced: clock::is_plausible(now),
            historical: false,
        };
        self.put(RecordKind::Metrics, self.topics.metrics(), METRICS_TTL_SECONDS, &body);
    }

    fn put(&self, kind: RecordKind, topic: String, ttl_seconds: u32, body: &impl Serialize) -> AppendOutcome {
        // Only a map with keys that are no strings can fail to become JSON, and there is none in these.
        let body = serde_json::to_vec(body).unwrap_or_default();
        let letter = match kind {
            RecordKind::Result => "",
            RecordKind::Event => "e",
            RecordKind::Metrics => "m",
        };
        self.spool.append(NewRecord {
            kind,
            topic: topic.into(),
            ttl_seconds,
            when_full: self.when_full,
            make: |seq| with_id(&format!("{}:{}:{letter}{seq}", self.node, self.epoch), seq, &body),
        })
    }
}
