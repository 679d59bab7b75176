//! Publishes the spool's records to a broker. One task owns the connection.
//!
//! ```text
//!            selects the first available broker         accepted: publishes its status; resends what was unacknowledged
//! (start) -----------------------------------> Connecting ---------------------------------------------------> Session
//!                      ^                           |                                                              |
//!                      |  delay per broker; half a minute after a refusal                                         | PUBACK: deletes the record
//!                      +---------------------------+--- lost, no progress, no answer to a keep-alive request -----+ append: sends the record
//!                      |                                                                                          |
//!                      +-- closed in order: preferred broker available, credentials changed, Sparkplug host offline
//! ```
//!
//! A record is deleted from the spool on its PUBACK and not before.
//!
//! [`Publisher::run`] may be called again after it has panicked: everything that outlives it is in the spool. A guard makes sure
//! that [`BrokerState`] is `Disconnected`, and the spool informed, whenever `run` is not running.

mod broker_selector;
mod commands;
mod context;
mod encoder;
mod send_window;
mod session;
#[cfg(test)]
mod simulation;

use std::time::SystemTime;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::broker_selector::{BrokerSelector, Selection};
use self::commands::Commands;
pub use self::context::PublisherContext;
use self::encoder::{Encoder, SessionSender};
use self::session::{CREDENTIALS_CHECK_INTERVAL, Session, SessionEnd, SessionInputs};
use crate::broker_state::{BrokerState, BrokerStateWriter};
use crate::connection;
use crate::connection::{ConnectionEvent, ConnectionLoss, MqttReceiver};
use crate::credentials::{BrokerCredentials, fingerprint};

/// Publishes records to one broker at a time, and owns the connection and its state.
pub struct Publisher {
    context: PublisherContext,
    state: BrokerStateWriter,
}

/// What a session, or the attempt to open one, leads to.
struct SessionReport {
    end: SessionEnd,
    was_connected: bool,
    results_published: u64,
}

impl SessionReport {
    fn not_connected(end: SessionEnd) -> Self {
        Self { end, was_connected: false, results_published: 0 }
    }
}

/// Ends the connection's state with the future of [`Publisher::run`], also when it panics or is dropped.
struct RunGuard<'a>(&'a Publisher);

impl Drop for RunGuard<'_> {
    fn drop(&mut self) {
        let reason = std::thread::panicking().then(|| "the publisher panicked".to_owned());
        self.0.disconnected(reason);
    }
}

impl Publisher {
    /// A publisher that is not connected. [`Self::run`] starts it.
    pub fn new(context: PublisherContext) -> Self {
        let state = BrokerStateWriter::new(context.metrics.clone());
        Self { context, state }
    }

    /// The state of the broker connection, which follows the publisher.
    pub fn broker_state(&self) -> watch::Receiver<BrokerState> {
        self.state.subscribe()
    }

    /// Publishes until `stop` is cancelled; then waits up to three seconds for acknowledgements and disconnects in order. It
    /// can be called again after it has ended or panicked, but must not run twice at the same time.
    pub async fn run(&self, stop: CancellationToken) {
        // An earlier run may have panicked with records in flight.
        self.context.spool.disconnected();
        let _guard = RunGuard(self);
        let mut inputs =
            SessionInputs { commands: Commands::new(&self.context), streams: self.context.streams.clone(), stop };
        let mut selector = BrokerSelector::new(&self.context.mqtt.brokers);
        let mut credentials = self.credentials_fingerprint();
        loop {
            let index = match selector.select(Instant::now()) {
                Selection::Connect(index) => index,
                Selection::Wait(until) => {
                    tokio::select! {
                        () = tokio::time::sleep_until(until.min(Instant::now() + CREDENTIALS_CHECK_INTERVAL)) => {}
                        () = inputs.stop.cancelled() => return self.context.log_remaining_records(),
                    }
                    let current = self.credentials_fingerprint();
                    if current != credentials {
                        // The new credentials may be accepted.
                        credentials = current;
                        selector.reset();
                    }
                    continue;
                }
            };
            let report = self.run_session(&selector, index, &mut inputs).await;
            credentials = self.credentials_fingerprint();
            if self.finish_session(&mut selector, index, report) {
                return;
            }
        }
    }

    /// Updates state and selector after a session. Returns whether the publisher stops.
    fn finish_session(&self, selector: &mut BrokerSelector, index: usize, report: SessionReport) -> bool {
        // Only a session that delivered results resets the retry delay. The status message does not count: two agents with
        // the same node name would disconnect each other at full speed.
        if report.results_published > 0 {
            selector.record_success(index);
        }
        match report.end {
            SessionEnd::Stopped | SessionEnd::Reconnect => self.disconnected(None),
            SessionEnd::Lost(ref loss) => {
                let reason = loss.reason();
                if selector.record_failure(index, loss, report.was_connected, Instant::now()) {
                    let broker = selector.broker(index);
                    tracing::warn!(
                        event = "broker_disconnected",
                        %broker,
                        reason,
                        "Broker is not connected; records wait in the spool"
                    );
                }
                self.disconnected(Some(reason));
            }
        }
        matches!(report.end, SessionEnd::Stopped)
    }

    /// Publishes that no connection is open.
    fn disconnected(&self, reason: Option<String>) {
        self.context.spool.disconnected();
        self.state.set_disconnected(reason);
    }

    fn credentials_fingerprint(&self) -> Option<lineside_common::digest::Digest> {
        fingerprint(self.context.mqtt.secret.as_deref())
    }

    /// Connects to a broker and runs a session until it ends.
    async fn run_session(&self, selector: &BrokerSelector, index: usize, inputs: &mut SessionInputs) -> SessionReport {
        let (sender, receiver, encoder) = match self.connect(selector, index, &inputs.stop).await {
            Ok(connected) => connected,
            Err(end) => return SessionReport::not_connected(end),
        };
        let (broker, waiting) = (selector.broker(index), self.context.spool.stats().records);
        self.state.set_connected(index, broker);
        tracing::info!(event = "broker_connected", %broker, waiting, "Broker is connected");
        let mut session = Session::new(&self.context, sender, encoder, selector, index);
        let end = session.run(receiver, inputs).await;
        SessionReport { end, was_connected: true, results_published: session.results_published() }
    }

    /// Opens a connection and waits until the broker accepts it.
    async fn connect(
        &self,
        selector: &BrokerSelector,
        index: usize,
        stop: &CancellationToken,
    ) -> Result<(SessionSender, MqttReceiver, Encoder), SessionEnd> {
        let (context, broker) = (&self.context, selector.broker(index));
        let credentials = BrokerCredentials::read(broker, context.mqtt.secret.as_deref())
            .map_err(|error| SessionEnd::Lost(error.into()))?;
        let expires = credentials.expires.and_then(|expires| expires.duration_since(SystemTime::UNIX_EPOCH).ok());
        let expires = expires.and_then(|expires| i64::try_from(expires.as_secs()).ok());
        context.metrics.certificate_expiry.set(expires.unwrap_or(0));
        let encoder = Encoder::new(context).map_err(|error| {
            let loss = ConnectionLoss::unreachable("the Sparkplug birth-death number cannot be stored");
            SessionEnd::Lost(loss.with_source(error))
        })?;
        // The client id is the same for every connection of the node, so that the broker closes the old one.
        let client_id = format!("lineside/{}/{}", context.site, context.node);
        let will = Some(encoder.will(context));
        let (mut sender, mut receiver) =
            connection::prepare(broker, &credentials, &client_id, context.mqtt.keep_alive, will);
        loop {
            let event = tokio::select! {
                event = receiver.next() => event,
                () = stop.cancelled() => {
                    context.log_remaining_records();
                    return Err(SessionEnd::Stopped);
                }
            };
            match sender.interpret(event) {
                ConnectionEvent::Connected => return Ok((sender, receiver, encoder)),
                ConnectionEvent::Lost(loss) => return Err(SessionEnd::Lost(loss)),
                _ => {}
            }
        }
    }
}
