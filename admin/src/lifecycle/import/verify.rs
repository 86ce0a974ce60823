//! Before the commit: what is in the tables is what is in the file.
//!
//! The checksum of a column is the sum, over its rows, of `hashtextextended` of one canonical form of the value: the text as it
//! is; for numbers, moments and the like what the type's output function prints under settings of ours; for floating-point
//! numbers, durations and addresses the bytes that the type sends, in hexadecimal. The file's side is computed here, from the
//! value that was read; the other one by PostgreSQL, from the row that is stored.

use serde_json::{Value, json};
use tokio_postgres::{Client, Row};

use super::super::StepError;
use super::load::{Load, in_words};
use crate::{
    import::{
        file::Sums,
        plan::{Plan, TablePlan},
    },
    sql::import as sql,
};

/// Schema and name of a table, whether it is filled or not.
pub async fn name_of(client: &Client, plan: &Plan, oid: u32) -> Result<(String, String), StepError> {
    if let Some(table) = plan.tables.iter().find(|table| table.oid == oid) {
        return Ok((table.schema.clone(), table.name.clone()));
    }
    let row = client.query_one(sql::NAME_OF, &[&oid]).await?;
    Ok((row.try_get(0)?, row.try_get(1)?))
}

impl Load {
    /// Every foreign key leads somewhere, and whatever else was deferred holds.
    pub async fn check_keys(&mut self, result: &mut Value) -> Result<(), StepError> {
        let mut broken = Vec::new();
        for key in &self.plan.keys {
            let child = name_of(&self.client, &self.plan, key.child).await?;
            let parent = name_of(&self.client, &self.plan, key.parent).await?;
            let statement = sql::count_orphans((&child.0, &child.1), (&parent.0, &parent.1), key);
            let count: i64 = self.client.query_one(&statement, &[]).await?.try_get(0)?;
            if count > 0 {
                let columns = key.columns.join(", ");
                broken.push((
                    child.1,
                    format!("{count} rows whose {columns} leads nowhere: no row of {} has it", parent.1),
                ));
            }
        }
        if !broken.is_empty() {
            return Err(self.refuse_orphans(broken, result).await?);
        }
        if let Err(error) = self.client.batch_execute(sql::ALL_IMMEDIATE).await {
            let Some(told) = error.as_db_error() else { return Err(error.into()) };
            let why = in_words(told);
            let table = told.table().unwrap_or_default().to_owned();
            return Err(self.refuse(&table, &why, result));
        }
        for key in &self.plan.to_defer {
            let child = name_of(&self.client, &self.plan, key.child).await?;
            self.client.batch_execute(&sql::set_deferrable((&child.0, &child.1), key, false)).await?;
        }
        result["foreign_keys"] = json!(self.plan.keys.len());
        Ok(())
    }

    /// Counts and checksums.
    pub async fn verify(&mut self, result: &mut Value) -> Result<(), StepError> {
        let mut tables = serde_json::Map::new();
        for (table, sums) in self.plan.tables.iter().zip(&self.sums) {
            let row = self.client.query_one(&sql::checksums(table), &[]).await?;
            let told = same(table, sums, &row)?;
            tables.insert(format!("{}.{}", table.schema, table.name), told);
        }
        result["tables"] = Value::Object(tables);
        self.tell(result);
        Ok(())
    }

    /// Sequences go on behind what is there.
    pub async fn finish(&mut self, result: &mut Value) -> Result<(), StepError> {
        let mut set = 0;
        for table in &self.plan.tables {
            for row in self.client.query(sql::SEQUENCES_OF, &[&table.oid]).await? {
                set += u32::from(self.sequence(table, &row).await?);
            }
        }
        result["sequences"] = json!(set);
        Ok(())
    }

    async fn sequence(&self, table: &TablePlan, row: &Row) -> Result<bool, StepError> {
        let (column, schema, name): (String, String, String) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let (step, most, stands): (i64, i64, Option<i64>) = (row.try_get(3)?, row.try_get(4)?, row.try_get(5)?);
        let largest: Option<i64> = self.client.query_one(&sql::largest(table, &column), &[]).await?.try_get(0)?;
        let Some(last) = largest.max(table.last_number).max(stands).filter(|last| *last > 0) else { return Ok(false) };
        let statement = match last.checked_add(step).filter(|next| *next <= most) {
            Some(next) => sql::restart_sequence(&schema, &name, next),
            None => sql::exhaust_sequence(&schema, &name, most),
        };
        self.client.batch_execute(&statement).await?;
        Ok(true)
    }
}

/// What both sides have; else what differs.
fn same(table: &TablePlan, sums: &Sums, row: &Row) -> Result<Value, StepError> {
    let rows: i64 = row.try_get(0)?;
    let mut wrong = Vec::new();
    if u64::try_from(rows) != Ok(sums.rows) {
        wrong.push(format!("{rows} rows where the file has {}", sums.rows));
    }
    let mut columns = serde_json::Map::new();
    for (at, (column, (sum, _))) in table.columns.iter().zip(&sums.columns).enumerate() {
        let there: String = row.try_get(at + 1)?;
        if there != sum.to_string() {
            wrong.push(column.name.clone());
        }
        columns.insert(column.name.clone(), json!(there));
    }
    if wrong.is_empty() {
        return Ok(json!({ "rows": rows, "checksums": columns }));
    }
    let why = if table.has_triggers { "; it has triggers, which may change rows" } else { "" };
    let what = wrong.join(", ");
    Err(StepError::Refused(format!("{} differs from the file in {what}{why}; nothing was changed", table.name)))
}
