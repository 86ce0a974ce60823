//! What can be looked at besides tenants and jobs.

use axum::{
    Extension, Json,
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};

use tenantry_config::TenantState;
use tenantry_proxy::directory::ClientSnapshot;

use super::{
    Plane, Shared,
    body::{Asked, At},
    find, page,
    problem::{Answer, Errors, Problem},
    types::{ClientQuery, ClientView, Explained, Page, PageQuery, ServerView, Why},
};
use crate::{
    catalog::{
        audit::{AuditChain, AuditRow},
        store::ArchiveRow,
    },
    plane::ControlPlane,
};

const MOST_CLIENTS_ON_A_PAGE: u32 = 1_000;

/// The servers of the settings, and what is used of them.
#[utoipa::path(get, path = "/v1/servers", operation_id = "list_servers", responses((status = 200, body = Page<ServerView>), Errors))]
pub async fn servers(State(plane): Plane, Extension(shared): Extension<Shared>) -> Answer<Json<Page<ServerView>>> {
    let items = shared.aside(move || server_views(&plane)).await?;
    Ok(Json(Page { items, next: None }))
}

fn server_views(plane: &ControlPlane) -> Vec<ServerView> {
    let (file, (merged, _)) = (plane.file(), plane.known().merge(&plane.file()));
    let live = plane.data.snapshot();
    let view = |(name, server): (&String, &tenantry_config::Server)| {
        let now = live.servers.iter().find(|now| now.name == *name);
        let tenants = || merged.tenants.values().filter(|tenant| tenant.server == *name);
        ServerView {
            name: name.clone(),
            connections: now.map_or(0, |now| now.held),
            cap: now.map_or(0, |now| now.cap),
            tenants: tenants().count(),
            floors: tenants().map(|tenant| u64::from(tenant.floor)).sum(),
            has_control: server.control.is_some(),
        }
    };
    file.servers.iter().map(view).collect()
}

/// Archives, the newest first.
#[utoipa::path(get, path = "/v1/archives", operation_id = "list_archives", params(PageQuery),
    responses((status = 200, body = Page<ArchiveRow>), Errors))]
pub async fn archives(
    State(plane): Plane,
    Asked(PageQuery { after, limit }): Asked<PageQuery>,
) -> Answer<Json<Page<ArchiveRow>>> {
    let limit = page::size(limit)?;
    let rows = plane.catalog.archives_before(page::number(after)?, page::and_one(limit)).await?;
    let (items, next) = page::cut(rows, limit, |row| row.id.to_string());
    Ok(Json(Page { items, next }))
}

/// Who wanted what, and what came of it, the newest first.
#[utoipa::path(get, path = "/v1/audit", operation_id = "list_audit", params(PageQuery),
    responses((status = 200, body = Page<AuditRow>), Errors))]
pub async fn audit(
    State(plane): Plane,
    Asked(PageQuery { after, limit }): Asked<PageQuery>,
) -> Answer<Json<Page<AuditRow>>> {
    let limit = page::size(limit)?;
    let rows = plane.catalog.audit_rows(page::number(after)?, page::and_one(limit)).await?;
    let (items, next) = page::cut(rows, limit, |row| row.id.to_string());
    Ok(Json(Page { items, next }))
}

/// Whether a row of the audit log was changed or taken out since it was written.
#[utoipa::path(get, path = "/v1/audit/verify", operation_id = "verify_audit",
    responses((status = 200, body = AuditChain), Errors))]
pub async fn verify_audit(State(plane): Plane) -> Answer<Json<AuditChain>> {
    Ok(Json(plane.catalog.verify_audit().await?))
}

/// Why a tenant's clients wait, or would: which limit, how long, how many before.
#[utoipa::path(get, path = "/v1/explain/{tenant}", operation_id = "explain_tenant", params(("tenant" = String, Path)),
    responses((status = 200, body = Explained), Errors))]
pub async fn explain(State(plane): Plane, At(name): At) -> Answer<Json<Explained>> {
    let (merged, _) = plane.known().merge(&plane.file());
    let explained = plane.data.explain(&name);
    // A database of `[tenants."*"]` is in no settings; it is there once somebody uses it.
    let state = match merged.tenants.get(name.as_str()) {
        Some(tenant) => tenant.standing.state,
        None if !explained.is_empty() => TenantState::Active,
        None => return Err(Problem::not_found("no tenant of that name")),
    };
    let why = |(role, now): (String, tenantry_proxy::pool::explain::Explanation)| Why {
        role,
        blocked: now.blocked.as_str().to_owned(),
        remedy: now.blocked.remedy().to_owned(),
        ahead: now.ahead,
        waiting: now.waiting,
        waited_ms: now.waited,
        connections: now.size,
        pool_size: now.pool_size,
        held: now.held,
        ceiling: (now.ceiling < u32::MAX).then_some(now.ceiling),
        permits: now.permits,
        cap: now.cap,
    };
    let roles = explained.into_iter().map(why).collect();
    Ok(Json(Explained { tenant: name, state: state.to_string(), roles }))
}

/// A tenant's clients in the process that is asked, the oldest first: what each does, and why it keeps its server connection.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/clients", operation_id = "list_clients",
    params(("tenant" = String, Path), ClientQuery), responses((status = 200, body = Page<ClientView>), Errors))]
pub async fn clients(
    State(plane): Plane,
    Extension(shared): Extension<Shared>,
    At(name): At,
    Asked(ClientQuery { after, limit, pinned }): Asked<ClientQuery>,
) -> Answer<Json<Page<ClientView>>> {
    let (limit, after) = (page::size_to(MOST_CLIENTS_ON_A_PAGE, limit)?, page::number_before(after)?);
    let found = shared.aside(move || clients_of(&plane, &name)).await??;
    let wanted = found.into_iter().filter(|client| client.id > after && !(pinned && client.pins.is_empty()));
    let some = wanted.take(limit + 1).map(ClientView::from).collect();
    let (items, next) = page::cut(some, limit, |client| client.id.to_string());
    Ok(Json(Page { items, next }))
}

fn clients_of(plane: &ControlPlane, name: &str) -> Answer<Vec<ClientSnapshot>> {
    let number = plane.known().tenant(name).map(|entry| entry.number);
    match plane.data.clients(name, number) {
        Some(clients) => Ok(clients),
        // The data plane has none whose server is not in the settings.
        None if number.is_some() || plane.file().tenants.contains_key(name) => Ok(Vec::new()),
        None => Err(find(plane, name).map_or_else(|problem| problem, |_| Problem::not_found("no tenant of that name"))),
    }
}

/// The registry of databases as a Markdown table.
#[utoipa::path(get, path = "/v1/registry.md", operation_id = "registry",
    responses((status = 200, content_type = "text/markdown", body = String), Errors))]
pub async fn registry(State(plane): Plane) -> Response {
    let mut text = "| Database | Application | Owner | Stage | Deployed | Server | State | Floor | Ceiling |\n\
                    |---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    for entry in &plane.known().tenants {
        let cell = |value: &Option<String>| value.as_deref().unwrap_or("").replace('|', "\\|");
        let spec = &entry.spec;
        let ceiling = spec.ceiling.map_or_else(String::new, |ceiling| ceiling.to_string());
        text.push_str(&format!(
            "| {} | {} | {} | {} | {} | {} | {} | {} | {ceiling} |\n",
            entry.name,
            cell(&spec.application),
            cell(&spec.owner),
            cell(&spec.stage),
            cell(&spec.deployed),
            entry.server,
            entry.state,
            spec.floor,
        ));
    }
    ([(header::CONTENT_TYPE, "text/markdown; charset=utf-8")], text).into_response()
}
