//! Why the cluster did not do what it was asked for, and what is to be done about it.

use std::time::Duration;

/// Why the cluster did not do what it was asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterError {
    /// What to do about it.
    pub kind: ClusterErrorKind,
    /// For people.
    pub message: String,
}

/// What to do about a [`ClusterError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterErrorKind {
    /// The version to go on from is too old: list again.
    Expired,
    /// There is no such object, or no such kind.
    NotFound,
    /// Somebody else was faster.
    Conflict,
    /// It is not allowed, or not valid: somebody has to change something first.
    Refused,
    /// The server is there and has no time: try again, and not before this.
    Busy(Duration),
    /// There was no answer, or none that can be read, or the credentials are not good any more: try again with a new
    /// connection.
    Unreachable,
}

impl std::fmt::Display for ClusterError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl std::error::Error for ClusterError {}

impl ClusterError {
    /// Whether this is not what was `said` last; from now on it is. What stays as it is, is logged once.
    pub fn is_news(&self, said: &mut Option<String>) -> bool {
        said.replace(self.message.clone()).as_ref() != Some(&self.message)
    }

    pub(super) fn unreachable(message: impl Into<String>) -> Self {
        Self { kind: ClusterErrorKind::Unreachable, message: message.into() }
    }

    pub(super) fn new(error: kube::Error) -> Self {
        let kube::Error::Api(status) = error else {
            // The causes say what happened: `ServiceError: client error (Connect)` alone says little.
            let mut message = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(inner) = cause {
                let text = inner.to_string();
                if !message.contains(&text) {
                    message = format!("{message}: {text}");
                }
                cause = inner.source();
            }
            return Self::unreachable(message);
        };
        let seconds = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
        let kind = match status.code {
            410 => ClusterErrorKind::Expired,
            404 => ClusterErrorKind::NotFound,
            409 => ClusterErrorKind::Conflict,
            // The credentials may have been changed where they lie; a new connection reads them.
            401 => ClusterErrorKind::Unreachable,
            429 | 500..=599 => ClusterErrorKind::Busy(Duration::from_secs(u64::from(seconds))),
            _ => ClusterErrorKind::Refused,
        };
        let message = match status.message.as_str() {
            "" => format!("the API server answers {} {}", status.code, status.reason),
            message => format!("{message} ({})", status.code),
        };
        Self { kind, message }
    }
}
