//! Steps from a role that tenants share to one of a tenant's own.
//!
//! What always holds: everything in the tenant's database changes hands in one transaction, and nothing outside of it; the old
//! role goes on working, as a member of the new one, until it is retired.

use std::collections::BTreeSet;

use tokio_postgres::{Client, Transaction};

use super::{Site, StepError, database};
use crate::{
    catalog::{model::Entry, store::JobRow},
    jobs::work::Work,
    sql,
};

pub async fn hand_over(site: &mut Site, job: &JobRow, entry: &Entry) -> Result<(), StepError> {
    let Work::Separate { role, old, .. } = &job.work else { return Ok(()) };
    let since_16 = database::is_since_16(site, &entry.server).await?;
    let mut client = site.connect(&entry.server, &entry.database).await?;
    site.plane.fuse.burn();
    let change = reassign(&mut client, &entry.database, old, &role.name).await?;
    change.batch_execute(&sql::share(&entry.database, &role.name, old, since_16)).await?;
    Ok(change.commit().await?)
}

pub async fn hand_back(site: &mut Site, job: &JobRow, entry: &Entry) -> Result<(), StepError> {
    let Work::Separate { role, old, .. } = &job.work else { return Ok(()) };
    if site.control(&entry.server).await?.query_opt(sql::ROLE, &[&role.name]).await?.is_none() {
        return Ok(());
    }
    let client = site.connect(&entry.server, &entry.database).await?;
    site.plane.fuse.burn();
    Ok(client.batch_execute(&sql::hand_back(&role.name, old)).await?)
}

/// All of `from` in this database, and the database, becomes `to`'s; other databases stay whose they are.
async fn reassign<'a>(
    client: &'a mut Client,
    database: &str,
    from: &str,
    to: &str,
) -> Result<Transaction<'a>, StepError> {
    let change = client.transaction().await?;
    let before = owned(&change, to).await?;
    change.batch_execute(&sql::reassign(from, to)).await?;
    // It takes databases along, wherever they are.
    for taken in owned(&change, to).await?.difference(&before).filter(|taken| *taken != database) {
        change.batch_execute(&sql::set_owner(taken, from)).await?;
    }
    Ok(change)
}

async fn owned(change: &Transaction<'_>, role: &str) -> Result<BTreeSet<String>, StepError> {
    let rows = change.query(sql::DATABASES_OF, &[&role]).await?;
    Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
}

pub async fn take_role(site: &Site, job: &JobRow, entry: &Entry) -> Result<(), StepError> {
    let Work::Separate { role, .. } = &job.work else { return Ok(()) };
    site.change(entry.number, |e| {
        e.owner_role.clone_from(&role.name);
        if e.roles.iter().all(|row| row.name != role.name) {
            e.roles.insert(0, role.clone());
        }
        Ok(())
    })
    .await
}

pub async fn remove_role(site: &Site, job: &JobRow, entry: &Entry) -> Result<(), StepError> {
    let Work::Retire { roles } = &job.work else { return Ok(()) };
    site.change(entry.number, |e| {
        e.roles.retain(|row| !roles.contains(&row.name));
        Ok(())
    })
    .await
}

pub async fn reclaim(site: &mut Site, job: &JobRow, entry: &Entry) -> Result<(), StepError> {
    let Work::Retire { roles } = &job.work else { return Ok(()) };
    for old in roles {
        if site.control(&entry.server).await?.query_opt(sql::ROLE, &[&old]).await?.is_none() {
            continue;
        }
        let mut client = site.connect(&entry.server, &entry.database).await?;
        site.plane.fuse.burn();
        // First, so that none of its sessions that ends now is followed by another.
        client.batch_execute(&sql::revoke_connect(&entry.database, old)).await?;
        database::end_sessions(site, &entry.server, sql::END_SESSIONS_OF, &[&entry.database, old]).await?;
        site.plane.fuse.burn();
        let change = reassign(&mut client, &entry.database, old, &entry.owner_role).await?;
        change.batch_execute(&sql::revoke_role(&entry.owner_role, old)).await?;
        change.commit().await?;
    }
    Ok(())
}
