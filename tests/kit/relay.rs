//! A network link that can be throttled, held and cut while it is in use: a TCP relay from its own port to another
//! loopback port.
//!
//! In both directions bytes are delivered in order or not at all. Bytes that are sent while the link is held are
//! delivered when it passes again. A connection that was cut stays closed, even if the link passes again immediately.

use std::io::{ErrorKind, Read as _, Result, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The size of a read, in bytes.
const CHUNK_BYTES: usize = 16 << 10;
/// The timeout of a read or write, after which the mode of the link is checked again.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// The number of writes per second on a throttled link.
const CHUNKS_PER_SECOND: u64 = 10;

/// The behaviour of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Bytes are forwarded immediately.
    Pass,
    /// Open connections are cut, and new ones are closed immediately.
    Refuse,
    /// Connections stay open and new ones are accepted, but no bytes are forwarded.
    Hold,
}

struct State {
    mode: Mode,
    /// The number of cuts; a connection that was opened before a cut is dead.
    cuts: u64,
    bytes_per_second: Option<u64>,
    connections: usize,
    bytes_to_target: u64,
    is_stopped: bool,
}

struct Link {
    target_port: u16,
    state: Mutex<State>,
    changed: Condvar,
}

/// A relay. Dropping it cuts its connections.
pub struct Relay {
    port: u16,
    link: Arc<Link>,
}

impl Relay {
    /// Starts a relay to this port that forwards everything.
    ///
    /// # Panics
    /// If no port is free.
    pub fn start(target_port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("a bound socket has an address").port();
        let state = State {
            mode: Mode::Pass,
            cuts: 0,
            bytes_per_second: None,
            connections: 0,
            bytes_to_target: 0,
            is_stopped: false,
        };
        let link = Arc::new(Link { target_port, state: Mutex::new(state), changed: Condvar::new() });
        let relay = Self { port, link: link.clone() };
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let mut state = link.lock();
                if state.is_stopped {
                    return;
                }
                state.connections += 1;
                if state.mode != Mode::Refuse {
                    let (link, cuts) = (link.clone(), state.cuts);
                    // The other side only needs to see that the connection has ended; the error is of no interest.
                    std::thread::spawn(move || drop(link.serve(client, cuts)));
                }
            }
        });
        relay
    }

    /// The URL for an MQTT client.
    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Sets the behaviour of the link.
    pub fn set(&self, mode: Mode) {
        self.change(|state| {
            state.mode = mode;
            state.cuts += u64::from(mode == Mode::Refuse);
        });
    }

    /// Limits the rate to the target, in bytes per second and connection; `None` is unlimited. The buffers of the
    /// operating system before the relay take a few MiB at once, so a client notices the limit late.
    pub fn throttle(&self, bytes_per_second: Option<u64>) {
        self.change(|state| state.bytes_per_second = bytes_per_second);
    }

    /// The number of connections accepted so far, including those that were cut immediately.
    pub fn connections(&self) -> usize {
        self.link.lock().connections
    }

    /// The number of bytes forwarded to the target so far.
    pub fn bytes_to_target(&self) -> u64 {
        self.link.lock().bytes_to_target
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.link.lock());
        self.link.changed.notify_all();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.change(|state| state.is_stopped = true);
        // The accept loop checks the flag after the next connection.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

impl Link {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the link is held. Returns whether a connection that was opened after `cuts` cuts is still alive.
    fn is_alive(&self, cuts: u64) -> bool {
        let is_held = |state: &mut State| state.mode == Mode::Hold && state.cuts == cuts && !state.is_stopped;
        let state = self.changed.wait_while(self.lock(), is_held).unwrap_or_else(PoisonError::into_inner);
        state.cuts == cuts && !state.is_stopped
    }

    fn serve(self: Arc<Self>, client: TcpStream, cuts: u64) -> Result<()> {
        if !self.is_alive(cuts) {
            return Ok(());
        }
        let target = TcpStream::connect(("127.0.0.1", self.target_port))?;
        for stream in [&client, &target] {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(POLL_INTERVAL))?;
            stream.set_write_timeout(Some(POLL_INTERVAL))?;
        }
        let back = (self.clone(), target.try_clone()?, client.try_clone()?);
        std::thread::spawn(move || back.0.pump(&back.1, &back.2, cuts, false));
        self.pump(&client, &target, cuts, true);
        Ok(())
    }

    /// Forwards bytes until one end or the link is closed, and then closes both ends.
    fn pump(&self, from: &TcpStream, to: &TcpStream, cuts: u64, is_to_target: bool) {
        // Any error on one end closes the connection on the other.
        drop(self.move_bytes(from, to, cuts, is_to_target));
        drop(from.shutdown(Shutdown::Both));
        drop(to.shutdown(Shutdown::Both));
    }

    fn move_bytes(&self, mut from: &TcpStream, mut to: &TcpStream, cuts: u64, is_to_target: bool) -> Result<()> {
        let mut buffer = [0; CHUNK_BYTES];
        while self.is_alive(cuts) {
            let Some(count) = unless_timed_out(from.read(&mut buffer))? else { continue };
            let mut rest = &buffer[..count];
            // The link may have been held in the meantime; in that case the end of the stream must be delayed as well.
            while self.is_alive(cuts) && !rest.is_empty() {
                let rate = self.lock().bytes_per_second.filter(|_| is_to_target);
                let most = rate.map_or(rest.len(), |rate| (rate / CHUNKS_PER_SECOND).max(1) as usize);
                let written = unless_timed_out(to.write(&rest[..most.min(rest.len())]))?.unwrap_or(0);
                rest = &rest[written..];
                if is_to_target {
                    self.lock().bytes_to_target += written as u64;
                }
                if let Some(rate) = rate {
                    self.pause(written, rate, cuts);
                }
            }
            if count == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Waits for the time that `bytes` take at this rate, unless the mode or the rate changes.
    fn pause(&self, bytes: usize, bytes_per_second: u64, cuts: u64) {
        let pause = Duration::from_secs_f64(bytes as f64 / bytes_per_second.max(1) as f64);
        let is_same = |state: &mut State| {
            state.bytes_per_second == Some(bytes_per_second) && state.cuts == cuts && !state.is_stopped
        };
        drop(self.changed.wait_timeout_while(self.lock(), pause, is_same));
    }
}

/// `None` if the operation timed out.
fn unless_timed_out(result: Result<usize>) -> Result<Option<usize>> {
    match result {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
            Ok(None)
        }
        other => other.map(Some),
    }
}
