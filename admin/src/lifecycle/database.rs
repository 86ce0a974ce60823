//! Steps that make, rename, fence and drop databases and roles.

use std::time::Duration;

use serde_json::{Value, json};
use tenantry_config::TenantState;
use tokio_postgres::{error::SqlState, types::ToSql};

use super::{Site, StepError, half_made, mark, mark_of};
use crate::{
    catalog::{
        model::{Entry, Verifier},
        store::JobRow,
    },
    jobs::work::Work,
    sql,
};

/// Sessions around Tenantry are ended so many times, so far apart, before a step gives up.
const TRIES: u32 = 300;
const BETWEEN: Duration = Duration::from_millis(50);
/// PostgreSQL 16 asks for more words in a GRANT of a role.
const PG16: i32 = 160_000;

/// What PostgreSQL has under a name.
pub struct Database {
    pub oid: u32,
    /// A DROP that was interrupted.
    is_invalid: bool,
    /// Sessions are let in.
    is_open: bool,
}

impl Database {
    /// Whole, and open.
    pub fn is_usable(&self) -> bool {
        self.is_open && !self.is_invalid
    }
}

pub async fn look(site: &mut Site, server: &str, name: &str) -> Result<Option<Database>, StepError> {
    let row = site.control(server).await?.query_opt(sql::DATABASE, &[&name]).await?;
    let database = |row: tokio_postgres::Row| {
        let (oid, limit, is_open) = (row.try_get(0)?, row.try_get::<_, i32>(2)?, row.try_get(3)?);
        Ok(Database { oid, is_invalid: limit == -2, is_open })
    };
    row.map(database).transpose()
}

fn remembered(result: &Value) -> Option<u32> {
    result["oid"].as_u64().and_then(|oid| u32::try_from(oid).ok())
}

pub fn catalog_id(site: &Site) -> String {
    site.plane.known().catalog.clone()
}

pub async fn is_since_16(site: &mut Site, server: &str) -> Result<bool, StepError> {
    let version = site.control(server).await?.query_one("SHOW server_version_num", &[]).await?;
    Ok(version.try_get::<_, String>(0)?.parse::<i32>().unwrap_or(0) >= PG16)
}

pub async fn make_role(site: &mut Site, job: &JobRow, entry: &Entry) -> Result<(), StepError> {
    let (Work::Create { role, .. } | Work::Separate { role, .. }) = &job.work else { return Ok(()) };
    let mark = mark(&catalog_id(site), entry.number);
    let found = site.control(&entry.server).await?.query_opt(sql::ROLE, &[&role.name]).await?;
    match (found, &role.verifier) {
        (None, Some(Verifier(verifier))) if role.ours => {
            let since_16 = is_since_16(site, &entry.server).await?;
            let statement = sql::create_role(&role.name, verifier, &mark, since_16);
            site.execute(&entry.server, &statement).await
        }
        (None, _) => Err(StepError::Refused(format!("there is no role {} to own the database", role.name))),
        (Some(row), _) if role.ours => match row.try_get::<_, Option<String>>(0)? {
            Some(comment) if comment == mark => Ok(()),
            _ => Err(StepError::Refused(format!("there is a role {} already; choose another", role.name))),
        },
        (Some(row), _) if !row.try_get::<_, bool>(1)? => {
            Err(StepError::Refused(format!("the role {} may not log in", role.name)))
        }
        (Some(row), _) if row.try_get::<_, bool>(2)? => {
            Err(StepError::Refused(format!("the role {} is a superuser: no tenant gets in as one", role.name)))
        }
        (Some(_), _) => Ok(()),
    }
}

pub async fn make(site: &mut Site, job: &JobRow, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let name = half_made(&catalog_id(site), entry.number);
    if look(site, &entry.server, &entry.database).await?.is_some() {
        let hint = if matches!(job.work, Work::Create { .. }) { "; adopt it, or choose another name" } else { "" };
        return Err(StepError::Refused(format!("there is a database {} already{hint}", entry.database)));
    }
    drop_named(site, &entry.server, &name).await?;
    match site.execute(&entry.server, &sql::create_database(&name, &entry.owner_role)).await {
        // An interrupted one of ours has just come to its end.
        Err(StepError::Refused(why)) if look(site, &entry.server, &name).await?.is_some() => {
            return Err(StepError::Away(why));
        }
        other => other?,
    }
    let made = look(site, &entry.server, &name).await?;
    result["oid"] = json!(made.map(|database| database.oid));
    Ok(())
}

/// The database that the steps of making work on: half made if there is one, else the tenant's own.
async fn at_work(site: &mut Site, entry: &Entry) -> Result<String, StepError> {
    let name = half_made(&catalog_id(site), entry.number);
    Ok(if look(site, &entry.server, &name).await?.is_some() { name } else { entry.database.clone() })
}

pub async fn close_to_public(site: &mut Site, entry: &Entry) -> Result<(), StepError> {
    let name = at_work(site, entry).await?;
    let mut roles: Vec<&String> = entry.roles.iter().map(|role| &role.name).chain([&entry.owner_role]).collect();
    roles.sort();
    roles.dedup();
    site.execute(&entry.server, &sql::revoke_public(&name)).await?;
    for role in roles {
        site.execute(&entry.server, &sql::grant_connect(&name, role)).await?;
    }
    unfence(site, &entry.server, &name).await
}

pub async fn add_extensions(site: &mut Site, entry: &Entry) -> Result<(), StepError> {
    if entry.spec.extensions.is_empty() {
        return Ok(());
    }
    let name = half_made(&catalog_id(site), entry.number);
    let client = site.connect(&entry.server, &name).await?;
    for extension in &entry.spec.extensions {
        site.plane.fuse.burn();
        let made = client.batch_execute(&sql::create_extension(&entry.owner_role, extension)).await;
        made.map_err(|error| match error.code() {
            // No such file on the server: it will not come by itself.
            Some(&SqlState::UNDEFINED_FILE) => StepError::Refused(format!("the server has no extension {extension}")),
            _ => StepError::from(error),
        })?;
    }
    Ok(())
}

pub async fn set_defaults(site: &mut Site, entry: &Entry) -> Result<(), StepError> {
    let name = at_work(site, entry).await?;
    for (setting, value) in &entry.spec.settings {
        site.execute(&entry.server, &sql::set_database_default(&name, setting, Some(value))).await?;
    }
    Ok(())
}

pub async fn publish(site: &mut Site, entry: &Entry, result: &Value) -> Result<(), StepError> {
    let name = half_made(&catalog_id(site), entry.number);
    if look(site, &entry.server, &name).await?.is_none() {
        let there = look(site, &entry.server, &entry.database).await?;
        return match there {
            Some(database) if Some(database.oid) == remembered(result) => Ok(()),
            _ => Err(StepError::Refused("the database that was being made is gone".to_owned())),
        };
    }
    quiet_around(site, &entry.server, &name).await?;
    site.execute(&entry.server, &sql::rename_database(&name, &entry.database)).await
}

pub async fn fence(site: &mut Site, entry: &Entry) -> Result<(), StepError> {
    site.execute(&entry.server, &sql::allow_connections(&entry.database, false)).await?;
    quiet_around(site, &entry.server, &entry.database).await
}

/// Lets sessions in, if they are not.
pub async fn unfence(site: &mut Site, server: &str, name: &str) -> Result<(), StepError> {
    match look(site, server, name).await? {
        Some(database) if !database.is_open => site.execute(server, &sql::allow_connections(name, true)).await,
        _ => Ok(()),
    }
}

/// Ends the sessions of a database that nobody may enter any more.
pub async fn quiet_around(site: &mut Site, server: &str, database: &str) -> Result<(), StepError> {
    end_sessions(site, server, sql::END_SESSIONS, &[&database]).await
}

/// Ends the sessions that the statement finds, until it finds none.
pub async fn end_sessions(
    site: &mut Site,
    server: &str,
    statement: &str,
    of: &[&(dyn ToSql + Sync)],
) -> Result<(), StepError> {
    let mut left = 0;
    for _ in 0..TRIES {
        let row = site.control(server).await?.query_one(statement, of).await;
        let row = row.map_err(|error| match error.code() {
            Some(&SqlState::INSUFFICIENT_PRIVILEGE) => StepError::Refused(
                "a session in the database cannot be ended by the control role (it needs pg_signal_backend, and cannot end a \
                 superuser's): end it by hand"
                    .to_owned(),
            ),
            _ => StepError::from(error),
        })?;
        left = row.try_get::<_, i64>(0)?;
        if left == 0 {
            return Ok(());
        }
        tokio::time::sleep(BETWEEN).await;
    }
    Err(StepError::Refused(format!("{left} sessions in the database did not end")))
}

pub async fn rename(site: &mut Site, job: &JobRow, entry: &Entry, result: &Value) -> Result<(), StepError> {
    let Work::Rename { to, .. } = &job.work else { return Ok(()) };
    let oid = remembered(result);
    let is_ours = |found: Option<Database>| found.is_some_and(|database| Some(database.oid) == oid);
    if is_ours(look(site, &entry.server, to).await?) {
        return Ok(());
    }
    if !is_ours(look(site, &entry.server, &entry.database).await?) {
        return Err(StepError::Refused(format!("the database {} is not the one that was fenced", entry.database)));
    }
    site.execute(&entry.server, &sql::rename_database(&entry.database, to)).await
}

/// The way back: whatever it is called now, by its number.
pub async fn name_back(site: &mut Site, job: &JobRow, entry: &Entry, result: &Value) -> Result<(), StepError> {
    let Work::Rename { to, .. } = &job.work else { return Ok(()) };
    match look(site, &entry.server, to).await? {
        Some(found) if Some(found.oid) == remembered(result) => {
            site.execute(&entry.server, &sql::rename_database(to, &entry.database)).await
        }
        _ => Ok(()),
    }
}

pub async fn reroute(site: &Site, job: &JobRow, entry: &Entry) -> Result<(), StepError> {
    let Work::Rename { to, rename_database, .. } = &job.work else { return Ok(()) };
    site.change(entry.number, |e| {
        if e.name != *to {
            let old = std::mem::replace(&mut e.name, to.clone());
            e.aliases.retain(|alias| alias != to && *alias != old);
            e.aliases.push(old);
        }
        if *rename_database {
            e.database.clone_from(to);
        }
        Ok(())
    })
    .await
}

/// Drops the tenant's database, if it is still the one that was drained.
pub async fn drop(site: &mut Site, entry: &Entry, result: &Value) -> Result<(), StepError> {
    let Some(found) = look(site, &entry.server, &entry.database).await? else { return Ok(()) };
    if Some(found.oid) != remembered(result) {
        return Ok(());
    }
    drop_named(site, &entry.server, &entry.database).await
}

pub async fn drop_named(site: &mut Site, server: &str, name: &str) -> Result<(), StepError> {
    match look(site, server, name).await? {
        None => return Ok(()),
        // Takes no ALTER.
        Some(database) if database.is_invalid => {}
        Some(_) => {
            site.execute(server, &sql::allow_connections(name, false)).await?;
            quiet_around(site, server, name).await?;
        }
    }
    site.execute(server, &sql::drop_database(name)).await
}

/// What a job made and did not publish; or published, but nobody was let in yet.
pub async fn drop_half_made(site: &mut Site, job: &JobRow, entry: &Entry, result: &Value) -> Result<(), StepError> {
    let name = half_made(&catalog_id(site), entry.number);
    drop_named(site, &entry.server, &name).await?;
    let makes = matches!(job.work, Work::Create { .. } | Work::Restore { .. });
    if makes && entry.state != TenantState::Active && remembered(result).is_some() {
        drop(site, entry, result).await?;
    }
    Ok(())
}

pub async fn drop_new_role(site: &mut Site, job: &JobRow, entry: &Entry) -> Result<(), StepError> {
    let (Work::Create { role, .. } | Work::Separate { role, .. }) = &job.work else { return Ok(()) };
    let own = mark(&catalog_id(site), entry.number);
    let found = site.control(&entry.server).await?.query_opt(sql::ROLE, &[&role.name]).await?;
    let comment = found.map(|row| row.try_get::<_, Option<String>>(0)).transpose()?.flatten();
    // One that was there before, whoever made it, is none of this job's.
    if role.ours && comment.as_deref() == Some(&own) {
        drop_role(site, entry, &role.name).await?;
    }
    Ok(())
}

/// Also a shared one that another tenant made: the last one to leave turns off the light.
pub async fn drop_roles(site: &mut Site, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let mut left = Vec::new();
    for role in &entry.roles {
        if !drop_role(site, entry, &role.name).await? {
            left.push(role.name.clone());
        }
    }
    result["roles_left"] = json!(left);
    Ok(())
}

/// False if it is still needed elsewhere, or is not ours.
pub async fn drop_role(site: &mut Site, entry: &Entry, name: &str) -> Result<bool, StepError> {
    let catalog = catalog_id(site);
    let Some(found) = site.control(&entry.server).await?.query_opt(sql::ROLE, &[&name]).await? else {
        return Ok(true);
    };
    let comment = found.try_get::<_, Option<String>>(0)?.unwrap_or_default();
    if !comment.starts_with(&mark_of(&catalog)) {
        return Ok(false);
    }
    // An archived one has no database, and needs it all the same.
    if let Some(heir) = site.plane.catalog.others_with_role(entry.number, &entry.server, name).await?.first() {
        if comment == mark(&catalog, entry.number) {
            bequeath(site, entry, name, *heir).await?;
        }
        return Ok(false);
    }
    if site.plane.catalog.copy_needs_role(entry.number, &entry.server, name).await? {
        return Ok(false);
    }
    let owned: i64 = site.control(&entry.server).await?.query_one(sql::OWNED, &[&name]).await?.try_get(0)?;
    if owned > 0 {
        return Ok(false);
    }
    match site.execute_raw(&entry.server, &sql::drop_role(name)).await? {
        Ok(()) => Ok(true),
        Err(error) if error.code() == Some(&SqlState::DEPENDENT_OBJECTS_STILL_EXIST) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The role is another tenant's now, who drops it in the end.
async fn bequeath(site: &mut Site, entry: &Entry, role: &str, heir: i64) -> Result<(), StepError> {
    site.change(heir, |e| {
        e.roles.iter_mut().filter(|row| row.name == role).for_each(|row| row.ours = true);
        Ok(())
    })
    .await?;
    let mark = mark(&catalog_id(site), heir);
    site.execute(&entry.server, &sql::mark_role(role, &mark)).await
}
