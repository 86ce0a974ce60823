//! The audit log: who wanted what, and what came of it.
//!
//! What always holds: rows are only added, one after the other; each is chained to the one before, so that a row that was
//! changed or taken out later is found; no row holds a secret.

use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio_postgres::{Row, Transaction};

use super::{
    Catalog, CatalogError,
    disk::hex,
    entry,
    model::Entry,
    store::{Asker, JobRow},
    within,
};
use crate::sql::catalog as sql;

/// What somebody does.
#[derive(Debug, Clone, Copy)]
pub struct Deed<'a> {
    pub asker: &'a Asker,
    pub action: &'a str,
    pub tenant: Option<&'a str>,
}

/// A row of the audit log.
#[derive(Debug, Clone, serde::Serialize, utoipa::ToSchema)]
pub struct AuditRow {
    pub id: i64,
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// The request that it belongs to.
    pub request: String,
    /// Token id and label.
    pub actor: String,
    /// Address that it came from.
    pub peer: String,
    /// The operation.
    pub action: String,
    pub tenant: Option<String>,
    /// `intent`; then `done`, or the kind of problem; of a job `begun`, then how it ended. `no-token` and `forbidden` stand alone.
    pub outcome: String,
    /// What it was about, as it was.
    pub before: Option<Value>,
    /// Of an intent what was asked for, else what it is now.
    pub after: Option<Value>,
    /// SHA-256 of the chain of the row before and the text of this one, hex.
    pub chain: String,
}

/// Whether the log is whole.
#[derive(Debug, Clone, serde::Serialize, utoipa::ToSchema)]
pub struct AuditChain {
    /// Rows that were looked at.
    pub rows: i64,
    /// The last of them, and its chain: kept elsewhere, they also show rows taken away at the end.
    pub last: Option<i64>,
    pub chain: Option<String>,
    /// The first row that does not fit those before; null: all do.
    pub broken: Option<i64>,
}

impl Catalog {
    /// One row.
    pub async fn audit(
        &self,
        deed: &Deed<'_>,
        outcome: &str,
        before: Option<Value>,
        after: Option<Value>,
    ) -> Result<(), CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            write(&change, deed, outcome, before, after).await?;
            Ok(change.commit().await?)
        })
        .await
    }

    /// Newest first, those before `before`.
    pub async fn audit_rows(&self, before: i64, limit: i64) -> Result<Vec<AuditRow>, CatalogError> {
        within(async { self.client().await?.query(sql::AUDIT, &[&before, &limit]).await?.iter().map(row).collect() })
            .await
    }

    /// Follows the chain from its beginning, some rows at a time.
    pub async fn verify_audit(&self) -> Result<AuditChain, CatalogError> {
        let client = self.client().await?;
        let mut whole = AuditChain { rows: 0, last: None, chain: None, broken: None };
        let mut chain: Vec<u8> = Vec::new();
        loop {
            // Each part has its deadline; the whole may take long.
            let last = whole.last.unwrap_or(0);
            let part = within(async { Ok(client.query_one(sql::VERIFY_AUDIT, &[&last, &chain]).await?) }).await?;
            let rows: i64 = part.try_get(0)?;
            if rows == 0 {
                return Ok(whole);
            }
            chain = part.try_get(3)?;
            whole.rows += rows;
            whole.last = part.try_get(1)?;
            whole.chain = Some(hex(&chain));
            whole.broken = part.try_get(2)?;
            if whole.broken.is_some() {
                return Ok(whole);
            }
        }
    }
}

/// One row, as part of a change. Its lock is the last that a transaction takes.
pub(super) async fn write(
    change: &Transaction<'_>,
    deed: &Deed<'_>,
    outcome: &str,
    before: Option<Value>,
    after: Option<Value>,
) -> Result<(), CatalogError> {
    let Deed { asker: Asker { actor, peer, request }, action, tenant } = deed;
    change.execute(sql::LOCK_AUDIT, &[]).await?;
    change.execute(sql::INSERT_AUDIT, &[request, actor, peer, action, tenant, &outcome, &before, &after]).await?;
    Ok(())
}

/// How a job ended, under the request that began it: part of the transaction that ends it.
pub(super) async fn job_over(change: &Transaction<'_>, job: &JobRow) -> Result<(), CatalogError> {
    let row = change.query_one(sql::ASKER_OF_JOB, &[&job.id]).await?;
    let asker = Asker { actor: row.try_get(0)?, peer: row.try_get(1)?, request: row.try_get(2)? };
    let tenant = change.query_opt(sql::TENANT_NOW, &[&job.tenant]).await?.as_ref().map(entry).transpose()?;
    let mut after = tenant.map_or_else(|| json!({}), |tenant| shown(&tenant, Some(job.id)));
    after["error"] = json!(job.error);
    let deed = Deed { asker: &asker, action: job.work.kind(), tenant: Some(&job.name) };
    write(change, &deed, job.state.as_str(), None, Some(after)).await
}

/// A tenant as the log has it: all but its verifiers.
#[must_use]
pub fn shown(tenant: &Entry, job: Option<i64>) -> Value {
    let Entry { number, name, state, held, server, database, owner_role, aliases, version, spec, roles, .. } = tenant;
    let roles: Vec<_> = roles.iter().map(|role| &role.name).collect();
    let mut shown = json!({
        "number": number, "name": name, "state": state.as_str(), "held": held, "server": server, "database": database,
        "owner_role": owner_role, "aliases": aliases, "version": version, "spec": spec, "roles": roles,
    });
    if let Some(job) = job {
        shown["job"] = json!(job);
    }
    shown
}

fn row(row: &Row) -> Result<AuditRow, CatalogError> {
    Ok(AuditRow {
        id: row.try_get(0)?,
        at: row.try_get(1)?,
        request: row.try_get(2)?,
        actor: row.try_get(3)?,
        peer: row.try_get(4)?,
        action: row.try_get(5)?,
        tenant: row.try_get(6)?,
        outcome: row.try_get(7)?,
        before: row.try_get(8)?,
        after: row.try_get(9)?,
        chain: hex(row.try_get(10)?),
    })
}
