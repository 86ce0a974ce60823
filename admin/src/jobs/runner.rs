//! Walks the journal: takes open jobs, does their steps, turns back where a step gives up.
//!
//! What always holds: one process at a time runs jobs (an advisory lock on a connection of its own; when it is lost, or gives
//! no sign of life, all work stops and whoever has it next goes on, under a number of its own without which nothing is
//! written); a job that waits holds up no other; a step that cannot reach PostgreSQL is tried again, for as long as it takes
//! unless that keeps clients waiting; one that is refused turns the job back, while there is a way back.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures_util::FutureExt;
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::{
    rollouts,
    work::{JobEvent, JobState, Step, may_be_committed},
};
use crate::{
    catalog::{
        CatalogError,
        store::{JobRow, Journalled, OpenJobs},
    },
    control,
    lifecycle::{self, Site, StepError},
    plane::ControlPlane,
    sql::catalog as sql,
};

/// Jobs at work at once, over all servers; those that only wait do not count.
const AT_ONCE: usize = 4;
/// Those of them that dump or load, from their beginning to their end: disks and PostgreSQL have other work, too.
const MOVERS: usize = 4;
/// Migrations, which wait for PostgreSQL and need little of us; a rollout says how many of its own are under way.
const MIGRATORS: usize = 16;
/// Jobs of other processes' API, and those left by a crash, are looked for this often; our own are told at once.
const LOOK: Duration = Duration::from_secs(1);
/// So many of these looks apart it is looked for what jobs left on this host.
const SWEEP: u32 = 60;
/// A step that may be interrupted looks for a cancel this often.
const LOOK_FOR_CANCEL: Duration = Duration::from_millis(250);
/// The connection with the lock has to answer within this.
const SIGN_OF_LIFE: Duration = Duration::from_secs(3);
/// Until a step that could not reach PostgreSQL is tried again: doubled up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// How often work is begun in the middle of which PostgreSQL goes, or has no room: it may be the reason.
const MOST_LOST: u32 = 5;
/// How long one step is tried again that keeps clients waiting, or that somebody is in the way of, while there is a way back.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs jobs until `stop`.
pub async fn run(plane: Arc<ControlPlane>, stop: CancellationToken) {
    let mut turns = 0u32;
    loop {
        let turn = async {
            // Also where the jobs are run by another process: what they left here is here.
            if turns.is_multiple_of(SWEEP) {
                lifecycle::sweep_spools(&plane).await;
            }
            if let Err(error) = lead(&plane).await {
                tracing::debug!(%error, "jobs are not run here now");
            }
            tokio::time::sleep(LOOK).await;
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = turn => turns = turns.wrapping_add(1),
        }
    }
}

/// What all jobs share that this process runs while it has the lock.
struct Lead {
    plane: Arc<ControlPlane>,
    /// The number under which it runs them.
    number: i64,
    slots: Arc<Semaphore>,
    /// Of jobs that dump or load: kept from before anybody waits to the end.
    movers: Arc<Semaphore>,
    /// In place of `slots`, of migrations.
    migrators: Arc<Semaphore>,
    /// Jobs that have a task.
    busy: Mutex<BTreeSet<i64>>,
}

/// Runs jobs while we hold the lock.
async fn lead(plane: &Arc<ControlPlane>) -> Result<(), StepError> {
    let Some(lock) = lock(plane).await? else { return Ok(()) };
    let number = plane.catalog.lead().await?;
    // Names and marks of what is made hold the catalog's name.
    plane.refresh().await?;
    lifecycle::sweep_uploads(plane).await;
    plane.catalog.hear_all_runners(number).await?;
    let [slots, movers, migrators] = [AT_ONCE, MOVERS, MIGRATORS].map(|n| Arc::new(Semaphore::new(n)));
    let lead = Arc::new(Lead { plane: Arc::clone(plane), number, slots, movers, migrators, busy: Mutex::default() });
    let mut told = BTreeSet::new();
    // Dropped on the way out: what runs stops at its next await.
    let mut running = JoinSet::new();
    let mut aside = JoinSet::new();
    aside.spawn(lifecycle::copies::watch(Arc::clone(plane), number));
    loop {
        let sign = timeout(SIGN_OF_LIFE, lock.simple_query("")).await;
        sign.map_err(|_| StepError::Away("the connection with the lock gives no sign of life".to_owned()))??;
        // A catalog that does not answer now is no reason to stop what runs: the journal asks for our number anyway.
        if let Err(error) = rollouts::advance(plane, number).await {
            tracing::debug!(%error, "rollouts wait");
        }
        match found(&lead).await {
            Ok(Some((jobs, unreadable))) => {
                for (job, error) in unreadable.into_iter().filter(|(job, _)| told.insert(*job)) {
                    tracing::error!(job, %error, "a job cannot be read, and is left alone");
                }
                for job in jobs.into_iter().filter(|job| lead.busy.lock().insert(job.id)) {
                    running.spawn(take(Arc::clone(&lead), job.id));
                }
            }
            Ok(None) => return Err(StepError::Away("another process runs the jobs".to_owned())),
            Err(CatalogError::Away(_)) => {}
            Err(error) => return Err(error.into()),
        }
        tokio::select! {
            () = plane.new_job.notified() => {}
            Some(_) = running.join_next() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// The jobs there are, and those that cannot be read; `None` if another process runs them now.
async fn found(lead: &Lead) -> Result<Option<OpenJobs>, CatalogError> {
    if lead.plane.catalog.leader().await? != lead.number {
        return Ok(None);
    }
    lead.plane.catalog.open_jobs().await.map(Some)
}

/// The connection with the lock, if nobody else has it.
async fn lock(plane: &ControlPlane) -> Result<Option<Client>, StepError> {
    let settings = plane.file();
    let (server, control) = plane.control_of(&settings)?;
    let client = control::connect(server, control).await?;
    let is_ours: bool = client.query_one(sql::LOCK_JOBS, &[]).await?.try_get(0)?;
    if is_ours {
        client.batch_execute(sql::NOTICE_DEATH).await?;
    }
    Ok(is_ours.then_some(client))
}

async fn take(lead: Arc<Lead>, id: i64) {
    if std::panic::AssertUnwindSafe(walk(&lead, id)).catch_unwind().await.is_err() {
        tracing::error!(job = id, "a step panicked; the job is tried again");
        tokio::time::sleep(RETRY.1).await;
    }
    lead.busy.lock().remove(&id);
}

/// One step that is tried again and again.
struct Tries {
    /// When it first failed.
    first: Option<Instant>,
    pause: Duration,
    /// How often PostgreSQL was lost in its middle.
    lost: u32,
}

impl Tries {
    fn new() -> Self {
        Self { first: None, pause: RETRY.0, lost: 0 }
    }

    fn again(&mut self, error: &StepError) -> Duration {
        self.lost += u32::from(matches!(error, StepError::Lost(_)));
        self.first.get_or_insert_with(Instant::now);
        let pause = self.pause;
        self.pause = (pause * 2).min(RETRY.1);
        pause
    }

    /// Whether the job turns back for this.
    fn are_enough(&self, job: &JobRow, error: &StepError) -> bool {
        let is_enough = self.first.is_some_and(|first| first.elapsed() >= PATIENCE);
        match error {
            StepError::Refused(_) => true,
            StepError::InUse(_) => is_enough,
            StepError::Lost(_) => self.lost + 1 >= MOST_LOST || (job.work.keeps_clients(job.step) && is_enough),
            StepError::Away(_) => job.work.keeps_clients(job.step) && is_enough,
        }
    }
}

/// One job, from where its journal stands to its end.
async fn walk(lead: &Lead, id: i64) {
    let (mut site, mut tries, mut slot, mut mover) = (site(lead), Tries::new(), None, None);
    // The list that it was found in may be older than its end.
    let mut fresh = lead.plane.catalog.job(id).await;
    while let Ok(Some(job)) = &fresh
        && !job.state.is_over()
    {
        let (was, mut job) = (job.clone(), job.clone());
        if step_of(&job).is_some_and(Step::only_waits) {
            (site, slot) = (self::site(lead), None);
        } else {
            if mover.is_none() && job.work.moves_data() {
                mover = place_of(&lead.movers, &job).await;
            }
            if slot.is_none() {
                let slots = if job.work.is_of_rollout() { &lead.migrators } else { &lead.slots };
                slot = place_of(slots, &job).await;
            }
        }
        let done = lead.plane.fuse.watch(&was, advance(lead, &mut site, &mut job, &tries)).await;
        match done {
            Ok(true) => {
                tries = Tries::new();
                fresh = Ok(Some(job));
            }
            // Somebody else knows better; if the job is still ours to do, the next look finds it where it is.
            Ok(false) => return,
            Err(error) => {
                let why = logged_of(&job, &error);
                tracing::warn!(job = id, tenant = %job.name, error = why, "a job waits; tried again");
                let _ = lead.plane.catalog.progress(id, &format!("waits: {error}")).await;
                (site, slot) = (self::site(lead), None);
                tokio::time::sleep(tries.again(&error)).await;
                // The journal may have what we did not hear of.
                fresh = lead.plane.catalog.job(id).await;
            }
        }
    }
    // Whoever is not here any more finds it again with the next look.
    lead.plane.job_over.notify_waiters();
}

fn site(lead: &Lead) -> Site {
    Site::new(Arc::clone(&lead.plane), lead.number)
}

/// One of so many places; who keeps clients waiting, or is on the way back, goes on without one if there is none.
async fn place_of(places: &Arc<Semaphore>, job: &JobRow) -> Option<OwnedSemaphorePermit> {
    let places = Arc::clone(places);
    if job.state == JobState::Undoing || job.work.keeps_clients(job.step) {
        return places.try_acquire_owned().ok();
    }
    places.acquire_owned().await.ok()
}

/// The step of the way there that comes next.
fn step_of(job: &JobRow) -> Option<Step> {
    (job.state == JobState::Running).then(|| job.work.plan().get(job.step).copied()).flatten()
}

/// One step, and its line in the journal; false if the journal is not where we thought. An error is one that may pass.
async fn advance(lead: &Lead, site: &mut Site, job: &mut JobRow, tries: &Tries) -> Result<bool, StepError> {
    let mut next = job.clone();
    let told = match job.state {
        JobState::Queued => {
            next.state = shift(job.state, JobEvent::Start);
            "started".to_owned()
        }
        JobState::Running => forward(lead, site, job, &mut next, tries).await?,
        JobState::Undoing => back(lead, site, job, &mut next).await?,
        JobState::Succeeded | JobState::Failed | JobState::Cancelled => return Ok(true),
    };
    let plane = &lead.plane;
    plane.fuse.burn();
    let told = match plane.catalog.journal(lead.number, job, &next, &told, is_last_chance(job, &next)).await? {
        Journalled::Done => told,
        Journalled::Stale => return Ok(false),
        Journalled::Cancelled => {
            let Some(told) = turn(job, &mut next, CANCELLED.to_owned()) else { return Ok(false) };
            if plane.catalog.journal(lead.number, job, &next, &told, false).await? != Journalled::Done {
                return Ok(false);
            }
            told
        }
    };
    tracing::info!(job = job.id, kind = job.work.kind(), tenant = %job.name, "{}", logged(job, &next, told));
    *job = next;
    Ok(true)
}

const CANCELLED: &str = "cancelled on request";

/// What the log has of it: not why something gave up that meets a tenant's rows, since PostgreSQL may quote them.
fn logged(job: &JobRow, next: &JobRow, told: String) -> String {
    let gave_up = next.error != job.error && told != CANCELLED;
    match step_of(job) {
        Some(step) if gave_up && job.work.meets_rows() => format!("{} gave up; the job says why", step.word()),
        _ => told,
    }
}

/// The same of what is tried again. Who is away was not asked about rows.
fn logged_of(job: &JobRow, error: &StepError) -> String {
    match error {
        StepError::Away(_) => error.to_string(),
        _ if job.work.meets_rows() => "the job's progress says why".to_owned(),
        _ => error.to_string(),
    }
}

/// There is a way back from where it was, and none from where it will be.
fn is_last_chance(job: &JobRow, next: &JobRow) -> bool {
    let returns = |job: &JobRow| job.state == JobState::Running && job.work.way_back(job.step).is_some();
    let is_settled = may_be_committed(step_of(job), &next.result);
    returns(job) && !returns(next) && next.state != JobState::Undoing && !is_settled
}

async fn forward(
    lead: &Lead,
    site: &mut Site,
    job: &JobRow,
    next: &mut JobRow,
    tries: &Tries,
) -> Result<String, StepError> {
    let plan = job.work.plan();
    if !may_be_committed(step_of(job), &job.result)
        && lead.plane.catalog.is_cancelled(job.id).await?
        && let Some(told) = turn(job, next, CANCELLED.to_owned())
    {
        return Ok(told);
    }
    let Some(step) = plan.get(job.step).copied() else {
        next.state = shift(job.state, JobEvent::Finish);
        return Ok("done".to_owned());
    };
    let outcome = tokio::select! {
        outcome = lifecycle::perform(site, job, step, &mut next.result) => outcome,
        () = cancelled(lead, job, step) => {
            // What the step noted meanwhile is part of the way back.
            if let Some(fresh) = lead.plane.catalog.job(job.id).await? {
                next.result = fresh.result;
            }
            if may_be_committed(Some(step), &next.result) {
                return Err(StepError::Away("the cancel came while it was committed: it is looked what became of that".to_owned()));
            }
            return turn(job, next, CANCELLED.to_owned()).ok_or_else(|| StepError::Away("it cannot turn back".to_owned()));
        }
    };
    match outcome {
        Ok(()) => {
            next.step = job.step + 1;
            if next.step == plan.len() {
                next.state = shift(job.state, JobEvent::Finish);
            }
            Ok(format!("{} done", step.word()))
        }
        // What is committed, or may be, is not told as failed: whatever came after it is tried again.
        Err(error) if may_be_committed(Some(step), &next.result) || !tries.are_enough(job, &error) => Err(error),
        // Past the point of no return there is only trying again.
        Err(error) => match turn(job, next, why(&error)) {
            Some(told) => Ok(format!("{} gave up: {told}", step.word())),
            None => Err(error),
        },
    }
}

/// What is told of a step that gave up.
fn why(error: &StepError) -> String {
    match error {
        StepError::Lost(words) => format!(
            "{words}: PostgreSQL went, or had no room, in the middle of the work, {MOST_LOST} times: its log says more; the \
             work may be the reason"
        ),
        other => other.to_string(),
    }
}

/// Comes to an end when the job is cancelled in the middle of a step that may be interrupted.
async fn cancelled(lead: &Lead, job: &JobRow, step: Step) {
    if !step.is_interruptible() {
        return std::future::pending().await;
    }
    loop {
        tokio::time::sleep(LOOK_FOR_CANCEL).await;
        if matches!(lead.plane.catalog.is_cancelled(job.id).await, Ok(true)) {
            return;
        }
    }
}

/// On the way back from here, if there is one.
fn turn(job: &JobRow, next: &mut JobRow, why: String) -> Option<String> {
    job.work.way_back(job.step)?;
    next.state = JobState::Undoing;
    next.result["turned_at"] = job.step.into();
    next.step = 0;
    next.error = Some(why.clone());
    Some(why)
}

async fn back(lead: &Lead, site: &mut Site, job: &JobRow, next: &mut JobRow) -> Result<String, StepError> {
    let turned_at = job.result["turned_at"].as_u64().and_then(|at| usize::try_from(at).ok()).unwrap_or(0);
    let way: Vec<Step> = job.work.way_back(turned_at).unwrap_or_default();
    let Some(step) = way.get(job.step).copied() else {
        let event = if lead.plane.catalog.is_cancelled(job.id).await? { JobEvent::Cancel } else { JobEvent::Fail };
        next.state = shift(job.state, event);
        return Ok("undone".to_owned());
    };
    // There is no way back from the way back: whatever it is, it is tried again.
    lifecycle::perform(site, job, step, &mut next.result).await?;
    next.step = job.step + 1;
    Ok(format!("{} done", step.word()))
}

fn shift(state: JobState, event: JobEvent) -> JobState {
    debug_assert!(state.next(event).is_some(), "{state:?} has no {event:?}");
    state.next(event).unwrap_or(state)
}
