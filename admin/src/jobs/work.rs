//! What a job wants, and the steps that lead there and back. Pure.

use serde::{Deserialize, Serialize};

use crate::catalog::model::{Method, RoleRow, Verifier};

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Written down; nothing has run.
    Queued,
    /// On its way.
    Running,
    /// A step gave up, or somebody cancelled: on its way back.
    Undoing,
    /// Every step is done.
    Succeeded,
    /// A step gave up, and what was done before it is undone.
    Failed,
    /// Somebody cancelled, and what was done is undone.
    Cancelled,
}

/// What happens to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobEvent {
    /// Somebody takes it.
    Start,
    /// Its last step is done.
    Finish,
    /// A step gave up, or it was cancelled.
    Turn,
    /// The way back is done, after a failure.
    Fail,
    /// The way back is done, after a cancel.
    Cancel,
}

impl JobState {
    pub const ALL: [Self; 6] =
        [Self::Queued, Self::Running, Self::Undoing, Self::Succeeded, Self::Failed, Self::Cancelled];

    /// The table; `None` where it has no such transition.
    #[must_use]
    pub fn next(self, event: JobEvent) -> Option<Self> {
        use JobEvent as E;
        Some(match (self, event) {
            (Self::Queued, E::Start) => Self::Running,
            (Self::Running, E::Finish) => Self::Succeeded,
            (Self::Queued | Self::Running, E::Turn) => Self::Undoing,
            (Self::Undoing, E::Fail) => Self::Failed,
            (Self::Undoing, E::Cancel) => Self::Cancelled,
            _ => return None,
        })
    }

    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Undoing => "undoing",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }
}

/// An archive in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    pub id: i64,
    pub path: String,
    pub sha256: String,
}

/// What is wanted; the tenant is the job's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Work {
    /// A role and a database; with `archive`, filled from it.
    Create {
        role: RoleRow,
        archive: Option<Stored>,
    },
    Rename {
        from: String,
        to: String,
        rename_database: bool,
        wait: u64,
    },
    /// Milliseconds for transactions to finish by themselves.
    Drain {
        deadline: u64,
    },
    Archive {
        deadline: u64,
    },
    Restore {
        archive: Stored,
    },
    Delete {
        deadline: u64,
    },
    /// A new verifier for one of its roles.
    Rotate {
        role: String,
        verifier: Verifier,
        /// Leads from the old password's key to the new one's.
        bridge: Option<Verifier>,
        /// Milliseconds for which the old password is good, too.
        grace: u64,
    },
    /// From the role that it shares with others to one of its own, which owns everything from then on; the old one goes on working.
    Separate {
        role: RoleRow,
        old: String,
        /// Milliseconds for transactions to finish.
        wait: u64,
    },
    /// Roles that were shared get in no more.
    Retire {
        roles: Vec<String>,
    },
    /// The files of a rollout, in the tenant's database.
    Migrate {
        rollout: i64,
    },
    /// A login for a command of a rollout, which somebody else runs.
    Exec {
        rollout: i64,
    },
    /// The rows of an SQLite file, all or none.
    Import {
        /// Its name in `admin.imports_dir`.
        file: String,
        sha256: String,
        bytes: u64,
        /// Everything is done and rolled back.
        dry_run: bool,
        /// Tables, besides Django's own, whose rows give way to those of the file.
        replace: Vec<String>,
    },
    /// The tenant's database and its roles, at another server.
    Move {
        from: String,
        to: String,
        method: Method,
        /// Milliseconds for transactions to finish, while clients are held.
        wait: u64,
        /// Past it, what runs is cancelled, and whose transaction stays open is ended.
        cancel: bool,
        verify: Compared,
        /// Streams of pg_dump and pg_restore.
        streams: u32,
        /// Only what stands in the way is told.
        dry_run: bool,
    },
    /// To where the tenant was before it was moved.
    MoveBack {
        wait: u64,
        cancel: bool,
        verify: Compared,
        /// What was written since is there, too; else it may stay behind, at the place that is left, which may be lost.
        follows: bool,
    },
    /// The copy that a move left behind is dropped.
    ConfirmMove,
}

/// How much of two copies is compared while clients are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Compared {
    /// Rows and checksum of every table.
    Full,
    /// The smallest tables in full, larger ones by their rows, the largest by the position in the log that both have reached.
    Fast,
}

/// An idempotent unit of a job, by its word in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Whether all that comes can be done, before anybody is kept waiting; and how things stand, for the way back.
    Check,
    /// The login role, with its verifier.
    MakeRole,
    /// The database, under a temporary name.
    MakeDatabase,
    /// Nobody but its own roles may connect.
    CloseToPublic,
    /// Extensions.
    AddExtensions,
    /// ALTER DATABASE SET.
    SetDefaults,
    /// The database gets its name.
    Publish,
    /// Clients are let in.
    Open,
    /// New transactions wait.
    Hold,
    /// No connection of ours is left.
    AwaitQuiet,
    /// PostgreSQL lets nobody in, and sessions around Tenantry are ended.
    Fence,
    /// ALTER DATABASE RENAME.
    RenameDatabase,
    /// The new name leads there; the old one stays as an alias.
    Reroute,
    /// PostgreSQL lets sessions in again.
    Unfence,
    /// Waiting transactions go on.
    Release,
    /// Programs, store and rights are there, and nothing in the database would be lost.
    FindPrograms,
    /// New transactions are refused.
    StopTransactions,
    /// Those under way finish, are cancelled, are cut.
    AwaitTransactions,
    /// Nothing runs.
    Drained,
    /// Only Tenantry's own role may connect.
    FenceForDump,
    /// pg_dump into the store.
    Dump,
    /// Restored into a scratch database and compared.
    Prove,
    /// It is in the archive now.
    MarkArchived,
    /// It is gone; its name is free.
    Tombstone,
    /// DROP DATABASE.
    DropDatabase,
    /// DROP ROLE of those that Tenantry made.
    DropRoles,
    /// pg_restore from the store, whose checksum must fit.
    Load,
    /// The new verifier, in PostgreSQL.
    SetVerifier,
    /// The new verifier, for clients; the old one stays good for a while.
    OfferVerifier,
    /// All that the shared role has in the tenant's database, and the database, is the new role's.
    HandOver,
    /// The catalog has the new role as the owner.
    TakeRole,
    /// Clients of the old role are let in no more.
    RemoveRole,
    /// What the old role made meanwhile is the owner's, and it has no rights there any more.
    Reclaim,
    /// Files of SQL that are not in the version table yet, each in one transaction.
    Migrate,
    /// What is prepared on the tenant's server connections, in every process, is prepared anew.
    DropPlans,
    /// A role for one command, and the way in for it.
    OpenLogin,
    /// The command runs.
    AwaitCommand,
    /// The role is gone; what it made is the owner's.
    CloseLogin,
    /// The role that a migration worked as is dropped, with what it still does.
    EndMigration,
    /// The rows of the file go in, are compared with it, and are committed.
    Fill,
    /// The same, rolled back at the end.
    Rehearse,
    /// ANALYZE of what was filled.
    Analyze,
    /// The uploaded file is removed.
    ForgetFile,
    /// What was half made is dropped.
    DropHalfMade,
    /// What was stored without a proof is removed.
    ForgetDump,
    /// The role that this job made is dropped.
    DropNewRole,
    /// The tenant was never there.
    Forget,
    /// Transactions are let in again, if they were before.
    Reopen,
    /// Those who might connect may do so again.
    LiftFence,
    /// The database has its old name again.
    NameBack,
    /// Everything is the shared role's again.
    HandBack,
    /// The tenant's roles with their verifiers, at the other server.
    CarryRoles,
    /// A database there, which nobody gets into.
    MakeCopy,
    /// Whether the old server could log in at the new one, to follow it later.
    TryFollowing,
    /// Its tables, and all that is no row.
    CopySchema,
    /// Publication, slot and subscription: rows are copied, and what is written is applied.
    Replicate,
    /// Every table is copied.
    AwaitCopy,
    /// The same in the other direction, for the way back: what is written at the new place is applied at the old one.
    FollowBack,
    /// The copy is less than a moment behind.
    CatchUp,
    /// Nobody but Tenantry gets into the database that clients are about to leave, and nobody is in it.
    FenceForMove,
    /// What was written there last is at the other place.
    AwaitApplied,
    /// pg_dump and pg_restore, in parallel streams.
    CopyData,
    /// Sequences are set, and both copies compared.
    Verify,
    /// On the way back by force: what can still be had from the place that is left.
    LastRows,
    /// And no sequence of the copy gives a number that is in its tables.
    MendSequences,
    /// A copy that follows nobody lets nobody in at all.
    Seal,
    /// The tenant is at the other server.
    SwitchServer,
    /// Its roles may connect there.
    OpenCopy,
    /// ANALYZE of what was copied.
    AnalyzeCopy,
    /// Subscription, slot and publication are gone.
    EndReplication,
    /// The same, of the other direction.
    EndFollowing,
    /// What was made at the other server is dropped.
    DropCopy,
    /// Roles that this job made there are dropped.
    DropCarriedRoles,
    /// The copy that was left behind is dropped, with the roles that nobody needs there.
    DropKept,
    /// The tenant is at one place only.
    ForgetKept,
}

impl Step {
    /// As in the journal.
    #[must_use]
    pub fn word(self) -> String {
        serde_json::to_value(self).ok().and_then(|word| word.as_str().map(str::to_owned)).unwrap_or_default()
    }
}

impl Work {
    /// The word in the API.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Create { .. } => "create",
            Self::Rename { .. } => "rename",
            Self::Drain { .. } => "drain",
            Self::Archive { .. } => "archive",
            Self::Restore { .. } => "restore",
            Self::Delete { .. } => "delete",
            Self::Rotate { .. } => "rotate",
            Self::Separate { .. } => "separate",
            Self::Retire { .. } => "retire",
            Self::Migrate { .. } => "migrate",
            Self::Exec { .. } => "exec",
            Self::Import { .. } => "import",
            Self::Move { .. } => "move",
            Self::MoveBack { .. } => "rollback_move",
            Self::ConfirmMove => "confirm_move",
        }
    }

    /// As it is kept once it is over: verifiers and what leads from one password to the next are of no more use.
    #[must_use]
    pub fn without_secrets(&self) -> Self {
        let mut kept = self.clone();
        match &mut kept {
            Self::Create { role, .. } | Self::Separate { role, .. } => role.verifier = None,
            Self::Rotate { verifier, bridge, .. } => (*verifier, *bridge) = (Verifier(String::new()), None),
            _ => {}
        }
        kept
    }

    /// The way there.
    #[must_use]
    pub fn plan(&self) -> Vec<Step> {
        use Step as S;
        match self {
            Self::Create { archive: Some(_), .. } => {
                vec![S::MakeRole, S::MakeDatabase, S::CloseToPublic, S::Load, S::SetDefaults, S::Publish, S::Open]
            }
            Self::Create { .. } => vec![
                S::MakeRole,
                S::MakeDatabase,
                S::CloseToPublic,
                S::AddExtensions,
                S::SetDefaults,
                S::Publish,
                S::Open,
            ],
            Self::Rename { rename_database: true, .. } => {
                vec![S::Check, S::Hold, S::AwaitQuiet, S::Fence, S::RenameDatabase, S::Reroute, S::Unfence, S::Release]
            }
            Self::Rename { rename_database: false, .. } => vec![S::Check, S::Reroute],
            Self::Drain { .. } => vec![S::Check, S::StopTransactions, S::AwaitTransactions, S::Drained],
            Self::Archive { .. } => vec![
                S::Check,
                S::FindPrograms,
                S::StopTransactions,
                S::AwaitTransactions,
                S::Drained,
                S::FenceForDump,
                S::Dump,
                S::Prove,
                S::MarkArchived,
                S::DropDatabase,
            ],
            Self::Restore { .. } => {
                vec![S::MakeDatabase, S::CloseToPublic, S::Load, S::SetDefaults, S::Publish, S::Open]
            }
            Self::Delete { .. } => vec![
                S::Check,
                S::StopTransactions,
                S::AwaitTransactions,
                S::Drained,
                S::Tombstone,
                S::DropDatabase,
                S::DropRoles,
            ],
            Self::Rotate { .. } => vec![S::Check, S::OfferVerifier, S::SetVerifier],
            Self::Separate { .. } => {
                vec![S::Check, S::MakeRole, S::Hold, S::AwaitQuiet, S::HandOver, S::TakeRole, S::Release]
            }
            Self::Retire { .. } => vec![S::Check, S::RemoveRole, S::Reclaim],
            Self::Migrate { .. } => vec![S::Check, S::Migrate, S::DropPlans],
            Self::Exec { .. } => vec![S::Check, S::OpenLogin, S::AwaitCommand, S::CloseLogin, S::DropPlans],
            Self::Import { dry_run: false, .. } => vec![S::Check, S::Fill, S::Analyze, S::ForgetFile],
            Self::Import { dry_run: true, .. } => vec![S::Check, S::Rehearse, S::ForgetFile],
            Self::Move { .. } | Self::MoveBack { .. } | Self::ConfirmMove => self.plan_of_move(),
        }
    }

    fn plan_of_move(&self) -> Vec<Step> {
        use Step as S;
        match self {
            Self::Move { dry_run: true, .. } => vec![S::Check],
            Self::Move { method: Method::Online, .. } => vec![
                S::Check,
                S::CarryRoles,
                S::MakeCopy,
                S::TryFollowing,
                S::CopySchema,
                S::Replicate,
                S::AwaitCopy,
                S::FollowBack,
                S::CatchUp,
                S::Hold,
                S::AwaitQuiet,
                S::FenceForMove,
                S::AwaitApplied,
                S::Verify,
                S::Seal,
                S::SwitchServer,
                S::OpenCopy,
                S::Release,
                S::EndReplication,
            ],
            Self::Move { .. } => vec![
                S::Check,
                S::CarryRoles,
                S::MakeCopy,
                S::Hold,
                S::AwaitQuiet,
                S::FenceForMove,
                S::CopyData,
                S::Verify,
                S::Seal,
                S::SwitchServer,
                S::OpenCopy,
                S::Release,
                S::AnalyzeCopy,
            ],
            Self::MoveBack { follows: true, .. } => vec![
                S::Check,
                S::CatchUp,
                S::Hold,
                S::AwaitQuiet,
                S::FenceForMove,
                S::AwaitApplied,
                S::Verify,
                S::SwitchServer,
                S::OpenCopy,
                S::Release,
                S::EndFollowing,
                S::DropKept,
                S::ForgetKept,
            ],
            Self::MoveBack { .. } => vec![
                S::Check,
                S::Hold,
                S::AwaitQuiet,
                S::FenceForMove,
                S::LastRows,
                S::Seal,
                S::SwitchServer,
                // From here on nothing is applied to what clients are about to write in.
                S::EndFollowing,
                S::MendSequences,
                S::OpenCopy,
                S::Release,
                S::EndReplication,
            ],
            _ => vec![S::Check, S::EndFollowing, S::DropKept, S::ForgetKept],
        }
    }

    /// The step whose effect cannot be taken back.
    fn of_no_return(&self) -> Option<Step> {
        match self {
            Self::Create { .. } | Self::Restore { .. } => Some(Step::Open),
            Self::Rename { .. } => Some(Step::Reroute),
            Self::Drain { .. } | Self::Import { dry_run: true, .. } => None,
            Self::Import { dry_run: false, .. } => Some(Step::Analyze),
            Self::Archive { .. } => Some(Step::MarkArchived),
            Self::Delete { .. } => Some(Step::Tombstone),
            Self::Rotate { .. } => Some(Step::OfferVerifier),
            Self::Separate { .. } => Some(Step::TakeRole),
            Self::Retire { .. } => Some(Step::RemoveRole),
            Self::Migrate { .. } => Some(Step::DropPlans),
            Self::Exec { .. } => Some(Step::CloseLogin),
            Self::Move { dry_run: true, .. } => None,
            Self::Move { .. } | Self::MoveBack { .. } => Some(Step::SwitchServer),
            Self::ConfirmMove => Some(Step::EndFollowing),
        }
    }

    /// The way back, clients first: what is undone, and the step that may have left it there.
    fn undo(&self) -> &'static [(Step, Step)] {
        use Step as S;
        match self {
            Self::Create { .. } => {
                &[(S::DropHalfMade, S::MakeDatabase), (S::DropNewRole, S::MakeRole), (S::Forget, S::MakeRole)]
            }
            Self::Rename { .. } => &[(S::NameBack, S::RenameDatabase), (S::Unfence, S::Fence), (S::Release, S::Hold)],
            Self::Drain { .. } | Self::Delete { .. } => &[(S::Reopen, S::StopTransactions)],
            Self::Archive { .. } => &[
                (S::LiftFence, S::FenceForDump),
                (S::Reopen, S::StopTransactions),
                (S::DropHalfMade, S::Prove),
                (S::ForgetDump, S::FindPrograms),
            ],
            Self::Restore { .. } => &[(S::DropHalfMade, S::MakeDatabase)],
            Self::Import { .. } => &[(S::ForgetFile, S::Check)],
            Self::Rotate { .. } | Self::Retire { .. } => &[],
            // What was committed stays: the files before the one that failed, and what a command did.
            Self::Migrate { .. } => &[(S::EndMigration, S::Migrate), (S::DropPlans, S::Migrate)],
            Self::Exec { .. } => &[(S::CloseLogin, S::OpenLogin), (S::DropPlans, S::OpenLogin)],
            Self::Move { .. } => &[
                (S::LiftFence, S::FenceForMove),
                (S::Release, S::Hold),
                // The slot at the server that clients use goes first: each of these may have to wait for the other server.
                (S::EndReplication, S::Replicate),
                (S::EndFollowing, S::TryFollowing),
                (S::DropCopy, S::MakeCopy),
                (S::DropCarriedRoles, S::CarryRoles),
            ],
            Self::MoveBack { .. } => &[(S::LiftFence, S::FenceForMove), (S::Release, S::Hold)],
            Self::ConfirmMove => &[],
            Self::Separate { .. } => {
                &[(S::HandBack, S::HandOver), (S::Release, S::Hold), (S::DropNewRole, S::MakeRole)]
            }
        }
    }

    /// The way back from this step of `plan`, which may have had its effect or not; `None`: there is only the way forward.
    #[must_use]
    pub fn way_back(&self, from: usize) -> Option<Vec<Step>> {
        let plan = self.plan();
        let may_be_done = |step: Step| plan.iter().position(|s| *s == step).is_some_and(|at| at <= from);
        if self.of_no_return().is_some_and(may_be_done) {
            return None;
        }
        Some(self.undo().iter().filter(|(_, done)| may_be_done(*done)).map(|(undo, _)| *undo).collect())
    }

    /// One tenant's part of a rollout.
    #[must_use]
    pub fn is_of_rollout(&self) -> bool {
        matches!(self, Self::Migrate { .. } | Self::Exec { .. })
    }

    /// What PostgreSQL says of it, or the caller's command, may hold values of a tenant's rows.
    #[must_use]
    pub fn meets_rows(&self) -> bool {
        self.is_of_rollout() || matches!(self, Self::Import { .. })
    }

    /// Whole databases go through it.
    #[must_use]
    pub fn moves_data(&self) -> bool {
        self.plan().iter().any(|step| {
            matches!(step, Step::Dump | Step::Load | Step::Fill | Step::Rehearse | Step::AwaitCopy | Step::CopyData)
        })
    }

    /// Connections that it has in the tenant's database beside those of its clients: whoever looks and compares, who sends what is
    /// written, tables that are copied at once, and streams of a dump.
    #[must_use]
    pub fn room(&self) -> u32 {
        match self {
            Self::Move { method: Method::Online, .. } => 10,
            Self::Move { streams, .. } => streams.saturating_add(5),
            Self::MoveBack { .. } | Self::ConfirmMove => 5,
            _ => 0,
        }
    }

    /// While this step of `plan` runs or is tried again, clients wait or are refused: not for ever.
    #[must_use]
    pub fn keeps_clients(&self, step: usize) -> bool {
        let plan = self.plan();
        plan.iter().position(|s| matches!(s, Step::Hold | Step::StopTransactions)).is_some_and(|at| at <= step)
    }
}

/// What `Step::Fill` notes before it commits: the number of its transaction.
pub const COMMITTING: &str = "committing";

/// A job may have committed what cannot be taken back, and its step must find out before anything else: until then it is not
/// turned, and a cancel comes too late.
#[must_use]
pub fn may_be_committed(step: Option<Step>, result: &serde_json::Value) -> bool {
    step == Some(Step::Fill) && !result[COMMITTING].is_null()
}

impl Step {
    /// Takes long, and may be dropped in its middle: its way back undoes whatever is there.
    #[must_use]
    pub fn is_interruptible(self) -> bool {
        matches!(
            self,
            Self::AwaitQuiet
                | Self::AwaitTransactions
                | Self::Dump
                | Self::Prove
                | Self::Load
                | Self::Migrate
                | Self::AwaitCommand
                | Self::Fill
                | Self::Rehearse
                | Self::CopySchema
                | Self::AwaitCopy
                | Self::CatchUp
                | Self::AwaitApplied
                | Self::CopyData
                | Self::Verify
        )
    }

    /// Waits for clients, or for what PostgreSQL does by itself, and needs nothing for that.
    #[must_use]
    pub fn only_waits(self) -> bool {
        matches!(self, Self::AwaitQuiet | Self::AwaitTransactions | Self::AwaitCommand | Self::AwaitCopy)
    }
}

#[cfg(test)]
#[path = "work_tests.rs"]
mod tests;
