//! The real `tenantry` binary, with settings of the test's own.
//!
//! Which binary: `TENANTRY_BIN`, else the one of the same profile as the test, built if it is absent or older than the code.

use std::{
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{Mutex, OnceLock},
    time::{Instant, SystemTime},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use toml::{Table, Value};

use crate::{
    client::{Connect, Endpoint},
    postgres::{Cluster, Tenant, bin_dir},
    supervisor::{Plan, Supervised, free_port, scratch},
    wait::{DEADLINE, within},
};

/// Settings in the making.
#[derive(Debug, Clone)]
pub struct ProxyBuilder {
    settings: Table,
    secrets: Vec<String>,
    max_files: Option<u32>,
}

impl ProxyBuilder {
    /// One server, `main`: the cluster.
    pub fn new(cluster: &Cluster) -> Self {
        Self::to(cluster.address())
    }

    /// One server, `main`, at an address: a relay, a fake server.
    pub fn to(server: SocketAddr) -> Self {
        let builder = Self { settings: Table::new(), secrets: Vec::new(), max_files: None };
        builder
            .set("servers.main.host", server.ip().to_string())
            .set("servers.main.port", i64::from(server.port()))
            .set("log.filter", "info")
            // More than one, whatever the machine: what only happens between threads shall happen here.
            .set("process.workers", 2)
    }

    /// Sets a key by its dotted path; times and sizes as text, as in the file.
    #[must_use]
    pub fn set(mut self, path: &str, value: impl Into<Value>) -> Self {
        let mut words: Vec<&str> = path.split('.').collect();
        let last = words.pop().expect("a key");
        let mut table = &mut self.settings;
        for word in words {
            let inner = table.entry(word).or_insert_with(|| Value::Table(Table::new()));
            table = inner.as_table_mut().expect("a table");
        }
        table.insert(last.to_owned(), value.into());
        self
    }

    /// The same, unless the key was set before.
    #[must_use]
    fn or(self, path: &str, value: impl Into<Value>) -> Self {
        let (section, key) = path.rsplit_once('.').unwrap_or(("", path));
        let table = section.split('.').try_fold(&self.settings, |table, word| table.get(word)?.as_table());
        if table.is_some_and(|table| table.contains_key(key)) { self } else { self.set(path, value) }
    }

    /// A tenant with its owner and the owner's password.
    #[must_use]
    pub fn tenant(self, tenant: &Tenant) -> Self {
        self.role(&tenant.name, &tenant.role, Some(&tenant.password))
    }

    /// A role of a tenant; `secret` may be a verifier.
    #[must_use]
    pub fn role(mut self, tenant: &str, role: &str, secret: Option<&str>) -> Self {
        let mut entry = Table::from_iter([("name".to_owned(), Value::from(role))]);
        if let Some(secret) = secret {
            entry.insert("password".to_owned(), Value::from(secret));
            self.secrets.push(secret.to_owned());
        }
        let tenants = self.settings.entry("tenants").or_insert_with(|| Value::Table(Table::new()));
        let tenants = tenants.as_table_mut().expect("a table");
        let own = tenants.entry(tenant).or_insert_with(|| Value::Table(Table::new()));
        let roles = own.as_table_mut().expect("a table").entry("roles").or_insert_with(|| Value::Array(Vec::new()));
        roles.as_array_mut().expect("an array").push(Value::Table(entry));
        self
    }

    /// RLIMIT_NOFILE of the process.
    #[must_use]
    pub fn max_files(mut self, n: u32) -> Self {
        self.max_files = Some(n);
        self
    }

    /// The settings file's text.
    pub fn text(&self) -> String {
        toml::to_string(&self.settings).expect("toml")
    }

    /// Starts the binary and waits until it takes connections.
    pub async fn start(self) -> Proxy {
        for attempt in 0..5 {
            let proxy = self.clone().launch();
            if proxy.comes_up().await {
                return proxy;
            }
            let log = proxy.log();
            assert!(
                attempt < 4 && log.to_lowercase().contains("in use"),
                "tenantry does not start:\n{log}\n{}",
                self.text()
            );
        }
        unreachable!()
    }

    fn launch(mut self) -> Proxy {
        let dir = scratch("proxy");
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let admin = SocketAddr::from(([127, 0, 0, 1], free_port()));
        self = self
            .set("listen.addresses", vec![address.to_string()])
            .set("listen.unix_socket_dir", dir.display().to_string())
            .set("listen.tls.state_dir", dir.display().to_string())
            .set("admin.address", admin.to_string())
            .set("admin.state_dir", dir.display().to_string())
            .or("admin.archives", dir.join("archives").display().to_string())
            .or("admin.archives_volatile", true)
            .or("admin.imports_dir", dir.join("imports").display().to_string())
            .or("admin.postgres_bin", bin_dir().display().to_string());
        let file = dir.join("tenantry.toml");
        fs::write(&file, self.text()).expect("settings file");
        let words = [binary().display().to_string(), "serve".into(), "--config".into(), file.display().to_string()];
        let plan = Plan { dir: &dir, command: words.into(), user: None, signal: "KILL", max_files: self.max_files };
        let process = Mutex::new(Supervised::start(plan));
        Proxy { address, admin, file, dir, settings: self, process }
    }
}

/// A running Tenantry. Dropped: killed, and its log looked through for panics and passwords.
pub struct Proxy {
    address: SocketAddr,
    admin: SocketAddr,
    file: PathBuf,
    dir: PathBuf,
    settings: ProxyBuilder,
    process: Mutex<Supervised>,
}

impl Proxy {
    async fn comes_up(&self) -> bool {
        let start = Instant::now();
        while start.elapsed() < DEADLINE {
            if TcpStream::connect(self.address).await.is_ok() {
                return true;
            }
            if !self.runs() {
                return false;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        panic!("tenantry does not listen within {DEADLINE:?}:\n{}", self.log());
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn endpoint(&self) -> Endpoint {
        Endpoint::Tcp(self.address)
    }

    /// Its Unix socket.
    pub fn unix(&self) -> Endpoint {
        Endpoint::Unix(self.dir.join(format!(".s.PGSQL.{}", self.address.port())))
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// As a tenant's owner, over plain TCP.
    pub fn connect(&self, tenant: &Tenant) -> Connect {
        Connect::new(self.endpoint(), tenant, &tenant.name)
    }

    /// Ends it as by a crash, if it still runs, and starts it again with the same settings, and with more words on its command line.
    pub async fn restart(&self, words: &[&str]) {
        {
            let mut process = self.process.lock().expect("no panic inside");
            if process.runs() {
                process.signal("KILL");
            }
            // Also of one that killed itself: until the last of its threads is gone, its ports are taken.
            process.wait();
            process.again_with(words);
        }
        assert!(self.comes_up().await, "tenantry does not start again:\n{}", self.log());
    }

    /// The settings file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The admin listener.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    pub fn pid(&self) -> u32 {
        self.process.lock().expect("no panic inside").pid()
    }

    pub fn runs(&self) -> bool {
        self.process.lock().expect("no panic inside").runs()
    }

    pub fn log(&self) -> String {
        self.process.lock().expect("no panic inside").log()
    }

    pub fn signal(&self, name: &str) {
        self.process.lock().expect("no panic inside").signal(name);
    }

    /// The exit code after a signal told it to go.
    pub async fn exit(&self) -> i32 {
        let gone = async {
            while self.runs() {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        within("tenantry ends", DEADLINE, gone).await;
        self.process.lock().expect("no panic inside").wait()
    }

    /// What the settings were made of, to change and write again.
    pub fn settings(&self) -> ProxyBuilder {
        self.settings.clone()
    }

    /// Writes a new settings file and sends SIGHUP.
    pub fn reload(&self, text: &str) {
        fs::write(&self.file, text).expect("settings file");
        self.signal("HUP");
    }

    /// Text of a path on the admin listener.
    pub async fn http(&self, path: &str) -> String {
        let ask = async {
            let mut stream = TcpStream::connect(self.admin).await?;
            let request = format!("GET {path} HTTP/1.1\r\nHost: tenantry\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await?;
            Ok::<_, std::io::Error>(String::from_utf8_lossy(&answer).into_owned())
        };
        within(path, DEADLINE, ask).await.unwrap_or_else(|e| panic!("GET {path}: {e}"))
    }

    pub async fn metrics(&self) -> String {
        self.http("/metrics").await
    }

    /// The sum of a metric's series.
    pub async fn metric(&self, name: &str) -> f64 {
        let metrics = self.metrics().await;
        let series = metrics.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
        series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Resident memory in KiB.
    pub fn resident_kib(&self) -> u64 {
        self.status_kib("VmRSS:")
    }

    /// The most that it ever was, in KiB.
    pub fn peak_kib(&self) -> u64 {
        self.status_kib("VmHWM:")
    }

    fn status_kib(&self, key: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let log = self.log();
        if std::thread::panicking() {
            eprintln!("---- log of tenantry ({})\n{}", self.file.display(), tail(&log));
            return;
        }
        assert!(!log.contains("panicked at"), "tenantry panicked:\n{}", tail(&log));
        for secret in &self.settings.secrets {
            assert!(!log.contains(secret.as_str()), "a password is in the log");
        }
    }
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// Runs `tenantry check --config` on a settings text.
pub fn check(text: &str) -> Output {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("tenantry.toml");
    fs::write(&file, text).expect("settings file");
    Command::new(binary()).arg("check").arg("--config").arg(&file).output().expect("tenantry check")
}

/// The binary under test.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match std::env::var_os("TENANTRY_BIN") {
        Some(path) => PathBuf::from(path),
        None => built(),
    })
}

fn built() -> PathBuf {
    // target/PROFILE/deps/TEST-HASH
    let test = std::env::current_exe().expect("the test's path");
    let profile = test.ancestors().nth(2).expect("target/PROFILE");
    let path = profile.join("tenantry");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("the workspace");
    let lock = File::create(profile.join(".tenantry-build.lock")).expect("a lock file");
    lock.lock().expect("lock");
    let fresh = fs::metadata(&path).and_then(|m| m.modified()).is_ok_and(|made| made >= newest_source(root));
    if !fresh {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["build", "--quiet", "--workspace", "--bin", "tenantry"]).current_dir(root);
        cargo.arg("--target-dir").arg(profile.parent().expect("target"));
        if profile.ends_with("release") {
            cargo.arg("--release");
        }
        let output = cargo.output().expect("cargo");
        assert!(output.status.success(), "cargo build: {}", String::from_utf8_lossy(&output.stderr));
        // Cargo leaves the file alone if only the time of a source changed.
        let _ = File::options().append(true).open(&path).and_then(|f| f.set_modified(SystemTime::now()));
    }
    path
}

fn newest_source(root: &Path) -> SystemTime {
    let mut newest = SystemTime::UNIX_EPOCH;
    let mut open: Vec<PathBuf> =
        ["src", "config/src", "proxy/src", "proxy/wire/src", "admin/src"].map(|d| root.join(d)).into();
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                open.push(entry.path());
            } else if let Ok(modified) = entry.metadata().and_then(|m| m.modified()) {
                newest = newest.max(modified);
            }
        }
    }
    newest
}
