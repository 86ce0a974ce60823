//! The model of every job: whatever it does, wherever it turns, it ends done or undone.

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
        moving(Method::Online, false),
        moving(Method::Dump, false),
        moving(Method::Online, true),
        back(true),
        back(false),
        Work::ConfirmMove,
    ]
}

fn moving(method: Method, dry_run: bool) -> Work {
    let (from, to) = ("old".to_owned(), "new".to_owned());
    Work::Move { from, to, method, wait: 0, cancel: false, verify: Compared::Fast, streams: 1, dry_run }
}

fn back(follows: bool) -> Work {
    Work::MoveBack { wait: 0, cancel: false, verify: Compared::Fast, follows }
}

/// A server that a tenant may be at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Site {
    /// The tenant's database.
    is_there: bool,
    /// Whether the tenant's roles may connect to it.
    is_open: bool,
    roles: bool,
}

const NOTHING: Site = Site { is_there: false, is_open: false, roles: false };
const CLOSED: Site = Site { is_there: true, is_open: false, roles: true };
const OPEN: Site = Site { is_there: true, is_open: true, roles: true };

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
    /// The old server and the new one of a move, at which of them the tenant is, and whether there is a copy at the other.
    sites: [Site; 2],
    at: usize,
    is_kept: bool,
    /// From the old one to the new one, and the other way round.
    replicates: [bool; 2],
}

impl World {
    fn before(work: &Work, state: &'static str) -> Self {
        let is_there = !matches!(work, Work::Create { .. }) && state != "archived";
        let was_moved = matches!(work, Work::MoveBack { .. } | Work::ConfirmMove);
        Self {
            sites: if was_moved { [CLOSED, OPEN] } else { [OPEN, NOTHING] },
            at: usize::from(was_moved),
            is_kept: was_moved,
            replicates: [false, was_moved],
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
        if matches!(work, Work::Move { .. } | Work::MoveBack { .. } | Work::ConfirmMove) {
            self.perform_move(step, matches!(work, Work::Move { .. }))?;
            return self.never_two_writable();
        }
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
            other => panic!("{other:?} is of a move"),
        }
        Ok(())
    }

    fn perform_move(&mut self, step: Step, is_there: bool) -> Result<(), &'static str> {
        use Step as S;
        let (here, other) = (self.at, 1 - self.at);
        match step {
            S::Check | S::AwaitQuiet | S::TryFollowing | S::LastRows | S::MendSequences => {}
            S::CarryRoles => self.sites[other].roles = true,
            S::MakeCopy => self.sites[other].is_there = true,
            S::CopySchema | S::AwaitCopy | S::CatchUp | S::AwaitApplied | S::CopyData | S::Verify => {
                if !self.sites[other].is_there {
                    return Err("no copy");
                }
            }
            S::Replicate => self.replicates[0] = true,
            S::FollowBack => self.replicates[1] = true,
            S::EndReplication => self.replicates[0] = false,
            S::EndFollowing => self.replicates[1] = false,
            S::Hold => self.held = true,
            S::Release => self.held = false,
            S::FenceForMove => self.sites[here].is_open = false,
            S::LiftFence => self.sites[here].is_open = true,
            S::Seal | S::AnalyzeCopy => {}
            S::SwitchServer => (self.at, self.is_kept) = (usize::from(is_there), true),
            S::OpenCopy => self.sites[here].is_open = true,
            S::DropCopy => (self.sites[other].is_there, self.sites[other].is_open) = (false, false),
            S::DropCarriedRoles => self.sites[other].roles = false,
            S::DropKept => {
                if self.replicates[1] {
                    return Err("a database with a subscription cannot be dropped");
                }
                self.sites[other] = NOTHING;
            }
            S::ForgetKept => self.is_kept = false,
            step => panic!("{step:?} is not of a move"),
        }
        Ok(())
    }

    fn never_two_writable(&self) -> Result<(), &'static str> {
        if self.sites[0].is_open && self.sites[1].is_open {
            return Err("two copies can be written");
        }
        let place = self.sites[self.at];
        if self.held || place.is_there && place.is_open { Ok(()) } else { Err("clients meet a closed door") }
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

/// Whatever is not dropped keeps the log of a server, until its disk is full; and the other server may be gone.
#[test]
fn a_move_on_its_way_back_first_drops_the_slot_of_the_server_that_clients_use() {
    for work in every_work().iter().filter(|work| matches!(work, Work::Move { method: Method::Online, .. })) {
        let Some(from) = work.plan().iter().position(|step| *step == Step::CatchUp) else { continue };
        let way = work.way_back(from).unwrap();
        let at = |wanted| way.iter().position(|step| *step == wanted).unwrap();
        assert!(at(Step::EndReplication) < at(Step::EndFollowing), "{way:?}");
    }
}

#[test]
fn by_force_nothing_is_applied_any_more_to_what_clients_are_let_into() {
    let plan = back(false).plan();
    let at = |wanted| plan.iter().position(|step| *step == wanted).unwrap();
    assert!(at(Step::SwitchServer) < at(Step::EndFollowing) && at(Step::EndFollowing) < at(Step::OpenCopy), "{plan:?}");
    assert!(
        at(Step::EndFollowing) < at(Step::MendSequences) && at(Step::MendSequences) < at(Step::OpenCopy),
        "{plan:?}"
    );
}

#[test]
fn clients_are_let_in_before_anything_that_may_take_long() {
    for work in every_work() {
        for at in 0..work.plan().len() {
            let way = work.way_back(at).unwrap_or_default();
            let place = |wanted: &[Step]| way.iter().position(|step| wanted.contains(step));
            let clients = place(&[Step::Release, Step::Reopen]);
            let slow = place(&[
                Step::DropHalfMade,
                Step::ForgetDump,
                Step::DropNewRole,
                Step::EndFollowing,
                Step::EndReplication,
                Step::DropCopy,
            ]);
            assert!(clients.is_none() || slow.is_none() || clients < slow, "{work:?} at {at}: {way:?}");
        }
    }
}

#[test]
fn there_is_always_a_way_back_before_anything_was_done_and_none_after_the_last_step_that_was_published() {
    for work in every_work() {
        assert!(work.way_back(0).is_some(), "{work:?}");
        let last = work.way_back(work.plan().len() - 1);
        let is_harmless =
            matches!(work, Work::Drain { .. } | Work::Import { dry_run: true, .. } | Work::Move { dry_run: true, .. });
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
