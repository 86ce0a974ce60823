//! What an import asks and does in a tenant's database, as its owner.

use super::{id, text};
use crate::import::{
    Form,
    plan::{ForeignKey, TablePlan},
};

/// After `plain_text_as`: what a trigger or a CHECK of the tenant names is found as ever, and nothing gives up while the file
/// is read.
pub const BEGIN: &str = "RESET search_path; SET lock_timeout = '5s'; SET idle_in_transaction_session_timeout = '30min'; \
     BEGIN READ WRITE";
pub const ROLLBACK: &str = "ROLLBACK";
pub const COMMIT: &str = "COMMIT";
pub const SAVEPOINT: &str = "SAVEPOINT one_table";
pub const BACK_TO_SAVEPOINT: &str = "ROLLBACK TO SAVEPOINT one_table";
pub const RELEASE_SAVEPOINT: &str = "RELEASE SAVEPOINT one_table";
pub const ALL_IMMEDIATE: &str = "SET CONSTRAINTS ALL IMMEDIATE";
pub const ALL_DEFERRED: &str = "SET CONSTRAINTS ALL DEFERRED";

/// Encoding, and what the server's hash makes of a text.
pub const SERVER: &str =
    "SELECT pg_catalog.current_setting('server_encoding'), pg_catalog.hashtextextended($1::text, 0)";

/// The number by which it can be asked later what became of the transaction.
pub const TRANSACTION: &str = "SELECT pg_catalog.pg_current_xact_id()::text";
/// `committed`, `aborted`, `in progress`; NULL: nobody knows any more.
pub const BECAME: &str = "SELECT pg_catalog.pg_xact_status($1::text::xid8)";

/// Tables that are found without their schema: oid, schema, name, whether there are triggers of the tenant's.
pub const TABLES: &str = "SELECT c.oid, n.nspname::text, c.relname::text, \
       EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal) \
     FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
     WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND NOT c.relispartition AND pg_catalog.pg_table_is_visible(c.oid) \
       AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' \
     ORDER BY n.nspname, c.relname";

/// Table, name, type, its modifier, NOT NULL, default or identity, generated.
pub const COLUMNS: &str = "SELECT a.attrelid, a.attname::text, a.atttypid, a.atttypmod, a.attnotnull, \
       a.atthasdef AND a.attgenerated = '' OR a.attidentity <> '', a.attgenerated <> '' \
     FROM pg_catalog.pg_attribute a WHERE a.attrelid = ANY ($1::oid[]) AND a.attnum > 0 AND NOT a.attisdropped \
     ORDER BY a.attrelid, a.attnum";

/// All types: oid, name, kind (base, domain, enum, ...), of a domain its type and modifier, NOT NULL, of an array its element, the
/// labels of an enum.
pub const TYPES: &str = "SELECT t.oid, pg_catalog.format_type(t.oid, NULL), t.typtype::text, t.typbasetype, t.typtypmod, t.typnotnull, \
       CASE WHEN t.typcategory = 'A' AND t.typlen = -1 THEN t.typelem ELSE 0::oid END, \
       ARRAY (SELECT e.enumlabel::text FROM pg_catalog.pg_enum e WHERE e.enumtypid = t.oid) \
     FROM pg_catalog.pg_type t WHERE t.typtype IN ('b', 'd', 'e') OR t.typcategory = 'A'";

/// Table, and columns of a unique index over whole columns and all rows.
pub const UNIQUES: &str = "SELECT i.indrelid, ARRAY (SELECT a.attname::text FROM pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY AS k (num, at) \
         JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.num WHERE k.at <= i.indnkeyatts ORDER BY k.at) \
     FROM pg_catalog.pg_index i WHERE i.indrelid = ANY ($1::oid[]) AND i.indisunique AND i.indpred IS NULL AND i.indexprs IS NULL \
     ORDER BY i.indexrelid";

/// Name, child, parent, their columns, whether it may be deferred.
pub const FOREIGN_KEYS: &str = "SELECT c.conname::text, c.conrelid, c.confrelid, \
       ARRAY (SELECT a.attname::text FROM pg_catalog.unnest(c.conkey) WITH ORDINALITY AS k (num, at) \
         JOIN pg_catalog.pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.num ORDER BY k.at), \
       ARRAY (SELECT a.attname::text FROM pg_catalog.unnest(c.confkey) WITH ORDINALITY AS k (num, at) \
         JOIN pg_catalog.pg_attribute a ON a.attrelid = c.confrelid AND a.attnum = k.num ORDER BY k.at), \
       c.condeferrable \
     FROM pg_catalog.pg_constraint c WHERE c.contype = 'f' AND c.conparentid = 0 \
       AND (c.conrelid = ANY ($1::oid[]) OR c.confrelid = ANY ($1::oid[])) ORDER BY c.conrelid, c.conname";

/// Schema and name of a table by its number, for those that are not filled themselves.
pub const NAME_OF: &str = "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_class c \
     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1::oid";

/// Sequences of a table's columns that count up: column, schema, name, step, largest number, where it stands, whether that was
/// given out.
pub const SEQUENCES_OF: &str = "SELECT a.attname::text, n.nspname::text, s.relname::text, q.seqincrement, q.seqmax, \
       pg_catalog.pg_sequence_last_value(s.oid) \
     FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_class s ON s.oid = d.objid AND s.relkind = 'S' \
     JOIN pg_catalog.pg_namespace n ON n.oid = s.relnamespace JOIN pg_catalog.pg_sequence q ON q.seqrelid = s.oid \
     JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid \
     WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.refclassid = 'pg_catalog.pg_class'::regclass AND d.deptype IN ('a', 'i') \
       AND d.refobjid = $1::oid AND q.seqincrement > 0 ORDER BY 1, 2, 3";

fn table(schema: &str, name: &str) -> String {
    format!("{}.{}", id(schema), id(name))
}

fn of(plan: &TablePlan) -> String {
    table(&plan.schema, &plan.name)
}

fn ids<'a>(names: impl IntoIterator<Item = &'a String>) -> String {
    names.into_iter().map(|name| id(name)).collect::<Vec<_>>().join(", ")
}

/// Nobody else writes there until the end; who reads sees the table as it was.
pub fn lock(plan: &TablePlan) -> String {
    format!("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE", of(plan))
}

pub fn has_rows(plan: &TablePlan) -> String {
    format!("SELECT EXISTS (SELECT FROM {})", of(plan))
}

pub fn delete_all(plan: &TablePlan) -> String {
    format!("DELETE FROM {}", of(plan))
}

/// What has been applied, of the table that Django keeps; the same in SQLite.
pub fn migrations(schema: Option<&str>, name: &str) -> String {
    let name = schema.map_or_else(|| id(name), |schema| table(schema, name));
    format!("SELECT app, name FROM {name}")
}

pub fn copy(plan: &TablePlan) -> String {
    let columns = ids(plan.columns.iter().map(|column| &column.name));
    format!("COPY {} ({columns}) FROM STDIN", of(plan))
}

/// Rows, and of each column its checksum.
pub fn checksums(plan: &TablePlan) -> String {
    let sums = plan.columns.iter().map(|column| {
        let name = format!("it.{}", id(&column.name));
        let (form, is_there) = match column.kind.form() {
            Form::Text => (format!("{name}::pg_catalog.text"), String::new()),
            Form::Printed => (format!("pg_catalog.concat({name})"), format!(" FILTER (WHERE {name} IS NOT NULL)")),
            Form::Sent(function) => (format!("pg_catalog.encode(pg_catalog.{function}({name}), 'hex')"), String::new()),
        };
        format!(", coalesce(pg_catalog.sum(pg_catalog.hashtextextended({form} COLLATE pg_catalog.\"C\", 0)){is_there}, 0)::pg_catalog.text")
    });
    format!("SELECT pg_catalog.count(*){} FROM {} AS it", sums.collect::<String>(), of(plan))
}

/// Rows whose foreign key leads nowhere.
pub fn count_orphans(child: (&str, &str), parent: (&str, &str), key: &ForeignKey) -> String {
    let given = key.columns.iter().map(|name| format!("c.{} IS NOT NULL", id(name)));
    let same =
        key.columns.iter().zip(&key.parent_columns).map(|(here, there)| format!("p.{} = c.{}", id(there), id(here)));
    format!(
        "SELECT pg_catalog.count(*) FROM {} AS c WHERE {} AND NOT EXISTS (SELECT FROM {} AS p WHERE {})",
        table(child.0, child.1),
        given.collect::<Vec<_>>().join(" AND "),
        table(parent.0, parent.1),
        same.collect::<Vec<_>>().join(" AND ")
    )
}

/// `None`: it cannot be deferred, as it was.
pub fn set_deferrable(child: (&str, &str), key: &ForeignKey, is_deferrable: bool) -> String {
    let how = if is_deferrable { "DEFERRABLE INITIALLY DEFERRED" } else { "NOT DEFERRABLE" };
    format!("ALTER TABLE {} ALTER CONSTRAINT {} {how}", table(child.0, child.1), id(&key.name))
}

pub fn largest(plan: &TablePlan, column: &str) -> String {
    format!("SELECT pg_catalog.max({})::pg_catalog.int8 FROM {}", id(column), of(plan))
}

/// Takes part in the transaction, as `setval` would not.
pub fn restart_sequence(schema: &str, name: &str, with: i64) -> String {
    format!("ALTER SEQUENCE {} RESTART WITH {with}", table(schema, name))
}

/// The same for one whose last number is given out: it cannot be told to begin behind its end. RESTART gives it a new file in
/// this transaction, so that what is taken from it is rolled back, too.
pub fn exhaust_sequence(schema: &str, name: &str, last: i64) -> String {
    let taken = format!("SELECT pg_catalog.nextval({}::pg_catalog.regclass)", text(&table(schema, name)));
    format!("{}; {taken}", restart_sequence(schema, name, last))
}

/// Tables that are not filled ($2) and whose rows go, or lose what they say, with those of tables that are replaced ($1).
pub const FOLLOW: &str = "SELECT DISTINCT n.nspname::text, c.relname::text FROM pg_catalog.pg_constraint k \
     JOIN pg_catalog.pg_class c ON c.oid = k.conrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
     WHERE k.contype = 'f' AND k.confdeltype IN ('c', 'n', 'd') AND k.confrelid = ANY ($1::oid[]) \
       AND NOT k.conrelid = ANY ($2::oid[]) ORDER BY 1, 2";

pub fn has_rows_of(schema: &str, name: &str) -> String {
    format!("SELECT EXISTS (SELECT FROM {})", table(schema, name))
}

pub const MAY_WRITE: &str = "SET default_transaction_read_only = off";

pub fn analyze(schema: &str, name: &str) -> String {
    format!("ANALYZE {}", table(schema, name))
}
