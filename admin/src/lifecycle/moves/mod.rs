//! A tenant goes to another server, and may come back: the steps of `move`, `rollback_move` and `confirm_move`.
//!
//! Both copies have the same name, each at its server. What always holds: the copy that clients are not routed to lets none
//! of the tenant's roles in, before the route changes as after it; the one that they leave is closed in PostgreSQL before
//! the other is opened; a copy is told from a stranger's database by PostgreSQL's number for it; a slot is dropped before
//! anything that may have to wait for another server.

pub mod copies;
mod copy;
mod cutover;
mod kept;
mod left;
mod preflight;
mod replicate;
mod roles;
mod still;

use futures_util::future::BoxFuture;
use serde_json::Value;
use tenantry_config::Floors;

use super::{Site, StepError, database, half_made};
use crate::{
    catalog::{
        model::{Entry, Method},
        store::JobRow,
    },
    jobs::work::{Step, Work},
};

pub use copy::sweep_spools;
pub use preflight::check;

/// `lost` of a job: the server that clients leave by force was away before anything was done there.
pub const BEFORE_THE_FENCE: &str = "before the fence";
/// Or went in the middle of the fence.
const IN_THE_FENCE: &str = "in the fence";

/// The tenant at the server that a move leaves, and at the one where it goes; whichever of them it is at.
struct Pair {
    old: Entry,
    new: Entry,
    /// The server that clients leave by force, and that cannot be reached: nothing is asked of it.
    lost: Option<String>,
}

impl Pair {
    fn of(job: &JobRow, entry: &Entry, result: &Value) -> Result<Self, StepError> {
        let noted = |key: &str| {
            let server = result[key].as_str().map(str::to_owned);
            server.ok_or_else(|| StepError::Refused("the job does not know where the other copy is".to_owned()))
        };
        let (old, new) = match &job.work {
            Work::Move { from, to, .. } => (from.clone(), to.clone()),
            _ => (noted("old")?, noted("new")?),
        };
        let lost = (!result["lost"].is_null()).then(|| new.clone());
        Ok(Self { old: at(entry, &old), new: at(entry, &new), lost })
    }

    /// Where clients are led, and the other.
    fn here_and_there(&self, entry: &Entry) -> (&Entry, &Entry) {
        if entry.server == self.new.server { (&self.new, &self.old) } else { (&self.old, &self.new) }
    }

    fn forward(&self, site: &Site) -> Direction {
        Direction { lost: self.lost.clone(), ..Direction::new(site, &self.old, &self.new, "") }
    }

    fn back(&self, site: &Site) -> Direction {
        Direction { lost: self.lost.clone(), ..Direction::new(site, &self.new, &self.old, BACK) }
    }

    /// The direction in which what clients write is carried.
    fn away(&self, site: &Site, entry: &Entry) -> Direction {
        if entry.server == self.new.server { self.back(site) } else { self.forward(site) }
    }
}

fn at(entry: &Entry, server: &str) -> Entry {
    Entry { server: server.to_owned(), ..entry.clone() }
}

/// What a name ends in that belongs to the way back.
const BACK: &str = "_back";

/// What is written at one place is applied at the other.
struct Direction {
    from: Entry,
    to: Entry,
    /// Of publication, subscription and slot.
    name: String,
    /// The role that `to` logs in as at `from`, and the one that applies at `to`.
    sender: String,
    applier: String,
    /// See `Pair`.
    lost: Option<String>,
}

impl Direction {
    fn new(site: &Site, from: &Entry, to: &Entry, suffix: &str) -> Self {
        let base = half_made(&database::catalog_id(site), from.number);
        Self {
            from: from.clone(),
            to: to.clone(),
            // A slot's name has no `-`.
            name: format!("{}{suffix}", base.replace('-', "_")),
            sender: format!("{base}-send"),
            applier: format!("{base}-apply"),
            lost: None,
        }
    }
}

/// Does one step of a move.
pub async fn perform(
    site: &mut Site,
    job: &JobRow,
    entry: &Entry,
    step: Step,
    result: &mut Value,
) -> Result<(), StepError> {
    let pair = Pair::of(job, entry, result)?;
    let done = step_of_move(site, job, entry, &pair, step, result).await;
    match done {
        // A slot keeps the log of the server that clients use.
        Err(error)
            if matches!(
                step,
                Step::TryFollowing | Step::Replicate | Step::AwaitCopy | Step::FollowBack | Step::CatchUp
            ) =>
        {
            Err(still::verdict(site, job, step, result, error).await)
        }
        done => done,
    }
}

/// Each step on the heap, and made in a frame of its own: together they would not fit a thread's stack.
fn step_of_move<'a>(
    site: &'a mut Site,
    job: &'a JobRow,
    entry: &'a Entry,
    pair: &'a Pair,
    step: Step,
    result: &'a mut Value,
) -> BoxFuture<'a, Result<(), StepError>> {
    match step {
        Step::CarryRoles => boxed(|| async move { roles::carry(site, pair).await }),
        Step::MakeCopy => boxed(|| async move {
            copy::make(site, job, pair, result).await?;
            // A dump begins with clients waiting.
            still_fits(site, &pair.new)
        }),
        Step::TryFollowing if result["follows"] == true => {
            boxed(|| async move { replicate::rehearse(site, &pair.back(site)).await })
        }
        Step::TryFollowing => boxed(|| async { Ok(()) }),
        Step::CopySchema => boxed(|| async move { copy::schema(site, job, pair, result).await }),
        Step::Replicate => boxed(|| async move { replicate::begin(site, &pair.forward(site), true).await }),
        Step::AwaitCopy => boxed(|| async move { replicate::await_copy(site, job, &pair.forward(site), result).await }),
        Step::FollowBack if result["follows"] == true => {
            boxed(|| async move { replicate::begin(site, &pair.back(site), false).await })
        }
        Step::FollowBack => boxed(|| async { Ok(()) }),
        Step::CatchUp => boxed(|| async move { cutover::catch_up(site, job, entry, pair, result).await }),
        Step::FenceForMove if is_forced(job) => {
            boxed(|| async move { left::fence(site, job, entry, pair, result).await })
        }
        Step::FenceForMove => boxed(|| async move { cutover::fence(site, entry, pair).await }),
        Step::LastRows => boxed(|| async move { left::last_rows(site, job, entry, pair, result).await }),
        Step::AwaitApplied => boxed(|| async move { cutover::await_applied(site, &pair.away(site, entry)).await }),
        Step::CopyData => boxed(|| async move { copy::data(site, job, pair, result).await }),
        Step::Verify => boxed(|| async move { cutover::verify(site, job, entry, pair, result).await }),
        Step::Seal => boxed(|| async move { cutover::seal(site, job, entry, pair, result).await }),
        Step::SwitchServer => boxed(|| async move { cutover::switch(site, job, entry, pair, result).await }),
        Step::OpenCopy => boxed(|| async move { cutover::open(site, job, entry, pair, result).await }),
        Step::AnalyzeCopy => boxed(|| async move { copy::analyze(site, &pair.new).await }),
        Step::EndReplication if is_forced(job) => {
            boxed(|| async move { left::end(site, job, entry, &pair.forward(site), result).await })
        }
        Step::EndFollowing if is_forced(job) => {
            boxed(|| async move { left::end(site, job, entry, &pair.back(site), result).await })
        }
        Step::EndReplication => boxed(|| async move { replicate::end(site, &pair.forward(site)).await }),
        Step::EndFollowing => boxed(|| async move { replicate::end(site, &pair.back(site)).await }),
        Step::MendSequences => boxed(|| async move { left::mend_sequences(site, pair, result).await }),
        Step::DropCopy => boxed(|| async move { copy::drop(site, job, pair, result).await }),
        Step::DropCarriedRoles => boxed(|| async move { roles::drop_carried(site, pair).await }),
        Step::DropKept => boxed(|| async move { kept::drop(site, entry, result).await }),
        Step::ForgetKept => boxed(|| async move {
            let forget = |e: &mut Entry| {
                e.kept = None;
                Ok(())
            };
            site.change(entry.number, forget).await
        }),
        other => {
            boxed(move || async move { Err(StepError::Refused(format!("{} is no step of a move", other.word()))) })
        }
    }
}

fn boxed<'a, F: Future<Output = Result<(), StepError>> + Send + 'a>(
    make: impl FnOnce() -> F,
) -> BoxFuture<'a, Result<(), StepError>> {
    Box::pin(make())
}

/// Floors that were promised at the server meanwhile: looked at once more, before anybody waits.
fn still_fits(site: &Site, new: &Entry) -> Result<(), StepError> {
    if new.spec.floor == 0 {
        return Ok(());
    }
    let (mut others, _) = site.plane.known().merge(&site.plane.file());
    others.tenants.retain(|_, tenant| tenant.standing.number != Some(new.number));
    let others = Floors::of(&others, &new.server, site.plane.data.slots(&new.server));
    match others.cap {
        Some(cap) if others.sum + u64::from(new.spec.floor) > u64::from(cap) => Err(StepError::Refused(format!(
            "the floor of {} does not fit at {} any more: the floors of the others there are {} by now, and its cap is {cap}; \
             lower one of them",
            new.spec.floor, new.server, others.sum
        ))),
        _ => Ok(()),
    }
}

/// What was written since may stay behind.
fn is_forced(job: &JobRow) -> bool {
    matches!(job.work, Work::MoveBack { follows: false, .. })
}

fn method_of(job: &JobRow) -> Method {
    match &job.work {
        Work::Move { method, .. } => *method,
        _ => Method::Dump,
    }
}
