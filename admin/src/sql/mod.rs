//! The only room of the control plane that holds SQL text.
//!
//! What always holds: a name or a text that is put into a statement goes through `id` or `text`; everything that can be a
//! parameter is one.

pub mod catalog;
pub mod import;
pub mod moves;
pub mod rollouts;
pub mod sqlite;

use postgres_protocol::escape::{escape_identifier, escape_literal};

fn id(name: &str) -> String {
    escape_identifier(name)
}

fn text(text: &str) -> String {
    // The library's form for backslashes (` E'…'`) has a space before it.
    escape_literal(text).trim_start().to_owned()
}

/// The databases of these names and their connection limits; -1 is none, -2 a database that was dropped halfway.
pub const CONNECTION_LIMITS: &str =
    "SELECT datname::text, datconnlimit FROM pg_catalog.pg_database WHERE datname = ANY ($1::text[])";

/// oid, owner, connection limit, whether sessions are let in.
pub const DATABASE: &str = "SELECT oid, pg_catalog.pg_get_userbyid(datdba)::text, datconnlimit, datallowconn \
     FROM pg_catalog.pg_database WHERE datname = $1::text";

/// Whether a database may be adopted: owner, template, lets sessions in, connection limit, whether we may act as its owner,
/// whether everybody may connect.
pub const ADOPTABLE: &str = "SELECT pg_catalog.pg_get_userbyid(datdba)::text, datistemplate, datallowconn, datconnlimit, \
     pg_catalog.pg_has_role(datdba, 'USAGE'), EXISTS (SELECT FROM \
     pg_catalog.aclexplode(coalesce(datacl, pg_catalog.acldefault('d', datdba))) a \
     WHERE a.grantee = 0 AND a.privilege_type = 'CONNECT') FROM pg_catalog.pg_database WHERE datname = $1::text";

/// Its comment (whose it is), and whether it may log in.
pub const ROLE: &str = "SELECT pg_catalog.shobj_description(oid, 'pg_authid'), rolcanlogin, rolsuper \
     FROM pg_catalog.pg_roles WHERE rolname = $1::text";

/// Only a superuser may ask.
pub const STORED_VERIFIER: &str = "SELECT rolpassword FROM pg_catalog.pg_authid WHERE rolname = $1::text";

/// Databases that a role owns.
pub const OWNED: &str = "SELECT count(*) FROM pg_catalog.pg_database d JOIN pg_catalog.pg_roles r ON r.oid = d.datdba \
     WHERE r.rolname = $1::text";

/// Ends the sessions of a database, ours excepted; how many there were, and how many could not be ended. A worker of
/// autovacuum has no user: it may not be ended by us, and DROP and ALTER DATABASE end it by themselves.
pub const END_SESSIONS: &str = "SELECT count(*), count(*) FILTER (WHERE NOT pg_catalog.pg_terminate_backend(pid)) \
     FROM pg_catalog.pg_stat_activity WHERE datname = $1::text AND usesysid IS NOT NULL AND pid <> pg_catalog.pg_backend_pid()";

/// The same of one role.
pub const END_SESSIONS_OF: &str = "SELECT count(*), count(*) FILTER (WHERE NOT pg_catalog.pg_terminate_backend(pid)) \
     FROM pg_catalog.pg_stat_activity WHERE datname = $1::text AND usename = $2::text AND pid <> pg_catalog.pg_backend_pid()";

/// oid, owner, whether it was dropped halfway, whether sessions are let in; whether we have the owner's rights and can make
/// databases for it, and may make databases at all.
pub const CONTROL_MAY: &str = "SELECT d.oid, pg_catalog.pg_get_userbyid(d.datdba)::text, d.datconnlimit = -2, d.datallowconn, \
       pg_catalog.pg_has_role(d.datdba, 'USAGE') AND pg_catalog.pg_has_role(d.datdba, \
         CASE WHEN pg_catalog.current_setting('server_version_num')::int >= 160000 THEN 'SET' ELSE 'MEMBER' END), \
       (SELECT rolcreatedb OR rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) \
     FROM pg_catalog.pg_database d WHERE d.datname = $1::text";

/// Who may connect by a grant (PUBLIC is '-'), whether they may grant it on, and whether the owner granted it.
pub const CONNECT_ACL: &str = "SELECT CASE WHEN a.grantee = 0 THEN '-' ELSE pg_catalog.pg_get_userbyid(a.grantee)::text END, \
       a.is_grantable, a.grantor = d.datdba \
     FROM pg_catalog.pg_database d, pg_catalog.aclexplode(coalesce(d.datacl, pg_catalog.acldefault('d', d.datdba))) a \
     WHERE d.datname = $1::text AND a.privilege_type = 'CONNECT' ORDER BY 1";

/// Databases of a role.
pub const DATABASES_OF: &str = "SELECT d.datname::text FROM pg_catalog.pg_database d \
     JOIN pg_catalog.pg_roles r ON r.oid = d.datdba WHERE r.rolname = $1::text";

/// Roles that may connect to a database by a grant of their own (PUBLIC is '-').
pub const CONNECT_GRANTS: &str = "SELECT CASE WHEN a.grantee = 0 THEN '-' ELSE pg_catalog.pg_get_userbyid(a.grantee)::text END \
     FROM pg_catalog.pg_database d, pg_catalog.aclexplode(coalesce(d.datacl, pg_catalog.acldefault('d', d.datdba))) a \
     WHERE d.datname = $1::text AND a.privilege_type = 'CONNECT'";

/// What a database is besides its contents: its row, encoding, owner and comment, and whether it has a security label.
pub const DATABASE_FACTS: &str = "SELECT pg_catalog.to_jsonb(d), pg_catalog.pg_encoding_to_char(d.encoding)::text, \
     pg_catalog.pg_get_userbyid(d.datdba)::text, pg_catalog.shobj_description(d.oid, 'pg_database'), \
     EXISTS (SELECT FROM pg_catalog.pg_shseclabel l WHERE l.objoid = d.oid AND l.classoid = 'pg_catalog.pg_database'::regclass) \
     FROM pg_catalog.pg_database d WHERE d.datname = $1::text";

/// ALTER DATABASE SET, and ALTER ROLE IN DATABASE SET (the first column is its role then).
pub const DATABASE_SETTINGS: &str = "SELECT CASE WHEN s.setrole <> 0 THEN pg_catalog.pg_get_userbyid(s.setrole)::text END, c.one \
     FROM pg_catalog.pg_db_role_setting s JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase, \
       pg_catalog.unnest(s.setconfig) WITH ORDINALITY AS c (one, at) \
     WHERE d.datname = $1::text ORDER BY 1, c.at";

/// Who may do what with a database, and hand it on; PUBLIC is NULL.
pub const DATABASE_RIGHTS: &str = "SELECT CASE WHEN a.grantee <> 0 THEN pg_catalog.pg_get_userbyid(a.grantee)::text END, \
     a.privilege_type, a.is_grantable \
     FROM pg_catalog.pg_database d, pg_catalog.aclexplode(coalesce(d.datacl, pg_catalog.acldefault('d', d.datdba))) a \
     WHERE d.datname = $1::text ORDER BY 1, 2, 3";

/// Whether we may let another role be a member of this one (before PostgreSQL 16: CREATEROLE suffices).
pub const MAY_GRANT: &str = "SELECT pg_catalog.pg_has_role($1::name, 'USAGE WITH ADMIN OPTION') \
     OR pg_catalog.current_setting('server_version_num')::int < 160000";

/// Things in this database whose owner is not $1: what a dump without owners cannot keep.
/// Those of extensions come with the extension; types of tables and arrays with what they are of.
pub const OF_OTHERS: &str = "SELECT pg_catalog.format('%s is owned by %s', thing, pg_catalog.pg_get_userbyid(owner)), count(*) OVER () \
     FROM ( \
       SELECT c.oid, 'pg_catalog.pg_class'::regclass AS class, c.relowner AS owner, pg_catalog.format('relation %I.%I', n.nspname, c.relname) AS thing \
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f') AND n.nspname !~ '^pg_(toast|temp)' \
       UNION ALL SELECT p.oid, 'pg_catalog.pg_proc'::regclass, p.proowner, pg_catalog.format('function %I.%I', n.nspname, p.proname) \
         FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace \
       UNION ALL SELECT n.oid, 'pg_catalog.pg_namespace'::regclass, n.nspowner, pg_catalog.format('schema %I', n.nspname) \
         FROM pg_catalog.pg_namespace n WHERE n.nspname !~ '^pg_(toast|temp)' \
       UNION ALL SELECT t.oid, 'pg_catalog.pg_type'::regclass, t.typowner, pg_catalog.format('type %I.%I', n.nspname, t.typname) \
         FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace WHERE n.nspname !~ '^pg_(toast|temp)' \
           AND t.typtype <> 'm' AND NOT EXISTS (SELECT FROM pg_catalog.pg_type e WHERE e.typarray = t.oid) \
           AND NOT EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = t.typrelid AND c.relkind <> 'c') \
       UNION ALL SELECT l.oid, 'pg_catalog.pg_largeobject'::regclass, l.lomowner, pg_catalog.format('large object %s', l.oid) \
         FROM pg_catalog.pg_largeobject_metadata l \
       UNION ALL SELECT e.oid, 'pg_catalog.pg_event_trigger'::regclass, e.evtowner, pg_catalog.format('event trigger %I', e.evtname) \
         FROM pg_catalog.pg_event_trigger e \
       UNION ALL SELECT s.oid, 'pg_catalog.pg_subscription'::regclass, s.subowner, pg_catalog.format('subscription %I', s.subname) \
         FROM pg_catalog.pg_subscription s JOIN pg_catalog.pg_database d ON d.oid = s.subdbid WHERE d.datname = pg_catalog.current_database() \
     ) AS it \
     WHERE (it.oid >= 16384 OR it.class = 'pg_catalog.pg_largeobject'::regclass) \
       AND pg_catalog.pg_get_userbyid(it.owner) NOT IN ($1::name, 'pg_database_owner') \
       AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = it.class AND d.objid = it.oid AND d.deptype = 'e') \
     ORDER BY 1 LIMIT 1";

/// Tables with data of their own; partitions count, their parents do not, nor views that are filled from others.
pub const TABLES: &str = "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_class c \
     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
     WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' \
       AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e') \
     ORDER BY 1, 2";

/// The last value of every sequence.
pub const SEQUENCES: &str = "SELECT n.nspname::text, c.relname::text, coalesce(pg_catalog.pg_sequence_last_value(c.oid), 0) \
     FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
     WHERE c.relkind = 'S' AND c.relpersistence <> 't' ORDER BY 1, 2";

/// How many there are of each kind of thing that a database is made of.
pub const THINGS: &str = "SELECT kind, count(*) FROM ( \
       SELECT CASE c.relkind WHEN 'r' THEN 'tables' WHEN 'p' THEN 'partitioned tables' WHEN 'v' THEN 'views' WHEN 'm' THEN 'materialized views' \
         WHEN 'i' THEN 'indexes' WHEN 'I' THEN 'partitioned indexes' WHEN 'S' THEN 'sequences' WHEN 'f' THEN 'foreign tables' ELSE 'composite types' END AS kind \
         FROM pg_catalog.pg_class c WHERE c.oid >= 16384 AND c.relpersistence <> 't' AND c.relkind <> 't' AND c.relnamespace <> 'pg_toast'::regnamespace \
       UNION ALL SELECT 'columns' FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid \
         WHERE c.oid >= 16384 AND c.relpersistence <> 't' AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'c') AND a.attnum > 0 AND NOT a.attisdropped \
       UNION ALL SELECT 'functions' FROM pg_catalog.pg_proc WHERE oid >= 16384 \
       UNION ALL SELECT 'schemas' FROM pg_catalog.pg_namespace WHERE nspname !~ '^pg_' \
       UNION ALL SELECT 'constraints' FROM pg_catalog.pg_constraint WHERE oid >= 16384 \
       UNION ALL SELECT 'triggers' FROM pg_catalog.pg_trigger WHERE NOT tgisinternal \
       UNION ALL SELECT 'event triggers' FROM pg_catalog.pg_event_trigger \
       UNION ALL SELECT 'rules' FROM pg_catalog.pg_rewrite WHERE oid >= 16384 \
       UNION ALL SELECT 'policies' FROM pg_catalog.pg_policy \
       UNION ALL SELECT 'types' FROM pg_catalog.pg_type WHERE oid >= 16384 AND typtype IN ('e', 'd', 'r', 'm', 'b') AND typcategory <> 'A' \
       UNION ALL SELECT 'casts' FROM pg_catalog.pg_cast WHERE oid >= 16384 \
       UNION ALL SELECT 'operators' FROM pg_catalog.pg_operator WHERE oid >= 16384 \
       UNION ALL SELECT 'collations' FROM pg_catalog.pg_collation WHERE oid >= 16384 \
       UNION ALL SELECT 'statistics' FROM pg_catalog.pg_statistic_ext \
       UNION ALL SELECT 'text search configurations' FROM pg_catalog.pg_ts_config WHERE oid >= 16384 \
       UNION ALL SELECT 'publications' FROM pg_catalog.pg_publication \
       UNION ALL SELECT 'subscriptions' FROM pg_catalog.pg_subscription s JOIN pg_catalog.pg_database d ON d.oid = s.subdbid \
         WHERE d.datname = pg_catalog.current_database() \
       UNION ALL SELECT 'extensions' FROM pg_catalog.pg_extension \
       UNION ALL SELECT 'default privileges' FROM pg_catalog.pg_default_acl \
       UNION ALL SELECT 'large objects' FROM pg_catalog.pg_largeobject_metadata \
     ) AS it GROUP BY kind ORDER BY kind";

/// Large objects, their numbers and what is in them.
pub const LARGE_OBJECTS: &str = "SELECT count(*), coalesce(sum(pg_catalog.hashtextextended( \
       pg_catalog.concat(oid, ' ', pg_catalog.encode(pg_catalog.sha256(pg_catalog.lo_get(oid)), 'hex')), 0)::numeric), 0)::text \
     FROM pg_catalog.pg_largeobject_metadata";

/// Rows, and a sum over their text that does not depend on their order. Only output functions make the text: a cast would
/// ask pg_cast, where the owner of a table may have put a function of his own. `.*` is the whole row, whatever its columns
/// are called.
pub fn checksum(schema: &str, table: &str) -> String {
    format!(
        "SELECT count(*), coalesce(sum(pg_catalog.hashtextextended(pg_catalog.textin(pg_catalog.record_out(one.*)), 0)::numeric), 0)::text \
         FROM ONLY {}.{} AS one",
        id(schema),
        id(table)
    )
}

/// So that the text of a row is the same in every session; as the tenant's owner.
pub fn plain_text_as(owner: &str) -> String {
    format!(
        "SET search_path = pg_catalog; SET extra_float_digits = 1; SET datestyle = 'ISO, YMD'; SET intervalstyle = 'postgres'; \
         SET timezone = 'UTC'; SET bytea_output = 'hex'; SET statement_timeout = 0; SET lock_timeout = '30s'; \
         SET row_security = off; SET xmloption = content; SET default_transaction_read_only = on; SET ROLE {}",
        id(owner)
    )
}

/// In PostgreSQL's own time.
pub const SOON: &str =
    "SELECT pg_catalog.to_char((now() + $1::text::interval) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS\"+00\"')";

/// A role for one piece of work inside a tenant's database: it may log in for a while, may become the tenant's owner, and
/// is nobody else. Only that we belong to it lets us see what its sessions do.
pub fn create_hand(hand: &str, verifier: &str, until: &str, owner: &str, since_16: bool) -> String {
    let (as_owner, as_hand) =
        if since_16 { (" WITH INHERIT FALSE, SET TRUE", " WITH INHERIT TRUE, SET FALSE") } else { ("", "") };
    format!(
        "BEGIN; CREATE ROLE {hand} LOGIN NOINHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION PASSWORD {verifier} \
         VALID UNTIL {until}; GRANT {owner} TO {hand}{as_owner}; GRANT {hand} TO CURRENT_USER{as_hand}; COMMIT",
        hand = id(hand),
        verifier = text(verifier),
        until = text(until),
        owner = id(owner),
    )
}

/// Settings with which a role's sessions begin in a database, the more special ones last; but for whom they are.
pub const SETTINGS_OF_ROLE: &str = "SELECT pg_catalog.split_part(c, '=', 1), pg_catalog.substr(c, pg_catalog.strpos(c, '=') + 1) \
     FROM pg_catalog.pg_db_role_setting s JOIN pg_catalog.pg_roles r ON r.oid = s.setrole \
     CROSS JOIN LATERAL pg_catalog.unnest(s.setconfig) WITH ORDINALITY AS u(c, place) \
     WHERE r.rolname = $1 AND s.setdatabase IN (0, (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = $2)) \
       AND pg_catalog.split_part(c, '=', 1) NOT IN ('role', 'session_authorization') ORDER BY s.setdatabase, place";
/// Whoever is in stays in; nobody else comes.
pub fn no_login(role: &str) -> String {
    format!("ALTER ROLE {} NOLOGIN", id(role))
}

pub fn grant_only_connect(database: &str, role: &str) -> String {
    format!("GRANT CONNECT ON DATABASE {} TO {}", id(database), id(role))
}

/// Databases that keep a role from being dropped; true where it is only a right to the database itself.
pub const HELD_BY: &str = "SELECT DISTINCT d.datname::text, s.dbid = 0 FROM pg_catalog.pg_shdepend s \
     JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid AND s.refclassid = 'pg_catalog.pg_authid'::regclass \
     JOIN pg_catalog.pg_database d ON d.oid = s.dbid OR s.dbid = 0 AND s.classid = 'pg_catalog.pg_database'::regclass AND d.oid = s.objid \
     WHERE r.rolname = $1::text ORDER BY 1, 2";

/// Ends what a role runs; how many sessions there were.
pub const END_SESSIONS_OF_ROLE: &str = "SELECT count(pg_catalog.pg_terminate_backend(pid)) FROM pg_catalog.pg_stat_activity \
     WHERE usename = $1::name";

/// Sessions of a role in which PostgreSQL is at work: not waiting for the other end.
pub const BUSY_SESSIONS_OF: &str = "SELECT count(*) FROM pg_catalog.pg_stat_activity \
     WHERE usename = $1::name AND state = 'active' AND wait_event_type IS DISTINCT FROM 'Client'";

/// In the database where the role left something behind.
pub fn hand_over(role: &str, to: &str) -> String {
    format!("REASSIGN OWNED BY {role} TO {to}; DROP OWNED BY {role}", role = id(role), to = id(to))
}

/// Databases in which it has rights, then the role.
pub fn drop_hand(hand: &str, databases: &[String]) -> String {
    let mut statements = String::new();
    for database in databases {
        statements.push_str(&format!("REVOKE ALL ON DATABASE {} FROM {}; ", id(database), id(hand)));
    }
    statements + &drop_role(hand)
}

/// A login role with a verifier, marked as ours, and the control role in it (`16`: with what PostgreSQL 16 asks for).
pub fn create_role(role: &str, verifier: &str, mark: &str, since_16: bool) -> String {
    let with = if since_16 { " WITH INHERIT TRUE, SET TRUE" } else { "" };
    format!(
        "BEGIN; CREATE ROLE {role} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION PASSWORD {verifier}; \
         COMMENT ON ROLE {role} IS {mark}; GRANT {role} TO CURRENT_USER{with}; COMMIT",
        role = id(role),
        verifier = text(verifier),
        mark = text(mark),
    )
}

pub fn set_password(role: &str, verifier: &str) -> String {
    format!("ALTER ROLE {} PASSWORD {}", id(role), text(verifier))
}

pub fn drop_role(role: &str) -> String {
    format!("DROP ROLE IF EXISTS {}", id(role))
}

/// template0: nothing that somebody put into template1, and any encoding. Nobody gets in until it is closed to the public.
pub fn create_database(database: &str, owner: &str) -> String {
    format!(
        "CREATE DATABASE {} OWNER {} TEMPLATE template0 ENCODING 'UTF8' ALLOW_CONNECTIONS false",
        id(database),
        id(owner)
    )
}

/// How text is encoded, compared and sorted in a database.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Locale {
    pub encoding: String,
    pub collate: String,
    pub ctype: String,
    /// `c`, `i` or `b`, as in pg_database; absent before PostgreSQL 15.
    pub provider: Option<String>,
    pub locale: Option<String>,
    pub icu_rules: Option<String>,
}

/// As `create_database`, for text as another database had it.
pub fn create_database_like(database: &str, owner: &str, locale: &Locale) -> String {
    let Locale { encoding, collate, ctype, provider, locale, icu_rules } = locale;
    let mut statement = format!(
        "CREATE DATABASE {} OWNER {} TEMPLATE template0 ENCODING {} LC_COLLATE {} LC_CTYPE {}",
        id(database),
        id(owner),
        text(encoding),
        text(collate),
        text(ctype)
    );
    let named = locale.as_deref().unwrap_or_default();
    match provider.as_deref() {
        Some("c") => statement.push_str(" LOCALE_PROVIDER libc"),
        Some("i") => statement.push_str(&format!(" LOCALE_PROVIDER icu ICU_LOCALE {}", text(named))),
        Some("b") => statement.push_str(&format!(" LOCALE_PROVIDER builtin BUILTIN_LOCALE {}", text(named))),
        _ => {}
    }
    if let Some(rules) = icu_rules {
        statement.push_str(&format!(" ICU_RULES {}", text(rules)));
    }
    statement + " ALLOW_CONNECTIONS false"
}

pub fn drop_database(database: &str) -> String {
    format!("DROP DATABASE IF EXISTS {}", id(database))
}

pub fn rename_database(from: &str, to: &str) -> String {
    format!("ALTER DATABASE {} RENAME TO {}", id(from), id(to))
}

pub fn allow_connections(database: &str, allow: bool) -> String {
    format!("ALTER DATABASE {} ALLOW_CONNECTIONS {allow}", id(database))
}

pub fn revoke_public(database: &str) -> String {
    format!("REVOKE ALL ON DATABASE {} FROM PUBLIC", id(database))
}

pub fn grant_connect(database: &str, role: &str) -> String {
    format!("GRANT CONNECT, TEMPORARY ON DATABASE {} TO {}", id(database), id(role))
}

/// Nobody but Tenantry's own role gets in.
pub fn only_control(database: &str, others: &[String]) -> String {
    let database = id(database);
    let mut statements = format!("GRANT CONNECT ON DATABASE {database} TO CURRENT_USER");
    for role in others {
        let role = if role == "-" { "PUBLIC".to_owned() } else { id(role) };
        statements.push_str(&format!("; REVOKE CONNECT ON DATABASE {database} FROM {role}"));
    }
    statements
}

/// CONNECT for these (and whether they may grant it on), and not for the others.
pub fn give_connect(database: &str, to: &[(String, bool)], not: &[String]) -> String {
    let database = id(database);
    let name = |role: &String| if role == "-" { "PUBLIC".to_owned() } else { id(role) };
    let mut statements = String::new();
    for (role, may_grant) in to {
        let option = if *may_grant { " WITH GRANT OPTION" } else { "" };
        statements.push_str(&format!("GRANT CONNECT ON DATABASE {database} TO {}{option}; ", name(role)));
    }
    for role in not {
        statements.push_str(&format!("REVOKE CONNECT ON DATABASE {database} FROM {}; ", name(role)));
    }
    statements
}

/// In the database where it is said; and databases and tablespaces everywhere.
pub fn reassign(from: &str, to: &str) -> String {
    format!("REASSIGN OWNED BY {} TO {}", id(from), id(to))
}

pub fn set_owner(database: &str, owner: &str) -> String {
    format!("ALTER DATABASE {} OWNER TO {}", id(database), id(owner))
}

/// The old role may do in the database what the new one may.
pub fn share(database: &str, new: &str, old: &str, since_16: bool) -> String {
    let with = if since_16 { " WITH INHERIT TRUE, SET TRUE" } else { "" };
    format!("{}; GRANT {} TO {}{with}", grant_connect(database, old), id(new), id(old))
}

/// Everything of the new role is the old one's again, and the new one has no rights any more.
pub fn hand_back(new: &str, old: &str) -> String {
    let (new, old) = (id(new), id(old));
    format!("BEGIN; REASSIGN OWNED BY {new} TO {old}; REVOKE {new} FROM {old}; DROP OWNED BY {new}; COMMIT")
}

pub fn revoke_connect(database: &str, role: &str) -> String {
    format!("REVOKE ALL ON DATABASE {} FROM {}", id(database), id(role))
}

pub fn revoke_role(role: &str, from: &str) -> String {
    format!("REVOKE {} FROM {}", id(role), id(from))
}

/// Whose it is.
pub fn mark_role(role: &str, mark: &str) -> String {
    format!("COMMENT ON ROLE {} IS {}", id(role), text(mark))
}

/// `None`: back to the server's own.
pub fn set_database_default(database: &str, setting: &str, value: Option<&str>) -> String {
    match value {
        Some(value) => {
            format!("ALTER DATABASE {} SET {} = {}", id(database), setting_name(setting), setting_value(setting, value))
        }
        None => format!("ALTER DATABASE {} RESET {}", id(database), setting_name(setting)),
    }
}

/// In one database, or in all.
pub fn set_role_default(role: &str, database: Option<&str>, setting: &str, value: &str) -> String {
    let place = database.map_or_else(String::new, |database| format!(" IN DATABASE {}", id(database)));
    format!("ALTER ROLE {}{place} SET {} = {}", id(role), setting_name(setting), setting_value(setting, value))
}

/// A setting of an extension or of one's own has a dot in its name, which is none of the name's.
fn setting_name(setting: &str) -> String {
    setting.split('.').map(id).collect::<Vec<_>>().join(".")
}

/// Settings that are lists of names: a text with commas would be one name.
fn setting_value(setting: &str, value: &str) -> String {
    let lists = [
        "search_path",
        "temp_tablespaces",
        "local_preload_libraries",
        "session_preload_libraries",
        "shared_preload_libraries",
        "unix_socket_directories",
    ];
    if !lists.iter().any(|list| list.eq_ignore_ascii_case(setting)) {
        return text(value);
    }
    let names = list_of_names(value);
    if names.is_empty() { text("") } else { names.iter().map(|name| text(name)).collect::<Vec<_>>().join(", ") }
}

/// The names in a list as PostgreSQL writes it: with commas between them, in quotes where they need them.
fn list_of_names(list: &str) -> Vec<String> {
    let (mut names, mut name, mut quoted, mut was_quoted) = (Vec::new(), String::new(), false, false);
    let mut characters = list.chars().peekable();
    while let Some(c) = characters.next() {
        match c {
            '"' if quoted && characters.peek() == Some(&'"') => {
                characters.next();
                name.push('"');
            }
            '"' => {
                quoted = !quoted;
                was_quoted = true;
            }
            ',' if !quoted => {
                names.push(std::mem::take(&mut name));
                was_quoted = false;
            }
            c if quoted => name.push(c),
            c if c.is_whitespace() => {}
            c if was_quoted => name.push(c),
            c => name.extend(c.to_lowercase()),
        }
    }
    if !name.is_empty() || was_quoted {
        names.push(name);
    }
    names
}

pub fn comment_on_database(database: &str, comment: &str) -> String {
    format!("COMMENT ON DATABASE {} IS {}", id(database), text(comment))
}

/// `None`: to PUBLIC.
pub fn grant_on_database(database: &str, privilege: &'static str, role: Option<&str>, is_grantable: bool) -> String {
    let role = role.map_or_else(|| "PUBLIC".to_owned(), id);
    let option = if is_grantable { " WITH GRANT OPTION" } else { "" };
    format!("GRANT {privilege} ON DATABASE {} TO {role}{option}", id(database))
}

/// As the owner, who owns what it makes.
pub fn create_extension(owner: &str, extension: &str) -> String {
    format!("SET ROLE {}; CREATE EXTENSION IF NOT EXISTS {}; RESET ROLE", id(owner), id(extension))
}

/// `None`: no limit.
pub fn set_connection_limit(database: &str, limit: Option<u32>) -> String {
    let limit = limit.map_or_else(|| "-1".to_owned(), |limit| limit.to_string());
    format!("ALTER DATABASE {} CONNECTION LIMIT {limit}", id(database))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_names_is_set_as_a_list() {
        let set = |value| set_database_default("d", "search_path", Some(value));
        assert_eq!(set("app, public"), "ALTER DATABASE \"d\" SET \"search_path\" = 'app', 'public'");
        let odd = "ALTER DATABASE \"d\" SET \"search_path\" = '$user', 'a, \"b', 'public'";
        assert_eq!(set("\"$user\", \"a, \"\"b\",PUBLIC"), odd);
        assert_eq!(set(""), "ALTER DATABASE \"d\" SET \"search_path\" = ''");
        assert_eq!(set("\"\""), "ALTER DATABASE \"d\" SET \"search_path\" = ''");
        assert_eq!(
            set_role_default("r", Some("d"), "app.x", "1, 2"),
            "ALTER ROLE \"r\" IN DATABASE \"d\" SET \"app\".\"x\" = '1, 2'"
        );
    }

    #[test]
    fn names_and_texts_are_quoted_whatever_they_hold() {
        assert_eq!(set_connection_limit("a\"b; x", Some(3)), "ALTER DATABASE \"a\"\"b; x\" CONNECTION LIMIT 3");
        assert_eq!(set_connection_limit("acme", None), "ALTER DATABASE \"acme\" CONNECTION LIMIT -1");
        assert_eq!(set_password("a\"b", "x'y"), "ALTER ROLE \"a\"\"b\" PASSWORD 'x''y'");
        assert_eq!(set_password("a", "x\\y"), "ALTER ROLE \"a\" PASSWORD E'x\\\\y'");
        assert_eq!(
            set_database_default("d", "lock_timeout", Some("'; DROP")),
            "ALTER DATABASE \"d\" SET \"lock_timeout\" = '''; DROP'"
        );
        assert_eq!(
            give_connect("d", &[("-".to_owned(), false), ("x\"".to_owned(), true)], &["y".to_owned()]),
            "GRANT CONNECT ON DATABASE \"d\" TO PUBLIC; GRANT CONNECT ON DATABASE \"d\" TO \"x\"\"\" WITH GRANT OPTION; \
             REVOKE CONNECT ON DATABASE \"d\" FROM \"y\"; "
        );
        assert_eq!(
            only_control("d", &["-".to_owned(), "x\"".to_owned()]),
            "GRANT CONNECT ON DATABASE \"d\" TO CURRENT_USER; REVOKE CONNECT ON DATABASE \"d\" FROM PUBLIC; \
             REVOKE CONNECT ON DATABASE \"d\" FROM \"x\"\"\""
        );
    }
}
