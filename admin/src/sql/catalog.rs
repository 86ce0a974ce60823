//! What is asked of the catalog. Parameters only; nothing is put together here.

/// The versions of the schema, in order; the first is version 1.
pub const VERSIONS: [&str; 3] =
    [include_str!("schema.sql"), include_str!("schema_rollouts.sql"), include_str!("schema_moves.sql")];

/// Held while the schema is made or changed, and by whoever runs the jobs: the first number is ours, the second says what for.
pub const LOCK_SCHEMA: &str = "SELECT pg_catalog.pg_advisory_xact_lock(1952803425, 1)";
/// Held from the last row of the audit log that is read to the commit of the next; always the last lock of a transaction.
pub const LOCK_AUDIT: &str = "SELECT pg_catalog.pg_advisory_xact_lock(1952803425, 3)";
pub const LOCK_JOBS: &str = "SELECT pg_catalog.pg_try_advisory_lock(1952803425, 2)";

/// PostgreSQL finds out within half a minute that the machine with the lock is gone.
pub const NOTICE_DEATH: &str = "SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 4; \
     SET tcp_user_timeout = 30000";

pub const HAS_META: &str = "SELECT pg_catalog.to_regclass('tenantry.meta') IS NOT NULL";
pub const VERSION: &str = "SELECT version FROM tenantry.meta";
pub const FIRST_META: &str = "INSERT INTO tenantry.meta (version, catalog) VALUES ($1, $2)";
pub const SET_VERSION: &str = "UPDATE tenantry.meta SET version = $1";
pub const META: &str = "SELECT catalog, revision FROM tenantry.meta";
pub const REVISION: &str = "SELECT revision FROM tenantry.meta";
/// Also keeps two changes from happening at once.
pub const BUMP: &str = "UPDATE tenantry.meta SET revision = revision + 1 RETURNING leader, catalog";
/// From now on the jobs are ours: the number that the journal asks for.
pub const LEAD: &str = "UPDATE tenantry.meta SET leader = leader + 1 RETURNING leader";
pub const LEADER_NOW: &str = "SELECT leader FROM tenantry.meta";
/// Kept until the transaction is over: nobody takes the jobs over in its middle.
pub const LEADER: &str = "SELECT leader FROM tenantry.meta FOR SHARE";
/// Those that are there, by name.
pub const TENANTS: &str = "SELECT number, name, state, held, server, database, owner_role, aliases, version, spec, roles, \
     created_at, updated_at, plans, kept FROM tenantry.tenants WHERE state <> 'dropped' ORDER BY name";
pub const TENANT: &str = "SELECT number, name, state, held, server, database, owner_role, aliases, version, spec, roles, \
     created_at, updated_at, plans, kept FROM tenantry.tenants WHERE number = $1 FOR UPDATE";
/// As it is, without a lock.
pub const TENANT_NOW: &str = "SELECT number, name, state, held, server, database, owner_role, aliases, version, spec, roles, \
     created_at, updated_at, plans, kept FROM tenantry.tenants WHERE number = $1";
pub const INSERT_TENANT: &str = "INSERT INTO tenantry.tenants (name, state, server, database, owner_role, spec, roles) \
     VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING number, name, state, held, server, database, owner_role, aliases, \
     version, spec, roles, created_at, updated_at, plans, kept";
pub const UPDATE_TENANT: &str = "UPDATE tenantry.tenants SET name = $2, state = $3, held = $4, server = $5, database = $6, \
     owner_role = $7, aliases = $8, spec = $9, roles = $10, plans = $11, kept = $12, version = version + 1, updated_at = now() WHERE number = $1";

/// Its names are free again; those that a job reserved only if $2.
pub const FORGET_NAMES: &str = "DELETE FROM tenantry.names WHERE tenant = $1 AND ($2 OR NOT reserved)";
/// Its names, as its row says; a name that another one has ends in a duplicate.
pub const WRITE_NAMES: &str = "INSERT INTO tenantry.names (space, name, tenant) SELECT w.space, w.name, w.number FROM ( \
       SELECT number, '' AS space, name FROM tenantry.tenants WHERE number = $1 AND state <> 'dropped' \
       UNION SELECT number, '', unnest(aliases) FROM tenantry.tenants WHERE number = $1 AND state <> 'dropped' \
       UNION SELECT number, '@' || server, database FROM tenantry.tenants WHERE number = $1 AND state <> 'dropped' \
       UNION SELECT number, '@' || (kept->>'server'), kept->>'database' FROM tenantry.tenants \
         WHERE number = $1 AND state <> 'dropped' AND kept IS NOT NULL) AS w \
     WHERE NOT EXISTS (SELECT FROM tenantry.names n WHERE n.space = w.space AND n.name = w.name AND n.tenant = w.number)";
/// One more for the tenant (its own alias may become it); no row: another one has it.
pub const RESERVE_NAME: &str = "INSERT INTO tenantry.names AS n (space, name, tenant, reserved) VALUES ($1, $2, $3, true) \
     ON CONFLICT (space, name) DO UPDATE SET reserved = true WHERE n.tenant = excluded.tenant RETURNING n.name";
/// Living tenants of a server, another one excepted, that have a role.
pub const OTHERS_WITH_ROLE: &str = "SELECT number FROM tenantry.tenants WHERE number <> $1 AND server = $2 AND state <> 'dropped' \
     AND (owner_role = $3 OR roles @> jsonb_build_array(jsonb_build_object('name', $3::text))) ORDER BY number";
/// The same of those with a copy there that is kept.
pub const COPIES_WITH_ROLE: &str = "SELECT count(*) FROM tenantry.tenants WHERE number <> $1 AND kept->>'server' = $2 \
     AND state <> 'dropped' AND (owner_role = $3 OR roles @> jsonb_build_array(jsonb_build_object('name', $3::text)))";

pub const TOKENS: &str =
    "SELECT id, label, access, hash, expires_at, created_at FROM tenantry.tokens ORDER BY created_at";
pub const INSERT_TOKEN: &str =
    "INSERT INTO tenantry.tokens (id, label, access, hash, expires_at) VALUES ($1, $2, $3, $4, $5)";
pub const DELETE_TOKEN: &str = "DELETE FROM tenantry.tokens WHERE id = $1";

pub const INSERT_JOB: &str = "INSERT INTO tenantry.jobs (tenant, name, work, actor, peer, request) \
     VALUES ($1, $2, $3, $4, $5, $6) RETURNING id";
pub const ASKER_OF_JOB: &str = "SELECT actor, peer, request FROM tenantry.jobs WHERE id = $1";
pub const JOBS: &str = "SELECT id, tenant, name, work, state, step, progress, result, error, cancel, actor, created_at, \
     updated_at FROM tenantry.jobs WHERE id < $1 AND ($3::text IS NULL OR name = $3) ORDER BY id DESC LIMIT $2";
pub const JOB: &str = "SELECT id, tenant, name, work, state, step, progress, result, error, cancel, actor, created_at, \
     updated_at FROM tenantry.jobs WHERE id = $1";
pub const OPEN_JOBS: &str = "SELECT id, tenant, name, work, state, step, progress, result, error, cancel, actor, created_at, \
     updated_at FROM tenantry.jobs WHERE state IN ('queued', 'running', 'undoing') ORDER BY id LIMIT 1000";
pub const OPEN_JOB_OF: &str =
    "SELECT id FROM tenantry.jobs WHERE tenant = $1 AND state IN ('queued', 'running', 'undoing')";
/// Only from where it was known to be; with $8 only if nobody cancelled it.
pub const JOURNAL: &str = "UPDATE tenantry.jobs SET state = $2, step = $3, result = $4, error = $5, progress = NULL, \
     updated_at = now() WHERE id = $1 AND state = $6 AND step = $7 AND NOT ($8 AND cancel)";
/// What a step remembers before it is done.
pub const NOTE: &str =
    "UPDATE tenantry.jobs SET result = $2, updated_at = now() WHERE id = $1 AND state = $3 AND step = $4";
pub const KEEP_WORK: &str = "UPDATE tenantry.jobs SET work = $2 WHERE id = $1";
pub const PROGRESS: &str = "UPDATE tenantry.jobs SET progress = $2, updated_at = now() WHERE id = $1";
pub const CANCEL_JOB: &str = "UPDATE tenantry.jobs SET cancel = true WHERE id = $1";
pub const JOB_TO_CANCEL: &str = "SELECT id, tenant, name, work, state, step, progress, result, error, cancel, actor, created_at, \
     updated_at FROM tenantry.jobs WHERE id = $1 FOR UPDATE";
pub const IS_CANCELLED: &str = "SELECT cancel FROM tenantry.jobs WHERE id = $1";
pub const INSERT_EVENT: &str = "INSERT INTO tenantry.job_events (job, text) VALUES ($1, $2)";
pub const EVENTS: &str =
    "SELECT id, at, text FROM tenantry.job_events WHERE job = $1 AND id > $2 ORDER BY id LIMIT 500";

pub const INSERT_ARCHIVE: &str = "INSERT INTO tenantry.archives (tenant, path, bytes, sha256, tables, facts) VALUES ($1, $2, $3, $4, $5, $6) RETURNING id";
pub const ARCHIVE_FACTS: &str = "SELECT facts FROM tenantry.archives WHERE id = $1";
pub const ARCHIVES: &str = "SELECT a.id, a.tenant, t.name, a.path, a.bytes, a.sha256, a.tables, a.created_at \
     FROM tenantry.archives a JOIN tenantry.tenants t ON t.number = a.tenant \
     WHERE ($1::bigint IS NULL OR a.tenant = $1) ORDER BY a.id DESC LIMIT 500";

pub const ARCHIVE: &str = "SELECT a.id, a.tenant, t.name, a.path, a.bytes, a.sha256, a.tables, a.created_at \
     FROM tenantry.archives a JOIN tenantry.tenants t ON t.number = a.tenant \
     WHERE ($1::bigint IS NULL OR a.tenant = $1) AND ($2::bigint IS NULL OR a.id = $2) ORDER BY a.id DESC LIMIT 1";
pub const ARCHIVES_BEFORE: &str = "SELECT a.id, a.tenant, t.name, a.path, a.bytes, a.sha256, a.tables, a.created_at \
     FROM tenantry.archives a JOIN tenantry.tenants t ON t.number = a.tenant WHERE a.id < $1 ORDER BY a.id DESC LIMIT $2";

/// What a row of the audit log says, the same in every session.
macro_rules! audit_text {
    () => {
        "pg_catalog.convert_to(pg_catalog.jsonb_build_array(id, extract(epoch FROM at), request, actor, peer, action, tenant, \
         outcome, before, after)::text, 'UTF8')"
    };
}

/// Under LOCK_AUDIT, so that numbers, times and the chain have one order.
pub const INSERT_AUDIT: &str = concat!(
    "WITH new AS MATERIALIZED (SELECT pg_catalog.nextval(pg_catalog.pg_get_serial_sequence('tenantry.audit', 'id')) AS id, \
     pg_catalog.clock_timestamp() AS at, $1::text AS request, $2::text AS actor, $3::text AS peer, $4::text AS action, \
     $5::text AS tenant, $6::text AS outcome, $7::jsonb AS before, $8::jsonb AS after) \
     INSERT INTO tenantry.audit (id, at, request, actor, peer, action, tenant, outcome, before, after, chain) \
     OVERRIDING SYSTEM VALUE SELECT new.*, pg_catalog.sha256(coalesce((SELECT last.chain FROM tenantry.audit last \
     ORDER BY last.id DESC LIMIT 1), ''::bytea) || ",
    audit_text!(),
    ") FROM new"
);
pub const AUDIT: &str = "SELECT id, at, request, actor, peer, action, tenant, outcome, before, after, chain FROM tenantry.audit \
     WHERE id < $1 ORDER BY id DESC LIMIT $2";
/// The next rows after $1, whose chain is $2: how many, the last, its chain, and the first that does not fit.
pub const VERIFY_AUDIT: &str = concat!(
    "WITH part AS (SELECT * FROM tenantry.audit WHERE id > $1 ORDER BY id LIMIT 10000), \
     seen AS (SELECT id, chain, chain = pg_catalog.sha256(coalesce(lag(chain) OVER (ORDER BY id), $2::bytea) || ",
    audit_text!(),
    ") AS fits FROM part) SELECT count(*), max(id), min(id) FILTER (WHERE NOT fits), \
     (SELECT chain FROM seen ORDER BY id DESC LIMIT 1) FROM seen"
);

pub const IDEMPOTENT: &str = "SELECT hash, job FROM tenantry.idempotency WHERE actor = $1 AND key = $2";
pub const INSERT_IDEMPOTENT: &str = "INSERT INTO tenantry.idempotency (actor, key, hash, job) VALUES ($1, $2, $3, $4)";
/// A key is remembered for a day.
pub const FORGET_IDEMPOTENT: &str = "DELETE FROM tenantry.idempotency WHERE at < now() - interval '1 day'";

pub const SIGN_OF_LIFE: &str = "INSERT INTO tenantry.instances (id, revision, busy, pid, began) \
     SELECT $1, $2, $3, pid, backend_start FROM pg_catalog.pg_stat_activity WHERE pid = pg_catalog.pg_backend_pid() \
     ON CONFLICT (id) DO UPDATE SET revision = excluded.revision, busy = excluded.busy, pid = excluded.pid, \
     began = excluded.began, seen_at = now()";
/// Those whose session is there, and that were heard of in the last `$2` seconds.
pub const OTHERS: &str = "SELECT i.revision, i.busy FROM tenantry.instances i \
     JOIN pg_catalog.pg_stat_activity a ON a.pid = i.pid AND a.backend_start = i.began \
     WHERE i.id <> $1 AND i.seen_at > now() - make_interval(secs => $2)";
/// And away with what was left by those that ended otherwise.
pub const LEAVE: &str = "DELETE FROM tenantry.instances WHERE id = $1 OR seen_at < now() - interval '1 hour'";

pub const OPEN_MOVES: &str = "SELECT tenant, work FROM tenantry.jobs WHERE state IN ('queued', 'running', 'undoing') \
     AND work->>'kind' IN ('move', 'move_back', 'confirm_move')";
pub const ORDERS: &str = "SELECT tenant, what FROM tenantry.orders";
pub const GIVE_ORDER: &str = "INSERT INTO tenantry.orders (tenant, what) VALUES ($1, $2) \
     ON CONFLICT (tenant) DO UPDATE SET what = excluded.what";
pub const END_ORDER: &str = "DELETE FROM tenantry.orders WHERE tenant = $1";
