//! Child processes for work that may go wrong in ways a process cannot survive.
//!
//! The child is this same program with a hidden subcommand. It limits itself before it touches what it was given
//! ([`limit_myself`]); the parent waits no longer than it wants to, and keeps only so much of what the child prints.

use std::io::{self, Read, Write as _};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, Signal};

/// Bytes kept of what a child prints.
const OUTPUT_BYTES_MAX: u64 = 8 << 20;
/// How much nicer than its parent a child is, so that live frames come first.
const NICENESS: i32 = 10;
/// `oom_score_adj` of a child: where memory runs out, it goes first.
const OOM_SCORE: &str = "1000";

/// What a child may take.
#[derive(Debug, Clone, Copy)]
pub struct ProcessLimits {
    /// Bytes of address space.
    pub memory_bytes: u64,
    /// Seconds of processor time.
    pub cpu_seconds: u64,
    /// Time from start to end.
    pub wall: Duration,
}

/// How a child ended.
pub struct ChildOutput {
    /// `None` when it was killed for taking too long.
    pub status: Option<ExitStatus>,
    /// What it printed on stdout.
    pub stdout: Vec<u8>,
    /// What it printed on stderr.
    pub stderr: String,
}

/// Runs a child to its end, or kills it when `wall` is over. It is given `input` on stdin, piece by piece; `cancelled` is
/// asked ten times a second.
///
/// # Errors
/// When it cannot be started.
pub fn run(
    mut command: Command,
    input: &[&[u8]],
    wall: Duration,
    cancelled: impl Fn() -> bool,
) -> io::Result<ChildOutput> {
    const LOOK_EVERY: Duration = Duration::from_millis(100);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (done, ended) = mpsc::channel();
    let stdout = child.stdout.take().map(|pipe| drained(pipe, done.clone()));
    let stderr = child.stderr.take().map(|pipe| drained(pipe, done));
    let stdin = child.stdin.take();
    let status = std::thread::scope(|scope| {
        // A child that is gone reads nothing more, and that is no error of ours.
        scope.spawn(move || stdin.map(|mut pipe| input.iter().try_for_each(|piece| pipe.write_all(piece))));
        let deadline = Instant::now() + wall;
        // Both pipes are closed when the child is gone, which is noticed at once.
        let mut open = 2;
        let mut is_in_time = true;
        while open > 0 && is_in_time {
            match ended.recv_timeout(LOOK_EVERY) {
                Ok(()) => open -= 1,
                Err(mpsc::RecvTimeoutError::Disconnected) => open = 0,
                Err(mpsc::RecvTimeoutError::Timeout) => is_in_time = Instant::now() < deadline && !cancelled(),
            }
        }
        if !is_in_time {
            child.kill()?;
        }
        child.wait().map(|status| is_in_time.then_some(status))
    })?;
    let collected = |thread: Option<std::thread::JoinHandle<Vec<u8>>>| {
        thread.and_then(|thread| thread.join().ok()).unwrap_or_default()
    };
    let stderr = String::from_utf8_lossy(&collected(stderr)).into_owned();
    Ok(ChildOutput { status, stdout: collected(stdout), stderr })
}

/// Reads a pipe to its end on a thread of its own and keeps the beginning.
fn drained(mut pipe: impl Read + Send + 'static, done: mpsc::Sender<()>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        // An error ends it as the end does; what was read until then is what there is.
        drop(pipe.by_ref().take(OUTPUT_BYTES_MAX).read_to_end(&mut kept));
        drop(io::copy(&mut pipe, &mut io::sink()));
        // Nobody listens any more when the child took too long.
        done.send(()).ok();
        kept
    })
}

/// Called by a child before anything else: from here on it cannot take more than `limits`, gives way to everything
/// else, writes no core dump, and ends with its parent.
///
/// # Errors
/// When the system refuses a limit that protects the node.
pub fn limit_myself(limits: &ProcessLimits) -> io::Result<()> {
    let both = |value| Rlimit { current: Some(value), maximum: Some(value) };
    rustix::process::setrlimit(Resource::As, both(limits.memory_bytes))?;
    // The first limit ends it with SIGXCPU, which tells why; the second is for a child that would not listen.
    let cpu = Rlimit { current: Some(limits.cpu_seconds), maximum: Some(limits.cpu_seconds + 2) };
    rustix::process::setrlimit(Resource::Cpu, cpu)?;
    rustix::process::setrlimit(Resource::Core, both(0))?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // The rest is courtesy: a system that does not let it through costs nothing but politeness.
    rustix::process::nice(NICENESS).ok();
    std::fs::write("/proc/self/oom_score_adj", OOM_SCORE).ok();
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
    fn output_and_status_come_back_and_a_child_that_hangs_is_killed() {
        let ended =
            run(shell("cat; echo err >&2; exit 3"), &[b"o", b"ut\n"], Duration::from_secs(30), || false).unwrap();
        assert_eq!(ended.status.and_then(|status| status.code()), Some(3));
        assert_eq!((ended.stdout.as_slice(), ended.stderr.as_str()), (&b"out\n"[..], "err\n"));
        let ended = run(shell("exec sleep 1000"), &[&[0; 1 << 20]], Duration::from_millis(1), || false).unwrap();
        assert!(ended.status.is_none());
        let ended = run(shell("exec sleep 1000"), &[&[0; 1 << 20]], Duration::from_secs(1000), || true).unwrap();
        assert!(ended.status.is_none());
    }
}
