//! What the parts of the publisher share: configuration, identity, and the channels to the rest of the agent. Data only.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};

use crate::command::{CommandRequest, SetLevel};
use crate::config::MqttConfig;
use crate::connection::MqttMessage;
use crate::metrics::MqttMetrics;
use lineside_api::message::{AgentPresence, PresenceMessage, Topics};
use lineside_api::state::StreamStates;
use lineside_common::clock;
use lineside_spool::Spool;

/// The configuration of a publisher and its connections to the rest of the agent.
pub struct PublisherContext {
    /// The brokers and how to publish to them.
    pub mqtt: MqttConfig,
    /// The topics of this node.
    pub topics: Topics,
    /// The node's name.
    pub node: String,
    /// The site's name.
    pub site: String,
    /// The random id of the data folder, published in the status.
    pub folder: String,
    /// The boot epoch, published in the status.
    pub epoch: u64,
    /// The agent's data folder, which holds the Sparkplug birth-death number.
    pub data_dir: PathBuf,
    /// The source of the records.
    pub spool: Arc<Spool>,
    /// The streams that run and their states.
    pub streams: watch::Receiver<StreamStates>,
    /// Receives the commands to execute.
    pub commands: mpsc::Sender<CommandRequest>,
    /// Changes the log filter.
    pub set_level: SetLevel,
    /// The publisher's metrics.
    pub metrics: MqttMetrics,
}

impl PublisherContext {
    /// The retained message about the agent's presence.
    pub(super) fn status_message(&self, state: AgentPresence) -> MqttMessage {
        let status = PresenceMessage {
            state,
            ts: clock::rfc3339(SystemTime::now()),
            site: &self.site,
            node: &self.node,
            version: env!("CARGO_PKG_VERSION"),
            folder: &self.folder,
            epoch: self.epoch,
        };
        // The serialization of a struct of strings and numbers cannot fail.
        let payload = Bytes::from(serde_json::to_vec(&status).unwrap_or_default());
        MqttMessage { topic: self.topics.status().into(), payload, retain: true }
    }

    /// Logs how many records stay in the spool when the publisher stops.
    pub(super) fn log_remaining_records(&self) {
        let records = self.spool.stats().records;
        if records > 0 {
            tracing::info!(
                event = "records_left_in_spool",
                records,
                "Publisher stops before the broker acknowledged all records; the spool keeps them"
            );
        }
    }
}
