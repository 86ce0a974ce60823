//! EXECUTE, DEALLOCATE and PREPARE: which statements of a text are one of these, and of which name.
//!
//! What always holds: a statement ends where PostgreSQL ends it, whatever is quoted (unless `standard_conforming_strings` is
//! off), so that the statements that are found are those that run, in their order. Pure.

use super::{
    quoted::{is_of_word, quoted_length},
    words::is_blank,
};

/// PostgreSQL's names have no more bytes: in the protocol a longer one counts as far as that; in SQL it is not read.
const MAX_NAME: usize = 63;

/// What PostgreSQL knows a statement or a portal by, whatever its client calls it.
#[must_use]
pub fn known_by(name: &[u8]) -> &[u8] {
    name.get(..MAX_NAME).unwrap_or(name)
}

/// What SQL does with the name of a prepared statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NamedUse {
    Execute,
    Deallocate,
    Prepare,
}

/// A statement of SQL about a prepared statement, and its name as PostgreSQL knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    pub verb: NamedUse,
    pub name: Vec<u8>,
}

/// Whether a text may be one of these; a look at its first bytes.
fn may_be_named(text: &[u8]) -> bool {
    matches!(text.trim_ascii_start().first(), Some(b'e' | b'E' | b'd' | b'D' | b'p' | b'P' | b'-' | b'/'))
}

impl Named {
    /// Of each statement of a simple query, in order.
    pub fn all(text: &[u8]) -> impl Iterator<Item = Self> {
        statements(text).filter_map(Self::of)
    }

    /// Of a text that is one statement. `None` for any other than these, ALL, and names of more than 63 bytes in UTF-8.
    #[must_use]
    pub fn of(text: &[u8]) -> Option<Self> {
        // Mostly the first byte says enough.
        if may_be_named(text) { Self::read(text) } else { None }
    }

    /// As much of the first part of a text as surely ends no word too early.
    #[must_use]
    pub fn without_broken_end(text: &[u8]) -> &[u8] {
        text.get(..text.iter().rposition(|b| !is_of_word(*b)).unwrap_or(0)).unwrap_or_default()
    }

    fn read(text: &[u8]) -> Option<Self> {
        let (verb, rest) = word(text)?;
        let is = |w: &str| verb.eq_ignore_ascii_case(w.as_bytes());
        let (verb, (name, rest)) = match () {
            () if is("execute") => (NamedUse::Execute, word(rest)?),
            () if is("prepare") => (NamedUse::Prepare, word(rest)?),
            () if is("deallocate") => {
                let (next, after) = word(rest)?;
                let again = if next.eq_ignore_ascii_case(b"prepare") { word(after) } else { None };
                (NamedUse::Deallocate, again.unwrap_or((next, after)))
            }
            () => return None,
        };
        let is_keyword = |w: &str| name.eq_ignore_ascii_case(w.as_bytes());
        if (verb == NamedUse::Deallocate && is_keyword("all"))
            || (verb == NamedUse::Prepare && is_keyword("transaction"))
        {
            return None;
        }
        let name = if name == b"\"" { quoted(rest)? } else { name.to_ascii_lowercase() };
        (!name.is_empty() && name.len() <= MAX_NAME).then_some(Self { verb, name })
    }
}

/// The statements of a text. What is quoted, in dollars or in a comment holds no semicolon. (With
/// `standard_conforming_strings = off` a string may seem to end too early.)
fn statements(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let end = end_of_statement(text);
        rest = text.get(end.saturating_add(1)..);
        text.get(..end)
    })
}

/// Where the first statement's semicolon is, or the text ends.
fn end_of_statement(text: &[u8]) -> usize {
    let mut at = 0;
    while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
        // Nothing else begins something, or ends the statement.
        let plain =
            rest.iter().position(|b| matches!(b, b';' | b'\'' | b'"' | b'$' | b'-' | b'/')).unwrap_or(rest.len());
        at = at.saturating_add(plain);
        let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) else { break };
        if rest.first() == Some(&b';') {
            return at;
        }
        at = at.saturating_add(quoted_length(rest, text.get(..at).unwrap_or_default()).unwrap_or(1));
    }
    text.len()
}

/// The next word behind blanks and comments, or the quote that opens a quoted name; and what follows.
fn word(mut text: &[u8]) -> Option<(&[u8], &[u8])> {
    loop {
        text = text.get(text.iter().position(|b| !is_blank(*b))?..)?;
        if let Some(comment) = text.strip_prefix(b"--") {
            text = comment.get(comment.iter().position(|b| matches!(b, b'\n' | b'\r'))?..)?;
        } else if let Some(comment) = text.strip_prefix(b"/*") {
            // One that holds another is left to the words of the scan.
            let end = comment.windows(2).position(|w| matches!(w, b"*/" | b"/*"))?;
            text = comment.get(end..)?.strip_prefix(b"*/")?;
        } else {
            break;
        }
    }
    if text.first() == Some(&b'"') {
        return text.split_at_checked(1);
    }
    let end = text.iter().position(|b| !is_of_word(*b)).unwrap_or(text.len());
    (end > 0).then(|| text.split_at_checked(end)).flatten()
}

/// A quoted name, behind its opening quote.
fn quoted(text: &[u8]) -> Option<Vec<u8>> {
    let mut name = Vec::new();
    let mut bytes = text.iter().copied().peekable();
    loop {
        match bytes.next()? {
            b'"' if bytes.peek() == Some(&b'"') => {
                bytes.next();
                name.push(b'"');
            }
            b'"' => return Some(name),
            b => name.push(b),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sql_about_prepared_statements_is_read() {
        use NamedUse::{Deallocate, Execute, Prepare};
        for (text, verb, name) in [
            ("EXECUTE a", Execute, "a"),
            (" execute\n_Pg3_0(1, 2)", Execute, "_pg3_0"),
            ("/* x */ EXECUTE -- y\n \"A \"\"b\"(1)", Execute, "A \"b"),
            ("DEALLOCATE a;", Deallocate, "a"),
            ("deallocate prepare a", Deallocate, "a"),
            ("DEALLOCATE prepare", Deallocate, "prepare"),
            ("DEALLOCATE \"all\"", Deallocate, "all"),
            ("prepare p(int) AS SELECT 1", Prepare, "p"),
        ] {
            let named = Named { verb, name: name.into() };
            assert_eq!(Named::of(text.as_bytes()).as_ref(), Some(&named), "{text}");
        }
        for text in [
            "DEALLOCATE ALL",
            "deallocate prepare all",
            "PREPARE TRANSACTION 'x'",
            "EXECUTE",
            "DELETE FROM a",
            "",
            "EXECUTE \"a",
        ] {
            assert_eq!(Named::of(text.as_bytes()), None, "{text}");
        }
        let names = |text: &str| Named::all(text.as_bytes()).map(|n| n.name).collect::<Vec<_>>();
        assert_eq!(names("SELECT 1; execute a;DEALLOCATE b"), [b"a", b"b"]);
        assert!(names("SELECT ';', 1; SELECT 2").is_empty());
    }

    #[test]
    fn a_statement_ends_where_postgresql_ends_it() {
        let parts = |text: &'static str| statements(text.as_bytes()).map(|part| part.len()).collect::<Vec<_>>();
        assert_eq!(parts("a;b;"), [1, 1, 0]);
        for whole in [
            "';'",
            "'it''s;'",
            "E'\\';'",
            "e'it''s \\';'",
            "\";\"\";\"",
            "$$;$$",
            "$a$;$$;$a$",
            "-- ;",
            "/* ; /* ; */ ; */",
            // Without an end.
            "';",
            "\";",
            "$a$;$$;",
            "/* ;",
            "/*/;",
            "E';\\",
        ] {
            assert_eq!(parts(whole), [whole.len()], "{whole}");
        }
        for (text, first) in [
            ("-- x\n;b", 5),
            ("-- x\r;b", 5),
            ("name'\\';b", 7),
            ("$1;b", 2),
            ("a$b$;c$b$", 4),
            ("$1$;b", 3),
            ("-;b", 1),
            ("/;b", 1),
            ("2*/*;*/3;b", 8),
        ] {
            assert_eq!(parts(text).first(), Some(&first), "{text}");
        }
    }

    #[test]
    fn a_name_that_may_go_on_is_not_read() {
        let names = |text: &str| Named::all(Named::without_broken_end(text.as_bytes())).count();
        assert_eq!(["EXECUTE ab", "EXECUTE \"ab", "EXECUTE ab(", "EXECUTE a; DEALLOCATE b"].map(names), [0, 0, 1, 1]);
    }
}
