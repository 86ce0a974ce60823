//! Operations on jobs.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use axum::{
    Extension, Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response, sse::Event},
};
use serde_json::json;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    Plane, Shared, Who,
    begin::{audited, deed},
    body::{Asked, At, MaybeBody},
    follow::{self, Followed, event},
    page,
    problem::{Answer, Errors, Problem},
    types::{JobEvent, JobQuery, JobView, Nothing, Page},
};
use crate::{jobs::work::JobState, plane::ControlPlane};

/// Jobs, the newest first.
#[utoipa::path(get, path = "/v1/jobs", operation_id = "list_jobs", params(JobQuery),
    responses((status = 200, body = Page<JobView>), Errors))]
pub async fn list(
    State(plane): Plane,
    Asked(JobQuery { after, limit, tenant }): Asked<JobQuery>,
) -> Answer<Json<Page<JobView>>> {
    if tenant.as_ref().is_some_and(|tenant| tenant.len() > 63 || tenant.contains('\0')) {
        return Err(Problem::invalid("tenant: is no name of one"));
    }
    let (limit, before) = (page::size(limit)?, page::number(after)?);
    let rows = plane.catalog.jobs(before, page::and_one(limit), tenant.as_deref()).await?;
    let (rows, next) = page::cut(rows, limit, |job| job.id.to_string());
    Ok(Json(Page { items: rows.into_iter().map(JobView::in_list).collect(), next }))
}

fn none() -> Problem {
    Problem::not_found("no job of that number")
}

fn id(text: &str) -> Answer<i64> {
    text.parse().map_err(|_| none())
}

/// One job.
#[utoipa::path(get, path = "/v1/jobs/{job}", operation_id = "show_job", params(("job" = String, Path)),
    responses((status = 200, body = JobView), Errors))]
pub async fn show(State(plane): Plane, At(job): At) -> Answer<Json<JobView>> {
    let row = plane.catalog.job(id(&job)?).await?;
    row.map(|row| Json(row.into())).ok_or_else(none)
}

/// What a job has done so far and does from now on, as server-sent events; the stream ends with the job, or when its
/// connection has lived for ten minutes: `Last-Event-ID` goes on. At most 16 are followed at once, over all.
#[utoipa::path(get, path = "/v1/jobs/{job}/events", operation_id = "follow_job",
    params(("job" = String, Path), ("Last-Event-ID" = Option<String>, Header)),
    responses((status = 200, content_type = "text/event-stream", body = JobEvent), Errors))]
pub async fn events(
    State(plane): Plane,
    Extension(shared): Extension<Shared>,
    At(job): At,
    headers: axum::http::HeaderMap,
) -> Answer<Response> {
    let id = id(&job)?;
    let place = follow::place(shared, "/v1/jobs/{job}")?;
    plane.catalog.job(id).await?.ok_or_else(none)?;
    let last = headers.get("last-event-id").and_then(|value| value.to_str().ok()?.parse().ok()).unwrap_or(0i64);
    let job = FollowedJob { plane: Arc::clone(&plane), id, last, told: String::new(), seen: None };
    Ok(follow::tell(plane, place, job))
}

/// A job that somebody follows.
struct FollowedJob {
    plane: Arc<ControlPlane>,
    id: i64,
    /// The last event that was told.
    last: i64,
    /// The last progress that was told.
    told: String,
    /// When what was told had changed.
    seen: Option<OffsetDateTime>,
}

impl Followed for FollowedJob {
    const EVERY: Duration = Duration::from_millis(250);

    /// One query while nothing happens.
    async fn look(&mut self, news: &mut VecDeque<Event>) -> Answer<bool> {
        // First the job: what it told before its end is then among the events.
        let Some(row) = self.plane.catalog.job(self.id).await? else { return Ok(true) };
        if self.seen == Some(row.updated_at) && !row.state.is_over() {
            return Ok(false);
        }
        let events = self.plane.catalog.events(self.id, self.last).await?;
        let is_all = events.is_empty();
        for (number, at, text) in events {
            self.last = number;
            let data = json!({ "at": at.format(&Rfc3339).unwrap_or_default(), "text": text });
            news.push_back(event("step", &data).id(number.to_string()));
        }
        if !is_all {
            return Ok(false);
        }
        self.seen = Some(row.updated_at);
        // What has no number.
        let progress = row.progress.clone().unwrap_or_default();
        if progress != self.told && !progress.is_empty() {
            news.push_back(event("progress", &json!({ "text": progress })));
        }
        self.told = progress;
        let is_over = row.state.is_over();
        if is_over {
            news.push_back(event("end", &json!(JobView::from(row))));
        }
        Ok(is_over)
    }
}

/// Turns a job back, where there still is a way back.
#[utoipa::path(post, path = "/v1/jobs/{job}/cancel", operation_id = "cancel_job", request_body = Option<Nothing>,
    params(("job" = String, Path)), responses((status = 202, body = JobView), Errors))]
pub async fn cancel(
    State(plane): Plane,
    who: Who,
    At(job): At,
    MaybeBody(Nothing {}): MaybeBody<Nothing>,
) -> Answer<Response> {
    let id = id(&job)?;
    let row = plane.catalog.job(id).await?.ok_or_else(none)?;
    let deed = deed(&who, "cancel", Some(&row.name));
    audited(&plane, &deed, None, json!({ "job": id }), async {
        if plane.catalog.cancel_job(&deed, id).await? {
            Ok(())
        } else {
            let state = plane.catalog.job(id).await?.map_or(row.state, |row| row.state);
            Err(Problem::wrong_state(match state {
                JobState::Queued | JobState::Running => {
                    "there is only the way forward from where the job is".to_owned()
                }
                state => format!("the job is {}", state.as_str()),
            }))
        }
    })
    .await?;
    plane.new_job.notify_one();
    // It is cancelled, whether or not it can be looked at again.
    let row = plane.catalog.job(id).await.ok().flatten().unwrap_or(row);
    Ok((StatusCode::ACCEPTED, Json(JobView::from(row))).into_response())
}
