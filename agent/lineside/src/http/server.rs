//! Health, metrics and status over HTTP/1.1, on an accept loop of our own: with a limit on connections and on the time a client
//! may take to send its headers, neither of which axum's own server has.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::Router;
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use prometheus::IntCounter;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::health::Health;
use super::status_store::StatusStore;
use lineside_common::metrics::Registrar;
use lineside_models::StoreMetrics;
use lineside_models::store::Store;
use lineside_spool::Spool;

/// Open connections at most; one more is closed at once, and counted.
const CONNECTIONS_MAX: usize = 256;
/// Time to send a request's headers, also for the next request on a kept connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of headers and of a connection's read buffer at most.
const BUFFER_BYTES_MAX: usize = 16 << 10;
/// A connection lives this long at most. One that takes its answers too slowly must not hold its place for ever.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(60);
/// How long the end waits for requests that are under way.
const FAREWELL: Duration = Duration::from_secs(2);
/// Pause after a failed accept, which happens when the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the handlers look at.
#[derive(Clone)]
pub struct HttpState {
    /// Liveness and readiness.
    pub health: Arc<Health>,
    /// All metrics.
    pub registrar: Registrar,
    /// Looked at when metrics are asked for.
    pub spool: Arc<Spool>,
    /// The node's status.
    pub status: Arc<StatusStore>,
    /// The model store, whose files are offered to peers.
    pub store: Arc<Store>,
    /// The gauges of the store.
    pub store_metrics: StoreMetrics,
    /// The file with the token that the site's agents share; without one nothing is offered to them.
    pub peer_token: Option<PathBuf>,
}

/// A bound listener that does not serve yet.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
}

impl Server {
    /// Takes the address; port 0 takes a free one.
    ///
    /// # Errors
    /// When it cannot be had; the message names it.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await.map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("--http {address} cannot be bound: {error}; choose another, or port 0"),
            )
        })?;
        Ok(Self { address: listener.local_addr()?, listener })
    }

    /// The address in use.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until it is stopped, and counts connections that there was no room for; then lets the requests that are under way finish.
    pub async fn run(&self, router: Router, refused: IntCounter, stop: CancellationToken) {
        let service = TowerToHyperService::new(router);
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let connections = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = stop.cancelled() => break,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                refused.inc();
                continue;
            };
            let (service, stop) = (service.clone(), stop.clone());
            connections.spawn(async move {
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .max_buf_size(BUFFER_BYTES_MAX)
                    .serve_connection(TokioIo::new(stream), service);
                tokio::pin!(connection);
                let ended = tokio::select! {
                    ended = connection.as_mut() => ended,
                    () = tokio::time::sleep(CONNECTION_LIFETIME) => Ok(()),
                    () = stop.cancelled() => {
                        connection.as_mut().graceful_shutdown();
                        connection.await
                    }
                };
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection ended early");
                }
                drop(place);
            });
        }
        connections.close();
        if tokio::time::timeout(FAREWELL, connections.wait()).await.is_err() {
            tracing::debug!(open = connections.len(), "connections are cut off at the end");
        }
    }
}

/// What the agent answers.
pub fn router(served: HttpState) -> Router {
    let mut router = Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/v1/status", get(status));
    if served.peer_token.is_some() {
        router = router.route("/v1/blobs/sha256/{hex}", get(blob));
    }
    router.fallback(unknown).with_state(served)
}

async fn status(State(served): State<HttpState>) -> Response {
    Json(tokio::task::block_in_place(|| lineside_kube::status_writer::StatusSource::get(&*served.status)))
        .into_response()
}

async fn blob(State(served): State<HttpState>, UrlPath(hex): UrlPath<String>, headers: HeaderMap) -> Response {
    match &served.peer_token {
        Some(token) => super::blobs::answer(&served.store, token, &hex, &headers).await,
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn livez(State(served): State<HttpState>) -> Response {
    match served.health.is_alive(Instant::now()) {
        true => Json(json!({"alive": true})).into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"error": "the core loop has stopped"}))).into_response(),
    }
}

async fn readyz(State(served): State<HttpState>) -> Response {
    let readiness = served.health.readiness();
    let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(readiness)).into_response()
}

/// Updates the gauges that are only set on demand.
pub fn refresh(spool: &Spool, store: &Store, store_metrics: &StoreMetrics) {
    spool.update_metrics();
    // The gauges of a store that cannot be read keep their last values; the status reports the error.
    if let Ok(usage) = tokio::task::block_in_place(|| store.usage()) {
        store_metrics.set_usage(&usage);
    }
}

async fn metrics(State(served): State<HttpState>) -> Response {
    refresh(&served.spool, &served.store, &served.store_metrics);
    match served.registrar.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, Json(json!({"error": error.to_string()}))).into_response(),
    }
}

async fn unknown(uri: Uri) -> Response {
    let error = format!("there is nothing at {}; there are /livez, /readyz, /metrics and /v1/status", uri.path());
    (StatusCode::NOT_FOUND, Json(json!({"error": error}))).into_response()
}
