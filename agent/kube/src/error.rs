//! Errors of calls to the API server, classified by what the caller can do about them.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

/// A failed call to the API server, or credentials that cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ClusterError {
    kind: ClusterErrorKind,
    message: String,
    #[source]
    source: Option<Arc<dyn Error + Send + Sync>>,
}

/// What the caller can do about a [`ClusterError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterErrorKind {
    /// The resource version is too old to watch or to continue a list from: list again.
    Expired,
    /// The object does not exist, or its kind does not.
    NotFound,
    /// The object changed since it was read: read it again.
    Conflict,
    /// The request is not allowed or not valid, or the credentials are not usable: retrying does not help until
    /// somebody changes the configuration.
    Refused,
    /// The API server is overloaded or failed internally: retry, and not before this time has passed.
    Busy(Duration),
    /// There was no answer, or none that can be read, or the credentials have expired: retry with a new connection.
    Unreachable,
}

impl ClusterError {
    /// An error without a cause.
    pub fn new(kind: ClusterErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// What the caller can do about it.
    pub fn kind(&self) -> ClusterErrorKind {
        self.kind
    }

    pub(crate) fn unreachable(message: impl Into<String>) -> Self {
        Self::new(ClusterErrorKind::Unreachable, message)
    }

    /// The configuration, a kubeconfig or a service account, cannot be used.
    pub(crate) fn configuration(message: impl Into<String>, source: impl Error + Send + Sync + 'static) -> Self {
        Self { kind: ClusterErrorKind::Refused, message: message.into(), source: Some(Arc::new(source)) }
    }
}

impl From<std::io::Error> for ClusterError {
    fn from(error: std::io::Error) -> Self {
        let message = "the thread that opens the connection cannot be started".to_owned();
        Self { kind: ClusterErrorKind::Unreachable, message, source: Some(Arc::new(error)) }
    }
}

impl From<kube::Error> for ClusterError {
    fn from(error: kube::Error) -> Self {
        let kube::Error::Api(status) = error else {
            let message = "the API server cannot be reached".to_owned();
            return Self { kind: ClusterErrorKind::Unreachable, message, source: Some(Arc::new(error)) };
        };
        let seconds = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
        let kind = match status.code {
            410 => ClusterErrorKind::Expired,
            404 => ClusterErrorKind::NotFound,
            409 => ClusterErrorKind::Conflict,
            // The credentials on disk may be newer than those of the connection; a new connection reads them.
            401 => ClusterErrorKind::Unreachable,
            429 | 500..=599 => ClusterErrorKind::Busy(Duration::from_secs(u64::from(seconds))),
            _ => ClusterErrorKind::Refused,
        };
        let message = if status.message.is_empty() {
            format!("the API server answered {} {}", status.code, status.reason)
        } else {
            format!("{} ({})", status.message, status.code)
        };
        Self::new(kind, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;
    use lineside_common::error_chain;

    fn answer(code: u16, message: &str) -> ClusterError {
        let status = Status { code, message: message.to_owned(), reason: "Because".to_owned(), ..Status::default() };
        ClusterError::from(kube::Error::Api(Box::new(status)))
    }

    #[test]
    fn answers_are_classified_by_their_code() {
        let kinds = [410, 404, 409, 401, 403, 422].map(|code| answer(code, "").kind());
        assert_eq!(
            kinds,
            [
                ClusterErrorKind::Expired,
                ClusterErrorKind::NotFound,
                ClusterErrorKind::Conflict,
                ClusterErrorKind::Unreachable,
                ClusterErrorKind::Refused,
                ClusterErrorKind::Refused,
            ]
        );
        assert_eq!(answer(503, "").kind(), ClusterErrorKind::Busy(Duration::ZERO));
        assert_eq!(answer(403, "").to_string(), "the API server answered 403 Because");
        assert_eq!(answer(403, "no access").to_string(), "no access (403)");
    }

    #[test]
    fn other_errors_keep_their_cause() {
        let error = ClusterError::from(kube::Error::LinesCodecMaxLineLengthExceeded);
        assert_eq!(error.kind(), ClusterErrorKind::Unreachable);
        assert!(error_chain(&error).starts_with("the API server cannot be reached: "), "{}", error_chain(&error));
    }
}
