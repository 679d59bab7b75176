//! The credentials for a broker: user name and password, trusted certificate authorities, and the client certificate.
//!
//! They are read from a mounted folder for every connection, so that rotated credentials take effect without a restart.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_cert::der::Decode as _;

use crate::config::Broker;
use lineside_common::digest::Digest;
use lineside_common::secrets::Secret;

const USERNAME: &str = "username";
const PASSWORD: &str = "password";
const CA_CERTIFICATES: &str = "ca.crt";
const CLIENT_CERTIFICATE: &str = "tls.crt";
const CLIENT_KEY: &str = "tls.key";
/// The files that may be in the folder, named as in the Secret types `basic-auth` and `tls` of Kubernetes.
const FILES: [&str; 5] = [USERNAME, PASSWORD, CA_CERTIFICATES, CLIENT_CERTIFICATE, CLIENT_KEY];

/// What a connection needs besides the address. The default is an unauthenticated connection without TLS.
#[derive(Default)]
pub struct BrokerCredentials {
    /// User name and password.
    pub login: Option<(String, String)>,
    /// The TLS configuration; `None` for a plain connection.
    pub tls: Option<Arc<ClientConfig>>,
    /// When the client certificate expires; `None` without one.
    pub expires: Option<SystemTime>,
}

/// The class of a [`CredentialsError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CredentialsErrorKind {
    /// A file cannot be read, or the folder is missing.
    Unreadable,
    /// A file that is needed is missing.
    Missing,
    /// The content of a file is not valid.
    Invalid,
}

/// Why the credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The folder or one of its files cannot be read.
    #[error("the MQTT secret cannot be read")]
    Secret {
        /// Names the file.
        source: Box<dyn Error + Send + Sync>,
    },
    /// A certificate file without a certificate.
    #[error("{file} does not contain a PEM-encoded certificate")]
    NoCertificate {
        /// The file's name in the folder.
        file: &'static str,
    },
    /// A certificate that cannot be parsed or used.
    #[error("{file} contains an invalid certificate")]
    InvalidCertificate {
        /// The file's name in the folder.
        file: &'static str,
        /// The parser's error.
        source: Box<dyn Error + Send + Sync>,
    },
    /// `tls.key` without a private key.
    #[error("{CLIENT_KEY} does not contain a PEM-encoded private key")]
    NoPrivateKey,
    /// The private key does not belong to the certificate.
    #[error("{CLIENT_CERTIFICATE} and {CLIENT_KEY} do not match")]
    KeyMismatch {
        /// The TLS library's error.
        source: rustls::Error,
    },
    /// Only one file of the client certificate is present.
    #[error("{CLIENT_CERTIFICATE} and {CLIENT_KEY} must both be present, or neither")]
    IncompleteClientCertificate,
    /// There is neither `ca.crt` nor a trusted certificate on the machine.
    #[error(
        "this machine has no root certificates; add the certificate of the broker's authority as {CA_CERTIFICATES}"
    )]
    NoRootCertificates,
    /// The TLS library rejects its configuration.
    #[error("TLS cannot be configured")]
    Tls {
        /// The TLS library's error.
        source: rustls::Error,
    },
}

impl CredentialsError {
    fn secret(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Secret { source: source.into() }
    }

    /// The class of the error.
    pub fn kind(&self) -> CredentialsErrorKind {
        match self {
            Self::Secret { .. } => CredentialsErrorKind::Unreadable,
            Self::IncompleteClientCertificate | Self::NoRootCertificates => CredentialsErrorKind::Missing,
            Self::NoCertificate { .. }
            | Self::InvalidCertificate { .. }
            | Self::NoPrivateKey
            | Self::KeyMismatch { .. }
            | Self::Tls { .. } => CredentialsErrorKind::Invalid,
        }
    }
}

impl BrokerCredentials {
    /// Reads the credentials for a broker. User name and password in the broker's address have precedence over those in the
    /// folder. Without `ca.crt` the machine's root certificates are trusted.
    ///
    /// # Errors
    /// When the folder or a file in it cannot be read, or the files do not form a usable configuration.
    pub fn read(broker: &Broker, folder: Option<&Path>) -> Result<Self, CredentialsError> {
        let secret = folder.map(Secret::at).transpose().map_err(CredentialsError::secret)?;
        let read = |name: &str| match &secret {
            Some(secret) => secret.get(name).map_err(CredentialsError::secret),
            None => Ok(None),
        };
        let from_folder = match read(USERNAME)? {
            Some(user) => Some((user, read(PASSWORD)?.unwrap_or_default())),
            None => None,
        };
        let login = broker.credentials.clone().or(from_folder);
        if !broker.tls {
            return Ok(Self { login, ..Self::default() });
        }
        let roots = root_certificates(read(CA_CERTIFICATES)?)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|source| CredentialsError::Tls { source })?
            .with_root_certificates(roots);
        let (config, expires) = match (read(CLIENT_CERTIFICATE)?, read(CLIENT_KEY)?) {
            (Some(certificate), Some(key)) => {
                let chain = parse_certificates(CLIENT_CERTIFICATE, &certificate)?;
                let expires = chain.first().map(not_after).transpose()?;
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|_| CredentialsError::NoPrivateKey)?;
                let config = config
                    .with_client_auth_cert(chain, key)
                    .map_err(|source| CredentialsError::KeyMismatch { source })?;
                (config, expires)
            }
            (None, None) => (config.with_no_client_auth(), None),
            _ => return Err(CredentialsError::IncompleteClientCertificate),
        };
        Ok(Self { login, tls: Some(Arc::new(config)), expires })
    }
}

/// A digest of all files in the folder, which differs when one of them has changed. `None` when there is no folder.
pub fn fingerprint(folder: Option<&Path>) -> Option<Digest> {
    let secret = Secret::at(folder?).ok()?;
    let contents = FILES.map(|name| secret.get(name).ok().flatten().unwrap_or_default());
    Some(Digest::of(contents.join("\0").as_bytes()))
}

/// The trusted root certificates: those of `ca.crt` if it is present, otherwise the machine's.
fn root_certificates(ca_certificates: Option<String>) -> Result<rustls::RootCertStore, CredentialsError> {
    if let Some(text) = ca_certificates {
        let mut roots = rustls::RootCertStore::empty();
        for certificate in parse_certificates(CA_CERTIFICATES, &text)? {
            roots.add(certificate).map_err(|error| invalid_certificate(CA_CERTIFICATES, error))?;
        }
        return Ok(roots);
    }
    let roots = lineside_common::tls_roots::system_roots();
    if roots.is_empty() { Err(CredentialsError::NoRootCertificates) } else { Ok(roots) }
}

fn parse_certificates(file: &'static str, text: &str) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    match CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<Vec<_>, _>>() {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(CredentialsError::NoCertificate { file }),
    }
}

fn not_after(certificate: &CertificateDer<'_>) -> Result<SystemTime, CredentialsError> {
    let parsed = x509_cert::Certificate::from_der(certificate)
        .map_err(|error| invalid_certificate(CLIENT_CERTIFICATE, error))?;
    Ok(parsed.tbs_certificate().validity().not_after.to_system_time())
}

fn invalid_certificate(file: &'static str, error: impl Error + Send + Sync + 'static) -> CredentialsError {
    CredentialsError::InvalidCertificate { file, source: Box::new(error) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    /// Certificates are read, matched and rotated against a real broker in `tests/suite/mqtt.rs`; here are the cases that
    /// need none.
    fn folder(files: &[(&str, &str)]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, text)| fs::write(folder.path().join(name), text).unwrap());
        folder
    }

    fn broker(tls: bool, credentials: Option<(String, String)>) -> Broker {
        Broker { host: "b".to_owned(), port: 1, tls, credentials }
    }

    #[test]
    fn the_login_in_the_address_has_precedence_over_the_folder() {
        let folder = folder(&[("username", "line\n"), ("password", "s3cret\n")]);
        let read = |broker: &Broker| BrokerCredentials::read(broker, Some(folder.path())).unwrap().login;
        assert_eq!(read(&broker(false, None)), Some(("line".to_owned(), "s3cret".to_owned())));
        let in_address = Some(("other".to_owned(), String::new()));
        assert_eq!(read(&broker(false, in_address.clone())), in_address);
        assert_eq!(BrokerCredentials::read(&broker(false, None), None).unwrap().login, None);
    }

    #[test]
    fn unusable_files_are_named() {
        let read = |files: &[(&str, &str)]| {
            BrokerCredentials::read(&broker(true, None), Some(folder(files).path())).err().unwrap()
        };
        let error = read(&[("ca.crt", "nothing")]);
        assert_eq!(error.kind(), CredentialsErrorKind::Invalid);
        assert_eq!(error.to_string(), "ca.crt does not contain a PEM-encoded certificate");
        let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let error = read(&[("ca.crt", garbage)]);
        assert_eq!(error.kind(), CredentialsErrorKind::Invalid);
        assert!(error.to_string().starts_with("ca.crt contains an invalid certificate"), "{error}");
        let missing = Path::new("/no/such/folder");
        let error = BrokerCredentials::read(&broker(true, None), Some(missing)).err().unwrap();
        assert_eq!(error.kind(), CredentialsErrorKind::Unreadable);
        assert!(lineside_common::error_chain(&error).contains("/no/such/folder"));
    }

    #[test]
    fn the_fingerprint_changes_with_every_file() {
        let folder = folder(&[]);
        let mut seen = vec![fingerprint(Some(folder.path()))];
        for file in FILES {
            fs::write(folder.path().join(file), "x").unwrap();
            let current = fingerprint(Some(folder.path()));
            assert!(current.is_some() && !seen.contains(&current), "{file}");
            seen.push(current);
        }
        assert_eq!(fingerprint(None), None);
        assert_eq!(fingerprint(Some(Path::new("/no/such/folder"))), None);
    }
}
