//! How records are said: as they are, in JSON, or as SparkplugConfig B.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::{Publisher, Token};
use crate::connection::{Message, Sender};
use crate::home_assistant;
use crate::sparkplug::{HostSignal, Session};
use lineside_api::message::{AgentPresence, mark_historical};
use lineside_api::state::StreamStates;
use lineside_common::files;
use lineside_spool::{Record, RecordId};

/// The file in the data folder that holds SparkplugConfig's birth and death number.
const BD_SEQ_FILE: &str = "sparkplug-bdseq";
/// Requests that saying one record may take: a birth and its data.
const REQUESTS_PER_RECORD: usize = 2;

/// The manner of speaking over one connection.
pub(super) enum Encoder {
    /// As the topics of the documentation say.
    Json {
        /// The streams that Home Assistant was told of; `None` where it is not to be told.
        announced: Option<StreamStates>,
    },
    /// As an edge node.
    SparkplugConfig {
        /// Births, deaths and numbers.
        session: Box<Session>,
        /// Records that were said and that nothing behind them has been acknowledged for.
        unfenced: Vec<RecordId>,
        /// Where the message goes whose acknowledgement counts for those before it.
        fence: Arc<str>,
    },
}

impl Encoder {
    pub(super) fn new(publisher: &Publisher) -> io::Result<Self> {
        let Some(sparkplug) = &publisher.mqtt.sparkplug else {
            let announced = publisher.mqtt.home_assistant.as_ref().map(|_| StreamStates::new());
            return Ok(Self::Json { announced });
        };
        let bd_seq = next_bd_seq(&publisher.data_dir)?;
        let (node, site) = (&publisher.node, &publisher.site);
        let session = Session::new(&sparkplug.group, node, site, sparkplug.host.as_deref(), bd_seq);
        let fence = publisher.topics.fence().into();
        Ok(Self::SparkplugConfig { session: Box::new(session), unfenced: Vec::new(), fence })
    }

    /// What the broker says for us when we vanish.
    pub(super) fn will(&self, publisher: &Publisher) -> Message {
        match self {
            Self::Json { .. } => publisher.status(AgentPresence::Offline),
            Self::SparkplugConfig { session, .. } => session.death(),
        }
    }

    /// What is said and asked for first.
    pub(super) fn begin(&mut self, publisher: &Publisher, sender: &mut Sender<Token>, streams: &StreamStates) -> bool {
        match self {
            Self::Json { .. } => {
                let filters = publisher.topics.subscriptions();
                sender.publish(publisher.status(AgentPresence::Online), Token::Own)
                    && filters.iter().all(|filter| sender.subscribe(filter))
                    && self.follow(publisher, sender, streams)
            }
            Self::SparkplugConfig { session, .. } => {
                let filters = session.filters();
                filters.iter().all(|filter| sender.subscribe(filter)) && self.follow(publisher, sender, streams)
            }
        }
    }

    /// Says what has changed about the streams.
    pub(super) fn follow(&mut self, publisher: &Publisher, sender: &mut Sender<Token>, streams: &StreamStates) -> bool {
        match self {
            Self::Json { announced } => {
                let (Some(before), Some(prefix)) = (announced, &publisher.mqtt.home_assistant) else { return true };
                let messages = home_assistant::discovery(prefix, &publisher.node, &publisher.topics, before, streams);
                before.clone_from(streams);
                messages.into_iter().all(|message| sender.publish(message, Token::Own))
            }
            Self::SparkplugConfig { session, .. } => {
                let messages = match (session.is_born(), session.may_be_born()) {
                    (false, true) => session.births(streams),
                    (true, _) => session.follow(streams),
                    (false, false) => return true,
                };
                messages.into_iter().all(|message| sender.publish_unconfirmed(message))
            }
        }
    }

    /// Makes sense of a message that is none of the agent's own topics. `false` when the connection is to be given up.
    pub(super) fn hear(&mut self, message: &Message, sender: &mut Sender<Token>, streams: &StreamStates) -> bool {
        let Self::SparkplugConfig { session, .. } = self else { return true };
        match session.hear(message) {
            HostSignal::HostOffline if session.is_born() => false,
            HostSignal::HostOnline => {
                session.births(streams).into_iter().all(|message| sender.publish_unconfirmed(message))
            }
            HostSignal::Rebirth if session.is_born() => {
                session.births(streams).into_iter().all(|message| sender.publish_unconfirmed(message))
            }
            _ => true,
        }
    }

    /// Whether anybody listens: what is made before comes late.
    pub(super) fn is_heard(&self) -> bool {
        match self {
            Self::Json { .. } => true,
            Self::SparkplugConfig { session, .. } => session.is_born(),
        }
    }

    /// Whether a record may be handed over now.
    pub(super) fn has_room(sender: &Sender<Token>) -> bool {
        sender.has_room(REQUESTS_PER_RECORD + 1)
    }

    /// Says a record. `false` when there was no room after all.
    pub(super) fn say(&mut self, record: Record, historical: bool, sender: &mut Sender<Token>) -> bool {
        match self {
            Self::Json { .. } => {
                let payload = if historical { mark_historical(record.payload) } else { record.payload };
                let message = Message { topic: record.topic, payload, retain: false };
                sender.publish(message, Token::Record(record.place))
            }
            Self::SparkplugConfig { session, unfenced, .. } => {
                let said =
                    session.data(&record, historical).into_iter().all(|message| sender.publish_unconfirmed(message));
                if said {
                    unfenced.push(record.place);
                }
                said
            }
        }
    }

    /// After a burst of records: what makes the broker acknowledge those it acknowledges none of.
    pub(super) fn pause(&mut self, sender: &mut Sender<Token>) {
        let Self::SparkplugConfig { unfenced, fence, .. } = self else { return };
        if unfenced.is_empty() {
            return;
        }
        let payload = Bytes::from(format!("{{\"records\":{}}}", unfenced.len()));
        let message = Message { topic: fence.clone(), payload, retain: false };
        if sender.publish(message, Token::Records(unfenced.clone())) {
            unfenced.clear();
        }
    }

    /// Says goodbye.
    pub(super) fn leave(&self, publisher: &Publisher, sender: &mut Sender<Token>) -> bool {
        match self {
            Self::Json { .. } => sender.publish(publisher.status(AgentPresence::Offline), Token::Own),
            Self::SparkplugConfig { session, .. } if session.is_born() => sender.publish(session.death(), Token::Own),
            Self::SparkplugConfig { .. } => true,
        }
    }
}

/// The number that binds a birth to its death: one more than the last, also over restarts, and 0 after 255.
fn next_bd_seq(data_dir: &Path) -> io::Result<u8> {
    let path = data_dir.join(BD_SEQ_FILE);
    let last = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<u8>().ok());
    let next = last.map_or(0, |last| last.wrapping_add(1));
    files::replace(&path, format!("{next}\n").as_bytes())?;
    Ok(next)
}
