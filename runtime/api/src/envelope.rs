//! A DSSE envelope as it stands in manifests and bundles. Who may sign it, and what it means, stands in the crate `models`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A signed payload, as it stands in manifests and bundles.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Envelope {
    /// What the payload is.
    pub payload_type: String,
    /// The payload in base64.
    pub payload: String,
    /// One for each key.
    pub signatures: Vec<Signature>,
}

/// One signature of an envelope.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Signature {
    /// SHA-256 of the raw public key, in hexadecimal digits.
    pub keyid: String,
    /// The signature in base64.
    pub sig: String,
}

impl Envelope {
    /// An envelope that nobody has signed yet.
    pub fn new(payload_type: &str, payload: &[u8]) -> Self {
        Self { payload_type: payload_type.to_owned(), payload: BASE64.encode(payload), signatures: Vec::new() }
    }

    /// The payload, believed or not.
    ///
    /// # Errors
    /// When it is no base64.
    pub fn decoded(&self) -> Result<Vec<u8>, String> {
        BASE64.decode(&self.payload).map_err(|_| "the payload of the signature is no base64".to_owned())
    }
}
