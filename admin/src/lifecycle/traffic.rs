//! Steps that wait for clients: hold them, let them finish, end them.

use std::time::Duration;

use serde_json::{Value, json};
use tenantry_config::{TenantEvent, TenantState};
use tokio::time::Instant;

use super::{Site, StepError, shift};
use tenantry_proxy::directory::Activity;

use crate::{
    catalog::{model::Entry, store::JobRow},
    jobs::work::Work,
};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(5);
/// For what was cancelled to come to an end, and for what was cut.
const AFTER_CANCEL: Duration = Duration::from_secs(5);
/// For PostgreSQL to close its ends.
const CLOSING: Duration = Duration::from_secs(15);

/// Until it holds of the tenant's activity, or the time is over; what it was last.
async fn until(site: &Site, name: &str, limit: Duration, holds: impl Fn(&Activity) -> bool) -> Result<(), Activity> {
    let deadline = Instant::now() + limit;
    loop {
        let Some(activity) = site.plane.data.activity(name) else { return Ok(()) };
        if holds(&activity) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(activity);
        }
        tokio::time::sleep(LOOK).await;
    }
}

pub async fn await_quiet(site: &Site, job: &JobRow, entry: &Entry) -> Result<(), StepError> {
    let (Work::Rename { wait, .. } | Work::Separate { wait, .. }) = &job.work else { return Ok(()) };
    let limit = Duration::from_millis(*wait);
    until(site, &entry.name, limit, |activity| activity.connections == 0).await.map_err(|left| {
        StepError::Refused(format!(
            "{} of its server connections were still in use after {}, {} of them kept by session state; let the \
             transactions end, or allow a longer wait",
            left.connections,
            humantime::format_duration(limit),
            left.pinned
        ))
    })
}

pub async fn stop_transactions(site: &Site, entry: &Entry) -> Result<(), StepError> {
    site.change(entry.number, |e| match e.state {
        TenantState::Drained | TenantState::Archived => Ok(()),
        _ => shift(e, TenantEvent::Drain, TenantState::Draining),
    })
    .await
}

pub async fn await_transactions(site: &Site, job: &JobRow, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let limit = match &job.work {
        Work::Drain { deadline } | Work::Archive { deadline } | Work::Delete { deadline } => *deadline,
        _ => 0,
    };
    let idle = |activity: &Activity| activity.active == 0;
    // A step that is done again adds to what it did before.
    if result["drain"].is_null() {
        let began = site.plane.data.activity(&entry.name).map_or(0, |activity| activity.active);
        result["drain"] = json!({ "under_way": began, "cancelled": 0, "cut": 0 });
        site.note(job, result).await?;
    }
    if until(site, &entry.name, Duration::from_millis(limit), idle).await.is_ok() {
        return Ok(());
    }
    add(result, "cancelled", site.plane.data.cancel_running(&entry.name));
    site.note(job, result).await?;
    if until(site, &entry.name, AFTER_CANCEL.min(Duration::from_millis(limit.max(1_000))), idle).await.is_ok() {
        return Ok(());
    }
    add(result, "cut", site.plane.data.end_sessions(&entry.name, true));
    site.note(job, result).await?;
    until(site, &entry.name, CLOSING, idle)
        .await
        .map_err(|left| StepError::Refused(format!("{} transactions could not be ended", left.active)))
}

fn add(result: &mut Value, key: &str, n: usize) {
    let before = result["drain"][key].as_u64().unwrap_or(0);
    result["drain"][key] = json!(before + u64::try_from(n).unwrap_or(0));
}

/// As it was before transactions were stopped; whatever else it is by now stays.
pub async fn reopen(site: &Site, entry: &Entry, result: &Value) -> Result<(), StepError> {
    let before = result["before"].as_str().and_then(TenantState::parse).unwrap_or(TenantState::Active);
    site.change(entry.number, |e| {
        if matches!(e.state, TenantState::Draining | TenantState::Drained) {
            e.state = before;
        }
        Ok(())
    })
    .await
}

pub async fn drained(site: &Site, entry: &Entry) -> Result<(), StepError> {
    site.change(entry.number, |e| match e.state {
        TenantState::Archived => Ok(()),
        _ => shift(e, TenantEvent::Emptied, TenantState::Drained),
    })
    .await?;
    until(site, &entry.name, CLOSING, |activity| activity.connections == 0)
        .await
        .map_err(|left| StepError::Refused(format!("PostgreSQL did not close {} connections", left.connections)))
}
