//! Changes to the catalog, and what is read of it on demand.

use serde_json::{Value, json};
use tenantry_config::TenantState;
use time::OffsetDateTime;
use tokio_postgres::{Row, Transaction, types::Json};

use super::{
    Catalog, CatalogError,
    audit::{self, Deed, shown},
    entry,
    model::{Access, Entry, Known, RoleRow, Spec},
    within,
};
use crate::{
    jobs::work::{JobState, Work},
    sql::catalog as sql,
};

/// Who asks, for the audit log.
#[derive(Debug, Clone)]
pub struct Asker {
    /// The token's id and label, or what of Tenantry itself.
    pub actor: String,
    pub peer: String,
    /// Ties intent and outcome together.
    pub request: String,
}

/// A job as it is written down.
#[derive(Debug, Clone)]
pub struct JobRow {
    pub id: i64,
    pub tenant: i64,
    pub name: String,
    pub work: Work,
    pub state: JobState,
    pub step: usize,
    pub progress: Option<String>,
    pub result: Value,
    pub error: Option<String>,
    pub cancel: bool,
    pub actor: String,
    pub created_at: OffsetDateTime,
    pub updated_at: OffsetDateTime,
}

/// An archive of a tenant.
#[derive(Debug, Clone, serde::Serialize, utoipa::ToSchema)]
pub struct ArchiveRow {
    pub id: i64,
    /// Number of the tenant.
    pub tenant: i64,
    /// Its name now.
    pub name: String,
    /// Where in the store.
    pub path: String,
    pub bytes: i64,
    pub sha256: String,
    /// Rows and checksum by table.
    pub tables: Value,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

/// What a line in the journal came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Journalled {
    Done,
    /// Somebody cancelled it before there was no way back any more; nothing is written.
    Cancelled,
    /// The job is not where it was known to be, or others run the jobs now; nothing is written.
    Stale,
}

/// What a change to a tenant came to.
#[derive(Debug)]
pub enum Changed<E> {
    Done {
        before: Box<Entry>,
        after: Box<Entry>,
    },
    /// Nothing was changed.
    Refused(E),
    Gone,
}

/// What a change must see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    AtIt,
    /// All tenants, too: for names and for sums.
    AtAll,
}

/// What a change sees besides its tenant.
#[derive(Debug)]
pub struct Seen {
    /// The job that the tenant is busy with.
    pub job: Option<i64>,
    /// With its tenants only if it was asked for.
    pub known: Known,
}

/// As many open jobs as are read at once: beyond that nobody knows all of them.
pub const MOST_OPEN_JOBS: usize = 1_000;

/// Jobs that are not over; and those that cannot be read, with the reason.
pub type OpenJobs = (Vec<JobRow>, Vec<(i64, CatalogError)>);

/// A new tenant, before it has a number.
#[derive(Debug)]
pub struct NewTenant {
    pub name: String,
    pub state: TenantState,
    pub server: String,
    pub database: String,
    pub owner_role: String,
    pub spec: Spec,
    pub roles: Vec<RoleRow>,
}

impl Catalog {
    /// Writes a tenant and, with it, the job that makes it real; unless `check`, who sees all others, says no.
    pub async fn insert_tenant<E>(
        &self,
        deed: &Deed<'_>,
        new: &NewTenant,
        work: Option<&Work>,
        key: Option<(&str, &str)>,
        check: impl FnOnce(&Known) -> Result<(), E> + Send,
    ) -> Result<Result<(Entry, Option<i64>), E>, CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            if let Err(refused) = check(&bump(&change, true).await?) {
                return Ok(Err(refused));
            }
            let NewTenant { name, state, server, database, owner_role, spec, roles } = new;
            let row = change
                .query_one(
                    sql::INSERT_TENANT,
                    &[name, &state.as_str(), server, database, owner_role, &Json(spec), &Json(roles)],
                )
                .await?;
            let made = entry(&row)?;
            change.execute(sql::WRITE_NAMES, &[&made.number]).await?;
            let job = match work {
                Some(work) => Some(insert_job(&change, &made, work, deed.asker, key).await?),
                None => None,
            };
            audit::write(&change, deed, if job.is_some() { "begun" } else { "done" }, None, Some(shown(&made, job)))
                .await?;
            change.commit().await?;
            Ok(Ok((made, job)))
        })
        .await
    }

    /// Changes a tenant as `edit` says, whole or not at all, with its outcome in the audit log. What `edit` sees cannot
    /// change before the commit.
    pub async fn change_at_rest<E>(
        &self,
        deed: &Deed<'_>,
        number: i64,
        look: Look,
        edit: impl FnOnce(&mut Entry, &Seen) -> Result<(), E> + Send,
    ) -> Result<Changed<E>, CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            let known = bump(&change, look == Look::AtAll).await?;
            let Some(row) = change.query_opt(sql::TENANT, &[&number]).await? else { return Ok(Changed::Gone) };
            let before = Box::new(entry(&row)?);
            let job = change.query_opt(sql::OPEN_JOB_OF, &[&number]).await?.map(|row| row.try_get(0)).transpose()?;
            let mut after = before.clone();
            if let Err(refused) = edit(&mut after, &Seen { job, known }) {
                return Ok(Changed::Refused(refused));
            }
            if after != before {
                update(&change, &mut after).await?;
            }
            audit::write(&change, deed, "done", Some(shown(&before, None)), Some(shown(&after, None))).await?;
            change.commit().await?;
            Ok(Changed::Done { before, after })
        })
        .await
    }

    /// Changes a tenant as `edit` says, whole or not at all.
    pub async fn change_tenant<E>(
        &self,
        number: i64,
        edit: impl FnOnce(&mut Entry) -> Result<(), E> + Send,
    ) -> Result<Changed<E>, CatalogError> {
        self.change_tenant_as(None, number, edit).await
    }

    /// The same, as a step of a job: only while `leader` runs the jobs.
    pub async fn change_tenant_as<E>(
        &self,
        leader: Option<i64>,
        number: i64,
        edit: impl FnOnce(&mut Entry) -> Result<(), E> + Send,
    ) -> Result<Changed<E>, CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            let leads: i64 = change.query_one(sql::BUMP, &[]).await?.try_get(0)?;
            if leader.is_some_and(|leader| leader != leads) {
                return Err(CatalogError::Away("another process runs the jobs now".to_owned()));
            }
            let Some(row) = change.query_opt(sql::TENANT, &[&number]).await? else { return Ok(Changed::Gone) };
            let before = Box::new(entry(&row)?);
            let mut after = before.clone();
            if let Err(refused) = edit(&mut after) {
                return Ok(Changed::Refused(refused));
            }
            if after != before {
                update(&change, &mut after).await?;
                change.commit().await?;
            }
            Ok(Changed::Done { before, after })
        })
        .await
    }

    pub async fn tenant(&self, number: i64) -> Result<Option<Entry>, CatalogError> {
        within(async { self.client().await?.query_opt(sql::TENANT, &[&number]).await?.as_ref().map(entry).transpose() })
            .await
    }

    /// Writes a job for a tenant, unless `check`, who sees it as it stays until then, says no.
    pub async fn insert_job<E>(
        &self,
        deed: &Deed<'_>,
        tenant: i64,
        work: &Work,
        key: Option<(&str, &str)>,
        check: impl FnOnce(Option<&Entry>) -> Result<(), E> + Send,
    ) -> Result<Result<i64, E>, CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            change.query_one(sql::BUMP, &[]).await?;
            let found = change.query_opt(sql::TENANT, &[&tenant]).await?.as_ref().map(entry).transpose()?;
            if let Err(refused) = check(found.as_ref()) {
                return Ok(Err(refused));
            }
            let Some(found) = found else { return Err(CatalogError::Garbage("a job for nobody".to_owned())) };
            let id = insert_job(&change, &found, work, deed.asker, key).await?;
            audit::write(&change, deed, "begun", Some(shown(&found, None)), Some(json!({ "job": id }))).await?;
            change.commit().await?;
            Ok(Ok(id))
        })
        .await
    }

    /// The job that this key began, if it did, and a hash of what was asked then.
    pub async fn idempotent(&self, actor: &str, key: &str) -> Result<Option<(String, Option<i64>)>, CatalogError> {
        within(async {
            let row = self.client().await?.query_opt(sql::IDEMPOTENT, &[&actor, &key]).await?;
            row.map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).transpose()
        })
        .await
    }

    pub async fn job(&self, id: i64) -> Result<Option<JobRow>, CatalogError> {
        within(async { self.client().await?.query_opt(sql::JOB, &[&id]).await?.as_ref().map(job).transpose() }).await
    }

    /// Newest first, those before `before`; one that this version cannot read is left out, and told.
    pub async fn jobs(&self, before: i64, limit: i64, tenant: Option<&str>) -> Result<Vec<JobRow>, CatalogError> {
        within(async {
            let rows = self.client().await?.query(sql::JOBS, &[&before, &limit, &tenant]).await?;
            Ok(rows
                .iter()
                .filter_map(|row| job(row).inspect_err(|error| tracing::error!(%error, "a job cannot be read")).ok())
                .collect())
        })
        .await
    }

    /// Jobs that are not over; and those that this version cannot read, with why.
    pub async fn open_jobs(&self) -> Result<OpenJobs, CatalogError> {
        within(async {
            let (mut jobs, mut unreadable) = (Vec::new(), Vec::new());
            for row in self.client().await?.query(sql::OPEN_JOBS, &[]).await? {
                match job(&row) {
                    Ok(job) => jobs.push(job),
                    Err(error) => unreadable.push((row.try_get(0)?, error)),
                }
            }
            Ok((jobs, unreadable))
        })
        .await
    }

    /// Takes the jobs over: the number that the journal wants to see.
    pub async fn lead(&self) -> Result<i64, CatalogError> {
        within(async { Ok(self.client().await?.query_one(sql::LEAD, &[]).await?.try_get(0)?) }).await
    }

    /// Of whoever took them over last.
    pub async fn leader(&self) -> Result<i64, CatalogError> {
        within(async { Ok(self.client().await?.query_one(sql::LEADER_NOW, &[]).await?.try_get(0)?) }).await
    }

    /// Living tenants, besides this one, that have a role on a server.
    pub async fn others_with_role(&self, of: i64, server: &str, role: &str) -> Result<Vec<i64>, CatalogError> {
        within(async {
            let rows = self.client().await?.query(sql::OTHERS_WITH_ROLE, &[&of, &server, &role]).await?;
            rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
        })
        .await
    }

    /// Whether another tenant, which was moved, has a copy on a server that needs a role there.
    pub async fn copy_needs_role(&self, of: i64, server: &str, role: &str) -> Result<bool, CatalogError> {
        within(async {
            let row = self.client().await?.query_one(sql::COPIES_WITH_ROLE, &[&of, &server, &role]).await?;
            Ok(row.try_get::<_, i64>(0)? > 0)
        })
        .await
    }

    /// The job that a tenant is busy with.
    pub async fn busy_with(&self, tenant: i64) -> Result<Option<i64>, CatalogError> {
        within(async {
            let row = self.client().await?.query_opt(sql::OPEN_JOB_OF, &[&tenant]).await?;
            Ok(row.map(|row| row.try_get(0)).transpose()?)
        })
        .await
    }

    /// Where a job stands now, and what there is to tell of it: one transaction, and only from where `was` left it.
    /// `unless_cancelled`: from here on there is no way back.
    pub async fn journal(
        &self,
        leader: i64,
        was: &JobRow,
        next: &JobRow,
        told: &str,
        unless_cancelled: bool,
    ) -> Result<Journalled, CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            // What it had beside the tenant's clients is served as over.
            let asks = if next.state.is_over() && next.work.room() > 0 { sql::BUMP } else { sql::LEADER };
            if change.query_one(asks, &[]).await?.try_get::<_, i64>(0)? != leader {
                return Ok(Journalled::Stale);
            }
            let step = |job: &JobRow| i32::try_from(job.step).unwrap_or(i32::MAX);
            let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 8] = [
                &next.id,
                &next.state.as_str(),
                &step(next),
                &next.result,
                &next.error,
                &was.state.as_str(),
                &step(was),
                &unless_cancelled,
            ];
            if change.execute(sql::JOURNAL, &parameters).await? == 0 {
                let cancelled: bool = change.query_one(sql::IS_CANCELLED, &[&next.id]).await?.try_get(0)?;
                return Ok(if unless_cancelled && cancelled { Journalled::Cancelled } else { Journalled::Stale });
            }
            if next.state.is_over() && matches!(next.work, Work::Rename { .. } | Work::Move { .. }) {
                write_names(&change, next.tenant, true).await?;
            }
            change.execute(sql::INSERT_EVENT, &[&next.id, &told]).await?;
            if next.state.is_over() {
                change.execute(sql::KEEP_WORK, &[&next.id, &Json(next.work.without_secrets())]).await?;
                audit::job_over(&change, next).await?;
            }
            change.commit().await?;
            Ok(Journalled::Done)
        })
        .await
    }

    /// What a step wants to find again if it is done once more.
    pub async fn note(&self, job: &JobRow, result: &Value) -> Result<(), CatalogError> {
        within(async {
            let step = i32::try_from(job.step).unwrap_or(i32::MAX);
            self.client().await?.execute(sql::NOTE, &[&job.id, result, &job.state.as_str(), &step]).await?;
            Ok(())
        })
        .await
    }

    pub async fn progress(&self, job: i64, text: &str) -> Result<(), CatalogError> {
        within(async {
            self.client().await?.execute(sql::PROGRESS, &[&job, &text]).await?;
            Ok(())
        })
        .await
    }

    /// False if it is over, or past the point from which there is no way back.
    pub async fn cancel_job(&self, deed: &Deed<'_>, id: i64) -> Result<bool, CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            let Some(row) = change.query_opt(sql::JOB_TO_CANCEL, &[&id]).await? else { return Ok(false) };
            let found = job(&row)?;
            let open = matches!(found.state, JobState::Queued | JobState::Running);
            if !open || found.work.way_back(found.step).is_none() {
                return Ok(false);
            }
            change.execute(sql::CANCEL_JOB, &[&id]).await?;
            audit::write(&change, deed, "done", None, Some(json!({ "job": id }))).await?;
            change.commit().await?;
            Ok(true)
        })
        .await
    }

    pub async fn is_cancelled(&self, job: i64) -> Result<bool, CatalogError> {
        within(async { Ok(self.client().await?.query_one(sql::IS_CANCELLED, &[&job]).await?.try_get(0)?) }).await
    }

    /// Those after the event `after`.
    pub async fn events(&self, job: i64, after: i64) -> Result<Vec<(i64, OffsetDateTime, String)>, CatalogError> {
        within(async {
            let rows = self.client().await?.query(sql::EVENTS, &[&job, &after]).await?;
            rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))).collect()
        })
        .await
    }

    pub async fn insert_archive(
        &self,
        tenant: i64,
        path: &str,
        bytes: i64,
        sha256: &str,
        (tables, facts): (&Value, &Value),
    ) -> Result<i64, CatalogError> {
        within(async {
            let client = self.client().await?;
            let row = client.query_one(sql::INSERT_ARCHIVE, &[&tenant, &path, &bytes, &sha256, tables, facts]).await?;
            Ok(row.try_get(0)?)
        })
        .await
    }

    /// What is to be told to PostgreSQL beside the dump itself; not for the API, since settings may hold secrets.
    pub async fn archive_facts(&self, id: i64) -> Result<Option<Value>, CatalogError> {
        within(async {
            let row = self.client().await?.query_opt(sql::ARCHIVE_FACTS, &[&id]).await?;
            row.map(|row| Ok(row.try_get(0)?)).transpose()
        })
        .await
    }

    /// Newest first.
    pub async fn archives(&self, tenant: Option<i64>) -> Result<Vec<ArchiveRow>, CatalogError> {
        within(async { self.client().await?.query(sql::ARCHIVES, &[&tenant]).await?.iter().map(archive).collect() })
            .await
    }

    /// Newest first, those before `before`.
    pub async fn archives_before(&self, before: i64, limit: i64) -> Result<Vec<ArchiveRow>, CatalogError> {
        within(async {
            self.client().await?.query(sql::ARCHIVES_BEFORE, &[&before, &limit]).await?.iter().map(archive).collect()
        })
        .await
    }

    /// One by its number, or the newest; of a tenant, or of any.
    pub async fn archive(&self, tenant: Option<i64>, id: Option<i64>) -> Result<Option<ArchiveRow>, CatalogError> {
        within(async {
            self.client().await?.query_opt(sql::ARCHIVE, &[&tenant, &id]).await?.as_ref().map(archive).transpose()
        })
        .await
    }

    pub async fn insert_token(
        &self,
        deed: &Deed<'_>,
        id: &str,
        label: &str,
        access: Access,
        hash: &[u8],
        expires_at: OffsetDateTime,
    ) -> Result<(), CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            change.query_one(sql::BUMP, &[]).await?;
            change.execute(sql::INSERT_TOKEN, &[&id, &label, &access.as_str(), &hash, &expires_at]).await?;
            let made = json!({ "id": id, "label": label, "access": access, "expires_at": expires_at.unix_timestamp() });
            audit::write(&change, deed, "done", None, Some(made)).await?;
            change.commit().await?;
            Ok(())
        })
        .await
    }

    /// False if there is no such token.
    pub async fn delete_token(&self, deed: &Deed<'_>, id: &str) -> Result<bool, CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            change.query_one(sql::BUMP, &[]).await?;
            if change.execute(sql::DELETE_TOKEN, &[&id]).await? == 0 {
                return Ok(false);
            }
            audit::write(&change, deed, "done", Some(json!({ "id": id })), None).await?;
            change.commit().await?;
            Ok(true)
        })
        .await
    }
}

/// One more step of the revision, which also keeps every other change away until the commit; the tenants, if they are wanted.
async fn bump(change: &Transaction<'_>, with_tenants: bool) -> Result<Known, CatalogError> {
    let catalog = change.query_one(sql::BUMP, &[]).await?.try_get(1)?;
    let rows = if with_tenants { change.query(sql::TENANTS, &[]).await? } else { Vec::new() };
    Ok(Known { catalog, tenants: rows.iter().map(entry).collect::<Result<_, _>>()?, ..Known::default() })
}

async fn update(change: &Transaction<'_>, after: &mut Entry) -> Result<(), CatalogError> {
    let Entry { number, name, state, held, server, database, owner_role, aliases, spec, roles, plans, kept, .. } =
        &*after;
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 12] = [
        number,
        name,
        &state.as_str(),
        held,
        server,
        database,
        owner_role,
        aliases,
        &Json(spec),
        &Json(roles),
        plans,
        &kept.as_ref().map(Json),
    ];
    change.execute(sql::UPDATE_TENANT, &parameters).await?;
    write_names(change, *number, false).await?;
    after.version += 1;
    Ok(())
}

fn archive(row: &Row) -> Result<ArchiveRow, CatalogError> {
    Ok(ArchiveRow {
        id: row.try_get(0)?,
        tenant: row.try_get(1)?,
        name: row.try_get(2)?,
        path: row.try_get(3)?,
        bytes: row.try_get(4)?,
        sha256: row.try_get(5)?,
        tables: row.try_get(6)?,
        created_at: row.try_get(7)?,
    })
}

/// The names of a tenant, as its row says now.
async fn write_names(change: &Transaction<'_>, tenant: i64, also_reserved: bool) -> Result<(), CatalogError> {
    change.execute(sql::FORGET_NAMES, &[&tenant, &also_reserved]).await?;
    change.execute(sql::WRITE_NAMES, &[&tenant]).await?;
    Ok(())
}

/// Nobody else gets the names that a job is to give the tenant.
async fn reserve_names(change: &Transaction<'_>, of: &Entry, work: &Work) -> Result<(), CatalogError> {
    let wanted: Vec<(String, &String)> = match work {
        Work::Rename { to, rename_database, .. } => {
            let database = rename_database.then(|| format!("@{}", of.server));
            [String::new()].into_iter().chain(database).map(|space| (space, to)).collect()
        }
        Work::Move { to, dry_run: false, .. } => vec![(format!("@{to}"), &of.database)],
        _ => Vec::new(),
    };
    for (space, name) in wanted {
        if change.query_opt(sql::RESERVE_NAME, &[&space, name, &of.number]).await?.is_none() {
            return Err(CatalogError::Taken(name.clone()));
        }
    }
    Ok(())
}

pub(super) async fn insert_job(
    change: &Transaction<'_>,
    of: &Entry,
    work: &Work,
    asker: &Asker,
    key: Option<(&str, &str)>,
) -> Result<i64, CatalogError> {
    let Asker { actor, peer, request } = asker;
    let row = change.query_one(sql::INSERT_JOB, &[&of.number, &of.name, &Json(work), actor, peer, request]).await?;
    let id: i64 = row.try_get(0)?;
    reserve_names(change, of, work).await?;
    if let Some((key, hash)) = key {
        change.execute(sql::FORGET_IDEMPOTENT, &[]).await?;
        change.execute(sql::INSERT_IDEMPOTENT, &[&asker.actor, &key, &hash, &id]).await?;
    }
    Ok(id)
}

fn job(row: &Row) -> Result<JobRow, CatalogError> {
    let (state, step): (String, i32) = (row.try_get(4)?, row.try_get(5)?);
    Ok(JobRow {
        id: row.try_get(0)?,
        tenant: row.try_get(1)?,
        name: row.try_get(2)?,
        work: row.try_get::<_, Json<_>>(3)?.0,
        state: JobState::parse(&state).ok_or(CatalogError::Garbage(state))?,
        step: usize::try_from(step).unwrap_or(0),
        progress: row.try_get(6)?,
        result: row.try_get(7)?,
        error: row.try_get(8)?,
        cancel: row.try_get(9)?,
        actor: row.try_get(10)?,
        created_at: row.try_get(11)?,
        updated_at: row.try_get(12)?,
    })
}
