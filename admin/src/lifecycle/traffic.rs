//! Steps that wait for clients: hold them, let them finish, end them.

use std::time::Duration;

use serde_json::{Value, json};
use tenantry_config::{TenantEvent, TenantState};
use tokio::time::Instant;

use super::{Site, StepError, shift};
use crate::{
    catalog::{
        model::{Entry, Order},
        store::JobRow,
    },
    fleet::Everywhere,
    jobs::work::Work,
};

/// Between two looks at this process, and at the others.
const LOOK: Duration = Duration::from_millis(10);
const LOOK_AROUND: Duration = Duration::from_millis(100);
/// For what was cancelled to come to an end, and for what was cut.
const AFTER_CANCEL_MS: u64 = 5_000;
const AFTER_CANCEL: Duration = Duration::from_millis(AFTER_CANCEL_MS);
/// For PostgreSQL to close its ends, and for other processes to hear of it.
const CLOSING_MS: u64 = 15_000;
const CLOSING: Duration = Duration::from_millis(CLOSING_MS);

/// Until it holds of the tenant in every process, or the time is over; how it was last.
async fn until(
    site: &Site,
    entry: &Entry,
    limit: Duration,
    holds: impl Fn(&Everywhere) -> bool,
) -> Result<Everywhere, StepError> {
    let (deadline, revision) = (Instant::now() + limit, site.plane.known().revision);
    loop {
        // The others are only asked once it holds here.
        let is_last = Instant::now() >= deadline;
        if !is_last && !holds(&site.plane.here(entry)) {
            tokio::time::sleep(LOOK).await;
            continue;
        }
        let seen = site.plane.everywhere(entry, revision).await?;
        if is_last || holds(&seen) {
            return Ok(seen);
        }
        tokio::time::sleep(LOOK_AROUND).await;
    }
}

pub async fn await_quiet(site: &Site, job: &JobRow, entry: &Entry) -> Result<(), StepError> {
    let (wait, cancel) = match &job.work {
        Work::Rename { wait, .. } | Work::Separate { wait, .. } => (*wait, false),
        Work::Move { wait, cancel, .. } | Work::MoveBack { wait, cancel, .. } => (*wait, *cancel),
        _ => return Ok(()),
    };
    let limit = Duration::from_millis(wait);
    let mut seen = until(site, entry, limit, Everywhere::is_quiet).await?;
    if !seen.is_quiet() && cancel {
        // A client has a moment for the end of its own that it makes of it; who does nothing is ended.
        for order in [Order::Cancel, Order::End] {
            seen = ordered(site, entry, order, AFTER_CANCEL / 2, Everywhere::is_quiet).await?;
            if seen.is_quiet() {
                break;
            }
        }
    }
    // Of a server that does not answer nothing ends by itself: who waits for it is ended, and PostgreSQL's end is not waited for.
    let is_lost = !job.result["lost"].is_null();
    if !seen.is_quiet() && is_lost {
        seen = ordered(site, entry, Order::End, CLOSING, Everywhere::is_at_rest).await?;
    }
    if seen.is_quiet() || is_lost && seen.is_at_rest() {
        return Ok(());
    }
    let (limit, Everywhere { told, behind }) = (humantime::format_duration(limit), seen);
    Err(StepError::Refused(match behind {
        0 => format!(
            "{} of its server connections were still in use after {limit}, {} of them kept by session state; let the \
             transactions end, or allow a longer wait",
            told.connections, told.pinned
        ),
        _ => format!("{behind} Tenantry processes had not heard of it after {limit}"),
    }))
}

async fn ordered(
    site: &Site,
    entry: &Entry,
    order: Order,
    limit: Duration,
    holds: impl Fn(&Everywhere) -> bool,
) -> Result<Everywhere, StepError> {
    // One that a crash left would not be a new one.
    site.order(entry.number, None).await?;
    site.order(entry.number, Some(order)).await?;
    let seen = until(site, entry, limit, holds).await?;
    site.order(entry.number, None).await?;
    Ok(seen)
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
    // A step that is done again keeps what it counted before, where that was more.
    if result["drain"].is_null() {
        let began = until(site, entry, AFTER_CANCEL, |seen| seen.behind == 0).await?;
        result["drain"] = json!({ "under_way": began.told.active, "cancelled": 0, "cut": 0 });
        site.note(job, result).await?;
    }
    let orders =
        [(None, limit), (Some(Order::Cancel), limit.clamp(1_000, AFTER_CANCEL_MS)), (Some(Order::End), CLOSING_MS)];
    for (order, limit) in orders {
        if order.is_some() {
            site.order(entry.number, order).await?;
        }
        let seen = until(site, entry, Duration::from_millis(limit), Everywhere::is_at_rest).await?;
        let drain = &mut result["drain"];
        for (key, n) in [("cancelled", seen.told.cancelled), ("cut", seen.told.cut)] {
            drain[key] = json!(drain[key].as_u64().unwrap_or(0).max(u64::from(n)));
        }
        site.note(job, result).await?;
        if seen.is_at_rest() {
            return Ok(());
        }
    }
    Err(StepError::Refused("its transactions could not be ended, or a Tenantry process does not hear of it".to_owned()))
}

/// As it was before transactions were stopped; whatever else it is by now stays.
pub async fn reopen(site: &Site, entry: &Entry, result: &Value) -> Result<(), StepError> {
    site.order(entry.number, None).await?;
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
    let seen = until(site, entry, CLOSING, Everywhere::is_quiet).await?;
    if !seen.is_quiet() {
        return Err(StepError::Refused(format!("PostgreSQL did not close {} connections", seen.told.connections)));
    }
    site.order(entry.number, None).await
}

/// Until every process serves what this one does; one that does not hear of it is not waited for longer.
pub async fn heard(site: &Site, entry: &Entry, limit: Duration) -> Result<(), StepError> {
    until(site, entry, limit, |seen| seen.behind == 0).await.map(drop)
}
