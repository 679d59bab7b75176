//! The controller's probes and metrics.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;

use lineside_common::metrics::ControllerMetrics;
use lineside_controller::{BEAT_MAX, Heartbeat};

/// `/livez`, `/readyz` and `/metrics`.
pub fn router(heartbeat: Arc<Heartbeat>, metrics: ControllerMetrics) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(encode))
        .with_state((heartbeat, metrics))
}

type Looked = State<(Arc<Heartbeat>, ControllerMetrics)>;

fn unavailable(error: &str) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"error": error}))).into_response()
}

async fn livez(State((heartbeat, _)): Looked) -> Response {
    match heartbeat.get().0.elapsed() <= BEAT_MAX {
        true => Json(json!({"alive": true})).into_response(),
        false => unavailable("the controller's loop is stuck"),
    }
}

async fn readyz(State((heartbeat, _)): Looked) -> Response {
    match heartbeat.get().1 {
        true => Json(json!({"ready": true})).into_response(),
        false => unavailable("the cluster has not been heard yet"),
    }
}

async fn encode(State((_, metrics)): Looked) -> Response {
    match metrics.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, Json(json!({"error": error.to_string()}))).into_response(),
    }
}
