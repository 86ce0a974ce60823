//! Operations that take a tenant to another server, back, or leave it there for good.

use std::num::NonZeroU32;

use axum::{extract::State, http::StatusCode, response::Response};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tenantry_config::TenantState;
use utoipa::ToSchema;

use super::{
    Plane, Who,
    begin::{Begin, Once},
    body::{Asked, At, Body, Conditions, MaybeBody},
    check, find,
    problem::{Answer, Errors, Problem},
    tenants::hold,
    types::{Begun, DryRun, Nothing},
};
use crate::{
    catalog::model::{Entry, Method},
    jobs::work::{Compared, Work},
    plane::ControlPlane,
};

/// Streams of pg_dump and pg_restore.
const STREAMS: NonZeroU32 = NonZeroU32::MIN.saturating_add(3);
const MOST_STREAMS: u32 = 16;
const ITS_STATES: &[TenantState] = &[TenantState::Active, TenantState::Paused, TenantState::Suspended];
/// Its own copy is not needed to drop the other one.
const AT_REST_TOO: &[TenantState] =
    &[TenantState::Active, TenantState::Paused, TenantState::Suspended, TenantState::Drained];

/// To another server.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveTenant {
    /// A server of the settings, with a control login.
    #[schema(max_length = 63)]
    pub server: String,
    /// `online` needs wal_level = logical at the old server and PostgreSQL 16 at the new one; `dump` keeps clients waiting for as
    /// long as it takes.
    #[serde(default = "MoveTenant::method")]
    #[schema(default = "online")]
    pub method: Method,
    /// How long transactions under way may take to finish at the end; past it nothing is moved. Clients are held meanwhile, so
    /// it must be less than `pool.query_wait_timeout`; null: 30 s, or as long as that allows.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 600_000)]
    pub wait_ms: Option<u64>,
    /// Past it, statements that run are cancelled, and sessions whose transaction is open all the same are ended (57P01); what keeps
    /// a server connection outside a transaction keeps the tenant where it is.
    #[serde(default)]
    pub cancel: bool,
    /// How much is compared while clients wait; null: `fast` of an online move, `full` of a dump. `fast`: tables of together 16
    /// MiB, the smallest, in full; the next of 64 MiB by their rows; all others by the position in the log that both have reached.
    #[serde(default)]
    pub verify: Option<Compared>,
    /// Streams of pg_dump and pg_restore; null: 4.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 16)]
    pub streams: Option<u32>,
}

impl MoveTenant {
    fn method() -> Method {
        Method::Online
    }
}

/// Back to where it was.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RollbackMove {
    /// As of a move.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 600_000)]
    pub wait_ms: Option<u64>,
    /// As of a move.
    #[serde(default)]
    pub cancel: bool,
    /// As of a move; null: `fast`.
    #[serde(default)]
    pub verify: Option<Compared>,
    /// What was written since the old copy followed may stay behind, at the place that is left: for a copy that does not follow, or
    /// whose following is broken, or where the server that is left is lost. The job tells in `result.left_behind` what, as far as it is
    /// known.
    #[serde(default)]
    pub force: bool,
}

/// Moves a tenant to another server: its database, and its roles with the passwords that they have. `online`: by logical
/// replication while the application runs, and a pause of its clients at the end. `dump`: by pg_dump and pg_restore, while its
/// clients wait. Until the route changes, cancelling the job leaves everything as it was; afterwards the old copy is kept,
/// closed, until `move/confirm` drops it or `move/rollback` goes back. `dry_run` is a job, too: what was found is in its
/// `result.findings`, and the steps of the move in `result.steps`.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/move", operation_id = "move_tenant", request_body = MoveTenant,
    params(("tenant" = String, Path), DryRun, ("If-Match" = Option<String>, Header), ("Idempotency-Key" = Option<String>, Header),
        ("Prefer" = Option<String>, Header, description = "wait=SECONDS or respond-async")),
    responses((status = 200, body = Begun), (status = 202, body = Begun), Errors))]
pub async fn move_tenant(
    State(plane): Plane,
    who: Who,
    At(name): At,
    conditions: Conditions,
    Asked(DryRun { dry_run }): Asked<DryRun>,
    Body(wish): Body<MoveTenant>,
) -> Answer<Response> {
    // Looking is a job, too: it needs a role inside the database.
    let (action, begun) = (if dry_run { "move_dry_run" } else { "move" }, DryRun::default());
    let once = Once::new((&plane, &who, &conditions, &begun), (action, &name, &wish), StatusCode::OK);
    if let Some(answered) = once.before().await? {
        return Ok(answered);
    }
    let begin = Begin { once, action, name: &name, states: ITS_STATES };
    let made = async {
        let entry = find(&plane, &name)?;
        let work = work(&plane, &entry, &wish, dry_run)?;
        begin.begin(&entry, json!(wish), work, None).await
    };
    begin.once.after(made.await).await
}

fn work(plane: &ControlPlane, entry: &Entry, wish: &MoveTenant, dry_run: bool) -> Answer<Work> {
    let file = plane.file();
    let to = check::server(Some(&wish.server), &file)?;
    if to == entry.server {
        return Err(Problem::invalid("server: the tenant is there already"));
    }
    check::server(Some(&entry.server), &file)
        .map_err(|_| Problem::wrong_state("the server where it is has no control login in the settings"))?;
    check::floors(&entry.spec, &to, &file, &plane.known(), Some(entry), plane.data.slots(&to))?;
    let streams = wish.streams.unwrap_or(STREAMS.get());
    if !(1..=MOST_STREAMS).contains(&streams) {
        return Err(Problem::invalid(format!("streams: 1 to {MOST_STREAMS}")));
    }
    let verify = wish.verify.unwrap_or(match wish.method {
        Method::Online => Compared::Fast,
        Method::Dump => Compared::Full,
    });
    Ok(Work::Move {
        from: entry.server.clone(),
        to,
        method: wish.method,
        wait: hold(wish.wait_ms, &file)?,
        cancel: wish.cancel,
        verify,
        streams,
        dry_run,
    })
}

fn no_copy() -> Problem {
    Problem::wrong_state("there is no copy of an earlier move: it was confirmed, rolled back, or never moved")
}

/// Goes back to the server where the tenant was before it was moved. What was written since goes with it, where the old copy
/// followed the new one (an online move between servers that can do that); else it must be said with `force` that it stays
/// behind: the place that is left is the kept copy then, and nothing of it is dropped. With `force` the server that is left need not
/// answer: its copy is closed once it is back.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/move/rollback", operation_id = "rollback_move", request_body = Option<RollbackMove>,
    params(("tenant" = String, Path), DryRun, ("If-Match" = Option<String>, Header), ("Idempotency-Key" = Option<String>, Header),
        ("Prefer" = Option<String>, Header, description = "wait=SECONDS or respond-async")),
    responses((status = 200, body = Begun), (status = 202, body = Begun), Errors))]
pub async fn rollback(
    State(plane): Plane,
    who: Who,
    At(name): At,
    conditions: Conditions,
    Asked(dry): Asked<DryRun>,
    MaybeBody(wish): MaybeBody<RollbackMove>,
) -> Answer<Response> {
    let action = "rollback_move";
    let once = Once::new((&plane, &who, &conditions, &dry), (action, &name, &wish), StatusCode::OK);
    if let Some(answered) = once.before().await? {
        return Ok(answered);
    }
    let begin = Begin { once, action, name: &name, states: ITS_STATES };
    let made = async {
        let entry = find(&plane, &name)?;
        let kept = entry.kept.as_ref().ok_or_else(no_copy)?;
        let follows = kept.follows && !wish.force;
        if !follows && !wish.force {
            let then = kept.ended.as_ref().map_or_else(
                || "as it was then".to_owned(),
                |ended| format!("as it was at {}, when it ended to follow: {}", ended.at, ended.why),
            );
            return Err(Problem::wrong_state(format!(
                "what was written since is only at {}, and {} would be {then}; say force if that is what you want; the place \
                 that is left is kept",
                entry.server, kept.server
            )));
        }
        check::floors(
            &entry.spec,
            &kept.server,
            &plane.file(),
            &plane.known(),
            Some(&entry),
            plane.data.slots(&kept.server),
        )?;
        let verify = wish.verify.unwrap_or(Compared::Fast);
        let wait = hold(wish.wait_ms, &plane.file())?;
        begin.begin(&entry, json!(wish), Work::MoveBack { wait, cancel: wish.cancel, verify, follows }, None).await
    };
    begin.once.after(made.await).await
}

/// Drops the copy that a move left at the old server, and the roles that nobody needs there: the move stands.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/move/confirm", operation_id = "confirm_move", request_body = Option<Nothing>,
    params(("tenant" = String, Path), DryRun, ("If-Match" = Option<String>, Header), ("Idempotency-Key" = Option<String>, Header),
        ("Prefer" = Option<String>, Header, description = "wait=SECONDS or respond-async")),
    responses((status = 200, body = Begun), (status = 202, body = Begun), Errors))]
pub async fn confirm(
    State(plane): Plane,
    who: Who,
    At(name): At,
    conditions: Conditions,
    Asked(dry): Asked<DryRun>,
    MaybeBody(wish): MaybeBody<Nothing>,
) -> Answer<Response> {
    let action = "confirm_move";
    let once = Once::new((&plane, &who, &conditions, &dry), (action, &name, &wish), StatusCode::OK);
    if let Some(answered) = once.before().await? {
        return Ok(answered);
    }
    let begin = Begin { once, action, name: &name, states: AT_REST_TOO };
    let made = async {
        let entry = find(&plane, &name)?;
        entry.kept.as_ref().ok_or_else(no_copy)?;
        begin.begin(&entry, json!(wish), Work::ConfirmMove, None).await
    };
    begin.once.after(made.await).await
}
