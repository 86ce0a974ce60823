//! What makes prepared statements stale, and how a client is spared the error: PostgreSQL's "cached plan must not change
//! result type" (0A000).
//!
//! A statement is shared, so a client may meet a plan that was made for another before a table changed. Where nothing of
//! the request's answer has reached the client, and it asked what the columns are, the request is dealt with once more,
//! with every statement prepared anew. A client that did not ask would read new columns by what it knows of the old ones:
//! it is told, as on a direct connection.
//!
//! What always holds: a request is repeated at most once, only outside a transaction, and only if all of it failed.

use std::sync::Arc;

use bytes::BytesMut;
use tenantry_wire::{
    extended,
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
    server::statements::{self, Columns, Statement},
};

/// A longer first batch is not kept: its error is the client's.
const MAX_KEPT: usize = 16 * 1024;

/// Whether the client's bytes are being kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Keep {
    /// Something was answered, or it is too much, or it is not of the extended protocol.
    #[default]
    No,
    Yes,
    /// They are being dealt with for the second time.
    Again,
}

impl Session {
    /// A transaction may begin with what comes next.
    pub(super) fn keep_from_here(&mut self) {
        if self.keep == Keep::Again {
            return;
        }
        self.keep = Keep::Yes;
        if let Some(conn) = self.lease.as_mut().and_then(Lease::conn) {
            conn.kept.clear();
        }
    }

    /// Keeps what was dealt with, if it may have to be dealt with once more.
    pub(super) fn keep(&mut self, bytes: &[u8]) {
        if self.keep != Keep::Yes {
            return;
        }
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return };
        let simple = conn.kept.is_empty() && bytes.first() == Some(&frontend::QUERY);
        if simple || conn.kept.len().saturating_add(bytes.len()) > MAX_KEPT {
            self.keep = Keep::No;
            return;
        }
        conn.kept.extend_from_slice(bytes);
    }

    /// PostgreSQL refuses a plan that does not fit any more. True if the client need not know: its request comes once more.
    pub(super) fn heal(&mut self) -> Result<bool, End> {
        let plans = self.pool.plans_are_stale();
        let again = self.keep == Keep::Yes && self.request.left == 0 && self.owed.may_be_repeated();
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
        if !again || conn.kept.is_empty() {
            return Ok(false);
        }
        let mut input = BytesMut::from(conn.kept.as_slice());
        conn.kept.clear();
        self.owed.repeat();
        self.undo();
        input.extend_from_slice(&self.input);
        self.input = input;
        self.keep = Keep::Again;
        self.drop_statements(plans)?;
        Ok(true)
    }

    /// PostgreSQL told a statement's columns.
    pub(super) fn learn_columns(&mut self, body: &[u8]) {
        if let Some(statement) = self.owed.take_columns() {
            statement.described(body, self.pool.plans());
            self.verifying &= !self.owed.head_is_ours();
        }
    }

    /// The client has a statement that is not on this connection: whether it may be put there, or what to do first.
    pub(super) fn verify(&mut self, statement: &Arc<Statement>, run: &mut Run<'_>) -> Result<Columns, End> {
        let columns = statement.columns(self.pool.plans());
        if columns != Columns::Unknown {
            return Ok(columns);
        }
        // Tables have changed since the client was told of its columns: PostgreSQL is asked first, which takes one round
        // trip for each statement and change.
        run.cut(&mut self.to_server.buf, 0);
        self.prepare(statement, For::Us, Undo::OnServer(statement.id))?;
        let out = &mut self.to_server.buf;
        let written = extended::write_statement_target(out, frontend::DESCRIBE, &statement.name);
        written.map_err(|_| End::Fatal(errors::internal()))?;
        out.extend_from_slice(message::FLUSH);
        self.owed.push(Kind::Describe, For::Us, Some(Box::new(Undo::Columns(Arc::clone(statement)))));
        self.describing = true;
        self.verifying = true;
        Ok(columns)
    }

    /// The statement's columns are not what the client was told. It is spared the error if it asks for them now, outside a
    /// transaction: the name stands for the same text, prepared anew.
    pub(super) fn renew(&mut self, name: &[u8], statement: &Statement, asks: bool) -> Option<Arc<Statement>> {
        if !asks || self.owed.status() != status::IDLE {
            return None;
        }
        let parse = statement.parse();
        let plans = self.pool.plans();
        let own = if self.executed_by(parse.query).is_some() { self.registered.shared.id } else { 0 };
        let planning = self.settings.planning() ^ own;
        let fresh = self.pool.statements.intern(&parse, planning, plans, &self.limits.memory)?;
        self.names.insert(name, Arc::clone(&fresh));
        Some(fresh)
    }

    /// Takes the shared statements off the connection, to be prepared anew where they are used; what a client prepared
    /// with SQL stays.
    fn drop_statements(&mut self, plans: u32) -> Result<(), End> {
        let broken = |_: FrameError| End::Fatal(errors::internal());
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
        let look = conn.prepared.look().map(|(_, name)| name.to_vec());
        for name in conn.prepared.ids().map(statements::name_of).chain(look) {
            extended::write_statement_target(&mut self.to_server.buf, frontend::CLOSE, &name).map_err(broken)?;
            self.owed.push(Kind::Close, For::Us, None);
        }
        self.to_server.buf.extend_from_slice(message::SYNC);
        self.owed.push(Kind::Sync, For::Us, None);
        conn.forget_statements(plans);
        Ok(())
    }
}
