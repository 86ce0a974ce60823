//! Steps of an import: the rows of an SQLite file into a tenant's tables, all of them or none.
//!
//! What always holds: everything happens in one transaction of a hand's; clients see nothing of it until it is committed, and it
//! is committed only after counts, checksums and foreign keys were found to be right; before the commit the job knows the
//! number of the transaction, so that after a crash PostgreSQL is asked what became of it and nothing is loaded twice; the
//! values of a tenant's rows are in the job's result, never in the log.

mod load;
mod target;
mod verify;

use std::{collections::BTreeSet, path::PathBuf};

use serde_json::{Value, json};
use tokio_postgres::{Client, error::SqlState};

use self::load::Load;
use super::{
    Site, StepError,
    hand::{self, Hand},
};
use crate::{
    catalog::{
        model::Entry,
        store::{JobRow, MOST_OPEN_JOBS},
    },
    import::{
        file::{File, Hold, Leash},
        plan::{self, OF_DJANGO, SourceTable},
        problems::Problems,
        spool,
    },
    jobs::work::{COMMITTING, Work},
    plane::ControlPlane,
    sql::import as sql,
};

/// Work on the file, which blocks.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, StepError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| StepError::Away("reading the file failed; the log says why".to_owned()))
}

/// Away with uploads of which no job knows: those that a crash left.
pub async fn sweep_uploads(plane: &ControlPlane) {
    let dir = plane.file().admin.imports_dir.clone();
    let Ok(left) = aside(move || spool::left(&dir)).await else { return };
    if left.is_empty() {
        return;
    }
    match plane.catalog.open_jobs().await {
        Ok((jobs, unreadable)) if unreadable.is_empty() && jobs.len() < MOST_OPEN_JOBS => {
            spool::sweep(&left, jobs.iter().map(|job| &job.work));
        }
        _ => {}
    }
}

fn path(site: &Site, file: &str) -> PathBuf {
    spool::place(&site.plane.file().admin.imports_dir, file)
}

/// The file is here, and the one that was uploaded.
pub async fn check(site: &Site, file: &str, sha256: &str) -> Result<(), StepError> {
    sweep_uploads(&site.plane).await;
    let (path, sha256) = (path(site, file), sha256.to_owned());
    aside(move || spool::verify(&path, &sha256)).await?.map_err(StepError::Refused)
}

/// Filled and committed, once.
pub async fn fill(site: &mut Site, job: &JobRow, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    // With its sessions, so that what became of the transaction does not change any more.
    hand::drop_of(site, entry).await?;
    if let Some(number) = result[COMMITTING].as_str().map(str::to_owned) {
        match is_committed(site, entry, &number).await {
            Ok(true) => return Ok(()),
            Ok(false) => forget_note(result),
            // It is told as failed, in these words.
            Err(StepError::Refused(why)) => {
                forget_note(result);
                return Err(StepError::Refused(why));
            }
            Err(error) => return Err(error),
        }
        site.note(job, result).await?;
    }
    as_hand(site, job, entry, result, true).await
}

/// The same, and rolled back.
pub async fn rehearse(site: &mut Site, job: &JobRow, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    as_hand(site, job, entry, result, false).await
}

fn forget_note(result: &mut Value) {
    if let Some(result) = result.as_object_mut() {
        result.remove(COMMITTING);
    }
}

async fn is_committed(site: &mut Site, entry: &Entry, number: &str) -> Result<bool, StepError> {
    let row = match site.control(&entry.server).await?.query_one(sql::BECAME, &[&number]).await {
        Ok(row) => row,
        // Of a transaction that is yet to come: it is another server, or an older state of this one.
        Err(error) if error.code() == Some(&SqlState::INVALID_PARAMETER_VALUE) => return Err(is_unknown(number)),
        Err(error) => return Err(error.into()),
    };
    match row.try_get::<_, Option<String>>(0)?.as_deref() {
        Some("committed") => Ok(true),
        Some("aborted") => Ok(false),
        Some(_) => Err(StepError::Away("the import's transaction is not over yet".to_owned())),
        None => Err(is_unknown(number)),
    }
}

/// There is nobody else to ask.
fn is_unknown(number: &str) -> StepError {
    StepError::Refused(format!(
        "PostgreSQL does not know any more whether transaction {number} was committed: the rows are all there, or none is; \
         look at the tenant's tables before the file is imported again"
    ))
}

async fn as_hand(
    site: &mut Site,
    job: &JobRow,
    entry: &Entry,
    result: &mut Value,
    keep: bool,
) -> Result<(), StepError> {
    let hand = hand::make(site, entry, &[&entry.database]).await?;
    let done = match hand::set_as_owner(site, entry, &hand.role).await {
        Ok(()) => run(site, job, entry, &hand, result, keep).await,
        Err(error) => Err(error),
    };
    hand::put_down(site, entry, done).await
}

/// The whole of it.
async fn run(
    site: &Site,
    job: &JobRow,
    entry: &Entry,
    hand: &Hand,
    result: &mut Value,
    keep: bool,
) -> Result<(), StepError> {
    let Work::Import { file, replace, .. } = &job.work else { return Ok(()) };
    let path = path(site, file);
    // Dropped with us, also where the job is cancelled: no thread works on.
    let leash = Leash::new(site.plane.file().admin.import_timeout);
    let (hold, of_file) = (leash.hold(), leash.hold());
    let opened = aside(move || {
        let (file, mut problems) = (File::open(&path, of_file)?, Problems::default());
        let tables = file.tables(&mut problems)?;
        Ok::<_, String>((file, tables, problems))
    });
    let opened = opened.await?;
    in_time(site, &hold)?;
    let (file, source, problems) = opened.map_err(StepError::Refused)?;
    let client = hand.connect(site, &entry.database).await?;
    site.plane.fuse.burn();
    let done = load(site, job, client, (file, hold), (source, problems, replace), result, keep).await;
    done.map_err(StepError::in_the_middle)
}

/// What was read before the deadline counts.
fn in_time(site: &Site, hold: &Hold) -> Result<(), StepError> {
    if !hold.is_late() {
        return Ok(());
    }
    let limit = humantime::format_duration(site.plane.file().admin.import_timeout);
    Err(StepError::Refused(format!("the file is not read to its end after {limit} (admin.import_timeout)")))
}

/// In one transaction, which is committed if it is to be kept.
async fn load(
    site: &Site,
    job: &JobRow,
    client: Client,
    file: (File, Hold),
    (source, mut problems, replace): (Vec<SourceTable>, Problems, &[String]),
    result: &mut Value,
    keep: bool,
) -> Result<(), StepError> {
    client.batch_execute(sql::BEGIN).await?;
    target::suits(&client).await?;
    let target = target::read(&client).await?;
    let replaced: BTreeSet<String> =
        OF_DJANGO.iter().map(|name| (*name).to_owned()).chain(replace.iter().cloned()).collect();
    let plan = plan::plan(&source, &target, &replaced, &mut problems);
    if plan.tables.is_empty() && problems.total() == 0 {
        return Err(StepError::Refused(
            "the file has no table that the tenant has, too; migrate the tenant first".to_owned(),
        ));
    }
    let mut load = Load::new(client, file, plan, problems);
    load.prepare(site).await?;
    load.fill(site, job).await?;
    load.tell_losses(result);
    load.refuse_problems(result)?;
    load.check_keys(result).await?;
    load.verify(result).await?;
    load.finish(result).await?;
    if keep { commit(site, job, &load, result).await } else { Ok(load.client.batch_execute(sql::ROLLBACK).await?) }
}

async fn commit(site: &Site, job: &JobRow, load: &Load, result: &mut Value) -> Result<(), StepError> {
    let number: String = load.client.query_one(sql::TRANSACTION, &[]).await?.try_get(0)?;
    result[COMMITTING] = json!(number);
    site.note(job, result).await?;
    site.plane.fuse.burn();
    match load.client.batch_execute(sql::COMMIT).await {
        Ok(()) => {}
        // PostgreSQL's own word: it is rolled back.
        Err(error) if error.as_db_error().is_some() && !error.is_closed() => {
            forget_note(result);
            return Err(error.into());
        }
        Err(error) => return Err(error.into()),
    }
    site.plane.fuse.burn();
    Ok(())
}

/// So that the first queries are planned well. It can be done again by anybody: a failure is none of the import.
pub async fn analyze(site: &mut Site, job: &JobRow, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let filled: Vec<(String, String)> = serde_json::from_value(result["filled"].clone()).unwrap_or_default();
    let hand = hand::make(site, entry, &[&entry.database]).await?;
    let done = async {
        let client = hand.connect(site, &entry.database).await?;
        client.batch_execute(sql::MAY_WRITE).await?;
        for (schema, name) in &filled {
            client.batch_execute(&sql::analyze(schema, name)).await?;
        }
        Ok::<_, StepError>(())
    };
    if let Err(error) = done.await {
        tracing::warn!(job = job.id, %error, "what was imported is not analyzed; autovacuum will, or ANALYZE does");
    }
    if let Some(result) = result.as_object_mut() {
        result.remove("filled");
        result.remove(COMMITTING);
    }
    hand::put_down(site, entry, Ok(())).await
}

pub async fn forget_file(site: &mut Site, job: &JobRow, entry: &Entry) -> Result<(), StepError> {
    hand::drop_of(site, entry).await?;
    let Work::Import { file, .. } = &job.work else { return Ok(()) };
    site.plane.fuse.burn();
    spool::remove(&path(site, file));
    Ok(())
}
