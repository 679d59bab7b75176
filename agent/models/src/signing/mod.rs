//! Signatures of model versions, and the trusted keys that verify them.
//!
//! A signature is a DSSE envelope (Dead Simple Signing Envelope, protocol version 1): a payload, its type, and one or
//! more Ed25519 signatures (RFC 8032) over their pre-authentication encoding
//!
//! ```text
//! PAE = "DSSEv1" SP len(type) SP type SP len(payload) SP payload        (lengths in ASCII decimal, counted in bytes)
//! ```
//!
//! For a model the payload is the JSON of a [`Statement`]. It binds name, version, digest and size together, so that a
//! valid file cannot be presented as another version, and everything else that decides what the version reports: whether
//! it may replace a higher version, and the fields of the manifest that turn a picture into a prediction ([`spec_digest`]).
//! A payload without these two fields, as earlier versions signed it, is refused. The id of a key is the SHA-256 of its 32 raw bytes. Keys are PEM
//! files as `openssl genpkey -algorithm ed25519` writes them. Only this module uses `ring`.

mod error;
mod keys;
mod spec_digest;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::signature::{ED25519, UnparsedPublicKey};
use serde::{Deserialize, Serialize};

use lineside_api::envelope::{Envelope, Signature};
use lineside_common::clock;
use lineside_common::digest::Digest;

pub use error::{SigningError, SigningErrorKind};
pub use keys::{SigningKey, key_id};
pub use spec_digest::spec_digest;

/// The payload type of the statement about a model.
pub const MODEL_PAYLOAD: &str = "application/vnd.lineside.model.v1+json";

/// What the signature of a model version states.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Statement {
    /// Name of the model.
    pub name: String,
    /// Version number.
    pub version: u64,
    /// SHA-256 of the model file.
    pub digest: Digest,
    /// Size of the model file in bytes.
    pub size: u64,
    /// Until when the version may start to serve, RFC 3339. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<String>,
    /// Whether the version may replace a higher one, where its manifest sets `rollback: true`.
    pub rollback: bool,
    /// Digest of `spec.task`, `spec.input` and `spec.output` of its manifest; see [`spec_digest`].
    pub spec_digest: Digest,
}

impl Statement {
    /// When the signature expires.
    ///
    /// # Errors
    /// [`SigningError::Time`] when `expires` is not a time.
    pub fn expiry(&self) -> Result<Option<SystemTime>, SigningError> {
        self.expires.as_deref().map(parse_time).transpose()
    }
}

/// Parses `2027-12-31` (the end of that day) or `2027-12-31T12:00:00Z`.
///
/// # Errors
/// [`SigningError::Time`] for any other text.
pub fn parse_time(text: &str) -> Result<SystemTime, SigningError> {
    let timestamp = if text.contains('T') { text.to_owned() } else { format!("{text}T23:59:59Z") };
    humantime::parse_rfc3339(&timestamp).map_err(|source| SigningError::Time { text: text.to_owned(), source })
}

/// Whether a signature that is valid until `expires` has expired. `false` while the clock is not plausible, because a
/// clock that was never set does not prove an expiry.
pub fn has_expired(expires: SystemTime, now: SystemTime) -> bool {
    clock::is_plausible(now) && now > expires
}

/// The trusted keys, and how many of them must sign.
#[derive(Debug, Clone)]
pub struct Keyring {
    /// Raw public keys by their id.
    keys: BTreeMap<String, [u8; 32]>,
    threshold: usize,
}

impl Keyring {
    /// Reads one PEM file, or all `.pem` and `.pub` files of a folder.
    ///
    /// # Errors
    /// When a file is not a key, the folder has no key, or the threshold is 0 or exceeds the number of keys.
    pub fn read(path: &Path, threshold: usize) -> Result<Self, SigningError> {
        let keys = keys::read_public_keys(path)?;
        if keys.is_empty() {
            Err(SigningError::NoKeys { path: path.to_owned() })
        } else if threshold > keys.len() || threshold == 0 {
            Err(SigningError::Threshold { path: path.to_owned(), threshold, keys: keys.len() })
        } else {
            Ok(Self { keys, threshold })
        }
    }

    /// Verifies an envelope and returns its payload. Signatures of keys that are not trusted are ignored; an invalid
    /// signature of a trusted key rejects the envelope, also when enough other signatures are valid.
    ///
    /// # Errors
    /// When the payload type differs, a signature is invalid, or fewer trusted keys than the threshold have signed.
    pub fn verify(&self, envelope: &Envelope, payload_type: &str) -> Result<Vec<u8>, SigningError> {
        if envelope.payload_type != payload_type {
            return Err(SigningError::PayloadType {
                expected: payload_type.to_owned(),
                actual: envelope.payload_type.clone(),
            });
        }
        let payload = envelope.decoded().map_err(|error| SigningError::Payload(error.into()))?;
        let message = pre_authentication_encoding(payload_type, &payload);
        let mut signers = BTreeSet::new();
        for signature in &envelope.signatures {
            let Some(key) = self.keys.get(&signature.keyid) else { continue };
            let invalid = || SigningError::InvalidSignature { key: short_id(&signature.keyid) };
            let sig = BASE64.decode(&signature.sig).map_err(|_| invalid())?;
            UnparsedPublicKey::new(&ED25519, key).verify(&message, &sig).map_err(|_| invalid())?;
            signers.insert(&signature.keyid);
        }
        if signers.len() < self.threshold {
            let signed_by: Vec<String> =
                envelope.signatures.iter().map(|signature| short_id(&signature.keyid)).collect();
            return Err(SigningError::NotEnoughSignatures {
                trusted: signers.len(),
                threshold: self.threshold,
                signed_by: if signed_by.is_empty() { "no key".to_owned() } else { signed_by.join(", ") },
            });
        }
        Ok(payload)
    }

    /// Verifies an envelope and returns its statement, which must be about exactly this model version.
    ///
    /// # Errors
    /// As [`Keyring::verify`], and when the payload is not a valid statement or is about another version.
    pub fn verify_statement(&self, envelope: &Envelope, name: &str, version: u64) -> Result<Statement, SigningError> {
        let payload = self.verify(envelope, MODEL_PAYLOAD)?;
        let fields: serde_json::Value =
            serde_json::from_slice(&payload).map_err(|error| SigningError::Payload(error.into()))?;
        if ["rollback", "specDigest"].iter().any(|field| fields.get(field).is_none()) {
            return Err(SigningError::FormerPayload);
        }
        let statement: Statement =
            serde_json::from_slice(&payload).map_err(|error| SigningError::Payload(error.into()))?;
        if (statement.name.as_str(), statement.version) != (name, version) {
            return Err(SigningError::OtherVersion {
                signed: format!("{} version {}", statement.name, statement.version),
                expected: format!("{name} version {version}"),
            });
        }
        statement.expiry()?;
        Ok(statement)
    }
}

/// Adds the signature of a key to an envelope. An earlier signature of the same key is replaced.
///
/// # Errors
/// [`SigningError::Payload`] when the payload of the envelope is not Base64.
pub fn sign(envelope: &mut Envelope, key: &SigningKey) -> Result<(), SigningError> {
    let payload = envelope.decoded().map_err(|error| SigningError::Payload(error.into()))?;
    let sig = key.sign(&pre_authentication_encoding(&envelope.payload_type, &payload));
    let keyid = key_id(&key.public());
    envelope.signatures.retain(|signature| signature.keyid != keyid);
    envelope.signatures.push(Signature { keyid, sig: BASE64.encode(sig) });
    Ok(())
}

/// The first 12 digits of a key id, for messages.
fn short_id(keyid: &str) -> String {
    keyid.get(..12).unwrap_or(keyid).to_owned()
}

fn pre_authentication_encoding(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut message = format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len()).into_bytes();
    message.extend_from_slice(payload);
    message
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn generate(folder: &Path, name: &str) -> SigningKey {
        SigningKey::generate(&folder.join(name)).unwrap()
    }

    fn statement() -> Statement {
        Statement {
            name: "m".into(),
            version: 3,
            digest: Digest::of(b"x"),
            size: 1,
            expires: None,
            rollback: false,
            spec_digest: Digest::of(b"spec"),
        }
    }

    fn unsigned() -> Envelope {
        Envelope::new(MODEL_PAYLOAD, &serde_json::to_vec(&statement()).unwrap())
    }

    #[test]
    fn an_envelope_needs_signatures_of_as_many_trusted_keys_as_the_threshold() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (generate(folder.path(), "one"), generate(folder.path(), "two"));
        let untrusted_folder = tempfile::tempdir().unwrap();
        let untrusted = generate(untrusted_folder.path(), "three");
        let verify = |envelope: &Envelope, threshold| {
            Keyring::read(folder.path(), threshold).unwrap().verify_statement(envelope, "m", 3)
        };
        let mut envelope = unsigned();
        let error = verify(&envelope, 1).unwrap_err();
        assert_eq!(error.kind(), SigningErrorKind::Untrusted);
        assert!(error.to_string().contains("no key"), "{error}");
        sign(&mut envelope, &untrusted).unwrap();
        assert!(verify(&envelope, 1).unwrap_err().to_string().contains("0 of 1"));
        sign(&mut envelope, &one).unwrap();
        sign(&mut envelope, &one).unwrap();
        assert_eq!(envelope.signatures.len(), 2, "a key signs once");
        assert_eq!(verify(&envelope, 1).unwrap(), statement());
        assert!(verify(&envelope, 2).unwrap_err().to_string().contains("1 of 2"));
        let duplicated = Envelope { signatures: vec![envelope.signatures[1].clone(); 2], ..envelope.clone() };
        assert_eq!(verify(&duplicated, 2).unwrap_err().kind(), SigningErrorKind::Untrusted, "a key counts once");
        sign(&mut envelope, &two).unwrap();
        assert_eq!(verify(&envelope, 2).unwrap(), statement());
    }

    #[test]
    fn a_signature_is_valid_for_one_version_and_one_payload() {
        let folder = tempfile::tempdir().unwrap();
        let key = generate(folder.path(), "one");
        let keys = Keyring::read(folder.path(), 1).unwrap();
        let mut envelope = unsigned();
        sign(&mut envelope, &key).unwrap();
        let error = keys.verify_statement(&envelope, "other", 3).unwrap_err();
        assert_eq!(error.kind(), SigningErrorKind::OtherSubject);
        assert!(error.to_string().contains("m version 3"), "{error}");
        assert_eq!(keys.verify_statement(&envelope, "m", 4).unwrap_err().kind(), SigningErrorKind::OtherSubject);
        let other_type = Envelope { payload_type: "text/plain".into(), ..envelope.clone() };
        let error = keys.verify(&other_type, MODEL_PAYLOAD).unwrap_err();
        assert_eq!(error.kind(), SigningErrorKind::OtherSubject);
        assert!(error.to_string().contains("text/plain"), "{error}");
        let mut other_payload = Envelope::new(MODEL_PAYLOAD, br#"{"name":"m"}"#);
        other_payload.signatures = envelope.signatures.clone();
        let error = keys.verify(&other_payload, MODEL_PAYLOAD).unwrap_err();
        assert_eq!(error.kind(), SigningErrorKind::InvalidSignature);
        let mut not_base64 = envelope.clone();
        not_base64.signatures[0].sig = "?".into();
        let error = keys.verify(&not_base64, MODEL_PAYLOAD).unwrap_err();
        assert_eq!(error.kind(), SigningErrorKind::InvalidSignature);
    }

    #[test]
    fn a_payload_that_does_not_state_rollback_and_spec_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let key = generate(folder.path(), "one");
        let keys = Keyring::read(folder.path(), 1).unwrap();
        for field in ["rollback", "specDigest"] {
            let mut payload = serde_json::to_value(statement()).unwrap();
            assert!(payload.as_object_mut().unwrap().remove(field).is_some());
            let mut envelope = Envelope::new(MODEL_PAYLOAD, payload.to_string().as_bytes());
            sign(&mut envelope, &key).unwrap();
            let error = keys.verify_statement(&envelope, "m", 3).unwrap_err();
            assert_eq!(error.kind(), SigningErrorKind::Payload);
            assert!(error.to_string().contains("lineside sign --manifest"), "{error}");
        }
    }

    #[test]
    fn a_date_ends_with_its_day_and_an_implausible_clock_expires_nothing() {
        let end = parse_time("2027-12-31").unwrap();
        assert_eq!(end, parse_time("2027-12-31T23:59:59Z").unwrap());
        assert_eq!(parse_time("soon").unwrap_err().kind(), SigningErrorKind::Time);
        assert!(has_expired(end, end + Duration::from_secs(1)) && !has_expired(end, end));
        assert!(!has_expired(SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH + Duration::from_secs(9)));
    }
}
