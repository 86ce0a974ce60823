//! Operations on rollouts: schema migrations, and commands, over many tenants in waves.

use std::collections::{BTreeMap, BTreeSet};

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use rand::{Rng, distr::Alphanumeric};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};
use tenantry_config::RoleSecret;
use tenantry_wire::scram;
use time::OffsetDateTime;
use utoipa::ToSchema;
use wildmatch::WildMatch;
use zeroize::Zeroizing;

use super::{
    Plane, Who,
    begin::{audited, deed},
    body::{Asked, At, Conditions, LargeBody, MaybeBody},
    page,
    problem::{Answer, Errors, Problem},
    types::{DryRun, Nothing, Page, PageQuery},
};
use crate::{
    catalog::{
        disk::hex,
        model::{Entry, Known, Verifier},
        rollouts::{FileName, Inserted, Item, Kind, NewRollout, Plan, Resumed, RolloutRow, RolloutState, busy_timeout},
    },
    migrate::{
        script::{self, Applied, Migration},
        waves::{self, Size, Turn},
    },
    plane::ControlPlane,
};

/// Tenants of one rollout.
const MOST_TENANTS: usize = 5_000;
const MOST_PARALLEL: u32 = 16;
const MOST_WORDS: usize = 1_000;
/// Of a command, together.
const MOST_COMMAND: usize = 32 << 10;
/// Of what is told of a command's end.
const MOST_OUTCOME: usize = 8_000;
const LONGEST_LOCK_TIMEOUT: u64 = 600_000;
const LONGEST: u64 = 24 * 3_600_000;
const DEFAULT_LOCK_TIMEOUT: u64 = 3_000;
const DEFAULT_STATEMENT_TIMEOUT: u64 = 300_000;
const DEFAULT_LOCK_RETRIES: u32 = 10;
const DEFAULT_TIMEOUT: u64 = 3_600_000;
const PASSWORD_CHARACTERS: usize = 32;
/// As many as PostgreSQL makes: the password is random.
const ITERATIONS: u32 = 4096;

/// A rollout that is to be: which tenants, in which waves, and either `migrations` or `exec`.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewRolloutWish {
    /// Names, or patterns of them (`*`: any letters, `?`: one). Empty: all that `application` and `stage` leave.
    #[serde(default)]
    #[schema(max_items = 5000, example = json!(["shop", "exp_*"]))]
    pub tenants: Vec<String>,
    /// Of those, only forks of this application.
    #[serde(default)]
    #[schema(max_length = 200)]
    pub application: Option<String>,
    /// Of those, only tenants in this stage.
    #[serde(default)]
    #[schema(max_length = 200)]
    pub stage: Option<String>,
    /// All tenants of the catalog are meant: said where nothing else says which.
    #[serde(default)]
    pub all: bool,
    /// So many tenants go first, as a wave of their own; one of them that fails stops everything. 0: none.
    #[serde(default = "one")]
    #[schema(minimum = 0, maximum = 5000, default = 1)]
    pub canary: u32,
    /// These are the canary, in place of the first by name.
    #[serde(default)]
    #[schema(max_items = 5000)]
    pub canary_tenants: Vec<String>,
    /// Tenants of each wave after the canary: a number, or a percentage of all; null: all in one.
    #[serde(default)]
    #[schema(max_length = 10, pattern = "^[1-9][0-9]{0,8}%?$", example = "25%")]
    pub wave: Option<String>,
    /// Tenants under way at once.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 16, default = 1)]
    pub parallel: u32,
    /// After so many failures nobody else begins.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 5000, default = 1)]
    pub stop_after: u32,
    /// Milliseconds that a statement may wait for a lock: for as long the tenant's clients may wait behind it.
    #[serde(default = "lock_timeout")]
    #[schema(minimum = 1, maximum = 600_000, default = 3000)]
    pub lock_timeout_ms: u64,
    /// How often a file is tried again whose locks were not to be had.
    #[serde(default = "lock_retries")]
    #[schema(minimum = 0, maximum = 1000, default = 10)]
    pub lock_retries: u32,
    /// Milliseconds that a tenant is waited for which another job has, while others have their turns; then it has failed.
    #[serde(default = "busy_timeout")]
    #[schema(minimum = 0, maximum = 86_400_000, default = 600_000)]
    pub busy_timeout_ms: u64,
    /// Milliseconds that a statement may take; 0: no limit. Null: 300000, and of commands what the tenant has.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 86_400_000)]
    pub statement_timeout_ms: Option<u64>,
    /// Files may have lower numbers than those that were applied.
    #[serde(default)]
    pub allow_out_of_order: bool,
    /// Files of SQL, applied in the order of their versions where they are not yet.
    #[serde(default)]
    #[schema(max_items = 500)]
    pub migrations: Vec<Migration>,
    /// A command that the caller runs for each tenant.
    #[serde(default)]
    pub exec: Option<ExecWish>,
}

fn one() -> u32 {
    1
}

fn lock_timeout() -> u64 {
    DEFAULT_LOCK_TIMEOUT
}

fn lock_retries() -> u32 {
    DEFAULT_LOCK_RETRIES
}

/// A command that whoever asks runs for each tenant, with a login that Tenantry makes for it.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecWish {
    /// Its words: kept for the report, so no secrets.
    #[schema(min_items = 1, max_items = 1000)]
    pub command: Vec<String>,
    /// SCRAM verifier of the password that the logins have; the password itself is the caller's.
    #[schema(max_length = 500)]
    pub verifier: String,
    /// Milliseconds that a command may take: its login is closed after that.
    #[serde(default = "timeout")]
    #[schema(minimum = 1, maximum = 86_400_000, default = 3_600_000)]
    pub timeout_ms: u64,
}

fn timeout() -> u64 {
    DEFAULT_TIMEOUT
}

/// How a rollout goes on.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResumeWish {
    /// Of a rollout of a command: as when it was begun.
    #[serde(default)]
    #[schema(max_length = 500)]
    pub verifier: Option<String>,
}

/// From whoever runs the commands: a sign of life, at least every 30 s, and those that have ended.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Outcomes {
    #[serde(default)]
    #[schema(max_items = 5000)]
    pub ended: Vec<Outcome>,
    /// As when the rollout was begun or resumed: whoever is told here to be another's runner is one that was given up.
    #[serde(default)]
    #[schema(max_length = 500)]
    pub verifier: Option<String>,
}

/// How a command ended.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Outcome {
    /// As in the rollout.
    #[schema(max_length = 63)]
    pub tenant: String,
    /// The attempt that it was.
    pub attempt: u32,
    /// What went wrong; null: nothing.
    #[serde(default)]
    #[schema(max_length = 8000)]
    pub error: Option<String>,
}

/// A rollout.
#[derive(Debug, Serialize, ToSchema)]
pub struct RolloutView {
    /// Null with `dry_run`.
    pub id: Option<i64>,
    pub kind: Kind,
    pub state: RolloutState,
    /// Why it did not end well.
    pub error: Option<String>,
    pub plan: Plan,
    /// Of exec.
    pub command: Option<Vec<String>>,
    /// Of migrate, in order; not in lists.
    pub files: Vec<FileName>,
    /// How many tenants are waiting (or were not reached), running, done, failed, skipped.
    pub counts: BTreeMap<String, u64>,
    /// In order; not in lists.
    pub tenants: Vec<TurnView>,
    /// Whose token.
    pub actor: String,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub updated_at: OffsetDateTime,
}

/// A tenant of a rollout.
#[derive(Debug, Serialize, ToSchema)]
pub struct TurnView {
    pub name: String,
    /// 0: the canary.
    pub wave: u32,
    pub state: Turn,
    /// How often it was begun.
    pub attempts: u32,
    /// Its last job: GET /v1/jobs/{job} tells more.
    pub job: Option<i64>,
    /// Of exec, while its command may run: whom it logs in as.
    pub login: Option<String>,
    /// Why it failed, was skipped, or waits although its turn has come.
    pub error: Option<String>,
    /// With `dry_run` the files that would be applied, by what is known of it; else those that were.
    pub files: Vec<String>,
    /// When its job was begun; of one that another job has: since when it is waited for.
    #[serde(with = "time::serde::rfc3339::option")]
    pub began_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    pub ended_at: Option<OffsetDateTime>,
}

impl TurnView {
    fn of(item: Item) -> Self {
        let files = item.result.map(|mut result| result["applied"].take());
        Self {
            name: item.name,
            wave: item.wave,
            state: item.turn,
            attempts: item.attempts,
            job: item.job,
            login: item.login,
            error: item.error,
            files: files.and_then(|files| serde_json::from_value(files).ok()).unwrap_or_default(),
            began_at: item.began_at,
            ended_at: item.ended_at,
        }
    }
}

fn view(row: RolloutRow, counts: BTreeMap<String, u64>, tenants: Vec<TurnView>) -> RolloutView {
    let RolloutRow { id, kind, state, plan, command, error, actor, created_at, updated_at, files, .. } = row;
    let id = Some(id);
    RolloutView { id, kind, state, error, plan, command, files, counts, tenants, actor, created_at, updated_at }
}

fn counts(turns: impl Iterator<Item = Turn>) -> BTreeMap<String, u64> {
    let mut counts: BTreeMap<String, u64> = Turn::ALL.iter().map(|turn| (turn.as_str().to_owned(), 0)).collect();
    turns.for_each(|turn| *counts.entry(turn.as_str().to_owned()).or_default() += 1);
    counts
}

/// A password that only the caller knows, and the verifier of it that the API is told.
#[must_use]
pub fn login_secret() -> (Zeroizing<String>, String) {
    let password = rand::rng().sample_iter(Alphanumeric).take(PASSWORD_CHARACTERS).map(char::from).collect();
    let (password, salt): (Zeroizing<String>, [u8; 16]) = (Zeroizing::new(password), rand::random());
    let verifier = scram::Verifier::from_password(password.as_bytes(), &salt, ITERATIONS).to_pg_string();
    (password, verifier)
}

pub(super) fn none() -> Problem {
    Problem::not_found("no rollout of that number")
}

pub(super) fn id(text: &str) -> Answer<i64> {
    text.parse().map_err(|_| none())
}

/// One with its tenants.
pub(super) async fn whole(plane: &ControlPlane, id: i64) -> Answer<RolloutView> {
    let row = plane.catalog.rollout(id).await?.ok_or_else(none)?;
    let items = plane.catalog.rollout_items(id).await?;
    let counts = counts(items.iter().map(|item| item.turn));
    Ok(view(row, counts, items.into_iter().map(TurnView::of).collect()))
}

/// Rollouts, the newest first, without their tenants and files.
#[utoipa::path(get, path = "/v1/rollouts", operation_id = "list_rollouts", params(PageQuery),
    responses((status = 200, body = Page<RolloutView>), Errors))]
pub async fn list(
    State(plane): Plane,
    Asked(PageQuery { after, limit }): Asked<PageQuery>,
) -> Answer<Json<Page<RolloutView>>> {
    let (limit, before) = (page::size(limit)?, page::number(after)?);
    let rows = plane.catalog.rollouts(before, page::and_one(limit)).await?;
    let (rows, next) = page::cut(rows, limit, |row| row.id.to_string());
    let mut items = Vec::new();
    for row in rows {
        let counts = plane.catalog.rollout_counts(row.id).await?;
        items.push(view(row, counts, Vec::new()));
    }
    Ok(Json(Page { items, next }))
}

/// One rollout, and where each of its tenants is.
#[utoipa::path(get, path = "/v1/rollouts/{rollout}", operation_id = "show_rollout", params(("rollout" = String, Path)),
    responses((status = 200, body = RolloutView), Errors))]
pub async fn show(State(plane): Plane, At(rollout): At) -> Answer<Json<RolloutView>> {
    whole(&plane, id(&rollout)?).await.map(Json)
}

/// Files of SQL, or a command, over many tenants: a canary first, then wave after wave, each once the one before is over.
/// Each tenant's turn is a job. What was committed has no way back. With `dry_run`: who would have a turn, in which wave, and
/// with which files, by what is known of their version tables.
#[utoipa::path(post, path = "/v1/rollouts", operation_id = "create_rollout", request_body = NewRolloutWish,
    params(DryRun, ("Idempotency-Key" = Option<String>, Header)),
    responses((status = 202, body = RolloutView), (status = 200, body = RolloutView, description = "dry run"), Errors))]
pub async fn create(
    State(plane): Plane,
    who: Who,
    conditions: Conditions,
    Asked(dry): Asked<DryRun>,
    LargeBody(wish): LargeBody<NewRolloutWish>,
) -> Answer<Response> {
    let hash = hex(&Sha256::digest(json!(wish).to_string().as_bytes()));
    let (new, skipped) = plan(&plane.known(), wish)?;
    let numbers: Vec<i64> = new.tenants.iter().map(|(number, ..)| *number).collect();
    let applied = plane.catalog.migrations_of(&numbers).await?;
    let pending = pending(&new, &applied)?;
    if dry.dry_run {
        return Ok(Json(planned(new, &skipped, pending, &who.asker.actor)).into_response());
    }
    let deed = deed(&who, "rollout", None);
    let names: Vec<&str> = new.tenants.iter().map(|(_, name, _)| name.as_str()).take(100).collect();
    let about = json!({
        "kind": new.kind, "tenants": names, "count": new.tenants.len(), "command": new.command,
        "files": new.files.as_ref().map(|files| files.iter().map(|file| json!({ "name": file.name, "sha256": file.sha256() })).collect::<Vec<_>>()),
    });
    let key = conditions.key.as_deref().map(|key| (key, hash.as_str()));
    let inserted = audited(&plane, &deed, None, about, async {
        match plane.catalog.insert_rollout(&deed, &new, key).await? {
            Inserted::New(id) | Inserted::Before(id) => Ok(id),
            Inserted::OtherRequest => {
                Err(Problem::invalid("Idempotency-Key: was used for another request; take a new one"))
            }
        }
    });
    let id = inserted.await?;
    plane.new_job.notify_one();
    let shown = whole(&plane, id).await?;
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, format!("/v1/rollouts/{id}"))], Json(shown)).into_response())
}

/// Goes on where a rollout stopped: the failed and the skipped have another turn, then those that were not reached; who is
/// done is not touched.
#[utoipa::path(post, path = "/v1/rollouts/{rollout}/resume", operation_id = "resume_rollout",
    request_body = Option<ResumeWish>, params(("rollout" = String, Path)),
    responses((status = 202, body = RolloutView), Errors))]
pub async fn resume(
    State(plane): Plane,
    who: Who,
    At(rollout): At,
    MaybeBody(wish): MaybeBody<ResumeWish>,
) -> Answer<Response> {
    let id = id(&rollout)?;
    let row = plane.catalog.rollout(id).await?.ok_or_else(none)?;
    let verifier = match (row.kind, wish.verifier) {
        (Kind::Exec, Some(verifier)) => Some(proof(verifier)?),
        (Kind::Exec, None) => return Err(Problem::invalid("verifier: a rollout of a command needs one")),
        (Kind::Migrate, _) => None,
    };
    let deed = deed(&who, "resume-rollout", None);
    audited(&plane, &deed, None, json!({ "rollout": id }), async {
        match plane.catalog.resume_rollout(&deed, id, verifier.as_ref()).await? {
            Resumed::Yes => Ok(()),
            Resumed::Gone => Err(none()),
            Resumed::Not(RolloutState::Succeeded) => {
                Err(Problem::wrong_state("it has succeeded: there is nothing to do"))
            }
            Resumed::Not(RolloutState::Running) => {
                Err(Problem::wrong_state("it is running; wait for it, or cancel it"))
            }
            Resumed::Not(_) => Err(Problem::wrong_state("some of its tenants are still under way; wait for them")),
        }
    })
    .await?;
    plane.new_job.notify_one();
    Ok((StatusCode::ACCEPTED, Json(whole(&plane, id).await?)).into_response())
}

/// Nobody else has a turn; jobs under way turn back where they can, which rolls their transaction back.
#[utoipa::path(post, path = "/v1/rollouts/{rollout}/cancel", operation_id = "cancel_rollout",
    request_body = Option<Nothing>, params(("rollout" = String, Path)),
    responses((status = 202, body = RolloutView), Errors))]
pub async fn cancel(
    State(plane): Plane,
    who: Who,
    At(rollout): At,
    MaybeBody(Nothing {}): MaybeBody<Nothing>,
) -> Answer<Response> {
    let id = id(&rollout)?;
    let deed = deed(&who, "cancel-rollout", None);
    audited(&plane, &deed, None, json!({ "rollout": id }), async {
        match plane.catalog.cancel_rollout(&deed, id).await? {
            Some(true) => Ok(()),
            Some(false) => Err(Problem::wrong_state("it is over")),
            None => Err(none()),
        }
    })
    .await?;
    plane.new_job.notify_one();
    Ok((StatusCode::ACCEPTED, Json(whole(&plane, id).await?)).into_response())
}

/// For whoever runs the commands of a rollout: tells how some ended, and that it is there. Answers with the rollout: a tenant
/// with a `login` may have its command begun, one that has none any more must have it ended.
#[utoipa::path(post, path = "/v1/rollouts/{rollout}/outcomes", operation_id = "tell_outcomes",
    request_body = Option<Outcomes>, params(("rollout" = String, Path)),
    responses((status = 200, body = RolloutView), Errors))]
pub async fn outcomes(
    State(plane): Plane,
    At(rollout): At,
    MaybeBody(Outcomes { ended, verifier }): MaybeBody<Outcomes>,
) -> Answer<Json<RolloutView>> {
    let id = id(&rollout)?;
    if ended.iter().any(|one| one.tenant.len() > 63 || one.tenant.contains('\0')) {
        return Err(Problem::invalid("tenant: is no name of one"));
    }
    if ended.iter().any(|one| one.error.as_ref().is_some_and(|error| error.chars().count() > MOST_OUTCOME)) {
        return Err(Problem::invalid(format!("error: at most {MOST_OUTCOME} characters")));
    }
    let row = plane.catalog.rollout(id).await?.ok_or_else(none)?;
    if row.kind != Kind::Exec {
        return Err(Problem::wrong_state("nobody but Tenantry runs this rollout"));
    }
    let told = |one: Outcome| {
        let error = one.error.map(|error| error.replace('\0', ""));
        // An empty text is well.
        let error =
            error.map_or_else(String::new, |error| if error.is_empty() { "it failed".to_owned() } else { error });
        (one.tenant, one.attempt, error)
    };
    let ended: Vec<_> = ended.into_iter().map(told).collect();
    if !plane.catalog.hear_of_runner(id, verifier.as_deref(), &ended).await? {
        return Err(Problem::wrong_state("somebody else runs the commands of this rollout by now: it was resumed"));
    }
    if !ended.is_empty() {
        plane.new_job.notify_one();
    }
    whole(&plane, id).await.map(Json)
}

/// Those who would be asked for and cannot have a turn.
type Skipped = Vec<(String, String)>;

/// What a wish comes to.
fn plan(known: &Known, wish: NewRolloutWish) -> Answer<(NewRollout, Skipped)> {
    check(&wish)?;
    let kind = if wish.exec.is_some() { Kind::Exec } else { Kind::Migrate };
    let found = chosen(known, &wish)?;
    let (canary, found) = canary_first(found, &wish)?;
    let wave = match wish.wave.as_deref().map(|text| Size::parse(text).ok_or(text)) {
        None => None,
        Some(Ok(size)) => Some(size),
        Some(Err(_)) => return Err(Problem::invalid("wave: must be a number, as 10, or a percentage, as 25%")),
    };
    let waves = waves::arrange(found.len(), canary, wave);
    let skipped = found.iter().filter_map(|entry| Some((entry.name.clone(), kind.suits(entry).err()?))).collect();
    let tenants = found.iter().zip(waves).map(|(entry, wave)| (entry.number, entry.name.clone(), wave)).collect();
    let statement_timeout_ms = match kind {
        Kind::Migrate => wish.statement_timeout_ms.or(Some(DEFAULT_STATEMENT_TIMEOUT)),
        Kind::Exec => wish.statement_timeout_ms,
    };
    let plan = Plan {
        parallel: wish.parallel,
        stop_after: wish.stop_after,
        canary: u32::try_from(canary).unwrap_or(u32::MAX),
        wave: wish.wave,
        lock_timeout_ms: wish.lock_timeout_ms,
        lock_retries: wish.lock_retries,
        statement_timeout_ms,
        allow_out_of_order: wish.allow_out_of_order,
        timeout_ms: wish.exec.as_ref().map_or(DEFAULT_TIMEOUT, |exec| exec.timeout_ms),
        busy_timeout_ms: wish.busy_timeout_ms,
    };
    let (command, verifier) = match wish.exec {
        Some(exec) => (Some(exec.command), Some(proof(exec.verifier)?)),
        None => (None, None),
    };
    let files = match kind {
        Kind::Migrate => Some(script::check_files(wish.migrations).map_err(Problem::invalid)?),
        Kind::Exec => None,
    };
    Ok((NewRollout { kind, plan, command, files, verifier, tenants }, skipped))
}

fn check(wish: &NewRolloutWish) -> Answer<()> {
    let number = |what: &str, value: u64, least: u64, most: u64| match (least..=most).contains(&value) {
        true => Ok(()),
        false => Err(Problem::invalid(format!("{what}: must be {least} to {most}"))),
    };
    let most = u64::try_from(MOST_TENANTS).unwrap_or(u64::MAX);
    number("canary", wish.canary.into(), 0, most)?;
    number("parallel", wish.parallel.into(), 1, MOST_PARALLEL.into())?;
    number("stop_after", wish.stop_after.into(), 1, most)?;
    number("lock_timeout_ms", wish.lock_timeout_ms, 1, LONGEST_LOCK_TIMEOUT)?;
    number("lock_retries", wish.lock_retries.into(), 0, 1_000)?;
    number("busy_timeout_ms", wish.busy_timeout_ms, 0, LONGEST)?;
    number("statement_timeout_ms", wish.statement_timeout_ms.unwrap_or(0), 0, LONGEST)?;
    match &wish.exec {
        Some(_) if !wish.migrations.is_empty() => Err(Problem::invalid("either migrations or exec, not both")),
        None if wish.migrations.is_empty() => Err(Problem::invalid("either migrations or exec is needed")),
        None => Ok(()),
        Some(exec) => {
            number("timeout_ms", exec.timeout_ms, 1, LONGEST)?;
            let bytes: usize = exec.command.iter().map(String::len).sum();
            let is_fit = (1..=MOST_WORDS).contains(&exec.command.len()) && bytes <= MOST_COMMAND;
            if !is_fit || exec.command.iter().any(|word| word.contains('\0')) {
                let limits = format!("command: must be 1 to {MOST_WORDS} words of {MOST_COMMAND} bytes together");
                return Err(Problem::invalid(limits));
            }
            Ok(())
        }
    }
}

/// Only what only the caller knows the password of; never a password.
fn proof(text: String) -> Answer<Verifier> {
    let secret = RoleSecret::classify(tenantry_config::Secret::new(text.clone()));
    match secret {
        Ok(RoleSecret::Scram(_)) => Ok(Verifier(text)),
        _ => Err(Problem::invalid("verifier: must be a SCRAM-SHA-256 verifier, as in pg_authid.rolpassword")),
    }
}

/// The tenants that are meant, by name.
fn chosen<'a>(known: &'a Known, wish: &NewRolloutWish) -> Answer<Vec<&'a Entry>> {
    let says_which = !wish.tenants.is_empty() || wish.application.is_some() || wish.stage.is_some();
    if says_which == wish.all {
        return Err(Problem::invalid("tenants: say which, by tenants, application or stage; or all: true"));
    }
    let mut unknown: BTreeSet<&str> = wish.tenants.iter().map(String::as_str).collect();
    let patterns: Vec<(&str, WildMatch)> =
        wish.tenants.iter().map(|pattern| (pattern.as_str(), WildMatch::new(pattern))).collect();
    let mut is_named = |entry: &Entry| {
        let fit = patterns.iter().filter(|(_, pattern)| pattern.matches(&entry.name));
        let fit: Vec<&str> = fit.map(|(pattern, _)| *pattern).collect();
        unknown.retain(|pattern| !fit.contains(pattern));
        wish.tenants.is_empty() || !fit.is_empty()
    };
    let is_of = |wanted: &Option<String>, has: &Option<String>| wanted.is_none() || wanted == has;
    let found: Vec<&Entry> = known
        .tenants
        .iter()
        .filter(|entry| is_named(entry))
        .filter(|entry| is_of(&wish.application, &entry.spec.application) && is_of(&wish.stage, &entry.spec.stage))
        .collect();
    if let Some(name) = unknown.first() {
        return Err(Problem::invalid(format!("tenants: no tenant of the catalog is called {name:?}")));
    }
    match found.len() {
        0 => Err(Problem::invalid("tenants: there is none of that kind")),
        count if count > MOST_TENANTS => Err(Problem::invalid(format!("tenants: {count}, and at most {MOST_TENANTS}"))),
        _ => Ok(found),
    }
}

/// How many are the canary, and all, those first.
fn canary_first<'a>(found: Vec<&'a Entry>, wish: &NewRolloutWish) -> Answer<(usize, Vec<&'a Entry>)> {
    if wish.canary_tenants.is_empty() {
        return Ok((usize::try_from(wish.canary).unwrap_or(usize::MAX).min(found.len()), found));
    }
    let is_canary = |entry: &&Entry| wish.canary_tenants.contains(&entry.name);
    if let Some(name) = wish.canary_tenants.iter().find(|name| found.iter().all(|entry| entry.name != **name)) {
        return Err(Problem::invalid(format!("canary_tenants: {name:?} is none of the tenants")));
    }
    let (canary, rest): (Vec<_>, Vec<_>) = found.into_iter().partition(is_canary);
    let count = canary.len();
    Ok((count, canary.into_iter().chain(rest).collect()))
}

/// What each would be given, by what was known last; what must not be applied is refused here already.
fn pending(new: &NewRollout, applied: &BTreeMap<i64, BTreeMap<i64, Applied>>) -> Answer<Vec<Vec<String>>> {
    let Some(files) = &new.files else { return Ok(vec![Vec::new(); new.tenants.len()]) };
    let nothing = BTreeMap::new();
    let of = |(number, name, _): &(i64, String, u32)| {
        let there = applied.get(number).unwrap_or(&nothing);
        let todo = script::pending(files, there, new.plan.allow_out_of_order);
        let todo = todo.map_err(|why| Problem::invalid(format!("tenant {name}: {why}")))?;
        Ok(todo.iter().map(|file| file.name.clone()).collect())
    };
    new.tenants.iter().map(of).collect()
}

/// What a dry run tells.
fn planned(new: NewRollout, skipped: &Skipped, pending: Vec<Vec<String>>, actor: &str) -> RolloutView {
    let turn = |((_, name, wave), files): ((i64, String, u32), Vec<String>)| {
        let error = skipped.iter().find(|(of, _)| *of == name).map(|(_, why)| why.clone());
        let state = if error.is_some() { Turn::Skipped } else { Turn::Waiting };
        let (attempts, job, login, began_at, ended_at) = (0, None, None, None, None);
        TurnView { name, wave, state, attempts, job, login, error, files, began_at, ended_at }
    };
    let tenants: Vec<TurnView> = new.tenants.into_iter().zip(pending).map(turn).collect();
    let name = |file: &Migration| FileName {
        version: file.version,
        name: file.name.clone(),
        transactional: file.transactional,
    };
    let now = OffsetDateTime::now_utc();
    RolloutView {
        id: None,
        kind: new.kind,
        state: RolloutState::Running,
        error: None,
        plan: new.plan,
        command: new.command,
        files: new.files.unwrap_or_default().iter().map(name).collect(),
        counts: counts(tenants.iter().map(|turn| turn.state)),
        tenants,
        actor: actor.to_owned(),
        created_at: now,
        updated_at: now,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn known() -> Known {
        let entry = |number: i64, name: &str, stage: &str, state: &str| {
            serde_json::from_value(json!({
                "number": number, "name": name, "state": state, "held": false, "server": "main", "database": name,
                "owner_role": name, "aliases": [], "version": 1, "spec": { "stage": stage }, "roles": [],
                "created_at": "2026-11-26T00:00:00Z", "updated_at": "2026-11-26T00:00:00Z",
            }))
            .unwrap()
        };
        let tenants = vec![
            entry(1, "blog", "production", "active"),
            entry(2, "exp_one", "experiment", "active"),
            entry(3, "exp_two", "experiment", "archived"),
            entry(4, "shop", "production", "paused"),
        ];
        Known { tenants, ..Known::default() }
    }

    fn planned_of(wish: Value) -> Result<(Vec<(String, u32)>, Skipped), String> {
        let mut wish = wish;
        if wish["exec"].is_null() {
            wish["migrations"] = json!([{ "version": 1, "name": "0001_a.sql", "sql": "SELECT 1" }]);
        }
        let wish = serde_json::from_value(wish).map_err(|error| error.to_string())?;
        let (new, skipped) = plan(&known(), wish).map_err(|problem| problem.detail)?;
        Ok((new.tenants.into_iter().map(|(_, name, wave)| (name, wave)).collect(), skipped))
    }

    fn names(wish: Value) -> Result<String, String> {
        let (tenants, _) = planned_of(wish)?;
        Ok(tenants.iter().map(|(name, wave)| format!("{name}:{wave}")).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn tenants_are_chosen_by_name_pattern_and_label_and_never_all_by_accident() {
        assert_eq!(names(json!({ "all": true, "canary": 0 })).unwrap(), "blog:1 exp_one:1 exp_two:1 shop:1");
        assert_eq!(names(json!({ "tenants": ["shop", "exp_*"] })).unwrap(), "exp_one:0 exp_two:1 shop:1");
        assert_eq!(names(json!({ "stage": "production" })).unwrap(), "blog:0 shop:1");
        assert_eq!(names(json!({ "tenants": ["b*", "e*"], "stage": "production" })).unwrap(), "blog:0");
        for wrong in [json!({}), json!({ "all": true, "tenants": ["shop"] })] {
            assert!(names(wrong).unwrap_err().contains("say which"));
        }
        assert!(names(json!({ "tenants": ["shop", "nosuch"] })).unwrap_err().contains("nosuch"));
        assert!(names(json!({ "stage": "pilot" })).unwrap_err().contains("there is none"));
    }

    #[test]
    fn the_canary_may_be_named() {
        let wish = json!({ "all": true, "canary_tenants": ["shop"], "wave": "50%" });
        assert_eq!(names(wish).unwrap(), "shop:0 blog:1 exp_one:1 exp_two:2");
        let wrong = json!({ "tenants": ["blog"], "canary_tenants": ["shop"] });
        assert!(names(wrong).unwrap_err().contains("canary_tenants"));
    }

    #[test]
    fn who_cannot_have_a_turn_is_told_before() {
        let (_, skipped) = planned_of(json!({ "all": true })).unwrap();
        assert_eq!(skipped, [("exp_two".to_owned(), "it is archived".to_owned())]);
        let verifier = "SCRAM-SHA-256$4096:AAAAAAAAAAAAAAAAAAAAAA==$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
        let exec = json!({ "all": true, "exec": { "command": ["true"], "verifier": verifier } });
        let (_, skipped) = planned_of(exec).unwrap();
        assert_eq!(skipped.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["exp_two", "shop"]);
        let password = json!({ "all": true, "exec": { "command": ["true"], "verifier": "secret" } });
        assert!(names(password).unwrap_err().contains("verifier"));
    }
}
