//! Whether what the tenant's database holds may leave session state behind that no statement's text shows.
//!
//! A function may set a setting, take a lock, make a temporary table; and so may a view, a rule, a default, a policy, a
//! check, an operator or an aggregate that calls one of PostgreSQL's own functions which do. Which of them could, the
//! catalog says; PostgreSQL is asked for that when it has changed, not at each call: a database without any (most have none)
//! pays nothing for this, in one that has some each transaction is followed by a look at what they may leave, and by the
//! probe if that finds anything.
//!
//! What always holds: while it is not known that nothing may, every session is looked at, or probed, before its connection
//! goes to another. What cannot be read for certain counts as the worst it could be. Events in, decisions out; no clock.

use std::{
    fmt::Write as _,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

use crate::{
    clock::Millis,
    server::{signs::MAX_CUSTOM, sql::literal},
};

/// PostgreSQL is asked again this often, for what was made around us: milliseconds.
const ASK_EVERY: u64 = 10_000;

/// One row: a number that is another one when anything has changed that `READ` reads.
pub const PRINT: &str = "SELECT 'print', pg_catalog.concat(pg_catalog.count(*), ':', \
pg_catalog.sum(pg_catalog.hashtextextended(pg_catalog.concat(o, ':', x), 0))), '' FROM (\
SELECT oid AS o, xmin AS x FROM pg_catalog.pg_proc WHERE oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid \
UNION ALL SELECT oid, xmin FROM pg_catalog.pg_rewrite WHERE ev_class OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid \
UNION ALL SELECT oid, xmin FROM pg_catalog.pg_attrdef UNION ALL SELECT oid, xmin FROM pg_catalog.pg_policy \
UNION ALL SELECT oid, xmin FROM pg_catalog.pg_constraint WHERE conbin IS NOT NULL \
UNION ALL SELECT oid, xmin FROM pg_catalog.pg_type WHERE typdefaultbin IS NOT NULL \
UNION ALL SELECT oid, xmin FROM pg_catalog.pg_trigger WHERE tgqual IS NOT NULL \
UNION ALL SELECT oid, xmin FROM pg_catalog.pg_operator WHERE oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid \
UNION ALL SELECT oid, xmin FROM pg_catalog.pg_cast WHERE oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid) made";

/// Where a statement begins: in a body, or in a string that may be run and is not the rest of one. Captures nothing.
const BEGINS: &str = r"(?:^|;|\*/|>>|\m(?:begin|then|else|loop)\M|\$\w*\$|(?<!\|\|\s*)')\s*";
/// Of functions that make state, by which PostgreSQL's own are found in expressions, and their names in texts.
const OWN: [(&str, &str); 5] = [
    ("stateful", "^pg_(try_)?advisory_(un)?lock"),
    ("opaque", "^(set_config|query_to_xml|query_to_xmlschema|query_to_xml_and_xmlschema|ts_stat)$"),
    ("seeds", "^setseed$"),
    ("keeps", "^dblink_connect"),
    ("sequences", "^(lastval|currval)$"),
];
/// Words and statements in texts.
const WORDS: &str = r"\mset_config|\mset_limit\M|advisory_(un)?lock|\mtemp(orary)?\s+(table|view|sequence|recursive)\M|\minto\s+temp(orary)?\M|\mpg_temp|\mwith\s+hold\M";
const STATEMENTS: &str =
    r"((set(?=\s|\x22)\s*(?!\s|local\M|constraints\M|transaction\M))|(reset|discard|listen|load|prepare)\M)";
/// A setting may change whose name does not stand there by itself: the probe finds it if it has no dot.
const UNNAMED: &str = r"((reset|discard|load)\M|set(?=\s|\x22)\s*(?!\s|local\M|constraints\M|transaction\M|(session\s+)?[a-z_][a-z0-9_$.]*\s*(=|to\M)))";
/// A name or a statement that is put together when it runs, or that stands there in a way which is not read here. What is
/// EXECUTEd is read if all of it is one string, or if it begins with a verb that leaves nothing.
const OPAQUE: &str = r#"\mset_config(?!\s*\(\s*'[a-z_][a-z0-9_$.]*'(::text)?\s*,)|\mu&["']|\mcreate\s+(or\s+replace\s+)?(function|procedure|view|rule|policy|domain|aggregate|operator|cast|extension)\M|\m(query_to_xml\w*|ts_stat)\M"#;
/// Behind BEGINS, or where PL/pgSQL takes a query.
const EXECUTES: &str = r"\mexecute\M(?!\s*\(?\s*(format\s*\(\s*)?'\s*(insert\s+into|update(?!\s+(pg_catalog\.)?pg_settings)|delete\s+from|truncate|alter|drop|create\s+(unique\s+)?(index|table)|comment|grant|revoke|analyze|vacuum|refresh|lock|notify|copy|select\s[^'%]*\sfrom|select\s*\(*\s*\$\d+)\M|\s*'([^']|'')*'\s*(;|using\M|into\M|loop\M|$))";
const SEEDS: &str = r"\msetseed\M|\mset\s+(session\s+)?seed\M";
const CONNECTS: &str = r"\mdblink_connect";
const SETTINGS_VIEW: &str = r"\mupdate\s+(only\s+)?(pg_catalog\s*\.\s*)?\x22?pg_settings";
const SEQUENCES: &str = r"\m(curr|last)val\M";
const DOTTED: &str =
    r"(?:set_config\s*\(\s*'|\m(?:set|reset)\s+(?:session\s+)?)([a-z_][a-z0-9_$]*(?:\.[a-z_][a-z0-9_$]*)+)";
/// `set_config(..., true)`, which ends with the transaction.
const LOCAL: &str = r"set_config\s*\((?:'(?:[^']|'')*'|[^()'/]|/(?!\*)|\((?:'(?:[^']|'')*'|[^()'])*\))*,\s*(?:true|'t(?:rue)?'|'on')\s*\)";
/// Comments, where no quote says that it may be a string.
const BLOCK_COMMENT: &str = r"/\*([^*']|\*+[^*/'])*\*+/";
const LINE_COMMENT: &str = r"^((?:[^'\n-]|-(?!-))*)--.*$";

/// One row for each kind of thing that may be left, and one for each setting that a function touches by name. What is looked
/// at is the text of the functions that are not PostgreSQL's own nor written in C, without comments; and in all other
/// expressions, as PostgreSQL keeps them, the calls of its own functions. What they call besides is looked at by itself.
///
/// Stateful: a word that makes state, wherever it stands; SET, RESET and the like at the beginning of a statement or of a
/// string. Unnamed: a setting may change whose name does not stand there whole. Opaque: what cannot be read, or another
/// language; extensions are trusted not to do that. The row of the print comes with it: without it the answer is not whole.
pub static READ: LazyLock<String> = LazyLock::new(|| {
    let own = |kind: &str| OWN.iter().find(|(of, _)| *of == kind).map(|(_, names)| literal(names)).unwrap_or_default();
    let sets = literal(&format!("{WORDS}|{BEGINS}{STATEMENTS}"));
    let unnamed = literal(&format!(r"\mset_limit\M|{SETTINGS_VIEW}|{BEGINS}{UNNAMED}"));
    let named = literal(&format!(
        r"set_config\s*\(\s*'([a-z_][a-z0-9_$]*)'|{BEGINS}set\s+(?:session\s+)?([a-z_][a-z0-9_$]*)\s*(?:=|to\M)"
    ));
    let opaque =
        literal(&format!(r"{OPAQUE}|{BEGINS}set\s+(session\s+)?['%\x22]|(?:{BEGINS}|\m(?:query|in|for)\s+){EXECUTES}"));
    let keeps = literal(&format!(r"{CONNECTS}|{BEGINS}load\s+'"));
    let seeds = literal(SEEDS);
    let (sequences, dotted, local) = (literal(SEQUENCES), literal(DOTTED), literal(LOCAL));
    let (block, line) = (literal(BLOCK_COMMENT), literal(LINE_COMMENT));
    let mut sql = format!(
        r#"SELECT * FROM (
WITH raw AS MATERIALIZED (SELECT l.lanname, EXISTS (SELECT FROM pg_catalog.pg_depend d
WHERE d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass AND d.objid OPERATOR(pg_catalog.=) p.oid
AND d.deptype OPERATOR(pg_catalog.=) 'e') AS of_extension, CASE WHEN EXISTS (SELECT FROM pg_catalog.unnest(p.proconfig) c
WHERE c OPERATOR(pg_catalog.~) '^search_path="?pg_temp') THEN 'pg_temp.' ELSE '' END OPERATOR(pg_catalog.||) p.prosrc AS text
FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_language l ON l.oid OPERATOR(pg_catalog.=) p.prolang
WHERE p.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid AND l.lanname OPERATOR(pg_catalog.<>) 'c'
AND p.prokind OPERATOR(pg_catalog.=) ANY (ARRAY['f', 'p']::pg_catalog."char"[])),
body AS MATERIALIZED (SELECT lanname, of_extension, pg_catalog.regexp_replace(text, {local}, '', 'gi') AS raw, pg_catalog.regexp_replace(pg_catalog.regexp_replace(
pg_catalog.regexp_replace(text, {block}, ' ', 'g'), {line}, E'\\1 ', 'gn'), {local}, '', 'gi') AS text FROM raw),
own AS MATERIALIZED (SELECT oid, proname FROM pg_catalog.pg_proc WHERE (oid OPERATOR(pg_catalog.<) 16384::pg_catalog.oid
OR proname OPERATOR(pg_catalog.~) {keeping}) AND proname OPERATOR(pg_catalog.~) {all}),
node AS MATERIALIZED (SELECT ev_action::pg_catalog.text OPERATOR(pg_catalog.||) ev_qual::pg_catalog.text AS tree FROM pg_catalog.pg_rewrite
WHERE ev_class OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
UNION ALL SELECT adbin::pg_catalog.text FROM pg_catalog.pg_attrdef WHERE adrelid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
UNION ALL SELECT pg_catalog.concat(polqual::pg_catalog.text, polwithcheck::pg_catalog.text) FROM pg_catalog.pg_policy
UNION ALL SELECT conbin::pg_catalog.text FROM pg_catalog.pg_constraint WHERE oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
UNION ALL SELECT typdefaultbin::pg_catalog.text FROM pg_catalog.pg_type WHERE oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
UNION ALL SELECT tgqual::pg_catalog.text FROM pg_catalog.pg_trigger
UNION ALL SELECT prosqlbody::pg_catalog.text FROM pg_catalog.pg_proc WHERE oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid),
called AS MATERIALIZED (SELECT DISTINCT m[1] AS o FROM node, LATERAL pg_catalog.regexp_matches(tree,
(SELECT pg_catalog.concat(':(?:op)?funcid (', pg_catalog.string_agg(oid::pg_catalog.text, '|'), ') ') FROM own), 'g') m
UNION SELECT f::pg_catalog.oid::pg_catalog.text FROM pg_catalog.pg_operator, LATERAL (VALUES (oprcode)) v(f) WHERE oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
UNION SELECT castfunc::pg_catalog.text FROM pg_catalog.pg_cast WHERE oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
UNION SELECT f::pg_catalog.oid::pg_catalog.text FROM pg_catalog.pg_aggregate, LATERAL (VALUES (aggtransfn), (aggfinalfn), (aggcombinefn),
(aggserialfn), (aggdeserialfn), (aggmtransfn), (aggminvtransfn), (aggmfinalfn)) v(f) WHERE aggfnoid::pg_catalog.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid)
{PRINT_ROW}
UNION ALL SELECT 'functions', 'stateful', '' WHERE EXISTS (SELECT FROM body WHERE text OPERATOR(pg_catalog.~*) {sets} OR raw OPERATOR(pg_catalog.~*) {sets})
UNION ALL SELECT 'functions', 'unnamed', '' WHERE EXISTS (SELECT FROM body WHERE text OPERATOR(pg_catalog.~*) {unnamed})
UNION ALL SELECT 'functions', 'opaque', '' WHERE EXISTS (SELECT FROM body WHERE NOT of_extension
AND (lanname OPERATOR(pg_catalog.<>) ALL (ARRAY['sql', 'plpgsql', 'internal']::pg_catalog.name[]) OR text OPERATOR(pg_catalog.~*) {opaque}))
UNION ALL SELECT 'functions', 'seeds', '' WHERE EXISTS (SELECT FROM body WHERE text OPERATOR(pg_catalog.~*) {seeds})
UNION ALL SELECT 'functions', 'keeps', '' WHERE EXISTS (SELECT FROM body WHERE NOT of_extension AND text OPERATOR(pg_catalog.~*) {keeps})
UNION ALL SELECT 'functions', 'sequences', '' WHERE EXISTS (SELECT FROM body WHERE text OPERATOR(pg_catalog.~*) {sequences})
UNION ALL SELECT DISTINCT 'touches', pg_catalog.lower(m[1]), '' FROM body, LATERAL pg_catalog.regexp_matches(text, {dotted}, 'gi') m
UNION ALL SELECT DISTINCT CASE WHEN EXISTS (SELECT FROM pg_catalog.pg_settings s
WHERE s.name OPERATOR(pg_catalog.=) pg_catalog.lower(n)) THEN 'touches' ELSE 'hidden' END, pg_catalog.lower(n), ''
FROM body, LATERAL pg_catalog.regexp_matches(text, {named}, 'gi') m, LATERAL (VALUES (COALESCE(m[1], m[2]))) v(n)"#,
        PRINT_ROW = PRINT,
        keeping = own("keeps"),
        all = literal(&OWN.map(|(_, names)| names).join("|")),
    );
    for (kind, _) in OWN {
        let _ = write!(
            sql,
            "\nUNION ALL SELECT 'functions', '{kind}', '' WHERE EXISTS (SELECT FROM own JOIN called \
             ON o OPERATOR(pg_catalog.=) oid::pg_catalog.text WHERE proname OPERATOR(pg_catalog.~) {})",
            own(kind)
        );
    }
    sql.push_str("\n) functions");
    sql
});

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

/// What PostgreSQL told when it was asked for `PRINT` or `READ`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reading {
    print: Option<String>,
    kind: Functions,
    /// Settings with a dot that functions touch, which `pg_settings` does not show.
    custom: Vec<String>,
    /// Other settings that they touch.
    plain: Vec<String>,
    /// Something asks what a sequence gave.
    pub asks_sequences: bool,
    /// Something may call `setseed`.
    seeds: bool,
    /// Something may leave what nothing takes away: a named connection of dblink, a loaded library.
    keeps: bool,
}

impl Reading {
    /// Takes the first two columns of a row; false if they make no sense.
    pub fn row(&mut self, kind: &str, name: &str) -> bool {
        match (kind, name) {
            ("print", print) => self.print = Some(print.to_owned()),
            ("functions", "stateful") => self.kind = self.kind.max(Functions::Stateful),
            ("functions", "unnamed") => self.kind = self.kind.max(Functions::Unnamed),
            ("functions", "opaque") => self.kind = self.kind.max(Functions::Opaque),
            ("functions", "sequences") => self.asks_sequences = true,
            ("functions", "seeds") => self.seeds = true,
            ("functions", "keeps") => self.keeps = true,
            ("touches", name) if name.contains('.') => self.custom.push(name.to_owned()),
            ("touches", name) => self.plain.push(name.to_owned()),
            // A setting that this role may not see, or that does not exist.
            ("hidden", _) => self.kind = self.kind.max(Functions::Opaque),
            _ => return false,
        }
        true
    }
}

/// What was asked, and when: an answer counts only if nothing has changed since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    generation: u32,
    /// All of it, not the print alone.
    pub is_all: bool,
}

/// What came of an answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Learned {
    /// It counts. Settings with a dot that were not known before: nobody has been asked for them yet.
    Fresh(Vec<String>),
    /// Something has changed in the meantime, or the print shows that all must be asked.
    Nothing,
}

/// Sessions of all of a tenant's pools that change what may leave state.
#[derive(Debug, Default)]
pub struct Makers {
    /// How many have, and were not probed since.
    count: AtomicU32,
    /// How often one began or ended: what was asked before is not what is.
    generation: AtomicU32,
}

/// What is known of the database of one pool, as its role sees it.
#[derive(Debug, Default)]
pub struct KnownFunctions {
    makers: Arc<Makers>,
    /// 0: not known.
    kind: AtomicU8,
    /// In which generation that was so.
    known_in: AtomicU32,
    /// When to ask again.
    due: AtomicU64,
    seeds: AtomicBool,
    keeps: AtomicBool,
    /// The print of what was read.
    print: Mutex<Option<String>>,
    /// Settings with a dot that functions touch.
    custom: Mutex<Vec<String>>,
    /// What to look at, where a look is enough.
    look: Mutex<Option<Arc<Look>>>,
    looks: AtomicU32,
}

impl KnownFunctions {
    #[must_use]
    pub fn new(makers: Arc<Makers>) -> Self {
        Self { makers, ..Self::default() }
    }

    /// What any statement calls may leave something.
    #[must_use]
    pub fn are_suspect(&self, now: Millis) -> bool {
        // In this order: a kind is that of the generation which was found to be known.
        self.are_to_be_read(now) || self.kind.load(Ordering::Relaxed) != Functions::Clean as u8
    }

    /// It is time to ask PostgreSQL.
    #[must_use]
    pub fn are_to_be_read(&self, now: Millis) -> bool {
        self.kind.load(Ordering::Relaxed) == 0
            || self.makers.count.load(Ordering::Acquire) > 0
            || self.known_in.load(Ordering::Acquire) != self.makers.generation.load(Ordering::Relaxed)
            || now.0 >= self.due.load(Ordering::Relaxed)
    }

    /// What to ask PostgreSQL now; `None`: nothing.
    #[must_use]
    pub fn to_ask(&self, now: Millis) -> Option<Question> {
        self.are_to_be_read(now).then(|| Question {
            generation: self.makers.generation.load(Ordering::Relaxed),
            is_all: self.kind.load(Ordering::Relaxed) == 0 || self.print.lock().is_none(),
        })
    }

    #[must_use]
    pub fn are_opaque(&self) -> bool {
        self.kind.load(Ordering::Relaxed) == Functions::Opaque as u8
    }

    /// What `random()` gives may be told beforehand.
    #[must_use]
    pub fn leave_seeds(&self) -> bool {
        self.seeds.load(Ordering::Relaxed)
    }

    /// A connection is not fit for anybody else after its use.
    #[must_use]
    pub fn leave_what_stays(&self) -> bool {
        self.keeps.load(Ordering::Relaxed)
    }

    /// PostgreSQL told. `made`: it was asked by a session that had changed something, after it was committed, and that has
    /// ended with this.
    pub fn read(&self, asked: Question, reading: Reading, made: bool, now: Millis) -> Learned {
        let generation = &self.makers.generation;
        let (now_is, counts_in) = if made {
            // Its own end makes a new generation, in which what it was told still counts.
            let before = generation.fetch_add(1, Ordering::Relaxed);
            self.end_to_change();
            (before, before.wrapping_add(1))
        } else {
            let now_is = generation.load(Ordering::Relaxed);
            (now_is, now_is)
        };
        if now_is != asked.generation {
            return Learned::Nothing;
        }
        let Some(print) = &reading.print else { return Learned::Nothing };
        let mut known_print = self.print.lock();
        if !asked.is_all && known_print.as_ref() != Some(print) {
            *known_print = None;
            return Learned::Nothing;
        }
        self.due.store(now.0.saturating_add(ASK_EVERY), Ordering::Relaxed);
        if !asked.is_all {
            self.known_in.store(counts_in, Ordering::Release);
            return Learned::Fresh(Vec::new());
        }
        let Reading { kind, custom, plain, print, seeds, keeps, .. } = reading;
        *known_print = print;
        // Held to the end: whoever finds this print known must find what it tells.
        self.seeds.store(seeds, Ordering::Relaxed);
        self.keeps.store(keeps, Ordering::Relaxed);
        self.learn_look(kind, &custom, plain);
        let mut known = self.custom.lock();
        let fresh: Vec<_> = custom.iter().filter(|name| !known.contains(name)).cloned().collect();
        *known = custom;
        self.kind.store(kind as u8, Ordering::Relaxed);
        self.known_in.store(counts_in, Ordering::Release);
        Learned::Fresh(fresh)
    }

    fn learn_look(&self, kind: Functions, custom: &[String], plain: Vec<String>) {
        let mut names: Vec<_> = custom.iter().cloned().chain(plain).collect();
        names.sort_unstable();
        names.dedup();
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
        let is_known = !self.are_to_be_read(now) && self.kind.load(Ordering::Relaxed) == Functions::Stateful as u8;
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

    /// A session changes what may leave state: from now until it was probed nobody trusts what was known.
    pub fn begin_to_change(&self) {
        self.makers.count.fetch_add(1, Ordering::Relaxed);
        self.makers.generation.fetch_add(1, Ordering::Relaxed);
    }

    /// Such a session ended, and nobody knows what came of it.
    pub fn maker_vanished(&self) {
        self.makers.generation.fetch_add(1, Ordering::Relaxed);
        self.end_to_change();
    }

    /// Behind the new generation: who sees that nobody changes anything must see that, too.
    fn end_to_change(&self) {
        let _ = self.makers.count.fetch_update(Ordering::Release, Ordering::Relaxed, |n| n.checked_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: bool = true;
    const PRINT_ALONE: bool = false;

    fn read(known: &KnownFunctions, kind: Functions, print: &str, names: &[&str], at: u64) -> Learned {
        let asked = known.to_ask(Millis(at)).unwrap_or(Question { generation: generation(known), is_all: ALL });
        let custom = names.iter().map(|n| (*n).to_owned()).collect();
        known.read(asked, Reading { kind, custom, print: Some(print.into()), ..Reading::default() }, false, Millis(at))
    }

    fn generation(known: &KnownFunctions) -> u32 {
        known.makers.generation.load(Ordering::Relaxed)
    }

    fn fresh(names: &[&str]) -> Learned {
        Learned::Fresh(names.iter().map(|n| (*n).to_owned()).collect())
    }

    #[test]
    fn nobody_is_trusted_before_it_was_read_nor_while_it_changes() {
        let known = KnownFunctions::default();
        assert!(known.are_suspect(Millis(0)) && known.are_to_be_read(Millis(0)));
        assert_eq!(read(&known, Functions::Clean, "p", &["app.a"], 5), fresh(&["app.a"]));
        assert_eq!(read(&known, Functions::Clean, "p", &["app.a"], 5), fresh(&[]));
        assert!(!known.are_suspect(Millis(6)));
        known.begin_to_change();
        let early = known.to_ask(Millis(7)).unwrap();
        read(&known, Functions::Clean, "p", &[], 7);
        assert!(known.are_suspect(Millis(8)), "somebody else's probe; the maker has not committed yet");
        let asked = Question { is_all: ALL, ..known.to_ask(Millis(8)).unwrap() };
        let told = Reading { kind: Functions::Stateful, print: Some("q".into()), ..Reading::default() };
        assert_eq!(known.read(asked, told, true, Millis(8)), fresh(&[]));
        assert!(!known.are_to_be_read(Millis(8)) && known.are_suspect(Millis(8)));
        let late = Reading { print: Some("p".into()), ..Reading::default() };
        assert_eq!(known.read(early, late, false, Millis(9)), Learned::Nothing);
        assert!(known.are_suspect(Millis(9)), "what was asked before is believed no more");
        assert!(known.are_to_be_read(Millis(10 + ASK_EVERY)), "and now and then");
        known.begin_to_change();
        known.maker_vanished();
        assert!(known.are_to_be_read(Millis(11)), "a maker that vanished");
    }

    #[test]
    fn of_two_makers_at_once_neither_is_believed_before_both_have_ended() {
        let known = KnownFunctions::default();
        read(&known, Functions::Clean, "p", &[], 1);
        known.begin_to_change();
        let first = known.to_ask(Millis(2)).unwrap();
        known.begin_to_change();
        let second = known.to_ask(Millis(3)).unwrap();
        let told = || Reading { print: Some("p".into()), ..Reading::default() };
        for asked in [first, second] {
            known.read(asked, told(), true, Millis(4));
        }
        assert!(known.are_to_be_read(Millis(4)), "each was asked before the other one had ended");
        known.begin_to_change();
        let asked = known.to_ask(Millis(5)).unwrap();
        known.begin_to_change();
        known.maker_vanished();
        known.read(asked, told(), true, Millis(6));
        assert!(known.are_to_be_read(Millis(6)), "another one has ended since it was asked");
    }

    #[test]
    fn what_another_role_of_the_tenant_changes_is_asked_for_in_every_pool() {
        let makers = Arc::<Makers>::default();
        let (own, other) = (KnownFunctions::new(Arc::clone(&makers)), KnownFunctions::new(makers));
        read(&own, Functions::Clean, "p", &[], 1);
        read(&other, Functions::Clean, "p", &[], 1);
        other.begin_to_change();
        assert!(own.are_suspect(Millis(2)));
        let asked = other.to_ask(Millis(2)).unwrap();
        assert_eq!(asked.is_all, PRINT_ALONE);
        let told = Reading { print: Some("p".into()), ..Reading::default() };
        assert_eq!(other.read(asked, told, true, Millis(2)), fresh(&[]));
        assert!(!other.are_suspect(Millis(2)) && own.are_suspect(Millis(2)));
    }

    #[test]
    fn all_is_read_where_the_print_is_another_one() {
        let known = KnownFunctions::default();
        read(&known, Functions::Clean, "p", &[], 1);
        let at = Millis(1 + ASK_EVERY);
        let print = |text: &str| Reading { print: Some(text.into()), ..Reading::default() };
        let asked = known.to_ask(at).unwrap();
        assert_eq!((asked.is_all, known.read(asked, print("p"), false, at)), (PRINT_ALONE, fresh(&[])));
        assert!(!known.are_suspect(at));
        let at = Millis(at.0 + ASK_EVERY);
        assert_eq!(known.read(known.to_ask(at).unwrap(), print("q"), false, at), Learned::Nothing);
        assert!(known.are_suspect(at));
        let asked = known.to_ask(at).unwrap();
        assert_eq!(asked.is_all, ALL);
        assert_eq!(known.read(asked, Reading::default(), false, at), Learned::Nothing, "an answer that is not whole");
        assert!(known.are_suspect(at));
    }

    #[test]
    fn the_same_is_looked_at_in_the_same_way() {
        let known = KnownFunctions::default();
        read(&known, Functions::Stateful, "p", &["app.a"], 12);
        let look = known.look(Millis(12)).expect("a look is enough");
        assert_eq!(look.names, ["app.a"]);
        read(&known, Functions::Stateful, "p", &["app.a"], 12);
        assert_eq!(known.look(Millis(12)), Some(Arc::clone(&look)));
        read(&known, Functions::Stateful, "p", &["app.b"], 12);
        assert!(known.look(Millis(12)).is_some_and(|other| other.id != look.id));
        assert_eq!(known.look(Millis(12 + ASK_EVERY)), None, "it is time to ask");
        read(&known, Functions::Unnamed, "p", &[], 12);
        assert_eq!(known.look(Millis(12)), None);
        read(&known, Functions::Opaque, "p", &[], 12);
        assert!(known.are_suspect(Millis(12)) && known.are_opaque() && !known.are_to_be_read(Millis(12)));
    }
}
