//! Operations on tenants. What takes more than one statement becomes a job; the rest is done before the answer.

use std::{collections::BTreeMap, time::Duration};

use axum::{Extension, Json, extract::State, http::StatusCode, response::Response};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use rand::{Rng, distr::Alphanumeric};
use serde_json::{Value, json};
use tenantry_config::{Settings, TenantEvent, TenantState};
use tenantry_proxy::{directory::Snapshot, pool::slot::SlotState};
use tenantry_wire::scram;
use zeroize::Zeroizing;

use super::{
    Plane, Shared, Who, address,
    begin::{Begin, Once, at_rest, audited, change, deed, released, required, same_version, taken},
    body::{Asked, At, Body, Conditions, MaybeBody},
    check, find, live, page,
    problem::{Answer, Errors, Problem},
    tagged,
    types::{
        Begun, Create, Credentials, Deadline, Delete, DryRun, JobView, Live, Nothing, Page, PageQuery, Rename, Restore,
        Rotate, Separate, TenantView, Update,
    },
    view, view_with,
};
use crate::{
    catalog::{
        model::{Entry, Known, RoleRow, Verifier},
        store::{Look, NewTenant},
    },
    jobs::work::{Stored, Work},
    plane::ControlPlane,
};

const PASSWORD_CHARACTERS: usize = 32;
const LONGEST_DEADLINE: u64 = 3_600_000;
/// What a rename has left of `query_wait_timeout` once the transactions are over, for its statements.
const AFTER_THE_WAIT: Duration = Duration::from_secs(10);
/// Milliseconds.
const DEFAULT_GRACE: u64 = 3_600_000;
const LONGEST_GRACE: u64 = 7 * 24 * 3_600_000;
const DEFAULT_HOLD: Duration = Duration::from_secs(30);

/// Every tenant, by name.
#[utoipa::path(get, path = "/v1/tenants", operation_id = "list_tenants", params(PageQuery),
    responses((status = 200, body = Page<TenantView>), Errors))]
pub async fn list(
    State(plane): Plane,
    Extension(shared): Extension<Shared>,
    Asked(PageQuery { after, limit }): Asked<PageQuery>,
) -> Answer<Json<Page<TenantView>>> {
    let (limit, after) = (page::size(limit)?, page::word(after)?);
    let (items, next) = shared.aside(move || views(&plane, limit, after.as_deref())).await?;
    Ok(Json(Page { items, next }))
}

/// One page, with what goes on in its tenants as of one moment.
fn views(plane: &ControlPlane, limit: usize, after: Option<&str>) -> (Vec<TenantView>, Option<String>) {
    let (file, known) = (plane.file(), plane.known());
    let (names, next) = names(&file, &known, limit, after);
    let now = plane.data.snapshot();
    let live = going_on(&now);
    let view = |name: &str| {
        let now = Some(live.get(name).cloned().unwrap_or_default());
        match (file.tenants.get(name), known.tenant(name)) {
            (Some(tenant), _) => Some(TenantView::of_file(name, tenant, address(plane), now)),
            (None, Some(entry)) => Some(view_with(plane, entry, now)),
            (None, None) => None,
        }
    };
    (names.iter().filter_map(|name| view(name)).collect(), next)
}

fn names(file: &Settings, known: &Known, limit: usize, after: Option<&str>) -> (Vec<String>, Option<String>) {
    let of_file = file.tenants.keys().map(|id| id.as_str());
    let mut names: Vec<&str> = known.tenants.iter().map(|entry| entry.name.as_str()).chain(of_file).collect();
    names.sort_unstable();
    names.dedup();
    let rest = names.into_iter().filter(|name| after.is_none_or(|after| *name > after)).take(limit + 1);
    page::cut(rest.map(str::to_owned).collect(), limit, String::clone)
}

/// By tenant.
fn going_on(now: &Snapshot) -> BTreeMap<&str, Live> {
    let mut all: BTreeMap<&str, Live> = BTreeMap::new();
    for pool in &now.pools {
        let (live, counts) = (all.entry(pool.snapshot.tenant.as_str()).or_default(), &pool.snapshot.counts);
        live.waiting += pool.snapshot.explanation.waiting;
        live.active +=
            counts.of(SlotState::Active) + counts.of(SlotState::Resetting) + counts.of(SlotState::CancelPending);
        live.connections += counts.sum();
        live.pinned += pool.pool.pinned();
    }
    for ((tenant, _), states) in &now.sessions {
        let clients = u32::try_from(states.iter().sum::<u64>()).unwrap_or(u32::MAX);
        all.entry(tenant.as_str()).or_default().clients += clients;
    }
    all
}

/// One tenant, with what goes on in it.
#[utoipa::path(get, path = "/v1/tenants/{tenant}", operation_id = "show_tenant", params(("tenant" = String, Path)),
    responses((status = 200, body = TenantView, headers(("etag" = String))), Errors))]
pub async fn show(State(plane): Plane, At(name): At) -> Answer<Response> {
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
    Asked(dry): Asked<DryRun>,
    Body(wish): Body<Create>,
) -> Answer<Response> {
    let once = Once::new((&plane, &who, &conditions, &dry), ("create", &wish.name, &wish), StatusCode::CREATED);
    if let Some(answered) = once.before().await? {
        return Ok(answered);
    }
    let made = create_once(&once, &wish).await;
    once.after(made).await
}

async fn create_once(once: &Once<'_>, wish: &Create) -> Answer<Response> {
    let (plane, file) = (once.plane, once.plane.file());
    let server = check::server(wish.server.as_deref(), &file)?;
    let mut spec = wish.spec.clone();
    for (name, value) in check::DEFAULTS {
        spec.settings.entry(name.to_owned()).or_insert_with(|| value.to_owned());
    }
    let check = |known: &Known| {
        check::new_name(&wish.name, &file, known, None)?;
        check::spec(&spec, &server, &file, known, None, plane.data.slots(&server))
    };
    check(&plane.known())?;
    let (role, password) = match &wish.shared_role {
        Some(shared) => (shared_role(plane, &server, shared)?, None),
        None => {
            let password = password();
            let verifier = verifier(&password, file.auth.scram_iterations.get()).await?;
            (RoleRow::new(wish.name.clone(), Some(verifier), true), Some(password))
        }
    };
    let archive = match wish.archive {
        None => None,
        Some(id) => Some(stored(plane, None, Some(id)).await?),
    };
    if archive.is_some() && !spec.extensions.is_empty() {
        return Err(Problem::invalid("extensions: an archive brings its own; leave them out"));
    }
    let work = Work::Create { role: role.clone(), archive };
    if once.dry.dry_run {
        return once.planned(&work, None);
    }
    let new = NewTenant {
        name: wish.name.clone(),
        state: TenantState::Creating,
        server: server.clone(),
        database: wish.name.clone(),
        owner_role: role.name.clone(),
        spec: spec.clone(),
        roles: vec![role.clone()],
    };
    let fits = |known: &Known| {
        check(known)?;
        // A rotation may have come between.
        let shared = wish.shared_role.as_ref().and_then(|shared| role_of(known, &server, shared));
        match shared {
            Some(row) if row.verifier != role.verifier => {
                Err(Problem::changed("the shared role was changed meanwhile; ask again"))
            }
            _ => Ok(()),
        }
    };
    let deed = deed(once.who, "create", Some(&wish.name));
    let job = audited(plane, &deed, None, json!(wish), async {
        let made = plane.catalog.insert_tenant(&deed, &new, Some(&work), once.key(), fits).await.map_err(taken)??;
        made.1.ok_or_else(|| Problem::internal("the job was not written down"))
    })
    .await?;
    plane.new_job.notify_one();
    let credentials = password.map(|password| credentials(plane, &wish.name, &role.name, &password));
    once.answer(job, Some(JobView::written(job, &work, &wish.name, &once.who.asker.actor)), credentials).await
}

/// Changes what is said about a tenant: budget, mode, owner, stage.
#[utoipa::path(patch, path = "/v1/tenants/{tenant}", operation_id = "update_tenant", request_body = Update,
    params(("tenant" = String, Path), ("If-Match" = Option<String>, Header)),
    responses((status = 200, body = TenantView, headers(("etag" = String))), Errors))]
pub async fn update(
    State(plane): Plane,
    who: Who,
    At(name): At,
    conditions: Conditions,
    Body(wish): Body<Update>,
) -> Answer<Response> {
    let (entry, file) = (find(&plane, &name)?, plane.file());
    required(&conditions)?;
    let mut spec = entry.spec.clone();
    wish.apply(&mut spec);
    let slots = plane.data.slots(&entry.server);
    check::spec(&spec, &entry.server, &file, &plane.known(), Some(entry.number), slots)?;
    let deed = deed(&who, "update", Some(&name));
    let (_, entry) = change(&plane, &deed, &entry, json!(wish), Look::AtAll, |e, seen| {
        same_version(&conditions, e)?;
        wish.apply(&mut e.spec);
        // Once more, with what others have changed meanwhile.
        check::spec(&e.spec, &e.server, &file, &seen.known, Some(e.number), slots)
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
    At(name): At,
    conditions: Conditions,
    Asked(dry): Asked<DryRun>,
    Body(wish): Body<Delete>,
) -> Answer<Response> {
    use TenantState as S;
    let once = Once::new((&plane, &who, &conditions, &dry), ("delete", &name, &wish), StatusCode::OK);
    if let Some(answered) = once.before().await? {
        return Ok(answered);
    }
    let states: &[_] = if wish.without_archive {
        &[S::Active, S::Paused, S::Suspended, S::Draining, S::Drained, S::Archived]
    } else {
        &[S::Archived]
    };
    let begin = Begin { once, action: "delete", name: &name, states };
    let made = async {
        let entry = find(&plane, &name)?;
        if wish.confirm != name {
            return Err(Problem::invalid("confirm: must be the tenant's name"));
        }
        required(&conditions)?;
        if !wish.without_archive && entry.state != S::Archived {
            return Err(Problem::wrong_state("archive it first, or say without_archive: true"));
        }
        begin.begin(&entry, json!(wish), Work::Delete { deadline: wish.deadline_ms.min(LONGEST_DEADLINE) }, None).await
    };
    begin.once.after(made.await).await
}

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
            At(name): At,
            conditions: Conditions,
            Asked(dry): Asked<DryRun>,
            $take($wish): $take<$body>,
        ) -> Answer<Response> {
            let action = stringify!($name);
            let once = Once::new((&$plane, &who, &conditions, &dry), (action, &name, &$wish), StatusCode::OK);
            if let Some(answered) = once.before().await? {
                return Ok(answered);
            }
            let begin = Begin { once, action, name: &name, states: &[$(TenantState::$state),*] };
            let made = async {
                let $entry = find(&$plane, &name)?;
                let (work, credentials) = $work?;
                begin.begin(&$entry, json!($wish), work, credentials).await
            };
            begin.once.after(made.await).await
        }
    };
}

job_operation!(
    /// Gives a tenant, and its database if it has the same name, another name. Clients wait a moment; the old name stays as an
    /// alias. While they wait, `pool.max_waiters` counts as ever: the client after that many is told 53300.
    rename, "/v1/tenants/{tenant}/rename", "rename_tenant", Rename, Body<Rename>, [Active, Paused, Suspended], |plane, entry, wish| {
        hold(wish.wait_ms, &plane.file()).and_then(|wait| {
            check::new_name(&wish.to, &plane.file(), &plane.known(), Some(entry.number))?;
            let rename_database = entry.database == entry.name;
            let (from, to) = (entry.name.clone(), wish.to.clone());
            Ok((Work::Rename { from, to, rename_database, wait }, None))
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
        rotation(&plane, &entry, &wish).await
    }
);
job_operation!(
    /// Gives a tenant that shares a role with others one of its own, which owns its database from then on. The shared role goes
    /// on working, as a member of the new one, until `finish`.
    separate, "/v1/tenants/{tenant}/separate", "separate_tenant", Option<Separate>, MaybeBody<Separate>, [Active, Paused, Suspended], |plane, entry, wish| {
        separation(&plane, &entry, &wish).await
    }
);

/// What a separation does, and the new role's password.
async fn separation(plane: &ControlPlane, entry: &Entry, wish: &Separate) -> Answer<(Work, Option<Credentials>)> {
    let is_shared = |role: &str| entry.roles.iter().any(|row| row.name == role && !row.ours);
    if wish.finish {
        let names = entry.roles.iter().map(|row| row.name.clone());
        let roles: Vec<String> = names.filter(|role| is_shared(role) && *role != entry.owner_role).collect();
        let has_own = entry.roles.iter().any(|row| row.name == entry.owner_role && row.ours);
        if roles.is_empty() || !has_own {
            return Err(Problem::wrong_state("it has no role of its own beside a shared one; separate it first"));
        }
        return Ok((Work::Retire { roles }, None));
    }
    if !is_shared(&entry.owner_role) {
        return Err(Problem::wrong_state("its database is not owned by a role that it shares"));
    }
    let role = wish.role.clone().unwrap_or_else(|| entry.name.clone());
    check::role_name(&role)?;
    let wait = hold(Some(wish.wait_ms), &plane.file())?;
    let password = password();
    let verifier = verifier(&password, plane.file().auth.scram_iterations.get()).await?;
    let credentials = credentials(plane, &entry.name, &role, &password);
    let role = RoleRow::new(role, Some(verifier), true);
    Ok((Work::Separate { role, old: entry.owner_role.clone(), wait }, Some(credentials)))
}

/// How long a job may hold clients, in milliseconds: none of them shall give up before it does.
pub(super) fn hold(wait_ms: Option<u64>, file: &Settings) -> Answer<u64> {
    let patience = file.pool.query_wait_timeout;
    let most = patience.saturating_sub(AFTER_THE_WAIT.min(patience / 2));
    let wait = wait_ms.map_or(DEFAULT_HOLD.min(most), Duration::from_millis);
    if wait > most {
        return Err(Problem::invalid(format!(
            "wait_ms: clients are held meanwhile, and give up after pool.query_wait_timeout ({}); at most {}",
            humantime::format_duration(patience),
            most.as_millis()
        )));
    }
    Ok(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX))
}

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
            At(name): At,
            conditions: Conditions,
            MaybeBody(Nothing {}): MaybeBody<Nothing>,
        ) -> Answer<Response> {
            let entry = find(&plane, &name)?;
            let deed = deed(&who, stringify!($name), Some(&name));
            let (before, entry) = change(&plane, &deed, &entry, Value::Null, Look::AtIt, |e, seen| {
                at_rest(seen)?;
                same_version(&conditions, e)?;
                if e.state != TenantState::$there {
                    e.state = e.state.next(TenantEvent::$event).map_err(|error| Problem::wrong_state(error.to_string()))?;
                }
                Ok(())
            })
            .await?;
            if (before.state, entry.state) == (TenantState::Suspended, TenantState::Suspended) {
                // It woke by itself, which the catalog does not know.
                plane.release(&entry.name);
            }
            if matches!(entry.state, TenantState::Paused | TenantState::Suspended) {
                released(&plane, &entry, &conditions).await;
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
    /// Gives up the server connections until the next query; also of a tenant that was suspended before and woke by one.
    suspend, "/v1/tenants/{tenant}/suspend", "suspend_tenant", Suspend, Suspended
);
state_operation!(
    /// Ends a suspension; the next query would, too.
    wake, "/v1/tenants/{tenant}/wake", "wake_tenant", Wake, Active
);

/// An archive by its number; the newest without one.
async fn stored(plane: &ControlPlane, tenant: Option<i64>, id: Option<i64>) -> Answer<Stored> {
    let found = plane.catalog.archive(tenant, id).await?;
    let found = found.ok_or_else(|| Problem::invalid("archive: there is none of that number"))?;
    Ok(Stored { id: found.id, path: found.path, sha256: found.sha256 })
}

/// A role that other tenants have, or the settings file.
fn shared_role(plane: &ControlPlane, server: &str, name: &str) -> Answer<RoleRow> {
    let known = plane.known();
    let of_tenant = role_of(&known, server, name);
    let verifier = of_tenant.and_then(|row| row.verifier.clone());
    if of_tenant.is_none() && !plane.file().roles.iter().any(|role| role.name == name) {
        return Err(Problem::invalid("shared_role: no tenant has it, and it is none of [[roles]] in the settings"));
    }
    Ok(RoleRow::new(name.to_owned(), verifier, false))
}

fn role_of<'a>(known: &'a Known, server: &str, name: &str) -> Option<&'a RoleRow> {
    let here = known.tenants.iter().filter(|entry| entry.server == server);
    here.flat_map(|entry| &entry.roles).find(|row| row.name == name)
}

/// What a rotation does, and the new password.
async fn rotation(plane: &ControlPlane, entry: &Entry, wish: &Rotate) -> Answer<(Work, Option<Credentials>)> {
    let role = wish.role.clone().unwrap_or_else(|| entry.owner_role.clone());
    let row = entry.roles.iter().find(|row| row.name == role && row.ours);
    let row = row.ok_or_else(|| Problem::invalid("role: the tenant has none of that name that Tenantry made"))?;
    let old = row.verifier.as_ref().and_then(|text| scram::Verifier::parse(&text.0).ok());
    let key = plane.data.client_key(&entry.name, &role).filter(|key| old.as_ref().is_some_and(|old| old.fits(key)));
    let grace = match (wish.grace_ms, &key) {
        (None | Some(0), None) => 0,
        (None, Some(_)) => DEFAULT_GRACE,
        (Some(0), Some(_)) => 0,
        (Some(wanted), Some(_)) if wanted <= LONGEST_GRACE => wanted,
        (Some(_), Some(_)) => return Err(Problem::invalid(format!("grace_ms: at most {LONGEST_GRACE}, a week"))),
        (Some(_), None) => {
            return Err(Problem::wrong_state(
                "no client has logged in with the old password through this process since it was started, so the old one \
                 cannot be kept good beside the new one: log in once, or say grace_ms: 0",
            ));
        }
    };
    // Whoever has one of two passwords is asked for it with one salt.
    let kept = old.filter(|_| grace > 0).map(|old| (old.salt().to_vec(), old.iterations()));
    let (salt, iterations) =
        kept.unwrap_or_else(|| (rand::random::<[u8; 16]>().to_vec(), plane.file().auth.scram_iterations.get()));
    let password = password();
    let secret = password.clone();
    let derive = move || scram::Verifier::derive(secret.as_bytes(), &salt, iterations);
    let derived = tokio::task::spawn_blocking(derive).await;
    let (verifier, new_key) = derived.map_err(|_| Problem::internal("no verifier could be made"))?;
    let bridge = key.map(|key| Verifier(STANDARD.encode(scram::bridge(&key, &new_key))));
    let credentials = credentials(plane, &entry.name, &role, &password);
    Ok((Work::Rotate { role, verifier: Verifier(verifier.to_pg_string()), bridge, grace }, Some(credentials)))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_held_for_longer_than_he_would_wait() {
        let mut file = Settings::default();
        let wait = |file: &Settings, wait_ms| hold(wait_ms, file).ok();
        assert_eq!(wait(&file, None), Some(30_000));
        assert_eq!((wait(&file, Some(110_000)), wait(&file, Some(110_001))), (Some(110_000), None));
        file.pool.query_wait_timeout = Duration::from_secs(2);
        assert_eq!((wait(&file, None), wait(&file, Some(1_001))), (Some(1_000), None));
    }

    #[test]
    fn a_page_has_each_name_once_and_says_where_the_next_begins() {
        let mut file = Settings::default();
        for name in ["b", "d"] {
            let id = tenantry_config::TenantId::parse(name).unwrap();
            file.tenants.insert(id, tenantry_config::Tenant::default());
        }
        let known = Known::default();
        assert_eq!(names(&file, &known, 1, None), (vec!["b".to_owned()], Some("b".to_owned())));
        assert_eq!(names(&file, &known, 1, Some("b")), (vec!["d".to_owned()], None));
    }
}
