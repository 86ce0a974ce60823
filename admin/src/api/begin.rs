//! How a change is made: written into the audit log, done once for one key, waited for.
//!
//! What always holds: once something was written down, the answer says so, whatever becomes of the catalog next; nobody's
//! password is lost with an error.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use serde_json::{Value, json};
use tenantry_config::TenantState;

use super::{
    auth::Caller,
    body::{Conditions, HungUp, Version},
    problem::{Answer, Problem},
    types::{Begun, Credentials, DryRun, JobView},
    view,
};
use crate::{
    catalog::{
        CatalogError,
        audit::{self, Deed},
        disk::hex,
        model::Entry,
        store::{Changed, JobRow, Look, Seen},
    },
    jobs::work::{JobState, Work},
    plane::ControlPlane,
};

/// Between two looks at a job that runs in another process; the end of one of ours is told.
const LOOK: Duration = Duration::from_millis(250);
/// What may be done to a tenant while the copy of a move is kept: it goes on following, or has nothing to follow.
const BESIDE_A_COPY: [&str; 5] = ["rollback_move", "confirm_move", "drain", "rotate", "import"];
/// Between two looks at a tenant's connections.
const LOOK_CLOSELY: Duration = Duration::from_millis(25);

pub fn deed<'a>(who: &'a Caller, action: &'a str, tenant: Option<&'a str>) -> Deed<'a> {
    Deed { asker: &who.asker, action, tenant }
}

/// Nothing is done before the log has the intent. That it was done is written with the change itself; that it was not, here.
pub async fn audited<T>(
    plane: &ControlPlane,
    deed: &Deed<'_>,
    before: Option<Value>,
    wish: Value,
    work: impl Future<Output = Answer<T>>,
) -> Answer<T> {
    plane.catalog.audit(deed, "intent", before, Some(wish)).await?;
    let outcome = work.await;
    if let Err(problem) = &outcome {
        let why = Some(json!({ "detail": problem.detail }));
        if let Err(error) = plane.catalog.audit(deed, problem.word(), None, why).await {
            tracing::error!(%error, request = %deed.asker.request, "the outcome of a change is not in the audit log");
        }
    }
    outcome
}

/// What was committed is served. Where it cannot be read again now, it is done all the same, and `follow` serves it soon.
pub async fn served(plane: &ControlPlane) {
    if let Err(error) = plane.refresh().await {
        tracing::warn!(%error, "a change was made, and is served once the catalog can be read again");
    }
}

/// So that what another process did is seen by whoever was told of it here.
async fn up_to_date(plane: &ControlPlane) {
    if plane.catalog.revision().await.is_ok_and(|now| now != plane.known().revision) {
        served(plane).await;
    }
}

/// A change of one row, at once.
pub async fn change(
    plane: &ControlPlane,
    deed: &Deed<'_>,
    entry: &Entry,
    wish: Value,
    look: Look,
    edit: impl FnOnce(&mut Entry, &Seen) -> Answer<()> + Send,
) -> Answer<(Entry, Entry)> {
    let done = audited(plane, deed, Some(audit::shown(entry, None)), wish, async {
        match plane.catalog.change_at_rest(deed, entry.number, look, edit).await? {
            Changed::Done { before, after } => Ok((*before, *after)),
            Changed::Refused(problem) => Err(problem),
            Changed::Gone => Err(gone()),
        }
    });
    let done = done.await?;
    served(plane).await;
    Ok(done)
}

fn gone() -> Problem {
    Problem::not_found("no tenant of that name")
}

pub fn required(conditions: &Conditions) -> Answer<()> {
    match conditions.version {
        Some(_) => Ok(()),
        None => Err(Problem::no_version("send If-Match with the tenant's ETag, so that nobody's change is lost; or *")),
    }
}

pub fn same_version(conditions: &Conditions, entry: &Entry) -> Answer<()> {
    match conditions.version {
        Some(Version::Is(version)) if version != entry.version => {
            Err(Problem::changed(format!("the tenant is of version {} now; look again", entry.version)))
        }
        _ => Ok(()),
    }
}

/// Whether no job has it.
pub fn at_rest(seen: &Seen) -> Answer<()> {
    match seen.job {
        Some(job) => Err(Problem::busy(format!("job {job} is under way; wait for it, or cancel it")).of_job(job)),
        None => Ok(()),
    }
}

pub fn taken(error: CatalogError) -> Problem {
    if error.is_taken() {
        Problem::exists("another tenant has that name or database")
    } else if error.is_duplicate("idempotency_pkey") {
        Problem::busy("a request with the same Idempotency-Key is under way")
    } else {
        error.into()
    }
}

fn fingerprint(action: &str, name: &str, wish: &impl Serialize) -> String {
    use sha2::{Digest, Sha256};
    hex(&Sha256::digest(format!("{action}\0{name}\0{}", json!(wish)).as_bytes()))
}

/// A request that begins a job, and does so once for one key.
pub struct Once<'a> {
    pub plane: &'a Arc<ControlPlane>,
    pub who: &'a Caller,
    pub conditions: &'a Conditions,
    pub dry: &'a DryRun,
    hash: String,
    /// The status once the job is over.
    done: StatusCode,
}

impl<'a> Once<'a> {
    #[must_use]
    pub fn new(
        (plane, who, conditions, dry): (&'a Arc<ControlPlane>, &'a Caller, &'a Conditions, &'a DryRun),
        (action, name, wish): (&str, &str, &impl Serialize),
        done: StatusCode,
    ) -> Self {
        Self { plane, who, conditions, dry, hash: fingerprint(action, name, wish), done }
    }

    /// The key, and what it stands for.
    #[must_use]
    pub fn key(&self) -> Option<(&str, &str)> {
        self.conditions.key.as_deref().map(|key| (key, self.hash.as_str()))
    }

    /// The answer, if the same request was made before. Asked before anything else: what it began may have changed the rest.
    pub async fn before(&self) -> Answer<Option<Response>> {
        let Some((key, hash)) = self.key().filter(|_| !self.dry.dry_run) else { return Ok(None) };
        match self.plane.catalog.idempotent(&self.who.asker.actor, key).await? {
            Some((known, Some(job))) if known == hash => self.answer(job, None, None).await.map(Some),
            Some((known, _)) if known != hash => {
                Err(Problem::invalid("Idempotency-Key: was used for another request; take a new one"))
            }
            _ => Ok(None),
        }
    }

    /// The same once more, where it failed: the same request may have come in at the same time, and been the faster one.
    pub async fn after(&self, made: Answer<Response>) -> Answer<Response> {
        match made {
            Err(problem) if matches!(problem.status, StatusCode::CONFLICT | StatusCode::NOT_FOUND) => {
                self.before().await?.ok_or(problem)
            }
            made => made,
        }
    }

    /// What it would do.
    pub fn planned(&self, work: &Work, entry: Option<&Entry>) -> Answer<Response> {
        let tenant = entry.map(|entry| view(self.plane, entry));
        Ok(Json(Begun { job: None, steps: work.plan(), tenant, credentials: None }).into_response())
    }

    /// Waits for the job as long as the asker likes, and says how it stands; `written`: what is known of it anyway.
    pub async fn answer(
        &self,
        job: i64,
        written: Option<JobView>,
        credentials: Option<Credentials>,
    ) -> Answer<Response> {
        let Conditions { wait, hung_up, .. } = self.conditions;
        let row = match await_job(self.plane, job, *wait, hung_up).await {
            Ok(row) => row,
            Err(problem) => {
                let written = written.ok_or_else(|| problem.of_job(job))?;
                let begun = Begun { steps: written.steps.clone(), job: Some(written), tenant: None, credentials };
                return Ok(located(StatusCode::ACCEPTED, job, begun));
            }
        };
        if matches!(row.state, JobState::Failed | JobState::Cancelled) {
            let why = row.error.clone().unwrap_or_else(|| "it was cancelled".to_owned());
            return Err(Problem::job_failed(why).of_job(job));
        }
        let is_over = row.state.is_over();
        if is_over {
            up_to_date(self.plane).await;
        }
        let tenant = self.plane.known().tenants.iter().find(|entry| entry.number == row.tenant).cloned();
        let tenant = tenant.map(|entry| view(self.plane, &entry));
        let begun = Begun { steps: row.work.plan(), job: Some(row.into()), tenant, credentials };
        Ok(located(if is_over { self.done } else { StatusCode::ACCEPTED }, job, begun))
    }
}

fn located(status: StatusCode, job: i64, begun: Begun) -> Response {
    (status, [(header::LOCATION, format!("/v1/jobs/{job}"))], Json(begun)).into_response()
}

/// A job on a tenant that is there.
pub struct Begin<'a> {
    pub once: Once<'a>,
    pub action: &'a str,
    pub name: &'a str,
    pub states: &'a [TenantState],
}

impl Begin<'_> {
    /// Whether it may be begun, by the tenant as it is; asked again where that cannot change any more.
    pub fn may(&self, entry: &Entry) -> Answer<()> {
        if entry.state == TenantState::Dropped || entry.name != self.name {
            return Err(gone());
        }
        same_version(self.once.conditions, entry)?;
        if let Some(kept) = &entry.kept
            && !BESIDE_A_COPY.contains(&self.action)
        {
            return Err(Problem::wrong_state(format!(
                "it was moved, and the copy at {} is kept for the way back, which this would break: confirm the move first \
                 (`tenantry tenant confirm-move`), or roll it back",
                kept.server
            )));
        }
        if self.states.contains(&entry.state) {
            return Ok(());
        }
        Err(Problem::wrong_state(format!("a tenant that is {} cannot be changed like this", entry.state)))
    }

    /// `entry`: what the work was made of.
    pub async fn begin(
        &self,
        entry: &Entry,
        wish: Value,
        work: Work,
        credentials: Option<Credentials>,
    ) -> Answer<Response> {
        let Once { plane, who, conditions: _, dry, .. } = &self.once;
        if dry.dry_run {
            self.may(entry)?;
            return self.once.planned(&work, Some(entry));
        }
        let deed = deed(who, self.action, Some(self.name));
        let job = audited(plane, &deed, Some(audit::shown(entry, None)), wish, async {
            let may = |now: Option<&Entry>| {
                let now = now.ok_or_else(gone)?;
                self.may(now)?;
                // A new password or role is made of the one before.
                if (&now.roles, &now.owner_role) != (&entry.roles, &entry.owner_role) {
                    return Err(Problem::changed("its roles were changed meanwhile; ask again"));
                }
                Ok(())
            };
            match plane.catalog.insert_job(&deed, entry.number, &work, self.once.key(), may).await {
                Err(error) if error.is_duplicate("jobs_busy") => {
                    let job = plane.catalog.busy_with(entry.number).await?;
                    let problem = Problem::busy("another job is under way; wait for it, or cancel it");
                    Err(Problem { job, ..problem })
                }
                other => other.map_err(taken)?,
            }
        })
        .await?;
        plane.new_job.notify_one();
        let written = JobView::written(job, &work, self.name, &who.asker.actor);
        self.once.answer(job, Some(written), credentials).await
    }
}

async fn await_job(plane: &ControlPlane, job: i64, wait: Duration, hung_up: &HungUp) -> Answer<JobRow> {
    let deadline = tokio::time::Instant::now() + wait;
    loop {
        let over = plane.job_over.notified();
        let row = plane.catalog.job(job).await?.ok_or_else(|| Problem::internal("the job is gone"))?;
        if row.state.is_over() || tokio::time::Instant::now() >= deadline || hung_up.0.is_cancelled() {
            return Ok(row);
        }
        tokio::select! {
            () = over => {}
            () = hung_up.0.cancelled() => {}
            () = tokio::time::sleep_until(deadline.min(tokio::time::Instant::now() + LOOK)) => {}
        }
    }
}

/// Until a tenant has no server connection in any process, or nobody waits for that any more.
pub async fn released(plane: &ControlPlane, entry: &Entry, conditions: &Conditions) {
    let revision = plane.known().revision;
    let released = async {
        // The other processes are only asked once nothing is left here.
        while !plane.here(entry).is_quiet()
            || !plane.everywhere(entry, revision).await.is_ok_and(|seen| seen.is_quiet())
        {
            tokio::time::sleep(LOOK_CLOSELY).await;
        }
    };
    tokio::select! {
        () = released => {}
        () = conditions.hung_up.0.cancelled() => {}
        () = tokio::time::sleep(conditions.wait) => {}
    }
}
