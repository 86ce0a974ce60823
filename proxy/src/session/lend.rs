//! SQL that speaks of names which the client gave in the protocol: EXECUTE, DEALLOCATE, PREPARE, `pg_prepared_statements`.
//!
//! In PostgreSQL both kinds of prepared statements share one set of names. Here the client's names are its own and the
//! server's are others; so where SQL uses such a name, the statement is lent to the connection under it for as long as the
//! transaction lasts, and PostgreSQL itself says what comes of it. Such a request begins when everything before it is
//! answered, so that the books are true.
//!
//! What always holds: whatever is lent stands in the books, and is taken off the connection before that is given back; a
//! lent name that is the client's no more is taken off before anything can ask for it.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
};

use tenantry_config::PoolMode;
use tenantry_wire::{
    extended::{self, Parse},
    frame::FrameError,
    message,
    tag::{frontend, status},
};

use super::{
    errors,
    owed::{For, Kind, Undo},
    relay::{End, Session},
    run::Run,
};
use crate::{
    net::memory::Held,
    pool::lease::Lease,
    server::{
        named::{Named, NamedUse},
        signs::{Asks, Signs},
        statements::{self, Statement},
    },
};

/// The client's names on the connection.
#[derive(Debug, Default)]
pub(super) struct Lent {
    names: HashMap<Box<[u8]>, Stands>,
    /// Those for which a DEALLOCATE was run. If it was for another one, after all, it must not stay for the next client.
    doubtful: HashSet<Box<[u8]>>,
    /// For what was written to put them there.
    held: Vec<Held>,
    /// All of the client's names stand there and no others, if that is still their `Names::changes`.
    shown: Option<u64>,
}

impl Lent {
    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty() && self.doubtful.is_empty()
    }

    /// Out of the books.
    pub(super) fn take(&mut self, name: &[u8]) -> Option<(Box<[u8]>, Stands)> {
        if self.names.is_empty() {
            return None;
        }
        self.shown = None;
        self.names.remove_entry(name)
    }
}

/// What stands under the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stands {
    /// An empty statement: only the name counts.
    Empty,
    /// The shared statement with this number.
    Statement(u64),
}

/// What came of a wish to see which names there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shown {
    Yes,
    /// Nobody else's, but in a failed transaction nothing can be prepared.
    NotAll,
    OutOfMemory,
}

impl Session {
    // What a request needs.

    /// The statements of a simple query that speak of names, if one of those is the client's or is lent.
    pub(super) fn named_in(&self, text: &[u8], is_whole: bool) -> Vec<Named> {
        if self.names.is_empty() && self.lent.is_empty() {
            return Vec::new();
        }
        let text = if is_whole { text } else { Named::without_broken_end(text) };
        let all: Vec<_> = Named::all(text).collect();
        if all.iter().any(|named| self.knows(named)) { all } else { Vec::new() }
    }

    /// The statement that an EXECUTE runs, if this is one and the client has given its name.
    pub(super) fn executed_by(&self, text: &[u8]) -> Option<Named> {
        if self.names.is_empty() {
            return None;
        }
        let named = Named::of(text)?;
        (named.verb == NamedUse::Execute && self.names.get(&named.name).is_some()).then_some(named)
    }

    pub(super) fn knows(&self, named: &Named) -> bool {
        self.names.get(&named.name).is_some() || self.lent.names.contains_key(named.name.as_slice())
    }

    /// What a statement asks for, by itself and by what it runs with EXECUTE.
    pub(super) fn asks_of(&self, signs: &Signs) -> Asks {
        let mut asks = signs.asks();
        if let Some(named) = signs.named.as_deref().filter(|named| self.knows(named)) {
            self.add_asks(named, &mut asks);
        }
        asks
    }

    pub(super) fn add_asks(&self, named: &Named, asks: &mut Asks) {
        asks.speaks_of_names = true;
        if named.verb == NamedUse::Execute
            && let Some(statement) = self.names.get(&named.name)
        {
            asks.add(&statement.signs);
        }
    }

    /// Makes sure that the name means on this connection what it means to the client. DEALLOCATE takes it away from
    /// the client when PostgreSQL has done so (`deallocated`).
    pub(super) fn lend(&mut self, named: &Named, run: &mut Run<'_>) -> Result<(), End> {
        let Some(statement) = self.names.get(&named.name).cloned() else { return self.unlend(&named.name, run) };
        if named.verb != NamedUse::Execute {
            return self.occupy(&named.name, run);
        }
        self.signs.merge(&statement.signs);
        if self.owed.status() == status::FAILED {
            // PostgreSQL refuses to run it as it would refuse to prepare it; but a ROLLBACK before it in the text is run.
            return Ok(());
        }
        self.lend_statement(&named.name, &statement, run)
    }

    /// The same for a statement that may be one of SQL about names.
    pub(super) fn lend_to(&mut self, named: Option<&Named>, run: &mut Run<'_>) -> Result<(), End> {
        match named.filter(|named| self.knows(named)) {
            Some(named) => self.lend(named, run),
            None => Ok(()),
        }
    }

    /// The same for all of a simple query. False if there is no memory for it.
    pub(super) fn lend_all(&mut self, all: &[Named], run: &mut Run<'_>) -> Result<bool, End> {
        let run_by_name: HashMap<_, _> = all
            .iter()
            .filter(|named| named.verb == NamedUse::Execute)
            .filter_map(|named| Some((named.name.as_slice(), self.names.get(&named.name)?)))
            .filter(|(name, statement)| !self.is_lent(name, statement))
            .collect();
        let size = run_by_name.values().map(|statement| statement.size()).sum();
        if !self.hold_for_names(size) {
            return Ok(false);
        }
        for named in all {
            self.lend(named, run)?;
        }
        Ok(true)
    }

    /// The names that a simple query takes away, as far as it comes; `None` for those that the client has not given.
    pub(super) fn deallocated_by(&self, all: &[Named]) -> Option<Box<Undo>> {
        let known = |named: &Named| self.names.get(&named.name).map(|_| named.name.as_slice().into());
        let names: VecDeque<Option<Box<[u8]>>> =
            all.iter().filter(|named| named.verb == NamedUse::Deallocate).map(known).collect();
        names.iter().any(Option::is_some).then(|| Box::new(Undo::Deallocates(names)))
    }

    /// PostgreSQL says that it has run a DEALLOCATE.
    pub(super) fn deallocated(&mut self) {
        if let Some(name) = self.owed.take_deallocated() {
            self.names.remove(&name);
            if let Some((name, _)) = self.lent.take(&name) {
                self.lent.doubtful.insert(name);
            }
        }
    }

    /// Takes from the memory of all clients what is written for names until the transaction is over. False if there is too
    /// little: one short text may have any number of names, each of a long one.
    fn hold_for_names(&mut self, size: usize) -> bool {
        if size == 0 {
            return true;
        }
        let held = self.limits.memory.take(size);
        let is_enough = held.is_some();
        self.lent.held.extend(held);
        is_enough
    }

    // What stands on the connection.

    /// What comes next asks PostgreSQL which names there are: makes them the client's own, and no others. The unnamed
    /// statement is none of them.
    pub(super) fn show_names(&mut self, run: &mut Run<'_>) -> Result<Shown, End> {
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
        let has_shared = !conn.prepared.is_empty() || conn.prepared.look().is_some();
        if !has_shared && self.lent.shown == Some(self.names.changes()) {
            return Ok(Shown::Yes);
        }
        let is_failed = self.owed.status() == status::FAILED;
        let mut names = if is_failed { Vec::new() } else { self.names.all() };
        names.retain(|(name, statement)| !name.is_empty() && !self.is_lent(name, statement));
        let size = names.iter().map(|(name, statement)| name.len().saturating_add(statement.size())).sum();
        if !self.hold_for_names(size) {
            return Ok(Shown::OutOfMemory);
        }
        run.cut(&mut self.to_server.buf, 0);
        if has_shared {
            self.close_shared()?;
        }
        let known = &self.names;
        let gone: Vec<_> = self.lent.names.extract_if(|name, _| known.get(name).is_none()).collect();
        for (name, stood) in gone {
            self.close_lent(name, stood)?;
        }
        for (name, statement) in names {
            self.lend_statement(&name, &statement, run)?;
        }
        if is_failed {
            return Ok(Shown::NotAll);
        }
        self.lent.shown = Some(self.names.changes());
        Ok(Shown::Yes)
    }

    /// Takes the shared statements and the look off the connection.
    fn close_shared(&mut self) -> Result<(), End> {
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
        let shared: Vec<u64> = conn.prepared.ids().collect();
        let look = conn.prepared.look().map(|(_, name)| name.to_vec());
        conn.prepared.clear();
        for id in shared {
            self.close_on_server(&statements::name_of(id), Undo::Evicted(id))?;
        }
        look.map_or(Ok(()), |look| self.close_on_server(&look, Undo::Stray))
    }

    fn is_lent(&self, name: &[u8], statement: &Statement) -> bool {
        self.lent.names.get(name) == Some(&Stands::Statement(statement.id))
    }

    /// Makes sure that the client's statement stands on the connection under the client's name for it.
    pub(super) fn lend_statement(
        &mut self,
        name: &[u8],
        statement: &Arc<Statement>,
        run: &mut Run<'_>,
    ) -> Result<(), End> {
        if self.is_lent(name, statement) {
            return Ok(());
        }
        self.unlend(name, run)?;
        self.put(name, &statement.parse(), Stands::Statement(statement.id), run)
    }

    /// Makes sure that something stands under the name: whoever wants to give it once more is told by PostgreSQL.
    pub(super) fn occupy(&mut self, name: &[u8], run: &mut Run<'_>) -> Result<(), End> {
        if self.lent.names.contains_key(name) {
            return Ok(());
        }
        // A text that never fails, not even in a failed transaction.
        self.put(name, &Parse { name, query: b"", types: b"\0\0" }, Stands::Empty, run)
    }

    /// Takes the name off the connection, if it is lent.
    pub(super) fn unlend(&mut self, name: &[u8], run: &mut Run<'_>) -> Result<(), End> {
        let Some((name, stood)) = self.lent.take(name) else { return Ok(()) };
        run.cut(&mut self.to_server.buf, 0);
        self.close_lent(name, stood)
    }

    fn put(&mut self, name: &[u8], parse: &Parse<'_>, stands: Stands, run: &mut Run<'_>) -> Result<(), End> {
        run.cut(&mut self.to_server.buf, 0);
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
        if name.is_empty() {
            conn.forget_unnamed();
        }
        if let Some(id) = statements::id_of(name).filter(|id| conn.prepared.touch(*id)) {
            // A client that calls its statements as we do.
            conn.prepared.remove(id);
            self.close_on_server(name, Undo::Evicted(id))?;
        }
        let written = parse.write_as(&mut self.to_server.buf, name);
        written.map_err(|_: FrameError| End::Fatal(errors::internal()))?;
        // Whose the unnamed one is, the connection knows.
        let undo = (!name.is_empty()).then(|| Box::new(Undo::Lent(name.into())));
        if undo.is_some() {
            self.lent.names.insert(name.into(), stands);
        }
        self.owed.push(Kind::Parse, For::Us, undo);
        Ok(())
    }

    /// The name is about to be another's.
    pub(super) fn close_doubtful(&mut self, name: &[u8]) -> Result<(), End> {
        if self.lent.doubtful.remove(name) { self.close_on_server(name, Undo::Stray) } else { Ok(()) }
    }

    /// Takes a name off the connection that the books have just forgotten.
    pub(super) fn close_lent(&mut self, name: Box<[u8]>, stood: Stands) -> Result<(), End> {
        let written = extended::write_statement_target(&mut self.to_server.buf, frontend::CLOSE, &name);
        written.map_err(|_: FrameError| End::Fatal(errors::internal()))?;
        self.owed.push(Kind::Close, For::Us, Some(Box::new(Undo::Taken(name, stood))));
        Ok(())
    }

    fn close_on_server(&mut self, name: &[u8], undo: Undo) -> Result<(), End> {
        let written = extended::write_statement_target(&mut self.to_server.buf, frontend::CLOSE, name);
        written.map_err(|_: FrameError| End::Fatal(errors::internal()))?;
        self.owed.push(Kind::Close, For::Us, Some(Box::new(undo)));
        Ok(())
    }

    // What was skipped, and the end.

    /// A Close of it was skipped.
    pub(super) fn still_lent(&mut self, name: Box<[u8]>, stands: Stands) {
        self.lent.shown = None;
        self.lent.names.insert(name, stands);
    }

    /// It could not be put there: what stands there, if anything does, is the client's own.
    pub(super) fn not_lent(&mut self, name: &[u8]) {
        self.lent.take(name);
    }

    /// PostgreSQL took all names away, but for what was sent behind that.
    pub(super) fn keep_lent(&mut self, later: &HashSet<Box<[u8]>>) {
        self.lent.shown = None;
        self.lent.names.retain(|name, _| later.contains(name));
    }

    /// Takes the client's names off the connection, at the end of its transaction. True if there were any.
    pub(super) fn take_back_lent(&mut self) -> Result<bool, End> {
        if self.lent.is_empty() {
            self.lent.held = Vec::new();
            return Ok(false);
        }
        let Lent { names, mut doubtful, .. } = std::mem::take(&mut self.lent);
        if self.signs.prepares || self.pinned || self.mode == PoolMode::Session {
            // SQL may have given such a name since, to a statement that stays as long as the connection is this client's.
            self.retire |= self.mode != PoolMode::Session && !doubtful.is_empty();
            doubtful.clear();
        }
        if names.is_empty() && doubtful.is_empty() {
            return Ok(false);
        }
        for (name, stood) in names {
            self.close_lent(name, stood)?;
        }
        for name in doubtful {
            self.close_on_server(&name, Undo::Stray)?;
        }
        self.to_server.buf.extend_from_slice(message::SYNC);
        self.owed.push(Kind::Sync, For::Us, None);
        Ok(true)
    }
}
