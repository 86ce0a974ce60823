//! What may be set, and the one default of each setting.
//!
//! Plain data: no socket, no task, no clock. `impl Default` is the only place where a default is written; the
//! reference (`config/reference.toml`) is rendered from it and from the comments below. Times are `Duration`; `None` means "no limit".

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    num::NonZeroU32,
    path::PathBuf,
    time::Duration,
};

use documented::{Documented, DocumentedFields};

use crate::{Secret, TenantId, TenantState};

/// Everything Tenantry is told at start or reload.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// `[process]`.
    pub process: Process,
    /// `[listen]`.
    pub listen: Listen,
    /// `[auth]`.
    pub auth: Auth,
    /// `[pool]`: what a tenant gets unless it says otherwise.
    pub pool: Pool,
    /// `[admin]`.
    pub admin: Admin,
    /// `[log]`.
    pub log: Log,
    /// PostgreSQL servers by name.
    pub servers: BTreeMap<String, Server>,
    /// Tenants by name: the name is the database name that clients ask for.
    pub tenants: BTreeMap<TenantId, Tenant>,
    /// `[tenants."*"]`: serves any database name that no tenant has, on one server.
    pub any_tenant: Option<Tenant>,
    /// Roles that may log in to every tenant (`[[roles]]`); a tenant's own roles come first.
    pub roles: Vec<Role>,
}

/// `[process]`: the process as a whole. Counts from the next start.
#[derive(Debug, Clone, PartialEq, Documented, DocumentedFields)]
pub struct Process {
    /// Threads that serve clients. "auto": half of the CPUs this process may use, at least one. Each further one costs
    /// about 15 % more CPU for a small query, for wake-ups between threads; add one when the busiest is near 100 %.
    pub workers: OrAuto<NonZeroU32>,
}

/// A value, or the word `auto` for one that Tenantry finds out by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OrAuto<T> {
    /// Found out at run time.
    Auto,
    /// As written.
    Is(T),
}

/// `[listen]`: where clients connect and what they may do before login.
#[derive(Debug, Clone, PartialEq, Documented, DocumentedFields)]
pub struct Listen {
    /// TCP addresses, `host:port` or `[v6]:port`.
    pub addresses: Vec<SocketAddr>,
    /// Directory of the Unix socket `.s.PGSQL.<port of the first address>`; absent: no Unix socket.
    pub unix_socket_dir: Option<PathBuf>,
    /// Permission bits of the Unix socket, octal in the file ("0777").
    pub unix_socket_mode: u32,
    /// Most client connections over all tenants. Besides them half as many (at least 64) may be logging in.
    pub max_client_conn: u32,
    /// From accept to the end of login, TLS included.
    pub client_login_timeout: Duration,
    /// Largest memory one client may make us hold for one message that must be looked at whole (a named Parse).
    pub max_message_size: usize,
    /// Largest memory that all clients together may make us hold for such messages; the next one gets 53200.
    pub max_message_memory: usize,
    /// `[listen.tls]`.
    pub tls: ClientTls,
}

/// `[listen.tls]`: encryption towards clients.
#[derive(Debug, Clone, PartialEq, Documented, DocumentedFields)]
pub struct ClientTls {
    /// `disable`: TLS is refused; `allow`: the client chooses; `require`: plain TCP logins are refused (Unix sockets may stay plain).
    pub mode: ClientTlsMode,
    /// PEM chain and key. Without them a self-signed certificate is made at first start in `state_dir`.
    pub cert_file: Option<PathBuf>,
    /// PEM key of `cert_file`.
    pub key_file: Option<PathBuf>,
    /// Where the self-signed certificate is kept (`tenantry.crt`, `tenantry.key`).
    pub state_dir: PathBuf,
}

/// `disable`: TLS is refused; `allow`: the client chooses; `require`: plain TCP logins are refused (Unix sockets may stay plain).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientTlsMode {
    /// TLS is refused.
    Disable,
    /// The client chooses.
    Allow,
    /// Plain TCP logins are refused.
    Require,
}

/// `[auth]`: how clients prove who they are.
#[derive(Debug, Clone, PartialEq, Documented, DocumentedFields)]
pub struct Auth {
    /// `scram-sha-256`, `md5`, `password` (only ever asked for over TLS or a Unix socket) or `trust`.
    pub auth_type: AuthType,
    /// PBKDF2 rounds of verifiers that Tenantry makes itself.
    pub scram_iterations: NonZeroU32,
    /// Logins that may fail in a minute from one address (IPv6: one /64 network) for one database, and 16 times as
    /// many for all; more are turned away unheard. "off": no limit.
    pub max_failed_logins: Option<u32>,
}

/// How a client proves who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthType {
    /// SCRAM-SHA-256, with -PLUS offered over TLS.
    ScramSha256,
    /// PostgreSQL's md5 challenge; for old clients.
    Md5,
    /// Cleartext password, only ever asked for over TLS or a Unix socket.
    Password,
    /// No proof at all.
    Trust,
}

/// For how long a client holds a server connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolMode {
    /// A server connection is lent for one transaction.
    Transaction,
    /// A server connection is lent until the client leaves.
    Session,
    /// A server connection is lent for one statement; transactions of several statements are refused.
    Statement,
}

/// What keeps one client's session state from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isolation {
    /// What a client may have left is asked of PostgreSQL when something points to it, kept for it and from others.
    Tracked,
    /// The same, and each use of a server connection begins with DISCARD ALL, in the same write.
    Strict,
}

/// `[pool]`: what every tenant gets unless it says otherwise. PgBouncer's names where the meaning is PgBouncer's.
#[derive(Debug, Clone, PartialEq, Documented, DocumentedFields)]
pub struct Pool {
    /// When a server connection goes back to the pool: after each `transaction`, `session` or `statement`.
    pub pool_mode: PoolMode,
    /// Most server connections of one (tenant, role).
    pub pool_size: u32,
    /// Server connections kept open even if idle; needs a stored password or one login since start.
    pub min_pool_size: u32,
    /// Most clients that wait at once in one (tenant, role); the next one gets 53300.
    pub max_waiters: u32,
    /// A client that waited this long gets 53300 and stays connected.
    pub query_wait_timeout: Duration,
    /// Idle connections are used oldest first (false: newest first).
    pub server_round_robin: bool,
    /// A server connection this old is closed at rest; shortened by up to 20 % at random for each connection.
    pub server_lifetime: Duration,
    /// A server connection idle this long is closed, down to `min_pool_size`.
    pub server_idle_timeout: Duration,
    /// From dial to the end of the server login.
    pub server_connect_timeout: Duration,
    /// An idle connection is checked in the background this often.
    pub server_check_delay: Duration,
    /// Most protocol-level prepared statements kept on one server connection.
    pub max_prepared_statements: u32,
    /// Longest wait between a request and its answer, then cancel and 57014. "off": no limit.
    pub query_timeout: Option<Duration>,
    /// A transaction idle this long is ended with 25P03. "off": no limit.
    pub idle_transaction_timeout: Option<Duration>,
    /// A transaction open this long is ended with 25P04. "off": no limit.
    pub transaction_timeout: Option<Duration>,
    /// A client silent this long outside a transaction is sent away with 57P05. "off": no limit.
    pub client_idle_timeout: Option<Duration>,
    /// How long a vanished client's server connection may take to come to rest before it is closed.
    pub rollback_timeout: Duration,
    /// Most leases of one (tenant, role) that may outlive their transaction.
    pub max_pinned: u32,
    /// What keeps one client's session state from another: `tracked`, or `strict`, which wipes a server connection (DISCARD ALL)
    /// before each use as well: prepared statements are then prepared anew in each transaction.
    pub isolation: Isolation,
    /// Unnamed statements are shared and kept prepared like named ones: less parsing for drivers that name none; of no use
    /// where values stand in the text.
    pub reuse_unnamed_statements: bool,
}

/// `[admin]`: the HTTP listener.
#[derive(Debug, Clone, PartialEq, Documented, DocumentedFields)]
pub struct Admin {
    /// IP address and port; `""` means no listener. Beyond loopback, an API (`catalog`) must have a token or `client_ca_file`.
    pub address: Option<SocketAddr>,
    /// PEM chain and key: HTTPS. Without them HTTP.
    pub cert_file: Option<PathBuf>,
    /// PEM key of `cert_file`.
    pub key_file: Option<PathBuf>,
    /// PEM roots: clients must show a certificate that one of these signed (mTLS), besides their token.
    pub client_ca_file: Option<PathBuf>,
    /// The server whose `control` database holds the catalog (schema `tenantry`): there is an API for tenants then. Without
    /// it there are `/metrics` and health only. Counts from the next start.
    pub catalog: Option<String>,
    /// Where the last known catalog is kept, so that Tenantry starts without the control database.
    pub state_dir: PathBuf,
    /// Where archives go: a directory, or `s3://BUCKET/PREFIX` (credentials from `AWS_*` variables).
    pub archives: String,
    /// Archives may lie in memory (tmpfs, ramfs): for a trial, since they are gone with the machine or the container.
    pub archives_volatile: bool,
    /// pg_dump, pg_restore or the store may stand still for so long, PostgreSQL doing nothing for them meanwhile, before the job
    /// turns back.
    pub archive_stall_timeout: Duration,
    /// Where an SQLite file waits for its import, 0600 in a directory of 0700; of several processes on one catalog one directory
    /// for all.
    pub imports_dir: PathBuf,
    /// Largest SQLite file that may be uploaded; four at once are.
    pub max_import_size: usize,
    /// An import may be at work on its file for so long, from opening it to its last row; PostgreSQL, which takes the rows meanwhile,
    /// included.
    pub import_timeout: Duration,
    /// After a move: log (WAL) that a server may keep for the copy that follows it. Past it the copy follows no more, and a
    /// rollback leaves behind what was written since; at half of it there is a warning.
    pub max_followed_wal: usize,
    /// Directory of `pg_dump` and `pg_restore`, as new as the newest server; without it they are searched in `PATH`.
    pub postgres_bin: Option<PathBuf>,
    /// Extensions that `create` may install, separated by commas.
    pub extensions: String,
    /// Where clients reach Tenantry, `host:port`, as told in credentials that are handed out; without it the first of
    /// `listen.addresses`.
    pub public_address: Option<String>,
}

/// `[log]`: what is logged, and how.
#[derive(Debug, Clone, PartialEq, Documented, DocumentedFields)]
pub struct Log {
    /// `tracing` filter, e.g. `info` or `tenantry=debug`.
    pub filter: String,
    /// `text` or `json`.
    pub format: LogFormat,
}

/// Shape of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object per line.
    Json,
}

/// `[servers.NAME]`: a PostgreSQL server. NAME is 1 to 63 of a-z, 0-9, _ and -, and starts with a-z or _.
#[derive(Debug, Clone, PartialEq, Documented, DocumentedFields)]
pub struct Server {
    /// Host name, IP address, or the directory of a Unix socket (starts with `/`).
    pub host: String,
    /// TCP port, or the number in the name of the Unix socket.
    pub port: u16,
    /// Most connections Tenantry holds on this server over all tenants. "auto": PostgreSQL's `max_connections` without
    /// those it reserves and without `reserve`; and never more than others leave free.
    pub cap: OrAuto<NonZeroU32>,
    /// Connections kept free for people and maintenance when `cap` is "auto".
    pub reserve: u32,
    /// Most dials under way at once (storm guard).
    pub max_connecting: u32,
    /// First wait after a failed dial, doubled up to 4 times this.
    pub server_login_retry: Duration,
    /// `[servers.NAME.tls]`.
    pub tls: ServerTls,
    /// Unacknowledged data and keepalive limit on the link (`TCP_USER_TIMEOUT`).
    pub tcp_user_timeout: Duration,
    /// Most cancel requests under way at once.
    pub max_cancels: u32,
    /// `[servers.NAME.control]`: how Tenantry itself logs in, for what is done to databases.
    pub control: Option<Control>,
}

/// `[servers.NAME.control]`: Tenantry's own login, for what is done to databases; clients never get it. It uses one
/// connection now and then, which is not part of `cap`.
#[derive(Debug, Clone, PartialEq)]
pub struct Control {
    /// Role.
    pub role: String,
    /// Database that it logs in to.
    pub database: String,
    /// `Plain`, or `None` where the server trusts it.
    pub secret: RoleSecret,
    /// Keep PostgreSQL's own CONNECTION LIMIT of each tenant's database equal to the tenant's ceiling.
    pub connection_limits: bool,
}

/// `[servers.NAME.tls]`, or `tls = { mode = "...", ca_file = "..." }`: encryption towards the server.
#[derive(Debug, Clone, PartialEq, Documented, DocumentedFields)]
pub struct ServerTls {
    /// `disable`, `prefer`, `require`, `verify-ca` or `verify-full`; when absent, `disable` for Unix sockets and loopback addresses.
    pub mode: ServerTlsMode,
    /// PEM roots; without it the system's.
    pub ca_file: Option<PathBuf>,
    /// Direct TLS (ALPN `postgresql`), PostgreSQL 17 and newer.
    pub direct: bool,
}

/// libpq's sslmode words. `Require` encrypts without looking at the certificate unless `ca_file` is set (then as verify-ca).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerTlsMode {
    /// No TLS.
    Disable,
    /// TLS if the server has it.
    Prefer,
    /// TLS; the certificate is looked at only if `ca_file` is set.
    Require,
    /// TLS, and the certificate is signed by a known authority.
    VerifyCa,
    /// As `VerifyCa`, and the certificate is for this host.
    VerifyFull,
}

/// `[tenants.NAME]`: a database name that clients ask for, 1 to 63 of a-z, 0-9, _ and -, starting with a-z or _.
#[derive(Debug, Clone, PartialEq, Documented, DocumentedFields)]
pub struct Tenant {
    /// Name of a `[servers.*]`; may be left out when there is exactly one.
    pub server: String,
    /// Database on the server; default: the tenant's name.
    pub database: Option<String>,
    /// `[pool]` with this tenant's own values laid over it (written flat in `[tenants.NAME]`).
    pub pool: Pool,
    /// Server connections that are always available to this tenant; those of a server's tenants together must fit its `cap`.
    pub floor: u32,
    /// Most server connections of this tenant, over all of its roles; "off": as many as the server's `cap` allows.
    pub ceiling: Option<u32>,
    /// Its part of the connections above the floors while several tenants wait, in proportion to the others'; 1 to 1000.
    pub weight: NonZeroU32,
    /// Most client connections of this tenant; "off": only the limit over all tenants.
    pub max_client_conn: Option<u32>,
    /// Roles that may log in to this tenant, besides those of all tenants.
    pub roles: Vec<Role>,
    /// Other names under which clients reach it: those that it had before.
    pub aliases: Vec<TenantId>,
    /// Not set in the file: what the catalog says of it.
    pub standing: Standing,
}

impl Tenant {
    /// The roles that may log in: its own, and those of all tenants (`shared`) that it has none of the same name for.
    pub fn all_roles<'a>(&'a self, shared: &'a [Role]) -> impl Iterator<Item = &'a Role> {
        let is_own = |role: &Role| self.roles.iter().any(|own| own.name == role.name);
        self.roles.iter().chain(shared.iter().filter(move |role| !is_own(role)))
    }

    /// The most connections that the pools of its roles can have together.
    #[must_use]
    pub fn most_connections(&self, shared: &[Role]) -> u32 {
        let sizes = self.all_roles(shared).map(|role| role.pool_size.unwrap_or(self.pool.pool_size));
        sizes.fold(0, u32::saturating_add)
    }
}

/// What only the catalog knows of a tenant.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Standing {
    /// The number that stays when its name changes; `None` for a tenant of the file, which is known by its name.
    pub number: Option<i64>,
    /// Where it is in its life.
    pub state: TenantState,
    /// Grows when its tables were changed around its clients: what is prepared on its server connections is dropped then.
    pub plans: i64,
    /// Connections that a job has beside those of its clients: PostgreSQL's own limit of its database has room for them.
    pub room: u32,
}

/// A role that may log in (`[[tenants.NAME.roles]]` or `[[roles]]`).
#[derive(Debug, Clone, PartialEq)]
pub struct Role {
    /// The name that clients log in with.
    pub name: String,
    /// How the role proves itself, to Tenantry and to the server.
    pub secret: RoleSecret,
    /// Overrides the tenant's.
    pub pool_mode: Option<PoolMode>,
    /// Overrides the tenant's.
    pub pool_size: Option<u32>,
    /// Not set in the file: the secret before this one, while a change of it is under way.
    pub former: Option<FormerSecret>,
}

/// What only the catalog knows of a role: the secret that it had before, for clients that do not know the new one yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormerSecret {
    /// A SCRAM verifier with the salt and the rounds of the new one, as text.
    pub verifier: Secret,
    /// Base64 of 32 bytes that lead from the old secret's `ClientKey` to the new one's; without it who proves the old one
    /// cannot log in to the server.
    pub bridge: Option<Secret>,
    /// Logins with it are still let in.
    pub accepts: bool,
}

/// Exactly one of the keys `password`, `password_file`, `password_env`, or none (only good for `auth_type = "trust"` on both sides).
/// The value may be plain, `md5<32 hex>` or `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`, as in `pg_authid`.
#[derive(Debug, Clone, PartialEq)]
pub enum RoleSecret {
    /// No secret known.
    None,
    /// The password itself.
    Plain(Secret),
    /// `md5` and the hash of password and role name.
    Md5(Secret),
    /// A SCRAM-SHA-256 verifier.
    Scram(Secret),
}

/// The defaults; no server and no tenant, so not yet enough to serve.
impl Default for Settings {
    fn default() -> Self {
        Self {
            process: Process::default(),
            listen: Listen::default(),
            auth: Auth::default(),
            pool: Pool::default(),
            admin: Admin::default(),
            log: Log::default(),
            servers: BTreeMap::new(),
            tenants: BTreeMap::new(),
            any_tenant: None,
            roles: Vec::new(),
        }
    }
}

impl Default for Process {
    fn default() -> Self {
        Self { workers: OrAuto::Auto }
    }
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            addresses: vec![local(6432)],
            unix_socket_dir: None,
            // As PgBouncer: the password is the lock, not the file mode.
            unix_socket_mode: 0o777,
            max_client_conn: 10_000,
            client_login_timeout: Duration::from_secs(60),
            max_message_size: 16 << 20,
            max_message_memory: 256 << 20,
            tls: ClientTls::default(),
        }
    }
}

impl Default for ClientTls {
    fn default() -> Self {
        Self {
            mode: ClientTlsMode::Allow,
            cert_file: None,
            key_file: None,
            state_dir: PathBuf::from("/var/lib/tenantry"),
        }
    }
}

impl Default for Auth {
    fn default() -> Self {
        Self {
            auth_type: AuthType::ScramSha256,
            scram_iterations: POSTGRES_SCRAM_ITERATIONS,
            max_failed_logins: Some(60),
        }
    }
}

/// PostgreSQL's `scram_iterations`.
const POSTGRES_SCRAM_ITERATIONS: NonZeroU32 = NonZeroU32::MIN.saturating_add(4095);

impl Default for Pool {
    fn default() -> Self {
        Self {
            pool_mode: PoolMode::Transaction,
            pool_size: 20,
            min_pool_size: 0,
            max_waiters: 1_000,
            query_wait_timeout: Duration::from_secs(2 * 60),
            server_round_robin: false,
            server_lifetime: Duration::from_secs(60 * 60),
            server_idle_timeout: Duration::from_secs(10 * 60),
            server_connect_timeout: Duration::from_secs(15),
            server_check_delay: Duration::from_secs(30),
            max_prepared_statements: 200,
            query_timeout: None,
            idle_transaction_timeout: None,
            transaction_timeout: None,
            client_idle_timeout: None,
            rollback_timeout: Duration::from_secs(5),
            max_pinned: 10,
            isolation: Isolation::Tracked,
            reuse_unnamed_statements: false,
        }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            address: Some(local(9930)),
            cert_file: None,
            key_file: None,
            client_ca_file: None,
            catalog: None,
            state_dir: PathBuf::from("/var/lib/tenantry"),
            archives: "/var/lib/tenantry/archives".to_owned(),
            archives_volatile: false,
            archive_stall_timeout: Duration::from_secs(300),
            imports_dir: PathBuf::from("/var/lib/tenantry/imports"),
            max_import_size: 4 << 30,
            // 4 GiB are read in minutes; what takes hours does not end.
            import_timeout: Duration::from_secs(2 * 3_600),
            max_followed_wal: 4 << 30,
            postgres_bin: None,
            extensions: "citext, hstore, pg_trgm, unaccent, btree_gin, btree_gist, uuid-ossp, pgcrypto".to_owned(),
            public_address: None,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { filter: "info".to_owned(), format: LogFormat::Text }
    }
}

/// A server without a host, which only the settings can give.
impl Default for Server {
    fn default() -> Self {
        Self {
            host: String::new(),
            port: 5432,
            cap: OrAuto::Auto,
            reserve: 10,
            max_connecting: 4,
            server_login_retry: Duration::from_millis(50),
            tls: ServerTls::default(),
            tcp_user_timeout: Duration::from_secs(15),
            max_cancels: 16,
            control: None,
        }
    }
}

/// For a server that is not local; the loader takes `Disable` for one that is.
impl Default for ServerTls {
    fn default() -> Self {
        Self { mode: ServerTlsMode::VerifyFull, ca_file: None, direct: false }
    }
}

/// A tenant with the default pool; the server's name, if empty, is filled in by the loader.
impl Default for Tenant {
    fn default() -> Self {
        Self {
            server: String::new(),
            database: None,
            floor: 0,
            ceiling: None,
            weight: NonZeroU32::MIN,
            pool: Pool::default(),
            max_client_conn: None,
            roles: Vec::new(),
            aliases: Vec::new(),
            standing: Standing::default(),
        }
    }
}

/// Only this machine, until the settings say otherwise.
fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}
