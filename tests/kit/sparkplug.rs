//! What goes over a broker as Sparkplug B, and whether it keeps the rules: `sparkplug.py` does both.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::paho::Listener;
use crate::plant::utf8;

/// The payload of an NCMD that asks for all births once more. Format: metrics (2) of one metric with its name (1),
/// datatype (4) Boolean, and boolean value (14).
pub const REBIRTH: &[u8] = b"\x12\x1a\x0a\x14Node Control/Rebirth\x20\x0b\x70\x01";

/// Everything under `spBv1.0/`, from its start on. It is to be started before the agent.
pub struct Capture {
    folder: TempDir,
    _listener: Listener,
}

impl Capture {
    /// Starts one at an open broker on loopback, which has subscribed when this returns.
    ///
    /// # Panics
    /// When the broker does not grant the subscription.
    pub fn start(port: u16) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("capture");
        let arguments = ["capture", "127.0.0.1", &port.to_string(), utf8(&file)].map(str::to_owned);
        Self { folder, _listener: Listener::start("sparkplug.py", &arguments) }
    }

    /// Where it writes, a message per line.
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("capture")
    }

    /// Everything so far, decoded; a line is described in `sparkplug.py`.
    ///
    /// # Panics
    /// When the capture is broken.
    pub fn messages(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.file()).expect("the capture is a file");
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| serde_json::from_str(line).expect("the capture is JSON")).collect()
    }

    /// The report on everything so far: `violations` as sentences, and the counts `messages`, `births`, `deaths`,
    /// `data`, `historical`.
    ///
    /// # Panics
    /// When the checker fails otherwise than by finding violations.
    pub fn check(&self) -> Value {
        let output = Command::new(crate::python())
            .arg(crate::root().join("tests/kit/sparkplug.py"))
            .arg("check")
            .arg(self.file())
            .output()
            .expect("Python starts");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let errors = String::from_utf8_lossy(&output.stderr);
        let is_clean = report["violations"].as_array().expect(&errors).is_empty();
        assert_eq!(output.status.success(), is_clean, "the exit status says otherwise than the report");
        report
    }
}
