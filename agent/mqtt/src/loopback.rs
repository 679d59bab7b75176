//! A small MQTT 3.1.1 broker for the demonstration: on this machine only, in memory only.
//!
//! It serves real clients such as `mosquitto_sub`: wildcards, retained messages, Wills, QoS 0 and 1. It keeps no session,
//! grants QoS 1 where QoS 2 is asked for, closes the connection of a client that publishes with QoS 2, and that of one
//! that does not read. It is no broker to run a plant on, and nothing but `lineside demo` starts it.
//!
//! Why not a library: the codec is rumqttc's, which is here anyway, so this adds no crate at all; `rumqttd`, the
//! smallest embeddable broker found, brings over a hundred and a thread model of its own.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::BytesMut;
use rumqttc::mqttbytes::v4::{
    ConnAck, Connect, ConnectReturnCode, Packet, PingResp, PubAck, Publish, SubAck, SubscribeReasonCode, UnsubAck,
};
use rumqttc::mqttbytes::{self, QoS, matches, valid_filter, valid_topic};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// Messages that wait for one subscriber at most.
const WAITING_MAX: usize = 1024;
const PACKET_BYTES_MAX: usize = 8 << 20;

/// A running broker. It ends with the runtime it was started on.
pub struct Loopback {
    address: SocketAddr,
}

impl Loopback {
    /// Starts a broker on a free port of the loopback interface.
    ///
    /// # Errors
    /// When no port can be had.
    pub async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = shared.clone();
                tokio::spawn(async move {
                    if let Err(error) = serve(stream, &shared).await {
                        tracing::debug!(%error, "loopback broker: a client is gone");
                    }
                });
            }
        });
        Ok(Self { address })
    }

    /// Where it listens.
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
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a message to everyone who asked for it. Who does not keep up is let go.
    fn route(&self, message: Publish) {
        let mut state = self.state();
        if message.retain {
            match message.payload.is_empty() {
                true => drop(state.retained.remove(&message.topic)),
                false => drop(state.retained.insert(message.topic.clone(), message.clone())),
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

/// A message as one subscriber gets it: at the lower of both qualities.
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
        return Err(protocol("the first packet is no CONNECT"));
    };
    write(&mut stream, &Packet::ConnAck(ConnAck::new(ConnectReturnCode::Success, false))).await?;
    let (outgoing, waiting) = mpsc::channel(WAITING_MAX);
    let id = {
        let mut state = shared.state();
        state.next_client += 1;
        let id = state.next_client;
        state.clients.insert(id, Client { outgoing, filters: Vec::new() });
        id
    };
    let ended = converse(stream, buffer, id, waiting, shared).await;
    shared.state().clients.remove(&id);
    if !matches!(ended, Ok(Farewell::Said)) {
        publish_will(connect, shared);
    }
    ended.map(drop)
}

/// Whether the client took its leave.
enum Farewell {
    Said,
    Unsaid,
}

async fn converse(
    stream: TcpStream,
    mut buffer: BytesMut,
    id: u64,
    mut waiting: mpsc::Receiver<Packet>,
    shared: &Shared,
) -> io::Result<Farewell> {
    let (mut reader, mut writer) = stream.into_split();
    let mut last_pkid = 0u16;
    loop {
        tokio::select! {
            // Reading is cancel safe: what has come stays in the buffer.
            packet = read(&mut reader, &mut buffer) => match packet? {
                Packet::Publish(message) => {
                    let (qos, pkid) = (message.qos, message.pkid);
                    if qos == QoS::ExactlyOnce || !valid_topic(&message.topic) {
                        return Err(protocol("a message with QoS 2, or with a wildcard in its topic"));
                    }
                    shared.route(message);
                    if qos == QoS::AtLeastOnce {
                        write(&mut writer, &Packet::PubAck(PubAck::new(pkid))).await?;
                    }
                }
                Packet::Subscribe(wanted) => {
                    let filters: Vec<(String, QoS)> =
                        wanted.filters.into_iter().map(|filter| (filter.path, capped(filter.qos))).collect();
                    let codes = filters.iter().map(|(filter, qos)| match valid_filter(filter) {
                        true => SubscribeReasonCode::Success(*qos),
                        false => SubscribeReasonCode::Failure,
                    });
                    let answer = SubAck::new(wanted.pkid, codes.collect());
                    write(&mut writer, &Packet::SubAck(answer)).await?;
                    for message in subscribe(shared, id, filters) {
                        send(&mut writer, message, &mut last_pkid).await?;
                    }
                }
                Packet::Unsubscribe(unwanted) => {
                    if let Some(client) = shared.state().clients.get_mut(&id) {
                        client.filters.retain(|(filter, _)| !unwanted.topics.contains(filter));
                    }
                    write(&mut writer, &Packet::UnsubAck(UnsubAck::new(unwanted.pkid))).await?;
                }
                Packet::PingReq => write(&mut writer, &Packet::PingResp).await?,
                Packet::PubAck(_) => {}
                Packet::Disconnect => return Ok(Farewell::Said),
                _ => return Err(protocol("a packet that only a broker sends")),
            },
            packet = waiting.recv() => match packet {
                Some(Packet::Publish(message)) => send(&mut writer, message, &mut last_pkid).await?,
                Some(_) => {}
                // It did not keep up and was let go.
                None => return Ok(Farewell::Unsaid),
            },
        }
    }
}

/// Notes the filters and returns the retained messages they match.
fn subscribe(shared: &Shared, id: u64, filters: Vec<(String, QoS)>) -> Vec<Publish> {
    let mut state = shared.state();
    let mut found = Vec::new();
    for (filter, qos) in filters.iter().filter(|(filter, _)| valid_filter(filter)) {
        let retained = state.retained.values().filter(|message| matches(&message.topic, filter));
        found.extend(retained.map(|message| for_client(message, *qos, true)));
    }
    if let Some(client) = state.clients.get_mut(&id) {
        client.filters.retain(|(known, _)| filters.iter().all(|(filter, _)| filter != known));
        client.filters.extend(filters.into_iter().filter(|(filter, _)| valid_filter(filter)));
    }
    found
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

fn protocol(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}
