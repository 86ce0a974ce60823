//! The durable tables in the control database: reading, changing, and the schema itself.
//!
//! What always holds: a change, the audit row of its outcome and the step of the revision are one transaction; what it
//! returned `Ok` for is on PostgreSQL's disk. Nobody but this room talks to the catalog's tables.

pub mod audit;
pub mod disk;
pub mod model;
pub mod rollouts;
pub mod store;

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use deadpool_postgres::{Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime, Timeouts};
use rand::{Rng, distr::Alphanumeric};
use serde_json::Value;
use tenantry_config::{Control, Server, TenantState};
use tokio_postgres::{Row, error::SqlState, types::Json};

use self::model::{Access, Entry, Known, Order, Token};
use crate::{
    control::{self, ControlError},
    jobs::work::Work,
    sql::catalog as sql,
};

/// Connections of one process to the control database; not part of any server's `cap`.
const CONNECTIONS: usize = 4;
/// For a connection of them, and for a login.
const WAIT: Duration = Duration::from_secs(5);
/// For one piece of work on the catalog, however PostgreSQL keeps silent.
const WORK_LIMIT: Duration = Duration::from_secs(12);

/// Why the catalog did not do it.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// Nobody answers, or no connection in time: worth trying again.
    #[error("the control database is away: {0}")]
    Away(String),
    /// PostgreSQL refused it.
    #[error("{}", control::words(.0))]
    Refused(tokio_postgres::Error),
    #[error("the catalog is of version {0}, and this Tenantry knows only {known}: use a newer one", known = sql::VERSIONS.len())]
    TooNew(i32),
    /// Another tenant has the name, or will have it.
    #[error("{0} is another tenant's name, or is about to be")]
    Taken(String),
    #[error("the catalog holds something unreadable: {0}")]
    Garbage(String),
    /// There is none, though there was one.
    #[error(
        "there is no catalog in the control database any more: bring it back from a backup; or, if that was meant, remove \
         catalog.json from admin.state_dir and start again"
    )]
    Lost,
    /// Not the one that was known.
    #[error(
        "the control database holds {0}: bring the right one back; or, if that was meant, remove catalog.json from \
         admin.state_dir and start again"
    )]
    Unexpected(String),
}

impl From<tokio_postgres::Error> for CatalogError {
    fn from(error: tokio_postgres::Error) -> Self {
        match error.code() {
            // A row that this version cannot read.
            None if ["error deserializing", "invalid column", "error serializing"]
                .iter()
                .any(|kind| error.to_string().starts_with(kind)) =>
            {
                Self::Garbage(control::words(&error))
            }
            // Shutting down, starting up, out of connections, a failed write: later it may work.
            None => Self::Away(control::words(&error)),
            Some(code) if matches!(&code.code()[..2], "08" | "53" | "57" | "58") => Self::Away(control::words(&error)),
            Some(&SqlState::READ_ONLY_SQL_TRANSACTION | &SqlState::LOCK_NOT_AVAILABLE) => {
                Self::Away(control::words(&error))
            }
            Some(_) => Self::Refused(error),
        }
    }
}

impl From<PoolError> for CatalogError {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Backend(error) => Self::Away(control::words(&error)),
            PoolError::Timeout(_) => Self::Away(format!("no connection within {WAIT:?}")),
            error => Self::Away(error.to_string()),
        }
    }
}

impl CatalogError {
    /// Another tenant has that name, or database, or is about to.
    #[must_use]
    pub fn is_taken(&self) -> bool {
        matches!(self, Self::Taken(_))
            || ["tenants_name", "tenants_database", "names_pkey"].iter().any(|index| self.is_duplicate(index))
    }

    /// Of that unique index.
    #[must_use]
    pub fn is_duplicate(&self, index: &str) -> bool {
        let Self::Refused(error) = self else { return false };
        error.as_db_error().is_some_and(|db| db.code() == &SqlState::UNIQUE_VIOLATION && db.constraint() == Some(index))
    }
}

/// The control database.
#[derive(Clone)]
pub struct Catalog {
    pool: Arc<ArcSwap<Pool>>,
}

impl std::fmt::Debug for Catalog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Catalog")
    }
}

impl Catalog {
    /// Connects at its first use.
    pub fn new(server: &Server, control: &Control) -> Result<Self, ControlError> {
        Ok(Self { pool: Arc::new(ArcSwap::from_pointee(pool(server, control)?)) })
    }

    /// Another address or login, from the next connection on.
    pub fn log_in_as(&self, server: &Server, control: &Control) -> Result<(), ControlError> {
        self.pool.store(Arc::new(pool(server, control)?));
        Ok(())
    }

    pub(crate) async fn client(&self) -> Result<Object, CatalogError> {
        Ok(self.pool.load_full().get().await?)
    }

    /// Brings the schema up to this version; makes it where there is none, if it `may_begin`. Several processes may do so
    /// at once.
    pub async fn migrate(&self, may_begin: bool) -> Result<(), CatalogError> {
        within(self.migrate_now(may_begin)).await
    }

    async fn migrate_now(&self, may_begin: bool) -> Result<(), CatalogError> {
        let mut client = self.client().await?;
        let change = client.transaction().await?;
        change.execute(sql::LOCK_SCHEMA, &[]).await?;
        let exists: bool = change.query_one(sql::HAS_META, &[]).await?.get(0);
        if !exists && !may_begin {
            return Err(CatalogError::Lost);
        }
        let version: i32 = if exists { change.query_one(sql::VERSION, &[]).await?.get(0) } else { 0 };
        let done = usize::try_from(version).unwrap_or(0);
        if done > sql::VERSIONS.len() {
            return Err(CatalogError::TooNew(version));
        }
        for step in sql::VERSIONS.iter().skip(done) {
            change.batch_execute(step).await?;
        }
        let latest = i32::try_from(sql::VERSIONS.len()).unwrap_or(i32::MAX);
        if exists {
            change.execute(sql::SET_VERSION, &[&latest]).await?;
        } else {
            let letters = rand::rng().sample_iter(Alphanumeric).map(|byte| char::from(byte).to_ascii_lowercase());
            let catalog: String = letters.take(6).collect();
            change.execute(sql::FIRST_META, &[&latest, &catalog]).await?;
        }
        change.commit().await?;
        if version < latest {
            tracing::info!(from = version, to = latest, "the catalog's schema is up to date now");
        }
        Ok(())
    }

    pub async fn revision(&self) -> Result<i64, CatalogError> {
        within(async { Ok(self.client().await?.query_one(sql::REVISION, &[]).await?.try_get(0)?) }).await
    }

    /// All of it that serving needs, as of one moment.
    pub async fn load(&self) -> Result<Known, CatalogError> {
        within(self.load_now()).await
    }

    async fn load_now(&self) -> Result<Known, CatalogError> {
        let mut client = self.client().await?;
        let isolation = tokio_postgres::IsolationLevel::RepeatableRead;
        let moment = client.build_transaction().isolation_level(isolation).read_only(true).start().await?;
        let meta = moment.query_one(sql::META, &[]).await?;
        let tenants = moment.query(sql::TENANTS, &[]).await?;
        let tokens = moment.query(sql::TOKENS, &[]).await?;
        let orders = moment.query(sql::ORDERS, &[]).await?;
        let moves = moment.query(sql::OPEN_MOVES, &[]).await?;
        moment.commit().await?;
        Ok(Known {
            catalog: meta.try_get(0)?,
            revision: meta.try_get(1)?,
            tenants: tenants.iter().map(entry).collect::<Result<_, _>>()?,
            tokens: tokens.iter().map(token).collect::<Result<_, _>>()?,
            orders: orders.iter().map(order).collect::<Result<_, _>>()?,
            room: moves.iter().map(room).collect::<Result<_, _>>()?,
        })
    }

    /// What every process is to do to a tenant's sessions; `None`: nothing any more.
    pub async fn order(&self, leader: i64, tenant: i64, order: Option<Order>) -> Result<(), CatalogError> {
        within(async {
            let mut client = self.client().await?;
            let change = client.transaction().await?;
            if change.query_one(sql::BUMP, &[]).await?.try_get::<_, i64>(0)? != leader {
                return Err(CatalogError::Away("another process runs the jobs now".to_owned()));
            }
            match order {
                Some(Order::Cancel) => change.execute(sql::GIVE_ORDER, &[&tenant, &"cancel"]).await?,
                Some(Order::End) => change.execute(sql::GIVE_ORDER, &[&tenant, &"end"]).await?,
                None => change.execute(sql::END_ORDER, &[&tenant]).await?,
            };
            Ok(change.commit().await?)
        })
        .await
    }
}

fn pool(server: &Server, control: &Control) -> Result<Pool, ControlError> {
    let (config, tls) = control::config(server, control, &control.database)?;
    let manager = Manager::from_config(config, tls, ManagerConfig { recycling_method: RecyclingMethod::Fast });
    let timeouts = Timeouts { wait: Some(WAIT), create: Some(WAIT), recycle: Some(WAIT) };
    let pool = Pool::builder(manager).max_size(CONNECTIONS).timeouts(timeouts).runtime(Runtime::Tokio1).build();
    pool.map_err(|_| ControlError::Timeout)
}

/// PostgreSQL may take a query and never answer.
pub(crate) async fn within<T>(work: impl Future<Output = Result<T, CatalogError>>) -> Result<T, CatalogError> {
    let silent = |_| CatalogError::Away(format!("no answer within {WORK_LIMIT:?}"));
    tokio::time::timeout(WORK_LIMIT, work).await.map_err(silent)?
}

/// Whether what was read may be served in place of what was served: a catalog that was emptied, mixed up with another, or
/// put back to an older state must not cost any tenant its route.
pub fn accept(before: &Known, fresh: &Known) -> Result<(), CatalogError> {
    if before.catalog.is_empty() {
        return Ok(());
    }
    if before.catalog != fresh.catalog {
        let what = format!("another catalog ({}) than the one that is served ({})", fresh.catalog, before.catalog);
        return Err(CatalogError::Unexpected(what));
    }
    if fresh.revision < before.revision {
        let what =
            format!("an older state of the catalog (revision {}, and {} was known)", fresh.revision, before.revision);
        return Err(CatalogError::Unexpected(what));
    }
    Ok(())
}

pub(crate) fn entry(row: &Row) -> Result<Entry, CatalogError> {
    let state: String = row.try_get(2)?;
    Ok(Entry {
        number: row.try_get(0)?,
        name: row.try_get(1)?,
        state: TenantState::parse(&state).ok_or(CatalogError::Garbage(state))?,
        held: row.try_get(3)?,
        server: row.try_get(4)?,
        database: row.try_get(5)?,
        owner_role: row.try_get(6)?,
        aliases: row.try_get(7)?,
        version: row.try_get(8)?,
        spec: model::stored_spec(row.try_get::<_, Json<_>>(9)?.0)
            .map_err(|error| CatalogError::Garbage(error.to_string()))?,
        roles: row.try_get::<_, Json<_>>(10)?.0,
        created_at: row.try_get(11)?,
        updated_at: row.try_get(12)?,
        plans: row.try_get(13)?,
        kept: row.try_get::<_, Option<Json<_>>>(14)?.map(|kept| kept.0),
    })
}

/// What a job that this version cannot read needs, nobody here knows.
fn room(row: &Row) -> Result<(i64, u32), CatalogError> {
    let work: Value = row.try_get(1)?;
    Ok((row.try_get(0)?, serde_json::from_value::<Work>(work).map_or(0, |work| work.room())))
}

fn order(row: &Row) -> Result<(i64, Order), CatalogError> {
    let what: String = row.try_get(1)?;
    let order = match what.as_str() {
        "cancel" => Order::Cancel,
        "end" => Order::End,
        _ => return Err(CatalogError::Garbage(what)),
    };
    Ok((row.try_get(0)?, order))
}

fn token(row: &Row) -> Result<Token, CatalogError> {
    let access: String = row.try_get(2)?;
    Ok(Token {
        id: row.try_get(0)?,
        label: row.try_get(1)?,
        access: Access::parse(&access).ok_or(CatalogError::Garbage(access))?,
        hash: disk::hex(row.try_get(3)?),
        expires_at: row.try_get(4)?,
        created_at: row.try_get(5)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_catalog_going_forward_is_accepted() {
        let known = |catalog: &str, revision| Known { catalog: catalog.to_owned(), revision, ..Known::default() };
        let nothing = Known::default();
        assert!(accept(&nothing, &known("abc123", 3)).is_ok(), "the first one");
        assert!(accept(&known("abc123", 3), &known("abc123", 3)).is_ok());
        assert!(accept(&known("abc123", 3), &known("abc123", 4)).is_ok());
        assert!(matches!(accept(&known("abc123", 3), &known("abc123", 2)), Err(CatalogError::Unexpected(_))));
        assert!(matches!(accept(&known("abc123", 3), &known("zzz999", 9)), Err(CatalogError::Unexpected(_))));
    }
}
