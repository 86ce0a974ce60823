//! What every pool of one server does next: a pure function of events and `now`.
//!
//! One core per PostgreSQL server holds all of its pools, so that the cap, the queues and the decision whose connection
//! is closed for whom stand in one place, under one short lock. No I/O, no clock, no randomness, no hash order: the same
//! events with the same `now` give the same actions.
//!
//! What always holds, after every call:
//! - a slot holds a permit from `Connecting` until `closed`; permits never exceed the cap, nor a tenant's its ceiling;
//! - a pool that has an idle slot has no waiter;
//! - `counts` of a pool are the states of its slots, since only `shift` changes either;
//! - what a tenant wants in `fair` is what its pools want (`refresh`).
//!
//! Calls: `tenant` and `add_pool` first; then `checkout`, `release`, `dialed`, `dial_failed`, `closed`, `leave_queue` as things happen,
//! and `tick` about ten times a second, `nudge` ten times as often while `is_contended`. Each appends to `actions` what the shell must do, in order.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, VecDeque},
};

use slab::Slab;
use smallvec::SmallVec;
use tenantry_config::TenantId;

use super::{
    explain::{Blocked, Explanation},
    slot::{SlotEvent, SlotState},
    waiters::{Queue, WaiterId},
};
use crate::{
    budget::{
        cap::{Cap, Room},
        fair::{Budget, FairShare, QUANTUM, TenantKey},
        permit::Ledger,
    },
    clock::Millis,
};

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
    /// `None`: what PostgreSQL has, without the reserve.
    pub cap: Option<u32>,
    pub reserve: u32,
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
    Timeout(Explanation),
    /// `max_waiters` are waiting already.
    QueueFull(Explanation),
    /// The server turned the login down for good (password, database, role); its error is with the pool.
    LoginRefused,
}

/// How a dial failed. Each cause holds up exactly those whom it concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DialFailure {
    /// Nobody answers, or "starting up": holds for every pool of the server.
    ServerDown,
    /// PostgreSQL has no room for anybody (53300): the cap shrinks for a while, and everybody waits on.
    ServerFull,
    /// PostgreSQL has no room for this role or database (53300 of a CONNECTION LIMIT): only this pool waits.
    TenantFull,
    /// Only this pool's login failed, and may succeed later (a timeout inside the login, a passing error).
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

/// What sharing costs; milliseconds, and only ever grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Waste {
    /// Time in which the cap kept somebody waiting.
    pub contended: u64,
    /// The same, times the connections that stood idle meanwhile.
    pub idle: u64,
}

pub type Actions = SmallVec<[Action; 4]>;

/// An idle connection is only closed for another pool's waiter once nobody has wanted it for this long: its client may be
/// about to ask again, and would then wait for a connect.
const LEAST_IDLE: u64 = 5;

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
    /// Since when nobody uses it; a check in between does not count.
    unused: Millis,
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
    tenant: TenantKey,
    limits: PoolLimits,
    generation: u32,
    idle: VecDeque<SlotId>,
    queue: Queue,
    counts: [u32; SlotState::ALL.len()],
    backoff: Backoff,
    /// Why, while `backoff` has a delay.
    trouble: DialFailure,
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

    /// How many more connections this pool could use right now, whatever its tenant may have.
    /// `dials`: how many of its dials may be under way at once.
    fn wants(&self, now: Millis, dials: u32) -> u32 {
        if self.queue.is_empty() || self.backoff.is_open(now) {
            return 0;
        }
        let waiting = u32::try_from(self.queue.len()).unwrap_or(u32::MAX);
        let coming = self.count(SlotState::Connecting);
        // After a failure one finds out for all.
        let dials = if self.backoff.delay > 0 { 1 } else { dials };
        let room = self.limits.size.saturating_sub(self.size()).min(dials.saturating_sub(coming));
        waiting.saturating_sub(coming).min(room)
    }
}

/// A state in which a permit is of use to its tenant, and charged for.
fn is_use(state: SlotState) -> bool {
    match state {
        SlotState::Connecting | SlotState::Active | SlotState::Resetting | SlotState::CancelPending => true,
        SlotState::Idle | SlotState::Checking | SlotState::Closing => false,
    }
}

/// All pools of one server.
#[derive(Debug)]
pub struct Core {
    limits: ServerLimits,
    cap: Cap,
    ledger: Ledger,
    fair: FairShare,
    names: BTreeMap<TenantId, TenantKey>,
    /// The pools of each tenant.
    members: BTreeMap<TenantKey, SmallVec<[PoolId; 1]>>,
    pools: BTreeMap<PoolId, PoolState>,
    slots: Slab<Slot>,
    /// The states of all slots.
    totals: [u32; SlotState::ALL.len()],
    stopped: bool,
    waste: Waste,
    down: Backoff,
    next_waiter: u64,
    next_pool: u32,
    /// Grows with every dial; spreads lifetimes without randomness.
    dials: u64,
}

impl Core {
    #[must_use]
    pub fn new(limits: ServerLimits) -> Self {
        let cap = Cap::new(limits.cap, limits.reserve);
        Self {
            limits,
            ledger: Ledger::new(cap.effective()),
            cap,
            fair: FairShare::default(),
            names: BTreeMap::new(),
            members: BTreeMap::new(),
            pools: BTreeMap::new(),
            slots: Slab::new(),
            totals: [0; SlotState::ALL.len()],
            stopped: false,
            waste: Waste::default(),
            down: Backoff::default(),
            next_waiter: 0,
            next_pool: 0,
            dials: 0,
        }
    }

    // Set-up and reload.

    /// The tenant of this name, with this budget from now on; it is forgotten with its last pool.
    pub fn tenant(&mut self, name: &TenantId, budget: Budget, now: Millis) -> TenantKey {
        if let Some(key) = self.names.get(name).copied() {
            self.fair.set_budget(key, budget);
            self.refresh(key, now);
            return key;
        }
        let key = self.fair.add(budget);
        self.names.insert(name.clone(), key);
        self.members.insert(key, SmallVec::new());
        key
    }

    /// A new budget for a tenant that has pools.
    pub fn set_budget(&mut self, name: &TenantId, budget: Budget, now: Millis) {
        if self.names.contains_key(name) {
            self.tenant(name, budget, now);
        }
    }

    pub fn add_pool(&mut self, tenant: TenantKey, limits: PoolLimits, may_prewarm: bool) -> PoolId {
        let id = PoolId(self.next_pool);
        self.next_pool += 1;
        let pool = PoolState {
            tenant,
            limits,
            generation: 0,
            idle: VecDeque::new(),
            queue: Queue::default(),
            counts: [0; SlotState::ALL.len()],
            backoff: Backoff::default(),
            trouble: DialFailure::Later,
            may_prewarm,
            retired: false,
        };
        self.pools.insert(id, pool);
        self.members.entry(tenant).or_default().push(id);
        id
    }

    pub fn set_limits(&mut self, limits: ServerLimits) {
        self.limits = limits;
        self.cap.change(limits.cap, limits.reserve);
        self.apply_cap();
    }

    /// PostgreSQL told what room it has, on a connection that is one of ours. Gives the floors and the cap if the
    /// promises cannot all be kept.
    pub fn observe(&mut self, room: Room) -> Option<(u32, u32)> {
        // Some of those that are connecting may not be counted yet: too few others for a moment rather than too many.
        self.cap.observe(room, self.ledger.held());
        self.apply_cap();
        let (floors, cap) = (self.fair.floors(), self.ledger.cap());
        (floors > cap && !self.stopped).then_some((floors, cap))
    }

    /// No dial from now on.
    pub fn stop_dialing(&mut self) {
        self.stopped = true;
        self.apply_cap();
    }

    fn apply_cap(&mut self) {
        self.ledger.set_cap(if self.stopped { 0 } else { self.cap.effective() });
    }

    pub fn set_pool_limits(&mut self, id: PoolId, limits: PoolLimits, now: Millis) {
        if let Some(pool) = self.pools.get_mut(&id) {
            pool.limits = limits;
            let tenant = pool.tenant;
            self.refresh(tenant, now);
        }
    }

    /// Closes what the pool has as it comes to rest, idle connections at once, and dials afresh from now on.
    pub fn reconnect(&mut self, id: PoolId, now: Millis, actions: &mut Actions) {
        self.pass(now);
        let Some(pool) = self.pools.get_mut(&id) else { return };
        let tenant = pool.tenant;
        pool.generation = pool.generation.wrapping_add(1);
        pool.backoff = Backoff::default();
        for slot in std::mem::take(&mut pool.idle) {
            self.shift(slot, SlotEvent::Close, now);
            actions.push(Action::Close { slot });
        }
        self.refresh(tenant, now);
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
        if !self.pools.get(&id).is_some_and(|p| p.retired && p.counts.iter().all(|n| *n == 0)) {
            return;
        }
        let Some(tenant) = self.pools.remove(&id).map(|pool| pool.tenant) else { return };
        let Some(members) = self.members.get_mut(&tenant) else { return };
        members.retain(|member| *member != id);
        if members.is_empty() {
            self.members.remove(&tenant);
            self.names.retain(|_, key| *key != tenant);
            self.fair.remove(tenant);
        }
    }

    /// A client proved a secret that can log in to the server: the pool may dial without waiting for another.
    pub fn credentials_known(&mut self, id: PoolId, now: Millis) {
        if let Some(pool) = self.pools.get_mut(&id) {
            pool.may_prewarm = true;
            pool.backoff = Backoff::default();
            let tenant = pool.tenant;
            self.refresh(tenant, now);
        }
    }

    // Events.

    /// A session wants a connection of this pool.
    pub fn checkout(&mut self, id: PoolId, now: Millis, actions: &mut Actions) -> Checkout {
        self.pass(now);
        let Some(pool) = self.pools.get_mut(&id) else { return Checkout::Refused(Refusal::LoginRefused) };
        let free = if pool.limits.round_robin { pool.idle.pop_front() } else { pool.idle.pop_back() };
        if let Some(slot) = free {
            self.shift(slot, SlotEvent::Lend, now);
            return Checkout::Ready(slot);
        }
        if pool.queue.len() >= pool.limits.max_waiters {
            return Checkout::Refused(Refusal::QueueFull(self.explain(id, None, now)));
        }
        let waiter = WaiterId(self.next_waiter);
        self.next_waiter += 1;
        pool.queue.join(waiter, now);
        let tenant = pool.tenant;
        self.refresh(tenant, now);
        self.free_sibling(tenant, now, actions);
        self.grow(now, actions);
        Checkout::Queued(waiter)
    }

    /// A connection came to rest in good order: after a transaction, a reset or a check.
    pub fn release(&mut self, slot: SlotId, now: Millis, actions: &mut Actions) -> Rested {
        self.pass(now);
        let rested = self.rest(slot, now);
        // Freed, or idle while somebody waits: perhaps not for long.
        if rested == Rested::Close || (rested == Rested::Idle && self.fair.is_wanted()) {
            self.grow(now, actions);
        }
        rested
    }

    /// A connection changes state without coming to rest: `Reset`, `AwaitCancel`, `Close`.
    pub fn change(&mut self, slot: SlotId, event: SlotEvent, now: Millis, actions: &mut Actions) {
        self.pass(now);
        self.shift(slot, event, now);
        if event == SlotEvent::Close {
            if let Some(tenant) = self.pool_of(slot).map(|pool| pool.tenant) {
                self.refresh(tenant, now);
            }
            self.grow(now, actions);
        }
    }

    /// A dial succeeded.
    pub fn dialed(&mut self, slot: SlotId, now: Millis, actions: &mut Actions) -> Rested {
        self.pass(now);
        self.down = Backoff::default();
        self.cap.took(self.ledger.held().saturating_sub(self.total(SlotState::Connecting)).saturating_add(1));
        self.apply_cap();
        if let Some(pool) = self.pool_of(slot) {
            pool.backoff = Backoff::default();
            pool.may_prewarm = true;
        }
        let rested = self.rest(slot, now);
        if let Some(tenant) = self.pool_of(slot).map(|pool| pool.tenant) {
            // One dial less is under way: its other roles may have waited for that.
            self.refresh(tenant, now);
        }
        self.grow(now, actions);
        rested
    }

    /// A dial failed and its socket is closed.
    pub fn dial_failed(&mut self, slot: SlotId, failure: DialFailure, now: Millis, actions: &mut Actions) {
        self.pass(now);
        let base = self.limits.login_retry;
        match failure {
            DialFailure::ServerDown => self.down.fail(base, now),
            DialFailure::ServerFull => {
                self.down = Backoff::default();
                self.cap.refused(self.ledger.held().saturating_sub(self.total(SlotState::Connecting)), now);
                self.apply_cap();
            }
            DialFailure::TenantFull | DialFailure::Later | DialFailure::Refused => {
                self.down = Backoff::default();
                if let Some(pool) = self.pool_of(slot) {
                    pool.backoff.fail(base, now);
                    pool.trouble = failure;
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
        self.pass(now);
        let Some(gone) = self.slots.try_remove(slot.0) else { return };
        self.count(gone.state, false);
        if let Some(pool) = self.pools.get_mut(&gone.pool) {
            let tenant = pool.tenant;
            if let Some(count) = pool.counts.get_mut(gone.state.index()) {
                *count -= 1;
            }
            if is_use(gone.state) {
                self.fair.use_one(tenant, false);
            }
            if gone.state == SlotState::Closing {
                self.fair.leave(tenant, false);
            }
            self.fair.hold(tenant, false);
            self.refresh(tenant, now);
        }
        self.ledger.give_back();
        self.forget_if_empty(gone.pool);
        self.grow(now, actions);
    }

    /// A waiter went away by itself; false if it had left the queue already (a connection or a refusal is on its way).
    pub fn leave_queue(&mut self, id: PoolId, waiter: WaiterId, now: Millis) -> bool {
        self.pass(now);
        let Some(pool) = self.pools.get_mut(&id) else { return false };
        let (left, tenant) = (pool.queue.leave(waiter), pool.tenant);
        if left {
            self.refresh(tenant, now);
        }
        left
    }

    /// Time passed: refusals, ends of life, checks, minimum sizes, retries. About ten times a second.
    pub fn tick(&mut self, now: Millis, actions: &mut Actions) {
        self.pass(now);
        self.cap.tick(now);
        self.apply_cap();
        self.expire_waiters(now, actions);
        self.retire_idle(now, actions);
        self.nudge(now, actions);
        self.prewarm(now, actions);
    }

    /// The part of `tick` that must not be late while somebody waits for somebody else's permit.
    pub fn nudge(&mut self, now: Millis, actions: &mut Actions) {
        self.pass(now);
        self.fair.charge_all();
        self.free_siblings(now, actions);
        self.grow(now, actions);
    }

    /// The cap keeps somebody waiting.
    #[must_use]
    pub fn is_contended(&self) -> bool {
        self.ledger.is_full() && self.fair.is_wanted()
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
    pub fn waste(&self) -> Waste {
        self.waste
    }

    #[must_use]
    pub fn permits(&self) -> (u32, u32) {
        (self.ledger.held(), self.ledger.cap())
    }

    #[must_use]
    pub fn state(&self, slot: SlotId) -> Option<SlotState> {
        self.slots.get(slot.0).map(|s| s.state)
    }

    /// The one answer to "why does this pool's queue not move"; of a waiter, or of whoever would come next.
    #[must_use]
    pub fn explain(&self, id: PoolId, waiter: Option<WaiterId>, now: Millis) -> Explanation {
        let pool = self.pools.get(&id);
        let budget = pool.and_then(|pool| self.fair.budget(pool.tenant));
        let since = match waiter {
            Some(waiter) => pool.and_then(|pool| pool.queue.since(waiter)),
            None => pool.and_then(|pool| pool.queue.oldest()).map(|(_, since)| since),
        };
        Explanation {
            blocked: self.blocked(id),
            waited: since.map_or(0, |since| now.0.saturating_sub(since.0)),
            ahead: pool.map_or(0, |pool| waiter.map_or(pool.queue.len(), |waiter| pool.queue.before(waiter))),
            waiting: pool.map_or(0, |pool| pool.queue.len()),
            size: pool.map_or(0, PoolState::size),
            pool_size: pool.map_or(0, |pool| pool.limits.size),
            held: pool.map_or(0, |pool| self.fair.held(pool.tenant)),
            ceiling: budget.map_or(0, |budget| budget.ceiling),
            permits: self.ledger.held(),
            cap: self.ledger.cap(),
        }
    }

    fn blocked(&self, id: PoolId) -> Blocked {
        let Some(pool) = self.pools.get(&id) else { return Blocked::PoolSize };
        let ceiling = self.fair.budget(pool.tenant).map_or(0, |budget| budget.ceiling);
        if self.down.delay > 0 {
            Blocked::ServerDown
        } else if pool.backoff.delay > 0 {
            if pool.trouble == DialFailure::TenantFull { Blocked::TenantFull } else { Blocked::LoginFails }
        } else if pool.size() >= pool.limits.size {
            Blocked::PoolSize
        } else if self.fair.held(pool.tenant) >= ceiling {
            Blocked::Ceiling
        } else if self.cap.is_shrunk() {
            Blocked::ServerFull
        } else if self.ledger.is_full() {
            Blocked::ServerCap
        } else {
            Blocked::ConnectThrottle
        }
    }

    #[must_use]
    pub fn budget(&self, tenant: &TenantId) -> Option<Budget> {
        self.fair.budget(*self.names.get(tenant)?)
    }

    // Inside.

    /// Time passes for the fair share: was somebody kept waiting by the cap up to now?
    fn pass(&mut self, now: Millis) {
        let contended = self.is_contended();
        let elapsed = self.fair.pass(now, contended);
        if contended {
            self.waste.contended += elapsed;
            self.waste.idle += elapsed * u64::from(self.total(SlotState::Idle));
        }
    }

    /// Tells the fair share what the tenant's pools could use.
    fn refresh(&mut self, tenant: TenantKey, now: Millis) {
        let Some(members) = self.members.get(&tenant) else { return };
        let (mut wants, mut connecting) = (0u32, 0u32);
        for pool in members.iter().filter_map(|id| self.pools.get(id)) {
            wants = wants.saturating_add(pool.wants(now, self.dials_of_one()));
            connecting = connecting.saturating_add(pool.count(SlotState::Connecting));
        }
        let wants = wants.min(self.dials_of_one().saturating_sub(connecting));
        let ceiling = self.fair.budget(tenant).map_or(0, |budget| budget.ceiling);
        self.fair.want(tenant, wants.min(ceiling.saturating_sub(self.fair.held(tenant))));
    }

    /// The one place where a slot changes state, and so the one place that counts.
    fn shift(&mut self, id: SlotId, event: SlotEvent, now: Millis) {
        let Some(slot) = self.slots.get_mut(id.0) else { return };
        let (before, pool) = (slot.state, slot.pool);
        match before.next(event) {
            Ok(next) => {
                slot.state = next;
                slot.since = now;
                if let Some(pool) = self.pools.get_mut(&pool) {
                    for (state, up) in [(before, false), (next, true)] {
                        if let Some(count) = pool.counts.get_mut(state.index()) {
                            *count = if up { *count + 1 } else { *count - 1 };
                        }
                    }
                    if is_use(before) != is_use(next) {
                        self.fair.use_one(pool.tenant, is_use(next));
                    }
                    if next == SlotState::Closing {
                        self.fair.leave(pool.tenant, true);
                    }
                }
                self.count(before, false);
                self.count(next, true);
            }
            Err(illegal) => debug_assert!(false, "{illegal}"),
        }
    }

    fn count(&mut self, state: SlotState, up: bool) {
        if let Some(total) = self.totals.get_mut(state.index()) {
            *total = if up { *total + 1 } else { *total - 1 };
        }
    }

    fn total(&self, state: SlotState) -> u32 {
        self.totals.get(state.index()).copied().unwrap_or(0)
    }

    fn pool_of(&mut self, slot: SlotId) -> Option<&mut PoolState> {
        let pool = self.slots.get(slot.0)?.pool;
        self.pools.get_mut(&pool)
    }

    fn rest(&mut self, id: SlotId, now: Millis) -> Rested {
        let Some(slot) = self.slots.get_mut(id.0) else { return Rested::Close };
        slot.checked = now;
        let was_checked = slot.state == SlotState::Checking;
        if !was_checked {
            slot.unused = now;
        }
        let (pool_id, expired, generation) = (slot.pool, now >= slot.expires, slot.generation);
        let Some(pool) = self.pools.get(&pool_id) else { return Rested::Close };
        let tenant = pool.tenant;
        let over = pool.size() > pool.limits.size || self.is_above_ceiling(tenant) || self.is_above_cap();
        if expired || over || generation != pool.generation || self.belongs_elsewhere(pool_id, tenant, now) {
            self.shift(id, SlotEvent::Close, now);
            self.refresh(tenant, now);
            return Rested::Close;
        }
        let Some(pool) = self.pools.get_mut(&pool_id) else { return Rested::Close };
        if let Some(waiter) = pool.queue.take_first() {
            self.shift(id, SlotEvent::Lend, now);
            self.refresh(tenant, now);
            return Rested::Hand(waiter);
        }
        // In the order in which they were used last.
        if was_checked {
            pool.idle.push_front(id)
        } else {
            pool.idle.push_back(id)
        }
        self.shift(id, SlotEvent::Rest, now);
        Rested::Idle
    }

    /// Lowered: more is held than may be, and not enough of it is closing.
    fn is_above_cap(&self) -> bool {
        self.ledger.held().saturating_sub(self.total(SlotState::Closing)) > self.ledger.cap()
    }

    fn is_above_ceiling(&self, tenant: TenantKey) -> bool {
        self.fair.budget(tenant).is_none_or(|budget| self.fair.kept(tenant) > budget.ceiling)
    }

    /// A connection that comes to rest: is its permit somebody else's turn?
    fn belongs_elsewhere(&mut self, pool: PoolId, tenant: TenantKey, now: Millis) -> bool {
        if self.sibling_is_first(pool, tenant, now) {
            return true;
        }
        if !self.ledger.is_full() || !self.fair.is_wanted() || self.down.is_open(now) || self.cap.is_pausing(now) {
            return false;
        }
        // More than can be dialled at once would only lie closed.
        let closing = self.total(SlotState::Closing);
        closing + self.total(SlotState::Connecting) < self.connecting_limit() && self.fair.must_yield(tenant, closing)
    }

    /// Inside a tenant: does a waiter of another of its pools come before this pool's own, by enough to pay for a connect?
    fn sibling_is_first(&self, own: PoolId, tenant: TenantKey, now: Millis) -> bool {
        let Some(members) = self.members.get(&tenant).filter(|members| members.len() > 1) else { return false };
        if !self.is_at_ceiling(tenant) && !self.ledger.is_full() {
            return false;
        }
        let pools = || members.iter().filter(|id| **id != own).filter_map(|id| self.pools.get(id));
        let closing: u32 =
            members.iter().filter_map(|id| self.pools.get(id)).map(|p| p.count(SlotState::Closing)).sum();
        if pools().map(|pool| pool.wants(now, self.dials_of_one())).sum::<u32>() <= closing {
            return false;
        }
        let oldest = |pool: &PoolState| pool.queue.oldest().map(|(_, since)| since.0);
        let first = pools().filter(|pool| pool.wants(now, self.dials_of_one()) > 0).filter_map(oldest).min();
        let mine = self.pools.get(&own).and_then(oldest);
        first.is_some_and(|first| mine.is_none_or(|mine| first.saturating_add(QUANTUM) < mine))
    }

    /// A tenant with several roles makes room for one of them with an idle connection of another: at its ceiling it has no
    /// other way, and at the cap its own cost it least.
    fn free_sibling(&mut self, tenant: TenantKey, now: Millis, actions: &mut Actions) {
        let Some(members) = self.members.get(&tenant).filter(|members| members.len() > 1) else { return };
        let at_ceiling = self.is_at_ceiling(tenant);
        if !at_ceiling && !self.ledger.is_full() {
            return;
        }
        let least = if at_ceiling { 0 } else { LEAST_IDLE };
        let pools = || members.iter().filter_map(|id| self.pools.get(id));
        let closing: u32 = pools().map(|pool| pool.count(SlotState::Closing)).sum();
        if pools().map(|pool| pool.wants(now, self.dials_of_one())).sum::<u32>() <= closing {
            return;
        }
        let unused = |slot: &SlotId| self.slots.get(slot.0).map_or(0, |s| now.0.saturating_sub(s.unused.0));
        let idle = pools().flat_map(|pool| pool.idle.iter().copied()).filter(|slot| unused(slot) >= least);
        let longest = idle.min_by_key(|slot| (self.slots.get(slot.0).map(|s| s.unused), *slot));
        if let Some(slot) = longest {
            self.close_idle(slot, now, actions);
        }
    }

    /// For every tenant with several roles: what kept one of them waiting may have changed since it began to wait.
    fn free_siblings(&mut self, now: Millis, actions: &mut Actions) {
        let several = self.members.iter().filter(|(_, members)| members.len() > 1);
        let tenants: SmallVec<[TenantKey; 8]> = several.map(|(tenant, _)| *tenant).collect();
        for tenant in tenants {
            self.free_sibling(tenant, now, actions);
        }
    }

    /// Dials for whoever is next, while permits and the throttle last; at the cap, closes idle connections of others.
    fn grow(&mut self, now: Millis, actions: &mut Actions) {
        if self.is_above_cap() {
            self.make_room(now, actions);
        }
        while let Some(tenant) = self.fair.next() {
            if self.total(SlotState::Connecting) >= self.connecting_limit()
                || self.down.is_open(now)
                || self.cap.is_pausing(now)
            {
                return;
            }
            if self.ledger.is_full() {
                self.make_room(now, actions);
                return;
            }
            let Some(pool) = self.oldest_waiting(tenant, now) else {
                debug_assert!(false, "a tenant wants what none of its pools wants");
                self.refresh(tenant, now);
                return;
            };
            self.fair.served(tenant);
            self.dial(pool, now, actions);
            self.refresh(tenant, now);
        }
    }

    /// The pool of a tenant whose first waiter has waited longest, among those that could use a connection.
    fn oldest_waiting(&self, tenant: TenantKey, now: Millis) -> Option<PoolId> {
        let members = self.members.get(&tenant)?.iter();
        let waiting = members.filter_map(|id| {
            let pool = self.pools.get(id).filter(|pool| pool.wants(now, self.dials_of_one()) > 0)?;
            pool.queue.oldest().map(|(waiter, since)| (since, waiter, *id))
        });
        waiting.min().map(|(_, _, id)| id)
    }

    /// Not all of them: a login that hangs must not stop everybody's.
    fn dials_of_one(&self) -> u32 {
        self.limits.max_connecting.saturating_sub(1).max(1)
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
        self.fair.hold(pool.tenant, true);
        self.fair.use_one(pool.tenant, true);
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
            unused: now,
        };
        if let Some(count) = pool.counts.get_mut(SlotState::Connecting.index()) {
            *count += 1;
        }
        let slot = SlotId(self.slots.insert(slot));
        self.count(SlotState::Connecting, true);
        actions.push(Action::Dial { slot, pool: pool_id });
    }

    /// Closes idle connections for those who wait, or because the cap was lowered: those first whom it costs least.
    fn make_room(&mut self, now: Millis, actions: &mut Actions) {
        // More than can be dialled at once would only lie closed.
        let room = self.connecting_limit().saturating_sub(self.total(SlotState::Connecting));
        let mut closing = self.total(SlotState::Closing);
        let wanted = self.fair.wanted(room).min(room);
        let owes_floor = self.fair.owes_floor(closing);
        while self.total(SlotState::Idle) > 0 && (closing < wanted || self.is_above_cap()) {
            let Some(victim) = self.least_useful(owes_floor || self.is_above_cap(), now) else { return };
            self.close_idle(victim, now, actions);
            closing += 1;
        }
    }

    /// The idle connection that its tenant can best do without: furthest above its floor, then furthest ahead, then
    /// longest idle. What lies within a floor is only taken after `server_idle_timeout`.
    fn least_useful(&self, at_once: bool, now: Millis) -> Option<SlotId> {
        let idle = self.slots.iter().filter(|(_, slot)| slot.state == SlotState::Idle);
        let ranked = idle.filter_map(|(index, slot)| {
            let pool = self.pools.get(&slot.pool)?;
            let (surplus, ahead) = self.fair.surplus(pool.tenant);
            let idle_for = now.0.saturating_sub(slot.unused.0);
            let least = match surplus {
                0 => pool.limits.idle_timeout,
                _ if at_once => 0,
                _ => LEAST_IDLE,
            };
            (idle_for >= least).then_some((Reverse(surplus), Reverse(ahead), slot.unused, SlotId(index)))
        });
        ranked.min().map(|(_, _, _, slot)| slot)
    }

    fn close_idle(&mut self, slot: SlotId, now: Millis, actions: &mut Actions) {
        let Some(pool) = self.pool_of(slot) else { return };
        pool.idle.retain(|idle| *idle != slot);
        let tenant = pool.tenant;
        self.shift(slot, SlotEvent::Close, now);
        self.refresh(tenant, now);
        actions.push(Action::Close { slot });
    }

    fn expire_waiters(&mut self, now: Millis, actions: &mut Actions) {
        let late = |pool: &PoolState| {
            let oldest = pool.queue.oldest();
            oldest.is_some_and(|(_, since)| now.0.saturating_sub(since.0) >= pool.limits.query_wait_timeout)
        };
        let waiting = |pool: &PoolState| !pool.queue.is_empty();
        let ids: SmallVec<[(PoolId, bool, TenantKey); 8]> =
            self.pools.iter().filter(|(_, p)| waiting(p)).map(|(id, p)| (*id, late(p), p.tenant)).collect();
        for (id, is_late, tenant) in ids {
            while is_late && let Some(pool) = self.pools.get(&id).filter(|pool| late(pool)) {
                let Some((waiter, _)) = pool.queue.oldest() else { break };
                let refusal = Refusal::Timeout(self.explain(id, Some(waiter), now));
                if let Some(pool) = self.pools.get_mut(&id) {
                    pool.queue.leave(waiter);
                }
                actions.push(Action::Refuse { waiter, refusal });
            }
            // A back-off may be over, too.
            self.refresh(tenant, now);
        }
    }

    /// Idle connections: too old, idle too long (above the minimum), or due for a check.
    fn retire_idle(&mut self, now: Millis, actions: &mut Actions) {
        let mut close = Vec::new();
        let mut check = Vec::new();
        // Of a tenant with several roles: what they may give up together, and what they must.
        let mut tenants: BTreeMap<TenantKey, (u32, u32)> = BTreeMap::new();
        for pool in self.pools.values().filter(|pool| !pool.idle.is_empty()) {
            let (surplus, excess) = tenants.entry(pool.tenant).or_insert_with(|| {
                let ceiling = self.fair.budget(pool.tenant).map_or(0, |budget| budget.ceiling);
                (self.fair.surplus(pool.tenant).0, self.fair.kept(pool.tenant).saturating_sub(ceiling))
            });
            let mut spare = pool.size().saturating_sub(pool.limits.min_size);
            let mut over = pool.size().saturating_sub(pool.limits.size);
            for id in &pool.idle {
                let Some(slot) = self.slots.get(id.0) else { continue };
                let idle_for = now.0.saturating_sub(slot.unused.0);
                let unwanted = idle_for >= pool.limits.idle_timeout && spare > 0 && *surplus > 0;
                if now >= slot.expires || over > 0 || *excess > 0 || unwanted {
                    spare = spare.saturating_sub(1);
                    over = over.saturating_sub(1);
                    *excess = excess.saturating_sub(1);
                    *surplus = surplus.saturating_sub(1);
                    close.push(*id);
                } else if now.0.saturating_sub(slot.checked.0) >= pool.limits.check_delay {
                    check.push(*id);
                }
            }
        }
        for (slot, event) in
            close.into_iter().map(|s| (s, SlotEvent::Close)).chain(check.into_iter().map(|s| (s, SlotEvent::Check)))
        {
            if event == SlotEvent::Close {
                self.close_idle(slot, now, actions);
                continue;
            }
            if let Some(pool) = self.pool_of(slot) {
                pool.idle.retain(|s| *s != slot);
            }
            self.shift(slot, event, now);
            actions.push(Action::Check { slot });
        }
    }

    fn prewarm(&mut self, now: Millis, actions: &mut Actions) {
        let short = |pool: &PoolState| pool.may_prewarm && pool.size() < pool.limits.min_size;
        let ids: Vec<_> = self.pools.iter().filter(|(_, pool)| short(pool)).map(|(id, _)| *id).collect();
        for id in ids {
            while let Some(pool) = self.pools.get(&id)
                && short(pool)
                && !self.is_at_ceiling(pool.tenant)
                && !pool.backoff.is_open(now)
                && !self.down.is_open(now)
                && !self.cap.is_pausing(now)
                && self.total(SlotState::Connecting) < self.connecting_limit()
                && !self.ledger.is_full()
            {
                let tenant = pool.tenant;
                self.dial(id, now, actions);
                self.refresh(tenant, now);
            }
        }
    }

    fn is_at_ceiling(&self, tenant: TenantKey) -> bool {
        self.fair.budget(tenant).is_none_or(|budget| self.fair.held(tenant) >= budget.ceiling)
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
