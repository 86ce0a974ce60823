//! Steps that change a password without an error for anybody.
//!
//! First every process and every tenant that has the role learns the new verifier, and keeps the old one beside it; then
//! PostgreSQL. In between a pool tries both (`proxy::server::credentials`), so whichever PostgreSQL has, logins work. What
//! always holds: after the step in the catalog there is only the way forward.

use std::time::Duration;

use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{Site, StepError, traffic};
use crate::{
    catalog::{
        model::{Entry, Former, RoleRow},
        store::JobRow,
    },
    jobs::work::Work,
    sql,
};

/// For other processes to hear of the new verifier.
const HEARD: Duration = Duration::from_secs(5);
/// Where the old password is good no more: until every pool has crossed to the new key.
const CROSSING: Duration = Duration::from_secs(30);
/// A server that is away may keep the second step waiting for so long.
const PROVISIONAL: Duration = Duration::from_secs(30 * 24 * 3_600);

pub async fn offer_verifier(site: &Site, job: &JobRow, entry: &Entry) -> Result<(), StepError> {
    let Work::Rotate { role, grace, .. } = &job.work else { return Ok(()) };
    let grace = Duration::from_millis(*grace);
    // Not before PostgreSQL has the new one: its time begins then.
    let until = OffsetDateTime::now_utc() + grace + PROVISIONAL;
    for number in sharers(site, entry, role).await? {
        site.change(number, |e| {
            e.roles.iter_mut().filter(|row| row.name == *role).for_each(|row| turn(row, &job.work, until));
            Ok(())
        })
        .await?;
    }
    traffic::heard(site, entry, HEARD).await
}

/// The new verifier, with the old one beside it; done again, it changes nothing.
fn turn(row: &mut RoleRow, work: &Work, until: OffsetDateTime) {
    let Work::Rotate { verifier, bridge, grace, .. } = work else { return };
    if row.verifier.as_ref() == Some(verifier) {
        return;
    }
    let old = row.verifier.replace(verifier.clone());
    row.former = old.map(|verifier| Former { verifier, bridge: bridge.clone(), accepts: *grace > 0, until });
}

pub async fn set_verifier(site: &mut Site, job: &JobRow, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let Work::Rotate { role, verifier, grace, .. } = &job.work else { return Ok(()) };
    site.execute(&entry.server, &sql::set_password(role, &verifier.0)).await?;
    let until = OffsetDateTime::now_utc() + Duration::from_millis(*grace).max(CROSSING);
    for number in sharers(site, entry, role).await? {
        site.change(number, |e| {
            let rows = e.roles.iter_mut().filter(|row| row.name == *role && row.verifier.as_ref() == Some(verifier));
            rows.filter_map(|row| row.former.as_mut()).for_each(|former| former.until = until);
            Ok(())
        })
        .await?;
    }
    let told = (*grace > 0).then(|| until.format(&Rfc3339).ok()).flatten();
    result["old_password_until"] = json!(told);
    Ok(())
}

/// Every tenant that has the role, this one first.
async fn sharers(site: &Site, entry: &Entry, role: &str) -> Result<Vec<i64>, StepError> {
    let others = site.plane.catalog.others_with_role(entry.number, &entry.server, role).await?;
    Ok([entry.number].into_iter().chain(others).collect())
}
