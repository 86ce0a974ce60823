//! Who gets the next permit of a server: floors first, then weighted virtual time. Pure.
//!
//! Start-time fair queueing over tenants. A tenant's virtual time is the connection time that it used while somebody was
//! kept waiting by the cap, divided by its weight; whoever waits with the least is next. Time in which nobody waited
//! costs nothing, so using what nobody wanted is never held against a tenant; and one that begins to wait starts no
//! earlier than the system's virtual time, that of the last among those who wait, so having been away is never paid back
//! as a monopoly. Who waits for nothing holds back nobody's line, however little it uses; nor does one that its floor
//! carries.
//!
//! While the floors do not fit into the cap, each is scaled down in proportion: what is left of it, rounded down, is
//! nobody else's, and those parts are together at most the cap; the part of a permit that rounding leaves is a place
//! before those who are above their floors, and virtual time decides among all who claim one.
//!
//! What always holds: a tenant is in `claims` exactly if it wants permits, under its key of now.

use std::collections::BTreeSet;

use slab::Slab;

use crate::clock::Millis;

/// A tenant within one server: an index that is used again after `remove`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantKey(pub usize);

/// A tenant's allowance of server connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Always available to it.
    pub floor: u32,
    /// Never more.
    pub ceiling: u32,
    /// Its part of what is left, in proportion to the others'; at least 1.
    pub weight: u32,
}

impl Budget {
    /// As the settings say.
    #[must_use]
    pub fn of(tenant: &tenantry_config::Tenant) -> Self {
        let tenantry_config::Tenant { floor, ceiling, weight, .. } = tenant;
        Self { floor: *floor, ceiling: ceiling.unwrap_or(u32::MAX), weight: weight.get() }
    }
}

/// Moving a permit costs a connect, so it moves only to a tenant that is this much behind: milliseconds of connection
/// time for a tenant of weight 1.
pub const QUANTUM: u64 = 100;
/// Nobody is further ahead than this, so that a floor larger than the fair share is not paid for without end.
const MOST_AHEAD: u64 = 60_000;
/// Nor further behind, when it wants again after a dial for which it waited: a slow login is made good, a hanging one is not.
const MOST_BEHIND: u64 = 10 * QUANTUM;
/// Virtual time per millisecond and weight 1: fine enough that a large weight loses nothing to rounding.
const UNIT: u64 = 1 << 16;

#[derive(Debug)]
struct Account {
    budget: Budget,
    /// Permits: from before the dial until PostgreSQL closed its end.
    held: u32,
    /// Those of them that are `Use::Leaving`.
    leaving: u32,
    /// Those of them that are `Use::Busy`.
    busy: u32,
    /// How many more it could use at once.
    wants: u32,
    /// Somebody waits, perhaps for a dial that is under way.
    waits: bool,
    virtual_time: u64,
    /// The contended clock when it was charged last.
    charged_at: u64,
    claim: Option<Claim>,
}

impl Account {
    /// What it has, or is getting.
    fn kept(&self) -> u32 {
        self.held.saturating_sub(self.leaving)
    }
}

/// What a permit is to its tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Of use, and charged for.
    Busy,
    /// At its tenant's disposal.
    Idle,
    /// On its way out: of no use to it any more.
    Leaving,
}

/// In the order in which they are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    above_floor: bool,
    virtual_time: u64,
    tenant: TenantKey,
}

/// The tenants of one server.
#[derive(Debug, Default)]
pub struct FairShare {
    accounts: Slab<Account>,
    claims: BTreeSet<Claim>,
    /// All promises together.
    floors: u64,
    cap: u32,
    /// Milliseconds in which somebody was kept waiting by the cap.
    clock: u64,
    /// Where one that begins to wait starts at least; it only grows.
    system: u64,
    seen: Millis,
}

impl FairShare {
    pub fn add(&mut self, budget: Budget) -> TenantKey {
        let account = Account {
            budget,
            held: 0,
            leaving: 0,
            busy: 0,
            wants: 0,
            waits: false,
            virtual_time: self.system,
            charged_at: self.clock,
            claim: None,
        };
        let tenant = TenantKey(self.accounts.insert(account));
        self.promise(self.floors.saturating_add(u64::from(budget.floor)), self.cap);
        tenant
    }

    pub fn set_budget(&mut self, tenant: TenantKey, budget: Budget) {
        self.charge(tenant);
        let Some(account) = self.accounts.get_mut(tenant.0) else { return };
        let before = std::mem::replace(&mut account.budget, budget);
        let others = self.floors.saturating_sub(u64::from(before.floor));
        self.promise(others.saturating_add(u64::from(budget.floor)), self.cap);
        self.enter_claim(tenant);
    }

    /// The tenant holds nothing and wants nothing any more.
    pub fn remove(&mut self, tenant: TenantKey) {
        let Some(account) = self.accounts.try_remove(tenant.0) else { return };
        if let Some(claim) = account.claim {
            self.claims.remove(&claim);
        }
        self.promise(self.floors.saturating_sub(u64::from(account.budget.floor)), self.cap);
    }

    /// How many permits there may be now.
    pub fn set_cap(&mut self, cap: u32) {
        self.promise(self.floors, cap);
    }

    /// The promises and what there is to keep them with.
    fn promise(&mut self, floors: u64, cap: u32) {
        let was_scaled = self.is_overpromised();
        let changed = (self.floors, self.cap) != (floors, cap);
        (self.floors, self.cap) = (floors, cap);
        if changed && (was_scaled || self.is_overpromised()) {
            let claims: Vec<_> = self.claims.iter().map(|claim| claim.tenant).collect();
            claims.into_iter().for_each(|tenant| self.enter_claim(tenant));
        }
    }

    /// The floors do not all fit.
    #[must_use]
    pub fn is_overpromised(&self) -> bool {
        self.floors > u64::from(self.cap)
    }

    /// What is left of a floor now: nobody takes it.
    fn floor(&self, budget: Budget) -> u32 {
        self.part(budget, u64::checked_div)
    }

    /// The same with a whole permit for a part of one: below this it comes before those who are above it.
    fn claim_of_floor(&self, budget: Budget) -> u32 {
        self.part(budget, |floor, floors| (floors > 0).then(|| floor.div_ceil(floors)))
    }

    fn part(&self, budget: Budget, divide: impl Fn(u64, u64) -> Option<u64>) -> u32 {
        if !self.is_overpromised() {
            return budget.floor;
        }
        let part = divide(u64::from(budget.floor).saturating_mul(u64::from(self.cap)), self.floors);
        part.and_then(|part| u32::try_from(part).ok()).unwrap_or(0)
    }

    fn is_below_floor(&self, account: &Account) -> bool {
        account.kept() < self.claim_of_floor(account.budget)
    }

    /// Time passes; `contended`: the cap kept somebody waiting since the last call. Gives the milliseconds.
    pub fn pass(&mut self, now: Millis, contended: bool) -> u64 {
        let elapsed = now.0.saturating_sub(self.seen.0);
        self.seen = self.seen.max(now);
        if contended {
            self.clock = self.clock.saturating_add(elapsed);
        }
        elapsed
    }

    /// A permit is taken (from `None`), given back (to `None`) or put to another use.
    pub fn count(&mut self, tenant: TenantKey, from: Option<Use>, to: Option<Use>) {
        if from == to {
            return;
        }
        let busy = |use_: Option<Use>| use_ == Some(Use::Busy);
        if busy(from) != busy(to) {
            self.charge(tenant);
        }
        let Some(account) = self.accounts.get_mut(tenant.0) else { return };
        let kept = account.kept();
        let step = |count: &mut u32, was: bool, is: bool| *count = *count + u32::from(is) - u32::from(was);
        step(&mut account.held, from.is_some(), to.is_some());
        step(&mut account.leaving, from == Some(Use::Leaving), to == Some(Use::Leaving));
        step(&mut account.busy, busy(from), busy(to));
        if account.kept() != kept && account.claim.is_some() {
            self.enter_claim(tenant);
        }
    }

    /// How many more connections the tenant could use at once, apart from the cap; `waits`: somebody goes on waiting, be it
    /// for what is coming.
    pub fn want(&mut self, tenant: TenantKey, wants: u32, waits: bool) {
        let Some(account) = self.accounts.get_mut(tenant.0) else { return };
        let before = std::mem::replace(&mut account.wants, wants);
        let waited = std::mem::replace(&mut account.waits, waits);
        if (before > 0) == (wants > 0) {
            return;
        }
        self.charge(tenant);
        let behind = if waited && waits { MOST_BEHIND * UNIT } else { 0 };
        let line = self.system.saturating_sub(behind);
        if let Some(account) = self.accounts.get_mut(tenant.0)
            && wants > 0
        {
            account.virtual_time = account.virtual_time.max(line);
        }
        self.enter_claim(tenant);
    }

    /// Charges everybody who uses a permit, so that the order of the claims is right again, and the system's time with it.
    pub fn charge_all(&mut self) {
        let busy: Vec<_> = self.accounts.iter().filter(|(_, a)| a.busy > 0).map(|(key, _)| TenantKey(key)).collect();
        busy.into_iter().for_each(|tenant| self.charge(tenant));
        let last = self.last(|account| account.wants > 0 && !self.is_carried(account));
        // All who wait live on their floors: then whoever uses what is above one is all there is to go by.
        let last = last.or_else(|| {
            let floor = |account: &Account| self.floor(account.budget);
            self.last(|account| account.busy > floor(account) || account.wants > 0 && account.kept() >= floor(account))
        });
        self.system = last.map_or(self.system, |last| last.max(self.system));
    }

    /// What it has is its floor's: how far ahead or behind it is says nothing of the others.
    fn is_carried(&self, account: &Account) -> bool {
        let floor = self.floor(account.budget);
        floor > 0 && account.kept() <= floor
    }

    /// The virtual time of the last among these.
    fn last(&self, competes: impl Fn(&Account) -> bool) -> Option<u64> {
        self.accounts.iter().map(|(_, account)| account).filter(|a| competes(a)).map(|a| a.virtual_time).min()
    }

    /// Who gets the next free permit.
    #[must_use]
    pub fn next(&self) -> Option<TenantKey> {
        self.claims.first().map(|claim| claim.tenant)
    }

    /// Everybody who would like one, in the order of `next`.
    pub fn wanting(&self) -> impl Iterator<Item = TenantKey> {
        self.claims.iter().map(|claim| claim.tenant)
    }

    #[must_use]
    pub fn is_wanted(&self) -> bool {
        !self.claims.is_empty()
    }

    /// At the cap: must `own` give the permit that it could go on using to somebody else? `coming` permits are on their
    /// way to the first claims already.
    pub fn must_yield(&mut self, own: TenantKey, coming: u32) -> bool {
        self.charge(own);
        let Some(account) = self.accounts.get(own.0) else { return true };
        if account.kept() <= self.floor(account.budget) {
            return false;
        }
        let Some(claim) = self.uncovered(own, coming) else { return false };
        let is_ahead = account.virtual_time > claim.virtual_time.saturating_add(QUANTUM * UNIT);
        // What stands on a part of a permit is only given up for another such part.
        match (account.kept() <= self.claim_of_floor(account.budget), claim.above_floor) {
            (true, above_floor) => !above_floor && is_ahead,
            (false, above_floor) => !above_floor || is_ahead,
        }
    }

    /// Does somebody below its floor wait for a permit that is not on its way?
    #[must_use]
    pub fn owes_floor(&self, coming: u32) -> bool {
        let floors = self.claims.iter().take_while(|claim| !claim.above_floor);
        let owed = floors
            .filter_map(|claim| self.accounts.get(claim.tenant.0))
            .map(|account| account.wants.min(self.claim_of_floor(account.budget).saturating_sub(account.kept())));
        owed.sum::<u32>() > coming
    }

    /// How many permits are wanted by others than `own`'s betters: the first claim that `coming` permits do not cover.
    fn uncovered(&self, own: TenantKey, mut coming: u32) -> Option<Claim> {
        for claim in &self.claims {
            if claim.tenant == own {
                // From here on nobody comes before it.
                return None;
            }
            let wants = self.accounts.get(claim.tenant.0).map_or(0, |account| account.wants);
            if coming < wants {
                return Some(*claim);
            }
            coming -= wants;
        }
        None
    }

    /// Wanted by all together, as far as that is more than `limit`.
    #[must_use]
    pub fn wanted(&self, limit: u32) -> u32 {
        let mut sum = 0u32;
        for claim in &self.claims {
            sum = sum.saturating_add(self.accounts.get(claim.tenant.0).map_or(0, |account| account.wants));
            if sum >= limit {
                break;
            }
        }
        sum
    }

    /// All promises together, of tenants that have pools.
    #[must_use]
    pub fn floors(&self) -> u64 {
        self.floors
    }

    #[must_use]
    pub fn held(&self, tenant: TenantKey) -> u32 {
        self.accounts.get(tenant.0).map_or(0, |account| account.held)
    }

    /// What the tenant has or is getting: without what is closing.
    #[must_use]
    pub fn kept(&self, tenant: TenantKey) -> u32 {
        self.accounts.get(tenant.0).map_or(0, Account::kept)
    }

    #[must_use]
    pub fn budget(&self, tenant: TenantKey) -> Option<Budget> {
        self.accounts.get(tenant.0).map(|account| account.budget)
    }

    /// How far the tenant is above its floor, and how far ahead in virtual time: who can best do without.
    #[must_use]
    pub fn surplus(&self, tenant: TenantKey) -> (u32, u64) {
        let surplus = |account: &Account| account.kept().saturating_sub(self.floor(account.budget));
        self.accounts.get(tenant.0).map_or((0, 0), |account| (surplus(account), account.virtual_time))
    }

    fn charge(&mut self, tenant: TenantKey) {
        let clock = self.clock;
        if self.accounts.get(tenant.0).is_none_or(|account| account.charged_at == clock) {
            return;
        }
        let most = self.system.saturating_add(MOST_AHEAD * UNIT);
        let Some(account) = self.accounts.get_mut(tenant.0) else { return };
        let elapsed = clock.saturating_sub(account.charged_at);
        account.charged_at = clock;
        if account.busy == 0 {
            return;
        }
        let service = elapsed.saturating_mul(u64::from(account.busy)).saturating_mul(UNIT);
        let after = account.virtual_time.saturating_add(service / u64::from(account.budget.weight.max(1)));
        account.virtual_time = after.min(most).max(account.virtual_time);
        if account.claim.is_some() {
            self.enter_claim(tenant);
        }
    }

    fn enter_claim(&mut self, tenant: TenantKey) {
        let Some(account) = self.accounts.get(tenant.0) else { return };
        let (above_floor, virtual_time) = (!self.is_below_floor(account), account.virtual_time);
        let key = (account.wants > 0).then_some(Claim { above_floor, virtual_time, tenant });
        if account.claim == key {
            return;
        }
        let Some(account) = self.accounts.get_mut(tenant.0) else { return };
        if let Some(old) = std::mem::replace(&mut account.claim, key) {
            self.claims.remove(&old);
        }
        self.claims.extend(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn virtual_millis(fair: &FairShare, tenant: TenantKey) -> u64 {
        fair.accounts[tenant.0].virtual_time / UNIT
    }

    const BUSY: Option<Use> = Some(Use::Busy);
    const EQUAL: Budget = Budget { floor: 0, ceiling: 100, weight: 1 };

    fn with_cap(cap: u32) -> FairShare {
        let mut fair = FairShare::default();
        fair.set_cap(cap);
        fair
    }

    /// Gives one permit after another for `steps` turns of 10 ms each, everybody always wanting; permits per tenant.
    fn turns(budgets: &[Budget], permits: u32, steps: u32) -> Vec<u32> {
        let mut fair = with_cap(100);
        let tenants: Vec<_> = budgets.iter().map(|b| fair.add(*b)).collect();
        tenants.iter().for_each(|t| fair.want(*t, 100, true));
        let mut served = vec![0; tenants.len()];
        let mut now = Millis(0);
        for _ in 0..steps {
            let mut turn = Vec::new();
            for _ in 0..permits {
                let next = fair.next().expect("somebody wants");
                fair.count(next, None, BUSY);
                turn.push(next);
            }
            now = Millis(now.0 + 10);
            fair.pass(now, true);
            for tenant in turn {
                served[tenant.0] += 1;
                fair.count(tenant, BUSY, None);
            }
        }
        served
    }

    #[test]
    fn equal_weights_get_equal_service() {
        assert_eq!(turns(&[EQUAL; 4], 2, 200), [100; 4]);
    }

    #[test]
    fn service_is_in_proportion_to_weight() {
        let weighted = [1, 2, 4].map(|weight| Budget { weight, ..EQUAL });
        let served = turns(&weighted, 1, 700);
        assert!(served.iter().zip([100, 200, 400]).all(|(n, wanted)| n.abs_diff(wanted) <= 2), "{served:?}");
    }

    #[test]
    fn below_its_floor_a_tenant_is_first_whatever_it_used() {
        let mut fair = with_cap(100);
        let greedy = fair.add(Budget { floor: 1, ..EQUAL });
        let patient = fair.add(EQUAL);
        fair.want(patient, 1, true);
        fair.count(greedy, None, BUSY);
        fair.pass(Millis(10_000), true);
        fair.count(greedy, BUSY, Some(Use::Leaving));
        fair.want(greedy, 2, true);
        assert_eq!(fair.next(), Some(greedy));
        fair.count(greedy, None, BUSY);
        assert_eq!(fair.next(), Some(patient), "at its floor it is one of many");
    }

    #[test]
    fn what_nobody_else_wanted_is_free_and_being_away_is_not_saved_up() {
        let mut fair = with_cap(100);
        let (alone, late) = (fair.add(EQUAL), fair.add(EQUAL));
        fair.count(alone, None, BUSY);
        fair.pass(Millis(3_600_000), false);
        fair.want(alone, 1, true);
        fair.want(late, 1, true);
        assert_eq!((virtual_millis(&fair, alone), virtual_millis(&fair, late)), (0, 0));
        fair.want(late, 0, false);
        fair.pass(Millis(3_601_000), true);
        fair.charge_all();
        fair.want(late, 1, true);
        assert_eq!(virtual_millis(&fair, late), virtual_millis(&fair, alone), "both begin at the same line");
    }

    /// The one that waits is far ahead, since it uses its floor all the time; that says nothing of a newcomer.
    #[test]
    fn a_newcomer_starts_with_the_last_of_those_who_compete_not_with_whoever_waits() {
        let mut fair = with_cap(10);
        let (entitled, rival) = (fair.add(Budget { floor: 7, ..EQUAL }), fair.add(EQUAL));
        for _ in 0..7 {
            fair.count(entitled, None, BUSY);
        }
        fair.count(rival, None, BUSY);
        fair.want(entitled, 1, true);
        fair.pass(Millis(1_000), true);
        fair.charge_all();
        let late = fair.add(EQUAL);
        fair.want(late, 1, true);
        assert_eq!((virtual_millis(&fair, entitled), virtual_millis(&fair, rival)), (7_000, 1_000));
        assert_eq!((virtual_millis(&fair, late), fair.next()), (1_000, Some(late)));
    }

    /// One holds a connection for long and waits for nothing; another has all the rest and would like more.
    #[test]
    fn who_waits_for_nothing_holds_back_nobodys_line() {
        let mut fair = with_cap(10);
        let (lazy, eager, late) = (fair.add(EQUAL), fair.add(EQUAL), fair.add(EQUAL));
        fair.count(lazy, None, BUSY);
        (0..9).for_each(|_| fair.count(eager, None, BUSY));
        fair.want(eager, 1, true);
        fair.pass(Millis(10_000), true);
        fair.charge_all();
        fair.want(late, 1, true);
        assert_eq!(virtual_millis(&fair, late), virtual_millis(&fair, eager));
        fair.want(lazy, 1, true);
        assert_eq!(
            virtual_millis(&fair, lazy),
            virtual_millis(&fair, eager),
            "nor does it become one that was kept waiting"
        );
    }

    #[test]
    fn a_dial_in_between_does_not_cost_a_waiting_tenant_its_turn_and_a_hanging_one_buys_no_monopoly() {
        for (dial_takes, lag) in [(300, 300), (30_000, MOST_BEHIND)] {
            let mut fair = with_cap(10);
            let (slow, rival) = (fair.add(EQUAL), fair.add(EQUAL));
            fair.want(slow, 1, true);
            fair.want(rival, 1, true);
            fair.count(rival, None, BUSY);
            fair.want(slow, 0, true);
            fair.pass(Millis(dial_takes), true);
            fair.charge_all();
            fair.want(slow, 1, true);
            assert_eq!(virtual_millis(&fair, rival) - virtual_millis(&fair, slow), lag);
        }
    }

    #[test]
    fn a_permit_moves_past_a_quantum_of_lag_and_not_from_a_floor() {
        let mut fair = with_cap(100);
        let own = fair.add(Budget { floor: 1, ..EQUAL });
        let other = fair.add(EQUAL);
        for _ in 0..2 {
            fair.count(own, None, BUSY);
        }
        fair.want(other, 1, true);
        fair.pass(Millis(QUANTUM / 2), true);
        assert!(!fair.must_yield(own, 0), "exactly a quantum is not past it");
        fair.pass(Millis(QUANTUM / 2 + 1), true);
        assert!(fair.must_yield(own, 0));
        assert!(!fair.must_yield(own, 1), "one is on its way already");
        fair.count(own, BUSY, None);
        assert!(!fair.must_yield(own, 0), "at its floor it keeps what it has");
    }

    #[test]
    fn promises_that_do_not_fit_are_kept_in_proportion() {
        let mut fair = with_cap(4);
        let (large, small) = (fair.add(Budget { floor: 6, ..EQUAL }), fair.add(Budget { floor: 2, ..EQUAL }));
        for _ in 0..4 {
            fair.count(large, None, BUSY);
        }
        fair.want(small, 2, true);
        assert!(fair.is_overpromised() && fair.owes_floor(0));
        assert!(fair.must_yield(large, 0), "three of four are its part");
        fair.count(large, BUSY, None);
        assert!(!fair.must_yield(large, 0));
        fair.set_cap(8);
        assert_eq!(fair.surplus(large), (0, 0), "there is room for everybody again");
    }

    /// One permit too few for four floors of one: nobody's floor is worth nothing, and the fourth is not left out.
    #[test]
    fn floors_that_just_do_not_fit_still_come_before_everybody_else() {
        let mut fair = with_cap(3);
        let entitled = [(); 4].map(|()| fair.add(Budget { floor: 1, ..EQUAL }));
        let greedy = fair.add(EQUAL);
        fair.count(greedy, None, BUSY);
        fair.want(greedy, 9, true);
        fair.count(entitled[0], None, BUSY);
        fair.count(entitled[1], None, BUSY);
        assert!(!fair.must_yield(entitled[0], 0), "to somebody who is above its floor");
        fair.want(entitled[2], 1, true);
        assert_eq!(fair.next(), Some(entitled[2]));
        assert!(fair.owes_floor(0) && fair.must_yield(greedy, 0));
        fair.count(greedy, BUSY, None);
        fair.count(entitled[2], None, BUSY);
        fair.want(entitled[2], 0, false);
        fair.want(entitled[3], 1, true);
        assert!(!fair.must_yield(entitled[0], 0), "as long as nobody is a quantum behind");
        fair.pass(Millis(QUANTUM + 1), true);
        assert!(fair.must_yield(entitled[0], 0), "the one that is left out has its turn");
    }
}
