//! What in a file would not fit, and where: every problem is counted, the first thousand are told with row and value.

use std::collections::BTreeMap;

use rusqlite::types::ValueRef;
use serde_json::{Value, json};

/// Rows that are told, over all problems.
const MOST_ROWS: usize = 1_000;
/// Different problems that are told apart.
const MOST_GROUPS: usize = 1_000;
/// Characters of a value, and of a row's name, that are told.
const MOST_CHARACTERS: usize = 80;
const MOST_BYTES: usize = 32;

/// What is the same of many rows.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct What {
    table: String,
    /// Empty: of the table.
    column: String,
    why: String,
}

#[derive(Debug, Default)]
struct Group {
    count: u64,
    rows: Vec<(String, String)>,
}

/// What was found so far.
#[derive(Debug, Default)]
pub struct Problems {
    total: u64,
    listed: usize,
    groups: BTreeMap<What, Group>,
}

impl Problems {
    /// Of one row: its name (`id=5`) and the value that is wrong.
    pub fn row(&mut self, table: &str, column: &str, why: &str, (row, value): (String, String)) {
        let may_list = self.listed < MOST_ROWS;
        let group = self.group(table, column, why);
        if may_list {
            group.rows.push((row, value));
            self.listed += 1;
        }
    }

    /// Of a table or a column as a whole.
    pub fn whole(&mut self, table: &str, column: &str, why: &str) {
        self.group(table, column, why);
    }

    /// Those of another part of the file.
    pub fn add(&mut self, others: Self) {
        for (what, group) in others.groups {
            let room = MOST_ROWS.saturating_sub(self.listed);
            let rows: Vec<_> = group.rows.into_iter().take(room).collect();
            self.listed += rows.len();
            self.total += group.count - 1;
            let mine = self.group(&what.table, &what.column, &what.why);
            mine.count += group.count - 1;
            mine.rows.extend(rows);
        }
    }

    fn group(&mut self, table: &str, column: &str, why: &str) -> &mut Group {
        self.total += 1;
        let mut what = What { table: table.to_owned(), column: column.to_owned(), why: why.to_owned() };
        if self.groups.len() >= MOST_GROUPS && !self.groups.contains_key(&what) {
            what = What { table: String::new(), column: String::new(), why: "further problems".to_owned() };
        }
        let group = self.groups.entry(what).or_default();
        group.count += 1;
        group
    }

    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// `count`, how many of them are `listed`, and `groups`.
    #[must_use]
    pub fn told(&self) -> Value {
        let groups = self.groups.iter().map(|(what, group)| {
            let rows = group.rows.iter().map(|(row, value)| json!({ "row": row, "value": value }));
            json!({
                "table": what.table, "column": what.column, "problem": what.why, "count": group.count,
                "rows": rows.collect::<Vec<_>>(),
            })
        });
        json!({ "count": self.total, "listed": self.listed, "groups": groups.collect::<Vec<_>>() })
    }
}

/// A value, short enough to be told.
#[must_use]
pub fn shown(value: ValueRef<'_>) -> String {
    match value {
        ValueRef::Null => "NULL".to_owned(),
        ValueRef::Integer(number) => number.to_string(),
        ValueRef::Real(number) => number.to_string(),
        ValueRef::Text(text) => {
            // Enough bytes for the characters that are told.
            let start = text.get(..MOST_CHARACTERS * 4).unwrap_or(text);
            let start = String::from_utf8_lossy(start);
            let mut told = String::new();
            for one in start.chars().take(MOST_CHARACTERS) {
                if one.is_control() {
                    told.extend(one.escape_debug());
                } else {
                    told.push(one);
                }
            }
            if text.len() > MOST_CHARACTERS * 4 || start.chars().count() > MOST_CHARACTERS {
                told.push('…');
            }
            format!("\"{told}\"")
        }
        ValueRef::Blob(bytes) => {
            let start = crate::catalog::disk::hex(bytes.get(..MOST_BYTES).unwrap_or(bytes));
            let more = if bytes.len() > MOST_BYTES { "…" } else { "" };
            format!("x'{start}{more}' ({} bytes)", bytes.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_counted_and_a_thousand_are_told() {
        let mut problems = Problems::default();
        for at in 0..2_500 {
            problems.row("t", if at % 2 == 0 { "a" } else { "b" }, "is wrong", (format!("id={at}"), "1".into()));
        }
        problems.whole("u", "", "is not there");
        let told = problems.told();
        assert_eq!((told["count"].as_u64(), told["listed"].as_u64()), (Some(2_501), Some(1_000)));
        let groups = told["groups"].as_array().unwrap();
        assert_eq!(groups.iter().map(|g| g["count"].as_u64().unwrap()).collect::<Vec<_>>(), [1_250, 1_250, 1]);
        assert_eq!(groups[0]["rows"][0], json!({ "row": "id=0", "value": "1" }));
    }

    #[test]
    fn those_of_two_parts_are_added_within_the_limit() {
        let part = |table: &str, rows: usize| {
            let mut part = Problems::default();
            (0..rows).for_each(|at| part.row(table, "a", "is wrong", (format!("id={at}"), String::new())));
            part
        };
        let mut problems = part("t", 700);
        problems.add(part("t", 200));
        problems.add(part("u", 300));
        let told = problems.told();
        assert_eq!((told["count"].as_u64(), told["listed"].as_u64()), (Some(1_200), Some(1_000)));
        let rows = |at: usize| told["groups"][at]["rows"].as_array().unwrap().len();
        assert_eq!((rows(0), rows(1), told["groups"][0]["count"].as_u64()), (900, 100, Some(900)));
    }

    #[test]
    fn different_problems_have_a_limit_too() {
        let mut problems = Problems::default();
        (0..MOST_GROUPS + 5).for_each(|at| problems.whole(&format!("t{at}"), "", "is not there"));
        let told = problems.told();
        let groups = told["groups"].as_array().unwrap();
        assert_eq!((groups.len(), groups[0]["count"].as_u64()), (MOST_GROUPS + 1, Some(5)));
    }

    #[test]
    fn values_are_short_whatever_they_are() {
        assert_eq!(shown(ValueRef::Text("a\0\"b".as_bytes())), "\"a\\0\"b\"");
        assert_eq!(shown(ValueRef::Text(b"\xff\xfe")), "\"\u{fffd}\u{fffd}\"");
        let long = "ä".repeat(10_000);
        assert_eq!(shown(ValueRef::Text(long.as_bytes())), format!("\"{}…\"", "ä".repeat(80)));
        assert!(shown(ValueRef::Blob(&[1; 100_000])).ends_with("01…' (100000 bytes)"));
        assert_eq!((shown(ValueRef::Null), shown(ValueRef::Real(1.5))), ("NULL".into(), "1.5".into()));
    }
}
