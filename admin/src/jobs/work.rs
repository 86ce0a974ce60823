//! What a job wants, and the steps that lead there and back. Pure.

use serde::{Deserialize, Serialize};

use crate::catalog::model::{RoleRow, Verifier};

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

    /// Whole databases go through it.
    #[must_use]
    pub fn moves_data(&self) -> bool {
        self.plan().iter().any(|step| matches!(step, Step::Dump | Step::Load | Step::Fill | Step::Rehearse))
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
        )
    }

    /// Waits for clients, and needs nothing for that.
    #[must_use]
    pub fn only_waits(self) -> bool {
        matches!(self, Self::AwaitQuiet | Self::AwaitTransactions | Self::AwaitCommand)
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

    fn import(dry_run: bool) -> Work {
        Work::Import { file: "f".into(), sha256: String::new(), bytes: 0, dry_run, replace: Vec::new() }
    }

    fn every_work() -> Vec<Work> {
        let role = RoleRow::new("new".into(), None, true);
        let archive = Stored { id: 1, path: String::new(), sha256: String::new() };
        let rename = |rename_database| Work::Rename { from: "a".into(), to: "b".into(), rename_database, wait: 0 };
        vec![
            Work::Create { role: role.clone(), archive: None },
            Work::Create { role: role.clone(), archive: Some(archive.clone()) },
            rename(true),
            rename(false),
            Work::Drain { deadline: 0 },
            Work::Archive { deadline: 0 },
            Work::Restore { archive },
            Work::Delete { deadline: 0 },
            Work::Rotate { role: "a".into(), verifier: Verifier(String::new()), bridge: None, grace: 0 },
            Work::Separate { role, old: "all".into(), wait: 0 },
            Work::Retire { roles: vec!["all".into()] },
            Work::Migrate { rollout: 1 },
            Work::Exec { rollout: 1 },
            import(false),
            import(true),
        ]
    }

    /// As much of the world as the steps change.
    #[derive(Debug, Clone, PartialEq, Eq)]
    struct World {
        state: &'static str,
        held: bool,
        name: &'static str,
        /// Name of the tenant's database, and whether sessions are let in.
        database: Option<(&'static str, bool)>,
        /// Whether others than Tenantry may connect.
        is_public: bool,
        half_made: bool,
        new_role: bool,
        file: bool,
        is_registered: bool,
        owner: &'static str,
        owner_in_postgres: &'static str,
        may_log_in: bool,
        old_rights: bool,
        verifier: (u8, u8),
        /// A role that works on the tables, and plans of clients that know them as they were.
        worker: bool,
        has_stale_plans: bool,
        has_upload: bool,
        is_filled: bool,
    }

    impl World {
        fn before(work: &Work, state: &'static str) -> Self {
            let is_there = !matches!(work, Work::Create { .. }) && state != "archived";
            Self {
                state,
                held: false,
                name: "a",
                database: is_there.then_some(("a", true)),
                is_public: true,
                half_made: false,
                new_role: false,
                file: false,
                is_registered: false,
                owner: "all",
                owner_in_postgres: "all",
                may_log_in: true,
                old_rights: true,
                verifier: (0, 0),
                worker: false,
                has_stale_plans: false,
                has_upload: matches!(work, Work::Import { .. }),
                is_filled: false,
            }
        }

        /// What `lifecycle` does; an error is one that never passes.
        fn perform(&mut self, step: Step, work: &Work, before: &Self) -> Result<(), &'static str> {
            use Step as S;
            match step {
                S::Check | S::FindPrograms | S::AwaitQuiet | S::AwaitTransactions => {}
                S::SetDefaults | S::AddExtensions | S::CloseToPublic | S::Load => {
                    if !self.half_made && self.database.is_none() {
                        return Err("no database to work on");
                    }
                }
                S::MakeRole => self.new_role = true,
                S::MakeDatabase => self.half_made = true,
                S::Publish => {
                    if std::mem::take(&mut self.half_made) {
                        self.database = Some(("a", true));
                    }
                }
                S::Open => self.state = "active",
                S::Hold => self.held = true,
                S::Release => self.held = false,
                S::Fence => self.database = self.database.map(|(name, _)| (name, false)),
                S::Unfence => {
                    // Asked for by the name that the catalog has.
                    if self.database.is_some_and(|(name, _)| name == self.name) {
                        self.database = Some((self.name, true));
                    }
                }
                S::RenameDatabase => self.database = self.database.map(|(_, open)| ("b", open)),
                S::NameBack => self.database = self.database.map(|(_, open)| ("a", open)),
                S::Reroute => self.name = "b",
                S::StopTransactions => {
                    if !matches!(self.state, "drained" | "archived") {
                        self.state = "draining";
                    }
                }
                S::Drained => {
                    if self.state != "archived" {
                        self.state = "drained";
                    }
                }
                S::Reopen => {
                    if matches!(self.state, "draining" | "drained") {
                        self.state = before.state;
                    }
                }
                S::FenceForDump => self.is_public = false,
                S::LiftFence => self.is_public = true,
                S::Dump => self.file = true,
                S::ForgetDump => self.file = false,
                S::Prove => self.half_made = false,
                S::MarkArchived => (self.is_registered, self.state) = (true, "archived"),
                S::Tombstone => self.state = "dropped",
                S::DropDatabase => self.database = None,
                S::DropRoles => self.may_log_in = false,
                S::OfferVerifier => self.verifier.0 = 1,
                S::SetVerifier => self.verifier.1 = 1,
                S::DropHalfMade => {
                    self.half_made = false;
                    if matches!(work, Work::Create { .. } | Work::Restore { .. }) && self.state != "active" {
                        self.database = None;
                    }
                }
                S::DropNewRole => self.new_role = false,
                S::Forget => self.state = "dropped",
                S::HandOver => self.owner_in_postgres = "new",
                S::HandBack => self.owner_in_postgres = "all",
                S::TakeRole => self.owner = "new",
                S::RemoveRole => self.may_log_in = false,
                S::Reclaim => self.old_rights = false,
                S::Migrate | S::AwaitCommand => self.has_stale_plans = true,
                S::DropPlans => self.has_stale_plans = false,
                S::OpenLogin => self.worker = true,
                S::CloseLogin | S::EndMigration => self.worker = false,
                S::Fill => self.is_filled = true,
                S::Rehearse | S::Analyze => {
                    if !self.has_upload {
                        return Err("no file to read");
                    }
                }
                S::ForgetFile => self.has_upload = false,
            }
            Ok(())
        }
    }

    /// A crash at every step, before or after its effect; then a cancel, or not; then the rest of the way.
    #[test]
    fn wherever_a_job_turns_it_ends_done_or_undone() {
        let mut ends = 0;
        for work in every_work() {
            let states: &[&str] = match work {
                Work::Create { .. } => &["creating"],
                Work::Restore { .. } => &["archived"],
                Work::Drain { .. } => &["active", "paused", "suspended"],
                Work::Archive { .. } => &["active", "paused", "suspended", "drained"],
                Work::Delete { .. } => &["active", "paused", "drained", "archived"],
                _ => &["active", "paused"],
            };
            for state in states {
                let before = World::before(&work, state);
                let plan = work.plan();
                let mut done = before.clone();
                plan.iter().for_each(|step| done.perform(*step, &work, &before).unwrap());
                for (at, is_done) in (0..plan.len()).flat_map(|at| [(at, false), (at, true)]) {
                    let mut world = before.clone();
                    plan[..at].iter().for_each(|step| world.perform(*step, &work, &before).unwrap());
                    if is_done {
                        world.perform(plan[at], &work, &before).unwrap();
                    }
                    // A cancel turns it back where it can; else it goes on. What was committed is never turned.
                    let noted = serde_json::json!({ COMMITTING: is_done.then_some("1") });
                    match work.way_back(at).filter(|_| !may_be_committed(Some(plan[at]), &noted)) {
                        Some(way) => {
                            way.iter().for_each(|step| world.perform(*step, &work, &before).unwrap());
                            let mut undone = before.clone();
                            if matches!(work, Work::Create { .. }) {
                                undone.state = "dropped";
                            }
                            undone.has_upload = false;
                            assert_eq!(world, undone, "{work:?} from {state}, turned at {:?} ({is_done})", plan[at]);
                        }
                        None => {
                            plan[at..].iter().for_each(|step| world.perform(*step, &work, &before).unwrap());
                            assert_eq!(world, done, "{work:?} from {state}, at {:?} ({is_done})", plan[at]);
                        }
                    }
                    ends += 1;
                }
            }
        }
        assert!(ends > 200, "{ends}");
    }

    #[test]
    fn clients_are_let_in_before_anything_that_may_take_long() {
        for work in every_work() {
            for at in 0..work.plan().len() {
                let way = work.way_back(at).unwrap_or_default();
                let place = |wanted: &[Step]| way.iter().position(|step| wanted.contains(step));
                let clients = place(&[Step::Release, Step::Reopen]);
                let slow = place(&[Step::DropHalfMade, Step::ForgetDump, Step::DropNewRole]);
                assert!(clients.is_none() || slow.is_none() || clients < slow, "{work:?} at {at}: {way:?}");
            }
        }
    }

    #[test]
    fn there_is_always_a_way_back_before_anything_was_done_and_none_after_the_last_step_that_was_published() {
        for work in every_work() {
            assert!(work.way_back(0).is_some(), "{work:?}");
            let last = work.way_back(work.plan().len() - 1);
            let is_harmless = matches!(work, Work::Drain { .. } | Work::Import { dry_run: true, .. });
            assert_eq!(last.is_some(), is_harmless, "{work:?}");
        }
    }

    #[test]
    fn only_what_may_have_been_done_is_undone() {
        let archive = Work::Archive { deadline: 0 };
        let at = |step| archive.plan().iter().position(|s| *s == step).unwrap();
        assert_eq!(archive.way_back(at(Step::FindPrograms)), Some(vec![Step::ForgetDump]));
        assert_eq!(archive.way_back(at(Step::Drained)), Some(vec![Step::Reopen, Step::ForgetDump]));
        let from_dump = vec![Step::LiftFence, Step::Reopen, Step::ForgetDump];
        assert_eq!(archive.way_back(at(Step::Dump)), Some(from_dump));
        assert_eq!(archive.way_back(at(Step::MarkArchived)), None);
    }
}
