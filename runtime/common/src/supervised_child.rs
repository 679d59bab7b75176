//! Long-running child processes: start, handshake, orderly stop, and the budget of restarts.
//!
//! A supervised child serves until it is stopped, such as the worker of a model version or the capture process of a camera.
//! The parent passes the limits in the environment variable `LINESIDE_CHILD_LIMITS`; the child applies them with
//! [`limit_from_environment`] and then writes one line to standard output, the handshake, which names its protocol and
//! version: `lineside-worker 1`. A child that does not write exactly this line within the deadline is killed. After the
//! handshake, standard input and output belong to the protocol; a child may have a Unix socket as its standard input, which
//! also carries descriptors. Standard error is logged, and its end is kept for diagnosis.
//!
//! Invariants:
//! - A signal that a terminal sends to the agent does not reach its children.
//! - No child outlives the agent. `PR_SET_PDEATHSIG` kills it when the *thread* that started it ends, so every child is
//!   started by a thread of its own, which waits until the child has ended.
//! - No signal reaches another process. The process id stays valid until the owner reaps the child.
//! - Dropping a [`SupervisedChild`] kills and reaps the child.
//!
//! The owner restarts a child that ended, after the delay of its [`RestartBudget`].

use std::collections::VecDeque;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};

use crate::backoff::Backoff;
use crate::child_process::{ChildExit, ProcessLimits, limit_myself};

/// The environment variable with the [`Limits`] of a child.
const LIMITS_VARIABLE: &str = "LINESIDE_CHILD_LIMITS";
/// Longest handshake line in bytes.
const HANDSHAKE_BYTES_MAX: u64 = 256;
/// Bytes kept of the end of standard error.
const STDERR_BYTES_MAX: usize = 4 << 10;
/// The period of the restart budget.
const BUDGET_PERIOD: Duration = Duration::from_secs(60);

/// The limits, as they are passed to the child.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Limits {
    limits: ProcessLimits,
    /// Process id of the parent.
    parent: i32,
}

/// How a child is started and stopped.
#[derive(Debug, Clone)]
pub struct ChildOptions {
    /// Name for logs and errors, such as `worker surface-defects 3`.
    pub name: String,
    /// Resources of the child.
    pub limits: ProcessLimits,
    /// The expected handshake line without its line end: protocol and version.
    pub handshake: &'static str,
    /// Time from the start to the handshake.
    pub handshake_deadline: Duration,
    /// Time from SIGTERM to SIGKILL in an orderly stop.
    pub stop_grace: Duration,
}

/// Why a child could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// The program cannot be executed, or a system call on the child fails.
    #[error("{name} cannot be started")]
    Start {
        /// Name of the child.
        name: String,
        /// The error of the system.
        #[source]
        source: io::Error,
    },
    /// The child did not write its handshake within the deadline.
    #[error("{name} did not write its handshake within {deadline:?}")]
    HandshakeTimeout {
        /// Name of the child.
        name: String,
        /// The deadline.
        deadline: Duration,
    },
    /// The child speaks another protocol or version.
    #[error("{name} wrote the handshake `{}`; expected `{expected}`", .actual.escape_debug())]
    HandshakeMismatch {
        /// Name of the child.
        name: String,
        /// The handshake of this program.
        expected: &'static str,
        /// The first line of the child.
        actual: String,
    },
    /// The child ended before its handshake.
    #[error("{name} ended with {exit} before its handshake{}{stderr}", if .stderr.is_empty() { "" } else { ": " })]
    Exited {
        /// Name of the child.
        name: String,
        /// How the child ended.
        exit: ChildExit,
        /// The end of its standard error, in one line.
        stderr: String,
    },
}

/// The kind of a [`ChildError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChildErrorKind {
    /// The program cannot be executed, or a system call on the child fails.
    Start,
    /// The child did not write its handshake within the deadline.
    HandshakeTimeout,
    /// The child speaks another protocol or version; a restart does not help.
    HandshakeMismatch,
    /// The child ended before its handshake.
    Exited,
}

impl ChildError {
    /// The kind, to branch on.
    pub fn kind(&self) -> ChildErrorKind {
        match self {
            Self::Start { .. } => ChildErrorKind::Start,
            Self::HandshakeTimeout { .. } => ChildErrorKind::HandshakeTimeout,
            Self::HandshakeMismatch { .. } => ChildErrorKind::HandshakeMismatch,
            Self::Exited { .. } => ChildErrorKind::Exited,
        }
    }
}

/// A child that has passed its handshake.
pub struct SupervisedChild {
    name: String,
    stop_grace: Duration,
    child: Child,
    pid: Pid,
    /// Receives one message when the child has ended. It is a zombie then, until `exit` reaps it.
    ended: mpsc::Receiver<()>,
    exit: Option<ChildExit>,
    stdin: Option<ChildStdin>,
    stdout: Option<BufReader<ChildStdout>>,
    stderr: Arc<Mutex<VecDeque<u8>>>,
    stderr_reader: Option<thread::JoinHandle<()>>,
}

impl SupervisedChild {
    /// Starts a child and waits for its handshake.
    ///
    /// # Errors
    /// [`ChildError`]; the child is killed and reaped then.
    pub fn start(command: Command, options: &ChildOptions) -> Result<Self, ChildError> {
        let start_error = |source| ChildError::Start { name: options.name.clone(), source };
        let (child, ended) = spawn(command, Stdio::piped(), options).map_err(start_error)?;
        let mut this = Self::new(child, ended, options).map_err(start_error)?;
        this.handshake(options)?;
        Ok(this)
    }

    /// Starts a child whose standard input is one end of a Unix stream socket, and returns the other end. Standard output is
    /// closed after the handshake.
    ///
    /// # Errors
    /// As [`SupervisedChild::start`].
    pub fn start_with_socket(command: Command, options: &ChildOptions) -> Result<(Self, UnixStream), ChildError> {
        let start_error = |source| ChildError::Start { name: options.name.clone(), source };
        let (own, other) = UnixStream::pair().map_err(start_error)?;
        let (child, ended) = spawn(command, Stdio::from(OwnedFd::from(other)), options).map_err(start_error)?;
        let mut this = Self::new(child, ended, options).map_err(start_error)?;
        this.handshake(options)?;
        drop(this.stdout.take());
        Ok((this, own))
    }

    fn new(mut child: Child, ended: mpsc::Receiver<()>, options: &ChildOptions) -> io::Result<Self> {
        let stderr = Arc::default();
        let stderr_reader =
            child.stderr.take().map(|pipe| log_stderr(pipe, options.name.clone(), &stderr)).transpose()?;
        Ok(Self {
            name: options.name.clone(),
            stop_grace: options.stop_grace,
            pid: Pid::from_child(&child),
            ended,
            exit: None,
            stdin: child.stdin.take(),
            stdout: child.stdout.take().map(BufReader::new),
            stderr,
            stderr_reader,
            child,
        })
    }

    /// Reads the handshake on a thread of its own, because a pipe has no read timeout. Killing the child ends the thread.
    fn handshake(&mut self, options: &ChildOptions) -> Result<(), ChildError> {
        let name = || options.name.clone();
        let start_error = |source| ChildError::Start { name: options.name.clone(), source };
        let Some(mut stdout) = self.stdout.take() else { return Err(start_error(io::Error::other("no pipe"))) };
        let (sender, receiver) = mpsc::channel();
        let read = move || {
            let mut line = Vec::new();
            let outcome = stdout.by_ref().take(HANDSHAKE_BYTES_MAX).read_until(b'\n', &mut line);
            // The receiver is gone after the deadline.
            sender.send((outcome.map(|_| line), stdout)).ok();
        };
        thread::Builder::new().name("child-handshake".to_owned()).spawn(read).map_err(start_error)?;
        let Ok((line, stdout)) = receiver.recv_timeout(options.handshake_deadline) else {
            self.kill().map_err(start_error)?;
            return Err(ChildError::HandshakeTimeout { name: name(), deadline: options.handshake_deadline });
        };
        let line = line.map_err(start_error)?;
        if line.is_empty() {
            // Standard output was closed. A child that has not ended yet is killed.
            let exit = self.stop().map_err(start_error)?;
            return Err(ChildError::Exited { name: name(), exit, stderr: self.stderr() });
        }
        let actual = String::from_utf8_lossy(&line);
        if actual.strip_suffix('\n') != Some(options.handshake) {
            self.kill().map_err(start_error)?;
            let actual = actual.trim_end().to_owned();
            return Err(ChildError::HandshakeMismatch { name: name(), expected: options.handshake, actual });
        }
        self.stdout = Some(stdout);
        Ok(())
    }

    /// The process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Standard input, once.
    pub fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.stdin.take()
    }

    /// Standard output behind the handshake, once.
    pub fn take_stdout(&mut self) -> Option<BufReader<ChildStdout>> {
        self.stdout.take()
    }

    /// Waits until the child has ended, at most for `timeout`. `None` while it runs.
    ///
    /// # Errors
    /// When the child cannot be waited for.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<Option<ChildExit>> {
        if self.exit.is_none() && self.ended.recv_timeout(timeout) != Err(mpsc::RecvTimeoutError::Timeout) {
            self.exit = Some(self.child.wait()?.into());
        }
        Ok(self.exit)
    }

    /// Waits until the child has ended, and kills it after `grace`.
    ///
    /// # Errors
    /// When the child cannot be signalled or waited for.
    pub fn finish(&mut self, grace: Duration) -> io::Result<ChildExit> {
        match self.wait(grace)? {
            Some(exit) => Ok(exit),
            None => self.kill(),
        }
    }

    /// Stops the child in order: closes its standard input, sends SIGTERM, and after the grace period SIGKILL.
    ///
    /// # Errors
    /// When the child cannot be signalled or waited for.
    pub fn stop(&mut self) -> io::Result<ChildExit> {
        if let Some(exit) = self.wait(Duration::ZERO)? {
            return Ok(exit);
        }
        drop(self.stdin.take());
        rustix::process::kill_process(self.pid, Signal::TERM)?;
        if let Some(exit) = self.wait(self.stop_grace)? {
            return Ok(exit);
        }
        tracing::warn!(event = "child_killed", child = self.name, grace = ?self.stop_grace, "Child ignored SIGTERM and is killed");
        self.kill()
    }

    /// Kills the child and reaps it.
    fn kill(&mut self) -> io::Result<ChildExit> {
        if let Some(exit) = self.exit {
            return Ok(exit);
        }
        rustix::process::kill_process(self.pid, Signal::KILL)?;
        let exit = self.child.wait()?.into();
        self.exit = Some(exit);
        Ok(exit)
    }

    /// The last 4 KiB of standard error, in one line. Complete once the child has ended.
    pub fn stderr(&mut self) -> String {
        if self.exit.is_some()
            && let Some(reader) = self.stderr_reader.take()
        {
            // A panic of the reader loses output and nothing else.
            reader.join().ok();
        }
        let bytes: Vec<u8> = self.stderr.lock().iter().copied().collect();
        String::from_utf8_lossy(&bytes).split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

impl Drop for SupervisedChild {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            tracing::error!(event = "child_kill_failed", child = self.name, %error, "Child cannot be killed");
        }
    }
}

/// Starts a child from a thread that lives as long as the child. The receiver gets a message when the child has ended.
fn spawn(mut command: Command, stdin: Stdio, options: &ChildOptions) -> io::Result<(Child, mpsc::Receiver<()>)> {
    let parent = rustix::process::getpid().as_raw_nonzero().get();
    let limits = serde_json::to_string(&Limits { limits: options.limits, parent })?;
    command.env(LIMITS_VARIABLE, limits).stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
    // A terminal sends SIGINT to the whole process group; the child must live until the agent has drained it.
    command.process_group(0);
    let (started, start) = mpsc::channel();
    let (ended, end) = mpsc::channel();
    let waiter = move || {
        let child = command.spawn();
        let pid = child.as_ref().ok().map(Pid::from_child);
        // The receivers are gone when the owner has panicked or has dropped the child.
        started.send(child).ok();
        let Some(pid) = pid else { return };
        // NOWAIT leaves the zombie to the owner, so that the process id is not reused while the owner may send signals.
        let wait = || rustix::process::waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        while wait().err() == Some(rustix::io::Errno::INTR) {}
        ended.send(()).ok();
    };
    thread::Builder::new().name("child-waiter".to_owned()).spawn(waiter)?;
    let child = start.recv().map_err(|_| io::Error::other("the thread that starts the child ended"))??;
    Ok((child, end))
}

/// Logs standard error line by line, and keeps its end.
fn log_stderr(pipe: ChildStderr, child: String, kept: &Arc<Mutex<VecDeque<u8>>>) -> io::Result<thread::JoinHandle<()>> {
    let kept = kept.clone();
    thread::Builder::new().name("child-stderr".to_owned()).spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        // The bound also splits a line that never ends.
        while pipe.by_ref().take(STDERR_BYTES_MAX as u64).read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            tracing::debug!(child, line = %String::from_utf8_lossy(&line).trim_end(), "Standard error of a child");
            let mut kept = kept.lock();
            kept.extend(line.drain(..));
            let surplus = kept.len().saturating_sub(STDERR_BYTES_MAX);
            drop(kept.drain(..surplus));
        }
    })
}

/// Applies the limits that the parent has passed in the environment. A child calls this before anything else.
///
/// # Errors
/// When the variable is missing or invalid, when the parent has ended already, and those of [`limit_myself`].
pub fn limit_from_environment() -> io::Result<()> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidInput, format!("{LIMITS_VARIABLE}: {reason}"));
    let text = std::env::var(LIMITS_VARIABLE).map_err(|error| invalid(error.to_string()))?;
    let Limits { limits, parent } = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
    limit_myself(&limits)?;
    // The death signal is not sent for a parent that had ended before the call above.
    let is_orphan = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get()) != Some(parent);
    if is_orphan { Err(io::Error::other("the parent process has ended")) } else { Ok(()) }
}

/// The delays between restarts of one child: the first restarts within a minute are immediate, further ones are delayed by a
/// backoff. The backoff is reset after a minute without a restart beyond the budget.
#[derive(Debug)]
pub struct RestartBudget {
    restarts_max: usize,
    /// Times of the immediate restarts within the last minute.
    recent: VecDeque<Instant>,
    backoff: Backoff,
    last_delayed: Option<Instant>,
}

impl RestartBudget {
    /// A budget of `restarts_max` immediate restarts a minute, and the backoff of further restarts.
    pub fn new(restarts_max: usize, backoff: Backoff) -> Self {
        Self { restarts_max, recent: VecDeque::new(), backoff, last_delayed: None }
    }

    /// Counts one restart and returns the delay before it.
    pub fn next_delay(&mut self, now: Instant) -> Duration {
        let is_old = |time: &Instant| now.saturating_duration_since(*time) >= BUDGET_PERIOD;
        while self.recent.front().is_some_and(is_old) {
            self.recent.pop_front();
        }
        if self.recent.len() < self.restarts_max {
            self.recent.push_back(now);
            return Duration::ZERO;
        }
        if self.last_delayed.is_some_and(|time| is_old(&time)) {
            self.backoff.reset();
        }
        let delay = self.backoff.next_delay();
        self.last_delayed = Some(now + delay);
        delay
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::child_process::ChildPriority;

    const LONG: Duration = Duration::from_secs(60);

    fn options() -> ChildOptions {
        ChildOptions {
            name: "test child".to_owned(),
            limits: ProcessLimits { memory_bytes: 1 << 30, cpu_seconds: None, priority: ChildPriority::Normal },
            handshake: "test 1",
            handshake_deadline: LONG,
            stop_grace: LONG,
        }
    }

    fn start(script: &str, options: &ChildOptions) -> Result<SupervisedChild, ChildError> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        SupervisedChild::start(command, options)
    }

    fn exists(pid: i32) -> bool {
        Pid::from_raw(pid).is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok())
    }

    #[test]
    fn pipes_belong_to_the_protocol_after_the_handshake() {
        let mut child = start("echo 'test 1'; exec cat", &options()).unwrap();
        let (mut stdin, mut stdout) = (child.take_stdin().unwrap(), child.take_stdout().unwrap());
        stdin.write_all(b"frame\n").unwrap();
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "frame\n");
        assert_eq!(child.wait(Duration::ZERO).unwrap(), None);
        drop(stdin);
        assert_eq!(child.wait(LONG).unwrap(), Some(ChildExit::Code(0)));
        assert_eq!(child.stop().unwrap(), ChildExit::Code(0), "a child that has ended keeps its exit");
    }

    #[test]
    fn standard_input_may_be_a_socket() {
        let start = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            SupervisedChild::start_with_socket(command, &options()).unwrap()
        };
        let (mut child, mut socket) = start("echo 'test 1'; read line; echo \"$line\" >&0");
        socket.write_all(b"frame\n").unwrap();
        let mut line = String::new();
        BufReader::new(&socket).read_line(&mut line).unwrap();
        assert_eq!(line, "frame\n");
        assert_eq!(child.finish(LONG).unwrap(), ChildExit::Code(0));
        let (mut child, _socket) = start("echo 'test 1'; exec sleep 1000");
        assert_eq!(child.finish(Duration::ZERO).unwrap(), ChildExit::Signal(9));
    }

    #[test]
    fn stop_sends_sigterm_and_kills_a_child_that_ignores_it() {
        let mut child = start("echo 'test 1'; exec sleep 1000", &options()).unwrap();
        assert_eq!(child.stop().unwrap(), ChildExit::Signal(Signal::TERM.as_raw()));
        let impatient = ChildOptions { stop_grace: Duration::from_millis(1), ..options() };
        // An ignored signal stays ignored in the program that is executed.
        let mut child = start("trap '' TERM; echo 'test 1'; exec sleep 1000", &impatient).unwrap();
        assert_eq!(child.stop().unwrap(), ChildExit::Signal(Signal::KILL.as_raw()));
    }

    #[test]
    fn a_child_without_the_expected_handshake_is_killed() {
        let impatient = ChildOptions { handshake_deadline: Duration::from_millis(10), ..options() };
        let error = start("exec sleep 1000", &impatient).err().unwrap();
        assert_eq!(error.kind(), ChildErrorKind::HandshakeTimeout);
        for script in ["echo 'test 2'; exec sleep 1000", "head -c 1000 /dev/zero; exec sleep 1000", "echo; exec cat"] {
            let error = start(script, &options()).err().unwrap();
            assert_eq!(error.kind(), ChildErrorKind::HandshakeMismatch, "{script}: {error}");
        }
    }

    #[test]
    fn an_early_exit_is_reported_with_its_standard_error() {
        let error = start("echo out of  memory >&2; exit 7", &options()).err().unwrap();
        let expected = "test child ended with exit code 7 before its handshake: out of memory";
        assert_eq!((error.kind(), error.to_string().as_str()), (ChildErrorKind::Exited, expected));
        let absent = SupervisedChild::start(Command::new("/no/such/program"), &options()).err().unwrap();
        assert_eq!(absent.kind(), ChildErrorKind::Start);
    }

    #[test]
    fn the_exit_is_a_code_or_a_signal() {
        let mut child = start("echo 'test 1'; exit 3", &options()).unwrap();
        assert_eq!(child.wait(LONG).unwrap(), Some(ChildExit::Code(3)));
        let mut child = start("echo 'test 1'; kill -9 $$", &options()).unwrap();
        assert_eq!(child.wait(LONG).unwrap(), Some(ChildExit::Signal(9)));
    }

    #[test]
    fn a_dropped_child_is_killed_and_reaped() {
        let child = start("trap '' TERM; echo 'test 1'; exec sleep 1000", &options()).unwrap();
        let pid = child.pid();
        assert!(exists(pid));
        drop(child);
        assert!(!exists(pid), "a zombie would still exist");
    }

    #[test]
    fn only_the_end_of_standard_error_is_kept() {
        let mut child = start("echo 'test 1'; yes first | head -c 100000 >&2; printf last >&2", &options()).unwrap();
        assert_eq!(child.wait(LONG).unwrap(), Some(ChildExit::Code(0)));
        let stderr = child.stderr();
        assert!(stderr.len() <= STDERR_BYTES_MAX && stderr.ends_with("last"), "{} bytes", stderr.len());
    }

    #[test]
    fn limits_are_passed_in_the_environment() {
        let mut child = start("echo 'test 1'; printf '%s' \"$LINESIDE_CHILD_LIMITS\"", &options()).unwrap();
        let mut text = String::new();
        child.take_stdout().unwrap().read_to_string(&mut text).unwrap();
        let passed: Limits = serde_json::from_str(&text).unwrap();
        assert_eq!(passed.limits, options().limits);
        assert_eq!(u32::try_from(passed.parent).unwrap(), std::process::id());
    }

    #[test]
    fn restarts_beyond_the_budget_are_delayed_by_a_growing_backoff() {
        let start = Instant::now();
        let mut budget = RestartBudget::new(3, Backoff::new(Duration::from_secs(1), Duration::from_secs(8)));
        assert!((0..3).all(|second| budget.next_delay(start + Duration::from_secs(second)).is_zero()));
        let delays: Vec<Duration> = (0..5).map(|_| budget.next_delay(start + Duration::from_secs(3))).collect();
        assert!(delays[0] <= Duration::from_secs(1) && delays[0] >= Duration::from_millis(500), "{delays:?}");
        assert!(delays[4] >= Duration::from_secs(4) && delays[4] <= Duration::from_secs(8), "{delays:?}");
        let later = start + Duration::from_secs(200);
        assert!((0..3).all(|_| budget.next_delay(later).is_zero()), "the budget is renewed after a minute");
        assert!(budget.next_delay(later) <= Duration::from_secs(1), "the backoff is reset");
    }
}
