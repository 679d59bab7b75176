//! The sources `http:` and `https:`: network cameras. The content type of the response selects the mode: an MJPEG stream is
//! read frame by frame, a single picture is requested repeatedly at the frame rate of the stream.
//!
//! Every wait is bounded: the connection, the response, and the time between two reads of a body. Redirects are not followed
//! and proxies of the environment are not used, because the address names the camera itself.
//!
//! This file has no unit tests: it is tested by the suite against scripted cameras.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use reqwest::header::CONTENT_TYPE;
use reqwest::{Client, Response, Url};

use super::multipart::Multipart;
use super::{CameraError, FRAME_BYTES_MAX, Health, Pace, SourcePolicy, captured, retry};
use crate::mailbox::Mailbox;
use lineside_api::kinds::StreamSource;

/// Longest time to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time between two reads of a response.
const STALL_TIMEOUT: Duration = Duration::from_secs(8);
/// Interval between requests for single pictures when the manifest sets no frame rate (`fps: 0`).
const SNAPSHOT_INTERVAL: Duration = Duration::from_millis(200);
/// Shortest accepted gap between two frames, as a fraction of the interval.
const GAP_TOLERANCE: f64 = 0.9;

pub(super) async fn play(
    url: &Url,
    policy: &SourcePolicy,
    interval: Option<Duration>,
    mailbox: &Mailbox,
    health: &Health,
) {
    let client = match client(url, policy) {
        Ok(client) => client,
        Err(error) => {
            let reason = describe(&error);
            tracing::error!(
                event = "http_client_failed",
                stream = health.stream,
                reason,
                "HTTP client cannot be created; the stream stays down"
            );
            return;
        }
    };
    // The address that a name has is checked at every connection. That of a literal address is checked here at every attempt,
    // because the addresses of this node can change.
    let attempt = || async {
        policy.cameras.check_literal(url).map_err(|error| CameraError::Rejected(error.to_string()))?;
        receive(&client, url, interval, mailbox, health).await
    };
    retry(health, attempt).await;
}

/// A client with the limits above that connects only to allowed addresses. TLS is rustls with ring, and the certificates that the system trusts.
fn client(url: &Url, policy: &SourcePolicy) -> reqwest::Result<Client> {
    // Fails when the provider is installed already.
    drop(rustls::crypto::ring::default_provider().install_default());
    Client::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(STALL_TIMEOUT)
        .redirect(reqwest::redirect::Policy::none())
        .dns_resolver(policy.cameras.resolver(url))
        .no_proxy()
        .user_agent(concat!("lineside/", env!("CARGO_PKG_VERSION")))
        .build()
}

/// Receives frames until an error occurs.
async fn receive(
    client: &Client,
    url: &Url,
    interval: Option<Duration>,
    mailbox: &Mailbox,
    health: &Health,
) -> Result<(), CameraError> {
    let mut response = request(client, url).await?;
    match response_kind(&response)? {
        ResponseKind::Mjpeg { boundary } => receive_mjpeg(response, boundary, interval, mailbox, health).await,
        ResponseKind::Picture => {
            let mut pace = Pace::new(Some(interval.unwrap_or(SNAPSHOT_INTERVAL)));
            pace.tick().await;
            loop {
                let picture = body(response).await?;
                health.up();
                mailbox.offer(captured(picture, None, true));
                pace.tick().await;
                response = request(client, url).await?;
                if !matches!(response_kind(&response)?, ResponseKind::Picture) {
                    return Err(CameraError::Unreachable(
                        "the camera changed from single pictures to MJPEG".to_owned(),
                    ));
                }
            }
        }
    }
}

/// Sends one request. Statuses other than 200 are errors.
async fn request(client: &Client, url: &Url) -> Result<Response, CameraError> {
    let response = client.get(url.clone()).send().await.map_err(|error| unreachable(&error))?;
    let status = response.status();
    match status.as_u16() {
        200 => Ok(response),
        401 | 403 => Err(CameraError::Rejected(format!(
            "the camera denies access ({status}); put user and password into the address"
        ))),
        300..=399 => Err(CameraError::Rejected(format!(
            "the camera redirects ({status}); redirects are not followed, use the final address"
        ))),
        _ => Err(CameraError::Rejected(format!("the camera responds with {status}"))),
    }
}

/// The content of a response.
enum ResponseKind {
    /// An MJPEG stream, with the boundary of its content type.
    Mjpeg { boundary: Option<String> },
    /// A single picture.
    Picture,
}

fn response_kind(response: &Response) -> Result<ResponseKind, CameraError> {
    let header = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let (media, parameters) = header.split_once(';').unwrap_or((header, ""));
    let media = media.trim().to_ascii_lowercase();
    if media.starts_with("multipart/") {
        let boundary = parameters.split(';').find_map(|parameter| {
            let (name, value) = parameter.split_once('=')?;
            name.trim().eq_ignore_ascii_case("boundary").then(|| value.trim().to_owned())
        });
        return Ok(ResponseKind::Mjpeg { boundary });
    }
    // Simple cameras send no content type or a generic one; the decoder detects whether the body is a picture.
    match media.as_str() {
        "" | "application/octet-stream" | "binary/octet-stream" => Ok(ResponseKind::Picture),
        media if media.starts_with("image/") => Ok(ResponseKind::Picture),
        other => Err(CameraError::Rejected(format!("the camera responds with {other}; expected MJPEG or a picture"))),
    }
}

/// Receives the frames of an MJPEG stream until it ends, which is an error.
async fn receive_mjpeg(
    response: Response,
    boundary: Option<String>,
    interval: Option<Duration>,
    mailbox: &Mailbox,
    health: &Health,
) -> Result<(), CameraError> {
    let mut parser = Multipart::new(boundary.as_deref(), FRAME_BYTES_MAX);
    let mut chunks = response.bytes_stream();
    // A camera with a higher frame rate than the stream is reduced by time, with a tolerance for its jitter.
    let gap_min = interval.map(|interval| interval.mul_f64(GAP_TOLERANCE));
    let mut last_taken: Option<tokio::time::Instant> = None;
    while let Some(chunk) = chunks.next().await {
        parser.feed(&chunk.map_err(|error| unreachable(&error))?);
        while let Some(part) = parser.next_part().map_err(|error| CameraError::Rejected(error.to_string()))? {
            health.up();
            let now = tokio::time::Instant::now();
            let too_soon = gap_min.zip(last_taken).is_some_and(|(gap, taken)| now - taken < gap);
            if !too_soon {
                last_taken = Some(now);
                mailbox.offer(captured(part, None, true));
            }
        }
    }
    Err(CameraError::Unreachable("the camera closed the connection".to_owned()))
}

/// The complete body, at most [`FRAME_BYTES_MAX`] bytes.
async fn body(response: Response) -> Result<Bytes, CameraError> {
    let too_large = || CameraError::Rejected(format!("the picture has more than {FRAME_BYTES_MAX} bytes"));
    if response.content_length().is_some_and(|length| length > FRAME_BYTES_MAX as u64) {
        return Err(too_large());
    }
    let mut bytes = BytesMut::new();
    let mut chunks = response.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        bytes.extend_from_slice(&chunk.map_err(|error| unreachable(&error))?);
        if bytes.len() > FRAME_BYTES_MAX {
            return Err(too_large());
        }
    }
    Ok(bytes.freeze())
}

fn unreachable(error: &reqwest::Error) -> CameraError {
    CameraError::Unreachable(describe(error))
}

/// An error with its root cause in one line, without the secrets of the address.
fn describe(error: &reqwest::Error) -> String {
    let place = error.url().map(|url| StreamSource::Http(url.clone()).to_string()).unwrap_or_default();
    let failure = match error {
        error if error.is_timeout() => "did not respond in time",
        error if error.is_connect() => "cannot be reached",
        error if error.is_body() || error.is_decode() => "sent an incomplete response",
        _ => "did not complete the request",
    };
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    let mut root = String::new();
    while let Some(inner) = cause {
        root = inner.to_string();
        cause = inner.source();
    }
    let separator = if root.is_empty() { "" } else { ": " };
    format!("{place} {failure}{separator}{root}").trim().to_owned()
}
