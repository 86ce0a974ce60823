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

/// Refused where they differ.
pub async fn compare(site: &Site, job: &JobRow, hand: &Hand, source: &str, copy: &str) -> Result<Same, StepError> {
    let mut progress = Progress::of(job.id);
    let (source, copy) = (hand.connect(site, source).await?, hand.connect(site, copy).await?);
    let things = equal(&things(&source).await?, &things(&copy).await?)?;
    let names = tables(&source).await?;
    let (mut ours, mut theirs) = (sequences(&source).await?, sequences(&copy).await?);
    // Where there are other tables, the counts differ already, or a checksum finds no table.
    for (at, (schema, table)) in names.iter().enumerate() {
        progress.tell(site, || format!("compare: {at} of {} tables", names.len())).await;
        let statement = sql::checksum(schema, table);
        let (one, other) = tokio::try_join!(sum(&source, &statement), sum(&copy, &statement))?;
        let key = format!("{schema}.{table}");
        ours.insert(key.clone(), one);
        theirs.insert(key, other);
    }
    ours.insert("large objects".to_owned(), sum(&source, sql::LARGE_OBJECTS).await?);
    theirs.insert("large objects".to_owned(), sum(&copy, sql::LARGE_OBJECTS).await?);
    Ok(Same { tables: equal(&ours, &theirs)?, things })
}

fn equal(source: &Map<String, Value>, copy: &Map<String, Value>) -> Result<Map<String, Value>, StepError> {
    let names: BTreeSet<&String> = source.keys().chain(copy.keys()).collect();
    let mut wrong = names.into_iter().filter(|name| source.get(*name) != copy.get(*name)).map(String::as_str);
    let told: Vec<&str> = wrong.by_ref().take(TOLD).collect();
    if told.is_empty() {
        return Ok(source.clone());
    }
    let more = if wrong.next().is_some() { ", ..." } else { "" };
    Err(StepError::Refused(format!(
        "the archive differs from the database in {}{more}; nothing was dropped",
        told.join(", ")
    )))
}

async fn tables(client: &Client) -> Result<Vec<(String, String)>, StepError> {
    client.query(sql::TABLES, &[]).await?.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

async fn sum(client: &Client, statement: &str) -> Result<Value, StepError> {
    let row = client.query_one(statement, &[]).await?;
    let (rows, checksum): (i64, String) = (row.try_get(0)?, row.try_get(1)?);
    Ok(json!({ "rows": rows, "checksum": checksum }))
}

async fn sequences(client: &Client) -> Result<Map<String, Value>, StepError> {
    let one = |row: &Row| {
        let (schema, name, last): (String, String, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        Ok((format!("{schema}.{name}"), json!({ "last_value": last })))
    };
    client.query(sql::SEQUENCES, &[]).await?.iter().map(one).collect()
}

async fn things(client: &Client) -> Result<Map<String, Value>, StepError> {
    let one = |row: &Row| Ok((row.try_get::<_, String>(0)?, json!(row.try_get::<_, i64>(1)?)));
    client.query(sql::THINGS, &[]).await?.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named_and_no_more_than_ten() {
        let many = |n: i64| -> Map<String, Value> { (0..n).map(|i| (format!("t{i}"), json!(i))).collect() };
        assert!(equal(&many(3), &many(3)).is_ok());
        let one = equal(&many(3), &many(4)).unwrap_err().to_string();
        assert_eq!(one, "the archive differs from the database in t3; nothing was dropped");
        let all = equal(&many(0), &many(12)).unwrap_err().to_string();
        assert!(all.contains("t7, ...;") || all.contains(", ...; nothing"), "{all}");
    }
}
