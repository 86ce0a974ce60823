//! A borrowed server connection, and the place where a waiter receives one.
//!
//! A lease that is dropped without `release` closes its connection: nothing is reused by accident.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use atomic_waker::AtomicWaker;
use parking_lot::Mutex;

use super::{Pool, decision::Refusal, explain::Explanation, slot::SlotEvent, waiters::WaiterId};
use crate::{clock::Millis, server::conn::ServerConn};

/// The right to use one server connection until it is given back.
#[derive(Debug)]
pub struct Lease {
    conn: Option<Box<ServerConn>>,
    pool: Arc<Pool>,
}

impl Lease {
    pub(super) fn new(pool: &Arc<Pool>, conn: Box<ServerConn>) -> Self {
        Self { conn: Some(conn), pool: Arc::clone(pool) }
    }

    /// `None` never happens before `release`, `into_conn` or drop; callers treat it as a broken connection.
    pub fn conn(&mut self) -> Option<&mut ServerConn> {
        self.conn.as_deref_mut()
    }

    /// The server says that it is a standby, where nothing can be written.
    #[must_use]
    pub fn is_on_standby(&self) -> bool {
        self.conn.as_ref().is_some_and(|conn| conn.baseline("in_hot_standby") == Some("on"))
    }

    #[must_use]
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Gives the connection back in good order: idle, nothing owed, nothing unread, state known.
    pub fn release(mut self, now: Millis) {
        if let Some(conn) = self.conn.take() {
            self.pool.server.release(conn, now);
        }
    }

    /// Marks the connection as being cleaned; the lease stays with the caller, who then releases or drops it.
    pub fn begin_reset(&self, now: Millis) {
        self.change(SlotEvent::Reset, now);
    }

    /// Marks the connection as waiting for its cancel request to end; then `begin_reset`.
    pub fn await_cancel(&self, now: Millis) {
        self.change(SlotEvent::AwaitCancel, now);
    }

    fn change(&self, event: SlotEvent, now: Millis) {
        if let Some(conn) = &self.conn {
            self.pool.server.change(conn.slot, event, now);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(conn) = self.conn.take() {
            self.pool.server.close_lent(conn, &self.pool);
        }
    }
}

/// Where one session receives its connection or its refusal; made once per session and used for every wait.
#[derive(Debug, Default)]
pub struct Handoff {
    handed: Mutex<Handed>,
    waker: AtomicWaker,
}

#[derive(Debug, Default)]
enum Handed {
    #[default]
    Nothing,
    Conn(Box<ServerConn>),
    Refused(Refusal),
}

impl Handoff {
    pub(super) fn deliver(&self, conn: Box<ServerConn>) {
        *self.handed.lock() = Handed::Conn(conn);
        self.waker.wake();
    }

    pub(super) fn refuse(&self, refusal: Refusal) {
        *self.handed.lock() = Handed::Refused(refusal);
        self.waker.wake();
    }

    fn take(&self) -> Handed {
        std::mem::take(&mut *self.handed.lock())
    }
}

/// A place in a pool's queue. Dropping it leaves the queue; a connection that was already on its way goes back.
#[derive(Debug)]
pub struct Waiting {
    pool: Arc<Pool>,
    handoff: Arc<Handoff>,
    waiter: WaiterId,
    pub since: Millis,
    done: bool,
}

impl Waiting {
    pub(super) fn new(pool: &Arc<Pool>, handoff: &Arc<Handoff>, waiter: WaiterId, since: Millis) -> Self {
        Self { pool: Arc::clone(pool), handoff: Arc::clone(handoff), waiter, since, done: false }
    }

    /// What keeps it waiting.
    #[must_use]
    pub fn explain(&self) -> Explanation {
        self.pool.server.explain(self.pool.id, Some(self.waiter))
    }

    /// The connection or the refusal, as soon as there is one. After that, drop this.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Lease, Refusal>> {
        self.handoff.waker.register(cx.waker());
        match self.handoff.take() {
            Handed::Nothing => Poll::Pending,
            Handed::Conn(conn) => {
                self.done = true;
                Poll::Ready(Ok(Lease::new(&self.pool, conn)))
            }
            Handed::Refused(refusal) => {
                self.done = true;
                Poll::Ready(Err(refusal))
            }
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.done || self.pool.server.leave_queue(self.pool.id, self.waiter) {
            return;
        }
        if let Handed::Conn(conn) = self.handoff.take() {
            self.pool.server.release(conn, Millis::now());
        }
    }
}
