//! Steps of archive and restore: pg_dump into the store, pg_restore out of it, and the proof that both are the same.
//!
//! What always holds: bytes stream through in bounded memory; nothing is dropped before a restore of exactly these bytes was
//! compared with the source, table by table; a stored file whose checksum does not fit ends in nothing but an error.

use std::{process::Stdio, time::Duration};

use bytes::BytesMut;
use futures_util::StreamExt;
use object_store::{ObjectStore, WriteMultipart, path::Path};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tenantry_config::{RoleSecret, ServerTlsMode, TenantEvent, TenantState};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
    time::timeout,
};
use tokio_postgres::Client;

use super::{Site, StepError, database, half_made, shift, store};
use crate::{
    catalog::{disk::hex, model::Entry, store::JobRow},
    jobs::work::Work,
    sql,
};

/// Of one read, and of one part of an upload.
const CHUNK: usize = 256 << 10;
const PARTS_UNDER_WAY: usize = 4;
/// pg_dump or pg_restore that moves nothing for this long hangs.
/// For `--version`.
const PROGRAM_START: Duration = Duration::from_secs(10);
const STALL: Duration = Duration::from_secs(15 * 60);
/// What one of them has to say at its end, at most.
const LAST_WORDS: usize = 2_000;

/// Before anybody is kept waiting: the programs, of the server's version or a newer one.
pub async fn find_programs(site: &mut Site, entry: &Entry) -> Result<(), StepError> {
    let version = site.control(&entry.server).await?.query_one("SHOW server_version_num", &[]).await?;
    let wanted = version.try_get::<_, String>(0)?.parse::<u32>().unwrap_or(0) / 10_000;
    for name in ["pg_dump", "pg_restore"] {
        let mut command = program(site, &entry.server, name, "")?;
        let output = timeout(PROGRAM_START, command.arg("--version").output()).await;
        let output = output.map_err(|_| StepError::Refused(format!("{name} hangs")))?.map_err(cannot_run)?;
        // "pg_dump (PostgreSQL) 16.14"
        let text = String::from_utf8_lossy(&output.stdout);
        let words = text.split_once("(PostgreSQL) ").map(|(_, rest)| rest);
        let major = words.and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u32>().ok());
        if major.is_none_or(|major| major < wanted) {
            return Err(StepError::Refused(format!(
                "{name} is of version {}, and the server of {wanted}: install newer client programs, or set admin.postgres_bin",
                major.map_or_else(|| "unknown".to_owned(), |major| major.to_string())
            )));
        }
    }
    Ok(())
}

/// Nobody but Tenantry gets in, and nobody is in: what is dumped is all there will be.
pub async fn fence(site: &mut Site, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let settings = site.plane.file();
    let own = site.plane.server_of(&settings, &entry.server)?.1.role.clone();
    let rows = site.control(&entry.server).await?.query(sql::CONNECT_GRANTS, &[&entry.database]).await?;
    let grantees: Vec<String> = rows.iter().map(|row| row.get(0)).filter(|role| *role != own).collect();
    if result["connect"].is_null() {
        result["connect"] = json!(grantees);
    }
    site.execute(&entry.server, &sql::only_control(&entry.database, &grantees)).await?;
    database::quiet_around(site, &entry.server, &entry.database).await
}

pub async fn dump(site: &mut Site, job: &JobRow, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let (store, prefix) = store::open(&site.plane.file().admin.archives)?;
    let path = store::place(&prefix, &database::catalog_id(site), entry.number, job.id);
    site.plane.fuse.burn();
    store::sweep(&site.plane.file().admin.archives, &path);
    // The format compresses, and pg_restore reads it from a stream.
    let mut dump = program(site, &entry.server, "pg_dump", &entry.database)?;
    dump.args(["--format=custom", "--no-password"]);
    let mut child =
        dump.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(cannot_run)?;
    let (mut output, words) = (child.stdout.take(), listen(&mut child));
    let upload = store.put_multipart(&path).await.map_err(|error| StepError::Away(error.to_string()))?;
    let mut upload = WriteMultipart::new(upload);
    let (mut digest, mut bytes) = (Sha256::new(), 0u64);
    let copied = async {
        let Some(output) = output.as_mut() else { return Ok(()) };
        let mut buffer = BytesMut::with_capacity(CHUNK);
        loop {
            buffer.clear();
            let read = timeout(STALL, output.read_buf(&mut buffer)).await.map_err(|_| "pg_dump hangs".to_owned())?;
            if read.map_err(|error| error.to_string())? == 0 {
                return Ok::<(), String>(());
            }
            digest.update(&buffer);
            bytes += u64::try_from(buffer.len()).unwrap_or(0);
            upload.wait_for_capacity(PARTS_UNDER_WAY).await.map_err(|error| error.to_string())?;
            upload.write(&buffer);
        }
    };
    let copied = copied.await;
    let ended = end(child, words, "pg_dump").await;
    if let Err(why) = copied.map_err(StepError::Refused).and(ended) {
        let _ = upload.abort().await;
        return Err(why);
    }
    site.plane.fuse.burn();
    upload.finish().await.map_err(|error| StepError::Refused(format!("the archive cannot be stored: {error}")))?;
    result["path"] = json!(path.to_string());
    result["bytes"] = json!(bytes);
    result["sha256"] = json!(hex(&digest.finalize()));
    Ok(())
}

/// The job turns back: what it stored is worth nothing without a proof.
pub async fn forget_dump(site: &mut Site, job: &JobRow, entry: &Entry) -> Result<(), StepError> {
    let (store, prefix) = store::open(&site.plane.file().admin.archives)?;
    let path = store::place(&prefix, &database::catalog_id(site), entry.number, job.id);
    site.plane.fuse.burn();
    store::sweep(&site.plane.file().admin.archives, &path);
    match store.delete(&path).await {
        Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(StepError::Away(error.to_string())),
    }
}

pub async fn prove(site: &mut Site, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let scratch = half_made(&database::catalog_id(site), entry.number);
    database::drop_named(site, &entry.server, &scratch).await?;
    site.execute(&entry.server, &sql::create_database(&scratch, &entry.owner_role)).await?;
    let own = {
        let settings = site.plane.file();
        site.plane.server_of(&settings, &entry.server)?.1.role.clone()
    };
    site.execute(&entry.server, &sql::revoke_public(&scratch)).await?;
    site.execute(&entry.server, &sql::grant_connect(&scratch, &own)).await?;
    site.execute(&entry.server, &sql::allow_connections(&scratch, true)).await?;
    let (path, sha256) = (text(result, "path"), text(result, "sha256"));
    restore(site, entry, &scratch, &path, &sha256).await?;
    let source = contents(&site.connect(&entry.server, &entry.database).await?).await?;
    let copy = contents(&site.connect(&entry.server, &scratch).await?).await?;
    if source != copy {
        let wrong: Vec<_> = source.keys().chain(copy.keys()).filter(|key| source.get(*key) != copy.get(*key)).collect();
        return Err(StepError::Refused(format!(
            "the archive differs from the database in {wrong:?}; nothing was dropped"
        )));
    }
    result["tables"] = Value::Object(source);
    database::drop_named(site, &entry.server, &scratch).await
}

pub async fn mark_archived(site: &Site, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let path = text(result, "path");
    let known = site.plane.catalog.archives(Some(entry.number)).await?;
    let id = match known.iter().find(|archive| archive.path == path) {
        Some(archive) => archive.id,
        None => {
            site.plane.fuse.burn();
            let bytes = result["bytes"].as_i64().unwrap_or(0);
            let (sha256, tables) = (text(result, "sha256"), result["tables"].clone());
            site.plane.catalog.insert_archive(entry.number, &path, bytes, &sha256, &tables).await?
        }
    };
    result["archive"] = json!(id);
    site.change(entry.number, |e| shift(e, TenantEvent::Archive, TenantState::Archived)).await
}

pub async fn load(site: &mut Site, job: &JobRow, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let (Work::Restore { archive } | Work::Create { archive: Some(archive), .. }) = &job.work else { return Ok(()) };
    // A step that is done again finds what the first time left behind.
    let name = half_made(&database::catalog_id(site), entry.number);
    database::drop_named(site, &entry.server, &name).await?;
    site.execute(&entry.server, &sql::create_database(&name, &entry.owner_role)).await?;
    // It is another one than `make_database` made.
    result["oid"] = json!(database::look(site, &entry.server, &name).await?.map(|database| database.oid));
    site.execute(&entry.server, &sql::revoke_public(&name)).await?;
    for role in entry.roles.iter().map(|role| &role.name).chain([&entry.owner_role]) {
        site.execute(&entry.server, &sql::grant_connect(&name, role)).await?;
    }
    site.execute(&entry.server, &sql::allow_connections(&name, true)).await?;
    restore(site, entry, &name, &archive.path, &archive.sha256).await
}

async fn restore(site: &Site, entry: &Entry, into: &str, path: &str, sha256: &str) -> Result<(), StepError> {
    let (store, _) = store::open(&site.plane.file().admin.archives)?;
    let path = Path::parse(path).map_err(|error| StepError::Refused(error.to_string()))?;
    site.plane.fuse.burn();
    let stored = store.get(&path).await.map_err(|error| match error {
        object_store::Error::NotFound { .. } => StepError::Refused(format!("the archive {path} is not in the store")),
        error => StepError::Away(error.to_string()),
    })?;
    let mut restore = program(site, &entry.server, "pg_restore", into)?;
    restore.args(["--no-owner", "--exit-on-error", "--no-password"]).arg(format!("--role={}", entry.owner_role));
    restore.arg(format!("--dbname={}", quoted_conninfo(into)));
    let mut child =
        restore.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(cannot_run)?;
    let (input, words) = (child.stdin.take(), listen(&mut child));
    let mut digest = Sha256::new();
    let fed = async {
        let Some(mut input) = input else { return Ok(()) };
        let mut chunks = stored.into_stream();
        let mut takes = true;
        while let Some(chunk) = timeout(STALL, chunks.next()).await.map_err(|_| "the store hangs".to_owned())? {
            let chunk = chunk.map_err(|error| error.to_string())?;
            digest.update(&chunk);
            // pg_restore stops reading at what it cannot use; the checksum says whether that is the file's fault.
            if takes {
                takes =
                    timeout(STALL, input.write_all(&chunk)).await.map_err(|_| "pg_restore hangs".to_owned())?.is_ok();
            }
        }
        Ok::<(), String>(())
    };
    let fed = fed.await;
    let ended = end(child, words, "pg_restore").await;
    fed.map_err(StepError::Away)?;
    if hex(&digest.finalize()) != sha256 {
        return Err(StepError::Refused(format!(
            "the archive {path} is damaged: its checksum is not the one that was noted"
        )));
    }
    ended
}

/// Rows and checksum of every table, and where the sequences stand.
async fn contents(client: &Client) -> Result<Map<String, Value>, StepError> {
    client.batch_execute(sql::PLAIN_TEXT).await?;
    let mut found = Map::new();
    for row in client.query(sql::TABLES, &[]).await? {
        let (schema, table): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        let sum = client.query_one(&sql::checksum(&schema, &table), &[]).await?;
        let (rows, checksum): (i64, String) = (sum.try_get(0)?, sum.try_get(1)?);
        found.insert(format!("{schema}.{table}"), json!({ "rows": rows, "checksum": checksum }));
    }
    for row in client.query(sql::SEQUENCES, &[]).await? {
        let (schema, name, last): (String, String, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        found.insert(format!("{schema}.{name}"), json!({ "last_value": last }));
    }
    Ok(found)
}

/// pg_dump or pg_restore, with our login in its environment and nothing else.
fn program(site: &Site, server: &str, name: &str, database: &str) -> Result<Command, StepError> {
    let settings = site.plane.file();
    let (server, control) = site.plane.server_of(&settings, server)?;
    let path = match &settings.admin.postgres_bin {
        Some(dir) => dir.join(name),
        None => which::which(name).map_err(|_| {
            StepError::Refused(format!(
                "there is no {name} in PATH; install PostgreSQL's client programs, or set admin.postgres_bin"
            ))
        })?,
    };
    let mut command = Command::new(path);
    command.env_clear().kill_on_drop(true);
    command.env("PGHOST", &server.host).env("PGPORT", server.port.to_string()).env("PGUSER", &control.role);
    command.env("PGDATABASE", database).env("PGAPPNAME", "tenantry").env("PGCONNECT_TIMEOUT", "10");
    command.env("PGPASSFILE", "/dev/null").env("PGOPTIONS", "-c lock_timeout=30s -c statement_timeout=0");
    command.env(
        "PGSSLMODE",
        match server.tls.mode {
            ServerTlsMode::Disable => "disable",
            ServerTlsMode::Prefer => "prefer",
            ServerTlsMode::Require => "require",
            ServerTlsMode::VerifyCa => "verify-ca",
            ServerTlsMode::VerifyFull => "verify-full",
        },
    );
    match &server.tls.ca_file {
        Some(file) => command.env("PGSSLROOTCERT", file),
        None => command.env("PGSSLROOTCERT", "system"),
    };
    if matches!(server.tls.mode, ServerTlsMode::Disable | ServerTlsMode::Prefer) {
        command.env_remove("PGSSLROOTCERT");
    }
    if let RoleSecret::Plain(password) = &control.secret {
        command.env("PGPASSWORD", password.expose());
    }
    Ok(command)
}

/// A name with `=` or spaces would be taken for a connection string.
fn quoted_conninfo(database: &str) -> String {
    format!("dbname='{}'", database.replace('\\', "\\\\").replace('\'', "\\'"))
}

fn cannot_run(error: std::io::Error) -> StepError {
    StepError::Refused(format!("PostgreSQL's client program cannot be run: {error}"))
}

/// Reads what the program complains of, so that it never waits for us; keeps the end of it.
fn listen(child: &mut Child) -> tokio::task::JoinHandle<String> {
    let errors = child.stderr.take();
    tokio::spawn(async move {
        let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
        if let Some(mut errors) = errors {
            while let Ok(read @ 1..) = errors.read(&mut buffer).await {
                kept.extend_from_slice(buffer.get(..read).unwrap_or_default());
                let over = kept.len().saturating_sub(LAST_WORDS);
                kept.drain(..over);
            }
        }
        String::from_utf8_lossy(&kept).trim().replace('\n', "; ")
    })
}

async fn end(mut child: Child, words: tokio::task::JoinHandle<String>, name: &str) -> Result<(), StepError> {
    let status = timeout(STALL, child.wait()).await;
    let Ok(Ok(status)) = status else {
        return Err(StepError::Refused(format!("{name} did not come to an end")));
    };
    if status.success() {
        return Ok(());
    }
    let words = words.await.unwrap_or_default();
    Err(StepError::Refused(format!("{name} failed ({status}): {words}")))
}

fn text(result: &Value, key: &str) -> String {
    result[key].as_str().unwrap_or_default().to_owned()
}
