//! Any demand, any failure, any change of budget, over the pure core that shares a server's connections.
//!
//! A seed makes a world: a cap, tenants (from one to thousands) with budgets and clients, and how PostgreSQL behaves.
//! Events happen in virtual time, and after every one of them the promises are checked against a second bookkeeping
//! that knows nothing of the core's own. The same seed gives the same trace. A seed that failed is printed, and belongs
//! into `KEPT`.
//!
//! `SIMULATION_SEEDS=from..to cargo test --release --test simulation -- --nocapture chosen` runs others than the 2,000.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, VecDeque},
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
};

use fastrand::Rng;
use tenantry_config::TenantId;
use tenantry_proxy::{
    budget::fair::{Budget, QUANTUM},
    clock::Millis,
    pool::{
        core::{Action, Actions, Checkout, Core, DialFailure, PoolId, PoolLimits, Rested, ServerLimits, SlotId},
        slot::{SlotEvent, SlotState},
        waiters::WaiterId,
    },
};

/// Seeds that once failed.
const KEPT: [u64; 0] = [];
const STEPS: usize = 1_500;
const MAX_CONNECTING: u32 = 4;
/// Longer than an idle connection is left to its own tenant, and longer than between two nudges.
const IDLE_LIMIT: u64 = 16;

fn run_all(seeds: Range<u64>) {
    let (mut steps, mut served, mut moved) = (0, 0, 0);
    for seed in seeds.clone() {
        let outcome = run(seed);
        steps += outcome.steps;
        served += outcome.served;
        moved += outcome.closed;
    }
    println!("seeds {seeds:?}: {steps} steps, {served} clients served, {moved} connections closed, 0 violations");
}

#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    steps: u64,
    served: u64,
    closed: u64,
    trace: u64,
}

fn run(seed: u64) -> Outcome {
    catch_unwind(AssertUnwindSafe(|| World::new(seed).run())).unwrap_or_else(|panic| {
        eprintln!("seed {seed} fails; keep it: KEPT = [{seed}]; alone: SIMULATION_SEEDS={seed}..{}", seed + 1);
        resume_unwind(panic)
    })
}

macro_rules! seeds {
    ($($name:ident: $seeds:expr;)*) => {$(
        #[test]
        fn $name() {
            run_all($seeds);
        }
    )*};
}

// Several, so that they run side by side.
seeds! {
    the_promises_hold_for_seeds_0_to_500: 0..500;
    the_promises_hold_for_seeds_500_to_1000: 500..1_000;
    the_promises_hold_for_seeds_1000_to_1500: 1_000..1_500;
    the_promises_hold_for_seeds_1500_to_2000: 1_500..2_000;
}

#[test]
fn seeds_that_once_failed_hold() {
    for seed in KEPT {
        run(seed);
    }
}

#[test]
fn chosen_seeds_hold() {
    let Ok(chosen) = std::env::var("SIMULATION_SEEDS") else { return };
    let (from, to) = chosen.split_once("..").expect("SIMULATION_SEEDS=from..to");
    run_all(from.parse().expect("a number")..to.parse().expect("a number"));
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in [1, 7, 42, 1_000_003] {
        assert_eq!(run(seed), run(seed));
    }
    assert_ne!(run(1).trace, run(2).trace);
}

/// One tenant keeps every connection busy and has more clients waiting; another has one client. Without a floor, and
/// with the same weight, the one must not wait for longer than the other's quantum and a connect.
#[test]
fn a_greedy_tenant_does_not_starve_a_small_one() {
    let mut world = World::new(0);
    (world.calm, world.cap, world.most, world.hold, world.think, world.connect) = (true, 4, 4, 50, 0, 5);
    world.core = Core::new(limits(4));
    world.events.clear();
    world.tenants.clear();
    world.pools.clear();
    world.clients.clear();
    for (n, clients) in [40, 1].into_iter().enumerate() {
        let name = TenantId::parse(&format!("t{n}")).expect("a name");
        let budget = Budget { floor: 0, ceiling: u32::MAX, weight: 1 };
        let key = world.core.tenant(&name, budget, Millis(1));
        let limits = PoolLimits {
            size: 10,
            min_size: 0,
            max_waiters: 100,
            query_wait_timeout: u64::MAX,
            round_robin: false,
            lifetime: 3_600_000,
            idle_timeout: 600_000,
            check_delay: 600_000,
        };
        let id = world.core.add_pool(key, limits, true);
        world.tenants.push(Tenant { name, budget, held: 0, most: u32::MAX, waits_since: None });
        world.pools.push(Pool { id, tenant: n, limits, queue: VecDeque::new(), troubled: false });
        for _ in 0..clients {
            world.clients.push(Client { pool: n, doing: Doing::Thinking });
            world.later(n as u64 * 1_000, Event::Ask(world.clients.len() - 1));
        }
    }
    world.later(0, Event::Tick);
    let mut longest = 0;
    while world.now < 60_000 {
        world.step();
        longest = longest.max(world.tenants[1].waits_since.map_or(0, |since| world.now - since));
    }
    assert!((1..=QUANTUM + world.hold * 2).contains(&longest), "the small one waited for {longest} ms");
}

/// What happens next, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Ask(usize),
    Finish(usize),
    GiveUp(usize, WaiterId),
    Dialed(SlotId),
    Closed(SlotId),
    Checked(SlotId),
    Tick,
    Nudge,
    Change,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Thinking,
    Waiting(WaiterId),
    Holding(SlotId),
    Gone,
}

struct Client {
    pool: usize,
    doing: Doing,
}

struct Pool {
    id: PoolId,
    tenant: usize,
    limits: PoolLimits,
    queue: VecDeque<WaiterId>,
    /// Its last dial failed: it pauses, and nothing can be said of it.
    troubled: bool,
}

struct Tenant {
    name: TenantId,
    budget: Budget,
    held: u32,
    /// The most it may hold after its ceiling was lowered.
    most: u32,
    /// Since when it waits without having been served.
    waits_since: Option<u64>,
}

struct Slot {
    pool: usize,
    state: SlotState,
    since: u64,
}

struct World {
    rng: Rng,
    core: Core,
    now: u64,
    sequence: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    tenants: Vec<Tenant>,
    pools: Vec<Pool>,
    clients: Vec<Client>,
    slots: BTreeMap<SlotId, Slot>,
    waiters: BTreeMap<WaiterId, usize>,
    /// Nothing fails and nothing is changed: then promises about time hold, too.
    calm: bool,
    down_until: u64,
    full_until: u64,
    cap: u32,
    most: u32,
    hold: u64,
    think: u64,
    connect: u64,
    ending: bool,
    nudging: bool,
    outcome: Outcome,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let calm = rng.bool();
        let cap = if rng.u8(..4) == 0 { rng.u32(1..=4) } else { rng.u32(1..=60) };
        let count = match rng.u8(..20) {
            0 => rng.usize(500..3_000),
            1..=4 => rng.usize(30..200),
            _ => rng.usize(1..12),
        };
        let mut world = Self {
            core: Core::new(limits(cap)),
            now: 1,
            sequence: 0,
            events: BinaryHeap::new(),
            tenants: Vec::new(),
            pools: Vec::new(),
            clients: Vec::new(),
            slots: BTreeMap::new(),
            waiters: BTreeMap::new(),
            calm,
            down_until: 0,
            full_until: 0,
            cap,
            most: cap,
            hold: *rng.choice(&[2, 20, 200, 2_000]).expect("one"),
            think: *rng.choice(&[0, 1, 50, 3_000]).expect("one"),
            connect: rng.u64(1..30),
            ending: false,
            nudging: false,
            outcome: Outcome { steps: 0, served: 0, closed: 0, trace: 0xcbf2_9ce4_8422_2325 },
            rng,
        };
        let mut floors_left = cap;
        for n in 0..count {
            world.add_tenant(n, &mut floors_left);
        }
        world.later(0, Event::Tick);
        if !calm {
            world.later(50, Event::Change);
        }
        world
    }

    fn budget(&mut self, floors_left: &mut u32) -> Budget {
        let floor = if self.rng.u8(..3) == 0 { self.rng.u32(0..=*floors_left) / 2 } else { 0 };
        *floors_left -= floor;
        let ceiling = if self.rng.u8(..4) == 0 { floor.max(1) + self.rng.u32(..10) } else { u32::MAX };
        Budget { floor, ceiling, weight: *self.rng.choice(&[1, 1, 1, 2, 4, 10]).expect("one") }
    }

    fn add_tenant(&mut self, n: usize, floors_left: &mut u32) {
        let name = TenantId::parse(&format!("t{n}")).expect("a name");
        let budget = self.budget(floors_left);
        let key = self.core.tenant(&name, budget, Millis(self.now));
        self.tenants.push(Tenant { name, budget, held: 0, most: budget.ceiling, waits_since: None });
        for _ in 0..=usize::from(self.rng.u8(..5) == 0) {
            let limits = PoolLimits {
                size: self.rng.u32(1..30),
                min_size: 0,
                max_waiters: if self.calm { 10_000 } else { self.rng.usize(1..50) },
                query_wait_timeout: if self.calm { u64::MAX } else { self.rng.u64(100..20_000) },
                round_robin: self.rng.bool(),
                lifetime: self.rng.u64(1_000..100_000),
                idle_timeout: self.rng.u64(100..100_000),
                check_delay: self.rng.u64(100..100_000),
            };
            let id = self.core.add_pool(key, limits, true);
            self.pools.push(Pool { id, tenant: n, limits, queue: VecDeque::new(), troubled: false });
            // Skewed: some have most of the clients.
            let clients = if self.rng.u8(..5) == 0 { self.rng.usize(0..40) } else { self.rng.usize(0..3) };
            for _ in 0..clients {
                self.clients.push(Client { pool: self.pools.len() - 1, doing: Doing::Thinking });
                let at = self.rng.u64(0..=self.think);
                self.later(at, Event::Ask(self.clients.len() - 1));
            }
        }
    }

    fn later(&mut self, delay: u64, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((self.now + delay, self.sequence, event)));
    }

    fn run(mut self) -> Outcome {
        while self.outcome.steps < STEPS as u64 {
            self.step();
        }
        self.end();
        self.outcome
    }

    /// Nobody asks any more and nothing fails: whoever waits must be served or told no, and what was lent come back.
    fn end(&mut self) {
        self.ending = true;
        self.down_until = 0;
        self.full_until = 0;
        let deadline = self.now + self.patience() * 4 + 60_000;
        while !self.waiters.is_empty() {
            assert!(
                self.now < deadline,
                "a lost wake-up: {} still wait at the end: {:?}",
                self.waiters.len(),
                self.core.explain(
                    self.pools[self.clients[*self.waiters.values().next().expect("one")].pool].id,
                    None,
                    Millis(self.now)
                )
            );
            self.step();
        }
    }

    /// The longest that a tenant may wait for its next connection while nothing fails.
    fn patience(&self) -> u64 {
        let wanting: u64 = self
            .clients
            .iter()
            .map(|c| self.pools[c.pool].tenant)
            .collect::<std::collections::BTreeSet<_>>()
            .iter()
            .map(|t| u64::from(self.tenants[*t].budget.weight))
            .sum();
        let tenants = self.tenants.len() as u64;
        let each = self.hold * 2 + self.connect * 2 + 20;
        let moves = tenants * each / u64::from(self.cap.min(MAX_CONNECTING));
        2 * (wanting * 10 * QUANTUM / u64::from(self.cap) + moves + self.hold * 4 + 1_000)
    }

    fn step(&mut self) {
        let Some(Reverse((at, _, event))) = self.events.pop() else { panic!("nothing happens any more") };
        self.now = at;
        self.outcome.steps += 1;
        self.note(at);
        let mut actions = Actions::new();
        match event {
            Event::Ask(client) => self.ask(client, &mut actions),
            Event::Finish(client) => self.finish(client, &mut actions),
            Event::GiveUp(client, waiter) => self.give_up(client, waiter),
            Event::Dialed(slot) => self.dialed(slot, &mut actions),
            Event::Closed(slot) => self.closed(slot, &mut actions),
            Event::Checked(slot) => self.release(slot, &mut actions),
            Event::Tick => {
                self.core.tick(Millis(self.now), &mut actions);
                self.later(100, Event::Tick);
                self.check_patience();
            }
            Event::Nudge => {
                self.nudging = false;
                self.core.nudge(Millis(self.now), &mut actions);
            }
            Event::Change => self.change(&mut actions),
        }
        self.act(&actions);
        if self.core.is_contended() && !self.nudging {
            self.nudging = true;
            self.later(10, Event::Nudge);
        }
        self.check(event);
    }

    /// FNV-1a: what is compared between two runs of one seed.
    fn note(&mut self, what: u64) {
        self.outcome.trace = (self.outcome.trace ^ what).wrapping_mul(0x0000_0100_0000_01b3);
    }

    fn ask(&mut self, client: usize, actions: &mut Actions) {
        if self.ending || self.clients[client].doing != Doing::Thinking {
            return;
        }
        let pool = self.clients[client].pool;
        match self.core.checkout(self.pools[pool].id, Millis(self.now), actions) {
            Checkout::Ready(slot) => {
                self.set(slot, SlotState::Active);
                self.holds(client, slot);
            }
            Checkout::Queued(waiter) => {
                self.note(waiter.0);
                self.clients[client].doing = Doing::Waiting(waiter);
                self.waiters.insert(waiter, client);
                self.pools[pool].queue.push_back(waiter);
                let tenant = &mut self.tenants[self.pools[pool].tenant];
                tenant.waits_since.get_or_insert(self.now);
                if !self.calm && self.rng.u8(..10) == 0 {
                    let delay = self.rng.u64(..500);
                    self.later(delay, Event::GiveUp(client, waiter));
                }
            }
            Checkout::Refused(_) => self.thinks(client),
        }
    }

    fn holds(&mut self, client: usize, slot: SlotId) {
        self.outcome.served += 1;
        self.note(slot.0 as u64);
        self.clients[client].doing = Doing::Holding(slot);
        let time = self.rng.u64(1..=self.hold);
        self.later(time, Event::Finish(client));
    }

    fn thinks(&mut self, client: usize) {
        self.clients[client].doing = Doing::Thinking;
        let time = self.rng.u64(0..=self.think) + u64::from(!self.calm);
        self.later(time, Event::Ask(client));
    }

    fn finish(&mut self, client: usize, actions: &mut Actions) {
        let Doing::Holding(slot) = self.clients[client].doing else { return };
        self.thinks(client);
        if !self.calm && self.rng.u8(..30) == 0 {
            self.core.change(slot, SlotEvent::Close, Millis(self.now), actions);
            self.closing(slot);
            return;
        }
        self.release(slot, actions);
    }

    fn release(&mut self, slot: SlotId, actions: &mut Actions) {
        if !self.slots.contains_key(&slot) {
            return;
        }
        let owed = self.owes_a_floor(slot);
        let rested = self.core.release(slot, Millis(self.now), actions);
        assert!(!owed || rested == Rested::Close, "somebody below its floor waits, and {slot:?} is {rested:?}");
        self.rested(slot, rested);
    }

    /// Does a tenant below its floor wait for a permit that is not on its way, and could this one be it?
    fn owes_a_floor(&self, slot: SlotId) -> bool {
        let own = self.pools[self.slots[&slot].pool].tenant;
        let closing = self.count(SlotState::Closing);
        if !self.calm
            || self.core.permits().0 < self.cap
            || closing + self.count(SlotState::Connecting) >= MAX_CONNECTING
        {
            return false;
        }
        if self.kept(own) <= self.tenants[own].budget.floor {
            return false;
        }
        let mut owed = 0;
        for (n, tenant) in self.tenants.iter().enumerate() {
            if n != own && tenant.budget.floor > 0 && tenant.waits_since.is_some() && self.kept(n) < tenant.budget.floor
            {
                owed += self.wants_of(n).min(tenant.budget.floor - self.kept(n));
            }
        }
        owed > closing
    }

    /// What a tenant has, without what is closing.
    fn kept(&self, tenant: usize) -> u32 {
        let own = self.slots.values().filter(|slot| self.pools[slot.pool].tenant == tenant);
        own.filter(|slot| slot.state != SlotState::Closing).count() as u32
    }

    /// How many connections a tenant's clients could use at once, apart from the cap.
    fn wants_of(&self, tenant: usize) -> u32 {
        if self.tenants[tenant].waits_since.is_none() {
            return 0;
        }
        let pools = self.pools.iter().enumerate().filter(|(_, pool)| pool.tenant == tenant && !pool.queue.is_empty());
        let wants: u32 = pools.map(|(n, pool)| self.wants(n, pool)).sum();
        // Nor may one tenant.
        let own = self.slots.values().filter(|slot| self.pools[slot.pool].tenant == tenant);
        let dials = own.filter(|slot| slot.state == SlotState::Connecting).count() as u32;
        let wants = wants.min((MAX_CONNECTING - 1).saturating_sub(dials));
        wants.min(self.tenants[tenant].budget.ceiling.saturating_sub(self.tenants[tenant].held))
    }

    fn wants(&self, n: usize, pool: &Pool) -> u32 {
        let own = |state| self.slots.values().filter(|slot| slot.pool == n && slot.state == state).count() as u32;
        let size = self.slots.values().filter(|slot| slot.pool == n && slot.state != SlotState::Closing).count() as u32;
        let waiting = pool.queue.len() as u32;
        // One pool may not take all dials.
        let room =
            pool.limits.size.saturating_sub(size).min((MAX_CONNECTING - 1).saturating_sub(own(SlotState::Connecting)));
        waiting.saturating_sub(own(SlotState::Connecting)).min(room)
    }

    fn rested(&mut self, slot: SlotId, rested: Rested) {
        match rested {
            Rested::Idle => self.set(slot, SlotState::Idle),
            Rested::Close => self.closing(slot),
            Rested::Hand(waiter) => {
                let pool = self.slots[&slot].pool;
                assert_eq!(self.pools[pool].queue.pop_front(), Some(waiter), "not the first of its pool");
                let client = self.waiters.remove(&waiter).expect("a waiter");
                self.set(slot, SlotState::Active);
                self.served(self.pools[pool].tenant);
                self.holds(client, slot);
            }
        }
    }

    fn served(&mut self, tenant: usize) {
        let waits = self.pools.iter().any(|pool| pool.tenant == tenant && !pool.queue.is_empty());
        let tenant = &mut self.tenants[tenant];
        assert!(tenant.waits_since.is_some(), "it waited");
        tenant.waits_since = waits.then_some(self.now);
    }

    /// While nothing fails nobody starves.
    fn check_patience(&self) {
        let patience = self.patience();
        for tenant in self.tenants.iter().filter(|_| self.calm && !self.ending) {
            let waited = tenant.waits_since.map_or(0, |since| self.now - since);
            assert!(waited <= patience, "{:?} is kept waiting for {waited} ms; the bound is {patience}", tenant.name);
        }
    }

    fn give_up(&mut self, client: usize, waiter: WaiterId) {
        if self.clients[client].doing != Doing::Waiting(waiter) {
            return;
        }
        let pool = self.clients[client].pool;
        assert!(self.core.leave_queue(self.pools[pool].id, waiter, Millis(self.now)));
        self.left(waiter);
        self.clients[client].doing = Doing::Gone;
    }

    fn left(&mut self, waiter: WaiterId) -> usize {
        let client = self.waiters.remove(&waiter).expect("a waiter");
        let pool = self.clients[client].pool;
        self.pools[pool].queue.retain(|w| *w != waiter);
        let tenant = self.pools[pool].tenant;
        if !self.pools.iter().any(|pool| pool.tenant == tenant && !pool.queue.is_empty()) {
            self.tenants[tenant].waits_since = None;
        }
        client
    }

    fn dialed(&mut self, slot: SlotId, actions: &mut Actions) {
        let pool = self.slots[&slot].pool;
        let failure = if self.now < self.down_until {
            Some(DialFailure::ServerDown)
        } else if self.now < self.full_until {
            Some(DialFailure::ServerFull)
        } else if !self.calm && !self.ending && self.rng.u8(..20) == 0 {
            self.rng.choice([DialFailure::Later, DialFailure::TenantFull, DialFailure::Refused])
        } else {
            None
        };
        let Some(failure) = failure else {
            self.pools[pool].troubled = false;
            let rested = self.core.dialed(slot, Millis(self.now), actions);
            self.rested(slot, rested);
            return;
        };
        self.pools[pool].troubled = true;
        self.gone(slot);
        self.core.dial_failed(slot, failure, Millis(self.now), actions);
    }

    fn closed(&mut self, slot: SlotId, actions: &mut Actions) {
        self.gone(slot);
        self.core.closed(slot, Millis(self.now), actions);
    }

    fn gone(&mut self, slot: SlotId) {
        let slot = self.slots.remove(&slot).expect("a slot");
        self.tenants[self.pools[slot.pool].tenant].held -= 1;
    }

    fn set(&mut self, slot: SlotId, state: SlotState) {
        let slot = self.slots.get_mut(&slot).expect("a slot");
        slot.state = state;
        slot.since = self.now;
    }

    fn closing(&mut self, slot: SlotId) {
        self.outcome.closed += 1;
        self.set(slot, SlotState::Closing);
        let time = self.rng.u64(0..=5);
        self.later(time, Event::Closed(slot));
    }

    fn change(&mut self, actions: &mut Actions) {
        if self.ending {
            return;
        }
        let wait = self.rng.u64(1..400);
        self.later(wait, Event::Change);
        let length = self.rng.u64(1..2_000);
        match self.rng.u8(..5) {
            0 => self.down_until = self.now + length,
            1 => self.full_until = self.now + length,
            2 => {
                self.cap = self.rng.u32(1..60);
                self.core.set_limits(limits(self.cap));
            }
            3 => {
                let n = self.rng.usize(..self.tenants.len());
                let budget = self.budget(&mut 3);
                self.core.set_budget(&self.tenants[n].name, budget, Millis(self.now));
                let tenant = &mut self.tenants[n];
                tenant.budget = budget;
                tenant.most = tenant.held.max(budget.ceiling);
            }
            _ => {
                let n = self.rng.usize(..self.pools.len());
                self.core.reconnect(self.pools[n].id, Millis(self.now), actions);
            }
        }
    }

    fn act(&mut self, actions: &Actions) {
        for action in actions {
            match *action {
                Action::Dial { slot, pool } => {
                    let pool = self.pools.iter().position(|p| p.id == pool).expect("a pool");
                    let state = SlotState::Connecting;
                    assert!(self.slots.insert(slot, Slot { pool, state, since: self.now }).is_none(), "used twice");
                    self.tenants[self.pools[pool].tenant].held += 1;
                    let time = self.rng.u64(1..=self.connect);
                    self.later(time, Event::Dialed(slot));
                }
                Action::Close { slot } => self.closing(slot),
                Action::Check { slot } => {
                    self.set(slot, SlotState::Checking);
                    self.later(1, Event::Checked(slot));
                }
                Action::Refuse { waiter, .. } => {
                    assert!(!self.calm, "nobody is refused while nothing fails");
                    let client = self.left(waiter);
                    self.thinks(client);
                }
            }
        }
    }

    fn count(&self, state: SlotState) -> u32 {
        self.slots.values().filter(|slot| slot.state == state).count() as u32
    }

    /// The promises, after every step.
    fn check(&mut self, event: Event) {
        let (held, cap) = self.core.permits();
        assert_eq!(held as usize, self.slots.len(), "a permit for each connection that PostgreSQL counts");
        assert!(cap <= self.cap, "the cap is {cap}, and {} was set", self.cap);
        self.most = self.most.min(held.max(self.cap)).max(self.cap.min(held.max(cap)));
        assert!(held <= self.most.max(cap), "{held} permits, the cap is {cap}");
        for tenant in &mut self.tenants {
            assert!(tenant.held <= tenant.most, "{:?} holds {} and may {}", tenant.name, tenant.held, tenant.most);
            tenant.most = tenant.most.min(tenant.held.max(tenant.budget.ceiling));
        }
        for slot in self.slots.values().filter(|slot| slot.state == SlotState::Idle) {
            assert!(self.pools[slot.pool].queue.is_empty(), "idle beside a waiter of its own pool");
        }
        if self.calm {
            self.check_work_conserving(event);
        }
    }

    /// What is free, or idle beyond a floor for a while, is nobody's as long as nobody could use it.
    fn check_work_conserving(&self, event: Event) {
        let (held, cap) = self.core.permits();
        let (connecting, closing) = (self.count(SlotState::Connecting), self.count(SlotState::Closing));
        if connecting + closing >= MAX_CONNECTING {
            return;
        }
        let wanted = || -> u32 { (0..self.tenants.len()).map(|n| self.wants_of(n)).sum() };
        if held < cap {
            assert_eq!(wanted(), 0, "{held} of {cap} permits are used, and somebody waits for one");
        } else if matches!(event, Event::Tick | Event::Nudge) {
            let spare = self.slots.values().find(|slot| {
                let tenant = self.pools[slot.pool].tenant;
                slot.state == SlotState::Idle
                    && self.now - slot.since > IDLE_LIMIT
                    && self.kept(tenant) > self.tenants[tenant].budget.floor
            });
            if let Some(spare) = spare {
                let idle = self.now - spare.since;
                assert!(wanted() <= closing, "a connection is idle for {idle} ms, and somebody waits for its permit");
            }
        }
    }
}

fn limits(cap: u32) -> ServerLimits {
    ServerLimits { cap: Some(cap), reserve: 0, max_connecting: MAX_CONNECTING, login_retry: 50 }
}
