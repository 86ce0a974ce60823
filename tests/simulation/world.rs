//! What is around the core: clients, PostgreSQL, an operator; and a bookkeeping of its own.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque},
    ops::Range,
};

use fastrand::Rng;
use tenantry_config::TenantId;
use tenantry_proxy::{
    budget::{cap::Room, fair::Budget},
    clock::Millis,
    pool::{
        core::Core,
        decision::{
            Action, Actions, Checkout, DialFailure, Gate, PoolId, PoolLimits, Refusal, Rested, ServerLimits, SlotId,
        },
        slot::{SlotEvent, SlotState},
        waiters::WaiterId,
    },
};

/// Fewest steps of a world; a calm one goes on until everybody's patience could have ended several times.
const STEPS: u64 = 1_500;
const MOST_STEPS: u64 = 15_000;
/// A connection that has been closing for longer is lost: milliseconds.
const CLOSES_WITHIN: u64 = 1_000;
const LOGIN_RETRY: u64 = 50;
/// The longest pause after failures, and a tick until it is noticed.
pub const PAUSE: u64 = LOGIN_RETRY * 4 + 100;
/// The same after PostgreSQL had no room while it held no connection of ours.
const FULL_PAUSE: u64 = 5_000 + 100;

/// What may happen in a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Temper {
    /// Nothing fails and nothing is changed: promises about time hold, too.
    Calm,
    /// Settings, tenants and the connections of others come and go.
    Changing,
    /// And PostgreSQL fails in every way.
    Stormy,
}

/// What happens next, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    Ask(usize),
    Finish(usize),
    GiveUp(usize, WaiterId),
    Dialed(SlotId),
    Closed(SlotId),
    Checked(SlotId),
    Cancelled(SlotId),
    Cleaned(SlotId),
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

pub struct Pool {
    pub id: PoolId,
    pub tenant: usize,
    pub limits: PoolLimits,
    pub queue: VecDeque<(WaiterId, u64)>,
    pub counts: [u32; SlotState::ALL.len()],
    /// When its last dial failed, if none has succeeded since.
    pub failed: Option<u64>,
    /// Since when it waits without having been served.
    pub waits_since: Option<u64>,
    /// Its clients' numbers.
    pub clients: Range<usize>,
    /// Logins that came to nothing, and PostgreSQL has not closed its end.
    pub hanging: u32,
    retired: bool,
}

impl Pool {
    pub fn count(&self, state: SlotState) -> u32 {
        self.counts[state.index()]
    }

    /// Without what is closing.
    pub fn size(&self) -> u32 {
        self.counts.iter().sum::<u32>() - self.count(SlotState::Closing) - self.count(SlotState::Lingering)
    }
}

pub struct Tenant {
    pub name: TenantId,
    pub budget: Budget,
    pub held: u32,
    pub pools: Vec<usize>,
    pub waits_since: Option<u64>,
    pub gate: Gate,
    /// The longest time for which its clients hold a connection, and for which they do not ask again.
    pub hold: u64,
    think: u64,
    /// Milliseconds of connections, lent to its clients.
    service: u64,
}

pub struct Slot {
    pub pool: usize,
    pub state: SlotState,
    pub since: u64,
    pub dialed: u64,
    /// Since when nobody uses it; a check in between does not count.
    pub unused: u64,
    /// PostgreSQL took the login.
    logged_in: bool,
    /// It came to nothing.
    failed: bool,
}

/// What PostgreSQL told last of its room.
#[derive(Debug, Clone, Copy)]
pub struct Told {
    pub at: u64,
    /// Connections that are not ours.
    pub others: u32,
    /// Permits of ours that it did not count.
    pub uncounted: u32,
}

#[derive(Debug, PartialEq, Eq, Default)]
pub struct Outcome {
    pub steps: u64,
    pub served: u64,
    pub closed: u64,
    pub refused: u64,
    /// Calm worlds, and those of them that lasted for longer than their bound on starvation.
    pub calm: u64,
    pub patience_passed: u64,
    pub trace: u64,
}

pub struct World {
    rng: Rng,
    /// For what only newer worlds have (habits of each tenant, resets, cancels, gates, new names), so that nothing is drawn
    /// from the seed's own numbers; `None` in the others.
    newer: Option<Rng>,
    pub core: Core,
    pub now: u64,
    sequence: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    pub tenants: Vec<Tenant>,
    pub pools: Vec<Pool>,
    ids: BTreeMap<PoolId, usize>,
    clients: Vec<Client>,
    pub slots: BTreeMap<SlotId, Slot>,
    waiters: BTreeMap<WaiterId, usize>,
    /// Tenants with a queue.
    pub waiting: BTreeSet<usize>,
    pub temper: Temper,
    /// No client ever gives up, and no queue is ever full.
    patient: bool,
    pub limits: ServerLimits,
    /// PostgreSQL's, without what it reserves.
    pub most: u32,
    others: u32,
    pub told: Option<Told>,
    down_until: u64,
    /// No login has succeeded since one found nobody.
    pub down: bool,
    /// Until when the core may still be at odds with what was changed or what failed.
    pub unsettled_until: u64,
    pub hold: u64,
    pub think: u64,
    pub connect: u64,
    pub ending: bool,
    nudging: bool,
    pub last_held: u32,
    pub outcome: Outcome,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let temper = *rng.choice(&[Temper::Calm, Temper::Changing, Temper::Stormy]).expect("one");
        let cap = if rng.u8(..4) == 0 { rng.u32(1..=4) } else { rng.u32(1..=60) };
        let mut world = Self::plain(temper, cap);
        if rng.u8(..4) == 0 {
            world.most = rng.u32(10..70);
            world.limits = ServerLimits { cap: None, reserve: rng.u32(..6), ..world.limits };
        }
        world.limits.max_connecting = rng.u32(1..=6);
        world.patient = temper != Temper::Stormy || rng.bool();
        world.hold = *rng.choice(&[2, 20, 200, 2_000]).expect("one");
        world.think = *rng.choice(&[0, 1, 50, 3_000]).expect("one");
        world.connect = rng.u64(1..30);
        if seed % 5 == 3 {
            // Longer than the quantum, as a server does that is out of breath. (Not drawn: kept seeds stay what they were.)
            world.connect *= 17;
        }
        // Chosen so that the first seeds that were kept are older worlds, and stay what they were.
        world.newer = matches!(seed % 7, 1 | 2 | 3 | 5).then(|| Rng::with_seed(!seed));
        world.core = Core::new(world.limits);
        world.rng = rng;
        let count = match world.rng.u8(..40) {
            0 => world.rng.usize(500..3_000),
            1..=8 => world.rng.usize(30..200),
            _ => world.rng.usize(1..12),
        };
        let mut floors_left = world.limits.cap.unwrap_or(world.most - world.limits.reserve);
        for n in 0..count {
            world.add_tenant(n, &mut floors_left);
        }
        if temper != Temper::Calm {
            world.later(50, Event::Change);
        }
        world
    }

    /// Nobody in it yet.
    pub fn plain(temper: Temper, cap: u32) -> Self {
        let limits = ServerLimits { cap: Some(cap), reserve: 0, max_connecting: 4, login_retry: LOGIN_RETRY };
        let mut world = Self {
            rng: Rng::with_seed(0),
            newer: None,
            core: Core::new(limits),
            now: 1,
            sequence: 0,
            events: BinaryHeap::new(),
            tenants: Vec::new(),
            pools: Vec::new(),
            ids: BTreeMap::new(),
            clients: Vec::new(),
            slots: BTreeMap::new(),
            waiters: BTreeMap::new(),
            waiting: BTreeSet::new(),
            temper,
            patient: true,
            limits,
            most: 1_000,
            others: 0,
            told: None,
            down_until: 0,
            down: false,
            unsettled_until: 0,
            hold: 10,
            think: 10,
            connect: 10,
            ending: false,
            nudging: false,
            last_held: 0,
            outcome: Outcome { trace: 0xcbf2_9ce4_8422_2325, ..Outcome::default() },
        };
        world.later(0, Event::Tick);
        world
    }

    fn budget(&mut self, floors_left: &mut u32) -> Budget {
        let floor = if self.rng.u8(..3) == 0 { self.rng.u32(0..=*floors_left) / 2 } else { 0 };
        *floors_left -= floor;
        let ceiling = if self.rng.u8(..4) == 0 { floor.max(1) + self.rng.u32(..10) } else { u32::MAX };
        Budget { floor, ceiling, weight: *self.rng.choice(&[1, 1, 1, 2, 4, 10]).expect("one") }
    }

    fn pool_limits(&mut self) -> PoolLimits {
        let size = self.rng.u32(1..30);
        PoolLimits {
            size,
            min_size: if self.rng.u8(..8) == 0 { self.rng.u32(1..3).min(size) } else { 0 },
            max_waiters: if self.patient { 100_000 } else { self.rng.usize(1..50) },
            query_wait_timeout: if self.patient { u64::MAX } else { self.rng.u64(100..20_000) },
            round_robin: self.rng.bool(),
            lifetime: self.rng.u64(1_000..100_000),
            idle_timeout: self.rng.u64(100..100_000),
            check_delay: self.rng.u64(100..100_000),
        }
    }

    fn add_tenant(&mut self, n: usize, floors_left: &mut u32) {
        let budget = self.budget(floors_left);
        let tenant = self.enter_tenant(n, budget);
        for _ in 0..=usize::from(self.rng.u8(..5) == 0) {
            let limits = self.pool_limits();
            // Skewed: some have most of the clients.
            let clients = if self.rng.u8(..5) == 0 { self.rng.usize(0..40) } else { self.rng.usize(0..3) };
            self.add_pool(tenant, limits, clients);
        }
    }

    fn enter_tenant(&mut self, n: usize, budget: Budget) -> usize {
        let name = TenantId::parse(&format!("t{n}")).expect("a name");
        let (mut hold, mut think) = (self.hold, self.think);
        if let Some(rng) = &mut self.newer {
            // Not everybody is alike.
            hold = *rng.choice(&[hold, 2, 20, 200]).expect("one");
            think = *rng.choice(&[think, 0, 50, 1_000]).expect("one");
        }
        let (pools, gate) = (Vec::new(), Gate::Open);
        self.tenants.push(Tenant { name, budget, held: 0, pools, waits_since: None, gate, hold, think, service: 0 });
        self.tenants.len() - 1
    }

    fn add_pool(&mut self, tenant: usize, limits: PoolLimits, clients: usize) {
        let Tenant { name, budget, gate, think, .. } = &self.tenants[tenant];
        let think = *think;
        let key = self.core.tenant(name, *budget, Millis(self.now));
        let id = self.core.add_pool(key, limits, true, *gate);
        let (queue, counts) = (VecDeque::new(), [0; SlotState::ALL.len()]);
        let n = self.pools.len();
        let own = self.clients.len()..self.clients.len() + clients;
        let (failed, waits_since, hanging, retired) = (None, None, 0, false);
        let pool = Pool { id, tenant, limits, queue, counts, failed, waits_since, clients: own, hanging, retired };
        self.pools.push(pool);
        assert!(self.ids.insert(id, n).is_none(), "a pool's number is used again");
        self.tenants[tenant].pools.push(n);
        for _ in 0..clients {
            self.clients.push(Client { pool: n, doing: Doing::Thinking });
            let at = self.rng.u64(0..=think);
            self.later(at, Event::Ask(self.clients.len() - 1));
        }
    }

    /// A tenant whose clients always want more; its number.
    pub fn add_saturated(&mut self, budget: Budget, clients: usize) -> usize {
        let tenant = self.enter_tenant(self.tenants.len(), budget);
        let limits = PoolLimits {
            size: 1_000,
            min_size: 0,
            max_waiters: 100_000,
            query_wait_timeout: u64::MAX,
            round_robin: false,
            lifetime: 3_600_000,
            idle_timeout: 600_000,
            check_delay: 600_000,
        };
        self.add_pool(tenant, limits, clients);
        tenant
    }

    pub fn waits_for(&self, tenant: usize) -> u64 {
        self.tenants[tenant].waits_since.map_or(0, |since| self.now - since)
    }

    pub fn service_of(&self, tenant: usize) -> u64 {
        self.tenants[tenant].service
    }

    fn later(&mut self, delay: u64, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((self.now + delay, self.sequence, event)));
    }

    pub fn run(mut self) -> Outcome {
        let patience = self.patience();
        let lasts = |world: &Self| world.temper == Temper::Calm && world.now < patience * 3;
        while self.outcome.steps < STEPS || (lasts(&self) && self.outcome.steps < MOST_STEPS) {
            self.step();
        }
        self.outcome.calm = u64::from(self.temper == Temper::Calm);
        self.outcome.patience_passed = u64::from(self.temper == Temper::Calm && self.now > patience);
        self.end();
        self.outcome
    }

    /// Nobody asks any more and nothing fails: whoever waits must be served, or told no when its time is up; what was
    /// lent comes back; and when all pools are gone, nothing is held any more.
    fn end(&mut self) {
        (self.ending, self.down_until, self.others) = (true, 0, 0);
        self.unsettle(FULL_PAUSE + PAUSE);
        let mut actions = Actions::new();
        (0..self.tenants.len()).for_each(|tenant| self.set_gate(tenant, Gate::Open, &mut actions));
        self.act(&actions);
        let deadline = self.now + self.patience() * 4 + 60_000;
        let in_use = [SlotState::Active, SlotState::Resetting, SlotState::CancelPending];
        let lent = |world: &Self| world.slots.values().any(|slot| in_use.contains(&slot.state));
        while !self.waiters.is_empty() || lent(self) {
            if self.now > deadline {
                let first = self.waiters.values().next().map(|client| self.pools[self.clients[*client].pool].id);
                let why = first.map(|pool| self.core.explain(pool, None, Millis(self.now)));
                panic!("a lost wake-up: {} still wait at the end: {why:?}", self.waiters.len());
            }
            self.step();
        }
        let mut actions = Actions::new();
        for n in 0..self.pools.len() {
            self.retire(n, &mut actions);
        }
        self.act(&actions);
        while !self.slots.is_empty() {
            assert!(self.now < deadline + 60_000, "{} connections are kept for nobody", self.slots.len());
            self.step();
        }
        assert_eq!(self.core.permits().0, 0, "every permit comes back");
    }

    pub fn step(&mut self) {
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
            Event::Closed(slot) => {
                self.gone(slot);
                self.core.closed(slot, Millis(self.now), &mut actions);
            }
            Event::Checked(slot) => {
                let room = self.tell_room();
                let rested = self.core.checked(slot, Some(room), Millis(self.now), &mut actions);
                self.rested(slot, rested);
            }
            Event::Cancelled(slot) => self.clean(slot, &mut actions),
            Event::Cleaned(slot) => self.release(slot, &mut actions),
            Event::Tick => {
                self.give_up_on_closing();
                self.core.tick(Millis(self.now), &mut actions);
                self.later(100, Event::Tick);
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
        self.check(event, &actions);
    }

    /// FNV-1a: what is compared between two runs of one seed.
    fn note(&mut self, what: u64) {
        self.outcome.trace = (self.outcome.trace ^ what).wrapping_mul(0x0000_0100_0000_01b3);
    }

    fn unsettle(&mut self, time: u64) {
        self.unsettled_until = self.unsettled_until.max(self.now + time);
    }

    /// What PostgreSQL tells of itself.
    fn room(&self) -> Room {
        let ours = self.slots.values().filter(|slot| slot.logged_in).count() as u32;
        Room { slots: self.most, connections: ours + self.others }
    }

    fn tell_room(&mut self) -> Room {
        let uncounted = self.slots.values().filter(|slot| !slot.logged_in).count() as u32;
        self.told = Some(Told { at: self.now, others: self.others, uncounted });
        self.room()
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
                assert!(self.pools[pool].queue.len() < self.pools[pool].limits.max_waiters, "the queue was full");
                self.clients[client].doing = Doing::Waiting(waiter);
                self.waiters.insert(waiter, client);
                let tenant = self.pools[pool].tenant;
                self.pools[pool].queue.push_back((waiter, self.now));
                self.pools[pool].waits_since.get_or_insert(self.now);
                self.tenants[tenant].waits_since.get_or_insert(self.now);
                self.waiting.insert(tenant);
                if self.temper == Temper::Stormy && self.rng.u8(..10) == 0 {
                    let delay = self.rng.u64(..500);
                    self.later(delay, Event::GiveUp(client, waiter));
                }
            }
            Checkout::Refused(refusal) => {
                self.outcome.refused += 1;
                let full = self.pools[pool].queue.len() >= self.pools[pool].limits.max_waiters;
                match (refusal, self.gate_of(pool)) {
                    (Refusal::Shut, gate) => assert_eq!(gate, Gate::Shut),
                    (refusal, gate) => {
                        assert!(full && gate != Gate::Shut && matches!(refusal, Refusal::QueueFull(_)), "{refusal:?}");
                    }
                }
                self.thinks(client);
            }
        }
    }

    fn holds(&mut self, client: usize, slot: SlotId) {
        self.outcome.served += 1;
        self.note(slot.0 as u64);
        self.clients[client].doing = Doing::Holding(slot);
        let tenant = &mut self.tenants[self.pools[self.clients[client].pool].tenant];
        let time = self.rng.u64(1..=tenant.hold);
        tenant.service += time;
        self.later(time, Event::Finish(client));
    }

    fn thinks(&mut self, client: usize) {
        self.clients[client].doing = Doing::Thinking;
        let think = self.tenants[self.pools[self.clients[client].pool].tenant].think;
        let time = self.rng.u64(0..=think) + u64::from(self.temper == Temper::Stormy);
        self.later(time, Event::Ask(client));
    }

    fn finish(&mut self, client: usize, actions: &mut Actions) {
        let Doing::Holding(slot) = self.clients[client].doing else { return };
        self.thinks(client);
        if self.temper == Temper::Stormy && self.rng.u8(..30) == 0 {
            self.core.change(slot, SlotEvent::Close, Millis(self.now), actions);
            self.closing(slot);
            return;
        }
        match self.newer.as_mut().map(|rng| rng.u8(..30)) {
            Some(0) => self.clean(slot, actions),
            Some(1) => {
                self.core.change(slot, SlotEvent::AwaitCancel, Millis(self.now), actions);
                self.set(slot, SlotState::CancelPending);
                self.later(2, Event::Cancelled(slot));
            }
            _ => self.release(slot, actions),
        }
    }

    fn clean(&mut self, slot: SlotId, actions: &mut Actions) {
        self.core.change(slot, SlotEvent::Reset, Millis(self.now), actions);
        self.set(slot, SlotState::Resetting);
        self.later(1, Event::Cleaned(slot));
    }

    fn release(&mut self, slot: SlotId, actions: &mut Actions) {
        let owed = self.owes_a_floor(slot);
        let rested = self.core.release(slot, Millis(self.now), actions);
        assert!(!owed || rested == Rested::Close, "somebody below its floor waits, and {slot:?} is {rested:?}");
        self.rested(slot, rested);
    }

    fn rested(&mut self, slot: SlotId, rested: Rested) {
        match rested {
            Rested::Idle => self.set(slot, SlotState::Idle),
            Rested::Close => self.closing(slot),
            Rested::Check => self.checking(slot),
            Rested::Hand(waiter) => {
                let pool = self.slots[&slot].pool;
                assert_eq!(self.gate_of(pool), Gate::Open, "served at a closed gate");
                let first = self.pools[pool].queue.front().map(|(waiter, _)| *waiter);
                assert_eq!(first, Some(waiter), "not the first of its pool");
                self.set(slot, SlotState::Active);
                let client = self.left(waiter);
                self.pools[pool].waits_since = (!self.pools[pool].queue.is_empty()).then_some(self.now);
                let tenant = self.pools[pool].tenant;
                self.tenants[tenant].waits_since = self.waiting.contains(&tenant).then_some(self.now);
                self.holds(client, slot);
            }
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
        self.pools[pool].queue.retain(|(w, _)| *w != waiter);
        if self.pools[pool].queue.is_empty() {
            self.pools[pool].waits_since = None;
        }
        let tenant = self.pools[pool].tenant;
        if self.tenants[tenant].pools.iter().all(|pool| self.pools[*pool].queue.is_empty()) {
            self.tenants[tenant].waits_since = None;
            self.waiting.remove(&tenant);
        }
        client
    }

    /// PostgreSQL answers a login.
    fn dialed(&mut self, slot: SlotId, actions: &mut Actions) {
        let pool = self.slots[&slot].pool;
        let failure = if self.now < self.down_until {
            Some(DialFailure::ServerDown)
        } else if self.room().connections >= self.most {
            Some(DialFailure::ServerFull)
        } else if self.temper == Temper::Stormy && !self.ending && self.rng.u8(..20) == 0 {
            self.rng.choice([DialFailure::Later, DialFailure::TenantFull, DialFailure::Refused])
        } else {
            None
        };
        assert!(failure.is_none() || self.temper != Temper::Calm, "PostgreSQL refuses in a calm world: {failure:?}");
        self.down = failure == Some(DialFailure::ServerDown);
        match failure {
            None => {
                self.pools[pool].failed = None;
                self.slots.get_mut(&slot).expect("a slot").logged_in = true;
                let room = self.tell_room();
                let rested = self.core.dialed(slot, Some(room), Millis(self.now), actions);
                self.rested(slot, rested);
                return;
            }
            Some(DialFailure::ServerDown) => self.unsettle(PAUSE),
            Some(DialFailure::ServerFull) => self.unsettle(FULL_PAUSE),
            Some(_) => self.pools[pool].failed = Some(self.now),
        }
        self.pools[pool].hanging += 1;
        self.slots.get_mut(&slot).expect("a slot").failed = true;
        self.core.dial_failed(slot, failure.expect("it failed"), Millis(self.now), actions);
        self.closing(slot);
    }

    fn gone(&mut self, slot: SlotId) {
        let slot = self.slots.remove(&slot).expect("a slot");
        self.pools[slot.pool].hanging -= u32::from(slot.failed);
        self.pools[slot.pool].counts[slot.state.index()] -= 1;
        self.tenants[self.pools[slot.pool].tenant].held -= 1;
        self.forget_if_empty(slot.pool);
    }

    /// Its connections are the tenant's as long as there are any.
    fn forget_if_empty(&mut self, pool: usize) {
        if self.pools[pool].retired && self.pools[pool].counts.iter().all(|n| *n == 0) {
            self.tenants[self.pools[pool].tenant].pools.retain(|n| *n != pool);
        }
    }

    fn set(&mut self, slot: SlotId, state: SlotState) {
        let slot = self.slots.get_mut(&slot).expect("a slot");
        let counts = &mut self.pools[slot.pool].counts;
        counts[slot.state.index()] -= 1;
        counts[state.index()] += 1;
        if !matches!(slot.state, SlotState::Idle | SlotState::Checking) {
            slot.unused = self.now;
        }
        (slot.state, slot.since) = (state, self.now);
    }

    fn closing(&mut self, slot: SlotId) {
        self.outcome.closed += 1;
        self.set(slot, SlotState::Closing);
        let hangs = self.temper == Temper::Stormy && !self.ending && self.rng.u8(..50) == 0;
        let time = if hangs { self.rng.u64(500..4_000) } else { self.rng.u64(0..=5) };
        self.later(time, Event::Closed(slot));
    }

    fn give_up_on_closing(&mut self) {
        let is_late = |slot: &Slot| slot.state == SlotState::Closing && self.now - slot.since >= CLOSES_WITHIN;
        let late: Vec<_> = self.slots.iter().filter(|(_, slot)| is_late(slot)).map(|(id, _)| *id).collect();
        late.into_iter().for_each(|slot| self.set(slot, SlotState::Lingering));
    }

    fn checking(&mut self, slot: SlotId) {
        self.set(slot, SlotState::Checking);
        self.later(1, Event::Checked(slot));
    }

    fn change(&mut self, actions: &mut Actions) {
        if self.ending {
            return;
        }
        let wait = self.rng.u64(1..400);
        self.later(wait, Event::Change);
        // What is changed counts from the next tick at the latest.
        self.unsettle(101);
        let now = Millis(self.now);
        let tenant = self.rng.usize(..self.tenants.len());
        let pool = self.rng.usize(..self.pools.len());
        match self.newer.as_mut().map(|rng| rng.u8(..12)) {
            Some(0..3) => return self.set_gate(tenant, Gate::Open, actions),
            Some(3) => return self.set_gate(tenant, Gate::Held, actions),
            Some(4) => return self.set_gate(tenant, Gate::Shut, actions),
            Some(5) => return self.rename(tenant, tenant),
            Some(6) => return self.rename(tenant, self.pools[pool].tenant),
            _ => {}
        }
        match self.rng.u8(..if self.temper == Temper::Stormy { 9 } else { 7 }) {
            0 => {
                self.limits.cap = (self.rng.u8(..4) > 0).then(|| self.rng.u32(1..60));
                self.limits.max_connecting = self.rng.u32(1..=6);
                self.core.set_limits(self.limits, now);
            }
            1 => {
                let budget = self.budget(&mut 8);
                self.core.set_budget(&self.tenants[tenant].name, budget, now);
                self.tenants[tenant].budget = budget;
            }
            2 => self.core.reconnect(self.pools[pool].id, now, actions),
            3 if !self.pools[pool].retired => {
                let limits = self.pool_limits();
                self.core.set_pool_limits(self.pools[pool].id, limits, now);
                self.pools[pool].limits = limits;
            }
            4 => self.retire(pool, actions),
            5 => {
                let (limits, clients) = (self.pool_limits(), self.rng.usize(0..5));
                self.add_pool(tenant, limits, clients);
            }
            6 => {
                let ours = self.room().connections - self.others;
                self.others = self.rng.u32(0..=self.most.saturating_sub(ours));
            }
            7 => self.down_until = self.now + self.rng.u64(1..2_000),
            _ => self.core.credentials_known(self.pools[pool].id, now),
        }
    }

    fn gate_of(&self, pool: usize) -> Gate {
        self.tenants[self.pools[pool].tenant].gate
    }

    /// Pause, drain, resume.
    fn set_gate(&mut self, tenant: usize, gate: Gate, actions: &mut Actions) {
        self.tenants[tenant].gate = gate;
        let ids: Vec<PoolId> = self.tenants[tenant].pools.iter().map(|pool| self.pools[*pool].id).collect();
        self.core.set_gates(&ids, gate, Millis(self.now), actions);
    }

    /// Two tenants change names; one takes a new one.
    fn rename(&mut self, tenant: usize, other: usize) {
        if tenant == other {
            let name = format!("{}x", self.tenants[tenant].name.as_str().chars().take(50).collect::<String>());
            self.tenants[tenant].name = TenantId::parse(&name).expect("a name");
        } else {
            let name = self.tenants[tenant].name.clone();
            self.tenants[tenant].name = std::mem::replace(&mut self.tenants[other].name, name);
        }
        for tenant in [tenant, other].map(|n| &self.tenants[n]) {
            for pool in &tenant.pools {
                self.core.rename_tenant(self.pools[*pool].id, &tenant.name);
            }
        }
        for tenant in [tenant, other].map(|n| &self.tenants[n]).into_iter().filter(|tenant| !tenant.pools.is_empty()) {
            assert_eq!(self.core.budget(&tenant.name), Some(tenant.budget), "a name leads to its tenant");
        }
    }

    /// As the shell does with a pool that nobody holds any more: nobody waits for it and nobody uses it.
    fn retire(&mut self, pool: usize, actions: &mut Actions) {
        let own = &mut self.clients[self.pools[pool].clients.clone()];
        if self.pools[pool].retired || own.iter().any(|c| !matches!(c.doing, Doing::Thinking | Doing::Gone)) {
            return;
        }
        own.iter_mut().for_each(|client| client.doing = Doing::Gone);
        self.pools[pool].retired = true;
        self.pools[pool].limits.size = 0;
        self.core.retire_pool(self.pools[pool].id, Millis(self.now), actions);
        self.ids.remove(&self.pools[pool].id);
        self.forget_if_empty(pool);
    }

    fn act(&mut self, actions: &Actions) {
        for action in actions {
            match *action {
                Action::Dial { slot, pool } => {
                    let pool = self.ids[&pool];
                    let state = SlotState::Connecting;
                    let now = self.now;
                    assert_eq!(self.gate_of(pool), Gate::Open, "a dial behind a closed gate");
                    let (logged_in, failed) = (false, false);
                    let fresh = Slot { pool, state, since: now, dialed: now, unused: now, logged_in, failed };
                    assert!(self.slots.insert(slot, fresh).is_none(), "used twice");
                    self.pools[pool].counts[state.index()] += 1;
                    self.tenants[self.pools[pool].tenant].held += 1;
                    let time = self.rng.u64(1..=self.connect);
                    self.later(time, Event::Dialed(slot));
                }
                Action::Close { slot } => {
                    self.check_close(slot);
                    self.closing(slot);
                }
                Action::Check { slot } => self.checking(slot),
                Action::Refuse { waiter, refusal } => {
                    self.outcome.refused += 1;
                    self.check_refusal(self.clients[self.waiters[&waiter]].pool, waiter, refusal);
                    let client = self.left(waiter);
                    self.thinks(client);
                }
            }
        }
    }
}
