//! `http:` and `https:` cameras. What the camera answers with decides: an endless MJPEG is read frame by frame, a single
//! picture is asked for again and again at the stream's pace.
//!
//! Every wait has a limit: connecting, the answer, and the time between two pieces of a body. Redirects are not followed,
//! and no proxy is taken from the environment: a camera is where its address says.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use reqwest::header::CONTENT_TYPE;
use reqwest::{Client, Response, Url};

use super::multipart::Multipart;
use super::{CameraError, FRAME_BYTES_MAX, Health, Pace, captured, retry};
use lineside_api::kinds::StreamSource;
use crate::mailbox::Mailbox;

/// Waiting for a connection at most.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Waiting for the next piece of an answer at most.
const STALL_TIMEOUT: Duration = Duration::from_secs(8);
/// The pace of single pictures where the manifest leaves it open (`fps: 0`).
const SNAPSHOT_INTERVAL: Duration = Duration::from_millis(200);

pub(super) async fn play(url: &Url, interval: Option<Duration>, mailbox: &Mailbox, health: Health) {
    let client = match client() {
        Ok(client) => client,
        Err(reason) => {
            tracing::error!(stream = health.stream, reason, "no HTTP client can be made, the stream stays down");
            return;
        }
    };
    retry(&health, || watch(&client, url, interval, mailbox, &health)).await;
}

/// A client with our limits. TLS is rustls with ring, and the certificates this machine trusts.
fn client() -> Result<Client, String> {
    // A second call finds the provider installed already, which is as good.
    drop(rustls::crypto::ring::default_provider().install_default());
    Client::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(STALL_TIMEOUT)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .user_agent(concat!("lineside/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|error| describe(&error))
}

/// Reads one connection's frames. It returns only when something went wrong.
async fn watch(
    client: &Client,
    url: &Url,
    interval: Option<Duration>,
    mailbox: &Mailbox,
    health: &Health,
) -> Result<(), CameraError> {
    let mut answer = ask(client, url).await?;
    match kind(&answer)? {
        ResponseKind::Mjpeg { boundary } => mjpeg(answer, boundary, interval, mailbox, health).await,
        ResponseKind::Picture => {
            let mut pace = Pace::new(Some(interval.unwrap_or(SNAPSHOT_INTERVAL)));
            pace.tick().await;
            loop {
                let picture = body(answer).await?;
                health.up();
                mailbox.offer(captured(picture, None, true));
                pace.tick().await;
                answer = ask(client, url).await?;
                if !matches!(kind(&answer)?, ResponseKind::Picture) {
                    return Err(CameraError::Unreachable("the camera changed from single pictures to MJPEG".to_owned()));
                }
            }
        }
    }
}

async fn ask(client: &Client, url: &Url) -> Result<Response, CameraError> {
    let answer = client.get(url.clone()).send().await.map_err(|error| gone(&error))?;
    let status = answer.status();
    match status.as_u16() {
        200 => Ok(answer),
        401 | 403 => {
            Err(CameraError::Rejected(format!("the camera refuses us ({status}); put user and password into the address")))
        }
        300..=399 => {
            Err(CameraError::Rejected(format!("the camera sends us elsewhere ({status}), which is not followed")))
        }
        _ => Err(CameraError::Rejected(format!("the camera answers {status}"))),
    }
}

enum ResponseKind {
    Mjpeg { boundary: Option<String> },
    Picture,
}

fn kind(answer: &Response) -> Result<ResponseKind, CameraError> {
    let header = answer.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let (media, parameters) = header.split_once(';').unwrap_or((header, ""));
    let media = media.trim().to_ascii_lowercase();
    if media.starts_with("multipart/") {
        let boundary = parameters.split(';').find_map(|parameter| {
            let (name, value) = parameter.split_once('=')?;
            name.trim().eq_ignore_ascii_case("boundary").then(|| value.trim().to_owned())
        });
        return Ok(ResponseKind::Mjpeg { boundary });
    }
    // Small cameras leave the type out or send something general; the decoder will tell.
    match media.as_str() {
        "" | "application/octet-stream" | "binary/octet-stream" => Ok(ResponseKind::Picture),
        media if media.starts_with("image/") => Ok(ResponseKind::Picture),
        other => Err(CameraError::Rejected(format!("the camera answers with {other}; expected MJPEG or a picture"))),
    }
}

async fn mjpeg(
    answer: Response,
    boundary: Option<String>,
    interval: Option<Duration>,
    mailbox: &Mailbox,
    health: &Health,
) -> Result<(), CameraError> {
    let mut parser = Multipart::new(boundary.as_deref(), FRAME_BYTES_MAX);
    let mut chunks = answer.bytes_stream();
    // A camera faster than the stream's pace is thinned out by time, with some room for its jitter.
    let least_gap = interval.map(|interval| interval.mul_f64(0.9));
    let mut last_taken: Option<tokio::time::Instant> = None;
    while let Some(chunk) = chunks.next().await {
        parser.feed(&chunk.map_err(|error| gone(&error))?);
        while let Some(part) = parser.next_part().map_err(CameraError::Rejected)? {
            health.up();
            let now = tokio::time::Instant::now();
            let too_soon = least_gap.zip(last_taken).is_some_and(|(gap, taken)| now - taken < gap);
            if !too_soon {
                last_taken = Some(now);
                mailbox.offer(captured(part, None, true));
            }
        }
    }
    Err(CameraError::Unreachable("the camera closed the connection".to_owned()))
}

/// The whole body, within bounds.
async fn body(answer: Response) -> Result<Bytes, CameraError> {
    let too_large = || CameraError::Rejected(format!("the picture has more than {FRAME_BYTES_MAX} bytes"));
    if answer.content_length().is_some_and(|length| length > FRAME_BYTES_MAX as u64) {
        return Err(too_large());
    }
    let mut bytes = BytesMut::new();
    let mut chunks = answer.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        bytes.extend_from_slice(&chunk.map_err(|error| gone(&error))?);
        if bytes.len() > FRAME_BYTES_MAX {
            return Err(too_large());
        }
    }
    Ok(bytes.freeze())
}

fn gone(error: &reqwest::Error) -> CameraError {
    CameraError::Unreachable(describe(error))
}

/// An error and its causes in one line, with no secret of the address in it.
fn describe(error: &reqwest::Error) -> String {
    let place = error.url().map(|url| StreamSource::Http(url.clone()).to_string()).unwrap_or_default();
    let what = match error {
        error if error.is_timeout() => "no answer in time",
        error if error.is_connect() => "cannot be reached",
        error if error.is_body() || error.is_decode() => "the answer broke off",
        _ => "the request failed",
    };
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    let mut root = String::new();
    while let Some(inner) = cause {
        root = inner.to_string();
        cause = inner.source();
    }
    match root.is_empty() {
        true => format!("{place} {what}").trim().to_owned(),
        false => format!("{place} {what}: {root}").trim().to_owned(),
    }
}
