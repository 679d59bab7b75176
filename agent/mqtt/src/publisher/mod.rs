//! From the spool to a broker. One task owns the connection.
//!
//! ```text
//!            the first broker that may be tried          accepted: say online; what was on the way goes again
//! (start) ------------------------------------> Waiting ------------------------------------------------> Open
//!                        ^                         |                                                        |
//!                        |  back off, each broker for itself; a rejection for half a minute                   | PUBACK: forget
//!                        +-------------------------+------ lost, wedged, silent ----------------------------+ append: send
//!                        |                                                                                  |
//!                        +-- left in order: a better broker is there again, or credentials have changed ----+
//! ```
//!
//! A record leaves the spool on its PUBACK and not before. A connection on which nothing moves for twice the keep-alive
//! while messages are on the way, or that does not answer a probe within half the keep-alive, is given up and made anew.

mod broker_selector;
mod commands;
mod encoder;
mod send_window;
mod session;
#[cfg(test)]
mod simulated_days;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::broker_selector::BrokerSelector;
use self::commands::Commands;
pub use self::commands::SetLevel;
use self::encoder::Encoder;
use self::session::Session;
use crate::config::MqttConfig;
use crate::connection;
use crate::connection::{ConnectionLoss, Event, Message, Receiver, Sender};
use crate::credentials::{BrokerCredentials, fingerprint};
use lineside_api::message::{AgentPresence, PresenceMessage, Topics};
use lineside_api::state::StreamStates;
use lineside_common::clock;
use lineside_common::metrics::Metrics;
use lineside_spool::{RecordId, Spool};

/// How often the files of the secret are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// What is to be acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    /// This record.
    Record(RecordId),
    /// These records, which went before without being acknowledged each.
    Records(Vec<RecordId>),
    /// Something that no record says.
    Own,
}

/// Who speaks.
pub struct Publisher {
    /// Brokers, and what is said to them.
    pub mqtt: MqttConfig,
    /// Our topics.
    pub topics: Topics,
    /// The node's name.
    pub node: String,
    /// The site's name.
    pub site: String,
    /// The boot epoch.
    pub epoch: u64,
    /// The agent's own folder.
    pub data_dir: PathBuf,
    /// Where records come from.
    pub spool: Arc<Spool>,
    /// The streams.
    pub registry: watch::Receiver<StreamStates>,
    /// Who carries out commands.
    pub commands: mpsc::Sender<crate::command::CommandRequest>,
    /// Changes what is logged.
    pub set_level: SetLevel,
    /// Where it is counted.
    pub metrics: Metrics,
}

/// How a connection ended.
#[derive(Debug)]
enum SessionEnd {
    /// It broke, or never came to be.
    Lost(ConnectionLoss),
    /// It was left on purpose, and there is to be another.
    Moved,
    /// The agent ends.
    Farewell,
}

impl Publisher {
    /// Publishes until stopped; then it waits a little for the broker to take what is left and says goodbye.
    pub async fn run(self, stop: CancellationToken) {
        let mut selector = BrokerSelector::new(&self.mqtt.brokers);
        let mut commands = Commands::new(
            &self.node,
            self.topics.clone(),
            self.mqtt.commands.clone(),
            self.commands.clone(),
            self.set_level.clone(),
            self.metrics.clone(),
        );
        let mut print = fingerprint(self.mqtt.secret.as_deref());
        let mut registry = self.registry.clone();
        loop {
            let index = match selector.choose(Instant::now()) {
                Ok(index) => index,
                Err(until) => {
                    tokio::select! {
                        () = tokio::time::sleep_until(until.min(Instant::now() + LOOK_EVERY)) => {}
                        () = stop.cancelled() => return self.tell_what_is_left(),
                    }
                    let now = fingerprint(self.mqtt.secret.as_deref());
                    if now != print {
                        // Other credentials may be accepted.
                        print = now;
                        selector.reset();
                    }
                    continue;
                }
            };
            let published_before = self.metrics.mqtt_results.get();
            let ended = self.visit(&selector, index, &mut commands, &mut registry, &stop).await;
            let was_open = self.metrics.mqtt_connected.get() == 1;
            self.metrics.mqtt_connected.set(0);
            self.spool.disconnected();
            print = fingerprint(self.mqtt.secret.as_deref());
            // Only a connection that got a record across has earned a quick next try. The status does not count: two
            // agents of one name would throw each other out at full speed.
            if self.metrics.mqtt_results.get() > published_before {
                selector.record_success(index);
            }
            match ended {
                SessionEnd::Farewell => return,
                SessionEnd::Moved => {}
                SessionEnd::Lost(loss) => {
                    let is_news = selector.record_failure(index, &loss, was_open, Instant::now());
                    if is_news {
                        let broker = selector.broker(index);
                        tracing::warn!(event = "broker_disconnected", %broker, reason = loss.reason(), "broker is not reached, results wait");
                    }
                }
            }
        }
    }

    /// One connection to one broker, from the attempt to its end.
    async fn visit(
        &self,
        selector: &BrokerSelector,
        index: usize,
        commands: &mut Commands,
        registry: &mut watch::Receiver<StreamStates>,
        stop: &CancellationToken,
    ) -> SessionEnd {
        let broker = selector.broker(index);
        let access = match BrokerCredentials::read(broker, self.mqtt.secret.as_deref()) {
            Ok(access) => access,
            Err(reason) => return SessionEnd::Lost(ConnectionLoss::Refused(reason)),
        };
        let expires = access.expires.and_then(|expires| expires.duration_since(SystemTime::UNIX_EPOCH).ok());
        let expires = expires.and_then(|expires| i64::try_from(expires.as_secs()).ok());
        self.metrics.mqtt_certificate_expiry.set(expires.unwrap_or(0));
        let encoder = match Encoder::new(self) {
            Ok(encoder) => encoder,
            Err(error) => {
                return SessionEnd::Lost(ConnectionLoss::Unreachable(format!("bdSeq cannot be written down: {error}")));
            }
        };
        // The client id is the node's, so that a broker lets go of our last connection when it sees the new one.
        let client_id = format!("lineside/{}/{}", self.site, self.node);
        let (mut sender, mut receiver) =
            connection::connection(broker, &access, &client_id, self.mqtt.keep_alive, Some(encoder.will(self)));
        if let Err(ended) = self.accepted(&mut sender, &mut receiver, stop).await {
            return ended;
        }
        self.metrics.mqtt_connected.set(1);
        self.metrics.mqtt_broker_index.set(i64::try_from(index).unwrap_or(i64::MAX));
        tracing::info!(event = "broker_connected", %broker, waiting = self.spool.stats().records, "broker is reached");
        let talk = Session::new(self, sender, encoder, selector, index);
        talk.run(receiver, commands, registry, stop).await
    }

    /// Waits for the broker to accept us.
    async fn accepted(
        &self,
        sender: &mut Sender<Token>,
        receiver: &mut Receiver,
        stop: &CancellationToken,
    ) -> Result<(), SessionEnd> {
        loop {
            let seen = tokio::select! {
                seen = receiver.next() => seen,
                () = stop.cancelled() => {
                    self.tell_what_is_left();
                    return Err(SessionEnd::Farewell);
                }
            };
            match sender.understand(seen) {
                Event::Connected => return Ok(()),
                Event::Lost(loss) => return Err(SessionEnd::Lost(loss)),
                _ => {}
            }
        }
    }

    fn status(&self, state: AgentPresence) -> Message {
        let status = PresenceMessage {
            state,
            ts: clock::rfc3339(SystemTime::now()),
            site: &self.site,
            node: &self.node,
            version: env!("CARGO_PKG_VERSION"),
            epoch: self.epoch,
        };
        // A structure of texts and numbers always becomes JSON.
        let payload = Bytes::from(serde_json::to_vec(&status).unwrap_or_default());
        Message { topic: self.topics.status().into(), payload, retain: true }
    }

    fn tell_what_is_left(&self) {
        let left = self.spool.stats().records;
        if left > 0 {
            tracing::info!(
                event = "records_left_in_spool",
                records = left,
                "ending with results the broker has not taken; the spool keeps them"
            );
        }
    }
}
