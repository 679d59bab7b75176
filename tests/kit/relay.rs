//! A link that can be throttled, held and cut while it runs: a TCP relay from a port of its own to another on loopback.
//!
//! In either direction bytes arrive whole and in order, or not at all. What was sent while the link was held arrives
//! when it passes again. A connection that was cut stays cut, even when the link passes again at once.

use std::io::{ErrorKind, Read as _, Result, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What is read at once.
const PIECE: usize = 16 << 10;
/// How long a read or a write may take until the link is looked at again.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A throttled link moves a piece this often per second.
const PIECES_PER_SECOND: u64 = 10;

/// What a link does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Bytes go on at once.
    Pass,
    /// Connections are cut, those there are and those to come.
    Refuse,
    /// Connections stay and new ones are accepted, but nothing moves and nobody is told.
    Hold,
}

struct State {
    mode: Mode,
    /// How often the link was cut; a connection from before a cut is dead.
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

/// A relay. Its connections are cut when it is dropped.
pub struct Relay {
    port: u16,
    link: Arc<Link>,
}

impl Relay {
    /// Starts one to this port, which passes everything on.
    ///
    /// # Panics
    /// When no port can be had.
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
                    // A connection that ends with an error has ended, which is all that the other side is to see.
                    std::thread::spawn(move || drop(link.serve(client, cuts)));
                }
            }
        });
        relay
    }

    /// The address for an MQTT client.
    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Behaves like this from now on.
    pub fn set(&self, mode: Mode) {
        self.change(|state| {
            state.mode = mode;
            state.cuts += u64::from(mode == Mode::Refuse);
        });
    }

    /// Lets every connection send so many bytes per second to the target at most; `None` is as many as it can. The
    /// system's buffers before the relay take some MiB more at once, so that a client feels it late.
    pub fn throttle(&self, bytes_per_second: Option<u64>) {
        self.change(|state| state.bytes_per_second = bytes_per_second);
    }

    /// The connections accepted so far, with those that were cut at once.
    pub fn connections(&self) -> usize {
        self.link.lock().connections
    }

    /// The bytes that went to the target so far, counted just after they went.
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
        // The accept loop sees the flag when somebody knocks.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

impl Link {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the link is held, and says whether a connection from before so many cuts still lives.
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
            stream.set_read_timeout(Some(LOOK_EVERY))?;
            stream.set_write_timeout(Some(LOOK_EVERY))?;
        }
        let back = (self.clone(), target.try_clone()?, client.try_clone()?);
        std::thread::spawn(move || back.0.pump(&back.1, &back.2, cuts, false));
        self.pump(&client, &target, cuts, true);
        Ok(())
    }

    /// Moves bytes until one end or the link is gone, and closes both ends then.
    fn pump(&self, from: &TcpStream, to: &TcpStream, cuts: u64, is_to_target: bool) {
        // Whatever goes wrong with one end is the end of the connection for the other.
        drop(self.move_bytes(from, to, cuts, is_to_target));
        drop(from.shutdown(Shutdown::Both));
        drop(to.shutdown(Shutdown::Both));
    }

    fn move_bytes(&self, mut from: &TcpStream, mut to: &TcpStream, cuts: u64, is_to_target: bool) -> Result<()> {
        let mut buffer = [0; PIECE];
        while self.is_alive(cuts) {
            let Some(count) = unless_late(from.read(&mut buffer))? else { continue };
            let mut rest = &buffer[..count];
            // The link may have been held meanwhile: then an end of the stream has to wait as well.
            while self.is_alive(cuts) && !rest.is_empty() {
                let rate = self.lock().bytes_per_second.filter(|_| is_to_target);
                let most = rate.map_or(rest.len(), |rate| (rate / PIECES_PER_SECOND).max(1) as usize);
                let written = unless_late(to.write(&rest[..most.min(rest.len())]))?.unwrap_or(0);
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

    /// Waits as long as so many bytes take at this rate, unless something changes.
    fn pause(&self, bytes: usize, bytes_per_second: u64, cuts: u64) {
        let pause = Duration::from_secs_f64(bytes as f64 / bytes_per_second.max(1) as f64);
        let is_same = |state: &mut State| {
            state.bytes_per_second == Some(bytes_per_second) && state.cuts == cuts && !state.is_stopped
        };
        drop(self.changed.wait_timeout_while(self.lock(), pause, is_same));
    }
}

/// Nothing where the time for it was over.
fn unless_late(result: Result<usize>) -> Result<Option<usize>> {
    match result {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
            Ok(None)
        }
        other => other.map(Some),
    }
}
