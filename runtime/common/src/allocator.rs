//! A single malloc heap for all threads.
//!
//! glibc gives each thread its own heap (arena) and keeps freed memory in it. The agent starts and ends threads with every
//! model version, so its memory grows with every switch: from 49 to 80 MiB after 200 switches of the bundled model, and only
//! from 39 to 43 MiB with a single heap. glibc reads the number of heaps from the environment before `main` runs, so the
//! program sets the variable and executes itself again, with the same process id and the same arguments.
//!
//! This file has no unit tests: its only function replaces the running process.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

const VARIABLE: &str = "MALLOC_ARENA_MAX";

/// Executes this program again with a single heap, unless `MALLOC_ARENA_MAX` is set already. Returns when it is set, or when
/// the execution fails; a failure costs memory and nothing else.
pub fn share_one_heap() {
    if std::env::var_os(VARIABLE).is_some() {
        return;
    }
    let mut arguments = std::env::args_os();
    // The path makes `ps` show the program's name. `/proc/self/exe` also works after the file was replaced or removed.
    let path = std::env::current_exe().ok().filter(|path| path.exists());
    let mut command = Command::new(path.unwrap_or_else(|| "/proc/self/exe".into()));
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    let error = command.args(arguments).env(VARIABLE, "1").exec();
    tracing::debug!(%error, "The heap settings could not be changed");
}
