//! The protocol between the agent and the admission process. The agent writes a [`Request`] as one line of JSON to the
//! stdin of the child, followed by the bytes of the model; the child writes an [`Answer`] as JSON to stdout.

use lineside_api::spec::ModelSpec;
use serde::{Deserialize, Serialize};

use super::report::AdmissionReport;
use super::{AdmissionLimits, Benchmark};

/// A golden sample with the content of its files. The serialized names are part of the admission key.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct GoldenSample {
    /// Path of the image, for messages.
    pub(super) name: String,
    /// The encoded image in Base64.
    #[serde(rename = "picture")]
    pub(super) image: String,
    /// The expected output as JSON.
    #[serde(rename = "answer")]
    pub(super) expected: String,
    /// How far a score may differ. Boxes may differ by this share of the image.
    pub(super) tolerance: f32,
}

/// What the child is to test.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Request {
    pub(super) spec: ModelSpec,
    pub(super) limits: AdmissionLimits,
    pub(super) samples: Vec<GoldenSample>,
    /// A picture to report the answer to.
    pub(super) image: Option<TestImage>,
    /// Whether a model that the manifest does not fit is measured with the task `tensor`.
    pub(super) reports_as_tensor: bool,
}

/// A picture that is not part of the admission.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct TestImage {
    /// Path, for messages.
    pub(super) name: String,
    /// The encoded image in Base64.
    pub(super) image: String,
}

impl Request {
    /// The request as one line of JSON.
    pub(super) fn to_line(&self) -> serde_json::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        Ok(line)
    }
}

/// What the child writes.
#[derive(Serialize, Deserialize)]
pub(super) struct Answer {
    pub(super) response: Response,
    pub(super) report: AdmissionReport,
}

/// The result of the child.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Response {
    /// The model is admitted.
    Admitted(Benchmark),
    /// The manifest does not fit the model.
    Manifest(String),
    /// The model cannot serve on this node.
    Model(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_one_line() {
        let sample =
            GoldenSample { name: "a\nb".into(), image: "AA==".into(), expected: "{\n}".into(), tolerance: 0.01 };
        let limits = AdmissionLimits { memory_bytes: 1, seconds: 2, result_bytes: 3 };
        let line = Request {
            spec: ModelSpec::default(),
            limits,
            samples: vec![sample],
            image: None,
            reports_as_tensor: false,
        }
        .to_line()
        .unwrap();
        assert_eq!(line.iter().position(|byte| *byte == b'\n'), Some(line.len() - 1));
        let request: Request = serde_json::from_slice(&line).unwrap();
        assert_eq!((request.limits, request.samples[0].name.as_str()), (limits, "a\nb"));
        let text = String::from_utf8(line).unwrap();
        assert!(text.contains("\"picture\":\"AA==\"") && text.contains("\"answer\":"), "{text}");
    }
}
