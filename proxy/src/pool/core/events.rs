//! What happens to the pools of a server: clients come and go, connections are given back, dialled, checked and closed,
//! and time passes.

use super::*;

impl Core {
    /// A session wants a connection of this pool.
    pub fn checkout(&mut self, id: PoolId, now: Millis, actions: &mut Actions) -> Checkout {
        let now = self.pass(now);
        let Some(pool) = self.pools.get_mut(&id) else { return Checkout::Refused(Refusal::LoginRefused) };
        if pool.gate == Gate::Shut {
            return Checkout::Refused(Refusal::Shut);
        }
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
        let now = self.pass(now);
        let rested = self.rest(slot, now);
        // Freed, or idle while somebody waits: perhaps not for long.
        if rested == Rested::Close || (rested == Rested::Idle && self.fair.is_wanted()) {
            self.grow(now, actions);
        }
        rested
    }

    /// A connection changes state without coming to rest: `Reset`, `AwaitCancel`, `Close`.
    pub fn change(&mut self, slot: SlotId, event: SlotEvent, now: Millis, actions: &mut Actions) {
        let now = self.pass(now);
        self.shift(slot, event, now);
        if event == SlotEvent::Close {
            if let Some(tenant) = self.pool_of(slot).map(|pool| pool.tenant) {
                self.refresh(tenant, now);
            }
            self.grow(now, actions);
        }
    }

    /// A dial succeeded, and PostgreSQL told what room it has.
    pub fn dialed(&mut self, slot: SlotId, room: Option<Room>, now: Millis, actions: &mut Actions) -> Rested {
        let now = self.pass(now);
        if let Some(room) = room {
            self.observe(room, now);
        }
        self.down = Backoff::default();
        self.cap.took(self.ledger.held().saturating_sub(self.totals.of(SlotState::Connecting)).saturating_add(1));
        self.apply_cap();
        if let Some(pool) = self.pool_of(slot) {
            pool.backoff = Backoff::default();
            pool.may_prewarm = true;
            pool.missed = 0;
        }
        let rested = self.rest(slot, now);
        if let Some(tenant) = self.pool_of(slot).map(|pool| pool.tenant) {
            // One dial less is under way: its other roles may have waited for that.
            self.refresh(tenant, now);
        }
        self.grow(now, actions);
        rested
    }

    /// A connection that was asked for a sign of life gave one, and told what room there is.
    pub fn checked(&mut self, slot: SlotId, room: Option<Room>, now: Millis, actions: &mut Actions) -> Rested {
        let now = self.pass(now);
        if let Some(room) = room {
            self.observe(room, now);
        }
        self.release(slot, now, actions)
    }

    /// A dial failed; `closed` follows, as soon as PostgreSQL has closed its end.
    pub fn dial_failed(&mut self, slot: SlotId, failure: DialFailure, now: Millis, actions: &mut Actions) {
        let now = self.pass(now);
        let base = self.limits.login_retry;
        let longest = base.saturating_mul(4);
        match failure {
            DialFailure::ServerDown => {
                self.down.fail(base, longest, now);
                self.misses += 1;
                let misses = self.misses;
                if let Some(pool) = self.pool_of(slot) {
                    pool.missed = misses;
                }
            }
            DialFailure::ServerFull => {
                self.down = Backoff::default();
                self.cap.refused(self.ledger.held().saturating_sub(self.totals.of(SlotState::Connecting)), now);
                self.apply_cap();
            }
            DialFailure::TenantFull | DialFailure::Later | DialFailure::Refused => {
                self.down = Backoff::default();
                if let Some(pool) = self.pool_of(slot) {
                    pool.backoff.fail(base, longest, now);
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
        if let Some(slot) = self.slots.get_mut(slot.0) {
            slot.failed = true;
        }
        if let Some(pool) = self.pool_of(slot) {
            pool.hanging += 1;
        }
        self.shift(slot, SlotEvent::Close, now);
        if let Some(tenant) = self.pool_of(slot).map(|pool| pool.tenant) {
            self.refresh(tenant, now);
        }
        self.grow(now, actions);
    }

    /// PostgreSQL closed its end: the permit is free.
    pub fn closed(&mut self, slot: SlotId, now: Millis, actions: &mut Actions) {
        let now = self.pass(now);
        let Some(gone) = self.slots.try_remove(slot.0) else { return };
        self.recount(gone.pool, Some(gone.state), None);
        self.ledger.give_back();
        if let Some(pool) = self.pools.get_mut(&gone.pool) {
            pool.hanging -= u32::from(gone.failed);
            let tenant = pool.tenant;
            self.refresh(tenant, now);
        }
        self.forget_if_empty(gone.pool);
        self.grow(now, actions);
    }

    /// A waiter went away by itself; false if it had left the queue already (a connection or a refusal is on its way).
    pub fn leave_queue(&mut self, id: PoolId, waiter: WaiterId, now: Millis) -> bool {
        let now = self.pass(now);
        let Some(pool) = self.pools.get_mut(&id) else { return false };
        let (left, tenant) = (pool.queue.leave(waiter), pool.tenant);
        if left {
            self.refresh(tenant, now);
        }
        left
    }

    /// Time passed: refusals, ends of life, checks, minimum sizes, retries. About ten times a second.
    pub fn tick(&mut self, now: Millis, actions: &mut Actions) {
        let now = self.pass(now);
        self.cap.tick(now);
        self.doubt_old_news(now);
        self.apply_cap();
        self.expire_waiters(now, actions);
        self.retire_idle(now, actions);
        self.give_up_on_closing(now);
        self.nudge(now, actions);
        self.prewarm(now, actions);
    }

    /// The part of `tick` that must not be late while somebody waits for somebody else's permit.
    pub fn nudge(&mut self, now: Millis, actions: &mut Actions) {
        let now = self.pass(now);
        self.fair.charge_all();
        self.free_siblings(now, actions);
        self.grow(now, actions);
    }

    /// The cap keeps somebody waiting.
    #[must_use]
    pub fn is_contended(&self) -> bool {
        self.ledger.is_full() && self.fair.is_wanted()
    }

    fn rest(&mut self, id: SlotId, now: Millis) -> Rested {
        let Some(slot) = self.slots.get_mut(id.0) else { return Rested::Close };
        slot.checked = now;
        let was_checked = slot.state == SlotState::Checking;
        // A dial is paid for with one transaction at least: where logins take longer than the quantum, permits would else
        // travel for ever and serve nobody.
        let is_fresh = slot.state == SlotState::Connecting;
        if !was_checked {
            slot.unused = now;
        }
        let (pool_id, expired, generation) = (slot.pool, now >= slot.expires, slot.generation);
        let Some(pool) = self.pools.get(&pool_id) else { return Rested::Close };
        let tenant = pool.tenant;
        let over = pool.gate != Gate::Open
            || pool.size() > pool.limits.size
            || self.is_above_ceiling(tenant)
            || self.is_above_cap();
        let is_unwanted = expired || over || generation != pool.generation;
        if is_unwanted || !is_fresh && self.belongs_elsewhere(pool_id, tenant, now) {
            self.shift(id, SlotEvent::Close, now);
            self.refresh(tenant, now);
            return Rested::Close;
        }
        if !was_checked && !is_fresh && self.room_due.is_some_and(|due| now >= due) {
            self.room_due = Some(Millis(now.0.saturating_add(ROOM_AGE)));
            self.shift(id, SlotEvent::Check, now);
            return Rested::Check;
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

    /// Everything is lent for long, so that nobody could ask what room there is, and somebody waits: perhaps one of the
    /// others that the cap yields to has left. One more dial finds out.
    fn doubt_old_news(&mut self, now: Millis) {
        let is_old = self.room_due.is_some_and(|due| now.0 >= due.0.saturating_add(ROOM_AGE));
        if is_old && self.is_contended() {
            self.cap.presume_room(self.ledger.held());
            self.room_due = Some(now);
        }
    }

    fn give_up_on_closing(&mut self, now: Millis) {
        if self.totals.of(SlotState::Closing) == 0 {
            return;
        }
        let late =
            |slot: &Slot| slot.state == SlotState::Closing && now.0.saturating_sub(slot.since.0) >= CLOSES_WITHIN;
        let late: SmallVec<[SlotId; 4]> =
            self.slots.iter().filter(|(_, slot)| late(slot)).map(|(index, _)| SlotId(index)).collect();
        late.into_iter().for_each(|slot| self.shift(slot, SlotEvent::Linger, now));
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
}
