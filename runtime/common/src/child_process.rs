//! One-shot child processes, and the limits of all child processes.
//!
//! Work that may crash, hang or exhaust memory runs in a child process: this same program with a hidden subcommand. The child
//! applies its limits to itself before it reads any input ([`limit_myself`]). The parent bounds the time it waits and the
//! amount of output it keeps ([`run`]). Children that serve for a long time are [`crate::supervised_child`].

use std::fmt;
use std::io::{self, Read, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, Signal};
use serde::{Deserialize, Serialize};

/// Bytes kept of each output stream of a child.
const OUTPUT_BYTES_MAX: u64 = 8 << 20;
/// Interval at which `run` checks the deadline and the cancellation.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// Nice value added for background children, so that inference on live frames takes precedence.
const BACKGROUND_NICENESS: i32 = 10;
/// Seconds between the soft and the hard limit of processor time.
const CPU_GRACE_SECONDS: u64 = 2;

/// How a child competes with the agent for processor time and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ChildPriority {
    /// Lower processor priority than the agent, and the first process to be killed when memory runs out.
    Background,
    /// The processor priority of the agent. When memory runs out, the child is killed before the agent, which can restart it.
    Normal,
}

impl ChildPriority {
    /// The value of `oom_score_adj`, -1000 to 1000; the kernel kills processes with high values first.
    fn oom_score(self) -> &'static str {
        match self {
            Self::Background => "1000",
            Self::Normal => "500",
        }
    }
}

/// The resources that a child may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessLimits {
    /// Memory that the process may allocate, in bytes (`RLIMIT_DATA`): private writable memory. Files that it maps, memory that
    /// it shares and address space that it only reserves do not count.
    pub memory_bytes: u64,
    /// Processor time in seconds; `None` for a child that serves for a long time.
    pub cpu_seconds: Option<u64>,
    /// Competition with the agent for processor time and memory.
    pub priority: ChildPriority,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChildExit {
    /// The process exited with this code; 0 is success.
    Code(i32),
    /// The process was killed by this signal.
    Signal(i32),
}

impl From<ExitStatus> for ChildExit {
    fn from(status: ExitStatus) -> Self {
        // A terminated process has either a code or a signal.
        status.code().map_or_else(|| Self::Signal(status.signal().unwrap_or_default()), Self::Code)
    }
}

impl fmt::Display for ChildExit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(formatter, "exit code {code}"),
            Self::Signal(signal) => write!(formatter, "signal {signal}"),
        }
    }
}

/// The result of a one-shot child.
pub struct ChildOutput {
    /// `None` when the parent killed the child, because of the deadline or a cancellation.
    pub status: Option<ExitStatus>,
    /// The first 8 MiB of standard output.
    pub stdout: Vec<u8>,
    /// The first 8 MiB of standard error; invalid UTF-8 is replaced.
    pub stderr: String,
}

/// A command that starts this program with a subcommand, also after the file of the program was replaced or removed.
pub fn own_command(subcommand: &str) -> Command {
    let path = std::env::current_exe().ok().filter(|path| path.exists());
    let mut command = Command::new(path.unwrap_or_else(|| "/proc/self/exe".into()));
    // The name in `ps`.
    command.arg0("lineside").arg(subcommand);
    command
}

/// Runs a child to its end. Kills it when `deadline` has passed, or when `is_cancelled`, which is called every 100 ms, returns
/// `true`. The pieces of `input` are written to its standard input in order.
///
/// # Errors
/// When the child cannot be started, killed or waited for.
pub fn run(
    mut command: Command,
    input: &[&[u8]],
    deadline: Duration,
    is_cancelled: impl Fn() -> bool,
) -> io::Result<ChildOutput> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (closed, closings) = mpsc::channel();
    let stdout = child.stdout.take().map(|pipe| drain(pipe, closed.clone()));
    let stderr = child.stderr.take().map(|pipe| drain(pipe, closed));
    let stdin = child.stdin.take();
    let status = std::thread::scope(|scope| {
        // The write fails when the child ends without reading all input, which is not an error of the parent.
        scope.spawn(move || stdin.map(|mut pipe| input.iter().try_for_each(|piece| pipe.write_all(piece))));
        let deadline = Instant::now() + deadline;
        // Both pipes are closed when the child ends, so its end is noticed without delay.
        let mut open_pipes = 2;
        let mut may_run = true;
        while open_pipes > 0 && may_run {
            match closings.recv_timeout(CHECK_INTERVAL) {
                Ok(()) => open_pipes -= 1,
                Err(mpsc::RecvTimeoutError::Disconnected) => open_pipes = 0,
                Err(mpsc::RecvTimeoutError::Timeout) => may_run = Instant::now() < deadline && !is_cancelled(),
            }
        }
        if !may_run {
            child.kill()?;
        }
        child.wait().map(|status| may_run.then_some(status))
    })?;
    let collect = |thread: Option<std::thread::JoinHandle<Vec<u8>>>| {
        thread.and_then(|thread| thread.join().ok()).unwrap_or_default()
    };
    let stderr = String::from_utf8_lossy(&collect(stderr)).into_owned();
    Ok(ChildOutput { status, stdout: collect(stdout), stderr })
}

/// Reads a pipe to its end on a new thread and keeps the first [`OUTPUT_BYTES_MAX`] bytes.
fn drain(mut pipe: impl Read + Send + 'static, closed: mpsc::Sender<()>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        // A read error ends the output as the end of the pipe does; the bytes read before it are kept.
        drop(pipe.by_ref().take(OUTPUT_BYTES_MAX).read_to_end(&mut kept));
        drop(io::copy(&mut pipe, &mut io::sink()));
        // The receiver is gone when the child was killed.
        closed.send(()).ok();
        kept
    })
}

/// Applies limits to the calling process. A child calls this before anything else. From then on it cannot exceed `limits`,
/// writes no core dump, and is killed when the thread that started it ends (`PR_SET_PDEATHSIG`).
///
/// # Errors
/// When the system refuses a limit that protects the node.
pub fn limit_myself(limits: &ProcessLimits) -> io::Result<()> {
    let both = |value| Rlimit { current: Some(value), maximum: Some(value) };
    rustix::process::setrlimit(Resource::Data, both(limits.memory_bytes))?;
    if let Some(seconds) = limits.cpu_seconds {
        // The soft limit sends SIGXCPU, which shows the cause of death; the hard limit kills a child that ignores SIGXCPU.
        let cpu = Rlimit { current: Some(seconds), maximum: Some(seconds.saturating_add(CPU_GRACE_SECONDS)) };
        rustix::process::setrlimit(Resource::Cpu, cpu)?;
    }
    rustix::process::setrlimit(Resource::Core, both(0))?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // A system that refuses the rest still protects the node by the limits above.
    if limits.priority == ChildPriority::Background {
        rustix::process::nice(BACKGROUND_NICENESS).ok();
    }
    std::fs::write("/proc/self/oom_score_adj", limits.priority.oom_score()).ok();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_and_status_are_returned() {
        let output =
            run(shell("cat; echo err >&2; exit 3"), &[b"o", b"ut\n"], Duration::from_secs(30), || false).unwrap();
        assert_eq!(output.status.map(ChildExit::from), Some(ChildExit::Code(3)));
        assert_eq!((output.stdout.as_slice(), output.stderr.as_str()), (&b"out\n"[..], "err\n"));
    }

    #[test]
    fn a_child_past_its_deadline_or_cancelled_is_killed() {
        let large: &[&[u8]] = &[&[0; 1 << 20]];
        let output = run(shell("exec sleep 1000"), large, Duration::from_millis(1), || false).unwrap();
        assert!(output.status.is_none());
        let output = run(shell("exec sleep 1000"), large, Duration::from_secs(1000), || true).unwrap();
        assert!(output.status.is_none());
    }

    #[test]
    fn a_signal_is_distinguished_from_an_exit_code() {
        let output = run(shell("kill -9 $$"), &[], Duration::from_secs(30), || false).unwrap();
        let exit = output.status.map(ChildExit::from);
        assert_eq!(exit, Some(ChildExit::Signal(9)));
        assert_eq!(exit.unwrap().to_string(), "signal 9");
    }
}
