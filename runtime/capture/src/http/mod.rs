//! The sources `http:` and `https:`: network cameras, with single pictures that are requested again and again, or with an endless stream
//! of pictures. What the camera sends decides, not what it announces: pictures are found by their own bytes ([`crate::pictures`]).
//!
//! ```text
//! request ──> head ──> body ──> pictures
//!    ^                            ├── the body continues: a stream, until no picture has come for too long
//!    └──── at the frame rate <────┴── the body ended after one picture
//! ```
//!
//! The client is our own, because the strict ones refuse responses of many cameras (see [`head`]) and because a picture has to be taken
//! when its last byte arrives. Every wait is bounded. Redirects are not followed and proxies of the environment are not used, because the
//! address names the camera itself, and each connection goes to an address that the policy allows.
//!
//! A stream is alive as long as pictures come, whatever else it sends. A request that fails on a connection that was kept is repeated at
//! once on a new one.

mod auth;
mod chunks;
mod connection;
mod head;

use std::time::Duration;

use bytes::Bytes;
use lineside_api::kinds::StreamSource;
use percent_encoding::percent_decode_str;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use url::Url;

use self::auth::{Authenticator, Credentials};
use self::connection::{Body, Connection, ConnectionError, tls};
use self::head::{Framing, Head};
use super::{CameraError, FRAME_BYTES_MAX, Health, Pace, SourcePolicy, captured, retry};
use crate::mailbox::Mailbox;
use crate::pictures::{Found, PictureScanner};
use crate::policy::CameraHosts;

/// Longest time without a picture.
const PICTURE_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest time without a picture of a camera with few pictures.
const PICTURE_TIMEOUT_MAX: Duration = Duration::from_secs(60);
/// A camera with few pictures may take so many times the time between two of them.
const PICTURE_INTERVALS: u32 = 3;
/// Time in which a body continues after its first picture, if it is a stream that does not say so.
const SETTLE: Duration = Duration::from_millis(250);
/// Interval between requests for single pictures when the manifest sets no frame rate (`fps: 0`).
const SNAPSHOT_INTERVAL: Duration = Duration::from_millis(200);
/// Shortest accepted gap between two frames, as a fraction of the interval.
const GAP_TOLERANCE: f64 = 0.9;
/// Requests in a row for one response: the first one, one with credentials, and one with a new nonce.
const ATTEMPTS_MAX: u32 = 3;

pub(super) async fn play(
    url: &Url,
    policy: &SourcePolicy,
    interval: Option<Duration>,
    mailbox: &Mailbox,
    health: &Health,
) {
    // Reads the certificates of the system, which only a camera with TLS needs.
    let tls = match (url.scheme() == "https").then(tls).transpose() {
        Ok(tls) => tls,
        Err(error) => {
            tracing::error!(event = "tls_unavailable", stream = health.stream, %error, "TLS is not available; the stream stays down");
            return;
        }
    };
    let attempt = || async {
        let mut camera = Camera::new(url, &policy.cameras, tls.as_ref());
        let mut receiver = Receiver { interval, mailbox, health, last_taken: None };
        let place = StreamSource::Http(url.clone());
        receiver.receive(&mut camera).await.map_err(|error| error.at(&place))
    };
    retry(health, attempt).await;
}

/// Why a response gives no pictures.
#[derive(Debug, thiserror::Error)]
enum ReceiveError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("{0}")]
    Auth(#[from] auth::AuthError),
    #[error("the camera responds with {status}{}", if *.status == 404 { "; check the path of the address" } else { "" })]
    Status { status: u16, retry_after: Option<Duration> },
    #[error("the camera denies access (403); check the rights of the user in the camera")]
    Forbidden,
    #[error("the camera redirects ({status}) and redirects are not followed; use the final address")]
    Redirect { status: u16 },
    /// What the camera sent instead is not shown: reasons leave the node, and the address may be that of another service.
    #[error(
        "the camera answers with {0} and no picture; check the path of the address, and whether the camera is busy"
    )]
    Nothing(String),
    #[error("the picture is cut off or damaged")]
    Broken,
    #[error(transparent)]
    TooLarge(#[from] crate::pictures::PictureTooLarge),
    #[error("no picture has come for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("the camera closed the connection")]
    Ended,
}

impl ReceiveError {
    /// The error of a source. The address is shown without its secrets.
    fn at(self, place: &StreamSource) -> CameraError {
        match self {
            Self::Connection(ConnectionError::Forbidden(error)) => CameraError::Rejected(error.to_string()),
            Self::Connection(error) => CameraError::Unreachable(format!("{place} {error}")),
            Self::Ended | Self::Silent(_) => CameraError::Unreachable(self.to_string()),
            Self::Status { retry_after: Some(delay), .. } => CameraError::Busy(self.to_string(), delay),
            other => CameraError::Rejected(other.to_string()),
        }
    }
}

/// A camera, with the connection that is kept between two requests.
struct Camera<'a> {
    url: &'a Url,
    hosts: &'a CameraHosts,
    /// For `https:`.
    tls: Option<&'a TlsConnector>,
    credentials: Option<Credentials>,
    authenticator: Authenticator,
    kept: Option<Connection>,
}

impl<'a> Camera<'a> {
    fn new(url: &'a Url, hosts: &'a CameraHosts, tls: Option<&'a TlsConnector>) -> Self {
        let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        let has_credentials = !url.username().is_empty() || url.password().is_some();
        let credentials = has_credentials.then(|| Credentials {
            user: decoded(url.username()),
            password: decoded(url.password().unwrap_or_default()),
        });
        Self { url, hosts, tls, credentials, authenticator: Authenticator::default(), kept: None }
    }

    /// Requests the address, with an answer to the camera's challenge where it asks for one.
    async fn request(&mut self) -> Result<(Connection, Head, Body), ReceiveError> {
        for _ in 0..ATTEMPTS_MAX {
            let target = match self.url.query() {
                Some(query) => format!("{}?{query}", self.url.path()),
                None => self.url.path().to_owned(),
            };
            let authorization = self.authenticator.authorization(self.credentials.as_ref(), &target);
            let (connection, head, body) = self.exchange(&target, authorization.as_deref()).await?;
            match head.status {
                200 => return Ok((connection, head, body)),
                401 => {
                    let values = head.values("www-authenticate");
                    self.authenticator.challenged(values, self.credentials.as_ref(), authorization.is_some())?;
                }
                403 => return Err(ReceiveError::Forbidden),
                status @ 300..=399 => return Err(ReceiveError::Redirect { status }),
                status => return Err(ReceiveError::Status { status, retry_after: retry_after(status, &head) }),
            }
        }
        Err(auth::AuthError::Refused.into())
    }

    /// Sends one request, on the connection that was kept, or on a new one when there is none or the camera has closed it.
    async fn exchange(
        &mut self,
        target: &str,
        authorization: Option<&str>,
    ) -> Result<(Connection, Head, Body), ReceiveError> {
        let host = self.url.host_str().unwrap_or_default();
        let port = self.url.port().map(|port| format!(":{port}")).unwrap_or_default();
        let authorization = authorization.map(|value| format!("Authorization: {value}\r\n")).unwrap_or_default();
        let version = env!("CARGO_PKG_VERSION");
        let request = format!(
            "GET {target} HTTP/1.1\r\nHost: {host}{port}\r\nUser-Agent: lineside/{version}\r\nAccept: */*\r\n{authorization}\r\n"
        );
        let kept = self.kept.take();
        let mut connection = match kept {
            Some(connection) => connection,
            None => Connection::open(self.url, self.hosts, self.tls).await?,
        };
        let was_kept = connection.is_kept();
        match connection.request(&request).await {
            Ok((head, body)) => Ok((connection, head, body)),
            // RFC 9112, section 9.3.1: the camera may close a connection at any time, and a GET may be repeated.
            Err(ConnectionError::Closed | ConnectionError::Io(_) | ConnectionError::Head(_)) if was_kept => {
                let mut connection = Connection::open(self.url, self.hosts, self.tls).await?;
                let (head, body) = connection.request(&request).await?;
                Ok((connection, head, body))
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// The time that a busy camera asks for.
fn retry_after(status: u16, head: &Head) -> Option<Duration> {
    /// Longest time that is waited because a camera asks for it.
    const RETRY_AFTER_MAX: u64 = 30;
    let seconds = head.values("retry-after").next_back().and_then(|value| value.parse::<u64>().ok());
    matches!(status, 429 | 503).then(|| Duration::from_secs(seconds.unwrap_or(0).min(RETRY_AFTER_MAX)))
}

/// What has come of one body.
struct Progress {
    pictures: u64,
    has_broken: bool,
    /// The last picture, or the start of the body.
    last_picture: Instant,
    /// Longest time without a picture.
    timeout: Duration,
    /// When a body that may have ended is taken to have ended.
    settled: Instant,
}

impl Progress {
    fn new(now: Instant) -> Self {
        Self { pictures: 0, has_broken: false, last_picture: now, timeout: PICTURE_TIMEOUT, settled: now + SETTLE }
    }

    fn on_picture(&mut self, now: Instant) {
        if self.pictures > 0 {
            let usual = (now - self.last_picture) * PICTURE_INTERVALS;
            self.timeout = usual.clamp(PICTURE_TIMEOUT, PICTURE_TIMEOUT_MAX);
        }
        self.pictures += 1;
        (self.last_picture, self.settled) = (now, now + SETTLE);
    }

    /// Until when the next bytes are waited for.
    fn deadline(&self, may_have_ended: bool) -> Instant {
        let silent = self.last_picture + self.timeout;
        if may_have_ended { silent.min(self.settled) } else { silent }
    }
}

/// Takes pictures from responses.
struct Receiver<'a> {
    interval: Option<Duration>,
    mailbox: &'a Mailbox,
    health: &'a Health,
    last_taken: Option<Instant>,
}

impl Receiver<'_> {
    /// Receives pictures until an error occurs.
    async fn receive(&mut self, camera: &mut Camera<'_>) -> Result<(), ReceiveError> {
        let mut pace = Pace::new(Some(self.interval.unwrap_or(SNAPSHOT_INTERVAL)));
        loop {
            pace.tick().await;
            let (connection, head, body) = camera.request().await?;
            camera.kept = self.receive_body(connection, &head, body).await?;
        }
    }

    /// Takes the pictures of a body. Returns the connection when the camera can be asked again on it, after a single picture.
    async fn receive_body(
        &mut self,
        mut connection: Connection,
        head: &Head,
        mut body: Body,
    ) -> Result<Option<Connection>, ReceiveError> {
        let mut scanner = PictureScanner::new(FRAME_BYTES_MAX);
        let mut progress = Progress::new(Instant::now());
        loop {
            // Cameras that announce parts state lengths that mean nothing.
            let has_ended = body.is_complete() && !head.is_multipart();
            if progress.pictures > 0 && has_ended && !scanner.is_within_picture() {
                return Ok(Some(connection).filter(|_| head.keeps_connection()));
            }
            // A length that is reached without a picture may be wrong, and a picture without a length may be the first of a stream.
            let may_have_ended = body.is_complete() || (progress.pictures == 1 && !head.is_multipart());
            let deadline = progress.deadline(may_have_ended);
            let piece = match tokio::time::timeout_at(deadline, connection.read(&mut body)).await {
                Ok(piece) => piece.or_else(|error| if progress.pictures > 0 { Ok(None) } else { Err(error) })?,
                Err(_) if may_have_ended => None,
                Err(_) => return Err(ReceiveError::Silent(progress.timeout)),
            };
            let Some(piece) = piece else { break };
            if progress.pictures == 0 {
                progress.settled = Instant::now() + SETTLE;
            }
            scanner.feed(&piece);
            while let Some(found) = scanner.next_found()? {
                self.take_found(found, head, &mut progress);
            }
        }
        if scanner.is_within_picture() {
            self.take_found(Found::Broken, head, &mut progress);
        }
        match progress.pictures {
            // The body ended after one picture, as that of a camera with single pictures.
            1 => Ok(None),
            0 if progress.has_broken => Err(ReceiveError::Broken),
            0 => Err(ReceiveError::Nothing(head.media_type())),
            _ => Err(ReceiveError::Ended),
        }
    }

    fn take_found(&mut self, found: Found, head: &Head, progress: &mut Progress) {
        let Found::Picture(picture) = found else {
            progress.has_broken = true;
            self.health.metrics.failed.inc();
            return;
        };
        let now = Instant::now();
        progress.on_picture(now);
        // A preview behind the picture of a single response is not a frame.
        let is_single = !head.is_multipart() && matches!(head.framing(), Framing::Length(_));
        if progress.pictures == 1 || !is_single {
            self.take(picture, now, progress.pictures > 1);
        }
    }

    /// Hands a picture over. A stream with a higher frame rate than the manifest's is reduced by time, with a tolerance for its jitter.
    fn take(&mut self, picture: Bytes, now: Instant, is_stream: bool) {
        self.health.up();
        let gap_min = self.interval.filter(|_| is_stream).map(|interval| interval.mul_f64(GAP_TOLERANCE));
        let too_soon = gap_min.zip(self.last_taken).is_some_and(|(gap, taken)| now - taken < gap);
        if !too_soon {
            self.last_taken = Some(now);
            self.mailbox.offer(captured(picture, None, true));
        }
    }
}
