//! A throw-away PostgreSQL: found (or fetched), initialised, started, stopped.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::AsyncWriteExt,
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};
use tokio_postgres::{Client, NoTls};

use super::{free_port, password, place::Place};
use crate::failure::Failure;

/// What is fetched when nothing is found, and preferred when several are.
const VERSION: &str = "16";
/// An older one is only used when none can be fetched.
const OLDEST: u32 = 16;
/// The test kit's own script, so that an installed binary can do what a checkout can.
const GET_POSTGRES: &str = include_str!("../../tests/support/get-postgres");
const DISTRIBUTION: &str = "/usr/lib/postgresql";
/// Throw-away: nothing of it needs to survive a power cut.
const OPTIONS: [&str; 7] = [
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "listen_addresses=127.0.0.1",
    "max_connections=50",
    "password_encryption=scram-sha-256",
    "logging_collector=off",
];
const START_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(50);

/// Running; killed when dropped, ended in order by `stop`.
#[derive(Debug)]
pub struct Cluster {
    process: Child,
    pub port: u16,
    pub bin: PathBuf,
    socket_dir: PathBuf,
    password: String,
}

impl Cluster {
    pub async fn start(place: &Place, bin: Option<&Path>) -> Result<Self, Failure> {
        let bin = match bin {
            Some(bin) if !has_server(bin) => {
                return Err(Failure::Usage(format!("{}: has no postgres and initdb", bin.display())));
            }
            Some(bin) => bin.to_owned(),
            // An older one that is here already is better than none.
            None => match installed(OLDEST) {
                Some(bin) => bin,
                None => match (fetch().await, installed(0)) {
                    (Ok(bin), _) | (Err(_), Some(bin)) => bin,
                    (Err(failure), None) => return Err(failure),
                },
            },
        };
        let (directory, password) = (place.cluster(), password());
        init(place, &bin, &password).await?;
        let port = free_port(0)?;
        let log_path = directory.join("postgres.log");
        let log = fs::File::create(&log_path).map_err(Failure::internal(log_path.display()))?;
        let errors = log.try_clone().map_err(Failure::internal(log_path.display()))?;
        let mut command = command(place, &bin.join("postgres"));
        command.arg("-D").arg(directory.join("data")).arg("-k").arg(&directory).arg("-p").arg(port.to_string());
        for option in OPTIONS {
            command.arg("-c").arg(option);
        }
        // Not in our process group: Ctrl-C is for us, and PostgreSQL goes after its clients have.
        command.process_group(0).stdout(log).stderr(errors).kill_on_drop(true);
        let process = command.spawn().map_err(Failure::internal("cannot start postgres"))?;
        let mut cluster = Self { process, port, bin, socket_dir: directory, password };
        cluster.await_ready(&log_path).await?;
        Ok(cluster)
    }

    /// As the bootstrap superuser, over the Unix socket.
    pub async fn superuser(&self) -> Result<Client, tokio_postgres::Error> {
        self.connect("postgres", &self.password, "postgres").await
    }

    /// Straight to PostgreSQL, past Tenantry.
    pub async fn connect(&self, role: &str, password: &str, database: &str) -> Result<Client, tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::Config::new()
            .host_path(&self.socket_dir)
            .port(self.port)
            .user(role)
            .password(password)
            .dbname(database)
            .connect(NoTls)
            .await?;
        // Ends with its client; an error of it is the client's next error.
        tokio::spawn(async move { drop(connection.await) });
        Ok(client)
    }

    async fn await_ready(&mut self, log: &Path) -> Result<(), Failure> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if self.superuser().await.is_ok() {
                return Ok(());
            }
            let died = self.process.try_wait().ok().flatten();
            if died.is_some() || Instant::now() > deadline {
                let said = fs::read_to_string(log).unwrap_or_default();
                return Err(Failure::Internal(format!("postgres did not start:\n{}", said.trim_end())));
            }
            sleep(POLL).await;
        }
    }

    /// SIGINT is PostgreSQL's fast shutdown: sessions are ended, data is written.
    pub async fn stop(mut self) {
        let id = self.process.id().and_then(|id| i32::try_from(id).ok());
        if let Some(id) = id
            && kill(Pid::from_raw(id), Signal::SIGINT).is_ok()
            && timeout(STOP_LIMIT, self.process.wait()).await.is_ok()
        {
            return;
        }
        if let Err(error) = self.process.kill().await {
            tracing::warn!(%error, "cannot end postgres");
        }
    }
}

/// A program of PostgreSQL, as the user it may run as, with nothing of ours that would steer it.
fn command(place: &Place, program: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(place.cluster()).env_clear().env("LC_ALL", "C.UTF-8").env("TZ", "UTC").stdin(Stdio::null());
    if let Some((user, group)) = place.user {
        command.uid(user).gid(group);
    }
    command
}

async fn init(place: &Place, bin: &Path, password: &str) -> Result<(), Failure> {
    let file = place.write("superuser-password", password)?;
    place.give(&file)?;
    let mut command = command(place, &bin.join("initdb"));
    command.args(["--username=postgres", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]);
    command.arg("--pwfile").arg(&file).arg("-D").arg(place.cluster().join("data"));
    let done = command.output().await;
    let removed = fs::remove_file(&file);
    succeeded("initdb", done.map_err(Failure::internal("cannot run initdb"))?)?;
    removed.map_err(Failure::internal(file.display()))
}

fn succeeded(what: &str, output: Output) -> Result<String, Failure> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(Failure::Internal(format!("{what} failed:\n{}", String::from_utf8_lossy(&said).trim_end())))
}

fn has_server(bin: &Path) -> bool {
    ["postgres", "initdb"].iter().all(|program| bin.join(program).is_file())
}

/// PostgreSQL 16 if the distribution has it, else its newest from `oldest` on, else what is in the PATH.
fn installed(oldest: u32) -> Option<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir(DISTRIBUTION)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin")))
        })
        .filter(|(version, bin)| *version >= oldest && has_server(bin))
        .collect();
    found.sort_by_key(|(version, _)| (version.to_string() == VERSION, *version));
    let in_path = || Some(which::which("postgres").ok()?.canonicalize().ok()?.parent()?.to_owned());
    found.pop().map(|(_, bin)| bin).or_else(|| in_path().filter(|bin| has_server(bin)))
}

async fn fetch() -> Result<PathBuf, Failure> {
    tracing::info!(version = VERSION, "no PostgreSQL of this version here; fetching one");
    let unavailable = || Failure::unavailable("no PostgreSQL here, and python3 is needed to fetch one");
    let mut python = Command::new("python3")
        .args(["-", VERSION])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(unavailable())?;
    if let Some(mut script) = python.stdin.take() {
        script.write_all(GET_POSTGRES.as_bytes()).await.map_err(unavailable())?;
    }
    let output = python.wait_with_output().await.map_err(unavailable())?;
    match succeeded("fetching PostgreSQL", output) {
        Ok(directory) => Ok(PathBuf::from(directory)),
        Err(failure) => Err(Failure::Unavailable(failure.to_string())),
    }
}
