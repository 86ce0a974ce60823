//! One client's statement names, and its unnamed statement.
//!
//! Names are the client's own: two clients may use the same name for different texts. Pure.

use std::{collections::HashSet, sync::Arc};

use bytes::Bytes;
use foldhash::{HashMap, HashMapExt};

use crate::{
    net::memory::{Held, Memory},
    server::{signs::Signs, statements::Statement},
};

/// Most names that one client may hold; past it a Parse is answered with 54000.
pub const MAX_NAMES: usize = 65_536;
/// Memory for names is taken for so many at once; any client may have the first of them.
const LUMP: usize = 256;
/// What a name takes at most, with its place in the table (`named::known_by` bounds it).
const NAME: usize = 256;
/// A longer unnamed Parse is not remembered: its Bind must come on the same server connection.
pub const MAX_UNNAMED: usize = 64 * 1024;

/// What a name stands for.
#[derive(Debug)]
struct Named {
    statement: Arc<Statement>,
    /// Which of the names it is, in the order in which they were given.
    place: u64,
}

#[derive(Debug, Default)]
pub struct Names {
    /// A shared unnamed statement stands here too, under no name.
    names: HashMap<Box<[u8]>, Named>,
    /// How many names were given.
    given: u64,
    /// How often the names became others.
    changes: u64,
    /// The last unnamed Parse as it was sent, to be sent again where another server connection needs it.
    unnamed: Option<Bytes>,
    /// Which of the client's unnamed statements the present one is; `None` while it has none.
    number: Option<u64>,
    /// Of the last one.
    last_number: u64,
    /// What running it may leave behind; known also when it is too large to be kept.
    pub unnamed_signs: Signs,
    /// For names beyond the first `LUMP`, one for each `LUMP` of them.
    held: Vec<Held>,
}

impl Names {
    #[must_use]
    pub fn get(&self, name: &[u8]) -> Option<&Arc<Statement>> {
        self.names.get(name).map(|named| &named.statement)
    }

    /// Whether there is memory for one name more, which is taken from that of all clients.
    pub fn has_room(&mut self, memory: &Arc<Memory>) -> bool {
        if self.names.len() < self.held.len().saturating_add(1).saturating_mul(LUMP) {
            return true;
        }
        let held = memory.take(LUMP.saturating_mul(NAME));
        let is_enough = held.is_some();
        self.held.extend(held);
        is_enough
    }

    pub fn insert(&mut self, name: &[u8], statement: Arc<Statement>) {
        self.given = self.given.wrapping_add(1);
        self.changes = self.changes.wrapping_add(1);
        self.names.insert(name.into(), Named { statement, place: self.given });
    }

    pub fn remove(&mut self, name: &[u8]) -> Option<Arc<Statement>> {
        self.changes = self.changes.wrapping_add(1);
        self.names.remove(name).map(|named| named.statement)
    }

    /// How often they became others: what was made of all of them holds as long as this is the same.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// All of them, in the order in which they were given.
    #[must_use]
    pub fn all(&self) -> Vec<(Box<[u8]>, Arc<Statement>)> {
        let mut all: Vec<_> = self.names.iter().collect();
        all.sort_unstable_by_key(|(_, named)| named.place);
        all.into_iter().map(|(name, named)| (name.clone(), Arc::clone(&named.statement))).collect()
    }

    /// DISCARD ALL and DEALLOCATE ALL: only these names stay, which were prepared later; as the unnamed statement, if it was.
    pub fn keep(&mut self, later: &HashSet<Box<[u8]>>, unnamed: bool) {
        self.changes = self.changes.wrapping_add(1);
        if later.is_empty() {
            (self.names, self.held) = (HashMap::new(), Vec::new());
        } else {
            self.names.retain(|name, _| later.contains(name));
        }
        if !unnamed {
            (self.unnamed, self.number) = (None, None);
        }
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.names.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    #[must_use]
    pub fn unnamed(&self) -> Option<&Bytes> {
        self.unnamed.as_ref()
    }

    /// `None` while the client has none.
    #[must_use]
    pub fn unnamed_number(&self) -> Option<u64> {
        self.number
    }

    /// The client has another one; `None` for one that is too large to be kept.
    pub fn replace_unnamed(&mut self, message: Option<Bytes>) {
        self.drop_unnamed();
        self.unnamed = message;
        self.last_number = self.last_number.wrapping_add(1);
        self.number = Some(self.last_number);
    }

    /// The client has none any more.
    pub fn drop_unnamed(&mut self) {
        self.unnamed = None;
        self.number = None;
        if !self.names.is_empty() {
            self.names.remove(&b""[..]);
        }
    }
}
