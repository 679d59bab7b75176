//! The HTTP routes of the controller: liveness, readiness and metrics, on its HTTP server and on its probe server.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;

use lineside_common::metrics::Registrar;
use lineside_controller::Heartbeat;

/// The routes `/livez`, `/readyz` and `/metrics`.
pub fn router(heartbeat: Arc<Heartbeat>, metrics: Registrar) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics_text))
        .with_state((heartbeat, metrics))
}

type ControllerState = State<(Arc<Heartbeat>, Registrar)>;

fn unavailable(error: &str) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"error": error}))).into_response()
}

async fn livez(State((heartbeat, _)): ControllerState) -> Response {
    if heartbeat.is_alive(Instant::now()) {
        Json(json!({"alive": true})).into_response()
    } else {
        unavailable("the control loop of the controller has stalled")
    }
}

async fn readyz(State((heartbeat, _)): ControllerState) -> Response {
    if heartbeat.is_synced() {
        Json(json!({"ready": true})).into_response()
    } else {
        unavailable("the cluster's objects have not been listed yet")
    }
}

async fn metrics_text(State((_, metrics)): ControllerState) -> Response {
    match metrics.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, Json(json!({"error": error.to_string()}))).into_response(),
    }
}
