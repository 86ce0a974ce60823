//! From the server to the client: what each message of the server means for the session.
//!
//! Whole runs are forwarded from where they were read; rows are skipped over in a tight loop. Whose a message is follows
//! from `Owed`; one that nobody asked for ends the connection before any of it reaches the client.

use std::task::Context;

use tenantry_config::PoolMode;
use tenantry_wire::{
    error::{Fields, sqlstate},
    frame::{self, HEADER, Header},
    message,
    tag::{backend, status},
};

use super::{
    errors,
    heal::Keep,
    owed::{For, Kind, Own, Verdict},
    relay::{End, Session, Sink},
    run::Run,
};
use crate::{clock::Millis, pool::lease::Lease, server::conn::is_setting};

/// Of an ErrorResponse or NoticeResponse, this much is looked at; the fields that matter come first.
const MAX_FIELDS: usize = 4096;
/// Longest message that is taken whole: a ParameterStatus, a row of our own probe.
const MAX_WHOLE: usize = 1024 * 1024;
/// Longest command tag.
const MAX_TAG: usize = 64;

impl Session {
    /// Deals with the server's bytes as far as possible; says how many were dealt with, also when that is the end. The
    /// rest must be kept.
    pub(super) fn take_answers(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> (usize, Result<(), End>) {
        let mut run = Run::new(bytes);
        let unsent = self.to_client.buf.len();
        let outcome = self.walk_answers(&mut run);
        // What came before the bad byte, or before the server's last words, is still the client's.
        let pending = run.pending();
        let said = self.to_client.buf.len().saturating_sub(unsent).saturating_add(pending.len());
        self.tally.sent_bytes = self.tally.sent_bytes.saturating_add(u64::try_from(said).unwrap_or(0));
        if !pending.is_empty() || !self.to_client.is_done() {
            let sent = self.to_client.poll_send(&mut self.client, cx, pending);
            if let std::task::Poll::Ready(Err(_)) = sent {
                return (run.at, Err(End::ClientGone));
            }
        }
        if outcome.is_ok() && self.said_fatal && self.answer.left == 0 {
            // PostgreSQL closes after a FATAL, and so do we, whether or not it gets round to it.
            return (run.at, Err(End::ServerSaidWhy));
        }
        (run.at, outcome)
    }

    fn walk_answers(&mut self, run: &mut Run<'_>) -> Result<(), End> {
        loop {
            if self.answer.left > 0 {
                if run.at >= run.bytes.len() {
                    return Ok(());
                }
                let there = run.bytes.len().saturating_sub(run.at).min(self.answer.left);
                self.answer.left = self.answer.left.saturating_sub(there);
                match self.answer.sink {
                    Sink::Discard => run.cut(&mut self.to_client.buf, there),
                    Sink::Forward | Sink::Scan => run.at = run.at.saturating_add(there),
                }
                self.put_own(run);
                continue;
            }
            let rest = run.bytes.get(run.at..).unwrap_or_default();
            let header = frame::server_header(rest).map_err(|_| self.desync("a malformed header"))?;
            let Some(header) = header else { return Ok(()) };
            let body = rest.get(HEADER..rest.len().min(header.total())).unwrap_or_default();
            let needed = needed(header, self.evidence.is_some(), self.describing, self.listening.is_some());
            if needed > MAX_WHOLE {
                return Err(self.desync("a message that is too long"));
            }
            if body.len() < needed {
                return Ok(());
            }
            self.answer(header, body, run)?;
        }
    }

    /// One message of the server. A table of contents by type.
    fn answer(&mut self, header: Header, body: &[u8], run: &mut Run<'_>) -> Result<(), End> {
        match header.tag {
            backend::ERROR_RESPONSE => self.error(header, body, run),
            backend::NOTICE_RESPONSE => {
                self.notice(header, body, run);
                Ok(())
            }
            backend::PARAMETER_STATUS => self.parameter(header, body, run),
            backend::NOTIFICATION_RESPONSE => {
                self.notification(header, body, run);
                Ok(())
            }
            backend::READY_FOR_QUERY => self.ready(header, body, run),
            tag => {
                // Those of ours that waited for company.
                self.put_own(run);
                if self.describing && matches!(tag, backend::ROW_DESCRIPTION | backend::NO_DATA) {
                    self.learn_columns(body);
                }
                if tag == backend::COMMAND_COMPLETE && message::drops_statement(body) {
                    self.deallocated();
                }
                let verdict = self.owed.reply(tag).map_err(|u| self.desync(&u.to_string()))?;
                match verdict {
                    Verdict::Deliver => {
                        self.keep = Keep::No;
                        if tag == backend::COMMAND_COMPLETE {
                            self.command_complete(body);
                        }
                        self.take(header, Sink::Forward, run);
                        if tag == backend::DATA_ROW && self.answer.left == 0 {
                            let more = run.bytes.get(run.at..).unwrap_or_default();
                            run.at = run.at.saturating_add(frame::run_of(more, backend::DATA_ROW));
                        }
                    }
                    Verdict::Read if tag == backend::DATA_ROW => {
                        if let Some(evidence) = &mut self.evidence {
                            evidence.row(body);
                        }
                        self.take(header, Sink::Discard, run);
                    }
                    Verdict::Read | Verdict::Swallow | Verdict::Replace(_) => self.take(header, Sink::Discard, run),
                }
                self.put_own(run);
                Ok(())
            }
        }
    }

    pub(super) fn take(&mut self, header: Header, sink: Sink, run: &mut Run<'_>) {
        match sink {
            Sink::Discard => run.cut(&mut self.to_client.buf, HEADER),
            Sink::Forward | Sink::Scan => run.at = run.at.saturating_add(HEADER),
        }
        self.answer.left = header.body;
        self.answer.sink = sink;
        // The loop passes the body on; a body that is here whole is taken at once, so that its end is known here.
        let there = run.bytes.len().saturating_sub(run.at).min(header.body);
        if there == header.body {
            self.answer.left = 0;
            match sink {
                Sink::Discard => run.cut(&mut self.to_client.buf, there),
                Sink::Forward | Sink::Scan => run.at = run.at.saturating_add(there),
            }
        }
    }

    fn error(&mut self, header: Header, body: &[u8], run: &mut Run<'_>) -> Result<(), End> {
        let fields = Fields::new(body);
        let code = fields.code().unwrap_or("XX000");
        if fields.is_fatal() {
            self.said_fatal = true;
            self.pool.stats.error(code);
            self.take(header, Sink::Forward, run);
            return Ok(());
        }
        self.forget_what_was_prepared();
        let standby = || self.lease.as_ref().is_some_and(Lease::is_on_standby);
        let stale_plan = || fields.message().is_some_and(|m| m.starts_with("cached plan must not change"));
        if code == sqlstate::READ_ONLY_TRANSACTION && standby() {
            // A demoted primary: what the pool has is of no use to the next client.
            self.retire = true;
            self.pool.reconnect_soon(Millis::now());
        }
        // A client has dropped what it did not prepare: inside a function, or by our own name for it.
        let lost_ours = || fields.message().is_some_and(|m| m.contains("\"tenantry_"));
        let is_lost = code == sqlstate::INVALID_STATEMENT_NAME && !self.owed.head_is_ours() && lost_ours();
        if (is_lost || code == sqlstate::FEATURE_NOT_SUPPORTED && stale_plan()) && self.heal()? {
            self.take(header, Sink::Discard, run);
            return Ok(());
        }
        self.retire |= is_lost;
        self.put_own(run);
        self.keep = Keep::No;
        self.verifying = false;
        let in_probe = self.evidence.is_some();
        match self.owed.error().map_err(|u| self.desync(&u.to_string()))? {
            Verdict::Deliver => {
                self.pool.stats.error(code);
                self.take(header, Sink::Forward, run);
            }
            Verdict::Replace(error) => {
                self.pool.stats.error(error.code);
                run.cut(&mut self.to_client.buf, 0);
                error.write(&mut self.to_client.buf);
                self.take(header, Sink::Discard, run);
            }
            Verdict::Swallow | Verdict::Read if in_probe => {
                self.evidence = None;
                self.take(header, Sink::Discard, run);
            }
            Verdict::Swallow if self.is_moving() && !self.owed.head_is_guard() => {
                if let Some(listening) = &mut self.listening {
                    listening.fail();
                }
                self.take(header, Sink::Discard, run);
            }
            Verdict::Swallow | Verdict::Read => {
                // The client's settings could not be made: nothing may run without them.
                return Err(End::Fatal(errors::settings_lost(fields.message().unwrap_or_default())));
            }
        }
        if self.owed.has_undone() {
            self.undo();
        }
        self.end_stranded();
        self.put_own(run);
        Ok(())
    }

    /// A simple query was skipped, and no Sync of the client's will follow it: ours does, when all of the query is sent.
    pub(super) fn end_stranded(&mut self) {
        if self.request.left == 0 && self.owed.take_stranded() {
            self.to_server.buf.extend_from_slice(message::SYNC);
            self.owed.push(Kind::Sync, For::Client, None);
        }
    }

    fn notice(&mut self, header: Header, body: &[u8], run: &mut Run<'_>) {
        let ends = matches!(Fields::new(body).code(), Some(sqlstate::CRASH_SHUTDOWN | sqlstate::ADMIN_SHUTDOWN));
        if ends {
            // PostgreSQL's farewell in a crash: the client gets it as the one error when the connection closes.
            self.last_notice = Some(body.into());
        }
        let ours = self.evidence.is_some() || self.owed.head_is_ours() || self.is_moving();
        self.take(header, if ends || ours { Sink::Discard } else { Sink::Forward }, run);
    }

    fn parameter(&mut self, header: Header, body: &[u8], run: &mut Run<'_>) -> Result<(), End> {
        let Some((name, value)) = message::read_parameter_status(body) else {
            return Err(self.desync("a malformed parameter"));
        };
        // While we replay, what the client knows already is no news to it, nor to us.
        let mut known = false;
        if let Some(conn) = self.lease.as_mut().and_then(Lease::conn) {
            let lower = name.to_ascii_lowercase();
            let plain = conn.baseline(name) == Some(value);
            known = self.owed.head_is_ours() && self.settings.get(&lower).map_or(plain, |wanted| wanted == value);
            if is_setting(name) && !known {
                // Where a RESET would not lead there, the client has asked for it.
                let asked = !plain || self.startup.get(&lower).is_some();
                self.settings = self.settings.with(&lower, asked.then_some(value));
                conn.label = conn.label.with(&lower, asked.then_some(value));
            }
        }
        self.take(header, if known { Sink::Discard } else { Sink::Forward }, run);
        Ok(())
    }

    fn ready(&mut self, header: Header, body: &[u8], run: &mut Run<'_>) -> Result<(), End> {
        let Some(&[transaction]) = body.first_chunk::<1>().filter(|_| header.body == 1) else {
            return Err(self.desync("a malformed ReadyForQuery"));
        };
        if !matches!(transaction, status::IDLE | status::TRANSACTION | status::FAILED) {
            return Err(self.desync("an unknown transaction status"));
        }
        self.put_own(run);
        let verdict = self.owed.reply(header.tag).map_err(|u| self.desync(&u.to_string()))?;
        self.owed.ready(transaction);
        match verdict {
            Verdict::Deliver | Verdict::Replace(_) => {
                if transaction != status::IDLE && self.mode == PoolMode::Statement {
                    return Err(End::Fatal(errors::no_transactions()));
                }
                if transaction == status::IDLE {
                    self.tally.transactions += 1;
                    if self.listening.is_some() {
                        self.put_mail(run);
                    }
                }
                self.take(header, Sink::Forward, run);
            }
            Verdict::Swallow => self.take(header, Sink::Discard, run),
            Verdict::Read => {
                self.take(header, Sink::Discard, run);
                let evidence = self.evidence.take().map(|e| *e);
                self.conclude_probe(evidence)?;
            }
        }
        self.put_own(run);
        Ok(())
    }

    /// DISCARD ALL and DEALLOCATE ALL take every statement from the server, the shared ones too.
    fn command_complete(&mut self, body: &[u8]) {
        if message::changes_tables(body) {
            // Now for who sees it already, and again when it is committed.
            self.pool.plans_are_stale();
            self.made_stale = true;
        }
        self.creates |= self.signs.creates || message::creates(body);
        if message::rolls_back(body) {
            self.forget_what_was_prepared();
        }
        if message::makes_functions(body) && !self.made_functions {
            self.made_functions = true;
            self.pool.functions.begin_to_change();
        }
        if !message::drops_all_statements(body) {
            return;
        }
        // What was sent behind it stands again, or will.
        let later = self.owed.later_statements();
        let unnamed_is_later = self.owed.has_unnamed();
        self.names.keep(&later.names, unnamed_is_later);
        self.retire |= later.assumed;
        self.keep_lent(&later.lent);
        if let Some(conn) = self.lease.as_mut().and_then(Lease::conn) {
            conn.prepared.clear();
            for id in later.on_server {
                // No more than there were before, so none has to go for it.
                let _ = conn.prepared.insert(id, None);
            }
            if !unnamed_is_later {
                conn.forget_unnamed();
            }
        }
    }

    /// Something was rolled back, or will be. What was created in it is gone; a statement that was prepared meanwhile speaks
    /// of it by its number.
    fn forget_what_was_prepared(&mut self) {
        if self.creates && std::mem::take(&mut self.has_prepared) {
            self.pool.plans_are_stale();
        }
    }

    /// Puts our own replies whose turn has come behind what the server said before them.
    #[inline]
    fn put_own(&mut self, run: &mut Run<'_>) {
        // With each message of the server's: mostly there is none.
        if self.owed.has_own() && self.answer.left == 0 {
            self.put_own_now(run);
        }
    }

    fn put_own_now(&mut self, run: &mut Run<'_>) {
        while let Some(own) = self.owed.next_own() {
            run.cut(&mut self.to_client.buf, 0);
            self.to_client.buf.extend_from_slice(own_bytes(own));
        }
    }

    /// The same, when nothing of the server's is at hand.
    pub(super) fn emit_own(&mut self) {
        // What may have to be dealt with once more says nothing too early; and one write is better than two.
        if self.answer.left > 0 || (self.keep != Keep::No && self.owed.will_be_answered()) {
            return;
        }
        if self.owed.own_is_next() {
            self.keep = Keep::No;
        }
        while let Some(own) = self.owed.next_own() {
            self.to_client.buf.extend_from_slice(own_bytes(own));
        }
    }

    fn desync(&mut self, what: &str) -> End {
        tracing::warn!(tenant = %self.pool.tenant(), server = %self.pool.server.name(), what, "the server broke the protocol; its connection is closed");
        self.retire = true;
        End::Fatal(errors::server_broke_protocol())
    }
}

fn own_bytes(own: Own) -> &'static [u8] {
    match own {
        Own::ParseComplete => message::PARSE_COMPLETE,
        Own::CloseComplete => message::CLOSE_COMPLETE,
    }
}

/// How much of a message's body must be there before it can be dealt with.
fn needed(header: Header, probing: bool, describing: bool, listening: bool) -> usize {
    match header.tag {
        backend::ROW_DESCRIPTION if describing => header.body,
        backend::DATA_ROW if probing => header.body,
        backend::ERROR_RESPONSE | backend::NOTICE_RESPONSE => header.body.min(MAX_FIELDS),
        backend::PARAMETER_STATUS => header.body,
        backend::NOTIFICATION_RESPONSE if listening => header.body,
        backend::READY_FOR_QUERY => header.body.min(1),
        backend::COMMAND_COMPLETE => header.body.min(MAX_TAG),
        _ => 0,
    }
}
