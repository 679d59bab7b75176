//! The HTTP routes of the agent: probes, metrics, status and model files.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::Router;
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::json;

use super::health::Health;
use super::status_store::StatusStore;
use crate::streams::StreamRegistry;
use lineside_common::metrics::Registrar;
use lineside_models::StoreMetrics;
use lineside_models::store::Store;
use lineside_spool::Spool;

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
    /// The streams, whose states are evaluated at each scrape.
    pub streams: Arc<StreamRegistry>,
    /// The gauges of the store.
    pub store_metrics: StoreMetrics,
    /// File with the token that the agents of the site share. Without it no files are served to peers.
    pub peer_token: Option<PathBuf>,
}

/// The routes of the HTTP server.
pub fn router(state: HttpState) -> Router {
    let mut router = probes().route("/v1/status", get(status));
    if state.peer_token.is_some() {
        router = router.route("/v1/blobs/sha256/{hex}", get(blob));
    }
    router.fallback(not_found).with_state(state)
}

/// The routes of the probe server: `/livez`, `/readyz` and `/metrics`, and nothing else.
pub fn probe_router(state: HttpState) -> Router {
    probes().with_state(state)
}

fn probes() -> Router<HttpState> {
    Router::new().route("/livez", get(livez)).route("/readyz", get(readyz)).route("/metrics", get(metrics))
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
pub fn refresh(spool: &Spool, store: &Store, store_metrics: &StoreMetrics, streams: &StreamRegistry) {
    spool.update_metrics();
    streams.evaluate(Instant::now());
    // When the store cannot be read, its gauges keep their last values; the status reports the error.
    if let Ok(usage) = tokio::task::block_in_place(|| store.usage()) {
        store_metrics.set_usage(&usage);
    }
}

async fn metrics(State(state): State<HttpState>) -> Response {
    refresh(&state.spool, &state.store, &state.store_metrics, &state.streams);
    match state.registrar.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, Json(json!({"error": error.to_string()}))).into_response(),
    }
}

async fn not_found(uri: Uri) -> Response {
    let error = format!("{} does not exist; the paths are /livez, /readyz, /metrics and /v1/status", uri.path());
    (StatusCode::NOT_FOUND, Json(json!({"error": error}))).into_response()
}
