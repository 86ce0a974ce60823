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
        let job = match work {
            Some(work) => Some(insert_job(&change, &made, work, deed.asker, key).await?),
            None => None,
        };
        audit::write(&change, deed, if job.is_some() { "begun" } else { "done" }, None, Some(shown(&made, job)))
            .await?;
        change.commit().await?;
        Ok(Ok((made, job)))
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
    }

    /// Changes a tenant as `edit` says, whole or not at all.
    pub async fn change_tenant<E>(
        &self,
        number: i64,
        edit: impl FnOnce(&mut Entry) -> Result<(), E> + Send,
    ) -> Result<Changed<E>, CatalogError> {
        let mut client = self.client().await?;
        let change = client.transaction().await?;
        change.query_one(sql::BUMP, &[]).await?;
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
    }

    pub async fn tenant(&self, number: i64) -> Result<Option<Entry>, CatalogError> {
        self.client().await?.query_opt(sql::TENANT, &[&number]).await?.as_ref().map(entry).transpose()
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
        let mut client = self.client().await?;
        let change = client.transaction().await?;
        let found = change.query_opt(sql::TENANT, &[&tenant]).await?.as_ref().map(entry).transpose()?;
        if let Err(refused) = check(found.as_ref()) {
            return Ok(Err(refused));
        }
        let Some(found) = found else { return Err(CatalogError::Garbage("a job for nobody".to_owned())) };
        let id = insert_job(&change, &found, work, deed.asker, key).await?;
        audit::write(&change, deed, "begun", Some(shown(&found, None)), Some(json!({ "job": id }))).await?;
        change.commit().await?;
        Ok(Ok(id))
    }

    /// The job that this key began, if it did, and a hash of what was asked then.
    pub async fn idempotent(&self, actor: &str, key: &str) -> Result<Option<(String, Option<i64>)>, CatalogError> {
        let row = self.client().await?.query_opt(sql::IDEMPOTENT, &[&actor, &key]).await?;
        row.map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).transpose()
    }

    pub async fn job(&self, id: i64) -> Result<Option<JobRow>, CatalogError> {
        self.client().await?.query_opt(sql::JOB, &[&id]).await?.as_ref().map(job).transpose()
    }

    /// Newest first, those before `before`.
    pub async fn jobs(&self, before: i64, limit: i64, tenant: Option<&str>) -> Result<Vec<JobRow>, CatalogError> {
        self.client().await?.query(sql::JOBS, &[&before, &limit, &tenant]).await?.iter().map(job).collect()
    }

    pub async fn open_jobs(&self) -> Result<Vec<JobRow>, CatalogError> {
        self.client().await?.query(sql::OPEN_JOBS, &[]).await?.iter().map(job).collect()
    }

    /// The job that a tenant is busy with.
    pub async fn busy_with(&self, tenant: i64) -> Result<Option<i64>, CatalogError> {
        let row = self.client().await?.query_opt(sql::OPEN_JOB_OF, &[&tenant]).await?;
        Ok(row.map(|row| row.try_get(0)).transpose()?)
    }

    /// Where a job stands now, and what there is to tell of it: one transaction.
    pub async fn journal(&self, job: &JobRow, told: &str) -> Result<(), CatalogError> {
        let mut client = self.client().await?;
        let change = client.transaction().await?;
        let step = i32::try_from(job.step).unwrap_or(i32::MAX);
        change.execute(sql::JOURNAL, &[&job.id, &job.state.as_str(), &step, &job.result, &job.error]).await?;
        change.execute(sql::INSERT_EVENT, &[&job.id, &told]).await?;
        if job.state.is_over() {
            audit::job_over(&change, job).await?;
        }
        change.commit().await?;
        Ok(())
    }

    pub async fn progress(&self, job: i64, text: &str) -> Result<(), CatalogError> {
        self.client().await?.execute(sql::PROGRESS, &[&job, &text]).await?;
        Ok(())
    }

    /// False if it is past that.
    pub async fn cancel_job(&self, deed: &Deed<'_>, job: i64) -> Result<bool, CatalogError> {
        let mut client = self.client().await?;
        let change = client.transaction().await?;
        if change.query_opt(sql::CANCEL_JOB, &[&job]).await?.is_none() {
            return Ok(false);
        }
        audit::write(&change, deed, "done", None, Some(json!({ "job": job }))).await?;
        change.commit().await?;
        Ok(true)
    }

    pub async fn is_cancelled(&self, job: i64) -> Result<bool, CatalogError> {
        Ok(self.client().await?.query_one(sql::IS_CANCELLED, &[&job]).await?.try_get(0)?)
    }

    /// Those after the event `after`.
    pub async fn events(&self, job: i64, after: i64) -> Result<Vec<(i64, OffsetDateTime, String)>, CatalogError> {
        let rows = self.client().await?.query(sql::EVENTS, &[&job, &after]).await?;
        rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))).collect()
    }

    pub async fn insert_archive(
        &self,
        tenant: i64,
        path: &str,
        bytes: i64,
        sha256: &str,
        tables: &Value,
    ) -> Result<i64, CatalogError> {
        let row =
            self.client().await?.query_one(sql::INSERT_ARCHIVE, &[&tenant, &path, &bytes, &sha256, tables]).await?;
        Ok(row.try_get(0)?)
    }

    /// Newest first.
    pub async fn archives(&self, tenant: Option<i64>) -> Result<Vec<ArchiveRow>, CatalogError> {
        self.client().await?.query(sql::ARCHIVES, &[&tenant]).await?.iter().map(archive).collect()
    }

    /// Newest first, those before `before`.
    pub async fn archives_before(&self, before: i64, limit: i64) -> Result<Vec<ArchiveRow>, CatalogError> {
        self.client().await?.query(sql::ARCHIVES_BEFORE, &[&before, &limit]).await?.iter().map(archive).collect()
    }

    /// One by its number, or the newest; of a tenant, or of any.
    pub async fn archive(&self, tenant: Option<i64>, id: Option<i64>) -> Result<Option<ArchiveRow>, CatalogError> {
        self.client().await?.query_opt(sql::ARCHIVE, &[&tenant, &id]).await?.as_ref().map(archive).transpose()
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
        let mut client = self.client().await?;
        let change = client.transaction().await?;
        change.query_one(sql::BUMP, &[]).await?;
        change.execute(sql::INSERT_TOKEN, &[&id, &label, &access.as_str(), &hash, &expires_at]).await?;
        let made = json!({ "id": id, "label": label, "access": access, "expires_at": expires_at.unix_timestamp() });
        audit::write(&change, deed, "done", None, Some(made)).await?;
        change.commit().await?;
        Ok(())
    }

    /// False if there is no such token.
    pub async fn delete_token(&self, deed: &Deed<'_>, id: &str) -> Result<bool, CatalogError> {
        let mut client = self.client().await?;
        let change = client.transaction().await?;
        change.query_one(sql::BUMP, &[]).await?;
        if change.execute(sql::DELETE_TOKEN, &[&id]).await? == 0 {
            return Ok(false);
        }
        audit::write(&change, deed, "done", Some(json!({ "id": id })), None).await?;
        change.commit().await?;
        Ok(true)
    }
}

/// One more step of the revision, which also keeps every other change away until the commit; the tenants, if they are wanted.
async fn bump(change: &Transaction<'_>, with_tenants: bool) -> Result<Known, CatalogError> {
    let catalog = change.query_one(sql::BUMP, &[]).await?.try_get(0)?;
    let rows = if with_tenants { change.query(sql::TENANTS, &[]).await? } else { Vec::new() };
    Ok(Known { catalog, tenants: rows.iter().map(entry).collect::<Result<_, _>>()?, ..Known::default() })
}

async fn update(change: &Transaction<'_>, after: &mut Entry) -> Result<(), CatalogError> {
    let Entry { number, name, state, held, server, database, owner_role, aliases, spec, roles, .. } = &*after;
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 10] =
        [number, name, &state.as_str(), held, server, database, owner_role, aliases, &Json(spec), &Json(roles)];
    change.execute(sql::UPDATE_TENANT, &parameters).await?;
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

async fn insert_job(
    change: &Transaction<'_>,
    of: &Entry,
    work: &Work,
    asker: &Asker,
    key: Option<(&str, &str)>,
) -> Result<i64, CatalogError> {
    let Asker { actor, peer, request } = asker;
    let row = change.query_one(sql::INSERT_JOB, &[&of.number, &of.name, &Json(work), actor, peer, request]).await?;
    let id: i64 = row.try_get(0)?;
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
