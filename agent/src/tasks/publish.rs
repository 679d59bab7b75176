//! From the spool to the broker. One task owns the connection.
//!
//! ```text
//!           connect            accepted: say online, send everything un-acknowledged again
//! (start) ---------> Waiting ---------------------------------------------------> Open
//!                       ^                                                          |  PUBACK: forget the record
//!                       |   capped, jittered backoff                               |  append: send it
//!                       +-------------------- lost, or no progress ----------------+
//! ```
//!
//! A record leaves the spool on its PUBACK and not before. A connection on which nothing moves for twice the keep-alive
//! while records are on the way is given up and made anew.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::base::backoff::Backoff;
use crate::base::clock;
use crate::base::metrics::Metrics;
use crate::config::agent::Broker;
use crate::message::{Presence, StatusMessage, Topics};
use crate::mqtt::{self, Event, KEEP_ALIVE, Loss, Message, Receiver, Sender, WINDOW};
use crate::spool::Spool;

const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_CAP: Duration = Duration::from_secs(10);
/// A connection that does not move for this long while records are on the way is given up.
const WEDGED_AFTER: Duration = Duration::from_secs(2 * KEEP_ALIVE.as_secs());
/// How long the end may wait for the broker to take what is left.
const FAREWELL: Duration = Duration::from_secs(3);

/// What is to be acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Record(u64),
    Status,
}

/// Who speaks.
pub struct Publisher {
    /// The broker.
    pub broker: Broker,
    /// Our topics.
    pub topics: Topics,
    /// The node's name.
    pub node: String,
    /// The site's name.
    pub site: String,
    /// The boot epoch.
    pub epoch: u64,
    /// Where records come from.
    pub spool: Arc<dyn Spool>,
    /// Where it is counted.
    pub metrics: Metrics,
}

/// How a connection ended.
enum Ended {
    Lost(Loss),
    Farewell,
}

impl Publisher {
    /// Publishes until stopped; then it waits a little for the broker to take what is left and says goodbye.
    pub async fn run(self, stop: CancellationToken) {
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_CAP);
        let mut told: Option<Loss> = None;
        loop {
            let results_before = self.metrics.mqtt_results.get();
            let ended = self.connection(&stop).await;
            let was_open = self.metrics.mqtt_connected.get() == 1;
            self.metrics.mqtt_connected.set(0);
            let loss = match ended {
                Ended::Farewell => return,
                Ended::Lost(loss) => loss,
            };
            // Only a connection that got a result across has earned a quick next try. The status does not count: two
            // agents of one name would throw each other out at full speed.
            if self.metrics.mqtt_results.get() > results_before {
                backoff.reset();
            }
            if was_open || told.as_ref().is_none_or(|told| loss.is_news_after(told)) {
                tracing::warn!(broker = %self.broker, reason = loss.reason(), "broker is not reached, results wait");
                told = Some(loss);
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.next_delay()) => {}
                () = stop.cancelled() => return self.warn_of_loss(),
            }
        }
    }

    /// One connection, from the attempt to its end.
    async fn connection(&self, stop: &CancellationToken) -> Ended {
        // The client id is the node's, so that a broker lets go of our last connection when it sees the new one.
        let client_id = format!("lineside/{}/{}", self.site, self.node);
        let (mut sender, mut receiver) =
            mqtt::connection(&self.broker, &client_id, Some(self.status(Presence::Offline)));
        loop {
            let seen = tokio::select! {
                seen = receiver.next() => seen,
                () = stop.cancelled() => {
                    self.warn_of_loss();
                    return Ended::Farewell;
                }
            };
            match sender.understand(seen) {
                Event::Connected => break,
                Event::Lost(loss) => return Ended::Lost(loss),
                _ => {}
            }
        }
        self.metrics.mqtt_connected.set(1);
        tracing::info!(broker = %self.broker, waiting = self.spool.stats().records, "broker is reached");
        if !sender.publish(self.status(Presence::Online), Token::Status) {
            return Ended::Lost(Loss::Unreachable("the first message found no room".to_owned()));
        }
        self.open(sender, receiver, stop).await
    }

    /// An accepted connection: everything that waits is sent, oldest first.
    async fn open(&self, mut sender: Sender<Token>, mut receiver: Receiver, stop: &CancellationToken) -> Ended {
        let mut sent_up_to = None;
        let mut last_progress = Instant::now();
        let mut farewell: Option<Instant> = None;
        let mut has_left = false;
        loop {
            self.fill(&mut sender, &mut sent_up_to, &mut last_progress);
            let all_taken = sender.unacknowledged() == 0;
            if farewell.is_some() && all_taken && !has_left {
                has_left = self.leave(&mut sender);
            }
            // The future is kept until it is done: dropping it half way could lose a packet.
            let next = receiver.next();
            tokio::pin!(next);
            let seen = loop {
                let deadline = farewell.unwrap_or(last_progress + WEDGED_AFTER);
                tokio::select! {
                    seen = &mut next => break Some(seen),
                    () = self.spool.appended().notified(), if sender.unacknowledged() < WINDOW && !has_left => {
                        self.fill(&mut sender, &mut sent_up_to, &mut last_progress);
                    }
                    () = stop.cancelled(), if farewell.is_none() => {
                        farewell = Some(Instant::now() + FAREWELL);
                        // What was appended last may not have been sent yet: both waits were over at once.
                        self.fill(&mut sender, &mut sent_up_to, &mut last_progress);
                        if sender.unacknowledged() == 0 {
                            has_left = self.leave(&mut sender);
                        }
                    }
                    () = tokio::time::sleep_until(deadline) => {
                        match farewell {
                            Some(_) => {
                                self.warn_of_loss();
                                return Ended::Farewell;
                            }
                            None if sender.unacknowledged() > 0 => break None,
                            None => last_progress = Instant::now(),
                        }
                    }
                }
            };
            let Some(seen) = seen else {
                return Ended::Lost(Loss::Unreachable(format!(
                    "nothing was acknowledged for {} s",
                    WEDGED_AFTER.as_secs()
                )));
            };
            match sender.understand(seen) {
                Event::Acknowledged(token) => {
                    last_progress = Instant::now();
                    self.metrics.mqtt_published.inc();
                    if let Token::Record(seq) = token {
                        self.metrics.mqtt_results.inc();
                        self.spool.acknowledge(seq);
                    }
                }
                Event::Lost(_) if has_left => {
                    self.warn_of_loss();
                    return Ended::Farewell;
                }
                Event::Lost(loss) => return Ended::Lost(loss),
                _ => {}
            }
        }
    }

    /// Sends what waits behind `sent_up_to`, as far as the window goes.
    fn fill(&self, sender: &mut Sender<Token>, sent_up_to: &mut Option<u64>, last_progress: &mut Instant) {
        // On an idle connection the clock for a lack of progress starts with the first message.
        if sender.unacknowledged() == 0 {
            *last_progress = Instant::now();
        }
        while sender.unacknowledged() < WINDOW
            && let Some(record) = self.spool.next(*sent_up_to)
        {
            let message = Message { topic: record.topic, payload: record.payload, retain: false };
            if !sender.publish(message, Token::Record(record.seq)) {
                return;
            }
            *sent_up_to = Some(record.seq);
        }
    }

    /// Says offline and asks for the end of the connection.
    fn leave(&self, sender: &mut Sender<Token>) -> bool {
        sender.publish(self.status(Presence::Offline), Token::Status) && sender.disconnect()
    }

    fn status(&self, state: Presence) -> Message {
        let status = StatusMessage {
            state,
            ts: clock::rfc3339(SystemTime::now()),
            site: &self.site,
            node: &self.node,
            version: env!("CARGO_PKG_VERSION"),
            epoch: self.epoch,
        };
        // A structure of texts and numbers always becomes JSON.
        let payload = Bytes::from(serde_json::to_vec(&status).unwrap_or_default());
        Message { topic: self.topics.status(), payload, retain: true }
    }

    fn warn_of_loss(&self) {
        let left = self.spool.stats().records;
        if left > 0 {
            tracing::warn!(records = left, "ending with results the broker has not taken; they are lost");
        }
    }
}
