//! A login for a command that somebody runs for a tenant (`tenantry exec`): made for it, and gone with it.
//!
//! What always holds: the login is a role of its own, which the tenant's route lets in (in session mode) while the command
//! may run and never longer; its password is known to whoever asked and nobody else; sessions begin as the tenant's owner,
//! and what the role made nevertheless is the owner's when it is dropped. A runner that is not heard of any more has no
//! command under way.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::{Site, StepError, database, half_made, hand, traffic};
use crate::{
    catalog::{
        model::{Entry, RoleRow},
        store::JobRow,
    },
    jobs::{rollouts::SILENT, work::Work},
    sql::{self, rollouts as of},
};

/// For other processes to let it in, or not any more.
const HEARD: Duration = Duration::from_secs(5);
/// Between two looks at how the command ended.
const LOOK: Duration = Duration::from_millis(250);
/// Beyond the command's own time: for its start, and for its end to be told.
const GRACE: Duration = Duration::from_secs(120);
/// Of an outcome.
const TOLD: usize = 2_000;

fn role_of(site: &Site, entry: &Entry) -> String {
    format!("{}-exec", half_made(&database::catalog_id(site), entry.number))
}

pub async fn open(site: &mut Site, job: &JobRow, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let Work::Exec { rollout } = job.work else { return Ok(()) };
    let Some((plan, Some(verifier))) = site.plane.catalog.rollout_login(rollout).await? else {
        return Err(StepError::Refused("the rollout was stopped".to_owned()));
    };
    let role = role_of(site, entry);
    hand::drop_role(site, entry, &role).await?;
    let since_16 = database::is_since_16(site, &entry.server).await?;
    let valid = Duration::from_millis(plan.timeout_ms).saturating_add(GRACE).as_secs();
    let client = site.control(&entry.server).await?;
    let until: String = client.query_one(sql::SOON, &[&format!("{valid} seconds")]).await?.try_get(0)?;
    let mut statements = of::create_login(&role, &verifier.0, &until, &entry.owner_role, since_16);
    statements.push_str("; ");
    statements.push_str(&sql::grant_only_connect(&entry.database, &role));
    site.execute(&entry.server, &statements).await?;
    hand::set_as_owner(site, entry, &role).await?;
    site.execute(&entry.server, &of::limit_login(&role, plan.lock_timeout_ms, plan.statement_timeout_ms)).await?;
    let row = RoleRow { session_mode: true, ..RoleRow::new(role.clone(), Some(verifier), false) };
    site.change(entry.number, |e| {
        e.roles.retain(|known| known.name != role);
        e.roles.push(row);
        Ok(())
    })
    .await?;
    traffic::heard(site, entry, HEARD).await?;
    // From here on a command may change tables, whatever becomes of it.
    result["stale"] = json!(true);
    site.note(job, result).await?;
    site.plane.fuse.burn();
    site.plane.catalog.set_login(rollout, entry.number, Some(&role)).await.map_err(Into::into)
}

pub async fn await_command(site: &Site, job: &JobRow, entry: &Entry) -> Result<(), StepError> {
    let Work::Exec { rollout } = job.work else { return Ok(()) };
    let Some((plan, _)) = site.plane.catalog.rollout_login(rollout).await? else {
        return Err(StepError::Refused("the rollout is gone".to_owned()));
    };
    let deadline = Instant::now() + Duration::from_millis(plan.timeout_ms).saturating_add(GRACE);
    loop {
        let (outcome, silent) = site.plane.catalog.outcome(rollout, entry.number).await?;
        match outcome {
            Some(ended) if ended.is_empty() => return Ok(()),
            Some(ended) => return Err(StepError::Refused(ended.chars().take(TOLD).collect())),
            None if silent > SILENT => {
                return Err(StepError::Refused(format!("nothing was heard of who runs the command for {SILENT} s")));
            }
            None if Instant::now() > deadline => {
                return Err(StepError::Refused("the command took longer than its time".to_owned()));
            }
            None => tokio::time::sleep(LOOK).await,
        }
    }
}

pub async fn close(site: &mut Site, entry: &Entry) -> Result<(), StepError> {
    let role = role_of(site, entry);
    // First, so that none of its sessions that ends now is followed by another.
    site.change(entry.number, |e| {
        e.roles.retain(|known| known.name != role);
        Ok(())
    })
    .await?;
    traffic::heard(site, entry, HEARD).await?;
    hand::drop_role(site, entry, &role).await
}
