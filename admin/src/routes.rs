//! What is answered without a token: metrics and health. Nothing here has a body to read or a change to make.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::Mutex;

use crate::{
    api::problem::Problem,
    fence::Fences,
    metrics,
    plane::ControlPlane,
    view::{Status, View},
};

/// Prometheus gives up after 10 s by default; an answer later than that is work for nobody.
const SCRAPE_LIMIT: Duration = Duration::from_secs(5);
/// The text format's version that the exporter writes.
const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

pub(crate) struct App {
    pub view: Arc<dyn View>,
    pub status: Arc<Status>,
    pub fences: Arc<Fences>,
    pub recorder: PrometheusHandle,
    pub plane: Option<Arc<ControlPlane>>,
    /// One scrape at a time: several would only repeat the same work.
    pub scraping: Mutex<()>,
}

fn pages() -> Router<Arc<App>> {
    Router::new()
        .route("/metrics", get(scrape))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .method_not_allowed_fallback(async || Problem::method("only GET"))
}

/// Where all ordinary places are taken.
pub(crate) fn spare(app: Arc<App>) -> Router {
    let full = async || {
        let problem = Problem::too_many("too many connections; only /healthz, /readyz and /metrics are answered now");
        Problem { retry_after: Some(5), ..problem }
    };
    pages().fallback(full).with_state(app)
}

pub(crate) fn router(app: Arc<App>) -> Router {
    pages()
        .fallback(async || {
            Problem::not_found("no such page; there are /metrics, /healthz, /readyz and, with admin.catalog, /v1")
        })
        .with_state(app)
}

async fn scrape(State(app): State<Arc<App>>) -> Response {
    match tokio::time::timeout(SCRAPE_LIMIT, collect(app)).await {
        Ok(Some(text)) => ([(header::CONTENT_TYPE, PROMETHEUS_TEXT)], text).into_response(),
        Ok(None) => (StatusCode::INTERNAL_SERVER_ERROR, "the scrape failed\n").into_response(),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "the scrape took too long\n").into_response(),
    }
}

async fn collect(app: Arc<App>) -> Option<String> {
    let _one = app.scraping.lock().await;
    let work = Arc::clone(&app);
    // With thousands of pools this takes milliseconds: too long for a thread that carries sessions.
    tokio::task::spawn_blocking(move || {
        work.status.set_catalog(work.plane.as_ref().map(|plane| plane.is_within_reach()));
        let followed = work.plane.as_ref().map(|plane| plane.followed()).unwrap_or_default();
        metrics::publish(&*work.view, &work.status, &work.fences, &followed);
        work.recorder.render()
    })
    .await
    .ok()
}

async fn ready(State(app): State<Arc<App>>) -> (StatusCode, &'static str) {
    if app.status.draining() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining\n")
    } else if app.view.is_ready() {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "starting\n")
    }
}
