//! Captures Sparkplug B traffic at a broker, and checks it against the specification, with `sparkplug.py`.

use std::path::PathBuf;

use serde_json::Value;
use tempfile::TempDir;

use crate::paho::PythonSubscriber;
use crate::process::command;
use crate::utf8;

/// The payload of an NCMD that requests a rebirth. Format: metrics (2) with one metric: name (1), datatype (4) Boolean,
/// and boolean value (14).
pub const REBIRTH: &[u8] = b"\x12\x1a\x0a\x14Node Control/Rebirth\x20\x0b\x70\x01";

/// A capture of all messages under `spBv1.0/`. It must start before the agent.
pub struct Capture {
    folder: TempDir,
    _process: PythonSubscriber,
}

impl Capture {
    /// Starts a capture at a loopback broker without authentication. The subscription is active when this returns.
    ///
    /// # Panics
    /// If the broker does not grant the subscription.
    pub fn start(port: u16) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("capture");
        let arguments = ["capture", "127.0.0.1", &port.to_string(), utf8(&file)].map(str::to_owned);
        Self { folder, _process: PythonSubscriber::start("sparkplug.py", &arguments) }
    }

    /// The path of the capture, which has one message per line.
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("capture")
    }

    /// All decoded messages so far; `sparkplug.py` describes the format of a line.
    ///
    /// # Panics
    /// If the capture is not valid.
    pub fn messages(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.file()).expect("the capture is a file");
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| serde_json::from_str(line).expect("the capture is JSON")).collect()
    }

    /// The report on all messages so far: `violations` as sentences, and the counts `messages`, `births`, `deaths`,
    /// `data`, `historical`.
    ///
    /// # Panics
    /// If the checker fails for another reason than violations.
    pub fn check(&self) -> Value {
        let output = command(crate::python())
            .arg(crate::root().join("tests/kit/sparkplug.py"))
            .arg("check")
            .arg(self.file())
            .output()
            .expect("Python starts");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let errors = String::from_utf8_lossy(&output.stderr);
        let is_clean = report["violations"].as_array().expect(&errors).is_empty();
        assert_eq!(output.status.success(), is_clean, "the exit status contradicts the report");
        report
    }
}
