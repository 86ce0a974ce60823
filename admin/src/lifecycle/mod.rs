//! What the steps of a job do. Each looks first at what is there, so that it may be done again after a crash.

mod archive;
mod compare;
mod database;
mod facts;
mod hand;
mod import;
mod login;
mod migrate;
mod moves;
mod preflight;
mod program;
mod progress;
mod rotate;
mod separate;
mod store;
mod traffic;

use std::{collections::HashMap, sync::Arc, time::Duration};

use serde_json::Value;
use tenantry_config::{TenantEvent, TenantState};
use tokio::time::timeout;
use tokio_postgres::{Client, error::SqlState};

use crate::{
    catalog::{
        CatalogError,
        model::{Entry, Order},
        store::{Changed, JobRow},
    },
    control::{self, ControlError},
    jobs::work::Step,
    plane::ControlPlane,
};

pub use import::sweep_uploads;
pub use moves::{copies, sweep_spools};

/// Why a step is not done.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StepError {
    /// It may work later.
    #[error("{0}")]
    Away(String),
    /// PostgreSQL went, or had no room, in the middle of work that may be the reason: tried again, but a few times only.
    #[error("{0}")]
    Lost(String),
    /// Somebody is in its way, and may go: tried again, but not for ever.
    #[error("{0}")]
    InUse(String),
    /// It will not: the job turns back.
    #[error("{0}")]
    Refused(String),
}

impl StepError {
    /// Of work that was begun: what is away may be away because of it.
    fn in_the_middle(self) -> Self {
        match self {
            Self::Away(why) => Self::Lost(why),
            other => other,
        }
    }
}

impl From<tokio_postgres::Error> for StepError {
    fn from(error: tokio_postgres::Error) -> Self {
        let words = control::words(&error);
        match error.code() {
            None => Self::Away(words),
            Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::OBJECT_IN_USE | &SqlState::QUERY_CANCELED) => {
                Self::InUse(words)
            }
            Some(code) if matches!(&code.code()[..2], "08" | "53" | "57" | "58") => Self::Away(words),
            Some(&SqlState::READ_ONLY_SQL_TRANSACTION) => Self::Away(words),
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
        if error.is_taken() {
            return Self::Refused("another tenant has that name or database".to_owned());
        }
        Self::Away(error.to_string())
    }
}

/// Where a job works: its tenant's server, and the connections it has there.
pub struct Site {
    pub plane: Arc<ControlPlane>,
    /// The number under which this process runs the jobs.
    leader: i64,
    clients: HashMap<(String, String), Client>,
}

/// A statement on a database may take this long.
const STATEMENT_LIMIT: &str = "SET statement_timeout = '120s'; SET lock_timeout = '10s'";
/// The same here, and a little more: for a server that says nothing any more.
const ANSWER_LIMIT: Duration = Duration::from_secs(130);

impl Site {
    #[must_use]
    pub fn new(plane: Arc<ControlPlane>, leader: i64) -> Self {
        Self { plane, leader, clients: HashMap::new() }
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
        Ok(self.execute_raw(server, statement).await??)
    }

    /// The same, for those who want to see PostgreSQL's own error.
    async fn execute_raw(
        &mut self,
        server: &str,
        statement: &str,
    ) -> Result<Result<(), tokio_postgres::Error>, StepError> {
        self.plane.fuse.burn();
        let done = timeout(ANSWER_LIMIT, self.control(server).await?.batch_execute(statement)).await;
        done.map_err(|_| StepError::Away(format!("no answer within {ANSWER_LIMIT:?}")))
    }

    /// What the step wants to find again if it is done once more.
    async fn note(&self, job: &JobRow, result: &Value) -> Result<(), StepError> {
        self.plane.fuse.burn();
        Ok(self.plane.catalog.note(job, result).await?)
    }

    /// What all processes do to the tenant's sessions from now on.
    async fn order(&self, tenant: i64, order: Option<Order>) -> Result<(), StepError> {
        self.plane.fuse.burn();
        self.plane.catalog.order(self.leader, tenant, order).await?;
        Ok(self.plane.refresh().await?)
    }

    /// A change of the tenant in the catalog, served at once.
    async fn change(
        &self,
        number: i64,
        edit: impl FnOnce(&mut Entry) -> Result<(), StepError> + Send,
    ) -> Result<(), StepError> {
        self.plane.fuse.burn();
        match self.plane.catalog.change_tenant_as(Some(self.leader), number, edit).await? {
            Changed::Done { .. } => {}
            Changed::Refused(error) => return Err(error),
            Changed::Gone => return Err(StepError::Refused("the tenant is gone".to_owned())),
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
    format!("{}{number}", mark_of(catalog))
}

/// What such a comment of this catalog begins with.
fn mark_of(catalog: &str) -> String {
    format!("tenantry {catalog} ")
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
        Step::Check => preflight::check(site, job, &entry, result).await,
        Step::MakeRole => database::make_role(site, job, &entry).await,
        Step::MakeDatabase => database::make(site, job, &entry, result).await,
        Step::CloseToPublic => database::close_to_public(site, &entry).await,
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
        Step::Fence => database::fence(site, &entry).await,
        Step::Unfence => database::unfence(site, &entry.server, &entry.database).await,
        Step::RenameDatabase => database::rename(site, job, &entry, result).await,
        Step::Reroute => database::reroute(site, job, &entry).await,
        Step::StopTransactions => traffic::stop_transactions(site, &entry).await,
        Step::AwaitTransactions => traffic::await_transactions(site, job, &entry, result).await,
        Step::Drained => traffic::drained(site, &entry).await,
        Step::Reopen => traffic::reopen(site, &entry, result).await,
        // It was lost before it was fenced.
        Step::LiftFence if result["lost"] == moves::BEFORE_THE_FENCE => Ok(()),
        Step::LiftFence => preflight::lift_fence(site, &entry, result).await,
        Step::NameBack => database::name_back(site, job, &entry, result).await,
        Step::HandOver => separate::hand_over(site, job, &entry).await,
        Step::HandBack => separate::hand_back(site, job, &entry).await,
        Step::TakeRole => separate::take_role(site, job, &entry).await,
        Step::RemoveRole => separate::remove_role(site, job, &entry).await,
        Step::Reclaim => separate::reclaim(site, job, &entry).await,
        Step::Fill => import::fill(site, job, &entry, result).await,
        Step::Rehearse => import::rehearse(site, job, &entry, result).await,
        Step::Analyze => import::analyze(site, job, &entry, result).await,
        Step::ForgetFile => import::forget_file(site, job, &entry).await,
        Step::FindPrograms => archive::find_programs(site, job, &entry, result).await,
        Step::FenceForDump => archive::fence(site, &entry).await,
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
        Step::OfferVerifier => rotate::offer_verifier(site, job, &entry).await,
        Step::SetVerifier => rotate::set_verifier(site, job, &entry, result).await,
        Step::DropHalfMade => {
            hand::drop_of(site, &entry).await?;
            database::drop_half_made(site, job, &entry, result).await
        }
        Step::ForgetDump => archive::forget_dump(site, job, &entry, result).await,
        Step::DropNewRole => database::drop_new_role(site, job, &entry).await,
        Step::Migrate => migrate::run(site, job, &entry, result).await,
        Step::EndMigration => hand::drop_of(site, &entry).await,
        Step::DropPlans => migrate::drop_plans(site, &entry, result).await,
        Step::OpenLogin => login::open(site, job, &entry, result).await,
        Step::AwaitCommand => login::await_command(site, job, &entry).await,
        Step::CloseLogin => login::close(site, &entry).await,
        Step::CarryRoles
        | Step::MakeCopy
        | Step::TryFollowing
        | Step::CopySchema
        | Step::Replicate
        | Step::AwaitCopy
        | Step::FollowBack
        | Step::CatchUp
        | Step::FenceForMove
        | Step::AwaitApplied
        | Step::CopyData
        | Step::Verify
        | Step::LastRows
        | Step::MendSequences
        | Step::Seal
        | Step::SwitchServer
        | Step::OpenCopy
        | Step::AnalyzeCopy
        | Step::EndReplication
        | Step::EndFollowing
        | Step::DropCopy
        | Step::DropCarriedRoles
        | Step::DropKept
        | Step::ForgetKept => Box::pin(moves::perform(site, job, &entry, step, result)).await,
    }
}

fn set_held(entry: &mut Entry, held: bool) -> Result<(), StepError> {
    entry.held = held;
    Ok(())
}
