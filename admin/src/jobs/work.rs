//! What a job wants, and the steps that lead there and back. Pure.

use serde::{Deserialize, Serialize};

use crate::catalog::model::RoleRow;

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
        verifier: crate::catalog::model::Verifier,
    },
}

/// An idempotent unit of a job, by its word in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Step {
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
    /// The new verifier, in PostgreSQL and for clients.
    SetVerifier,
    /// What was half made is dropped.
    DropHalfMade,
    /// What was stored without a proof is removed.
    ForgetDump,
    /// The role that this job made is dropped.
    DropNewRole,
    /// The tenant was never there.
    Forget,
    /// Transactions are let in again.
    Reopen,
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
        }
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
                vec![S::Hold, S::AwaitQuiet, S::Fence, S::RenameDatabase, S::Reroute, S::Unfence, S::Release]
            }
            Self::Rename { rename_database: false, .. } => vec![S::Reroute],
            Self::Drain { .. } => vec![S::StopTransactions, S::AwaitTransactions, S::Drained],
            Self::Archive { .. } => vec![
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
            Self::Delete { .. } => {
                vec![S::StopTransactions, S::AwaitTransactions, S::Drained, S::Tombstone, S::DropDatabase, S::DropRoles]
            }
            Self::Rotate { .. } => vec![S::SetVerifier],
        }
    }

    /// The way back from this step of `plan`; `None`: there is only the way forward.
    #[must_use]
    pub fn way_back(&self, from: usize) -> Option<Vec<Step>> {
        use Step as S;
        let plan = self.plan();
        let is_before = |step: Step| plan.iter().position(|s| *s == step).is_none_or(|at| from <= at);
        match self {
            Self::Create { .. } => is_before(S::Open).then(|| vec![S::DropHalfMade, S::DropNewRole, S::Forget]),
            Self::Rename { rename_database: true, .. } => {
                is_before(S::RenameDatabase).then(|| vec![S::Unfence, S::Release])
            }
            Self::Rename { .. } | Self::Rotate { .. } => Some(Vec::new()),
            Self::Drain { .. } => is_before(S::Drained).then(|| vec![S::Reopen]),
            Self::Archive { .. } if from == 0 => Some(vec![S::ForgetDump]),
            Self::Archive { .. } => {
                is_before(S::MarkArchived).then(|| vec![S::DropHalfMade, S::ForgetDump, S::CloseToPublic, S::Reopen])
            }
            Self::Restore { .. } => is_before(S::Open).then(|| vec![S::DropHalfMade]),
            Self::Delete { .. } => is_before(S::Tombstone).then(|| vec![S::Reopen]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_table() {
        let events = [JobEvent::Start, JobEvent::Finish, JobEvent::Turn, JobEvent::Fail, JobEvent::Cancel];
        let mut table = String::new();
        for state in JobState::ALL {
            let row: Vec<_> = events.iter().map(|e| state.next(*e).map_or("-", JobState::as_str)).collect();
            table.push_str(&format!("{}: {}\n", state.as_str(), row.join(" ")));
            assert_eq!(state.is_over(), row.iter().all(|next| *next == "-"));
        }
        assert_eq!(
            table,
            "queued: running - undoing - -\nrunning: - succeeded undoing - -\nundoing: - - - failed cancelled\n\
             succeeded: - - - - -\nfailed: - - - - -\ncancelled: - - - - -\n"
        );
    }

    #[test]
    fn what_was_published_or_dropped_has_no_way_back() {
        let archive = Work::Archive { deadline: 0 };
        let at = |step| archive.plan().iter().position(|s| *s == step).unwrap();
        assert!(archive.way_back(at(Step::Prove)).is_some() && archive.way_back(at(Step::MarkArchived)).is_some());
        assert!(archive.way_back(at(Step::DropDatabase)).is_none());
        let rename = Work::Rename { from: "a".into(), to: "b".into(), rename_database: true, wait: 0 };
        assert_eq!(rename.way_back(2), Some(vec![Step::Unfence, Step::Release]));
        assert!(rename.way_back(4).is_none());
    }
}
