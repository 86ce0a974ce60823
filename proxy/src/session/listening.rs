//! A client that listens: from its own server connection to its tenant's hub, and back when it touches its channels.
//!
//! LISTEN itself runs where the client's other statements run, so it is PostgreSQL's in every way. When the probe then
//! finds channels and nothing else, they move to the hub (`pool::hub`): a mark goes into the stream of notifications, which
//! the client's connection and the hub's see at the same place; what comes before it is heard here, what comes after it
//! there. Then this connection listens to nothing and goes back to its pool. Before anything that may change or show what
//! the client listens to, or that notifies, or that begins a transaction, the same is done the other way round.
//!
//! What always holds: each notification reaches the client from exactly one of the two, in order, at a message boundary and
//! outside a transaction; nothing of the client's is sent while it moves; what cannot be moved keeps its connection.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll},
    time::Duration,
};

use bytes::BytesMut;
use tenantry_config::PoolMode;
use tenantry_wire::{frame::Header, message};
use tokio::time::Sleep;

use super::{
    errors,
    look::{self, Look},
    owed::{For, Kind},
    pin::{PinReason, Pins},
    probe,
    relay::{CHUNK, End, Session, Sink},
    run::Run,
    state::SessionEvent,
};
use crate::{
    clock::Millis,
    pool::{
        Pool,
        hub::{MAX_MAIL, Subscription, has_room},
        lease::Lease,
        subscribers::{Channel, Wanted},
    },
};

/// How long the hub may take to listen to a client's channels, before the client keeps its connection for now.
const MOVE_LIMIT: Duration = Duration::from_secs(5);
/// Until the next try to move.
const MOVE_AGAIN: Duration = Duration::from_secs(1);
/// How long the hub may take to come to a mark that it has to see.
const RETURN_LIMIT: Duration = Duration::from_secs(10);

/// Where a client's notifications come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// From its own connection.
    Own,
    /// From its own connection, which is told to listen to marks, too, before it is left to the hub.
    Leaving,
    /// From its own connection up to the mark, from the hub after it. `leaving`: the mark came, and the own connection is
    /// told to listen no more.
    Moving { token: u128, marked: bool, leaving: bool },
    /// From the hub.
    Served,
    /// From the hub up to the mark, from its own connection after it. `tidy`: the mark came on the own connection, which is
    /// told to listen to no more marks; `done`: it has been.
    Returning { token: u128, marked: bool, tidy: bool, done: bool },
}

/// See the file's head.
#[derive(Debug)]
pub(super) struct Listening {
    stage: Stage,
    channels: Vec<Channel>,
    subscription: Option<Subscription>,
    /// Listening is all that keeps its connection, and all of it can move.
    movable: bool,
    /// It is time to try to move.
    due: bool,
    /// The hub was asked to listen to its channels.
    asking: bool,
    /// Its connection listens to marks, too.
    hears_marks: bool,
    /// The next connection must listen to the channels before it gets the client's bytes.
    restore: bool,
    /// A query of ours failed.
    failed: bool,
    /// What came on the own connection while the hub was not yet done.
    late: BytesMut,
    timer: Option<Pin<Box<Sleep>>>,
    pool: Arc<Pool>,
}

impl Listening {
    fn new(pool: &Arc<Pool>) -> Self {
        pool.listening.fetch_add(1, Relaxed);
        Self {
            stage: Stage::Own,
            channels: Vec::new(),
            subscription: None,
            movable: false,
            due: false,
            asking: false,
            hears_marks: false,
            restore: false,
            failed: false,
            late: BytesMut::new(),
            timer: None,
            pool: Arc::clone(pool),
        }
    }

    /// Counted at this pool from now on.
    pub(super) fn move_to(&mut self, pool: &Arc<Pool>) {
        pool.listening.fetch_add(1, Relaxed);
        self.pool.listening.fetch_sub(1, Relaxed);
        self.pool = Arc::clone(pool);
    }

    /// Nothing of the client's may be sent.
    pub(super) fn is_moving(&self) -> bool {
        matches!(self.stage, Stage::Leaving | Stage::Moving { .. } | Stage::Returning { .. })
    }

    pub(super) fn is_served(&self) -> bool {
        self.stage == Stage::Served
    }

    pub(super) fn is_own(&self) -> bool {
        self.stage == Stage::Own
    }

    pub(super) fn must_restore(&self) -> bool {
        self.restore
    }

    /// A query of ours failed; the client's answers are not concerned.
    pub(super) fn fail(&mut self) {
        self.failed = true;
    }

    /// What it waited for in order to move has come.
    fn may_go_on(&self) -> bool {
        self.due || self.asking && self.subscription.as_ref().is_some_and(Subscription::is_confirmed)
    }

    fn set_timer(&mut self, limit: Duration) {
        self.timer = Some(Box::pin(tokio::time::sleep(limit)));
    }

    /// It stays where it is for now.
    fn try_later(&mut self) {
        self.subscription = None;
        self.asking = false;
        self.due = false;
        self.set_timer(MOVE_AGAIN);
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.pool.listening.fetch_sub(1, Relaxed);
    }
}

impl Session {
    // What the probe says.

    /// The session has exactly these channels on its connection (`None`: their names cannot be read). True if nothing else
    /// keeps the connection, and the hub may have them.
    pub(super) fn found_channels(&mut self, channels: Option<Vec<Channel>>) -> bool {
        let served = self.listening.as_ref().is_some_and(|listening| listening.is_served());
        if served || self.pins.has(PinReason::Unknown) {
            // What a served client has there got past us, and keeps its connection; or nobody knows.
            return false;
        }
        if !self.pins.has(PinReason::Listen) {
            self.listening = None;
            return false;
        }
        let mut only = Pins::default();
        only.add(PinReason::Listen);
        let pool = &self.pool;
        let listening = self.listening.get_or_insert_with(|| Box::new(Listening::new(pool)));
        listening.movable = channels.is_some() && self.pins == only;
        listening.due = listening.movable;
        listening.channels = channels.unwrap_or_default();
        listening.hears_marks = listening.channels.contains(pool.hub.marker());
        listening.channels.retain(|channel| channel != pool.hub.marker());
        if !listening.movable {
            listening.subscription = None;
            listening.asking = false;
            listening.timer = None;
        }
        listening.movable
    }

    // From the own connection to the hub.

    /// At rest, with what is left behind known: moves to the hub if it can. False if that comes to nothing for now.
    pub(super) fn hand_over(&mut self) -> Result<bool, End> {
        let Some(listening) = &mut self.listening else { return Ok(false) };
        if !listening.is_own() || !listening.movable || self.mode == PoolMode::Session {
            return Ok(false);
        }
        if !listening.due && !listening.asking {
            self.take_pin()?;
            return Ok(false);
        }
        listening.due = false;
        if self.cancelling.as_ref().is_some_and(|task| task.is_finished()) {
            self.cancelling = None;
        }
        let Some(conn) = self.lease.as_mut().and_then(Lease::conn) else { return Err(End::ServerLost) };
        let own = conn.baseline("client_encoding");
        let encoding = self.settings.get("client_encoding").or(own).unwrap_or_default();
        let hub = &self.pool.hub;
        // It must leave a connection to those whom it serves.
        let has_room = has_room(&self.pool) && self.pool.server.permits().1 > 1;
        let is_sound = !self.retire && !self.server_write_failed && self.cancelling.is_none();
        if !hub.speaks(encoding) || Some(encoding) != own && hub.lacks_connection() {
            // The text of its notifications is written in another way than everybody else's.
            listening.try_later();
            self.take_pin()?;
            return Ok(false);
        }
        let subscription = match &listening.subscription {
            Some(subscription) => subscription,
            None => listening.subscription.insert(hub.join(&self.registered.shared)),
        };
        match subscription.want(&listening.channels) {
            Wanted::TooMany => {}
            Wanted::Confirmed => return self.start_move(),
            Wanted::Asked if hub.lacks_connection() => {
                if is_sound && has_room && !listening.hears_marks {
                    listening.stage = Stage::Leaving;
                    let marker = [Arc::clone(hub.marker())];
                    self.ask_ourselves(&probe::listen(&marker, &[]))?;
                    return Ok(true);
                }
                if is_sound
                    && has_room
                    && let Some(lease) = self.lease.take()
                {
                    match hub.adopt(lease, subscription, &listening.channels) {
                        Ok(()) => {
                            self.served();
                            return Ok(true);
                        }
                        Err(lease) => self.lease = Some(lease),
                    }
                    listening.due = true;
                    return self.hand_over();
                }
            }
            Wanted::Asked => {
                if !std::mem::replace(&mut listening.asking, true) {
                    listening.set_timer(MOVE_LIMIT);
                }
                self.rest_with_lease();
                return Ok(true);
            }
        }
        listening.try_later();
        self.take_pin()?;
        Ok(false)
    }

    /// The hub listens to all of it.
    fn start_move(&mut self) -> Result<bool, End> {
        let token = rand::random();
        let Some(listening) = &mut self.listening else { return Ok(false) };
        listening.asking = false;
        listening.timer = None;
        listening.failed = false;
        listening.stage = Stage::Moving { token, marked: false, leaving: false };
        if let Some(subscription) = &listening.subscription {
            subscription.begin_at(token);
        }
        let sql = probe::mark(&[], self.pool.hub.marker(), token);
        self.ask_ourselves(&sql)?;
        Ok(true)
    }

    /// The hub serves the client, whose connection listens to nothing.
    fn served(&mut self) {
        if let Some(listening) = &mut self.listening {
            listening.stage = Stage::Served;
            listening.asking = false;
            listening.hears_marks = false;
            listening.timer = None;
            if listening.channels.is_empty() {
                self.listening = None;
            }
        }
        self.pins = Pins::default();
        self.drop_pin();
        self.registered.shared.pin(self.pins);
        self.give_back(Millis::now());
    }

    // And back.

    /// The client is served, and asks for something: true if it may go on. What may touch its channels waits until they
    /// are on its own connection.
    pub(super) fn heed_channels(&mut self, rest: &[u8], run: &mut Run<'_>) -> Result<bool, End> {
        let held = self.lease.is_some();
        if held && (self.owed.has_open_batch() || self.owed.is_empty() && !self.owed.is_at_rest()) {
            // In the middle of something: too late.
            return Ok(true);
        }
        let look = look::ahead(rest, &self.names);
        if look == Look::Incomplete && rest.len() < CHUNK {
            return Ok(false);
        }
        let restore = look != Look::Harmless;
        let Some(listening) = &mut self.listening else { return Ok(true) };
        listening.restore = restore && !held;
        if !restore || !held {
            return Ok(true);
        }
        if self.owed.is_at_rest() && !self.is_blocked() {
            run.cut(&mut self.to_server.buf, 0);
            self.restore_channels()?;
        }
        Ok(false)
    }

    /// Puts the client's channels on its connection, in the same write as its settings.
    pub(super) fn restore_channels(&mut self) -> Result<(), End> {
        let token = rand::random();
        let Some(listening) = &mut self.listening else { return Ok(()) };
        listening.restore = false;
        listening.failed = false;
        listening.stage = Stage::Returning { token, marked: false, tidy: false, done: false };
        listening.set_timer(RETURN_LIMIT);
        if let Some(subscription) = &listening.subscription {
            subscription.end_at(token);
        }
        let sql = probe::mark(&listening.channels, self.pool.hub.marker(), token);
        self.pins.add(PinReason::Listen);
        self.ask_ourselves(&sql)
    }

    fn ask_ourselves(&mut self, sql: &str) -> Result<(), End> {
        if let Some(conn) = self.lease.as_mut().and_then(Lease::conn) {
            conn.forget_unnamed();
        }
        let written = message::write_query(&mut self.to_server.buf, sql);
        written.map_err(|_| End::Fatal(errors::internal()))?;
        self.owed.push(Kind::Query, For::Us, None);
        Ok(())
    }

    /// At rest while it moves: what we asked was answered. True if the connection is not to be given back now.
    pub(super) fn step_channels(&mut self) -> Result<bool, End> {
        let Some(listening) = &mut self.listening else { return Ok(false) };
        let failed = std::mem::take(&mut listening.failed);
        let lost = || Err(End::Fatal(errors::listening_lost(None)));
        match &mut listening.stage {
            Stage::Own | Stage::Served => return Ok(false),
            Stage::Leaving => {
                listening.stage = Stage::Own;
                if failed {
                    listening.try_later();
                } else {
                    (listening.hears_marks, listening.due) = (true, true);
                }
                return Ok(false);
            }
            Stage::Moving { leaving: false, .. } if failed => {
                // Nothing has happened.
                if let Some(subscription) = &listening.subscription {
                    subscription.give_up();
                }
                listening.stage = Stage::Own;
                listening.try_later();
                return Ok(false);
            }
            Stage::Moving { marked: false, .. } => return lost(),
            Stage::Moving { leaving, .. } if !*leaving => {
                *leaving = true;
                self.ask_ourselves(probe::UNLISTEN_ALL)?;
            }
            Stage::Moving { .. } => {
                // It may still listen: nobody else may have it.
                self.retire |= failed;
                self.served();
            }
            Stage::Returning { marked, .. } if failed || !*marked => return lost(),
            Stage::Returning { tidy, .. } if !*tidy => {
                *tidy = true;
                let marker = [Arc::clone(self.pool.hub.marker())];
                self.ask_ourselves(&probe::listen(&[], &marker))?;
            }
            Stage::Returning { done, .. } => {
                *done = true;
                self.finish_return();
            }
        }
        Ok(true)
    }

    /// The hub's part is over when its mark came, too: then the client's own request comes next.
    fn finish_return(&mut self) -> bool {
        let Some(listening) = &mut self.listening else { return false };
        let Some(subscription) = &listening.subscription else { return false };
        if !matches!(listening.stage, Stage::Returning { done: true, .. }) || !subscription.mailbox.look(|m| m.ended) {
            return false;
        }
        let (messages, count) = subscription.mailbox.take();
        self.pool.stats.notifications.fetch_add(count, Relaxed);
        self.to_client.buf.extend_from_slice(&messages);
        self.to_client.buf.extend_from_slice(&std::mem::take(&mut listening.late));
        listening.stage = Stage::Own;
        listening.timer = None;
        // Whatever the client does now, the probe is to say what is left.
        self.signs.suspect = true;
        self.confirmed = true;
        true
    }

    // What comes.

    /// A notification on the own connection. While anything of the client's moves it is there whole.
    pub(super) fn notification(&mut self, header: Header, body: &[u8], run: &mut Run<'_>) {
        let Some(listening) = &mut self.listening else {
            let listens = self.may_listen();
            self.take(header, if listens { Sink::Forward } else { Sink::Discard }, run);
            return;
        };
        let read = message::read_notification(body);
        let (channel, payload) = read.map_or((&b""[..], &b""[..]), |(_, channel, payload)| (channel, payload));
        let is_mark = channel == self.pool.hub.marker().as_bytes();
        let token = std::str::from_utf8(payload).ok().and_then(|text| u128::from_str_radix(text, 16).ok());
        let mut keep = false;
        let forward = match &mut listening.stage {
            Stage::Moving { token: own, marked, .. } | Stage::Returning { token: own, marked, .. } if is_mark => {
                *marked |= token == Some(*own);
                false
            }
            _ if is_mark => false,
            Stage::Own | Stage::Leaving => true,
            Stage::Moving { marked, .. } => !*marked,
            Stage::Served => !listening.channels.iter().any(|own| own.as_bytes() == channel),
            Stage::Returning { marked, .. } => {
                keep = *marked;
                false
            }
        };
        if keep {
            let whole = run.bytes.get(run.at..run.at.saturating_add(header.total())).unwrap_or_default();
            listening.late.extend_from_slice(whole);
        }
        if forward || keep {
            self.pool.stats.notifications.fetch_add(1, Relaxed);
        }
        self.take(header, if forward { Sink::Forward } else { Sink::Discard }, run);
    }

    /// What the hub has for the client, where PostgreSQL puts it: before the ReadyForQuery that ends a transaction.
    pub(super) fn put_mail(&mut self, run: &mut Run<'_>) {
        let Some(listening) = self.listening.as_ref().filter(|listening| listening.is_served()) else { return };
        let Some(subscription) = &listening.subscription else { return };
        if subscription.mailbox.has_news() && self.to_client.buf.len() < CHUNK {
            run.cut(&mut self.to_client.buf, 0);
            let (messages, count) = subscription.mailbox.take();
            self.pool.stats.notifications.fetch_add(count, Relaxed);
            self.to_client.buf.extend_from_slice(&messages);
            // Whatever else there is to know is looked at when the session is polled.
            subscription.mailbox.look_again();
        }
    }

    /// What the hub has for the client, and what has become of its move.
    pub(super) fn poll_channels(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let Some(listening) = &mut self.listening else { return Ok(false) };
        let mut progress = false;
        if let Some(timer) = &mut listening.timer
            && timer.as_mut().poll(cx).is_ready()
        {
            progress = true;
            self.channels_late()?;
        }
        let Some(listening) = &mut self.listening else { return Ok(progress) };
        let Some(subscription) = listening.subscription.as_ref().filter(|s| s.mailbox.has_news()) else {
            return Ok(progress);
        };
        if !self.to_client.is_done()
            && matches!(self.to_client.poll_send(&mut self.client, cx, &[]), Poll::Ready(Err(_)))
        {
            return Err(End::ClientGone);
        }
        let between = self.answer.left == 0 && self.to_client.is_done();
        let at_rest = self.lease.is_none() || self.owed.is_at_rest();
        let may_have = match listening.stage {
            Stage::Served => between && at_rest,
            Stage::Returning { .. } => between,
            // There is none; but the news is heard.
            Stage::Own | Stage::Leaving | Stage::Moving { .. } => true,
        };
        let hears = !matches!(listening.stage, Stage::Leaving | Stage::Moving { .. });
        if may_have && hears {
            let (messages, count) = subscription.mailbox.take();
            progress |= count > 0;
            self.pool.stats.notifications.fetch_add(count, Relaxed);
            self.to_client.buf.extend_from_slice(&messages);
        }
        let (lost, ran_over) = subscription.mailbox.look(|mail| (mail.lost.clone(), mail.ran_over));
        if ran_over {
            let limit = MAX_MAIL;
            tracing::warn!(tenant = %self.pool.tenant(), limit, "a client does not read its notifications, and is ended");
            return Err(End::Fatal(errors::mail_ran_over(limit)));
        }
        if let Some(lost) = lost {
            if matches!(listening.stage, Stage::Own | Stage::Leaving) {
                // It hears everything where it is.
                listening.subscription = None;
                listening.asking = false;
                listening.due = listening.movable;
            } else if at_rest || listening.is_moving() {
                return Err(End::Fatal(errors::listening_lost(lost.0.as_deref())));
            }
        }
        if matches!(listening.stage, Stage::Returning { .. }) {
            progress |= self.finish_return();
        } else if listening.is_own() && listening.may_go_on() && self.rests_with_lease() {
            self.settle()?;
            progress = true;
        }
        Ok(progress)
    }

    fn rests_with_lease(&self) -> bool {
        self.lease.is_some() && self.owed.is_at_rest() && self.evidence.is_none()
    }

    /// The timer has run out.
    fn channels_late(&mut self) -> Result<(), End> {
        let rests = self.rests_with_lease();
        let Some(listening) = &mut self.listening else { return Ok(()) };
        listening.timer = None;
        match listening.stage {
            Stage::Returning { .. } => return Err(End::Fatal(errors::listening_lost(None))),
            Stage::Own if listening.asking => {
                listening.try_later();
                self.take_pin()?;
            }
            Stage::Own if listening.movable => {
                listening.due = true;
                if rests {
                    self.settle()?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// At rest with a connection that it keeps.
    pub(super) fn rest_with_lease(&mut self) {
        if self.state() == super::state::SessionState::Active {
            self.enter_at(SessionEvent::RestPinned, Millis::now());
            self.registered.shared.transaction(None);
        }
    }

    /// Whether what the server says next is an answer to what the move asked.
    pub(super) fn is_moving(&self) -> bool {
        self.listening.as_ref().is_some_and(|listening| listening.is_moving())
    }
}
