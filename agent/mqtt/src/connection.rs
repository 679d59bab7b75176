//! One MQTT 3.1.1 connection. This module and the loopback broker are the only users of `rumqttc`.
//!
//! `rumqttc` is used as a transport only. It discards unacknowledged messages when the broker has lost the session, and it
//! can block for ever on a packet identifier that is never released. Therefore a lost connection is never resumed: the caller
//! opens a new one with a clean session, and keeps every message until [`ConnectionEvent::Acknowledged`] names it.

use std::collections::{HashMap, VecDeque};
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rumqttc::{AsyncClient, EventLoop, Incoming, LastWill, MqttOptions, Outgoing, QoS, TlsConfiguration, Transport};

use crate::config::Broker;
use crate::credentials::{BrokerCredentials, CredentialsError};
use lineside_common::error_chain;

/// Seconds until an attempt to connect is abandoned.
const CONNECT_TIMEOUT_SECONDS: u64 = 5;
/// Maximum size of one outgoing packet in bytes. The default of rumqttc, 10 KiB, is too small for an anomaly map.
const PACKET_BYTES_MAX: usize = 8 << 20;
/// Maximum size of one incoming packet in bytes. A larger one ends the connection, again and again where the broker retains it, so it is far
/// above what is of use: a large message is received and skipped. Memory is taken only while one arrives.
const INCOMING_BYTES_MAX: usize = 64 << 20;
/// Maximum number of requests that wait to be sent: the send window, plus messages about the node itself.
const REQUESTS_MAX: usize = 1024;
/// Maximum number of packet identifiers in use. rumqttc assigns them in turn and blocks on one that is still in use, so there
/// are many more than the send window needs.
const PACKET_IDS: u16 = 1024;

/// A message that is published or received.
#[derive(Debug, Clone)]
pub struct MqttMessage {
    /// The topic, without wildcards.
    pub topic: Arc<str>,
    /// The payload, with the rest of the packet at most 8 MiB outgoing and 64 MiB incoming.
    pub payload: Bytes,
    /// Outgoing: the broker keeps the message for later subscribers. Incoming: the broker had kept it.
    pub retain: bool,
}

/// An event of a connection.
#[derive(Debug)]
pub enum ConnectionEvent<T> {
    /// The broker accepted the connection.
    Connected,
    /// The broker acknowledged the message that was published with this token.
    Acknowledged(T),
    /// A message arrived on a subscribed topic.
    Received(MqttMessage),
    /// A keep-alive request was sent to the broker.
    PingSent,
    /// A packet arrived that has no event of its own. It shows that the broker is alive.
    PacketReceived,
    /// The connection is closed, or could not be opened. The caller opens a new one.
    Lost(ConnectionLoss),
    /// An event that needs no action.
    Other,
}

/// What the caller decides by when a connection is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LossKind {
    /// The broker cannot be reached or does not answer. The next attempt follows soon.
    Unreachable,
    /// The broker or TLS rejects the agent, or the credentials cannot be used. The next attempt follows after a long pause, or
    /// when the credentials change.
    Refused,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ConnectionLoss {
    kind: LossKind,
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl ConnectionLoss {
    pub(crate) fn unreachable(message: impl Into<String>) -> Self {
        Self { kind: LossKind::Unreachable, message: message.into(), source: None }
    }

    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self { kind: LossKind::Refused, message: message.into(), source: None }
    }

    pub(crate) fn with_source(self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { source: Some(source.into()), ..self }
    }

    /// What to decide by.
    pub fn kind(&self) -> LossKind {
        self.kind
    }

    /// The message and its causes, for logs and status.
    pub fn reason(&self) -> String {
        error_chain(self)
    }
}

impl From<CredentialsError> for ConnectionLoss {
    fn from(error: CredentialsError) -> Self {
        Self::refused("the broker credentials cannot be used").with_source(error)
    }
}

/// The sending half of a connection. `T` identifies a message until it is acknowledged.
pub struct MqttSender<T> {
    client: AsyncClient,
    /// Requests that were handed to rumqttc and that it has not sent yet.
    unsent: usize,
    /// Messages that were handed to rumqttc and have no packet identifier yet.
    queued: VecDeque<T>,
    /// Messages that wait for their acknowledgement, by packet identifier.
    sent: HashMap<u16, T>,
}

/// The receiving half of a connection. It drives both halves: nothing is sent or received unless it is polled.
pub struct MqttReceiver {
    events: EventLoop,
}

/// An event as rumqttc reports it. [`MqttSender::interpret`] turns it into a [`ConnectionEvent`].
pub struct TransportEvent(Result<rumqttc::Event, Box<rumqttc::ConnectionError>>);

/// Prepares a connection. It is opened when the receiver is polled.
pub fn prepare<T>(
    broker: &Broker,
    credentials: &BrokerCredentials,
    client_id: &str,
    keep_alive: Duration,
    will: Option<MqttMessage>,
) -> (MqttSender<T>, MqttReceiver) {
    let mut options = MqttOptions::new(client_id, broker.host.clone(), broker.port);
    options
        .set_clean_session(true)
        .set_keep_alive(keep_alive)
        .set_max_packet_size(INCOMING_BYTES_MAX, PACKET_BYTES_MAX)
        .set_inflight(PACKET_IDS);
    if let Some((user, password)) = &credentials.login {
        options.set_credentials(user, password);
    }
    if let Some(tls) = &credentials.tls {
        options.set_transport(Transport::tls_with_config(TlsConfiguration::Rustls(tls.clone())));
    }
    if let Some(will) = will {
        options.set_last_will(LastWill::new(will.topic.as_ref(), will.payload.to_vec(), QoS::AtLeastOnce, will.retain));
    }
    let (client, mut events) = AsyncClient::new(options, REQUESTS_MAX);
    let mut network = events.network_options();
    network.set_connection_timeout(CONNECT_TIMEOUT_SECONDS);
    network.set_tcp_nodelay(true);
    events.set_network_options(network);
    let sender = MqttSender { client, unsent: 0, queued: VecDeque::new(), sent: HashMap::new() };
    (sender, MqttReceiver { events })
}

impl<T> MqttSender<T> {
    /// Number of messages that wait for their acknowledgement.
    pub fn unacknowledged(&self) -> usize {
        self.queued.len() + self.sent.len()
    }

    /// Whether this many more requests can be queued.
    pub fn has_room(&self, requests: usize) -> bool {
        self.unsent + requests <= REQUESTS_MAX
    }

    /// Queues a message with QoS 1. Returns `false` when the queue is full; the caller tries again after an event.
    pub fn publish(&mut self, message: MqttMessage, token: T) -> bool {
        let queued = self.enqueue(message, QoS::AtLeastOnce);
        if queued {
            self.queued.push_back(token);
        }
        queued
    }

    /// Queues a message with QoS 0, which is never acknowledged. Returns `false` when the queue is full.
    pub fn publish_unacknowledged(&mut self, message: MqttMessage) -> bool {
        self.enqueue(message, QoS::AtMostOnce)
    }

    fn enqueue(&mut self, message: MqttMessage, qos: QoS) -> bool {
        let queued = self.client.try_publish(message.topic.as_ref(), qos, message.retain, message.payload).is_ok();
        self.unsent += usize::from(queued);
        queued
    }

    /// Queues a subscription with QoS 1. Returns `false` when the queue is full.
    pub fn subscribe(&mut self, filter: &str) -> bool {
        let queued = self.client.try_subscribe(filter, QoS::AtLeastOnce).is_ok();
        self.unsent += usize::from(queued);
        queued
    }

    /// Queues a DISCONNECT packet, after which the broker does not publish the Will. Returns `false` when the queue is full.
    pub fn disconnect(&mut self) -> bool {
        self.client.try_disconnect().is_ok()
    }

    /// Converts an event of the receiver and updates which messages are unacknowledged.
    pub fn interpret(&mut self, event: TransportEvent) -> ConnectionEvent<T> {
        use rumqttc::Event as Raw;
        match event.0 {
            Ok(Raw::Incoming(Incoming::ConnAck(_))) => ConnectionEvent::Connected,
            Ok(Raw::Incoming(Incoming::PubAck(acknowledgement))) => match self.sent.remove(&acknowledgement.pkid) {
                Some(token) => ConnectionEvent::Acknowledged(token),
                None => ConnectionEvent::PacketReceived,
            },
            Ok(Raw::Incoming(Incoming::Publish(message))) => ConnectionEvent::Received(MqttMessage {
                topic: message.topic.into(),
                payload: message.payload,
                retain: message.retain,
            }),
            Ok(Raw::Incoming(_)) => ConnectionEvent::PacketReceived,
            // rumqttc assigns packet identifiers in the order in which messages were queued. Messages with QoS 0 get none.
            Ok(Raw::Outgoing(Outgoing::Publish(packet_id))) => {
                self.unsent = self.unsent.saturating_sub(1);
                if packet_id != 0
                    && let Some(token) = self.queued.pop_front()
                {
                    self.sent.insert(packet_id, token);
                }
                ConnectionEvent::Other
            }
            Ok(Raw::Outgoing(Outgoing::Subscribe(_))) => {
                self.unsent = self.unsent.saturating_sub(1);
                ConnectionEvent::Other
            }
            Ok(Raw::Outgoing(Outgoing::PingReq)) => ConnectionEvent::PingSent,
            Ok(Raw::Outgoing(_)) => ConnectionEvent::Other,
            Err(error) => ConnectionEvent::Lost(connection_loss(*error)),
        }
    }
}

impl MqttReceiver {
    /// Waits for the next event. Poll the future to completion: dropping it earlier can lose a packet.
    pub async fn next(&mut self) -> TransportEvent {
        TransportEvent(self.events.poll().await.map_err(Box::new))
    }
}

fn connection_loss(error: rumqttc::ConnectionError) -> ConnectionLoss {
    use rumqttc::{ConnectReturnCode as Code, ConnectionError};
    if let Some(loss) = tls_failure(&error) {
        return loss;
    }
    match error {
        ConnectionError::ConnectionRefused(Code::BadUserNamePassword | Code::NotAuthorized) => {
            ConnectionLoss::refused("the broker refuses our user or password")
        }
        // This condition is temporary.
        ConnectionError::ConnectionRefused(Code::ServiceUnavailable) => {
            ConnectionLoss::unreachable("the broker reports that its service is unavailable")
        }
        ConnectionError::ConnectionRefused(code) => {
            ConnectionLoss::refused(format!("the broker refuses the connection: {code:?}"))
        }
        ConnectionError::NetworkTimeout | ConnectionError::FlushTimeout => {
            ConnectionLoss::unreachable("the broker does not answer in time")
        }
        ConnectionError::Io(error) => ConnectionLoss::unreachable("the network connection failed").with_source(error),
        ConnectionError::MqttState(error) => {
            ConnectionLoss::unreachable("the MQTT connection failed").with_source(error)
        }
        other => ConnectionLoss::unreachable("the connection failed").with_source(other),
    }
}

/// A failure of TLS, which is one of the causes of rumqttc's error: the agent rejects the broker's certificate, or the broker
/// rejects the agent's.
fn tls_failure(error: &rumqttc::ConnectionError) -> Option<ConnectionLoss> {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let inner = error.downcast_ref::<std::io::Error>().and_then(|io| io.get_ref()).map(|inner| inner as _);
        let tls = error.downcast_ref::<rustls::Error>().or_else(|| {
            let inner: Option<&(dyn Error + 'static)> = inner;
            inner.and_then(|inner| inner.downcast_ref::<rustls::Error>())
        });
        let Some(tls) = tls else {
            cause = error.source();
            continue;
        };
        return Some(match tls {
            rustls::Error::AlertReceived(alert) => ConnectionLoss::refused(format!(
                "the broker ends the TLS handshake with the alert {alert:?}; does it accept our certificate?"
            )),
            rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented => {
                ConnectionLoss::refused("the broker's certificate is not accepted").with_source(tls.clone())
            }
            _ => ConnectionLoss::refused("the TLS handshake failed").with_source(tls.clone()),
        });
    }
    None
}

#[cfg(test)]
mod tests {
    use std::io;

    use rumqttc::{ConnectReturnCode, ConnectionError};

    use super::*;

    #[test]
    fn refusals_are_distinguished_from_network_failures() {
        let tls = |error: rustls::Error| ConnectionError::Io(io::Error::new(io::ErrorKind::InvalidData, error));
        let unknown_issuer = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let alert = rustls::Error::AlertReceived(rustls::AlertDescription::CertificateExpired);
        let reset = ConnectionError::Io(io::ErrorKind::ConnectionReset.into());
        let refused = ConnectionError::ConnectionRefused;
        for (error, kind, text) in [
            (refused(ConnectReturnCode::BadUserNamePassword), LossKind::Refused, "user or password"),
            (refused(ConnectReturnCode::BadClientId), LossKind::Refused, "refuses the connection: BadClientId"),
            (refused(ConnectReturnCode::ServiceUnavailable), LossKind::Unreachable, "service is unavailable"),
            (tls(unknown_issuer), LossKind::Refused, "not accepted: invalid peer certificate: UnknownIssuer"),
            (tls(alert), LossKind::Refused, "CertificateExpired; does it accept our certificate"),
            (tls(rustls::Error::DecryptError), LossKind::Refused, "the TLS handshake failed: "),
            (ConnectionError::NetworkTimeout, LossKind::Unreachable, "does not answer in time"),
            (reset, LossKind::Unreachable, "the network connection failed: connection reset"),
        ] {
            let loss = connection_loss(error);
            assert_eq!(loss.kind(), kind, "{loss:?}");
            assert!(loss.reason().contains(text), "{}", loss.reason());
        }
    }
}
