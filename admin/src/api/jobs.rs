//! Operations on jobs.

use std::{convert::Infallible, time::Duration};

use axum::{
    Json,
    extract::{Path, Query, State},
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::stream;
use serde_json::json;

use super::{
    Plane, Who,
    body::MaybeBody,
    problem::{Answer, Errors, Problem},
    tenants::{MAX_AFTER, audited, page},
    types::{JobEvent, JobQuery, JobView, Nothing, Page},
};
use crate::jobs::work::JobState;

const LOOK: Duration = Duration::from_millis(200);

/// Jobs, the newest first.
#[utoipa::path(get, path = "/v1/jobs", operation_id = "list_jobs", params(JobQuery),
    responses((status = 200, body = Page<JobView>), Errors))]
pub async fn list(
    State(plane): Plane,
    query: Result<Query<JobQuery>, axum::extract::rejection::QueryRejection>,
) -> Answer<Json<Page<JobView>>> {
    let Query(JobQuery { after, limit, tenant }) = query.map_err(|error| Problem::invalid(error.body_text()))?;
    if tenant.as_ref().is_some_and(|tenant| tenant.len() > 63 || tenant.contains('\0')) {
        return Err(Problem::invalid("tenant: is no name of one"));
    }
    let (limit, before) = (page(limit)?, number(after)?);
    let rows = plane.catalog.jobs(before, i64::try_from(limit + 1).unwrap_or(i64::MAX), tenant.as_deref()).await?;
    let is_more = rows.len() > limit;
    let items: Vec<JobView> = rows.into_iter().take(limit).map(JobView::from).collect();
    let next = items.last().filter(|_| is_more).map(|job| job.id.to_string());
    Ok(Json(Page { items, next }))
}

/// `after` of a list that is ordered by number, newest first.
pub(super) fn number(after: Option<String>) -> Answer<i64> {
    let number = after.map(|after| {
        after
            .parse()
            .ok()
            .filter(|_| after.len() <= MAX_AFTER)
            .ok_or_else(|| Problem::invalid("after: must be `next` of the page before"))
    });
    Ok(number.transpose()?.unwrap_or(i64::MAX))
}

fn id(text: &str) -> Answer<i64> {
    text.parse().map_err(|_| Problem::not_found("no job of that number"))
}

/// One job.
#[utoipa::path(get, path = "/v1/jobs/{job}", operation_id = "show_job", params(("job" = String, Path)),
    responses((status = 200, body = JobView), Errors))]
pub async fn show(State(plane): Plane, Path(job): Path<String>) -> Answer<Json<JobView>> {
    let row = plane.catalog.job(id(&job)?).await?;
    row.map(|row| Json(row.into())).ok_or_else(|| Problem::not_found("no job of that number"))
}

/// What a job has done so far and does from now on, as server-sent events; the stream ends with the job. `Last-Event-ID` goes on.
#[utoipa::path(get, path = "/v1/jobs/{job}/events", operation_id = "follow_job",
    params(("job" = String, Path), ("Last-Event-ID" = Option<String>, Header)),
    responses((status = 200, content_type = "text/event-stream", body = JobEvent), Errors))]
pub async fn events(State(plane): Plane, Path(job): Path<String>, headers: axum::http::HeaderMap) -> Answer<Response> {
    let id = id(&job)?;
    if plane.catalog.job(id).await?.is_none() {
        return Err(Problem::not_found("no job of that number"));
    }
    let last = headers.get("last-event-id").and_then(|value| value.to_str().ok()?.parse().ok()).unwrap_or(0i64);
    let follow = stream::unfold(Some((last, String::new())), move |at| {
        let plane = std::sync::Arc::clone(&plane);
        async move {
            let (last, told) = at?;
            loop {
                // First the job: what it told before its end is then among the events.
                let Ok(Some(row)) = plane.catalog.job(id).await else { return None };
                let Ok(events) = plane.catalog.events(id, last).await else { return None };
                let newest = events.last().map_or(last, |(number, ..)| *number);
                let progress = row.progress.clone().unwrap_or_default();
                if events.is_empty() && progress == told && !row.state.is_over() {
                    tokio::time::sleep(LOOK).await;
                    continue;
                }
                let mut out: Vec<Result<Event, Infallible>> = Vec::new();
                for (number, at, text) in events {
                    let at = at.format(&time::format_description::well_known::Rfc3339).unwrap_or_default();
                    let data = json!({ "at": at, "text": text }).to_string();
                    out.push(Ok(Event::default().id(number.to_string()).event("step").data(data)));
                }
                if progress != told && !progress.is_empty() {
                    out.push(Ok(Event::default().event("progress").data(json!({ "text": progress }).to_string())));
                }
                let next = if row.state.is_over() {
                    let data = serde_json::to_string(&JobView::from(row)).unwrap_or_default();
                    out.push(Ok(Event::default().event("end").data(data)));
                    None
                } else {
                    Some((newest, progress))
                };
                return Some((stream::iter(out), next));
            }
        }
    });
    use futures_util::StreamExt as _;
    Ok(Sse::new(follow.flatten()).keep_alive(KeepAlive::default()).into_response())
}

/// Turns a job back, where there still is a way back.
#[utoipa::path(post, path = "/v1/jobs/{job}/cancel", operation_id = "cancel_job", request_body = Option<Nothing>,
    params(("job" = String, Path)), responses((status = 202, body = JobView), Errors))]
pub async fn cancel(
    State(plane): Plane,
    who: Who,
    Path(job): Path<String>,
    MaybeBody(Nothing {}): MaybeBody<Nothing>,
) -> Answer<Response> {
    let id = id(&job)?;
    let row = plane.catalog.job(id).await?.ok_or_else(|| Problem::not_found("no job of that number"))?;
    audited(&plane, &who, "cancel", Some(&row.name), json!({ "job": id }), async {
        if plane.catalog.cancel_job(id).await? {
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
    let row = plane.catalog.job(id).await?.ok_or_else(|| Problem::not_found("no job of that number"))?;
    Ok((axum::http::StatusCode::ACCEPTED, Json(JobView::from(row))).into_response())
}
