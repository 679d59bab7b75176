//! Ed25519 key files: reading, generating, and the id of a key.
//!
//! Public keys are encoded by rustls. The PKCS#8 and PEM encodings of a new private key are written by hand, because no
//! dependency of this crate writes them: `ring` generates only PKCS#8 version 2, and these files are version 1, as
//! `openssl genpkey` writes them.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair as _, Signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer, alg_id};
use rustls::sign::public_key_to_spki;

use lineside_common::digest::Digest;
use lineside_common::files;

use super::error::SigningError;

/// Upper bound of a key file.
const KEY_BYTES_MAX: u64 = 64 << 10;
/// The DER encoding of a PKCS#8 version 1 private key of Ed25519 up to the seed (RFC 8410).
const PKCS8_PREFIX: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// A private key.
pub struct SigningKey(Ed25519KeyPair);

impl SigningKey {
    /// Reads a PKCS#8 PEM file.
    ///
    /// # Errors
    /// When the file cannot be read or is not an Ed25519 private key.
    pub fn read(path: &Path) -> Result<Self, SigningError> {
        let pem = files::read_bounded(path, KEY_BYTES_MAX).map_err(io_error(path))?;
        let invalid = || SigningError::NotPrivateKey { path: path.to_owned() };
        let der = PrivatePkcs8KeyDer::from_pem_slice(&pem).map_err(|_| invalid())?;
        Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der()).map(Self).map_err(|_| invalid())
    }

    /// Generates a key. Writes the private key to `path`, readable by its owner only, and the public key beside it with
    /// `.pub` appended.
    ///
    /// # Errors
    /// When one of the files exists or cannot be written.
    pub fn generate(path: &Path) -> Result<Self, SigningError> {
        let mut public_path = path.as_os_str().to_owned();
        public_path.push(".pub");
        let public_path = PathBuf::from(public_path);
        if public_path.exists() {
            return Err(SigningError::KeyExists { path: public_path });
        }
        let mut seed = [0; 32];
        SystemRandom::new().fill(&mut seed).map_err(|_| SigningError::Random)?;
        let der = [&PKCS8_PREFIX[..], &seed].concat();
        let invalid = |_| SigningError::NotPrivateKey { path: path.to_owned() };
        let key = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der).map_err(invalid)?;
        create(path, 0o600, &pem("PRIVATE KEY", &der))?;
        let public = public_key_to_spki(&alg_id::ED25519, key.public_key());
        create(&public_path, 0o644, &pem("PUBLIC KEY", &public))?;
        Ok(Self(key))
    }

    /// The public key, 32 bytes.
    pub fn public(&self) -> [u8; 32] {
        let mut public = [0; 32];
        public.copy_from_slice(self.0.public_key().as_ref());
        public
    }

    pub(super) fn sign(&self, message: &[u8]) -> Signature {
        self.0.sign(message)
    }
}

/// The id of a public key: the SHA-256 of its 32 bytes in hexadecimal digits.
pub fn key_id(public: &[u8; 32]) -> String {
    Digest::of(public).hex()
}

/// Reads one PEM file, or all `.pem` and `.pub` files of a folder. Returns the raw keys by their id.
pub(super) fn read_public_keys(path: &Path) -> Result<BTreeMap<String, [u8; 32]>, SigningError> {
    let metadata = std::fs::metadata(path).map_err(io_error(path))?;
    let mut files = vec![path.to_owned()];
    if metadata.is_dir() {
        files = std::fs::read_dir(path)
            .map_err(io_error(path))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|file| file.extension().is_some_and(|extension| extension == "pem" || extension == "pub"))
            .collect();
    }
    let keys = files.iter().map(|file| read_public_key(file).map(|key| (key_id(&key), key)));
    keys.collect()
}

fn read_public_key(path: &Path) -> Result<[u8; 32], SigningError> {
    let pem = files::read_bounded(path, KEY_BYTES_MAX).map_err(io_error(path))?;
    let invalid = || SigningError::NotPublicKey { path: path.to_owned() };
    let spki = SubjectPublicKeyInfoDer::from_pem_slice(&pem).map_err(|_| invalid())?;
    // The key is the end of the encoding; encoding it again proves the algorithm and the length.
    let key: [u8; 32] = spki.last_chunk().copied().ok_or_else(invalid)?;
    if public_key_to_spki(&alg_id::ED25519, key) == spki { Ok(key) } else { Err(invalid()) }
}

/// PEM with one line of Base64. The keys here need at most 64 characters, which is the longest line that RFC 7468 allows.
fn pem(label: &str, der: &[u8]) -> String {
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", BASE64.encode(der))
}

fn create(path: &Path, mode: u32, text: &str) -> Result<(), SigningError> {
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(mode).open(path).map_err(|error| {
        if error.kind() == std::io::ErrorKind::AlreadyExists {
            SigningError::KeyExists { path: path.to_owned() }
        } else {
            io_error(path)(error)
        }
    })?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io_error(path))
}

fn io_error(path: &Path) -> impl Fn(std::io::Error) -> SigningError + '_ {
    move |source| SigningError::Io { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::super::{Keyring, SigningErrorKind};
    use super::*;

    #[test]
    fn a_generated_key_is_read_again_and_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("one");
        let key = SigningKey::generate(&path).unwrap();
        assert!(matches!(SigningKey::generate(&path), Err(SigningError::KeyExists { .. })));
        assert_eq!(SigningKey::read(&path).unwrap().public(), key.public());
        assert_eq!(read_public_key(&folder.path().join("one.pub")).unwrap(), key.public());
        // A public key in the way leaves no private key behind.
        std::fs::write(folder.path().join("two.pub"), "x").unwrap();
        assert!(SigningKey::generate(&folder.path().join("two")).is_err() && !folder.path().join("two").exists());
        std::fs::remove_file(folder.path().join("one.pub")).unwrap();
        assert!(matches!(SigningKey::generate(&path), Err(SigningError::KeyExists { .. })), "a private key in the way");
    }

    #[test]
    fn files_that_are_not_keys_are_rejected_by_name() {
        let folder = tempfile::tempdir().unwrap();
        SigningKey::generate(&folder.path().join("one")).unwrap();
        let private = SigningKey::read(&folder.path().join("one.pub")).err().unwrap();
        assert!(private.to_string().contains("private key"), "{private}");
        assert!(Keyring::read(folder.path(), 2).unwrap_err().to_string().contains("contains 1 keys"));
        assert_eq!(Keyring::read(folder.path(), 0).unwrap_err().kind(), SigningErrorKind::Keys);
        std::fs::write(folder.path().join("bad.pem"), "x").unwrap();
        assert!(Keyring::read(folder.path(), 1).unwrap_err().to_string().contains("bad.pem"));
        assert_eq!(Keyring::read(&folder.path().join("gone"), 1).unwrap_err().kind(), SigningErrorKind::Io);
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(Keyring::read(empty.path(), 1), Err(SigningError::NoKeys { .. })));
    }

    #[test]
    fn a_public_key_of_another_algorithm_is_rejected() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x25519.pub");
        let x25519 = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x6e, 0x03, 0x21, 0x00];
        std::fs::write(&path, pem("PUBLIC KEY", &[&x25519[..], &[7; 32]].concat())).unwrap();
        assert!(matches!(read_public_key(&path), Err(SigningError::NotPublicKey { .. })));
    }
}
