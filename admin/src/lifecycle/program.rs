//! pg_dump and pg_restore: found, started as a hand, waited for with patience, and what of their words may be told.
//!
//! What always holds: a program that was started is killed when whoever waits for it goes; one that stands still while
//! PostgreSQL does nothing for it is given up after `admin.archive_stall_timeout`; text that may hold a tenant's rows or an
//! address goes to the log at `debug`, never into the job.

use std::{path::PathBuf, process::Stdio, time::Duration};

use tenantry_config::{Server, ServerTlsMode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, ChildStdin, ChildStdout, Command},
    task::JoinHandle,
    time::{Instant, timeout},
};

use super::{Site, StepError, hand::Hand};
use crate::sql;

/// For `--version`.
const START: Duration = Duration::from_secs(10);
/// What one of them has to say, at most.
const WORDS: usize = 16 << 10;
/// And what of that is told.
const TOLD: usize = 300;
/// So long PostgreSQL may be at work with nothing to show for it: a very large index.
const WORK: Duration = Duration::from_secs(24 * 60 * 60);
/// From this version on, what pg_restore begins with is refused by every server before it (`SET transaction_timeout`).
const SETS_TRANSACTION_TIMEOUT: u32 = 17;
/// Looks within the time that a stall takes.
const LOOKS: u32 = 10;

/// The programs, for a dump of the one server that is loaded at the other (the same, or another), each with its version.
pub async fn check(site: &Site, from: (&str, u32), to: (&str, u32)) -> Result<(), StepError> {
    let settings = site.plane.file();
    for (server, _) in [from, to] {
        tls(site.plane.server_of(&settings, server)?.0)?;
    }
    let (dump, restore) = (version(site, "pg_dump").await?, version(site, "pg_restore").await?);
    unfit((dump, restore), (from.1, to.1)).map_or(Ok(()), |why| Err(StepError::Refused(why)))
}

async fn version(site: &Site, name: &str) -> Result<u32, StepError> {
    let mut command = Command::new(path(site, name)?);
    let output = timeout(START, command.env_clear().kill_on_drop(true).arg("--version").output()).await;
    let output = output.map_err(|_| StepError::Refused(format!("{name} hangs")))?.map_err(cannot_run)?;
    let major = major(&String::from_utf8_lossy(&output.stdout));
    major.ok_or_else(|| StepError::Refused(format!("{name} does not tell its version")))
}

/// Why these versions of pg_dump and pg_restore do not do for a dump of the one server that is loaded at the other. pg_dump reads
/// no server that is newer than itself, and pg_restore no file of a newer pg_dump; an older file is loaded by any newer server.
fn unfit((dump, restore): (u32, u32), (from, to): (u32, u32)) -> Option<String> {
    let is_border = restore >= SETS_TRANSACTION_TIMEOUT && to < SETS_TRANSACTION_TIMEOUT;
    let instead = "install client programs that do, or set admin.postgres_bin to where they are";
    if dump < from {
        Some(format!("pg_dump is of version {dump}, and the server of {from}, which it does not read: {instead}"))
    } else if restore < dump {
        Some(format!(
            "pg_restore is of version {restore}, and pg_dump of {dump}, whose files it does not read: {instead}"
        ))
    } else if is_border && from < SETS_TRANSACTION_TIMEOUT {
        Some(format!(
            "pg_restore is of version {restore}, and the server of {to}, to which that says something that it does not know \
             (SET transaction_timeout): {instead}; those of 16 do"
        ))
    } else if is_border {
        Some(format!(
            "a dump of version {from} is not loaded by a server of {to}: what reads the one says something that the other does \
             not know (SET transaction_timeout); choose a server of {SETS_TRANSACTION_TIMEOUT} or newer"
        ))
    } else {
        None
    }
}

/// Of "pg_dump (PostgreSQL) 16.14".
fn major(text: &str) -> Option<u32> {
    let rest = text.split_once("(PostgreSQL) ")?.1;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn path(site: &Site, name: &str) -> Result<PathBuf, StepError> {
    match &site.plane.file().admin.postgres_bin {
        Some(dir) => Ok(dir.join(name)),
        None => which::which(name).map_err(|_| {
            StepError::Refused(format!(
                "there is no {name} in PATH; install PostgreSQL's client programs, or set admin.postgres_bin"
            ))
        }),
    }
}

fn cannot_run(error: std::io::Error) -> StepError {
    StepError::Refused(format!("PostgreSQL's client program cannot be run: {error}"))
}

/// libpq's words for a server's TLS: sslmode, and the roots where it looks at the certificate.
fn tls(server: &Server) -> Result<(&'static str, Option<PathBuf>), StepError> {
    Ok(match (server.tls.mode, &server.tls.ca_file) {
        (ServerTlsMode::Disable, _) => ("disable", None),
        (ServerTlsMode::Prefer, _) => ("prefer", None),
        (ServerTlsMode::Require, None) => ("require", None),
        // As our own connections do: roots that are given are looked at.
        (ServerTlsMode::Require | ServerTlsMode::VerifyCa, Some(roots)) => ("verify-ca", Some(roots.clone())),
        (ServerTlsMode::VerifyCa, None) => {
            return Err(StepError::Refused(
                "pg_dump cannot do tls.mode = \"verify-ca\" with the system's roots: set the server's tls.ca_file, or \
                 \"verify-full\""
                    .to_owned(),
            ));
        }
        (ServerTlsMode::VerifyFull, roots) => {
            ("verify-full", Some(roots.clone().unwrap_or_else(|| PathBuf::from("system"))))
        }
    })
}

/// A program under way.
pub struct Program {
    name: &'static str,
    child: Child,
    words: JoinHandle<String>,
    pub input: Option<ChildStdin>,
    pub output: Option<ChildStdout>,
}

impl Program {
    /// With the hand's login in its environment and nothing else; in a database.
    pub fn start(
        site: &Site,
        hand: &Hand,
        name: &'static str,
        database: &str,
        arguments: &[String],
    ) -> Result<Self, StepError> {
        let settings = site.plane.file();
        let server = site.plane.server_of(&settings, &hand.server)?.0;
        let (mode, roots) = tls(server)?;
        let mut command = Command::new(path(site, name)?);
        command.env_clear().kill_on_drop(true);
        command.env("PGHOST", &server.host).env("PGPORT", server.port.to_string()).env("PGUSER", &hand.role);
        command.env("PGDATABASE", database).env("PGAPPNAME", "tenantry").env("PGCONNECT_TIMEOUT", "10");
        command.env("PGPASSFILE", "/dev/null").env("PGPASSWORD", hand.password()).env("PGSSLMODE", mode);
        command.env("PGOPTIONS", "-c lock_timeout=30s -c statement_timeout=0 -c default_transaction_read_only=off");
        command.envs(roots.map(|roots| ("PGSSLROOTCERT", roots)));
        command.arg("--no-password").arg(format!("--role={}", hand.owner)).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(cannot_run)?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let words = listen(&mut child);
        Ok(Self { name, child, words, input, output })
    }

    /// Its end, which must be a good one.
    pub async fn end(mut self, site: &mut Site, patience: &Patience) -> Result<(), StepError> {
        drop((self.input.take(), self.output.take()));
        let status = patience.wait(site, self.child.wait()).await;
        let Some(Ok(status)) = status else { return Err(patience.over(self.name)) };
        if status.success() {
            return Ok(());
        }
        let words = self.words.await.unwrap_or_default();
        tracing::debug!(program = self.name, %words, "its last words");
        Err(StepError::Refused(format!("{} failed ({status}): {}", self.name, told(&words))))
    }

    /// Nobody waits for it any more.
    pub async fn kill(mut self) {
        drop((self.input.take(), self.output.take()));
        if let Err(error) = self.child.kill().await {
            tracing::warn!(%error, program = self.name, "cannot be killed");
        }
    }
}

/// Reads what the program complains of, so that it never waits for us.
fn listen(child: &mut Child) -> JoinHandle<String> {
    let errors = child.stderr.take();
    tokio::spawn(async move {
        let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
        if let Some(mut errors) = errors {
            while let Ok(read @ 1..) = errors.read(&mut buffer).await {
                kept.extend_from_slice(buffer.get(..read).unwrap_or_default());
                let over = kept.len().saturating_sub(WORDS);
                kept.drain(..over);
            }
        }
        String::from_utf8_lossy(&kept).into_owned()
    })
}

/// The first error, without what it says of rows (DETAIL, CONTEXT, values in a COPY) and of where the server is.
fn told(words: &str) -> String {
    let is_error = |line: &&str| line.contains(" error: ") || line.contains(" fatal: ");
    let line = words.lines().find(is_error).or_else(|| words.lines().next()).unwrap_or_default();
    let line = line.split_once(" error: ").map_or(line, |(_, rest)| rest);
    // What PostgreSQL says of a COPY may quote a value; which table it was does not.
    let line = if line.starts_with("COPY failed") { line.split(": ").next().unwrap_or_default() } else { line };
    // connection to server at "10.0.0.5", port 5432 failed: FATAL: ...
    let line = match line.split_once(" failed: ") {
        Some((place, why)) if place.starts_with("connection to server") => why,
        _ => line,
    };
    line.chars().filter(|c| !c.is_control()).take(TOLD).collect()
}

/// A name with `=` or spaces would be taken for a connection string.
pub fn quoted_conninfo(database: &str) -> String {
    sql::moves::conninfo(&[("dbname", database)])
}

/// Of one read.
const CHUNK: usize = 64 << 10;

/// What one of them writes is what the other reads, to its end; in bounded memory.
pub async fn feed(site: &mut Site, from: &mut Program, to: &mut Program, patience: &Patience) -> Result<(), StepError> {
    let (Some(mut output), Some(mut input)) = (from.output.take(), to.input.take()) else { return Ok(()) };
    let mut buffer = vec![0; CHUNK];
    loop {
        let read = patience.wait(site, output.read(&mut buffer)).await.ok_or_else(|| patience.over(from.name))?;
        let read = read.map_err(|error| StepError::Refused(format!("{} cannot be read: {error}", from.name)))?;
        let some = buffer.get(..read).unwrap_or_default();
        if some.is_empty() {
            return Ok(());
        }
        let written = patience.wait(site, input.write_all(some)).await.ok_or_else(|| patience.over(to.name))?;
        if written.is_err() {
            // It has failed, and its last words tell why; the other one would wait for its reader.
            let mut rest = output;
            while matches!(rest.read(&mut buffer).await, Ok(1..)) {}
            return Ok(());
        }
    }
}

/// How long a program, or the store, may stand still.
pub struct Patience {
    server: String,
    /// Whose sessions are looked at.
    role: String,
    limit: Duration,
}

impl Patience {
    pub fn with(site: &Site, hand: &Hand) -> Self {
        let limit = site.plane.file().admin.archive_stall_timeout;
        Self { server: hand.server.clone(), role: hand.role.clone(), limit }
    }

    /// `None`: nothing came of it, and PostgreSQL does nothing that something might come of.
    pub async fn wait<T>(&self, site: &mut Site, what: impl Future<Output = T>) -> Option<T> {
        let mut what = std::pin::pin!(what);
        let (begin, mut still) = (Instant::now(), 0);
        while still < LOOKS && begin.elapsed() < WORK {
            if let Ok(done) = timeout(self.limit / LOOKS, &mut what).await {
                return Some(done);
            }
            still = if self.is_busy(site).await { 0 } else { still + 1 };
        }
        None
    }

    async fn is_busy(&self, site: &mut Site) -> bool {
        let Ok(client) = site.control(&self.server).await else { return false };
        let busy = client.query_one(sql::BUSY_SESSIONS_OF, &[&self.role]).await;
        busy.and_then(|row| row.try_get::<_, i64>(0)).is_ok_and(|sessions| sessions > 0)
    }

    pub fn over(&self, who: &str) -> StepError {
        let limit = humantime::format_duration(self.limit);
        StepError::Refused(format!("{who} hangs: nothing moved for {limit}, and PostgreSQL was not at work for it"))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn what_is_told_holds_no_row_and_no_address() {
        let copy = "pg_restore: warning: something\npg_restore: error: COPY failed for table \"t\": ERROR:  value \"secret\" is bad\n\
                    DETAIL:  Failing row contains (secret).\nCONTEXT:  COPY t, line 1: \"secret\"\n";
        assert_eq!(told(copy), "COPY failed for table \"t\"");
        let query = "pg_restore: error: could not execute query: ERROR:  could not create unique index \"t_pkey\"\n\
                     DETAIL:  Key (email)=(a@b.c) is duplicated.\nCommand was: ALTER TABLE ...\n";
        assert_eq!(told(query), "could not execute query: ERROR:  could not create unique index \"t_pkey\"");
        let away = "pg_dump: error: connection to server at \"10.0.0.5\", port 5432 failed: FATAL:  the database system is shutting down\n";
        assert_eq!(told(away), "FATAL:  the database system is shutting down");
        assert_eq!((told(""), told("sh: not found")), (String::new(), "sh: not found".to_owned()));
        assert_eq!(told(&"x".repeat(10_000)).len(), TOLD);
    }

    #[test]
    fn the_roots_are_named_where_the_certificate_is_looked_at() {
        let words = |mode, ca: Option<&str>| {
            let mut server = Server::default();
            (server.tls.mode, server.tls.ca_file) = (mode, ca.map(PathBuf::from));
            tls(&server).map(|(mode, roots)| (mode, roots.as_deref().and_then(Path::to_str).map(str::to_owned))).ok()
        };
        assert_eq!(words(ServerTlsMode::Prefer, Some("/ca")), Some(("prefer", None)));
        assert_eq!(words(ServerTlsMode::Require, None), Some(("require", None)));
        assert_eq!(words(ServerTlsMode::Require, Some("/ca")), Some(("verify-ca", Some("/ca".to_owned()))));
        assert_eq!(words(ServerTlsMode::VerifyCa, None), None);
        assert_eq!(words(ServerTlsMode::VerifyFull, None), Some(("verify-full", Some("system".to_owned()))));
    }

    #[test]
    fn pg_dump_must_read_the_source_and_pg_restore_must_say_what_the_target_knows() {
        for ((bin, from, to), is_fit) in [
            ((16, 16, 16), true),
            ((16, 15, 16), true),
            ((16, 15, 18), true),
            ((16, 16, 18), true),
            ((18, 16, 18), true),
            ((18, 18, 18), true),
            ((18, 18, 17), true),
            ((16, 16, 15), true),
            ((15, 16, 16), false),
            ((16, 17, 18), false),
            ((18, 16, 16), false),
            ((18, 18, 16), false),
        ] {
            let why = unfit((bin, bin), (from, to));
            assert_eq!(why.is_none(), is_fit, "{bin}, {from} to {to}: {why:?}");
        }
        assert!(unfit((17, 16), (16, 16)).is_some_and(|why| why.contains("pg_restore is of version 16")));
        assert!(unfit((18, 18), (16, 16)).is_some_and(|why| why.contains("those of 16 do")));
        assert!(unfit((18, 18), (18, 16)).is_some_and(|why| why.contains("choose a server")));
    }

    #[test]
    fn the_version_is_the_number_after_the_name() {
        assert_eq!(major("pg_dump (PostgreSQL) 16.14 (Debian 16.14-1)\n"), Some(16));
        assert_eq!(major("pg_dump (PostgreSQL) 18beta1\n"), Some(18));
        assert_eq!(major("hello"), None);
    }
}
