//! MQTT 3.1.1, and the only door to `rumqttc`.
//!
//! rumqttc is transport here and nothing more. It forgets what was not acknowledged when the broker forgot the session,
//! and it can wedge on a packet identifier that never comes free; so a lost connection is never resumed but made anew,
//! with a clean session, and whoever publishes keeps every message until [`Event::Acknowledged`] names it.

pub mod loopback;

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use rumqttc::{AsyncClient, EventLoop, Incoming, LastWill, MqttOptions, Outgoing, QoS};

use crate::config::agent::Broker;

/// Unacknowledged messages on the way at most.
pub const WINDOW: usize = 64;
/// Silence after which the connection is probed.
pub const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Waiting for a connection at most, in seconds.
const CONNECT_TIMEOUT_SECONDS: u64 = 5;
/// Bytes of one packet at most. rumqttc's own default of 10 KiB would refuse an anomaly map.
const PACKET_BYTES_MAX: usize = 8 << 20;
/// Room for requests beside the window: the status, a subscription, the farewell.
const SPARE_REQUESTS: usize = 8;

/// A message for the broker.
#[derive(Debug, Clone)]
pub struct Message {
    /// Where it goes.
    pub topic: String,
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
    /// The connection is gone, or never came to be. Make a new one.
    Lost(Loss),
    /// Something of no interest went by.
    Other,
}

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loss {
    /// The broker is not there, or does not answer.
    Unreachable(String),
    /// The broker is there and does not want us.
    Refused(String),
}

impl Loss {
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

/// The end that sends. Messages are published with QoS 1.
pub struct Sender<T> {
    client: AsyncClient,
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
pub fn connection<T>(broker: &Broker, client_id: &str, will: Option<Message>) -> (Sender<T>, Receiver) {
    let mut options = MqttOptions::new(client_id, broker.host.clone(), broker.port);
    options
        .set_clean_session(true)
        .set_keep_alive(KEEP_ALIVE)
        .set_max_packet_size(PACKET_BYTES_MAX, PACKET_BYTES_MAX)
        .set_inflight((WINDOW + SPARE_REQUESTS) as u16);
    if let Some((user, password)) = &broker.credentials {
        options.set_credentials(user, password);
    }
    if let Some(will) = will {
        options.set_last_will(LastWill::new(will.topic, will.payload.to_vec(), QoS::AtLeastOnce, will.retain));
    }
    let (client, mut events) = AsyncClient::new(options, WINDOW + SPARE_REQUESTS);
    let mut network = events.network_options();
    network.set_connection_timeout(CONNECT_TIMEOUT_SECONDS);
    network.set_tcp_nodelay(true);
    events.set_network_options(network);
    (Sender { client, queued: VecDeque::new(), sent: HashMap::new() }, Receiver { events })
}

impl<T> Sender<T> {
    /// Messages that are not acknowledged yet.
    pub fn unacknowledged(&self) -> usize {
        self.queued.len() + self.sent.len()
    }

    /// Hands a message over. `false` when there is no room; try again after an event.
    pub fn publish(&mut self, message: Message, token: T) -> bool {
        let taken = self.client.try_publish(message.topic, QoS::AtLeastOnce, message.retain, message.payload).is_ok();
        if taken {
            self.queued.push_back(token);
        }
        taken
    }

    /// Asks for the messages of a topic filter. `false` when there is no room.
    pub fn subscribe(&mut self, filter: &str) -> bool {
        self.client.try_subscribe(filter, QoS::AtLeastOnce).is_ok()
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
                None => Event::Other,
            },
            Ok(Raw::Incoming(Incoming::Publish(message))) => {
                Event::Received(Message { topic: message.topic, payload: message.payload, retain: message.retain })
            }
            // Publishes are given their identifiers in the order they were handed over.
            Ok(Raw::Outgoing(Outgoing::Publish(pkid))) => {
                if let Some(token) = self.queued.pop_front() {
                    self.sent.insert(pkid, token);
                }
                Event::Other
            }
            Ok(_) => Event::Other,
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

fn describe(error: &rumqttc::ConnectionError) -> Loss {
    use rumqttc::{ConnectReturnCode as Code, ConnectionError as Error};
    match error {
        Error::ConnectionRefused(Code::BadUserNamePassword | Code::NotAuthorized) => {
            Loss::Refused("the broker refuses our user or password".to_owned())
        }
        Error::ConnectionRefused(code) => Loss::Refused(format!("the broker refuses us: {code:?}")),
        Error::NetworkTimeout | Error::FlushTimeout => {
            Loss::Unreachable("the broker does not answer in time".to_owned())
        }
        Error::Io(error) => Loss::Unreachable(error.to_string()),
        Error::MqttState(state) => Loss::Unreachable(format!("the connection broke: {state}")),
        other => Loss::Unreachable(other.to_string()),
    }
}
