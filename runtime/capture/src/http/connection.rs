//! One connection to a camera: TCP or TLS to an address that the policy allows, requests, heads and bodies of responses.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use lineside_common::tls_roots::system_roots;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use url::Url;

use super::chunks::{Chunks, DamagedChunks};
use super::head::{Framing, Head, HeadError};
use crate::policy::{CameraHostError, CameraHosts, ResolveError};

/// Longest time to connect, with TLS.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time from the request to the end of the head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(8);
/// Bytes that are read at once.
const READ_BYTES: usize = 64 << 10;

/// A response cannot be received.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    /// The policy does not allow the address.
    #[error(transparent)]
    Forbidden(#[from] CameraHostError),
    /// The connection cannot be opened.
    #[error("cannot be reached: {0}")]
    Connect(String),
    /// The camera closed the connection instead of an answer.
    #[error("closed the connection without an answer")]
    Closed,
    /// The connection failed.
    #[error("did not complete the request: {0}")]
    Io(#[from] io::Error),
    /// The camera did not answer in time.
    #[error("did not respond in time")]
    Timeout,
    /// The answer is not HTTP.
    #[error("does not answer in HTTP: {0}")]
    Head(#[from] HeadError),
    /// The body is damaged.
    #[error(transparent)]
    Chunks(#[from] DamagedChunks),
}

impl From<ResolveError> for ConnectionError {
    fn from(error: ResolveError) -> Self {
        match error {
            ResolveError::Lookup(error) => Self::Connect(error.to_string()),
            ResolveError::NotAllowed(error) => Self::Forbidden(error),
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection.
pub(super) struct Connection {
    stream: Box<dyn Stream>,
    buffer: BytesMut,
    /// Whether a response was received on it before.
    is_kept: bool,
}

/// The body of a response.
pub(super) struct Body {
    framing: Framing,
    left: u64,
    chunks: Chunks,
}

impl Connection {
    /// Opens a connection, with TLS where `tls` is given. All addresses of the host are tried.
    ///
    /// # Errors
    /// [`ConnectionError`].
    pub(super) async fn open(
        url: &Url,
        hosts: &CameraHosts,
        tls: Option<&TlsConnector>,
    ) -> Result<Self, ConnectionError> {
        let connect = async {
            let addresses = hosts.resolve(url).await?;
            let mut last = io::Error::other("the name has no address");
            for address in addresses {
                match TcpStream::connect(address).await {
                    Ok(stream) => {
                        stream.set_nodelay(true)?;
                        return Ok::<_, ConnectionError>(stream);
                    }
                    Err(error) => last = error,
                }
            }
            Err(ConnectionError::Connect(last.to_string()))
        };
        let open = async {
            let stream = connect.await?;
            let Some(tls) = tls else { return Ok::<_, ConnectionError>(Box::new(stream) as Box<dyn Stream>) };
            let host = url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned();
            let name = ServerName::try_from(host).map_err(|error| ConnectionError::Connect(error.to_string()))?;
            let stream =
                tls.connect(name, stream).await.map_err(|error| ConnectionError::Connect(error.to_string()))?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        };
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, open).await;
        let stream = stream.map_err(|_| ConnectionError::Connect("no answer in time".to_owned()))??;
        Ok(Self { stream, buffer: BytesMut::new(), is_kept: false })
    }

    /// Whether it carried a response before, so that the camera may have closed it meanwhile.
    pub(super) fn is_kept(&self) -> bool {
        self.is_kept
    }

    /// Sends a request and receives the head of the response.
    ///
    /// # Errors
    /// [`ConnectionError`].
    pub(super) async fn request(&mut self, request: &str) -> Result<(Head, Body), ConnectionError> {
        self.buffer.clear();
        let exchange = async {
            self.stream.write_all(request.as_bytes()).await?;
            self.stream.flush().await?;
            loop {
                if let Some((head, length)) = Head::parse(&self.buffer)? {
                    self.buffer.advance(length);
                    if head.status < 200 {
                        continue;
                    }
                    return Ok(head);
                }
                if self.stream.read_buf(&mut self.buffer).await? == 0 {
                    return Err(ConnectionError::Closed);
                }
            }
        };
        let head = tokio::time::timeout(HEAD_TIMEOUT, exchange).await.map_err(|_| ConnectionError::Timeout)??;
        self.is_kept = true;
        let framing = head.framing();
        let left = if let Framing::Length(length) = framing { length } else { 0 };
        Ok((head, Body { framing, left, chunks: Chunks::default() }))
    }

    /// Receives the next piece of a body. `None` at the end of the connection, or of the last chunk.
    ///
    /// # Errors
    /// [`ConnectionError`].
    pub(super) async fn read(&mut self, body: &mut Body) -> Result<Option<BytesMut>, ConnectionError> {
        loop {
            if self.buffer.is_empty() {
                self.buffer.reserve(READ_BYTES);
                if self.stream.read_buf(&mut self.buffer).await? == 0 {
                    return Ok(None);
                }
            }
            let piece = self.buffer.split();
            if body.framing != Framing::Chunked {
                body.left = body.left.saturating_sub(piece.len() as u64);
                return Ok(Some(piece));
            }
            let mut out = BytesMut::new();
            let has_ended = body.chunks.decode(&piece, &mut out)?;
            if has_ended {
                body.framing = Framing::Length(0);
            }
            match out.is_empty() {
                false => return Ok(Some(out)),
                true if has_ended => return Ok(None),
                true => {}
            }
        }
    }
}

impl Body {
    /// Whether all bytes that the head announced have been received.
    pub(super) fn is_complete(&self) -> bool {
        matches!(self.framing, Framing::Length(_)) && self.left == 0
    }
}

/// TLS with the certificates that the system trusts.
///
/// # Errors
/// When the cryptography of this build has none of the versions of TLS.
pub(super) fn tls() -> Result<TlsConnector, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(TlsConnector::from(Arc::new(builder.with_root_certificates(system_roots()).with_no_client_auth())))
}
