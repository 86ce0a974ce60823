//! From the client to the server: what each message of the client means for the connection that it goes to.
//!
//! Whole runs are forwarded from where they were read. A message is taken apart only for its statement name; its body is
//! never decoded. A message that PostgreSQL would refuse as malformed is refused here, with none of its bytes forwarded.

use std::{collections::VecDeque, sync::Arc, task::Context};

use bytes::Bytes;
use tenantry_wire::{
    error::ErrorResponse,
    extended::{self, BindHead, Parse, Target},
    frame::{self, FrameError, HEADER, Header},
    message,
    tag::{frontend, status},
};

use super::{
    errors,
    lend::Shown,
    owed::{For, Kind, Own, Undo},
    pin::PinReason,
    relay::{CHUNK, End, MAX_OWED, Session, Sink},
    run::Run,
    statements::{MAX_NAMES, MAX_UNNAMED},
};
use crate::{
    pool::{lease::Lease, stats::Stats},
    server::{
        conn::Unnamed,
        named::{Named, NamedUse, known_by},
        signs::{Asks, Signs},
        statements::{self, Columns, Statement},
    },
};

/// The two names of a Bind must end within this many bytes.
const MAX_BIND_NAMES: usize = 16 * 1024;
/// Portals that are remembered to be a DEALLOCATE: of others the client keeps the name.
const MAX_PORTALS: usize = 1024;
/// A simple query up to this size is looked at before any of it goes on; a longer one as it passes.
const MAX_LOOKED_AT: usize = 16 * 1024;

/// What to do with the message at hand.
enum Step {
    /// Its bytes go on as they are.
    Forward(Sink),
    /// Its first bytes were replaced by what was written to `to_server`; the rest goes on.
    Replaced { first: usize },
    /// Its bytes go nowhere.
    Discard,
    /// More of it must be there first.
    Incomplete,
    /// It must wait: for a lease, or for something to be confirmed.
    Wait,
}

/// Whether a text may be run now.
enum Ready {
    Yes,
    Wait,
    Refused(Box<ErrorResponse>),
}

/// Whether a statement gives the columns that its client was told of.
enum Fit {
    /// This one does.
    Yes(Arc<Statement>),
    No(Step),
}

/// Of a Describe or a Close.
fn target_of(body: &[u8]) -> Option<Target<'_>> {
    Target::read(body).map(|target| Target { name: known_by(target.name), ..target })
}

impl Session {
    /// Deals with the client's bytes as far as possible; says how many were dealt with. The rest must be kept.
    pub(super) fn take_requests(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Result<usize, End> {
        let mut run = Run::new(bytes);
        let outcome = self.walk_requests(&mut run);
        let from = std::mem::take(&mut self.keep_at);
        self.keep(bytes.get(from..run.at).unwrap_or_default());
        // What came before a malformed message was a request all the same.
        if self.lease.is_some() {
            let pending = run.pending();
            if !pending.is_empty() || !self.to_server.is_done() {
                self.send_to_server(cx, pending);
            }
        }
        self.emit_own();
        outcome?;
        Ok(run.at)
    }

    fn walk_requests(&mut self, run: &mut Run<'_>) -> Result<(), End> {
        let bytes = run.bytes;
        loop {
            if self.request.left > 0 {
                if run.at >= bytes.len() {
                    break;
                }
                self.pass_on(run);
                if self.request.left == 0 && self.owed.is_stranded() {
                    run.cut(&mut self.to_server.buf, 0);
                    self.end_stranded();
                }
                continue;
            }
            if self.to_server.buf.len() >= CHUNK {
                // A few bytes of the client's may have made us write many: they go first.
                break;
            }
            let rest = bytes.get(run.at..).unwrap_or_default();
            let header = frame::client_header(rest).map_err(|e| End::Fatal(errors::malformed(&e)))?;
            let Some(header) = header else { break };
            if header.tag == frontend::TERMINATE {
                self.client_said_goodbye();
                run.cut(&mut self.to_server.buf, 0);
                run.at = bytes.len();
                run.start = run.at;
                break;
            }
            match self.request(header, rest, run)? {
                Step::Forward(sink) => {
                    run.at = run.at.saturating_add(HEADER);
                    self.begin(header, header.body, sink);
                }
                Step::Replaced { first } => self.begin(header, header.total().saturating_sub(first), Sink::Forward),
                Step::Discard => {
                    run.cut(&mut self.to_server.buf, HEADER);
                    self.begin(header, header.body, Sink::Discard);
                }
                Step::Incomplete
                    if header.tag == frontend::PARSE
                        && rest.len() > HEADER
                        && let Err(error) = self.hold_message(header.total()) =>
                {
                    self.poison(run, error)?;
                    run.cut(&mut self.to_server.buf, HEADER);
                    self.begin(header, header.body, Sink::Discard);
                }
                Step::Incomplete | Step::Wait => break,
            }
        }
        Ok(())
    }

    /// The message at hand must be there whole before it can be dealt with: takes the memory for it.
    fn hold_message(&mut self, bytes: usize) -> Result<(), ErrorResponse> {
        if bytes > self.limits.max_message {
            return Err(errors::message_too_large(self.limits.max_message));
        }
        // Any client may have this much.
        if bytes > CHUNK && self.held.is_none() {
            self.held = Some(self.limits.memory.take(bytes).ok_or_else(errors::out_of_memory)?);
        }
        Ok(())
    }

    /// Begins a message of which `left` bytes are still to be dealt with.
    fn begin(&mut self, header: Header, left: usize, sink: Sink) {
        self.tally.received_bytes =
            self.tally.received_bytes.saturating_add(u64::try_from(header.total()).unwrap_or(0));
        self.request.left = left;
        self.request.sink = sink;
        // It was there whole, or is not needed whole.
        self.held = None;
        if sink == Sink::Scan {
            self.scan.reset();
        }
    }

    /// Passes on what is there of the message that has begun.
    fn pass_on(&mut self, run: &mut Run<'_>) {
        let there = run.bytes.len().saturating_sub(run.at).min(self.request.left);
        let part = run.bytes.get(run.at..run.at.saturating_add(there)).unwrap_or_default();
        self.request.left = self.request.left.saturating_sub(there);
        match self.request.sink {
            Sink::Forward => run.at = run.at.saturating_add(there),
            Sink::Scan => {
                // The NUL that ends the text is no part of it.
                self.scan.feed(part.strip_suffix(b"\0").unwrap_or(part), &mut self.signs);
                run.at = run.at.saturating_add(there);
                if self.request.left == 0 {
                    self.scan.finish(&mut self.signs);
                    self.alone |= std::mem::take(&mut self.signs.drops_names) && self.owed.will_be_answered();
                }
            }
            Sink::Discard => run.cut(&mut self.to_server.buf, there),
        }
    }

    /// One message of the client. A table of contents: what happens without a server, then by type.
    fn request(&mut self, header: Header, rest: &[u8], run: &mut Run<'_>) -> Result<Step, End> {
        if let Some(step) = self.request_without_server(header) {
            return Ok(step);
        }
        if self.listening.as_ref().is_some_and(|listening| listening.is_served()) && !self.heed_channels(rest, run)? {
            return Ok(Step::Wait);
        }
        if self.lease.is_none() {
            if !self.ensure_lease()? {
                return Ok(if self.refused { self.drop_refused(header) } else { Step::Wait });
            }
            self.keep_at = run.at;
        }
        if self.owed.is_empty() {
            self.alone = false;
        }
        if self.is_blocked() || self.owed.len() >= MAX_OWED {
            if rest.len() >= header.total().min(CHUNK) {
                self.wait_for_replay();
            }
            return Ok(Step::Wait);
        }
        if self.owed.is_skipping() && header.tag != frontend::SYNC {
            // PostgreSQL would read and drop it: so do we, and keep its names out of our books.
            return Ok(Step::Discard);
        }
        let body = rest.get(HEADER..rest.len().min(header.total())).unwrap_or_default();
        let whole = body.len() == header.body;
        match header.tag {
            frontend::QUERY if rest.len() < header.total().min(MAX_LOOKED_AT) => Ok(Step::Incomplete),
            frontend::QUERY => self.query(body, whole, run),
            frontend::SYNC => {
                self.owed.push(Kind::Sync, For::Client, None);
                Ok(Step::Forward(Sink::Forward))
            }
            frontend::PARSE => self.parse(header, body, whole, run),
            frontend::BIND => self.bind(header, body, run),
            frontend::DESCRIBE if whole => self.describe(body, run),
            frontend::CLOSE if whole => self.close(body, run),
            frontend::DESCRIBE | frontend::CLOSE => Ok(Step::Incomplete),
            frontend::EXECUTE => Ok(self.execute(header, rest, run)),
            frontend::FUNCTION_CALL => {
                // A function by its number: it may be any.
                self.signs.suspect = true;
                self.owed.push(Kind::FunctionCall, For::Client, None);
                Ok(Step::Forward(Sink::Forward))
            }
            frontend::COPY_DONE | frontend::COPY_FAIL => {
                self.owed.copy_ended();
                Ok(Step::Forward(Sink::Forward))
            }
            frontend::FLUSH if header.body > 0 => {
                // Malformed: answered by an error, and by nothing else.
                self.owed.push(Kind::Close, For::Client, None);
                Ok(Step::Forward(Sink::Forward))
            }
            // Flush and CopyData.
            _ => Ok(Step::Forward(Sink::Forward)),
        }
    }

    /// Messages that need no server connection, or that must not get one.
    fn request_without_server(&mut self, header: Header) -> Option<Step> {
        let copy = matches!(header.tag, frontend::COPY_DATA | frontend::COPY_DONE | frontend::COPY_FAIL);
        if copy {
            // PostgreSQL ignores them outside a COPY: a client may still be sending when its COPY has failed. While
            // anything is unanswered it may yet turn out to be a COPY that these are for.
            return (self.lease.is_none() || self.owed.is_empty()).then_some(Step::Discard);
        }
        if self.refused {
            return Some(self.drop_refused(header));
        }
        if self.skip_to_sync {
            if header.tag == frontend::SYNC {
                self.skip_to_sync = false;
                self.to_client.buf.extend_from_slice(&message::ready_for_query(status::IDLE));
            }
            return Some(Step::Discard);
        }
        if self.lease.is_none() && header.body == 0 {
            if header.tag == frontend::SYNC {
                self.to_client.buf.extend_from_slice(&message::ready_for_query(status::IDLE));
                return Some(Step::Discard);
            }
            if header.tag == frontend::FLUSH {
                return Some(Step::Discard);
            }
        }
        None
    }

    /// The request that an error of ours has just answered: a simple one is over, an extended one until its Sync.
    fn drop_refused(&mut self, header: Header) -> Step {
        self.refused = false;
        if matches!(header.tag, frontend::QUERY | frontend::FUNCTION_CALL) {
            self.to_client.buf.extend_from_slice(&message::ready_for_query(status::IDLE));
        } else {
            self.skip_to_sync = true;
        }
        Step::Discard
    }

    fn query(&mut self, body: &[u8], whole: bool, run: &mut Run<'_>) -> Result<Step, End> {
        let text = body.strip_suffix(b"\0").unwrap_or(body);
        let advanced = self.signs.advances;
        (self.signs.sequences, self.signs.asks_names) = (false, false);
        if whole {
            self.signs.add(text, &mut self.scan);
        }
        let named = self.named_in(text, whole);
        let mut asks = self.signs.asks();
        named.iter().for_each(|named| self.add_asks(named, &mut asks));
        let ready = self.is_ready(asks, advanced, run);
        if matches!(ready, Ready::Wait) {
            self.signs.advances = advanced;
            return Ok(Step::Wait);
        }
        self.names.drop_unnamed();
        self.owed.drop_unnamed();
        if let Some(conn) = self.lease.as_mut().and_then(Lease::conn) {
            conn.forget_unnamed();
        }
        self.tally.queries += 1;
        if let Ready::Refused(error) = ready {
            return self.poison_query(run, *error);
        }
        // If a statement of ours fails, PostgreSQL discards what comes behind it: one thing at a time.
        let drops_names = std::mem::take(&mut self.signs.drops_names);
        self.alone |= asks.names || asks.speaks_of_names || drops_names;
        if (asks.names && self.show_names(run)? == Shown::OutOfMemory) || !self.lend_all(&named, run)? {
            return self.poison_query(run, errors::out_of_memory());
        }
        let undo = self.deallocated_by(&named);
        self.owed.push(Kind::Query, For::Client, undo);
        Ok(Step::Forward(if whole { Sink::Forward } else { Sink::Scan }))
    }

    /// Whether a text that asks for this may be run now. `advanced`: what came before it moved a sequence.
    fn is_ready(&mut self, asks: Asks, advanced: bool, run: &mut Run<'_>) -> Ready {
        if (asks.names || asks.speaks_of_names) && !self.is_settled(run) {
            return Ready::Wait;
        }
        // That a text holds an EXECUTE may move one, but not before what it runs asks.
        let is_asked = asks.sequences || asks.runs_sequences;
        if is_asked && !self.may_ask_sequences(advanced || (asks.advances && !asks.runs_sequences)) {
            return Ready::Refused(Box::new(errors::sequence_elsewhere()));
        }
        Ready::Yes
    }

    /// Whether everything is answered, so that the books are true. If it is not, PostgreSQL is asked not to put it off.
    fn is_settled(&mut self, run: &mut Run<'_>) -> bool {
        // While it reads the data of a COPY, PostgreSQL answers nothing; whatever comes that is no data ends the connection.
        if self.owed.is_empty() || self.owed.in_copy_in() {
            return true;
        }
        if self.owed.take_unflushed() {
            run.cut(&mut self.to_server.buf, 0);
            self.to_server.buf.extend_from_slice(message::FLUSH);
        }
        self.wait_for_replay();
        false
    }

    fn execute(&mut self, header: Header, rest: &[u8], run: &mut Run<'_>) -> Step {
        let portal = if self.deallocates.is_empty() { None } else { rest.get(HEADER..header.total()) };
        if portal.is_none() && !self.deallocates.is_empty() && header.total() <= MAX_LOOKED_AT {
            return Step::Incomplete;
        }
        self.tally.queries += 1;
        let portal = portal.and_then(|body| body.split(|b| *b == 0).next()).map(known_by);
        let Some(name) = portal.and_then(|portal| self.deallocates.remove(portal)) else {
            self.owed.push(Kind::Execute, For::Client, None);
            return Step::Forward(Sink::Forward);
        };
        // What comes behind it has names less.
        self.alone = true;
        let undo = name.map(|name| Box::new(Undo::Deallocates(VecDeque::from([Some(name)]))));
        self.owed.push(Kind::Execute, For::Client, undo);
        run.cut(&mut self.to_server.buf, header.total());
        self.to_server.buf.extend_from_slice(rest.get(..header.total()).unwrap_or_default());
        self.to_server.buf.extend_from_slice(message::FLUSH);
        Step::Replaced { first: header.total() }
    }

    fn parse(&mut self, header: Header, body: &[u8], whole: bool, run: &mut Run<'_>) -> Result<Step, End> {
        let unnamed = match body.first() {
            None if header.body > 0 => return Ok(Step::Incomplete),
            first => first == Some(&0),
        };
        if unnamed && header.total() > MAX_UNNAMED && !whole {
            return Ok(self.parse_large_unnamed());
        }
        if unnamed && whole && self.reuse_unnamed {
            // As one that the client calls by no name: it may be there already.
            self.names.drop_unnamed();
        }
        if !whole {
            return Ok(Step::Incomplete);
        }
        let Some(parse) = Parse::read(body).map(|parse| Parse { name: known_by(parse.name), ..parse }) else {
            // Malformed inside: PostgreSQL says how.
            self.owed.push(Kind::Parse, For::Client, None);
            return Ok(Step::Forward(Sink::Forward));
        };
        let executed = self.executed_by(parse.query);
        if let Some(named) = &executed {
            // Its columns are those of what stands under the name now.
            if !self.is_settled(run) {
                return Ok(Step::Wait);
            }
            self.lend(named, run)?;
        }
        if unnamed && !self.reuse_unnamed {
            let message = run.bytes.get(run.at..run.at.saturating_add(header.total())).unwrap_or_default();
            return Ok(self.parse_unnamed(&parse, message));
        }
        self.parse_named(header, &parse, executed.is_some(), run)
    }

    fn parse_unnamed(&mut self, parse: &Parse<'_>, message: &[u8]) -> Step {
        let before = self.names.unnamed().cloned();
        if before.as_deref() == Some(message) {
            // As the last time: there is nothing to look at, and nothing to copy.
            self.names.replace_unnamed(before.clone());
        } else {
            self.names.unnamed_signs = Signs::of(parse.query);
            self.names.replace_unnamed((message.len() <= MAX_UNNAMED).then(|| Bytes::copy_from_slice(message)));
        }
        self.own_unnamed();
        self.owed.push(Kind::Parse, For::Client, Some(Box::new(Undo::Unnamed(before))));
        Step::Forward(Sink::Forward)
    }

    /// Too large to keep: streamed through. Its text is looked at in passing, types and all; that can only suspect too much.
    fn parse_large_unnamed(&mut self) -> Step {
        let before = self.names.unnamed().cloned();
        self.names.replace_unnamed(None);
        // Its text is looked at as it passes, for this batch; whatever comes of it later is suspected.
        self.names.unnamed_signs = Signs { suspect: true, commits: true, listens: true, ..Signs::default() };
        self.own_unnamed();
        self.owed.push(Kind::Parse, For::Client, Some(Box::new(Undo::Unnamed(before))));
        Step::Forward(Sink::Scan)
    }

    fn own_unnamed(&mut self) {
        let unnamed = self.unnamed();
        if let Some(conn) = self.lease.as_mut().and_then(Lease::conn) {
            conn.unnamed = unnamed;
        }
    }

    /// Which one the client's unnamed statement is, among all that connections have had.
    fn unnamed(&self) -> Option<Unnamed> {
        self.names.unnamed_number().map(|number| Unnamed { session: self.registered.shared.id, number })
    }

    /// The request at hand waits until what is owed was answered. If that is only what the connection was made the client's
    /// with, the connection must not go before the request has run: the next one would owe as much.
    fn wait_for_replay(&mut self) {
        self.confirmed |= self.evidence.is_none() && self.owed.is_for_us_alone();
    }

    /// `executes`: it is an EXECUTE of one of the client's names.
    fn parse_named(
        &mut self,
        header: Header,
        parse: &Parse<'_>,
        executes: bool,
        run: &mut Run<'_>,
    ) -> Result<Step, End> {
        if self.names.get(parse.name).is_some() {
            // Whether the earlier one stands is only known when it was answered.
            if !executes && !self.is_settled(run) {
                return Ok(Step::Wait);
            }
            // PostgreSQL finds fault with the text first, and then with the name.
            self.occupy(parse.name, run)?;
            self.owed.push(Kind::Parse, For::Client, None);
            return Ok(Step::Forward(Sink::Forward));
        }
        if self.names.len() >= MAX_NAMES {
            return self.poison(run, errors::too_many_statements());
        }
        if !self.names.has_room(&self.limits.memory) {
            return self.poison(run, errors::out_of_memory());
        }
        let sql_gives_names = self.signs.prepares || self.pins.has(PinReason::Prepare) || self.sql_gives_names;
        if !parse.name.is_empty() && sql_gives_names {
            self.occupy(parse.name, run)?;
        }
        // From here on the statement itself holds its text.
        self.held = None;
        let plans = self.pool.plans();
        // What EXECUTE gives depends on whose name it is: shared with nobody else.
        let own = if executes { self.registered.shared.id } else { 0 };
        let planning = self.settings.planning() ^ own;
        let mut interned = self.pool.statements.intern(parse, planning, plans, &self.limits.memory);
        if interned.is_none()
            && let Some(conn) = self.lease.as_mut().and_then(Lease::conn)
        {
            conn.prepared.hold_none();
            interned = self.pool.statements.intern(parse, planning, plans, &self.limits.memory);
        }
        let Some(statement) = interned else { return self.poison(run, errors::out_of_memory()) };
        self.names.insert(parse.name, Arc::clone(&statement));
        Stats::count(&self.pool.stats.parses);
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
        run.cut_to_write(&mut self.to_server.buf, header.total());
        let may_be_refused = self.owed.status() == status::FAILED || self.owed.is_status_in_doubt();
        if (conn.plans != plans || may_be_refused) && conn.prepared.touch(statement.id) {
            // What is there may not fit the tables any more, and the client asks for one that does; or PostgreSQL may refuse it
            // in a failed transaction.
            conn.prepared.remove(statement.id);
            let written = extended::write_statement_target(&mut self.to_server.buf, frontend::CLOSE, &statement.name);
            written.map_err(|_| End::Fatal(errors::internal()))?;
            self.owed.push(Kind::Close, For::Us, Some(Box::new(Undo::Evicted(statement.id))));
        }
        if conn.prepared.touch(statement.id) {
            Stats::count(&self.pool.stats.parses_saved);
            self.owed.push_own(Own::ParseComplete, Some(Box::new(Undo::Name(parse.name.into()))));
        } else {
            let undo = Undo::NameOnServer(parse.name.into(), statement.id);
            self.prepare(&statement, For::Client, undo)?;
        }
        Ok(Step::Replaced { first: header.total() })
    }

    /// Writes the Parse of a statement that the server connection does not have; evicts another if it must.
    pub(super) fn prepare(&mut self, statement: &Arc<Statement>, whose: For, undo: Undo) -> Result<(), End> {
        let broken = |_: FrameError| End::Fatal(errors::internal());
        self.has_prepared = true;
        // A client that calls its statements as we do.
        if let Some((name, stood)) = self.lent.take(&statement.name) {
            self.close_lent(name, stood)?;
        }
        self.close_doubtful(&statement.name)?;
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
        if let Some(evicted) = conn.prepared.insert(statement.id, Some(Arc::clone(statement))) {
            let name = statements::name_of(evicted);
            extended::write_statement_target(&mut self.to_server.buf, frontend::CLOSE, &name).map_err(broken)?;
            self.owed.push(Kind::Close, For::Us, Some(Box::new(Undo::Evicted(evicted))));
        }
        statement.parse().write_as(&mut self.to_server.buf, &statement.name).map_err(broken)?;
        self.owed.push(Kind::Parse, whose, Some(Box::new(undo)));
        Ok(())
    }

    /// Makes sure that the statement is there under the server's name for it. The run must have been cut before: this may
    /// write.
    fn put_on_server(&mut self, statement: &Arc<Statement>) -> Result<(), End> {
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
        if conn.prepared.touch(statement.id) {
            return Ok(());
        }
        self.prepare(statement, For::Us, Undo::OnServer(statement.id))
    }

    fn bind(&mut self, header: Header, body: &[u8], run: &mut Run<'_>) -> Result<Step, End> {
        let Some(head) = BindHead::read(body) else {
            if body.len() < header.body && body.len() < MAX_BIND_NAMES {
                return Ok(Step::Incomplete);
            }
            self.owed.push(Kind::Bind, For::Client, None);
            return Ok(Step::Forward(Sink::Forward));
        };
        let head = BindHead { statement: known_by(head.statement), ..head };
        if head.portal.is_empty() {
            self.bound = None;
        }
        if head.portal.is_empty() && !self.deallocates.is_empty() {
            // A named one is not replaced, but refused.
            self.deallocates.remove(head.portal);
        }
        let Some(statement) = self.names.get(head.statement).cloned() else {
            return self.bind_unshared(&head, run);
        };
        let asks = self.asks_of(&statement.signs);
        match self.is_ready(asks, self.signs.advances, run) {
            Ready::Yes => {}
            Ready::Wait => return Ok(Step::Wait),
            Ready::Refused(error) => return self.poison(run, *error),
        }
        if asks.speaks_of_names {
            self.lend_to(statement.signs.named.as_deref(), run)?;
        }
        // A client that asks for the columns of the portal does so right behind.
        let next = run.bytes.get(run.at.saturating_add(header.total())..).unwrap_or_default();
        let describes = matches!(next, [frontend::DESCRIBE, _, _, _, _, b'P', ..]);
        let statement = match self.ensure_fits(head.statement, statement, describes, run)? {
            Fit::Yes(statement) => statement,
            Fit::No(step) => return Ok(step),
        };
        let shown = if asks.names { self.show_names(run)? } else { Shown::NotAll };
        if asks.names && shown == Shown::OutOfMemory {
            return self.poison(run, errors::out_of_memory());
        }
        let first = HEADER.saturating_add(head.length);
        run.cut_to_write(&mut self.to_server.buf, first);
        // Where names are asked for, there must be none but the client's.
        let name = if shown == Shown::Yes {
            self.lend_statement(head.statement, &statement, run)?;
            head.statement
        } else {
            self.put_on_server(&statement)?;
            &statement.name
        };
        self.signs.merge(&statement.signs);
        if head.portal.is_empty() && !statement.knows_columns() {
            self.bound = Some(Arc::clone(&statement));
        }
        self.portal_of(head.portal, &statement.signs);
        let written = head.write_as(&mut self.to_server.buf, name, header.body);
        written.map_err(|e| End::Fatal(errors::malformed(&e)))?;
        self.owed.push(Kind::Bind, For::Client, None);
        Ok(Step::Replaced { first })
    }

    /// Of the client's own unnamed statement, or of one that it has not prepared in the protocol.
    fn bind_unshared(&mut self, head: &BindHead<'_>, run: &mut Run<'_>) -> Result<Step, End> {
        if !head.statement.is_empty() {
            // PostgreSQL says 26000 in its own words; or it is the name of a SQL-level PREPARE.
            self.unlend(head.statement, run)?;
            self.owed.push(Kind::Bind, For::Client, None);
            return Ok(Step::Forward(Sink::Forward));
        }
        let asks = self.asks_of(&self.names.unnamed_signs);
        match self.is_ready(asks, self.signs.advances, run) {
            Ready::Yes => {}
            Ready::Wait => return Ok(Step::Wait),
            Ready::Refused(error) => return self.poison(run, *error),
        }
        if self.owed.is_unnamed_in_doubt() && !self.is_settled(run) {
            return Ok(Step::Wait);
        }
        let named = self.names.unnamed_signs.named.clone();
        self.lend_to(named.as_deref(), run)?;
        if let Some(step) = self.need_unnamed(run)? {
            return Ok(step);
        }
        if asks.names && self.show_names(run)? == Shown::OutOfMemory {
            return self.poison(run, errors::out_of_memory());
        }
        self.signs.merge(&self.names.unnamed_signs);
        if self.names.unnamed_signs.drops_names {
            let signs = self.names.unnamed_signs.clone();
            self.portal_of(head.portal, &signs);
        }
        self.owed.push(Kind::Bind, For::Client, None);
        Ok(Step::Forward(Sink::Forward))
    }

    /// Notes what the portal takes away when it is run.
    fn portal_of(&mut self, portal: &[u8], signs: &Signs) {
        if !signs.drops_names || self.deallocates.len() >= MAX_PORTALS {
            return;
        }
        let is_known = |named: &&Named| named.verb == NamedUse::Deallocate && self.names.get(&named.name).is_some();
        let name = signs.named.as_deref().filter(is_known).map(|named| named.name.as_slice().into());
        // A named one that is there is not replaced, but refused.
        self.deallocates.entry(known_by(portal).into()).or_insert(name);
    }

    /// The client is about to use its unnamed statement: makes sure that it is on this server connection and not
    /// somebody else's. `Some` if the request was answered in another way.
    fn need_unnamed(&mut self, run: &mut Run<'_>) -> Result<Option<Step>, End> {
        let unnamed = self.unnamed();
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
        if unnamed.is_some() && conn.unnamed == unnamed {
            return Ok(None);
        }
        let Some(parse) = self.names.unnamed().cloned() else {
            return self.poison(run, errors::no_unnamed_statement()).map(Some);
        };
        conn.unnamed = unnamed;
        run.cut(&mut self.to_server.buf, 0);
        self.to_server.buf.extend_from_slice(&parse);
        self.owed.push(Kind::Parse, For::Us, Some(Box::new(Undo::Unnamed(Some(parse)))));
        Ok(None)
    }

    fn describe(&mut self, body: &[u8], run: &mut Run<'_>) -> Result<Step, End> {
        let header = Header { tag: frontend::DESCRIBE, body: body.len() };
        match target_of(body) {
            Some(target) if target.is_statement() && target.name.is_empty() && self.names.get(b"").is_none() => {
                if self.owed.is_unnamed_in_doubt() && !self.is_settled(run) {
                    return Ok(Step::Wait);
                }
                let named = self.names.unnamed_signs.named.clone();
                if let Some(step) = self.lend_to_describe(named.as_deref(), run)? {
                    return Ok(step);
                }
                if let Some(step) = self.need_unnamed(run)? {
                    return Ok(step);
                }
            }
            Some(target) if target.is_statement() => {
                let Some(statement) = self.names.get(target.name).cloned() else {
                    self.unlend(target.name, run)?;
                    self.push_describe(None);
                    return Ok(Step::Forward(Sink::Forward));
                };
                if let Some(step) = self.lend_to_describe(statement.signs.named.as_deref(), run)? {
                    return Ok(step);
                }
                let statement = match self.ensure_fits(target.name, statement, true, run)? {
                    Fit::Yes(statement) => statement,
                    Fit::No(step) => return Ok(step),
                };
                run.cut_to_write(&mut self.to_server.buf, header.total());
                self.put_on_server(&statement)?;
                let written =
                    extended::write_statement_target(&mut self.to_server.buf, frontend::DESCRIBE, &statement.name);
                written.map_err(|e| End::Fatal(errors::malformed(&e)))?;
                self.push_describe((!statement.knows_columns()).then_some(statement));
                return Ok(Step::Replaced { first: header.total() });
            }
            Some(target) if target.name.is_empty() => {
                let bound = self.bound.take();
                self.push_describe(bound);
                return Ok(Step::Forward(Sink::Forward));
            }
            _ => {}
        }
        self.push_describe(None);
        Ok(Step::Forward(Sink::Forward))
    }

    /// The columns of an EXECUTE are those of what stands under its name when it is parsed, which it may be anew. `Some` if
    /// the request must wait.
    fn lend_to_describe(&mut self, named: Option<&Named>, run: &mut Run<'_>) -> Result<Option<Step>, End> {
        let Some(named) = named.filter(|named| named.verb == NamedUse::Execute && self.knows(named)) else {
            return Ok(None);
        };
        if !self.is_settled(run) {
            return Ok(Some(Step::Wait));
        }
        self.lend(named, run)?;
        Ok(None)
    }

    /// `statement`: the one whose columns the answer tells for the first time.
    fn push_describe(&mut self, statement: Option<Arc<Statement>>) {
        self.describing |= statement.is_some();
        self.owed.push(Kind::Describe, For::Client, statement.map(|s| Box::new(Undo::Columns(s))));
    }

    /// Makes sure that a statement which this connection does not have yet still gives the columns that its client was
    /// told of.
    fn ensure_fits(
        &mut self,
        name: &[u8],
        statement: Arc<Statement>,
        asks: bool,
        run: &mut Run<'_>,
    ) -> Result<Fit, End> {
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
        if conn.prepared.touch(statement.id) && statement.columns(conn.plans) != Columns::Changed {
            return Ok(Fit::Yes(statement));
        }
        Ok(match self.verify(&statement, run)? {
            Columns::Same => Fit::Yes(statement),
            Columns::Unknown => Fit::No(Step::Wait),
            Columns::Changed => match self.renew(name, &statement, asks) {
                Some(fresh) => Fit::Yes(fresh),
                None => Fit::No(self.poison(run, errors::stale_plan())?),
            },
        })
    }

    /// Closing a name is the client's business alone: the shared statement stays where it is.
    fn close(&mut self, body: &[u8], run: &mut Run<'_>) -> Result<Step, End> {
        let header = Header { tag: frontend::CLOSE, body: body.len() };
        let Some(target) = target_of(body).filter(Target::is_statement) else {
            if let Some(portal) = target_of(body).filter(|_| !self.deallocates.is_empty()) {
                self.deallocates.remove(portal.name);
            }
            self.owed.push(Kind::Close, For::Client, None);
            return Ok(Step::Forward(Sink::Forward));
        };
        let undo = match (self.names.remove(target.name), self.lent.take(target.name)) {
            (Some(statement), None) => {
                run.cut(&mut self.to_server.buf, header.total());
                self.owed.push_own(Own::CloseComplete, Some(Box::new(Undo::Closed(target.name.into(), statement))));
                return Ok(Step::Replaced { first: header.total() });
            }
            // It is on the connection under this very name: so this closes it there, too.
            (Some(statement), Some((name, stood))) => Some(Undo::ClosedLent(name, statement, stood)),
            (None, Some((name, stood))) => Some(Undo::Taken(name, stood)),
            (None, None) => None,
        };
        if target.name.is_empty() {
            self.names.drop_unnamed();
            self.owed.drop_unnamed();
            if let Some(conn) = self.lease.as_mut().and_then(Lease::conn) {
                conn.forget_unnamed();
            }
        }
        self.owed.push(Kind::Close, For::Client, undo.map(Box::new));
        Ok(Step::Forward(Sink::Forward))
    }

    /// Answers a message with an error of ours, in its turn: sends in its place one that must fail, so that PostgreSQL's
    /// transaction and its skipping to Sync follow by themselves, and replaces the error that comes back.
    fn poison(&mut self, run: &mut Run<'_>, error: ErrorResponse) -> Result<Step, End> {
        run.cut(&mut self.to_server.buf, 0);
        let written =
            extended::write_statement_target(&mut self.to_server.buf, frontend::DESCRIBE, b"tenantry refuses");
        written.map_err(|_| End::Fatal(errors::internal()))?;
        self.owed.push_poison(error);
        Ok(Step::Discard)
    }

    /// The same for a simple query, which no Sync of the client's will follow.
    fn poison_query(&mut self, run: &mut Run<'_>, error: ErrorResponse) -> Result<Step, End> {
        let step = self.poison(run, error)?;
        self.to_server.buf.extend_from_slice(message::SYNC);
        self.owed.push(Kind::Sync, For::Client, None);
        Ok(step)
    }
}
