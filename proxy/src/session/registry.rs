//! Every session of the process: found by cancel key, watched for deadlines, told to end.
//!
//! A session writes its state into its own `Shared` and reads what others want of it there. The registry's lock is taken
//! at login, at the end, by a cancel request and by the sweep, never by a query.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU8, AtomicU16, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use atomic_waker::AtomicWaker;
use parking_lot::Mutex;
use tenantry_config::TenantId;
use tenantry_wire::{scram, startup::CancelKey};

use super::{pin::Pins, state::SessionState};
use crate::{
    clock::Millis,
    pool::{Place, Pool},
};

/// Why a session is asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum EndReason {
    IdleTimeout = 1,
    IdleTransactionTimeout = 2,
    TransactionTimeout = 3,
    Shutdown = 4,
    Killed = 5,
    /// Shutdown, and its deadline has passed: now, whatever runs.
    ShutdownNow = 6,
    /// Its tenant is drained: when its transaction is over.
    Drained = 7,
    /// The drain's deadline has passed.
    DrainedNow = 8,
    /// Its database is gone: when its transaction is over.
    Dropped = 9,
    /// Its transaction was open when its tenant had to leave the server.
    Moved = 10,
}

impl EndReason {
    fn from_u8(n: u8) -> Option<Self> {
        [
            Self::IdleTimeout,
            Self::IdleTransactionTimeout,
            Self::TransactionTimeout,
            Self::Shutdown,
            Self::Killed,
            Self::ShutdownNow,
            Self::Drained,
            Self::DrainedNow,
            Self::Dropped,
            Self::Moved,
        ]
        .into_iter()
        .find(|r| *r as u8 == n)
    }
}

/// Time limits that the sweep watches; milliseconds, 0 for none.
#[derive(Debug, Clone, Copy, Default)]
pub struct Watch {
    pub client_idle: u64,
    pub idle_transaction: u64,
    pub transaction: u64,
    pub query: u64,
}

/// What others may know and want of a session.
#[derive(Debug)]
pub struct Shared {
    pub id: u64,
    pub key: CancelKey,
    /// Another one once its tenant has moved to another server.
    pool: ArcSwap<Pool>,
    state: AtomicU8,
    since: AtomicU64,
    transaction_since: AtomicU64,
    cancel: AtomicBool,
    end: AtomicU8,
    pins: AtomicU16,
    watch: Watch,
    pub waker: AtomicWaker,
}

impl Shared {
    /// Where the session gets its server connections.
    #[must_use]
    pub fn pool(&self) -> Arc<Pool> {
        self.pool.load_full()
    }

    pub(crate) fn move_to(&self, pool: &Arc<Pool>) {
        self.pool.store(Arc::clone(pool));
    }

    /// The session entered this state.
    pub fn enter(&self, state: SessionState, now: Millis) {
        // Whoever sees the new state must see its beginning, too.
        self.since.store(now.0, Relaxed);
        self.state.store(state as u8, Release);
    }

    #[must_use]
    pub fn state(&self) -> SessionState {
        SessionState::from_u8(self.state.load(Acquire))
    }

    /// The session's transaction began (it got its server connection), or ended.
    pub fn transaction(&self, since: Option<Millis>) {
        self.transaction_since.store(since.map_or(0, |m| m.0.max(1)), Relaxed);
    }

    /// How long it has been in its state.
    #[must_use]
    pub fn in_state_for(&self, now: Millis) -> Duration {
        now.since(Millis(self.since.load(Relaxed)))
    }

    /// The session keeps its server connection beyond its transaction for these reasons.
    pub fn pin(&self, pins: Pins) {
        self.pins.store(pins.bits(), Relaxed);
    }

    #[must_use]
    pub fn pins(&self) -> Pins {
        Pins::from_bits(self.pins.load(Relaxed))
    }

    /// Takes the wish to cancel, if there is one.
    pub fn take_cancel(&self) -> bool {
        self.cancel.load(Relaxed) && self.cancel.swap(false, Relaxed)
    }

    #[must_use]
    pub fn end(&self) -> Option<EndReason> {
        EndReason::from_u8(self.end.load(Relaxed))
    }

    pub fn ask_to_end(&self, reason: EndReason) {
        // The first reason is the one the client hears.
        let _ = self.end.compare_exchange(0, reason as u8, Relaxed, Relaxed);
        self.waker.wake();
    }

    pub fn ask_to_cancel(&self) {
        self.cancel.store(true, Relaxed);
        self.waker.wake();
    }

    fn check(&self, now: Millis) {
        let state = self.state();
        let waited = now.0.saturating_sub(self.since.load(Relaxed));
        let over = |limit: u64| limit > 0 && waited >= limit;
        let started = self.transaction_since.load(Relaxed);
        match state {
            SessionState::Idle | SessionState::Pinned if over(self.watch.client_idle) => {
                self.ask_to_end(EndReason::IdleTimeout)
            }
            SessionState::IdleInTransaction if over(self.watch.idle_transaction) => {
                self.ask_to_end(EndReason::IdleTransactionTimeout);
            }
            SessionState::Active if over(self.watch.query) => {
                // Again only after the limit has passed once more.
                self.since.store(now.0, Relaxed);
                self.ask_to_cancel();
            }
            _ => {}
        }
        if self.watch.transaction > 0 && started > 0 && now.0.saturating_sub(started) >= self.watch.transaction {
            self.ask_to_end(EndReason::TransactionTimeout);
        }
    }
}

#[derive(Debug, Default)]
pub struct Registry {
    sessions: Mutex<HashMap<u32, Arc<Shared>>>,
    next: AtomicU64,
}

/// Takes the session out of the registry when dropped.
#[derive(Debug)]
pub struct Registered {
    registry: Arc<Registry>,
    pub shared: Arc<Shared>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.registry.sessions.lock().remove(&self.shared.key.process);
    }
}

impl Registry {
    /// Enters a session with a fresh random key; its secret has `secret_bytes` bytes.
    #[must_use]
    pub fn register(self: &Arc<Self>, pool: Arc<Pool>, secret_bytes: usize, watch: Watch, now: Millis) -> Registered {
        let mut sessions = self.sessions.lock();
        let process = std::iter::repeat_with(|| rand::random::<u32>() >> 1)
            .find(|p| *p != 0 && !sessions.contains_key(p))
            .unwrap_or_default();
        let secret = std::iter::repeat_with(rand::random::<u8>).take(secret_bytes).collect();
        let shared = Arc::new(Shared {
            id: self.next.fetch_add(1, Relaxed) + 1,
            key: CancelKey { process, secret },
            pool: ArcSwap::new(pool),
            state: AtomicU8::new(SessionState::Idle as u8),
            since: AtomicU64::new(now.0),
            transaction_since: AtomicU64::new(0),
            cancel: AtomicBool::new(false),
            end: AtomicU8::new(0),
            pins: AtomicU16::new(0),
            watch,
            waker: AtomicWaker::new(),
        });
        sessions.insert(process, Arc::clone(&shared));
        Registered { registry: Arc::clone(self), shared }
    }

    /// Asks the session that holds this key to cancel; whether there is one is nobody's business.
    pub fn cancel(&self, key: &CancelKey) {
        let found = self.sessions.lock().get(&key.process).cloned();
        if let Some(shared) = found
            && scram::same_secret(&shared.key.secret, &key.secret)
        {
            shared.ask_to_cancel();
        }
    }

    /// Looks at every session's deadlines.
    pub fn sweep(&self, now: Millis) {
        for shared in self.sessions.lock().values() {
            shared.check(now);
        }
    }

    /// Asks every session to end; one in a transaction may finish it.
    pub fn end_all(&self, reason: EndReason) {
        for shared in self.sessions.lock().values() {
            shared.ask_to_end(reason);
        }
    }

    /// The drain's deadline has passed.
    pub fn end_all_now(&self) {
        for shared in self.sessions.lock().values() {
            shared.end.store(EndReason::ShutdownNow as u8, Relaxed);
            shared.waker.wake();
        }
    }

    /// The sessions of one tenant.
    pub(crate) fn of(&self, is_meant: impl Fn(&Place) -> bool) -> Vec<Arc<Shared>> {
        self.sessions.lock().values().filter(|shared| is_meant(&shared.pool().place())).cloned().collect()
    }

    /// Asks the sessions of one tenant to end; how many of them are in a transaction.
    pub fn end_those(&self, is_meant: impl Fn(&Place) -> bool, reason: EndReason) -> usize {
        let sessions = self.of(is_meant);
        let is_busy = |state| matches!(state, SessionState::Active | SessionState::IdleInTransaction);
        let busy = sessions.iter().filter(|shared| is_busy(shared.state())).count();
        for shared in &sessions {
            if reason == EndReason::DrainedNow {
                shared.end.store(reason as u8, Relaxed);
            }
            shared.ask_to_end(reason);
        }
        busy
    }

    /// Ends the sessions of one tenant that are in a transaction, at once; how many.
    pub fn end_transactions(&self, is_meant: impl Fn(&Place) -> bool, reason: EndReason) -> usize {
        let mut sessions = self.of(is_meant);
        sessions.retain(|shared| matches!(shared.state(), SessionState::Active | SessionState::IdleInTransaction));
        sessions.iter().for_each(|shared| shared.ask_to_end(reason));
        sessions.len()
    }

    /// Asks those that have something running to cancel it, as their clients could; how many.
    pub fn cancel_those(&self, is_meant: impl Fn(&Place) -> bool) -> usize {
        let mut sessions = self.of(is_meant);
        sessions.retain(|shared| shared.state() == SessionState::Active);
        sessions.iter().for_each(|shared| shared.ask_to_cancel());
        sessions.len()
    }

    /// How many sessions of a tenant's role are in each state.
    #[must_use]
    pub fn states(&self) -> HashMap<(TenantId, String), [u64; SessionState::ALL.len()]> {
        let mut counts: HashMap<_, [u64; SessionState::ALL.len()]> = HashMap::new();
        for shared in self.sessions.lock().values() {
            let pool = shared.pool();
            let row = counts.entry((pool.tenant(), pool.role.clone())).or_default();
            if let Some(n) = row.get_mut(shared.state() as usize) {
                *n += 1;
            }
        }
        counts
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.sessions.lock().len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A time limit in milliseconds, 0 for none.
#[must_use]
pub fn limit(d: Option<Duration>) -> u64 {
    d.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX).max(1))
}
