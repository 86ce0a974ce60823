//! What is asked of the catalog about rollouts, and what is said in a tenant's database for them.

use super::{id, text};

pub const INSERT_ROLLOUT: &str = "INSERT INTO tenantry.rollouts (kind, plan, command, files, verifier, actor, peer, request, key, hash, \
     seen_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, now()) RETURNING id";
pub const INSERT_ITEM: &str =
    "INSERT INTO tenantry.rollout_tenants (rollout, tenant, name, wave, place) VALUES ($1, $2, $3, $4, $5)";
/// The rollout that a key began, and the hash of what was asked then.
pub const ROLLOUT_OF_KEY: &str = "SELECT id, hash FROM tenantry.rollouts WHERE actor = $1 AND key = $2";

pub const ROLLOUT: &str = "SELECT id, kind, state, plan, command, error, actor, created_at, updated_at, \
     coalesce(extract(epoch FROM now() - seen_at), 0)::float8, \
     (SELECT jsonb_agg(jsonb_build_object('version', f -> 'version', 'name', f -> 'name', 'transactional', f -> 'transactional')) \
      FROM jsonb_array_elements(files) f) FROM tenantry.rollouts WHERE id = $1";
pub const ROLLOUTS: &str = "SELECT id, kind, state, plan, command, error, actor, created_at, updated_at, \
     coalesce(extract(epoch FROM now() - seen_at), 0)::float8, NULL::jsonb \
     FROM tenantry.rollouts WHERE id < $1 ORDER BY id DESC LIMIT $2";
/// Those whose tenants have turns to come, or under way.
pub const OPEN_ROLLOUTS: &str = "SELECT id, kind, state, plan, command, error, actor, created_at, updated_at, \
     coalesce(extract(epoch FROM now() - seen_at), 0)::float8, NULL::jsonb FROM tenantry.rollouts r WHERE state = 'running' \
     OR EXISTS (SELECT FROM tenantry.rollout_tenants t WHERE t.rollout = r.id AND t.state = 'running') ORDER BY id LIMIT 100";
pub const ITEMS: &str = "SELECT tenant, name, wave, state, attempts, job, login, error, result, began_at, ended_at \
     FROM tenantry.rollout_tenants WHERE rollout = $1 ORDER BY place";
/// Stands for all of a rollout that anybody is told, but for the results.
pub const MARK: &str = "SELECT r.state || ' ' || coalesce((SELECT pg_catalog.md5(pg_catalog.string_agg( \
       pg_catalog.concat_ws('|', t.state, t.attempts, t.job, t.login, t.error, t.began_at), ',' ORDER BY t.place)) \
     FROM tenantry.rollout_tenants t WHERE t.rollout = r.id), '') FROM tenantry.rollouts r WHERE r.id = $1";
pub const COUNTS: &str =
    "SELECT state, count(*) FROM tenantry.rollout_tenants WHERE rollout = $1 GROUP BY state ORDER BY state";
pub const FILES: &str = "SELECT plan, files FROM tenantry.rollouts WHERE id = $1";
pub const ROLLOUT_FOR_UPDATE: &str = "SELECT state, kind FROM tenantry.rollouts WHERE id = $1 FOR UPDATE";
pub const ASKER_OF_ROLLOUT: &str = "SELECT actor, peer, request FROM tenantry.rollouts WHERE id = $1";

/// Tenants whose jobs are over are over.
pub const SETTLE: &str = "UPDATE tenantry.rollout_tenants t SET \
       state = CASE WHEN j.state = 'succeeded' THEN 'done' ELSE 'failed' END, login = NULL, outcome = NULL, \
       error = CASE WHEN j.state = 'succeeded' THEN NULL ELSE coalesce(j.error, 'it was cancelled') END, \
       result = j.result, ended_at = j.updated_at \
     FROM tenantry.jobs j WHERE t.rollout = $1 AND t.state = 'running' AND j.id = t.job \
       AND j.state IN ('succeeded', 'failed', 'cancelled')";
/// Whether its turn is still to come, and nobody stopped the rollout; for how many seconds it could not begin, and why.
pub const ITEM_FOR_UPDATE: &str = "SELECT extract(epoch FROM clock_timestamp() - t.began_at)::float8, t.error FROM tenantry.rollout_tenants t JOIN tenantry.rollouts r ON r.id = t.rollout \
     WHERE t.rollout = $1 AND t.tenant = $2 AND t.state = 'waiting' AND r.state = 'running' FOR UPDATE";
pub const BEGIN_ITEM: &str = "UPDATE tenantry.rollout_tenants SET state = 'running', attempts = attempts + 1, job = $3, login = NULL, \
     outcome = NULL, error = NULL, result = NULL, began_at = now(), ended_at = NULL WHERE rollout = $1 AND tenant = $2";
/// Its turn came, and another job has it.
pub const BUSY_ITEM: &str = "UPDATE tenantry.rollout_tenants SET began_at = coalesce(began_at, now()), error = $3 \
     WHERE rollout = $1 AND tenant = $2 AND state = 'waiting'";
/// Without a job.
pub const FAIL_ITEM: &str = "UPDATE tenantry.rollout_tenants SET state = 'failed', error = $3, ended_at = now() \
     WHERE rollout = $1 AND tenant = $2 AND state = 'waiting'";
pub const SKIP_ITEM: &str = "UPDATE tenantry.rollout_tenants SET state = 'skipped', error = $3, ended_at = now() \
     WHERE rollout = $1 AND tenant = $2 AND state = 'waiting'";
pub const END_ROLLOUT: &str = "UPDATE tenantry.rollouts SET state = $2, error = $3, verifier = NULL, updated_at = now() \
     WHERE id = $1 AND state = 'running'";
pub const CANCEL_JOBS: &str = "UPDATE tenantry.jobs j SET cancel = true FROM tenantry.rollout_tenants t \
     WHERE t.rollout = $1 AND t.state = 'running' AND j.id = t.job AND j.state IN ('queued', 'running')";
pub const HAS_RUNNING: &str =
    "SELECT EXISTS (SELECT FROM tenantry.rollout_tenants WHERE rollout = $1 AND state = 'running')";
/// Those that failed or could not be reached have another turn; nobody was waited for yet.
pub const REWIND_ITEMS: &str = "UPDATE tenantry.rollout_tenants SET state = 'waiting', error = NULL, began_at = NULL \
     WHERE rollout = $1 AND state IN ('failed', 'skipped', 'waiting')";
pub const RESUME_ROLLOUT: &str = "UPDATE tenantry.rollouts SET state = 'running', error = NULL, verifier = $2, seen_at = now(), \
     updated_at = now() WHERE id = $1";

/// Its logins prove themselves with another password than this runner's; one that is over is nobody's.
pub const IS_ANOTHERS: &str =
    "SELECT FROM tenantry.rollouts WHERE id = $1 AND kind = 'exec' AND verifier <> $2 FOR UPDATE";
pub const SIGN_OF_RUNNER: &str = "UPDATE tenantry.rollouts SET seen_at = now() WHERE id = $1 AND kind = 'exec'";
/// While nobody was there to be told, nobody was silent.
pub const HEAR_ALL_RUNNERS: &str =
    "UPDATE tenantry.rollouts SET seen_at = now() WHERE kind = 'exec' AND state = 'running'";
/// How a command ended: only of the turn that is under way.
pub const SET_OUTCOME: &str = "UPDATE tenantry.rollout_tenants SET outcome = $4 WHERE rollout = $1 AND name = $2 \
     AND state = 'running' AND attempts = $3 AND outcome IS NULL";
pub const SET_LOGIN: &str =
    "UPDATE tenantry.rollout_tenants SET login = $3 WHERE rollout = $1 AND tenant = $2 AND state = 'running'";
/// How the command ended, and for how many seconds nothing was heard of who runs it.
pub const OUTCOME: &str = "SELECT t.outcome, coalesce(extract(epoch FROM now() - r.seen_at), 0)::float8 \
     FROM tenantry.rollout_tenants t JOIN tenantry.rollouts r ON r.id = t.rollout WHERE t.rollout = $1 AND t.tenant = $2";
pub const LOGIN: &str = "SELECT plan, verifier FROM tenantry.rollouts WHERE id = $1";

pub const FORGET_MIGRATIONS: &str = "DELETE FROM tenantry.migrations WHERE tenant = $1";
pub const NOTE_MIGRATION: &str =
    "INSERT INTO tenantry.migrations (tenant, version, name, sha256, applied_at) VALUES ($1, $2, $3, $4, $5)";
pub const MIGRATIONS_OF: &str =
    "SELECT tenant, version, name, sha256 FROM tenantry.migrations WHERE tenant = ANY ($1::bigint[])";

// What follows is said in a tenant's own database, as its owner.

/// As a session of the tenant's own begins, but for who it is and how long it waits; after every file again.
pub fn as_owner(owner: &str, lock_timeout: u64, statement_timeout: u64) -> String {
    format!(
        "RESET ALL; SET ROLE {}; SET lock_timeout = {lock_timeout}; SET statement_timeout = {statement_timeout}; \
         SET idle_in_transaction_session_timeout = 0; SET client_min_messages = warning",
        id(owner)
    )
}

pub fn set_lock_timeout(millis: u64) -> String {
    format!("SET lock_timeout = {millis}")
}

/// Two runs never meet in one database.
pub const LOCK_MIGRATIONS: &str = "SELECT pg_catalog.pg_try_advisory_lock(1952803425, 4)";

/// The version table, in a schema of its own: what is in the application's is the application's.
pub const VERSION_TABLE: &str = "CREATE SCHEMA IF NOT EXISTS tenantry; CREATE TABLE IF NOT EXISTS tenantry.migrations ( \
     version bigint PRIMARY KEY, name text NOT NULL, sha256 text NOT NULL, transactional boolean NOT NULL, \
     statements integer NOT NULL, rollout bigint NOT NULL, began_at timestamptz NOT NULL DEFAULT now(), applied_at timestamptz)";
pub const HAS_VERSION_TABLE: &str = "SELECT pg_catalog.to_regclass('tenantry.migrations') IS NOT NULL";
pub const VERSIONS: &str = "SELECT version, pg_catalog.left(name, 1000), pg_catalog.left(sha256, 100), applied_at, statements FROM tenantry.migrations \
     ORDER BY version LIMIT 10001";
/// Together with the file's own statements, in its transaction.
pub const APPLIED: &str = "INSERT INTO tenantry.migrations (version, name, sha256, transactional, statements, rollout, applied_at) \
     VALUES ($1, $2, $3, true, $4, $5, now()) ON CONFLICT (version) DO UPDATE SET name = excluded.name, \
     sha256 = excluded.sha256, transactional = true, statements = excluded.statements, rollout = excluded.rollout, applied_at = now()";
/// Which indexes were invalid before a file that is not transactional was first begun. Version tables of before have no such column.
pub const HAS_INVALID_BEFORE: &str = "SELECT EXISTS (SELECT FROM pg_catalog.pg_attribute \
     WHERE attrelid = 'tenantry.migrations'::regclass AND attname = 'invalid_before' AND NOT attisdropped)";
pub const ADD_INVALID_BEFORE: &str = "ALTER TABLE tenantry.migrations ADD COLUMN IF NOT EXISTS invalid_before oid[]";
pub const INVALID_BEFORE: &str = "SELECT invalid_before FROM tenantry.migrations WHERE version = $1";
/// Of one that is not transactional: it begins, or goes on.
pub const BEGUN: &str = "INSERT INTO tenantry.migrations (version, name, sha256, transactional, statements, rollout, invalid_before) \
     VALUES ($1, $2, $3, false, $4, $5, $6) ON CONFLICT (version) DO UPDATE SET name = excluded.name, \
     sha256 = excluded.sha256, transactional = false, statements = excluded.statements, rollout = excluded.rollout, \
     invalid_before = excluded.invalid_before";
/// So many of its statements are done.
pub const DONE_SO_FAR: &str = "UPDATE tenantry.migrations SET statements = $2 WHERE version = $1";
pub const FINISHED: &str = "UPDATE tenantry.migrations SET statements = $2, applied_at = now() WHERE version = $1";
pub const TRANSACTION: &str = "SELECT pg_catalog.pg_current_xact_id()::text";
/// Indexes that were begun and not finished: nobody reads them, and everybody writes them. And whether another session is
/// building it.
pub const INVALID_INDEXES: &str = "SELECT i.indexrelid, pg_catalog.format('%I.%I', n.nspname, c.relname), EXISTS ( \
       SELECT FROM pg_catalog.pg_stat_progress_create_index p WHERE p.index_relid = i.indexrelid AND p.pid <> pg_catalog.pg_backend_pid()) \
     FROM pg_catalog.pg_index i \
     JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
     WHERE NOT i.indisvalid AND c.relkind = 'i' AND n.nspname !~ '^pg_' ORDER BY 2";

/// A login for a command that is run for a tenant: its sessions begin as the tenant's owner, so that what it makes is the
/// owner's. It has the owner's rights also where a session forgets whom it began as.
pub fn create_login(login: &str, verifier: &str, until: &str, owner: &str, since_16: bool) -> String {
    let (as_owner, as_login) =
        if since_16 { (" WITH INHERIT TRUE, SET TRUE", " WITH INHERIT TRUE, SET FALSE") } else { ("", "") };
    format!(
        "BEGIN; CREATE ROLE {login} LOGIN INHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION PASSWORD {verifier} \
         VALID UNTIL {until}; GRANT {owner} TO {login}{as_owner}; GRANT {login} TO CURRENT_USER{as_login}; \
         ALTER ROLE {login} SET role = {owner_text}; COMMIT",
        login = id(login),
        verifier = text(verifier),
        until = text(until),
        owner = id(owner),
        owner_text = text(owner),
    )
}

/// How long its sessions wait for locks, and for a statement; 0: for ever.
pub fn limit_login(login: &str, lock_timeout: u64, statement_timeout: Option<u64>) -> String {
    let login = id(login);
    let mut statements = format!("ALTER ROLE {login} SET lock_timeout = {lock_timeout}");
    if let Some(limit) = statement_timeout {
        statements.push_str(&format!("; ALTER ROLE {login} SET statement_timeout = {limit}"));
    }
    statements
}
