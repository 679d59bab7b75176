//! The errors of fetching.

use std::error::Error;

use lineside_common::file_roots::{FileRootsError, FileRootsErrorKind};

use crate::store::{StoreError, StoreErrorKind};

use super::policy::PolicyError;

/// What a caller branches on when a fetch fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchErrorKind {
    /// The server cannot be reached, interrupts the transfer, or reports a temporary error. Retrying may help.
    Unreachable,
    /// The server does not have the file.
    NotFound,
    /// The server rejects the credentials, or requires credentials that the manifest does not name.
    Credentials,
    /// The server rejects the request, or its response does not conform to the protocol.
    Refused,
    /// The address policy does not allow the address or a redirect.
    PolicyViolation,
    /// The file does not have the digest or the size that the manifest names.
    DigestMismatch,
    /// The file is larger than `--model-mib-max`.
    TooLarge,
    /// The store does not have space for the file.
    NoSpace,
    /// A local file cannot be read, or the store cannot be written.
    Io,
    /// The configuration or the manifest is not usable, for example a secret that is not mounted.
    Configuration,
}

/// Why a model file could not be fetched. The message names the source; the cause is in the source chain.
#[derive(Debug, thiserror::Error)]
#[error("cannot fetch {address}")]
pub struct FetchError {
    /// The address of the file, without credentials.
    address: String,
    /// Why the transfer failed.
    source: TransferError,
}

impl FetchError {
    pub(super) fn new(address: impl Into<String>, source: TransferError) -> Self {
        Self { address: address.into(), source }
    }

    /// What a caller branches on.
    pub fn kind(&self) -> FetchErrorKind {
        self.source.kind
    }
}

/// Whether and how a failed transfer is retried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Retry {
    /// Retrying cannot help.
    Never,
    /// Resume at the bytes that were received.
    Resume,
    /// Discard the received bytes and start from the beginning.
    Restart,
}

/// Why a transfer, or one attempt of it, failed.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(super) struct TransferError {
    pub(super) kind: FetchErrorKind,
    pub(super) retry: Retry,
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl TransferError {
    /// An error that retrying cannot help.
    pub(super) fn permanent(kind: FetchErrorKind, message: impl Into<String>) -> Self {
        Self { kind, retry: Retry::Never, message: message.into(), source: None }
    }

    /// An interruption. The next attempt resumes.
    pub(super) fn interrupted(message: impl Into<String>) -> Self {
        Self { kind: FetchErrorKind::Unreachable, retry: Retry::Resume, message: message.into(), source: None }
    }

    /// The received bytes cannot be used. The next attempt starts from the beginning.
    pub(super) fn stale(message: impl Into<String>) -> Self {
        Self { kind: FetchErrorKind::Refused, retry: Retry::Restart, message: message.into(), source: None }
    }

    /// Adds the cause.
    pub(super) fn caused_by(self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { source: Some(source.into()), ..self }
    }

    /// A local file cannot be read.
    pub(super) fn io(message: impl Into<String>, source: std::io::Error) -> Self {
        Self::permanent(FetchErrorKind::Io, message).caused_by(source)
    }

    /// The credentials cannot be read from the mounted secret.
    pub(super) fn secret(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::permanent(FetchErrorKind::Configuration, "cannot use the credentials of source.secretRef")
            .caused_by(source)
    }

    /// An error of the HTTP client. The address is left out, because its query may hold a credential.
    pub(super) fn http(error: reqwest::Error) -> Self {
        let error = error.without_url();
        if let Some(policy) = policy_error(&error) {
            let violation = Self::permanent(FetchErrorKind::PolicyViolation, "the address policy does not allow it");
            return violation.caused_by(policy);
        }
        if error.is_redirect() || error.is_builder() {
            return Self::permanent(FetchErrorKind::Refused, "the HTTP request failed").caused_by(error);
        }
        Self::interrupted("the HTTP request failed").caused_by(error)
    }
}

/// The policy error in the source chain of an HTTP error, when a redirect or a resolved address was rejected.
fn policy_error(error: &reqwest::Error) -> Option<PolicyError> {
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(policy) = cause.downcast_ref::<PolicyError>() {
            return Some(policy.clone());
        }
        source = cause.source();
    }
    None
}

impl From<PolicyError> for TransferError {
    fn from(error: PolicyError) -> Self {
        Self::permanent(FetchErrorKind::PolicyViolation, "the address policy does not allow it").caused_by(error)
    }
}

impl From<FileRootsError> for TransferError {
    fn from(error: FileRootsError) -> Self {
        match error.kind() {
            FileRootsErrorKind::Refused => {
                Self::permanent(FetchErrorKind::PolicyViolation, "the file is not allowed").caused_by(error)
            }
            FileRootsErrorKind::Io => Self::permanent(FetchErrorKind::Io, "the file is not available").caused_by(error),
        }
    }
}

impl From<StoreError> for TransferError {
    fn from(error: StoreError) -> Self {
        let (kind, message) = match error.kind() {
            StoreErrorKind::NoSpace => (FetchErrorKind::NoSpace, "the store cannot take the file"),
            StoreErrorKind::DigestMismatch => (FetchErrorKind::DigestMismatch, "the file is not the expected one"),
            StoreErrorKind::Io | StoreErrorKind::Locked => (FetchErrorKind::Io, "the store cannot take the file"),
        };
        Self::permanent(kind, message).caused_by(error)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lineside_common::error_chain;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::super::policy::AddressPolicy;
    use super::*;

    /// The error of a request with a secret in its query.
    async fn request_error(hosts: &[&str], address: &str) -> TransferError {
        let hosts = hosts.iter().copied().collect();
        let client = AddressPolicy { hosts, allow_http: true }.client(&[], Duration::from_secs(5)).unwrap();
        let response = client.get(format!("http://{address}/m.onnx?sig=hidden")).send().await;
        TransferError::http(response.unwrap_err())
    }

    #[tokio::test]
    async fn http_errors_are_classified_and_do_not_show_the_query() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            let (mut connection, _) = listener.accept().await.unwrap();
            connection.read_buf(&mut Vec::with_capacity(4096)).await.unwrap();
            let response = "HTTP/1.1 302 Found\r\nLocation: http://elsewhere.plant/m\r\nContent-Length: 0\r\n\r\n";
            connection.write_all(response.as_bytes()).await.unwrap();
        });
        let redirected = request_error(&[&server], &server).await;
        assert_eq!((redirected.kind, redirected.retry), (FetchErrorKind::PolicyViolation, Retry::Never));
        assert!(error_chain(&redirected).contains("elsewhere.plant:80"), "{}", error_chain(&redirected));

        // Without a list, the resolved loopback address is rejected on connecting.
        let resolved = request_error(&["*"], "localhost:9").await;
        assert_eq!(resolved.kind, FetchErrorKind::PolicyViolation);

        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
        let refused = request_error(&[&closed], &closed).await;
        assert_eq!((refused.kind, refused.retry), (FetchErrorKind::Unreachable, Retry::Resume));
        for error in [redirected, resolved, refused] {
            assert!(!error_chain(&error).contains("hidden"), "{}", error_chain(&error));
        }
    }

    #[test]
    fn an_error_names_the_address_and_every_cause() {
        let store = StoreError::Locked { path: "/store/partial/x".into() };
        let error = FetchError::new("https://models.plant/m.onnx", store.into());
        assert_eq!(error.kind(), FetchErrorKind::Io);
        assert_eq!(
            error_chain(&error),
            "cannot fetch https://models.plant/m.onnx: the store cannot take the file: /store/partial/x is being written by \
             another process"
        );
    }
}
