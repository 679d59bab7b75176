//! Credentials of requests: HTTP headers from mounted secrets, and the token that the agents of a site share.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};

use lineside_common::files;
use lineside_common::secrets::Secret;

use super::error::{FetchErrorKind, TransferError};

/// Upper bound of the token file.
const TOKEN_BYTES_MAX: u64 = 4096;

/// The value of the header for a user and a password (RFC 7617).
pub(super) fn basic((user, password): &(String, String)) -> String {
    format!("Basic {}", BASE64.encode(format!("{user}:{password}")))
}

/// The header for a login (RFC 7617) or a token (RFC 6750), marked as sensitive.
pub(super) fn authorization(value: &str) -> Result<HeaderMap, TransferError> {
    let mut value = HeaderValue::from_str(value).map_err(|_| {
        let message = "the credentials contain characters that an HTTP header cannot carry";
        TransferError::permanent(FetchErrorKind::Configuration, message)
    })?;
    value.set_sensitive(true);
    Ok(HeaderMap::from_iter([(AUTHORIZATION, value)]))
}

/// The header for a web server: `token`, else `username` and `password`. Empty without a secret.
pub(super) fn web_server(secret: &Secret) -> Result<HeaderMap, TransferError> {
    if let Some(token) = secret.get("token").map_err(TransferError::secret)? {
        return authorization(&format!("Bearer {token}"));
    }
    match secret.login(None).map_err(TransferError::secret)? {
        Some(login) => authorization(&basic(&login)),
        None if secret.is_named() => {
            let token = secret.require("token").map_err(TransferError::secret)?;
            authorization(&format!("Bearer {token}"))
        }
        None => Ok(HeaderMap::new()),
    }
}

/// Why the token of the site cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PeerTokenError {
    /// The file cannot be read.
    #[error("--peer-token-file {} cannot be read", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why it cannot be read.
        source: std::io::Error,
    },
    /// The file is not UTF-8 text.
    #[error("--peer-token-file {} is not UTF-8 text", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
    },
    /// The file contains only white space.
    #[error("--peer-token-file {} is empty", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// Reads the token that the agents of a site share. It is read for each use, so that a rotated token takes effect
/// without a restart.
///
/// # Errors
/// When the file cannot be read, is not text, or is empty.
pub fn read_peer_token(path: &Path) -> Result<String, PeerTokenError> {
    let bytes = files::read_bounded(path, TOKEN_BYTES_MAX)
        .map_err(|source| PeerTokenError::Unreadable { path: path.to_owned(), source })?;
    let text = String::from_utf8(bytes).map_err(|_| PeerTokenError::NotText { path: path.to_owned() })?;
    let token = text.trim();
    if token.is_empty() { Err(PeerTokenError::Empty { path: path.to_owned() }) } else { Ok(token.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_token_is_trimmed_and_not_empty() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        assert!(matches!(read_peer_token(&path), Err(PeerTokenError::Unreadable { .. })));
        std::fs::write(&path, " \n").unwrap();
        assert!(matches!(read_peer_token(&path), Err(PeerTokenError::Empty { .. })));
        std::fs::write(&path, [0xff]).unwrap();
        assert!(matches!(read_peer_token(&path), Err(PeerTokenError::NotText { .. })));
        std::fs::write(&path, "t0ken\n").unwrap();
        assert_eq!(read_peer_token(&path).unwrap(), "t0ken");
    }

    #[test]
    fn the_authorization_header_is_sensitive() {
        let headers = authorization(&basic(&("line".into(), "s3cret".into()))).unwrap();
        assert!(headers[AUTHORIZATION].is_sensitive());
        assert_eq!(headers[AUTHORIZATION], "Basic bGluZTpzM2NyZXQ=");
        assert_eq!(authorization("Bearer a\nb").unwrap_err().kind, FetchErrorKind::Configuration);
    }
}
