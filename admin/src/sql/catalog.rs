//! What is asked of the catalog. Parameters only; nothing is put together here.

/// The versions of the schema, in order; the first is version 1.
pub const VERSIONS: [&str; 1] = [include_str!("schema.sql")];

/// Held while the schema is made or changed, and by whoever runs the jobs: the numbers are "tena", "ntry".
pub const LOCK_SCHEMA: &str = "SELECT pg_catalog.pg_advisory_xact_lock(1952803425, 1)";
pub const LOCK_JOBS: &str = "SELECT pg_catalog.pg_try_advisory_lock(1952803425, 2)";

pub const HAS_META: &str = "SELECT pg_catalog.to_regclass('tenantry.meta') IS NOT NULL";
pub const VERSION: &str = "SELECT version FROM tenantry.meta";
pub const FIRST_META: &str = "INSERT INTO tenantry.meta (version, catalog) VALUES ($1, $2)";
pub const SET_VERSION: &str = "UPDATE tenantry.meta SET version = $1";
pub const META: &str = "SELECT catalog, revision FROM tenantry.meta";
pub const REVISION: &str = "SELECT revision FROM tenantry.meta";
/// Also keeps two changes from happening at once.
pub const BUMP: &str = "UPDATE tenantry.meta SET revision = revision + 1 RETURNING catalog";
/// No statement of a change waits long for another.
pub const TENANTS: &str = "SELECT number, name, state, held, server, database, owner_role, aliases, version, spec, roles, \
     created_at, updated_at FROM tenantry.tenants WHERE state <> 'dropped' ORDER BY name";
pub const TENANT: &str = "SELECT number, name, state, held, server, database, owner_role, aliases, version, spec, roles, \
     created_at, updated_at FROM tenantry.tenants WHERE number = $1 FOR UPDATE";
pub const INSERT_TENANT: &str = "INSERT INTO tenantry.tenants (name, state, server, database, owner_role, spec, roles) \
     VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING number";
pub const UPDATE_TENANT: &str = "UPDATE tenantry.tenants SET name = $2, state = $3, held = $4, server = $5, database = $6, \
     owner_role = $7, aliases = $8, spec = $9, roles = $10, version = version + 1, updated_at = now() WHERE number = $1";

pub const TOKENS: &str =
    "SELECT id, label, access, hash, expires_at, created_at FROM tenantry.tokens ORDER BY created_at";
pub const INSERT_TOKEN: &str =
    "INSERT INTO tenantry.tokens (id, label, access, hash, expires_at) VALUES ($1, $2, $3, $4, $5)";
pub const DELETE_TOKEN: &str = "DELETE FROM tenantry.tokens WHERE id = $1";

pub const INSERT_JOB: &str =
    "INSERT INTO tenantry.jobs (tenant, name, work, actor) VALUES ($1, $2, $3, $4) RETURNING id";
pub const JOBS: &str = "SELECT id, tenant, name, work, state, step, progress, result, error, cancel, actor, created_at, \
     updated_at FROM tenantry.jobs WHERE id < $1 AND ($3::text IS NULL OR name = $3) ORDER BY id DESC LIMIT $2";
pub const JOB: &str = "SELECT id, tenant, name, work, state, step, progress, result, error, cancel, actor, created_at, \
     updated_at FROM tenantry.jobs WHERE id = $1";
pub const OPEN_JOBS: &str = "SELECT id, tenant, name, work, state, step, progress, result, error, cancel, actor, created_at, \
     updated_at FROM tenantry.jobs WHERE state IN ('queued', 'running', 'undoing') ORDER BY id LIMIT 100";
pub const OPEN_JOB_OF: &str =
    "SELECT id FROM tenantry.jobs WHERE tenant = $1 AND state IN ('queued', 'running', 'undoing')";
pub const JOURNAL: &str = "UPDATE tenantry.jobs SET state = $2, step = $3, result = $4, error = $5, progress = NULL, \
     updated_at = now() WHERE id = $1";
pub const PROGRESS: &str = "UPDATE tenantry.jobs SET progress = $2, updated_at = now() WHERE id = $1";
pub const CANCEL_JOB: &str =
    "UPDATE tenantry.jobs SET cancel = true WHERE id = $1 AND state IN ('queued', 'running') RETURNING id";
pub const IS_CANCELLED: &str = "SELECT cancel FROM tenantry.jobs WHERE id = $1";
pub const INSERT_EVENT: &str = "INSERT INTO tenantry.job_events (job, text) VALUES ($1, $2)";
pub const EVENTS: &str =
    "SELECT id, at, text FROM tenantry.job_events WHERE job = $1 AND id > $2 ORDER BY id LIMIT 500";

pub const INSERT_ARCHIVE: &str = "INSERT INTO tenantry.archives (tenant, path, bytes, sha256, tables, facts) VALUES ($1, $2, $3, $4, $5, $6) RETURNING id";
pub const ARCHIVE_FACTS: &str = "SELECT facts FROM tenantry.archives WHERE id = $1";
pub const ARCHIVES: &str = "SELECT a.id, a.tenant, t.name, a.path, a.bytes, a.sha256, a.tables, a.created_at \
     FROM tenantry.archives a JOIN tenantry.tenants t ON t.number = a.tenant \
     WHERE ($1::bigint IS NULL OR a.tenant = $1) ORDER BY a.id DESC LIMIT 500";

pub const INSERT_AUDIT: &str = "INSERT INTO tenantry.audit (request, actor, peer, action, tenant, outcome, before, after) \
     VALUES ($1, $2, $3, $4, $5, $6, $7, $8)";
pub const AUDIT: &str = "SELECT id, at, request, actor, peer, action, tenant, outcome, before, after FROM tenantry.audit \
     WHERE id < $1 ORDER BY id DESC LIMIT $2";

pub const IDEMPOTENT: &str = "SELECT hash, job FROM tenantry.idempotency WHERE actor = $1 AND key = $2";
pub const INSERT_IDEMPOTENT: &str = "INSERT INTO tenantry.idempotency (actor, key, hash, job) VALUES ($1, $2, $3, $4)";
/// A key is remembered for a day.
pub const FORGET_IDEMPOTENT: &str = "DELETE FROM tenantry.idempotency WHERE at < now() - interval '1 day'";
