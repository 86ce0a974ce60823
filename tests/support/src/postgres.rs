//! A private PostgreSQL: one per test process, started when first asked for, gone with the process.
//!
//! `initdb` runs once per version; its result lies in the cache and is copied. Version: `TENANTRY_TEST_PG`, default 16.

use std::{
    fs::{self, File},
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Instant,
};

use tokio_postgres::{NoTls, Row, SimpleQueryMessage};

use crate::{
    client::{Connect, Endpoint},
    supervisor::{Plan, Supervised, User, free_port, scratch, signal},
    tls,
    wait::{DEADLINE, eventually},
};

/// Raised when a template's contents change.
const TEMPLATE: u32 = 4;
pub const MAX_CONNECTIONS: u32 = 60;

const SETTINGS: &str = "
listen_addresses = '127.0.0.1'
max_connections = 60
shared_buffers = 16MB
fsync = off
full_page_writes = off
autovacuum = off
wal_level = minimal
max_wal_senders = 0
max_prepared_transactions = 5
jit = off
timezone = 'UTC'
ssl = on
log_min_messages = warning
log_line_prefix = '%m [%p] %u@%d '
";

/// The kit is superuser without a password; a tenant's role proves itself with SCRAM, unless it is in one of these groups.
const HBA: &str = "
local all postgres trust
host  all postgres 127.0.0.1/32 trust
local all +kit_md5 md5
host  all +kit_md5 127.0.0.1/32 md5
local all +kit_trust trust
host  all +kit_trust 127.0.0.1/32 trust
local all +kit_password password
host  all +kit_password 127.0.0.1/32 password
hostssl all +kit_tls 127.0.0.1/32 scram-sha-256
hostnossl all +kit_tls 127.0.0.1/32 reject
local all all scram-sha-256
host  all all 127.0.0.1/32 scram-sha-256
";

const ROLES: &str = "CREATE ROLE kit_md5;\nCREATE ROLE kit_trust;\nCREATE ROLE kit_password;\nCREATE ROLE kit_tls;\n";

/// A running PostgreSQL.
pub struct Cluster {
    dir: PathBuf,
    bin: PathBuf,
    port: u16,
    server: Mutex<Supervised>,
}

/// A database with an owner of its own.
#[derive(Debug, Clone)]
pub struct Tenant {
    /// Also the database's name.
    pub name: String,
    pub role: String,
    pub password: String,
}

/// A row of `pg_stat_activity`.
#[derive(Debug, Clone)]
pub struct Session {
    pub pid: i32,
    pub state: String,
    pub query: String,
}

/// The cluster that all tests of this process share.
pub fn cluster() -> &'static Cluster {
    static SHARED: OnceLock<Cluster> = OnceLock::new();
    SHARED.get_or_init(Cluster::start)
}

/// The directory of `postgres`, `psql` and the like.
pub fn bin_dir() -> PathBuf {
    places().0
}

fn version() -> String {
    std::env::var("TENANTRY_TEST_PG").unwrap_or_else(|_| "16".to_owned())
}

fn get_postgres(argument: &str) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("get-postgres");
    let output = Command::new("python3").arg(script).arg(argument).output().expect("python3");
    assert!(output.status.success(), "get-postgres {argument}: {}", String::from_utf8_lossy(&output.stderr));
    PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
}

/// Binaries and template data directory; asked for once and noted next to the test executables, since every test is a process.
fn places() -> (PathBuf, PathBuf) {
    places_of(&version())
}

fn places_of(version: &str) -> (PathBuf, PathBuf) {
    let test = std::env::current_exe().expect("the test's path");
    let note = test.with_file_name(format!(".testkit-{version}-{TEMPLATE}"));
    let noted = fs::read_to_string(&note).unwrap_or_default();
    if let Some((bin, template)) = noted.trim().split_once('\n')
        && Path::new(bin).join("postgres").exists()
        && Path::new(template).exists()
    {
        return (bin.into(), template.into());
    }
    let bin = get_postgres(version);
    let template = template(&bin, version);
    let _ = fs::write(&note, format!("{}\n{}\n", bin.display(), template.display()));
    (bin, template)
}

/// The data directory to copy, made if this is the first time.
fn template(bin: &Path, version: &str) -> PathBuf {
    let cache = get_postgres("--cache-dir");
    let place = cache.join(format!("template-{version}-{TEMPLATE}"));
    let lock = File::create(cache.join(".template.lock")).expect("the template's lock");
    lock.lock().expect("lock");
    if !place.exists() {
        let new = cache.join(".template-new");
        let _ = fs::remove_dir_all(&new);
        fs::create_dir(&new).expect("the template's directory");
        User::own(User::unprivileged(), &new);
        build_template(bin, &new, version);
        fs::rename(&new, &place).expect("publish the template");
    }
    place
}

fn build_template(bin: &Path, new: &Path, version: &str) {
    let data = new.join("data");
    let initdb = format!(
        "{bin}/initdb -D {data} -U postgres -A trust -E UTF8 --no-locale --no-sync --wal-segsize=1 -c fsync=off 2>&1 \
         && {bin}/postgres --single -D {data} postgres 2>&1 <<'E'\n{ROLES}E\n",
        bin = bin.display(),
        data = data.display(),
    );
    // `-c` came with PostgreSQL 16.
    let initdb = if version == "15" { initdb.replace(" -c fsync=off", "") } else { initdb };
    tls::write_certificates(new);
    let moved = format!(
        "cd {new} && chmod 600 server.key && cp ca.crt server.crt server.key data/ && rm server.crt server.key",
        new = new.display()
    );
    for file in ["ca.crt", "server.crt", "server.key"] {
        User::own(User::unprivileged(), &new.join(file));
    }
    sh(&format!("umask 077; {initdb}{moved}"));
    let hba = data.join("pg_hba.conf");
    fs::write(&hba, HBA).expect("pg_hba.conf");
    let mut settings = fs::read_to_string(data.join("postgresql.conf")).expect("postgresql.conf");
    settings.push_str(SETTINGS);
    fs::write(data.join("postgresql.conf"), settings).expect("postgresql.conf");
}

/// Runs a script as PostgreSQL's user.
fn sh(script: &str) {
    let mut command = Command::new("sh");
    command.arg("-ec").arg(script).current_dir("/").env("LC_ALL", "C");
    if let Some(user) = User::unprivileged() {
        command.uid(user.uid).gid(user.gid);
    }
    let output = command.output().expect("sh");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{script}: {said} {}", String::from_utf8_lossy(&output.stderr));
}

impl Cluster {
    /// A cluster of the test's own, for tests that stop it.
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// With further lines in postgresql.conf.
    pub fn start_with(settings: &str) -> Self {
        Self::start_as(&version(), settings)
    }

    /// Of another version than the others.
    pub fn start_as(version: &str, settings: &str) -> Self {
        let (bin, template) = places_of(version);
        let user = User::unprivileged();
        for _ in 0..10 {
            let dir = scratch("pg");
            User::own(user, &dir);
            let port = free_port();
            sh(&format!(
                "cd {dir}; cp -a --reflink=auto {}/data .; cat >> data/postgresql.conf <<'E'\n{settings}\nE\n",
                template.display(),
                dir = dir.display(),
            ));
            let (program, data, dir_text) = (bin.join("postgres"), dir.join("data"), dir.display().to_string());
            let words = [
                &program.display().to_string(),
                "-D",
                &data.display().to_string(),
                "-p",
                &port.to_string(),
                "-k",
                &dir_text,
            ];
            let command = words.map(str::to_owned).to_vec();
            let server = Supervised::start(Plan { dir: &dir, command, user, signal: "QUIT", max_files: None });
            let cluster = Self { dir, bin: bin.clone(), port, server: Mutex::new(server) };
            if cluster.comes_up() {
                return cluster;
            }
            // Somebody took the port in between.
            assert!(cluster.log().contains("could not bind"), "PostgreSQL does not start:\n{}", cluster.log());
        }
        unreachable!("ten ports were taken")
    }

    /// Blocks until it takes connections; `false` if it ended.
    fn comes_up(&self) -> bool {
        let start = Instant::now();
        while start.elapsed() < DEADLINE {
            let ready = fs::read_to_string(self.dir.join("data/postmaster.pid")).unwrap_or_default();
            if ready.lines().last().is_some_and(|line| line.trim() == "ready") {
                return true;
            }
            if !self.server.lock().expect("no panic inside").runs() {
                return false;
            }
            // Between two looks at the condition; the cluster is started by whichever test is first, outside any runtime.
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        panic!("PostgreSQL is not ready within {DEADLINE:?}:\n{}", self.log());
    }

    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where its Unix socket is.
    pub fn socket_dir(&self) -> &Path {
        &self.dir
    }

    /// Signed its certificate, which is for `localhost` and 127.0.0.1.
    pub fn ca_file(&self) -> PathBuf {
        // Readable by whoever runs the tests: the data directory is not.
        let copy = self.dir.join("ca.crt");
        if !copy.exists() {
            fs::copy(self.dir.join("data/ca.crt"), &copy).expect("ca.crt");
        }
        copy
    }

    /// A client program's path.
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.join("log")).unwrap_or_default()).into_owned()
    }

    /// Straight to PostgreSQL, without Tenantry.
    pub fn direct(&self, tenant: &Tenant) -> Connect {
        Connect::new(Endpoint::Tcp(self.address()), tenant, &tenant.name)
    }

    /// A new database whose name begins with `hint`, with an owner that logs in with a password.
    pub async fn tenant(&self, hint: &str) -> Tenant {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{hint}_{n}");
        let tenant = Tenant {
            role: format!("{name}_owner"),
            password: format!("secret-{n}-{:016x}", rand::random::<u64>()),
            name,
        };
        let admin = self.admin("postgres").await;
        let Tenant { name, role, password } = &tenant;
        let role = format!("CREATE ROLE {role} LOGIN PASSWORD '{password}'");
        admin.batch_execute(&role).await.expect("create the role");
        let database = format!("CREATE DATABASE {name} OWNER {}", tenant.role);
        admin.batch_execute(&database).await.expect("create the database");
        tenant
    }

    /// A further role of a tenant, with the owner's rights.
    pub async fn role(&self, tenant: &Tenant, suffix: &str) -> Tenant {
        let role = format!("{}_{suffix}", tenant.name);
        let password = format!("secret-{:016x}", rand::random::<u64>());
        let sql = format!("CREATE ROLE {role} LOGIN PASSWORD '{password}' IN ROLE {}", tenant.role);
        self.sql(&sql).await;
        Tenant { name: tenant.name.clone(), role, password }
    }

    /// A superuser's connection. It ends when dropped.
    pub async fn admin(&self, database: &str) -> tokio_postgres::Client {
        self.try_admin(database).await.unwrap_or_else(|e| panic!("connect to {database}: {e}"))
    }

    pub async fn try_admin(&self, database: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
        let how = format!("host=127.0.0.1 port={} user=postgres dbname={database} application_name=kit", self.port);
        let (client, connection) = tokio_postgres::connect(&how, NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Runs SQL as superuser and returns the first value of the first row.
    pub async fn sql(&self, sql: &str) -> Option<String> {
        self.sql_in("postgres", sql).await
    }

    pub async fn sql_in(&self, database: &str, sql: &str) -> Option<String> {
        let messages = self.admin(database).await.simple_query(sql).await;
        let messages = messages.unwrap_or_else(|e| panic!("{sql}: {e}"));
        messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
    }

    /// Who is connected to a tenant's database.
    pub async fn sessions(&self, tenant: &Tenant) -> Vec<Session> {
        let sql = "SELECT pid, coalesce(state, ''), query FROM pg_stat_activity \
                   WHERE datname = $1 AND backend_type = 'client backend' ORDER BY backend_start";
        let rows = self.admin("postgres").await.query(sql, &[&tenant.name]).await.expect("pg_stat_activity");
        let session = |row: &Row| Session { pid: row.get(0), state: row.get(1), query: row.get(2) };
        rows.iter().map(session).collect()
    }

    /// Waits until there are `count` sessions on a tenant's database and all of them are idle.
    pub async fn settled(&self, tenant: &Tenant, count: usize) -> Vec<Session> {
        eventually(format!("{count} idle sessions on {}", tenant.name), async || {
            let sessions = self.sessions(tenant).await;
            (sessions.len() == count && sessions.iter().all(|s| s.state == "idle")).then_some(sessions)
        })
        .await
    }

    /// Waits until no session on a tenant's database is anything but idle.
    pub async fn at_rest(&self, tenant: &Tenant) -> Vec<Session> {
        eventually(format!("nothing but idle sessions on {}", tenant.name), async || {
            let sessions = self.sessions(tenant).await;
            sessions.iter().all(|s| s.state == "idle").then_some(sessions)
        })
        .await
    }

    /// `pg_terminate_backend`, and waits until the backend is gone.
    pub async fn terminate(&self, pid: i32) {
        self.sql(&format!("SELECT pg_terminate_backend({pid}, 10000)")).await;
    }

    /// `kill -9`: PostgreSQL then ends all other backends and recovers.
    pub fn kill_backend(&self, pid: i32) {
        signal(u32::try_from(pid).expect("a pid"), "KILL");
    }

    /// SIGSTOP or SIGCONT to one backend.
    pub fn signal_backend(&self, pid: i32, name: &str) {
        signal(u32::try_from(pid).expect("a pid"), name);
    }

    /// The smart (`TERM`), fast (`INT`) or immediate (`QUIT`) shutdown; does not wait.
    pub fn shutdown(&self, how: &str) {
        self.server.lock().expect("no panic inside").signal(how);
    }

    /// Waits for the end of a shutdown and starts it again on the same port.
    pub async fn start_again(&'static self) {
        tokio::task::spawn_blocking(|| {
            let mut server = self.server.lock().expect("no panic inside");
            server.wait();
            server.again();
            drop(server);
            assert!(self.comes_up(), "{}", self.log());
        })
        .await
        .expect("restarted");
    }

    /// For tests that stop it: lives as long as the process.
    pub fn leaked(self) -> &'static Self {
        Box::leak(Box::new(self))
    }

    /// Takes connections (again).
    pub async fn ready(&self) {
        eventually("PostgreSQL takes connections", async || self.try_admin("postgres").await.ok()).await;
    }
}
