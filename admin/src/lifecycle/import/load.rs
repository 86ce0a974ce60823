//! Tables are locked, found empty (or emptied), and filled by COPY, one after the other.
//!
//! The text format of COPY: the text of a value is needed for the checksum anyway, PostgreSQL's own input functions look at each
//! value once more, and domains, enums and decimals need no encoding of their own.

use std::sync::Arc;

use futures_util::SinkExt as _;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_postgres::{
    Client, CopyInSink, Error,
    error::{DbError, SqlState},
};

use super::super::{
    Site, StepError,
    progress::{Progress, mib},
};
use super::{aside, in_time, verify};
use crate::{
    catalog::store::JobRow,
    import::{
        file::{Chunk, File, Hold, Refused, Sums},
        plan::{MIGRATIONS, Plan, TablePlan},
        problems::Problems,
    },
    sql::import as sql,
};

/// Chunks between the file and PostgreSQL.
const UNDER_WAY: usize = 4;
/// Rows of one table that PostgreSQL may refuse before the others are not looked for: each costs another pass.
const MOST_REFUSED: usize = 20;
/// Characters of what PostgreSQL says of a row.
const MOST_TOLD: usize = 500;
/// Numbers that are told, over all tables, which are not the same afterwards.
const MOST_LOSSES: usize = 1_000;
/// Migrations that are named.
const MOST_NAMED: usize = 20;

/// An import under way.
pub struct Load {
    pub client: Client,
    pub plan: Plan,
    pub sums: Vec<Sums>,
    /// Whoever reads it takes it along. (SQLite's connection is not for several threads at once.)
    file: Mutex<Option<File>>,
    hold: Hold,
    problems: Problems,
    /// Numbers that their columns do not hold as they are: by column, and the first of them.
    rounded: serde_json::Map<String, Value>,
    losses: Vec<Value>,
    /// The tables cannot take anything; what would not fit is told all the same.
    is_blocked: bool,
    rows: (u64, u64),
    bytes: u64,
}

/// One pass over a table: the rows that PostgreSQL refused so far stay out of it.
struct Pass {
    problems: Problems,
    /// The file cannot be read to its end.
    sums: Result<Sums, String>,
    sent: Result<(), Error>,
}

impl Load {
    pub fn new(client: Client, (file, hold): (File, Hold), plan: Plan, problems: Problems) -> Self {
        let rows = (0, plan.tables.iter().map(|table| table.rows).sum());
        Self {
            client,
            plan,
            sums: Vec::new(),
            file: Mutex::new(Some(file)),
            hold,
            problems,
            rounded: serde_json::Map::new(),
            losses: Vec::new(),
            is_blocked: false,
            rows,
            bytes: 0,
        }
    }

    /// Locks, looks whether there is room, makes room where that is meant.
    pub async fn prepare(&mut self, site: &Site) -> Result<(), StepError> {
        let mut tables: Vec<&TablePlan> = self.plan.tables.iter().collect();
        // All who lock several do so in one order.
        tables.sort_by(|one, other| (&one.schema, &one.name).cmp(&(&other.schema, &other.name)));
        for table in tables {
            self.client.batch_execute(&sql::lock(table)).await.map_err(|error| in_use(error, table))?;
        }
        let before = self.problems.total();
        self.look_for_room().await?;
        self.look_for_followers().await?;
        self.look_at_migrations(site).await?;
        self.is_blocked = self.problems.total() > before;
        for key in &self.plan.to_defer {
            let child = verify::name_of(&self.client, &self.plan, key.child).await?;
            self.client.batch_execute(&sql::set_deferrable((&child.0, &child.1), key, true)).await?;
        }
        self.client.batch_execute(sql::ALL_DEFERRED).await?;
        for table in self.plan.tables.iter().rev().filter(|table| table.is_replaced && !self.is_blocked) {
            self.client.batch_execute(&sql::delete_all(table)).await?;
        }
        Ok(())
    }

    async fn look_for_room(&mut self) -> Result<(), StepError> {
        for table in self.plan.tables.iter().filter(|table| !table.is_replaced) {
            if self.client.query_one(&sql::has_rows(table), &[]).await?.try_get(0)? {
                let why = "has rows in the tenant already: it must be empty, or be named as one to replace";
                self.problems.whole(&table.name, "", why);
            }
        }
        Ok(())
    }

    /// Nobody's rows may go, or change, because those that they refer to are replaced (ON DELETE CASCADE and the like).
    async fn look_for_followers(&mut self) -> Result<(), StepError> {
        let oids = |tables: &mut dyn Iterator<Item = &TablePlan>| tables.map(|table| table.oid).collect::<Vec<_>>();
        let replaced = oids(&mut self.plan.tables.iter().filter(|table| table.is_replaced));
        let filled = oids(&mut self.plan.tables.iter());
        for row in self.client.query(sql::FOLLOW, &[&replaced, &filled]).await? {
            let (schema, name): (String, String) = (row.try_get(0)?, row.try_get(1)?);
            if self.client.query_one(&sql::has_rows_of(&schema, &name), &[]).await?.try_get(0)? {
                let why = "is not in the file, and has rows that refer to a table whose rows are replaced, and would go or \
                     change with them (ON DELETE): empty it first";
                self.problems.whole(&name, "", why);
            }
        }
        Ok(())
    }

    /// The same migrations here and there: else the tables are not those of the file.
    async fn look_at_migrations(&mut self, site: &Site) -> Result<(), StepError> {
        let Some(table) = self.plan.tables.iter().find(|table| table.name == MIGRATIONS) else { return Ok(()) };
        let rows = self.client.query(&sql::migrations(Some(&table.schema), &table.name), &[]).await?;
        let there = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
        let there: std::collections::BTreeSet<(String, String)> = there.collect::<Result<_, StepError>>()?;
        let Some(file) = self.file.get_mut().take() else { return Ok(()) };
        let statement = sql::migrations(None, &table.name);
        let (file, here) = aside(move || {
            let here = file.migrations(&statement);
            (file, here)
        })
        .await?;
        *self.file.get_mut() = Some(file);
        self.in_time(site)?;
        let here = here.map_err(StepError::Refused)?;
        let name = table.name.clone();
        for ((app, migration), place) in here
            .difference(&there)
            .map(|one| (one, "was applied to the file, and not to the tenant: migrate the tenant"))
            .chain(
                there
                    .difference(&here)
                    .map(|one| (one, "was applied to the tenant, and not to the file: migrate the file")),
            )
            .take(MOST_NAMED)
        {
            self.problems.row(&name, "", place, (format!("{app}.{migration}"), String::new()));
        }
        Ok(())
    }

    /// All tables.
    pub async fn fill(&mut self, site: &Site, job: &JobRow) -> Result<(), StepError> {
        let tables: Vec<Arc<TablePlan>> = self.plan.tables.iter().cloned().map(Arc::new).collect();
        let mut progress = Progress::of(job.id);
        for table in tables {
            let sums = if table.rows == 0 || table.columns.is_empty() {
                Sums::of(&table)
            } else {
                site.plane.fuse.burn();
                self.table(site, &mut progress, &table).await?
            };
            self.sums.push(sums);
        }
        self.look_for_broken_keys().await?;
        self.in_time(site)
    }

    /// What SQLite was stopped in is no problem of the file's.
    fn in_time(&self, site: &Site) -> Result<(), StepError> {
        in_time(site, &self.hold)
    }

    /// Of a table that was read.
    fn note_losses(&mut self, table: &TablePlan, sums: &Sums) {
        for (column, (_, count)) in table.columns.iter().zip(&sums.columns).filter(|(_, (_, count))| *count > 0) {
            self.rounded.insert(format!("{}.{}", table.name, column.name), json!(count));
        }
        let room = MOST_LOSSES.saturating_sub(self.losses.len());
        self.losses.extend(sums.losses.iter().take(room).map(|loss| {
            json!({
                "column": format!("{}.{}", table.name, loss.column), "row": loss.row, "value": loss.value, "held": loss.held,
            })
        }));
    }

    /// Also where there are problems.
    pub fn tell_losses(&self, result: &mut Value) {
        if !self.rounded.is_empty() {
            result["rounded"] = Value::Object(self.rounded.clone());
            result["rounded_rows"] = json!(self.losses);
        }
    }

    async fn look_for_broken_keys(&mut self) -> Result<(), StepError> {
        // PostgreSQL has found none, and would have.
        if self.problems.total() == 0 {
            return Ok(());
        }
        let (Some(file), plan) = (self.file.get_mut().take(), std::mem::take(&mut self.plan)) else { return Ok(()) };
        let mut problems = std::mem::take(&mut self.problems);
        let (file, plan, problems) = aside(move || {
            file.look_for_broken_keys(&plan, &mut problems);
            (file, plan, problems)
        })
        .await?;
        *self.file.get_mut() = Some(file);
        (self.plan, self.problems) = (plan, problems);
        Ok(())
    }

    /// One table, as often as it takes to name what PostgreSQL refuses.
    async fn table(&mut self, site: &Site, progress: &mut Progress, table: &Arc<TablePlan>) -> Result<Sums, StepError> {
        let mut refused: Vec<Refused> = Vec::new();
        let (rows, bytes) = (self.rows.0, self.bytes);
        loop {
            (self.rows.0, self.bytes) = (rows, bytes);
            let pass = self.pass(site, progress, table, &refused).await?;
            self.in_time(site)?;
            let error = match (pass.sums, pass.sent) {
                (Err(why), _) => {
                    self.problems.add(pass.problems);
                    self.problems.whole(&table.name, "", &format!("cannot be read to its end: {why}"));
                    return self.back().await;
                }
                (Ok(sums), Ok(())) => {
                    self.problems.add(pass.problems);
                    self.note_losses(table, &sums);
                    return Ok(sums);
                }
                (Ok(_), Err(error)) => error,
            };
            let found = refusal(&error, &refused);
            let sums = self.back().await;
            match found {
                // It may pass, or the connection is gone.
                None => return Err(error.into()),
                Some(Ok(row)) if refused.len() < MOST_REFUSED => {
                    refused.push(row);
                    refused.sort_by_key(|row| row.at);
                    continue;
                }
                Some(Ok(_)) => {
                    let why =
                        format!("PostgreSQL refuses more than {MOST_REFUSED} rows; the others are not looked for");
                    self.problems.whole(&table.name, "", &why);
                }
                Some(Err(why)) => self.problems.whole(&table.name, "", &why),
            }
            // To its end, whatever PostgreSQL says.
            self.is_blocked = true;
            let pass = self.pass(site, progress, table, &refused).await?;
            self.in_time(site)?;
            self.problems.add(pass.problems);
            if let Ok(sums) = &pass.sums {
                self.note_losses(table, sums);
            }
            self.is_blocked = false;
            return sums;
        }
    }

    /// As it was before the table.
    async fn back(&self) -> Result<Sums, StepError> {
        if !self.is_blocked && !self.client.is_closed() {
            self.client.batch_execute(sql::BACK_TO_SAVEPOINT).await?;
        }
        Ok(Sums::default())
    }

    async fn pass(
        &mut self,
        site: &Site,
        progress: &mut Progress,
        table: &Arc<TablePlan>,
        refused: &[Refused],
    ) -> Result<Pass, StepError> {
        let Some(file) = self.file.get_mut().take() else {
            return Err(StepError::Away("the file is not open".to_owned()));
        };
        let mut sink = None;
        if !self.is_blocked {
            self.client.batch_execute(sql::SAVEPOINT).await?;
            sink = Some(Box::pin(self.client.copy_in::<_, bytes::Bytes>(&sql::copy(table)).await?));
        }
        let (to, mut from) = mpsc::channel(UNDER_WAY);
        let (of, skipped) = (Arc::clone(table), refused.to_vec());
        let reading = aside(move || {
            let mut problems = Problems::default();
            let sums = file.read(&of, &skipped, &mut problems, |chunk| to.blocking_send(chunk).is_ok());
            (file, problems, sums)
        });
        let sending = async {
            let mut sent = Ok(());
            while let Some(Chunk { lines, rows }) = from.recv().await {
                self.rows.0 += rows;
                self.bytes += u64::try_from(lines.len()).unwrap_or(0);
                if let (Some(sink), Ok(())) = (&mut sink, &sent) {
                    sent = sink.send(lines).await;
                }
                let (rows, bytes) = (self.rows, self.bytes);
                progress
                    .tell(site, || format!("{} of {} rows, {} MiB, {}", rows.0, rows.1, mib(bytes), table.name))
                    .await;
            }
            sent
        };
        let (read, mut sent) = tokio::join!(reading, sending);
        let (file, problems, sums) = read?;
        *self.file.get_mut() = Some(file);
        if let (Some(sink), Ok(_)) = (sink, &sums) {
            sent = match (end(sink).await, sent) {
                (Ok(()), sent) => sent,
                // PostgreSQL's reason, which the link's end only follows from.
                (error, _) => error,
            };
            if sent.is_ok() {
                self.client.batch_execute(sql::RELEASE_SAVEPOINT).await?;
            }
        }
        Ok(Pass { problems, sums, sent })
    }

    /// With problems the job goes no further; they are in its result.
    pub fn refuse_problems(&self, result: &mut Value) -> Result<(), StepError> {
        if self.problems.total() == 0 {
            return Ok(());
        }
        result["problems"] = self.problems.told();
        let tables = result["problems"]["groups"].as_array().map_or(0, |groups| {
            groups.iter().map(|group| group["table"].as_str()).collect::<std::collections::BTreeSet<_>>().len()
        });
        Err(StepError::Refused(format!(
            "{} in {}; nothing was changed; the job's result names them",
            counted(self.problems.total(), "problem"),
            counted(u64::try_from(tables).unwrap_or(0), "table")
        )))
    }

    /// Foreign keys that PostgreSQL found to lead nowhere, with the rows as the file has them.
    pub async fn refuse_orphans(
        &mut self,
        broken: Vec<(String, String)>,
        result: &mut Value,
    ) -> Result<StepError, StepError> {
        for (table, why) in broken {
            self.problems.whole(&table, "", &why);
        }
        self.look_for_broken_keys().await?;
        Ok(self
            .refuse_problems(result)
            .err()
            .unwrap_or_else(|| StepError::Refused("a foreign key leads nowhere".to_owned())))
    }

    /// One more, and then no further.
    pub fn refuse(&mut self, table: &str, why: &str, result: &mut Value) -> StepError {
        self.problems.whole(table, "", why);
        self.refuse_problems(result).err().unwrap_or_else(|| StepError::Refused(why.to_owned()))
    }

    /// What is told of it in the end.
    pub fn tell(&self, result: &mut Value) {
        result["rows"] = json!(self.rows.0);
        result["bytes"] = json!(self.bytes);
        result["filled"] = json!(self.plan.tables.iter().map(|t| (&t.schema, &t.name)).collect::<Vec<_>>());
    }
}

fn counted(count: u64, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

async fn end(mut sink: std::pin::Pin<Box<CopyInSink<bytes::Bytes>>>) -> Result<(), Error> {
    sink.as_mut().finish().await.map(drop)
}

fn in_use(error: Error, table: &TablePlan) -> StepError {
    let code = error.code().cloned();
    if matches!(code, Some(SqlState::LOCK_NOT_AVAILABLE | SqlState::T_R_DEADLOCK_DETECTED)) {
        return StepError::InUse(format!(
            "somebody is at work in {}: end what is open there, or drain the tenant first",
            table.name
        ));
    }
    error.into()
}

/// The row that an error of COPY is about, or, without one, what it says; `None`: the error is none of the rows.
fn refusal(error: &Error, before: &[Refused]) -> Option<Result<Refused, String>> {
    let told = error.as_db_error()?;
    let code = told.code().code();
    if matches!(code.get(..2), Some("08" | "40" | "53" | "57" | "58")) || *told.code() == SqlState::LOCK_NOT_AVAILABLE {
        return None;
    }
    let Some(line) = told.where_().and_then(line_of) else { return Some(Err(in_words(told))) };
    // Those that stayed out have no line.
    let at = before.iter().fold(line, |at, row| if row.at <= at { at + 1 } else { at });
    Some(Ok(Refused { at, why: short(told.message()), detail: key_of(told) }))
}

/// What PostgreSQL says, for the job's result.
pub fn in_words(told: &DbError) -> String {
    let (message, key) = (short(told.message()), key_of(told));
    if key.is_empty() { message } else { format!("{message}: {key}") }
}

/// The key that is there twice, or leads nowhere. Every other detail may be a whole row, of which the row's name is enough.
fn key_of(told: &DbError) -> String {
    let is_of_key = matches!(
        *told.code(),
        SqlState::UNIQUE_VIOLATION | SqlState::FOREIGN_KEY_VIOLATION | SqlState::EXCLUSION_VIOLATION
    );
    told.detail().filter(|_| is_of_key).map_or_else(String::new, short)
}

fn short(text: &str) -> String {
    text.chars().take(MOST_TOLD).collect()
}

/// Of "COPY shop_order, line 17, column total: ...".
fn line_of(context: &str) -> Option<u64> {
    let line = context.lines().find(|line| line.starts_with("COPY "))?;
    let rest = line.rsplit_once(", line ")?.1;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_copy_is_found_in_its_context() {
        assert_eq!(line_of("COPY shop_order, line 17, column total: \"x\""), Some(17));
        assert_eq!(line_of("PL/pgSQL function f() line 3 at RAISE\nCOPY t, line 2: \"a\tb\""), Some(2));
        assert_eq!(line_of("COPY t, line 9"), Some(9));
        assert_eq!(line_of("PL/pgSQL function f() line 3 at RAISE"), None);
    }
}
