//! The SQLite file: opened so that nothing of it runs, looked through, and read row by row into lines of COPY.
//!
//! What always holds: the file is read only and nobody else's; everything here blocks, and belongs on a thread of its own; one
//! row and one chunk are in memory at a time, whatever the size of the file; a value larger than `MOST_BYTES_OF_VALUE` is
//! refused before it is read; whatever SQLite computes, it stops at its deadline, and when nobody waits for it any more.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use rusqlite::{Connection, OpenFlags, Row, backup::Backup, limits::Limit, types::ValueRef};
use tokio::time::Instant;

use super::{
    convert,
    plan::{Plan, SourceColumn, SourceTable, TablePlan},
    problems::{Problems, shown},
    sum,
};
use crate::sql::sqlite as sql;

/// Every SQLite file begins so.
pub const MAGIC: &[u8] = b"SQLite format 3\0";
/// The largest value that is imported.
const MOST_BYTES_OF_VALUE: i32 = 32 << 20;
/// Of a pattern of LIKE or GLOB in a CHECK of the file's: matching one is a single instruction, which nothing interrupts.
const LONGEST_PATTERN: i32 = 1_000;
/// Instructions of SQLite's between two looks at the clock. Few: one of them may be a function over a value of megabytes.
const INSTRUCTIONS: i32 = 100;
/// Values that are told of a table which are not the same afterwards.
const MOST_LOSSES: usize = 1_000;
/// Of one message to PostgreSQL.
const CHUNK: usize = 64 << 10;
/// Pages of one step of a copy.
const PAGES: i32 = 1_024;

/// Lines for COPY.
#[derive(Debug, Default)]
pub struct Chunk {
    pub lines: Bytes,
    pub rows: u64,
}

/// What was read of a table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sums {
    /// Rows that were handed on.
    pub rows: u64,
    /// Of each column: the checksum, and numbers that were rounded, those of rows with another problem included.
    pub columns: Vec<(i128, u64)>,
    /// The first of those.
    pub losses: Vec<Loss>,
}

/// A number that its column does not hold as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    pub column: String,
    pub row: String,
    pub value: String,
    pub held: String,
}

impl Sums {
    /// Before the first row.
    #[must_use]
    pub fn of(table: &TablePlan) -> Self {
        Self { rows: 0, columns: vec![(0, 0); table.columns.len()], losses: Vec::new() }
    }
}

/// A row that PostgreSQL did not take.
#[derive(Debug, Clone)]
pub struct Refused {
    /// Its number among the rows without another problem, from 1.
    pub at: u64,
    pub why: String,
    pub detail: String,
}

/// How long SQLite may be at work on a file. The one that was made is kept by whoever waits: dropped, it ends the work.
#[derive(Debug)]
pub struct Leash(Hold);

/// What the work has of it.
#[derive(Debug, Clone)]
pub struct Hold {
    is_off: Arc<AtomicBool>,
    deadline: Instant,
}

impl Leash {
    #[must_use]
    pub fn new(limit: Duration) -> Self {
        Self(Hold { is_off: Arc::default(), deadline: Instant::now() + limit })
    }

    #[must_use]
    pub fn hold(&self) -> Hold {
        self.0.clone()
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        self.0.is_off.store(true, Ordering::Relaxed);
    }
}

impl Hold {
    /// The deadline has passed.
    #[must_use]
    pub fn is_late(&self) -> bool {
        Instant::now() >= self.deadline
    }

    fn is_over(&self) -> bool {
        self.is_off.load(Ordering::Relaxed) || self.is_late()
    }
}

/// An open file.
#[derive(Debug)]
pub struct File(Connection);

/// SQLite's words, without a path.
fn words(error: &rusqlite::Error) -> String {
    match error {
        rusqlite::Error::SqliteFailure(code, text) => text.clone().unwrap_or_else(|| code.to_string()),
        error => error.to_string(),
    }
}

impl File {
    /// One that is whole.
    ///
    /// # Errors
    /// In SQLite's words.
    pub fn open(path: &Path, hold: Hold) -> Result<Self, String> {
        let opened = || {
            let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
            let file = Connection::open_with_flags(uri(path.as_os_str(), "mode=ro&immutable=1"), flags)?;
            file.progress_handler(INSTRUCTIONS, Some(move || hold.is_over()));
            file.set_limit(Limit::SQLITE_LIMIT_LENGTH, MOST_BYTES_OF_VALUE)?;
            file.set_limit(Limit::SQLITE_LIMIT_LIKE_PATTERN_LENGTH, LONGEST_PATTERN)?;
            file.execute_batch(sql::GUARDED)?;
            let mut check = file.prepare(sql::CHECK)?;
            let complaints: Vec<String> = check.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
            drop(check);
            Ok((file, complaints))
        };
        match opened() {
            Ok((file, complaints)) if complaints == ["ok"] => Ok(Self(file)),
            Ok((_, complaints)) => Err(format!("the file is damaged: {}", complaints.join("; "))),
            Err(error) => Err(format!("SQLite cannot read the file: {}", words(&error))),
        }
    }

    /// All its tables.
    ///
    /// # Errors
    /// In SQLite's words; a table that cannot be looked at is a problem of its own.
    pub fn tables(&self, problems: &mut Problems) -> Result<Vec<SourceTable>, String> {
        let names = || {
            let mut tables = self.0.prepare(sql::TABLES)?;
            let rows = tables.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
            rows.collect::<rusqlite::Result<Vec<(String, bool, bool)>>>()
        };
        let mut found = Vec::new();
        for (name, is_virtual, without_rowid) in names().map_err(|error| words(&error))? {
            match self.table(&name, is_virtual, without_rowid) {
                Ok(table) => found.push(table),
                Err(error) => problems.whole(&name, "", &format!("cannot be read: {}", words(&error))),
            }
        }
        Ok(found)
    }

    fn table(&self, name: &str, is_virtual: bool, without_rowid: bool) -> rusqlite::Result<SourceTable> {
        let number = |statement: &str| self.0.query_row(statement, [], |row| row.get::<_, i64>(0));
        let rows = u64::try_from(number(&sql::count(name))?).unwrap_or(0);
        let mut table =
            SourceTable { name: name.to_owned(), without_rowid, is_virtual, rows, ..SourceTable::default() };
        let mut key = Vec::new();
        let mut columns = self.0.prepare(sql::COLUMNS)?;
        let columns = columns.query_map([name], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        for column in columns {
            let (column, is_generated, place): (String, bool, i64) = column?;
            let is_used = rows > 0 && number(&sql::is_used(name, &column))? != 0;
            if place > 0 {
                key.push((place, column.clone()));
            }
            table.columns.push(SourceColumn { name: column, is_generated, is_used });
        }
        key.sort();
        table.key = key.into_iter().map(|(_, column)| column).collect();
        if number(sql::HAS_NUMBERS)? > 0 {
            table.last_number = self.0.query_row(sql::LAST_NUMBER, [name], |row| row.get(0))?;
        }
        Ok(table)
    }

    /// Rows that break a unique index or a foreign key of PostgreSQL's tables, which those of the file may not have.
    pub fn look_for_broken_keys(&self, plan: &Plan, problems: &mut Problems) {
        for table in &plan.tables {
            let names = |columns: &[String]| columns.iter().all(|name| table.columns.iter().any(|c| c.name == *name));
            for columns in table.uniques.iter().filter(|columns| names(columns)) {
                let why = "is not unique, and must be";
                self.tell_rows(sql::twice(table, columns), (&table.name, &columns.join(", "), why), problems);
            }
        }
        for key in &plan.keys {
            let find = |oid| plan.tables.iter().find(|table| table.oid == oid);
            let (Some(child), Some(parent)) = (find(key.child), find(key.parent)) else { continue };
            let why = format!("leads nowhere: no row of {} has it", parent.name);
            let what = (child.name.as_str(), key.columns.join(", "), why);
            self.tell_rows(sql::orphans(child, &parent.name, key), (what.0, &what.1, &what.2), problems);
        }
    }

    fn tell_rows(&self, (statement, key): (String, usize), what: (&str, &str, &str), problems: &mut Problems) {
        let (table, column, why) = what;
        let mut told = || {
            let mut rows = self.0.prepare(&statement)?;
            let count = rows.column_count();
            let names: Vec<String> = rows.column_names().iter().take(key).map(|name| (*name).to_owned()).collect();
            let mut rows = rows.query([])?;
            while let Some(row) = rows.next()? {
                let values =
                    (key..count).map(|at| Ok(shown(row.get_ref(at)?))).collect::<rusqlite::Result<Vec<_>>>()?;
                problems.row(table, column, why, (row_name(row, &names)?, values.join(", ")));
            }
            Ok(())
        };
        // Columns that the file does not have are problems already.
        if let Err(error) = told() {
            tracing::debug!(error = words(&error), table, "keys of a table are not looked at");
        }
    }

    /// Rows of the migrations, as application and name.
    ///
    /// # Errors
    /// In SQLite's words.
    pub fn migrations(&self, statement: &str) -> Result<BTreeSet<(String, String)>, String> {
        let found = || {
            let mut rows = self.0.prepare(statement)?;
            let rows = rows.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            rows.collect::<rusqlite::Result<_>>()
        };
        found().map_err(|error| words(&error))
    }

    /// Hands all rows to `take`, which says whether to go on; rows that do not fit are problems. `skipped`: rows that
    /// PostgreSQL refused.
    ///
    /// # Errors
    /// In SQLite's words.
    pub fn read(
        &self,
        table: &TablePlan,
        skipped: &[Refused],
        problems: &mut Problems,
        mut take: impl FnMut(Chunk) -> bool,
    ) -> Result<Sums, String> {
        let (statement, key) = sql::rows(table);
        let mut reader = Reader::new(table, key);
        let mut read = || {
            let mut rows = self.0.prepare(&statement)?;
            reader.names = rows.column_names().iter().take(key).map(|name| (*name).to_owned()).collect();
            let mut rows = rows.query([])?;
            while let Some(row) = rows.next()? {
                reader.row(row, skipped, problems)?;
                if reader.lines.len() >= CHUNK && !take(reader.chunk()) {
                    return Ok(());
                }
            }
            take(reader.chunk());
            Ok(())
        };
        read().map_err(|error: rusqlite::Error| words(&error))?;
        Ok(reader.sums)
    }
}

/// `id=5`; of a row without a primary key its rowid.
fn row_name(row: &Row<'_>, names: &[String]) -> rusqlite::Result<String> {
    let parts = names.iter().enumerate().map(|(at, name)| Ok(format!("{name}={}", shown(row.get_ref(at)?))));
    Ok(parts.collect::<rusqlite::Result<Vec<_>>>()?.join(", "))
}

/// What becomes of the rows of one table.
struct Reader<'a> {
    table: &'a TablePlan,
    /// How many columns tell the row.
    key: usize,
    names: Vec<String>,
    lines: Vec<u8>,
    rows: u64,
    /// Rows without a problem so far, those that are skipped counted.
    fitting: u64,
    sums: Sums,
    text: Vec<u8>,
    form: Vec<u8>,
    /// Of the row under way: the checksum of each column.
    hashes: Vec<i64>,
}

impl<'a> Reader<'a> {
    fn new(table: &'a TablePlan, key: usize) -> Self {
        Self {
            table,
            key,
            names: Vec::new(),
            lines: Vec::with_capacity(CHUNK * 2),
            rows: 0,
            fitting: 0,
            sums: Sums::of(table),
            text: Vec::new(),
            form: Vec::new(),
            hashes: Vec::new(),
        }
    }

    fn chunk(&mut self) -> Chunk {
        let rows = std::mem::take(&mut self.rows);
        let lines = std::mem::replace(&mut self.lines, Vec::with_capacity(CHUNK * 2));
        Chunk { lines: lines.into(), rows }
    }

    /// One line more, or a problem more.
    fn row(&mut self, row: &Row<'_>, skipped: &[Refused], problems: &mut Problems) -> rusqlite::Result<()> {
        let start = self.lines.len();
        self.hashes.clear();
        let mut fits = true;
        for (at, column) in self.table.columns.iter().enumerate() {
            if at > 0 {
                self.lines.push(b'\t');
            }
            let value = row.get_ref(self.key + at)?;
            match self.value(value, at) {
                Ok(false) => {}
                Ok(true) => self.lost(row, at, &column.name)?,
                Err(why) => {
                    fits = false;
                    let told = (row_name(row, &self.names)?, shown(value));
                    problems.row(&self.table.name, &column.name, &why, told);
                }
            }
        }
        self.fitting += u64::from(fits);
        let refused = skipped.iter().find(|row| fits && row.at == self.fitting);
        if let Some(Refused { why, detail, .. }) = refused {
            problems.row(&self.table.name, "", why, (row_name(row, &self.names)?, detail.clone()));
        }
        if !fits || refused.is_some() {
            self.lines.truncate(start);
            return Ok(());
        }
        self.lines.push(b'\n');
        self.rows += 1;
        self.sums.rows += 1;
        for ((sum, _), hash) in self.sums.columns.iter_mut().zip(&self.hashes) {
            *sum += i128::from(*hash);
        }
        Ok(())
    }

    /// A number that was rounded is counted, and told with its row.
    fn lost(&mut self, row: &Row<'_>, at: usize, column: &str) -> rusqlite::Result<()> {
        if let Some((_, rounded)) = self.sums.columns.get_mut(at) {
            *rounded += 1;
        }
        if self.sums.losses.len() < MOST_LOSSES {
            let (name, value) = (row_name(row, &self.names)?, shown(row.get_ref(self.key + at)?));
            let held = self.table.columns.get(at).map_or_else(String::new, |column| column.kind.held(&self.text));
            self.sums.losses.push(Loss { column: column.to_owned(), row: name, value, held });
        }
        Ok(())
    }

    /// Whether it was rounded.
    fn value(&mut self, value: ValueRef<'_>, at: usize) -> Result<bool, convert::Why> {
        let Some(column) = self.table.columns.get(at) else { return Ok(false) };
        if matches!(value, ValueRef::Null) {
            self.lines.extend_from_slice(b"\\N");
            self.hashes.push(0);
            return if column.is_required { Err("is NULL, and the column is NOT NULL".into()) } else { Ok(false) };
        }
        self.text.clear();
        self.form.clear();
        let written = column.kind.write(value, &mut self.text, &mut self.form)?;
        convert::escape(&self.text, &mut self.lines);
        let form = if written.has_form { &self.form } else { &self.text };
        self.hashes.push(sum::hash(form));
        Ok(written.rounded)
    }
}

fn uri(path: &OsStr, with: &str) -> String {
    let mut uri = "file:".to_owned();
    for byte in path.as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-".contains(byte) {
            uri.push(char::from(*byte));
        } else {
            uri.push_str(&format!("%{byte:02X}"));
        }
    }
    format!("{uri}?{with}")
}

/// A copy of a file that may be in use, as of one moment, with all that is in its write-ahead log. `told`: pages that are left,
/// and all of them.
///
/// # Errors
/// In SQLite's words.
pub fn copy(from: &Path, to: &Path, mut told: impl FnMut(u64, u64)) -> Result<(), String> {
    let mut copied = || {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let source = Connection::open_with_flags(uri(from.as_os_str(), "mode=ro"), flags)?;
        source.busy_timeout(std::time::Duration::from_secs(10))?;
        // Whoever writes meanwhile does not make the copy begin anew.
        source.execute_batch(sql::SNAPSHOT)?;
        let mut copy = Connection::open(to)?;
        let backup = Backup::new(&source, &mut copy)?;
        loop {
            let step = backup.step(PAGES)?;
            let progress = backup.progress();
            let pages = |count| u64::try_from(count).unwrap_or(0);
            told(pages(progress.remaining), pages(progress.pagecount));
            match step {
                rusqlite::backup::StepResult::Done => break,
                rusqlite::backup::StepResult::More => {}
                _ => {
                    return Err(rusqlite::Error::SqliteFailure(
                        rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_BUSY),
                        None,
                    ));
                }
            }
        }
        drop(backup);
        copy.query_row(sql::ONE_FILE, [], |row| row.get::<_, String>(0)).map(drop)
    };
    copied().map_err(|error| words(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It comes to no end.
    const ENDLESS: &str =
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT n, n FROM c WHERE n < 0";

    fn small() -> tempfile::NamedTempFile {
        let path = tempfile::NamedTempFile::new().unwrap();
        Connection::open(path.path()).and_then(|file| file.execute_batch("CREATE TABLE t (n)")).unwrap();
        path
    }

    #[test]
    fn work_on_a_file_ends_at_its_deadline() {
        let (path, leash) = (small(), Leash::new(Duration::from_secs(1)));
        let why = File::open(path.path(), leash.hold()).and_then(|file| file.migrations(ENDLESS)).unwrap_err();
        assert!(why.contains("interrupted") && leash.hold().is_late(), "{why}");
    }

    #[test]
    fn work_on_a_file_ends_when_nobody_waits_for_it() {
        let (path, leash) = (small(), Leash::new(Duration::from_secs(3_600)));
        let file = File::open(path.path(), leash.hold()).unwrap();
        let work = std::thread::spawn(move || file.migrations(ENDLESS).map(drop));
        drop(leash);
        assert!(work.join().unwrap().unwrap_err().contains("interrupted"));
    }
}
