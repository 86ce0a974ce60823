//! A logged-in client's life: one task that drives both sockets, without a channel hop and without a buffer while idle.
//!
//! `poll` is the table of contents: what others want of us, the queue, the server's answers, the client's requests. Both
//! directions read straight into one large buffer of the thread, walk headers, and write whole runs on from there; only
//! what must be kept is copied. Nothing here awaits, so a session can be dropped between any two polls.
//!
//! What always holds: at most one lease; the lease goes back to the pool only when `Owed` is at rest, both directions are
//! at a message boundary, nothing is unwritten, and what the session left behind is known.

use std::{
    cell::RefCell,
    collections::HashMap,
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use tenantry_config::{Isolation, PoolMode};
use tenantry_wire::{
    error::ErrorResponse,
    extended,
    frame::{self, FrameError},
    message,
    tag::{frontend, status},
};
use tokio::{task::JoinHandle, time::Sleep};

use super::{
    errors,
    heal::Keep,
    lend::Lent,
    listening::Listening,
    owed::{For, Kind, Owed, Undo},
    pin::Pins,
    probe::{self, Evidence},
    registry::{EndReason, Registered},
    state::{SessionEvent, SessionState},
    statements::Names,
};
use crate::{
    clock::Millis,
    net::{
        memory::{Held, Memory},
        stream::{Outgoing, Stream},
    },
    pool::{
        Pool,
        decision::Refusal,
        functions::{Look, Question},
        lease::{Handoff, Lease, Waiting},
        server::Asked,
        stats::{Stats, Tally},
    },
    server::{
        settings::Settings,
        signs::{Scan, Signs},
        statements::Statement,
    },
};

/// One read, and so most bytes that are held for one session in each direction.
pub(super) const CHUNK: usize = 64 * 1024;
/// Most unanswered requests of one session; past it the client is not read until some are answered.
pub(super) const MAX_OWED: usize = 65_536;
/// How long a client that closed its sending side may still get the answer to what it asked.
const HALF_CLOSE_GRACE: Duration = Duration::from_secs(1);
/// How long a client may take to close its side after we closed ours.
const LINGER: Duration = Duration::from_secs(1);
/// How long a cancel request may take.
pub(super) const CANCEL_LIMIT: Duration = Duration::from_secs(10);

thread_local! {
    /// The one read buffer of a worker thread. Borrowed only inside a poll.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; CHUNK].into_boxed_slice());
}

/// Why a session is over.
#[derive(Debug)]
pub enum End {
    /// The client closed, said Terminate, or cannot be written to.
    ClientGone,
    /// The client is told this, then closed.
    Fatal(ErrorResponse),
    /// The server's own last words were passed on already.
    ServerSaidWhy,
    /// The server went away without a word; its last notice may say why.
    ServerLost,
}

/// What is done with the rest of a message that has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Sink {
    #[default]
    Forward,
    /// Forwarded, and its text looked at.
    Scan,
    Discard,
}

/// A message of which some bytes are still to come.
#[derive(Debug, Default)]
pub(super) struct Partial {
    pub left: usize,
    pub sink: Sink,
}

/// See the file's head.
#[derive(Debug)]
pub struct Session {
    pub(super) registered: Registered,
    pub(super) pool: Arc<Pool>,
    handoff: Arc<Handoff>,
    pub(super) mode: PoolMode,
    /// `isolation = "strict"`: no connection is used that was not wiped since its last use.
    strict: bool,
    pub(super) reuse_unnamed: bool,
    state: SessionState,

    // The client's side.
    pub(super) client: Stream,
    pub(super) to_client: Outgoing,
    /// Bytes of the client that could not be dealt with yet.
    pub(super) input: BytesMut,
    pub(super) request: Partial,
    pub(super) names: Names,
    /// What the client's session has set.
    pub(super) settings: Settings,
    /// What it began with: RESET goes back to this.
    pub(super) startup: Settings,
    /// After an error of ours without a server: messages are dropped until the client's Sync.
    pub(super) skip_to_sync: bool,
    /// The request at the head of `input` was answered with an error of ours, and is to be dropped.
    pub(super) refused: bool,
    client_closed: bool,
    grace: Option<Pin<Box<Sleep>>>,

    // The server's side.
    waiting: Option<Waiting>,
    pub(super) lease: Option<Lease>,
    pub(super) to_server: Outgoing,
    pub(super) answer_input: BytesMut,
    pub(super) answer: Partial,
    pub(super) owed: Owed,
    /// A cancel came while only our own statement ran; it is for the client's, once that runs.
    cancel_later: bool,
    pub(super) last_notice: Option<Box<[u8]>>,
    pub(super) said_fatal: bool,
    /// The connection must not be used again after this transaction.
    pub(super) retire: bool,
    pub(super) server_write_failed: bool,
    /// Whether the client's bytes of this batch are kept, in case that it must be repeated.
    pub(super) keep: Keep,
    /// Where in what is being dealt with the batch begins.
    pub(super) keep_at: usize,
    /// The statement of the unnamed portal, if its columns are not known yet.
    pub(super) bound: Option<Arc<Statement>>,
    /// An answer is to come that tells a statement's columns.
    pub(super) describing: bool,
    /// It must come before anything else is dealt with.
    pub(super) verifying: bool,
    /// A statement changed tables: plans may be stale when that is committed.
    pub(super) made_stale: bool,
    /// Something was created in this transaction, and something was prepared: if the first is rolled back, the second is
    /// stale.
    pub(super) creates: bool,
    pub(super) has_prepared: bool,
    /// The client's names that stand on the connection.
    pub(super) lent: Lent,
    /// What was sent must be answered before anything else is sent, except the rest of its message and the data of its
    /// COPY.
    pub(super) alone: bool,
    /// Portals that are a DEALLOCATE, or a DISCARD; and the client's name that goes with it, if it is one.
    pub(super) deallocates: HashMap<Box<[u8]>, Option<Box<[u8]>>>,
    /// SQL's PREPARE was seen in session mode, where nobody looks what became of it.
    pub(super) sql_gives_names: bool,
    /// The connection was made fit for the client's request just now: that comes next, before the connection may go elsewhere.
    pub(super) confirmed: bool,
    pub(super) cancelling: Option<JoinHandle<bool>>,

    // What the session may leave behind.
    pub(super) scan: Scan,
    pub(super) signs: Signs,
    pub(super) custom: Vec<String>,
    pub(super) evidence: Option<Box<Evidence>>,
    /// The question under way is not the probe but a look.
    pub(super) looking: Option<Arc<Look>>,
    /// The probe under way also asks this about functions.
    pub(super) reads_functions: Option<Question>,
    /// The session has made or changed functions since the last probe.
    pub(super) made_functions: bool,
    pub(super) pins: Pins,
    pub(super) pinned: bool,
    /// What it listens to, and who hears it; none for most.
    pub(super) listening: Option<Box<Listening>>,
    /// The client has asked for something since the last probe.
    pub(super) worked: bool,

    pub(super) tally: Tally,
    pub(super) limits: Limits,
    /// For the message at the head of `input`, if it is large.
    pub(super) held: Option<Held>,
}

/// What one client may make us hold.
#[derive(Debug, Clone)]
pub struct Limits {
    pub max_message: usize,
    pub memory: Arc<Memory>,
}

impl Session {
    /// For a client whose login is done.
    #[must_use]
    pub fn new(
        client: Stream,
        registered: Registered,
        pool: Arc<Pool>,
        mode: PoolMode,
        settings: Settings,
        limits: Limits,
    ) -> Self {
        let pool_settings = &pool.settings().pool;
        Self {
            registered,
            pool: Arc::clone(&pool),
            handoff: Arc::new(Handoff::default()),
            mode,
            strict: pool_settings.isolation == Isolation::Strict,
            reuse_unnamed: pool_settings.reuse_unnamed_statements,
            state: SessionState::Idle,
            client,
            to_client: Outgoing::default(),
            input: BytesMut::new(),
            request: Partial::default(),
            names: Names::default(),
            startup: settings.clone(),
            settings,
            skip_to_sync: false,
            refused: false,
            client_closed: false,
            grace: None,
            waiting: None,
            lease: None,
            to_server: Outgoing::default(),
            answer_input: BytesMut::new(),
            answer: Partial::default(),
            owed: Owed::default(),
            cancel_later: false,
            last_notice: None,
            said_fatal: false,
            retire: false,
            server_write_failed: false,
            keep: Keep::No,
            keep_at: 0,
            bound: None,
            describing: false,
            verifying: false,
            made_stale: false,
            creates: false,
            has_prepared: false,
            deallocates: HashMap::new(),
            sql_gives_names: false,
            lent: Lent::default(),
            alone: false,
            confirmed: false,
            cancelling: None,
            scan: Scan::default(),
            signs: Signs::default(),
            custom: Vec::new(),
            evidence: None,
            looking: None,
            reads_functions: None,
            made_functions: false,
            pins: Pins::default(),
            pinned: false,
            listening: None,
            worked: false,
            tally: Tally::default(),
            limits,
            held: None,
        }
    }

    /// Runs until the session is over, then says goodbye to the client and brings the server connection to rest.
    pub async fn run(mut self) {
        let end = std::future::poll_fn(|cx| self.poll(cx)).await;
        self.waiting = None;
        self.pool.stats.add(&mut self.tally);
        // In a box of its own: the goodbye needs memory that an idle session should not hold.
        Box::pin(self.finish(end)).await;
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        self.registered.shared.waker.register(cx.waker());
        loop {
            match self.poll_once(cx) {
                Ok(true) => {}
                Ok(false) => return Poll::Pending,
                Err(end) => return Poll::Ready(end),
            }
        }
    }

    /// One round over everything that may have happened; true if anything had.
    fn poll_once(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        self.heed_wishes()?;
        let mut progress = self.poll_queue(cx)?;
        if self.listening.is_some() {
            progress |= self.poll_channels(cx)?;
        }
        progress |= self.poll_answers(cx)?;
        progress |= self.poll_requests(cx)?;
        if self.client_closed {
            self.poll_half_closed(cx)?;
        }
        Ok(progress)
    }

    // What others want.

    fn heed_wishes(&mut self) -> Result<(), End> {
        let shared = &self.registered.shared;
        if shared.take_cancel() || (self.cancel_later && !self.owed.runs_ours()) {
            self.cancel_later = false;
            self.cancel();
        }
        let Some(reason) = self.registered.shared.end() else { return Ok(()) };
        let listens_here = self.listening.as_ref().is_some_and(|listening| listening.is_own());
        let resting = (self.pinned || listens_here || self.mode == PoolMode::Session) && self.owed.is_at_rest();
        let busy = self.lease.is_some() && !resting;
        match reason {
            // Its transaction may finish; the drain's deadline ends it otherwise.
            EndReason::Shutdown | EndReason::Drained | EndReason::Dropped if busy || self.waiting.is_some() => Ok(()),
            _ => Err(End::Fatal(errors::ended(reason))),
        }
    }

    /// A cancel request for this session came in.
    fn cancel(&mut self) {
        if self.waiting.take().is_some() {
            self.enter(SessionEvent::Refuse);
            self.refuse(&errors::cancelled_in_queue());
            return;
        }
        let under_way = self.cancelling.as_ref().is_some_and(|task| !task.is_finished());
        if !self.owed.client_waits() || under_way {
            return;
        }
        if self.owed.runs_ours() {
            self.cancel_later = true;
            return;
        }
        let server = Arc::clone(&self.pool.server);
        if let Some(conn) = self.lease.as_mut().and_then(Lease::conn) {
            let key = conn.key.clone();
            Stats::count(&self.pool.stats.cancels);
            self.cancelling = Some(tokio::spawn(server.cancel(key, CANCEL_LIMIT)));
        }
    }

    // The queue.

    fn poll_queue(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let Some(waiting) = &mut self.waiting else { return Ok(false) };
        let Poll::Ready(outcome) = waiting.poll(cx) else { return Ok(false) };
        let now = Millis::now();
        let waited = now.since(waiting.since);
        self.waiting = None;
        let stats = &self.pool.stats;
        Stats::count(&stats.waits);
        let micros = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
        stats.wait_micros.fetch_add(micros, std::sync::atomic::Ordering::Relaxed);
        match outcome {
            Ok(lease) => self.attach(lease, now)?,
            // Its request is still there, and asks again: at the server that the tenant has moved to.
            Err(_) if self.pool.has_moved() => self.enter(SessionEvent::Refuse),
            Err(refusal) => {
                self.enter(SessionEvent::Refuse);
                if matches!(refusal, Refusal::Timeout(_)) {
                    Stats::count(&self.pool.stats.wait_timeouts);
                }
                let error = errors::refused(refusal, &self.pool);
                if error.severity == tenantry_wire::error::Severity::Fatal {
                    return Err(End::Fatal(error));
                }
                self.refuse(&error);
            }
        }
        Ok(true)
    }

    /// Makes sure that there is a lease; false if the client's bytes must wait.
    pub(super) fn ensure_lease(&mut self) -> Result<bool, End> {
        if self.lease.is_some() {
            return Ok(true);
        }
        if self.waiting.is_some() {
            return Ok(false);
        }
        if self.pool.has_moved() {
            self.move_on();
        }
        let now = Millis::now();
        match self.pool.server.checkout(&self.pool, &self.handoff, now) {
            Asked::Lease(lease) => {
                self.attach(lease, now)?;
                Ok(true)
            }
            Asked::Waiting(waiting) => {
                self.waiting = Some(waiting);
                self.enter_at(SessionEvent::Queue, now);
                Ok(false)
            }
            // In this very moment.
            Asked::Refused(_) if self.pool.has_moved() => self.ensure_lease(),
            Asked::Refused(refusal) => {
                let error = errors::refused(refusal, &self.pool);
                self.refuse(&error);
                Ok(false)
            }
        }
    }

    /// The tenant has moved to another server, and the session follows: it has no connection here, and its statements are the
    /// same there. What the client was told of the server at its login stays as it was told.
    fn move_on(&mut self) {
        self.pool.stats.add(&mut self.tally);
        let next = self.pool.latest();
        if let Some(listening) = &mut self.listening {
            listening.move_to(&next);
        }
        self.registered.shared.move_to(&next);
        self.pool = next;
    }

    /// Takes a connection into use: its settings are made ours in the same write as the client's first bytes.
    fn attach(&mut self, lease: Lease, now: Millis) -> Result<(), End> {
        self.owed.reset();
        if !self.lent.is_empty() {
            // Of a connection that was closed.
            self.lent = Lent::default();
        }
        self.last_notice = None;
        self.server_write_failed = false;
        self.cancel_later = false;
        self.lease = Some(lease);
        self.take_over()?;
        if self.listening.as_ref().is_some_and(|listening| listening.must_restore()) {
            self.restore_channels()?;
        }
        self.keep_from_here();
        self.worked = true;
        self.enter_at(SessionEvent::Work, now);
        self.registered.shared.transaction(Some(now));
        Ok(())
    }

    /// Makes a connection that was another's until now the client's: all of that in the same write as its request.
    fn take_over(&mut self) -> Result<(), End> {
        let id = self.registered.shared.id;
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
        let plans = self.pool.plans();
        let reads_sequences = self.pool.reads_sequences();
        let hinted = std::mem::take(&mut conn.hinted);
        if conn.used && (self.strict || self.pool.functions.are_opaque() || hinted) {
            let guarded = conn.label.may_time_out();
            probe::write_wipe(&mut self.to_server.buf, &mut self.owed, conn.begins_as_another, guarded)
                .map_err(|_| End::Fatal(errors::internal()))?;
            conn.label = Settings::default();
            conn.forget_statements(plans);
            conn.forget_unnamed();
            conn.sequences_of = id;
            conn.used = false;
        }
        // Also its own of an earlier transaction: what it would find is what it did on this connection, not the last it did.
        let has_given = conn.used && reads_sequences;
        let is_seeded = hinted || (conn.used && self.pool.functions.leave_seeds());
        conn.used = true;
        let is_stale = conn.plans != plans && !conn.prepared.is_empty();
        let mut first = String::new();
        for (is_needed, sql) in
            [(is_stale, "DEALLOCATE ALL;"), (has_given, "DISCARD SEQUENCES;"), (is_seeded, probe::SEED)]
        {
            if is_needed {
                first.push_str(sql);
            }
        }
        if is_stale {
            conn.prepared.clear();
        }
        conn.plans = plans;
        if reads_sequences {
            conn.sequences_of = id;
        }
        self.replay(&first)
    }

    /// Makes the connection's settings the client's, if they are not: in the same write as the client's request. Where
    /// PostgreSQL may refuse, or a timer of the last client's may strike, a guard behind it fails with it, and makes
    /// PostgreSQL discard that request.
    pub(super) fn replay(&mut self, first: &str) -> Result<(), End> {
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
        if conn.label == self.settings && first.is_empty() {
            return Ok(());
        }
        let difference = conn.label.difference(&self.settings);
        let guarded = conn.label.may_time_out() || difference.may_fail();
        let broken = |_: FrameError| End::Fatal(errors::internal());
        let out = &mut self.to_server.buf;
        message::write_query(out, &probe::replay(first, &difference, guarded)).map_err(broken)?;
        self.owed.push_guard(Kind::Query);
        if guarded {
            extended::write_statement_target(out, frontend::DESCRIBE, probe::GUARD).map_err(broken)?;
            self.owed.push_guard(Kind::Describe);
            extended::write_statement_target(out, frontend::CLOSE, probe::GUARD).map_err(broken)?;
            self.owed.push_guard(Kind::Close);
            // Without it PostgreSQL would keep the answer back until the client's batch is over, however long that takes.
            out.extend_from_slice(message::FLUSH);
        }
        conn.label = self.settings.clone();
        conn.forget_unnamed();
        Stats::count(&self.pool.stats.replays);
        Ok(())
    }

    // The server's answers.

    fn poll_answers(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        match self.to_client.poll_send(&mut self.client, cx, &[]) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(_)) => return Err(End::ClientGone),
            // The client reads slowly: so do we.
            Poll::Pending => return Ok(false),
        }
        if self.lease.is_none() {
            return Ok(false);
        }
        BUFFER.with_borrow_mut(|buffer| {
            let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
            let n = match conn.stream.poll_read_into(cx, buffer) {
                Poll::Pending => return Ok(false),
                Poll::Ready(Ok(n)) if n > 0 => n,
                Poll::Ready(_) => return Err(self.server_ended()),
            };
            let fresh = buffer.get(..n).unwrap_or_default();
            // What could not be dealt with is kept, whatever the outcome: who drains the connection must not lose its place.
            if self.answer_input.is_empty() {
                let (used, outcome) = self.take_answers(cx, fresh);
                self.answer_input.extend_from_slice(fresh.get(used..).unwrap_or_default());
                outcome?;
            } else {
                let mut kept = std::mem::take(&mut self.answer_input);
                kept.extend_from_slice(fresh);
                let (used, outcome) = self.take_answers(cx, &kept);
                kept.advance(used);
                if !kept.is_empty() {
                    self.answer_input = kept;
                }
                outcome?;
            }
            self.settle()?;
            Ok(true)
        })
    }

    fn server_ended(&self) -> End {
        if self.said_fatal { End::ServerSaidWhy } else { End::ServerLost }
    }

    /// The connection may have come to rest: decides what becomes of it.
    pub(super) fn settle(&mut self) -> Result<(), End> {
        if !self.owed.is_empty() || self.answer.left > 0 || !self.answer_input.is_empty() {
            return Ok(());
        }
        if !self.owed.is_at_rest() {
            if self.owed.status() != status::IDLE && !self.owed.has_open_batch() {
                return self.settle_in_transaction();
            }
            if self.owed.is_unclear() && self.owed.is_empty() && self.owed.status() == status::IDLE {
                // Nobody knows whether one more ReadyForQuery is on its way: the connection ends with this transaction.
                self.retire = true;
                self.give_back(Millis::now());
            }
            return self.end_our_batch();
        }
        if self.request.left > 0 || !self.to_server.is_done() {
            return Ok(());
        }
        if self.listening.is_some() && self.step_channels()? {
            return Ok(());
        }
        if std::mem::take(&mut self.confirmed) && !self.input.is_empty() {
            // What it was confirmed for is about to be sent.
            return Ok(());
        }
        self.pool.stats.add(&mut self.tally);
        (self.creates, self.has_prepared) = (false, false);
        if !self.deallocates.is_empty() {
            // Portals end with their transaction.
            self.deallocates.clear();
        }
        if std::mem::take(&mut self.made_stale) {
            self.pool.plans_are_stale();
        }
        self.sql_gives_names |= self.mode == PoolMode::Session && self.signs.prepares;
        if self.take_back_lent()? {
            return Ok(());
        }
        self.pass_on_hints();
        let now = Millis::now();
        if self.needs_probe(now) {
            return self.start_probe(now);
        }
        self.signs = Signs::default();
        self.describing = false;
        if self.listening.is_some() && self.hand_over()? {
            return Ok(());
        }
        if self.pinned || self.mode == PoolMode::Session {
            self.keep_from_here();
            self.rest_with_lease();
            return Ok(());
        }
        self.give_back(now);
        Ok(())
    }

    /// What may yet have been run out of a string is for who uses the connection next.
    fn pass_on_hints(&mut self) {
        if self.signs.hints
            && let Some(conn) = self.lease.as_mut().and_then(Lease::conn)
        {
            conn.hinted = true;
        }
    }

    /// A replay went ahead of a request that is not all there yet: its transaction ends here.
    fn end_our_batch(&mut self) -> Result<(), End> {
        if self.owed.needs_our_sync() {
            self.to_server.buf.extend_from_slice(message::SYNC);
            self.owed.push(Kind::Sync, For::Us, None);
        }
        Ok(())
    }

    fn settle_in_transaction(&mut self) -> Result<(), End> {
        if self.state == SessionState::Active {
            self.enter(SessionEvent::RestInTransaction);
        }
        Ok(())
    }

    /// The connection is at rest and nothing ties the session to it.
    pub(super) fn give_back(&mut self, now: Millis) {
        self.enter_at(SessionEvent::Rest, now);
        self.registered.shared.transaction(None);
        let Some(lease) = self.lease.take() else { return };
        // Finished or not: whether it was delivered decides whether the connection may go to anybody else.
        let cancelling = self.cancelling.take();
        let is_unfit = self.pool.functions.leave_what_stays() && self.mode != PoolMode::Session;
        if std::mem::take(&mut self.retire) || self.server_write_failed || is_unfit {
            drop(lease);
        } else if let Some(task) = cancelling {
            super::vanish::after_cancel(lease, task, now);
        } else {
            lease.release(now);
        }
    }

    // The client's requests.

    fn poll_requests(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        if self.to_client.buf.len() >= CHUNK {
            // It does not read its answers: no more questions. `poll_answers` has asked to be woken.
            return Ok(false);
        }
        if self.to_server.is_stalled() && !self.flush_to_server(cx)? {
            return Ok(false);
        }
        let mut progress = false;
        if !self.input.is_empty() && !self.is_blocked() {
            let mut kept = std::mem::take(&mut self.input);
            let used = self.take_requests(cx, &kept)?;
            progress = used > 0;
            kept.advance(used);
            if !kept.is_empty() {
                self.input = kept;
            }
            self.after_requests()?;
        }
        if !self.flush_to_server(cx)? {
            return Ok(progress);
        }
        if self.client_closed
            || self.input.len() >= CHUNK.max(self.wanted_input())
            || (self.is_blocked() && self.input.len() >= CHUNK)
        {
            return Ok(progress);
        }
        if self.owed.len() >= MAX_OWED {
            return Ok(progress);
        }
        Ok(self.read_requests(cx)? || progress)
    }

    fn read_requests(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        BUFFER.with_borrow_mut(|buffer| {
            let n = match self.client.poll_read_into(cx, buffer) {
                Poll::Pending => return Ok(false),
                Poll::Ready(Ok(0)) => {
                    self.client_closed = true;
                    return Ok(true);
                }
                Poll::Ready(Ok(n)) => n,
                Poll::Ready(Err(_)) => return Err(End::ClientGone),
            };
            let fresh = buffer.get(..n).unwrap_or_default();
            if self.input.is_empty() && !self.is_blocked() {
                let used = self.take_requests(cx, fresh)?;
                self.input.extend_from_slice(fresh.get(used..).unwrap_or_default());
                self.after_requests()?;
            } else {
                self.input.extend_from_slice(fresh);
            }
            Ok(true)
        })
    }

    /// How much of the message at the head of `input` must be there before it can be dealt with.
    fn wanted_input(&self) -> usize {
        match frame::client_header(&self.input) {
            Ok(Some(header)) => header.total().min(self.limits.max_message).saturating_add(1),
            _ => 0,
        }
    }

    /// The client's requests must wait: for a connection, or until it is known what its session has or that it has it.
    pub(super) fn is_blocked(&self) -> bool {
        self.waiting.is_some()
            || self.evidence.is_some()
            || self.verifying
            || self.is_moving()
            || self.owed.is_past_guard()
            || (self.owed.is_past_unsettled() && !self.owed.in_copy_in())
            || self.must_be_alone()
    }

    /// What is under way must be over before anything else begins; the rest of it is no other.
    fn must_be_alone(&self) -> bool {
        self.alone && !self.owed.is_empty() && self.request.left == 0 && !self.owed.in_copy_in()
    }

    /// True when nothing is left to write. A write that fails is not the last word: the server's may still be unread.
    fn flush_to_server(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        while !self.to_server.is_done() {
            self.send_to_server(cx, &[]);
            if !self.to_server.is_done() {
                return Ok(false);
            }
            // Perhaps everything was at rest but for this; which may give the server something new to do.
            self.settle()?;
        }
        Ok(true)
    }

    pub(super) fn send_to_server(&mut self, cx: &mut Context<'_>, fresh: &[u8]) {
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return };
        if self.server_write_failed {
            self.to_server = Outgoing::default();
            return;
        }
        if let Poll::Ready(Err(_)) = self.to_server.poll_send(&mut conn.stream, cx, fresh) {
            self.server_write_failed = true;
            self.to_server = Outgoing::default();
        }
    }

    fn after_requests(&mut self) -> Result<(), End> {
        if self.owed.client_waits() && self.state != SessionState::Active && self.lease.is_some() {
            let now = Millis::now();
            if self.state == SessionState::Pinned {
                self.registered.shared.transaction(Some(now));
            }
            self.enter_at(SessionEvent::Work, now);
            self.worked = true;
        }
        // A message whose end came after its answer (a late CopyData) may have been all that kept the connection.
        if self.lease.is_some() && self.owed.is_at_rest() { self.settle() } else { Ok(()) }
    }

    /// Answers the request at the head of the client's input with an error of ours, without a server connection.
    pub(super) fn refuse(&mut self, error: &ErrorResponse) {
        self.pool.stats.told(error);
        error.write(&mut self.to_client.buf);
        self.refused = true;
    }

    /// The client closed its sending side: what it asked is still answered, within a grace; then it is gone.
    fn poll_half_closed(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        let waits = self.is_blocked() || !self.owed.is_empty();
        let asked = self.owed.client_waits() || (waits && !self.input.is_empty());
        if !asked && self.to_client.is_done() {
            return Err(End::ClientGone);
        }
        let grace = self.grace.get_or_insert_with(|| Box::pin(tokio::time::sleep(HALF_CLOSE_GRACE)));
        if grace.as_mut().poll(cx).is_ready() {
            return Err(End::ClientGone);
        }
        Ok(())
    }

    /// Whether a notification can be meant for this client.
    pub(super) fn may_listen(&self) -> bool {
        self.pinned || self.signs.suspect || self.evidence.is_some() || self.mode == PoolMode::Session
    }

    pub(super) fn client_said_goodbye(&mut self) {
        self.client_closed = true;
    }

    // Small things.

    /// Takes back what the server skipped or failed.
    pub(super) fn undo(&mut self) {
        // Last in, first out: what was done later stands on what was done before.
        for undo in self.owed.take_undone().into_iter().rev() {
            let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return };
            match undo {
                Undo::Name(name) => drop(self.names.remove(&name)),
                Undo::Closed(name, statement) => self.names.insert(&name, statement),
                Undo::ClosedLent(name, statement, stood) => {
                    self.names.insert(&name, statement);
                    self.still_lent(name, stood);
                }
                Undo::Taken(name, stood) => self.still_lent(name, stood),
                // It still stands there, and is in no book any more.
                Undo::Stray => self.retire = true,
                Undo::OnServer(id) => conn.prepared.remove(id),
                Undo::NameOnServer(name, id) => {
                    self.names.remove(&name);
                    conn.prepared.remove(id);
                }
                // Nobody's now; what the client parsed last is sent again where it is used.
                // The client has sent another one since, which is still to be answered: that one counts.
                Undo::Unnamed(before) if self.owed.has_unnamed() => self.owed.unnamed_before(before),
                Undo::Unnamed(before) => {
                    conn.forget_unnamed();
                    if before.is_some() {
                        self.names.unnamed_signs = Signs::of_parse(before.as_deref());
                    }
                    match before {
                        Some(_) => self.names.replace_unnamed(before),
                        None => self.names.drop_unnamed(),
                    }
                }
                Undo::Lent(name) => self.not_lent(&name),
                Undo::Columns(_) | Undo::Deallocates(_) => {}
                Undo::Evicted(id) => {
                    // It is still there; if that makes one too many, another goes, and is closed on the server later.
                    if conn.prepared.insert(id, None).is_some() {
                        self.retire = true;
                    }
                }
            }
        }
    }

    pub(super) fn state(&self) -> SessionState {
        self.state
    }

    fn enter(&mut self, event: SessionEvent) {
        self.enter_at(event, Millis::now());
    }

    /// The one place where a session changes state.
    pub(super) fn enter_at(&mut self, event: SessionEvent, now: Millis) {
        match self.state.next(event) {
            Ok(next) => {
                self.state = next;
                self.registered.shared.enter(next, now);
            }
            Err(illegal) => debug_assert!(false, "{illegal}"),
        }
    }

    async fn finish(mut self, end: End) {
        self.enter(SessionEvent::End);
        self.pass_on_hints();
        if self.made_stale || (self.creates && self.has_prepared) {
            self.pool.plans_are_stale();
        }
        if self.made_functions {
            self.pool.functions.maker_vanished();
        }
        let error = self.last_words(&end);
        if let Some(error) = error {
            self.pool.stats.told(&error);
            // Nothing may be put inside a message of the server's that the client has half of.
            if self.answer.left == 0 || self.answer.sink == Sink::Discard {
                error.write(&mut self.to_client.buf);
            }
        }
        if matches!(end, End::ServerLost)
            && let Some(notice) = self.last_notice.take()
        {
            tenantry_wire::error::write_fatal_from_notice(&mut self.to_client.buf, &notice);
        }
        let server_side = self.lease.take().map(|lease| super::vanish::Remains {
            lease,
            owed: std::mem::take(&mut self.owed),
            unsent: !self.to_server.is_done() || self.request.left > 0,
            input: std::mem::take(&mut self.answer_input),
            partial: std::mem::take(&mut self.answer),
            lost: matches!(end, End::ServerLost | End::ServerSaidWhy)
                || self.server_write_failed
                || self.said_fatal
                || self.retire
                || self.signs.opaque
                || self.signs.seeds
                || !self.pins.forever().is_empty(),
            dirty: self.pinned
                || self.listening.as_ref().is_some_and(|listening| !listening.is_served())
                || self.mode == PoolMode::Session
                || self.signs.suspect
                || self.signs.opaque
                || !self.pins.is_empty()
                || !self.lent.is_empty()
                || (self.worked && (self.settings.makes_temporary() || self.pool.functions.are_suspect(Millis::now())))
                || self.evidence.is_some(),
            cancelling: self.cancelling.take(),
        });
        self.drop_pin();
        if let Some(remains) = server_side {
            let limit = self.pool.settings().pool.rollback_timeout;
            super::vanish::bring_to_rest(remains, limit);
        }
        if !matches!(end, End::ClientGone) {
            let goodbye = std::future::poll_fn(|cx| self.to_client.poll_send(&mut self.client, cx, &[]));
            let _ = tokio::time::timeout(Duration::from_secs(5), goodbye).await;
        }
        let _ = tokio::time::timeout(LINGER, linger(&mut self.client)).await;
    }

    /// Exactly one error per failure, or none if PostgreSQL said it already.
    fn last_words(&self, end: &End) -> Option<ErrorResponse> {
        match end {
            End::ClientGone | End::ServerSaidWhy => None,
            End::Fatal(error) => Some(error.clone()),
            End::ServerLost if self.last_notice.is_some() => None,
            End::ServerLost => {
                // In a transaction block that was not being committed, all of it is gone for certain.
                let certain = !self.owed.client_waits() || (self.owed.status() != status::IDLE && !self.signs.commits);
                Some(errors::server_lost(certain))
            }
        }
    }
}

/// Closes our side and reads what the client still sends: with unread bytes the kernel would reset the connection, and
/// the client might never see our last words.
async fn linger(client: &mut Stream) -> io::Result<()> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    client.shutdown().await?;
    let mut sink = [0u8; 4096];
    while client.read(&mut sink).await? > 0 {}
    Ok(())
}

impl Drop for Session {
    fn drop(&mut self) {
        self.drop_pin();
    }
}
