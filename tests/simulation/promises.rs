//! What Tenantry promises, checked after every step against the world's own books.
//!
//! The books err on one side only: where they cannot know what the core knows (a pause after a failure, a change that
//! was just made), they expect less of it.

use std::collections::BTreeSet;

use tenantry_proxy::pool::{
    decision::{Action, Actions, Gate, Refusal, SlotId},
    slot::SlotState,
    waiters::WaiterId,
};

use super::world::{Event, PAUSE, Pool, Temper, World};

/// Longer than an idle connection is left to its own tenant, and longer than between two nudges.
const IDLE_LIMIT: u64 = 16;
/// News of PostgreSQL's room older than this are doubted.
const OLD_NEWS: u64 = 10_000;
/// The lag past which a permit moves, as the README says: milliseconds.
pub const QUANTUM: u64 = 100;

impl World {
    pub fn check(&mut self, event: Event, actions: &Actions) {
        let (held, cap) = self.core.permits();
        assert_eq!(held as usize, self.slots.len(), "a permit for each connection that PostgreSQL counts");
        let most = self.most_permits(held);
        assert!(cap <= most, "the cap is {cap}, and there is room for {most}: {:?}", self.told);
        assert!(held <= cap || held <= self.last_held, "{held} permits, the cap is {cap}");
        self.last_held = held;
        for action in actions {
            if let Action::Dial { slot, .. } = action {
                assert!(held <= cap, "a dial above the cap of {cap}");
                let pool = self.slots.get(slot).map_or(0, |slot| slot.pool);
                let tenant = &self.tenants[self.pools[pool].tenant];
                assert!(tenant.held <= tenant.budget.ceiling, "a dial above the ceiling of {:?}", tenant.name);
                assert!(self.pools[pool].size() <= self.pools[pool].limits.size, "a dial above the pool's size");
            }
        }
        let connecting = self.count(SlotState::Connecting);
        if actions.iter().any(|action| matches!(action, Action::Dial { .. })) {
            assert!(connecting <= self.limits.max_connecting, "{connecting} dials at once");
        }
        for slot in self.slots.values().filter(|slot| slot.state == SlotState::Idle) {
            assert!(self.pools[slot.pool].queue.is_empty(), "idle beside a waiter of its own pool");
        }
        if self.is_settled() {
            self.check_work_conserving(event, held, cap);
        }
        if event == Event::Tick {
            self.check_roles();
            self.check_waits();
        }
    }

    /// What the cap may be: what is set, what PostgreSQL has without the reserve, and what it last told that others leave.
    fn most_permits(&self, held: u32) -> u32 {
        let Some(told) = self.told else { return self.limits.cap.unwrap_or(4) };
        let set = self.limits.cap.unwrap_or(self.most.saturating_sub(self.limits.reserve));
        let left = self.most.saturating_sub(told.others.saturating_sub(told.uncounted));
        let left = if self.now - told.at >= OLD_NEWS { left.max(held + 1) } else { left };
        set.min(left).max(1)
    }

    fn is_settled(&self) -> bool {
        self.now > self.unsettled_until
    }

    fn count(&self, state: SlotState) -> u32 {
        self.slots.values().filter(|slot| slot.state == state).count() as u32
    }

    /// No further dial can be expected.
    fn is_throttled(&self) -> bool {
        let limit = if self.down { 1 } else { self.limits.max_connecting };
        self.count(SlotState::Connecting) + self.count(SlotState::Closing) >= limit
    }

    /// What is free, or idle beyond a floor for a while, is nobody's as long as nobody could use it.
    fn check_work_conserving(&self, event: Event, held: u32, cap: u32) {
        if self.is_throttled() {
            return;
        }
        let coming = self.count(SlotState::Closing);
        if held < cap {
            assert!(!self.are_wanted(0), "{held} of {cap} permits are used, and somebody waits for one");
        } else if matches!(event, Event::Tick | Event::Nudge) {
            let mut idle = self
                .slots
                .values()
                .filter(|s| s.state == SlotState::Idle && self.now - s.since > IDLE_LIMIT)
                .peekable();
            if idle.peek().is_none() {
                return;
            }
            let floors = self.floors();
            let spare = idle.find(|slot| {
                let tenant = self.pools[slot.pool].tenant;
                self.kept(tenant) > self.floor(tenant, floors)
            });
            if let Some(spare) = spare {
                let (idle, own, temper) = (self.now - spare.since, self.pools[spare.pool].tenant, self.temper);
                assert!(
                    !self.are_wanted(coming),
                    "{temper:?}: a connection of tenant {own} is idle for {idle} ms, and {:?} wait for its permit",
                    self.waiting.iter().filter(|n| self.wants_of(**n) > 0).collect::<Vec<_>>()
                );
            }
        }
    }

    /// At its ceiling a tenant helps one role with what another leaves idle.
    fn check_roles(&self) {
        for tenant in self.waiting.iter().map(|n| &self.tenants[*n]) {
            let pools = || tenant.pools.iter().map(|n| &self.pools[*n]);
            let coming: u32 = pools().map(|p| p.count(SlotState::Connecting) + p.count(SlotState::Closing)).sum();
            if tenant.held < tenant.budget.ceiling || coming > 0 || !self.is_settled() {
                continue;
            }
            let is_open = tenant.gate == Gate::Open;
            let could = |p: &Pool| is_open && !p.queue.is_empty() && p.size() < p.limits.size && p.failed.is_none();
            let spare = self.slots.values().find(|slot| {
                slot.state == SlotState::Idle && self.now - slot.since > 100 && tenant.pools.contains(&slot.pool)
            });
            let idle = spare.map_or(0, |slot| self.now - slot.since);
            assert!(idle == 0 || !pools().any(could), "{:?}: idle for {idle} ms beside its own waiter", tenant.name);
        }
    }

    /// An idle connection within a floor stays, unless it is old or long unused.
    pub fn check_close(&self, slot: SlotId) {
        let slot = &self.slots[&slot];
        let pool = &self.pools[slot.pool];
        let is_over = self.now - slot.unused >= pool.limits.idle_timeout
            || self.now - slot.dialed >= pool.limits.lifetime * 4 / 5
            || self.tenants[pool.tenant].pools.len() > 1;
        if self.temper == Temper::Calm && !self.ending && !is_over {
            let (kept, floor) = (self.kept(pool.tenant), self.floor(pool.tenant, self.floors()));
            assert!(kept > floor, "an idle connection within the floor of tenant {} is taken", pool.tenant);
        }
    }

    /// Are more permits wanted than these?
    fn are_wanted(&self, coming: u32) -> bool {
        let mut sum = 0;
        self.waiting.iter().any(|n| {
            sum += self.wants_of(*n);
            sum > coming
        })
    }

    /// Nobody waits for longer than its pool allows; and while nothing fails, nobody starves.
    fn check_waits(&self) {
        let patience = self.patience();
        for tenant in &self.waiting {
            let before = self.tenants[*tenant].pools.iter().map(|n| self.pools[*n].clients.len() as u64).sum::<u64>();
            for pool in self.tenants[*tenant].pools.iter().map(|n| &self.pools[*n]) {
                let waited = pool.queue.front().map_or(0, |(_, since)| self.now - since);
                assert!(waited <= pool.limits.query_wait_timeout, "{waited} ms are more than query_wait_timeout");
                if self.temper == Temper::Calm && !self.ending {
                    let waited = pool.waits_since.map_or(0, |since| self.now - since);
                    // Inside a tenant the one that came first is first, whatever its role.
                    let bound = patience * (1 + before);
                    assert!(waited <= bound, "{:?} of {tenant} starves: {waited} ms, {bound}", pool.id);
                }
            }
            let waited = self.waits_for(*tenant);
            if self.temper == Temper::Calm && !self.ending {
                assert!(waited <= patience, "tenant {tenant} starves: {waited} ms; the bound is {patience}");
            }
        }
    }

    /// A refusal is only right when the waiter's time was up and nothing was free for it.
    pub fn check_refusal(&self, pool: usize, waiter: WaiterId, refusal: Refusal) {
        let pool = &self.pools[pool];
        if refusal == Refusal::Shut {
            assert_eq!(self.tenants[pool.tenant].gate, Gate::Shut);
            return;
        }
        if refusal == Refusal::LoginRefused {
            assert!(self.temper == Temper::Stormy && pool.failed.is_some(), "no login was refused");
            return;
        }
        let joined = pool.queue.iter().find(|(w, _)| *w == waiter).map_or(self.now, |(_, at)| *at);
        let (waited, limit) = (self.now - joined, pool.limits.query_wait_timeout);
        assert!(waited >= limit, "refused after {waited} of {limit} ms");
        let (held, cap) = self.core.permits();
        let free = held < cap && self.is_settled() && !self.is_throttled() && self.wants_of(pool.tenant) > 0;
        assert!(!free, "refused, and {held} of {cap} permits are used");
    }

    /// Does a tenant below its floor wait for a permit that is not on its way, and could this one be it?
    pub fn owes_a_floor(&self, slot: SlotId) -> bool {
        let own = self.pools[self.slots[&slot].pool].tenant;
        let (held, cap) = self.core.permits();
        if !self.is_settled() || held < cap || self.is_throttled() {
            return false;
        }
        let floors = self.floors();
        if floors == 0 || self.kept(own) <= self.tenants[own].budget.floor {
            return false;
        }
        let others = self.waiting.iter().filter(|n| **n != own && self.tenants[**n].budget.floor > 0);
        // However little is left of a floor, one that has nothing comes first.
        let floor = |n: usize| self.floor(n, floors).max(1);
        let owed = others.map(|n| self.wants_of(*n).min(floor(*n).saturating_sub(self.kept(*n))));
        owed.sum::<u32>() > self.count(SlotState::Closing)
    }

    /// All promises together, of tenants that have pools.
    fn floors(&self) -> u64 {
        let with_pools = self.tenants.iter().filter(|tenant| !tenant.pools.is_empty());
        with_pools.map(|tenant| u64::from(tenant.budget.floor)).sum()
    }

    /// The floor that counts: while they do not all fit, a part of each.
    fn floor(&self, tenant: usize, all: u64) -> u32 {
        let (floor, cap) = (u64::from(self.tenants[tenant].budget.floor), u64::from(self.core.permits().1));
        (if all > cap { floor * cap / all } else { floor }) as u32
    }

    /// What a tenant has, without what is closing.
    fn kept(&self, tenant: usize) -> u32 {
        self.tenants[tenant].pools.iter().map(|n| self.pools[*n].size()).sum()
    }

    /// How many connections a tenant's clients could use at once, apart from the cap.
    fn wants_of(&self, tenant: usize) -> u32 {
        let pools = || self.tenants[tenant].pools.iter().map(|n| &self.pools[*n]);
        let wants: u32 = pools().map(|pool| self.wants(pool)).sum();
        // Nor may one tenant take all dials.
        let dials = pools().map(|pool| pool.count(SlotState::Connecting)).sum();
        let wants = wants.min(self.dials_of_one().saturating_sub(dials));
        wants.min(self.tenants[tenant].budget.ceiling.saturating_sub(self.tenants[tenant].held))
    }

    fn wants(&self, pool: &Pool) -> u32 {
        let is_shut = self.tenants[pool.tenant].gate != Gate::Open;
        if is_shut || pool.failed.is_some_and(|at| self.now <= at + PAUSE) {
            return 0;
        }
        let connecting = pool.count(SlotState::Connecting);
        // After a failure one finds out for all, and no more than may be dialled at once are left hanging.
        let tries = u32::from(pool.hanging < self.dials_of_one());
        let dials = if pool.failed.is_some() { tries } else { self.dials_of_one() };
        let room = pool.limits.size.saturating_sub(pool.size()).min(dials.saturating_sub(connecting));
        (pool.queue.len() as u32).saturating_sub(connecting).min(room)
    }

    fn dials_of_one(&self) -> u32 {
        self.limits.max_connecting.saturating_sub(1).max(1)
    }

    /// The longest that a tenant may wait for its next connection while nothing fails: until the others have used a quantum
    /// each, their permits have moved and what is lent comes back; with a margin.
    pub fn patience(&self) -> u64 {
        let clients = |pool: &&usize| !self.pools[**pool].queue.is_empty() || self.pools[**pool].limits.size > 0;
        let wanting: BTreeSet<usize> =
            (0..self.tenants.len()).filter(|n| self.tenants[*n].pools.iter().any(|pool| clients(&pool))).collect();
        let weights: u64 = wanting.iter().map(|n| u64::from(self.tenants[*n].budget.weight)).sum();
        let cap = u64::from(self.core.permits().1.max(1));
        let hold = self.tenants.iter().map(|tenant| tenant.hold).max().unwrap_or(0);
        let each = hold * 2 + self.connect * 2 + 20;
        let moves = wanting.len() as u64 * each / cap.min(u64::from(self.limits.max_connecting));
        2 * (weights * 3 * QUANTUM / cap + moves + hold * 4 + 1_000)
    }
}
