//! Reading: from the merged layers to `Settings`.
//!
//! What always holds: every key is looked at even after a problem, so that all problems are told at once; a key that no
//! row of `keys.rs` takes is a problem; no problem repeats what may be a secret.

use std::{
    collections::BTreeMap,
    fs,
    io::Read as _,
    net::IpAddr,
    path::{Path, PathBuf},
};

use config::{Map, Value, ValueKind};
use zeroize::Zeroizing;

use crate::{
    Control, NameError, Overrides, Problems, Role, RoleSecret, Secret, Server, ServerTlsMode, Settings, Tenant,
    TenantId, check,
    keys::{ControlKeys, FlatTenant, RoleKeys, Section, Visitor},
    layers::{self, join},
    name::check_name,
    problem::{Report, suggest},
    value::Setting,
};

/// More is no password file.
const MAX_SECRET_FILE_BYTES: u64 = 16 << 10;

/// Reads the settings: default < `file` < environment < flags.
///
/// Reads `file` and each `password_file`; opens nothing else and touches no global state.
///
/// # Errors
/// All problems of the file, the environment and the flags at once.
pub fn load(file: Option<&Path>, overrides: &Overrides) -> Result<Settings, Problems> {
    let name = file.map_or_else(|| "settings".to_owned(), |path| path.display().to_string());
    let mut report = Report::new(name);
    let mut settings = Settings::default();
    if let Some(root) = layers::merge(file, overrides, &mut report) {
        read_settings(&mut settings, root, overrides, &mut report);
        check::check(&settings, &mut report);
    }
    report.finish(settings)
}

fn read_settings(settings: &mut Settings, root: Map<String, Value>, overrides: &Overrides, report: &mut Report) {
    let mut reader = Reader { path: String::new(), table: root, known: Vec::new(), report };
    reader.section("process", &mut settings.process);
    reader.section("listen", &mut settings.listen);
    reader.section("auth", &mut settings.auth);
    reader.section("pool", &mut settings.pool);
    reader.section("admin", &mut settings.admin);
    reader.section("log", &mut settings.log);
    settings.roles = reader.roles(overrides);
    let servers = reader.tables("servers");
    let tenants = reader.tables("tenants");
    reader.finish();
    for (name, table) in servers {
        let server = read_server(&name, table, overrides, report);
        settings.servers.insert(name, server);
    }
    for (name, table) in tenants {
        read_tenant(settings, &name, table, overrides, report);
    }
}

fn read_server(name: &str, table: Map<String, Value>, overrides: &Overrides, report: &mut Report) -> Server {
    let path = join("servers", name);
    if let Err(error) = check_name(name) {
        report.problem(&[&path], error.to_string());
    }
    let mut server = Server::default();
    let mut reader = Reader { path, table, known: Vec::new(), report };
    server.keys(&mut reader);
    server.control = reader.take_table("control").map(|table| reader.control(table, overrides));
    let mode = format!("{}.tls.mode", reader.path);
    reader.finish();
    if !report.is_set(&mode) && is_local(&server.host) {
        server.tls.mode = ServerTlsMode::Disable;
    }
    server
}

/// A Unix socket, or an address that never leaves this machine.
fn is_local(host: &str) -> bool {
    host.starts_with('/')
        || host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

fn read_tenant(
    settings: &mut Settings,
    name: &str,
    table: Map<String, Value>,
    overrides: &Overrides,
    report: &mut Report,
) {
    let path = join("tenants", name);
    let mut tenant = Tenant { pool: settings.pool.clone(), ..Tenant::default() };
    let mut reader = Reader { path: path.clone(), table, known: Vec::new(), report };
    FlatTenant(&mut tenant).keys(&mut reader);
    tenant.roles = reader.roles(overrides);
    reader.finish();
    resolve_server(&mut tenant.server, &path, settings, report);
    match (name, TenantId::parse(name)) {
        ("*", _) => settings.any_tenant = Some(tenant),
        (_, Ok(id)) => {
            settings.tenants.insert(id, tenant);
        }
        (_, Err(error)) => bad_tenant(&path, error, report),
    }
}

fn bad_tenant(path: &str, error: NameError, report: &mut Report) {
    report.problem(&[path], format!("cannot be a tenant: {error}"));
}

/// The one server if none is named; else the named one must exist.
fn resolve_server(server: &mut String, path: &str, settings: &Settings, report: &mut Report) {
    let names = settings.servers.keys().map(String::as_str);
    let key = join(path, "server");
    match (server.is_empty(), names.len()) {
        // The lack of servers is told once, by `check`.
        (true, 0) => {}
        (true, 1) => names.for_each(|only| only.clone_into(server)),
        (true, _) => {
            let all = names.collect::<Vec<_>>().join(", ");
            report.problem(&[&key], format!("is missing and there are several servers; write one of {all}"));
        }
        (false, _) if settings.servers.contains_key(server.as_str()) => {}
        (false, 0) => report.problem(&[&key], format!("there is no server {server:?}; add [servers.{server}]")),
        (false, _) => {
            report.problem(&[&key], format!("there is no server {server:?}; {}", suggest(server, names)));
        }
    }
}

/// Takes the keys of one table, row by row.
struct Reader<'a> {
    path: String,
    table: Map<String, Value>,
    known: Vec<&'static str>,
    report: &'a mut Report,
}

impl Visitor for Reader<'_> {
    fn key<T: Setting>(&mut self, name: &'static str, field: &mut T) {
        self.known.push(name);
        let Some(value) = self.table.remove(name) else { return };
        match T::read(&value) {
            Ok(value) => *field = value,
            Err(message) => self.report.unreadable(&join(&self.path, name), message),
        }
    }

    fn section<S: Section>(&mut self, name: &'static str, section: &mut S) {
        let Some(table) = self.take_table(name) else { return };
        let mut inner = Reader { path: join(&self.path, name), table, known: Vec::new(), report: self.report };
        section.keys(&mut inner);
        inner.finish();
    }
}

impl Reader<'_> {
    fn take_table(&mut self, name: &'static str) -> Option<Map<String, Value>> {
        self.known.push(name);
        as_table(&join(&self.path, name), self.table.remove(name)?, self.report)
    }

    /// `[name.*]`, in the order of the names.
    fn tables(&mut self, name: &'static str) -> BTreeMap<String, Map<String, Value>> {
        let path = join(&self.path, name);
        let tables = self.take_table(name).unwrap_or_default();
        tables
            .into_iter()
            .filter_map(|(key, value)| {
                let table = as_table(&join(&path, &key), value, self.report)?;
                Some((key, table))
            })
            .collect()
    }

    /// `[[roles]]`. A role with a problem keeps its place, so that the number in a path stays that of the file.
    fn roles(&mut self, overrides: &Overrides) -> Vec<Role> {
        self.known.push("roles");
        let path = join(&self.path, "roles");
        match self.table.remove("roles").map(|value| value.kind) {
            None => Vec::new(),
            Some(ValueKind::Array(values)) => values
                .into_iter()
                .enumerate()
                .map(|(i, value)| read_role(&format!("{path}[{i}]"), value, overrides, self.report))
                .collect(),
            Some(_) => {
                let message = format!("must be a list of roles; write [[{path}]] above each role, in the file");
                self.report.unreadable(&path, message);
                Vec::new()
            }
        }
    }

    fn control(&mut self, table: Map<String, Value>, overrides: &Overrides) -> Control {
        let path = join(&self.path, "control");
        let mut keys = ControlKeys::default();
        let mut reader = Reader { path: path.clone(), table, known: Vec::new(), report: self.report };
        keys.keys(&mut reader);
        reader.finish();
        let ControlKeys { role, database, password, password_file, password_env, connection_limits } = keys;
        check_role_name(&join(&path, "role"), "role", &role, self.report);
        check_role_name(&join(&path, "database"), "database", &database, self.report);
        let secret = SecretSources { password, password_file, password_env }.read(&path, overrides, self.report);
        if matches!(secret, RoleSecret::Md5(_) | RoleSecret::Scram(_)) {
            let keys = ["password", "password_file", "password_env"].map(|key| join(&path, key));
            let keys = keys.each_ref().map(String::as_str);
            self.report.problem(&keys, "must be the password itself: a verifier cannot log in");
        }
        Control { role, database, secret, connection_limits }
    }

    /// What no row took is unknown. Its value is not shown: it may be a secret under a misspelt key.
    fn finish(mut self) {
        let mut unknown: Vec<String> = self.table.drain().map(|(key, _)| key).collect();
        unknown.sort_unstable();
        for key in unknown {
            let message = format!("unknown key; {}", suggest(&key, self.known.iter().copied()));
            self.report.problem(&[&join(&self.path, &key)], message);
        }
    }
}

fn as_table(path: &str, value: Value, report: &mut Report) -> Option<Map<String, Value>> {
    if let ValueKind::Table(table) = value.kind {
        return Some(table);
    }
    report.unreadable(path, format!("must be a section; write [{path}] with keys below it"));
    None
}

fn read_role(path: &str, value: Value, overrides: &Overrides, report: &mut Report) -> Role {
    let table = as_table(path, value, report).unwrap_or_default();
    let mut keys = RoleKeys::default();
    let mut reader = Reader { path: path.to_owned(), table, known: Vec::new(), report };
    keys.keys(&mut reader);
    reader.finish();
    let RoleKeys { name, password, password_file, password_env, pool_mode, pool_size } = keys;
    check_role_name(&join(path, "name"), "name", &name, report);
    let sources = SecretSources { password, password_file, password_env };
    let secret = sources.read(path, overrides, report);
    Role { name, secret, pool_mode, pool_size, former: None }
}

/// PostgreSQL's NAMEDATALEN - 1; a NUL was refused when the string was read.
fn check_role_name(path: &str, key: &str, name: &str, report: &mut Report) {
    if !(1..=63).contains(&name.len()) {
        report.problem(&[path], format!("must be 1 to 63 bytes; write {key} = \"...\""));
    }
}

/// The three places that a role's secret may come from.
struct SecretSources {
    password: Option<Secret>,
    password_file: Option<PathBuf>,
    password_env: Option<String>,
}

impl SecretSources {
    fn read(self, path: &str, overrides: &Overrides, report: &mut Report) -> RoleSecret {
        let given: Vec<String> = ["password", "password_file", "password_env"]
            .iter()
            .map(|key| join(path, key))
            .filter(|key| report.is_set(key))
            .collect();
        if given.len() > 1 {
            let message = "password, password_file and password_env exclude each other; keep one of them";
            report.unreadable(&given[1], message);
            return RoleSecret::None;
        }
        let Some(key) = given.first() else { return RoleSecret::None };
        let secret = match self {
            Self { password: Some(secret), .. } => Ok(secret),
            Self { password_file: Some(file), .. } => read_secret_file(&file),
            Self { password_env: Some(name), .. } => read_secret_variable(&name, overrides),
            // Written, but not readable or "": the first is already told.
            Self { .. } => Err("is empty; write a value, or leave the key out".to_owned()),
        };
        match secret.and_then(|secret| RoleSecret::classify(secret).map_err(|error| error.to_string())) {
            Ok(secret) => secret,
            Err(message) => {
                report.unreadable(key, message);
                RoleSecret::None
            }
        }
    }
}

// Neither error repeats what was written: it may be the secret itself under the wrong key.
fn read_secret_file(path: &Path) -> Result<Secret, String> {
    let mut text = Zeroizing::new(String::new());
    let read = fs::File::open(path).and_then(|file| file.take(MAX_SECRET_FILE_BYTES + 1).read_to_string(&mut text));
    let bytes = read.map_err(|error| format!("the file it names cannot be read: {error}"))?;
    if u64::try_from(bytes).is_ok_and(|bytes| bytes > MAX_SECRET_FILE_BYTES) {
        return Err(format!("the file it names is larger than {MAX_SECRET_FILE_BYTES} bytes"));
    }
    let line = text.strip_suffix('\n').unwrap_or(&text);
    Ok(line.strip_suffix('\r').unwrap_or(line).into())
}

fn read_secret_variable(name: &str, overrides: &Overrides) -> Result<Secret, String> {
    let value = overrides.variable(name).ok_or_else(|| "the environment variable it names is not set".to_owned())?;
    let text = value.to_str().ok_or_else(|| "the environment variable it names is not UTF-8".to_owned())?;
    Ok(text.into())
}
