//! Which table and column of the file goes where, in which order; and what has no place. Pure.
//!
//! What always holds: names are the same to the letter; a table that is filled was empty, or is one of those that are
//! replaced; parents come before children wherever foreign keys allow it.

use std::collections::{BTreeMap, BTreeSet};

use super::{Kind, problems::Problems};

/// What `migrate` itself fills: replaced by what the file has, so that what refers to it by number stays right.
pub const OF_DJANGO: [&str; 4] = ["django_migrations", "django_content_type", "auth_permission", "django_site"];
/// The table that says which migrations were applied.
pub const MIGRATIONS: &str = "django_migrations";

/// A table of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SourceTable {
    pub name: String,
    pub columns: Vec<SourceColumn>,
    /// Columns of its primary key, in order.
    pub key: Vec<String>,
    /// Has no rowid.
    pub without_rowid: bool,
    pub is_virtual: bool,
    pub rows: u64,
    /// The last number that AUTOINCREMENT gave.
    pub last_number: Option<i64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SourceColumn {
    pub name: String,
    /// Computed by SQLite.
    pub is_generated: bool,
    /// Some row has a value there.
    pub is_used: bool,
}

/// What is there in the tenant's database.
#[derive(Debug, Clone, Default)]
pub struct Target {
    pub tables: Vec<TargetTable>,
    pub keys: Vec<ForeignKey>,
}

#[derive(Debug, Clone, Default)]
pub struct TargetTable {
    pub oid: u32,
    pub schema: String,
    pub name: String,
    pub columns: Vec<TargetColumn>,
    /// Columns of unique indexes over whole columns and all rows.
    pub uniques: Vec<Vec<String>>,
    pub has_triggers: bool,
}

#[derive(Debug, Clone)]
pub struct TargetColumn {
    pub name: String,
    pub kind: Kind,
    pub is_required: bool,
    /// Something is put there by itself.
    pub has_default: bool,
    pub is_generated: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignKey {
    pub name: String,
    pub child: u32,
    pub parent: u32,
    pub columns: Vec<String>,
    pub parent_columns: Vec<String>,
    pub is_deferrable: bool,
}

/// A table that is filled.
#[derive(Debug, Clone)]
pub struct TablePlan {
    pub oid: u32,
    pub schema: String,
    pub name: String,
    pub columns: Vec<ColumnPlan>,
    /// Columns that tell a row by name; none: its rowid does.
    pub key: Vec<String>,
    /// All columns of the file's table, to find a name for the rowid.
    pub source_columns: Vec<String>,
    pub uniques: Vec<Vec<String>>,
    pub rows: u64,
    pub last_number: Option<i64>,
    /// What is there is deleted first.
    pub is_replaced: bool,
    pub has_triggers: bool,
}

#[derive(Debug, Clone)]
pub struct ColumnPlan {
    pub name: String,
    pub kind: Kind,
    pub is_required: bool,
}

/// All of it, in order.
#[derive(Debug, Default)]
pub struct Plan {
    pub tables: Vec<TablePlan>,
    /// Foreign keys that must be deferrable meanwhile: their child comes first.
    pub to_defer: Vec<ForeignKey>,
    /// Foreign keys between tables of which one at least is filled.
    pub keys: Vec<ForeignKey>,
}

/// Finds each table its place.
pub fn plan(source: &[SourceTable], target: &Target, replaced: &BTreeSet<String>, problems: &mut Problems) -> Plan {
    let mut tables = Vec::new();
    for table in source {
        match target.tables.iter().find(|there| there.name == table.name) {
            Some(there) if !table.is_virtual => tables.push(table_plan(table, there, replaced, problems)),
            Some(_) => problems.whole(&table.name, "", "is a virtual table in the file, which cannot be imported"),
            None if table.rows == 0 => {}
            None => {
                let other = target.tables.iter().find(|there| there.name.eq_ignore_ascii_case(&table.name));
                problems.whole(&table.name, "", &without_place("table", other.map(|other| other.name.as_str())));
            }
        }
    }
    let (order, to_defer) = in_order(&tables, &target.keys);
    let mut by_oid: BTreeMap<u32, TablePlan> = tables.into_iter().map(|table| (table.oid, table)).collect();
    let concerns = |key: &ForeignKey| order.contains(&key.child) || order.contains(&key.parent);
    let keys = target.keys.iter().filter(|key| concerns(key)).cloned().collect();
    let tables = order.iter().filter_map(|oid| by_oid.remove(oid)).collect();
    Plan { tables, to_defer, keys }
}

fn without_place(what: &str, other: Option<&str>) -> String {
    match other {
        Some(other) => format!("has no {what} of that name to go to; there is {other}, and case counts"),
        None => format!("has no {what} of that name to go to"),
    }
}

fn table_plan(
    table: &SourceTable,
    there: &TargetTable,
    replaced: &BTreeSet<String>,
    problems: &mut Problems,
) -> TablePlan {
    let mut columns = Vec::new();
    for column in &table.columns {
        match there.columns.iter().find(|there| there.name == column.name) {
            Some(to) if to.is_generated => {}
            Some(to) => {
                columns.push(ColumnPlan { name: to.name.clone(), kind: to.kind.clone(), is_required: to.is_required })
            }
            None if column.is_generated || !column.is_used => {}
            None => {
                let other = there.columns.iter().find(|there| there.name.eq_ignore_ascii_case(&column.name));
                let why = without_place("column", other.map(|other| other.name.as_str()));
                problems.whole(&table.name, &column.name, &why);
            }
        }
    }
    for column in &there.columns {
        let is_given =
            columns.iter().any(|given| given.name == column.name) || column.has_default || column.is_generated;
        if table.rows > 0 && column.is_required && !is_given {
            problems.whole(
                &table.name,
                &column.name,
                "is not in the file, and the column is NOT NULL without a default",
            );
        }
    }
    if table.rows > 0 && columns.is_empty() {
        problems.whole(&table.name, "", "has no column that is there, too");
    }
    TablePlan {
        oid: there.oid,
        schema: there.schema.clone(),
        name: there.name.clone(),
        columns,
        key: table.key.clone(),
        source_columns: table.columns.iter().map(|column| column.name.clone()).collect(),
        uniques: there.uniques.clone(),
        rows: table.rows,
        last_number: table.last_number,
        is_replaced: replaced.contains(&there.name),
        has_triggers: there.has_triggers,
    }
}

/// Parents first; where tables refer to each other in a circle, by name, and those keys are told that then come too early.
/// (A table that refers to itself needs nothing: a foreign key is looked at when COPY has ended.)
fn in_order(tables: &[TablePlan], keys: &[ForeignKey]) -> (Vec<u32>, Vec<ForeignKey>) {
    let mut left: BTreeMap<&str, u32> = tables.iter().map(|table| (table.name.as_str(), table.oid)).collect();
    let mut order: Vec<u32> = Vec::new();
    while !left.is_empty() {
        let waits = |oid: u32| {
            let parents = keys.iter().filter(|key| key.child == oid && key.parent != oid);
            parents.into_iter().any(|key| left.values().any(|other| *other == key.parent))
        };
        let free = left.iter().find(|(_, oid)| !waits(**oid)).map(|(name, _)| *name);
        let Some(name) = free.or_else(|| of_circle(&left, keys)) else { break };
        let Some(oid) = left.remove(name) else { break };
        order.push(oid);
    }
    let place = |oid: u32| order.iter().position(|one| *one == oid);
    let comes_first = |key: &&ForeignKey| match (place(key.child), place(key.parent)) {
        (Some(child), Some(parent)) => child < parent,
        _ => false,
    };
    let to_defer = keys.iter().filter(|key| !key.is_deferrable).filter(comes_first).cloned().collect();
    (order, to_defer)
}

/// One of those that refer to each other in a circle: whoever goes from parent to parent comes back to it.
fn of_circle<'a>(left: &BTreeMap<&'a str, u32>, keys: &[ForeignKey]) -> Option<&'a str> {
    let mut seen = BTreeSet::new();
    let mut at = *left.values().next()?;
    while seen.insert(at) {
        let mut parents = keys.iter().filter(|key| key.child == at && key.parent != at).map(|key| key.parent);
        at = parents.find(|parent| left.values().any(|other| other == parent))?;
    }
    left.iter().find(|(_, oid)| **oid == at).map(|(name, _)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str) -> TargetColumn {
        TargetColumn { name: name.into(), kind: Kind::Int4, is_required: true, has_default: false, is_generated: false }
    }

    fn there(oid: u32, name: &str, columns: &[&str]) -> TargetTable {
        let columns = columns.iter().map(|name| column(name)).collect();
        TargetTable { oid, schema: "public".into(), name: name.into(), columns, ..TargetTable::default() }
    }

    fn here(name: &str, columns: &[&str], rows: u64) -> SourceTable {
        let column = |name: &&str| SourceColumn { name: (*name).into(), is_generated: false, is_used: rows > 0 };
        SourceTable { name: name.into(), columns: columns.iter().map(column).collect(), rows, ..SourceTable::default() }
    }

    fn key(child: u32, parent: u32, is_deferrable: bool) -> ForeignKey {
        let (columns, parent_columns) = (vec!["a".to_owned()], vec!["id".to_owned()]);
        ForeignKey { name: format!("{child}-{parent}"), child, parent, columns, parent_columns, is_deferrable }
    }

    fn found(source: &[SourceTable], target: &Target) -> (Plan, Vec<String>) {
        let mut problems = Problems::default();
        let plan = plan(source, target, &BTreeSet::new(), &mut problems);
        let told = problems.told();
        let line = |group: &serde_json::Value| {
            let word = |key: &str| group[key].as_str().unwrap_or_default().to_owned();
            format!("{}.{} {}", word("table"), word("column"), word("problem"))
        };
        (plan, told["groups"].as_array().unwrap().iter().map(line).collect())
    }

    #[test]
    fn what_has_no_place_is_named_unless_it_is_empty() {
        let mut target = Target { tables: vec![there(1, "t", &["id", "x", "must"])], keys: vec![] };
        target.tables[0].columns[1].is_generated = true;
        let source = [
            here("t", &["id", "x", "extra", "Must"], 3),
            here("u", &["id"], 1),
            here("v", &["id"], 0),
            here("T", &["id"], 1),
        ];
        let (plan, problems) = found(&source, &target);
        assert_eq!(
            problems,
            [
                "T. has no table of that name to go to; there is t, and case counts",
                "t.Must has no column of that name to go to; there is must, and case counts",
                "t.extra has no column of that name to go to",
                "t.must is not in the file, and the column is NOT NULL without a default",
                "u. has no table of that name to go to",
            ]
        );
        let names: Vec<_> = plan.tables[0].columns.iter().map(|column| column.name.as_str()).collect();
        assert_eq!(names, ["id"], "what PostgreSQL computes is left to it");
        let (_, problems) = found(&[here("t", &["id", "x", "extra"], 0)], &target);
        assert!(problems.is_empty(), "{problems:?}");
    }

    #[test]
    fn parents_come_first_and_circles_are_told() {
        let names = ["a", "b", "c", "d"];
        let tables = names.iter().zip(1..).map(|(name, oid)| there(oid, name, &["id"])).collect();
        // a needs b needs c; c needs itself; d and b need each other.
        let keys = vec![key(1, 2, false), key(2, 3, false), key(3, 3, false), key(2, 4, false), key(4, 2, false)];
        let source: Vec<_> = names.iter().map(|name| here(name, &["id"], 1)).collect();
        let (plan, _) = found(&source, &Target { tables, keys });
        let order: Vec<_> = plan.tables.iter().map(|table| table.name.as_str()).collect();
        assert_eq!(order, ["c", "b", "a", "d"]);
        let deferred: Vec<_> = plan.to_defer.iter().map(|key| key.name.as_str()).collect();
        assert_eq!(deferred, ["2-4"]);
    }
}
