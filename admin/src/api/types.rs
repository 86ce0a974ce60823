//! What the API takes and gives, as types; the OpenAPI document is made from them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tenantry_proxy::directory::ClientSnapshot;
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};

use crate::{
    catalog::{
        model::{Access, Ended, Entry, Isolation, Kept, Method, Mode, Spec},
        store::JobRow,
    },
    jobs::work::{JobState, Step, Work},
};

/// A tenant.
#[derive(Debug, Serialize, ToSchema)]
pub struct TenantView {
    /// Stays when the name changes; null: a tenant of the settings file.
    pub number: Option<i64>,
    pub name: String,
    /// creating, active, paused, draining, drained, suspended or archived.
    pub state: String,
    /// New transactions wait for a job.
    pub held: bool,
    /// From the settings file: the API shows it and changes nothing.
    pub is_static: bool,
    pub server: String,
    /// The database on the server.
    pub database: String,
    /// Who owns the database.
    pub owner_role: Option<String>,
    /// Roles that may log in.
    pub roles: Vec<String>,
    /// Names that lead here too.
    pub aliases: Vec<String>,
    /// Grows with every change; also in ETag.
    pub version: i64,
    pub spec: Spec,
    /// Where clients reach it.
    pub address: Address,
    /// What goes on now, in this process.
    pub live: Option<Live>,
    /// It was moved, and the copy at the old server awaits `move/confirm` or `move/rollback`.
    pub moved: Option<Moved>,
    #[serde(with = "time::serde::rfc3339::option")]
    pub created_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    pub updated_at: Option<OffsetDateTime>,
}

/// The copy that a move left behind.
#[derive(Debug, Serialize, ToSchema)]
pub struct Moved {
    /// Where it is.
    pub from: String,
    pub method: Method,
    /// What is written now is applied there, too, so that a rollback loses nothing.
    pub follows: bool,
    #[serde(with = "time::serde::rfc3339")]
    pub since: OffsetDateTime,
    /// It followed, and does not any more.
    pub ended: Option<Ended>,
    /// What somebody should do something about.
    pub warning: Option<String>,
}

impl Moved {
    fn of(kept: &Kept, at: &str) -> Self {
        let warning = if kept.is_open {
            Some(format!(
                "the copy at {} is still to be closed, which is done as soon as that server answers; until then whoever reaches it \
                 around Tenantry may write there",
                kept.server
            ))
        } else if kept.follows && kept.is_dear {
            Some(format!(
                "{at} keeps more than half of admin.max_followed_wal of its log for the copy at {}: confirm the move, or roll \
                 it back",
                kept.server
            ))
        } else {
            None
        };
        Self {
            from: kept.server.clone(),
            method: kept.method,
            follows: kept.follows,
            since: kept.since,
            ended: kept.ended.clone(),
            warning,
        }
    }
}

/// A tenant that was adopted.
#[derive(Debug, Serialize, ToSchema)]
pub struct Adopted {
    #[serde(flatten)]
    pub tenant: TenantView,
    /// Every role of the server may connect to the database, also around Tenantry; `REVOKE CONNECT ON DATABASE ... FROM PUBLIC`
    /// ends that, and is not done here, since others may rely on it.
    pub public_may_connect: bool,
}

/// Host and port.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Address {
    pub host: String,
    pub port: u16,
}

/// What goes on in a tenant.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct Live {
    /// Client connections.
    pub clients: u32,
    /// Clients that wait for a server connection.
    pub waiting: usize,
    /// Server connections at work.
    pub active: u32,
    /// Server connections, idle and closing ones included.
    pub connections: u32,
    /// Kept beyond their transaction by session state.
    pub pinned: u32,
}

/// Some of many, and where the rest begins.
#[derive(Debug, Serialize, ToSchema)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// Give this as `after` for the next page; null: there is none.
    pub next: Option<String>,
}

/// Which part of a list.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct PageQuery {
    /// `next` of the page before.
    #[param(max_length = 64)]
    pub after: Option<String>,
    /// At most so many.
    #[param(minimum = 1, maximum = 500, default = 100)]
    pub limit: Option<u32>,
}

/// The same, for jobs.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct JobQuery {
    /// `next` of the page before.
    #[param(max_length = 64)]
    pub after: Option<String>,
    /// At most so many.
    #[param(minimum = 1, maximum = 500, default = 100)]
    pub limit: Option<u32>,
    /// Only those of this tenant.
    #[param(max_length = 63)]
    pub tenant: Option<String>,
}

/// Which of a tenant's clients.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ClientQuery {
    /// `next` of the page before.
    #[param(max_length = 64)]
    pub after: Option<String>,
    /// At most so many.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    pub limit: Option<u32>,
    /// Only those that keep their server connection for a reason.
    #[serde(default)]
    pub pinned: bool,
}

/// Whether to do it at all.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct DryRun {
    /// Only tell the steps.
    #[serde(default)]
    pub dry_run: bool,
}

/// How a file is imported.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ImportQuery {
    /// Everything is done, compared, and rolled back: a job that tells what an import would.
    #[serde(default)]
    pub dry_run: bool,
    /// Tables, with commas between them, whose rows give way to those of the file; those of Django that `migrate` fills do
    /// anyway.
    pub replace: Option<String>,
}

/// An SQLite file.
#[derive(Debug, ToSchema)]
#[schema(value_type = String, format = Binary)]
#[expect(dead_code, reason = "only its schema is wanted: the body is a stream")]
pub struct SqliteFile(Vec<u8>);

/// A new tenant.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Create {
    /// Of the tenant, its database and its role.
    #[schema(pattern = "^[a-z][a-z0-9_]{0,47}$", example = "shop")]
    pub name: String,
    /// A server of the settings; may be left out when there is one.
    #[serde(default)]
    #[schema(max_length = 63)]
    pub server: Option<String>,
    /// A role that is there already and is shared with other tenants owns the database; null: a role of its own is made.
    #[serde(default)]
    #[schema(max_length = 63)]
    pub shared_role: Option<String>,
    /// Filled from this archive, whosever it was.
    #[serde(default)]
    pub archive: Option<i64>,
    #[serde(default)]
    pub spec: Spec,
}

/// An existing database becomes a tenant.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Adopt {
    /// A server of the settings; may be left out when there is one.
    #[serde(default)]
    #[schema(max_length = 63)]
    pub server: Option<String>,
    /// The database; null: the tenant's name.
    #[serde(default)]
    #[schema(max_length = 63)]
    pub database: Option<String>,
    /// The role that its clients log in with; null: the owner of the database.
    #[serde(default)]
    #[schema(max_length = 63)]
    pub role: Option<String>,
    /// Its SCRAM verifier, as in pg_authid; null: read there, which only a superuser may, or that of another tenant with the
    /// same role.
    #[serde(default)]
    #[schema(max_length = 500)]
    pub verifier: Option<String>,
    /// Without extensions and settings: the database keeps those that it has.
    #[serde(default)]
    pub spec: Spec,
}

/// What is to change; what is left out stays, null takes a value away.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Update {
    #[serde(default, with = "maybe", skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 200)]
    pub application: Option<Option<String>>,
    #[serde(default, with = "maybe", skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 200)]
    pub owner: Option<Option<String>>,
    #[serde(default, with = "maybe", skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 200)]
    pub stage: Option<Option<String>>,
    #[serde(default, with = "maybe", skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 10, pattern = "^[0-9]{4}-[0-9]{2}-[0-9]{2}$")]
    pub deployed: Option<Option<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub floor: Option<u32>,
    #[serde(default, with = "maybe", skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub ceiling: Option<Option<u32>>,
    #[serde(default, with = "maybe", skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1000)]
    pub weight: Option<Option<u32>>,
    #[serde(default, with = "maybe", skip_serializing_if = "Option::is_none")]
    pub pool_mode: Option<Option<Mode>>,
    #[serde(default, with = "maybe", skip_serializing_if = "Option::is_none")]
    pub isolation: Option<Option<Isolation>>,
    #[serde(default, with = "maybe", skip_serializing_if = "Option::is_none")]
    pub reuse_unnamed_statements: Option<Option<bool>>,
    #[serde(default, with = "maybe", skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub pool_size: Option<Option<u32>>,
    #[serde(default, with = "maybe", skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub max_client_conn: Option<Option<u32>>,
}

/// Left out is `None`, null is `Some(None)`.
mod maybe {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn deserialize<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<Option<T>>, D::Error> {
        Option::<T>::deserialize(from).map(Some)
    }

    pub fn serialize<S: Serializer, T: Serialize>(value: &Option<Option<T>>, to: S) -> Result<S::Ok, S::Error> {
        value.as_ref().and_then(Option::as_ref).serialize(to)
    }
}

impl Update {
    pub fn apply(&self, spec: &mut Spec) {
        fn set<T: Clone>(field: &mut Option<T>, wish: Option<&Option<T>>) {
            if let Some(wish) = wish {
                field.clone_from(wish);
            }
        }
        set(&mut spec.application, self.application.as_ref());
        set(&mut spec.owner, self.owner.as_ref());
        set(&mut spec.stage, self.stage.as_ref());
        set(&mut spec.deployed, self.deployed.as_ref());
        set(&mut spec.ceiling, self.ceiling.as_ref());
        set(&mut spec.weight, self.weight.as_ref());
        set(&mut spec.pool_mode, self.pool_mode.as_ref());
        set(&mut spec.isolation, self.isolation.as_ref());
        set(&mut spec.reuse_unnamed_statements, self.reuse_unnamed_statements.as_ref());
        set(&mut spec.pool_size, self.pool_size.as_ref());
        set(&mut spec.max_client_conn, self.max_client_conn.as_ref());
        spec.floor = self.floor.unwrap_or(spec.floor);
    }
}

/// A new name.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rename {
    /// Of the tenant and, if it had the tenant's name, of its database.
    #[schema(pattern = "^[a-z][a-z0-9_]{0,47}$", example = "store")]
    pub to: String,
    /// How long transactions under way may take to finish; past it nothing is renamed. Clients are held meanwhile, so it must
    /// be less than `pool.query_wait_timeout`, by 10 s or by half of it; null: 30 s, or as long as that allows.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 600_000)]
    pub wait_ms: Option<u64>,
}

/// How long transactions under way may take.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Deadline {
    /// Past it they are cancelled, then cut.
    #[serde(default = "Deadline::default_ms")]
    #[schema(minimum = 0, maximum = 3_600_000, default = 30_000)]
    pub deadline_ms: u64,
}

impl Deadline {
    fn default_ms() -> u64 {
        30_000
    }
}

/// Away with it.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Delete {
    /// The tenant's name, once more.
    #[schema(max_length = 63)]
    pub confirm: String,
    /// There need not be an archive of it.
    #[serde(default)]
    pub without_archive: bool,
    /// Past it transactions are cancelled, then cut.
    #[serde(default = "Deadline::default_ms")]
    #[schema(minimum = 0, maximum = 3_600_000, default = 30_000)]
    pub deadline_ms: u64,
}

/// Out of an archive.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Restore {
    /// Of this tenant; null: the newest.
    #[serde(default)]
    pub archive: Option<i64>,
}

/// Whose password.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rotate {
    /// Null: its owner.
    #[serde(default)]
    #[schema(max_length = 63)]
    pub role: Option<String>,
    /// Milliseconds for which the old password is good beside the new one; 0: not at all. Null: an hour, if it can be: some
    /// client must have logged in with the old one, through this process, since it was started.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 604_800_000)]
    pub grace_ms: Option<u64>,
}

/// From a shared role to one of the tenant's own.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Separate {
    /// What the new role is called; null: like the tenant.
    #[serde(default)]
    #[schema(max_length = 63)]
    pub role: Option<String>,
    /// It has its own role; the shared ones get in no more.
    #[serde(default)]
    pub finish: bool,
    /// How long transactions under way may take to finish; past it nothing is changed.
    #[serde(default = "Separate::wait")]
    #[schema(minimum = 0, maximum = 600_000, default = 30_000)]
    pub wait_ms: u64,
}

impl Separate {
    fn wait() -> u64 {
        30_000
    }
}

/// Nothing to say.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// How clients log in. Told once: nobody keeps the password.
#[derive(Debug, Serialize, ToSchema)]
pub struct Credentials {
    pub host: String,
    pub port: u16,
    pub database: String,
    pub user: String,
    pub password: String,
    /// All of it as one URL.
    pub url: String,
}

/// What was begun.
#[derive(Debug, Serialize, ToSchema)]
pub struct Begun {
    /// Null with `dry_run`, and for what is done at once.
    pub job: Option<JobView>,
    /// The steps, in order.
    pub steps: Vec<Step>,
    /// The tenant as it is now.
    pub tenant: Option<TenantView>,
    /// They work once the job has succeeded.
    pub credentials: Option<Credentials>,
}

/// Durable work.
#[derive(Debug, Serialize, ToSchema)]
pub struct JobView {
    pub id: i64,
    /// create, rename, drain, archive, restore, delete, rotate, separate, retire, import, move, rollback_move, confirm_move, migrate or exec.
    pub kind: String,
    /// The tenant's name when it was begun.
    pub tenant: String,
    pub state: JobState,
    /// Steps done, of the way there or (undoing) of the way back.
    pub step: usize,
    pub steps: Vec<Step>,
    /// What the step under way says of itself.
    pub progress: Option<String>,
    /// What it found and counted.
    pub result: serde_json::Value,
    /// Why it turned back.
    pub error: Option<String>,
    /// Whose token.
    pub actor: String,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub updated_at: OffsetDateTime,
}

impl JobView {
    /// One that was just written down.
    #[must_use]
    pub fn written(id: i64, work: &Work, tenant: &str, actor: &str) -> Self {
        let now = OffsetDateTime::now_utc();
        Self {
            id,
            kind: work.kind().to_owned(),
            steps: work.plan(),
            tenant: tenant.to_owned(),
            state: JobState::Queued,
            step: 0,
            progress: None,
            result: serde_json::json!({}),
            error: None,
            actor: actor.to_owned(),
            created_at: now,
            updated_at: now,
        }
    }
}

impl JobView {
    /// In a list: what a job found wrong row by row is in its own page.
    #[must_use]
    pub fn in_list(job: JobRow) -> Self {
        let mut view = Self::from(job);
        if let Some(result) = view.result.as_object_mut() {
            result.remove("rounded_rows");
        }
        if let Some(problems) = view.result.get_mut("problems").and_then(serde_json::Value::as_object_mut) {
            problems.remove("groups");
        }
        view
    }
}

impl From<JobRow> for JobView {
    fn from(job: JobRow) -> Self {
        Self {
            id: job.id,
            kind: job.work.kind().to_owned(),
            steps: job.work.plan(),
            tenant: job.name,
            state: job.state,
            step: job.step,
            progress: job.progress,
            result: job.result,
            error: job.error,
            actor: job.actor,
            created_at: job.created_at,
            updated_at: job.updated_at,
        }
    }
}

/// One server-sent event of a job.
#[derive(Debug, Serialize, ToSchema)]
pub struct JobEvent {
    /// Its number, for Last-Event-ID; only of steps.
    pub id: Option<String>,
    /// step, progress or end.
    pub event: String,
    /// JSON: of a step and of progress `text` (and `at`), at the end the job.
    pub data: String,
}

/// One server-sent event of a rollout.
#[derive(Debug, Serialize, ToSchema)]
pub struct RolloutEvent {
    /// turn, progress or end.
    pub event: String,
    /// JSON: of a turn the tenant as in the rollout's `tenants`; of progress `state` and `counts`; at the end the rollout.
    pub data: String,
}

/// A PostgreSQL server.
#[derive(Debug, Serialize, ToSchema)]
pub struct ServerView {
    pub name: String,
    /// Server connections that Tenantry holds, and the most it may.
    pub connections: u32,
    pub cap: u32,
    /// Tenants on it.
    pub tenants: usize,
    /// Sum of their floors.
    pub floors: u64,
    /// The API can make tenants here.
    pub has_control: bool,
}

/// A token, without its secret.
#[derive(Debug, Serialize, ToSchema)]
pub struct TokenView {
    pub id: String,
    pub label: String,
    pub access: Access,
    #[serde(with = "time::serde::rfc3339")]
    pub expires_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

/// A new token.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewToken {
    /// Whose it is, or what for.
    #[schema(min_length = 1, max_length = 100)]
    pub label: String,
    pub access: Access,
    /// How long it is good.
    #[serde(default = "NewToken::days")]
    #[schema(minimum = 1, maximum = 3650, default = 90)]
    pub days: u32,
}

impl NewToken {
    fn days() -> u32 {
        90
    }
}

/// The one time that it is told.
#[derive(Debug, Serialize, ToSchema)]
pub struct TokenMade {
    pub token: String,
    pub id: String,
    #[serde(with = "time::serde::rfc3339")]
    pub expires_at: OffsetDateTime,
}

/// Why a role of a tenant would wait, or waits, for a server connection.
#[derive(Debug, Serialize, ToSchema)]
pub struct Why {
    pub role: String,
    /// Which limit: pool_size, ceiling, server_cap, connect_throttle, server_down, server_full, tenant_full, login_fails,
    /// paused; or nothing: the next client is served at once.
    pub blocked: String,
    /// What would help.
    pub remedy: String,
    /// Clients that would be before the next one.
    pub ahead: usize,
    /// Clients that wait, and for how long the first has, in milliseconds.
    pub waiting: usize,
    pub waited_ms: u64,
    /// Server connections of the role, and the most it may have.
    pub connections: u32,
    pub pool_size: u32,
    /// Of the tenant; ceiling null: as many as the server's cap allows.
    pub held: u32,
    pub ceiling: Option<u32>,
    /// Of the server.
    pub permits: u32,
    pub cap: u32,
}

/// A client of a tenant, in the process that was asked.
#[derive(Debug, Serialize, ToSchema)]
pub struct ClientView {
    /// Grows with each login.
    pub id: u64,
    /// What the client was told as the process number of its connection: drivers show it as the backend's PID.
    pub process: u32,
    pub role: String,
    /// idle, waiting, active, idle_in_transaction, pinned or closing.
    pub state: String,
    /// For how long it has been in that state.
    pub seconds: f64,
    pub server: String,
    /// Clients with the same server and number share server connections.
    pub pool: u32,
    /// Why it keeps its server connection beyond the transaction: advisory_lock, cursor, temp_object, prepare, listen,
    /// session_authorization, opaque, unknown, seed. As PostgreSQL said when it was last asked; without any the connection
    /// goes back to the pool.
    pub pins: Vec<String>,
}

impl From<ClientSnapshot> for ClientView {
    fn from(client: ClientSnapshot) -> Self {
        Self {
            id: client.id,
            process: client.process,
            role: client.role,
            state: client.state.as_str().to_owned(),
            seconds: client.in_state.as_secs_f64(),
            server: client.server,
            pool: client.pool.0,
            pins: client.pins.iter().map(|reason| reason.as_str().to_owned()).collect(),
        }
    }
}

/// The explanation for a tenant.
#[derive(Debug, Serialize, ToSchema)]
pub struct Explained {
    pub tenant: String,
    pub state: String,
    /// Those that were used since the start.
    pub roles: Vec<Why>,
}

impl TenantView {
    /// Of the catalog.
    #[must_use]
    pub fn of(entry: &Entry, address: Address, live: Option<Live>) -> Self {
        Self {
            number: Some(entry.number),
            name: entry.name.clone(),
            state: entry.state.to_string(),
            held: entry.held,
            is_static: false,
            server: entry.server.clone(),
            database: entry.database.clone(),
            owner_role: Some(entry.owner_role.clone()),
            roles: entry.roles.iter().map(|role| role.name.clone()).collect(),
            aliases: entry.aliases.clone(),
            version: entry.version,
            spec: entry.spec.clone(),
            address,
            live,
            moved: entry.kept.as_ref().map(|kept| Moved::of(kept, &entry.server)),
            created_at: Some(entry.created_at),
            updated_at: Some(entry.updated_at),
        }
    }

    /// Of the settings file.
    #[must_use]
    pub fn of_file(name: &str, tenant: &tenantry_config::Tenant, address: Address, live: Option<Live>) -> Self {
        let settings = BTreeMap::new();
        Self {
            number: None,
            name: name.to_owned(),
            state: "active".to_owned(),
            held: false,
            is_static: true,
            server: tenant.server.clone(),
            database: tenant.database.clone().unwrap_or_else(|| name.to_owned()),
            owner_role: None,
            roles: tenant.roles.iter().map(|role| role.name.clone()).collect(),
            aliases: tenant.aliases.iter().map(ToString::to_string).collect(),
            version: 0,
            spec: Spec {
                floor: tenant.floor,
                ceiling: tenant.ceiling,
                weight: Some(tenant.weight.get()),
                pool_mode: Some(tenant.pool.pool_mode.into()),
                isolation: Some(tenant.pool.isolation.into()),
                reuse_unnamed_statements: Some(tenant.pool.reuse_unnamed_statements),
                pool_size: Some(tenant.pool.pool_size),
                max_client_conn: tenant.max_client_conn,
                settings,
                ..Spec::default()
            },
            address,
            live,
            moved: None,
            created_at: None,
            updated_at: None,
        }
    }
}
