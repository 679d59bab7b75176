//! One MQTT session: from the broker's acceptance to the end of the connection. Tested with the publisher in the parent module,
//! and in `tests/suite/` against real brokers and scripted ones.
//!
//! A session ends when the connection is lost, when it makes no progress for twice the keep-alive although messages are
//! unacknowledged, when a keep-alive request is not answered within half the keep-alive, or in order: the node publishes that it
//! is offline and sends DISCONNECT, because the agent stops, the credentials have changed, a preferred broker is available, or
//! the Sparkplug primary host is offline.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::broker_selector::{BrokerSelector, probe};
use super::commands::Commands;
use super::context::PublisherContext;
use super::encoder::{AckToken, Encoder, EncoderSignal, QueueFull, SessionSender, publish_node_message};
use super::send_window::{SendWindow, Undeliverable, WINDOW, packet_bytes};
use super::suspects::{LossCause, Suspects};
use crate::connection::{ConnectionEvent, ConnectionLoss, MqttMessage, MqttReceiver, TransportEvent};
use crate::credentials::fingerprint;
use crate::node_clash::ClashDetector;
use lineside_api::message::IncomingTopic;
use lineside_api::state::StreamStates;
use lineside_common::digest::Digest;
use lineside_spool::{RecordKind, SetAsideReason};

/// Interval at which the credential files are checked for changes.
pub(super) const CREDENTIALS_CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// Maximum time that an orderly end waits for acknowledgements.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum time that the agent waits for the broker to close the connection after DISCONNECT.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Largest payload of a message that is looked at, in bytes.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// Shortest time between two presence messages of a session.
const PRESENCE_INTERVAL: Duration = Duration::from_secs(2);

/// How a session ended.
#[derive(Debug)]
pub(super) enum SessionEnd {
    /// The connection was lost, or could not be opened.
    Lost(ConnectionLoss),
    /// The session was closed in order; another one follows at once.
    Reconnect,
    /// The agent stops.
    Stopped,
}

impl From<QueueFull> for SessionEnd {
    fn from(error: QueueFull) -> Self {
        Self::Lost(ConnectionLoss::unreachable("a message about the node cannot be sent").with_source(error))
    }
}

/// What a session receives from the rest of the agent. It is kept from one session to the next.
pub(super) struct SessionInputs {
    pub(super) commands: Commands,
    pub(super) streams: watch::Receiver<StreamStates>,
    pub(super) clash: ClashDetector,
    /// The records that the broker may not take.
    pub(super) suspects: Suspects,
    pub(super) stop: CancellationToken,
}

/// An open session.
pub(super) struct Session<'a> {
    context: &'a PublisherContext,
    selector: &'a BrokerSelector,
    /// The index of the connected broker.
    index: usize,
    sender: SessionSender,
    encoder: Encoder,
    window: SendWindow,
    results_published: u64,
    /// What a loss of the connection now says about the unacknowledged records.
    loss_cause: LossCause,
    /// Whether the spool knows of the connection, and records are sent.
    is_sending: bool,
    /// The last acknowledgement, or the first message after an idle time.
    last_progress: Instant,
    /// When the keep-alive request was sent that is not answered yet.
    ping_sent_at: Option<Instant>,
    /// When the presence is published again, because the status topic says that the agent is offline.
    presence_due: Option<Instant>,
    presence_published: Instant,
    credentials: Option<Digest>,
    credentials_check_at: Instant,
    /// When the preferred brokers are probed, and the probe that runs.
    probe_at: Option<Instant>,
    running_probe: Option<JoinHandle<bool>>,
    closing: Option<Closing>,
}

/// Whether a presence message says that the agent is offline.
fn is_offline(payload: &[u8]) -> bool {
    let presence: serde_json::Value = serde_json::from_slice(payload).unwrap_or_default();
    presence["state"] == "offline"
}

/// The orderly end of a session.
struct Closing {
    reason: CloseReason,
    deadline: Instant,
    /// Whether the offline message and DISCONNECT were sent.
    is_disconnecting: bool,
}

/// Why a session is closed in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CloseReason {
    /// The agent stops. Records are sent until the deadline.
    Stop,
    /// Another session follows. Unsent records are left for it.
    Reconnect,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        context: &'a PublisherContext,
        sender: SessionSender,
        encoder: Encoder,
        selector: &'a BrokerSelector,
        index: usize,
    ) -> Self {
        let now = Instant::now();
        Self {
            context,
            selector,
            index,
            sender,
            encoder,
            window: SendWindow::new(context.mqtt.drain_per_second, now.into_std()),
            results_published: 0,
            loss_cause: LossCause::Closed,
            is_sending: false,
            last_progress: now,
            ping_sent_at: None,
            presence_due: None,
            presence_published: now,
            credentials: fingerprint(context.mqtt.secret.as_deref()),
            credentials_check_at: now + CREDENTIALS_CHECK_INTERVAL,
            probe_at: selector.has_preferred(index).then(|| now + selector.failback_delay(index)),
            running_probe: None,
            closing: None,
        }
    }

    /// Number of results that the broker acknowledged.
    pub(super) fn results_published(&self) -> u64 {
        self.results_published
    }

    /// Runs the session until it ends.
    pub(super) async fn run(&mut self, receiver: MqttReceiver, inputs: &mut SessionInputs) -> SessionEnd {
        let streams = inputs.streams.borrow_and_update().clone();
        if let Err(error) = self.encoder.start(self.context, &mut self.sender, &streams) {
            return error.into();
        }
        self.window.start(std::mem::take(&mut inputs.suspects), self.index, Instant::now().into_std());
        let end = match self.run_events(receiver, inputs).await {
            Ok(never) => match never {},
            Err(end) => end,
        };
        inputs.suspects = self.finish(&end);
        end
    }

    /// Registers how the session ended, and sets aside what the broker does not take.
    fn finish(&mut self, end: &SessionEnd) -> Suspects {
        let is_lost = matches!(end, SessionEnd::Lost(_)) || self.loss_cause == LossCause::Unacknowledged;
        let cause = if is_lost { self.loss_cause } else { LossCause::Other };
        let (mut suspects, set_aside) = self.window.end(cause, Instant::now().into_std());
        if let Some(record) = set_aside {
            self.set_aside(&record);
        }
        suspects.save(&self.context.data_dir);
        suspects
    }

    fn set_aside(&self, record: &Undeliverable) {
        self.context.spool.set_aside(record.id, record.reason);
        tracing::error!(
            event = "record_set_aside",
            broker = %self.selector.broker(self.index),
            kind = record.id.kind.name(),
            position = record.id.position,
            topic = &*record.topic,
            bytes = record.bytes,
            reason = record.reason.as_str(),
            "The broker does not take a message; it is set aside. `lineside spool ls --set-aside` shows it"
        );
    }

    async fn run_events(
        &mut self,
        mut receiver: MqttReceiver,
        inputs: &mut SessionInputs,
    ) -> Result<std::convert::Infallible, SessionEnd> {
        let context = self.context;
        loop {
            if self.encoder.has_pending_streams() && self.closing.is_none() {
                let streams = inputs.streams.borrow().clone();
                self.encoder.update_streams(context, &mut self.sender, &streams)?;
            }
            self.send_records();
            // The future is polled to completion: dropping it earlier could lose a packet.
            let next = receiver.next();
            tokio::pin!(next);
            let event = loop {
                let wake_at = self.wake_at();
                let can_send = self.closing.is_none() && self.window.unacknowledged() < WINDOW;
                tokio::select! {
                    event = &mut next => break event,
                    () = context.spool.changed().notified(), if can_send => self.send_records(),
                    Ok(()) = inputs.streams.changed() => {
                        let streams = inputs.streams.borrow_and_update().clone();
                        if self.closing.is_none() {
                            self.encoder.update_streams(context, &mut self.sender, &streams)?;
                        }
                    }
                    reply = inputs.commands.next_reply() => {
                        if self.closing.is_none() {
                            publish_node_message(&mut self.sender, reply)?;
                        }
                    }
                    is_available = probe_result(&mut self.running_probe) => self.on_probe(is_available),
                    () = inputs.stop.cancelled(), if !self.is_stopping() => self.close(CloseReason::Stop),
                    () = tokio::time::sleep_until(wake_at) => {
                        inputs.clash.expire(Instant::now());
                        self.on_timer()?;
                    }
                }
            };
            self.on_event(event, inputs)?;
        }
    }

    fn is_stopping(&self) -> bool {
        self.closing.as_ref().is_some_and(|closing| closing.reason == CloseReason::Stop)
    }

    fn is_disconnecting(&self) -> bool {
        self.closing.as_ref().is_some_and(|closing| closing.is_disconnecting)
    }

    /// Sends the records that the window admits.
    fn send_records(&mut self) {
        // After an idle time, the time without progress starts with the first message.
        if self.sender.unacknowledged() == 0 {
            self.last_progress = Instant::now();
        }
        if !self.is_sending && self.encoder.can_send_records() {
            self.is_sending = true;
            self.context.spool.connected();
        }
        let is_open = self
            .closing
            .as_ref()
            .is_none_or(|closing| closing.reason == CloseReason::Stop && !closing.is_disconnecting);
        while is_open && self.is_sending && Encoder::has_room(&self.sender) {
            let now = Instant::now().into_std();
            let Some((record, historical)) = self.window.next(&self.context.spool, now) else { break };
            let id = record.id;
            if self.window.exceeds_limit(&record, self.context.mqtt.packet_bytes_max, now) {
                self.window.requeue(id);
                let (bytes, reason) = (packet_bytes(&record), SetAsideReason::TooLarge);
                self.set_aside(&Undeliverable { id, bytes, topic: record.topic, reason });
                continue;
            }
            if self.encoder.send_record(record, historical, &mut self.sender).is_err() {
                self.window.requeue(id);
                self.context.spool.requeue(id);
                break;
            }
        }
        self.encoder.end_burst(&mut self.sender);
        self.disconnect_when_acknowledged();
    }

    /// Starts the orderly end: unacknowledged messages are awaited, then the node goes offline.
    fn close(&mut self, reason: CloseReason) {
        let is_disconnecting = self.is_disconnecting();
        self.closing = Some(Closing { reason, deadline: Instant::now() + CLOSE_TIMEOUT, is_disconnecting });
        self.send_records();
    }

    /// While closing: sends the offline message and DISCONNECT once everything is acknowledged.
    fn disconnect_when_acknowledged(&mut self) {
        let Some(closing) = &mut self.closing else { return };
        if closing.is_disconnecting || self.sender.unacknowledged() > 0 {
            return;
        }
        let is_offline_sent = self.encoder.send_offline(self.context, &mut self.sender).is_ok();
        closing.is_disconnecting = is_offline_sent && self.sender.disconnect();
        closing.deadline = closing.deadline.min(Instant::now() + DISCONNECT_TIMEOUT);
    }

    /// When the next timer expires.
    fn wake_at(&self) -> Instant {
        if let Some(closing) = &self.closing {
            return closing.deadline;
        }
        let now = Instant::now();
        let timers = [
            self.progress_deadline(),
            self.ping_deadline(),
            self.window.backlog_delay(now.into_std()).map(|delay| now + delay),
            self.window.alone_at().map(Instant::from_std),
            self.overdue_deadline(),
            self.presence_due,
            self.probe_at,
        ];
        timers.into_iter().flatten().fold(self.credentials_check_at, Instant::min)
    }

    /// While messages are unacknowledged: when the connection is given up because none has been acknowledged.
    fn progress_deadline(&self) -> Option<Instant> {
        (self.sender.unacknowledged() > 0).then(|| self.last_progress + self.progress_timeout())
    }

    /// When the oldest unacknowledged record is overdue, although others may have been acknowledged.
    fn overdue_deadline(&self) -> Option<Instant> {
        self.window.oldest_sent_at().map(|sent_at| Instant::from_std(sent_at) + self.progress_timeout())
    }

    fn progress_timeout(&self) -> Duration {
        self.context.mqtt.keep_alive * 2
    }

    /// After a keep-alive request: when the connection is given up because it was not answered.
    fn ping_deadline(&self) -> Option<Instant> {
        self.ping_sent_at.map(|sent_at| sent_at + self.context.mqtt.keep_alive / 2)
    }

    fn on_timer(&mut self) -> Result<(), SessionEnd> {
        let now = Instant::now();
        let is_due = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        if let Some(closing) = self.closing.as_ref().filter(|closing| closing.deadline <= now) {
            return Err(self.end(closing.reason));
        }
        if is_due(self.progress_deadline()) {
            let seconds = self.progress_timeout().as_secs();
            let message = format!("the broker acknowledged no message for {seconds} s");
            self.loss_cause = LossCause::Unacknowledged;
            return Err(SessionEnd::Lost(ConnectionLoss::unreachable(message)));
        }
        if is_due(self.ping_deadline()) {
            self.loss_cause = LossCause::Other;
            return Err(SessionEnd::Lost(ConnectionLoss::unreachable(
                "the broker does not answer keep-alive requests",
            )));
        }
        if is_due(self.presence_due) {
            (self.presence_due, self.presence_published) = (None, now);
            self.encoder.send_online(self.context, &mut self.sender)?;
        }
        if is_due(self.overdue_deadline()) {
            self.on_overdue(now);
        }
        if self.credentials_check_at <= now {
            self.credentials_check_at = now + CREDENTIALS_CHECK_INTERVAL;
            self.check_credentials();
        }
        if is_due(self.probe_at) {
            self.probe_at = None;
            self.running_probe = Some(tokio::spawn(probe(self.selector.preferred(self.index, now))));
        }
        self.send_records();
        Ok(())
    }

    /// Reconnects when the broker has acknowledged others and not the oldest record. MQTT 3.1.1 sends a message again only on a
    /// new connection, and the packet identifier of the lost message stays in use until then.
    fn on_overdue(&mut self, now: Instant) {
        if self.closing.is_some() {
            return;
        }
        let sent_before = now.into_std().checked_sub(self.progress_timeout());
        let records = sent_before.map_or(0, |sent_before| self.window.unacknowledged_since(sent_before));
        tracing::warn!(
            event = "records_unacknowledged",
            broker = %self.selector.broker(self.index),
            records,
            seconds = self.progress_timeout().as_secs(),
            "The broker acknowledges other messages and not these; reconnecting to send them again"
        );
        self.loss_cause = LossCause::Unacknowledged;
        self.close(CloseReason::Reconnect);
    }

    /// Reconnects when the credentials have changed. A folder that was removed does not end a connection that works.
    fn check_credentials(&mut self) {
        let current = fingerprint(self.context.mqtt.secret.as_deref());
        if current.is_some() && current != self.credentials && self.closing.is_none() {
            tracing::info!(
                event = "broker_credentials_changed",
                broker = %self.selector.broker(self.index),
                "Broker credentials have changed; reconnecting"
            );
            self.close(CloseReason::Reconnect);
        }
    }

    fn on_probe(&mut self, is_available: bool) {
        if is_available && self.closing.is_none() {
            tracing::info!(
                event = "broker_failback",
                broker = %self.selector.broker(self.index),
                "A preferred broker is available; leaving this broker"
            );
            self.close(CloseReason::Reconnect);
        } else {
            self.probe_at = Some(Instant::now() + self.selector.failback_delay(self.index));
        }
    }

    fn on_event(&mut self, event: TransportEvent, inputs: &mut SessionInputs) -> Result<(), SessionEnd> {
        match self.sender.interpret(event) {
            ConnectionEvent::Acknowledged(token) => {
                self.ping_sent_at = None;
                self.last_progress = Instant::now();
                self.on_acknowledged(token);
            }
            ConnectionEvent::PacketReceived => self.ping_sent_at = None,
            ConnectionEvent::PingSent => self.ping_sent_at = self.ping_sent_at.or(Some(Instant::now())),
            ConnectionEvent::Received(message) => {
                self.ping_sent_at = None;
                self.on_message(&message, inputs)?;
            }
            ConnectionEvent::Lost(loss) => return Err(self.on_loss(loss)),
            ConnectionEvent::Connected | ConnectionEvent::Other => {}
        }
        Ok(())
    }

    fn on_message(&mut self, message: &MqttMessage, inputs: &mut SessionInputs) -> Result<(), SessionEnd> {
        if message.payload.len() > MESSAGE_BYTES_MAX {
            tracing::warn!(
                event = "message_skipped",
                topic = &*message.topic,
                bytes = message.payload.len(),
                retained = message.retain,
                "A message is too large for a command or trigger; it is skipped"
            );
            return Ok(());
        }
        if self.context.topics.parse(&message.topic) == Some(IncomingTopic::Presence) {
            inputs.clash.observe(&message.payload, message.retain, Instant::now());
            // The broker publishes the Will of an earlier connection late, behind this session's presence. A retained one is from before.
            if !message.retain && self.closing.is_none() && is_offline(&message.payload) {
                self.presence_due = Some(Instant::now().max(self.presence_published + PRESENCE_INTERVAL));
            }
            return Ok(());
        }
        inputs.commands.handle(message);
        if self.closing.is_some() {
            return Ok(());
        }
        let streams = inputs.streams.borrow().clone();
        let signal = self.encoder.handle_message(message, &mut self.sender, &streams)?;
        if signal == EncoderSignal::HostOffline {
            tracing::warn!(
                event = "sparkplug_host_offline",
                broker = %self.selector.broker(self.index),
                "Sparkplug primary host is offline; records wait in the spool"
            );
            self.close(CloseReason::Reconnect);
        }
        Ok(())
    }

    fn on_loss(&self, loss: ConnectionLoss) -> SessionEnd {
        match &self.closing {
            Some(closing) if closing.is_disconnecting => self.end(closing.reason),
            Some(closing) if closing.reason == CloseReason::Stop => {
                tracing::debug!(reason = loss.reason(), "The connection was lost while the publisher was stopping");
                self.end(CloseReason::Stop)
            }
            _ => SessionEnd::Lost(loss),
        }
    }

    fn on_acknowledged(&mut self, token: AckToken) {
        let metrics = &self.context.metrics;
        let records = match token {
            AckToken::NodeMessage => {
                metrics.published.inc();
                return;
            }
            AckToken::Record(record) => vec![record],
            AckToken::Fence(records) => records,
        };
        let results = records.iter().filter(|record| record.kind == RecordKind::Result).count() as u64;
        metrics.published.inc_by(records.len() as u64);
        metrics.results_published.inc_by(results);
        self.results_published += results;
        let now = Instant::now().into_std();
        for record in records {
            self.window.acknowledged(record, now);
            self.context.spool.acknowledge(record);
        }
    }

    fn end(&self, reason: CloseReason) -> SessionEnd {
        match reason {
            CloseReason::Stop => {
                self.context.log_remaining_records();
                SessionEnd::Stopped
            }
            CloseReason::Reconnect => SessionEnd::Reconnect,
        }
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        if let Some(probe) = &self.running_probe {
            probe.abort();
        }
    }
}

/// Waits for the result of the running probe. Never completes when there is none.
async fn probe_result(running: &mut Option<JoinHandle<bool>>) -> bool {
    let Some(probe) = running else { return std::future::pending().await };
    let is_available = probe.await.unwrap_or(false);
    *running = None;
    is_available
}
