//! The program of the rules child. A rule may end it at any point in any way, which is why it is a process.
//!
//! It is tested by `tests/suite/attack/rules.rs`, because it needs the built program.

use std::io::{self, BufRead as _, Read as _, Write as _};
use std::thread;

use lineside_common::sandbox::restrict_myself;
use lineside_common::supervised_child::limit_from_environment;

use super::{HANDSHAKE, LINE_BYTES_MAX, Reply, Request};

/// Stack of the thread that checks a rule, in bytes: that of the threads that evaluate rules.
const STACK_BYTES: usize = 2 << 20;

/// Answers requests until standard input ends.
///
/// # Errors
/// When the limits cannot be set, a request is invalid, or the parent has closed the pipes.
pub fn main() -> io::Result<()> {
    limit_from_environment()?;
    restrict_myself();
    let mut stdin = io::stdin().lock();
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{HANDSHAKE}")?;
    stdout.flush()?;
    let mut line = Vec::new();
    while stdin.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line)? > 0 {
        let Request { rule } = serde_json::from_slice(&line)?;
        let check = move || match lineside_rules::check(&rule) {
            Ok(()) => Reply::Accepted,
            Err(error) => Reply::Refused(error.to_string()),
        };
        let thread = thread::Builder::new().name("rule".to_owned()).stack_size(STACK_BYTES).spawn(check)?;
        let reply = thread.join().unwrap_or_else(|_| Reply::Refused("the check of the rule panicked".to_owned()));
        serde_json::to_writer(&mut stdout, &reply)?;
        stdout.write_all(b"\n")?;
        stdout.flush()?;
        line.clear();
    }
    Ok(())
}
