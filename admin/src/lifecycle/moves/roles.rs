//! The tenant's roles at the other server: the same names, the same verifiers, so that nobody needs a new password.
//!
//! What always holds: a verifier comes from the catalog and is asked of no server; a role that was there before, and is not
//! one that this catalog has there with the same verifier, is left alone and stands in the way.

use std::collections::BTreeSet;

use super::{Pair, Site, StepError, replicate};
use crate::{
    catalog::model::{Entry, Verifier},
    lifecycle::{database, mark},
    sql::{self, moves as of},
};

/// Every role of the tenant, the owner of its database first; without a verifier it does not log in.
pub fn of_tenant(entry: &Entry) -> Vec<(String, Option<Verifier>)> {
    let mut roles = vec![(entry.owner_role.clone(), None)];
    for row in &entry.roles {
        match roles.iter_mut().find(|(name, _)| *name == row.name) {
            Some((_, verifier)) => verifier.clone_from(&row.verifier),
            None => roles.push((row.name.clone(), row.verifier.clone())),
        }
    }
    roles
}

/// How a role stands at the server where the tenant goes.
pub enum There {
    /// It must be made.
    No,
    /// An earlier try made it.
    Ours,
    /// Another tenant of this catalog has it there, with the same verifier; or the settings file says how it logs in.
    Shared,
    /// Why it cannot be used.
    InTheWay(String),
}

pub async fn look(site: &mut Site, new: &Entry, role: &str, verifier: Option<&Verifier>) -> Result<There, StepError> {
    let found = site.control(&new.server).await?.query_opt(sql::ROLE, &[&role]).await?;
    let of_file = site.plane.file().roles.iter().any(|row| row.name == role);
    let Some(row) = found else {
        let logs_in = new.roles.iter().any(|row| row.name == role);
        return Ok(match verifier {
            None if logs_in => There::InTheWay(format!(
                "the role {role} logs in as [[roles]] of the settings file say, and is not there: make it there first"
            )),
            _ => There::No,
        });
    };
    let comment = row.try_get::<_, Option<String>>(0)?.unwrap_or_default();
    if comment == mark(&database::catalog_id(site), new.number) {
        return Ok(There::Ours);
    }
    let known = site.plane.known();
    let is_at = |entry: &&Entry| {
        entry.server == new.server || entry.kept.as_ref().is_some_and(|kept| kept.server == new.server)
    };
    let others = known.tenants.iter().filter(|entry| entry.number != new.number).filter(is_at);
    let same = others.flat_map(|entry| &entry.roles).any(|row| row.name == role && row.verifier.as_ref() == verifier);
    Ok(if same || of_file && verifier.is_none() {
        There::Shared
    } else {
        There::InTheWay(format!(
            "there is a role {role} already, and whether it has the same password nobody can tell: drop it there"
        ))
    })
}

pub async fn carry(site: &mut Site, pair: &Pair) -> Result<(), StepError> {
    let Pair { old, new, .. } = pair;
    let own = mark(&database::catalog_id(site), new.number);
    let roles = of_tenant(old);
    for (role, verifier) in &roles {
        let is_there = match look(site, new, role, verifier.as_ref()).await? {
            There::No => false,
            // An earlier try may have made it and no more.
            There::Ours => {
                if let Some(Verifier(verifier)) = verifier {
                    site.execute(&new.server, &sql::set_password(role, verifier)).await?;
                }
                true
            }
            There::Shared => continue,
            There::InTheWay(why) => return Err(StepError::Refused(why)),
        };
        let facts = site.control(&old.server).await?.query_opt(of::ROLE_FACTS, &[role]).await?;
        let facts = facts.ok_or_else(|| StepError::Refused(format!("there is no role {role} at {}", old.server)))?;
        let (inherits, limit): (bool, i32) = (facts.try_get(1)?, facts.try_get(2)?);
        let (settings, until): (Vec<String>, Option<String>) = (facts.try_get(3)?, facts.try_get(5)?);
        let since_16 = database::is_since_16(site, &new.server).await?;
        let verifier = verifier.as_ref().map(|verifier| verifier.0.as_str());
        if !is_there {
            let made = of::create_role_like(role, verifier, inherits, limit, &own, since_16);
            site.execute(&new.server, &made).await?;
        }
        if let Some(until) = until {
            site.execute(&new.server, &of::valid_until(role, &until)).await?;
        }
        for setting in settings {
            let (name, value) = setting.split_once('=').unwrap_or((&setting, ""));
            site.execute(&new.server, &sql::set_role_default(role, None, name, value)).await?;
        }
    }
    let names: BTreeSet<&String> = roles.iter().map(|(role, _)| role).collect();
    let since_16 = database::is_since_16(site, &new.server).await?;
    for Membership { member, group, admin, options } in memberships(site, old).await? {
        if names.contains(&group) {
            let options = options.filter(|_| since_16);
            site.execute(&new.server, &of::grant_role(&group, &member, admin, options)).await?;
        }
    }
    Ok(())
}

/// One role in another.
pub struct Membership {
    pub member: String,
    pub group: String,
    pub admin: bool,
    /// INHERIT and SET; before PostgreSQL 16 there are none.
    pub options: Option<(bool, bool)>,
}

/// What the tenant's roles are members of.
pub async fn memberships(site: &mut Site, old: &Entry) -> Result<Vec<Membership>, StepError> {
    let names: Vec<String> = of_tenant(old).into_iter().map(|(name, _)| name).collect();
    let rows = site.control(&old.server).await?.query(of::MEMBERSHIPS, &[&names]).await?;
    let membership = |row: &tokio_postgres::Row| {
        let (inherit, set): (Option<bool>, Option<bool>) = (row.try_get(3)?, row.try_get(4)?);
        Ok(Membership {
            member: row.try_get(0)?,
            group: row.try_get(1)?,
            admin: row.try_get(2)?,
            options: inherit.zip(set),
        })
    };
    rows.iter().map(membership).collect()
}

/// Those that this job made; whoever else came to need one keeps it.
pub async fn drop_carried(site: &mut Site, pair: &Pair) -> Result<(), StepError> {
    if !replicate::is_known(site, &pair.new) {
        return Ok(());
    }
    let own = mark(&database::catalog_id(site), pair.new.number);
    for (role, _) in of_tenant(&pair.new).iter().rev() {
        let found = site.control(&pair.new.server).await?.query_opt(sql::ROLE, &[role]).await?;
        let comment = found.map(|row| row.try_get::<_, Option<String>>(0)).transpose()?.flatten();
        if comment.as_deref() == Some(&own) {
            database::drop_role(site, &pair.new, role).await?;
        }
    }
    Ok(())
}
