//! What the catalog holds, as types: the tables, the last known copy on disk and the API share them.

use std::{collections::BTreeMap, num::NonZeroU32};

use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use serde_json::Value;
use tenantry_config::{
    FormerSecret, Isolation as PoolIsolation, PoolMode, Role, RoleSecret, Secret, Settings, Standing, Tenant, TenantId,
    TenantState,
};
use time::OffsetDateTime;
use utoipa::ToSchema;

/// The catalog at one moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Known {
    /// Six letters and digits that tell this catalog from others.
    pub catalog: String,
    /// Grows with every change.
    pub revision: i64,
    pub tenants: Vec<Entry>,
    pub tokens: Vec<Token>,
    /// By tenant number: what is to be done to its sessions.
    #[serde(default)]
    pub orders: BTreeMap<i64, Order>,
    /// By tenant number: connections that an open job of a move has beside its clients.
    #[serde(default)]
    pub room: BTreeMap<i64, u32>,
}

/// While a copy follows: who sends, and who looks.
const ROOM_TO_FOLLOW: u32 = 3;

/// What is done to the sessions of a tenant that is drained or moved, once its transactions had their time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Running statements are cancelled.
    Cancel,
    /// Sessions end, those in a transaction too; of a tenant that is held only these.
    End,
}

/// A tenant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub number: i64,
    pub name: String,
    #[serde(with = "state_word")]
    pub state: TenantState,
    /// New transactions wait for a job.
    pub held: bool,
    pub server: String,
    pub database: String,
    pub owner_role: String,
    pub aliases: Vec<String>,
    pub version: i64,
    #[serde(deserialize_with = "lenient_spec")]
    pub spec: Spec,
    pub roles: Vec<RoleRow>,
    /// How often its tables were changed around its clients: each process drops the plans of its connections then.
    #[serde(default)]
    pub plans: i64,
    /// It was moved, and the copy at the old server is kept.
    #[serde(default)]
    pub kept: Option<Kept>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub updated_at: OffsetDateTime,
}

/// How a tenant's database gets to another server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// By logical replication, while the application runs.
    Online,
    /// By pg_dump and pg_restore, while clients wait.
    Dump,
}

impl Method {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Dump => "dump",
        }
    }
}

/// The copy of a tenant's database that a move left at another server, closed to everybody, until it is confirmed or
/// rolled back. Both have the same name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    pub server: String,
    pub database: String,
    /// PostgreSQL's number of it: another one of that name is none of ours.
    pub oid: u32,
    pub method: Method,
    /// What is written where the tenant is now is applied there, too.
    pub follows: bool,
    /// Who might connect to it before it was closed (PUBLIC is `-`), and whether they may grant that on.
    pub acl: Vec<(String, bool)>,
    /// What its tables looked like when it was closed.
    pub fingerprint: String,
    #[serde(with = "time::serde::rfc3339")]
    pub since: OffsetDateTime,
    /// PostgreSQL's number of the one that clients use; 0: not known.
    #[serde(default)]
    pub live_oid: u32,
    /// Still to be closed, as soon as its server answers: it was away when clients left it, and whoever gets in there may write; or
    /// the copy has just been given up.
    #[serde(default)]
    pub is_open: bool,
    /// Since when it does not follow any more, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
    /// The log that is kept for it has come near the limit.
    #[serde(default)]
    pub is_dear: bool,
}

/// A copy that followed, and does not any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ended {
    pub why: String,
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
}

/// A role that may log in to a tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleRow {
    pub name: String,
    /// As in `pg_authid`. `None`: one of `[[roles]]` in the settings file has it.
    pub verifier: Option<Verifier>,
    /// Made by Tenantry, and dropped with the tenant.
    pub ours: bool,
    /// The one before, for a while after a rotation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub former: Option<Former>,
    /// Its server connections are the client's until that leaves; of a login that `tenantry exec` has for a while.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub session_mode: bool,
}

impl RoleRow {
    #[must_use]
    pub fn new(name: String, verifier: Option<Verifier>, ours: bool) -> Self {
        Self { name, verifier, ours, former: None, session_mode: false }
    }
}

/// The password before the last rotation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Former {
    pub verifier: Verifier,
    /// Leads from its key to the new one's (`scram::bridge`), base64; as much of a secret as a verifier.
    pub bridge: Option<Verifier>,
    /// Logins with it are let in; else it is only there so that pools find the new key.
    pub accepts: bool,
    /// Then it is forgotten.
    #[serde(with = "time::serde::rfc3339")]
    pub until: OffsetDateTime,
}

/// A SCRAM verifier: as good as a password to whoever plays the server, so it is not shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Verifier(pub String);

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// What somebody may say about a tenant, at `create` or later.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Spec {
    /// The application that it is a fork of.
    #[schema(max_length = 200)]
    pub application: Option<String>,
    /// Who looks after it.
    #[schema(max_length = 200)]
    pub owner: Option<String>,
    /// Where it stands: experiment, pilot, production, ...
    #[schema(max_length = 200)]
    pub stage: Option<String>,
    /// When it was deployed, YYYY-MM-DD.
    #[schema(max_length = 10, pattern = "^[0-9]{4}-[0-9]{2}-[0-9]{2}$")]
    pub deployed: Option<String>,
    /// Server connections that are always available to it.
    pub floor: u32,
    /// Most server connections that it may have; null: as many as the server's cap allows.
    #[schema(minimum = 1)]
    pub ceiling: Option<u32>,
    /// Its part of what is left while several wait, 1 to 1000; null: 1.
    #[schema(minimum = 1, maximum = 1000)]
    pub weight: Option<u32>,
    /// When a server connection goes back to the pool; null: as `[pool]` says.
    pub pool_mode: Option<Mode>,
    /// What keeps one client's session state from another; null: as `[pool]` says.
    pub isolation: Option<Isolation>,
    /// Unnamed statements are shared and kept prepared like named ones; null: as `[pool]` says.
    pub reuse_unnamed_statements: Option<bool>,
    /// Most server connections of one of its roles; null: as `[pool]` says.
    #[schema(minimum = 1)]
    pub pool_size: Option<u32>,
    /// Most client connections; null: only the limit over all tenants.
    #[schema(minimum = 1)]
    pub max_client_conn: Option<u32>,
    /// Extensions in its database, of those that `admin.extensions` lists.
    #[schema(max_items = 32)]
    pub extensions: Vec<String>,
    /// Settings of its database (ALTER DATABASE SET); those of `create` are laid over the defaults.
    pub settings: BTreeMap<String, String>,
}

/// When a server connection goes back to the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    Transaction,
    Session,
    Statement,
}

impl From<Mode> for PoolMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Transaction => Self::Transaction,
            Mode::Session => Self::Session,
            Mode::Statement => Self::Statement,
        }
    }
}

impl From<PoolMode> for Mode {
    fn from(mode: PoolMode) -> Self {
        match mode {
            PoolMode::Transaction => Self::Transaction,
            PoolMode::Session => Self::Session,
            PoolMode::Statement => Self::Statement,
        }
    }
}

/// What keeps one client's session state from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// What a client may have left is asked of PostgreSQL, kept for it and from others.
    Tracked,
    /// The same, and each use of a server connection begins with DISCARD ALL.
    Strict,
}

impl From<Isolation> for PoolIsolation {
    fn from(isolation: Isolation) -> Self {
        match isolation {
            Isolation::Tracked => Self::Tracked,
            Isolation::Strict => Self::Strict,
        }
    }
}

impl From<PoolIsolation> for Isolation {
    fn from(isolation: PoolIsolation) -> Self {
        match isolation {
            PoolIsolation::Tracked => Self::Tracked,
            PoolIsolation::Strict => Self::Strict,
        }
    }
}

/// A bearer token; its secret is nowhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    pub id: String,
    pub label: String,
    pub access: Access,
    /// SHA-256 of the secret, hex.
    pub hash: String,
    #[serde(with = "time::serde::rfc3339")]
    pub expires_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

/// What a token may do; each can do what the one before it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// Look.
    Viewer,
    /// Change what can be changed back.
    Operator,
    /// Everything.
    Admin,
}

impl Access {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }

    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Viewer, Self::Operator, Self::Admin].into_iter().find(|access| access.as_str() == word)
    }
}

impl Known {
    #[must_use]
    pub fn tenant(&self, name: &str) -> Option<&Entry> {
        self.tenants.iter().find(|entry| entry.name == name)
    }

    /// Whether a former password's time ended in between.
    #[must_use]
    pub fn has_grace_until(&self, after: OffsetDateTime, now: OffsetDateTime) -> bool {
        let formers = self.tenants.iter().flat_map(|entry| &entry.roles).filter_map(|row| row.former.as_ref());
        formers.into_iter().any(|former| former.until > after && former.until <= now)
    }

    /// The settings of the file with the catalog's tenants in them; and what could not be taken over, for the log.
    #[must_use]
    pub fn merge(&self, file: &Settings) -> (Settings, Vec<String>) {
        let (mut merged, mut told) = (file.clone(), Vec::new());
        let mut names: std::collections::BTreeSet<TenantId> = file.tenants.keys().cloned().collect();
        names.extend(file.tenants.values().flat_map(|tenant| tenant.aliases.iter().cloned()));
        for entry in &self.tenants {
            let Ok(id) = TenantId::parse(&entry.name) else { continue };
            if !file.servers.contains_key(&entry.server) {
                told.push(format!("tenant {id}: no server named {} in the settings", entry.server));
            } else if !names.insert(id.clone()) {
                told.push(format!("tenant {id}: the settings file has that name, which counts"));
            } else {
                let mut tenant = entry.settings(file);
                let room = self.room.get(&entry.number).copied().unwrap_or(0);
                tenant.standing.room = tenant.standing.room.max(room);
                merged.tenants.insert(id, tenant);
            }
        }
        // Only once all names are known: a name wins over an alias.
        for tenant in merged.tenants.values_mut().filter(|tenant| tenant.standing.number.is_some()) {
            tenant.aliases.retain(|alias| names.insert(alias.clone()));
        }
        (merged, told)
    }
}

impl Entry {
    /// As the data plane wants it.
    fn settings(&self, file: &Settings) -> Tenant {
        let mut pool = file.pool.clone();
        let spec = &self.spec;
        pool.pool_mode = spec.pool_mode.map_or(pool.pool_mode, Into::into);
        pool.isolation = spec.isolation.map_or(pool.isolation, Into::into);
        pool.reuse_unnamed_statements = spec.reuse_unnamed_statements.unwrap_or(pool.reuse_unnamed_statements);
        if let Some(size) = spec.pool_size {
            pool.pool_size = size;
            pool.min_pool_size = pool.min_pool_size.min(size);
        }
        let role = |row: &RoleRow| {
            let verifier = row.verifier.as_ref()?;
            let secret = RoleSecret::classify(Secret::new(verifier.0.clone())).ok()?;
            let secret_of = |verifier: &Verifier| Secret::new(verifier.0.clone());
            // Also where the catalog is out of reach and cannot forget it.
            let former = row.former.as_ref().filter(|former| former.until > OffsetDateTime::now_utc());
            let former = former.map(|former| FormerSecret {
                verifier: secret_of(&former.verifier),
                bridge: former.bridge.as_ref().map(secret_of),
                accepts: former.accepts,
            });
            let pool_mode = row.session_mode.then_some(PoolMode::Session);
            Some(Role { name: row.name.clone(), secret, pool_mode, pool_size: None, former })
        };
        let state = match self.state {
            TenantState::Active | TenantState::Suspended if self.held => TenantState::Paused,
            state => state,
        };
        Tenant {
            server: self.server.clone(),
            database: Some(self.database.clone()),
            pool,
            floor: self.spec.floor,
            ceiling: self.spec.ceiling,
            weight: self.spec.weight.and_then(NonZeroU32::new).unwrap_or(NonZeroU32::MIN),
            max_client_conn: self.spec.max_client_conn,
            roles: self.roles.iter().filter_map(role).collect(),
            aliases: self.aliases.iter().filter_map(|alias| TenantId::parse(alias).ok()).collect(),
            standing: Standing {
                number: Some(self.number),
                state,
                plans: self.plans,
                room: if self.kept.as_ref().is_some_and(|kept| kept.follows) { ROOM_TO_FOLLOW } else { 0 },
            },
        }
    }
}

/// A spec as it was stored, perhaps by a newer version: what this one does not know is left out.
pub fn stored_spec(mut stored: serde_json::Map<String, Value>) -> serde_json::Result<Spec> {
    let known = serde_json::to_value(Spec::default())?;
    stored.retain(|key, _| known.get(key).is_some());
    serde_json::from_value(Value::Object(stored))
}

fn lenient_spec<'de, D: Deserializer<'de>>(from: D) -> Result<Spec, D::Error> {
    stored_spec(serde_json::Map::deserialize(from)?).map_err(D::Error::custom)
}

mod state_word {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use tenantry_config::TenantState;

    pub fn serialize<S: Serializer>(state: &TenantState, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(state.as_str())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<TenantState, D::Error> {
        let word = String::deserialize(from)?;
        TenantState::parse(&word).ok_or_else(|| D::Error::custom("no such state"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn entry(spec: &Value) -> Entry {
        let entry = json!({
            "number": 1, "name": "shop", "state": "active", "held": false, "server": "main", "database": "shop",
            "owner_role": "shop", "aliases": [], "version": 1, "spec": spec, "roles": [],
            "created_at": "2026-11-26T00:00:00Z", "updated_at": "2026-11-26T00:00:00Z",
        });
        serde_json::from_value(entry).unwrap()
    }

    #[test]
    fn what_a_spec_does_not_say_is_as_the_file_says() {
        let mut file = Settings::default();
        let (isolation, reuse) = (PoolIsolation::Strict, true);
        (file.pool.isolation, file.pool.reuse_unnamed_statements) = (isolation, reuse);
        let pool = |spec: Value| entry(&spec).settings(&file).pool;
        // As rows were before there was such a thing, and as they are now.
        for spec in [json!({ "floor": 1 }), json!({ "isolation": null, "reuse_unnamed_statements": null })] {
            let pool = pool(spec);
            assert_eq!((pool.isolation, pool.reuse_unnamed_statements), (isolation, reuse));
        }
        let said = pool(json!({ "isolation": "tracked", "reuse_unnamed_statements": false, "of_a_newer_version": 1 }));
        assert_eq!((said.isolation, said.reuse_unnamed_statements), (PoolIsolation::Tracked, false));
    }
}
