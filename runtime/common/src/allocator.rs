//! One heap for all threads.
//!
//! glibc gives threads heaps of their own and keeps what was freed in each. The agent's threads come and go with model
//! versions, so that memory grew with every swap: after 200 swaps of the bundled model from 49 to 80 MiB, and with one heap
//! from 39 to 43 MiB. glibc reads the setting from the environment before the program begins, therefore the program starts
//! itself once more, in place: same process id, same arguments.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

const VARIABLE: &str = "MALLOC_ARENA_MAX";

/// Starts this program anew with one heap, unless the environment says how many it should have. Returns only where that is
/// so already, or could not be done, which costs memory and nothing else.
pub fn share_one_heap() {
    if std::env::var_os(VARIABLE).is_some() {
        return;
    }
    let mut arguments = std::env::args_os();
    // By its path, so that `ps` shows the program's name; where there is no such file any more, as what is running.
    let path = std::env::current_exe().ok().filter(|path| path.exists());
    let mut command = Command::new(path.unwrap_or_else(|| "/proc/self/exe".into()));
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    let error = command.args(arguments).env(VARIABLE, "1").exec();
    tracing::debug!(%error, "the heap's settings could not be changed");
}
