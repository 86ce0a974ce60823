//! SQL that speaks of names which the client gave in the protocol: EXECUTE, DEALLOCATE and PREPARE.
//!
//! In PostgreSQL both kinds of prepared statements share one set of names. Here the client's names are its own and the
//! server's are others; so where SQL uses such a name, the statement is put on the connection under it for as long as the
//! transaction lasts, and PostgreSQL itself says what comes of it.
//!
//! What always holds: no connection is given back with a client's name on it.

use tenantry_wire::{
    extended::{self, Parse},
    frame::FrameError,
    message,
    tag::frontend,
};

use super::{
    errors,
    owed::{For, Kind, Undo},
    relay::{End, Session},
    run::Run,
};
use crate::server::signs::{self, Named, NamedUse};

/// A client's name on the connection.
#[derive(Debug)]
pub(super) struct Lent {
    name: Box<[u8]>,
    /// The statement stands under it, as far as is known.
    is_there: bool,
}

impl Session {
    /// The same for the text of a simple query.
    pub(super) fn lend_to_query(&mut self, text: &[u8], run: &mut Run<'_>) -> Result<Option<Box<Undo>>, End> {
        if self.names.is_empty() || !signs::may_be_named(text) {
            return Ok(None);
        }
        let Some(named) = Named::read(text) else { return Ok(None) };
        let before = self.lent.len();
        let undo = self.lend(&named, run)?;
        // If that fails, PostgreSQL discards what comes behind it: one thing at a time.
        self.alone |= self.lent.len() > before;
        Ok(undo)
    }

    /// Makes sure that the name means on this connection what it means to the client; for DEALLOCATE, takes it away from
    /// the client, and says how to undo that.
    pub(super) fn lend(&mut self, named: &Named, run: &mut Run<'_>) -> Result<Option<Box<Undo>>, End> {
        let Some(statement) = self.names.get(&named.name).cloned() else { return Ok(None) };
        let broken = |_: FrameError| End::Fatal(errors::internal());
        let place = self.lent.iter().position(|lent| *lent.name == *named.name);
        let is_there = place.and_then(|n| self.lent.get(n)).is_some_and(|lent| lent.is_there);
        if !is_there {
            run.cut(&mut self.to_server.buf, 0);
            // Where only the name counts, a text that never fails.
            let nothing = Parse { name: &named.name, query: b"", types: b"\0\0" };
            let parse = if named.verb == NamedUse::Execute { statement.parse() } else { nothing };
            parse.write_as(&mut self.to_server.buf, &named.name).map_err(broken)?;
            let undo = Undo::Lent(named.name.as_slice().into());
            self.owed.push(Kind::Parse, For::Us, Some(Box::new(undo)));
        }
        match place.and_then(|n| self.lent.get_mut(n)) {
            Some(lent) => lent.is_there = true,
            None => self.lent.push(Lent { name: named.name.as_slice().into(), is_there: true }),
        }
        match named.verb {
            NamedUse::Execute => self.signs.merge(&statement.signs),
            NamedUse::Prepare => {}
            NamedUse::Deallocate => {
                self.not_lent(&named.name);
                self.names.remove(&named.name);
                return Ok(Some(Box::new(Undo::Closed(named.name.as_slice().into(), statement))));
            }
        }
        Ok(None)
    }

    /// The name stands on the connection no more, or never did; to be sure it is closed all the same.
    pub(super) fn not_lent(&mut self, name: &[u8]) {
        self.lent.iter_mut().filter(|lent| *lent.name == *name).for_each(|lent| lent.is_there = false);
    }

    /// Takes the client's names off the connection, at the end of its transaction. True if there were any.
    pub(super) fn take_back_lent(&mut self) -> Result<bool, End> {
        if self.lent.is_empty() {
            return Ok(false);
        }
        let broken = |_: FrameError| End::Fatal(errors::internal());
        for lent in std::mem::take(&mut self.lent) {
            extended::write_statement_target(&mut self.to_server.buf, frontend::CLOSE, &lent.name).map_err(broken)?;
            self.owed.push(Kind::Close, For::Us, None);
        }
        self.to_server.buf.extend_from_slice(message::SYNC);
        self.owed.push(Kind::Sync, For::Us, None);
        Ok(true)
    }
}
