//! A scripted MQTT 3.1.1 broker for behaviour that mosquitto does not produce on demand.
//!
//! It supports CONNECT, PUBLISH with QoS 0 and 1, SUBSCRIBE, PINGREQ and DISCONNECT, and closes the connection on any
//! other packet. It delivers nothing to subscribers and keeps no sessions; it records what it receives.

use std::io::{Error, ErrorKind, Read as _, Result, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::hostile::Random;

/// The timeout of a read, after which the script is checked again.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// The longest time that acknowledgements are delayed for reordering.
const REORDER_TIMEOUT: Duration = Duration::from_millis(200);
/// The length of a response that is not valid MQTT.
const GARBAGE_BYTES: usize = 64;

/// The behaviour of a scripted broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BrokerScript {
    /// Every publish is acknowledged immediately.
    InOrder,
    /// This many publishes are collected and acknowledged in reverse order; fewer if no further one arrives within 200
    /// ms.
    Reversed(usize),
    /// No publish is acknowledged.
    Never,
    /// Every publish is acknowledged twice.
    Twice,
    /// The first publish of a connection is never acknowledged, every other one immediately.
    SkipOne,
    /// A publish is answered with bytes that are not valid MQTT.
    Garbage,
    /// A publish is acknowledged with a packet identifier that was never used; assumes that the client has at most
    /// 32767 publishes in flight.
    WrongIdentifiers,
    /// New connections are refused with this CONNACK code; publishes on open connections are acknowledged.
    RefuseConnect(u8),
    /// CONNECT is never answered; publishes on open connections are acknowledged.
    SilentConnect,
}

/// A connection, as described by its CONNECT packet.
#[derive(Debug, Clone)]
pub struct ClientConnection {
    /// The time at which the CONNECT packet arrived.
    pub at: Instant,
    /// The client identifier.
    pub client: String,
    /// The topic and payload of the will.
    pub will: Option<(String, Vec<u8>)>,
    /// The user name.
    pub user: Option<String>,
}

/// A message as it was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The topic.
    pub topic: String,
    /// The payload.
    pub payload: Vec<u8>,
    /// The QoS.
    pub qos: u8,
    /// Whether the retain flag is set.
    pub retain: bool,
    /// Whether the dup flag is set.
    pub dup: bool,
}

struct State {
    script: BrokerScript,
    connections: Vec<ClientConnection>,
    /// The received messages, and whether each was acknowledged.
    received: Vec<(Published, bool)>,
    is_stopped: bool,
}

type Shared = Arc<Mutex<State>>;

/// A scripted broker. Dropping it closes its connections.
pub struct ScriptedBroker {
    port: u16,
    state: Shared,
}

impl ScriptedBroker {
    /// Starts a broker on a free port.
    ///
    /// # Panics
    /// If no port is free.
    pub fn start(script: BrokerScript) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("a bound socket has an address").port();
        let state = State { script, connections: Vec::new(), received: Vec::new(), is_stopped: false };
        let broker = Self { port, state: Arc::new(Mutex::new(state)) };
        let state = broker.state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if lock(&state).is_stopped {
                    return;
                }
                let session = Session { stream, state: state.clone(), delayed: Vec::new(), last: None, is_mute: false };
                // Invalid input only closes the connection, so the error is of no interest.
                std::thread::spawn(move || drop(session.run()));
            }
        });
        broker
    }

    /// The broker's URL.
    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Sets the behaviour.
    pub fn set(&self, script: BrokerScript) {
        lock(&self.state).script = script;
    }

    /// All connections so far, including refused and unanswered ones.
    pub fn connections(&self) -> Vec<ClientConnection> {
        lock(&self.state).connections.clone()
    }

    /// The QoS 1 messages that were acknowledged correctly, in the order of their arrival.
    pub fn acknowledged(&self) -> Vec<Published> {
        let state = lock(&self.state);
        state
            .received
            .iter()
            .filter(|(_, is_acknowledged)| *is_acknowledged)
            .map(|(message, _)| message.clone())
            .collect()
    }

    /// All received messages, whether acknowledged or not.
    pub fn received(&self) -> Vec<Published> {
        lock(&self.state).received.iter().map(|(message, _)| message.clone()).collect()
    }
}

impl Drop for ScriptedBroker {
    fn drop(&mut self) {
        lock(&self.state).is_stopped = true;
        // The accept loop checks the flag after the next connection.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Session {
    stream: TcpStream,
    state: Shared,
    /// Publishes to be acknowledged later: their index in `received`, and their packet identifier.
    delayed: Vec<(usize, u16)>,
    /// The arrival of the last QoS 1 publish.
    last: Option<Instant>,
    /// Whether the broker never answers on this connection.
    is_mute: bool,
}

impl Session {
    fn run(mut self) -> Result<()> {
        self.stream.set_nodelay(true)?;
        self.stream.set_read_timeout(Some(POLL_INTERVAL))?;
        let (mut bytes, mut buffer) = (Vec::new(), [0; 16 << 10]);
        while !lock(&self.state).is_stopped {
            if self.last.is_some_and(|last| last.elapsed() > REORDER_TIMEOUT) {
                self.acknowledge_delayed()?;
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => bytes.extend_from_slice(&buffer[..count]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error),
            }
            while let Some((head, body)) = take_packet(&mut bytes)? {
                let is_open = self.is_mute || self.handle(head, Fields(&body))?;
                if !is_open {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Answers one packet. Returns whether the connection stays open.
    fn handle(&mut self, head: u8, mut fields: Fields<'_>) -> Result<bool> {
        match head >> 4 {
            1 => return self.connect(&mut fields),
            3 => self.publish(head, fields)?,
            8 => {
                let identifier = fields.number()?;
                let mut granted = Vec::new();
                while !fields.0.is_empty() {
                    fields.bytes()?;
                    granted.push(fields.byte()?.min(1));
                }
                let [high, low] = identifier.to_be_bytes();
                self.stream.write_all(&[&[0x90, 2 + granted.len() as u8, high, low], &granted[..]].concat())?;
            }
            12 => self.stream.write_all(&[0xD0, 0])?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Format: protocol name, level, flags, keep-alive, then the fields that the flags announce.
    fn connect(&mut self, fields: &mut Fields<'_>) -> Result<bool> {
        fields.bytes()?;
        fields.byte()?;
        let flags = fields.byte()?;
        fields.number()?;
        let client = fields.text()?;
        let will = if flags & 0x04 == 0 { None } else { Some((fields.text()?, fields.bytes()?.to_vec())) };
        let user = if flags & 0x80 == 0 { None } else { Some(fields.text()?) };
        let mut state = lock(&self.state);
        state.connections.push(ClientConnection { at: Instant::now(), client, will, user });
        let script = state.script;
        drop(state);
        let code = match script {
            BrokerScript::SilentConnect => {
                self.is_mute = true;
                return Ok(true);
            }
            BrokerScript::RefuseConnect(code) => code,
            _ => 0,
        };
        self.stream.write_all(&[0x20, 2, 0, code])?;
        Ok(code == 0)
    }

    fn publish(&mut self, head: u8, mut fields: Fields<'_>) -> Result<()> {
        let (qos, topic) = (head >> 1 & 3, fields.text()?);
        let identifier = match qos {
            0 => None,
            1 => Some(fields.number()?),
            _ => return Err(ErrorKind::Unsupported.into()),
        };
        let payload = fields.0.to_vec();
        let message = Published { topic, payload, qos, retain: head & 1 != 0, dup: head & 8 != 0 };
        let mut state = lock(&self.state);
        state.received.push((message, false));
        let (index, script) = (state.received.len() - 1, state.script);
        drop(state);
        let Some(identifier) = identifier else { return Ok(()) };
        let is_first = self.last.replace(Instant::now()).is_none();
        match script {
            BrokerScript::Never => {}
            BrokerScript::SkipOne if is_first => {}
            BrokerScript::Reversed(count) => {
                self.delayed.push((index, identifier));
                if self.delayed.len() >= count {
                    self.acknowledge_delayed()?;
                }
            }
            BrokerScript::Garbage => {
                let mut random = Random::new(index as u64);
                let mut garbage: Vec<u8> = (0..GARBAGE_BYTES).map(|_| random.next() as u8).collect();
                // Packet type 15 is reserved in MQTT 3.1.1.
                garbage[0] |= 0xF0;
                self.stream.write_all(&garbage)?;
            }
            BrokerScript::WrongIdentifiers => self.send_puback(identifier ^ 0x8000)?,
            BrokerScript::Twice => {
                self.acknowledge(index, identifier)?;
                self.send_puback(identifier)?;
            }
            BrokerScript::InOrder
            | BrokerScript::SkipOne
            | BrokerScript::RefuseConnect(_)
            | BrokerScript::SilentConnect => {
                self.acknowledge(index, identifier)?;
            }
        }
        Ok(())
    }

    fn acknowledge_delayed(&mut self) -> Result<()> {
        while let Some((index, identifier)) = self.delayed.pop() {
            self.acknowledge(index, identifier)?;
        }
        Ok(())
    }

    /// The message is marked before the client can receive the acknowledgement, so a test never sees it the other way
    /// round.
    fn acknowledge(&mut self, index: usize, identifier: u16) -> Result<()> {
        lock(&self.state).received[index].1 = true;
        self.send_puback(identifier)
    }

    fn send_puback(&mut self, identifier: u16) -> Result<()> {
        let [high, low] = identifier.to_be_bytes();
        self.stream.write_all(&[0x40, 2, high, low])
    }
}

/// Removes one complete packet from the front, if there is one, and returns its first byte and its body.
fn take_packet(bytes: &mut Vec<u8>) -> Result<Option<(u8, Vec<u8>)>> {
    let (mut length, mut start) = (0, 1);
    loop {
        let Some(&byte) = bytes.get(start) else { return Ok(None) };
        if start > 4 {
            return Err(ErrorKind::InvalidData.into());
        }
        length |= usize::from(byte & 0x7F) << (7 * (start - 1));
        start += 1;
        if byte & 0x80 == 0 {
            break;
        }
    }
    if bytes.len() < start + length {
        return Ok(None);
    }
    let packet: Vec<u8> = bytes.drain(..start + length).collect();
    Ok(Some((packet[0], packet[start..].to_vec())))
}

/// The unread part of a packet.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or_else(|| Error::from(ErrorKind::InvalidData))?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn number(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes([self.byte()?, self.byte()?]))
    }

    /// Format: two bytes of length, then the content.
    fn bytes(&mut self) -> Result<&'a [u8]> {
        let count = self.number()?;
        self.take(count.into())
    }

    fn text(&mut self) -> Result<String> {
        Ok(String::from_utf8_lossy(self.bytes()?).into_owned())
    }
}
