//! Whether a move can be made, asked of both servers before anything is done: every reason against it at once, each with what
//! to do about it.
//!
//! What always holds: nothing is changed here but the job's own notes; a reason that would only show while clients wait is a
//! reason here.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::{Value, json};

use super::{
    Pair, Site, StepError, at, left,
    replicate::Abilities,
    roles::{self, Membership, There},
};
use crate::{
    catalog::{
        model::{Entry, Kept, Method},
        store::JobRow,
    },
    jobs::work::Work,
    lifecycle::{archive, database, facts, hand, hand::Hand, preflight, program},
    sql::{self, moves as of},
};

/// Names that are told of one kind.
const TOLD: usize = 20;
/// Of slots and senders: one for the stream, one for a table that is being copied.
const WANTED: i32 = 2;

/// What was found.
#[derive(Debug, Serialize)]
struct Finding {
    /// Stands in the way; else it is only good to know.
    refuses: bool,
    what: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    names: Vec<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    advice: String,
}

#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn refuse(&mut self, what: impl Into<String>, advice: impl Into<String>) {
        self.0.push(Finding { refuses: true, what: what.into(), names: Vec::new(), advice: advice.into() });
    }

    fn tell(&mut self, what: impl Into<String>) {
        self.0.push(Finding { refuses: false, what: what.into(), names: Vec::new(), advice: String::new() });
    }

    /// In one line, what stands in the way.
    fn refusal(&self) -> Option<String> {
        let one = |finding: &Finding| {
            let names =
                if finding.names.is_empty() { String::new() } else { format!(": {}", finding.names.join(", ")) };
            let advice = if finding.advice.is_empty() { String::new() } else { format!(" ({})", finding.advice) };
            format!("{}{names}{advice}", finding.what)
        };
        let all: Vec<String> = self.0.iter().filter(|finding| finding.refuses).map(one).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }
}

/// The first step of every job about a move.
pub async fn check(site: &mut Site, job: &JobRow, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    match &job.work {
        Work::Move { to, method, dry_run, .. } => before_move(site, job, entry, (to, *method, *dry_run), result).await,
        Work::MoveBack { follows, .. } => before_way_back(site, job, entry, *follows, result).await,
        _ => before_confirmation(site, entry, result).await,
    }
}

/// From the next step on it cannot be cancelled.
async fn before_confirmation(site: &mut Site, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    note_places(entry, result)?;
    let Some(kept) = &entry.kept else { return Ok(()) };
    if !site.plane.file().servers.contains_key(&kept.server) {
        return Ok(());
    }
    if let Some(why) = left::away(site, &kept.server).await? {
        return Err(StepError::Refused(format!(
            "{} cannot be reached, and the copy there could not be dropped ({why}): confirm once it is back; if it is gone for \
             good, take it out of the settings, then confirm",
            kept.server
        )));
    }
    is_closed(kept)
}

/// Whoever goes there, or drops it, must not meet the one that closes it.
fn is_closed(kept: &Kept) -> Result<(), StepError> {
    if kept.is_open {
        return Err(StepError::Refused(format!(
            "the copy at {} is not closed yet, which it is as soon as that server can be reached: try again then",
            kept.server
        )));
    }
    Ok(())
}

fn note_places(entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let Some(kept) = &entry.kept else {
        return Err(StepError::Refused("there is no copy of an earlier move any more".to_owned()));
    };
    (result["old"], result["new"]) = (json!(kept.server), json!(entry.server));
    result["kept_acl"] = json!(kept.acl);
    Ok(())
}

async fn before_way_back(
    site: &mut Site,
    job: &JobRow,
    entry: &Entry,
    follows: bool,
    result: &mut Value,
) -> Result<(), StepError> {
    note_places(entry, result)?;
    let Some(kept) = &entry.kept else { return Ok(()) };
    if let Some(why) = left::away(site, &kept.server).await? {
        return Err(StepError::Refused(format!(
            "{}, where the tenant would go back to, cannot be reached: {why}",
            kept.server
        )));
    }
    is_closed(kept)?;
    match database::look(site, &kept.server, &kept.database).await? {
        Some(found) if found.oid == kept.oid => {}
        _ => return Err(StepError::Refused(format!("the copy at {} is gone", kept.server))),
    }
    let known = site.plane.known();
    let neighbours = known.tenants.iter().filter(|other| other.number != entry.number && other.server == kept.server);
    for row in neighbours.flat_map(|other| &other.roles) {
        if entry.roles.iter().any(|own| own.name == row.name && own.verifier != row.verifier) {
            return Err(StepError::Refused(format!(
                "the role {} has another password at {} by now, where another tenant has it, too: rotate it at both first",
                row.name, kept.server
            )));
        }
    }
    if !follows {
        let is_there = left::look(site, entry, kept, result).await?;
        let pair = Pair::of(job, entry, result)?;
        if is_there {
            may_leave(site, entry, result).await?;
        }
        return left::note(site, entry, kept, &pair, result).await;
    }
    if let Some(why) = left::away(site, &entry.server).await? {
        return Err(StepError::Refused(format!(
            "{} cannot be reached, and what was written there last is not at {} perhaps ({why}): wait until it is back, or, if \
             it is lost, go back with force (`rollback-move --force`), which leaves that behind",
            entry.server, kept.server
        )));
    }
    may_leave(site, entry, result).await?;
    result["fingerprint"] = json!(kept.fingerprint);
    Ok(())
}

async fn may_leave(site: &mut Site, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    preflight::may_change(site, entry, result).await?;
    hand::drop_of(site, entry).await?;
    preflight::note_grants(site, entry, result).await?;
    archive::may_grant(site, entry).await
}

async fn before_move(
    site: &mut Site,
    job: &JobRow,
    entry: &Entry,
    (to, method, dry_run): (&str, Method, bool),
    result: &mut Value,
) -> Result<(), StepError> {
    // As they are before anything of ours is in them.
    may_leave(site, entry, result).await?;
    let new = at(entry, to);
    let mut found = Findings::default();
    if instance(site, &entry.server).await? == instance(site, to).await? {
        return Err(StepError::Refused(format!("{to} and {} are the same PostgreSQL", entry.server)));
    }
    if database::look(site, to, &new.database).await?.is_some() {
        found.refuse(format!("there is a database {} at {to} already", new.database), "drop or rename it there");
    }
    let (here, there) = (Abilities::of(site, &entry.server).await?, Abilities::of(site, to).await?);
    program::check(site, (&entry.server, here.major()), (to, there.major())).await?;
    if method == Method::Online {
        may_replicate(&mut found, (&entry.server, &here), (to, &there));
        result["follows"] = json!(follows(&mut found, (&entry.server, &here), (to, &there)));
    }
    look_at_roles(site, &mut found, entry, &new).await?;
    let noted = facts::note(site, &entry.server, &entry.database).await?;
    result["rights"] = json!(noted.rights);
    let hand = hand::make(site, entry, &[&entry.database]).await?;
    let looked = look_inside(site, &mut found, &hand, entry, to, method).await;
    hand::put_down(site, entry, looked).await?;
    result["findings"] = json!(found.0);
    if dry_run {
        let mut wanted = job.work.clone();
        if let Work::Move { dry_run, .. } = &mut wanted {
            *dry_run = false;
        }
        result["steps"] = json!(wanted.plan());
        return Ok(());
    }
    found.refusal().map_or(Ok(()), |why| Err(StepError::Refused(why)))
}

async fn instance(site: &mut Site, server: &str) -> Result<String, StepError> {
    Ok(site.control(server).await?.query_one(of::INSTANCE, &[]).await?.try_get(0)?)
}

/// What the source must be able to, and the target.
fn may_replicate(found: &mut Findings, (from, here): (&str, &Abilities), (to, there): (&str, &Abilities)) {
    let instead = "or use method dump";
    if let Some(why) = cannot_send(here) {
        found.refuse(format!("{from} cannot be replicated from: {why}"), instead);
    }
    if let Some(why) = cannot_apply(there) {
        found.refuse(format!("{to} cannot be replicated to: {why}"), instead);
    }
}

/// Whether the old copy can follow the new one, for a way back without loss.
fn follows(found: &mut Findings, (from, here): (&str, &Abilities), (to, there): (&str, &Abilities)) -> bool {
    let why = match (cannot_send(there), cannot_apply(here)) {
        (Some(why), _) => format!("{to}: {why}"),
        (None, Some(why)) => format!("{from}: {why}"),
        (None, None) => return true,
    };
    found.tell(format!("after the move, the old copy does not follow the new one ({why}): rolling back would leave behind what was written since"));
    false
}

fn cannot_send(server: &Abilities) -> Option<String> {
    let Abilities { wal_level, slots, senders, superuser, replication, .. } = server;
    if wal_level != "logical" {
        Some(format!("wal_level is {wal_level}; set it to logical, which takes a restart"))
    } else if *slots < WANTED {
        Some(format!("{slots} of max_replication_slots are free, and {WANTED} are needed"))
    } else if *senders < WANTED {
        Some(format!("{senders} of max_wal_senders are free, and {WANTED} are needed"))
    } else if !superuser && !replication {
        Some("the control role has no REPLICATION: ALTER ROLE ... REPLICATION, once, as a superuser".to_owned())
    } else {
        None
    }
}

fn cannot_apply(server: &Abilities) -> Option<String> {
    let Abilities { version, slots, workers, subscribes, .. } = server;
    if *version < 160_000 {
        Some("before PostgreSQL 16 only a superuser may subscribe".to_owned())
    } else if *slots < 1 {
        Some("none of max_replication_slots is free, which limits what it follows, too".to_owned())
    } else if *workers < WANTED {
        Some(format!("max_logical_replication_workers is {workers}, and {WANTED} are needed"))
    } else if !subscribes {
        Some(
            "the control role cannot let others subscribe: GRANT pg_create_subscription TO ... WITH ADMIN OPTION, once, as a \
             superuser"
                .to_owned(),
        )
    } else {
        None
    }
}

async fn look_at_roles(site: &mut Site, found: &mut Findings, entry: &Entry, new: &Entry) -> Result<(), StepError> {
    let roles = roles::of_tenant(entry);
    for (role, verifier) in &roles {
        if let There::InTheWay(why) = roles::look(site, new, role, verifier.as_ref()).await? {
            found.refuse(format!("{}: {why}", new.server), "");
        }
        let facts = site.control(&entry.server).await?.query_opt(of::ROLE_FACTS, &[role]).await?;
        if let Some(row) = facts
            && row.try_get(4)?
        {
            found.tell(format!(
                "the role {role} is more than a login (CREATEDB, REPLICATION, ...), and is a mere login there"
            ));
        }
    }
    let known: BTreeSet<&str> = roles.iter().map(|(role, _)| role.as_str()).collect();
    for Membership { member, group, .. } in roles::memberships(site, entry).await? {
        if !known.contains(group.as_str()) {
            found.tell(format!(
                "{member} is a member of {group}, and is not one there: GRANT {group} TO {member} there after the move"
            ));
        }
    }
    let own = {
        let settings = site.plane.file();
        site.plane.server_of(&settings, &entry.server)?.1.role.clone()
    };
    let rows = site.control(&entry.server).await?.query(of::ROLES_IN, &[&entry.database]).await?;
    for row in rows {
        let role: String = row.try_get(0)?;
        let is_ours = role == own || role.starts_with("tenantry-") || known.contains(role.as_str());
        if !is_ours && site.control(&new.server).await?.query_opt(sql::ROLE, &[&role]).await?.is_none() {
            found.refuse(
                format!("the role {role} has rights in the database, and is not at {}", new.server),
                "make it there, or revoke them",
            );
        }
    }
    Ok(())
}

async fn look_inside(
    site: &mut Site,
    found: &mut Findings,
    hand: &Hand,
    entry: &Entry,
    to: &str,
    method: Method,
) -> Result<(), StepError> {
    if let Err(StepError::Refused(why)) = facts::refuse_what_is_lost(site, hand, &entry.database).await {
        found.refuse(why, "");
    }
    let client = hand.connect(site, &entry.database).await?;
    for row in client.query(of::EXTENSIONS, &[]).await? {
        let (name, version): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        match site.control(to).await?.query_opt(of::IS_AVAILABLE, &[&name]).await? {
            None => {
                found
                    .refuse(format!("the extension {name} is not there at {to}"), "install its package on that server");
            }
            Some(row) => {
                let there: Option<String> = row.try_get(0)?;
                if there.as_ref().is_some_and(|there| *there != version) {
                    let there = there.unwrap_or_default();
                    found.tell(format!("the extension {name} is of version {version}, and becomes {there} at {to}"));
                }
            }
        }
    }
    let mut last: Option<(String, Vec<String>, i64)> = None;
    for row in client.query(of::IN_THE_WAY, &[]).await? {
        let (kind, name, count): (String, String, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        match &mut last {
            Some((of, names, _)) if *of == kind => names.push(name),
            _ => {
                if let Some((kind, names, count)) = last.replace((kind, vec![name], count)) {
                    judge(found, method, &kind, names, count);
                }
            }
        }
    }
    if let Some((kind, names, count)) = last {
        judge(found, method, &kind, names, count);
    }
    Ok(())
}

/// What replication or a dump makes of things of this kind.
fn judge(found: &mut Findings, method: Method, kind: &str, mut names: Vec<String>, count: i64) {
    let is_online = method == Method::Online;
    let dump = "use method dump";
    let (refuses, what, advice) = match kind {
        "no_identity" => (
            is_online,
            "tables without a primary key or replica identity, whose UPDATE and DELETE PostgreSQL would refuse while they are replicated",
            "ALTER TABLE ... ADD PRIMARY KEY, or ... REPLICA IDENTITY USING INDEX of a unique index, or ... REPLICA IDENTITY FULL",
        ),
        "unlogged" => {
            (is_online, "unlogged tables, which are not replicated", "ALTER TABLE ... SET LOGGED, or use method dump")
        }
        "large_object" => (is_online, "large objects, which are not replicated", dump),
        "row_security" => (
            true,
            "tables whose rows FORCE ROW LEVEL SECURITY keeps from their owner, too",
            "ALTER TABLE ... NO FORCE ROW LEVEL SECURITY",
        ),
        "replica_trigger" => (
            is_online,
            "triggers that fire for what is replicated (ENABLE ALWAYS or REPLICA), and would act twice",
            dump,
        ),
        "replica_rule" => (is_online, "rules that act on what is replicated (ENABLE ALWAYS or REPLICA)", dump),
        "event_trigger" => (true, "event triggers, which only a superuser can make there", "drop them for the move"),
        "extension_table" => {
            (is_online, "tables of extensions that hold the application's rows, which are not replicated", dump)
        }
        "slot" => (true, "replication slots of others, who would not follow the move", "end that replication first"),
        "subscription" => (true, "subscriptions, which would not follow the move", "drop them first"),
        "prepared_transaction" => (
            true,
            "prepared transactions, which nobody could commit there",
            "COMMIT PREPARED or ROLLBACK PREPARED first",
        ),
        "publication" => (false, "publications, which are not carried over", ""),
        "foreign_table" => (false, "foreign tables: what they lead to must be within reach of the other server", ""),
        "materialized_view" if is_online => {
            (false, "materialized views, which are refreshed there before the move", "")
        }
        "sequence" if is_online => (false, "sequences, which are set there while clients wait", ""),
        _ => return,
    };
    if kind == "sequence" {
        names.clear();
    }
    let more = usize::try_from(count).unwrap_or(usize::MAX).saturating_sub(TOLD);
    names.truncate(TOLD);
    if more > 0 && kind != "sequence" {
        names.push(format!("and {more} more"));
    }
    found.0.push(Finding { refuses, what: format!("{count} {what}"), names, advice: advice.to_owned() });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn able() -> Abilities {
        Abilities {
            version: 160_004,
            wal_level: "logical".to_owned(),
            slots: 5,
            senders: 5,
            workers: 4,
            superuser: false,
            replication: true,
            subscribes: true,
        }
    }

    #[test]
    fn what_a_server_cannot_do_is_told_with_what_would_help() {
        assert_eq!((cannot_send(&able()), cannot_apply(&able())), (None, None));
        let told = |abilities: Abilities| (cannot_send(&abilities), cannot_apply(&abilities));
        let has = |told: Option<String>, word: &str| {
            assert!(told.as_ref().is_some_and(|told| told.contains(word)), "{told:?}")
        };
        has(told(Abilities { wal_level: "replica".to_owned(), ..able() }).0, "logical");
        has(told(Abilities { slots: 1, ..able() }).0, "max_replication_slots");
        has(told(Abilities { senders: 0, ..able() }).0, "max_wal_senders");
        has(told(Abilities { replication: false, ..able() }).0, "REPLICATION");
        has(told(Abilities { version: 150_008, ..able() }).1, "superuser");
        has(told(Abilities { subscribes: false, ..able() }).1, "pg_create_subscription");
        has(told(Abilities { workers: 1, ..able() }).1, "max_logical_replication_workers");
    }

    #[test]
    fn tables_without_identity_refuse_online_and_not_a_dump_and_no_more_than_twenty_are_named() {
        for (method, refuses) in [(Method::Online, true), (Method::Dump, false)] {
            let mut found = Findings::default();
            let names = (0..30).map(|n| format!("public.t{n}")).collect();
            judge(&mut found, method, "no_identity", names, 30);
            assert_eq!(found.refusal().is_some(), refuses);
            let finding = &found.0[0];
            assert_eq!((finding.names.len(), finding.names.last().map(String::as_str)), (21, Some("and 10 more")));
        }
    }
}
