//! What is asked of an SQLite file. Names of the file go through `id`.

use super::super::import::plan::{ForeignKey, TablePlan};

/// In SQLite a name is quoted as in PostgreSQL.
fn id(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn ids<'a>(names: impl IntoIterator<Item = &'a String>) -> String {
    names.into_iter().map(|name| id(name)).collect::<Vec<_>>().join(", ")
}

/// Nothing of the file's own text runs with rights, and nothing is believed of its pages.
pub const GUARDED: &str = "PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON; PRAGMA mmap_size = 0; PRAGMA query_only = ON; PRAGMA cache_size = -16384";
/// The first complaints, or `ok`.
pub const CHECK: &str = "PRAGMA quick_check(5)";
/// Name, whether it is virtual, whether it has no rowid. Tables that belong to a virtual one, and SQLite's own, are left out.
pub const TABLES: &str = "SELECT name, type = 'virtual', wr FROM pragma_table_list \
     WHERE schema = 'main' AND type IN ('table', 'virtual') AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name";
/// Name, whether SQLite computes it, place in the primary key (from 1).
pub const COLUMNS: &str =
    "SELECT name, hidden IN (2, 3), pk FROM pragma_table_xinfo(?1) WHERE hidden <> 1 ORDER BY cid";
pub const HAS_NUMBERS: &str = "SELECT count(*) FROM sqlite_master WHERE name = 'sqlite_sequence'";
pub const LAST_NUMBER: &str = "SELECT max(seq) FROM sqlite_sequence WHERE name = ?1";
/// A snapshot that lasts.
pub const SNAPSHOT: &str = "BEGIN; SELECT count(*) FROM sqlite_master";
/// So that it is one file, without a log beside it.
pub const ONE_FILE: &str = "PRAGMA journal_mode = DELETE";

pub fn count(table: &str) -> String {
    format!("SELECT count(*) FROM {}", id(table))
}

pub fn is_used(table: &str, column: &str) -> String {
    format!("SELECT EXISTS (SELECT 1 FROM {} WHERE {} IS NOT NULL)", id(table), id(column))
}

/// What tells a row, and how many columns that are: the primary key, or the rowid under a name that no column has.
fn key(table: &TablePlan) -> (String, usize) {
    if !table.key.is_empty() {
        return (ids(&table.key), table.key.len());
    }
    let is_free = |name: &&&str| !table.source_columns.iter().any(|column| column.eq_ignore_ascii_case(name));
    match ["rowid", "_rowid_", "oid"].iter().find(is_free) {
        Some(name) => ((*name).to_owned(), 1),
        None => ("NULL".to_owned(), 1),
    }
}

/// All rows: first what tells them, in so many columns, then what is imported.
pub fn rows(table: &TablePlan) -> (String, usize) {
    let (key, count) = key(table);
    let columns = ids(table.columns.iter().map(|column| &column.name));
    let comma = if columns.is_empty() { "" } else { ", " };
    (format!("SELECT {key}{comma}{columns} FROM {}", id(&table.name)), count)
}

/// Rows that have in these columns what another row has, too: what tells them, then the columns.
pub fn twice(table: &TablePlan, columns: &[String]) -> (String, usize) {
    let (key, count) = key(table);
    let (columns, name) = (ids(columns), id(&table.name));
    let statement = format!(
        "SELECT {key}, {columns} FROM {name} WHERE ({columns}) IN (SELECT {columns} FROM {name} GROUP BY {columns} HAVING count(*) > 1) \
         ORDER BY {columns}"
    );
    (statement, count)
}

/// Rows whose foreign key leads nowhere: what tells them, then the key's columns.
pub fn orphans(child: &TablePlan, parent: &str, of: &ForeignKey) -> (String, usize) {
    let (key, count) = key(child);
    let (columns, parent_columns) = (ids(&of.columns), ids(&of.parent_columns));
    let are_there = |columns: &[String]| {
        columns.iter().map(|name| format!("{} IS NOT NULL", id(name))).collect::<Vec<_>>().join(" AND ")
    };
    let statement = format!(
        "SELECT {key}, {columns} FROM {} WHERE {} AND ({columns}) NOT IN (SELECT {parent_columns} FROM {} WHERE {})",
        id(&child.name),
        are_there(&of.columns),
        id(parent),
        are_there(&of.parent_columns)
    );
    (statement, count)
}
