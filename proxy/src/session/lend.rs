//! SQL that speaks of names which the client gave in the protocol: EXECUTE, DEALLOCATE, PREPARE, `pg_prepared_statements`.
//!
//! In PostgreSQL both kinds of prepared statements share one set of names. Here the client's names are its own and the
//! server's are others; so where SQL uses such a name, the statement is put on the connection under it for as long as the
//! transaction lasts, and PostgreSQL itself says what comes of it.
//!
//! What always holds: no connection is given back with a client's name on it. Where a message that takes one away was
//! skipped, the books cannot say what stands there: the connection is closed when the transaction is over.

use std::sync::Arc;

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
    pool::lease::Lease,
    server::{
        signs::{Named, NamedUse},
        statements::{self, Statement},
    },
};

/// A client's name on the connection.
#[derive(Debug)]
pub(super) struct Lent {
    name: Box<[u8]>,
    stands: Stands,
}

/// What stands under the name, as far as is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stands {
    /// DEALLOCATE was sent.
    Nothing,
    /// An empty statement: only the name counts.
    Empty,
    /// The shared statement with this number.
    Statement(u64),
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
    /// The same for the text of a simple query.
    pub(super) fn lend_to_query(&mut self, text: &[u8], run: &mut Run<'_>) -> Result<Option<Box<Undo>>, End> {
        if self.names.is_empty() {
            return Ok(None);
        }
        let mut undo = None;
        for named in Named::all(text) {
            // If that fails, PostgreSQL discards what comes behind it: one thing at a time.
            self.alone |= self.names.get(&named.name).is_some();
            undo = self.lend(&named, run)?.or(undo);
        }
        Ok(undo)
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

    /// Makes sure that the name means on this connection what it means to the client; for DEALLOCATE, takes it away from
    /// the client, and says how to undo that.
    pub(super) fn lend(&mut self, named: &Named, run: &mut Run<'_>) -> Result<Option<Box<Undo>>, End> {
        let Some(statement) = self.names.get(&named.name).cloned() else { return Ok(None) };
        match named.verb {
            NamedUse::Execute => {
                self.lend_statement(&named.name, &statement, run)?;
                self.signs.merge(&statement.signs);
            }
            NamedUse::Prepare => self.occupy(&named.name, run)?,
            NamedUse::Deallocate => {
                self.occupy(&named.name, run)?;
                let lent = self.lent.iter_mut().filter(|lent| *lent.name == *named.name);
                lent.for_each(|lent| lent.stands = Stands::Nothing);
                self.names.remove(&named.name);
                return Ok(Some(Box::new(Undo::Closed(named.name.as_slice().into(), statement))));
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
        // One text may have any number of names, and is written for each of them.
        let size = names.iter().map(|(name, statement)| name.len().saturating_add(statement.size())).sum();
        let Some(held) = self.limits.memory.take(size) else { return Ok(Shown::OutOfMemory) };
        self.held_for_names.push(held);
        run.cut(&mut self.to_server.buf, 0);
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
        let shared: Vec<u64> = conn.prepared.ids().collect();
        let look = conn.prepared.look().map(|(_, name)| name.to_vec());
        conn.prepared.clear();
        for id in shared {
            self.close_on_server(&statements::name_of(id), Undo::Evicted(id))?;
        }
        if let Some(look) = look {
            self.close_on_server(&look, Undo::Taken)?;
        }
        let known = &self.names;
        // Under a name that was taken away by SQL, there may be one of SQL's by now.
        let is_gone = |lent: &Lent| lent.stands != Stands::Nothing && known.get(&lent.name).is_none();
        let gone: Vec<_> = self.lent.extract_if(.., |lent| is_gone(lent)).collect();
        for lent in gone {
            self.close_on_server(&lent.name, Undo::Taken)?;
        }
        for (name, statement) in names {
            self.lend_statement(&name, &statement, run)?;
        }
        Ok(Shown::Yes)
    }

    fn is_lent(&self, name: &[u8], statement: &Statement) -> bool {
        self.lent.iter().any(|lent| *lent.name == *name && lent.stands == Stands::Statement(statement.id))
    }

    /// Makes sure that the client's statement stands on the connection under the client's name for it.
    pub(super) fn lend_statement(
        &mut self,
        name: &[u8],
        statement: &Arc<Statement>,
        run: &mut Run<'_>,
    ) -> Result<(), End> {
        // A simple query may have dropped the unnamed one, and no other has to go before it.
        if !name.is_empty() {
            if self.is_lent(name, statement) {
                return Ok(());
            }
            let is_taken = |lent: &Lent| *lent.name == *name && lent.stands != Stands::Nothing;
            if self.lent.iter().any(is_taken) {
                run.cut(&mut self.to_server.buf, 0);
                self.close_on_server(name, Undo::Taken)?;
            }
        }
        self.put(name, &statement.parse(), Stands::Statement(statement.id), run)
    }

    fn close_on_server(&mut self, name: &[u8], undo: Undo) -> Result<(), End> {
        let written = extended::write_statement_target(&mut self.to_server.buf, frontend::CLOSE, name);
        written.map_err(|_: FrameError| End::Fatal(errors::internal()))?;
        self.owed.push(Kind::Close, For::Us, Some(Box::new(undo)));
        Ok(())
    }

    /// Makes sure that something stands under the name: whoever wants to give it once more is told by PostgreSQL.
    pub(super) fn occupy(&mut self, name: &[u8], run: &mut Run<'_>) -> Result<(), End> {
        let stands = self.lent.iter().find(|lent| *lent.name == *name).map(|lent| lent.stands);
        if matches!(stands, Some(Stands::Empty | Stands::Statement(_))) {
            return Ok(());
        }
        // A text that never fails, not even in a failed transaction.
        self.put(name, &Parse { name, query: b"", types: b"\0\0" }, Stands::Empty, run)
    }

    fn put(&mut self, name: &[u8], parse: &Parse<'_>, stands: Stands, run: &mut Run<'_>) -> Result<(), End> {
        run.cut(&mut self.to_server.buf, 0);
        let written = parse.write_as(&mut self.to_server.buf, name);
        written.map_err(|_: FrameError| End::Fatal(errors::internal()))?;
        self.owed.push(Kind::Parse, For::Us, Some(Box::new(Undo::Lent(name.into()))));
        match self.lent.iter_mut().find(|lent| *lent.name == *name) {
            Some(lent) => lent.stands = stands,
            None => self.lent.push(Lent { name: name.into(), stands }),
        }
        Ok(())
    }

    /// It could not be put there: what stands there, if anything does, is the client's own.
    pub(super) fn not_lent(&mut self, name: &[u8]) {
        self.lent.retain(|lent| *lent.name != *name);
    }

    /// PostgreSQL took all names away, but for what was sent behind that.
    pub(super) fn keep_lent(&mut self, later: &[Box<[u8]>]) {
        self.lent.retain(|lent| later.contains(&lent.name));
    }

    /// What was to take away the name by SQL was skipped: whatever stands there, the books do not say.
    pub(super) fn has_lost_lent(&self, name: &[u8]) -> bool {
        self.lent.iter().any(|lent| *lent.name == *name && lent.stands == Stands::Nothing)
    }

    /// Takes the client's names off the connection, at the end of its transaction. True if there were any.
    pub(super) fn take_back_lent(&mut self) -> Result<bool, End> {
        self.held_for_names = Vec::new();
        if self.lent.is_empty() {
            return Ok(false);
        }
        for lent in std::mem::take(&mut self.lent) {
            self.close_on_server(&lent.name, Undo::Taken)?;
        }
        self.to_server.buf.extend_from_slice(message::SYNC);
        self.owed.push(Kind::Sync, For::Us, None);
        Ok(true)
    }
}
