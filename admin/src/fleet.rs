//! Several Tenantry processes on one catalog: what each has applied, and what the clients of a tenant under a job do there.
//!
//! Each process leaves a sign of life in the catalog, with the revision that it serves. Whoever runs a job asks all of
//! them, so that a tenant is at rest only when it is at rest everywhere. What always holds: a process whose own session at
//! the control database has ended, or that was not heard of for `SILENT`, is not waited for (the fence in PostgreSQL ends
//! what it has); one that is behind counts as busy.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicI64, Ordering::Relaxed},
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tenantry_config::{Control, Server, TenantState};
use tenantry_proxy::directory::Activity;
use tokio_postgres::{Client, types::Json};

use crate::{
    catalog::{
        Catalog, CatalogError,
        disk::hex,
        model::{Entry, Known, Order},
        within,
    },
    control,
    sql::catalog as sql,
    view::Plane,
};

/// Seconds after which a process that says nothing is taken to be gone.
const SILENT: f64 = 5.0;

/// What a process tells of a tenant that a job waits for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// Server connections that are lent.
    pub active: u32,
    /// Those that PostgreSQL counts.
    pub connections: u32,
    /// Kept by session state.
    pub pinned: u32,
    /// Statements that were cancelled on order.
    pub cancelled: u32,
    /// Sessions that were ended on order.
    pub cut: u32,
}

/// The same over all processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Everywhere {
    pub told: Told,
    /// Processes that have not applied what was asked for.
    pub behind: u32,
}

impl Everywhere {
    /// Nothing of the tenant is open anywhere.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.behind == 0 && self.told.connections == 0
    }

    /// No transaction runs anywhere.
    #[must_use]
    pub fn is_at_rest(&self) -> bool {
        self.behind == 0 && self.told.active == 0
    }
}

/// This process among the others.
pub struct Fleet {
    id: String,
    /// What it did on order, by tenant number: cancelled, ended.
    done: Mutex<BTreeMap<i64, (u32, u32)>>,
    revision: AtomicI64,
    /// The session that ends with this process.
    session: tokio::sync::Mutex<Option<Client>>,
}

impl Default for Fleet {
    fn default() -> Self {
        Self {
            id: hex(&rand::random::<[u8; 8]>()),
            done: Mutex::default(),
            revision: AtomicI64::new(-1),
            session: tokio::sync::Mutex::default(),
        }
    }
}

impl Fleet {
    /// What is served now.
    #[must_use]
    pub fn revision(&self) -> i64 {
        self.revision.load(Relaxed)
    }

    /// After `known` was applied: carries out what is newly ordered, and forgets what is over.
    pub fn applied(&self, before: &Known, known: &Known, data: &dyn Plane) {
        self.done.lock().retain(|number, _| known.orders.contains_key(number));
        for (number, order) in &known.orders {
            if before.orders.get(number) == Some(order) {
                continue;
            }
            let Some(entry) = known.tenants.iter().find(|entry| entry.number == *number) else { continue };
            let count = match order {
                Order::Cancel => data.cancel_running(&entry.name, Some(*number)),
                Order::End if entry.held => data.end_transactions(&entry.name, Some(*number)),
                Order::End => data.end_sessions(&entry.name, Some(*number), true),
            };
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            let mut done = self.done.lock();
            let (cancelled, cut) = done.entry(*number).or_default();
            match order {
                Order::Cancel => *cancelled = cancelled.saturating_add(count),
                Order::End => *cut = cut.saturating_add(count),
            }
        }
        self.revision.store(known.revision, Relaxed);
    }

    /// What this process sees of a tenant.
    fn told(&self, entry: &Entry, data: &dyn Plane) -> Told {
        let Activity { active, connections, pinned, .. } =
            data.activity(&entry.name, Some(entry.number)).unwrap_or_default();
        let (cancelled, cut) = self.done.lock().get(&entry.number).copied().unwrap_or_default();
        Told { active, connections, pinned, cancelled, cut }
    }

    /// Leaves a sign of life: what is served, and how it goes with tenants that a job may wait for.
    pub async fn report(
        &self,
        (server, control): (&Server, &Control),
        revision: i64,
        known: &Known,
        data: &dyn Plane,
    ) -> Result<(), CatalogError> {
        let is_awaited = |entry: &&Entry| {
            let is_awaited = |state| {
                matches!(
                    state,
                    TenantState::Draining | TenantState::Drained | TenantState::Paused | TenantState::Suspended
                )
            };
            entry.held || is_awaited(entry.state)
        };
        let awaited = known.tenants.iter().filter(is_awaited);
        let busy: BTreeMap<i64, Told> = awaited.map(|entry| (entry.number, self.told(entry, data))).collect();
        let mut session = self.session.lock().await;
        let client = match session.take().filter(|client| !client.is_closed()) {
            Some(client) => client,
            None => control::connect(server, control).await.map_err(|error| CatalogError::Away(error.to_string()))?,
        };
        // Not put back if it fails: the next one begins with a new session.
        within(async { Ok(client.execute(sql::SIGN_OF_LIFE, &[&self.id, &revision, &Json(busy)]).await?) }).await?;
        *session = Some(client);
        Ok(())
    }

    /// This process is about to end in order: nobody need wait for it.
    pub async fn leave(&self, catalog: &Catalog) -> Result<(), CatalogError> {
        within(async {
            catalog.client().await?.execute(sql::LEAVE, &[&self.id]).await?;
            Ok(())
        })
        .await
    }

    /// What a tenant's clients do in this process.
    #[must_use]
    pub fn here(&self, entry: &Entry, data: &dyn Plane) -> Everywhere {
        Everywhere { told: self.told(entry, data), behind: 0 }
    }

    /// What a tenant's clients do in all processes that serve at least this revision.
    pub async fn everywhere(
        &self,
        catalog: &Catalog,
        entry: &Entry,
        revision: i64,
        data: &dyn Plane,
    ) -> Result<Everywhere, CatalogError> {
        let rows =
            within(async { Ok(catalog.client().await?.query(sql::OTHERS, &[&self.id, &SILENT]).await?) }).await?;
        let mut sum = self.here(entry, data);
        for row in rows {
            let (applied, Json(busy)): (i64, Json<BTreeMap<i64, Told>>) = (row.try_get(0)?, row.try_get(1)?);
            if applied < revision {
                sum.behind += 1;
            } else if let Some(told) = busy.get(&entry.number) {
                sum.told.add(told);
            }
        }
        Ok(sum)
    }
}

impl Told {
    fn add(&mut self, other: &Self) {
        self.active += other.active;
        self.connections += other.connections;
        self.pinned += other.pinned;
        self.cancelled += other.cancelled;
        self.cut += other.cut;
    }
}
