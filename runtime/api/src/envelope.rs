//! The DSSE envelope (Dead Simple Signing Envelope, protocol version 1) of manifests and bundles. The crate `models` verifies
//! envelopes against the trusted keys.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A signed payload in DSSE format.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Envelope {
    /// Type of the payload, which is signed together with it.
    pub payload_type: String,
    /// The payload, in base64.
    pub payload: String,
    /// The signatures, one for each key.
    pub signatures: Vec<Signature>,
}

/// One signature of an envelope.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Signature {
    /// SHA-256 of the raw public key, as 64 hexadecimal digits.
    pub keyid: String,
    /// The signature, in base64.
    pub sig: String,
}

/// The payload of an envelope is not base64.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the payload of the signature is not base64")]
pub struct EnvelopeError(#[source] base64::DecodeError);

impl Envelope {
    /// An envelope without signatures.
    pub fn new(payload_type: &str, payload: &[u8]) -> Self {
        Self { payload_type: payload_type.to_owned(), payload: BASE64.encode(payload), signatures: Vec::new() }
    }

    /// The decoded payload. No signature is verified.
    ///
    /// # Errors
    /// [`EnvelopeError`] when the payload is not base64.
    pub fn decoded(&self) -> Result<Vec<u8>, EnvelopeError> {
        BASE64.decode(&self.payload).map_err(EnvelopeError)
    }
}
