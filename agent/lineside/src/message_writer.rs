//! Gives outgoing messages their id and topic, and appends them to the spool.

use std::sync::Arc;
use std::time::SystemTime;

use lineside_api::message::{EventMessage, MetricsMessage, NodeEvent, ResultMessage, Series, Topics, with_id};
use lineside_common::clock;
use lineside_spool::{AppendOutcome, NewRecord, RecordKind, Spool, WhenFull};
use serde::Serialize;

use crate::config::settings::Config;
use crate::data_folder::FolderIdentity;

/// Seconds that metrics are kept while no broker is connected: a day.
const METRICS_TTL_SECONDS: u32 = 24 * 3600;

/// Writes messages to the spool.
pub struct MessageWriter {
    node: String,
    site: String,
    /// The front of every id, `node:folder.epoch`.
    id_prefix: String,
    topics: Topics,
    spool: Arc<Spool>,
    when_full: WhenFull,
}

impl MessageWriter {
    /// The writer of this node in this run.
    pub fn new(config: &Config, identity: &FolderIdentity, topics: Topics, spool: Arc<Spool>) -> Self {
        let (node, site) = (config.node.clone(), config.site.clone());
        let id_prefix = identity.id_prefix(&node);
        Self { node, site, id_prefix, topics, spool, when_full: config.spool.when_full }
    }

    /// The node's name.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The site's name.
    pub fn site(&self) -> &str {
        &self.site
    }

    /// Writes the result of an inspection.
    pub fn result(&self, body: &ResultMessage<'_>) -> AppendOutcome {
        self.append(RecordKind::Result, self.topics.result(body.stream), 0, body)
    }

    /// Writes an event. One that is dropped for room is counted by the spool.
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
        self.append(RecordKind::Event, topic, 0, &body);
    }

    /// Writes the metrics of a period of so many seconds.
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
        self.append(RecordKind::Metrics, self.topics.metrics(), METRICS_TTL_SECONDS, &body);
    }

    fn append(&self, kind: RecordKind, topic: String, ttl_seconds: u32, body: &impl Serialize) -> AppendOutcome {
        // Serialization fails only for maps whose keys are not strings; these bodies have none.
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
            build_payload: |seq| with_id(&format!("{}:{letter}{seq}", self.id_prefix), seq, &body),
        })
    }
}
