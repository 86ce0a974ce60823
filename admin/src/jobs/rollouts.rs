//! Lets the tenants of a rollout have their turns: each turn is a job of its own, which the runner does.
//!
//! What always holds: only the process that runs the jobs comes here; what is next follows from the catalog alone
//! (`migrate::waves`), so that whoever has the jobs next goes on where this one stopped.

use crate::{
    catalog::{
        CatalogError,
        rollouts::{Begun, Item, Kind, RolloutRow, RolloutState},
    },
    migrate::waves::{self, End, Move, Turn},
    plane::ControlPlane,
};

/// Seconds without a word from whoever runs the commands: then no other begins.
pub const SILENT: f64 = 30.0;

/// Tenants of one rollout that are passed over in one look, since another job has them.
const MOST_BUSY: usize = 100;

/// One look at all rollouts that have something to do.
pub async fn advance(plane: &ControlPlane, leader: i64) -> Result<(), CatalogError> {
    for rollout in plane.catalog.open_rollouts().await? {
        plane.catalog.settle_rollout(leader, rollout.id).await?;
        if rollout.state == RolloutState::Running {
            go_on(plane, leader, &rollout).await?;
        }
    }
    Ok(())
}

async fn go_on(plane: &ControlPlane, leader: i64, rollout: &RolloutRow) -> Result<(), CatalogError> {
    loop {
        let items = plane.catalog.rollout_items(rollout.id).await?;
        let turns: Vec<_> = items.iter().map(|item| (item.wave, item.turn)).collect();
        let mut has_changed = false;
        match waves::next(&turns, rollout.plan.limits()) {
            Move::Wait => {}
            Move::End(end) => {
                let why = why(end, &items);
                tracing::info!(rollout = rollout.id, ?end, "a rollout is over");
                plane.fuse.burn_of(rollout.kind.as_str(), rollout.created_at);
                plane.catalog.end_rollout(leader, rollout.id, end.into(), why.as_deref()).await?;
                plane.job_over.notify_waiters();
            }
            Move::Start { .. } if rollout.kind == Kind::Exec && rollout.silent > SILENT => {
                if turns.iter().all(|(_, turn)| *turn != Turn::Running) {
                    let why = format!("nothing was heard of who runs the commands for {SILENT} s");
                    let stopped = RolloutState::Stopped;
                    plane.catalog.end_rollout(leader, rollout.id, stopped, Some(&why)).await?;
                    plane.job_over.notify_waiters();
                }
            }
            Move::Start { waiting, free } => {
                let (mut free, mut busy) = (free, 0);
                for item in waiting.into_iter().filter_map(|place| items.get(place)) {
                    if free == 0 || busy == MOST_BUSY {
                        break;
                    }
                    plane.fuse.burn_of(rollout.kind.as_str(), rollout.created_at);
                    match plane.catalog.begin_turn(leader, rollout, item.tenant).await? {
                        Begun::Yes => free -= 1,
                        // The next look finds out whether it still is.
                        Begun::Busy => busy += 1,
                        Begun::Skipped => has_changed = true,
                        Begun::No => {}
                        // A failure, which may be the last that may be.
                        Begun::GivenUp => {
                            has_changed = true;
                            break;
                        }
                    }
                }
            }
        }
        if !has_changed {
            return Ok(());
        }
    }
}

/// In words, where it did not end well.
fn why(end: End, items: &[Item]) -> Option<String> {
    let failed: Vec<&Item> = items.iter().filter(|item| item.turn == Turn::Failed).collect();
    let names = failed.iter().take(5).map(|item| item.name.as_str()).collect::<Vec<_>>().join(", ");
    let more = if failed.len() > 5 { ", ..." } else { "" };
    let of_canary = failed.iter().any(|item| item.wave == waves::CANARY);
    match end {
        End::Succeeded => None,
        End::Failed => Some(format!("{} failed: {names}{more}", failed.len())),
        End::Stopped if of_canary => Some(format!("the canary failed: {names}{more}")),
        End::Stopped => Some(format!("{} failed, which is as many as may: {names}{more}", failed.len())),
    }
}
