//! Steps of archive and restore: pg_dump into the store, pg_restore out of it, and the proof that both are the same.
//!
//! What always holds: bytes stream through in bounded memory; nothing is dropped before a restore of exactly these bytes was
//! compared with the source, table by table; nothing of a stored file whose checksum does not fit is run; whatever works
//! inside a tenant's database does so as a hand, never as the control role.

use bytes::BytesMut;
use futures_util::StreamExt;
use object_store::WriteMultipart;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tenantry_config::{TenantEvent, TenantState};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    Site, StepError,
    compare::compare,
    database,
    facts::{self, Facts, Right},
    half_made,
    hand::{self, Hand},
    program::{self, Patience, Program, quoted_conninfo},
    progress::{Progress, mib},
    shift,
    store::Place,
};
use crate::{
    catalog::{disk::hex, model::Entry, store::JobRow},
    jobs::work::{Stored, Work},
    sql,
};

/// Of one read, and of one part of an upload.
const CHUNK: usize = 256 << 10;
const PARTS_UNDER_WAY: usize = 4;

/// Before anybody is kept waiting: programs, a store, rights, and nothing in the database that a dump would lose.
pub async fn find_programs(site: &mut Site, job: &JobRow, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let version = site.control(&entry.server).await?.query_one("SHOW server_version_num", &[]).await?;
    let wanted = version.try_get::<_, String>(0)?.parse::<u32>().unwrap_or(0) / 10_000;
    program::check(site, (&entry.server, wanted), (&entry.server, wanted)).await?;
    let place = place(site, job, entry)?;
    site.plane.fuse.burn();
    place.sweep();
    place.probe(site.plane.file().admin.archives_volatile).await?;
    may_grant(site, entry).await?;
    // As it is before the fence changes it, and without the hand that a crash left.
    hand::drop_of(site, entry).await?;
    result["rights"] = json!(facts::note(site, &entry.server, &entry.database).await?.rights);
    let hand = hand::make(site, entry, &[&entry.database]).await?;
    let looked = facts::refuse_what_is_lost(site, &hand, &entry.database).await;
    hand::put_down(site, entry, looked).await
}

pub async fn may_grant(site: &mut Site, entry: &Entry) -> Result<(), StepError> {
    let row = site.control(&entry.server).await?.query_one(sql::MAY_GRANT, &[&entry.owner_role]).await?;
    if row.try_get(0)? {
        return Ok(());
    }
    let settings = site.plane.file();
    let control = &site.plane.server_of(&settings, &entry.server)?.1.role;
    Err(StepError::Refused(format!(
        "the control role cannot work as {owner}: GRANT {owner} TO {control} WITH ADMIN OPTION, once, as a superuser",
        owner = entry.owner_role
    )))
}

/// Of the archive that this job makes.
fn place(site: &Site, job: &JobRow, entry: &Entry) -> Result<Place, StepError> {
    Place::of(&site.plane.file().admin, &database::catalog_id(site), entry.number, job.id)
}

/// Nobody but Tenantry gets in, and nobody is in: what is dumped is all there will be.
pub async fn fence(site: &mut Site, entry: &Entry) -> Result<(), StepError> {
    let settings = site.plane.file();
    let own = site.plane.server_of(&settings, &entry.server)?.1.role.clone();
    let rows = site.control(&entry.server).await?.query(sql::CONNECT_GRANTS, &[&entry.database]).await?;
    let grantees: Vec<String> = rows.iter().map(|row| row.get(0)).filter(|role| *role != own).collect();
    site.execute(&entry.server, &sql::only_control(&entry.database, &grantees)).await?;
    database::quiet_around(site, &entry.server, &entry.database).await
}

fn noted_rights(result: &Value) -> Vec<Right> {
    serde_json::from_value(result["rights"].clone()).unwrap_or_default()
}

pub async fn dump(site: &mut Site, job: &JobRow, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let place = place(site, job, entry)?;
    site.plane.fuse.burn();
    place.sweep();
    let hand = hand::make(site, entry, &[&entry.database]).await?;
    let stored = store_dump(site, job, entry, &hand, &place).await;
    let (bytes, sha256) = hand::put_down(site, entry, stored).await?;
    result["path"] = json!(place.path.to_string());
    result["bytes"] = json!(bytes);
    result["sha256"] = json!(sha256);
    Ok(())
}

/// Size and checksum of what was stored.
async fn store_dump(
    site: &mut Site,
    job: &JobRow,
    entry: &Entry,
    hand: &Hand,
    place: &Place,
) -> Result<(u64, String), StepError> {
    place.prepare()?;
    let upload = place.store.put_multipart(&place.path).await.map_err(cannot_store)?;
    let mut upload = WriteMultipart::new(upload);
    let dumped = run_dump(site, job, entry, hand, &mut upload).await;
    let dumped = match dumped {
        Ok(dumped) => dumped,
        Err(why) => {
            if let Err(error) = upload.abort().await {
                tracing::warn!(%error, "half an archive may be left in the store");
            }
            return Err(why);
        }
    };
    site.plane.fuse.burn();
    upload.finish().await.map_err(cannot_store)?;
    place.settle().await?;
    Ok(dumped)
}

fn cannot_store(error: object_store::Error) -> StepError {
    StepError::Refused(format!("the archive cannot be stored: {error}"))
}

async fn run_dump(
    site: &mut Site,
    job: &JobRow,
    entry: &Entry,
    hand: &Hand,
    upload: &mut WriteMultipart,
) -> Result<(u64, String), StepError> {
    // The format compresses, and pg_restore reads it from a stream.
    let arguments = ["--format=custom", "--lock-wait-timeout=30000"].map(str::to_owned);
    let mut dump = Program::start(site, hand, "pg_dump", &entry.database, &arguments)?;
    let patience = Patience::with(site, hand);
    match copy_out(site, job, &mut dump, &patience, upload).await {
        Ok(copied) => dump.end(site, &patience).await.map(|()| copied),
        // It waits for us to read on, and would for ever.
        Err(why) => {
            dump.kill().await;
            Err(why)
        }
    }
}

async fn copy_out(
    site: &mut Site,
    job: &JobRow,
    dump: &mut Program,
    patience: &Patience,
    upload: &mut WriteMultipart,
) -> Result<(u64, String), StepError> {
    let mut progress = Progress::of(job.id);
    let (mut digest, mut bytes) = (Sha256::new(), 0u64);
    let mut buffer = BytesMut::with_capacity(CHUNK);
    let Some(mut output) = dump.output.take() else { return Err(StepError::Away("pg_dump has no output".to_owned())) };
    loop {
        buffer.clear();
        let read = patience.wait(site, output.read_buf(&mut buffer)).await;
        let read = read.ok_or_else(|| patience.over("pg_dump"))?;
        if read.map_err(|error| StepError::Refused(format!("pg_dump cannot be read: {error}")))? == 0 {
            return Ok((bytes, hex(&digest.finalize())));
        }
        digest.update(&buffer);
        bytes += u64::try_from(buffer.len()).unwrap_or(0);
        let room = patience.wait(site, upload.wait_for_capacity(PARTS_UNDER_WAY)).await;
        room.ok_or_else(|| patience.over("the store"))?.map_err(cannot_store)?;
        upload.write(&buffer);
        progress.tell(site, || format!("dump: {} MiB", mib(bytes))).await;
    }
}

/// The job turns back: what it stored is worth nothing without a proof. A store that is away keeps nobody from serving again.
pub async fn forget_dump(site: &mut Site, job: &JobRow, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    hand::drop_of(site, entry).await?;
    site.plane.fuse.burn();
    let forgotten = match place(site, job, entry) {
        Ok(place) => place.forget().await,
        Err(why) => Err(why),
    };
    if let Err(why) = forgotten {
        tracing::warn!(job = job.id, %why, "what the job stored may still be there");
        if !result["path"].is_null() {
            result["left_in_store"] = result["path"].clone();
        }
    }
    Ok(())
}

pub async fn prove(site: &mut Site, job: &JobRow, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let place = Place::at(&site.plane.file().admin, &text(result, "path"))?;
    let archive = Archive { place, sha256: text(result, "sha256") };
    archive.verify(site, job).await?;
    let scratch = half_made(&database::catalog_id(site), entry.number);
    database::drop_named(site, &entry.server, &scratch).await?;
    let mut noted = facts::note(site, &entry.server, &entry.database).await?;
    noted.rights = noted_rights(result);
    make_empty(site, entry, &scratch, &noted).await?;
    let hand = hand::make(site, entry, &[&entry.database, &scratch]).await?;
    let proved = prove_with(site, job, entry, &hand, &archive, &noted).await;
    let (tables, facts) = hand::put_down(site, entry, proved).await?;
    (result["tables"], result["things"]) = (tables, facts);
    database::drop_named(site, &entry.server, &scratch).await
}

/// What both databases hold: its tables, and its other things by their number.
async fn prove_with(
    site: &mut Site,
    job: &JobRow,
    entry: &Entry,
    hand: &Hand,
    archive: &Archive,
    noted: &Facts,
) -> Result<(Value, Value), StepError> {
    let scratch = half_made(&database::catalog_id(site), entry.number);
    restore(site, job, hand, archive, &scratch).await?;
    facts::apply(site, noted, entry, &scratch).await?;
    let missing = facts::missing(noted, &facts::note(site, &entry.server, &scratch).await?);
    if !missing.is_empty() {
        return Err(StepError::Refused(format!(
            "what is loaded from the archive lacks {}; nothing was dropped",
            missing.join(", ")
        )));
    }
    let same = compare(site, job, hand, &entry.database, &scratch).await?;
    Ok((Value::Object(same.tables), Value::Object(same.things)))
}

/// A database like the one that was noted, where its hand alone gets in.
async fn make_empty(site: &mut Site, entry: &Entry, name: &str, noted: &Facts) -> Result<(), StepError> {
    let statement = if noted.locale.encoding.is_empty() {
        sql::create_database(name, &entry.owner_role)
    } else {
        sql::create_database_like(name, &entry.owner_role, &noted.locale)
    };
    site.execute(&entry.server, &statement).await?;
    site.execute(&entry.server, &sql::revoke_public(name)).await?;
    site.execute(&entry.server, &sql::allow_connections(name, true)).await
}

pub async fn mark_archived(site: &mut Site, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let path = text(result, "path");
    let known = site.plane.catalog.archives(Some(entry.number)).await?;
    let id = match known.iter().find(|archive| archive.path == path) {
        Some(archive) => archive.id,
        None => {
            let mut facts = facts::note(site, &entry.server, &entry.database).await?;
            facts.rights = noted_rights(result);
            facts.things = result["things"].as_object().cloned().unwrap_or_default();
            site.plane.fuse.burn();
            let bytes = result["bytes"].as_i64().unwrap_or(0);
            let (sha256, tables) = (text(result, "sha256"), result["tables"].clone());
            site.plane.catalog.insert_archive(entry.number, &path, bytes, &sha256, (&tables, &json!(facts))).await?
        }
    };
    result["archive"] = json!(id);
    site.change(entry.number, |e| shift(e, TenantEvent::Archive, TenantState::Archived)).await
}

pub async fn load(site: &mut Site, job: &JobRow, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let (Work::Restore { archive } | Work::Create { archive: Some(archive), .. }) = &job.work else { return Ok(()) };
    let Stored { id, path, sha256 } = archive;
    may_grant(site, entry).await?;
    let archive = Archive { place: Place::at(&site.plane.file().admin, path)?, sha256: sha256.clone() };
    archive.verify(site, job).await?;
    let noted = site.plane.catalog.archive_facts(*id).await?.and_then(|facts| serde_json::from_value(facts).ok());
    let noted: Facts = noted.unwrap_or_default();
    // A step that is done again finds what the first time left behind.
    let name = half_made(&database::catalog_id(site), entry.number);
    database::drop_named(site, &entry.server, &name).await?;
    make_empty(site, entry, &name, &noted).await?;
    // It is another one than `make_database` made.
    result["oid"] = json!(database::look(site, &entry.server, &name).await?.map(|database| database.oid));
    let hand = hand::make(site, entry, &[&name]).await?;
    let restored = restore(site, job, &hand, &archive, &name).await;
    hand::put_down(site, entry, restored).await?;
    for role in entry.roles.iter().map(|role| &role.name).chain([&entry.owner_role]) {
        site.execute(&entry.server, &sql::grant_connect(&name, role)).await?;
    }
    facts::apply(site, &noted, entry, &name).await?;
    // Its version table is that of the archive: what was known of the one before is no reason to refuse a file.
    Ok(site.plane.catalog.note_migrations(entry.number, &[]).await?)
}

/// What is in the store, and what it must be.
struct Archive {
    place: Place,
    sha256: String,
}

impl Archive {
    async fn open(&self) -> Result<object_store::GetResult, StepError> {
        let path = &self.place.path;
        self.place.store.get(path).await.map_err(|error| match error {
            object_store::Error::NotFound { .. } => {
                StepError::Refused(format!("the archive {path} is not in the store"))
            }
            error => cannot_read(error),
        })
    }

    fn damaged(&self) -> StepError {
        let path = &self.place.path;
        StepError::Refused(format!("the archive {path} is damaged: its checksum is not the one that was noted"))
    }

    /// Reads it once for its checksum alone: nothing of a damaged or changed file may be run.
    async fn verify(&self, site: &Site, job: &JobRow) -> Result<(), StepError> {
        let mut progress = Progress::of(job.id);
        let stored = self.open().await?;
        let (size, mut read) = (stored.meta.size, 0u64);
        let (mut chunks, mut digest) = (stored.into_stream(), Sha256::new());
        let limit = site.plane.file().admin.archive_stall_timeout;
        loop {
            let chunk = tokio::time::timeout(limit, chunks.next()).await;
            let Some(chunk) = chunk.map_err(|_| StepError::Refused("the store hangs".to_owned()))? else { break };
            let chunk = chunk.map_err(cannot_read)?;
            digest.update(&chunk);
            read += u64::try_from(chunk.len()).unwrap_or(0);
            progress.tell(site, || format!("verify: {} of {} MiB", mib(read), mib(size))).await;
        }
        if hex(&digest.finalize()) == self.sha256 { Ok(()) } else { Err(self.damaged()) }
    }
}

fn cannot_read(error: object_store::Error) -> StepError {
    StepError::Refused(format!("the archive cannot be read: {error}"))
}

async fn restore(site: &mut Site, job: &JobRow, hand: &Hand, archive: &Archive, into: &str) -> Result<(), StepError> {
    site.plane.fuse.burn();
    let arguments =
        ["--no-owner".to_owned(), "--exit-on-error".to_owned(), format!("--dbname={}", quoted_conninfo(into))];
    let mut restore = Program::start(site, hand, "pg_restore", into, &arguments)?;
    let patience = Patience::with(site, hand);
    match copy_in(site, job, archive, &mut restore, &patience).await {
        Ok(()) => restore.end(site, &patience).await,
        Err(why) => {
            restore.kill().await;
            Err(why)
        }
    }
}

/// Feeds it, and looks once more that it is fed what was verified.
async fn copy_in(
    site: &mut Site,
    job: &JobRow,
    archive: &Archive,
    restore: &mut Program,
    patience: &Patience,
) -> Result<(), StepError> {
    let mut progress = Progress::of(job.id);
    let stored = archive.open().await?;
    let (size, mut fed) = (stored.meta.size, 0u64);
    let (mut chunks, mut digest) = (stored.into_stream(), Sha256::new());
    let mut input = restore.input.take();
    loop {
        let chunk = patience.wait(site, chunks.next()).await.ok_or_else(|| patience.over("the store"))?;
        let Some(chunk) = chunk else { break };
        let chunk = chunk.map_err(cannot_read)?;
        digest.update(&chunk);
        if let Some(open) = input.as_mut() {
            let written = patience.wait(site, open.write_all(&chunk)).await;
            // It stops reading when it has failed; its last words tell why.
            if written.ok_or_else(|| patience.over("pg_restore"))?.is_err() {
                input = None;
            }
        }
        fed += u64::try_from(chunk.len()).unwrap_or(0);
        progress.tell(site, || format!("restore: {} of {} MiB", mib(fed), mib(size))).await;
    }
    if hex(&digest.finalize()) == archive.sha256 { Ok(()) } else { Err(archive.damaged()) }
}

fn text(result: &Value, key: &str) -> String {
    result[key].as_str().unwrap_or_default().to_owned()
}
