//! Whose permit goes to whom: who may dial next, whose connection is closed for it, and what is closed for nobody's sake.

use std::cmp::Reverse;

use super::*;

impl Core {
    /// A connection that comes to rest: is its permit somebody else's turn?
    pub(super) fn belongs_elsewhere(&mut self, pool: PoolId, tenant: TenantKey, now: Millis) -> bool {
        if self.sibling_is_first(pool, tenant, now) {
            return true;
        }
        if !self.ledger.is_full() || !self.fair.is_wanted() || self.down.is_pausing(now) || self.cap.is_pausing(now) {
            return false;
        }
        // More than can be dialled at once would only lie closed.
        let closing = self.totals.of(SlotState::Closing);
        closing + self.totals.of(SlotState::Connecting) < self.connecting_limit(now)
            && self.fair.must_yield(tenant, closing)
    }

    /// Inside a tenant: does a waiter of another of its pools come before this pool's own, by enough to pay for a connect?
    fn sibling_is_first(&self, own: PoolId, tenant: TenantKey, now: Millis) -> bool {
        if !self.several.contains(&tenant) || !self.is_at_ceiling(tenant) && !self.ledger.is_full() {
            return false;
        }
        let pools = || self.pools_of(tenant).filter(|(id, _)| *id != own).map(|(_, pool)| pool);
        let closing: u32 = self.pools_of(tenant).map(|(_, pool)| pool.counts.of(SlotState::Closing)).sum();
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
    pub(super) fn free_sibling(&mut self, tenant: TenantKey, now: Millis, actions: &mut Actions) {
        if !self.several.contains(&tenant) {
            return;
        }
        let at_ceiling = self.is_at_ceiling(tenant);
        if !at_ceiling && !self.ledger.is_full() {
            return;
        }
        let least = if at_ceiling { 0 } else { LEAST_IDLE };
        let pools = || self.pools_of(tenant).map(|(_, pool)| pool);
        let closing: u32 = pools().map(|pool| pool.counts.of(SlotState::Closing)).sum();
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
    pub(super) fn free_siblings(&mut self, now: Millis, actions: &mut Actions) {
        let tenants: SmallVec<[TenantKey; 8]> = self.several.iter().copied().collect();
        for tenant in tenants {
            self.free_sibling(tenant, now, actions);
        }
    }

    /// Dials for whoever is next, while permits and the throttle last; at the cap, closes idle connections of others.
    pub(super) fn grow(&mut self, now: Millis, actions: &mut Actions) {
        if self.is_above_cap() {
            self.make_room(now, actions);
        }
        while self.fair.is_wanted() {
            if self.totals.of(SlotState::Connecting) >= self.connecting_limit(now)
                || self.down.is_pausing(now)
                || self.cap.is_pausing(now)
            {
                return;
            }
            if self.ledger.is_full() {
                self.make_room(now, actions);
                return;
            }
            let Some(tenant) = self.next(now) else { return };
            let Some(pool) = self.oldest_waiting(tenant, now) else {
                debug_assert!(false, "a tenant wants what none of its pools wants");
                self.refresh(tenant, now);
                return;
            };
            self.dial(pool, now, actions);
            self.refresh(tenant, now);
        }
    }

    /// Who dials next. While the server seems to be down each finds out in turn: it may be down for one of them only.
    fn next(&self, now: Millis) -> Option<TenantKey> {
        if !self.down.is_failing() {
            return self.fair.next();
        }
        let missed = |tenant: &TenantKey| self.wanting(*tenant, now).map(|(_, pool)| pool.missed).min();
        self.fair.wanting().min_by_key(missed)
    }

    /// The pool of a tenant whose first waiter has waited longest, among those that could use a connection; while the
    /// server seems to be down, of those that found out longest ago.
    fn oldest_waiting(&self, tenant: TenantKey, now: Millis) -> Option<PoolId> {
        let missed = |pool: &PoolState| if self.down.is_failing() { pool.missed } else { 0 };
        let first = self
            .wanting(tenant, now)
            .filter_map(|(id, pool)| pool.queue.oldest().map(|(waiter, since)| (missed(pool), since, waiter, id)));
        first.min().map(|(_, _, _, id)| id)
    }

    /// The pools of a tenant that could use a connection.
    fn wanting(&self, tenant: TenantKey, now: Millis) -> impl Iterator<Item = (PoolId, &PoolState)> {
        self.pools_of(tenant).filter(move |(_, pool)| pool.wants(now, self.dials_of_one()) > 0)
    }

    /// Not all of them: a login that hangs must not stop everybody's.
    pub(super) fn dials_of_one(&self) -> u32 {
        self.limits.max_connecting.saturating_sub(1).max(1)
    }

    /// While the server is down one dial at a time finds out whether it is back; another, if that takes long.
    fn connecting_limit(&self, now: Millis) -> u32 {
        if !self.down.is_failing() {
            self.limits.max_connecting
        } else if now.0.saturating_sub(self.last_dial.0) < LOOKS_WITHIN {
            1
        } else {
            self.limits.max_connecting.min(self.totals.of(SlotState::Connecting) + 1)
        }
    }

    fn dial(&mut self, pool_id: PoolId, now: Millis, actions: &mut Actions) {
        let Some(pool) = self.pools.get_mut(&pool_id) else { return };
        if !self.ledger.take() {
            return;
        }
        self.dials += 1;
        self.last_dial = now;
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
            failed: false,
        };
        let slot = SlotId(self.slots.insert(slot));
        self.recount(pool_id, None, Some(SlotState::Connecting));
        actions.push(Action::Dial { slot, pool: pool_id });
    }

    /// Closes idle connections for those who wait, or because the cap was lowered: those first whom it costs least.
    fn make_room(&mut self, now: Millis, actions: &mut Actions) {
        // More than can be dialled at once would only lie closed.
        let room = self.connecting_limit(now).saturating_sub(self.totals.of(SlotState::Connecting));
        let mut closing = self.totals.of(SlotState::Closing);
        let wanted = self.fair.wanted(room).min(room);
        let owes_floor = self.fair.owes_floor(closing);
        while self.totals.of(SlotState::Idle) > 0 && (closing < wanted || self.is_above_cap()) {
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

    /// Idle connections: too old, idle too long (above the minimum), or due for a check.
    pub(super) fn retire_idle(&mut self, now: Millis, actions: &mut Actions) {
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

    pub(super) fn prewarm(&mut self, now: Millis, actions: &mut Actions) {
        let dials = self.dials_of_one();
        let short = |pool: &PoolState| {
            let may = pool.may_prewarm && pool.gate == Gate::Open && pool.tries(dials) > 0;
            may && pool.size() < pool.limits.min_size
        };
        let ids: Vec<_> = self.pools.iter().filter(|(_, pool)| short(pool)).map(|(id, _)| *id).collect();
        for id in ids {
            while let Some(pool) = self.pools.get(&id)
                && short(pool)
                && !self.is_at_ceiling(pool.tenant)
                && !pool.backoff.is_pausing(now)
                && !self.down.is_pausing(now)
                && !self.cap.is_pausing(now)
                && self.totals.of(SlotState::Connecting) < self.connecting_limit(now)
                && !self.ledger.is_full()
            {
                let tenant = pool.tenant;
                self.dial(id, now, actions);
                self.refresh(tenant, now);
            }
        }
    }
}
