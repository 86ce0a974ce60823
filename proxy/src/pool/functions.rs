//! Whether functions in the tenant's database may leave session state behind that no statement's text shows.
//!
//! A function, and so a trigger, a view, a default or a policy that calls it, may set a setting, take a lock, make a
//! temporary table. Which functions could, their bodies say; PostgreSQL is asked for them now and then, not at each call: a
//! database without such functions (most have none) pays nothing for this, in one that has some each transaction is
//! followed by a look at what they may leave, and by the probe if that finds anything.
//!
//! What always holds: while it is not known that no function may, every session is looked at, or probed, before its
//! connection goes to another. Events in, decisions out; no clock.

use std::sync::{
    Arc,
    atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
};

use parking_lot::Mutex;

use crate::{clock::Millis, server::signs::MAX_CUSTOM};

/// PostgreSQL is asked again this often, for functions that were made around us: milliseconds.
const ASK_EVERY: u64 = 10_000;

/// The regular expression of where a statement begins: in a body, or in a string that may be run. It captures nothing.
macro_rules! begins {
    () => {
        r"(?:^|;|\m(?:begin|then|else|loop)\M|\$\w*\$|'')(?:\s|--[^\n]*\n|/\*(?:[^*]|\*+[^*/])*\*+/)*"
    };
}

/// One row for each kind of thing that a function in the database may leave, and one for each setting that one touches by
/// name. What is looked at is the text of the functions that are not PostgreSQL's own nor written in C, without
/// `set_config(..., true)`, which ends with the transaction. What such a function calls is looked at by itself.
///
/// Stateful: a word that makes state, wherever it stands; SET, RESET and the like at the beginning of a statement or of a
/// string. Unnamed: a setting may change whose name does not stand there whole, as far as this can tell. Opaque: a name or a
/// statement that is put together when it runs, or another language; extensions are trusted not to do that.
pub const READ: &str = concat!(
    r#"SELECT * FROM (
WITH body AS MATERIALIZED (SELECT lanname, EXISTS (SELECT FROM pg_catalog.pg_depend d
WHERE d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass AND d.objid OPERATOR(pg_catalog.=) p.oid
AND d.deptype OPERATOR(pg_catalog.=) 'e') AS of_extension,
pg_catalog.regexp_replace(CASE p.prosrc WHEN '' THEN pg_catalog.pg_get_functiondef(p.oid) ELSE p.prosrc END,
'set_config\s*\(([^()]|\([^()]*\))*,\s*(true|''t(rue)?''|''on'')\s*\)', '', 'gi') AS text
FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_language l ON l.oid OPERATOR(pg_catalog.=) p.prolang
WHERE p.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid AND p.prokind OPERATOR(pg_catalog.=) ANY (ARRAY['f', 'p']::pg_catalog."char"[])
AND l.lanname OPERATOR(pg_catalog.<>) ALL (ARRAY['internal', 'c']::pg_catalog.name[]))
SELECT DISTINCT 'functions', 'stateful', '' FROM body WHERE text OPERATOR(pg_catalog.~*)
'\m(set_config|setseed|dblink_connect\w*|set_limit)\M|advisory_(un)?lock|\mtemp(orary)?\s+(table|view|sequence|recursive)\M|\minto\s+temp(orary)?\M|\mpg_temp|\mwith\s+hold\M|"#,
    begins!(),
    r#"((set\s+(?!\s|local\M|constraints\M|transaction\M))|(reset|discard|listen|load|prepare)\M)'
UNION ALL SELECT DISTINCT 'functions', 'unnamed', '' FROM body WHERE text OPERATOR(pg_catalog.~*)
'\m(dblink_connect\w*|set_limit)\M|\mset_config\M(?!\s*\(\s*''[a-z_][a-z0-9_$.]*''\s*,)|"#,
    begins!(),
    r#"((reset|discard|load)\M|set\s+(?!\s|local\M|constraints\M|transaction\M|(session\s+)?[a-z_][a-z0-9_$.]*\s*(=|to\M)))'
UNION ALL SELECT DISTINCT 'functions', 'opaque', '' FROM body
WHERE NOT of_extension AND (lanname OPERATOR(pg_catalog.<>) ALL (ARRAY['sql', 'plpgsql']::pg_catalog.name[]) OR text OPERATOR(pg_catalog.~*)
'\mset_config\s*\(\s*(?!''|\s)|\mset\s+(session\s+)?(''|%)|\mexecute\s+(?!''|\s|format\s*\(\s*''|(e|u&)''|function\M|procedure\M|on\M)')
UNION ALL SELECT 'functions', 'sequences', '' WHERE EXISTS (SELECT FROM body WHERE text OPERATOR(pg_catalog.~*) '\m(curr|last)val\M')
OR EXISTS (SELECT FROM pg_catalog.pg_attrdef WHERE adrelid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
AND pg_catalog.pg_get_expr(adbin, adrelid) OPERATOR(pg_catalog.~*) '\m(curr|last)val\M')
UNION ALL SELECT DISTINCT 'touches', pg_catalog.lower(m[1]), '' FROM body, LATERAL pg_catalog.regexp_matches(text,
'(?:set_config\s*\(\s*''|\m(?:set|reset)\s+(?:session\s+)?)([a-z_][a-z0-9_$]*(?:\.[a-z_][a-z0-9_$]*)+)', 'gi') m
UNION ALL SELECT DISTINCT 'touches', pg_catalog.lower(COALESCE(m[1], m[2])), '' FROM body, LATERAL pg_catalog.regexp_matches(text,
'set_config\s*\(\s*''([a-z_][a-z0-9_$]*)''|"#,
    begins!(),
    r#"set\s+(?:session\s+)?([a-z_][a-z0-9_$]*)\s*(?:=|to\M)', 'gi') m
) functions"#
);

/// What the functions of a database may do, the worst of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
#[repr(u8)]
pub enum Functions {
    /// Leave nothing.
    #[default]
    Clean = 1,
    /// Leave what a look finds: among settings, only those that are known by name.
    Stateful = 2,
    /// Leave what the probe finds.
    Unnamed = 3,
    /// Leave what nobody can ask for by name: connections are wiped before others use them.
    Opaque = 4,
}

/// What is looked at behind each transaction where functions may leave something: less than the probe looks at, which costs
/// PostgreSQL many times as much, since it goes over all settings.
#[derive(Debug, PartialEq, Eq)]
pub struct Look {
    /// Never used again for others.
    pub id: u32,
    /// Settings that functions touch.
    pub names: Vec<String>,
}

/// What PostgreSQL told when it was asked for `READ`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reading {
    kind: Functions,
    /// Settings with a dot that functions touch, which `pg_settings` does not show.
    custom: Vec<String>,
    /// Other settings that they touch.
    plain: Vec<String>,
    /// A function or a default asks what a sequence gave.
    pub asks_sequences: bool,
}

impl Reading {
    /// Takes the first two columns of a row; false if they make no sense.
    pub fn row(&mut self, kind: &str, name: &str) -> bool {
        match (kind, name) {
            ("functions", "stateful") => self.kind = self.kind.max(Functions::Stateful),
            ("functions", "unnamed") => self.kind = self.kind.max(Functions::Unnamed),
            ("functions", "opaque") => self.kind = self.kind.max(Functions::Opaque),
            ("functions", "sequences") => self.asks_sequences = true,
            ("touches", name) if name.contains('.') => self.custom.push(name.to_owned()),
            ("touches", name) => self.plain.push(name.to_owned()),
            _ => return false,
        }
        true
    }
}

/// What is known of one pool's database.
#[derive(Debug, Default)]
pub struct KnownFunctions {
    /// 0: not known.
    kind: AtomicU8,
    /// When to ask again.
    due: AtomicU64,
    /// Sessions that have made functions and were not probed since.
    makers: AtomicU32,
    /// How often a maker began or ended: what was asked before is not what is.
    generation: AtomicU32,
    /// Settings with a dot that functions touch.
    custom: Mutex<Vec<String>>,
    /// What to look at, where a look is enough.
    look: Mutex<Option<Arc<Look>>>,
    looks: AtomicU32,
}

impl KnownFunctions {
    /// What any statement calls may leave something.
    #[must_use]
    pub fn are_suspect(&self, now: Millis) -> bool {
        self.kind.load(Ordering::Relaxed) != Functions::Clean as u8 || self.are_to_be_read(now)
    }

    /// It is time to ask PostgreSQL.
    #[must_use]
    pub fn are_to_be_read(&self, now: Millis) -> bool {
        self.kind.load(Ordering::Relaxed) == 0
            || self.makers.load(Ordering::Relaxed) > 0
            || now.0 >= self.due.load(Ordering::Relaxed)
    }

    #[must_use]
    pub fn are_opaque(&self) -> bool {
        self.kind.load(Ordering::Relaxed) == Functions::Opaque as u8
    }

    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Relaxed)
    }

    /// PostgreSQL told, when asked in this generation. Names that were not known before are returned: they have not been asked for yet.
    pub fn read(&self, generation: u32, reading: Reading, now: Millis) -> Vec<String> {
        if generation != self.generation() {
            return Vec::new();
        }
        self.kind.store(reading.kind as u8, Ordering::Relaxed);
        self.due.store(now.0.saturating_add(ASK_EVERY), Ordering::Relaxed);
        let Reading { kind, custom, plain, .. } = reading;
        self.learn_look(kind, &custom, plain);
        let mut known = self.custom.lock();
        let fresh: Vec<_> = custom.iter().filter(|name| !known.contains(name)).cloned().collect();
        *known = custom;
        fresh
    }

    fn learn_look(&self, kind: Functions, custom: &[String], plain: Vec<String>) {
        let mut names: Vec<_> = custom.iter().cloned().chain(plain).collect();
        names.sort_unstable();
        let mut look = self.look.lock();
        if kind != Functions::Stateful || names.len() > MAX_CUSTOM {
            *look = None;
        } else if look.as_ref().is_none_or(|known| known.names != names) {
            let id = self.looks.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
            *look = Some(Arc::new(Look { id, names }));
        }
    }

    /// What functions may have left is found by this; `None`: by the probe alone.
    #[must_use]
    pub fn look(&self, now: Millis) -> Option<Arc<Look>> {
        let is_known = self.kind.load(Ordering::Relaxed) == Functions::Stateful as u8 && !self.are_to_be_read(now);
        is_known.then(|| self.look.lock().clone()).flatten()
    }

    /// The settings that looks compare.
    #[must_use]
    pub fn looked_at(&self) -> Option<Arc<Look>> {
        self.look.lock().clone()
    }

    #[must_use]
    pub fn custom(&self) -> Vec<String> {
        self.custom.lock().clone()
    }

    /// A session makes functions: from now until it was probed nobody trusts what was known.
    pub fn begin_to_change(&self) {
        self.makers.fetch_add(1, Ordering::Relaxed);
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    /// It was probed, and `read` told; or it is gone, and somebody else must ask.
    pub fn changed(&self, was_read: bool) {
        if !was_read {
            self.kind.store(0, Ordering::Relaxed);
        }
        self.generation.fetch_add(1, Ordering::Relaxed);
        let _ = self.makers.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_trusted_before_the_functions_were_read_nor_while_they_change() {
        let known = KnownFunctions::default();
        let read = |kind, names: &[&str], at| {
            let custom = names.iter().map(|n| (*n).to_owned()).collect();
            known.read(known.generation(), Reading { kind, custom, ..Reading::default() }, Millis(at))
        };
        assert!(known.are_suspect(Millis(0)) && known.are_to_be_read(Millis(0)));
        assert_eq!(read(Functions::Clean, &["app.a"], 5), ["app.a"]);
        assert!(read(Functions::Clean, &["app.a"], 5).is_empty());
        assert!(!known.are_suspect(Millis(6)));
        known.begin_to_change();
        let early = known.generation();
        read(Functions::Clean, &[], 7);
        assert!(known.are_suspect(Millis(8)), "somebody else's probe; the maker has not committed yet");
        read(Functions::Stateful, &[], 8);
        known.changed(true);
        known.read(early, Reading::default(), Millis(9));
        assert!(known.are_suspect(Millis(9)), "what was asked before is believed no more");
        read(Functions::Clean, &[], 10);
        assert!(!known.are_suspect(Millis(10)));
        assert!(known.are_to_be_read(Millis(10 + ASK_EVERY)), "and now and then");
        known.begin_to_change();
        known.changed(false);
        assert!(known.are_suspect(Millis(11)), "a maker that vanished");
        read(Functions::Stateful, &["app.a"], 12);
        let look = known.look(Millis(12)).expect("a look is enough");
        assert_eq!(look.names, ["app.a"]);
        read(Functions::Stateful, &["app.a"], 12);
        assert_eq!(known.look(Millis(12)), Some(Arc::clone(&look)), "the same is looked at in the same way");
        read(Functions::Stateful, &["app.b"], 12);
        assert!(known.look(Millis(12)).is_some_and(|other| other.id != look.id));
        assert_eq!(known.look(Millis(12 + ASK_EVERY)), None, "it is time to ask for functions");
        read(Functions::Unnamed, &[], 12);
        assert_eq!(known.look(Millis(12)), None);
        read(Functions::Opaque, &[], 12);
        assert!(known.are_suspect(Millis(12)) && known.are_opaque() && !known.are_to_be_read(Millis(12)));
    }
}
