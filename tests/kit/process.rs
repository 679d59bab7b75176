//! Child processes that end with the test, however the test ends.
//!
//! A child is killed when its owner is dropped. If the test process itself is killed, no destructor runs; therefore
//! [`command`] also asks the kernel to kill the child together with the thread that started it. A child must not outlive
//! the thread that starts it, which holds for every child that is owned by one test.

use std::ffi::OsStr;
use std::io::Write as _;
use std::ops::{Deref, DerefMut};
use std::process::{Child, Command, Output, Stdio};

/// A command for a program that the kernel kills when the starting thread ends. `setpriv` (util-linux) sets the
/// parent-death signal and replaces itself with the program, so the process id is that of the program.
///
/// # Panics
/// If the program is not installed.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let program = program.as_ref();
    // `setpriv` starts even if the program does not exist, so a missing tool would only show as a timeout.
    let folders = std::env::var_os("PATH").unwrap_or_default();
    // Joining an absolute path gives that path.
    let exists = std::env::split_paths(&folders).any(|folder| folder.join(program).is_file());
    assert!(exists, "{} is not installed; run `make test-tools` once", program.display());
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// A child process that is killed when it is dropped.
pub struct Process(Child);

impl Process {
    /// Takes ownership of a child.
    pub fn new(child: Child) -> Self {
        Self(child)
    }
}

impl Deref for Process {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Process {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only for a child that has already ended.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Runs a program with this standard input and returns its standard output.
///
/// # Panics
/// If the program is not installed or fails.
pub fn run_with_input(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut command = command(program);
    let mut child = command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("setpriv is installed; it is part of util-linux");
    child.stdin.take().expect("stdin is piped").write_all(input).expect("the program reads its input");
    let output = child.wait_with_output().expect("the program ends");
    assert!(output.status.success(), "{program} {arguments:?} fails");
    output.stdout
}

/// Standard output and standard error of a program, for assertions and messages.
pub fn output_text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}
