//! The HTTP/1.1 server for health, metrics and status. It has its own accept loop, which limits the number of connections and the
//! time in which a client must send its headers; the server of axum has neither limit. `tests/suite` tests it over real sockets.

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

/// Maximum number of open connections. A further connection is closed immediately, and counted.
const CONNECTIONS_MAX: usize = 256;
/// Time limit for the headers of a request, including the next request on a kept-alive connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum size of the headers and of the read buffer of a connection, in bytes.
const BUFFER_BYTES_MAX: usize = 16 << 10;
/// Maximum lifetime of a connection, so that a client that reads its responses too slowly does not hold a connection forever.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(60);
/// Time limit for requests in progress at shutdown.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after a failed accept, which happens when the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The state that the handlers share.
#[derive(Clone)]
pub struct HttpState {
    /// Liveness and readiness.
    pub health: Arc<Health>,
    /// The registry of all metrics.
    pub registrar: Registrar,
    /// The spool, whose gauges are updated at each scrape.
    pub spool: Arc<Spool>,
    /// The node's status.
    pub status: Arc<StatusStore>,
    /// The model store, whose files are served to peers.
    pub store: Arc<Store>,
    /// The gauges of the store.
    pub store_metrics: StoreMetrics,
    /// File with the token that the agents of the site share. Without it no files are served to peers.
    pub peer_token: Option<PathBuf>,
}

/// A bound listener. It accepts connections once [`Server::run`] is called.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
}

impl Server {
    /// Binds the address. Port 0 selects a free port.
    ///
    /// # Errors
    /// When the address cannot be bound. The message names it.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await.map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("--http {address} cannot be bound: {error}; use another address, or port 0 for a free port"),
            )
        })?;
        Ok(Self { address: listener.local_addr()?, listener })
    }

    /// The bound address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves `router` until `stop`, then completes the requests in progress within a time limit. `rejected` counts the connections
    /// above the limit.
    pub async fn run(&self, router: Router, rejected: IntCounter, stop: CancellationToken) {
        let service = TowerToHyperService::new(router);
        let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let connections = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = stop.cancelled() => break,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!(%error, "Cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = permits.clone().try_acquire_owned() else {
                rejected.inc();
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
                let outcome = tokio::select! {
                    outcome = connection.as_mut() => outcome,
                    () = tokio::time::sleep(CONNECTION_LIFETIME) => Ok(()),
                    () = stop.cancelled() => {
                        connection.as_mut().graceful_shutdown();
                        connection.await
                    }
                };
                if let Err(error) = outcome {
                    tracing::debug!(%error, "A connection failed");
                }
                drop(permit);
            });
        }
        connections.close();
        if tokio::time::timeout(DRAIN_TIMEOUT, connections.wait()).await.is_err() {
            tracing::debug!(open = connections.len(), "Open connections are closed at shutdown");
        }
    }
}

/// The routes of the agent.
pub fn router(state: HttpState) -> Router {
    let mut router = Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/v1/status", get(status));
    if state.peer_token.is_some() {
        router = router.route("/v1/blobs/sha256/{hex}", get(blob));
    }
    router.fallback(not_found).with_state(state)
}

async fn status(State(state): State<HttpState>) -> Response {
    Json(tokio::task::block_in_place(|| lineside_kube::status_writer::StatusSource::get(&*state.status)))
        .into_response()
}

async fn blob(State(state): State<HttpState>, UrlPath(hex): UrlPath<String>, headers: HeaderMap) -> Response {
    match &state.peer_token {
        Some(token) => super::blobs::serve_blob(&state.store, token, &hex, &headers).await,
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn livez(State(state): State<HttpState>) -> Response {
    if state.health.is_alive(Instant::now()) {
        Json(json!({"alive": true})).into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"error": "the reconciler has stalled"}))).into_response()
    }
}

async fn readyz(State(state): State<HttpState>) -> Response {
    let readiness = state.health.readiness();
    let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(readiness)).into_response()
}

/// Updates the gauges that are only set on demand.
pub fn refresh(spool: &Spool, store: &Store, store_metrics: &StoreMetrics) {
    spool.update_metrics();
    // When the store cannot be read, its gauges keep their last values; the status reports the error.
    if let Ok(usage) = tokio::task::block_in_place(|| store.usage()) {
        store_metrics.set_usage(&usage);
    }
}

async fn metrics(State(state): State<HttpState>) -> Response {
    refresh(&state.spool, &state.store, &state.store_metrics);
    match state.registrar.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, Json(json!({"error": error.to_string()}))).into_response(),
    }
}

async fn not_found(uri: Uri) -> Response {
    let error = format!("{} does not exist; the paths are /livez, /readyz, /metrics and /v1/status", uri.path());
    (StatusCode::NOT_FOUND, Json(json!({"error": error}))).into_response()
}
