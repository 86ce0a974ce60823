//! What the steps of a job do. Each looks first at what is there, so that it may be done again after a crash.

mod archive;
mod compare;
mod database;
mod facts;
mod hand;
mod program;
mod progress;
mod store;
mod traffic;

use std::{collections::HashMap, sync::Arc};

use serde_json::Value;
use tenantry_config::{TenantEvent, TenantState};
use tokio_postgres::{Client, error::SqlState};

use crate::{
    catalog::{
        CatalogError,
        model::Entry,
        store::{Changed, JobRow},
    },
    control::{self, ControlError},
    jobs::work::{Step, Work},
    plane::ControlPlane,
};

/// Why a step is not done.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StepError {
    /// It may work later.
    #[error("{0}")]
    Away(String),
    /// It will not: the job turns back.
    #[error("{0}")]
    Refused(String),
}

impl From<tokio_postgres::Error> for StepError {
    fn from(error: tokio_postgres::Error) -> Self {
        let words = control::words(&error);
        match error.code() {
            None => Self::Away(words),
            Some(code) if matches!(&code.code()[..2], "08" | "53" | "57" | "58") => Self::Away(words),
            Some(&SqlState::READ_ONLY_SQL_TRANSACTION | &SqlState::LOCK_NOT_AVAILABLE | &SqlState::OBJECT_IN_USE) => {
                Self::Away(words)
            }
            Some(_) => Self::Refused(words),
        }
    }
}

impl From<ControlError> for StepError {
    fn from(error: ControlError) -> Self {
        match error {
            ControlError::Postgres(error) => error.into(),
            error => Self::Away(error.to_string()),
        }
    }
}

impl From<CatalogError> for StepError {
    fn from(error: CatalogError) -> Self {
        Self::Away(error.to_string())
    }
}

/// Where a job works: its tenant's server, and the connections it has there.
pub struct Site {
    pub plane: Arc<ControlPlane>,
    clients: HashMap<(String, String), Client>,
}

/// A statement on a database may take this long.
const STATEMENT_LIMIT: &str = "SET statement_timeout = '120s'; SET lock_timeout = '10s'";

impl Site {
    #[must_use]
    pub fn new(plane: Arc<ControlPlane>) -> Self {
        Self { plane, clients: HashMap::new() }
    }

    /// The connection to the control database of a server.
    async fn control(&mut self, server: &str) -> Result<&Client, StepError> {
        let settings = self.plane.file();
        let (_, control) = self.plane.server_of(&settings, server)?;
        let database = control.database.clone();
        self.client(server, &database).await
    }

    async fn client(&mut self, server: &str, database: &str) -> Result<&Client, StepError> {
        let key = (server.to_owned(), database.to_owned());
        if self.clients.get(&key).is_none_or(Client::is_closed) {
            let client = self.connect(server, database).await?;
            self.clients.insert(key.clone(), client);
        }
        self.clients.get(&key).ok_or_else(|| StepError::Away("no connection".to_owned()))
    }

    /// One that ends with the caller.
    async fn connect(&self, server: &str, database: &str) -> Result<Client, StepError> {
        let settings = self.plane.file();
        let (at, control) = self.plane.server_of(&settings, server)?;
        let client = control::connect_to(at, control, database).await?;
        client.batch_execute(STATEMENT_LIMIT).await?;
        Ok(client)
    }

    /// One statement that changes something.
    async fn execute(&mut self, server: &str, statement: &str) -> Result<(), StepError> {
        self.plane.fuse.burn();
        Ok(self.control(server).await?.batch_execute(statement).await?)
    }

    /// A change of the tenant in the catalog, served at once.
    async fn change(
        &self,
        number: i64,
        edit: impl FnOnce(&mut Entry) -> Result<(), StepError> + Send,
    ) -> Result<(), StepError> {
        self.plane.fuse.burn();
        match self.plane.catalog.change_tenant(number, edit).await {
            Ok(Changed::Done { .. }) => {}
            Ok(Changed::Refused(error)) => return Err(error),
            Ok(Changed::Gone) => return Err(StepError::Refused("the tenant is gone".to_owned())),
            Err(error) if error.is_duplicate("tenants_name") || error.is_duplicate("tenants_database") => {
                return Err(StepError::Refused("another tenant has that name or database".to_owned()));
            }
            Err(error) => return Err(error.into()),
        }
        self.plane.fuse.burn();
        Ok(self.plane.refresh().await?)
    }
}

/// The name of a database that is being made: no tenant's, since it is no valid name of one.
fn half_made(catalog: &str, number: i64) -> String {
    format!("tenantry-{catalog}-{number}")
}

/// The comment on a role that Tenantry made.
fn mark(catalog: &str, number: i64) -> String {
    format!("tenantry {catalog} {number}")
}

/// Moves it along the table of states, if it is not there already.
fn shift(entry: &mut Entry, event: TenantEvent, there: TenantState) -> Result<(), StepError> {
    if entry.state != there {
        entry.state = entry.state.next(event).map_err(|error| StepError::Refused(error.to_string()))?;
    }
    Ok(())
}

/// Does one step. `result` is what the job remembers from step to step, and tells in the end.
pub async fn perform(site: &mut Site, job: &JobRow, step: Step, result: &mut Value) -> Result<(), StepError> {
    let entry = site.plane.catalog.tenant(job.tenant).await?;
    let entry = entry.ok_or_else(|| StepError::Refused("the tenant is gone".to_owned()))?;
    let number = entry.number;
    match step {
        Step::MakeRole => database::make_role(site, job, &entry).await,
        Step::MakeDatabase => database::make(site, job, &entry, result).await,
        // On the way back of an archive: what the fence took.
        Step::CloseToPublic if matches!(job.work, Work::Archive { .. }) => archive::unfence(site, &entry, result).await,
        Step::CloseToPublic => database::close_to_public(site, job, &entry, result).await,
        Step::AddExtensions => database::add_extensions(site, &entry).await,
        Step::SetDefaults => database::set_defaults(site, &entry).await,
        Step::Publish => database::publish(site, &entry, result).await,
        Step::Open => {
            let event =
                |state| if state == TenantState::Archived { TenantEvent::Restore } else { TenantEvent::Created };
            site.change(number, |e| shift(e, event(e.state), TenantState::Active)).await
        }
        Step::Hold => site.change(number, |e| set_held(e, true)).await,
        Step::Release => site.change(number, |e| set_held(e, false)).await,
        Step::AwaitQuiet => traffic::await_quiet(site, job, &entry).await,
        Step::Fence => database::fence(site, &entry, result).await,
        Step::Unfence => database::unfence(site, &entry).await,
        Step::RenameDatabase => database::rename(site, job, &entry, result).await,
        Step::Reroute => database::reroute(site, job, &entry).await,
        Step::StopTransactions => traffic::stop_transactions(site, &entry).await,
        Step::AwaitTransactions => traffic::await_transactions(site, job, &entry, result).await,
        Step::Drained => {
            database::remember(site, &entry, result).await?;
            traffic::drained(site, &entry).await
        }
        Step::Reopen => site.change(number, |e| shift(e, TenantEvent::Resume, TenantState::Active)).await,
        Step::FindPrograms => archive::find_programs(site, job, &entry, result).await,
        Step::FenceForDump => archive::fence(site, &entry, result).await,
        Step::Dump => archive::dump(site, job, &entry, result).await,
        Step::Prove => archive::prove(site, job, &entry, result).await,
        Step::MarkArchived => archive::mark_archived(site, &entry, result).await,
        Step::Load => archive::load(site, job, &entry, result).await,
        Step::Tombstone => {
            site.change(number, |e| {
                e.aliases.clear();
                shift(e, TenantEvent::Drop, TenantState::Dropped)
            })
            .await
        }
        Step::Forget => {
            site.change(number, |e| {
                e.state = TenantState::Dropped;
                Ok(())
            })
            .await
        }
        Step::DropDatabase => database::drop(site, &entry, result).await,
        Step::DropRoles => database::drop_roles(site, &entry, result).await,
        Step::SetVerifier => database::set_verifier(site, job, &entry).await,
        Step::DropHalfMade => {
            hand::drop_of(site, &entry).await?;
            database::drop_half_made(site, job, &entry, result).await
        }
        Step::ForgetDump => archive::forget_dump(site, job, &entry, result).await,
        Step::DropNewRole => database::drop_new_role(site, job, &entry).await,
    }
}

fn set_held(entry: &mut Entry, held: bool) -> Result<(), StepError> {
    entry.held = held;
    Ok(())
}
