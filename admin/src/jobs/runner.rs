//! Walks the journal: takes open jobs, does their steps, turns back where a step gives up.
//!
//! What always holds: one process at a time runs jobs (an advisory lock on a connection of its own; when it is lost, all
//! work stops at once and whoever has it next goes on); a step that cannot reach PostgreSQL is tried again, for as long as
//! it takes; one that is refused turns the job back.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures_util::FutureExt;
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::work::{JobEvent, JobState, Step};
use crate::{
    catalog::store::JobRow,
    control,
    lifecycle::{self, Site, StepError},
    plane::ControlPlane,
    sql::catalog as sql,
};

/// Jobs at work at once, over all servers.
const AT_ONCE: usize = 4;
/// Jobs of other processes' API, and those left by a crash, are looked for this often; our own are told at once.
const LOOK: Duration = Duration::from_secs(1);
/// Until a step that could not reach PostgreSQL is tried again: doubled up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// Runs jobs until `stop`.
pub async fn run(plane: Arc<ControlPlane>, stop: CancellationToken) {
    loop {
        let turn = async {
            if let Err(error) = lead(&plane).await {
                tracing::debug!(%error, "jobs are not run here now");
            }
            tokio::time::sleep(LOOK).await;
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = turn => {}
        }
    }
}

/// Runs jobs while we hold the lock.
async fn lead(plane: &Arc<ControlPlane>) -> Result<(), StepError> {
    let settings = plane.file();
    let (server, control) = plane.control_of(&settings)?;
    let lock = control::connect(server, control).await?;
    if !lock.query_one(sql::LOCK_JOBS, &[]).await?.try_get::<_, bool>(0)? {
        return Ok(());
    }
    let busy: Arc<Mutex<BTreeSet<i64>>> = Arc::default();
    // Dropped on the way out: what runs stops at its next await.
    let mut running = JoinSet::new();
    loop {
        // Also tells whether the lock is still ours.
        lock.simple_query("").await?;
        for job in plane.catalog.open_jobs().await? {
            if running.len() < AT_ONCE && busy.lock().insert(job.id) {
                let (plane, busy, id) = (Arc::clone(plane), Arc::clone(&busy), job.id);
                running.spawn(async move {
                    let walked = std::panic::AssertUnwindSafe(walk(&plane, job)).catch_unwind().await;
                    if walked.is_err() {
                        tracing::error!(job = id, "a step panicked; the job is tried again");
                        tokio::time::sleep(RETRY.1).await;
                    }
                    busy.lock().remove(&id);
                });
            }
        }
        tokio::select! {
            () = plane.new_job.notified() => {}
            Some(_) = running.join_next() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// One job, from where its journal stands to its end.
async fn walk(plane: &Arc<ControlPlane>, mut job: JobRow) {
    let mut site = Site::new(Arc::clone(plane));
    let mut pause = RETRY.0;
    while !job.state.is_over() {
        match advance(plane, &mut site, &mut job).await {
            Ok(()) => pause = RETRY.0,
            Err(error) => {
                tracing::warn!(job = job.id, tenant = %job.name, %error, "a job waits; tried again");
                let _ = plane.catalog.progress(job.id, &format!("waits: {error}")).await;
                site = Site::new(Arc::clone(plane));
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY.1);
                // The journal may have what we did not hear of.
                if let Ok(Some(fresh)) = plane.catalog.job(job.id).await {
                    job = fresh;
                }
            }
        }
    }
    plane.job_over.notify_waiters();
}

/// One step, and its line in the journal. An error is one that may pass.
async fn advance(plane: &Arc<ControlPlane>, site: &mut Site, job: &mut JobRow) -> Result<(), StepError> {
    let mut next = job.clone();
    let told = match job.state {
        JobState::Queued => {
            next.state = shift(job.state, JobEvent::Start);
            "started".to_owned()
        }
        JobState::Running => forward(plane, site, job, &mut next).await?,
        JobState::Undoing => back(plane, site, job, &mut next).await?,
        JobState::Succeeded | JobState::Failed | JobState::Cancelled => return Ok(()),
    };
    plane.fuse.burn();
    plane.catalog.journal(&next, &told).await?;
    tracing::info!(job = job.id, kind = job.work.kind(), tenant = %job.name, "{told}");
    *job = next;
    Ok(())
}

async fn forward(
    plane: &Arc<ControlPlane>,
    site: &mut Site,
    job: &JobRow,
    next: &mut JobRow,
) -> Result<String, StepError> {
    let plan = job.work.plan();
    if plane.catalog.is_cancelled(job.id).await?
        && let Some(told) = turn(job, next, "cancelled on request".to_owned())
    {
        next.cancel = true;
        return Ok(told);
    }
    let Some(step) = plan.get(job.step).copied() else {
        next.state = shift(job.state, JobEvent::Finish);
        return Ok("done".to_owned());
    };
    match lifecycle::perform(site, job, step, &mut next.result).await {
        Ok(()) => {
            next.step = job.step + 1;
            if next.step == plan.len() {
                next.state = shift(job.state, JobEvent::Finish);
            }
            Ok(format!("{} done", step.word()))
        }
        Err(StepError::Refused(why)) => match turn(job, next, why.clone()) {
            Some(told) => Ok(format!("{} gave up: {told}", step.word())),
            // Past the point of no return there is only trying again.
            None => Err(StepError::Away(why)),
        },
        Err(error) => Err(error),
    }
}

/// On the way back from here, if there is one.
fn turn(job: &JobRow, next: &mut JobRow, why: String) -> Option<String> {
    job.work.way_back(job.step)?;
    next.state = shift(job.state, JobEvent::Turn);
    next.result["turned_at"] = job.step.into();
    next.step = 0;
    next.error = Some(why.clone());
    Some(why)
}

async fn back(
    plane: &Arc<ControlPlane>,
    site: &mut Site,
    job: &JobRow,
    next: &mut JobRow,
) -> Result<String, StepError> {
    let turned_at = job.result["turned_at"].as_u64().and_then(|at| usize::try_from(at).ok()).unwrap_or(0);
    let way: Vec<Step> = job.work.way_back(turned_at).unwrap_or_default();
    let Some(step) = way.get(job.step).copied() else {
        let event = if plane.catalog.is_cancelled(job.id).await? { JobEvent::Cancel } else { JobEvent::Fail };
        next.state = shift(job.state, event);
        return Ok("undone".to_owned());
    };
    match lifecycle::perform(site, job, step, &mut next.result).await {
        Ok(()) => {
            next.step = job.step + 1;
            Ok(format!("{} done", step.word()))
        }
        // There is no way back from the way back.
        Err(StepError::Refused(why)) => Err(StepError::Away(why)),
        Err(error) => Err(error),
    }
}

fn shift(state: JobState, event: JobEvent) -> JobState {
    debug_assert!(state.next(event).is_some(), "{state:?} has no {event:?}");
    state.next(event).unwrap_or(state)
}
