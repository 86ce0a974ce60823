//! Bringing a server connection to rest after its client is gone: cancel what runs, read the rest, roll back, clean.
//!
//! What always holds: a connection that cannot be shown to be at rest within the time limit is closed, never reused; no
//! partial message of the client's is ever completed by somebody else.

use std::{sync::Arc, time::Duration};

use bytes::BytesMut;
use tenantry_wire::{
    error::Fields,
    frame::{self, HEADER},
    message,
    tag::{backend, status},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinHandle,
};

use super::{
    owed::{For, Kind, Owed, Undo},
    relay::{CANCEL_LIMIT, Partial},
};
use crate::{
    clock::Millis,
    pool::lease::Lease,
    server::upkeep::{self, Unusable},
};

/// What a session leaves of its lease.
#[derive(Debug)]
pub struct Remains {
    pub lease: Lease,
    pub owed: Owed,
    /// Some of the client's bytes never reached the server.
    pub unsent: bool,
    /// The server's bytes that were read and not dealt with.
    pub input: BytesMut,
    pub partial: Partial,
    /// The connection is known to be of no use.
    pub lost: bool,
    /// The session may have left state behind.
    pub dirty: bool,
    pub cancelling: Option<JoinHandle<bool>>,
}

/// Hands the remains to a task of their own, with a time limit.
pub fn bring_to_rest(remains: Remains, limit: Duration) {
    let Remains { lease, owed, .. } = &remains;
    // A replay of settings under way may be hit by the cancel, and then nobody knows what is set.
    if remains.lost || remains.unsent || owed.is_unclear() || (owed.head_is_ours() && !owed.is_probe_only()) {
        // Dropping the lease closes the connection.
        return;
    }
    let quiet = owed.is_at_rest()
        && remains.partial.left == 0
        && remains.input.is_empty()
        && !remains.dirty
        && remains.cancelling.is_none();
    if quiet {
        remains.lease.release(Millis::now());
        return;
    }
    lease.begin_reset(Millis::now());
    let server = Arc::clone(&lease.pool().server);
    server.spawn(async move {
        let mut remains = remains;
        if let Ok(Ok(())) = tokio::time::timeout(limit, settle(&mut remains)).await {
            remains.lease.release(Millis::now());
        }
    });
}

/// A connection at rest, for which a cancel request is still under way: it is nobody's until that has ended.
pub fn after_cancel(mut lease: Lease, cancelling: JoinHandle<bool>, now: Millis) {
    lease.await_cancel(now);
    let server = Arc::clone(&lease.pool().server);
    server.spawn(async move {
        if !matches!(cancelling.await, Ok(true)) {
            return;
        }
        lease.begin_reset(Millis::now());
        let Some(conn) = lease.conn() else { return };
        // One round trip more: a signal that came late has hit by then, and hit nobody's query.
        if let Ok(Ok(())) = tokio::time::timeout(CANCEL_LIMIT, upkeep::check(conn)).await {
            lease.release(Millis::now());
        }
    });
}

async fn settle(remains: &mut Remains) -> Result<(), Unusable> {
    if let Some(task) = remains.cancelling.take()
        && !matches!(task.await, Ok(true))
    {
        return Err(Unusable);
    }
    let server = Arc::clone(&remains.lease.pool().server);
    let conn = remains.lease.conn().ok_or(Unusable)?;
    let mut last = BytesMut::new();
    if remains.owed.in_copy_in() {
        last.extend_from_slice(message::COPY_FAIL);
        remains.owed.copy_ended();
    } else if !remains.owed.is_empty()
        && !remains.owed.is_probe_only()
        && !server.cancel(conn.key.clone(), CANCEL_LIMIT).await
    {
        return Err(Unusable);
    }
    if remains.owed.has_open_batch() || remains.owed.is_skipping() {
        last.extend_from_slice(message::SYNC);
        remains.owed.push(Kind::Sync, For::Us, None);
    }
    conn.stream.write_all(&last).await.map_err(|_| Unusable)?;
    conn.stream.flush().await.map_err(|_| Unusable)?;
    drain(remains).await?;
    let in_transaction = remains.owed.status() != status::IDLE;
    let dirty = remains.dirty;
    let conn = remains.lease.conn().ok_or(Unusable)?;
    if dirty {
        upkeep::reset(conn, in_transaction).await
    } else if in_transaction {
        upkeep::rollback(conn).await
    } else {
        upkeep::check(conn).await
    }
}

/// Reads and drops what is owed.
async fn drain(remains: &mut Remains) -> Result<(), Unusable> {
    let mut input = std::mem::take(&mut remains.input);
    let mut left = remains.partial.left;
    loop {
        let there = left.min(input.len());
        bytes::Buf::advance(&mut input, there);
        left -= there;
        while left == 0
            && let Some(header) = frame::server_header(&input).map_err(|_| Unusable)?
        {
            let whole = matches!(
                header.tag,
                backend::READY_FOR_QUERY
                    | backend::PARAMETER_STATUS
                    | backend::ERROR_RESPONSE
                    | backend::COMMAND_COMPLETE
            );
            if whole && header.body > 64 * 1024 {
                return Err(Unusable);
            }
            if whole && input.len() < header.total() {
                break;
            }
            let there = header.total().min(input.len());
            let message = input.split_to(there);
            left = header.total() - there;
            note(remains, header.tag, message.get(HEADER..).unwrap_or_default())?;
        }
        if left == 0 && remains.owed.is_empty() && input.is_empty() {
            return Ok(());
        }
        let conn = remains.lease.conn().ok_or(Unusable)?;
        if conn.stream.read_buf(&mut input).await.map_err(|_| Unusable)? == 0 {
            return Err(Unusable);
        }
    }
}

fn note(remains: &mut Remains, tag: u8, body: &[u8]) -> Result<(), Unusable> {
    match tag {
        backend::NOTICE_RESPONSE | backend::NOTIFICATION_RESPONSE => {}
        backend::PARAMETER_STATUS => {
            if let (Some(conn), Some((name, value))) = (remains.lease.conn(), message::read_parameter_status(body)) {
                conn.reported(name, value);
            }
        }
        backend::ERROR_RESPONSE if Fields::new(body).is_fatal() || remains.owed.head_is_ours() => return Err(Unusable),
        backend::ERROR_RESPONSE => {
            remains.owed.error().map_err(|_| Unusable)?;
        }
        tag => {
            remains.owed.reply(tag).map_err(|_| Unusable)?;
            if tag == backend::COPY_IN_RESPONSE {
                // The client's copy data will never come.
                return Err(Unusable);
            }
            if tag == backend::COMMAND_COMPLETE
                && message::drops_all_statements(body)
                && let Some(conn) = remains.lease.conn()
            {
                conn.prepared.clear();
                conn.forget_unnamed();
                if !remains.owed.is_empty() {
                    // What was prepared behind it is not in our books any more.
                    return Err(Unusable);
                }
            }
            if tag == backend::READY_FOR_QUERY {
                remains.owed.ready(body.first().copied().unwrap_or(status::FAILED));
            }
        }
    }
    while remains.owed.next_own().is_some() {}
    for undo in remains.owed.take_undone() {
        let Some(conn) = remains.lease.conn() else { return Err(Unusable) };
        match undo {
            Undo::OnServer(id) | Undo::NameOnServer(_, id) => conn.prepared.remove(id),
            // Still there although our books said it was closed: simplest to begin anew.
            Undo::Evicted(_) | Undo::Lent(_) | Undo::Taken(..) | Undo::ClosedLent(..) | Undo::Stray => {
                return Err(Unusable);
            }
            Undo::Unnamed(_) => conn.forget_unnamed(),
            Undo::Name(_) | Undo::Closed(..) | Undo::Deallocates(_) | Undo::Columns(_) => {}
        }
    }
    Ok(())
}
