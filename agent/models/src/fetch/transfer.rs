//! The transfer itself: bytes from some server into a file on its way, through cuts, stalls and lies.
//!
//! A transfer is tried again while it makes progress. It goes on where the file safely ends (`Range`), and says which
//! content it began with where the server gave a strong ETag (`If-Range`, RFC 9110 section 13.1.5), so that a file that
//! changed begins anew. Whatever a server says is only a hint: what counts is the digest at the end.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use object_store::path::Path as ObjectPath;
use object_store::{GetOptions, GetRange, ObjectStore};
use reqwest::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_RANGE, RANGE,
    RETRY_AFTER,
};
use reqwest::{Client, StatusCode, Url};

use super::policy::describe;
use super::progress::Progress;
use crate::store::Partial;
use lineside_common::backoff::Backoff;

/// Attempts in a row that bring nothing, after which the transfer is given up; the whole is tried again later.
const FRUITLESS_MAX: u32 = 4;
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_CAP: Duration = Duration::from_secs(20);
/// How far ahead room is made for a file whose size nobody told.
const ROOM_AHEAD_BYTES: u64 = 8 << 20;

/// Why a transfer, or an attempt at it, failed.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Failure {
    /// For people.
    pub(super) reason: String,
    /// Whether another attempt may fare better.
    pub(super) is_passing: bool,
    /// Whether what is there is of no use for it.
    pub(super) begin_anew: bool,
}

impl Failure {
    pub(super) fn lasting(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), is_passing: false, begin_anew: false }
    }

    fn passing(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), is_passing: true, begin_anew: false }
    }

    fn anew(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), is_passing: true, begin_anew: true }
    }
}

impl From<crate::store::StoreError> for Failure {
    fn from(error: crate::store::StoreError) -> Self {
        Self::lasting(error.to_string())
    }
}

/// Where bytes can be had.
pub(super) enum Origin {
    /// A web server, a registry's blob, or a peer.
    Http { client: Client, url: Url, headers: HeaderMap },
    /// An object store.
    Object { store: std::sync::Arc<dyn ObjectStore>, key: ObjectPath },
}

/// What a server answered.
struct Opened {
    /// Bytes of the whole file, where the server tells.
    total: Option<u64>,
    /// Its strong ETag.
    validator: Option<String>,
    /// Where in the file the answer begins.
    offset: u64,
    body: BoxStream<'static, Result<Bytes, String>>,
}

/// Limits of one transfer.
pub(super) struct Terms<'a> {
    /// Bytes of the file at most.
    pub(super) bytes_max: u64,
    /// Bytes it has to have, where that is known beforehand.
    pub(super) size: Option<u64>,
    /// Shared by all transfers of the node.
    pub(super) throttle: &'a Throttle,
    /// Makes room in the store for so many more bytes.
    pub(super) make_room: &'a (dyn Fn(u64) -> Result<(), Failure> + Send + Sync),
    /// HostSignal how far it is.
    pub(super) progress: &'a Progress,
}

/// Brings everything that is missing of `partial`, and nothing more; the caller finishes it.
pub(super) async fn run(
    origin: &Origin,
    source: &str,
    partial: &mut Partial,
    terms: &Terms<'_>,
) -> Result<(), Failure> {
    let mut backoff = Backoff::new(RETRY_FIRST, RETRY_CAP);
    loop {
        let before = partial.bytes();
        let failure = match attempt(origin, source, partial, terms).await {
            Ok(()) => return Ok(()),
            Err(failure) => failure,
        };
        // What came counts for the next attempt, also after a restart.
        partial.sync()?;
        if failure.begin_anew {
            partial.restart()?;
        } else if partial.bytes() > before {
            backoff.reset();
        }
        if !failure.is_passing || backoff.attempts() >= FRUITLESS_MAX {
            return Err(failure);
        }
        tracing::debug!(from = source, reason = failure.reason, "a transfer was cut, going on");
        tokio::time::sleep(backoff.next_delay()).await;
    }
}

async fn attempt(origin: &Origin, source: &str, partial: &mut Partial, terms: &Terms<'_>) -> Result<(), Failure> {
    let validator = partial.validator(source).map(str::to_owned);
    let opened = match origin {
        Origin::Http { client, url, headers } => {
            ask_http(client, url, headers, partial.bytes(), validator.as_deref()).await?
        }
        Origin::Object { store, key } => ask_object(store.as_ref(), key, partial.bytes(), validator).await?,
    };
    if opened.offset != partial.bytes() {
        partial.restart()?;
    }
    let allowed = terms.size.unwrap_or(terms.bytes_max).min(terms.bytes_max);
    if let Some(total) = opened.total {
        if terms.size.is_some_and(|size| size != total) {
            return Err(Failure::lasting(format!(
                "it has {total} bytes, and {} are asked for",
                terms.size.unwrap_or(0)
            )));
        }
        if total > terms.bytes_max {
            return Err(Failure::lasting(too_large(total, terms.bytes_max)));
        }
        (terms.make_room)(total.saturating_sub(partial.bytes()))?;
    }
    terms.progress.begin(source, partial.bytes(), opened.total.or(terms.size));
    partial.begin(source, opened.validator.as_deref());
    let mut room = 0;
    let mut body = opened.body;
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(Failure::passing)?;
        let bytes = piece.len() as u64;
        if partial.bytes() + bytes > allowed {
            return Err(match terms.size {
                Some(size) if size <= terms.bytes_max => {
                    Failure::lasting(format!("more than the {size} bytes that are asked for came"))
                }
                _ => Failure::lasting(too_large(partial.bytes() + bytes, terms.bytes_max)),
            });
        }
        if opened.total.is_none() {
            if room < bytes {
                (terms.make_room)(ROOM_AHEAD_BYTES)?;
                room += ROOM_AHEAD_BYTES;
            }
            room = room.saturating_sub(bytes);
        }
        tokio::task::block_in_place(|| partial.append(&piece))?;
        terms.progress.add(bytes);
        terms.throttle.spend(bytes).await;
    }
    match opened.total {
        Some(total) if partial.bytes() < total => {
            Err(Failure::passing(format!("the transfer was cut at {} of {total} bytes", partial.bytes())))
        }
        Some(total) if partial.bytes() > total => {
            Err(Failure::anew(format!("{} bytes came, and {total} were announced", partial.bytes())))
        }
        _ => Ok(()),
    }
}

fn too_large(bytes: u64, bytes_max: u64) -> String {
    format!("it has {bytes} bytes or more, and at most {bytes_max} are taken; raise --model-mib-max")
}

async fn ask_http(
    client: &Client,
    url: &Url,
    headers: &HeaderMap,
    offset: u64,
    validator: Option<&str>,
) -> Result<Opened, Failure> {
    let mut request = client.get(url.clone()).headers(headers.clone());
    if offset > 0 {
        request = request.header(RANGE, format!("bytes={offset}-"));
        if let Some(validator) = validator {
            request = request.header(IF_RANGE, validator);
        }
    }
    let answer = request.send().await.map_err(|error| match error.is_redirect() || error.is_builder() {
        true => Failure::lasting(describe(&error)),
        false => Failure::passing(describe(&error)),
    })?;
    let status = answer.status();
    let text = |name: HeaderName| answer.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let (encoding, etag, length) = (text(CONTENT_ENCODING), text(ETAG), text(CONTENT_LENGTH));
    let range = text(CONTENT_RANGE);
    match status {
        StatusCode::OK | StatusCode::PARTIAL_CONTENT => {}
        StatusCode::RANGE_NOT_SATISFIABLE => {
            return Err(Failure::anew("the server cannot go on where the transfer was cut (416)"));
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            return Err(Failure::lasting(format!(
                "the server refuses it ({status}); check the credentials of source.secretRef"
            )));
        }
        StatusCode::NOT_FOUND | StatusCode::GONE => {
            return Err(Failure::lasting(format!("it is not there ({status})")));
        }
        status if status.is_redirection() => {
            return Err(Failure::lasting(format!("it redirects to an address that is not allowed ({status})")));
        }
        status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
            let later = text(RETRY_AFTER).map(|after| format!(", retry after {after}")).unwrap_or_default();
            return Err(Failure::passing(format!("the server says {status}{later}")));
        }
        status => return Err(Failure::lasting(format!("the server says {status}"))),
    }
    if let Some(encoding) = encoding.filter(|encoding| !encoding.eq_ignore_ascii_case("identity")) {
        return Err(Failure::lasting(format!("the server sends it encoded as {encoding}, which nobody asked for")));
    }
    let (offset, total) = match (status, range) {
        (StatusCode::OK, _) => (0, length.and_then(|length| length.parse::<u64>().ok())),
        (_, range) => {
            let (first, total) = content_range(range.as_deref().unwrap_or_default())
                .ok_or_else(|| Failure::anew("the server answers with a part and does not say which"))?;
            if first != offset {
                return Err(Failure::anew(format!("the server answers from byte {first}, not from {offset}")));
            }
            (first, total)
        }
    };
    // A weak validator does not promise the same bytes.
    let validator = etag.filter(|etag| etag.starts_with('"'));
    let body = answer.bytes_stream().map(|piece| piece.map_err(|error| describe(&error))).boxed();
    Ok(Opened { total, validator, offset, body })
}

/// `bytes 5-9/10`: first byte and size of the whole (RFC 9110, section 14.4).
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
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

async fn ask_object(
    store: &dyn ObjectStore,
    key: &ObjectPath,
    offset: u64,
    validator: Option<String>,
) -> Result<Opened, Failure> {
    use object_store::Error;
    let range = (offset > 0).then_some(GetRange::Offset(offset));
    let options = GetOptions { range, if_match: validator.filter(|_| offset > 0), ..GetOptions::default() };
    let found = store.get_opts(key, options).await.map_err(|error| match error {
        Error::NotFound { .. } => Failure::lasting("it is not there: no such bucket or object"),
        Error::Unauthenticated { .. } | Error::PermissionDenied { .. } => {
            Failure::lasting("the store refuses it; check the credentials of source.secretRef")
        }
        Error::Precondition { .. } => Failure::anew("the object has changed meanwhile"),
        error => {
            let text = describe(&error);
            // An offset at the end or beyond it: what is there is of no use.
            match text.contains("416") {
                true => Failure::anew(text),
                false => Failure::passing(text),
            }
        }
    })?;
    let (total, offset, validator) = (found.meta.size, found.range.start, found.meta.e_tag.clone());
    let body = found.into_stream().map(|piece| piece.map_err(|error| describe(&error))).boxed();
    Ok(Opened { total: Some(total), validator: validator.filter(|etag| !etag.starts_with("W/")), offset, body })
}

/// A bandwidth cap that all transfers share.
pub(super) struct Throttle {
    bytes_per_second: Option<u64>,
    free_at: Mutex<Instant>,
}

impl Throttle {
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until so many bytes may have come.
    async fn spend(&self, bytes: u64) {
        let Some(rate) = self.bytes_per_second else { return };
        let until = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            *free_at = (*free_at).max(Instant::now()) + Duration::from_secs_f64(bytes as f64 / rate as f64);
            *free_at
        };
        tokio::time::sleep_until(until.into()).await;
    }
}

/// User and password as the header's value (RFC 7617).
pub(super) fn basic((user, password): &(String, String)) -> String {
    format!("Basic {}", BASE64.encode(format!("{user}:{password}")))
}

/// The header of a login (RFC 7617) or a token (RFC 6750), marked as secret.
pub(super) fn authorization(value: &str) -> Result<HeaderMap, String> {
    let mut value =
        HeaderValue::from_str(value).map_err(|_| "the credentials hold characters that no header can".to_owned())?;
    value.set_sensitive(true);
    Ok(HeaderMap::from_iter([(reqwest::header::AUTHORIZATION, value)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_and_nonsense_is_not() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, None)));
        for wrong in ["", "bytes", "bytes */10", "bytes 9-5/10", "items 0-1/2", "bytes a-b/c", "bytes -5/10"] {
            assert_eq!(content_range(wrong), None, "{wrong}");
        }
    }
}
