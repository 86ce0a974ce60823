//! Rollouts in the catalog: what is to be done to which tenants, in which order, and how far it is.
//!
//! What always holds: a tenant's turn and the job that does it are written in one transaction, by the process that runs the
//! jobs; a tenant with a job under way gets no second one, and is waited for with a bound; who is done is never begun again.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tenantry_config::TenantState;
use time::OffsetDateTime;
use tokio_postgres::{Row, Transaction, types::Json};
use utoipa::ToSchema;

use super::{
    Catalog, CatalogError,
    audit::{self, Deed},
    entry,
    model::{Entry, Verifier},
    store::{Asker, insert_job},
    within,
};
use crate::{
    jobs::work::Work,
    migrate::{
        script::{Applied, Migration},
        waves::{End, Limits, Turn},
    },
    sql::{catalog as sql, rollouts as of},
};

/// What a rollout does to each of its tenants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Files of SQL.
    Migrate,
    /// A command that whoever asked for it runs.
    Exec,
}

impl Kind {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Migrate => "migrate",
            Self::Exec => "exec",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::Migrate, Self::Exec].into_iter().find(|kind| kind.as_str() == word)
    }

    /// Whether it can be done to a tenant in this state. A command comes in like the tenant's clients do.
    pub fn suits(self, of: &Entry) -> Result<(), String> {
        use TenantState as S;
        if of.kept.is_some() {
            return Err(
                "it was moved, and changed tables would break the way back: confirm the move first, or roll it back"
                    .to_owned(),
            );
        }
        match (self, of.state) {
            (_, S::Active | S::Suspended) | (Self::Migrate, S::Paused | S::Drained) => Ok(()),
            (Self::Exec, S::Paused) => Err("it is paused: a command would wait; resume it first".to_owned()),
            (_, state) => Err(format!("it is {state}")),
        }
    }
}

/// Where a rollout is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RolloutState {
    Running,
    /// All had their turn, and nobody failed.
    Succeeded,
    /// All had their turn, and some failed.
    Failed,
    /// Too many failed, or the canary did: the others had no turn.
    Stopped,
    /// Somebody stopped it.
    Cancelled,
}

impl RolloutState {
    const ALL: [Self; 5] = [Self::Running, Self::Succeeded, Self::Failed, Self::Stopped, Self::Cancelled];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
            Self::Cancelled => "cancelled",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }
}

impl From<End> for RolloutState {
    fn from(end: End) -> Self {
        match end {
            End::Succeeded => Self::Succeeded,
            End::Failed => Self::Failed,
            End::Stopped => Self::Stopped,
        }
    }
}

/// How a rollout goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    /// Tenants under way at once.
    pub parallel: u32,
    /// After so many failures nobody else begins.
    pub stop_after: u32,
    /// Tenants in the canary.
    pub canary: u32,
    /// Of the waves after it: a number, or a percentage; null: all in one.
    pub wave: Option<String>,
    /// Milliseconds that a statement waits for a lock.
    pub lock_timeout_ms: u64,
    /// How often a file is tried again whose locks were not to be had.
    pub lock_retries: u32,
    /// Milliseconds that a statement may take; 0: no limit. Of a command null: what the tenant has.
    pub statement_timeout_ms: Option<u64>,
    /// Files with a lower number than those that were applied.
    pub allow_out_of_order: bool,
    /// Milliseconds that a command may take.
    pub timeout_ms: u64,
    /// Milliseconds that a tenant is waited for which another job has: then it has failed.
    #[serde(default = "busy_timeout")]
    pub busy_timeout_ms: u64,
}

/// Longer than an archive of a few gigabytes takes.
#[must_use]
pub fn busy_timeout() -> u64 {
    600_000
}

impl Plan {
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits { parallel: self.parallel, stop_after: self.stop_after }
    }
}

/// A rollout that is to be.
#[derive(Debug)]
pub struct NewRollout {
    pub kind: Kind,
    pub plan: Plan,
    pub command: Option<Vec<String>>,
    pub files: Option<Vec<Migration>>,
    pub verifier: Option<Verifier>,
    /// Number, name, wave; in order.
    pub tenants: Vec<(i64, String, u32)>,
}

/// A file of a rollout, without its text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileName {
    pub version: i64,
    pub name: String,
    pub transactional: bool,
}

/// A rollout as it is written down, but for its tenants and its files' text.
#[derive(Debug, Clone)]
pub struct RolloutRow {
    pub id: i64,
    pub kind: Kind,
    pub state: RolloutState,
    pub plan: Plan,
    pub command: Option<Vec<String>>,
    pub error: Option<String>,
    pub actor: String,
    pub created_at: OffsetDateTime,
    pub updated_at: OffsetDateTime,
    /// Of exec: seconds since whoever runs the commands was heard of.
    pub silent: f64,
    /// Only where one is asked for.
    pub files: Vec<FileName>,
}

/// A tenant of a rollout.
#[derive(Debug, Clone)]
pub struct Item {
    pub tenant: i64,
    pub name: String,
    pub wave: u32,
    pub turn: Turn,
    pub attempts: u32,
    pub job: Option<i64>,
    pub login: Option<String>,
    pub error: Option<String>,
    pub result: Option<Value>,
    pub began_at: Option<OffsetDateTime>,
    pub ended_at: Option<OffsetDateTime>,
}

/// What came of a tenant's turn to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begun {
    Yes,
    /// Another job has it: its turn stays.
    Busy,
    /// Another job had it for too long: it has failed.
    GivenUp,
    /// Nothing can be done to it.
    Skipped,
    /// The rollout was stopped, or the turn is another's.
    No,
}

/// What came of a request that begins a rollout.
#[derive(Debug)]
pub enum Inserted {
    New(i64),
    /// The same request was made before.
    Before(i64),
    /// Another request had the key.
    OtherRequest,
}

/// What came of resuming one.
#[derive(Debug)]
pub enum Resumed {
    Yes,
    Gone,
    /// It is in this state, or some of its tenants are under way.
    Not(RolloutState),
}

impl Catalog {
    /// Writes a rollout, once for one key.
    pub async fn insert_rollout(
        &self,
        deed: &Deed<'_>,
        new: &NewRollout,
        key: Option<(&str, &str)>,
    ) -> Result<Inserted, CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            // Two at once with the same key: one after the other.
            change.query_one(sql::BUMP, &[]).await?;
            let Asker { actor, peer, request } = deed.asker;
            if let Some((key, hash)) = key
                && let Some(row) = change.query_opt(of::ROLLOUT_OF_KEY, &[actor, &key]).await?
            {
                let (id, known): (i64, String) = (row.try_get(0)?, row.try_get(1)?);
                return Ok(if known == hash { Inserted::Before(id) } else { Inserted::OtherRequest });
            }
            let NewRollout { kind, plan, command, files, verifier, tenants } = new;
            let (key, hash) = key.unzip();
            let verifier = verifier.as_ref().map(|verifier| &verifier.0);
            let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 10] = [
                &kind.as_str(),
                &Json(plan),
                &command.as_ref().map(Json),
                &files.as_ref().map(Json),
                &verifier,
                actor,
                peer,
                request,
                &key,
                &hash,
            ];
            let id: i64 = change.query_one(of::INSERT_ROLLOUT, &parameters).await?.try_get(0)?;
            let insert = change.prepare(of::INSERT_ITEM).await?;
            for (place, (tenant, name, wave)) in (0i32..).zip(tenants) {
                let wave = i32::try_from(*wave).unwrap_or(i32::MAX);
                change.execute(&insert, &[&id, tenant, name, &wave, &place]).await?;
            }
            audit::write(&change, deed, "begun", None, Some(json!({ "rollout": id }))).await?;
            change.commit().await?;
            Ok(Inserted::New(id))
        })
        .await
    }

    pub async fn rollout(&self, id: i64) -> Result<Option<RolloutRow>, CatalogError> {
        within(async { self.client().await?.query_opt(of::ROLLOUT, &[&id]).await?.as_ref().map(rollout).transpose() })
            .await
    }

    /// Newest first, those before `before`.
    pub async fn rollouts(&self, before: i64, limit: i64) -> Result<Vec<RolloutRow>, CatalogError> {
        within(async {
            self.client().await?.query(of::ROLLOUTS, &[&before, &limit]).await?.iter().map(rollout).collect()
        })
        .await
    }

    /// Those with something to do, or to wait for.
    pub async fn open_rollouts(&self) -> Result<Vec<RolloutRow>, CatalogError> {
        within(async { self.client().await?.query(of::OPEN_ROLLOUTS, &[]).await?.iter().map(rollout).collect() }).await
    }

    /// Its tenants, in order.
    pub async fn rollout_items(&self, id: i64) -> Result<Vec<Item>, CatalogError> {
        within(async { self.client().await?.query(of::ITEMS, &[&id]).await?.iter().map(item).collect() }).await
    }

    /// Another text whenever something of it has changed; `None`: there is none.
    pub async fn rollout_mark(&self, id: i64) -> Result<Option<String>, CatalogError> {
        within(async {
            let row = self.client().await?.query_opt(of::MARK, &[&id]).await?;
            Ok(row.map(|row| row.try_get(0)).transpose()?)
        })
        .await
    }

    /// How many of its tenants are where.
    pub async fn rollout_counts(&self, id: i64) -> Result<BTreeMap<String, u64>, CatalogError> {
        within(async {
            let rows = self.client().await?.query(of::COUNTS, &[&id]).await?;
            let count = |row: &Row| Ok((row.try_get(0)?, u64::try_from(row.try_get::<_, i64>(1)?).unwrap_or(0)));
            rows.iter().map(count).collect()
        })
        .await
    }

    /// How it goes, and its files with their text.
    pub async fn rollout_files(&self, id: i64) -> Result<Option<(Plan, Vec<Migration>)>, CatalogError> {
        within(async {
            let row = self.client().await?.query_opt(of::FILES, &[&id]).await?;
            row.map(|row| {
                let files = row.try_get::<_, Option<Json<_>>>(1)?.map(|Json(files)| files).unwrap_or_default();
                Ok((row.try_get::<_, Json<_>>(0)?.0, files))
            })
            .transpose()
        })
        .await
    }

    /// How it goes, and what its logins prove themselves with, while it runs.
    pub async fn rollout_login(&self, id: i64) -> Result<Option<(Plan, Option<Verifier>)>, CatalogError> {
        within(async {
            let row = self.client().await?.query_opt(of::LOGIN, &[&id]).await?;
            row.map(|row| Ok((row.try_get::<_, Json<_>>(0)?.0, row.try_get::<_, Option<String>>(1)?.map(Verifier))))
                .transpose()
        })
        .await
    }

    /// Takes over how jobs of a rollout ended.
    pub async fn settle_rollout(&self, leader: i64, id: i64) -> Result<u64, CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            must_lead(&change, leader).await?;
            let settled = change.execute(of::SETTLE, &[&id]).await?;
            change.commit().await?;
            Ok(settled)
        })
        .await
    }

    /// A tenant's turn begins with its job.
    pub async fn begin_turn(&self, leader: i64, rollout: &RolloutRow, tenant: i64) -> Result<Begun, CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            if change.query_one(sql::BUMP, &[]).await?.try_get::<_, i64>(0)? != leader {
                return Err(not_the_leader());
            }
            let Some(item) = change.query_opt(of::ITEM_FOR_UPDATE, &[&rollout.id, &tenant]).await? else {
                return Ok(Begun::No);
            };
            let found = change.query_opt(sql::TENANT, &[&tenant]).await?.as_ref().map(entry).transpose()?;
            let suits = found.as_ref().map_or_else(|| Err("it is gone".to_owned()), |of| rollout.kind.suits(of));
            if let Some(job) = change.query_opt(sql::OPEN_JOB_OF, &[&tenant]).await? {
                return busy(change, rollout, tenant, &item, job.try_get(0)?).await;
            }
            let (Some(found), Ok(())) = (&found, &suits) else {
                change.execute(of::SKIP_ITEM, &[&rollout.id, &tenant, &suits.err()]).await?;
                change.commit().await?;
                return Ok(Begun::Skipped);
            };
            let row = change.query_one(of::ASKER_OF_ROLLOUT, &[&rollout.id]).await?;
            let asker = Asker { actor: row.try_get(0)?, peer: row.try_get(1)?, request: row.try_get(2)? };
            let work = match rollout.kind {
                Kind::Migrate => Work::Migrate { rollout: rollout.id },
                Kind::Exec => Work::Exec { rollout: rollout.id },
            };
            let job = insert_job(&change, found, &work, &asker, None).await?;
            change.execute(of::BEGIN_ITEM, &[&rollout.id, &tenant, &job]).await?;
            let deed = Deed { asker: &asker, action: work.kind(), tenant: Some(&found.name) };
            let after = Some(json!({ "job": job, "rollout": rollout.id }));
            audit::write(&change, &deed, "begun", Some(audit::shown(found, None)), after).await?;
            change.commit().await?;
            Ok(Begun::Yes)
        })
        .await
    }

    /// It is over.
    pub async fn end_rollout(
        &self,
        leader: i64,
        id: i64,
        state: RolloutState,
        why: Option<&str>,
    ) -> Result<(), CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            must_lead(&change, leader).await?;
            if change.execute(of::END_ROLLOUT, &[&id, &state.as_str(), &why]).await? == 0 {
                return Ok(());
            }
            let row = change.query_one(of::ASKER_OF_ROLLOUT, &[&id]).await?;
            let asker = Asker { actor: row.try_get(0)?, peer: row.try_get(1)?, request: row.try_get(2)? };
            let deed = Deed { asker: &asker, action: "rollout", tenant: None };
            audit::write(&change, &deed, state.as_str(), None, Some(json!({ "rollout": id, "error": why }))).await?;
            Ok(change.commit().await?)
        })
        .await
    }

    /// Nobody else begins, and those under way turn back where they can; `None`: no such rollout, else whether it ran.
    pub async fn cancel_rollout(&self, deed: &Deed<'_>, id: i64) -> Result<Option<bool>, CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            let Some((state, _)) = locked(&change, id).await? else { return Ok(None) };
            if state != RolloutState::Running {
                return Ok(Some(false));
            }
            let who = format!("stopped by {}", deed.asker.actor);
            change.execute(of::END_ROLLOUT, &[&id, &RolloutState::Cancelled.as_str(), &who]).await?;
            change.execute(of::CANCEL_JOBS, &[&id]).await?;
            audit::write(&change, deed, "done", None, Some(json!({ "rollout": id }))).await?;
            change.commit().await?;
            Ok(Some(true))
        })
        .await
    }

    /// It goes on: the failed, the skipped and those that were not reached have a turn.
    pub async fn resume_rollout(
        &self,
        deed: &Deed<'_>,
        id: i64,
        verifier: Option<&Verifier>,
    ) -> Result<Resumed, CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            let Some((state, _)) = locked(&change, id).await? else { return Ok(Resumed::Gone) };
            let has_running: bool = change.query_one(of::HAS_RUNNING, &[&id]).await?.try_get(0)?;
            if has_running || matches!(state, RolloutState::Running | RolloutState::Succeeded) {
                return Ok(Resumed::Not(state));
            }
            change.execute(of::REWIND_ITEMS, &[&id]).await?;
            change.execute(of::RESUME_ROLLOUT, &[&id, &verifier.map(|verifier| &verifier.0)]).await?;
            audit::write(&change, deed, "begun", None, Some(json!({ "rollout": id }))).await?;
            change.commit().await?;
            Ok(Resumed::Yes)
        })
        .await
    }

    /// Whoever runs the commands of a rollout is there; and how some of them ended: tenant, attempt, what went wrong. False,
    /// and nothing is taken over, if somebody else runs them by now.
    pub async fn hear_of_runner(
        &self,
        id: i64,
        verifier: Option<&str>,
        ended: &[(String, u32, String)],
    ) -> Result<bool, CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            if change.query_opt(of::IS_ANOTHERS, &[&id, &verifier]).await?.is_some() {
                return Ok(false);
            }
            change.execute(of::SIGN_OF_RUNNER, &[&id]).await?;
            for (name, attempt, outcome) in ended {
                let attempt = i32::try_from(*attempt).unwrap_or(i32::MAX);
                change.execute(of::SET_OUTCOME, &[&id, name, &attempt, outcome]).await?;
            }
            change.commit().await?;
            Ok(true)
        })
        .await
    }

    /// Silence counts from now on, of all runners: whoever ran the jobs before may have been gone for longer than they may be.
    pub async fn hear_all_runners(&self, leader: i64) -> Result<(), CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            must_lead(&change, leader).await?;
            change.execute(of::HEAR_ALL_RUNNERS, &[]).await?;
            Ok(change.commit().await?)
        })
        .await
    }

    /// The command of a tenant may run, with this login; or no more.
    pub async fn set_login(&self, id: i64, tenant: i64, login: Option<&str>) -> Result<(), CatalogError> {
        within(async {
            self.client().await?.execute(of::SET_LOGIN, &[&id, &tenant, &login]).await?;
            Ok(())
        })
        .await
    }

    /// How a command ended (an empty text: well), and the seconds since its runner was heard of.
    pub async fn outcome(&self, id: i64, tenant: i64) -> Result<(Option<String>, f64), CatalogError> {
        within(async {
            let row = self.client().await?.query_one(of::OUTCOME, &[&id, &tenant]).await?;
            Ok((row.try_get(0)?, row.try_get(1)?))
        })
        .await
    }

    /// What a tenant's version table says, from now on.
    pub async fn note_migrations(
        &self,
        tenant: i64,
        applied: &[(i64, Applied, OffsetDateTime)],
    ) -> Result<(), CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            change.execute(of::FORGET_MIGRATIONS, &[&tenant]).await?;
            let insert = change.prepare(of::NOTE_MIGRATION).await?;
            for (version, Applied { name, sha256, .. }, at) in applied {
                change.execute(&insert, &[&tenant, version, name, sha256, at]).await?;
            }
            Ok(change.commit().await?)
        })
        .await
    }

    /// What version tables said last, by tenant.
    pub async fn migrations_of(&self, tenants: &[i64]) -> Result<BTreeMap<i64, BTreeMap<i64, Applied>>, CatalogError> {
        within(async {
            let mut all: BTreeMap<i64, BTreeMap<i64, Applied>> = BTreeMap::new();
            for row in self.client().await?.query(of::MIGRATIONS_OF, &[&tenants]).await? {
                let applied = Applied { name: row.try_get(2)?, sha256: row.try_get(3)?, is_done: true, statements: 0 };
                all.entry(row.try_get(0)?).or_default().insert(row.try_get(1)?, applied);
            }
            Ok(all)
        })
        .await
    }
}

/// A tenant whose turn has come, and that another job has: told, and given up where that lasts too long.
async fn busy(
    change: deadpool_postgres::Transaction<'_>,
    rollout: &RolloutRow,
    tenant: i64,
    item: &Row,
    job: i64,
) -> Result<Begun, CatalogError> {
    let (waited, told): (Option<f64>, Option<String>) = (item.try_get(0)?, item.try_get(1)?);
    let limit = Duration::from_millis(rollout.plan.busy_timeout_ms);
    if waited.unwrap_or(0.0) >= limit.as_secs_f64() {
        let why = format!(
            "busy: job {job} is under way on it, and after {} (busy_timeout) it is not waited for any more",
            humantime::format_duration(limit)
        );
        change.execute(of::FAIL_ITEM, &[&rollout.id, &tenant, &why]).await?;
        change.commit().await?;
        return Ok(Begun::GivenUp);
    }
    let why = format!("busy: waits for job {job}");
    if waited.is_none() || told.as_ref() != Some(&why) {
        change.execute(of::BUSY_ITEM, &[&rollout.id, &tenant, &why]).await?;
        change.commit().await?;
    }
    Ok(Begun::Busy)
}

fn not_the_leader() -> CatalogError {
    CatalogError::Away("another process runs the jobs now".to_owned())
}

async fn must_lead(change: &Transaction<'_>, leader: i64) -> Result<(), CatalogError> {
    match change.query_one(sql::LEADER, &[]).await?.try_get::<_, i64>(0)? {
        now if now == leader => Ok(()),
        _ => Err(not_the_leader()),
    }
}

async fn locked(change: &Transaction<'_>, id: i64) -> Result<Option<(RolloutState, Kind)>, CatalogError> {
    let Some(row) = change.query_opt(of::ROLLOUT_FOR_UPDATE, &[&id]).await? else { return Ok(None) };
    Ok(Some((state(&row, 0)?, kind(&row, 1)?)))
}

fn state(row: &Row, at: usize) -> Result<RolloutState, CatalogError> {
    let word: String = row.try_get(at)?;
    RolloutState::parse(&word).ok_or(CatalogError::Garbage(word))
}

fn kind(row: &Row, at: usize) -> Result<Kind, CatalogError> {
    let word: String = row.try_get(at)?;
    Kind::parse(&word).ok_or(CatalogError::Garbage(word))
}

fn rollout(row: &Row) -> Result<RolloutRow, CatalogError> {
    Ok(RolloutRow {
        id: row.try_get(0)?,
        kind: kind(row, 1)?,
        state: state(row, 2)?,
        plan: row.try_get::<_, Json<_>>(3)?.0,
        command: row.try_get::<_, Option<Json<_>>>(4)?.map(|Json(words)| words),
        error: row.try_get(5)?,
        actor: row.try_get(6)?,
        created_at: row.try_get(7)?,
        updated_at: row.try_get(8)?,
        silent: row.try_get(9)?,
        files: row.try_get::<_, Option<Json<_>>>(10)?.map(|Json(files)| files).unwrap_or_default(),
    })
}

fn item(row: &Row) -> Result<Item, CatalogError> {
    let word: String = row.try_get(3)?;
    let number = |at: usize| Ok::<_, CatalogError>(u32::try_from(row.try_get::<_, i32>(at)?).unwrap_or(0));
    Ok(Item {
        tenant: row.try_get(0)?,
        name: row.try_get(1)?,
        wave: number(2)?,
        turn: Turn::parse(&word).ok_or(CatalogError::Garbage(word))?,
        attempts: number(4)?,
        job: row.try_get(5)?,
        login: row.try_get(6)?,
        error: row.try_get(7)?,
        result: row.try_get(8)?,
        began_at: row.try_get(9)?,
        ended_at: row.try_get(10)?,
    })
}
