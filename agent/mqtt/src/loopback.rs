//! A small in-memory MQTT 3.1.1 broker on the loopback interface, for the demonstration and for tests.
//!
//! It serves real clients such as `mosquitto_sub`: wildcards, retained messages, Wills, QoS 0 and 1. It keeps no sessions,
//! grants QoS 1 for a subscription with QoS 2, and closes the connection of a client that publishes with QoS 2 or does not
//! read. It is not suitable for production; only `lineside demo` starts it.
//!
//! It is not a library because the codec of rumqttc is a dependency already, so this module adds no crate; `rumqttd`, the smallest
//! embeddable broker that was found, adds over a hundred and a thread model of its own.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use bytes::BytesMut;
use parking_lot::Mutex;
use rumqttc::mqttbytes::v4::{
    ConnAck, Connect, ConnectReturnCode, Packet, PingResp, PubAck, Publish, SubAck, SubscribeReasonCode, UnsubAck,
};
use rumqttc::mqttbytes::{self, QoS, matches, valid_filter, valid_topic};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// Maximum number of messages that wait for one subscriber.
const OUTGOING_MAX: usize = 1024;
/// Maximum size of one packet in bytes.
const PACKET_BYTES_MAX: usize = 8 << 20;

/// A running broker. It stops with the runtime on which it was started.
pub struct LoopbackBroker {
    address: SocketAddr,
}

impl LoopbackBroker {
    /// Starts a broker on a free port of the loopback interface.
    ///
    /// # Errors
    /// When no port can be bound.
    pub async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = shared.clone();
                tokio::spawn(async move {
                    if let Err(error) = serve(stream, &shared).await {
                        tracing::debug!(%error, "The loopback broker closed a connection");
                    }
                });
            }
        });
        Ok(Self { address })
    }

    /// The address it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    clients: HashMap<u64, Client>,
    next_client: u64,
    retained: BTreeMap<String, Publish>,
}

struct Client {
    outgoing: mpsc::Sender<Packet>,
    filters: Vec<(String, QoS)>,
}

impl Shared {
    /// Queues a message for every subscriber. A subscriber whose queue is full is disconnected.
    fn route(&self, message: Publish) {
        let mut state = self.state.lock();
        if message.retain {
            // An empty payload deletes the retained message.
            if message.payload.is_empty() {
                state.retained.remove(&message.topic);
            } else {
                state.retained.insert(message.topic.clone(), message.clone());
            }
        }
        state.clients.retain(|_, client| {
            let granted = client.filters.iter().filter(|(filter, _)| matches(&message.topic, filter));
            match granted.map(|(_, qos)| *qos).max_by_key(|qos| *qos as u8) {
                Some(qos) => client.outgoing.try_send(Packet::Publish(for_client(&message, qos, false))).is_ok(),
                None => true,
            }
        });
    }
}

/// A message for one subscriber, at the lower QoS of the publisher and the subscription.
fn for_client(message: &Publish, granted: QoS, retain: bool) -> Publish {
    let qos = if (granted as u8) < (message.qos as u8) { granted } else { message.qos };
    let mut copy = Publish::from_bytes(message.topic.clone(), qos, message.payload.clone());
    copy.retain = retain;
    copy
}

async fn serve(mut stream: TcpStream, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = BytesMut::with_capacity(4096);
    let Packet::Connect(connect) = read(&mut stream, &mut buffer).await? else {
        return Err(protocol("the first packet is not a CONNECT packet"));
    };
    write(&mut stream, &Packet::ConnAck(ConnAck::new(ConnectReturnCode::Success, false))).await?;
    let (outgoing, queue) = mpsc::channel(OUTGOING_MAX);
    let id = {
        let mut state = shared.state.lock();
        state.next_client += 1;
        let id = state.next_client;
        state.clients.insert(id, Client { outgoing, filters: Vec::new() });
        id
    };
    let end = serve_client(stream, buffer, id, queue, shared).await;
    shared.state.lock().clients.remove(&id);
    if !matches!(end, Ok(ClientEnd::Disconnect)) {
        publish_will(connect, shared);
    }
    end.map(drop)
}

/// How a client's connection ended. After DISCONNECT its Will is not published.
enum ClientEnd {
    Disconnect,
    TooSlow,
}

async fn serve_client(
    stream: TcpStream,
    mut buffer: BytesMut,
    id: u64,
    mut queue: mpsc::Receiver<Packet>,
    shared: &Shared,
) -> io::Result<ClientEnd> {
    let (mut reader, mut writer) = stream.into_split();
    let mut last_pkid = 0u16;
    loop {
        tokio::select! {
            // Reading is cancel safe: bytes that were read stay in the buffer.
            packet = read(&mut reader, &mut buffer) => match packet? {
                Packet::Publish(message) => {
                    let (qos, pkid) = (message.qos, message.pkid);
                    if qos == QoS::ExactlyOnce || !valid_topic(&message.topic) {
                        return Err(protocol("a message has QoS 2 or a wildcard in its topic"));
                    }
                    shared.route(message);
                    if qos == QoS::AtLeastOnce {
                        write(&mut writer, &Packet::PubAck(PubAck::new(pkid))).await?;
                    }
                }
                Packet::Subscribe(subscribe) => {
                    let filters: Vec<(String, QoS)> =
                        subscribe.filters.into_iter().map(|filter| (filter.path, capped(filter.qos))).collect();
                    let codes = filters.iter().map(|(filter, qos)| {
                        if valid_filter(filter) {
                            SubscribeReasonCode::Success(*qos)
                        } else {
                            SubscribeReasonCode::Failure
                        }
                    });
                    let acknowledgement = SubAck::new(subscribe.pkid, codes.collect());
                    write(&mut writer, &Packet::SubAck(acknowledgement)).await?;
                    for message in add_filters(shared, id, filters) {
                        send(&mut writer, message, &mut last_pkid).await?;
                    }
                }
                Packet::Unsubscribe(unsubscribe) => {
                    if let Some(client) = shared.state.lock().clients.get_mut(&id) {
                        client.filters.retain(|(filter, _)| !unsubscribe.topics.contains(filter));
                    }
                    write(&mut writer, &Packet::UnsubAck(UnsubAck::new(unsubscribe.pkid))).await?;
                }
                Packet::PingReq => write(&mut writer, &Packet::PingResp).await?,
                Packet::PubAck(_) => {}
                Packet::Disconnect => return Ok(ClientEnd::Disconnect),
                _ => return Err(protocol("the client sent a packet that only a broker may send")),
            },
            packet = queue.recv() => match packet {
                Some(Packet::Publish(message)) => send(&mut writer, message, &mut last_pkid).await?,
                Some(_) => {}
                // The queue was full, so `route` removed the client.
                None => return Ok(ClientEnd::TooSlow),
            },
        }
    }
}

/// Adds the filters to the client and returns the retained messages that they match.
fn add_filters(shared: &Shared, id: u64, filters: Vec<(String, QoS)>) -> Vec<Publish> {
    let mut state = shared.state.lock();
    let mut matching = Vec::new();
    for (filter, qos) in filters.iter().filter(|(filter, _)| valid_filter(filter)) {
        let retained = state.retained.values().filter(|message| matches(&message.topic, filter));
        matching.extend(retained.map(|message| for_client(message, *qos, true)));
    }
    if let Some(client) = state.clients.get_mut(&id) {
        client.filters.retain(|(existing, _)| filters.iter().all(|(filter, _)| filter != existing));
        client.filters.extend(filters.into_iter().filter(|(filter, _)| valid_filter(filter)));
    }
    matching
}

fn publish_will(connect: Connect, shared: &Shared) {
    if let Some(will) = connect.last_will {
        let mut message = Publish::from_bytes(will.topic, capped(will.qos), will.message);
        message.retain = will.retain;
        shared.route(message);
    }
}

fn capped(qos: QoS) -> QoS {
    if qos == QoS::AtMostOnce { QoS::AtMostOnce } else { QoS::AtLeastOnce }
}

async fn send(
    writer: &mut (impl tokio::io::AsyncWrite + Unpin),
    mut message: Publish,
    last_pkid: &mut u16,
) -> io::Result<()> {
    if message.qos != QoS::AtMostOnce {
        *last_pkid = last_pkid.checked_add(1).unwrap_or(1);
        message.pkid = *last_pkid;
    }
    write(writer, &Packet::Publish(message)).await
}

async fn read(reader: &mut (impl tokio::io::AsyncRead + Unpin), buffer: &mut BytesMut) -> io::Result<Packet> {
    loop {
        match Packet::read(buffer, PACKET_BYTES_MAX) {
            Ok(packet) => return Ok(packet),
            Err(mqttbytes::Error::InsufficientBytes(_)) => {}
            Err(error) => return Err(protocol(&error.to_string())),
        }
        if reader.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

async fn write(writer: &mut (impl tokio::io::AsyncWrite + Unpin), packet: &Packet) -> io::Result<()> {
    let mut bytes = BytesMut::new();
    match packet {
        Packet::PingResp => PingResp.write(&mut bytes),
        packet => packet.write(&mut bytes, PACKET_BYTES_MAX),
    }
    .map_err(|error| protocol(&error.to_string()))?;
    writer.write_all(&bytes).await
}

fn protocol(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::Broker;
    use crate::connection::{self, ConnectionEvent, MqttMessage, MqttReceiver, MqttSender};
    use crate::credentials::BrokerCredentials;

    struct TestClient {
        sender: MqttSender<()>,
        receiver: MqttReceiver,
    }

    impl TestClient {
        async fn connect(broker: &LoopbackBroker, id: &str, will: Option<MqttMessage>) -> Self {
            let address = broker.address();
            let broker = Broker { host: address.ip().to_string(), port: address.port(), tls: false, credentials: None };
            let credentials = BrokerCredentials::default();
            let (sender, receiver) = connection::prepare(&broker, &credentials, id, Duration::from_secs(15), will);
            let mut client = Self { sender, receiver };
            client.wait_for(|event| matches!(event, ConnectionEvent::Connected).then_some(())).await;
            client
        }

        async fn wait_for<R>(&mut self, mut select: impl FnMut(ConnectionEvent<()>) -> Option<R>) -> R {
            loop {
                let event = self.sender.interpret(self.receiver.next().await);
                if let Some(found) = select(event) {
                    return found;
                }
            }
        }

        async fn subscribe(&mut self, filter: &str) {
            assert!(self.sender.subscribe(filter));
            self.wait_for(|event| matches!(event, ConnectionEvent::PacketReceived).then_some(())).await;
        }

        async fn publish(&mut self, topic: &str, payload: &'static str, retain: bool) {
            assert!(self.sender.publish(message(topic, payload, retain), ()));
            self.wait_for(|event| matches!(event, ConnectionEvent::Acknowledged(())).then_some(())).await;
        }

        async fn receive(&mut self) -> (String, String, bool) {
            let received = |event| match event {
                ConnectionEvent::Received(message) => Some(message),
                _ => None,
            };
            let message = self.wait_for(received).await;
            let payload = String::from_utf8(message.payload.to_vec()).unwrap();
            (message.topic.to_string(), payload, message.retain)
        }
    }

    fn message(topic: &str, payload: &'static str, retain: bool) -> MqttMessage {
        MqttMessage { topic: topic.into(), payload: payload.into(), retain }
    }

    #[tokio::test]
    async fn messages_reach_matching_subscribers_and_are_retained() {
        let broker = LoopbackBroker::start().await.unwrap();
        let mut publisher = TestClient::connect(&broker, "publisher", None).await;
        let mut early = TestClient::connect(&broker, "early", None).await;
        early.subscribe("a/+/c").await;
        publisher.publish("a/b/d", "other", true).await;
        publisher.publish("a/b/c", "1", true).await;
        assert_eq!(early.receive().await, ("a/b/c".to_owned(), "1".to_owned(), false));
        let mut late = TestClient::connect(&broker, "late", None).await;
        late.subscribe("a/+/c").await;
        assert_eq!(late.receive().await, ("a/b/c".to_owned(), "1".to_owned(), true));
        publisher.publish("a/b/c", "", true).await;
        assert!(!broker_retains(&broker, "a/b/c").await);
    }

    /// Whether a new subscriber receives a retained message of this topic before one that is published afterwards.
    async fn broker_retains(broker: &LoopbackBroker, topic: &str) -> bool {
        let mut client = TestClient::connect(broker, "check", None).await;
        client.subscribe("#").await;
        assert!(client.sender.publish(message("end", "", false), ()));
        loop {
            match client.receive().await.0.as_str() {
                "end" => return false,
                found if found == topic => return true,
                _ => {}
            }
        }
    }

    #[tokio::test]
    async fn the_will_is_published_unless_the_client_disconnects() {
        let broker = LoopbackBroker::start().await.unwrap();
        let mut subscriber = TestClient::connect(&broker, "subscriber", None).await;
        subscriber.subscribe("will/+").await;
        let mut orderly = TestClient::connect(&broker, "orderly", Some(message("will/orderly", "", false))).await;
        assert!(orderly.sender.disconnect());
        orderly.wait_for(|event| matches!(event, ConnectionEvent::Lost(_)).then_some(())).await;
        drop(TestClient::connect(&broker, "lost", Some(message("will/lost", "", false))).await);
        assert_eq!(subscriber.receive().await.0, "will/lost");
    }
}
