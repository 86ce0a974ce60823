//! The step before anybody is kept waiting: whether all that comes can be done, and how things stand, for the way back.

use serde_json::{Value, json};
use tenantry_config::TenantState;

use super::{Site, StepError, archive, database, import, moves};
use crate::{
    catalog::{model::Entry, store::JobRow},
    jobs::work::Work,
    sql,
};

pub async fn check(site: &mut Site, job: &JobRow, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    result["before"] = json!(entry.state.as_str());
    match &job.work {
        Work::Rename { to, rename_database: true, .. } => {
            may_change(site, entry, result).await?;
            name_is_free(site, &entry.server, to).await
        }
        Work::Archive { .. } => {
            may_change(site, entry, result).await?;
            note_grants(site, entry, result).await
        }
        // An archived tenant has no database; one of its name is somebody else's.
        Work::Delete { .. } if entry.state == TenantState::Archived => Ok(()),
        Work::Delete { .. } if database::look(site, &entry.server, &entry.database).await?.is_none() => Ok(()),
        Work::Delete { .. } | Work::Separate { .. } | Work::Retire { .. } => may_change(site, entry, result).await,
        Work::Rotate { role, .. } => role_is_there(site, entry, role).await,
        Work::Migrate { .. } | Work::Exec { .. } => may_work_inside(site, entry).await,
        Work::Import { file, sha256, .. } => {
            archive::may_grant(site, entry).await?;
            import::check(site, file, sha256).await
        }
        Work::Move { .. } | Work::MoveBack { .. } | Work::ConfirmMove => moves::check(site, job, entry, result).await,
        Work::Rename { .. } | Work::Drain { .. } | Work::Create { .. } | Work::Restore { .. } => Ok(()),
    }
}

/// Renaming, fencing and dropping are the owner's, and ours if we are a member.
pub async fn may_change(site: &mut Site, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let name = &entry.database;
    let Some(row) = site.control(&entry.server).await?.query_opt(sql::CONTROL_MAY, &[name]).await? else {
        return Err(StepError::Refused(format!("there is no database {name} on the server")));
    };
    let (oid, owner): (u32, String) = (row.try_get(0)?, row.try_get(1)?);
    let (is_invalid, is_open): (bool, bool) = (row.try_get(2)?, row.try_get(3)?);
    if is_invalid {
        return Err(StepError::Refused(format!("the database {name} was dropped halfway: drop it by hand")));
    }
    if !is_open {
        return Err(StepError::Refused(format!(
            "the database {name} lets nobody in (ALLOW_CONNECTIONS): let them in first"
        )));
    }
    if !row.try_get::<_, bool>(4)? {
        return Err(StepError::Refused(format!(
            "the control role is not a member of {owner}, who owns {name}: GRANT it that role (WITH INHERIT TRUE, SET TRUE)"
        )));
    }
    if !row.try_get::<_, bool>(5)? {
        return Err(StepError::Refused("the control role needs CREATEDB".to_owned()));
    }
    result["oid"] = json!(oid);
    Ok(())
}

/// A role that becomes the owner must be let in, and only a member with ADMIN OPTION can make one.
async fn may_work_inside(site: &mut Site, entry: &Entry) -> Result<(), StepError> {
    let name = &entry.database;
    match database::look(site, &entry.server, name).await? {
        Some(database) if database.is_usable() => {}
        Some(_) => return Err(StepError::Refused(format!("the database {name} lets nobody in (ALLOW_CONNECTIONS)"))),
        None => return Err(StepError::Refused(format!("there is no database {name} on the server"))),
    }
    role_is_there(site, entry, &entry.owner_role).await
}

async fn name_is_free(site: &mut Site, server: &str, name: &str) -> Result<(), StepError> {
    match database::look(site, server, name).await? {
        None => Ok(()),
        Some(_) => Err(StepError::Refused(format!("there is a database {name} already; choose another name"))),
    }
}

async fn role_is_there(site: &mut Site, entry: &Entry, role: &str) -> Result<(), StepError> {
    match site.control(&entry.server).await?.query_opt(sql::ROLE, &[&role]).await? {
        Some(_) if site.control(&entry.server).await?.query_one(sql::MAY_GRANT, &[&role]).await?.try_get(0)? => Ok(()),
        Some(_) => Err(StepError::Refused(format!(
            "the control role may not alter {role}: GRANT it that role WITH ADMIN OPTION, once, as a superuser"
        ))),
        None => Err(StepError::Refused(format!("there is no role {role} on the server"))),
    }
}

/// Who may connect, before a fence takes it from them.
pub async fn note_grants(site: &mut Site, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let mut grants = Vec::new();
    for row in site.control(&entry.server).await?.query(sql::CONNECT_ACL, &[&entry.database]).await? {
        let (grantee, may_grant, is_owners): (String, bool, bool) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        if !is_owners {
            return Err(StepError::Refused(format!(
                "{grantee} may connect by a grant that is not the owner's, and that could not be given back: revoke it first"
            )));
        }
        grants.push((grantee, may_grant));
    }
    result["acl"] = json!(grants);
    Ok(())
}

/// Gives CONNECT back to those who had it, and takes it from those who had not.
pub async fn lift_fence(site: &mut Site, entry: &Entry, result: &Value) -> Result<(), StepError> {
    let Ok(noted) = serde_json::from_value::<Vec<(String, bool)>>(result["acl"].clone()) else { return Ok(()) };
    if database::look(site, &entry.server, &entry.database).await?.is_none() {
        return Ok(());
    }
    let mut wanted = Vec::new();
    for (role, may_grant) in noted {
        // Whoever was dropped meanwhile needs nothing.
        let is_there =
            role == "-" || site.control(&entry.server).await?.query_opt(sql::ROLE, &[&role]).await?.is_some();
        if is_there {
            wanted.push((role, may_grant));
        }
    }
    let rows = site.control(&entry.server).await?.query(sql::CONNECT_GRANTS, &[&entry.database]).await?;
    let now: Vec<String> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    let over: Vec<String> = now.into_iter().filter(|role| wanted.iter().all(|(wanted, _)| wanted != role)).collect();
    site.execute(&entry.server, &sql::give_connect(&entry.database, &wanted, &over)).await?;
    database::unfence(site, &entry.server, &entry.database).await
}
