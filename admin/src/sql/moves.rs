//! What a move between servers says to PostgreSQL: preflight, roles, replication, positions in the log, sequences.

use super::{id, text};

/// Two connections are to the same PostgreSQL if this is the same. (The system identifier alone is that of a copied data
/// directory, too.)
pub const INSTANCE: &str = "SELECT system_identifier::text || ' ' || extract(epoch FROM pg_catalog.pg_postmaster_start_time())::text \
     FROM pg_catalog.pg_control_system()";

/// What a server and our role there are good for: version, wal_level, free slots, free walsenders, workers; whether we are
/// superuser, have REPLICATION, may give others pg_create_subscription.
pub const ABILITIES: &str = "SELECT pg_catalog.current_setting('server_version_num')::int, pg_catalog.current_setting('wal_level'), \
       pg_catalog.current_setting('max_replication_slots')::int - (SELECT count(*)::int FROM pg_catalog.pg_replication_slots), \
       pg_catalog.current_setting('max_wal_senders')::int \
         - (SELECT count(*)::int FROM pg_catalog.pg_stat_activity WHERE backend_type = 'walsender'), \
       pg_catalog.current_setting('max_logical_replication_workers')::int, r.rolsuper, \
       r.rolreplication OR EXISTS (SELECT FROM pg_catalog.pg_roles s WHERE s.rolname = 'rds_replication' \
         AND pg_catalog.pg_has_role(s.oid, 'MEMBER')), \
       r.rolsuper OR EXISTS (SELECT FROM pg_catalog.pg_roles s WHERE s.rolname = 'pg_create_subscription' \
         AND pg_catalog.pg_has_role(s.oid, 'MEMBER WITH ADMIN OPTION')) \
     FROM pg_catalog.pg_roles r WHERE r.rolname = current_user";

/// What of a database needs a look before it is moved: kind, name, how many there are of the kind.
pub const IN_THE_WAY: &str = "WITH own AS ( \
       SELECT c.oid, c.relkind, c.relpersistence, c.relreplident, c.relforcerowsecurity, \
         pg_catalog.format('%I.%I', n.nspname, c.relname) AS name \
       FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
       WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d \
         WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')) \
     SELECT kind, name, count(*) OVER (PARTITION BY kind) FROM ( \
       SELECT 'no_identity' AS kind, name FROM own WHERE relkind = 'r' AND relpersistence = 'p' AND CASE relreplident \
           WHEN 'd' THEN NOT EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = own.oid AND i.indisprimary AND i.indimmediate) \
           WHEN 'i' THEN NOT EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = own.oid AND i.indisreplident) \
           ELSE relreplident = 'n' END \
       UNION ALL SELECT 'unlogged', name FROM own WHERE relkind = 'r' AND relpersistence = 'u' \
       UNION ALL SELECT 'row_security', name FROM own WHERE relkind = 'r' AND relforcerowsecurity \
       UNION ALL SELECT 'foreign_table', name FROM own WHERE relkind = 'f' \
       UNION ALL SELECT 'materialized_view', name FROM own WHERE relkind = 'm' \
       UNION ALL SELECT 'sequence', name FROM own WHERE relkind = 'S' \
       UNION ALL SELECT 'large_object', oid::text FROM pg_catalog.pg_largeobject_metadata \
       UNION ALL SELECT 'replica_trigger', pg_catalog.format('%I on %s', t.tgname, own.name) FROM pg_catalog.pg_trigger t \
         JOIN own ON own.oid = t.tgrelid WHERE NOT t.tgisinternal AND t.tgenabled IN ('R', 'A') \
       UNION ALL SELECT 'replica_rule', pg_catalog.format('%I on %s', r.rulename, own.name) FROM pg_catalog.pg_rewrite r \
         JOIN own ON own.oid = r.ev_class WHERE r.ev_enabled IN ('R', 'A') \
       UNION ALL SELECT 'event_trigger', pg_catalog.format('%I', evtname) FROM pg_catalog.pg_event_trigger \
       UNION ALL SELECT 'extension_table', pg_catalog.format('%I of %I', c.relname, e.extname) FROM pg_catalog.pg_extension e, \
         pg_catalog.unnest(e.extconfig) AS t (oid) JOIN pg_catalog.pg_class c ON c.oid = t.oid WHERE c.relkind = 'r' \
       UNION ALL SELECT 'publication', pg_catalog.format('%I', pubname) FROM pg_catalog.pg_publication \
       UNION ALL SELECT 'subscription', pg_catalog.format('%I', s.subname) FROM pg_catalog.pg_subscription s \
         JOIN pg_catalog.pg_database d ON d.oid = s.subdbid WHERE d.datname = pg_catalog.current_database() \
       UNION ALL SELECT 'slot', slot_name::text FROM pg_catalog.pg_replication_slots \
         WHERE database = pg_catalog.current_database() AND NOT temporary \
       UNION ALL SELECT 'prepared_transaction', gid FROM pg_catalog.pg_prepared_xacts \
         WHERE database = pg_catalog.current_database()) AS it \
     ORDER BY 1, 2 LIMIT 500";

pub const EXTENSIONS: &str =
    "SELECT extname::text, extversion FROM pg_catalog.pg_extension WHERE extname <> 'plpgsql' ORDER BY extname";
/// The version that it would be of.
pub const IS_AVAILABLE: &str = "SELECT default_version FROM pg_catalog.pg_available_extensions WHERE name = $1::text";

/// Roles that something in a database, or a right to it, belongs to.
pub const ROLES_IN: &str = "SELECT DISTINCT r.rolname::text FROM pg_catalog.pg_shdepend s \
     JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid AND s.refclassid = 'pg_catalog.pg_authid'::regclass \
     JOIN pg_catalog.pg_database d ON d.oid = s.dbid OR s.dbid = 0 AND s.classid = 'pg_catalog.pg_database'::regclass AND d.oid = s.objid \
     WHERE d.datname = $1::text AND r.oid >= 16384 ORDER BY 1";

/// May log in, inherits, connection limit, own settings, whether it is more than a login, until when its password is good.
pub const ROLE_FACTS: &str = "SELECT rolcanlogin, rolinherit, rolconnlimit, coalesce(rolconfig, '{}'::text[]), \
     rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls, rolvaliduntil::text \
     FROM pg_catalog.pg_roles WHERE rolname = $1::text";

/// What these roles are members of, and how: ADMIN, INHERIT, SET (the last two since PostgreSQL 16), whoever granted it.
pub const MEMBERSHIPS: &str = "SELECT m.rolname::text, g.rolname::text, bool_or(a.admin_option), \
       bool_or((pg_catalog.to_jsonb(a)->>'inherit_option')::bool), bool_or((pg_catalog.to_jsonb(a)->>'set_option')::bool) \
     FROM pg_catalog.pg_auth_members a \
     JOIN pg_catalog.pg_roles m ON m.oid = a.member JOIN pg_catalog.pg_roles g ON g.oid = a.roleid \
     WHERE m.rolname = ANY ($1::text[]) GROUP BY 1, 2 ORDER BY 1, 2";

/// What a tenant's tables, and all that belongs to them, look like; no row counts. The same server tells it in the same words.
pub const FINGERPRINT: &str = "WITH own AS ( \
       SELECT c.oid, c.relkind, pg_catalog.format('%I.%I', n.nspname, c.relname) AS name, \
         pg_catalog.concat_ws(' ', c.relkind, c.relpersistence, c.reloptions::text, c.relispartition, c.relrowsecurity, c.relreplident, \
           pg_catalog.pg_get_expr(c.relpartbound, c.oid), pg_catalog.pg_get_userbyid(c.relowner), c.relacl::text) AS facts \
       FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
       WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema') \
     SELECT pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(coalesce(pg_catalog.string_agg(line, E'\\n' \
         ORDER BY line COLLATE \"C\"), ''), 'UTF8')), 'hex') FROM ( \
       SELECT 'r ' || name || ' ' || facts AS line FROM own \
       UNION ALL SELECT pg_catalog.concat_ws(' ', 'a', own.name, a.attnum, a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), \
           a.attnotnull, a.attidentity, a.attgenerated, pg_catalog.pg_get_expr(f.adbin, f.adrelid)) \
         FROM own JOIN pg_catalog.pg_attribute a ON a.attrelid = own.oid AND a.attnum > 0 AND NOT a.attisdropped \
         LEFT JOIN pg_catalog.pg_attrdef f ON f.adrelid = a.attrelid AND f.adnum = a.attnum WHERE own.relkind <> 'i' \
       UNION ALL SELECT pg_catalog.concat_ws(' ', 'c', own.name, k.conname, pg_catalog.pg_get_constraintdef(k.oid)) \
         FROM own JOIN pg_catalog.pg_constraint k ON k.conrelid = own.oid \
       UNION ALL SELECT pg_catalog.concat_ws(' ', 'i', i.indisvalid, i.indisreplident, pg_catalog.pg_get_indexdef(i.indexrelid)) \
         FROM own JOIN pg_catalog.pg_index i ON i.indrelid = own.oid \
       UNION ALL SELECT pg_catalog.concat_ws(' ', 't', t.tgenabled, pg_catalog.pg_get_triggerdef(t.oid)) \
         FROM own JOIN pg_catalog.pg_trigger t ON t.tgrelid = own.oid WHERE NOT t.tgisinternal \
       UNION ALL SELECT pg_catalog.concat_ws(' ', 'u', own.name, r.rulename, pg_catalog.pg_get_ruledef(r.oid)) \
         FROM own JOIN pg_catalog.pg_rewrite r ON r.ev_class = own.oid \
       UNION ALL SELECT pg_catalog.concat_ws(' ', 'p', own.name, p.polname, p.polcmd, p.polpermissive, \
           pg_catalog.pg_get_expr(p.polqual, p.polrelid), pg_catalog.pg_get_expr(p.polwithcheck, p.polrelid)) \
         FROM own JOIN pg_catalog.pg_policy p ON p.polrelid = own.oid \
       UNION ALL SELECT pg_catalog.concat_ws(' ', 'f', p.pronamespace::regnamespace, p.proname, \
           pg_catalog.pg_get_function_arguments(p.oid), pg_catalog.pg_get_function_result(p.oid), p.prosrc, p.proconfig::text) \
         FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace \
         WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' \
       UNION ALL SELECT pg_catalog.concat_ws(' ', 'e', t.typnamespace::regnamespace, t.typname, e.enumlabel, e.enumsortorder) \
         FROM pg_catalog.pg_enum e JOIN pg_catalog.pg_type t ON t.oid = e.enumtypid \
       UNION ALL SELECT pg_catalog.concat_ws(' ', 's', s.seqrelid::regclass, s.seqtypid::regtype, s.seqstart, s.seqincrement, s.seqmax, \
           s.seqmin, s.seqcycle) FROM pg_catalog.pg_sequence s JOIN own ON own.oid = s.seqrelid \
       UNION ALL SELECT 'x ' || extname || ' ' || extversion FROM pg_catalog.pg_extension) AS it";

/// A session that works as the tenant's owner, for as long as it takes.
pub fn work_as(owner: &str) -> String {
    format!("SET search_path = pg_catalog; SET statement_timeout = 0; SET lock_timeout = '30s'; SET ROLE {}", id(owner))
}

/// A role of a tenant as it is at another server; without a verifier it cannot log in.
pub fn create_role_like(
    role: &str,
    verifier: Option<&str>,
    inherits: bool,
    limit: i32,
    mark: &str,
    since_16: bool,
) -> String {
    let with = if since_16 { " WITH INHERIT TRUE, SET TRUE" } else { "" };
    let login = verifier.map_or_else(|| "NOLOGIN".to_owned(), |verifier| format!("LOGIN PASSWORD {}", text(verifier)));
    let inherit = if inherits { "INHERIT" } else { "NOINHERIT" };
    format!(
        "BEGIN; CREATE ROLE {role} {login} {inherit} NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION CONNECTION LIMIT {limit}; \
         COMMENT ON ROLE {role} IS {mark}; GRANT {role} TO CURRENT_USER{with}; COMMIT",
        role = id(role),
        mark = text(mark),
    )
}

/// `options`: INHERIT and SET, where both the server that they are from and the one where this is said know them.
pub fn grant_role(role: &str, to: &str, admin: bool, options: Option<(bool, bool)>) -> String {
    let with = match options {
        Some((inherit, set)) => format!(" WITH ADMIN {admin}, INHERIT {inherit}, SET {set}"),
        None if admin => " WITH ADMIN OPTION".to_owned(),
        None => String::new(),
    };
    format!("GRANT {} TO {}{with}", id(role), id(to))
}

pub fn valid_until(role: &str, until: &str) -> String {
    format!("ALTER ROLE {} VALID UNTIL {}", id(role), text(until))
}

/// A role that the other server logs in as, to be told what is written: it reads as the tenant's owner, and becomes nobody. What
/// the tenant's database allows a statement would end the copy of a large table.
pub fn create_sender(role: &str, verifier: &str, owner: &str, since_16: bool) -> String {
    let with = if since_16 { " WITH INHERIT TRUE, SET FALSE" } else { "" };
    format!(
        "BEGIN; CREATE ROLE {role} LOGIN REPLICATION INHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD {verifier}; \
         ALTER ROLE {role} SET statement_timeout = 0; ALTER ROLE {role} SET lock_timeout = 0; \
         ALTER ROLE {role} SET idle_in_transaction_session_timeout = 0; GRANT {owner} TO {role}{with}; COMMIT",
        role = id(role),
        verifier = text(verifier),
        owner = id(owner),
    )
}

/// The same for our own login, where no role can be made for it.
pub fn take_time(role: &str, database: &str) -> String {
    format!("ALTER ROLE {} IN DATABASE {} SET statement_timeout = 0", id(role), id(database))
}

pub fn take_no_time(role: &str, database: &str) -> String {
    format!("ALTER ROLE {} IN DATABASE {} RESET statement_timeout", id(role), id(database))
}

/// A role that applies what comes from the other server, as the owner of each table. Its password is good for a while; what
/// works in the background needs none.
pub fn create_applier(role: &str, verifier: &str, until: &str, owner: &str) -> String {
    format!(
        "BEGIN; CREATE ROLE {role} LOGIN INHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION PASSWORD {verifier} \
         VALID UNTIL {until}; GRANT {owner} TO {role} WITH INHERIT TRUE, SET TRUE; GRANT pg_create_subscription TO {role}; COMMIT",
        role = id(role),
        verifier = text(verifier),
        until = text(until),
        owner = id(owner),
    )
}

pub fn renew_password(role: &str, verifier: &str, until: &str) -> String {
    format!("ALTER ROLE {} PASSWORD {} VALID UNTIL {}", id(role), text(verifier), text(until))
}

/// As the tables' owner. Their partitions and children are named themselves.
pub fn create_publication(name: &str, tables: &[(String, String)]) -> String {
    let tables: Vec<String> =
        tables.iter().map(|(schema, table)| format!("ONLY {}.{}", id(schema), id(table))).collect();
    let of = if tables.is_empty() { String::new() } else { format!(" FOR TABLE {}", tables.join(", ")) };
    format!("CREATE PUBLICATION {}{of}", id(name))
}

pub fn drop_publication(name: &str) -> String {
    format!("DROP PUBLICATION IF EXISTS {}", id(name))
}

/// Where the other server is, and who we are there, in libpq's words.
pub fn conninfo(parts: &[(&str, &str)]) -> String {
    let quoted = |value: &str| value.replace('\\', "\\\\").replace('\'', "\\'");
    parts.iter().map(|(key, value)| format!("{key}='{}'", quoted(value))).collect::<Vec<_>>().join(" ")
}

/// What was written by replication itself is not sent on: both directions may be at work at once.
pub fn create_subscription(name: &str, conninfo: &str, copy_data: bool) -> String {
    format!(
        "CREATE SUBSCRIPTION {name} CONNECTION {} PUBLICATION {name} WITH (slot_name = {}, create_slot = true, \
         copy_data = {copy_data}, origin = none, streaming = off)",
        text(conninfo),
        text(name),
        name = id(name),
    )
}

/// Whether the other server lets us in and has what we want of it; nothing is left of it here or there.
pub fn try_subscription(name: &str, conninfo: &str) -> String {
    format!(
        "BEGIN; CREATE SUBSCRIPTION {name} CONNECTION {} PUBLICATION {name} WITH (connect = true, enabled = false, \
         create_slot = false, slot_name = NONE, copy_data = false); ROLLBACK",
        text(conninfo),
        name = id(name),
    )
}

/// For the slot of a subscription that is made in parts, which waits for transactions that are open.
pub const NO_LIMIT: &str = "SET search_path = pg_catalog; SET statement_timeout = 0; SET lock_timeout = 0";
pub const CREATE_SLOT: &str = "SELECT pg_catalog.pg_create_logical_replication_slot($1::text::name, 'pgoutput'::name)";
/// A subscription that leads nowhere yet, with a slot that is there.
pub fn create_idle_subscription(name: &str) -> String {
    format!(
        "CREATE SUBSCRIPTION {name} CONNECTION 'dbname=nowhere password=none' PUBLICATION {name} \
         WITH (connect = false, slot_name = {}, origin = none, streaming = off)",
        text(name),
        name = id(name),
    )
}

/// Says where it leads, which has a password: as a parameter, and what fails inside is told without the text of the statement. (A
/// warning would be logged with it; there is none to be had here.)
pub const MAKE_SUBSCRIBE: &str = "CREATE FUNCTION pg_temp.tenantry_subscribe(name text, conninfo text) RETURNS text LANGUAGE plpgsql \
     SET search_path = pg_catalog, pg_temp AS $body$ BEGIN \
       EXECUTE pg_catalog.format('ALTER SUBSCRIPTION %I CONNECTION %L', name, conninfo); RETURN name; \
     EXCEPTION WHEN OTHERS THEN RAISE EXCEPTION USING ERRCODE = SQLSTATE, MESSAGE = SQLERRM; END $body$";
pub const SUBSCRIBE_QUIETLY: &str = "SELECT pg_temp.tenantry_subscribe($1::text, $2::text)";
/// Of one that was made without a word to the other server; its slot is there.
pub fn begin_subscription(name: &str, copy_data: bool) -> [String; 2] {
    let name = id(name);
    [
        format!("ALTER SUBSCRIPTION {name} ENABLE"),
        format!("ALTER SUBSCRIPTION {name} REFRESH PUBLICATION WITH (copy_data = {copy_data})"),
    ]
}

/// One after the other: a slot that cannot be reached keeps nothing from being dropped here.
pub fn drop_subscription(name: &str) -> [String; 3] {
    let name = id(name);
    [
        format!("ALTER SUBSCRIPTION {name} DISABLE"),
        format!("ALTER SUBSCRIPTION {name} SET (slot_name = NONE)"),
        format!("DROP SUBSCRIPTION {name}"),
    ]
}

/// Of a database.
pub const SUBSCRIPTION: &str = "SELECT s.oid FROM pg_catalog.pg_subscription s JOIN pg_catalog.pg_database d ON d.oid = s.subdbid \
     WHERE d.datname = $1::text AND s.subname = $2::text";
/// Its tables, those that are copied, and how often it failed.
pub const COPIED: &str = "SELECT count(*), count(*) FILTER (WHERE r.srsubstate = 'r'), \
       (SELECT e.apply_error_count + e.sync_error_count FROM pg_catalog.pg_stat_subscription_stats e WHERE e.subname = $1::text), \
       pg_catalog.pg_database_size(pg_catalog.current_database()) \
     FROM pg_catalog.pg_subscription_rel r JOIN pg_catalog.pg_subscription s ON s.oid = r.srsubid WHERE s.subname = $1::text";
/// Whether all up to a position was applied. The last word of a sender that has nothing more to send comes behind all of it.
pub const HAS_APPLIED: &str = "SELECT coalesce(bool_or(w.latest_end_lsn >= $3::text::pg_catalog.pg_lsn), false) \
     FROM pg_catalog.pg_stat_subscription w JOIN pg_catalog.pg_subscription s ON s.oid = w.subid \
     JOIN pg_catalog.pg_database d ON d.oid = s.subdbid WHERE d.datname = $1::text AND s.subname = $2::text AND w.relid IS NULL";

/// What the slot $1 has confirmed.
pub const CONFIRMED: &str =
    "SELECT confirmed_flush_lsn::text FROM pg_catalog.pg_replication_slots WHERE slot_name = $1::text";
/// What a subscription has received, and how often it failed.
pub const RECEIVED: &str = "SELECT (SELECT max(w.received_lsn)::text FROM pg_catalog.pg_stat_subscription w WHERE w.subid = s.oid AND w.relid IS NULL), \
       (SELECT e.apply_error_count FROM pg_catalog.pg_stat_subscription_stats e WHERE e.subid = s.oid) \
     FROM pg_catalog.pg_subscription s JOIN pg_catalog.pg_database d ON d.oid = s.subdbid \
     WHERE d.datname = $1::text AND s.subname = $2::text";
/// Of the slot $1: how its log stands, how much of it is kept, where the server is, whether what is confirmed is past $2, and
/// what is.
pub const KEPT_LOG: &str = "SELECT wal_status, pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), restart_lsn)::int8, \
       pg_catalog.pg_current_wal_lsn()::text, coalesce(confirmed_flush_lsn >= $2::text::pg_catalog.pg_lsn, false), \
       confirmed_flush_lsn::text FROM pg_catalog.pg_replication_slots WHERE slot_name = $1::text";
pub const SLOT: &str = "SELECT active_pid, wal_status FROM pg_catalog.pg_replication_slots WHERE slot_name = $1::text";
/// Ours, and those of tables that were being copied; who uses them is ended.
pub const END_SLOTS: &str = "SELECT slot_name::text, active_pid, CASE WHEN active_pid IS NOT NULL THEN pg_catalog.pg_terminate_backend(active_pid) END \
     FROM pg_catalog.pg_replication_slots WHERE database = $1::text AND (slot_name = $2::text OR slot_name ~ '^pg_[0-9]+_sync_')";
pub const DROP_SLOT: &str = "SELECT pg_catalog.pg_drop_replication_slot($1::text::name)";

/// All that was committed before this is on the disk after it.
pub const FLUSH: &str = "BEGIN; SET LOCAL synchronous_commit = local; \
     SELECT pg_catalog.pg_logical_emit_message(true, 'tenantry', 'move'); COMMIT";
pub const POSITION: &str = "SELECT pg_catalog.pg_current_wal_flush_lsn()::text";

/// Ends the sessions of a database but ours, those of the roles $2, and who sends from the slots of ours.
pub const END_OTHERS: &str = "SELECT count(*), count(*) FILTER (WHERE NOT pg_catalog.pg_terminate_backend(pid)) \
     FROM pg_catalog.pg_stat_activity WHERE datname = $1::text AND usesysid IS NOT NULL AND pid <> pg_catalog.pg_backend_pid() \
       AND usename <> ALL ($2::text[]) AND pid NOT IN (SELECT active_pid FROM pg_catalog.pg_replication_slots \
         WHERE slot_name = ANY ($3::text[]) AND active_pid IS NOT NULL)";
/// Nobody can commit these once the tenant is elsewhere.
pub const PREPARED: &str = "SELECT count(*) FROM pg_catalog.pg_prepared_xacts WHERE database = $1::text";

/// Tables with their size, the smallest first.
pub const SIZES: &str = "SELECT n.nspname::text, c.relname::text, pg_catalog.pg_relation_size(c.oid) FROM pg_catalog.pg_class c \
     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
     WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' \
       AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e') \
     ORDER BY 3, 1, 2";

/// Its rows, with nothing where the checksum would be.
pub fn count(schema: &str, table: &str) -> String {
    format!("SELECT count(*), ''::text FROM ONLY {}.{}", id(schema), id(table))
}

/// Of sequences: schema, name, last value, whether it was given to somebody. Never empty.
pub fn read_sequences(sequences: &[(String, String)]) -> String {
    let one = |(schema, name): &(String, String)| {
        format!(
            "SELECT {}::text, {}::text, last_value, is_called FROM {}.{}",
            text(schema),
            text(name),
            id(schema),
            id(name)
        )
    };
    sequences.iter().map(one).collect::<Vec<_>>().join(" UNION ALL ")
}

/// Sequences as `read_sequences` told them. Never empty.
pub fn set_sequences(sequences: &[(String, String, i64, bool)]) -> String {
    let one = |(schema, name, last, called): &(String, String, i64, bool)| {
        let sequence = text(&format!("{}.{}", id(schema), id(name)));
        format!("pg_catalog.setval({sequence}::regclass, {last}, {called})")
    };
    format!("SELECT {}", sequences.iter().map(one).collect::<Vec<_>>().join(", "))
}

/// Sequences that count upwards, the whole numbers' columns that they are for, and the most that they may give.
pub const COUNTED_COLUMNS: &str = "WITH of AS ( \
       SELECT d.objid AS sequence, d.refobjid AS relation, d.refobjsubid AS number FROM pg_catalog.pg_depend d \
         WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.refclassid = 'pg_catalog.pg_class'::regclass AND d.deptype IN ('a', 'i') \
           AND d.refobjsubid > 0 \
       UNION SELECT d.refobjid, f.adrelid, f.adnum FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_attrdef f ON f.oid = d.objid \
         WHERE d.classid = 'pg_catalog.pg_attrdef'::regclass AND d.refclassid = 'pg_catalog.pg_class'::regclass) \
     SELECT n.nspname::text, s.relname::text, m.nspname::text, t.relname::text, a.attname::text, q.seqmax FROM of \
     JOIN pg_catalog.pg_sequence q ON q.seqrelid = of.sequence AND q.seqincrement > 0 \
     JOIN pg_catalog.pg_class s ON s.oid = q.seqrelid JOIN pg_catalog.pg_namespace n ON n.oid = s.relnamespace \
     JOIN pg_catalog.pg_class t ON t.oid = of.relation AND t.relkind IN ('r', 'p') \
     JOIN pg_catalog.pg_namespace m ON m.oid = t.relnamespace \
     JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum = of.number \
       AND a.atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype) \
     WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' ORDER BY 1, 2, 3, 4, 5";

/// A sequence gives no number that the column has; one that is further stays.
pub fn raise_sequence((schema, name): (&str, &str), (of, table, column): (&str, &str, &str), most: i64) -> String {
    let sequence = format!("{}.{}", id(schema), id(name));
    format!(
        "SELECT pg_catalog.setval({}::regclass, m.n) FROM (SELECT max({}) AS n FROM {}.{}) AS m, {sequence} AS s \
         WHERE m.n >= s.last_value AND m.n <= {most}",
        text(&sequence),
        id(column),
        id(of),
        id(table),
    )
}

/// Views that hold rows, in the order in which they were made.
pub const FILLED_VIEWS: &str = "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_class c \
     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'm' AND c.relispopulated \
       AND n.nspname !~ '^pg_' ORDER BY c.oid";

pub fn refresh_view(schema: &str, view: &str) -> String {
    format!("REFRESH MATERIALIZED VIEW {}.{}", id(schema), id(view))
}

pub const ANALYZE: &str = "ANALYZE";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_texts_and_values_are_quoted_each_in_its_own_way() {
        assert_eq!(conninfo(&[("host", "db"), ("password", "a'b\\c")]), "host='db' password='a\\'b\\\\c'");
        let made = create_subscription("s", "password='a\\'b'", true);
        assert!(
            made.starts_with("CREATE SUBSCRIPTION \"s\" CONNECTION E'password=''a\\\\''b''' PUBLICATION \"s\""),
            "{made}"
        );
        let tables = [("a".to_owned(), "b\"c".to_owned()), ("a".to_owned(), "d".to_owned())];
        assert_eq!(
            create_publication("p", &tables),
            "CREATE PUBLICATION \"p\" FOR TABLE ONLY \"a\".\"b\"\"c\", ONLY \"a\".\"d\""
        );
        assert_eq!(create_publication("p", &[]), "CREATE PUBLICATION \"p\"");
        let sequences = [("a".to_owned(), "b'c".to_owned(), 7, false)];
        assert_eq!(set_sequences(&sequences), "SELECT pg_catalog.setval('\"a\".\"b''c\"'::regclass, 7, false)");
    }
}
