//! The replies that a server connection still owes, in order: the only truth about protocol sync.
//!
//! Every message that is forwarded or injected and will be answered stands here until its answer came. From the head of
//! the queue follows whose the next reply is (the client's, or ours to swallow), when the connection is at rest, and what
//! an error skips. Pure: bytes never come here.
//!
//! PostgreSQL's rules that it follows (documentation, "Message Flow"): an error in the extended protocol discards
//! everything up to the next Sync, simple queries and function calls included; Sync, Query and FunctionCall are each
//! answered by one ReadyForQuery; during COPY FROM STDIN, Sync and Flush are read and ignored.
//!
//! Calls: `push` for each message sent; `reply` for each message received; `copy_ended` when the client's CopyDone or
//! CopyFail was sent. `is_at_rest` may be asked at any time.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use tenantry_wire::{
    error::ErrorResponse,
    tag::{backend, status},
};

use super::lend::Stands;
use crate::server::statements::Statement;

/// A request that is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Parse,
    Bind,
    Describe,
    Execute,
    Close,
    Sync,
    Query,
    FunctionCall,
}

/// Who gets the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum For {
    Client,
    /// Ours: swallowed. An error is still the client's if it fails what the client asked for.
    Us,
    /// Ours, and its rows are to be read.
    Probe,
    /// Ours, and the end of what the client's requests rest on: had it failed, PostgreSQL would discard them.
    Guard,
}

/// A reply that PostgreSQL would give and that we give ourselves, when its turn comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Own {
    ParseComplete,
    CloseComplete,
}

/// Statements whose Parse is still unanswered.
#[derive(Debug, Default)]
pub struct Later {
    /// The client's names.
    pub names: HashSet<Box<[u8]>>,
    /// Numbers of those that are being sent.
    pub on_server: Vec<u64>,
    /// The client's names that are put on the server connection.
    pub lent: HashSet<Box<[u8]>>,
    /// One was not sent, because the server connection had it; or is to be taken away, which it may not be.
    pub assumed: bool,
}

/// What must be taken back if the request is skipped or fails.
#[derive(Debug)]
pub enum Undo {
    /// The client's name was given by this Parse.
    Name(Box<[u8]>),
    /// The client's name was taken away by this Close.
    Closed(Box<[u8]>, Arc<Statement>),
    /// The same of one that stood on the server, which this Close takes off it.
    ClosedLent(Box<[u8]>, Arc<Statement>, Stands),
    /// Not to be taken back: what this SQL takes away when it is run, name by name.
    Deallocates(VecDeque<Option<Box<[u8]>>>),
    /// The statement was put on the server by this Parse.
    OnServer(u64),
    /// Both of a Parse.
    NameOnServer(Box<[u8]>, u64),
    /// Not to be taken back: the answer tells this statement's columns.
    Columns(Arc<Statement>),
    /// The statement was put on the server under the client's own name by this Parse.
    Lent(Box<[u8]>),
    /// The client's own name was taken off the server by this Close; what stood there.
    Taken(Box<[u8]>, Stands),
    /// Something that is in no book any more (a look, a name that was deallocated) was taken off the server by this Close.
    Stray,
    /// The unnamed statement was replaced by this Parse; this was the one before, if it is known.
    Unnamed(Option<Bytes>),
    /// The statement was evicted from the server by this Close.
    Evicted(u64),
}

impl Undo {
    /// What is sent behind it must know whether it counts. (Of the unnamed statement only what uses it without a Parse of its
    /// own must: drivers send many in a row.)
    fn must_be_settled(&self) -> bool {
        !matches!(self, Self::Deallocates(_) | Self::Columns(_) | Self::Unnamed(_))
    }
}

#[derive(Debug)]
struct Entry {
    what: What,
    /// Boxed: few have one.
    undo: Option<Box<Undo>>,
}

impl Entry {
    fn must_be_settled(&self) -> bool {
        self.undo.as_deref().is_some_and(Undo::must_be_settled)
    }

    fn is_unnamed(&self) -> bool {
        matches!(self.undo.as_deref(), Some(Undo::Unnamed(_)))
    }
}

#[derive(Debug)]
enum What {
    Request(Kind, For),
    Own(Own),
    /// The client's CopyDone or CopyFail, sent before the server said that it wants copy data. Not answered.
    CopyEnd,
    /// Will fail on purpose, so that PostgreSQL's own state follows; its error is replaced by this one.
    Poison(Box<ErrorResponse>),
}

/// What to do with a message that arrived.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Deliver,
    Swallow,
    /// A message of an answer to our probe.
    Read,
    /// Deliver this error in its place.
    Replace(Box<ErrorResponse>),
}

/// The server said something that nobody asked for. Nothing after it can be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server sent an unexpected message of type {0}")]
pub struct Unexpected(pub u8);

/// See the file's head.
#[derive(Debug, Default)]
pub struct Owed {
    queue: VecDeque<Entry>,
    /// What failed or was skipped, for the caller to take back; emptied by `take_undone`.
    undone: Vec<Undo>,
    batch: Batch,
    /// What the client's requests rest on is unanswered.
    guarded: usize,
    /// A Sync was sent since: what comes behind it would run even if the guard failed.
    sync_behind_guard: bool,
    /// The server discards everything until a Sync that was not sent yet.
    skipping: bool,
    copy_in: CopyIn,
    /// A Sync was sent where a COPY may have ignored it; settled when the COPY succeeds.
    sync_in_copy: bool,
    /// A Sync may or may not have been ignored: the connection can be used on, but never by anybody else.
    unclear: bool,
    status: Option<u8>,
    /// A simple query was skipped, and its client will send no Sync.
    stranded: bool,
    /// Requests of the client in the queue.
    client_owed: usize,
    /// Replies of our own in the queue.
    own: usize,
    /// Something was sent since PostgreSQL was last asked to flush its answers.
    unflushed: bool,
    /// Entries that are to be taken back if they are skipped.
    unsettled: usize,
    /// A Sync was sent behind one of those: what comes now is not skipped with it, and must not rest on it.
    sync_behind_unsettled: bool,
    /// Parses of the unnamed statement.
    unnamed: usize,
    /// A Sync was sent behind one of those, and no other such Parse since: which one is the unnamed statement is not known.
    unnamed_in_doubt: bool,
}

/// Extended messages were sent, and no Sync after them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
enum Batch {
    #[default]
    None,
    /// All of them ours.
    Ours,
    Clients,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum CopyIn {
    #[default]
    No,
    /// The server reads copy data.
    Yes,
}

impl Owed {
    /// For another server connection: as new, but for the memory.
    pub fn reset(&mut self) {
        let mut queue = std::mem::take(&mut self.queue);
        queue.clear();
        *self = Self { queue, ..Self::default() };
    }

    // What was sent.

    /// A message was sent.
    pub fn push(&mut self, kind: Kind, whose: For, undo: Option<Box<Undo>>) {
        if kind == Kind::Sync {
            if self.copy_in == CopyIn::Yes {
                self.sync_in_copy = true;
                return;
            }
            self.skipping = false;
            self.batch = Batch::None;
            self.sync_behind_guard |= self.guarded > 0;
            self.sync_behind_unsettled |= self.unsettled > 0;
            self.unnamed_in_doubt |= self.unnamed > 0;
        } else if !matches!(kind, Kind::Query | Kind::FunctionCall) {
            self.batch = self.batch.max(if whose == For::Client { Batch::Clients } else { Batch::Ours });
        }
        self.client_owed += usize::from(whose == For::Client);
        self.unflushed = true;
        self.push_entry(What::Request(kind, whose), undo);
    }

    fn push_entry(&mut self, what: What, undo: Option<Box<Undo>>) {
        let entry = Entry { what, undo };
        self.unsettled += usize::from(entry.must_be_settled());
        if entry.is_unnamed() {
            self.unnamed += 1;
            self.unnamed_in_doubt = false;
        }
        self.queue.push_back(entry);
    }

    /// The last message of something of ours was sent, which fails in the extended protocol if the rest of it failed: until
    /// it is answered PostgreSQL may yet discard everything up to the next Sync.
    pub fn push_guard(&mut self, kind: Kind) {
        self.guarded += 1;
        self.push(kind, For::Guard, None);
    }

    /// A reply of our own, in its turn among the server's.
    pub fn push_own(&mut self, own: Own, undo: Option<Box<Undo>>) {
        self.batch = Batch::Clients;
        self.own += 1;
        self.push_entry(What::Own(own), undo);
    }

    /// A message was sent that fails on purpose.
    pub fn push_poison(&mut self, error: ErrorResponse) {
        self.batch = Batch::Clients;
        self.client_owed += 1;
        self.unflushed = true;
        self.queue.push_back(Entry { what: What::Poison(Box::new(error)), undo: None });
    }

    /// The client's CopyDone or CopyFail was sent.
    pub fn copy_ended(&mut self) {
        if self.copy_in == CopyIn::No && !self.queue.is_empty() {
            self.queue.push_back(Entry { what: What::CopyEnd, undo: None });
        }
        self.copy_in = CopyIn::No;
    }

    // What came.

    /// Whose columns the RowDescription or NoData that arrived tells, if somebody wants to know.
    pub fn take_columns(&mut self) -> Option<Arc<Statement>> {
        let head = self.queue.front_mut().filter(|e| matches!(e.what, What::Request(Kind::Describe, _)))?;
        match *head.undo.take()? {
            Undo::Columns(statement) => Some(statement),
            other => {
                head.undo = Some(Box::new(other));
                None
            }
        }
    }

    /// A DEALLOCATE was run: which of the client's names it was for.
    pub fn take_deallocated(&mut self) -> Option<Box<[u8]>> {
        match self.queue.front_mut()?.undo.as_deref_mut()? {
            Undo::Deallocates(names) => names.pop_front().flatten(),
            _ => None,
        }
    }

    /// A Parse of the unnamed statement is unanswered.
    #[must_use]
    pub fn has_unnamed(&self) -> bool {
        self.unnamed > 0
    }

    /// Whether the last Parse of the unnamed statement counts is not known, and what comes now is not skipped with it.
    #[must_use]
    pub fn is_unnamed_in_doubt(&self) -> bool {
        self.unnamed_in_doubt
    }

    /// The first unanswered Parse of the unnamed statement replaces this one: the one that it seemed to replace was skipped.
    pub fn unnamed_before(&mut self, before: Option<Bytes>) {
        if let Some(Undo::Unnamed(known)) =
            self.queue.iter_mut().filter_map(|e| e.undo.as_deref_mut()).find(|undo| matches!(undo, Undo::Unnamed(_)))
        {
            *known = before;
        }
    }

    /// A request that drops the unnamed statement comes behind everything: none of those before comes back.
    pub fn drop_unnamed(&mut self) {
        if self.unnamed > 0 {
            for undo in self.queue.iter_mut().filter_map(|e| e.undo.as_deref_mut()) {
                if let Undo::Unnamed(before) = undo {
                    *before = None;
                }
            }
        }
    }

    /// A reply of our own waits for its turn.
    #[must_use]
    pub fn has_own(&self) -> bool {
        self.own > 0
    }

    /// It is the turn of a reply of our own.
    #[must_use]
    pub fn own_is_next(&self) -> bool {
        matches!(self.queue.front(), Some(Entry { what: What::Own(_), .. }))
    }

    /// The own reply whose turn it is now, if any.
    pub fn next_own(&mut self) -> Option<Own> {
        let Some(What::Own(own)) = self.queue.front().map(|e| &e.what) else { return None };
        let own = *own;
        self.pop();
        Some(own)
    }

    /// A message arrived that is not an error, a notice, a notification or a parameter status.
    pub fn reply(&mut self, tag: u8) -> Result<Verdict, Unexpected> {
        let unexpected = Err(Unexpected(tag));
        let Some(What::Request(kind, whose)) = self.queue.front().map(|e| &e.what) else {
            // A Sync that may have been ignored was not, after all.
            return if self.unclear && tag == backend::READY_FOR_QUERY { Ok(Verdict::Deliver) } else { unexpected };
        };
        let (kind, whose) = (*kind, *whose);
        if self.unclear
            && tag == backend::READY_FOR_QUERY
            && !matches!(kind, Kind::Sync | Kind::Query | Kind::FunctionCall)
        {
            return Ok(Verdict::Deliver);
        }
        let last = match (tag, kind) {
            (backend::PARSE_COMPLETE, Kind::Parse)
            | (backend::BIND_COMPLETE, Kind::Bind)
            | (backend::CLOSE_COMPLETE, Kind::Close)
            | (backend::ROW_DESCRIPTION | backend::NO_DATA, Kind::Describe)
            | (backend::COMMAND_COMPLETE | backend::EMPTY_QUERY_RESPONSE | backend::PORTAL_SUSPENDED, Kind::Execute)
            | (backend::READY_FOR_QUERY, Kind::Sync | Kind::Query | Kind::FunctionCall) => true,
            (backend::PARAMETER_DESCRIPTION, Kind::Describe)
            | (backend::FUNCTION_CALL_RESPONSE, Kind::FunctionCall)
            | (backend::ROW_DESCRIPTION | backend::COMMAND_COMPLETE | backend::EMPTY_QUERY_RESPONSE, Kind::Query)
            | (
                backend::DATA_ROW | backend::COPY_DATA | backend::COPY_DONE | backend::COPY_OUT_RESPONSE,
                Kind::Query | Kind::Execute,
            ) => false,
            (backend::COPY_IN_RESPONSE, Kind::Query | Kind::Execute) => {
                self.begin_copy_in();
                false
            }
            _ => return unexpected,
        };
        if tag == backend::COMMAND_COMPLETE {
            self.sync_in_copy = false;
        }
        if last {
            self.pop();
            if tag == backend::READY_FOR_QUERY && self.queue.is_empty() {
                // A simple query ends what extended messages before it began.
                self.batch = Batch::None;
            }
        }
        if last && whose == For::Guard {
            self.guarded -= 1;
            self.sync_behind_guard &= self.guarded > 0;
        }
        Ok(match whose {
            For::Client => Verdict::Deliver,
            For::Us | For::Guard => Verdict::Swallow,
            For::Probe => Verdict::Read,
        })
    }

    /// A ReadyForQuery brought this transaction status.
    pub fn ready(&mut self, transaction: u8) {
        self.status = Some(transaction);
        if self.queue.is_empty() {
            self.copy_in = CopyIn::No;
        }
    }

    /// An ErrorResponse arrived that does not end the connection.
    pub fn error(&mut self) -> Result<Verdict, Unexpected> {
        self.copy_in = CopyIn::No;
        // Whether the server ignored that Sync or will answer it depends on when it read it: nobody else may get the answer.
        self.unclear |= std::mem::take(&mut self.sync_in_copy);
        let Some(head) = self.queue.front() else { return Err(Unexpected(backend::ERROR_RESPONSE)) };
        match &head.what {
            What::Request(Kind::Sync | Kind::Query | Kind::FunctionCall, whose) => {
                return Ok(if *whose == For::Client { Verdict::Deliver } else { Verdict::Swallow });
            }
            // Nothing rests on it that may run without it.
            What::Request(_, For::Guard) => return Ok(Verdict::Swallow),
            What::Request(_, For::Probe) => {
                // The Sync that ends the skipping was sent with it.
                self.skip_to_sync();
                (self.skipping, self.batch) = (false, Batch::None);
                return Ok(Verdict::Swallow);
            }
            What::Request(..) | What::Poison(_) | What::Own(_) | What::CopyEnd => {}
        }
        let verdict = match self.queue.front_mut().map(|e| &mut e.what) {
            Some(What::Poison(error)) => {
                let error = std::mem::replace(error, Box::new(ErrorResponse::error("XX000", "")));
                Verdict::Replace(error)
            }
            _ => Verdict::Deliver,
        };
        self.skip_to_sync();
        Ok(verdict)
    }

    /// An error that arrives now would be the answer to all that is owed, and to nothing before or behind it: one batch
    /// outside a transaction, which asked what its columns are.
    #[must_use]
    pub fn may_be_repeated(&self) -> bool {
        let is = |entry: Option<&Entry>, kinds: &[Kind]| matches!(entry.map(|e| &e.what), Some(What::Request(kind, For::Client)) if kinds.contains(kind));
        let syncs = self.queue.iter().filter(|e| is(Some(e), &[Kind::Sync])).count();
        let others = self.queue.iter().any(|e| is(Some(e), &[Kind::Query, Kind::FunctionCall]));
        self.status() == status::IDLE
            && self.copy_in == CopyIn::No
            && !self.unclear
            && is(self.queue.front(), &[Kind::Bind, Kind::Describe, Kind::Execute])
            && is(self.queue.back(), &[Kind::Sync])
            && syncs == 1
            && !others
            && self.queue.iter().any(|e| is(Some(e), &[Kind::Describe]))
    }

    /// The error that arrived is nobody's: the batch goes with it, and the answer to its Sync is ours to swallow.
    pub fn repeat(&mut self) {
        self.skip_to_sync();
        if let Some(Entry { what: What::Request(Kind::Sync, whose @ For::Client), .. }) = self.queue.front_mut() {
            *whose = For::Us;
            self.client_owed -= 1;
        }
    }

    /// Something that is owed makes the server say something: a reply of ours may wait for that.
    #[must_use]
    pub fn will_be_answered(&self) -> bool {
        matches!(self.queue.back().map(|e| &e.what), Some(What::Request(Kind::Sync | Kind::Query, _)))
    }

    /// See `take_stranded`.
    #[must_use]
    pub fn is_stranded(&self) -> bool {
        self.stranded
    }

    /// A request of the client's in the simple protocol was skipped because a message of ours before it failed: PostgreSQL
    /// answers nothing more until a Sync.
    pub fn take_stranded(&mut self) -> bool {
        std::mem::take(&mut self.stranded)
    }

    /// Statements that were prepared by what is still unanswered.
    #[must_use]
    pub fn later_statements(&self) -> Later {
        let mut later = Later::default();
        for undo in self.queue.iter().filter_map(|entry| entry.undo.as_deref()) {
            match undo {
                Undo::Name(name) => {
                    later.names.insert(name.clone());
                    later.assumed = true;
                }
                Undo::NameOnServer(name, id) => {
                    later.names.insert(name.clone());
                    later.on_server.push(*id);
                }
                Undo::OnServer(id) => later.on_server.push(*id),
                Undo::Lent(name) => drop(later.lent.insert(name.clone())),
                // If it is skipped, it would be believed to be there again.
                Undo::Evicted(_) | Undo::Taken(..) | Undo::ClosedLent(..) | Undo::Stray => later.assumed = true,
                Undo::Closed(..) | Undo::Deallocates(_) | Undo::Unnamed(_) | Undo::Columns(_) => {}
            }
        }
        later
    }

    /// What failed or was skipped since the last call.
    pub fn take_undone(&mut self) -> Vec<Undo> {
        std::mem::take(&mut self.undone)
    }

    // What can be asked.

    #[must_use]
    pub fn has_undone(&self) -> bool {
        !self.undone.is_empty()
    }

    /// The server discards what is sent now, until a Sync.
    #[must_use]
    pub fn is_skipping(&self) -> bool {
        self.skipping
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// The next reply is to something we asked.
    #[must_use]
    pub fn head_is_ours(&self) -> bool {
        matches!(self.queue.front().map(|e| &e.what), Some(What::Request(_, For::Us | For::Probe | For::Guard)))
    }

    /// The next reply is to what the client's requests rest on.
    #[must_use]
    pub fn head_is_guard(&self) -> bool {
        matches!(self.queue.front().map(|e| &e.what), Some(What::Request(_, For::Guard)))
    }

    /// What runs now, as far as is known, is apart from what the client asked: a cancel must not hit it. (A Parse of ours
    /// inside the client's batch is a part of that; besides, PostgreSQL keeps its answer back until the batch is over.)
    #[must_use]
    pub fn runs_ours(&self) -> bool {
        matches!(
            self.queue.front().map(|e| &e.what),
            Some(What::Request(Kind::Query, For::Us) | What::Request(_, For::Probe | For::Guard))
        )
    }

    /// Nothing but a probe is owed: it only looks, and is soon over.
    #[must_use]
    pub fn is_probe_only(&self) -> bool {
        !self.queue.is_empty() && self.queue.iter().all(|e| matches!(e.what, What::Request(_, For::Probe)))
    }

    /// Something is owed, and nothing of it is the client's.
    #[must_use]
    pub fn is_for_us_alone(&self) -> bool {
        !self.queue.is_empty()
            && self.client_owed == 0
            && self.queue.iter().all(|e| matches!(e.what, What::Request(_, For::Us | For::Guard)))
    }

    /// Whether a Flush is needed for that everything owed be answered; it is taken to be sent.
    pub fn take_unflushed(&mut self) -> bool {
        std::mem::take(&mut self.unflushed)
    }

    /// A request of the client is unanswered.
    #[must_use]
    pub fn client_waits(&self) -> bool {
        self.client_owed > 0
    }

    #[must_use]
    pub fn in_copy_in(&self) -> bool {
        self.copy_in != CopyIn::No
    }

    /// Extended messages were sent and no Sync after them.
    #[must_use]
    pub fn has_open_batch(&self) -> bool {
        self.batch != Batch::None
    }

    /// Nothing but messages of ours were sent since the last Sync: nobody else will send one.
    #[must_use]
    pub fn needs_our_sync(&self) -> bool {
        self.batch == Batch::Ours && self.queue.is_empty()
    }

    /// What is sent now could run although the guard before it failed.
    #[must_use]
    pub fn is_past_guard(&self) -> bool {
        self.sync_behind_guard
    }

    /// The transaction status that comes next may be another one: whether PostgreSQL takes what is sent now is not known.
    #[must_use]
    pub fn is_status_in_doubt(&self) -> bool {
        let ends = |kind| matches!(kind, Kind::Sync | Kind::Query | Kind::FunctionCall);
        self.queue.iter().any(|e| matches!(e.what, What::Request(kind, For::Client) if ends(kind)))
    }

    /// What is sent now could run although something that it rests on is skipped.
    #[must_use]
    pub fn is_past_unsettled(&self) -> bool {
        self.sync_behind_unsettled
    }

    #[must_use]
    pub fn is_unclear(&self) -> bool {
        self.unclear
    }

    /// The last transaction status; idle before the first.
    #[must_use]
    pub fn status(&self) -> u8 {
        self.status.unwrap_or(status::IDLE)
    }

    /// Outside a transaction, nothing owed, nothing begun: the connection may go to somebody else.
    #[must_use]
    pub fn is_at_rest(&self) -> bool {
        self.queue.is_empty()
            && self.batch == Batch::None
            && !self.skipping
            && self.copy_in == CopyIn::No
            && !self.unclear
            && self.status() == status::IDLE
    }

    fn pop(&mut self) {
        if let Some(entry) = self.queue.pop_front() {
            self.forget(&entry);
        }
        // An end of copy data that nothing was copied for: the server ignores it.
        while matches!(self.queue.front(), Some(Entry { what: What::CopyEnd, .. })) {
            self.queue.pop_front();
        }
    }

    fn forget(&mut self, entry: &Entry) {
        if entry.undo.is_none() && matches!(entry.what, What::Request(_, For::Client)) {
            // Most: nothing else is counted of them, and what is in doubt is so because of an entry that has something to undo.
            self.client_owed -= 1;
            return;
        }
        if matches!(entry.what, What::Request(_, For::Client) | What::Poison(_)) {
            self.client_owed -= 1;
        }
        self.own -= usize::from(matches!(entry.what, What::Own(_)));
        self.unnamed -= usize::from(entry.is_unnamed());
        self.unnamed_in_doubt &= self.unnamed > 0;
        self.unsettled -= usize::from(entry.must_be_settled());
        self.sync_behind_unsettled &= self.unsettled > 0;
    }

    /// Syncs that were sent right behind the COPY are in the server's hands before any copy data: it ignores them.
    fn begin_copy_in(&mut self) {
        self.copy_in = CopyIn::Yes;
        while let Some(next) = self.queue.get(1) {
            let (ignored, ended) =
                (matches!(next.what, What::Request(Kind::Sync, _)), matches!(next.what, What::CopyEnd));
            if !ignored && !ended {
                return;
            }
            if let Some(entry) = self.queue.remove(1) {
                self.forget(&entry);
            }
            self.sync_in_copy |= ignored;
            if ended {
                self.copy_in = CopyIn::No;
                return;
            }
            // The batch is open again, unless a Sync that counts has been sent behind the end of the data.
            let synced = self.queue.iter().any(|e| matches!(e.what, What::Request(Kind::Sync, _)));
            self.batch = if synced { Batch::None } else { Batch::Clients };
        }
    }

    fn skip_to_sync(&mut self) {
        // What stood between the client's request and its answer was ours, and for that request.
        let mut ours = matches!(self.queue.front().map(|e| &e.what), Some(What::Request(_, For::Us)));
        // The one that failed, in difference to what is skipped: PostgreSQL has dropped the unnamed statement before it read
        // the new one. (One of ours that failed was the client's own, which it sends anew where it is used.)
        if let Some(Entry { what: What::Request(Kind::Parse, For::Client), undo: Some(undo) }) = self.queue.front_mut()
            && let Undo::Unnamed(before) = undo.as_mut()
        {
            *before = None;
        }
        while let Some(entry) = self.queue.front() {
            match entry.what {
                What::Request(Kind::Sync, _) => return,
                What::Request(Kind::Query | Kind::FunctionCall, For::Client) => self.stranded |= ours,
                What::Request(_, For::Us) => {}
                // Had the client's own request failed, its query would have been skipped too.
                _ => ours = false,
            }
            if let Some(entry) = self.queue.pop_front() {
                self.forget(&entry);
                self.undone.extend(entry.undo.map(|u| *u));
            }
        }
        self.skipping = true;
        // Also where what failed was ours: the request it was for must be skipped with it, up to the client's own Sync. With
        // a Sync of ours it would be dealt with, and fail, again and again.
        self.batch = Batch::Clients;
    }
}

#[cfg(test)]
#[path = "owed_tests.rs"]
mod tests;
