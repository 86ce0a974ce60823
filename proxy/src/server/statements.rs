//! Protocol-level prepared statements: one shared text per (query, types, planning settings), and which of them a server
//! connection holds.
//!
//! A statement's server name comes from its number, so any session of the pool finds it on any connection. Numbers are
//! never used again. What always holds: a connection's set is what PostgreSQL has there, less what is still being sent.

use std::{
    collections::HashMap,
    num::NonZeroUsize,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;
use tenantry_wire::extended::Parse;

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
    _held: Held,
}

impl Statement {
    /// The Parse that prepares it, under whichever name `write_as` is given.
    #[must_use]
    pub fn parse(&self) -> Parse<'_> {
        Parse { name: &self.name, query: &self.query, types: &self.types }
    }
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    query: Bytes,
    types: Bytes,
    planning: u64,
}

/// The statements that clients of one pool hold; each lives as long as somebody names it.
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
    pub fn intern(&self, parse: &Parse<'_>, planning: u64, memory: &Arc<Memory>) -> Option<Arc<Statement>> {
        let key =
            Key { query: Bytes::copy_from_slice(parse.query), types: Bytes::copy_from_slice(parse.types), planning };
        let mut table = self.by_text.lock();
        if let Some(found) = table.get(&key).and_then(Weak::upgrade) {
            return Some(found);
        }
        if table.len() >= SWEEP_AT && table.len() == table.capacity() {
            table.retain(|_, statement| statement.strong_count() > 0);
        }
        let held = memory.take(OVERHEAD + parse.query.len() + parse.types.len())?;
        let id = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let name = format!("tenantry_{id}").into_bytes().into_boxed_slice();
        let signs = Signs::of(parse.query);
        let statement =
            Arc::new(Statement { id, name, query: key.query.clone(), types: key.types.clone(), signs, _held: held });
        table.insert(key, Arc::downgrade(&statement));
        Some(statement)
    }
}

/// What one server connection has prepared, most recently used first.
#[derive(Debug)]
pub struct Prepared(LruCache<u64, ()>);

impl Prepared {
    #[must_use]
    pub fn new(limit: u32) -> Self {
        let limit = usize::try_from(limit).ok().and_then(NonZeroUsize::new).unwrap_or(NonZeroUsize::MIN);
        let mut cache = LruCache::unbounded();
        cache.resize(limit);
        Self(cache)
    }

    /// Whether the statement is there; counts as a use.
    pub fn touch(&mut self, id: u64) -> bool {
        self.0.get(&id).is_some()
    }

    /// Takes it in; what had to go for it must be closed on the server, before its Parse is sent.
    pub fn insert(&mut self, id: u64) -> Option<u64> {
        self.0.push(id, ()).map(|(old, ())| old).filter(|old| *old != id)
    }

    pub fn remove(&mut self, id: u64) {
        self.0.pop(&id);
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The server name of a statement that is only known by its number (an evicted one).
#[must_use]
pub fn name_of(id: u64) -> Vec<u8> {
    format!("tenantry_{id}").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARSE: Parse<'static> = Parse { name: b"", query: b"select 1", types: b"\0\0" };

    #[test]
    fn the_same_text_is_shared_unless_planning_settings_differ() {
        let (table, memory) = (StatementTable::default(), Arc::new(Memory::new(1 << 20)));
        let intern = |planning| table.intern(&PARSE, planning, &memory).unwrap();
        let one = intern(0);
        assert_eq!(one.id, intern(0).id);
        assert_ne!(one.id, intern(1).id);
        assert_eq!(&one.name[..], &name_of(one.id)[..]);
    }

    #[test]
    fn a_statement_nobody_names_is_forgotten() {
        let (table, memory) = (StatementTable::default(), Arc::new(Memory::new(1 << 20)));
        let intern = |planning| table.intern(&PARSE, planning, &memory).unwrap().id;
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
        let held = table.intern(&PARSE, 0, &memory).unwrap();
        assert!(table.intern(&PARSE, 1, &memory).is_none());
        drop(held);
        assert!(table.intern(&PARSE, 1, &memory).is_some());
    }

    #[test]
    fn the_least_recently_used_goes() {
        let mut prepared = Prepared::new(2);
        assert_eq!(prepared.insert(1), None);
        assert_eq!(prepared.insert(2), None);
        assert!(prepared.touch(1));
        assert_eq!(prepared.insert(3), Some(2));
        assert_eq!(prepared.insert(3), None);
        assert!(!prepared.touch(2) && prepared.len() == 2);
    }
}
