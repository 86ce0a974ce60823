//! What a sequence gave to a session: `lastval()` and `currval()`.
//!
//! PostgreSQL keeps it for the session, shows nobody whether there is any, and drops it on DISCARD SEQUENCES. Here it
//! lasts as long as the transaction: in the one that called `nextval()`, by itself or in an INSERT, both functions work;
//! outside of it they are refused, since what they would find is perhaps another client's.
//!
//! What always holds: from the first time that a client of the pool asks, or a function or a column default in its database
//! does, no transaction begins on a connection without DISCARD SEQUENCES, in the same write as the client's request.
//! (What was made around Tenantry is known within ten seconds: `pool/functions.rs`.)

use tenantry_config::PoolMode;
use tenantry_wire::tag::status;

use super::relay::Session;
use crate::pool::lease::Lease;

impl Session {
    /// Whether what the client is about to ask can be answered with its own. `advances`: a sequence was moved in this
    /// transaction, or the same text does so.
    pub(super) fn may_ask_sequences(&mut self, advances: bool) -> bool {
        self.pool.sequences_are_read();
        let id = self.registered.shared.id;
        let discarded = self.lease.as_mut().and_then(Lease::conn).is_some_and(|conn| conn.sequences_of == id);
        self.pinned || self.mode == PoolMode::Session || advances || (discarded && self.owed.status() != status::IDLE)
    }
}
