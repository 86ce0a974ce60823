//! The files of a rollout, applied in a tenant's database, and what clients have prepared dropped afterwards.
//!
//! What always holds: everything runs as a hand that has become the tenant's owner; what may not be applied is refused
//! before anything runs; a file and its row in the version table are one transaction; no lock is waited for longer than
//! `lock_timeout`, since whoever waits for one holds up all who come after it.
//!
//! A file that is not transactional is done statement by statement, and the version table counts them. A crash between a
//! statement and its count does that one statement again. Where it was CREATE INDEX CONCURRENTLY, an index is left that
//! PostgreSQL calls invalid; it is looked for and named before such a file goes on, and after each statement. Indexes that were
//! invalid before the file was first begun (the version table keeps which) are not the file's, and not looked at.
//!
//! PostgreSQL's message of a file that failed is for the job: it may quote a value. The log has file, line and SQLSTATE; what
//! else PostgreSQL says (DETAIL, CONTEXT: whole rows, often) goes nowhere.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio_postgres::{Client, Error, error::ErrorPosition, error::SqlState};

use super::{
    Site, StepError,
    hand::{self, Hand},
    traffic,
};
use crate::{
    catalog::{model::Entry, rollouts::Plan, store::JobRow},
    jobs::work::Work,
    migrate::script::{self, Applied, Migration},
    sql::rollouts as sql,
};

/// Rows that a tenant's version table may have.
const MOST_VERSIONS: usize = 10_000;
/// Between two tries of a file whose locks were not to be had: doubled up to the second. Who waits for the lock meanwhile gets it.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// Characters of a message of PostgreSQL's that a job has.
const MOST_MESSAGE: usize = 500;
/// For other processes to hear of it.
const HEARD: Duration = Duration::from_secs(5);

/// What version tables say.
type Table = BTreeMap<i64, (Applied, Option<OffsetDateTime>)>;

pub async fn run(site: &mut Site, job: &JobRow, entry: &Entry, result: &mut Value) -> Result<(), StepError> {
    let Work::Migrate { rollout } = job.work else { return Ok(()) };
    let found = site.plane.catalog.rollout_files(rollout).await?;
    let (plan, files) = found.ok_or_else(|| StepError::Refused("the rollout is gone".to_owned()))?;
    let hand = hand::make(site, entry, &[&entry.database]).await?;
    let done = match hand::set_as_owner(site, entry, &hand.role).await {
        Ok(()) => with_hand(site, job, entry, &hand, (&plan, &files), result).await,
        Err(error) => Err(error),
    };
    hand::put_down(site, entry, done).await
}

async fn with_hand(
    site: &mut Site,
    job: &JobRow,
    entry: &Entry,
    hand: &Hand,
    (plan, files): (&Plan, &[Migration]),
    result: &mut Value,
) -> Result<(), StepError> {
    let mut client = hand.log_in(site, &entry.database).await?;
    let mut run = Run { site, job, plan, owner: &hand.owner, client: &mut client };
    run.begin().await?;
    let table = run.table().await?;
    let applied = table.iter().map(|(version, (row, _))| (*version, row.clone())).collect();
    let todo = script::pending(files, &applied, plan.allow_out_of_order).map_err(StepError::Refused)?;
    if !todo.is_empty() {
        // From here on plans may be stale, whatever becomes of us.
        result["stale"] = json!(true);
        run.site.note(job, result).await?;
        run.client.batch_execute(sql::VERSION_TABLE).await?;
    }
    let done = run.apply(&todo, &applied, result).await.map_err(StepError::in_the_middle);
    let table = run.table().await;
    if let Ok(table) = table {
        let rows: Vec<_> = table.into_iter().filter_map(|(version, (row, at))| Some((version, row, at?))).collect();
        run.site.plane.catalog.note_migrations(entry.number, &rows).await?;
    }
    done
}

/// One tenant's files under way.
struct Run<'a> {
    site: &'a mut Site,
    job: &'a JobRow,
    plan: &'a Plan,
    owner: &'a str,
    client: &'a mut Client,
}

/// Why a statement is not done.
enum Stopped {
    /// Its locks were not to be had.
    Locked(Error),
    Failed(StepError),
}

impl Run<'_> {
    /// A session as the owner's own begins, alone at the version table.
    async fn begin(&self) -> Result<(), StepError> {
        self.as_new().await?;
        for pause in pauses(self.plan.lock_retries) {
            if self.client.query_one(sql::LOCK_MIGRATIONS, &[]).await?.try_get(0)? {
                return Ok(());
            }
            self.tell("another run of migrations is in this database; waits for it").await;
            tokio::time::sleep(pause).await;
        }
        Err(StepError::Refused("another run of migrations is in this database".to_owned()))
    }

    /// Nothing that a file has set is left.
    async fn as_new(&self) -> Result<(), StepError> {
        let limit = self.plan.statement_timeout_ms.unwrap_or(0);
        Ok(self.client.batch_execute(&sql::as_owner(self.owner, self.plan.lock_timeout_ms, limit)).await?)
    }

    async fn table(&self) -> Result<Table, StepError> {
        if !self.client.query_one(sql::HAS_VERSION_TABLE, &[]).await?.try_get::<_, bool>(0)? {
            return Ok(Table::new());
        }
        let mut table = Table::new();
        let rows = self.client.query(sql::VERSIONS, &[]).await?;
        if rows.len() > MOST_VERSIONS {
            // The table is the tenant's: it may hold anything.
            return Err(StepError::Refused(format!("tenantry.migrations has more than {MOST_VERSIONS} rows")));
        }
        for row in rows {
            let at: Option<OffsetDateTime> = row.try_get(3)?;
            let statements = usize::try_from(row.try_get::<_, i32>(4)?).unwrap_or(0);
            let applied = Applied { name: row.try_get(1)?, sha256: row.try_get(2)?, is_done: at.is_some(), statements };
            table.insert(row.try_get(0)?, (applied, at));
        }
        Ok(table)
    }

    async fn apply(
        &mut self,
        todo: &[&Migration],
        applied: &BTreeMap<i64, Applied>,
        result: &mut Value,
    ) -> Result<(), StepError> {
        let mut done: Vec<String> = serde_json::from_value(result["applied"].clone()).unwrap_or_default();
        for file in todo {
            self.tell(&file.name).await;
            self.as_new().await?;
            if file.transactional {
                self.in_one_transaction(file).await?;
            } else {
                self.one_by_one(file, applied.get(&file.version)).await?;
            }
            done.push(file.name.clone());
            result["applied"] = json!(done);
            self.site.note(self.job, result).await?;
        }
        Ok(())
    }

    /// Progress is for people: where it cannot be written, the work goes on.
    async fn tell(&self, what: &str) {
        let _ = self.site.plane.catalog.progress(self.job.id, what).await;
    }

    async fn in_one_transaction(&mut self, file: &Migration) -> Result<(), StepError> {
        for (tries, pause) in (1..).zip(pauses(self.plan.lock_retries)) {
            match self.try_transaction(file).await {
                Ok(()) => return Ok(()),
                Err(Stopped::Failed(why)) => return Err(why),
                Err(Stopped::Locked(error)) => self.wait(file, &error, tries, pause).await?,
            }
        }
        Err(self.no_lock(file))
    }

    /// The file and its row, or nothing.
    async fn try_transaction(&mut self, file: &Migration) -> Result<(), Stopped> {
        let (rollout, job) = (self.rollout(), self.job);
        let change = self.client.transaction().await.map_err(away)?;
        let number: String = change.query_one(sql::TRANSACTION, &[]).await.map_err(away)?.get(0);
        change.batch_execute(&file.sql).await.map_err(|error| stopped(job, file, &file.sql, error))?;
        let count = i32::try_from(script::statements(&file.sql).map_or(0, |found| found.len())).unwrap_or(i32::MAX);
        let after = change.query_one(sql::TRANSACTION, &[]).await.map_err(|error| stopped(job, file, "", error))?;
        if after.get::<_, String>(0) != number {
            return Err(Stopped::Failed(StepError::Refused(format!("{}: it ended its transaction", file.name))));
        }
        let row: [&(dyn tokio_postgres::types::ToSql + Sync); 5] =
            [&file.version, &file.name, &file.sha256(), &count, &rollout];
        change.execute(sql::APPLIED, &row).await.map_err(|error| stopped(job, file, "", error))?;
        self.site.plane.fuse.burn();
        change.commit().await.map_err(|error| stopped(job, file, "", error))
    }

    fn rollout(&self) -> i64 {
        if let Work::Migrate { rollout } = self.job.work { rollout } else { 0 }
    }

    async fn wait(&self, file: &Migration, error: &Error, tries: u32, pause: Duration) -> Result<(), StepError> {
        let code = error.code().map_or("", SqlState::code);
        tracing::info!(job = self.job.id, tenant = %self.job.name, file = %file.name, tries, code, "a file's locks were not to be had");
        let all = self.plan.lock_retries.saturating_add(1);
        self.tell(&format!("{}: its locks were not to be had, try {tries} of {all}", file.name)).await;
        tokio::time::sleep(pause).await;
        self.as_new().await
    }

    fn no_lock(&self, file: &Migration) -> StepError {
        let (limit, tries) = (self.plan.lock_timeout_ms, self.plan.lock_retries.saturating_add(1));
        StepError::Refused(format!(
            "{}: its locks were not to be had within {limit} ms, {tries} times: a client has them for longer than that; see \
             pg_locks, or resume when less goes on, or raise lock_timeout_ms",
            file.name
        ))
    }

    async fn one_by_one(&mut self, file: &Migration, begun: Option<&Applied>) -> Result<(), StepError> {
        let before = self.invalid_before(file).await?;
        half_built(file, &self.left_invalid(&before).await?, "was begun before, and left")?;
        let sha256 = file.sha256();
        // One that was changed since begins anew.
        let done = begun.filter(|begun| begun.sha256 == sha256).map_or(0, |begun| begun.statements);
        let statements = script::statements(&file.sql).map_err(StepError::Refused)?;
        let (first, rollout) = (i32::try_from(done).unwrap_or(0), self.rollout());
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
            [&file.version, &file.name, &sha256, &first, &rollout, &before];
        self.client.execute(sql::BEGUN, &parameters).await?;
        for (count, statement) in (1i32..).zip(&statements).skip(done) {
            self.site.plane.fuse.burn();
            let outcome = self.one(file, statement).await;
            let left = self.left_invalid(&before).await?;
            match &outcome {
                Err(StepError::Refused(why)) => half_built(file, &left, &format!("failed ({why}), and left"))?,
                _ => half_built(file, &left, "left")?,
            }
            let is_again = begun.is_some() && usize::try_from(count).is_ok_and(|count| count == done + 1);
            outcome.map_err(|error| if is_again { again(error) } else { error })?;
            self.site.plane.fuse.burn();
            self.client.execute(sql::DONE_SO_FAR, &[&file.version, &count]).await?;
        }
        let count = i32::try_from(statements.len()).unwrap_or(i32::MAX);
        self.site.plane.fuse.burn();
        self.client.execute(sql::FINISHED, &[&file.version, &count]).await?;
        Ok(())
    }

    /// One statement, outside of a transaction.
    async fn one(&self, file: &Migration, statement: &str) -> Result<(), StepError> {
        for (tries, pause) in (1..).zip(pauses(self.plan.lock_retries)) {
            if script::is_concurrent(statement) {
                // It waits for clients without holding them up; given up, it would leave an index that is invalid.
                self.client.batch_execute(&sql::set_lock_timeout(0)).await?;
            }
            match self.client.batch_execute(statement).await.map_err(|error| stopped(self.job, file, statement, error))
            {
                Ok(()) => return self.set_lock_timeout().await,
                Err(Stopped::Failed(why)) => return Err(why),
                Err(Stopped::Locked(error)) => self.wait(file, &error, tries, pause).await?,
            }
        }
        Err(self.no_lock(file))
    }

    async fn set_lock_timeout(&self) -> Result<(), StepError> {
        Ok(self.client.batch_execute(&sql::set_lock_timeout(self.plan.lock_timeout_ms)).await?)
    }

    /// Indexes that were invalid before the file was first begun: they are none of its doing. By their numbers, since the file may
    /// drop one and make another of that name.
    async fn invalid_before(&self, file: &Migration) -> Result<Vec<u32>, StepError> {
        if !self.client.query_one(sql::HAS_INVALID_BEFORE, &[]).await?.try_get::<_, bool>(0)? {
            self.client.batch_execute(sql::ADD_INVALID_BEFORE).await?;
        }
        let row = self.client.query_opt(sql::INVALID_BEFORE, &[&file.version]).await?;
        match row.map(|row| row.try_get::<_, Option<Vec<u32>>>(0)).transpose()? {
            Some(Some(before)) => Ok(before),
            // It was begun by a Tenantry that wrote none down: all that there are may be its own.
            Some(None) => Ok(Vec::new()),
            None => {
                let rows = self.client.query(sql::INVALID_INDEXES, &[]).await?;
                Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
            }
        }
    }

    /// Those that the file left: what another session is building is not finished, and nobody's fault yet.
    async fn left_invalid(&self, before: &[u32]) -> Result<Vec<String>, StepError> {
        let mut left = Vec::new();
        for row in self.client.query(sql::INVALID_INDEXES, &[]).await? {
            let (number, name, is_built): (u32, String, bool) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            if !is_built && !before.contains(&number) {
                left.push(name);
            }
        }
        Ok(left)
    }
}

/// One pause after each try; `retries` and one.
fn pauses(retries: u32) -> impl Iterator<Item = Duration> {
    let doubled = std::iter::successors(Some(PAUSE.0), |pause| Some((*pause * 2).min(PAUSE.1)));
    doubled.take(usize::try_from(retries).unwrap_or(0).saturating_add(1))
}

/// Of the first statement that was not counted, in a file that was begun before.
fn again(error: StepError) -> StepError {
    match error {
        StepError::Refused(why) => StepError::Refused(format!(
            "{why}; the file was begun before, and this statement may have been done then: undo it, or change the file so that \
             it may be done again (IF NOT EXISTS), which begins the file anew"
        )),
        other => other,
    }
}

/// An index that was begun and not finished is named.
fn half_built(file: &Migration, left: &[String], what: &str) -> Result<(), StepError> {
    let Some(index) = left.first() else { return Ok(()) };
    Err(StepError::Refused(format!(
        "{}: it {what} the index {index} invalid, which nobody reads and everybody writes: DROP INDEX CONCURRENTLY {index}, \
         then resume",
        file.name
    )))
}

fn away(error: Error) -> Stopped {
    Stopped::Failed(error.into())
}

/// What PostgreSQL says of a file, for its job.
fn stopped(job: &JobRow, file: &Migration, sql: &str, error: Error) -> Stopped {
    let Some(told) = error.as_db_error() else { return away(error) };
    let code = told.code();
    if matches!(*code, SqlState::LOCK_NOT_AVAILABLE | SqlState::T_R_DEADLOCK_DETECTED) {
        return Stopped::Locked(error);
    }
    let line = match told.position() {
        Some(ErrorPosition::Original(at)) => {
            let before = sql.chars().take(usize::try_from(*at).unwrap_or(usize::MAX));
            Some(before.filter(|c| *c == '\n').count() + 1)
        }
        _ => None,
    };
    tracing::warn!(job = job.id, tenant = %job.name, file = %file.name, line, code = code.code(), "PostgreSQL refused a file");
    let line = line.map_or_else(String::new, |line| format!(", line {line}"));
    let message: String = told.message().chars().take(MOST_MESSAGE).collect();
    let why = format!("{}{line}: {message} ({})", file.name, code.code());
    // Shutting down, out of disk or of connections: later it may work.
    let may_pass = matches!(code.code().get(..2), Some("08" | "53" | "58"))
        || matches!(*code, SqlState::ADMIN_SHUTDOWN | SqlState::CRASH_SHUTDOWN);
    Stopped::Failed(if may_pass { StepError::Away(why) } else { StepError::Refused(why) })
}

/// Exactly this tenant's: every process that serves it prepares anew what its clients have prepared.
pub async fn drop_plans(site: &Site, entry: &Entry, result: &Value) -> Result<(), StepError> {
    if result["stale"] != true {
        return Ok(());
    }
    site.change(entry.number, |e| {
        e.plans = e.plans.wrapping_add(1);
        Ok(())
    })
    .await?;
    traffic::heard(site, entry, HEARD).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_there_is_one_more_try_than_retries() {
        let all: Vec<u128> = pauses(6).map(|pause| pause.as_millis()).collect();
        assert_eq!(all, [500, 1_000, 2_000, 4_000, 8_000, 10_000, 10_000]);
        assert_eq!(pauses(0).count(), 1);
    }
}
