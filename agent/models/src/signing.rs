//! Who vouches for a model: signatures, and the keys that are believed.
//!
//! A signature is a DSSE envelope (Dead Simple Signing Envelope, protocol version 1): a payload, its type, and one or
//! more Ed25519 signatures (RFC 8032) over their pre-authentication encoding
//!
//! ```text
//! PAE = "DSSEv1" SP len(type) SP type SP len(payload) SP payload        (lengths in ASCII decimal, counted in bytes)
//! ```
//!
//! For a model the payload is the JSON of a [`Statement`]; it binds name, version, digest and size together, so that a
//! good file cannot be passed off as another version. A key is known by the SHA-256 of its 32 raw bytes. Keys are PEM
//! files as `openssl genpkey -algorithm ed25519` writes them. This is the only place that names `ring`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use lineside_api::envelope::{Envelope, Signature};
use ring::rand::SecureRandom as _;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer};
use serde::{Deserialize, Serialize};

use lineside_common::clock;
use lineside_common::digest::Digest;
use lineside_common::files::read_bounded;

/// The payload type of a model's statement.
pub const MODEL_PAYLOAD: &str = "application/vnd.lineside.model.v1+json";
/// Bytes of a key file at most.
const KEY_BYTES_MAX: u64 = 64 << 10;
/// A `SubjectPublicKeyInfo` of Ed25519 up to the key itself (RFC 8410).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// A PKCS#8 version 1 private key of Ed25519 up to the seed itself (RFC 8410).
const PKCS8_PREFIX: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// What is vouched for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Statement {
    /// The model's name.
    pub name: String,
    /// Its version.
    pub version: u64,
    /// SHA-256 of its file.
    pub digest: Digest,
    /// Bytes of its file.
    pub size: u64,
    /// Until when it may begin to serve, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<String>,
}

impl Statement {
    /// When it expires.
    ///
    /// # Errors
    /// When that is no time.
    pub fn expiry(&self) -> Result<Option<SystemTime>, String> {
        self.expires.as_deref().map(parse_time).transpose()
    }
}

/// Reads `2027-12-31` (the end of that day) or `2027-12-31T12:00:00Z`.
///
/// # Errors
/// A message for people when it is anything else.
pub fn parse_time(text: &str) -> Result<SystemTime, String> {
    let whole = if text.contains('T') { text.to_owned() } else { format!("{text}T23:59:59Z") };
    humantime::parse_rfc3339(&whole)
        .map_err(|error| format!("`{text}` is no date like 2027-12-31 or 2027-12-31T12:00:00Z: {error}"))
}

/// The keys that are believed, and how many of them have to sign.
#[derive(Debug, Clone)]
pub struct Keyring {
    keys: BTreeMap<String, [u8; 32]>,
    threshold: usize,
}

impl Keyring {
    /// Reads one PEM file, or all `.pem` and `.pub` files of a folder.
    ///
    /// # Errors
    /// Which file is no key, or that the threshold cannot be reached.
    pub fn read(path: &Path, threshold: usize) -> Result<Self, String> {
        let shown = path.display();
        let facts = std::fs::metadata(path).map_err(|error| format!("{shown}: {error}"))?;
        let mut files = vec![path.to_owned()];
        if facts.is_dir() {
            let entries = std::fs::read_dir(path).map_err(|error| format!("{shown}: {error}"))?;
            files = entries
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|file| file.extension().is_some_and(|suffix| suffix == "pem" || suffix == "pub"))
                .collect();
        }
        let mut keys = BTreeMap::new();
        for file in files {
            let key = public_key(&file).map_err(|why| format!("{}: {why}", file.display()))?;
            keys.insert(key_id(&key), key);
        }
        match keys.len() {
            0 => Err(format!("{shown} holds no .pem or .pub file")),
            known if threshold > known || threshold == 0 => {
                Err(format!("{threshold} signatures are asked for, and {shown} holds {known} keys"))
            }
            _ => Ok(Self { keys, threshold }),
        }
    }

    /// The payload, when enough of the keys have signed it.
    ///
    /// # Errors
    /// Why it is not believed.
    pub fn verify(&self, envelope: &Envelope, payload_type: &str) -> Result<Vec<u8>, String> {
        if envelope.payload_type != payload_type {
            return Err(format!("the signature is of a {}, not of a {payload_type}", envelope.payload_type));
        }
        let payload = envelope.decoded().map_err(|error| error.to_string())?;
        let message = pae(payload_type, &payload);
        let mut signers = BTreeSet::new();
        for signature in &envelope.signatures {
            let Some(key) = self.keys.get(&signature.keyid) else { continue };
            let sig = BASE64.decode(&signature.sig).map_err(|_| "a signature is no base64".to_owned())?;
            if UnparsedPublicKey::new(&ED25519, key).verify(&message, &sig).is_err() {
                return Err(format!("the signature of key {} does not fit", short(&signature.keyid)));
            }
            signers.insert(&signature.keyid);
        }
        if signers.len() < self.threshold {
            let by: Vec<&str> = envelope.signatures.iter().map(|signature| short(&signature.keyid)).collect();
            return Err(format!(
                "{} of {} signatures by trusted keys; it is signed by {}",
                signers.len(),
                self.threshold,
                if by.is_empty() { "nobody".to_owned() } else { by.join(", ") }
            ));
        }
        Ok(payload)
    }

    /// The statement of an envelope that vouches for exactly this model version.
    ///
    /// # Errors
    /// Why it does not.
    pub fn statement(&self, envelope: &Envelope, name: &str, version: u64) -> Result<Statement, String> {
        let payload = self.verify(envelope, MODEL_PAYLOAD)?;
        let statement: Statement = serde_json::from_slice(&payload)
            .map_err(|error| format!("the signed statement cannot be read: {error}"))?;
        if (statement.name.as_str(), statement.version) != (name, version) {
            return Err(format!(
                "the signature is of {} version {}, not of {name} version {version}",
                statement.name, statement.version
            ));
        }
        statement.expiry()?;
        Ok(statement)
    }
}

/// Adds a key's signature to an envelope; one it had made before is replaced.
///
/// # Errors
/// When the payload is no base64.
pub fn sign(envelope: &mut Envelope, key: &SigningKey) -> Result<(), String> {
    let sig = key.0.sign(&pae(&envelope.payload_type, &envelope.decoded().map_err(|error| error.to_string())?));
    let keyid = key_id(&key.public());
    envelope.signatures.retain(|signature| signature.keyid != keyid);
    envelope.signatures.push(Signature { keyid, sig: BASE64.encode(sig) });
    Ok(())
}

/// A private key.
pub struct SigningKey(Ed25519KeyPair);

impl SigningKey {
    /// Reads a PKCS#8 PEM file.
    ///
    /// # Errors
    /// Why it is no such key.
    pub fn read(path: &Path) -> Result<Self, String> {
        let shown = path.display();
        let pem = read_bounded(path, KEY_BYTES_MAX).map_err(|error| format!("{shown}: {error}"))?;
        let wrong = || format!("{shown} holds no Ed25519 private key; `lineside keygen` makes one");
        let der = PrivatePkcs8KeyDer::from_pem_slice(&pem).map_err(|_| wrong())?;
        Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der()).map(Self).map_err(|_| wrong())
    }

    /// Makes a new key: the private one in `path`, for its owner only, the public one beside it with `.pub` added.
    ///
    /// # Errors
    /// When a file is there already or cannot be written.
    pub fn generate(path: &Path) -> Result<Self, String> {
        let mut public_path = path.as_os_str().to_owned();
        public_path.push(".pub");
        if Path::new(&public_path).exists() {
            return Err(format!("{} is there already, and nothing is overwritten", Path::new(&public_path).display()));
        }
        let mut seed = [0; 32];
        ring::rand::SystemRandom::new().fill(&mut seed).map_err(|_| "the system gives no random numbers".to_owned())?;
        let der = [&PKCS8_PREFIX[..], &seed].concat();
        let key = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der).map_err(|error| error.to_string())?;
        let public = [&SPKI_PREFIX[..], key.public_key().as_ref()].concat();
        create(path, 0o600, &pem("PRIVATE KEY", &der))?;
        create(Path::new(&public_path), 0o644, &pem("PUBLIC KEY", &public))?;
        Ok(Self(key))
    }

    /// The public key, 32 bytes.
    pub fn public(&self) -> [u8; 32] {
        let mut public = [0; 32];
        public.copy_from_slice(self.0.public_key().as_ref());
        public
    }
}

/// What a key is known by.
pub fn key_id(public: &[u8; 32]) -> String {
    Digest::of(public).hex()
}

/// Whether a signature that ends at `expires` has ended. A clock that was never set cannot tell, and ends nothing.
pub fn has_expired(expires: SystemTime, now: SystemTime) -> bool {
    clock::is_plausible(now) && now > expires
}

fn short(keyid: &str) -> &str {
    keyid.get(..12).unwrap_or(keyid)
}

fn pae(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut message = format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len()).into_bytes();
    message.extend_from_slice(payload);
    message
}

fn public_key(path: &Path) -> Result<[u8; 32], String> {
    let pem = read_bounded(path, KEY_BYTES_MAX).map_err(|error| error.to_string())?;
    let wrong = "is no Ed25519 public key in PEM";
    let der = SubjectPublicKeyInfoDer::from_pem_slice(&pem).map_err(|_| wrong)?;
    der.as_ref().strip_prefix(&SPKI_PREFIX).and_then(|key| key.try_into().ok()).ok_or_else(|| wrong.to_owned())
}

fn pem(label: &str, der: &[u8]) -> String {
    // All of ours are short enough for one line.
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", BASE64.encode(der))
}

fn create(path: &Path, mode: u32, text: &str) -> Result<(), String> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
        .map_err(|error| format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(folder: &Path, name: &str) -> SigningKey {
        SigningKey::generate(&folder.join(name)).unwrap()
    }

    fn statement() -> Statement {
        Statement { name: "m".into(), version: 3, digest: Digest::of(b"x"), size: 1, expires: None }
    }

    #[test]
    fn what_enough_trusted_keys_have_signed_is_believed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (key(folder.path(), "one"), key(folder.path(), "two"));
        let strangers = tempfile::tempdir().unwrap();
        let stranger = key(strangers.path(), "three");
        let mut envelope = Envelope::new(MODEL_PAYLOAD, &serde_json::to_vec(&statement()).unwrap());
        let keys = |threshold| Keyring::read(folder.path(), threshold).unwrap();
        assert!(keys(1).statement(&envelope, "m", 3).unwrap_err().contains("nobody"));
        sign(&mut envelope, &stranger).unwrap();
        assert!(keys(1).statement(&envelope, "m", 3).unwrap_err().contains("0 of 1"));
        sign(&mut envelope, &one).unwrap();
        sign(&mut envelope, &one).unwrap();
        assert_eq!(envelope.signatures.len(), 2);
        assert_eq!(keys(1).statement(&envelope, "m", 3), Ok(statement()));
        assert!(keys(2).statement(&envelope, "m", 3).unwrap_err().contains("1 of 2"));
        let twice = Envelope { signatures: vec![envelope.signatures[1].clone(); 2], ..envelope.clone() };
        assert!(keys(2).statement(&twice, "m", 3).is_err(), "one key is one signature");
        sign(&mut envelope, &two).unwrap();
        assert_eq!(keys(2).statement(&envelope, "m", 3), Ok(statement()));

        assert!(keys(1).statement(&envelope, "other", 3).unwrap_err().contains("m version 3"));
        assert!(keys(1).statement(&envelope, "m", 4).is_err());
        let mut other = Envelope { payload_type: "text/plain".into(), ..envelope.clone() };
        assert!(keys(1).verify(&other, MODEL_PAYLOAD).unwrap_err().contains("text/plain"));
        other = Envelope::new(MODEL_PAYLOAD, br#"{"name":"m"}"#);
        other.signatures = envelope.signatures.clone();
        assert!(keys(1).verify(&other, MODEL_PAYLOAD).unwrap_err().contains("does not fit"));
    }

    #[test]
    fn keys_that_cannot_be_used_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        key(folder.path(), "one");
        assert!(SigningKey::generate(&folder.path().join("one")).is_err(), "never overwritten");
        std::fs::write(folder.path().join("two.pub"), "x").unwrap();
        assert!(SigningKey::generate(&folder.path().join("two")).is_err() && !folder.path().join("two").exists());
        std::fs::remove_file(folder.path().join("two.pub")).unwrap();
        assert!(SigningKey::read(&folder.path().join("one")).is_ok());
        assert!(SigningKey::read(&folder.path().join("one.pub")).err().unwrap().contains("private key"));
        assert!(Keyring::read(folder.path(), 2).unwrap_err().contains("holds 1 keys"));
        assert!(Keyring::read(folder.path(), 0).is_err());
        std::fs::write(folder.path().join("bad.pem"), "x").unwrap();
        assert!(Keyring::read(folder.path(), 1).unwrap_err().contains("bad.pem"));
        assert!(Keyring::read(&folder.path().join("gone"), 1).is_err());
    }

    #[test]
    fn dates_end_with_their_day_and_a_clock_never_set_ends_nothing() {
        let end = parse_time("2027-12-31").unwrap();
        assert_eq!(end, parse_time("2027-12-31T23:59:59Z").unwrap());
        assert!(parse_time("soon").is_err());
        assert!(has_expired(end, end + std::time::Duration::from_secs(1)) && !has_expired(end, end));
        assert!(!has_expired(SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(9)));
    }
}
