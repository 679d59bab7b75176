//! What lets the agent in at a broker: user and password, the certificates that are believed, and the agent's own. They are
//! read from a mounted folder at every connection, so that whatever is rotated counts without a restart.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_cert::der::Decode as _;

use crate::config::Broker;
use lineside_common::digest::Digest;
use lineside_common::secrets::{Secret, SecretError};

/// The files that may be in the folder, as Kubernetes' own kinds of Secret call them.
const FILES: [&str; 5] = ["username", "password", "ca.crt", "tls.crt", "tls.key"];

/// What a connection needs.
#[derive(Default)]
pub struct BrokerCredentials {
    /// User and password.
    pub credentials: Option<(String, String)>,
    /// How to encrypt, where the broker wants it.
    pub tls: Option<Arc<ClientConfig>>,
    /// When our own certificate ends.
    pub expires: Option<SystemTime>,
}

impl BrokerCredentials {
    /// Reads what this broker needs.
    ///
    /// # Errors
    /// When a file cannot be used; the message names it.
    pub fn read(broker: &Broker, folder: Option<&Path>) -> Result<Self, String> {
        let text = |error: SecretError| lineside_common::error_chain(&error);
        let secret = folder.map(Secret::at).transpose().map_err(text)?;
        let file = |name: &str| secret.as_ref().map_or(Ok(None), |secret| secret.get(name).map_err(text));
        let login = match file("username")? {
            Some(user) => Some((user, file("password")?.unwrap_or_default())),
            None => None,
        };
        let credentials = broker.credentials.clone().or(login);
        if !broker.tls {
            return Ok(Self { credentials, ..Self::default() });
        }
        let roots = roots(file("ca.crt")?)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots);
        let (config, expires) = match (file("tls.crt")?, file("tls.key")?) {
            (Some(certificate), Some(key)) => {
                let chain = certificates("tls.crt", &certificate)?;
                let expires = chain.first().map(not_after).transpose()?;
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
                    .map_err(|_| "tls.key holds no private key in PEM".to_owned())?;
                let config = config
                    .with_client_auth_cert(chain, key)
                    .map_err(|error| format!("tls.crt and tls.key do not go together: {error}"))?;
                (config, expires)
            }
            (None, None) => (config.with_no_client_auth(), None),
            _ => return Err("there must be both tls.crt and tls.key, or neither".to_owned()),
        };
        Ok(Self { credentials, tls: Some(Arc::new(config)), expires })
    }
}

/// Changes whenever a file in the folder does.
pub fn fingerprint(folder: Option<&Path>) -> Option<Digest> {
    let secret = Secret::at(folder?).ok()?;
    let contents = FILES.map(|name| secret.get(name).ok().flatten().unwrap_or_default());
    Some(Digest::of(contents.join("\0").as_bytes()))
}

/// The certificates that are believed: those given, or else the machine's.
fn roots(given: Option<String>) -> Result<rustls::RootCertStore, String> {
    let mut roots = rustls::RootCertStore::empty();
    match given {
        Some(text) => {
            for certificate in certificates("ca.crt", &text)? {
                roots.add(certificate).map_err(|error| format!("ca.crt: {error}"))?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err("this machine has no root certificates; put the plant's into ca.crt".to_owned());
            }
        }
    }
    Ok(roots)
}

fn certificates(name: &str, text: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let found = CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<Vec<_>, _>>();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(format!("{name} holds no certificate in PEM")),
    }
}

fn not_after(certificate: &CertificateDer<'_>) -> Result<SystemTime, String> {
    let parsed = x509_cert::Certificate::from_der(certificate).map_err(|error| format!("tls.crt: {error}"))?;
    Ok(parsed.tbs_certificate().validity().not_after.to_system_time())
}
