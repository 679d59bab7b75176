//! An MQTT 3.1.1 broker that answers as it is told, for what mosquitto does not do on demand.
//!
//! It understands CONNECT, PUBLISH with QoS 0 and 1, SUBSCRIBE, PINGREQ and DISCONNECT, and closes the connection on
//! anything else. It passes nothing on to subscribers, and keeps no session; it records what it was told.

use std::io::{Error, ErrorKind, Read as _, Result, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::hostile::Random;

/// How long a read may take until the script is looked at again.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// What waits to be acknowledged in another order waits no longer than this for further ones.
const PATIENCE: Duration = Duration::from_millis(200);
/// How many bytes an answer has that is no MQTT.
const GARBAGE_BYTES: usize = 64;

/// How a scripted broker answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Script {
    /// Every publish is acknowledged at once.
    InOrder,
    /// So many publishes are collected and acknowledged in reverse order; fewer when 200 ms pass without a further one.
    Reversed(usize),
    /// No publish is acknowledged.
    Never,
    /// Every publish is acknowledged twice.
    Twice,
    /// The first publish of a connection is never acknowledged, every other one at once.
    SkipOne,
    /// A publish is answered with bytes that are no MQTT.
    Garbage,
    /// A publish is acknowledged under an identifier that was never used, by a client that has no more than 32767 on
    /// the way.
    WrongIdentifiers,
    /// New connections are refused with this code; on those there are, every publish is acknowledged.
    RefuseConnect(u8),
    /// New connections are never answered; on those there are, every publish is acknowledged.
    SilentConnect,
}

/// A connection as it introduced itself.
#[derive(Debug, Clone)]
pub struct Connection {
    /// When its CONNECT had arrived.
    pub at: Instant,
    /// The client's identifier.
    pub client: String,
    /// The Will's topic and payload.
    pub will: Option<(String, Vec<u8>)>,
    /// The user's name.
    pub user: Option<String>,
}

/// A message as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Where it was published.
    pub topic: String,
    /// What it says.
    pub payload: Vec<u8>,
    /// The quality it came with.
    pub qos: u8,
    /// Whether it is to be retained.
    pub retain: bool,
    /// Whether the client says that it may have been sent before.
    pub dup: bool,
}

struct State {
    script: Script,
    connections: Vec<Connection>,
    /// What was published, and whether it was acknowledged.
    received: Vec<(Published, bool)>,
    is_stopped: bool,
}

type Shared = Arc<Mutex<State>>;

/// A broker. Its connections are closed when it is dropped.
pub struct ScriptedBroker {
    port: u16,
    state: Shared,
}

impl ScriptedBroker {
    /// Starts one.
    ///
    /// # Panics
    /// When no port can be had.
    pub fn start(script: Script) -> Self {
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
                let session = Session { stream, state: state.clone(), waiting: Vec::new(), last: None, mute: false };
                // A client that breaks off or talks nonsense is closed, and that is all there is to do.
                std::thread::spawn(move || drop(session.run()));
            }
        });
        broker
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Answers like this from now on.
    pub fn set(&self, script: Script) {
        lock(&self.state).script = script;
    }

    /// The connections so far, refused and unanswered ones among them.
    pub fn connections(&self) -> Vec<Connection> {
        lock(&self.state).connections.clone()
    }

    /// The messages with QoS 1 that were acknowledged properly, in the order they arrived in.
    pub fn acknowledged(&self) -> Vec<Published> {
        let state = lock(&self.state);
        state
            .received
            .iter()
            .filter(|(_, is_acknowledged)| *is_acknowledged)
            .map(|(message, _)| message.clone())
            .collect()
    }

    /// All messages that arrived, acknowledged or not.
    pub fn received(&self) -> Vec<Published> {
        lock(&self.state).received.iter().map(|(message, _)| message.clone()).collect()
    }
}

impl Drop for ScriptedBroker {
    fn drop(&mut self) {
        lock(&self.state).is_stopped = true;
        // The accept loop sees the flag when somebody knocks.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Session {
    stream: TcpStream,
    state: Shared,
    /// Publishes to be acknowledged later: their place among the received, and their identifier.
    waiting: Vec<(usize, u16)>,
    /// When the last publish with QoS 1 came.
    last: Option<Instant>,
    /// Whether it never answers.
    mute: bool,
}

impl Session {
    fn run(mut self) -> Result<()> {
        self.stream.set_nodelay(true)?;
        self.stream.set_read_timeout(Some(LOOK_EVERY))?;
        let (mut bytes, mut buffer) = (Vec::new(), [0; 16 << 10]);
        while !lock(&self.state).is_stopped {
            if self.last.is_some_and(|last| last.elapsed() > PATIENCE) {
                self.acknowledge_waiting()?;
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => bytes.extend_from_slice(&buffer[..count]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error),
            }
            while let Some((head, body)) = take_packet(&mut bytes)? {
                let goes_on = self.mute || self.handle(head, Fields(&body))?;
                if !goes_on {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Answers one packet, and says whether the connection goes on.
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

    /// Format: protocol name, level, flags, keep-alive, then what the flags announce.
    fn connect(&mut self, fields: &mut Fields<'_>) -> Result<bool> {
        fields.bytes()?;
        fields.byte()?;
        let flags = fields.byte()?;
        fields.number()?;
        let client = fields.text()?;
        let will = if flags & 0x04 == 0 { None } else { Some((fields.text()?, fields.bytes()?.to_vec())) };
        let user = if flags & 0x80 == 0 { None } else { Some(fields.text()?) };
        let mut state = lock(&self.state);
        state.connections.push(Connection { at: Instant::now(), client, will, user });
        let script = state.script;
        drop(state);
        let code = match script {
            Script::SilentConnect => {
                self.mute = true;
                return Ok(true);
            }
            Script::RefuseConnect(code) => code,
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
        let (place, script) = (state.received.len() - 1, state.script);
        drop(state);
        let Some(identifier) = identifier else { return Ok(()) };
        let is_first = self.last.replace(Instant::now()).is_none();
        match script {
            Script::Never => {}
            Script::SkipOne if is_first => {}
            Script::Reversed(count) => {
                self.waiting.push((place, identifier));
                if self.waiting.len() >= count {
                    self.acknowledge_waiting()?;
                }
            }
            Script::Garbage => {
                let mut random = Random::new(place as u64);
                let mut garbage: Vec<u8> = (0..GARBAGE_BYTES).map(|_| random.next() as u8).collect();
                // No packet of MQTT 3.1.1 has the type 15.
                garbage[0] |= 0xF0;
                self.stream.write_all(&garbage)?;
            }
            Script::WrongIdentifiers => self.send_puback(identifier ^ 0x8000)?,
            Script::Twice => {
                self.acknowledge(place, identifier)?;
                self.send_puback(identifier)?;
            }
            Script::InOrder | Script::SkipOne | Script::RefuseConnect(_) | Script::SilentConnect => {
                self.acknowledge(place, identifier)?;
            }
        }
        Ok(())
    }

    fn acknowledge_waiting(&mut self) -> Result<()> {
        while let Some((place, identifier)) = self.waiting.pop() {
            self.acknowledge(place, identifier)?;
        }
        Ok(())
    }

    /// It stands as acknowledged before the client can know of it.
    fn acknowledge(&mut self, place: usize, identifier: u16) -> Result<()> {
        lock(&self.state).received[place].1 = true;
        self.send_puback(identifier)
    }

    fn send_puback(&mut self, identifier: u16) -> Result<()> {
        let [high, low] = identifier.to_be_bytes();
        self.stream.write_all(&[0x40, 2, high, low])
    }
}

/// Takes a whole packet from the front, if there is one: its first byte, and what comes after its length.
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

/// What is left of a packet.
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

    /// Format: two bytes of length, then so many bytes.
    fn bytes(&mut self) -> Result<&'a [u8]> {
        let count = self.number()?;
        self.take(count.into())
    }

    fn text(&mut self) -> Result<String> {
        Ok(String::from_utf8_lossy(self.bytes()?).into_owned())
    }
}
