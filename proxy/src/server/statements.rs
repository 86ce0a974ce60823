//! Protocol-level prepared statements: one shared text per (query, types, planning settings), and which of them a server
//! connection holds.
//!
//! A statement's server name comes from its number, so any session of the pool finds it on any connection. Numbers are
//! never used again. What always holds: a connection's set is what PostgreSQL has there, less what is still being sent.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    num::NonZeroUsize,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;
use tenantry_wire::{extended::Parse, message};

use super::signs::Signs;
use crate::net::memory::{Held, Memory};

/// One text that any number of clients prepared under names of their own.
#[derive(Debug)]
pub struct Statement {
    pub id: u64,
    /// Its name on every server connection.
    pub name: Box<[u8]>,
    query: Bytes,
    types: Bytes,
    /// What running it may leave behind.
    pub signs: Signs,
    /// Its columns, as a client was told of them; 0 before that.
    columns: AtomicU64,
    /// The pool's count of what made plans stale when its columns were last known to be the same.
    verified: AtomicU32,
    /// Its columns are others than a client was told.
    changed: AtomicBool,
    _held: Held,
}

/// How a statement's columns stand to what a client was told of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Columns {
    /// Nobody was told, or nothing has happened since.
    Same,
    /// Tables were changed since: PostgreSQL must be asked.
    Unknown,
    /// PostgreSQL's "cached plan must not change result type".
    Changed,
}

impl Statement {
    /// The Parse that prepares it, under whichever name `write_as` is given.
    #[must_use]
    pub fn parse(&self) -> Parse<'_> {
        Parse { name: &self.name, query: &self.query, types: &self.types }
    }

    /// Bytes of its text and types.
    #[must_use]
    pub fn size(&self) -> usize {
        self.query.len().saturating_add(self.types.len())
    }

    #[must_use]
    pub fn columns(&self, plans: u32) -> Columns {
        if self.changed.load(Ordering::Relaxed) {
            Columns::Changed
        } else if self.knows_columns() && self.verified.load(Ordering::Relaxed) != plans {
            Columns::Unknown
        } else {
            Columns::Same
        }
    }

    #[must_use]
    pub fn knows_columns(&self) -> bool {
        self.columns.load(Ordering::Relaxed) != 0
    }

    /// PostgreSQL told its columns: the body of a RowDescription, empty for NoData.
    pub fn described(&self, body: &[u8], plans: u32) {
        if self.signs.named.is_some() {
            // An EXECUTE has the columns of what its name stands for when it is parsed, and PostgreSQL does not look again.
            return;
        }
        let columns = hash_of_columns(body);
        let known = self.columns.load(Ordering::Relaxed);
        if known == 0 {
            self.columns.store(columns, Ordering::Relaxed);
        } else if known == columns {
            self.verified.store(plans, Ordering::Relaxed);
        } else {
            self.changed.store(true, Ordering::Relaxed);
        }
    }
}

/// Names, types and their modifiers: by which a client reads rows. Never 0.
fn hash_of_columns(body: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for column in message::columns(body) {
        column.hash(&mut hasher);
    }
    hasher.finish() | 1
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    query: Bytes,
    types: Bytes,
    planning: u64,
}

/// The statements of one pool; each lives as long as a client names it or a connection has it.
#[derive(Debug, Default)]
pub struct StatementTable {
    by_text: Mutex<HashMap<Key, Weak<Statement>>>,
    next: AtomicU64,
}

/// What a statement takes beside its text, about.
const OVERHEAD: usize = 256;
/// The table is swept of dead entries each time it has doubled beyond this.
const SWEEP_AT: usize = 256;

impl StatementTable {
    /// The shared statement for this text, made if there is none; `None` if there is no memory for it.
    /// `plans`: the pool's count of what made plans stale; one that was made before is as good as none.
    pub fn intern(&self, parse: &Parse<'_>, planning: u64, plans: u32, memory: &Arc<Memory>) -> Option<Arc<Statement>> {
        let key =
            Key { query: Bytes::copy_from_slice(parse.query), types: Bytes::copy_from_slice(parse.types), planning };
        let mut table = self.by_text.lock();
        let found = table.get(&key).and_then(Weak::upgrade);
        if let Some(found) = found.filter(|s| s.columns(plans) == Columns::Same) {
            return Some(found);
        }
        if table.len() >= SWEEP_AT && table.len() == table.capacity() {
            table.retain(|_, statement| statement.strong_count() > 0);
        }
        let held = memory.take(OVERHEAD + parse.query.len() + parse.types.len())?;
        let id = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let name = format!("tenantry_{id}").into_bytes().into_boxed_slice();
        let signs = Signs::of(parse.query);
        let statement = Arc::new(Statement {
            id,
            name,
            query: key.query.clone(),
            types: key.types.clone(),
            signs,
            columns: AtomicU64::new(0),
            verified: AtomicU32::new(plans),
            changed: AtomicBool::new(false),
            _held: held,
        });
        table.insert(key, Arc::downgrade(&statement));
        Some(statement)
    }
}

/// A longer text lives only as long as a client names it: what connections hold is taken from the memory of all clients.
const MAX_KEPT: usize = 4 * 1024;

/// What one server connection has prepared, most recently used first.
#[derive(Debug)]
pub struct Prepared {
    /// Small ones are held, so that who prepares the same text finds it, whether or not anybody names it meanwhile.
    shared: LruCache<u64, Option<Arc<Statement>>>,
    /// The look that is prepared there, and its name.
    look: Option<(u32, Box<[u8]>)>,
    /// How many names of looks were used.
    looks: u32,
}

impl Prepared {
    #[must_use]
    pub fn new(limit: u32) -> Self {
        let limit = usize::try_from(limit).ok().and_then(NonZeroUsize::new).unwrap_or(NonZeroUsize::MIN);
        let mut shared = LruCache::unbounded();
        shared.resize(limit);
        Self { shared, look: None, looks: 0 }
    }

    /// Whether the statement is there; counts as a use.
    pub fn touch(&mut self, id: u64) -> bool {
        self.shared.get(&id).is_some()
    }

    /// Takes it in; what had to go for it must be closed on the server, before its Parse is sent. `statement`: unless only
    /// its number is known.
    pub fn insert(&mut self, id: u64, statement: Option<Arc<Statement>>) -> Option<u64> {
        let small = statement.filter(|statement| statement.query.len() <= MAX_KEPT);
        self.shared.push(id, small).map(|(old, _)| old).filter(|old| *old != id)
    }

    /// Memory is short: from now on only those live that somebody names.
    pub fn hold_none(&mut self) {
        self.shared.iter_mut().for_each(|(_, statement)| *statement = None);
    }

    pub fn remove(&mut self, id: u64) {
        self.shared.pop(&id);
    }

    pub fn clear(&mut self) {
        self.shared.clear();
        self.look = None;
    }

    /// The look that is there: whose, and its name.
    #[must_use]
    pub fn look(&self) -> Option<(u32, &[u8])> {
        self.look.as_ref().map(|(id, name)| (*id, &**name))
    }

    /// A look is prepared, under a name that was not used before: one that failed may be there, or not.
    pub fn prepare_look(&mut self, id: u32) {
        self.looks = self.looks.wrapping_add(1);
        self.look = Some((id, format!("tenantry_look_{}", self.looks).into_bytes().into()));
    }

    pub fn forget_look(&mut self) {
        self.look = None;
    }

    /// All of them, by number.
    pub fn ids(&self) -> impl Iterator<Item = u64> {
        self.shared.iter().map(|(id, _)| *id)
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.shared.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shared.is_empty()
    }
}

/// The server name of a statement that is only known by its number (an evicted one).
#[must_use]
pub fn name_of(id: u64) -> Vec<u8> {
    format!("tenantry_{id}").into_bytes()
}

/// The number of the statement that has this server name, if it is one.
#[must_use]
pub fn id_of(name: &[u8]) -> Option<u64> {
    let id = std::str::from_utf8(name.strip_prefix(b"tenantry_")?).ok()?.parse().ok()?;
    // Not so of `tenantry_01`.
    (name_of(id) == name).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARSE: Parse<'static> = Parse { name: b"", query: b"select 1", types: b"\0\0" };

    #[test]
    fn the_same_text_is_shared_unless_planning_settings_differ() {
        let (table, memory) = (StatementTable::default(), Arc::new(Memory::new(1 << 20)));
        let intern = |planning| table.intern(&PARSE, planning, 0, &memory).unwrap();
        let one = intern(0);
        assert_eq!(one.id, intern(0).id);
        assert_ne!(one.id, intern(1).id);
        assert_eq!(&one.name[..], &name_of(one.id)[..]);
    }

    #[test]
    fn a_statement_nobody_names_is_forgotten() {
        let (table, memory) = (StatementTable::default(), Arc::new(Memory::new(1 << 20)));
        let intern = |planning| table.intern(&PARSE, planning, 0, &memory).unwrap().id;
        let first = intern(0);
        assert_ne!(first, intern(0), "a number is never used again");
        for n in 0..10_000u64 {
            intern(n);
        }
        assert_eq!(memory.held(), 0);
        assert!(table.by_text.lock().len() < 2 * SWEEP_AT * 4, "dead entries are swept");
    }

    #[test]
    fn texts_take_from_the_memory_of_all_clients() {
        let (table, memory) = (StatementTable::default(), Arc::new(Memory::new(300)));
        let held = table.intern(&PARSE, 0, 0, &memory).unwrap();
        assert!(table.intern(&PARSE, 1, 0, &memory).is_none());
        drop(held);
        assert!(table.intern(&PARSE, 1, 0, &memory).is_some());
    }

    #[test]
    fn columns_are_asked_for_again_when_tables_changed_and_never_change_unseen() {
        let (table, memory) = (StatementTable::default(), Arc::new(Memory::new(1 << 20)));
        let intern = |plans| table.intern(&PARSE, 0, plans, &memory).unwrap();
        let column = |name: &[u8], kind: u8| [&[0, 1][..], name, &[0; 9], &[kind], &[0; 8]].concat();
        let one = intern(0);
        assert_eq!(one.columns(7), Columns::Same, "nobody was told of any");
        one.described(&column(b"a\0", 23), 0);
        assert_eq!((one.columns(0), one.columns(1)), (Columns::Same, Columns::Unknown));
        assert_ne!(one.id, intern(1).id, "who comes later has nothing to do with what was told before");
        one.described(&column(b"a\0", 23), 1);
        assert_eq!(one.columns(1), Columns::Same);
        one.described(&column(b"a\0", 20), 2);
        assert_eq!(one.columns(2), Columns::Changed);
    }

    #[test]
    fn a_statement_that_a_connection_has_is_found_again_unless_memory_is_short() {
        let (table, memory) = (StatementTable::default(), Arc::new(Memory::new(1 << 20)));
        let intern = || table.intern(&PARSE, 0, 0, &memory).unwrap();
        let mut prepared = Prepared::new(2);
        let first = intern().id;
        let statement = intern();
        let second = statement.id;
        assert_ne!(first, second);
        prepared.insert(second, Some(statement));
        assert_eq!(intern().id, second);
        prepared.hold_none();
        assert!(prepared.touch(second));
        assert_ne!(intern().id, second);
    }

    #[test]
    fn the_least_recently_used_goes() {
        let mut prepared = Prepared::new(2);
        assert_eq!(prepared.insert(1, None), None);
        assert_eq!(prepared.insert(2, None), None);
        assert!(prepared.touch(1));
        assert_eq!(prepared.insert(3, None), Some(2));
        assert_eq!(prepared.insert(3, None), None);
        assert!(!prepared.touch(2) && prepared.len() == 2);
    }
}
