//! The copy at the other server: an empty database that is closed, then its tables, and (of a dump) its rows.
//!
//! What always holds: the database is made under a name that is no tenant's, noted by its number, and only then gets its own:
//! what a crash left is found by that number, and nobody else's database is ever dropped. It is closed to the tenant's own
//! roles from the first moment to the last step. It has its own name early since a subscription holds the name of the
//! database at the other end, and since a rename would have to wait until nobody is in it.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{Pair, Site, StepError, cutover, method_of, replicate};
use crate::{
    catalog::{
        model::{Entry, Method},
        store::{JobRow, MOST_OPEN_JOBS},
    },
    jobs::work::Work,
    lifecycle::{
        database,
        facts::{self, Facts},
        half_made,
        hand::{self, Hand},
        program::{Patience, Program, feed, quoted_conninfo},
        progress::{Progress, mib},
    },
    plane::ControlPlane,
    sql::{self, moves as of},
};

pub async fn make(site: &mut Site, job: &JobRow, pair: &Pair, result: &mut Value) -> Result<(), StepError> {
    let Pair { old, new, .. } = pair;
    let (name, temporary) = (&new.database, half_made(&database::catalog_id(site), new.number));
    let noted = copy_oid(result);
    if let Some(found) = database::look(site, &new.server, name).await? {
        return if Some(found.oid) == noted {
            database::unfence(site, &new.server, name).await
        } else {
            Err(StepError::Refused(format!("there is a database {name} at {} already", new.server)))
        };
    }
    let facts = Facts { rights: Vec::new(), ..facts::note(site, &old.server, &old.database).await? };
    database::drop_named(site, &new.server, &temporary).await?;
    site.execute(&new.server, &sql::create_database_like(&temporary, &new.owner_role, &facts.locale)).await?;
    site.execute(&new.server, &sql::revoke_public(&temporary)).await?;
    // Its owner is the tenant.
    site.execute(&new.server, &sql::only_control(&temporary, std::slice::from_ref(&new.owner_role))).await?;
    facts::apply(site, &facts, new, &temporary).await?;
    let made = database::look(site, &new.server, &temporary).await?;
    result["copy_oid"] = json!(made.map(|database| database.oid));
    site.note(job, result).await?;
    site.execute(&new.server, &sql::rename_database(&temporary, name)).await?;
    site.execute(&new.server, &sql::allow_connections(name, true)).await
}

fn copy_oid(result: &Value) -> Option<u32> {
    result["copy_oid"].as_u64().and_then(|oid| u32::try_from(oid).ok())
}

/// What an earlier try left in it is dropped with it.
async fn make_empty(site: &mut Site, job: &JobRow, pair: &Pair, result: &mut Value) -> Result<(), StepError> {
    if result["filled"] == true {
        drop_database(site, pair, result).await?;
        make(site, job, pair, result).await?;
    }
    result["filled"] = json!(true);
    site.note(job, result).await
}

/// Tables, indexes, functions, rights...; no rows.
pub async fn schema(site: &mut Site, job: &JobRow, pair: &Pair, result: &mut Value) -> Result<(), StepError> {
    make_empty(site, job, pair, result).await?;
    let Pair { old, new, .. } = pair;
    let source = hand::make(site, old, &[&old.database]).await?;
    let copied = async {
        let client = source.connect(site, &old.database).await?;
        result["fingerprint"] = json!(cutover::fingerprint(&client).await?);
        let target = hand::make(site, new, &[&new.database]).await?;
        let piped = pipe(site, pair, &source, &target).await;
        hand::put_down(site, new, piped).await
    };
    let copied = copied.await;
    hand::put_down(site, old, copied).await
}

async fn pipe(site: &mut Site, pair: &Pair, source: &Hand, target: &Hand) -> Result<(), StepError> {
    site.plane.fuse.burn();
    let arguments =
        ["--schema-only", "--format=custom", "--lock-wait-timeout=30000", "--no-publications", "--no-subscriptions"];
    let mut dump = Program::start(site, source, "pg_dump", &pair.old.database, &arguments.map(str::to_owned))?;
    let arguments = ["--no-owner".to_owned(), "--exit-on-error".to_owned(), into(&pair.new.database)];
    let mut restore = Program::start(site, target, "pg_restore", &pair.new.database, &arguments)?;
    let patience = Patience::with(site, source);
    let fed = feed(site, &mut dump, &mut restore, &patience).await;
    let dumped = match fed {
        Ok(()) => dump.end(site, &patience).await,
        Err(why) => {
            dump.kill().await;
            Err(why)
        }
    };
    let patience = Patience::with(site, target);
    match dumped {
        Ok(()) => restore.end(site, &patience).await,
        Err(why) => {
            restore.kill().await;
            Err(why)
        }
    }
}

fn into(database: &str) -> String {
    format!("--dbname={}", quoted_conninfo(database))
}

/// In `admin.state_dir`.
const SPOOLS: &str = "moves";

/// Where the files of a dump are until they are loaded.
fn spool(site: &Site, job: &JobRow) -> PathBuf {
    site.plane.file().admin.state_dir.join(SPOOLS).join(job.id.to_string())
}

/// Away with the files of dumps that no job needs any more: a process that lost the jobs to another left them where it was.
pub async fn sweep_spools(plane: &ControlPlane) {
    let dir = plane.file().admin.state_dir.join(SPOOLS);
    let left: Vec<PathBuf> = std::fs::read_dir(&dir).into_iter().flatten().flatten().map(|file| file.path()).collect();
    if left.is_empty() {
        return;
    }
    let open = match plane.catalog.open_jobs().await {
        Ok((jobs, unreadable)) if unreadable.is_empty() && jobs.len() < MOST_OPEN_JOBS => jobs,
        _ => return,
    };
    let is_needed = |path: &PathBuf| {
        let name = path.file_name().and_then(std::ffi::OsStr::to_str);
        name.is_none_or(|name| open.iter().any(|job| job.id.to_string() == name))
    };
    let over: Vec<PathBuf> = left.into_iter().filter(|path| !is_needed(path)).collect();
    let removed =
        tokio::task::spawn_blocking(move || over.iter().try_for_each(std::fs::remove_dir_all).map(|()| over.len()));
    match removed.await {
        Ok(Ok(0)) | Err(_) => {}
        Ok(Ok(count)) => tracing::info!(count, "files of dumps that nobody needed were removed"),
        Ok(Err(error)) => tracing::warn!(%error, "files of a dump that nobody needs cannot be removed"),
    }
}

fn forget_spool(site: &Site, job: &JobRow) -> Result<(), StepError> {
    site.plane.fuse.burn();
    match std::fs::remove_dir_all(spool(site, job)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(StepError::Away(format!("the files of a dump cannot be removed: {error}")))
        }
        _ => Ok(()),
    }
}

fn make_spool(site: &Site, job: &JobRow) -> Result<PathBuf, StepError> {
    use std::os::unix::fs::DirBuilderExt as _;
    forget_spool(site, job)?;
    let dir = spool(site, job);
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
    made.map_err(|error| StepError::Refused(format!("admin.state_dir takes no dump: {error}")))?;
    Ok(dir)
}

/// All of it, while nobody writes.
pub async fn data(site: &mut Site, job: &JobRow, pair: &Pair, result: &mut Value) -> Result<(), StepError> {
    make_empty(site, job, pair, result).await?;
    let dir = make_spool(site, job)?;
    let done = dump_and_load(site, job, pair, &dir.join("dump")).await;
    forget_spool(site, job)?;
    done
}

async fn dump_and_load(site: &mut Site, job: &JobRow, pair: &Pair, dir: &std::path::Path) -> Result<(), StepError> {
    let Work::Move { streams, .. } = &job.work else { return Ok(()) };
    let Pair { old, new, .. } = pair;
    let jobs = format!("--jobs={streams}");
    let place = dir.display().to_string();
    let source = hand::make(site, old, &[&old.database]).await?;
    let arguments = [
        "--format=directory".to_owned(),
        format!("--file={place}"),
        jobs.clone(),
        "--lock-wait-timeout=30000".to_owned(),
        "--no-publications".to_owned(),
        "--no-subscriptions".to_owned(),
    ];
    let dumped = run(site, job, &source, ("pg_dump", &old.database), &arguments, dir).await;
    hand::put_down(site, old, dumped).await?;
    let target = hand::make(site, new, &[&new.database]).await?;
    let arguments = ["--no-owner".to_owned(), "--exit-on-error".to_owned(), jobs, into(&new.database), place];
    let loaded = run(site, job, &target, ("pg_restore", &new.database), &arguments, dir).await;
    hand::put_down(site, new, loaded).await
}

/// One of the two, to its end.
async fn run(
    site: &mut Site,
    job: &JobRow,
    hand: &Hand,
    (name, database): (&'static str, &str),
    arguments: &[String],
    dir: &std::path::Path,
) -> Result<(), StepError> {
    site.plane.fuse.burn();
    let mut progress = Progress::of(job.id);
    progress.tell(site, || format!("{name}: {} MiB so far", mib(size_of(dir)))).await;
    let program = Program::start(site, hand, name, database, arguments)?;
    let patience = Patience::with(site, hand);
    program.end(site, &patience).await
}

fn size_of(dir: &std::path::Path) -> u64 {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter_map(|file| Some(file.metadata().ok()?.len())).sum()
}

/// So that its queries are planned as they were.
pub async fn analyze(site: &mut Site, new: &Entry) -> Result<(), StepError> {
    let hand = hand::make(site, new, &[&new.database]).await?;
    let done = async {
        let client = hand.log_in(site, &new.database).await?;
        client.batch_execute(&of::work_as(&hand.owner)).await?;
        site.plane.fuse.burn();
        Ok(client.batch_execute(of::ANALYZE).await?)
    };
    let done = done.await;
    hand::put_down(site, new, done).await
}

async fn drop_database(site: &mut Site, pair: &Pair, result: &Value) -> Result<(), StepError> {
    let Pair { new, .. } = pair;
    let temporary = half_made(&database::catalog_id(site), new.number);
    database::drop_named(site, &new.server, &temporary).await?;
    match database::look(site, &new.server, &new.database).await? {
        Some(found) if Some(found.oid) == copy_oid(result) => {
            database::drop_named(site, &new.server, &new.database).await
        }
        _ => Ok(()),
    }
}

/// The way back: all that was made for the copy.
pub async fn drop(site: &mut Site, job: &JobRow, pair: &Pair, result: &Value) -> Result<(), StepError> {
    if method_of(job) == Method::Dump {
        forget_spool(site, job)?;
    }
    let there = hand::drop_of(site, &pair.old).await;
    if !replicate::is_known(site, &pair.new) {
        return there;
    }
    hand::drop_of(site, &pair.new).await?;
    drop_database(site, pair, result).await?;
    there
}
