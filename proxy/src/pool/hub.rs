//! One server connection that listens for all clients of a tenant: the shell around `subscribers`.
//!
//! The connection is an ordinary one of the tenant's: the first client that listens leaves its own to the hub, with all
//! that PostgreSQL still has to say on it. One task reads it, puts each notification into the mailboxes of those whom it
//! is for, and wakes them. When nobody listens any more the connection goes back to its pool.
//!
//! While the tenant's gate is not open the connection is given up, as the last one of the tenant that is in use: whoever
//! could still notify has come to rest before, so that nothing is missed. When the gate opens it comes back; the clients
//! stay. When it is lost otherwise, notifications may be lost with it, and every client that the hub served is ended.
//!
//! What always holds: a mailbox holds no more than `MAX_MAIL`; a client whose mailbox runs over is ended and told so; no
//! lock is held across an await.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tenantry_wire::{
    frame::{self, HEADER},
    message,
    tag::{backend, status},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Notify,
    time::Instant,
};

use super::{
    Pool,
    decision::Gate,
    functions::Makers,
    lease::{Handoff, Lease},
    server::Asked,
    subscribers::{Channel, Heard, Subscribers, Wanted},
};
use crate::{
    clock::Millis,
    server::{conn::ServerConn, settings::Settings},
    session::{probe, registry::Shared},
};

/// Most bytes of notifications that wait for one client.
pub const MAX_MAIL: usize = 1024 * 1024;
/// How long PostgreSQL may take to answer a query of the hub's.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How often the hub looks whether it is the last one, while the gate is not open.
const LOOK: Duration = Duration::from_millis(10);
/// Until the next try after a refusal.
const AGAIN: Duration = Duration::from_millis(100);
/// Longest message that the hub's connection may bring: a notification has up to 8,000 bytes of payload.
const MAX_MESSAGE: usize = 64 * 1024;

/// What came for one client and was not yet taken.
#[derive(Debug)]
pub struct Mailbox {
    mail: Mutex<Mail>,
    /// Something changed since the client looked last.
    news: AtomicBool,
    client: Arc<Shared>,
}

/// See `Mailbox`.
#[derive(Debug, Default)]
pub struct Mail {
    /// Whole messages, in order.
    pub messages: BytesMut,
    pub count: u64,
    /// The mark came up to which the stream is the client's: nothing comes behind these.
    pub ended: bool,
    /// There was no room for one more.
    pub ran_over: bool,
    pub lost: Option<Lost>,
}

/// The hub's connection is gone; with PostgreSQL's last words, if there were any: the body of an ErrorResponse.
#[derive(Debug, Clone)]
pub struct Lost(pub Option<Bytes>);

impl Mailbox {
    /// Whether it is worth looking.
    #[must_use]
    pub fn has_news(&self) -> bool {
        self.news.load(Relaxed)
    }

    /// Looks, and leaves everything as it is.
    pub fn look<T>(&self, at: impl FnOnce(&Mail) -> T) -> T {
        at(&self.mail.lock())
    }

    /// What has come: its bytes, and how many.
    #[must_use]
    pub fn take(&self) -> (BytesMut, u64) {
        self.news.store(false, Relaxed);
        let mut mail = self.mail.lock();
        (std::mem::take(&mut mail.messages), std::mem::take(&mut mail.count))
    }

    /// Marks the mailbox as worth a look.
    pub fn look_again(&self) {
        self.news.store(true, Relaxed);
    }

    fn put(&self, message: &[u8]) {
        let mut mail = self.mail.lock();
        if mail.messages.len().saturating_add(message.len()) > MAX_MAIL {
            mail.ran_over = true;
        }
        if !mail.ran_over {
            mail.messages.extend_from_slice(message);
            mail.count += 1;
        }
    }

    fn change(&self, how: impl FnOnce(&mut Mail)) {
        how(&mut self.mail.lock());
        self.news.store(true, Relaxed);
        self.client.waker.wake();
    }

    fn wake(&self) {
        self.change(|_| {});
    }
}

/// Whether there is a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    /// None, and nobody cares for one.
    Off,
    /// None; the hub's task sees to it that there will be one.
    Away,
    Up,
}

#[derive(Debug)]
struct State {
    link: Link,
    subscribers: Subscribers,
    members: BTreeMap<u64, (Arc<Mailbox>, Arc<Pool>)>,
    /// A connection that a client left to the hub, and what it listens to.
    left: Option<(Lease, Vec<Channel>)>,
    /// How the connection writes text, once there was one.
    encoding: Option<String>,
}

/// See the file's head.
#[derive(Debug)]
pub struct Hub {
    state: Mutex<State>,
    /// Somebody wants something else, or the gate may have moved.
    changed: Notify,
    marker: Channel,
    channels: AtomicUsize,
    /// Here because there is one hub for all of a tenant's pools.
    pub makers: Arc<Makers>,
}

impl Default for Hub {
    fn default() -> Self {
        let marker: Channel = format!("tenantry_{:032x}", rand::random::<u128>()).into();
        let subscribers = Subscribers::new(Arc::clone(&marker));
        let state = State { link: Link::Off, subscribers, members: BTreeMap::new(), left: None, encoding: None };
        let makers = Arc::default();
        Self { state: Mutex::new(state), changed: Notify::new(), marker, channels: AtomicUsize::new(0), makers }
    }
}

/// A client's place at its hub; dropping it leaves.
#[derive(Debug)]
pub struct Subscription {
    hub: Arc<Hub>,
    id: u64,
    pub mailbox: Arc<Mailbox>,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut state = self.hub.state.lock();
        state.subscribers.leave(self.id);
        let member = state.members.remove(&self.id);
        self.hub.channels.store(state.subscribers.channels(), Relaxed);
        drop(state);
        self.hub.changed.notify_one();
        // A pool's last holder takes the server's lock: not under ours.
        drop(member);
    }
}

impl Subscription {
    /// Wants these channels and no others.
    #[must_use]
    pub fn want(&self, channels: &[Channel]) -> Wanted {
        let mut state = self.hub.state.lock();
        let wanted = state.subscribers.want(self.id, channels);
        let is_up = state.link == Link::Up;
        self.hub.channels.store(state.subscribers.channels(), Relaxed);
        drop(state);
        self.hub.changed.notify_one();
        if wanted == Wanted::Confirmed && !is_up { Wanted::Asked } else { wanted }
    }

    /// PostgreSQL listens to all of them for the hub.
    #[must_use]
    pub fn is_confirmed(&self) -> bool {
        let state = self.hub.state.lock();
        state.link == Link::Up && state.subscribers.is_confirmed(self.id)
    }

    /// The mailbox is filled from that mark on.
    pub fn begin_at(&self, token: u128) {
        self.mailbox.change(|mail| mail.ended = false);
        self.hub.state.lock().subscribers.begin_at(self.id, token);
    }

    /// The mark will not come: the mailbox stays empty.
    pub fn give_up(&self) {
        self.hub.state.lock().subscribers.end(self.id);
    }

    /// The mailbox is filled up to that mark; or no more, while there is no connection that hears it.
    pub fn end_at(&self, token: u128) {
        let mut state = self.hub.state.lock();
        // A connection that was left to the hub hears marks from the start. One that the hub got by itself, and that does not
        // hear them yet, has nothing for the client.
        let hears_marks = state.left.is_some() || state.subscribers.hears_marks();
        if hears_marks && state.subscribers.end_at(self.id, token) {
            return;
        }
        state.subscribers.end(self.id);
        drop(state);
        self.mailbox.change(|mail| mail.ended = true);
    }
}

impl Hub {
    /// The channel that marks come on.
    #[must_use]
    pub fn marker(&self) -> &Channel {
        &self.marker
    }

    /// How many channels its clients listen to.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.channels.load(Relaxed)
    }

    /// Something happened that may be its business.
    pub fn nudge(&self) {
        self.changed.notify_one();
    }

    /// Whether a client whose text is written like this can be served.
    #[must_use]
    pub fn speaks(&self, encoding: &str) -> bool {
        let state = self.state.lock();
        state.link == Link::Off || state.encoding.as_deref().is_none_or(|own| own == encoding)
    }

    /// A place for a client.
    #[must_use]
    pub fn join(self: &Arc<Self>, client: &Arc<Shared>) -> Subscription {
        let mailbox =
            Arc::new(Mailbox { mail: Mutex::default(), news: AtomicBool::new(false), client: Arc::clone(client) });
        let mut state = self.state.lock();
        let id = state.subscribers.join();
        state.members.insert(id, (Arc::clone(&mailbox), client.pool()));
        Subscription { hub: Arc::clone(self), id, mailbox }
    }

    /// Whether the hub is without a connection, and could use that of a client.
    #[must_use]
    pub fn lacks_connection(&self) -> bool {
        let state = self.state.lock();
        state.link != Link::Up && state.left.is_none()
    }

    /// Leaves a connection to the hub: at rest, listening to exactly what the client wants and to marks, nothing of it unread. The
    /// client is served from here on. The lease comes back if the hub has a connection by now.
    pub fn adopt(
        self: &Arc<Self>,
        mut lease: Lease,
        subscription: &Subscription,
        channels: &[Channel],
    ) -> Result<(), Lease> {
        let encoding = lease.conn().and_then(|conn| conn.baseline("client_encoding")).map(str::to_owned);
        let server = Arc::clone(&lease.pool().server);
        let mut state = self.state.lock();
        if state.link == Link::Up || state.left.is_some() {
            return Err(lease);
        }
        state.encoding = encoding;
        state.subscribers.begin(subscription.id);
        let marker = Arc::clone(&self.marker);
        state.left = Some((lease, channels.iter().cloned().chain([marker]).collect()));
        let is_new = state.link == Link::Off;
        state.link = Link::Away;
        drop(state);
        subscription.mailbox.change(|mail| mail.ended = false);
        if is_new {
            server.spawn(Arc::clone(self).run());
        } else {
            self.changed.notify_one();
        }
        Ok(())
    }

    async fn run(self: Arc<Self>) {
        while let Some((mut lease, channels)) = self.acquire().await {
            let encoding = lease.conn().and_then(|conn| conn.baseline("client_encoding")).map(str::to_owned);
            if !self.connected(channels, encoding) {
                lease.release(Millis::now());
                self.lose(None);
                return;
            }
            match self.tend(&mut lease).await {
                Over::Rest => {
                    self.disconnected();
                    lease.release(Millis::now());
                }
                Over::Closed => {
                    self.disconnected();
                    // It still listens, and the gate may have opened meanwhile: it is not for anybody else.
                    drop(lease);
                }
                Over::Lost(words) => {
                    drop(lease);
                    self.lose(words);
                    return;
                }
            }
        }
    }

    /// There is a connection; false if it writes text in another way than the one before.
    fn connected(&self, channels: Vec<Channel>, encoding: Option<String>) -> bool {
        let mut state = self.state.lock();
        if state.encoding.is_some() && state.encoding != encoding {
            return false;
        }
        state.encoding = encoding;
        state.link = Link::Up;
        state.subscribers.forget_confirmed();
        state.subscribers.confirm(channels);
        true
    }

    fn disconnected(&self) {
        let mut state = self.state.lock();
        state.link = Link::Away;
        state.subscribers.forget_confirmed();
    }

    /// Every client that it serves is told; those that are only about to be served stay where they are.
    fn lose(&self, words: Option<Bytes>) {
        let mut state = self.state.lock();
        state.link = Link::Off;
        state.encoding = None;
        state.subscribers.forget_confirmed();
        let members: Vec<_> = state.members.values().map(|(mailbox, _)| Arc::clone(mailbox)).collect();
        let left = state.left.take();
        drop(state);
        drop(left);
        for mailbox in members {
            mailbox.change(|mail| mail.lost = Some(Lost(words.clone())));
        }
    }

    /// A connection, and what it listens to already; `None` when nobody wants one, or none can be had.
    async fn acquire(&self) -> Option<(Lease, Vec<Channel>)> {
        let handoff = Arc::new(Handoff::default());
        let mut open_since: Option<Instant> = None;
        loop {
            let pool = {
                let mut state = self.state.lock();
                if let Some(left) = state.left.take() {
                    return Some(left);
                }
                match state.members.values().next() {
                    // Its tenant may have moved to another server since.
                    Some((_, pool)) => pool.latest(),
                    None => {
                        state.link = Link::Off;
                        state.encoding = None;
                        return None;
                    }
                }
            };
            // While the tenant is paused its clients wait; when it is not, they may wait no longer than for anything else.
            let now = Instant::now();
            let patience = pool.settings().pool.query_wait_timeout;
            if pool.server.gate(pool.id) != Gate::Open {
                open_since = None;
            } else if now.duration_since(*open_since.get_or_insert(now)) >= patience {
                tracing::warn!(tenant = %pool.tenant(), "no connection to listen on within query_wait_timeout");
                self.lose(None);
                return None;
            }
            match pool.server.checkout(&pool, &handoff, Millis::now()) {
                Asked::Lease(lease) => return Some((lease, Vec::new())),
                Asked::Waiting(mut waiting) => {
                    let lease = loop {
                        tokio::select! {
                            outcome = std::future::poll_fn(|cx| waiting.poll(cx)) => break outcome.ok(),
                            () = self.changed.notified() => {}
                        }
                        let state = self.state.lock();
                        if state.left.is_some() || state.members.is_empty() {
                            break None;
                        }
                    };
                    if let Some(lease) = lease {
                        return Some((lease, Vec::new()));
                    }
                }
                Asked::Refused(_) => {
                    tokio::select! {
                        () = tokio::time::sleep(AGAIN) => {}
                        () = self.changed.notified() => {}
                    }
                }
            }
        }
    }

    /// Reads the connection and keeps it listening to what is wanted, until it is to be given back or is lost.
    async fn tend(&self, lease: &mut Lease) -> Over {
        let pool = Arc::clone(lease.pool());
        let Some(conn) = lease.conn() else { return Over::Lost(None) };
        let place = pool.server.address();
        let mut link = Wire { hub: self, input: BytesMut::new(), asked: None };
        // The client that left it may have set something; here everything is as in a fresh session.
        let difference = conn.label.difference(&Settings::default());
        conn.label = Settings::default();
        conn.forget_unnamed();
        if difference != Default::default()
            && !link.ask(conn, &probe::replay("", &difference, false), Question::Settings).await
        {
            return Over::Lost(None);
        }
        let mut gate_is_open = true;
        // Not after each notification: only when something may have changed.
        let mut look = true;
        loop {
            if look {
                gate_is_open = pool.server.gate(pool.id) == Gate::Open;
                if !has_room(&pool) {
                    tracing::warn!(tenant = %pool.tenant(), "the tenant has no connection to spare for listening any more");
                    return Over::Lost(None);
                }
                if place != pool.server.address() {
                    // The server is somewhere else by now, where its clients' other connections lead.
                    return Over::Lost(None);
                }
            }
            if std::mem::replace(&mut look, true) && link.asked.is_none() {
                let (sql, question) = self.next_question(&pool, gate_is_open);
                if let Some(question) = question
                    && !link.ask(conn, &sql, question).await
                {
                    return Over::Lost(None);
                }
            }
            let pause = match &link.asked {
                Some((_, deadline)) => Some(*deadline),
                None if !gate_is_open => Some(Instant::now() + LOOK),
                None => None,
            };
            let patience = async {
                match pause {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                read = conn.stream.read_buf(&mut link.input) => {
                    if !matches!(read, Ok(n) if n > 0) {
                        return Over::Lost(None);
                    }
                }
                () = self.changed.notified() => continue,
                () = patience => {
                    if link.asked.is_some() {
                        return Over::Lost(None);
                    }
                    continue;
                }
            }
            let waited = link.asked.is_some();
            match link.take(conn) {
                Ok(None) => look = waited && link.asked.is_none(),
                Ok(Some(over)) => return over,
                Err(words) => return Over::Lost(words),
            }
        }
    }

    /// What PostgreSQL is to be told now.
    fn next_question(&self, pool: &Pool, gate_is_open: bool) -> (String, Option<Question>) {
        let mut state = self.state.lock();
        if state.members.is_empty() {
            state.subscribers.forget_confirmed();
            return (probe::UNLISTEN_ALL.to_owned(), Some(Question::Leave));
        }
        let difference = state.subscribers.difference();
        drop(state);
        if difference != Default::default() {
            let sql = probe::listen(&difference.listen, &difference.unlisten);
            return (sql, Some(Question::Listen(difference.listen)));
        }
        if !gate_is_open {
            let place = pool.place();
            if pool.server.activity(|at| at.is_of(&place.tenant, place.number)).active <= 1 {
                // Whoever notified has come to rest. PostgreSQL passes on what was notified before it answers this.
                return (String::new(), Some(Question::Last));
            }
        }
        (String::new(), None)
    }

    /// Puts a notification where it belongs; remembers whom to wake.
    fn deliver(&self, message: &[u8], wake: &mut BTreeMap<u64, Arc<Mailbox>>) {
        let body = message.get(HEADER..).unwrap_or_default();
        let Some((_, channel, payload)) = message::read_notification(body) else { return };
        let (Ok(channel), Ok(payload)) = (std::str::from_utf8(channel), std::str::from_utf8(payload)) else {
            // What it is called is what matters; its payload may be anything.
            let Ok(channel) = std::str::from_utf8(channel) else { return };
            return self.deliver_to(channel, "", message, wake);
        };
        self.deliver_to(channel, payload, message, wake);
    }

    fn deliver_to(&self, channel: &str, payload: &str, message: &[u8], wake: &mut BTreeMap<u64, Arc<Mailbox>>) {
        let mut state = self.state.lock();
        let (ids, ends) = match state.subscribers.hear(channel, payload) {
            Heard::For(ids) => (ids, false),
            Heard::Ends(id) => (vec![id], true),
            Heard::Nothing => return,
        };
        for id in ids {
            let Some((mailbox, _)) = state.members.get(&id) else { continue };
            if ends {
                mailbox.mail.lock().ended = true;
            } else {
                mailbox.put(message);
            }
            wake.entry(id).or_insert_with(|| Arc::clone(mailbox));
        }
    }

    /// PostgreSQL did what it was asked; whether that was the last thing.
    fn answered(&self, question: Question) -> Option<Over> {
        match question {
            Question::Settings => None,
            Question::Listen(channels) => {
                let mut state = self.state.lock();
                state.subscribers.confirm(channels);
                // Who waits for it looks by itself.
                let members: Vec<_> = state.members.values().map(|(mailbox, _)| Arc::clone(mailbox)).collect();
                drop(state);
                members.iter().for_each(|mailbox| mailbox.wake());
                None
            }
            Question::Leave => self.state.lock().members.is_empty().then_some(Over::Rest),
            Question::Last => Some(Over::Closed),
        }
    }
}

/// Whether the pool may have a connection besides one that only listens.
#[must_use]
pub fn has_room(pool: &Pool) -> bool {
    let why = pool.server.explain(pool.id, None);
    why.pool_size.min(why.ceiling) > 1
}

/// How it ended with a connection.
enum Over {
    /// It can go back to its pool.
    Rest,
    /// It is to be closed; nothing is missed.
    Closed,
    Lost(Option<Bytes>),
}

/// What the connection was asked.
enum Question {
    Settings,
    Listen(Vec<Channel>),
    /// Nobody listens any more.
    Leave,
    /// The gate is not open, and nobody else is left.
    Last,
}

/// The hub's connection: at most one question at a time.
struct Wire<'a> {
    hub: &'a Hub,
    input: BytesMut,
    asked: Option<(Question, Instant)>,
}

impl Wire<'_> {
    async fn ask(&mut self, conn: &mut ServerConn, sql: &str, question: Question) -> bool {
        let deadline = Instant::now() + ANSWER_LIMIT;
        let mut out = BytesMut::new();
        if message::write_query(&mut out, sql).is_err() {
            return false;
        }
        let write = async {
            conn.stream.write_all(&out).await?;
            conn.stream.flush().await
        };
        self.asked = Some((question, deadline));
        matches!(tokio::time::timeout_at(deadline, write).await, Ok(Ok(())))
    }

    /// Deals with what was read; what is to become of the connection. `Err`: it is of no use, with PostgreSQL's last words.
    fn take(&mut self, conn: &mut ServerConn) -> Result<Option<Over>, Option<Bytes>> {
        let mut wake = BTreeMap::new();
        let outcome = self.walk(conn, &mut wake);
        wake.values().for_each(|mailbox| mailbox.wake());
        outcome
    }

    fn walk(
        &mut self,
        conn: &mut ServerConn,
        wake: &mut BTreeMap<u64, Arc<Mailbox>>,
    ) -> Result<Option<Over>, Option<Bytes>> {
        while let Some(header) = frame::server_header(&self.input).map_err(|_| None)? {
            if header.total() > MAX_MESSAGE {
                return Err(None);
            }
            if self.input.len() < header.total() {
                break;
            }
            let message = self.input.split_to(header.total());
            let body = message.get(HEADER..).unwrap_or_default();
            match header.tag {
                backend::NOTIFICATION_RESPONSE => self.hub.deliver(&message, wake),
                backend::PARAMETER_STATUS => {
                    if let Some((name, value)) = message::read_parameter_status(body) {
                        conn.reported(name, value);
                    }
                }
                backend::NOTICE_RESPONSE
                | backend::COMMAND_COMPLETE
                | backend::EMPTY_QUERY_RESPONSE
                | backend::ROW_DESCRIPTION
                | backend::DATA_ROW => {}
                backend::READY_FOR_QUERY if body == [status::IDLE] => {
                    let Some((question, _)) = self.asked.take() else { return Err(None) };
                    if let Some(over) = self.hub.answered(question)
                        && self.input.is_empty()
                    {
                        return Ok(Some(over));
                    }
                }
                backend::ERROR_RESPONSE => return Err(Some(message.freeze().slice(HEADER..))),
                _ => return Err(None),
            }
        }
        Ok(None)
    }
}
