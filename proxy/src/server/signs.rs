//! What the text of a statement gives away: may it leave state in the session, may it end a transaction?
//!
//! A cheap scan, one pass, that works on text in pieces. It may suspect too much, which costs one probe of PostgreSQL
//! itself, and must not suspect too little. What no probe can clear is looked at once more, without what strings hold. Behind a semicolon that may stand inside a string, and inside a DO block, every
//! word counts, in comments too. It never decides anything by itself: a suspicion only makes us look. Pure.

use std::sync::LazyLock;

use tenantry_wire::{extended::Parse, frame::HEADER};

use super::{
    named::Named,
    quoted,
    words::{self, Words, is_blank},
};

/// Most settings with a dot that one text or session may name; with more, the session stays pinned.
pub const MAX_CUSTOM: usize = 64;

/// What a text showed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Signs {
    /// Session state may have changed: ask PostgreSQL before the connection goes to anybody else.
    pub suspect: bool,
    /// Session state may have become less: worth asking when the session is pinned.
    pub loosen: bool,
    /// LOAD, or a setting whose name cannot be read: nothing that PostgreSQL tells can clear it.
    pub opaque: bool,
    /// COMMIT, END or PREPARE TRANSACTION: if the answer is lost, nobody knows.
    pub commits: bool,
    /// For a client whose channels are listened to elsewhere: the text may change or look at what it listens to, may
    /// notify, or begins a transaction, of which nobody knows yet what it will do.
    pub listens: bool,
    /// Settings with a dot in their name, which `pg_settings` does not show.
    pub custom: Vec<String>,
    /// `lastval` or `currval`: asks what a sequence gave to this session.
    pub sequences: bool,
    /// A sequence may have given a value to this session.
    pub advances: bool,
    /// RESET or DISCARD: back to what PostgreSQL thinks the session began with.
    pub resets: bool,
    /// `setseed` or `SET seed`: what `random()` gives is state, which nothing shows and nothing resets.
    pub seeds: bool,
    /// One of the two above, but only inside strings, which hardly anything runs: nobody is pinned for that, and the
    /// connection is wiped, and its seed drawn anew, before somebody else uses it.
    pub hints: bool,
    /// PREPARE: SQL may have given a name.
    pub prepares: bool,
    /// DISCARD or DEALLOCATE: perhaps of all statements.
    pub drops_names: bool,
    /// `pg_prepared_statements`: asks which names the session has given.
    pub asks_names: bool,
    /// A statement creates a table, perhaps with a command tag that does not say so.
    pub creates: bool,
    /// The statement is EXECUTE, DEALLOCATE or PREPARE of this name.
    pub named: Option<Box<Named>>,
}

/// What must be seen to before a text is run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Asks {
    /// See `Signs::asks_names`.
    pub names: bool,
    /// See `Signs::sequences`.
    pub sequences: bool,
    /// See `Signs::advances`.
    pub advances: bool,
    /// What it runs with EXECUTE asks what a sequence gave before.
    pub runs_sequences: bool,
    /// It is, or holds, SQL about a prepared statement whose name is known.
    pub speaks_of_names: bool,
}

impl Asks {
    /// It runs that, too.
    pub fn add(&mut self, executed: &Signs) {
        self.names |= executed.asks_names;
        self.runs_sequences |= executed.sequences && !executed.advances;
    }
}

impl Signs {
    #[must_use]
    pub fn asks(&self) -> Asks {
        Asks { names: self.asks_names, sequences: self.sequences, advances: self.advances, ..Asks::default() }
    }

    pub fn merge(&mut self, other: &Self) {
        self.suspect |= other.suspect;
        self.loosen |= other.loosen;
        self.opaque |= other.opaque;
        self.commits |= other.commits;
        self.advances |= other.advances;
        self.seeds |= other.seeds;
        self.hints |= other.hints;
        self.resets |= other.resets;
        self.prepares |= other.prepares;
        self.creates |= other.creates;
        self.listens |= other.listens;
        for name in &other.custom {
            self.touched(name.clone());
        }
    }

    /// A setting with a dot in its name was touched.
    fn touched(&mut self, name: String) {
        if self.custom.contains(&name) {
            return;
        }
        if self.custom.len() < MAX_CUSTOM {
            self.custom.push(name);
        } else {
            self.opaque = true;
        }
    }

    /// Of a Parse message of the unnamed statement.
    #[must_use]
    pub fn of_parse(message: Option<&[u8]>) -> Self {
        let parse = message.and_then(|message| message.get(HEADER..)).and_then(Parse::read);
        parse.map_or_else(Self::default, |parse| Self::of(parse.query))
    }

    /// Of a text that is all there.
    #[must_use]
    pub fn of(text: &[u8]) -> Self {
        let mut signs = Self::default();
        signs.add(text, &mut Scan::default());
        signs.named = Named::of(text).map(Box::new);
        signs
    }

    /// What one more text shows, that is all there.
    pub fn add(&mut self, text: &[u8], scan: &mut Scan) {
        let before = (self.opaque, self.seeds);
        scan.reset();
        scan.feed(text, self);
        scan.finish(self);
        if (self.opaque, self.seeds) != before
            && let Some(outside) = outside_of_strings(text)
        {
            let told = (before.0 || outside.opaque, before.1 || outside.seeds);
            self.hints |= told != (self.opaque, self.seeds);
            (self.opaque, self.seeds) = told;
        }
    }
}

/// What a text shows apart from what its strings hold; `None` if it may run those, or nobody can say what is a string.
#[cold]
fn outside_of_strings(text: &[u8]) -> Option<Signs> {
    let (mut scan, mut signs) = (Scan::default(), Signs::default());
    scan.feed(&quoted::without_strings(text)?, &mut signs);
    scan.finish(&mut signs);
    (!scan.defines && !scan.is_block).then_some(signs)
}

/// What a substring tells.
#[derive(Debug, Clone, Copy)]
enum Tells {
    State,
    /// A setting, whose name is the first argument.
    SetConfig,
    Unlock,
    /// A comment may stand for a blank in the others,
    Comment,
    /// of which one is seen by its second word then.
    SecondWord,
    AsksSequence,
    AdvancesSequence,
    AsksNames,
    Creates,
    Seed,
    /// State that cannot be asked for.
    Opaque,
    Listens,
    /// A query that runs while something is made,
    Query,
    /// unless it is kept to be run later.
    KeepsQuery,
}

/// Substrings (blanks collapsed, any case) that tell something wherever they stand.
const PATTERNS: [(&str, Tells); 48] = [
    ("set_config", Tells::SetConfig),
    ("advisory_unlock", Tells::Unlock),
    ("advisory_lock", Tells::State),
    ("with hold", Tells::State),
    ("create temp ", Tells::State),
    ("create temporary ", Tells::State),
    ("local temp", Tells::State),
    ("global temp", Tells::State),
    ("unlogged temp", Tells::State),
    ("replace temp ", Tells::State),
    ("replace temporary ", Tells::State),
    ("into temp ", Tells::State),
    ("into temporary ", Tells::State),
    ("pg_temp", Tells::State),
    // An UPDATE of it is a SET.
    ("pg_settings", Tells::State),
    // These run a text of SQL.
    ("query_to_xml", Tells::State),
    ("ts_stat", Tells::State),
    // Of modules that come with PostgreSQL: a limit that is a setting, a connection by name.
    ("set_limit", Tells::State),
    ("dblink_connect", Tells::Opaque),
    // A name with an escape can be any.
    ("u&\"", Tells::Opaque),
    ("/*", Tells::Comment),
    ("--", Tells::Comment),
    ("temp", Tells::SecondWord),
    ("hold", Tells::SecondWord),
    ("lastval(", Tells::AsksSequence),
    ("currval(", Tells::AsksSequence),
    ("lastval (", Tells::AsksSequence),
    ("currval (", Tells::AsksSequence),
    ("lastval\"(", Tells::AsksSequence),
    ("currval\"(", Tells::AsksSequence),
    ("nextval", Tells::AdvancesSequence),
    ("insert into", Tells::AdvancesSequence),
    // The view, and the function that it calls.
    ("pg_prepared_statement", Tells::AsksNames),
    // CREATE TABLE ... AS and the like answer as SELECT does.
    ("create table", Tells::Creates),
    ("create unlogged", Tells::Creates),
    ("create materialized", Tells::Creates),
    ("setseed", Tells::Seed),
    // LISTEN, UNLISTEN, pg_listening_channels, NOTIFY, pg_notify.
    ("listen", Tells::Listens),
    ("notify", Tells::Listens),
    ("as select", Tells::Query),
    ("as with", Tells::Query),
    ("as (select", Tells::Query),
    ("create view", Tells::KeepsQuery),
    ("temp view", Tells::KeepsQuery),
    ("temporary view", Tells::KeepsQuery),
    ("recursive view", Tells::KeepsQuery),
    ("create or replace ", Tells::KeepsQuery),
    ("create function", Tells::KeepsQuery),
];

static WORDS: LazyLock<Option<Words>> = LazyLock::new(|| Words::new(&PATTERNS.map(|(text, _)| text)));

/// The first words of most statements, which tell nothing; all of one length.
const PLAIN: [&[u8; PLAIN_LENGTH]; 3] = [b"select", b"update", b"delete"];
const PLAIN_LENGTH: usize = 6;

/// A name longer than this is not read; the session stays pinned instead.
const MAX_WORD: usize = 64;

/// Where the scan is in the text.
#[derive(Debug, Default)]
pub struct Scan {
    place: words::At,
    /// Comments around the one we are in.
    depth: u32,
    at: At,
    word: Vec<u8>,
    /// Words of the statement so far, up to three: SET, SESSION, name.
    words: u8,
    verb: Verb,
    /// Collects the first argument of `set_config(`.
    argument: Option<Vec<u8>>,
    /// Strings and comments cannot be told from statements any more: every word counts.
    doubtful: bool,
    has_comment: bool,
    has_split_word: bool,
    /// In a DO block: EXECUTE and SET were seen.
    executes: bool,
    sets: bool,
    /// DO.
    is_block: bool,
    /// In a DO block: what EXECUTE runs, as far as it matters, without blanks.
    executed: Option<Vec<u8>>,
    /// CREATE, ALTER, COMMENT: a function that is named is not called,
    defines: bool,
    /// unless in a query that is run at once,
    queries: bool,
    /// and not kept.
    keeps_query: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Before the first word of a statement, or between the words that matter.
    #[default]
    Gap,
    Word,
    Slash,
    Dash,
    BlockComment,
    BlockStar,
    BlockSlash,
    LineComment,
    /// Past the words that matter.
    Body,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Verb {
    #[default]
    None,
    Set,
    Reset,
    Other,
}

impl Scan {
    /// Forgets the last text and keeps the memory.
    pub fn reset(&mut self) {
        let word = std::mem::take(&mut self.word);
        *self = Self { word, ..Self::default() };
        self.word.clear();
    }

    /// Takes the next piece of the text.
    pub fn feed(&mut self, text: &[u8], signs: &mut Signs) {
        let Some(words) = WORDS.as_ref() else {
            signs.suspect = true;
            signs.opaque = true;
            return;
        };
        let mut rest = self.skip_plain_word(words, text);
        while let Some((&byte, behind)) = rest.split_first() {
            rest = behind;
            if let Some(next) = words.step(self.place, byte) {
                self.place = next;
                let ending = words.ending(next);
                ending.iter().for_each(|word| self.found(*word, signs));
                if ending.is_empty() && self.argument.is_some() {
                    self.collect(byte, signs);
                }
            }
            if self.at != At::Body || byte == b';' {
                self.step(byte, signs);
            }
            if self.executed.is_some() {
                self.collect_executed(byte, signs);
            }
            // Most of most texts: past the words that matter.
            if self.at == At::Body && self.argument.is_none() && self.executed.is_none() {
                (self.place, rest) = words.skim(self.place, rest, b';');
            }
        }
    }

    /// A statement that begins with a word which says nothing by itself, as most do, is past the words that matter: what the
    /// steps would find, word by word. What is behind that word, or all if there is no such word.
    fn skip_plain_word<'a>(&mut self, words: &Words, text: &'a [u8]) -> &'a [u8] {
        let is_beginning = self.at == At::Gap && self.words == 0 && !self.doubtful && self.argument.is_none();
        let Some((first, rest)) = text.split_at_checked(PLAIN_LENGTH).filter(|_| is_beginning) else { return text };
        if rest.first() != Some(&b' ') || !PLAIN.iter().any(|word| first.eq_ignore_ascii_case(*word)) {
            return text;
        }
        let (place, unread) = words.skim(self.place, first, b';');
        if !unread.is_empty() {
            return text;
        }
        (self.place, self.at, self.verb, self.words) = (place, At::Body, Verb::Other, 1);
        rest
    }

    /// The text is over.
    pub fn finish(&mut self, signs: &mut Signs) {
        if self.at == At::Word {
            self.end_word(signs);
        }
        signs.suspect |= self.has_comment && self.has_split_word;
        signs.sequences &= !self.defines || (self.queries && !self.keeps_query);
        // A SET that is put together at run time: nobody can say of what.
        signs.opaque |= self.executes && self.sets;
        if self.argument.take().is_some() {
            signs.opaque = true;
        }
    }

    fn found(&mut self, pattern: usize, signs: &mut Signs) {
        match PATTERNS.get(pattern).map_or(Tells::State, |(_, tells)| *tells) {
            Tells::State => signs.suspect = true,
            Tells::SetConfig => {
                signs.suspect = true;
                self.argument = Some(Vec::new());
            }
            Tells::Unlock => signs.loosen = true,
            Tells::Comment => self.has_comment = true,
            Tells::SecondWord => self.has_split_word = true,
            Tells::AsksSequence => signs.sequences = true,
            Tells::AdvancesSequence => signs.advances = true,
            Tells::AsksNames => signs.asks_names = true,
            Tells::Creates => signs.creates = true,
            Tells::Seed => signs.seeds = true,
            Tells::Opaque => (signs.suspect, signs.opaque) = (true, true),
            Tells::Listens => signs.listens = true,
            Tells::Query => self.queries = true,
            Tells::KeepsQuery => self.keeps_query = true,
        }
    }

    /// Behind EXECUTE in a DO block: a string, or a format that begins with a word. Anything else cannot be read.
    fn collect_executed(&mut self, byte: u8, signs: &mut Signs) {
        const FORMAT: &[u8] = b"format('";
        let Some(executed) = &mut self.executed else { return };
        if is_blank(byte) {
            return;
        }
        executed.push(byte.to_ascii_lowercase());
        let is_read = executed.first() == Some(&b'\'')
            || (executed.starts_with(FORMAT) && executed.len() > FORMAT.len() && byte != b'%');
        if !is_read && FORMAT.starts_with(executed) {
            return;
        }
        signs.opaque |= !is_read;
        self.executed = None;
    }

    /// After `set_config`: an opening parenthesis, a quoted name, the closing quote, a comma. Anything else cannot be read.
    fn collect(&mut self, byte: u8, signs: &mut Signs) {
        let Some(argument) = &mut self.argument else { return };
        match (argument.as_slice(), byte) {
            ([] | [b'('] | [b'(', b'\'', .., b'\''], b' ' | b'\n' | b'\r' | b'\t') => {}
            ([], b'(') | ([b'('], b'\'') => argument.push(byte),
            ([b'(', b'\'', name @ .., b'\''], b',') => {
                let name = String::from_utf8_lossy(name).to_ascii_lowercase();
                if name.contains('.') {
                    signs.touched(name);
                }
                self.argument = None;
            }
            ([b'(', b'\'', _, .., b'\''] | [b'(', b'\'', b'\''], _) => {
                signs.opaque = true;
                self.argument = None;
            }
            ([b'(', b'\'', ..], b) if argument.len() < MAX_WORD => argument.push(b),
            _ => {
                signs.opaque = true;
                self.argument = None;
            }
        }
    }

    fn step(&mut self, byte: u8, signs: &mut Signs) {
        let quote_begins = byte == b'"'
            && !self.word.is_empty()
            && self.word.first() != Some(&b'"')
            && self.word.last() != Some(&b'.');
        if self.at == At::Word && quote_begins {
            // SET"name": the keyword is over although no blank says so.
            self.at = if self.end_word(signs) { self.past() } else { At::Gap };
        }
        let word = byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'"' | b'$' | 0x80..);
        self.at = match (self.at, byte) {
            (At::BlockComment, b'*') | (At::BlockStar, b'*') => At::BlockStar,
            (At::BlockStar, b'/') => self.close_comment(),
            (At::BlockComment | At::BlockSlash, b'/') => At::BlockSlash,
            (At::BlockSlash, b'*') => {
                self.depth = self.depth.saturating_add(1);
                At::BlockComment
            }
            (At::BlockComment | At::BlockStar | At::BlockSlash, _) => At::BlockComment,
            (At::LineComment, b'\n' | b'\r') => At::Gap,
            (At::LineComment, _) => At::LineComment,
            (At::Slash, b'*') => At::BlockComment,
            (At::Dash, b'-') => At::LineComment,
            (At::Word, _) if word => {
                self.word.push(byte);
                if self.word.len() > MAX_WORD {
                    self.end_word(signs);
                    self.past()
                } else {
                    At::Word
                }
            }
            (before, b) => {
                let past = before == At::Word && self.end_word(signs);
                match b {
                    b';' => {
                        // From here on a string or a comment may be open.
                        self.doubtful |= before == At::Body;
                        self.words = 0;
                        self.verb = Verb::None;
                        At::Gap
                    }
                    _ if past || before == At::Body => self.past(),
                    b'/' if !self.doubtful => At::Slash,
                    b'-' if !self.doubtful => At::Dash,
                    b if is_blank(b) || b == b'(' || b == 0 => At::Gap,
                    b if word => {
                        self.word.clear();
                        self.word.push(b);
                        At::Word
                    }
                    _ => self.past(),
                }
            }
        };
    }

    /// No further word of this statement matters; where nobody can say what is a statement, the next word may begin one.
    fn past(&mut self) -> At {
        if !self.doubtful {
            return At::Body;
        }
        self.words = 0;
        self.verb = Verb::None;
        At::Gap
    }

    /// PostgreSQL's comments nest.
    fn close_comment(&mut self) -> At {
        let outer = self.depth.checked_sub(1);
        self.depth = outer.unwrap_or(0);
        if outer.is_some() { At::BlockComment } else { At::Gap }
    }

    /// Looks at a word that is over; true if no further word of this statement matters.
    fn end_word(&mut self, signs: &mut Signs) -> bool {
        let word = std::mem::take(&mut self.word);
        let is = |w: &str| word.eq_ignore_ascii_case(w.as_bytes());
        self.words = self.words.saturating_add(1);
        let past = match (self.verb, self.words) {
            (Verb::None, _) => {
                self.verb = first_word(&is, signs);
                self.defines |= is("create") || is("alter") || is("comment");
                // What follows is another language, with statements of this one inside its strings.
                self.is_block |= is("do");
                self.doubtful |= self.is_block;
                if self.doubtful && is("execute") {
                    self.executes = true;
                    self.executed = self.is_block.then(Vec::new);
                }
                self.sets |= self.doubtful && (is("set") || is("reset"));
                self.verb == Verb::Other
            }
            (Verb::Set, 2) if is("local") || is("transaction") || is("constraints") => true,
            (Verb::Set, 2) if is("session") => false,
            (Verb::Set | Verb::Reset, _) => {
                signs.suspect = true;
                signs.seeds |= is("seed");
                if word.contains(&b'.') {
                    signs.touched(String::from_utf8_lossy(&word).replace('"', "").to_ascii_lowercase());
                }
                true
            }
            (Verb::Other, _) => true,
        };
        self.word = word;
        self.word.clear();
        past
    }
}

/// What the first word of a statement tells.
fn first_word(is: &impl Fn(&str) -> bool, signs: &mut Signs) -> Verb {
    if is("select") || is("update") || is("delete") {
        return Verb::Other;
    }
    if is("insert") {
        signs.advances = true;
        return Verb::Other;
    }
    if is("begin") {
        signs.listens = true;
        return Verb::Other;
    }
    if is("set") {
        return Verb::Set;
    }
    signs.resets |= is("reset") || is("discard");
    if is("reset") {
        return Verb::Reset;
    }
    signs.commits |= is("commit") || is("end") || is("prepare");
    signs.suspect |= ["listen", "load", "prepare", "do", "call", "discard"].into_iter().any(is);
    signs.listens |= is("start") || is("discard");
    signs.opaque |= is("load");
    signs.prepares |= is("prepare");
    signs.drops_names |= is("discard") || is("deallocate");
    signs.advances |= ["copy", "merge", "call", "do", "execute"].into_iter().any(is);
    signs.loosen |= ["drop", "close", "unlisten", "deallocate", "rollback", "commit", "end"].into_iter().any(is);
    Verb::Other
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suspects(text: &str) -> bool {
        Signs::of(text.as_bytes()).suspect
    }

    #[test]
    fn everyday_statements_raise_no_suspicion() {
        for text in [
            "SELECT 1",
            "UPDATE t SET a = 1 WHERE b = 'set'",
            "INSERT INTO template VALUES (1)",
            "BEGIN; UPDATE t SET temp = 2; COMMIT",
            "SET LOCAL work_mem = '1MB'",
            "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
            "/* set */ SELECT pg_advisory_xact_lock(1)",
            "-- set x\nselect 1;",
            "DECLARE c CURSOR WITHOUT HOLD FOR SELECT 1",
            "",
            ";;;",
        ] {
            assert!(!suspects(text), "{text}");
        }
    }

    #[test]
    fn what_may_leave_state_is_suspected_in_any_spelling() {
        for text in [
            "SET work_mem = '1MB'",
            "  set session Search_Path to x",
            "/* app */ SET a = 1",
            "-- c\nSET a = 1",
            "-- c\rSET a = 1",
            "/* a /* b */ select */ SET x = 1",
            "SET\"search_path\"TO x",
            "\0SET a = 1",
            "select 1 into local temp t",
            "SELECT 1; SET a = 1",
            "BEGIN;set a=1;COMMIT",
            "RESET ALL",
            "SELECT pg_try_advisory_lock(1)",
            "SELECT  Set_Config('TimeZone', 'UTC', false)",
            "DECLARE c CURSOR\nWITH  HOLD FOR SELECT 1",
            "CREATE\n TEMPORARY TABLE t ()",
            "SELECT 1 INTO TEMP t",
            "create or replace temp view v as select 1",
            "LISTEN x",
            "DO $$ begin end $$",
            "PREPARE p AS SELECT 1",
            "DISCARD ALL",
            "LOAD 'x'",
        ] {
            assert!(suspects(text), "{text}");
        }
    }

    #[test]
    fn pieces_give_the_same_as_the_whole() {
        for text in [
            "SELECT 1; /* x */ SET app.user = '1'",
            "select set_config( 'App.tenant' , 'x', false)",
            "create   temp table x()",
        ] {
            let whole = Signs::of(text.as_bytes());
            let mut scan = Scan::default();
            let mut signs = Signs::default();
            for byte in text.as_bytes() {
                scan.feed(std::slice::from_ref(byte), &mut signs);
            }
            scan.finish(&mut signs);
            assert_eq!(signs, whole, "{text}");
            assert!(whole.suspect);
        }
    }

    #[test]
    fn any_text_gives_the_same_in_any_pieces() {
        const PARTS: [&str; 28] = [
            "select",
            "SELECT ",
            "update ",
            "delete",
            "set ",
            "reset ",
            "session ",
            "app.x ",
            " ",
            "\n",
            ";",
            "; ",
            "(",
            "/*",
            "*/",
            "--",
            "'",
            "set_config",
            "('a.b', ",
            "do ",
            "execute ",
            "create ",
            "temp ",
            "as ",
            "insert into ",
            "lastval(",
            "\"",
            "x",
        ];
        let of = |pieces: &[&[u8]]| {
            let (mut scan, mut signs) = (Scan::default(), Signs::default());
            pieces.iter().for_each(|piece| scan.feed(piece, &mut signs));
            scan.finish(&mut signs);
            signs
        };
        let mut number: u64 = 1;
        for _ in 0..20_000 {
            let text: String = (0..9)
                .map(|_| {
                    number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    PARTS[(number >> 33) as usize % PARTS.len()]
                })
                .collect();
            let bytes: Vec<&[u8]> = text.as_bytes().chunks(1).collect();
            let (first, last) = text.as_bytes().split_at((number >> 40) as usize % text.len());
            let each = of(&bytes);
            assert_eq!(of(&[text.as_bytes()]), each, "{text}");
            assert_eq!(of(&[first, last]), each, "{text}");
        }
    }

    #[test]
    fn custom_settings_are_named_or_opaque() {
        assert_eq!(Signs::of(b"SET app.user = 'x'").custom, ["app.user"]);
        assert_eq!(Signs::of(b"SET SESSION \"App\".user = 'x'").custom, ["app.user"]);
        assert_eq!(Signs::of(b"select set_config('a.b', 'x', false)").custom, ["a.b"]);
        assert!(Signs::of(b"select set_config('TimeZone', 'x', false)").custom.is_empty());
        assert!(Signs::of(b"select set_config($1, $2, false)").opaque);
        assert!(!Signs::of(b"select set_config('a.b', 'x', false)").opaque);
        assert!(Signs::of(b"load 'x'").opaque);
    }

    #[test]
    fn what_looks_like_a_comment_inside_a_string_hides_nothing() {
        for text in [
            "INSERT INTO t VALUES ('a; -- b'); SET search_path = x",
            "INSERT INTO t VALUES ('a; /* b'); SET search_path = x",
            "SELECT 'it''s; --'; RESET ALL",
            "SELECT $$; /* $$; LISTEN x",
        ] {
            assert!(suspects(text), "{text}");
        }
        assert_eq!(Signs::of(b"SELECT 1; /* SET a */ SET app.user = 'x'").custom, ["app.user"]);
        assert_eq!(Signs::of(b"INSERT INTO t VALUES ('; --'); SET app.user = 'x'").custom, ["app.user"]);
    }

    #[test]
    fn a_comment_may_stand_for_a_blank() {
        for text in [
            "CREATE/**/TEMP TABLE t ()",
            "CREATE TEMP/**/TABLE t ()",
            "CREATE -- a\n TEMPORARY TABLE t ()",
            "DECLARE c CURSOR WITH/* x */HOLD FOR SELECT 1",
        ] {
            assert!(suspects(text), "{text}");
        }
        assert!(!suspects("SELECT 1 /* route='/shop' */") && !suspects("SELECT name FROM template"));
    }

    #[test]
    fn settings_made_in_a_do_block_are_named_or_opaque() {
        assert_eq!(Signs::of(b"DO $$ BEGIN SET app.x = '1'; END $$").custom, ["app.x"]);
        assert_eq!(Signs::of(b"DO $$ BEGIN EXECUTE 'SET app.x = 1'; END $$").custom, ["app.x"]);
        assert!(Signs::of(b"DO $$ BEGIN EXECUTE 'SET ' || name || ' = 1'; END $$").opaque);
        assert!(!Signs::of(b"DO $$ BEGIN UPDATE t SET a = 1; END $$").opaque);
    }

    #[test]
    fn sequences_and_seeds_are_seen() {
        let of = |text: &str| {
            let signs = Signs::of(text.as_bytes());
            (signs.sequences, signs.advances, signs.seeds)
        };
        assert_eq!(of("SELECT lastval()"), (true, false, false));
        assert_eq!(of("select nextval('s'), CURRVAL('s')"), (true, true, false));
        assert_eq!(of("WITH a AS (INSERT  INTO t VALUES (1)) SELECT lastval()"), (true, true, false));
        assert_eq!(of("INSERT INTO t DEFAULT VALUES; SELECT lastval()"), (true, true, false));
        assert_eq!(of("SELECT 1 AS lastval, 'currval'"), (false, false, false));
        assert!(!of("CREATE VIEW w AS SELECT currval('s')").0 && !of("ALTER TABLE t ALTER n SET DEFAULT lastval()").0);
        assert_eq!(of("SELECT setseed(0.5)"), (false, false, true));
        assert_eq!(of("SET SESSION seed TO 0.5"), (false, false, true));
        assert_eq!(of("SELECT seed FROM plants"), (false, false, false));
    }

    #[test]
    fn what_stands_in_a_string_pins_nobody() {
        let of = |text: &str| {
            let signs = Signs::of(text.as_bytes());
            (signs.seeds, signs.opaque, signs.hints)
        };
        for text in [
            "INSERT INTO t VALUES ('how does setseed(1) work?')",
            "INSERT INTO t VALUES ('a; SET seed TO 1')",
            "SELECT 1 FROM pg_proc WHERE proname = 'set_config'",
            "SELECT set_config('app.x', 'setseed', true), 'dblink_connect'",
            "SELECT f('select setseed(0.5)')",
        ] {
            assert_eq!(of(text), (false, false, true), "{text}");
        }
        for text in ["SELECT setseed(0.5), 'x'", "SELECT 'x' -- don't\n, setseed(0.5)", "SELECT $$'$$, setseed(1), ''"]
        {
            assert!(of(text).0, "{text}");
        }
        // What may run its strings, and where nobody can say what is one.
        for text in [
            "DO 'BEGIN PERFORM setseed(1); END'",
            "SELECT 1; CREATE FUNCTION f() RETURNS void LANGUAGE sql AS 'SELECT setseed(1)'",
            r"SELECT '\', setseed(1), '",
        ] {
            assert!(of(text).0, "{text}");
        }
        assert!(of("SELECT set_config($1, $2, false), 'x'").1);
    }

    #[test]
    fn what_may_touch_a_listener_is_seen() {
        let listens = |text: &str| Signs::of(text.as_bytes()).listens;
        for text in [
            "LISTEN x",
            "/* c */ unlisten *",
            "DISCARD ALL",
            "BEGIN",
            "start transaction",
            "SELECT pg_notify('a', 'b')",
            "SELECT 1; NOTIFY x",
            "SELECT * FROM pg_listening_channels()",
            "DO $$ BEGIN EXECUTE 'LISTEN x'; END $$",
        ] {
            assert!(listens(text), "{text}");
        }
        for text in ["SELECT 1", "COMMIT", "UPDATE t SET n = 1", "INSERT INTO t VALUES ('begin')"] {
            assert!(!listens(text), "{text}");
        }
    }

    #[test]
    fn the_end_of_a_transaction_is_seen() {
        assert!(Signs::of(b"COMMIT").commits && Signs::of(b"select 1; end").commits);
        assert!(!Signs::of(b"ROLLBACK").commits && !Signs::of(b"SELECT 'commit'").commits);
    }
}
