//! What every pool of one server does next: a pure function of events and `now`.
//!
//! One core per PostgreSQL server holds all of its pools, so that the cap, the queues and the decision whose connection
//! is closed for whom stand in one place, under one short lock. No I/O, no clock, no randomness, no hash order: the same
//! events with the same `now` give the same actions.
//!
//! What always holds, after every call:
//! - a slot holds a permit from `Connecting` until `closed`; permits never exceed the cap, nor a tenant's its ceiling;
//! - a pool that has an idle slot has no waiter;
//! - the counts of a pool, of the server and of a tenant's permits are the states of the slots, since only `recount`
//!   changes them;
//! - what a tenant wants in `fair` is what its pools want (`refresh`).
//!
//! Calls: `tenant` and `add_pool` first; then `checkout`, `release`, `dialed`, `dial_failed`, `checked`, `closed` and
//! `leave_queue` as things happen; `tick` about ten times a second, and `nudge` every few milliseconds while `is_contended`.
//! Each appends to `actions` what the shell must do, in order.
//!
//! `events` is what happens, `sharing` whose permit goes to whom.

mod events;
mod sharing;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use slab::Slab;
use smallvec::SmallVec;
use tenantry_config::TenantId;

use super::{
    decision::{
        Action, Actions, Checkout, DialFailure, Gate, PoolId, PoolLimits, Refusal, Rested, ServerLimits, SlotId, Waste,
    },
    explain::{Blocked, Explanation},
    slot::{Counts, SlotEvent, SlotState},
    waiters::{Queue, WaiterId},
};
use crate::{
    backoff::Backoff,
    budget::{
        cap::{Cap, Room},
        fair::{Budget, FairShare, QUANTUM, TenantKey, Use},
        permit::Ledger,
    },
    clock::Millis,
};

/// An idle connection is only closed for another pool's waiter once nobody has wanted it for this long: its client may be
/// about to ask again, and would then wait for a connect.
const LEAST_IDLE: u64 = 5;
/// A connection that has been closing for this long has lost its way: nobody counts on its permit. Milliseconds.
const CLOSES_WITHIN: u64 = 1_000;
/// A dial that takes longer than this keeps nobody else from finding out whether the server is back. Milliseconds.
const LOOKS_WITHIN: u64 = 1_000;
/// PostgreSQL is asked this often what room it has, while connections are used: milliseconds.
const ROOM_AGE: u64 = 5_000;

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
    /// Its login came to nothing.
    failed: bool,
}

#[derive(Debug)]
struct PoolState {
    tenant: TenantKey,
    limits: PoolLimits,
    generation: u32,
    idle: VecDeque<SlotId>,
    queue: Queue,
    counts: Counts,
    backoff: Backoff,
    /// Why, while it is failing.
    trouble: DialFailure,
    /// Logins that came to nothing, and PostgreSQL has not closed its end yet.
    hanging: u32,
    /// When it last found nobody, in the order of all who did; 0 if it was let in since.
    missed: u64,
    /// Set by a successful login, cleared when credentials failed: may we dial without a client waiting?
    may_prewarm: bool,
    gate: Gate,
    retired: bool,
}

impl PoolState {
    /// Connections that the pool holds or is getting; the ones that are closing do not count against its size.
    fn size(&self) -> u32 {
        self.counts.sum() - self.counts.of(SlotState::Closing) - self.counts.of(SlotState::Lingering)
    }

    /// How many of its dials may be under way after one failed: one finds out for all; none while as many hang as may be
    /// dialled at once, since each of them costs the server a connection.
    fn tries(&self, dials: u32) -> u32 {
        u32::from(self.hanging < dials)
    }

    /// Somebody waits, and it is not this pool's own trouble that keeps it waiting.
    fn waits(&self) -> bool {
        !self.queue.is_empty() && self.gate == Gate::Open && !self.backoff.is_failing()
    }

    /// How many more connections this pool could use right now, whatever its tenant may have.
    /// `dials`: how many of its dials may be under way at once.
    fn wants(&self, now: Millis, dials: u32) -> u32 {
        if self.queue.is_empty() || self.gate != Gate::Open || self.backoff.is_pausing(now) {
            return 0;
        }
        let waiting = u32::try_from(self.queue.len()).unwrap_or(u32::MAX);
        let coming = self.counts.of(SlotState::Connecting);
        let dials = if self.backoff.is_failing() { self.tries(dials) } else { dials };
        let room = self.limits.size.saturating_sub(self.size()).min(dials.saturating_sub(coming));
        waiting.saturating_sub(coming).min(room)
    }
}

/// What a permit in this state is to its tenant.
fn use_of(state: SlotState) -> Use {
    match state {
        SlotState::Connecting | SlotState::Active | SlotState::Resetting | SlotState::CancelPending => Use::Busy,
        SlotState::Idle | SlotState::Checking => Use::Idle,
        SlotState::Closing | SlotState::Lingering => Use::Leaving,
    }
}

#[derive(Debug)]
struct Tenant {
    name: TenantId,
    pools: SmallVec<[PoolId; 1]>,
}

/// All pools of one server.
#[derive(Debug)]
pub struct Core {
    limits: ServerLimits,
    cap: Cap,
    ledger: Ledger,
    fair: FairShare,
    names: BTreeMap<TenantId, TenantKey>,
    tenants: BTreeMap<TenantKey, Tenant>,
    /// Those of them with several pools.
    several: BTreeSet<TenantKey>,
    pools: BTreeMap<PoolId, PoolState>,
    slots: Slab<Slot>,
    totals: Counts,
    stopped: bool,
    waste: Waste,
    down: Backoff,
    next_waiter: u64,
    next_pool: u32,
    /// Grows with every dial; spreads lifetimes without randomness.
    dials: u64,
    last_dial: Millis,
    /// The latest that it was told.
    now: Millis,
    /// Grows with every dial that found nobody.
    misses: u64,
    /// When PostgreSQL is to be asked again what room it has; not before it was asked once.
    room_due: Option<Millis>,
}

impl Core {
    #[must_use]
    pub fn new(limits: ServerLimits) -> Self {
        let mut core = Self {
            limits,
            ledger: Ledger::new(0),
            cap: Cap::new(limits.cap, limits.reserve),
            fair: FairShare::default(),
            names: BTreeMap::new(),
            tenants: BTreeMap::new(),
            several: BTreeSet::new(),
            pools: BTreeMap::new(),
            slots: Slab::new(),
            totals: Counts::default(),
            stopped: false,
            waste: Waste::default(),
            down: Backoff::default(),
            next_waiter: 0,
            next_pool: 0,
            dials: 0,
            last_dial: Millis(0),
            now: Millis(0),
            misses: 0,
            room_due: None,
        };
        core.apply_cap();
        core
    }

    // Set-up and reload.

    /// The tenant of this name, with this budget from now on; it is forgotten with its last pool.
    pub fn tenant(&mut self, name: &TenantId, budget: Budget, now: Millis) -> TenantKey {
        let now = self.pass(now);
        if let Some(key) = self.names.get(name).copied() {
            self.fair.set_budget(key, budget);
            self.refresh(key, now);
            return key;
        }
        let key = self.fair.add(budget);
        self.names.insert(name.clone(), key);
        self.tenants.insert(key, Tenant { name: name.clone(), pools: SmallVec::new() });
        key
    }

    /// A new budget for a tenant that has pools.
    pub fn set_budget(&mut self, name: &TenantId, budget: Budget, now: Millis) {
        if self.names.contains_key(name) {
            self.tenant(name, budget, now);
        }
    }

    pub fn add_pool(&mut self, tenant: TenantKey, limits: PoolLimits, may_prewarm: bool, gate: Gate) -> PoolId {
        let id = PoolId(self.next_pool);
        self.next_pool += 1;
        let pool = PoolState {
            tenant,
            limits,
            generation: 0,
            idle: VecDeque::new(),
            queue: Queue::default(),
            counts: Counts::default(),
            backoff: Backoff::default(),
            trouble: DialFailure::Later,
            hanging: 0,
            missed: 0,
            may_prewarm,
            gate,
            retired: false,
        };
        self.pools.insert(id, pool);
        if let Some(tenant_) = self.tenants.get_mut(&tenant) {
            tenant_.pools.push(id);
            if tenant_.pools.len() > 1 {
                self.several.insert(tenant);
            }
        }
        id
    }

    /// Counts from the next event or tick on.
    pub fn set_limits(&mut self, limits: ServerLimits, now: Millis) {
        let now = self.pass(now);
        self.limits = limits;
        self.cap.change(limits.cap, limits.reserve);
        self.apply_cap();
        // How many dials one tenant may have under way depends on it.
        let tenants: Vec<_> = self.tenants.keys().copied().collect();
        tenants.into_iter().for_each(|tenant| self.refresh(tenant, now));
    }

    /// PostgreSQL told what room it has, on a connection that is one of ours.
    fn observe(&mut self, room: Room, now: Millis) {
        // Some of those that are connecting may not be counted yet: too few others for a moment rather than too many.
        self.cap.observe(room, self.ledger.held());
        self.room_due = Some(Millis(now.0.saturating_add(ROOM_AGE)));
        self.apply_cap();
    }

    /// The floors and the cap, if the promises cannot all be kept.
    #[must_use]
    pub fn broken_promise(&self) -> Option<(u64, u32)> {
        (self.fair.is_overpromised() && !self.stopped).then(|| (self.fair.floors(), self.ledger.cap()))
    }

    /// No dial from now on.
    pub fn stop_dialing(&mut self) {
        self.stopped = true;
        self.apply_cap();
    }

    fn apply_cap(&mut self) {
        let cap = if self.stopped { 0 } else { self.cap.effective() };
        self.ledger.set_cap(cap);
        self.fair.set_cap(cap);
    }

    pub fn set_pool_limits(&mut self, id: PoolId, limits: PoolLimits, now: Millis) {
        let now = self.pass(now);
        if let Some(pool) = self.pools.get_mut(&id) {
            pool.limits = limits;
            let tenant = pool.tenant;
            self.refresh(tenant, now);
        }
    }

    /// Opens or closes pools to those who ask; who waits is served, held on or refused. All of a tenant's at once: none
    /// of them dials with what another has left.
    pub fn set_gates(&mut self, ids: &[PoolId], gate: Gate, now: Millis, actions: &mut Actions) {
        let now = self.pass(now);
        for id in ids {
            self.set_gate(*id, gate, now, actions);
        }
        self.grow(now, actions);
    }

    /// Of a pool; that of one that is gone is shut.
    #[must_use]
    pub fn gate(&self, id: PoolId) -> Gate {
        self.pools.get(&id).map_or(Gate::Shut, |pool| pool.gate)
    }

    fn set_gate(&mut self, id: PoolId, gate: Gate, now: Millis, actions: &mut Actions) {
        let Some(pool) = self.pools.get_mut(&id).filter(|pool| pool.gate != gate) else { return };
        pool.gate = gate;
        let tenant = pool.tenant;
        if gate == Gate::Shut {
            let refusal = Refusal::Shut;
            actions.extend(pool.queue.drain().map(|waiter| Action::Refuse { waiter, refusal }));
        }
        if gate != Gate::Open {
            self.reconnect(id, now, actions);
        }
        self.refresh(tenant, now);
    }

    /// The tenant of this pool, with all of its pools, has another name from now on.
    pub fn rename_tenant(&mut self, id: PoolId, name: &TenantId) {
        let Some(key) = self.pools.get(&id).map(|pool| pool.tenant) else { return };
        let Some(tenant) = self.tenants.get_mut(&key) else { return };
        let old = std::mem::replace(&mut tenant.name, name.clone());
        // Two tenants may change names with each other: what is another's by now stays.
        if self.names.get(&old) == Some(&key) {
            self.names.remove(&old);
        }
        self.names.insert(name.clone(), key);
    }

    /// Closes what the pool has as it comes to rest, idle connections at once, and dials afresh from now on.
    pub fn reconnect(&mut self, id: PoolId, now: Millis, actions: &mut Actions) {
        let now = self.pass(now);
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
        if !self.pools.get(&id).is_some_and(|p| p.retired && p.counts.sum() == 0) {
            return;
        }
        let Some(tenant) = self.pools.remove(&id).map(|pool| pool.tenant) else { return };
        let Some(entry) = self.tenants.get_mut(&tenant) else { return };
        entry.pools.retain(|member| *member != id);
        if entry.pools.len() < 2 {
            self.several.remove(&tenant);
        }
        if entry.pools.is_empty()
            && let Some(entry) = self.tenants.remove(&tenant)
        {
            if self.names.get(&entry.name) == Some(&tenant) {
                self.names.remove(&entry.name);
            }
            self.fair.remove(tenant);
        }
    }

    /// A client proved a secret that was not known before: the pool may dial without waiting for another, and at once, if
    /// it was the old one that was refused. A pause of any other cause stays.
    pub fn credentials_known(&mut self, id: PoolId, now: Millis) {
        let now = self.pass(now);
        if let Some(pool) = self.pools.get_mut(&id) {
            pool.may_prewarm = true;
            if pool.trouble == DialFailure::Refused {
                pool.backoff = Backoff::default();
            }
            let tenant = pool.tenant;
            self.refresh(tenant, now);
        }
    }

    // What can be asked.

    #[must_use]
    pub fn counts(&self, id: PoolId) -> Counts {
        self.pools.get(&id).map(|p| p.counts).unwrap_or_default()
    }

    #[must_use]
    pub fn waiting(&self, id: PoolId) -> usize {
        self.pools.get(&id).map_or(0, |p| p.queue.len())
    }

    #[must_use]
    pub fn waste(&self) -> Waste {
        self.waste
    }

    #[must_use]
    pub fn permits(&self) -> (u32, u32) {
        (self.ledger.held(), self.ledger.cap())
    }

    /// What PostgreSQL has for roles that are not privileged, if it was asked.
    #[must_use]
    pub fn slots(&self) -> Option<u32> {
        self.cap.slots()
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
        let (waits, has_idle) = (!pool.queue.is_empty(), !pool.idle.is_empty());
        let ceiling = self.fair.budget(pool.tenant).map_or(0, |budget| budget.ceiling);
        if pool.gate != Gate::Open {
            Blocked::Paused
        } else if has_idle {
            Blocked::Nothing
        } else if self.down.is_failing() {
            Blocked::ServerDown
        } else if pool.backoff.is_failing() {
            if pool.trouble == DialFailure::TenantFull { Blocked::TenantFull } else { Blocked::LoginFails }
        } else if pool.size() >= pool.limits.size {
            Blocked::PoolSize
        } else if self.fair.held(pool.tenant) >= ceiling {
            Blocked::Ceiling
        } else if self.cap.is_shrunk() && (waits || self.ledger.is_full()) {
            Blocked::ServerFull
        } else if self.ledger.is_full() {
            Blocked::ServerCap
        } else if waits || self.totals.of(SlotState::Connecting) >= self.limits.max_connecting {
            // For a waiter, also while its own connection is being opened.
            Blocked::ConnectThrottle
        } else {
            Blocked::Nothing
        }
    }

    #[must_use]
    pub fn budget(&self, tenant: &TenantId) -> Option<Budget> {
        self.fair.budget(*self.names.get(tenant)?)
    }

    // Inside.

    /// Time passes for the fair share: was somebody kept waiting by the cap up to now? Gives the time that counts: who asks
    /// may have read the clock before somebody else who came first, and here it never goes back.
    fn pass(&mut self, now: Millis) -> Millis {
        let now = now.max(self.now);
        self.now = now;
        let contended = self.is_contended();
        let elapsed = self.fair.pass(now, contended);
        if contended {
            self.waste.contended += elapsed;
            self.waste.idle += elapsed * u64::from(self.totals.of(SlotState::Idle));
        }
        now
    }

    /// Tells the fair share what the tenant's pools could use.
    fn refresh(&mut self, tenant: TenantKey, now: Millis) {
        let (mut wants, mut connecting, mut waits) = (0u32, 0u32, false);
        for (_, pool) in self.pools_of(tenant) {
            wants = wants.saturating_add(pool.wants(now, self.dials_of_one()));
            connecting = connecting.saturating_add(pool.counts.of(SlotState::Connecting));
            waits |= pool.waits();
        }
        let wants = wants.min(self.dials_of_one().saturating_sub(connecting));
        let ceiling = self.fair.budget(tenant).map_or(0, |budget| budget.ceiling);
        self.fair.want(tenant, wants.min(ceiling.saturating_sub(self.fair.held(tenant))), waits);
    }

    /// The one place where a slot changes state.
    fn shift(&mut self, id: SlotId, event: SlotEvent, now: Millis) {
        let Some(slot) = self.slots.get_mut(id.0) else { return };
        let (before, pool) = (slot.state, slot.pool);
        match before.next(event) {
            Ok(next) => {
                slot.state = next;
                slot.since = now;
                self.recount(pool, Some(before), Some(next));
            }
            Err(illegal) => debug_assert!(false, "{illegal}"),
        }
    }

    /// The one place that counts: a slot of this pool comes (from `None`), goes (to `None`) or changes state.
    fn recount(&mut self, pool: PoolId, from: Option<SlotState>, to: Option<SlotState>) {
        self.totals.shift(from, to);
        if let Some(pool) = self.pools.get_mut(&pool) {
            pool.counts.shift(from, to);
            self.fair.count(pool.tenant, from.map(use_of), to.map(use_of));
        }
    }

    fn pools_of(&self, tenant: TenantKey) -> impl Iterator<Item = (PoolId, &PoolState)> + Clone {
        let ids = self.tenants.get(&tenant).map_or(&[][..], |tenant| &tenant.pools);
        ids.iter().filter_map(|id| Some((*id, self.pools.get(id)?)))
    }

    fn pool_of(&mut self, slot: SlotId) -> Option<&mut PoolState> {
        let pool = self.slots.get(slot.0)?.pool;
        self.pools.get_mut(&pool)
    }

    /// Lowered: more is held than may be, and not enough of it is closing.
    fn is_above_cap(&self) -> bool {
        self.ledger.held().saturating_sub(self.totals.of(SlotState::Closing)) > self.ledger.cap()
    }

    fn is_above_ceiling(&self, tenant: TenantKey) -> bool {
        self.fair.budget(tenant).is_none_or(|budget| self.fair.kept(tenant) > budget.ceiling)
    }

    fn is_at_ceiling(&self, tenant: TenantKey) -> bool {
        self.fair.budget(tenant).is_none_or(|budget| self.fair.held(tenant) >= budget.ceiling)
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
