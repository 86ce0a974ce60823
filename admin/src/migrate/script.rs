//! A migration's file: its number, its checksum, its statements, and whether it may be applied after those that were. Pure.
//!
//! A lexer of our own, of forty lines, finds where statements end: PostgreSQL's parser as a library (libpg_query) is hundreds
//! of thousands of lines of C for that, and tokenizers in Rust know lines and columns, not the bytes that we cut at. Where it
//! is wrong, PostgreSQL refuses what was cut; a transaction is never ended by it (the transaction's number is compared, too).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use utoipa::ToSchema;

use crate::catalog::disk::hex;

/// Files of one rollout.
pub const MOST_FILES: usize = 500;
/// Bytes of all of them together.
pub const MOST_BYTES: usize = 4 << 20;
const MOST_NAME: usize = 200;
/// A number in JSON is exact up to here.
const HIGHEST_VERSION: i64 = 1 << 53;

/// A file of SQL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Migration {
    /// Its number; files are applied in the order of their numbers.
    #[schema(minimum = 1, maximum = 9_007_199_254_740_992_i64, example = 3)]
    pub version: i64,
    /// For people: it may not change either.
    #[schema(max_length = 200, example = "0003_add_index.sql")]
    pub name: String,
    /// The statements. In one transaction, with the row in the version table.
    pub sql: String,
    /// SHA-256 of `sql`, hex: what arrives must be what was sent. Null: it is not compared.
    #[serde(default)]
    #[schema(max_length = 64)]
    pub checksum: Option<String>,
    /// False: statement by statement, outside of transactions, e.g. for CREATE INDEX CONCURRENTLY.
    #[serde(default = "Migration::yes")]
    #[schema(default = true)]
    pub transactional: bool,
}

impl Migration {
    fn yes() -> bool {
        true
    }

    /// SHA-256 of its text, hex.
    #[must_use]
    pub fn sha256(&self) -> String {
        hex(&Sha256::digest(self.sql.as_bytes()))
    }
}

/// What a version table says of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    pub name: String,
    pub sha256: String,
    /// False: one that is not transactional was begun, and not finished.
    pub is_done: bool,
    /// Statements of it that are done.
    pub statements: usize,
}

/// Puts files in their order, or says what is wrong with them.
pub fn check_files(mut files: Vec<Migration>) -> Result<Vec<Migration>, String> {
    if files.is_empty() || files.len() > MOST_FILES {
        return Err(format!("migrations: 1 to {MOST_FILES} files"));
    }
    if files.iter().map(|file| file.sql.len()).sum::<usize>() > MOST_BYTES {
        return Err(format!("migrations: at most {MOST_BYTES} bytes together"));
    }
    files.sort_by_key(|file| file.version);
    for pair in files.windows(2) {
        if let [one, two] = pair
            && one.version == two.version
        {
            return Err(format!("{} and {} have the same version, {}", one.name, two.name, one.version));
        }
    }
    files.iter().try_for_each(check_file)?;
    Ok(files)
}

fn check_file(file: &Migration) -> Result<(), String> {
    let name = &file.name;
    if name.is_empty() || name.len() > MOST_NAME || name.chars().any(char::is_control) {
        return Err(format!("version {}: its name must be 1 to {MOST_NAME} bytes of plain text", file.version));
    }
    if !(1..=HIGHEST_VERSION).contains(&file.version) {
        return Err(format!("{name}: the version must be 1 to {HIGHEST_VERSION}"));
    }
    if file.sql.contains('\0') {
        return Err(format!("{name}: PostgreSQL takes no NUL in a statement"));
    }
    if file.checksum.as_ref().is_some_and(|sum| !sum.eq_ignore_ascii_case(&file.sha256())) {
        return Err(format!("{name}: its checksum is not that of what arrived"));
    }
    let found = statements(&file.sql).map_err(|error| format!("{name}: {error}"))?;
    if found.is_empty() {
        return Err(format!("{name}: there is no statement in it"));
    }
    let takes_over = found.iter().find_map(|statement| controls_transaction(statement));
    match takes_over {
        Some(word) if !file.transactional => Err(format!(
            "{name}: {word} is in it, and in a file without a transaction each statement is its own: leave it out"
        )),
        Some(word) => Err(format!(
            "{name}: {word} is in it, and a file is one transaction of Tenantry's: leave it out, or begin the file with \
             `-- tenantry: no-transaction` (then each statement is its own)"
        )),
        None => Ok(()),
    }
}

/// What of these files is still to be applied; or why none may be: said before anything runs.
pub fn pending<'a>(
    files: &'a [Migration],
    applied: &BTreeMap<i64, Applied>,
    allow_out_of_order: bool,
) -> Result<Vec<&'a Migration>, String> {
    let newest = applied.iter().filter(|(_, there)| there.is_done).map(|(version, _)| *version).max();
    let mut todo = Vec::new();
    for file in files {
        match applied.get(&file.version) {
            Some(there) if there.is_done && there.sha256 != file.sha256() => {
                return Err(format!(
                    "{}: its checksum is not that of version {} as it was applied ({}): an applied file must not change; put \
                     the change into a new one",
                    file.name, file.version, there.name
                ));
            }
            Some(there) if there.is_done => {}
            _ => match newest {
                Some(newest) if newest > file.version && !allow_out_of_order => {
                    return Err(format!(
                        "{}: version {newest} is applied already, and this one comes before it: give it a higher number, or \
                         allow it (allow_out_of_order, --out-of-order)",
                        file.name
                    ));
                }
                _ => todo.push(file),
            },
        }
    }
    Ok(todo)
}

/// The statements of a text, without what is between them.
pub fn statements(sql: &str) -> Result<Vec<&str>, String> {
    let (mut found, mut start, mut at, mut body) = (Vec::new(), 0, 0, Body::default());
    let bytes = sql.as_bytes();
    while at < bytes.len() {
        let next = token(bytes, at).ok_or_else(|| {
            let line = sql.get(..=at).unwrap_or_default().lines().count().max(1);
            format!("what begins in line {line} (a string, a name or a comment) has no end")
        })?;
        let text = sql.get(at..next).unwrap_or_default();
        if text == ";" && body.depth == 0 {
            found.extend(statement(sql, start, at));
            (start, body) = (next, Body::default());
        } else {
            body.take(text);
        }
        at = next;
    }
    found.extend(statement(sql, start, bytes.len()));
    Ok(found)
}

/// Whether we are in the body of a function (BEGIN ATOMIC ... END), whose statements are not ours.
#[derive(Default)]
struct Body {
    depth: u32,
    has_begin: bool,
}

impl Body {
    fn take(&mut self, token: &str) {
        let is = |word: &str| token.eq_ignore_ascii_case(word);
        if self.has_begin && is("atomic") || self.depth > 0 && is("case") {
            self.depth += 1;
        } else if self.depth > 0 && is("end") {
            self.depth -= 1;
        }
        if !token.trim().is_empty() {
            self.has_begin = is("begin");
        }
    }
}

fn statement(sql: &str, start: usize, end: usize) -> Option<&str> {
    let text = sql.get(start..end)?;
    (!without_comments(text).is_empty()).then(|| text.trim())
}

/// What is left of a text behind the blanks and comments that it begins with.
fn without_comments(text: &str) -> &str {
    let bytes = text.as_bytes();
    let mut at = 0;
    while let Some(rest) = bytes.get(at..) {
        let is_between =
            matches!(rest, [b'-', b'-', ..] | [b'/', b'*', ..]) || rest.first().is_some_and(u8::is_ascii_whitespace);
        match token(bytes, at) {
            Some(next) if is_between => at = next,
            _ => break,
        }
    }
    text.get(at..).unwrap_or_default()
}

/// Where the token that begins here ends; `None`: nowhere.
fn token(bytes: &[u8], at: usize) -> Option<usize> {
    let rest = bytes.get(at..)?;
    match rest {
        [b'-', b'-', ..] => Some(rest.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |end| at + end + 1)),
        [b'/', b'*', ..] => comment(rest).map(|length| at + length),
        [b'\'', ..] => {
            // E'...' has escapes; what is before the E is no part of a name.
            let before = |back: usize| at.checked_sub(back).and_then(|at| bytes.get(at)).copied();
            let escapes = matches!(before(1), Some(b'e' | b'E')) && !before(2).is_some_and(is_of_name);
            quoted(rest, b'\'', escapes).map(|length| at + length)
        }
        [b'"', ..] => quoted(rest, b'"', false).map(|length| at + length),
        [b'$', ..] => dollars(rest).map(|length| at + length),
        [first, ..] if is_of_name(*first) => {
            Some(rest.iter().position(|byte| !is_of_name(*byte)).map_or(bytes.len(), |length| at + length))
        }
        _ => Some(at + 1),
    }
}

fn is_of_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$' || !byte.is_ascii()
}

/// Comments nest.
fn comment(rest: &[u8]) -> Option<usize> {
    let (mut depth, mut at) = (0usize, 0);
    while at < rest.len() {
        match rest.get(at..at + 2) {
            Some(b"/*") => (depth, at) = (depth + 1, at + 2),
            Some(b"*/") => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

fn quoted(rest: &[u8], quote: u8, escapes: bool) -> Option<usize> {
    let mut at = 1;
    while let Some(byte) = rest.get(at) {
        match byte {
            b'\\' if escapes => at += 2,
            byte if *byte == quote && rest.get(at + 1) == Some(&quote) => at += 2,
            byte if *byte == quote => return Some(at + 1),
            _ => at += 1,
        }
    }
    None
}

/// `$tag$ ... $tag$`; a lone `$`, as in `$1`, is one byte.
fn dollars(rest: &[u8]) -> Option<usize> {
    let inner = rest.get(1..)?;
    let Some(end) = inner.iter().position(|byte| !is_of_name(*byte) || *byte == b'$') else { return Some(1) };
    let begins_with_digit = inner.first().is_some_and(u8::is_ascii_digit);
    if inner.get(end) != Some(&b'$') || begins_with_digit {
        return Some(1);
    }
    let tag = rest.get(..end + 2)?;
    let body = rest.get(tag.len()..)?;
    let close = body.windows(tag.len()).position(|window| window == tag)?;
    Some(tag.len() + close + tag.len())
}

/// The word with which a statement begins or ends a transaction; savepoints do not.
fn controls_transaction(statement: &str) -> Option<&'static str> {
    let text = without_comments(statement);
    let mut words = text.split(|c: char| !c.is_ascii_alphabetic()).filter(|word| !word.is_empty());
    let (first, second, third) =
        (words.next()?.to_ascii_uppercase(), words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let is = |word: &str, other: &str| word.eq_ignore_ascii_case(other);
    let to_savepoint = is(second, "to") || is(third, "to");
    match first.as_str() {
        "BEGIN" => Some("BEGIN"),
        "START" if is(second, "transaction") => Some("START TRANSACTION"),
        "COMMIT" => Some("COMMIT"),
        "END" => Some("END"),
        "ROLLBACK" if !to_savepoint => Some("ROLLBACK"),
        "ABORT" => Some("ABORT"),
        "PREPARE" if is(second, "transaction") => Some("PREPARE TRANSACTION"),
        _ => None,
    }
}

/// Whether a statement builds, rebuilds or drops an index while clients write: it waits for them without holding them up.
#[must_use]
pub fn is_concurrent(statement: &str) -> bool {
    let words: Vec<String> = without_comments(statement)
        .split(|c: char| !c.is_ascii_alphabetic())
        .filter(|word| !word.is_empty())
        .take(8)
        .map(str::to_ascii_uppercase)
        .collect();
    let begins = matches!(words.first().map(String::as_str), Some("CREATE" | "DROP" | "REINDEX"));
    begins && words.iter().any(|word| word == "CONCURRENTLY")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(version: i64, sql: &str) -> Migration {
        Migration {
            version,
            name: format!("{version:04}_x.sql"),
            sql: sql.to_owned(),
            checksum: None,
            transactional: true,
        }
    }

    fn applied(file: &Migration) -> (i64, Applied) {
        let Migration { version, name, .. } = file;
        (*version, Applied { name: name.clone(), sha256: file.sha256(), is_done: true, statements: 0 })
    }

    #[test]
    fn statements_end_at_semicolons_that_are_in_nothing() {
        let cut = |sql| statements(sql).unwrap();
        assert_eq!(cut("SELECT 1; SELECT 2"), ["SELECT 1", "SELECT 2"]);
        assert_eq!(cut(" ;; -- only; this\n /* a; /* b; */ c; */ ;"), Vec::<&str>::new());
        assert_eq!(cut("SELECT ';', \"a;b\", 'it''s; so';"), ["SELECT ';', \"a;b\", 'it''s; so'"]);
        assert_eq!(cut(r"SELECT E'a\';b'; SELECT '\'"), [r"SELECT E'a\';b'", r"SELECT '\'"]);
        assert_eq!(cut("DO $$ BEGIN x; END $$; SELECT 1"), ["DO $$ BEGIN x; END $$", "SELECT 1"]);
        assert_eq!(
            cut("SELECT $a$ $$; $b$ ; $a$; SELECT $1; SELECT a$b; SELECT $"),
            ["SELECT $a$ $$; $b$ ; $a$", "SELECT $1", "SELECT a$b", "SELECT $"]
        );
        let function = "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT CASE WHEN true THEN 1 END; SELECT 2; END";
        let both = format!("{function}; SELECT 1");
        assert_eq!(statements(&both).unwrap(), [function, "SELECT 1"]);
        assert_eq!(cut("SELECT 'ü;é' ; SELECT 2"), ["SELECT 'ü;é'", "SELECT 2"]);
        for broken in ["SELECT 'a", "SELECT \"a", "/* /* */", "\n\nDO $x$ $y$"] {
            assert!(statements(broken).is_err(), "{broken}");
        }
        assert!(statements("\n\nSELECT 'a").unwrap_err().contains("line 3"));
    }

    #[test]
    fn a_file_that_would_end_our_transaction_is_refused() {
        for sql in ["BEGIN; SELECT 1", "SELECT 1; commit", "/* x */ end", "ROLLBACK", "start transaction", "ABORT;"] {
            let refused = check_files(vec![file(1, sql)]).unwrap_err();
            assert!(refused.contains("no-transaction") && refused.contains("0001_x.sql"), "{refused}");
        }
        for sql in ["SAVEPOINT a; ROLLBACK TO a; ROLLBACK TO SAVEPOINT a", "DO $$ BEGIN END $$", "SELECT 'COMMIT;'"] {
            assert!(check_files(vec![file(1, sql)]).is_ok(), "{sql}");
        }
    }

    #[test]
    fn files_are_put_in_order_and_what_is_wrong_is_named() {
        let ordered = check_files(vec![file(10, "SELECT 1"), file(2, "SELECT 1")]).unwrap();
        assert_eq!(ordered.iter().map(|file| file.version).collect::<Vec<_>>(), [2, 10]);
        let wrong = |files| check_files(files).unwrap_err();
        assert!(wrong(vec![]).contains("1 to 500"));
        assert!(wrong(vec![file(1, "SELECT 1"), file(1, "SELECT 2")]).contains("the same version, 1"));
        assert!(wrong(vec![file(1, "-- nothing")]).contains("no statement"));
        assert!(wrong(vec![file(0, "SELECT 1")]).contains("version must be"));
        assert!(wrong(vec![Migration { checksum: Some("00".to_owned()), ..file(1, "SELECT 1") }]).contains("checksum"));
        let good = file(1, "SELECT 1");
        assert!(check_files(vec![Migration { checksum: Some(good.sha256().to_uppercase()), ..good }]).is_ok());
    }

    #[test]
    fn only_what_is_not_applied_is_to_be_done_and_an_applied_file_must_not_change() {
        let files = [file(1, "SELECT 1"), file(2, "SELECT 2"), file(3, "SELECT 3")];
        let versions = |todo: Vec<&Migration>| todo.iter().map(|file| file.version).collect::<Vec<_>>();
        let has = |these: &[&Migration]| these.iter().map(|file| applied(file)).collect::<BTreeMap<_, _>>();
        assert_eq!(pending(&files, &has(&[]), false).map(versions), Ok(vec![1, 2, 3]));
        assert_eq!(pending(&files, &has(&[&files[0]]), false).map(versions), Ok(vec![2, 3]));
        let refused = pending(&files, &has(&[&file(1, "SELECT 'other'")]), false).unwrap_err();
        assert!(refused.contains("0001_x.sql") && refused.contains("checksum"), "{refused}");
        let late = has(&[&files[0], &files[2]]);
        assert!(pending(&files, &late, false).unwrap_err().contains("0002_x.sql"));
        assert_eq!(pending(&files, &late, true).map(versions), Ok(vec![2]));
        // What others applied is theirs.
        assert_eq!(
            pending(&files, &has(&[&files[0], &files[1], &files[2], &file(9, "SELECT 9")]), false).map(versions),
            Ok(vec![])
        );
    }

    #[test]
    fn one_that_was_begun_and_not_finished_is_to_be_done_also_changed() {
        let files = [Migration { transactional: false, ..file(1, "SELECT 1; SELECT 2") }];
        let begun = |sha256: String| {
            BTreeMap::from([(1, Applied { name: "x".to_owned(), sha256, is_done: false, statements: 1 })])
        };
        for sha256 in [files[0].sha256(), "other".to_owned()] {
            assert_eq!(pending(&files, &begun(sha256), false).map(|todo| todo.len()), Ok(1));
        }
    }

    #[test]
    fn what_is_done_concurrently_is_told_from_what_is_not() {
        for sql in [
            "create unique index concurrently i on t (n)",
            "-- x\nDROP INDEX CONCURRENTLY IF EXISTS i",
            "REINDEX (VERBOSE) INDEX CONCURRENTLY i",
        ] {
            assert!(is_concurrent(sql), "{sql}");
        }
        for sql in
            ["CREATE INDEX i ON t (concurrently)", "SELECT 'CREATE INDEX CONCURRENTLY'", "ALTER TABLE t ADD n int"]
        {
            assert_eq!(is_concurrent(sql), sql.contains("(concurrently)"), "{sql}");
        }
    }
}
