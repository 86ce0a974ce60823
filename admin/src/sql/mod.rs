//! The only room of the control plane that holds SQL text.
//!
//! What always holds: a name or a text that is put into a statement goes through `id` or `text`; everything that can be a
//! parameter is one.

pub mod catalog;

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

/// Ends the sessions of a database, ours excepted; how many there were, and how many could not be ended.
pub const END_SESSIONS: &str = "SELECT count(*), count(*) FILTER (WHERE NOT pg_catalog.pg_terminate_backend(pid)) \
     FROM pg_catalog.pg_stat_activity WHERE datname = $1::text AND pid <> pg_catalog.pg_backend_pid()";

/// Roles that may connect to a database by a grant of their own (PUBLIC is '-').
pub const CONNECT_GRANTS: &str = "SELECT CASE WHEN a.grantee = 0 THEN '-' ELSE pg_catalog.pg_get_userbyid(a.grantee)::text END \
     FROM pg_catalog.pg_database d, pg_catalog.aclexplode(coalesce(d.datacl, pg_catalog.acldefault('d', d.datdba))) a \
     WHERE d.datname = $1::text AND a.privilege_type = 'CONNECT'";

/// Tables with data of their own; partitions count, their parents do not.
pub const TABLES: &str = "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_class c \
     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
     WHERE c.relkind IN ('r', 'm') AND c.relpersistence = 'p' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' \
       AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e') \
     ORDER BY 1, 2";

/// The last value of every sequence.
pub const SEQUENCES: &str = "SELECT schemaname::text, sequencename::text, coalesce(last_value, 0) \
     FROM pg_catalog.pg_sequences ORDER BY 1, 2";

/// Rows, and a sum over their text that does not depend on their order.
pub fn checksum(schema: &str, table: &str) -> String {
    format!(
        "SELECT count(*), coalesce(sum(pg_catalog.hashtextextended(t::text, 0)::numeric), 0)::text FROM ONLY {}.{} t",
        id(schema),
        id(table)
    )
}

/// So that the text of a row is the same in every session.
pub const PLAIN_TEXT: &str = "SET extra_float_digits = 1; SET datestyle = 'ISO, YMD'; SET intervalstyle = 'postgres'; \
     SET timezone = 'UTC'; SET bytea_output = 'hex'; SET statement_timeout = 0; SET search_path = pg_catalog";

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

/// `None`: back to the server's own.
pub fn set_database_default(database: &str, setting: &str, value: Option<&str>) -> String {
    match value {
        Some(value) => format!("ALTER DATABASE {} SET {} = {}", id(database), id(setting), text(value)),
        None => format!("ALTER DATABASE {} RESET {}", id(database), id(setting)),
    }
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
            only_control("d", &["-".to_owned(), "x\"".to_owned()]),
            "GRANT CONNECT ON DATABASE \"d\" TO CURRENT_USER; REVOKE CONNECT ON DATABASE \"d\" FROM PUBLIC; \
             REVOKE CONNECT ON DATABASE \"d\" FROM \"x\"\"\""
        );
    }
}
