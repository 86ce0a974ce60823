//! What every pool of one server does next: a pure function of events and `now`.
//!
//! One core per PostgreSQL server holds all of its pools, so that the cap, the queues and the decision whose connection
//! is closed for whom stand in one place, under one short lock. No I/O, no clock, no randomness, no hash order: the same
//! events with the same `now` give the same actions.
//!
//! What always holds, after every call:
//! - a slot holds a permit from `Connecting` until `closed`; permits never exceed the cap;
//! - a pool that has an idle slot has no waiter;
//! - `counts` of a pool are the states of its slots, since only `shift` changes either.
//!
//! Calls: `add_pool` first; then `checkout`, `release`, `dialed`, `dial_failed`, `closed`, `leave_queue` as things happen,
//! and `tick` about ten times a second. Each appends to `actions` what the shell must do, in order.

use std::collections::{BTreeMap, VecDeque};

use slab::Slab;
use smallvec::SmallVec;

use super::{
    slot::{SlotEvent, SlotState},
    waiters::{Queue, WaiterId},
};
use crate::{budget::permit::Ledger, clock::Millis};

/// A pool within one server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolId(pub u32);

/// A server connection within one server: an index that is used again after `closed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub usize);

/// What a pool may do; times in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolLimits {
    pub size: u32,
    pub min_size: u32,
    pub max_waiters: usize,
    pub query_wait_timeout: u64,
    pub round_robin: bool,
    pub lifetime: u64,
    pub idle_timeout: u64,
    pub check_delay: u64,
}

/// What a server may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerLimits {
    pub cap: u32,
    pub max_connecting: u32,
    /// First pause after a failed dial; doubled up to 4 times this, so that a server that is back is found soon.
    pub login_retry: u64,
}

/// What the shell must do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Connect and log in for this pool, then report `dialed` or `dial_failed`.
    Dial { slot: SlotId, pool: PoolId },
    /// Close this idle slot's connection, then report `closed`.
    Close { slot: SlotId },
    /// Ask this idle connection for a sign of life, then `release` it or close it.
    Check { slot: SlotId },
    /// Tell this waiter no; it has left the queue.
    Refuse { waiter: WaiterId, refusal: Refusal },
}

/// Why nobody gets a server connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Waited longer than `query_wait_timeout`.
    Timeout { waited: u64, ahead: usize, blocked: Blocked },
    /// `max_waiters` are waiting already.
    QueueFull { waiting: usize },
    /// The server turned the login down for good (password, database, role); its error is with the pool.
    LoginRefused,
}

/// Which limit keeps a waiter waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocked {
    PoolSize,
    ServerCap,
    ConnectThrottle,
    ServerDown,
    /// PostgreSQL itself refused another connection (53300).
    ServerFull,
}

impl Blocked {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PoolSize => "pool_size",
            Self::ServerCap => "server_cap",
            Self::ConnectThrottle => "connect_throttle",
            Self::ServerDown => "server_down",
            Self::ServerFull => "server_full",
        }
    }
}

/// How a dial failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DialFailure {
    /// Nobody answers, or "starting up": holds for every pool of the server.
    ServerDown,
    /// Only this pool's login failed, and may succeed later (53300 for its role or database, timeout inside login).
    Later,
    /// Only this pool's login failed, and will again (password, database): its waiters are told at once.
    Refused,
}

/// What a session that asked for a connection gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checkout {
    Ready(SlotId),
    Queued(WaiterId),
    Refused(Refusal),
}

/// What becomes of a connection that was given back in good order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rested {
    /// It goes to this waiter.
    Hand(WaiterId),
    /// It stays in the pool.
    Idle,
    /// It is to be closed.
    Close,
}

pub type Actions = SmallVec<[Action; 4]>;

/// A waiter of another pool that has waited this much longer takes the next free connection's place at the cap.
const TRANSFER_LAG: u64 = 100;

#[derive(Debug)]
struct Slot {
    pool: PoolId,
    state: SlotState,
    /// When it entered its state.
    since: Millis,
    /// When its life is over.
    expires: Millis,
    /// The pool's generation at its dial; an older one is closed when it comes to rest.
    generation: u32,
    checked: Millis,
}

/// Pauses after failures: first `base`, then doubled up to 4 times `base`.
#[derive(Debug, Clone, Copy, Default)]
struct Backoff {
    delay: u64,
    until: Millis,
}

impl Backoff {
    fn fail(&mut self, base: u64, now: Millis) {
        self.delay = if self.delay == 0 { base } else { (self.delay * 2).min(base.saturating_mul(4)) };
        self.until = Millis(now.0.saturating_add(self.delay));
    }

    fn is_open(&self, now: Millis) -> bool {
        self.delay > 0 && now < self.until
    }
}

#[derive(Debug)]
struct PoolState {
    limits: PoolLimits,
    generation: u32,
    idle: VecDeque<SlotId>,
    queue: Queue,
    counts: [u32; SlotState::ALL.len()],
    backoff: Backoff,
    /// Set by a successful login, cleared when credentials failed: may we dial without a client waiting?
    may_prewarm: bool,
    retired: bool,
}

impl PoolState {
    fn count(&self, state: SlotState) -> u32 {
        self.counts.get(state.index()).copied().unwrap_or(0)
    }

    /// Connections that the pool holds or is getting; the ones that are closing do not count against its size.
    fn size(&self) -> u32 {
        self.counts.iter().sum::<u32>() - self.count(SlotState::Closing)
    }
}

/// All pools of one server.
#[derive(Debug)]
pub struct Core {
    limits: ServerLimits,
    ledger: Ledger,
    pools: BTreeMap<PoolId, PoolState>,
    slots: Slab<Slot>,
    down: Backoff,
    next_waiter: u64,
    next_pool: u32,
    /// Grows with every dial; spreads lifetimes without randomness.
    dials: u64,
}

impl Core {
    #[must_use]
    pub fn new(limits: ServerLimits) -> Self {
        Self {
            limits,
            ledger: Ledger::new(limits.cap),
            pools: BTreeMap::new(),
            slots: Slab::new(),
            down: Backoff::default(),
            next_waiter: 0,
            next_pool: 0,
            dials: 0,
        }
    }

    // Set-up and reload.

    pub fn add_pool(&mut self, limits: PoolLimits, may_prewarm: bool) -> PoolId {
        let id = PoolId(self.next_pool);
        self.next_pool += 1;
        let pool = PoolState {
            limits,
            generation: 0,
            idle: VecDeque::new(),
            queue: Queue::default(),
            counts: [0; SlotState::ALL.len()],
            backoff: Backoff::default(),
            may_prewarm,
            retired: false,
        };
        self.pools.insert(id, pool);
        id
    }

    pub fn set_limits(&mut self, limits: ServerLimits) {
        self.limits = limits;
        self.ledger.set_cap(limits.cap);
    }

    /// No dial from now on.
    pub fn stop_dialing(&mut self) {
        self.ledger.set_cap(0);
    }

    pub fn set_pool_limits(&mut self, id: PoolId, limits: PoolLimits) {
        if let Some(pool) = self.pools.get_mut(&id) {
            pool.limits = limits;
        }
    }

    /// Closes what the pool has as it comes to rest, idle connections at once, and dials afresh from now on.
    pub fn reconnect(&mut self, id: PoolId, now: Millis, actions: &mut Actions) {
        let Some(pool) = self.pools.get_mut(&id) else { return };
        pool.generation = pool.generation.wrapping_add(1);
        pool.backoff = Backoff::default();
        for slot in std::mem::take(&mut pool.idle) {
            self.shift(slot, SlotEvent::Close, now);
            actions.push(Action::Close { slot });
        }
    }

    /// Nobody will ask this pool again: its connections close as they come to rest, then it is forgotten.
    pub fn retire_pool(&mut self, id: PoolId, now: Millis, actions: &mut Actions) {
        self.reconnect(id, now, actions);
        let Some(pool) = self.pools.get_mut(&id) else { return };
        pool.limits.size = 0;
        pool.limits.min_size = 0;
        pool.retired = true;
        self.forget_if_empty(id);
    }

    fn forget_if_empty(&mut self, id: PoolId) {
        if self.pools.get(&id).is_some_and(|p| p.retired && p.counts.iter().all(|n| *n == 0)) {
            self.pools.remove(&id);
        }
    }

    /// A client proved a secret that can log in to the server: the pool may dial without waiting for another.
    pub fn credentials_known(&mut self, id: PoolId) {
        if let Some(pool) = self.pools.get_mut(&id) {
            pool.may_prewarm = true;
            pool.backoff = Backoff::default();
        }
    }

    // Events.

    /// A session wants a connection of this pool.
    pub fn checkout(&mut self, id: PoolId, now: Millis, actions: &mut Actions) -> Checkout {
        let Some(pool) = self.pools.get_mut(&id) else { return Checkout::Refused(Refusal::LoginRefused) };
        let free = if pool.limits.round_robin { pool.idle.pop_front() } else { pool.idle.pop_back() };
        if let Some(slot) = free {
            self.shift(slot, SlotEvent::Lend, now);
            return Checkout::Ready(slot);
        }
        if pool.queue.len() >= pool.limits.max_waiters {
            return Checkout::Refused(Refusal::QueueFull { waiting: pool.queue.len() });
        }
        let waiter = WaiterId(self.next_waiter);
        self.next_waiter += 1;
        pool.queue.join(waiter, now);
        self.grow(now, actions);
        Checkout::Queued(waiter)
    }

    /// A connection came to rest in good order: after a transaction, a reset or a check.
    pub fn release(&mut self, slot: SlotId, now: Millis, actions: &mut Actions) -> Rested {
        let rested = self.rest(slot, now);
        if rested == Rested::Close {
            self.grow(now, actions);
        }
        rested
    }

    /// A connection changes state without coming to rest: `Reset`, `AwaitCancel`, `Close`.
    pub fn change(&mut self, slot: SlotId, event: SlotEvent, now: Millis, actions: &mut Actions) {
        self.shift(slot, event, now);
        if event == SlotEvent::Close {
            self.grow(now, actions);
        }
    }

    /// A dial succeeded.
    pub fn dialed(&mut self, slot: SlotId, now: Millis, actions: &mut Actions) -> Rested {
        self.down = Backoff::default();
        if let Some(pool) = self.pool_of(slot) {
            pool.backoff = Backoff::default();
            pool.may_prewarm = true;
        }
        let rested = self.rest(slot, now);
        self.grow(now, actions);
        rested
    }

    /// A dial failed and its socket is closed.
    pub fn dial_failed(&mut self, slot: SlotId, failure: DialFailure, now: Millis, actions: &mut Actions) {
        let base = self.limits.login_retry;
        match failure {
            DialFailure::ServerDown => self.down.fail(base, now),
            DialFailure::Later | DialFailure::Refused => {
                self.down = Backoff::default();
                if let Some(pool) = self.pool_of(slot) {
                    pool.backoff.fail(base, now);
                }
            }
        }
        if failure == DialFailure::Refused
            && let Some(pool) = self.pool_of(slot)
        {
            pool.may_prewarm = false;
            let refusal = Refusal::LoginRefused;
            actions.extend(pool.queue.drain().map(|waiter| Action::Refuse { waiter, refusal }));
        }
        self.shift(slot, SlotEvent::Close, now);
        self.closed(slot, now, actions);
    }

    /// PostgreSQL closed its end: the permit is free.
    pub fn closed(&mut self, slot: SlotId, now: Millis, actions: &mut Actions) {
        let Some(gone) = self.slots.try_remove(slot.0) else { return };
        if let Some(pool) = self.pools.get_mut(&gone.pool)
            && let Some(count) = pool.counts.get_mut(gone.state.index())
        {
            *count -= 1;
        }
        self.ledger.give_back();
        self.forget_if_empty(gone.pool);
        self.grow(now, actions);
    }

    /// A waiter went away by itself; false if it had left the queue already (a connection or a refusal is on its way).
    pub fn leave_queue(&mut self, id: PoolId, waiter: WaiterId) -> bool {
        self.pools.get_mut(&id).is_some_and(|pool| pool.queue.leave(waiter))
    }

    /// Time passed: refusals, ends of life, checks, minimum sizes, retries. About ten times a second.
    pub fn tick(&mut self, now: Millis, actions: &mut Actions) {
        self.expire_waiters(now, actions);
        self.retire_idle(now, actions);
        self.grow(now, actions);
        self.prewarm(now, actions);
    }

    // What can be asked.

    #[must_use]
    pub fn counts(&self, id: PoolId) -> [u32; SlotState::ALL.len()] {
        self.pools.get(&id).map(|p| p.counts).unwrap_or_default()
    }

    #[must_use]
    pub fn waiting(&self, id: PoolId) -> usize {
        self.pools.get(&id).map_or(0, |p| p.queue.len())
    }

    /// How long the oldest waiter of this pool has waited, in milliseconds.
    #[must_use]
    pub fn oldest_wait(&self, id: PoolId, now: Millis) -> u64 {
        self.pools.get(&id).and_then(|p| p.queue.oldest()).map_or(0, |(_, since)| now.0.saturating_sub(since.0))
    }

    #[must_use]
    pub fn permits(&self) -> (u32, u32) {
        (self.ledger.held(), self.ledger.cap())
    }

    #[must_use]
    pub fn state(&self, slot: SlotId) -> Option<SlotState> {
        self.slots.get(slot.0).map(|s| s.state)
    }

    /// The one answer to "why does this pool's queue not move".
    #[must_use]
    pub fn blocked(&self, id: PoolId) -> Blocked {
        let Some(pool) = self.pools.get(&id) else { return Blocked::PoolSize };
        if self.down.delay > 0 {
            Blocked::ServerDown
        } else if pool.backoff.delay > 0 {
            Blocked::ServerFull
        } else if pool.size() >= pool.limits.size {
            Blocked::PoolSize
        } else if self.ledger.is_full() {
            Blocked::ServerCap
        } else {
            Blocked::ConnectThrottle
        }
    }

    // Inside.

    /// The one place where a slot changes state, and so the one place that counts.
    fn shift(&mut self, id: SlotId, event: SlotEvent, now: Millis) {
        let Some(slot) = self.slots.get_mut(id.0) else { return };
        match slot.state.next(event) {
            Ok(next) => {
                if let Some(pool) = self.pools.get_mut(&slot.pool) {
                    for (state, up) in [(slot.state, false), (next, true)] {
                        if let Some(count) = pool.counts.get_mut(state.index()) {
                            *count = if up { *count + 1 } else { *count - 1 };
                        }
                    }
                }
                slot.state = next;
                slot.since = now;
            }
            Err(illegal) => debug_assert!(false, "{illegal}"),
        }
    }

    fn pool_of(&mut self, slot: SlotId) -> Option<&mut PoolState> {
        let pool = self.slots.get(slot.0)?.pool;
        self.pools.get_mut(&pool)
    }

    fn rest(&mut self, id: SlotId, now: Millis) -> Rested {
        let Some(slot) = self.slots.get_mut(id.0) else { return Rested::Close };
        slot.checked = now;
        let (pool_id, expired, generation) = (slot.pool, now >= slot.expires, slot.generation);
        let robbed = self.owed_elsewhere(pool_id, now);
        let Some(pool) = self.pools.get_mut(&pool_id) else { return Rested::Close };
        let over = pool.size() > pool.limits.size;
        if expired || over || robbed || generation != pool.generation {
            self.shift(id, SlotEvent::Close, now);
            return Rested::Close;
        }
        if let Some(waiter) = pool.queue.take_first() {
            self.shift(id, SlotEvent::Lend, now);
            return Rested::Hand(waiter);
        }
        pool.idle.push_back(id);
        self.shift(id, SlotEvent::Rest, now);
        Rested::Idle
    }

    /// At the cap, does a waiter of another pool come before this pool's own oldest one (and by enough to pay for a connect)?
    fn owed_elsewhere(&self, own: PoolId, now: Millis) -> bool {
        if !self.ledger.is_full() || self.down.is_open(now) {
            return false;
        }
        let closing: u32 = self.pools.values().map(|p| p.count(SlotState::Closing)).sum();
        let mine =
            self.pools.get(&own).and_then(|p| p.queue.oldest()).map_or(now.0.saturating_add(1), |(_, since)| since.0);
        let starving = self.pools.iter().filter(|(id, p)| **id != own && self.wants(p, now) > 0);
        let mut owed = 0u32;
        for (_, pool) in starving {
            if let Some((_, since)) = pool.queue.oldest()
                && (mine > now.0 || since.0.saturating_add(TRANSFER_LAG) < mine)
            {
                owed = owed.saturating_add(self.wants(pool, now));
            }
        }
        owed > closing
    }

    /// How many more connections this pool could use right now.
    fn wants(&self, pool: &PoolState, now: Millis) -> u32 {
        if pool.backoff.is_open(now) {
            return 0;
        }
        let coming = pool.count(SlotState::Connecting);
        let waiting = u32::try_from(pool.queue.len()).unwrap_or(u32::MAX);
        waiting.saturating_sub(coming).min(pool.limits.size.saturating_sub(pool.size()))
    }

    /// Dials for the pools whose waiters have waited longest, while permits and the throttle last; at the cap, closes
    /// idle connections of others for them.
    fn grow(&mut self, now: Millis, actions: &mut Actions) {
        while let Some(pool) = self.neediest(now) {
            if self.connecting() >= self.connecting_limit() || self.down.is_open(now) {
                return;
            }
            if self.ledger.is_full() {
                self.make_room(pool, now, actions);
                return;
            }
            self.dial(pool, now, actions);
        }
    }

    fn neediest(&self, now: Millis) -> Option<PoolId> {
        let waiting = self.pools.iter().filter(|(_, p)| self.wants(p, now) > 0);
        waiting.filter_map(|(id, p)| p.queue.oldest().map(|(_, since)| (since, *id))).min().map(|(_, id)| id)
    }

    fn connecting(&self) -> u32 {
        self.pools.values().map(|p| p.count(SlotState::Connecting)).sum()
    }

    /// While the server is down one dial at a time finds out whether it is back.
    fn connecting_limit(&self) -> u32 {
        if self.down.delay > 0 { 1 } else { self.limits.max_connecting }
    }

    fn dial(&mut self, pool_id: PoolId, now: Millis, actions: &mut Actions) {
        let Some(pool) = self.pools.get_mut(&pool_id) else { return };
        if !self.ledger.take() {
            return;
        }
        self.dials += 1;
        // Up to a fifth of the lifetime earlier, spread evenly over successive dials: no herd when they end.
        let spread = pool.limits.lifetime / 5;
        let early = if spread == 0 { 0 } else { self.dials.wrapping_mul(0x9E37_79B9_7F4A_7C15) % spread };
        let slot = Slot {
            pool: pool_id,
            state: SlotState::Connecting,
            since: now,
            expires: Millis(now.0.saturating_add(pool.limits.lifetime).saturating_sub(early)),
            generation: pool.generation,
            checked: now,
        };
        if let Some(count) = pool.counts.get_mut(SlotState::Connecting.index()) {
            *count += 1;
        }
        let slot = SlotId(self.slots.insert(slot));
        actions.push(Action::Dial { slot, pool: pool_id });
    }

    /// Closes the longest idle connection of another pool, one for each connection that is wanted and not yet closing.
    fn make_room(&mut self, wanting: PoolId, now: Millis, actions: &mut Actions) {
        let wanted: u32 = self.pools.values().map(|p| self.wants(p, now)).sum();
        let mut closing: u32 = self.pools.values().map(|p| p.count(SlotState::Closing)).sum();
        while closing < wanted {
            let victims = self.pools.iter().filter(|(id, _)| **id != wanting).flat_map(|(_, p)| p.idle.iter().copied());
            let Some(victim) = victims.min_by_key(|s| (self.slots.get(s.0).map(|slot| slot.since), *s)) else { return };
            if let Some(pool) = self.pool_of(victim) {
                pool.idle.retain(|s| *s != victim);
            }
            self.shift(victim, SlotEvent::Close, now);
            actions.push(Action::Close { slot: victim });
            closing += 1;
        }
    }

    fn expire_waiters(&mut self, now: Millis, actions: &mut Actions) {
        let ids: Vec<_> = self.pools.iter().filter(|(_, p)| !p.queue.is_empty()).map(|(id, _)| *id).collect();
        for id in ids {
            let blocked = self.blocked(id);
            let Some(pool) = self.pools.get_mut(&id) else { continue };
            let timeout = pool.limits.query_wait_timeout;
            let mut ahead = 0;
            while let Some((waiter, since)) = pool.queue.oldest()
                && now.0.saturating_sub(since.0) >= timeout
            {
                pool.queue.leave(waiter);
                let refusal = Refusal::Timeout { waited: now.0.saturating_sub(since.0), ahead, blocked };
                actions.push(Action::Refuse { waiter, refusal });
                ahead += 1;
            }
        }
    }

    /// Idle connections: too old, idle too long (above the minimum), or due for a check.
    fn retire_idle(&mut self, now: Millis, actions: &mut Actions) {
        let mut close = Vec::new();
        let mut check = Vec::new();
        for pool in self.pools.values() {
            let mut spare = pool.size().saturating_sub(pool.limits.min_size);
            for id in &pool.idle {
                let Some(slot) = self.slots.get(id.0) else { continue };
                let idle_for = now.0.saturating_sub(slot.since.0);
                if now >= slot.expires || pool.size() > pool.limits.size {
                    close.push(*id);
                } else if idle_for >= pool.limits.idle_timeout && spare > 0 {
                    spare -= 1;
                    close.push(*id);
                } else if now.0.saturating_sub(slot.checked.0) >= pool.limits.check_delay {
                    check.push(*id);
                }
            }
        }
        for (slot, event) in
            close.into_iter().map(|s| (s, SlotEvent::Close)).chain(check.into_iter().map(|s| (s, SlotEvent::Check)))
        {
            if let Some(pool) = self.pool_of(slot) {
                pool.idle.retain(|s| *s != slot);
            }
            self.shift(slot, event, now);
            actions.push(if event == SlotEvent::Close { Action::Close { slot } } else { Action::Check { slot } });
        }
    }

    fn prewarm(&mut self, now: Millis, actions: &mut Actions) {
        let ids: Vec<_> = self.pools.keys().copied().collect();
        for id in ids {
            while let Some(pool) = self.pools.get(&id)
                && pool.may_prewarm
                && pool.size() < pool.limits.min_size
                && !pool.backoff.is_open(now)
                && !self.down.is_open(now)
                && self.connecting() < self.connecting_limit()
                && !self.ledger.is_full()
            {
                self.dial(id, now, actions);
            }
        }
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
