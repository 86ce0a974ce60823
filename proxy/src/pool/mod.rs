//! Server connections and who gets them: the pure core, and the shell that dials, hands over and closes for it.
//!
//! A `Server` is one PostgreSQL instance with one core, and so one lock, over all of its pools. The lock is held for the
//! length of a decision, never across an await. A connection that becomes free travels to the oldest waiter inside the
//! call that freed it.

pub mod core;
pub mod decision;
pub mod explain;
pub mod functions;
pub mod hub;
pub mod lease;
pub mod server;
pub mod slot;
pub mod stats;
pub mod subscribers;
pub mod waiters;

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use parking_lot::Mutex;
use tenantry_config::{PoolMode, TenantId};
use tenantry_wire::scram::ClientKey;

use self::{
    decision::PoolId,
    functions::{KnownFunctions, Learned, Question, Reading},
    hub::Hub,
    server::Server,
    stats::Stats,
};
use crate::clock::Millis;
use crate::server::{
    conn::Parameters,
    connect::Login,
    credentials::{Credentials, Keyring},
    settings::Settings,
    statements::StatementTable,
};

/// The server connections of one (tenant, role).
#[derive(Debug)]
pub struct Pool {
    pub id: PoolId,
    place: ArcSwap<Place>,
    pub role: String,
    pub server: Arc<Server>,
    settings: ArcSwap<PoolSettings>,
    keyring: Mutex<Keyring>,
    /// What a fresh connection reports; known from the first login on.
    welcome: Mutex<Option<Parameters>>,
    /// Why the last login failed for good, in PostgreSQL's words where it had any.
    login_error: Mutex<Option<LoginError>>,
    /// Shared with the pool that it succeeded: a statement that a client named there means the same here.
    pub statements: Arc<StatementTable>,
    /// Shared likewise: what is counted of a tenant's role only ever grows.
    pub stats: Arc<Stats>,
    pinned: AtomicU32,
    /// How often something made plans stale; a connection whose count differs has its statements dropped at its next use.
    plans: AtomicU32,
    /// A client has asked what a sequence gave it: from then on no client finds what a sequence gave to another.
    reads_sequences: AtomicBool,
    /// What functions in the database may leave behind.
    pub functions: KnownFunctions,
    /// Listens for the clients of all of the tenant's pools.
    pub hub: Arc<Hub>,
    /// Clients that listen to a channel.
    pub(crate) listening: AtomicU32,
    /// When `reconnect_soon` last did so.
    reconnected: AtomicU64,
    /// Startup settings that PostgreSQL took, and how it spells them.
    tried: Mutex<Vec<(Settings, Settings)>>,
    /// Settings that sessions began with, each once: equal ones are then the same one, and quick to compare.
    common: Mutex<Vec<Settings>>,
    /// The pool at the server that the tenant moved to: whoever holds this one asks there from then on.
    successor: OnceLock<Arc<Pool>>,
}

/// Whose a pool is, and where its connections lead. Changes when the tenant is renamed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub tenant: TenantId,
    /// The tenant's number, if it has one: that stays.
    pub number: Option<i64>,
    /// The database's name on the server.
    pub database: String,
}

impl Place {
    /// The same tenant, whatever it is called.
    #[must_use]
    pub fn is_of(&self, tenant: &TenantId, number: Option<i64>) -> bool {
        match (self.number, number) {
            (None, None) => self.tenant == *tenant,
            (own, other) => own == other,
        }
    }
}

/// Milliseconds.
const RECONNECT_AT_MOST_EVERY: u64 = 1_000;
/// More kinds of startup settings than this are tried each time.
const MAX_TRIED: usize = 32;

/// The pool's part of the tenant's settings.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolSettings {
    pub mode: PoolMode,
    pub pool: tenantry_config::Pool,
}

/// Why a login to the server failed for good.
#[derive(Debug, Clone)]
pub enum LoginError {
    /// The body of PostgreSQL's ErrorResponse.
    Server(Bytes),
    /// Our own, fit for a client.
    Ours(String),
}

impl Pool {
    /// Not for the hot path.
    #[must_use]
    pub fn place(&self) -> Arc<Place> {
        self.place.load_full()
    }

    #[must_use]
    pub fn tenant(&self) -> TenantId {
        self.place.load().tenant.clone()
    }

    #[must_use]
    pub fn settings(&self) -> Arc<PoolSettings> {
        self.settings.load_full()
    }

    #[must_use]
    pub fn mode(&self) -> PoolMode {
        self.settings.load().mode
    }

    /// How to log in to the server as this pool's role; and whose turn that is, for `login_worked` and `password_refused`.
    #[must_use]
    pub fn login(&self) -> (Login, u32) {
        let (credentials, turn) = self.keyring.lock().current();
        let login = Login {
            database: self.place.load().database.clone(),
            role: self.role.clone(),
            credentials,
            max_prepared_statements: self.settings.load().pool.max_prepared_statements,
        };
        (login, turn)
    }

    pub(crate) fn login_worked(&self, turn: u32) {
        self.keyring.lock().worked(turn);
    }

    /// PostgreSQL refused the password; true if there is another one to try.
    pub(crate) fn password_refused(&self, turn: u32) -> bool {
        self.keyring.lock().refused(turn)
    }

    /// The tenant has moved to another server, where `next` is this role's pool. The first word counts.
    pub(crate) fn succeed(&self, next: &Arc<Self>) {
        let _ = self.successor.set(Arc::clone(next));
    }

    /// Whether it has a successor: nobody is to ask here any more.
    #[must_use]
    pub fn has_moved(&self) -> bool {
        self.successor.get().is_some()
    }

    /// The pool that counts now: this one, or the last of those that came after it.
    #[must_use]
    pub fn latest(self: &Arc<Self>) -> Arc<Self> {
        let mut pool = self;
        while let Some(next) = pool.successor.get() {
            pool = next;
        }
        Arc::clone(pool)
    }

    /// A client proved these: what is new is used from now on, and wakes a pool that had given up.
    pub fn learn_credentials(&self, credentials: Credentials) {
        let is_new = self.keyring.lock().learn(credentials);
        if is_new {
            self.server.credentials_known(self.id);
        }
    }

    /// The role has another secret: `from` makes of what is known what to log in with from now on, if it can. Connections
    /// stay, as sessions of PostgreSQL do.
    pub fn change_credentials(&self, from: impl Fn(&Credentials) -> Option<Credentials>) {
        let mut keyring = self.keyring.lock();
        let made = keyring.all().find_map(from);
        let is_new = made.is_some_and(|credentials| keyring.change(credentials));
        drop(keyring);
        if is_new {
            self.server.credentials_known(self.id);
        }
    }

    /// What the pool would prove itself with, if it knows no password but a client's key.
    #[must_use]
    pub fn client_key(&self) -> Option<ClientKey> {
        self.keyring.lock().current().0.client_key().cloned()
    }

    /// What is open is of no use any more; at most once a second, since clients can bring this about.
    pub fn reconnect_soon(&self, now: Millis) {
        let last = self.reconnected.load(Ordering::Relaxed);
        if last == 0 || now.0.saturating_sub(last) >= RECONNECT_AT_MOST_EVERY {
            self.reconnected.store(now.0.max(1), Ordering::Relaxed);
            self.server.reconnect(self);
        }
    }

    /// How often something made plans stale.
    #[must_use]
    pub fn plans(&self) -> u32 {
        self.plans.load(Ordering::Relaxed)
    }

    /// Statements that are prepared may not fit the tables any more: each connection prepares them anew.
    pub fn plans_are_stale(&self) -> u32 {
        self.plans.fetch_add(1, Ordering::Relaxed).wrapping_add(1)
    }

    /// PostgreSQL told of the functions in the database, when asked for this; `made`: by a session that had
    /// changed something.
    pub fn read_functions(&self, asked: Question, reading: Reading, made: bool, now: Millis) -> Learned {
        if reading.asks_sequences {
            self.sequences_are_read();
        }
        self.functions.read(asked, reading, made, now)
    }

    #[must_use]
    pub fn reads_sequences(&self) -> bool {
        self.reads_sequences.load(Ordering::Relaxed)
    }

    pub fn sequences_are_read(&self) {
        self.reads_sequences.store(true, Ordering::Relaxed);
    }

    #[must_use]
    pub fn welcome(&self) -> Option<Parameters> {
        self.welcome.lock().clone()
    }

    #[must_use]
    pub fn login_error(&self) -> Option<LoginError> {
        self.login_error.lock().clone()
    }

    /// Takes one of the tenant's `max_pinned`; false if all are taken.
    #[must_use]
    pub fn pin(&self) -> bool {
        let limit = self.settings.load().pool.max_pinned;
        self.pinned.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < limit).then_some(n + 1)).is_ok()
    }

    pub fn unpin(&self) {
        let _ = self.pinned.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
    }

    /// How PostgreSQL spells these startup settings, if it was asked before.
    #[must_use]
    pub fn tried(&self, asked: &Settings) -> Option<Settings> {
        self.tried.lock().iter().find(|(a, _)| a == asked).map(|(_, known)| known.clone())
    }

    /// The same settings as one shared value, while there are few kinds of them.
    #[must_use]
    pub fn share(&self, settings: Settings) -> Settings {
        let mut common = self.common.lock();
        if let Some(same) = common.iter().find(|s| **s == settings) {
            return same.clone();
        }
        if common.len() < MAX_TRIED {
            common.push(settings.clone());
        }
        settings
    }

    pub fn remember_tried(&self, asked: Settings, known: Settings) {
        let mut tried = self.tried.lock();
        if tried.len() < MAX_TRIED {
            tried.push((asked, known));
        }
    }

    /// Clients that listen to a channel, here or by the hub.
    #[must_use]
    pub fn listening(&self) -> u32 {
        self.listening.load(Ordering::Relaxed)
    }

    #[must_use]
    pub fn pinned(&self) -> u32 {
        self.pinned.load(Ordering::Relaxed)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.server.forget(self.id);
    }
}
