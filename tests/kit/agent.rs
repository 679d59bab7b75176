//! The built agent as a process, with its logs.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use crate::wait::{until, until_true};

/// The built program. Cargo builds it before the suite and names it to the test at run time.
///
/// # Panics
/// When the test was not started by cargo.
pub fn program() -> PathBuf {
    std::env::var_os("CARGO_BIN_EXE_lineside").expect("cargo names the built program to the suite").into()
}

/// Runs a command of the program to its end.
///
/// # Panics
/// When it cannot be started.
pub fn lineside(arguments: &[&str]) -> Output {
    Command::new(program()).args(arguments).output().expect("the program starts")
}

/// A running agent.
pub struct Agent {
    child: Child,
    logs: Arc<Mutex<Vec<Value>>>,
    http: String,
    pid: u32,
}

/// What an agent is started with.
pub struct Start<'a> {
    /// Its folder of manifests.
    pub manifests: &'a Path,
    /// Its own folder.
    pub data: &'a Path,
    /// The broker's address.
    pub mqtt: &'a str,
    /// Further flags.
    pub flags: &'a [&'a str],
}

impl Agent {
    /// Starts an agent called `edge-1` at the site `plant` and waits until it says where it serves.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start(start: &Start<'_>) -> Self {
        Self::start_by(Command::new(program()), "edge-1", "--manifests", start)
    }

    /// The same for one that follows the cluster of a kubeconfig.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn follow(kubeconfig: &Path, data: &Path, mqtt: &str) -> Self {
        Self::follow_as(Command::new(program()), "edge-1", &Start { manifests: kubeconfig, data, mqtt, flags: &[] })
    }

    /// The same for one of another name, by a command that runs the [`program`] in its own way; `start.manifests` is the
    /// kubeconfig.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn follow_as(command: Command, node: &str, start: &Start<'_>) -> Self {
        Self::start_by(command, node, "--kubeconfig", start)
    }

    fn start_by(mut command: Command, node: &str, wishes: &str, start: &Start<'_>) -> Self {
        let mut child = command
            .arg("run")
            .args(["--node", node, "--site", "plant", "--http", "127.0.0.1:0", "--mqtt", start.mqtt])
            .arg(wishes)
            .arg(start.manifests)
            .arg("--data-dir")
            .arg(start.data)
            .args(start.flags)
            .env("LINESIDE_SOURCE_JITTER_SECONDS", "0")
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("the agent starts");
        let logs = Arc::new(Mutex::new(Vec::new()));
        let lines = BufReader::new(child.stderr.take().expect("stderr is piped"));
        std::thread::spawn({
            let logs = logs.clone();
            move || {
                for line in lines.lines().map_while(Result::ok) {
                    let entry = serde_json::from_str(&line).unwrap_or_else(|_| Value::from(line));
                    logs.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
                }
            }
        });
        let pid = child.id();
        let mut agent = Self { child, logs, http: String::new(), pid };
        agent.http = until("the agent to say where it serves", || {
            agent.events("agent_started").first().and_then(|entry| entry["http"].as_str().map(str::to_owned))
        });
        agent
    }

    /// Log entries with this event code, oldest first.
    pub fn events(&self, code: &str) -> Vec<Value> {
        let logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
        logs.iter().filter(|entry| entry["event"] == code).cloned().collect()
    }

    /// All log entries.
    pub fn logs(&self) -> Vec<Value> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for a log entry with this event code.
    ///
    /// # Panics
    /// When none comes.
    pub fn wait_for_event(&self, code: &str) -> Value {
        until(&format!("a log entry with event {code}\n{:#?}", self.logs()), || self.events(code).last().cloned())
    }

    /// Where it serves.
    pub fn http(&self) -> &str {
        &self.http
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The value of a metric with its labels, as it stands in the text format; 0 where it is not there.
    ///
    /// # Panics
    /// When the metrics cannot be had.
    pub fn metric(&self, series: &str) -> f64 {
        let (status, text) = crate::http::get(&self.http, "/metrics").expect("the agent answers");
        assert_eq!(status, 200);
        text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok()).unwrap_or_default()
    }

    /// Waits until a metric has at least this value.
    ///
    /// # Panics
    /// When it does not get there.
    pub fn wait_for_metric(&self, series: &str, least: f64) {
        until_true(&format!("{series} >= {least}"), || self.metric(series) >= least);
    }

    /// Waits until a metric has exactly this value.
    ///
    /// # Panics
    /// When it does not get there.
    pub fn wait_for_value(&self, series: &str, value: f64) {
        until_true(&format!("{series} == {value}"), || self.metric(series) == value);
    }

    /// Waits until `/readyz` says yes.
    ///
    /// # Panics
    /// When it does not.
    pub fn wait_ready(&self) {
        until_true(&format!("readiness\n{:#?}", self.logs()), || {
            crate::http::get(&self.http, "/readyz").is_ok_and(|(status, _)| status == 200)
        });
    }

    /// Whether the process is still there.
    ///
    /// # Panics
    /// When the system does not tell.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("the process can be asked").is_none()
    }

    /// Sends a signal such as `TERM` to it.
    ///
    /// # Panics
    /// When `kill` cannot be run.
    pub fn signal(&self, name: &str) {
        let done = Command::new("kill").arg(format!("-{name}")).arg(self.pid.to_string()).status();
        assert!(done.expect("kill runs").success());
    }

    /// Asks it to end and waits until it has.
    ///
    /// # Panics
    /// When it does not end.
    pub fn end(&mut self) -> ExitStatus {
        self.signal("TERM");
        self.wait()
    }

    /// Waits until it has ended.
    ///
    /// # Panics
    /// When it does not end.
    pub fn wait(&mut self) -> ExitStatus {
        until("the agent to end", || self.child.try_wait().expect("the process can be asked"))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for entry in self.logs() {
                eprintln!("agent: {entry}");
            }
        }
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
