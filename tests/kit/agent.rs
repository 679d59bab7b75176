//! The built agent as a process, with its log entries, metrics and exit status.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use crate::process::{Process, command};
use crate::wait::{until, until_true};

/// The built program. Cargo builds it before the suite, and passes its path to the test at run time.
///
/// # Panics
/// If the test was not started by cargo.
pub fn program() -> PathBuf {
    std::env::var_os("CARGO_BIN_EXE_lineside").expect("cargo sets CARGO_BIN_EXE_lineside for the suite").into()
}

/// Runs a command of the program to completion.
///
/// # Panics
/// If the program cannot be started.
pub fn lineside(arguments: &[&str]) -> Output {
    command(program()).args(arguments).output().expect("the program starts")
}

/// The folders that tests keep models and frames in.
fn file_roots() -> String {
    let root = crate::root().canonicalize().unwrap_or_else(|_| crate::root());
    let shared = root.join("../shared");
    [root, shared, std::env::temp_dir()].map(|folder| folder.display().to_string()).join(",")
}

/// A running agent. It is killed when it is dropped.
pub struct Agent {
    process: Process,
    logs: Arc<Mutex<Vec<Value>>>,
    http: String,
    probes: Option<String>,
}

/// The options that every agent is started with.
pub struct AgentOptions<'a> {
    /// The folder of manifests, or the kubeconfig for [`Agent::start_command`].
    pub manifests: &'a Path,
    /// The data folder.
    pub data: &'a Path,
    /// The URL of the broker, or several separated by commas.
    pub mqtt: &'a str,
    /// Further flags.
    pub flags: &'a [&'a str],
}

impl Agent {
    /// Starts an agent for the node `edge-1` of the site `plant`, and waits until it serves HTTP.
    ///
    /// # Panics
    /// If the agent does not start.
    pub fn start(options: &AgentOptions<'_>) -> Self {
        Self::spawn(command(program()), "edge-1", "--manifests", options)
    }

    /// Starts an agent like [`Agent::start`], to which the permissions of files apply even if the test runs as root.
    ///
    /// # Panics
    /// If the agent does not start.
    pub fn start_without_file_capabilities(options: &AgentOptions<'_>) -> Self {
        let is_root = std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
        if !is_root {
            return Self::start(options);
        }
        let mut confined = command("setpriv");
        confined.args(["--bounding-set", "-dac_override,-dac_read_search", "--"]).arg(program());
        Self::spawn(confined, "edge-1", "--manifests", options)
    }

    /// Starts an agent that watches the cluster of a kubeconfig.
    ///
    /// # Panics
    /// If the agent does not start.
    pub fn start_with_kubeconfig(kubeconfig: &Path, data: &Path, mqtt: &str) -> Self {
        let options = AgentOptions { manifests: kubeconfig, data, mqtt, flags: &[] };
        Self::start_command(command(program()), "edge-1", &options)
    }

    /// Starts an agent for another node, with a command that runs the [`program`], for example in a network namespace.
    /// `options.manifests` is the kubeconfig.
    ///
    /// # Panics
    /// If the agent does not start.
    pub fn start_command(command: Command, node: &str, options: &AgentOptions<'_>) -> Self {
        Self::spawn(command, node, "--kubeconfig", options)
    }

    fn spawn(mut command: Command, node: &str, source_flag: &str, options: &AgentOptions<'_>) -> Self {
        let mut child = command
            .arg("run")
            .args(["--node", node, "--site", "plant", "--http", "127.0.0.1:0", "--mqtt", options.mqtt])
            .arg(source_flag)
            .arg(options.manifests)
            .arg("--data-dir")
            .arg(options.data)
            .args(options.flags)
            .env("LINESIDE_SOURCE_JITTER_SECONDS", "0")
            // Cameras of the tests are on this machine, models and frames in the repository and in temporary folders. A flag
            // of a test overrides these.
            .env("LINESIDE_CAMERA_HOSTS", "*,127.0.0.1,localhost")
            .env("LINESIDE_FILE_ROOTS", file_roots())
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
        let mut agent = Self { process: Process::new(child), logs, http: String::new(), probes: None };
        let started = until("the agent to log its addresses", || agent.events("agent_started").first().cloned());
        agent.http = started["http"].as_str().expect("the agent logs its HTTP address").to_owned();
        agent.probes = started["probes"].as_str().map(str::to_owned);
        agent
    }

    /// The log entries with this event code, oldest first.
    pub fn events(&self, code: &str) -> Vec<Value> {
        let logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
        logs.iter().filter(|entry| entry["event"] == code).cloned().collect()
    }

    /// All log entries, oldest first.
    pub fn logs(&self) -> Vec<Value> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for a log entry with this event code, and returns the newest one.
    ///
    /// # Panics
    /// If there is none in time.
    pub fn wait_for_event(&self, code: &str) -> Value {
        until(&format!("a log entry with event {code}\n{:#?}", self.logs()), || self.events(code).last().cloned())
    }

    /// The address (host and port) of its HTTP server.
    pub fn http(&self) -> &str {
        &self.http
    }

    /// The address (host and port) of its probe server, where it has one.
    pub fn probes(&self) -> Option<&str> {
        self.probes.as_deref()
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The value of a time series, which is given with its labels as in the text format; 0 if it does not exist.
    ///
    /// # Panics
    /// If the agent does not respond.
    pub fn metric(&self, series: &str) -> f64 {
        let (status, text) = crate::http::get(&self.http, "/metrics").expect("the agent responds");
        assert_eq!(status, 200);
        text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok()).unwrap_or_default()
    }

    /// Waits until a metric is at least this value.
    ///
    /// # Panics
    /// If it does not reach the value in time.
    pub fn wait_for_metric(&self, series: &str, minimum: f64) {
        until_true(&format!("{series} >= {minimum}"), || self.metric(series) >= minimum);
    }

    /// Waits until a metric has exactly this value.
    ///
    /// # Panics
    /// If it does not reach the value in time.
    pub fn wait_for_metric_value(&self, series: &str, value: f64) {
        until_true(&format!("{series} == {value}"), || self.metric(series) == value);
    }

    /// Waits until `/readyz` responds with 200 and every desired model serves.
    ///
    /// # Panics
    /// If it does not in time.
    pub fn wait_until_ready(&self) {
        until_true(&format!("readiness\n{:#?}", self.logs()), || {
            crate::http::get(&self.http, "/readyz").is_ok_and(|(status, body)| {
                let body: Value = serde_json::from_str(&body).unwrap_or_default();
                let mut models = body["models"].as_object().into_iter().flatten();
                status == 200 && models.all(|(_, model)| model["serving"].is_u64())
            })
        });
    }

    /// Whether the process runs.
    ///
    /// # Panics
    /// If the operating system does not report the state of the process.
    pub fn is_running(&mut self) -> bool {
        self.process.try_wait().expect("the state of a child is known").is_none()
    }

    /// Sends a signal such as `TERM`.
    ///
    /// # Panics
    /// If `kill` fails.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.pid().to_string()).status();
        assert!(status.expect("kill runs").success());
    }

    /// Sends SIGTERM and waits until the agent has shut down.
    ///
    /// # Panics
    /// If it does not exit in time.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal("TERM");
        self.wait()
    }

    /// Waits until the process has exited.
    ///
    /// # Panics
    /// If it does not exit in time.
    pub fn wait(&mut self) -> ExitStatus {
        until("the agent to exit", || self.process.try_wait().expect("the state of a child is known"))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // A failed test shows what its agents have logged. `process` kills the agent.
        if std::thread::panicking() {
            for entry in self.logs() {
                eprintln!("agent: {entry}");
            }
        }
    }
}
