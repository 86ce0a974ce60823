//! Whether two databases hold the same: rows and checksums of every table, sequences, large objects, and how many there
//! are of everything else.
//!
//! What always holds: a hand looks, as the tenant's owner; a row becomes text through output functions alone, which only a
//! superuser can have made.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};
use tokio_postgres::{Client, Row};

use super::{Site, StepError, hand::Hand, progress::Progress};
use crate::{catalog::store::JobRow, sql};

/// Differences that are told, at most.
const TOLD: usize = 10;

/// What both hold: tables and sequences by name, and counts by kind.
pub struct Same {
    pub tables: Map<String, Value>,
    pub things: Map<String, Value>,
}

/// How much is compared: the smallest tables, of together so many bytes, in full; those that come next, of so many more, by
/// their rows; the others not at all.
#[derive(Debug, Clone, Copy)]
pub struct Depth {
    pub full: u64,
    pub rows: u64,
}

impl Depth {
    pub const ALL: Self = Self { full: u64::MAX, rows: u64::MAX };
}

/// What is compared, and what is said where it differs.
pub struct Words {
    copy: &'static str,
    consequence: &'static str,
    depth: Depth,
    /// Kinds of things that need not be the same in number.
    left_out: &'static [&'static str],
}

impl Words {
    const ARCHIVE: Self =
        Self { copy: "archive", consequence: "nothing was dropped", depth: Depth::ALL, left_out: &[] };

    /// Between servers. Not all versions of PostgreSQL count the same constraints.
    pub fn of_move(depth: Depth, is_same_version: bool) -> Self {
        let left_out: &[_] = if is_same_version {
            &["publications", "subscriptions"]
        } else {
            &["publications", "subscriptions", "constraints", "types", "functions"]
        };
        Self { copy: "copy", consequence: "the tenant stays where it is", depth, left_out }
    }
}

/// Refused where they differ.
pub async fn compare(site: &Site, job: &JobRow, hand: &Hand, source: &str, copy: &str) -> Result<Same, StepError> {
    let (source, copy) = (hand.connect(site, source).await?, hand.connect(site, copy).await?);
    between(site, job, &source, &copy, &Words::ARCHIVE).await
}

/// The same of two sessions, each as the tenant's owner.
pub async fn between(
    site: &Site,
    job: &JobRow,
    source: &Client,
    copy: &Client,
    words: &Words,
) -> Result<Same, StepError> {
    let mut progress = Progress::of(job.id);
    let (one, other) = tokio::try_join!(things(source, words), things(copy, words))?;
    let things = equal(&one, &other, words)?;
    let names = tables(source).await?;
    let (mut ours, mut theirs) = tokio::try_join!(sequences(source), sequences(copy))?;
    let mut seen = 0u64;
    // Where there are other tables, the counts differ already, or a checksum finds no table.
    for (at, (schema, table, bytes)) in names.iter().enumerate() {
        progress.tell(site, || format!("compare: {at} of {} tables", names.len())).await;
        seen = seen.saturating_add(*bytes);
        let statement = if seen <= words.depth.full {
            sql::checksum(schema, table)
        } else if seen <= words.depth.full.saturating_add(words.depth.rows) {
            sql::moves::count(schema, table)
        } else {
            continue;
        };
        let (one, other) = tokio::try_join!(sum(source, &statement), sum(copy, &statement))?;
        let key = format!("{schema}.{table}");
        ours.insert(key.clone(), one);
        theirs.insert(key, other);
    }
    let (one, other) = tokio::try_join!(sum(source, sql::LARGE_OBJECTS), sum(copy, sql::LARGE_OBJECTS))?;
    ours.insert("large objects".to_owned(), one);
    theirs.insert("large objects".to_owned(), other);
    Ok(Same { tables: equal(&ours, &theirs, words)?, things })
}

fn equal(
    source: &Map<String, Value>,
    copy: &Map<String, Value>,
    words: &Words,
) -> Result<Map<String, Value>, StepError> {
    let names: BTreeSet<&String> = source.keys().chain(copy.keys()).collect();
    let mut wrong = names.into_iter().filter(|name| source.get(*name) != copy.get(*name)).map(String::as_str);
    let told: Vec<&str> = wrong.by_ref().take(TOLD).collect();
    if told.is_empty() {
        return Ok(source.clone());
    }
    let more = if wrong.next().is_some() { ", ..." } else { "" };
    Err(StepError::Refused(format!(
        "the {} differs from the database in {}{more}; {}",
        words.copy,
        told.join(", "),
        words.consequence
    )))
}

/// With their size, the smallest first.
async fn tables(client: &Client) -> Result<Vec<(String, String, u64)>, StepError> {
    let one = |row: &Row| {
        let bytes = u64::try_from(row.try_get::<_, i64>(2)?).unwrap_or(0);
        Ok((row.try_get(0)?, row.try_get(1)?, bytes))
    };
    client.query(sql::moves::SIZES, &[]).await?.iter().map(one).collect()
}

async fn sum(client: &Client, statement: &str) -> Result<Value, StepError> {
    let row = client.query_one(statement, &[]).await?;
    let (rows, checksum): (i64, String) = (row.try_get(0)?, row.try_get(1)?);
    Ok(if checksum.is_empty() { json!({ "rows": rows }) } else { json!({ "rows": rows, "checksum": checksum }) })
}

async fn sequences(client: &Client) -> Result<Map<String, Value>, StepError> {
    let one = |row: &Row| {
        let (schema, name, last): (String, String, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        Ok((format!("{schema}.{name}"), json!({ "last_value": last })))
    };
    client.query(sql::SEQUENCES, &[]).await?.iter().map(one).collect()
}

async fn things(client: &Client, words: &Words) -> Result<Map<String, Value>, StepError> {
    let one = |row: &Row| Ok((row.try_get::<_, String>(0)?, json!(row.try_get::<_, i64>(1)?)));
    let mut things: Map<String, Value> =
        client.query(sql::THINGS, &[]).await?.iter().map(one).collect::<Result<_, StepError>>()?;
    things.retain(|kind, _| !words.left_out.contains(&kind.as_str()));
    Ok(things)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named_and_no_more_than_ten() {
        let many = |n: i64| -> Map<String, Value> { (0..n).map(|i| (format!("t{i}"), json!(i))).collect() };
        assert!(equal(&many(3), &many(3), &Words::ARCHIVE).is_ok());
        let one = equal(&many(3), &many(4), &Words::ARCHIVE).unwrap_err().to_string();
        assert_eq!(one, "the archive differs from the database in t3; nothing was dropped");
        let all = equal(&many(0), &many(12), &Words::ARCHIVE).unwrap_err().to_string();
        assert!(all.contains("t7, ...;") || all.contains(", ...; nothing"), "{all}");
    }
}
