//! The transfer of a file from a server into a partial blob.
//!
//! A failed transfer is retried while it makes progress. It resumes at the synced end of the partial blob (`Range`) and
//! names the content it started with where the server sent a strong ETag (`If-Range`, RFC 9110 section 13.1.5), so that
//! a file that changed on the server is transferred from the beginning. The headers of the server are hints; only the
//! digest of the complete file decides.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use object_store::path::Path as ObjectPath;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt as _};
use reqwest::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, IF_RANGE, RANGE, RETRY_AFTER,
};
use reqwest::{Client, Response, StatusCode, Url};

use lineside_common::backoff::Backoff;
use lineside_common::error_chain;

use super::error::{FetchErrorKind, Retry, TransferError};
use super::progress::Progress;
use super::throttle::Throttle;
use crate::store::PartialBlob;

/// Consecutive attempts without progress after which the transfer fails. The reconciler retries the whole fetch later.
const ATTEMPTS_WITHOUT_PROGRESS_MAX: u32 = 4;
const BACKOFF_FIRST: Duration = Duration::from_millis(250);
const BACKOFF_CAP: Duration = Duration::from_secs(20);
/// Space that is freed ahead for a file whose size is not known.
const UNKNOWN_SIZE_STEP_BYTES: u64 = 8 << 20;

/// The server and the address of a file.
pub(super) enum Origin {
    /// A file of a web server, a blob of a registry, or a blob of a peer.
    Http { client: Client, url: Url, headers: HeaderMap },
    /// An object of an object store.
    Object { store: Arc<dyn ObjectStore>, key: ObjectPath },
}

/// The limits of one transfer.
pub(super) struct TransferLimits<'a> {
    /// Upper bound of the size of the file, in bytes.
    pub(super) bytes_max: u64,
    /// The exact size the file must have, where it is known.
    pub(super) expected_size: Option<u64>,
    /// Shared by all transfers of the node.
    pub(super) throttle: &'a Throttle,
    /// Frees space in the store for this many more bytes.
    pub(super) free_space: &'a (dyn Fn(u64) -> Result<(), TransferError> + Send + Sync),
    /// Where the progress is recorded.
    pub(super) progress: &'a Progress,
}

impl TransferLimits<'_> {
    /// Checks the size that the server announces.
    fn check_total(&self, total: u64) -> Result<(), TransferError> {
        match self.expected_size {
            Some(expected) if expected != total => Err(TransferError::permanent(
                FetchErrorKind::DigestMismatch,
                format!("the file has {total} bytes, expected a size of {expected} bytes"),
            )),
            _ if total > self.bytes_max => Err(self.too_large(total)),
            _ => Ok(()),
        }
    }

    /// Checks the number of bytes received so far.
    fn check_received(&self, bytes: u64) -> Result<(), TransferError> {
        match self.expected_size {
            Some(expected) if expected <= self.bytes_max && bytes > expected => Err(TransferError::permanent(
                FetchErrorKind::DigestMismatch,
                format!("the server sends more bytes than the expected size of {expected} bytes"),
            )),
            _ if bytes > self.bytes_max => Err(self.too_large(bytes)),
            _ => Ok(()),
        }
    }

    fn too_large(&self, bytes: u64) -> TransferError {
        let limit = self.bytes_max;
        let message = format!("the file has at least {bytes} bytes, the limit is {limit}; raise --model-mib-max");
        TransferError::permanent(FetchErrorKind::TooLarge, message)
    }
}

/// The response of a server.
struct Opened {
    /// Size of the complete file in bytes, where the server announces it.
    total: Option<u64>,
    /// Its strong ETag.
    validator: Option<String>,
    /// The offset in the file at which the body starts.
    offset: u64,
    body: BoxStream<'static, Result<Bytes, TransferError>>,
}

/// Transfers the missing bytes of `partial`. The caller commits it.
pub(super) async fn run(
    origin: &Origin,
    source: &str,
    partial: &mut PartialBlob,
    limits: &TransferLimits<'_>,
) -> Result<(), TransferError> {
    let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_CAP);
    loop {
        let bytes_before = partial.bytes();
        let error = match attempt(origin, source, partial, limits).await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        // The received bytes count for the next attempt, also after a restart of the agent.
        partial.sync()?;
        if error.retry == Retry::Restart {
            partial.reset()?;
        } else if partial.bytes() > bytes_before {
            backoff.reset();
        }
        if error.retry == Retry::Never || backoff.attempts() >= ATTEMPTS_WITHOUT_PROGRESS_MAX {
            return Err(error);
        }
        tracing::debug!(from = source, reason = error_chain(&error), "Transfer interrupted; retrying");
        tokio::time::sleep(backoff.next_delay()).await;
    }
}

async fn attempt(
    origin: &Origin,
    source: &str,
    partial: &mut PartialBlob,
    limits: &TransferLimits<'_>,
) -> Result<(), TransferError> {
    let validator = partial.validator(source).map(str::to_owned);
    let opened = match origin {
        Origin::Http { client, url, headers } => {
            open_http(client, url, headers, partial.bytes(), validator.as_deref()).await?
        }
        Origin::Object { store, key } => open_object(store.as_ref(), key, partial.bytes(), validator).await?,
    };
    if opened.offset != partial.bytes() {
        partial.reset()?;
    }
    if let Some(total) = opened.total {
        limits.check_total(total)?;
        (limits.free_space)(total.saturating_sub(partial.bytes()))?;
    }
    limits.progress.start(source, partial.bytes(), opened.total.or(limits.expected_size));
    partial.set_source(source, opened.validator.as_deref());
    receive(opened.body, opened.total.is_some(), partial, limits).await?;
    match opened.total {
        Some(total) if partial.bytes() < total => {
            let message = format!("the transfer was interrupted at {} of {total} bytes", partial.bytes());
            Err(TransferError::interrupted(message))
        }
        Some(total) if partial.bytes() > total => {
            Err(TransferError::stale(format!("the server sent {} bytes but announced {total}", partial.bytes())))
        }
        _ => Ok(()),
    }
}

/// Appends the body to the partial blob. Frees space on the way when the size was not announced.
async fn receive(
    mut body: BoxStream<'static, Result<Bytes, TransferError>>,
    is_size_known: bool,
    partial: &mut PartialBlob,
    limits: &TransferLimits<'_>,
) -> Result<(), TransferError> {
    let mut free_bytes = 0;
    while let Some(piece) = body.next().await {
        let piece = piece?;
        let bytes = piece.len() as u64;
        limits.check_received(partial.bytes() + bytes)?;
        if !is_size_known {
            if free_bytes < bytes {
                (limits.free_space)(UNKNOWN_SIZE_STEP_BYTES)?;
                free_bytes += UNKNOWN_SIZE_STEP_BYTES;
            }
            free_bytes = free_bytes.saturating_sub(bytes);
        }
        tokio::task::block_in_place(|| partial.append(&piece))?;
        limits.progress.add(bytes);
        limits.throttle.wait(bytes).await;
    }
    Ok(())
}

async fn open_http(
    client: &Client,
    url: &Url,
    headers: &HeaderMap,
    offset: u64,
    validator: Option<&str>,
) -> Result<Opened, TransferError> {
    let mut request = client.get(url.clone()).headers(headers.clone());
    if offset > 0 {
        request = request.header(RANGE, format!("bytes={offset}-"));
        if let Some(validator) = validator {
            request = request.header(IF_RANGE, validator);
        }
    }
    let response = request.send().await.map_err(TransferError::http)?;
    check_status(&response)?;
    let header = |name| header_text(&response, name);
    if let Some(encoding) = header(CONTENT_ENCODING).filter(|encoding| !encoding.eq_ignore_ascii_case("identity")) {
        return Err(TransferError::permanent(
            FetchErrorKind::Refused,
            format!("the server sends the file with the encoding {encoding}, which was not requested"),
        ));
    }
    let (offset, total) = if response.status() == StatusCode::OK {
        (0, header(CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok()))
    } else {
        let (first, total) = header(CONTENT_RANGE)
            .and_then(|range| parse_content_range(&range))
            .ok_or_else(|| TransferError::stale("the server sends a part of the file without a valid Content-Range"))?;
        if first != offset {
            return Err(TransferError::stale(format!("the server sends bytes from {first}, requested from {offset}")));
        }
        (first, total)
    };
    // A weak ETag does not guarantee identical bytes.
    let validator = header(ETAG).filter(|etag| etag.starts_with('"'));
    let body = response.bytes_stream().map(|piece| piece.map_err(TransferError::http)).boxed();
    Ok(Opened { total, validator, offset, body })
}

/// Accepts 200 and 206. Maps every other status to an error.
fn check_status(response: &Response) -> Result<(), TransferError> {
    let refused = |kind, message: String| Err(TransferError::permanent(kind, message));
    match response.status() {
        StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(()),
        StatusCode::RANGE_NOT_SATISFIABLE => {
            Err(TransferError::stale("the server cannot resume at the requested offset (416)"))
        }
        status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => refused(
            FetchErrorKind::Credentials,
            format!("the server refuses the request ({status}); check the credentials of source.secretRef"),
        ),
        status @ (StatusCode::NOT_FOUND | StatusCode::GONE) => {
            refused(FetchErrorKind::NotFound, format!("the server does not have the file ({status})"))
        }
        status if status.is_redirection() => refused(
            FetchErrorKind::PolicyViolation,
            format!("the server redirects to an address that is not allowed ({status})"),
        ),
        status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
            let retry_after = header_text(response, RETRY_AFTER).map(|after| format!(", retry after {after}"));
            let message = format!("the server responds with {status}{}", retry_after.unwrap_or_default());
            Err(TransferError::interrupted(message))
        }
        status => refused(FetchErrorKind::Refused, format!("the server responds with {status}")),
    }
}

fn header_text(response: &Response, name: HeaderName) -> Option<String> {
    response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

/// Parses `bytes 5-9/10`: the first byte and the size of the complete file (RFC 9110, section 14.4).
fn parse_content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let first: u64 = first.trim().parse().ok()?;
    let last: u64 = last.trim().parse().ok()?;
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse::<u64>().ok()?),
    };
    (first <= last).then_some((first, total))
}

async fn open_object(
    store: &dyn ObjectStore,
    key: &ObjectPath,
    offset: u64,
    validator: Option<String>,
) -> Result<Opened, TransferError> {
    let range = (offset > 0).then_some(GetRange::Offset(offset));
    let options = GetOptions { range, if_match: validator.filter(|_| offset > 0), ..GetOptions::default() };
    let object = match store.get_opts(key, options).await {
        Ok(object) => object,
        Err(error) if offset > 0 && ends_before(store, key, offset).await => {
            return Err(TransferError::stale("the object ends before the requested offset").caused_by(error));
        }
        Err(error) => return Err(object_error(error)),
    };
    let (total, offset, validator) = (object.meta.size, object.range.start, object.meta.e_tag.clone());
    let body = object.into_stream().map(|piece| piece.map_err(object_error)).boxed();
    Ok(Opened { total: Some(total), validator: validator.filter(|etag| !etag.starts_with("W/")), offset, body })
}

/// Whether the object has no bytes at `offset`. Queried after a failed request for a range, because the error of the
/// client does not carry the status 416.
async fn ends_before(store: &dyn ObjectStore, key: &ObjectPath, offset: u64) -> bool {
    store.head(key).await.is_ok_and(|object| object.size <= offset)
}

fn object_error(error: object_store::Error) -> TransferError {
    use object_store::Error;
    match &error {
        Error::NotFound { .. } => TransferError::permanent(
            FetchErrorKind::NotFound,
            "the bucket or the object does not exist (404 Not Found)",
        ),
        Error::Unauthenticated { .. } | Error::PermissionDenied { .. } => TransferError::permanent(
            FetchErrorKind::Credentials,
            "the object store refuses the request; check the credentials of source.secretRef",
        ),
        Error::Precondition { .. } => TransferError::stale("the object was changed since the transfer started"),
        _ => TransferError::interrupted("the request to the object store failed").caused_by(error),
    }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

    #[test]
    fn content_ranges_are_parsed_strictly() {
        assert_eq!(parse_content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse_content_range("bytes 5-9/*"), Some((5, None)));
        for invalid in ["", "bytes", "bytes */10", "bytes 9-5/10", "items 0-1/2", "bytes a-b/c", "bytes -5/10"] {
            assert_eq!(parse_content_range(invalid), None, "{invalid}");
        }
    }

    #[test]
    fn sizes_are_checked_against_the_expected_size_and_the_limit() {
        let (throttle, progress) = (Throttle::new(None), Progress::new("m", 1));
        let free_space = |_| Ok(());
        let limits = |expected_size| TransferLimits {
            bytes_max: 10,
            expected_size,
            throttle: &throttle,
            free_space: &free_space,
            progress: &progress,
        };
        let kind = |result: Result<(), TransferError>| result.err().map(|error| error.kind);
        assert_eq!(kind(limits(None).check_total(10)), None);
        assert_eq!(kind(limits(None).check_total(11)), Some(FetchErrorKind::TooLarge));
        assert_eq!(kind(limits(Some(9)).check_total(10)), Some(FetchErrorKind::DigestMismatch));
        assert_eq!(kind(limits(Some(11)).check_total(11)), Some(FetchErrorKind::TooLarge));
        assert_eq!(kind(limits(Some(9)).check_received(9)), None);
        assert_eq!(kind(limits(Some(9)).check_received(10)), Some(FetchErrorKind::DigestMismatch));
        assert_eq!(kind(limits(None).check_received(11)), Some(FetchErrorKind::TooLarge));
        assert_eq!(kind(limits(Some(11)).check_received(11)), Some(FetchErrorKind::TooLarge));
    }

    #[tokio::test]
    async fn a_transfer_beyond_the_end_of_an_object_restarts() {
        let store = InMemory::new();
        let key = ObjectPath::from("m.onnx");
        let missing = open_object(&store, &key, 0, None).await.err().unwrap();
        assert_eq!((missing.kind, missing.retry), (FetchErrorKind::NotFound, Retry::Never));
        store.put(&key, Bytes::from_static(b"12345").into()).await.unwrap();
        let opened = open_object(&store, &key, 2, None).await.unwrap();
        assert_eq!((opened.total, opened.offset), (Some(5), 2));
        assert_eq!(open_object(&store, &key, 5, None).await.err().unwrap().retry, Retry::Restart);
        let changed = open_object(&store, &key, 2, Some("\"other\"".into())).await.err().unwrap();
        assert_eq!(changed.retry, Retry::Restart);
    }
}
