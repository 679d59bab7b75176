//! MQTT 3.1.1, and the only door to `rumqttc`.
//!
//! rumqttc is transport here and nothing more. It forgets what was not acknowledged when the broker forgot the session,
//! and it can wedge on a packet identifier that never comes free; so a lost connection is never resumed but made anew,
//! with a clean session, and whoever publishes keeps every message until [`Event::Acknowledged`] names it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rumqttc::{AsyncClient, EventLoop, Incoming, LastWill, MqttOptions, Outgoing, QoS, TlsConfiguration, Transport};

use crate::config::Broker;
use crate::credentials::BrokerCredentials;

/// Unacknowledged messages on the way at most.
pub const WINDOW: usize = 64;
/// Waiting for a connection at most, in seconds.
const CONNECT_TIMEOUT_SECONDS: u64 = 5;
/// Bytes of one packet at most. rumqttc's own default of 10 KiB would refuse an anomaly map.
const PACKET_BYTES_MAX: usize = 8 << 20;
/// Requests that wait to be sent at most: the window, and beside it what is said of the node itself.
const REQUESTS_MAX: usize = 1024;
/// Packet identifiers in use at most. rumqttc gives them in turn and stumbles over one that is still in use, so there are
/// many more than the window needs.
const IDENTIFIERS: u16 = 1024;

/// A message for the broker.
#[derive(Debug, Clone)]
pub struct Message {
    /// Where it goes.
    pub topic: Arc<str>,
    /// What it says.
    pub payload: Bytes,
    /// Whether the broker keeps it for later subscribers.
    pub retain: bool,
}

/// What happened on the connection.
#[derive(Debug)]
pub enum Event<T> {
    /// The broker has accepted us.
    Connected,
    /// The broker has the message sent under this token.
    Acknowledged(T),
    /// A message came on a subscribed topic.
    Received(Message),
    /// The broker was asked whether it is still there.
    Probing,
    /// The broker said something.
    Alive,
    /// The connection is gone, or never came to be. Make a new one.
    Lost(ConnectionLoss),
    /// Something of no interest went by.
    Other,
}

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectionLoss {
    /// The broker is not there, or does not answer.
    Unreachable(String),
    /// The broker is there and does not want us.
    Refused(String),
}

impl ConnectionLoss {
    /// In words.
    pub fn reason(&self) -> &str {
        match self {
            Self::Unreachable(reason) | Self::Refused(reason) => reason,
        }
    }

    /// Whether this is news to somebody who was told the other. How exactly a broker cannot be reached differs from one
    /// attempt to the next and is none.
    pub fn is_news_after(&self, other: &Self) -> bool {
        !matches!((self, other), (Self::Unreachable(_), Self::Unreachable(_))) && self != other
    }
}

/// The end that sends.
pub struct Sender<T> {
    client: AsyncClient,
    /// Requests handed to rumqttc that it has not sent yet.
    unsent: usize,
    /// Handed to rumqttc, not yet given a packet identifier.
    queued: VecDeque<T>,
    /// On the way, by packet identifier.
    sent: HashMap<u16, T>,
}

/// The end that moves everything: nothing is sent or received unless it is polled.
pub struct Receiver {
    events: EventLoop,
}

/// Prepares a connection. It is made when the receiver is polled.
pub fn connection<T>(
    broker: &Broker,
    access: &BrokerCredentials,
    client_id: &str,
    keep_alive: Duration,
    will: Option<Message>,
) -> (Sender<T>, Receiver) {
    let mut options = MqttOptions::new(client_id, broker.host.clone(), broker.port);
    options
        .set_clean_session(true)
        .set_keep_alive(keep_alive)
        .set_max_packet_size(PACKET_BYTES_MAX, PACKET_BYTES_MAX)
        .set_inflight(IDENTIFIERS);
    if let Some((user, password)) = &access.credentials {
        options.set_credentials(user, password);
    }
    if let Some(tls) = &access.tls {
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
    (Sender { client, unsent: 0, queued: VecDeque::new(), sent: HashMap::new() }, Receiver { events })
}

impl<T> Sender<T> {
    /// Messages that are not acknowledged yet.
    pub fn unacknowledged(&self) -> usize {
        self.queued.len() + self.sent.len()
    }

    /// Whether so many more requests can be handed over.
    pub fn has_room(&self, requests: usize) -> bool {
        self.unsent + requests <= REQUESTS_MAX
    }

    /// Hands a message over that the broker has to acknowledge. `false` when there is no room; try again after an event.
    pub fn publish(&mut self, message: Message, token: T) -> bool {
        let taken = self.hand_over(message, QoS::AtLeastOnce);
        if taken {
            self.queued.push_back(token);
        }
        taken
    }

    /// Hands a message over that nobody acknowledges (QoS 0).
    pub fn publish_unconfirmed(&mut self, message: Message) -> bool {
        self.hand_over(message, QoS::AtMostOnce)
    }

    fn hand_over(&mut self, message: Message, qos: QoS) -> bool {
        let taken = self.client.try_publish(message.topic.as_ref(), qos, message.retain, message.payload).is_ok();
        self.unsent += usize::from(taken);
        taken
    }

    /// Asks for the messages of a topic filter. `false` when there is no room.
    pub fn subscribe(&mut self, filter: &str) -> bool {
        let taken = self.client.try_subscribe(filter, QoS::AtLeastOnce).is_ok();
        self.unsent += usize::from(taken);
        taken
    }

    /// Asks for an orderly end.
    pub fn disconnect(&mut self) -> bool {
        self.client.try_disconnect().is_ok()
    }

    /// Makes sense of what the receiver saw.
    pub fn understand(&mut self, seen: Seen) -> Event<T> {
        use rumqttc::Event as Raw;
        match seen.0 {
            Ok(Raw::Incoming(Incoming::ConnAck(_))) => Event::Connected,
            Ok(Raw::Incoming(Incoming::PubAck(acknowledgement))) => match self.sent.remove(&acknowledgement.pkid) {
                Some(token) => Event::Acknowledged(token),
                None => Event::Alive,
            },
            Ok(Raw::Incoming(Incoming::Publish(message))) => Event::Received(Message {
                topic: message.topic.into(),
                payload: message.payload,
                retain: message.retain,
            }),
            Ok(Raw::Incoming(_)) => Event::Alive,
            // Publishes are given their identifiers in the order they were handed over; those with QoS 0 get none.
            Ok(Raw::Outgoing(Outgoing::Publish(pkid))) => {
                self.unsent = self.unsent.saturating_sub(1);
                if pkid != 0
                    && let Some(token) = self.queued.pop_front()
                {
                    self.sent.insert(pkid, token);
                }
                Event::Other
            }
            Ok(Raw::Outgoing(Outgoing::Subscribe(_))) => {
                self.unsent = self.unsent.saturating_sub(1);
                Event::Other
            }
            Ok(Raw::Outgoing(Outgoing::PingReq)) => Event::Probing,
            Ok(Raw::Outgoing(_)) => Event::Other,
            Err(error) => Event::Lost(describe(&error)),
        }
    }
}

/// What the receiver saw; [`Sender::understand`] says what it means.
pub struct Seen(Result<rumqttc::Event, Box<rumqttc::ConnectionError>>);

impl Receiver {
    /// Waits for the next thing to happen. Keep the future until it is done: dropping it half way can lose a packet.
    pub async fn next(&mut self) -> Seen {
        Seen(self.events.poll().await.map_err(Box::new))
    }
}

fn describe(error: &rumqttc::ConnectionError) -> ConnectionLoss {
    use rumqttc::{ConnectReturnCode as Code, ConnectionError as Error};
    if let Some(reason) = tls_refusal(error) {
        return ConnectionLoss::Refused(reason);
    }
    match error {
        Error::ConnectionRefused(Code::BadUserNamePassword | Code::NotAuthorized) => {
            ConnectionLoss::Refused("the broker refuses our user or password".to_owned())
        }
        // This one passes by itself.
        Error::ConnectionRefused(Code::ServiceUnavailable) => {
            ConnectionLoss::Unreachable("the broker says that it is not available".to_owned())
        }
        Error::ConnectionRefused(code) => ConnectionLoss::Refused(format!("the broker refuses us: {code:?}")),
        Error::NetworkTimeout | Error::FlushTimeout => {
            ConnectionLoss::Unreachable("the broker does not answer in time".to_owned())
        }
        Error::Io(error) => ConnectionLoss::Unreachable(error.to_string()),
        Error::MqttState(state) => ConnectionLoss::Unreachable(format!("the connection broke: {state}")),
        other => ConnectionLoss::Unreachable(other.to_string()),
    }
}

/// What TLS has against the broker's certificate, or the broker against ours. It stands somewhere among the error's causes.
fn tls_refusal(error: &rumqttc::ConnectionError) -> Option<String> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let inner = error.downcast_ref::<std::io::Error>().and_then(|io| io.get_ref()).map(|inner| inner as _);
        let tls = error.downcast_ref::<rustls::Error>().or_else(|| {
            let inner: Option<&(dyn std::error::Error + 'static)> = inner;
            inner.and_then(|inner| inner.downcast_ref::<rustls::Error>())
        });
        match tls {
            Some(rustls::Error::AlertReceived(alert)) => {
                return Some(format!("the broker ends the TLS handshake: {alert:?}; does it accept our certificate?"));
            }
            Some(error @ (rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented)) => {
                return Some(format!("the broker's certificate is not accepted: {error}"));
            }
            Some(error) => return Some(format!("TLS fails: {error}")),
            None => cause = error.source(),
        }
    }
    None
}
