//! The controller's probes and metrics.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;

use crate::base::metrics::ControllerMetrics;

/// A loop that has not come round for this long is stuck.
const BEAT_MAX: Duration = Duration::from_secs(60);

/// Whether the controller's loop comes round, and whether it knows everything.
pub struct Pulse(Mutex<(Instant, bool)>);

impl Pulse {
    /// A loop that has not come round yet.
    pub fn new(now: Instant) -> Self {
        Self(Mutex::new((now, false)))
    }

    /// The loop has come round; `is_ready` once all objects are known.
    pub fn beat(&self, is_ready: bool) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (Instant::now(), is_ready);
    }

    fn get(&self) -> (Instant, bool) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `/livez`, `/readyz` and `/metrics`.
pub fn router(pulse: Arc<Pulse>, metrics: ControllerMetrics) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(encode))
        .with_state((pulse, metrics))
}

type Looked = State<(Arc<Pulse>, ControllerMetrics)>;

fn unavailable(error: &str) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"error": error}))).into_response()
}

async fn livez(State((pulse, _)): Looked) -> Response {
    match pulse.get().0.elapsed() <= BEAT_MAX {
        true => Json(json!({"alive": true})).into_response(),
        false => unavailable("the controller's loop is stuck"),
    }
}

async fn readyz(State((pulse, _)): Looked) -> Response {
    match pulse.get().1 {
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
