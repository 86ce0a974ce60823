//! `/v1`: what may be asked and changed over HTTP.
//!
//! What always holds: nothing here changes anything before the audit log has it; no handler touches PostgreSQL but through the
//! catalog and the jobs; every error is a problem document.

mod adopt;
pub mod auth;
mod begin;
mod body;
mod check;
mod follow;
mod import;
mod jobs;
mod lists;
mod moves;
mod page;
pub mod problem;
mod rollout_events;
pub mod rollouts;
mod tenants;
pub mod tokens;
pub mod types;

use std::sync::Arc;

use axum::{
    Extension, Router,
    http::{HeaderValue, header},
    middleware,
    response::{IntoResponse, Response},
    routing::get,
};
use tenantry_config::TenantState;
use tokio::sync::{Mutex, Semaphore};
use utoipa::{
    Modify, OpenApi,
    openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
};
use utoipa_axum::{router::OpenApiRouter, routes};

use self::{
    auth::{Caller, Door},
    body::Inputs,
    problem::{Answer, Problem},
    types::{Address, Live, TenantView},
};
use crate::{catalog::model::Entry, plane::ControlPlane};

type Plane = axum::extract::State<Arc<ControlPlane>>;
type Who = axum::Extension<Caller>;

#[derive(OpenApi)]
#[openapi(
    info(title = "Tenantry", description = "Tenants of PostgreSQL: made, renamed, paused, archived and restored by one call.\n\n\
        What begins a job takes an `Idempotency-Key`: the same request with the same key, also at the same time, is answered \
        with the same job, for a day; passwords are told once. A parameter or an `Idempotency-Key` that an operation does not have \
        here is refused with 422, never passed over. Requests are limited per token (100 a second) and over all tokens \
        (400 a second)."),
    modifiers(&Bearer),
    security(("bearer" = []))
)]
struct Document;

struct Bearer;

impl Modify for Bearer {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some("`tenantry token create` makes one."))
            .build();
        document.components.get_or_insert_default().add_security_scheme("bearer", SecurityScheme::Http(scheme));
    }
}

fn operations() -> OpenApiRouter<Arc<ControlPlane>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(lists::servers))
        .routes(routes!(tenants::list, tenants::create))
        .routes(routes!(tenants::show, tenants::update, tenants::delete))
        .routes(routes!(lists::clients))
        .routes(routes!(adopt::adopt))
        .routes(routes!(tenants::rename))
        .routes(routes!(tenants::pause))
        .routes(routes!(tenants::resume))
        .routes(routes!(tenants::drain))
        .routes(routes!(tenants::suspend))
        .routes(routes!(tenants::wake))
        .routes(routes!(tenants::archive))
        .routes(routes!(tenants::restore))
        .routes(routes!(tenants::rotate))
        .routes(routes!(tenants::separate))
        .routes(routes!(moves::move_tenant))
        .routes(routes!(moves::rollback))
        .routes(routes!(moves::confirm))
        .routes(routes!(import::import))
        .routes(routes!(jobs::list))
        .routes(routes!(jobs::show))
        .routes(routes!(jobs::events))
        .routes(routes!(jobs::cancel))
        .routes(routes!(rollouts::list, rollouts::create))
        .routes(routes!(rollouts::show))
        .routes(routes!(rollout_events::events))
        .routes(routes!(rollouts::resume))
        .routes(routes!(rollouts::cancel))
        .routes(routes!(rollouts::outcomes))
        .routes(routes!(lists::archives))
        .routes(routes!(lists::audit))
        .routes(routes!(lists::verify_audit))
        .routes(routes!(tokens::list, tokens::create))
        .routes(routes!(tokens::delete))
        .routes(routes!(lists::explain))
        .routes(routes!(lists::registry))
}

/// The document, as it is served.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    operations().split_for_parts().1
}

/// `/v1` and `/openapi.json`.
pub fn router(plane: Arc<ControlPlane>) -> Router {
    let (router, document) = operations().split_for_parts();
    let inputs = Inputs::of(&serde_json::to_value(&document).unwrap_or_default());
    let document: Arc<str> = document.to_json().unwrap_or_default().into();
    let door = Door::new(Arc::clone(&plane), inputs);
    router
        .method_not_allowed_fallback(async || {
            Problem::method("nothing is done here with that method; see /openapi.json")
        })
        .route_layer(Extension(Shared::default()))
        .route_layer(middleware::from_fn_with_state(door, auth::guard))
        .with_state(plane)
        .route("/openapi.json", get(async move || ([(header::CONTENT_TYPE, "application/json")], document.to_string())))
}

/// Followers of jobs and rollouts at once: each keeps a connection, and asks the catalog a few times a second.
const MAX_STREAMS: usize = 16;

/// Files that are uploaded at once: each may be as large as `admin.max_import_size`.
const MAX_UPLOADS: usize = 4;

/// What requests share.
#[derive(Clone)]
struct Shared {
    streams: Arc<Semaphore>,
    /// One at a time, of what looks at every tenant or pool.
    aside: Arc<Mutex<()>>,
    /// Files that are being uploaded.
    uploads: Arc<Semaphore>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            streams: Arc::new(Semaphore::new(MAX_STREAMS)),
            aside: Arc::default(),
            uploads: Arc::new(Semaphore::new(MAX_UPLOADS)),
        }
    }
}

impl Shared {
    /// With thousands of tenants it takes milliseconds: too long for a thread that carries sessions.
    async fn aside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Answer<T> {
        let _one = self.aside.lock().await;
        tokio::task::spawn_blocking(work).await.map_err(|_| Problem::internal("the look at all tenants failed"))
    }
}

/// A tenant of the catalog, by name; a tenant of the file and one that is not there are different errors.
fn find(plane: &ControlPlane, name: &str) -> Answer<Entry> {
    let known = plane.known();
    if let Some(entry) = known.tenant(name) {
        return Ok(entry.clone());
    }
    if plane.file().tenants.contains_key(name) {
        return Err(Problem::wrong_state(format!("{name} is written in the settings file; change it there")));
    }
    let alias = known.tenants.iter().find(|entry| entry.aliases.iter().any(|alias| alias == name));
    Err(Problem::not_found(match alias {
        Some(entry) => format!("no tenant of that name; it is called {} now", entry.name),
        None => "no tenant of that name".to_owned(),
    }))
}

/// Where clients reach Tenantry.
fn address(plane: &ControlPlane) -> Address {
    let file = plane.file();
    if let Some((host, port)) = file.admin.public_address.as_deref().and_then(|at| at.rsplit_once(':')) {
        return Address { host: host.trim_matches(['[', ']']).to_owned(), port: port.parse().unwrap_or(6432) };
    }
    let bound = plane.data.addresses().first().copied();
    bound.map_or_else(
        || Address { host: "127.0.0.1".to_owned(), port: 6432 },
        |at| Address { host: at.ip().to_string(), port: at.port() },
    )
}

fn live(plane: &ControlPlane, name: &str, number: Option<i64>) -> Option<Live> {
    let activity = plane.data.activity(name, number)?;
    Some(Live {
        clients: activity.clients,
        waiting: activity.waiting,
        active: activity.active,
        connections: activity.connections,
        pinned: activity.pinned,
    })
}

fn view(plane: &ControlPlane, entry: &Entry) -> TenantView {
    view_with(plane, entry, live(plane, &entry.name, Some(entry.number)))
}

fn view_with(plane: &ControlPlane, entry: &Entry, live: Option<Live>) -> TenantView {
    // A suspended tenant wakes by itself.
    let mut view = TenantView::of(entry, address(plane), live);
    if entry.state == TenantState::Suspended && view.live.as_ref().is_some_and(|live| live.connections > 0) {
        view.state = TenantState::Active.to_string();
    }
    view
}

/// With the version that `If-Match` wants back.
fn tagged(version: i64, body: impl IntoResponse) -> Response {
    let mut response = body.into_response();
    if let Ok(tag) = HeaderValue::from_str(&format!("\"{version}\"")) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    response
}
