//! The moment in which a tenant changes its server, from "nearly the same" to "at the other one".
//!
//! What always holds: before the route changes, the database that clients leave is closed in PostgreSQL, nobody is in it, all
//! that was committed there is applied and on the disk at the other place, sequences included, and both were compared; the
//! other one is opened only after the route has changed. Whoever holds up a step of this holds up clients: each wait is
//! short, and ends with everything as it was.

use std::time::Duration;

use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::time::Instant;
use tokio_postgres::Client;

use super::{
    Direction, Pair, Site, StepError,
    replicate::{self, Abilities, position, reached},
    roles::{self, There},
    still::Still,
    still_fits,
};
use crate::{
    catalog::{
        model::{Entry, Kept, Method, Verifier},
        store::JobRow,
    },
    jobs::work::{Compared, Step, Work},
    lifecycle::{
        compare::{self, Depth},
        database,
        facts::{self, Facts, Right},
        hand,
        hand::Hand,
        progress::Progress,
    },
    sql::{self, moves as of},
};

/// A copy that is no further behind than this is taken to be close enough to stop the clients for the rest.
const CLOSE: Duration = Duration::from_millis(300);
/// One look at how far it is behind.
const LOOK: Duration = Duration::from_secs(3);
/// For what was written last to be applied, while clients wait.
pub const LAST: Duration = Duration::from_secs(10);
/// Statements about sequences speak of so many at once.
const SEQUENCES: usize = 200;
/// Compared while clients wait: the smallest tables, of together so many bytes, in full; the next by their rows.
const FAST: Depth = Depth { full: 16 << 20, rows: 64 << 20 };

pub async fn fingerprint(client: &Client) -> Result<String, StepError> {
    Ok(client.query_one(of::FINGERPRINT, &[]).await?.try_get(0)?)
}

/// Until the other place is a moment behind, for as long as it comes nearer at all.
pub async fn catch_up(
    site: &mut Site,
    job: &JobRow,
    entry: &Entry,
    pair: &Pair,
    result: &mut Value,
) -> Result<(), StepError> {
    let direction = pair.away(site, entry);
    if matches!(job.work, Work::Move { .. }) && result["prepared"] != true {
        prepare(site, pair).await?;
        result["prepared"] = json!(true);
        site.note(job, result).await?;
    }
    let stall = site.plane.file().admin.archive_stall_timeout;
    let mut progress = Progress::of(job.id);
    let mut failed = replicate::come(site, &direction).await?.1;
    let mut still = Still::of(site, job, Step::CatchUp, result).await?;
    let instead = if matches!(job.work, Work::MoveBack { .. }) {
        "go back with force (`rollback-move --force`), which leaves behind what was not applied"
    } else {
        "try again when less is written, or use method dump"
    };
    loop {
        let at = position(site, &direction.from.server).await?;
        let asked = Instant::now();
        if reached(site, &direction, &at, LOOK).await? && asked.elapsed() <= CLOSE {
            return still_fits(site, if matches!(job.work, Work::Move { .. }) { &pair.new } else { &pair.old });
        }
        let (come, failures) = replicate::come(site, &direction).await?;
        let mark = (come.0.max(still.mark().0), come.1.max(still.mark().1));
        if mark != still.mark() {
            failed = failures;
        }
        still.at(site, job, mark, result).await?;
        if failures - failed >= replicate::FAILURES {
            return Err(StepError::Refused(format!(
                "something that is written at {} cannot be applied at {}, whose log says what (tables that were changed at one \
                 of them only?): mend that, or {instead}",
                direction.from.server, direction.to.server
            )));
        }
        if still.is_over(stall) {
            return Err(StepError::Refused(format!(
                "the copy at {} has not come nearer for {}, or not near enough in a day: more is written than it can apply, or it \
                 cannot apply something (its log says what); {instead}",
                direction.to.server,
                humantime::format_duration(stall)
            )));
        }
        let behind = asked.elapsed().as_secs_f64();
        progress.tell(site, || format!("catch up: {behind:.1} s behind")).await;
    }
}

/// What would keep clients waiting later: planner statistics, and views that hold rows of their own.
async fn prepare(site: &mut Site, pair: &Pair) -> Result<(), StepError> {
    let Pair { old, new, .. } = pair;
    let source = hand::make(site, old, &[&old.database]).await?;
    let views = async {
        let client = source.connect(site, &old.database).await?;
        let rows = client.query(of::FILLED_VIEWS, &[]).await?;
        rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
    };
    let views: Result<Vec<(String, String)>, StepError> = views.await;
    let views = hand::put_down(site, old, views).await?;
    let target = hand::make(site, new, &[&new.database]).await?;
    let done = async {
        let client = target.log_in(site, &new.database).await?;
        client.batch_execute(&of::work_as(&target.owner)).await?;
        for (schema, view) in &views {
            client.batch_execute(&of::refresh_view(schema, view)).await?;
        }
        Ok(client.batch_execute(of::ANALYZE).await?)
    };
    let done: Result<(), StepError> = done.await;
    hand::put_down(site, new, done).await
}

/// Nobody gets into the database that clients are about to leave but Tenantry, and what carries its last rows away.
pub async fn fence(site: &mut Site, entry: &Entry, pair: &Pair) -> Result<(), StepError> {
    let (here, _) = pair.here_and_there(entry);
    let settings = site.plane.file();
    let own = site.plane.server_of(&settings, &here.server)?.1.role.clone();
    let (forward, back) = (pair.forward(site), pair.back(site));
    let keep = vec![forward.sender.clone(), forward.applier.clone()];
    let rows = site.control(&here.server).await?.query(sql::CONNECT_GRANTS, &[&here.database]).await?;
    let mut shut = Vec::new();
    for row in rows {
        let role: String = row.try_get(0)?;
        if role != own && !keep.contains(&role) {
            shut.push(role);
        }
    }
    site.execute(&here.server, &sql::only_control(&here.database, &shut)).await?;
    let slots = vec![forward.name, back.name];
    database::end_sessions(site, &here.server, of::END_OTHERS, &[&here.database, &keep, &slots]).await?;
    let prepared: i64 =
        site.control(&here.server).await?.query_one(of::PREPARED, &[&here.database]).await?.try_get(0)?;
    if prepared > 0 {
        return Err(StepError::Refused(format!(
            "{prepared} prepared transactions are open, which nobody could commit elsewhere: COMMIT PREPARED or ROLLBACK PREPARED first"
        )));
    }
    Ok(())
}

/// All that was committed is at the other place, and on its disk.
pub async fn await_applied(site: &mut Site, direction: &Direction) -> Result<(), StepError> {
    let at = position(site, &direction.from.server).await?;
    if !reached(site, direction, &at, LAST).await? {
        return Err(StepError::Refused(format!(
            "what was written last did not come to {} within {}",
            direction.to.server,
            humantime::format_duration(LAST)
        )));
    }
    position(site, &direction.to.server).await.map(drop)
}

/// Sequences are set, and the two compared; with clients waiting.
pub async fn verify(
    site: &mut Site,
    job: &JobRow,
    entry: &Entry,
    pair: &Pair,
    result: &mut Value,
) -> Result<(), StepError> {
    let (here, there) = pair.here_and_there(entry);
    let source = hand::make(site, here, &[&here.database]).await?;
    let verified = async {
        let copy = hand::make(site, there, &[&there.database]).await?;
        let done = verify_with(site, job, entry, (&source, &copy), result).await;
        hand::put_down(site, there, done).await
    };
    let verified = verified.await;
    hand::put_down(site, here, verified).await
}

async fn verify_with(
    site: &mut Site,
    job: &JobRow,
    entry: &Entry,
    (source, copy): (&Hand, &Hand),
    result: &mut Value,
) -> Result<(), StepError> {
    let (from, to) = tokio::try_join!(source.connect(site, &entry.database), copy.connect(site, &entry.database))?;
    let (method, depth) = match &job.work {
        Work::Move { method, verify, .. } => (*method, *verify),
        Work::MoveBack { verify, .. } => (Method::Online, *verify),
        _ => return Ok(()),
    };
    if let Some(before) = result["fingerprint"].as_str()
        && fingerprint(&from).await? != before
    {
        let instead = match job.work {
            Work::MoveBack { .. } => "change them back, or go back with force, which leaves that behind",
            _ => "move it when nobody changes them",
        };
        return Err(StepError::Refused(format!(
            "tables, or what belongs to them, were changed meanwhile (a migration?), and the copy does not have that: {instead}"
        )));
    }
    if method == Method::Online {
        let write = copy.log_in(site, &entry.database).await?;
        write.batch_execute(&of::work_as(&copy.owner)).await?;
        carry_sequences(site, &from, &write).await?;
    }
    let depth = match depth {
        Compared::Full => Depth::ALL,
        Compared::Fast => FAST,
    };
    let majors = (Abilities::of(site, &source.server).await?.major(), Abilities::of(site, &copy.server).await?.major());
    let same = compare::between(site, job, &from, &to, &compare::Words::of_move(depth, majors.0 == majors.1)).await?;
    result["tables"] = Value::Object(same.tables);
    result["things"] = Value::Object(same.things);
    result["copy_fingerprint"] = json!(fingerprint(&to).await?);
    Ok(())
}

/// Replication carries none.
pub async fn carry_sequences(site: &Site, from: &Client, to: &Client) -> Result<(), StepError> {
    let mut all = Vec::new();
    for row in from.query(sql::SEQUENCES, &[]).await? {
        all.push((row.try_get::<_, String>(0)?, row.try_get::<_, String>(1)?));
    }
    for some in all.chunks(SEQUENCES) {
        let mut found = Vec::new();
        for row in from.query(&of::read_sequences(some), &[]).await? {
            found.push((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?));
        }
        site.plane.fuse.burn();
        to.batch_execute(&of::set_sequences(&found)).await?;
    }
    Ok(())
}

/// A copy that follows nobody is closed to everybody, superusers too; what one of them wrote in the last moment is carried over.
pub async fn seal(site: &mut Site, job: &JobRow, entry: &Entry, pair: &Pair, result: &Value) -> Result<(), StepError> {
    if result["follows"] == true {
        return last_look(site, entry, pair).await;
    }
    if pair.lost.is_some() {
        return Ok(());
    }
    let (here, _) = pair.here_and_there(entry);
    let direction = pair.away(site, entry);
    site.execute(&here.server, &sql::allow_connections(&here.database, false)).await?;
    let (keep, slots) = (Vec::<String>::new(), vec![direction.name.clone()]);
    database::end_sessions(site, &here.server, of::END_OTHERS, &[&here.database, &keep, &slots]).await?;
    match &job.work {
        Work::Move { method: Method::Online, .. } => await_applied(site, &direction).await,
        _ => Ok(()),
    }
}

/// Where a superuser may still come in, since it sends or follows: whoever did is ended, and what he wrote is carried over.
async fn last_look(site: &mut Site, entry: &Entry, pair: &Pair) -> Result<(), StepError> {
    let (here, _) = pair.here_and_there(entry);
    let (forward, back) = (pair.forward(site), pair.back(site));
    let (keep, slots) = (vec![forward.sender.clone(), forward.applier.clone()], vec![forward.name, back.name]);
    database::end_sessions(site, &here.server, of::END_OTHERS, &[&here.database, &keep, &slots]).await?;
    await_applied(site, &pair.away(site, entry)).await
}

fn acl(result: &Value, key: &str) -> Vec<(String, bool)> {
    serde_json::from_value(result[key].clone()).unwrap_or_default()
}

/// From here on there is only the way forward.
pub async fn switch(
    site: &mut Site,
    job: &JobRow,
    entry: &Entry,
    pair: &Pair,
    result: &Value,
) -> Result<(), StepError> {
    let is_move = matches!(job.work, Work::Move { .. });
    let (leave, enter) = if is_move { (&pair.old, &pair.new) } else { (&pair.new, &pair.old) };
    // A move does so when it seals; and once the route has changed there is nobody to look for.
    if matches!(job.work, Work::MoveBack { follows: true, .. }) && entry.server == leave.server {
        last_look(site, entry, pair).await?;
    }
    let number = |oid: &Value| oid.as_u64().and_then(|oid| u32::try_from(oid).ok());
    let copy = entry.kept.as_ref().map(|kept| kept.oid);
    let known = entry.kept.as_ref().map_or(0, |kept| kept.live_oid);
    let method = entry.kept.as_ref().map_or_else(|| super::method_of(job), |kept| kept.method);
    let kept = Kept {
        server: leave.server.clone(),
        database: leave.database.clone(),
        oid: if pair.lost.is_some() { known } else { number(&result["oid"]).unwrap_or(0) },
        method,
        follows: is_move && result["follows"] == true,
        acl: acl(result, "acl"),
        fingerprint: result["copy_fingerprint"].as_str().unwrap_or_default().to_owned(),
        since: OffsetDateTime::now_utc(),
        live_oid: if is_move { number(&result["copy_oid"]) } else { copy }.unwrap_or(0),
        is_open: pair.lost.is_some(),
        ended: None,
        is_dear: false,
    };
    let to = enter.server.clone();
    site.change(entry.number, |e| {
        if e.server != to {
            e.server = to;
            e.kept = Some(kept);
        }
        Ok(())
    })
    .await
}

/// The tenant's roles may connect to where it is now.
pub async fn open(site: &mut Site, job: &JobRow, entry: &Entry, pair: &Pair, result: &Value) -> Result<(), StepError> {
    if matches!(job.work, Work::Move { .. }) {
        let noted: Vec<Right> = serde_json::from_value(result["rights"].clone()).unwrap_or_default();
        let mut rights = Vec::new();
        for right in noted {
            // Whoever was dropped there meanwhile needs none, and there is no way back from here.
            let is_there = match &right.role {
                Some(role) => has_role(site, &pair.new, role).await?,
                None => true,
            };
            if is_there {
                rights.push(right);
            }
        }
        for (role, verifier) in roles::of_tenant(&pair.new) {
            // Another tenant that has the role, too, may have been given a new password for it meanwhile.
            if let (Some(Verifier(verifier)), There::Ours) =
                (&verifier, roles::look(site, &pair.new, &role, verifier.as_ref()).await?)
            {
                site.execute(&pair.new.server, &sql::set_password(&role, verifier)).await?;
            }
            site.execute(&pair.new.server, &sql::grant_connect(&pair.new.database, &role)).await?;
        }
        let facts = Facts { owner: pair.new.owner_role.clone(), rights, ..Facts::default() };
        return facts::apply(site, &facts, &pair.new, &pair.new.database).await;
    }
    let old = &pair.old;
    // A password that was changed since is known there, too.
    for row in entry.roles.iter().filter(|row| row.ours) {
        if let (Some(Verifier(verifier)), true) = (&row.verifier, has_role(site, old, &row.name).await?) {
            site.execute(&old.server, &sql::set_password(&row.name, verifier)).await?;
        }
    }
    database::unfence(site, &old.server, &old.database).await?;
    let mut wanted = Vec::new();
    for (role, may_grant) in acl(result, "kept_acl") {
        // Whoever was dropped there meanwhile needs nothing; there is no way back from here.
        if role == "-" || has_role(site, old, &role).await? {
            wanted.push((role, may_grant));
        }
    }
    site.execute(&old.server, &sql::give_connect(&old.database, &wanted, &[])).await
}

pub async fn has_role(site: &mut Site, place: &Entry, role: &str) -> Result<bool, StepError> {
    Ok(site.control(&place.server).await?.query_opt(sql::ROLE, &[&role]).await?.is_some())
}
