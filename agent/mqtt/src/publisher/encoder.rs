//! Encodes records and stream states for one session: in JSON on the documented topics, or in Sparkplug B.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;

use super::context::PublisherContext;
use super::stream_health::{Origin, StreamHealth};
use crate::connection::{MqttMessage, MqttSender};
use crate::home_assistant;
use crate::sparkplug::{HostSignal, SparkplugSession};
use lineside_api::message::{AgentPresence, mark_historical};
use lineside_api::state::StreamStates;
use lineside_common::{clock, files};
use lineside_spool::{Record, RecordId};

/// The file in the data folder that holds the last Sparkplug birth-death number.
const BD_SEQ_FILE: &str = "sparkplug-bdseq";
/// Maximum number of requests for one record: a device birth and its data.
const REQUESTS_PER_RECORD: usize = 2;

/// Requests that the states of the streams leave free in the send queue, for records and for messages of Home Assistant.
const HEALTH_ROOM: usize = 256;

/// What an acknowledgement of the broker refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum AckToken {
    /// One record.
    Record(RecordId),
    /// The records that were sent with QoS 0 before a fence message.
    Fence(Vec<RecordId>),
    /// A message about the node itself, which is not in the spool.
    NodeMessage,
}

/// The sender of a session.
pub(super) type SessionSender = MqttSender<AckToken>;

/// The send queue is full. The session ends, because the messages about the node must not be lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the send queue is full")]
pub(super) struct QueueFull;

/// What follows from a message that is not on one of the agent's own topics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EncoderSignal {
    /// The session continues.
    Continue,
    /// The Sparkplug primary host is offline; the session ends and records wait.
    HostOffline,
}

/// The encoding of one session.
pub(super) enum Encoder {
    /// The topics and payloads of the documentation.
    Json {
        /// The streams that were announced to Home Assistant; `None` when discovery is off.
        announced: Option<StreamStates>,
        /// The retained states of the streams.
        health: StreamHealth,
    },
    /// A Sparkplug edge node.
    Sparkplug {
        /// Births, deaths and sequence numbers.
        session: Box<SparkplugSession>,
        /// Records that were sent with QoS 0 since the last fence message.
        unfenced: Vec<RecordId>,
        /// The topic of the fence message, whose acknowledgement covers the records before it.
        fence: Arc<str>,
    },
}

impl Encoder {
    /// The encoder for a new session.
    ///
    /// # Errors
    /// When the Sparkplug birth-death number cannot be stored, unless the disk accepts no writes.
    pub(super) fn new(context: &PublisherContext) -> io::Result<Self> {
        let Some(sparkplug) = &context.mqtt.sparkplug else {
            let announced = context.mqtt.home_assistant.as_ref().map(|_| StreamStates::new());
            return Ok(Self::Json { announced, health: StreamHealth::default() });
        };
        let bd_seq = next_bd_seq(&context.data_dir)?;
        let (node, site) = (&context.node, &context.site);
        let session = SparkplugSession::new(&sparkplug.group, node, site, sparkplug.host.as_deref(), bd_seq);
        let fence = context.topics.fence().into();
        Ok(Self::Sparkplug { session: Box::new(session), unfenced: Vec::new(), fence })
    }

    /// The message that the broker publishes when the connection is lost.
    pub(super) fn will(&self, context: &PublisherContext) -> MqttMessage {
        match self {
            Self::Json { .. } => context.status_message(AgentPresence::Offline),
            Self::Sparkplug { session, .. } => session.death(),
        }
    }

    /// Subscribes and publishes the first messages of a session.
    pub(super) fn start(
        &mut self,
        context: &PublisherContext,
        sender: &mut SessionSender,
        streams: &StreamStates,
    ) -> Result<(), QueueFull> {
        match self {
            Self::Json { .. } => {
                // The retained presence of another agent is received before it is replaced.
                subscribe_all(sender, &[context.topics.status()])?;
                publish_node_message(sender, context.status_message(AgentPresence::Online))?;
                subscribe_all(sender, &context.topics.subscriptions())?;
            }
            Self::Sparkplug { session, .. } => subscribe_all(sender, &session.filters())?,
        }
        self.update_streams(context, sender, streams)
    }

    /// Publishes what has changed about the streams.
    pub(super) fn update_streams(
        &mut self,
        context: &PublisherContext,
        sender: &mut SessionSender,
        streams: &StreamStates,
    ) -> Result<(), QueueFull> {
        match self {
            Self::Json { announced, health } => {
                let (site, node) = (context.site.as_str(), context.node.as_str());
                let origin = Origin { topics: &context.topics, site, node, ts: clock::rfc3339(SystemTime::now()) };
                health.update(&origin, streams, |message| {
                    sender.has_room(HEALTH_ROOM) && publish_node_message(sender, message).is_ok()
                });
                let (Some(announced), Some(prefix)) = (announced, &context.mqtt.home_assistant) else { return Ok(()) };
                let messages = home_assistant::discovery(prefix, &context.node, &context.topics, announced, streams);
                announced.clone_from(streams);
                messages.into_iter().try_for_each(|message| publish_node_message(sender, message))
            }
            Self::Sparkplug { session, .. } => {
                let messages = if session.is_born() {
                    session.update_devices(streams)
                } else if session.is_host_online() {
                    session.births(streams)
                } else {
                    return Ok(());
                };
                publish_all_unacknowledged(sender, messages)
            }
        }
    }

    /// Whether states of streams are left to publish, because the send queue had no room.
    pub(super) fn has_pending_streams(&self) -> bool {
        matches!(self, Self::Json { health, .. } if health.is_pending())
    }

    /// Handles a message that is not on one of the agent's own topics: commands and states of Sparkplug hosts.
    pub(super) fn handle_message(
        &mut self,
        message: &MqttMessage,
        sender: &mut SessionSender,
        streams: &StreamStates,
    ) -> Result<EncoderSignal, QueueFull> {
        let Self::Sparkplug { session, .. } = self else { return Ok(EncoderSignal::Continue) };
        match session.handle_message(message) {
            HostSignal::HostOffline if session.is_born() => Ok(EncoderSignal::HostOffline),
            HostSignal::HostOnline => {
                publish_all_unacknowledged(sender, session.births(streams)).map(|()| EncoderSignal::Continue)
            }
            HostSignal::Rebirth if session.is_born() => {
                publish_all_unacknowledged(sender, session.births(streams)).map(|()| EncoderSignal::Continue)
            }
            HostSignal::HostOffline | HostSignal::Rebirth | HostSignal::Ignored => Ok(EncoderSignal::Continue),
        }
    }

    /// Whether records may be sent. Records that are appended earlier are historical.
    pub(super) fn can_send_records(&self) -> bool {
        match self {
            Self::Json { .. } => true,
            Self::Sparkplug { session, .. } => session.is_born(),
        }
    }

    /// Whether the send queue has room for a record and a fence message.
    pub(super) fn has_room(sender: &SessionSender) -> bool {
        sender.has_room(REQUESTS_PER_RECORD + 1)
    }

    /// Sends a record.
    pub(super) fn send_record(
        &mut self,
        record: Record,
        historical: bool,
        sender: &mut SessionSender,
    ) -> Result<(), QueueFull> {
        match self {
            Self::Json { .. } => {
                let payload = if historical { mark_historical(record.payload) } else { record.payload };
                let message = MqttMessage { topic: record.topic, payload, retain: false };
                queued(sender.publish(message, AckToken::Record(record.id)))
            }
            Self::Sparkplug { session, unfenced, .. } => {
                publish_all_unacknowledged(sender, session.data(&record, historical))?;
                unfenced.push(record.id);
                Ok(())
            }
        }
    }

    /// Ends a burst of records. Sends the fence message for records with QoS 0; when the queue is full it is sent with the next
    /// burst.
    pub(super) fn end_burst(&mut self, sender: &mut SessionSender) {
        let Self::Sparkplug { unfenced, fence, .. } = self else { return };
        if unfenced.is_empty() {
            return;
        }
        let payload = Bytes::from(format!("{{\"records\":{}}}", unfenced.len()));
        let message = MqttMessage { topic: fence.clone(), payload, retain: false };
        if sender.publish(message, AckToken::Fence(unfenced.clone())) {
            unfenced.clear();
        }
    }

    /// Publishes again that the node is online.
    pub(super) fn send_online(&self, context: &PublisherContext, sender: &mut SessionSender) -> Result<(), QueueFull> {
        match self {
            Self::Json { .. } => publish_node_message(sender, context.status_message(AgentPresence::Online)),
            // A host asks for a rebirth.
            Self::Sparkplug { .. } => Ok(()),
        }
    }

    /// Publishes that the node goes offline, before an orderly DISCONNECT.
    pub(super) fn send_offline(&self, context: &PublisherContext, sender: &mut SessionSender) -> Result<(), QueueFull> {
        match self {
            Self::Json { .. } => publish_node_message(sender, context.status_message(AgentPresence::Offline)),
            Self::Sparkplug { session, .. } if session.is_born() => publish_node_message(sender, session.death()),
            Self::Sparkplug { .. } => Ok(()),
        }
    }
}

fn queued(is_queued: bool) -> Result<(), QueueFull> {
    if is_queued { Ok(()) } else { Err(QueueFull) }
}

/// Publishes a message about the node itself.
pub(super) fn publish_node_message(sender: &mut SessionSender, message: MqttMessage) -> Result<(), QueueFull> {
    queued(sender.publish(message, AckToken::NodeMessage))
}

fn publish_all_unacknowledged(sender: &mut SessionSender, messages: Vec<MqttMessage>) -> Result<(), QueueFull> {
    messages.into_iter().try_for_each(|message| queued(sender.publish_unacknowledged(message)))
}

fn subscribe_all(sender: &mut SessionSender, filters: &[String]) -> Result<(), QueueFull> {
    filters.iter().try_for_each(|filter| queued(sender.subscribe(filter)))
}

/// The Sparkplug birth-death number of a new session, which pairs an NBIRTH with its NDEATH. It is one more than the last one,
/// across restarts, and 0 after 255.
fn next_bd_seq(data_dir: &Path) -> io::Result<u8> {
    let path = data_dir.join(BD_SEQ_FILE);
    let last = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<u8>().ok());
    let next = last.map_or(0, |last| last.wrapping_add(1));
    match files::replace(&path, format!("{next}\n").as_bytes()) {
        // Births and deaths of this session still match. The next session has the same number.
        Err(error) if files::refuses_writes(&error) => {
            tracing::warn!(event = "sparkplug_bdseq_not_stored", %error, "The birth-death number cannot be stored");
        }
        result => result?,
    }
    Ok(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The messages of both encodings are checked by `tests/suite/mqtt.rs` and `tests/suite/sparkplug.rs` against real peers.
    #[test]
    fn the_birth_death_number_grows_across_restarts_and_wraps() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(next_bd_seq(folder.path()).unwrap(), 0);
        assert_eq!(next_bd_seq(folder.path()).unwrap(), 1);
        std::fs::write(folder.path().join(BD_SEQ_FILE), "255\n").unwrap();
        assert_eq!(next_bd_seq(folder.path()).unwrap(), 0);
        std::fs::write(folder.path().join(BD_SEQ_FILE), "damaged").unwrap();
        assert_eq!(next_bd_seq(folder.path()).unwrap(), 0);
        assert!(next_bd_seq(Path::new("/no/such/folder")).is_err());
    }
}
