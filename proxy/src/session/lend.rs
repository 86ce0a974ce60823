//! SQL that speaks of names which the client gave in the protocol: EXECUTE, DEALLOCATE, PREPARE, `pg_prepared_statements`.
//!
//! In PostgreSQL both kinds of prepared statements share one set of names. Here the client's names are its own and the
//! server's are others; so where SQL uses such a name, the statement is put on the connection under it for as long as the
//! transaction lasts, and PostgreSQL itself says what comes of it.
//!
//! What always holds: no connection is given back with a client's name on it.

use std::{
    collections::{HashMap, HashSet},
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
    owed::{Deallocated, For, Kind, Undo},
    relay::{End, Session},
    run::Run,
};
use crate::{
    net::memory::Held,
    pool::lease::Lease,
    server::{
        signs::{Named, NamedUse},
        statements::{self, Statement},
    },
};

/// The client's names on the connection.
#[derive(Debug, Default)]
pub(super) struct Lent {
    names: HashMap<Box<[u8]>, Stands>,
    /// For what was written to put them there.
    held: Vec<Held>,
}

impl Lent {
    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty()
    }
}

/// What stands under the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stands {
    /// DEALLOCATE was sent: nothing of ours, if it is run.
    Nothing,
    /// An empty statement: only the name counts.
    Empty,
    /// The shared statement with this number.
    Statement(u64),
}

/// What came of names in a simple query.
#[derive(Debug)]
pub(super) enum Lending {
    /// What it takes away, if it does.
    Done(Option<Box<Undo>>),
    OutOfMemory,
}

/// What came of a wish to see which names there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shown {
    Yes,
    /// It fails anyway.
    No,
    OutOfMemory,
}

impl Session {
    /// The same for each statement of a simple query.
    pub(super) fn lend_to_query(&mut self, text: &[u8], run: &mut Run<'_>) -> Result<Lending, End> {
        if self.names.is_empty() {
            return Ok(Lending::Done(None));
        }
        let all: Vec<_> = Named::all(text).filter(|named| self.names.get(&named.name).is_some()).collect();
        if all.is_empty() {
            return Ok(Lending::Done(None));
        }
        let run_by_name: HashMap<_, _> = all
            .iter()
            .filter(|named| named.verb == NamedUse::Execute)
            .filter_map(|named| Some((named.name.as_slice(), self.names.get(&named.name)?)))
            .filter(|(name, statement)| !self.is_lent(name, statement))
            .collect();
        let size = run_by_name.values().map(|statement| statement.size()).sum();
        if !self.hold_for_names(size) {
            return Ok(Lending::OutOfMemory);
        }
        // If that fails, PostgreSQL discards what comes behind it: one thing at a time.
        self.alone = true;
        let mut gone = Vec::new();
        for named in all {
            gone.extend(self.lend(&named, run)?);
        }
        Ok(Lending::Done((!gone.is_empty()).then(|| Box::new(Undo::Deallocated(gone)))))
    }

    /// Takes from the memory of all clients what is written for names until the transaction is over. False if there is too
    /// little: one short text may have any number of names, each of a long one.
    fn hold_for_names(&mut self, size: usize) -> bool {
        let held = self.limits.memory.take(size);
        let is_enough = held.is_some();
        self.lent.held.extend(held);
        is_enough
    }

    /// The same for an EXECUTE that is to be parsed, and described by what stands under the name. True if there is such a name.
    pub(super) fn lend_to_parse(&mut self, parse: &Parse<'_>, run: &mut Run<'_>) -> Result<bool, End> {
        if self.names.is_empty() {
            return Ok(false);
        }
        let named = Named::all(parse.query).next().filter(|named| named.verb == NamedUse::Execute);
        let Some(named) = named.filter(|named| self.names.get(&named.name).is_some()) else { return Ok(false) };
        self.lend(&named, run)?;
        Ok(true)
    }

    /// The same for a statement that is to be bound.
    pub(super) fn lend_to_bind(&mut self, named: Option<&Named>, run: &mut Run<'_>) -> Result<Option<Box<Undo>>, End> {
        let Some(named) = named else { return Ok(None) };
        let gone = self.lend(named, run)?;
        Ok(gone.map(|gone| Box::new(Undo::Deallocated(vec![gone]))))
    }

    /// Makes sure that the name means on this connection what it means to the client; for DEALLOCATE, takes it away from
    /// the client, and says what that was.
    fn lend(&mut self, named: &Named, run: &mut Run<'_>) -> Result<Option<Deallocated>, End> {
        let Some(statement) = self.names.get(&named.name).cloned() else { return Ok(None) };
        match named.verb {
            NamedUse::Execute => {
                self.lend_statement(&named.name, &statement, run)?;
                self.signs.merge(&statement.signs);
            }
            NamedUse::Prepare => self.occupy(&named.name, run)?,
            NamedUse::Deallocate => {
                self.occupy(&named.name, run)?;
                self.names.remove(&named.name);
                let name: Box<[u8]> = named.name.as_slice().into();
                let stood = self.lent.names.insert(name.clone(), Stands::Nothing);
                return Ok(stood.map(|stood| Deallocated { name, statement, stood }));
            }
        }
        Ok(None)
    }

    /// What comes next asks PostgreSQL which names there are: makes them the client's own, and no others. The unnamed
    /// statement is none of them.
    pub(super) fn show_names(&mut self, run: &mut Run<'_>) -> Result<Shown, End> {
        if self.owed.status() == status::FAILED {
            return Ok(Shown::No);
        }
        let mut names = self.names.all();
        names.retain(|(name, statement)| !name.is_empty() && !self.is_lent(name, statement));
        let size = names.iter().map(|(name, statement)| name.len().saturating_add(statement.size())).sum();
        if !self.hold_for_names(size) {
            return Ok(Shown::OutOfMemory);
        }
        run.cut(&mut self.to_server.buf, 0);
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
        let shared: Vec<u64> = conn.prepared.ids().collect();
        let look = conn.prepared.look().map(|(_, name)| name.to_vec());
        conn.prepared.clear();
        for id in shared {
            self.close_on_server(&statements::name_of(id), Undo::Evicted(id))?;
        }
        if let Some(look) = look {
            self.close_on_server(&look, Undo::Look)?;
        }
        let known = &self.names;
        // Under a name that was taken away by SQL, there may be one of SQL's by now.
        let is_gone = |name: &[u8], stands: Stands| stands != Stands::Nothing && known.get(name).is_none();
        let gone: Vec<_> = self.lent.names.extract_if(|name, stands| is_gone(name, *stands)).collect();
        for (name, stood) in gone {
            self.close_lent(name, stood)?;
        }
        for (name, statement) in names {
            self.lend_statement(&name, &statement, run)?;
        }
        Ok(Shown::Yes)
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
        if let Some((name, stood)) = self.lent.names.remove_entry(name)
            && stood != Stands::Nothing
        {
            run.cut(&mut self.to_server.buf, 0);
            self.close_lent(name, stood)?;
        }
        self.put(name, &statement.parse(), Stands::Statement(statement.id), run)
    }

    /// Takes a name off the connection that the books have just forgotten.
    fn close_lent(&mut self, name: Box<[u8]>, stood: Stands) -> Result<(), End> {
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

    /// Makes sure that something stands under the name: whoever wants to give it once more is told by PostgreSQL.
    pub(super) fn occupy(&mut self, name: &[u8], run: &mut Run<'_>) -> Result<(), End> {
        if matches!(self.lent.names.get(name), Some(Stands::Empty | Stands::Statement(_))) {
            return Ok(());
        }
        // A text that never fails, not even in a failed transaction.
        self.put(name, &Parse { name, query: b"", types: b"\0\0" }, Stands::Empty, run)
    }

    fn put(&mut self, name: &[u8], parse: &Parse<'_>, stands: Stands, run: &mut Run<'_>) -> Result<(), End> {
        run.cut(&mut self.to_server.buf, 0);
        let written = parse.write_as(&mut self.to_server.buf, name);
        written.map_err(|_: FrameError| End::Fatal(errors::internal()))?;
        if name.is_empty() {
            // Whose the unnamed one is, the connection knows; nobody uses it who has not parsed it.
            self.owed.push(Kind::Parse, For::Us, None);
            let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
            conn.forget_unnamed();
        } else {
            self.owed.push(Kind::Parse, For::Us, Some(Box::new(Undo::Lent(name.into()))));
            self.lent.names.insert(name.into(), stands);
        }
        Ok(())
    }

    /// A Close of it was skipped.
    pub(super) fn still_lent(&mut self, name: Box<[u8]>, stands: Stands) {
        self.lent.names.insert(name, stands);
    }

    /// It could not be put there: what stands there, if anything does, is the client's own.
    pub(super) fn not_lent(&mut self, name: &[u8]) {
        self.lent.names.remove(name);
    }

    /// PostgreSQL took all names away, but for what was sent behind that.
    pub(super) fn keep_lent(&mut self, later: &HashSet<Box<[u8]>>) {
        self.lent.names.retain(|name, _| later.contains(name));
    }

    /// Takes the client's names off the connection, at the end of its transaction. True if there were any.
    pub(super) fn take_back_lent(&mut self) -> Result<bool, End> {
        self.lent.held = Vec::new();
        if self.lent.is_empty() {
            return Ok(false);
        }
        // What DEALLOCATE was sent for is closed too: it may never have been run. But SQL may have given the name since, to
        // one that stays: then it has time until nothing ties the client to the connection.
        let has_sqls = self.signs.prepares || self.pinned || self.mode == PoolMode::Session;
        let is_sqls = |stands: Stands| has_sqls && stands == Stands::Nothing;
        let gone: Vec<_> = self.lent.names.extract_if(|_, stands| !is_sqls(*stands)).collect();
        if gone.is_empty() {
            return Ok(false);
        }
        for (name, stood) in gone {
            self.close_lent(name, stood)?;
        }
        self.to_server.buf.extend_from_slice(message::SYNC);
        self.owed.push(Kind::Sync, For::Us, None);
        Ok(true)
    }
}
