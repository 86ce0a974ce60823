//! Operations on tenants. What takes more than one statement becomes a job; the rest is done before the answer.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{Path, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use rand::{Rng, distr::Alphanumeric};
use serde::Serialize;
use serde_json::{Value, json};
use tenantry_config::{RoleSecret, Secret, TenantEvent, TenantState};
use tenantry_wire::scram;
use zeroize::Zeroizing;

use super::{
    Plane, Who, address,
    auth::Caller,
    body::{Body, Conditions, MaybeBody, Version},
    check, find, live,
    problem::{Answer, Errors, Problem},
    tagged,
    types::{
        Adopt, Begun, Create, Credentials, Deadline, Delete, DryRun, JobView, Nothing, Page, PageQuery, Rename,
        Restore, Rotate, Separate, TenantView, Update,
    },
    view,
};
use crate::{
    catalog::{
        CatalogError,
        disk::hex,
        model::{Entry, RoleRow, Verifier},
        store::{Changed, JobRow, NewTenant},
    },
    control,
    jobs::work::{JobState, Stored, Work},
    plane::ControlPlane,
    sql,
};

const PASSWORD_CHARACTERS: usize = 32;
const MOST_ON_A_PAGE: u32 = 500;
/// `next` is never longer.
pub(super) const MAX_AFTER: usize = 64;
/// Between two looks at a job or a tenant that somebody waits for.
const LOOK: Duration = Duration::from_millis(100);

/// Every tenant, by name.
#[utoipa::path(get, path = "/v1/tenants", operation_id = "list_tenants", params(PageQuery),
    responses((status = 200, body = Page<TenantView>), Errors))]
pub async fn list(
    State(plane): Plane,
    query: Result<Query<PageQuery>, axum::extract::rejection::QueryRejection>,
) -> Answer<Json<Page<TenantView>>> {
    let Query(PageQuery { after, limit }) = query.map_err(|error| Problem::invalid(error.body_text()))?;
    let limit = page(limit)?;
    if after.as_ref().is_some_and(|after| after.len() > MAX_AFTER) {
        return Err(Problem::invalid("after: must be `next` of the page before"));
    }
    let (file, known) = (plane.file(), plane.known());
    let mut all: Vec<TenantView> = known.tenants.iter().map(|entry| view(&plane, entry)).collect();
    let of_file = file
        .tenants
        .iter()
        .map(|(id, t)| TenantView::of_file(id.as_str(), t, address(&plane), live(&plane, id.as_str(), None)));
    all.retain(|view| !file.tenants.contains_key(view.name.as_str()));
    all.extend(of_file);
    all.sort_by(|a, b| a.name.cmp(&b.name));
    let mut items: Vec<_> =
        all.into_iter().filter(|view| after.as_ref().is_none_or(|after| view.name > *after)).take(limit + 1).collect();
    let is_more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| is_more).map(|view| view.name.clone());
    Ok(Json(Page { items, next }))
}

pub(super) fn page(limit: Option<u32>) -> Answer<usize> {
    match limit.unwrap_or(100) {
        limit @ 1..=MOST_ON_A_PAGE => Ok(usize::try_from(limit).unwrap_or(1)),
        _ => Err(Problem::invalid(format!("limit: must be 1 to {MOST_ON_A_PAGE}"))),
    }
}

/// One tenant, with what goes on in it.
#[utoipa::path(get, path = "/v1/tenants/{tenant}", operation_id = "show_tenant", params(("tenant" = String, Path)),
    responses((status = 200, body = TenantView, headers(("etag" = String))), Errors))]
pub async fn show(State(plane): Plane, Path(name): Path<String>) -> Answer<Response> {
    let known = plane.known();
    if let Some(entry) = known.tenant(&name) {
        return Ok(tagged(entry.version, Json(view(&plane, entry))));
    }
    match plane.file().tenants.get(name.as_str()) {
        Some(tenant) => {
            Ok(tagged(0, Json(TenantView::of_file(&name, tenant, address(&plane), live(&plane, &name, None)))))
        }
        None => find(&plane, &name).map(|entry| tagged(entry.version, Json(view(&plane, &entry)))),
    }
}

/// A new tenant: a role, a database, a budget, a route. The password is in this answer and nowhere else.
#[utoipa::path(post, path = "/v1/tenants", operation_id = "create_tenant", request_body = Create,
    params(DryRun, ("Idempotency-Key" = Option<String>, Header), ("Prefer" = Option<String>, Header, description = "wait=SECONDS or respond-async")),
    responses((status = 201, body = Begun), (status = 202, body = Begun), (status = 200, body = Begun, description = "dry run"), Errors))]
pub async fn create(
    State(plane): Plane,
    who: Who,
    conditions: Conditions,
    dry: Result<Query<DryRun>, axum::extract::rejection::QueryRejection>,
    Body(wish): Body<Create>,
) -> Answer<Response> {
    let is_dry = dry.map_err(|error| Problem::invalid(error.body_text()))?.dry_run;
    let (file, known) = (plane.file(), plane.known());
    let hash = fingerprint("create", &wish.name, &wish);
    if let Some(begun) = repeated(&plane, &who, &conditions, &hash).await? {
        return answer(&plane, begun, None, StatusCode::CREATED, conditions.wait).await;
    }
    check::new_name(&wish.name, &file, &known, None)?;
    let server = check::server(wish.server.as_deref(), &file)?;
    let mut spec = wish.spec.clone();
    for (name, value) in check::DEFAULTS {
        spec.settings.entry(name.to_owned()).or_insert_with(|| value.to_owned());
    }
    check::spec(&spec, &server, &file, &known, None, plane.data.slots(&server))?;
    let (role, password) = match &wish.shared_role {
        Some(shared) => (shared_role(&plane, shared)?, None),
        None => {
            let password = password();
            let verifier = verifier(&password, file.auth.scram_iterations.get()).await?;
            (RoleRow { name: wish.name.clone(), verifier: Some(verifier), ours: true }, Some(password))
        }
    };
    let archive = match wish.archive {
        None => None,
        Some(id) => Some(stored(&plane, None, Some(id)).await?),
    };
    if archive.is_some() && !spec.extensions.is_empty() {
        return Err(Problem::invalid("extensions: an archive brings its own; leave them out"));
    }
    let work = Work::Create { role: role.clone(), archive };
    if is_dry {
        let begun = Begun { job: None, steps: work.plan(), tenant: None, credentials: None };
        return Ok((StatusCode::OK, Json(begun)).into_response());
    }
    let new = NewTenant {
        name: wish.name.clone(),
        state: TenantState::Creating,
        server,
        database: wish.name.clone(),
        owner_role: role.name.clone(),
        spec,
        roles: vec![role.clone()],
    };
    let job = audited(&plane, &who, "create", Some(&wish.name), json!(wish), async {
        let key = conditions.key.as_deref().map(|key| (key, hash.as_str()));
        let (_, job) = plane.catalog.insert_tenant(&new, Some(&work), &who.asker, key).await.map_err(taken)?;
        job.ok_or_else(|| Problem::internal("the job was not written down"))
    })
    .await?;
    plane.new_job.notify_one();
    let credentials = password.map(|password| credentials(&plane, &wish.name, &role.name, &password));
    answer(&plane, job, credentials, StatusCode::CREATED, conditions.wait).await
}

/// An existing database and role become a tenant; clients notice nothing.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/adopt", operation_id = "adopt_tenant", request_body = Adopt,
    params(("tenant" = String, Path)), responses((status = 201, body = TenantView), Errors))]
pub async fn adopt(
    State(plane): Plane,
    who: Who,
    Path(name): Path<String>,
    Body(wish): Body<Adopt>,
) -> Answer<Response> {
    let (file, known) = (plane.file(), plane.known());
    check::new_name(&name, &file, &known, None)?;
    let server = check::server(wish.server.as_deref(), &file)?;
    check::spec(&wish.spec, &server, &file, &known, None, plane.data.slots(&server))?;
    let database = wish.database.clone().unwrap_or_else(|| name.clone());
    let (at, control) = plane.server_of(&file, &server)?;
    let client = control::connect(at, control).await.map_err(crate::lifecycle::StepError::from)?;
    let found = client.query_opt(sql::DATABASE, &[&database]).await.map_err(crate::lifecycle::StepError::from)?;
    let owner: String = match &found {
        Some(row) => row.get(1),
        None => return Err(Problem::invalid("database: there is none of that name on the server")),
    };
    let role = wish.role.clone().unwrap_or_else(|| owner.clone());
    let given = wish.verifier.clone().or_else(|| {
        let rows = known.tenants.iter().filter(|entry| entry.server == server).flat_map(|entry| &entry.roles);
        rows.into_iter().find(|row| row.name == role)?.verifier.as_ref().map(|verifier| verifier.0.clone())
    });
    let stored = match given {
        Some(given) => Some(given),
        None => match client.query_opt(sql::STORED_VERIFIER, &[&role]).await {
            Ok(row) => row.and_then(|row| row.get(0)),
            // Only a superuser may look.
            Err(_) => None,
        },
    };
    let in_file = file.roles.iter().any(|shared| shared.name == role);
    let verifier = match stored.map(|text| RoleSecret::classify(Secret::new(text))) {
        Some(Ok(RoleSecret::Scram(secret))) => Some(Verifier(secret.expose().to_owned())),
        None if in_file => None,
        _ => {
            return Err(Problem::invalid(
                "verifier: give the role's SCRAM verifier (pg_authid.rolpassword); the control role may not read it",
            ));
        }
    };
    let row = RoleRow { name: role, verifier, ours: false };
    let shown = json!({ "server": server, "database": database, "role": row.name });
    let new = NewTenant {
        name: name.clone(),
        state: TenantState::Active,
        server,
        database,
        owner_role: owner,
        spec: wish.spec,
        roles: vec![row],
    };
    audited(&plane, &who, "adopt", Some(&name), shown, async {
        plane.catalog.insert_tenant(&new, None, &who.asker, None).await.map_err(taken)?;
        Ok(plane.refresh().await?)
    })
    .await?;
    let entry = find(&plane, &name)?;
    Ok((StatusCode::CREATED, tagged(entry.version, Json(view(&plane, &entry)))).into_response())
}

/// Changes what is said about a tenant: budget, mode, owner, stage.
#[utoipa::path(patch, path = "/v1/tenants/{tenant}", operation_id = "update_tenant", request_body = Update,
    params(("tenant" = String, Path), ("If-Match" = Option<String>, Header)),
    responses((status = 200, body = TenantView, headers(("etag" = String))), Errors))]
pub async fn update(
    State(plane): Plane,
    who: Who,
    Path(name): Path<String>,
    conditions: Conditions,
    Body(wish): Body<Update>,
) -> Answer<Response> {
    let entry = find(&plane, &name)?;
    required(&conditions)?;
    let mut spec = entry.spec.clone();
    wish.apply(&mut spec);
    let slots = plane.data.slots(&entry.server);
    check::spec(&spec, &entry.server, &plane.file(), &plane.known(), Some(entry.number), slots)?;
    let entry = change(&plane, &who, "update", &entry, json!(wish), |e| {
        same_version(&conditions, e)?;
        wish.apply(&mut e.spec);
        Ok(())
    })
    .await?;
    Ok(tagged(entry.version, Json(view(&plane, &entry))))
}

/// Drops a tenant's database, and the roles that were made for it.
#[utoipa::path(delete, path = "/v1/tenants/{tenant}", operation_id = "delete_tenant", request_body = Delete,
    params(("tenant" = String, Path), DryRun, ("If-Match" = Option<String>, Header), ("Idempotency-Key" = Option<String>, Header), ("Prefer" = Option<String>, Header)),
    responses((status = 200, body = Begun), (status = 202, body = Begun), Errors))]
pub async fn delete(
    State(plane): Plane,
    who: Who,
    Path(name): Path<String>,
    conditions: Conditions,
    dry: Result<Query<DryRun>, axum::extract::rejection::QueryRejection>,
    Body(wish): Body<Delete>,
) -> Answer<Response> {
    let states = [
        TenantState::Active,
        TenantState::Paused,
        TenantState::Suspended,
        TenantState::Draining,
        TenantState::Drained,
        TenantState::Archived,
    ];
    let job = Begin { plane: &plane, who: &who, name: &name, conditions: &conditions, dry, states: &states };
    if wish.confirm != name {
        find(&plane, &name)?;
        return Err(Problem::invalid("confirm: must be the tenant's name"));
    }
    required(&conditions)?;
    if !wish.without_archive && find(&plane, &name).is_ok_and(|entry| entry.state != TenantState::Archived) {
        return Err(Problem::wrong_state("archive it first, or say without_archive: true"));
    }
    job.begin("delete", json!(wish), Work::Delete { deadline: wish.deadline_ms.min(LONGEST_DEADLINE) }, None).await
}

const LONGEST_DEADLINE: u64 = 3_600_000;

macro_rules! job_operation {
    ($(#[$doc:meta])* $name:ident, $path:literal, $id:literal, $doc_body:ty, $take:ident<$body:ty>, [$($state:ident),*], |$plane:ident, $entry:ident, $wish:ident| $work:expr) => {
        $(#[$doc])*
        #[utoipa::path(post, path = $path, operation_id = $id, request_body = $doc_body,
            params(("tenant" = String, Path), DryRun, ("If-Match" = Option<String>, Header), ("Idempotency-Key" = Option<String>, Header),
                ("Prefer" = Option<String>, Header, description = "wait=SECONDS or respond-async")),
            responses((status = 200, body = Begun), (status = 202, body = Begun), Errors))]
        pub async fn $name(
            State($plane): Plane,
            who: Who,
            Path(name): Path<String>,
            conditions: Conditions,
            dry: Result<Query<DryRun>, axum::extract::rejection::QueryRejection>,
            $take($wish): $take<$body>,
        ) -> Answer<Response> {
            let $entry = find(&$plane, &name)?;
            let states = [$(TenantState::$state),*];
            let shown = json!($wish);
            let (work, credentials) = $work?;
            let begin = Begin { plane: &$plane, who: &who, name: &name, conditions: &conditions, dry, states: &states };
            begin.begin(stringify!($name), shown, work, credentials).await
        }
    };
}

job_operation!(
    /// Gives a tenant, and its database if it has the same name, another name. Clients wait a moment; the old name stays as an alias.
    rename, "/v1/tenants/{tenant}/rename", "rename_tenant", Rename, Body<Rename>, [Active, Paused, Suspended], |plane, entry, wish| {
        check::new_name(&wish.to, &plane.file(), &plane.known(), Some(entry.number)).map(|()| {
            let rename_database = entry.database == entry.name;
            let (from, to) = (entry.name.clone(), wish.to.clone());
            (Work::Rename { from, to, rename_database, wait: wish.wait_ms.min(600_000) }, None)
        })
    }
);
job_operation!(
    /// Refuses new transactions, lets those under way finish, cancels and cuts what is left, and says how much that was.
    drain, "/v1/tenants/{tenant}/drain", "drain_tenant", Option<Deadline>, MaybeBody<Deadline>, [Active, Paused, Suspended], |plane, entry, wish| {
        let _ = (&plane, &entry);
        Answer::Ok((Work::Drain { deadline: wish.deadline_ms.min(LONGEST_DEADLINE) }, None))
    }
);
job_operation!(
    /// Drains, dumps, proves the dump by a restore, and only then drops the database.
    archive, "/v1/tenants/{tenant}/archive", "archive_tenant", Option<Deadline>, MaybeBody<Deadline>, [Active, Paused, Suspended, Drained], |plane, entry, wish| {
        let _ = (&plane, &entry);
        Answer::Ok((Work::Archive { deadline: wish.deadline_ms.min(LONGEST_DEADLINE) }, None))
    }
);
job_operation!(
    /// Brings an archived tenant back; its roles and passwords are what they were.
    restore, "/v1/tenants/{tenant}/restore", "restore_tenant", Option<Restore>, MaybeBody<Restore>, [Archived], |plane, entry, wish| {
        stored(&plane, Some(entry.number), wish.archive).await.map(|archive| (Work::Restore { archive }, None))
    }
);
job_operation!(
    /// A new password for one of a tenant's roles.
    rotate, "/v1/tenants/{tenant}/rotate", "rotate_credentials", Option<Rotate>, MaybeBody<Rotate>, [Active, Paused, Suspended, Drained], |plane, entry, wish| {
        let role = wish.role.clone().unwrap_or_else(|| entry.owner_role.clone());
        if entry.roles.iter().any(|row| row.name == role && row.ours) {
            let password = password();
            let verifier = verifier(&password, plane.file().auth.scram_iterations.get()).await?;
            let credentials = credentials(&plane, &entry.name, &role, &password);
            Ok((Work::Rotate { role, verifier }, Some(credentials)))
        } else {
            Err(Problem::invalid("role: the tenant has none of that name that Tenantry made"))
        }
    }
);

job_operation!(
    /// Gives a tenant that shares a role with others one of its own, which owns its database from then on. The shared role goes
    /// on working, as a member of the new one, until `finish`.
    separate, "/v1/tenants/{tenant}/separate", "separate_tenant", Option<Separate>, MaybeBody<Separate>, [Active, Paused, Suspended], |plane, entry, wish| {
        let is_shared = |role: &str| entry.roles.iter().any(|row| row.name == role && !row.ours);
        let shared = || entry.roles.iter().map(|row| row.name.clone()).filter(|role| is_shared(role) && *role != entry.owner_role);
        if wish.finish {
            match shared().collect::<Vec<_>>() {
                roles if roles.is_empty() || is_shared(&entry.owner_role) => {
                    Err(Problem::wrong_state("it has no role of its own beside a shared one; separate it first"))
                }
                roles => Ok((Work::Retire { roles }, None)),
            }
        } else if !is_shared(&entry.owner_role) {
            Err(Problem::wrong_state("its database is not owned by a role that it shares"))
        } else {
            let role = wish.role.clone().unwrap_or_else(|| entry.name.clone());
            check::role_name(&role)?;
            let password = password();
            let verifier = verifier(&password, plane.file().auth.scram_iterations.get()).await?;
            let credentials = credentials(&plane, &entry.name, &role, &password);
            let role = RoleRow { name: role, verifier: Some(verifier), ours: true };
            let work = Work::Separate { role, old: entry.owner_role.clone(), wait: wish.wait_ms.min(600_000) };
            Ok((work, Some(credentials)))
        }
    }
);

macro_rules! state_operation {
    ($(#[$doc:meta])* $name:ident, $path:literal, $id:literal, $event:ident, $there:ident) => {
        $(#[$doc])*
        #[utoipa::path(post, path = $path, operation_id = $id, request_body = Option<Nothing>,
            params(("tenant" = String, Path), ("If-Match" = Option<String>, Header),
                ("Prefer" = Option<String>, Header, description = "wait=SECONDS or respond-async")),
            responses((status = 200, body = TenantView, headers(("etag" = String))), Errors))]
        pub async fn $name(
            State(plane): Plane,
            who: Who,
            Path(name): Path<String>,
            conditions: Conditions,
            MaybeBody(Nothing {}): MaybeBody<Nothing>,
        ) -> Answer<Response> {
            let entry = find(&plane, &name)?;
            if let Some(job) = plane.catalog.busy_with(entry.number).await? {
                return Err(Problem::busy(format!("job {job} is under way; wait for it, or cancel it")).of_job(job));
            }
            let entry = change(&plane, &who, stringify!($name), &entry, Value::Null, |e| {
                same_version(&conditions, e)?;
                if e.state != TenantState::$there {
                    e.state = e.state.next(TenantEvent::$event).map_err(|error| Problem::wrong_state(error.to_string()))?;
                }
                Ok(())
            })
            .await?;
            if matches!(entry.state, TenantState::Paused | TenantState::Suspended) {
                released(&plane, &entry, conditions.wait).await;
            }
            Ok(tagged(entry.version, Json(view(&plane, &entry))))
        }
    };
}

state_operation!(
    /// Holds new transactions. The answer comes when no server connection is left, or after `Prefer: wait`.
    pause, "/v1/tenants/{tenant}/pause", "pause_tenant", Pause, Paused
);
state_operation!(
    /// Lets transactions run again, also after a drain.
    resume, "/v1/tenants/{tenant}/resume", "resume_tenant", Resume, Active
);
state_operation!(
    /// Gives up the server connections until the next query.
    suspend, "/v1/tenants/{tenant}/suspend", "suspend_tenant", Suspend, Suspended
);
state_operation!(
    /// Ends a suspension; the next query would, too.
    wake, "/v1/tenants/{tenant}/wake", "wake_tenant", Wake, Active
);

/// What every operation that begins a job on a tenant checks.
struct Begin<'a> {
    plane: &'a Arc<ControlPlane>,
    who: &'a Caller,
    name: &'a str,
    conditions: &'a Conditions,
    dry: Result<Query<DryRun>, axum::extract::rejection::QueryRejection>,
    states: &'a [TenantState],
}

impl Begin<'_> {
    async fn begin(
        self,
        action: &'static str,
        wish: Value,
        work: Work,
        credentials: Option<Credentials>,
    ) -> Answer<Response> {
        let Self { plane, who, name, conditions, dry, states } = self;
        let is_dry = dry.map_err(|error| Problem::invalid(error.body_text()))?.dry_run;
        let hash = fingerprint(action, name, &wish);
        if let Some(job) = repeated(plane, who, conditions, &hash).await? {
            return answer(plane, job, None, StatusCode::OK, conditions.wait).await;
        }
        let entry = find(plane, name)?;
        same_version(conditions, &entry)?;
        if !states.contains(&entry.state) {
            return Err(Problem::wrong_state(format!("a tenant that is {} cannot be changed like this", entry.state)));
        }
        if is_dry {
            let tenant = Some(view(plane, &entry));
            return Ok(Json(Begun { job: None, steps: work.plan(), tenant, credentials: None }).into_response());
        }
        let job = audited(plane, who, action, Some(name), wish, async {
            let key = conditions.key.as_deref().map(|key| (key, hash.as_str()));
            match plane.catalog.insert_job(entry.number, name, &work, &who.asker, key).await {
                Err(error) if error.is_duplicate("jobs_busy") => {
                    let job = plane.catalog.busy_with(entry.number).await?;
                    let problem = Problem::busy("another job is under way; wait for it, or cancel it");
                    Err(Problem { job, ..problem })
                }
                other => other.map_err(taken),
            }
        })
        .await?;
        plane.new_job.notify_one();
        answer(plane, job, credentials, StatusCode::OK, conditions.wait).await
    }
}

/// Waits for the job as long as the asker likes, and says how it stands.
async fn answer(
    plane: &Arc<ControlPlane>,
    job: i64,
    credentials: Option<Credentials>,
    done: StatusCode,
    wait: Duration,
) -> Answer<Response> {
    let row = await_job(plane, job, wait).await?;
    if matches!(row.state, JobState::Failed | JobState::Cancelled) {
        let why = row.error.clone().unwrap_or_else(|| "it was cancelled".to_owned());
        return Err(Problem::job_failed(why).of_job(job));
    }
    let is_over = row.state.is_over();
    if is_over && plane.known().tenants.iter().all(|entry| entry.number != row.tenant) {
        // It was run by another process, or is a tombstone now.
        plane.refresh().await?;
    }
    let tenant = plane.known().tenants.iter().find(|entry| entry.number == row.tenant).map(|entry| view(plane, entry));
    let begun = Begun { steps: row.work.plan(), job: Some(row.into()), tenant, credentials };
    let status = if is_over { done } else { StatusCode::ACCEPTED };
    let location = begun.job.as_ref().map_or_else(String::new, |job: &JobView| format!("/v1/jobs/{}", job.id));
    Ok((status, [(axum::http::header::LOCATION, location)], Json(begun)).into_response())
}

async fn await_job(plane: &ControlPlane, job: i64, wait: Duration) -> Answer<JobRow> {
    let deadline = tokio::time::Instant::now() + wait;
    loop {
        let over = plane.job_over.notified();
        let row = plane.catalog.job(job).await?.ok_or_else(|| Problem::internal("the job is gone"))?;
        if row.state.is_over() || tokio::time::Instant::now() >= deadline {
            return Ok(row);
        }
        tokio::select! {
            () = over => {}
            // It may run in another process.
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

async fn released(plane: &ControlPlane, entry: &Entry, wait: Duration) {
    let released = async {
        let activity = || plane.data.activity(&entry.name, Some(entry.number));
        while activity().is_some_and(|activity| activity.connections > 0) {
            tokio::time::sleep(LOOK / 10).await;
        }
    };
    let _ = tokio::time::timeout(wait, released).await;
}

/// The job that the same key began before.
async fn repeated(plane: &ControlPlane, who: &Caller, conditions: &Conditions, hash: &str) -> Answer<Option<i64>> {
    let Some(key) = &conditions.key else { return Ok(None) };
    match plane.catalog.idempotent(&who.asker.actor, key).await? {
        None => Ok(None),
        Some((known, job)) if known == hash => Ok(job),
        Some(_) => Err(Problem::invalid("Idempotency-Key: was used for another request; take a new one")),
    }
}

fn fingerprint(action: &str, name: &str, wish: &impl Serialize) -> String {
    use sha2::{Digest, Sha256};
    hex(&Sha256::digest(format!("{action}\0{name}\0{}", json!(wish)).as_bytes()))
}

/// A change of one row, in the audit log before and after.
async fn change(
    plane: &ControlPlane,
    who: &Caller,
    action: &'static str,
    entry: &Entry,
    wish: Value,
    edit: impl FnOnce(&mut Entry) -> Answer<()> + Send,
) -> Answer<Entry> {
    audited(plane, who, action, Some(&entry.name), wish, async {
        let after = match plane.catalog.change_tenant(entry.number, edit).await? {
            Changed::Done { after, .. } => *after,
            Changed::Refused(problem) => return Err(problem),
            Changed::Gone => return Err(Problem::not_found("no tenant of that name")),
        };
        plane.refresh().await?;
        Ok(after)
    })
    .await
}

/// Nothing is done before the log has the intent; the outcome follows.
pub(super) async fn audited<T>(
    plane: &ControlPlane,
    who: &Caller,
    action: &str,
    tenant: Option<&str>,
    wish: Value,
    work: impl Future<Output = Answer<T>>,
) -> Answer<T> {
    let version = tenant.and_then(|name| plane.known().tenant(name).map(|entry| json!({ "version": entry.version })));
    plane.catalog.audit(&who.asker, action, tenant, "intent", (version, Some(wish))).await?;
    let outcome = work.await;
    let word = outcome.as_ref().err().map_or("done", Problem::word);
    if let Err(error) = plane.catalog.audit(&who.asker, action, tenant, word, (None, None)).await {
        tracing::error!(%error, request = %who.asker.request, "the outcome of a change is not in the audit log");
    }
    outcome
}

fn required(conditions: &Conditions) -> Answer<()> {
    match conditions.version {
        Some(_) => Ok(()),
        None => Err(Problem::no_version("send If-Match with the tenant's ETag, so that nobody's change is lost; or *")),
    }
}

fn same_version(conditions: &Conditions, entry: &Entry) -> Answer<()> {
    match conditions.version {
        Some(Version::Is(version)) if version != entry.version => {
            Err(Problem::changed(format!("the tenant is of version {} now; look again", entry.version)))
        }
        _ => Ok(()),
    }
}

fn taken(error: CatalogError) -> Problem {
    if error.is_taken() {
        Problem::exists("another tenant has that name or database")
    } else if error.is_duplicate("idempotency_pkey") {
        Problem::busy("a request with the same Idempotency-Key is under way")
    } else {
        error.into()
    }
}

/// An archive by its number; the newest without one.
async fn stored(plane: &ControlPlane, tenant: Option<i64>, id: Option<i64>) -> Answer<Stored> {
    let archives = plane.catalog.archives(tenant).await?;
    let found = archives.into_iter().find(|archive| id.is_none_or(|id| id == archive.id));
    let found = found.ok_or_else(|| Problem::invalid("archive: there is none of that number"))?;
    Ok(Stored { id: found.id, path: found.path, sha256: found.sha256 })
}

/// A role that other tenants have, or the settings file.
fn shared_role(plane: &ControlPlane, name: &str) -> Answer<RoleRow> {
    let known = plane.known();
    let of_tenant = known.tenants.iter().flat_map(|entry| &entry.roles).find(|row| row.name == name);
    let verifier = of_tenant.and_then(|row| row.verifier.clone());
    if of_tenant.is_none() && !plane.file().roles.iter().any(|role| role.name == name) {
        return Err(Problem::invalid("shared_role: no tenant has it, and it is none of [[roles]] in the settings"));
    }
    Ok(RoleRow { name: name.to_owned(), verifier, ours: false })
}

fn password() -> Zeroizing<String> {
    Zeroizing::new(rand::rng().sample_iter(Alphanumeric).take(PASSWORD_CHARACTERS).map(char::from).collect())
}

/// Hashing is work, and not for a thread that serves.
async fn verifier(password: &Zeroizing<String>, iterations: u32) -> Answer<Verifier> {
    let (password, salt): (_, [u8; 16]) = (password.clone(), rand::random());
    let made = move || scram::Verifier::from_password(password.as_bytes(), &salt, iterations).to_pg_string();
    let made = tokio::task::spawn_blocking(made).await.map_err(|_| Problem::internal("no verifier could be made"))?;
    Ok(Verifier(made))
}

fn credentials(plane: &ControlPlane, database: &str, user: &str, password: &str) -> Credentials {
    let super::types::Address { host, port } = address(plane);
    let in_url = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    Credentials {
        url: format!("postgresql://{user}:{password}@{in_url}:{port}/{database}"),
        host,
        port,
        database: database.to_owned(),
        user: user.to_owned(),
        password: password.to_owned(),
    }
}
