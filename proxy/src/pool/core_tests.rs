//! The core as a specification: one behaviour a test, then any sequence of events against the invariants.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const POOL: PoolLimits = PoolLimits {
    size: 2,
    min_size: 0,
    max_waiters: 3,
    query_wait_timeout: 1_000,
    round_robin: false,
    lifetime: 3_600_000,
    idle_timeout: 600_000,
    check_delay: 30_000,
};

fn core(cap: u32) -> Core {
    Core::new(server_limits(cap))
}

fn dials(actions: &Actions) -> Vec<SlotId> {
    actions.iter().filter_map(|a| if let Action::Dial { slot, .. } = a { Some(*slot) } else { None }).collect()
}

fn server_limits(cap: u32) -> ServerLimits {
    ServerLimits { cap: Some(cap), reserve: 0, max_connecting: 4, login_retry: 50 }
}

const ALL: Budget = Budget { floor: 0, ceiling: u32::MAX, weight: 1 };

/// A pool of a tenant of its own.
fn add_pool(core: &mut Core, limits: PoolLimits) -> PoolId {
    add_tenant(core, ALL, limits)
}

fn add_tenant(core: &mut Core, budget: Budget, limits: PoolLimits) -> PoolId {
    let name = TenantId::parse(&format!("t{}", core.next_pool)).unwrap();
    let tenant = core.tenant(&name, budget, Millis(0));
    core.add_pool(tenant, limits, true, Gate::Open)
}

/// Two pools of one tenant whose ceiling is 1.
fn two_roles_with_one_connection(core: &mut Core) -> (PoolId, PoolId) {
    let name = TenantId::parse("two_roles").unwrap();
    let tenant = core.tenant(&name, Budget { ceiling: 1, ..ALL }, Millis(0));
    (core.add_pool(tenant, POOL, true, Gate::Open), core.add_pool(tenant, POOL, true, Gate::Open))
}

/// Queues one client, dials for it and hands it over.
fn open(core: &mut Core, pool: PoolId, now: u64) -> SlotId {
    let mut actions = Actions::new();
    assert!(matches!(core.checkout(pool, Millis(now), &mut actions), Checkout::Queued(_)));
    let [slot] = dials(&actions)[..] else { panic!("one dial: {actions:?}") };
    assert!(matches!(core.dialed(slot, None, Millis(now), &mut actions), Rested::Hand(_)));
    slot
}

/// A dial fails, and PostgreSQL closes its end at once.
fn fail(core: &mut Core, slot: SlotId, failure: DialFailure, now: u64, actions: &mut Actions) {
    core.dial_failed(slot, failure, Millis(now), actions);
    core.closed(slot, Millis(now), actions);
}

#[test]
fn an_idle_connection_is_lent_at_once_newest_first() {
    let mut core = core(10);
    let pool = add_pool(&mut core, POOL);
    let (a, b) = (open(&mut core, pool, 0), open(&mut core, pool, 0));
    let mut actions = Actions::new();
    assert_eq!(core.release(a, Millis(1), &mut actions), Rested::Idle);
    assert_eq!(core.release(b, Millis(2), &mut actions), Rested::Idle);
    assert_eq!(core.checkout(pool, Millis(3), &mut actions), Checkout::Ready(b));
    assert!(actions.is_empty());
}

#[test]
fn round_robin_lends_the_oldest_first() {
    let mut core = core(10);
    let pool = add_pool(&mut core, PoolLimits { round_robin: true, ..POOL });
    let (a, b) = (open(&mut core, pool, 0), open(&mut core, pool, 0));
    let mut actions = Actions::new();
    core.release(a, Millis(1), &mut actions);
    core.release(b, Millis(2), &mut actions);
    assert_eq!(core.checkout(pool, Millis(3), &mut actions), Checkout::Ready(a));
}

#[test]
fn a_freed_connection_goes_to_the_oldest_waiter() {
    let mut core = core(10);
    let pool = add_pool(&mut core, PoolLimits { size: 1, ..POOL });
    let slot = open(&mut core, pool, 0);
    let mut actions = Actions::new();
    let Checkout::Queued(first) = core.checkout(pool, Millis(1), &mut actions) else { panic!() };
    let Checkout::Queued(second) = core.checkout(pool, Millis(2), &mut actions) else { panic!() };
    assert_eq!(core.release(slot, Millis(3), &mut actions), Rested::Hand(first));
    assert_eq!(core.release(slot, Millis(4), &mut actions), Rested::Hand(second));
}

#[test]
fn a_waiter_is_refused_when_its_time_is_up_and_told_what_held_it() {
    let mut core = core(10);
    let pool = add_pool(&mut core, PoolLimits { size: 1, ..POOL });
    open(&mut core, pool, 0);
    let mut actions = Actions::new();
    let Checkout::Queued(waiter) = core.checkout(pool, Millis(10), &mut actions) else { panic!() };
    core.tick(Millis(1_009), &mut actions);
    assert!(actions.is_empty());
    core.tick(Millis(1_010), &mut actions);
    let [Action::Refuse { waiter: told, refusal: Refusal::Timeout(why) }] = actions[..] else { panic!("{actions:?}") };
    assert_eq!((told, why.waited, why.ahead, why.blocked), (waiter, 1_000, 0, Blocked::PoolSize));
}

#[test]
fn where_the_next_would_not_wait_nothing_is_said_to_hold_it_up() {
    let mut core = core(10);
    let pool = add_pool(&mut core, PoolLimits { size: 1, ..POOL });
    let blocked = |core: &Core| core.explain(pool, None, Millis(1)).blocked;
    assert_eq!(blocked(&core), Blocked::Nothing, "one may be opened");
    let slot = open(&mut core, pool, 0);
    assert_eq!(blocked(&core), Blocked::PoolSize);
    let mut actions = Actions::new();
    core.release(slot, Millis(1), &mut actions);
    assert_eq!(blocked(&core), Blocked::Nothing, "it lies there");
    core.set_gate(pool, Gate::Held, Millis(1), &mut actions);
    assert_eq!(blocked(&core), Blocked::Paused);
}

#[test]
fn while_all_dials_are_under_way_the_next_would_wait_for_the_throttle() {
    let mut core = core(10);
    let (busy, other) = (add_pool(&mut core, POOL), add_pool(&mut core, POOL));
    let mut actions = Actions::new();
    core.checkout(busy, Millis(0), &mut actions);
    assert_eq!(core.explain(busy, None, Millis(0)).blocked, Blocked::ConnectThrottle, "its connection is being opened");
    assert_eq!(core.explain(other, None, Millis(0)).blocked, Blocked::Nothing);
    for _ in 0..8 {
        core.checkout(busy, Millis(0), &mut actions);
        core.checkout(other, Millis(0), &mut actions);
    }
    let third = add_pool(&mut core, POOL);
    assert_eq!(core.explain(third, None, Millis(0)).blocked, Blocked::ConnectThrottle);
}

#[test]
fn the_queue_has_a_limit() {
    let mut core = core(10);
    let pool = add_pool(&mut core, PoolLimits { size: 1, max_waiters: 1, ..POOL });
    open(&mut core, pool, 0);
    let mut actions = Actions::new();
    assert!(matches!(core.checkout(pool, Millis(1), &mut actions), Checkout::Queued(_)));
    let Checkout::Refused(Refusal::QueueFull(why)) = core.checkout(pool, Millis(1), &mut actions) else { panic!() };
    assert_eq!((why.waiting, why.ahead, why.blocked), (1, 1, Blocked::PoolSize));
}

#[test]
fn at_the_cap_another_pools_idle_connection_is_closed_and_its_permit_used_only_once_it_is_gone() {
    let mut core = core(1);
    let rich = add_pool(&mut core, POOL);
    let poor = add_pool(&mut core, POOL);
    let slot = open(&mut core, rich, 0);
    let mut actions = Actions::new();
    core.release(slot, Millis(1), &mut actions);
    core.checkout(poor, Millis(2), &mut actions);
    assert!(actions.is_empty(), "its client may be about to ask again");
    core.nudge(Millis(1 + LEAST_IDLE), &mut actions);
    assert_eq!(actions.as_slice(), [Action::Close { slot }]);
    assert_eq!(core.permits(), (1, 1), "PostgreSQL still counts it");
    actions.clear();
    core.closed(slot, Millis(7), &mut actions);
    assert_eq!(dials(&actions).len(), 1);
    assert_eq!(core.permits(), (1, 1));
}

#[test]
fn at_the_cap_a_busy_pool_gives_up_its_next_free_connection_to_one_that_waited_longer() {
    let mut core = core(1);
    let busy = add_pool(&mut core, POOL);
    let poor = add_pool(&mut core, POOL);
    let slot = open(&mut core, busy, 0);
    let mut actions = Actions::new();
    core.checkout(poor, Millis(10), &mut actions);
    core.checkout(busy, Millis(200), &mut actions);
    assert_eq!(core.release(slot, Millis(300), &mut actions), Rested::Close);
    core.closed(slot, Millis(301), &mut actions);
    assert!(actions.iter().any(|a| matches!(a, Action::Dial { pool, .. } if *pool == poor)));
}

#[test]
fn while_the_server_is_down_one_dial_at_a_time_looks_for_it_and_waiters_stay() {
    let mut core = core(10);
    let pool = add_pool(&mut core, PoolLimits { size: 4, ..POOL });
    let mut actions = Actions::new();
    core.checkout(pool, Millis(0), &mut actions);
    core.checkout(pool, Millis(0), &mut actions);
    for slot in dials(&actions) {
        fail(&mut core, slot, DialFailure::ServerDown, 1, &mut Actions::new());
    }
    assert_eq!(core.permits().0, 0);
    assert_eq!(core.waiting(pool), 2);
    for now in (0..900).step_by(100) {
        actions.clear();
        core.tick(Millis(now + 100), &mut actions);
        let slots = dials(&actions);
        assert!(slots.len() <= 1, "{slots:?}");
        for slot in slots {
            fail(&mut core, slot, DialFailure::ServerDown, now + 101, &mut Actions::new());
        }
    }
    assert_eq!(core.explain(pool, None, Millis(1_000)).blocked, Blocked::ServerDown);
}

#[test]
fn a_login_that_can_never_succeed_tells_every_waiter_at_once() {
    let mut core = core(10);
    let pool = add_pool(&mut core, POOL);
    let mut actions = Actions::new();
    core.checkout(pool, Millis(0), &mut actions);
    let [slot] = dials(&actions)[..] else { panic!() };
    actions.clear();
    fail(&mut core, slot, DialFailure::Refused, 1, &mut actions);
    assert!(matches!(actions.as_slice(), [Action::Refuse { refusal: Refusal::LoginRefused, .. }]));
}

#[test]
fn idle_connections_above_the_minimum_are_closed_after_their_time_and_old_ones_always() {
    let mut core = core(10);
    let pool = add_pool(&mut core, PoolLimits { min_size: 1, idle_timeout: 1_000, lifetime: 5_000, ..POOL });
    let (a, b) = (open(&mut core, pool, 0), open(&mut core, pool, 0));
    let mut actions = Actions::new();
    core.release(a, Millis(0), &mut actions);
    core.release(b, Millis(0), &mut actions);
    core.tick(Millis(1_000), &mut actions);
    assert_eq!(actions.len(), 1, "one stays: the minimum");
    actions.clear();
    core.tick(Millis(5_000), &mut actions);
    assert!(actions.iter().any(|a| matches!(a, Action::Close { .. })), "its life is over");
    assert!(actions.iter().any(|a| matches!(a, Action::Dial { .. })), "and the minimum is kept");
}

#[test]
fn a_reconnect_closes_idle_connections_now_and_lent_ones_as_they_come_back() {
    let mut core = core(10);
    let pool = add_pool(&mut core, POOL);
    let (a, b) = (open(&mut core, pool, 0), open(&mut core, pool, 0));
    let mut actions = Actions::new();
    core.release(a, Millis(0), &mut actions);
    core.reconnect(pool, Millis(1), &mut actions);
    assert_eq!(actions.as_slice(), [Action::Close { slot: a }]);
    assert_eq!(core.release(b, Millis(2), &mut actions), Rested::Close);
}

#[derive(Debug, Clone, Copy)]
enum Event {
    Checkout(u8),
    Release(u8),
    Break(u8),
    Dialed(u8),
    DialFailed(u8, u8),
    Closed(u8),
    Leave(u8),
    Checked(u8, u8),
    Reset(u8),
    AwaitCancel(u8),
    Cancelled(u8),
    Tick(u16),
    Cap(u8),
    Budget(u8, u8, u8),
    Gate(u8, u8),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => any::<u8>().prop_map(Event::Checkout),
        6 => any::<u8>().prop_map(Event::Release),
        2 => any::<u8>().prop_map(Event::Break),
        6 => any::<u8>().prop_map(Event::Dialed),
        2 => (any::<u8>(), any::<u8>()).prop_map(|(a, b)| Event::DialFailed(a, b)),
        6 => any::<u8>().prop_map(Event::Closed),
        2 => any::<u8>().prop_map(Event::Leave),
        3 => (any::<u8>(), 0u8..12).prop_map(|(n, connections)| Event::Checked(n, connections)),
        1 => any::<u8>().prop_map(Event::Reset),
        1 => any::<u8>().prop_map(Event::AwaitCancel),
        2 => any::<u8>().prop_map(Event::Cancelled),
        4 => (0u16..2_000).prop_map(Event::Tick),
        1 => (0u8..5).prop_map(Event::Cap),
        1 => (any::<u8>(), 0u8..4, 0u8..5).prop_map(|(n, floor, ceiling)| Event::Budget(n, floor, ceiling)),
        1 => (any::<u8>(), 0u8..5).prop_map(|(n, gate)| Event::Gate(n, gate)),
    ]
}

/// The world outside the core: what the shell would hold.
#[derive(Default)]
struct World {
    dialing: Vec<SlotId>,
    lent: Vec<SlotId>,
    cancelling: Vec<SlotId>,
    checking: Vec<SlotId>,
    closing: Vec<SlotId>,
    waiting: BTreeMap<WaiterId, PoolId>,
}

impl World {
    fn act(&mut self, actions: &Actions) {
        for action in actions {
            match *action {
                Action::Dial { slot, .. } => self.dialing.push(slot),
                Action::Close { slot } => self.closing.push(slot),
                Action::Check { slot } => self.checking.push(slot),
                Action::Refuse { waiter, .. } => assert!(self.waiting.remove(&waiter).is_some(), "refused twice"),
            }
        }
    }

    fn rested(&mut self, slot: SlotId, rested: Rested) {
        match rested {
            Rested::Hand(waiter) => {
                assert!(self.waiting.remove(&waiter).is_some(), "handed to somebody who left");
                self.lent.push(slot);
            }
            Rested::Idle => {}
            Rested::Check => self.checking.push(slot),
            Rested::Close => self.closing.push(slot),
        }
    }
}

fn pick(from: &mut Vec<SlotId>, n: u8) -> Option<SlotId> {
    let len = from.len();
    (len > 0).then(|| from.remove(usize::from(n) % len))
}

proptest! {
    /// Any events in any order: permits never exceed the cap that was in force when they were taken, what the core
    /// counts is what the world holds, and a pool with an idle slot has no waiter.
    #[test]
    fn invariants_hold_after_every_event(events in prop::collection::vec(event(), 1..400)) {
        let mut core = core(3);
        let pools: Vec<_> = (0..3).map(|n| add_pool(&mut core, PoolLimits { min_size: n % 2, round_robin: n == 1, ..POOL })).collect();
        let mut world = World::default();
        let mut now = Millis(0);
        let mut most = 3;
        for event in events {
            let mut actions = Actions::new();
            match event {
                Event::Checkout(n) => {
                    let pool = pools[usize::from(n) % pools.len()];
                    match core.checkout(pool, now, &mut actions) {
                        Checkout::Ready(slot) => world.lent.push(slot),
                        Checkout::Queued(waiter) => { world.waiting.insert(waiter, pool); }
                        Checkout::Refused(_) => {}
                    }
                }
                Event::Release(n) => if let Some(slot) = pick(&mut world.lent, n) {
                    let rested = core.release(slot, now, &mut actions);
                    world.rested(slot, rested);
                },
                Event::Checked(n, connections) => if let Some(slot) = pick(&mut world.checking, n) {
                    let room = Room { slots: 8, connections: u32::from(connections) };
                    let rested = core.checked(slot, Some(room), now, &mut actions);
                    world.rested(slot, rested);
                },
                Event::Reset(n) => if let Some(slot) = pick(&mut world.lent, n) {
                    if core.slots[slot.0].state == SlotState::Active {
                        core.change(slot, SlotEvent::Reset, now, &mut actions);
                    }
                    world.lent.push(slot);
                },
                Event::AwaitCancel(n) => if let Some(slot) = pick(&mut world.lent, n) {
                    if core.slots[slot.0].state == SlotState::Active {
                        core.change(slot, SlotEvent::AwaitCancel, now, &mut actions);
                        world.cancelling.push(slot);
                    } else {
                        world.lent.push(slot);
                    }
                },
                Event::Cancelled(n) => if let Some(slot) = pick(&mut world.cancelling, n) {
                    core.change(slot, SlotEvent::Reset, now, &mut actions);
                    world.lent.push(slot);
                },
                Event::Break(n) => if let Some(slot) = pick(&mut world.lent, n) {
                    core.change(slot, SlotEvent::Close, now, &mut actions);
                    world.closing.push(slot);
                },
                Event::Dialed(n) => if let Some(slot) = pick(&mut world.dialing, n) {
                    let rested = core.dialed(slot, None, now, &mut actions);
                    world.rested(slot, rested);
                },
                Event::DialFailed(n, how) => if let Some(slot) = pick(&mut world.dialing, n) {
                    let failure = [DialFailure::ServerDown, DialFailure::Later, DialFailure::Refused][usize::from(how) % 3];
                    core.dial_failed(slot, failure, now, &mut actions);
                    world.closing.push(slot);
                },
                Event::Closed(n) => if let Some(slot) = pick(&mut world.closing, n) {
                    core.closed(slot, now, &mut actions);
                },
                Event::Leave(n) => if let Some((&waiter, &pool)) = world.waiting.iter().nth(usize::from(n) % world.waiting.len().max(1)) {
                    prop_assert!(core.leave_queue(pool, waiter, now));
                    world.waiting.remove(&waiter);
                },
                Event::Tick(ms) => {
                    now = Millis(now.0 + u64::from(ms));
                    core.tick(now, &mut actions);
                }
                Event::Cap(cap) => {
                    core.set_limits(server_limits(u32::from(cap)), now);
                    most = core.permits().0.max(u32::from(cap));
                }
                Event::Budget(n, floor, ceiling) => {
                    let name = TenantId::parse(&format!("t{}", usize::from(n) % pools.len())).unwrap();
                    core.set_budget(&name, Budget { floor: u32::from(floor), ceiling: u32::from(ceiling), ..ALL }, now);
                }
                Event::Gate(n, gate) => {
                    let gate = [Gate::Open, Gate::Open, Gate::Open, Gate::Held, Gate::Shut][usize::from(gate)];
                    core.set_gates(&[pools[usize::from(n) % pools.len()]], gate, now, &mut actions);
                }
            }
            world.act(&actions);
            let (held, cap) = core.permits();
            prop_assert!(held <= most.max(cap));
            most = held.max(cap);
            let mut counts = [0u32; SlotState::ALL.len()];
            for pool in &pools {
                let own = core.counts(*pool);
                prop_assert!(own.of(SlotState::Idle) == 0 || core.waiting(*pool) == 0, "idle slot beside a waiter");
                counts.iter_mut().zip(SlotState::ALL).for_each(|(sum, state)| *sum += own.of(state));
            }
            prop_assert_eq!(held, counts.iter().sum::<u32>(), "a permit for each slot");
            prop_assert_eq!(counts[SlotState::Connecting.index()] as usize, world.dialing.len());
            let lent = counts[SlotState::Active.index()] + counts[SlotState::Resetting.index()];
            prop_assert_eq!(lent as usize, world.lent.len());
            prop_assert_eq!(counts[SlotState::CancelPending.index()] as usize, world.cancelling.len());
            let leaving = counts[SlotState::Closing.index()] + counts[SlotState::Lingering.index()];
            prop_assert_eq!(leaving as usize, world.closing.len());
            prop_assert_eq!(counts[SlotState::Checking.index()] as usize, world.checking.len());
            prop_assert_eq!(pools.iter().map(|p| core.waiting(*p)).sum::<usize>(), world.waiting.len());
        }
    }
}

#[test]
fn a_tenant_below_its_floor_gets_the_next_connection_that_is_released() {
    let mut core = core(2);
    let greedy = add_pool(&mut core, POOL);
    let entitled = add_tenant(&mut core, Budget { floor: 1, ..ALL }, POOL);
    let (a, b) = (open(&mut core, greedy, 0), open(&mut core, greedy, 0));
    let mut actions = Actions::new();
    core.checkout(greedy, Millis(1), &mut actions);
    core.checkout(entitled, Millis(2), &mut actions);
    assert_eq!(core.release(a, Millis(2), &mut actions), Rested::Close, "although another of its own waits longer");
    assert!(matches!(core.release(b, Millis(2), &mut actions), Rested::Hand(_)), "one is enough");
}

#[test]
fn a_tenant_never_has_more_than_its_ceiling_over_all_of_its_roles() {
    let mut core = core(10);
    let (web, jobs) = two_roles_with_one_connection(&mut core);
    let slot = open(&mut core, web, 0);
    let mut actions = Actions::new();
    core.checkout(jobs, Millis(1), &mut actions);
    assert!(actions.is_empty());
    assert_eq!(core.explain(jobs, None, Millis(1)).blocked, Blocked::Ceiling);
    assert_eq!(core.release(slot, Millis(2), &mut actions), Rested::Close, "its sibling waits and has no other way");
    core.closed(slot, Millis(3), &mut actions);
    assert_eq!(dials(&actions).len(), 1);
}

#[test]
fn at_its_ceiling_a_tenant_closes_an_idle_connection_of_one_role_for_another() {
    let mut core = core(10);
    let (web, jobs) = two_roles_with_one_connection(&mut core);
    let slot = open(&mut core, web, 0);
    let mut actions = Actions::new();
    core.release(slot, Millis(1), &mut actions);
    core.checkout(jobs, Millis(2), &mut actions);
    assert_eq!(actions.as_slice(), [Action::Close { slot }]);
}

#[test]
fn what_lies_idle_within_a_floor_is_not_taken_for_others_wishes() {
    let mut core = core(1);
    let quiet = add_tenant(&mut core, Budget { floor: 1, ..ALL }, POOL);
    let noisy = add_pool(&mut core, POOL);
    let slot = open(&mut core, quiet, 0);
    let mut actions = Actions::new();
    core.release(slot, Millis(1), &mut actions);
    core.checkout(noisy, Millis(2), &mut actions);
    core.nudge(Millis(1_000), &mut actions);
    assert!(actions.is_empty(), "{actions:?}");
    assert_eq!(core.checkout(quiet, Millis(1_001), &mut actions), Checkout::Ready(slot));
}

#[test]
fn a_full_server_shrinks_the_cap_and_the_waiter_waits_on() {
    let mut core = core(4);
    let pool = add_pool(&mut core, PoolLimits { size: 4, ..POOL });
    open(&mut core, pool, 0);
    let mut actions = Actions::new();
    core.checkout(pool, Millis(1), &mut actions);
    let [slot] = dials(&actions)[..] else { panic!("{actions:?}") };
    actions.clear();
    fail(&mut core, slot, DialFailure::ServerFull, 2, &mut actions);
    assert!(actions.is_empty(), "{actions:?}");
    assert_eq!((core.permits(), core.waiting(pool)), ((1, 1), 1));
    assert_eq!(core.explain(pool, None, Millis(2)).blocked, Blocked::ServerFull);
    core.tick(Millis(300), &mut actions);
    let [slot] = dials(&actions)[..] else { panic!("one more is tried: {actions:?}") };
    assert!(matches!(core.dialed(slot, None, Millis(301), &mut actions), Rested::Hand(_)));
    assert_eq!(core.permits().1, 3, "there was room: one more than it has");
}

#[test]
fn a_full_tenant_holds_up_nobody_else() {
    let mut core = core(4);
    let (fenced, other) = (add_pool(&mut core, POOL), add_pool(&mut core, POOL));
    let mut actions = Actions::new();
    core.checkout(fenced, Millis(0), &mut actions);
    let [slot] = dials(&actions)[..] else { panic!("{actions:?}") };
    fail(&mut core, slot, DialFailure::TenantFull, 1, &mut actions);
    assert_eq!(core.explain(fenced, None, Millis(1)).blocked, Blocked::TenantFull);
    assert_eq!(core.permits().1, 4);
    open(&mut core, other, 2);
}

#[test]
fn a_lowered_cap_closes_what_is_idle_at_once_and_the_rest_as_it_comes_to_rest() {
    let mut core = core(3);
    let pool = add_pool(&mut core, PoolLimits { size: 3, ..POOL });
    let slots = [0; 3].map(|_| open(&mut core, pool, 0));
    let mut actions = Actions::new();
    core.release(slots[0], Millis(1), &mut actions);
    core.set_limits(server_limits(1), Millis(1));
    core.tick(Millis(2), &mut actions);
    assert_eq!(actions.as_slice(), [Action::Close { slot: slots[0] }]);
    assert_eq!(core.release(slots[1], Millis(3), &mut actions), Rested::Close);
    assert_eq!(core.release(slots[2], Millis(4), &mut actions), Rested::Idle);
}

#[test]
fn a_check_in_between_does_not_make_an_idle_connection_young_again() {
    let mut core = core(10);
    let pool = add_pool(&mut core, PoolLimits { idle_timeout: 1_000, check_delay: 100, ..POOL });
    let (a, b) = (open(&mut core, pool, 0), open(&mut core, pool, 0));
    let mut actions = Actions::new();
    core.release(a, Millis(0), &mut actions);
    core.release(b, Millis(1), &mut actions);
    core.tick(Millis(500), &mut actions);
    assert_eq!(actions.as_slice(), [Action::Check { slot: a }, Action::Check { slot: b }]);
    actions.clear();
    core.release(b, Millis(501), &mut actions);
    core.release(a, Millis(502), &mut actions);
    core.tick(Millis(1_000), &mut actions);
    assert!(actions.contains(&Action::Close { slot: a }), "{actions:?}");
}

#[test]
fn logins_of_one_pool_that_hang_leave_a_dial_for_others() {
    let mut core = core(10);
    let (stuck, other) =
        (add_pool(&mut core, PoolLimits { size: 9, max_waiters: 9, ..POOL }), add_pool(&mut core, POOL));
    let mut actions = Actions::new();
    for _ in 0..9 {
        core.checkout(stuck, Millis(0), &mut actions);
    }
    let slots = dials(&actions);
    assert_eq!(slots.len(), 3, "of four");
    actions.clear();
    core.checkout(other, Millis(1), &mut actions);
    assert_eq!(dials(&actions).len(), 1);
    for slot in slots {
        fail(&mut core, slot, DialFailure::Later, 2, &mut Actions::new());
    }
    actions.clear();
    core.tick(Millis(500), &mut actions);
    assert_eq!(dials(&actions).len(), 1, "after a failure one finds out for all");
}

#[test]
fn at_the_cap_a_role_gets_an_idle_connection_of_its_own_tenant_whatever_the_floor() {
    let mut core = core(2);
    let tenant = core.tenant(&TenantId::parse("two_roles").unwrap(), Budget { floor: 1, ..ALL }, Millis(0));
    let (web, jobs) = (core.add_pool(tenant, POOL, true, Gate::Open), core.add_pool(tenant, POOL, true, Gate::Open));
    let other = add_tenant(&mut core, Budget { floor: 1, ..ALL }, POOL);
    let slot = open(&mut core, web, 0);
    open(&mut core, other, 0);
    let mut actions = Actions::new();
    core.release(slot, Millis(1), &mut actions);
    core.checkout(jobs, Millis(2), &mut actions);
    core.nudge(Millis(10), &mut actions);
    assert_eq!(actions.as_slice(), [Action::Close { slot }]);
}

#[test]
fn a_role_whose_login_failed_is_not_forgotten_at_the_ceiling() {
    let mut core = core(10);
    let (web, jobs) = two_roles_with_one_connection(&mut core);
    let mut actions = Actions::new();
    core.checkout(jobs, Millis(0), &mut actions);
    let [slot] = dials(&actions)[..] else { panic!("{actions:?}") };
    fail(&mut core, slot, DialFailure::Later, 1, &mut Actions::new());
    let slot = open(&mut core, web, 2);
    assert_eq!(core.release(slot, Millis(3), &mut Actions::new()), Rested::Idle);
    actions.clear();
    core.tick(Millis(200), &mut actions);
    assert_eq!(actions.as_slice(), [Action::Close { slot }]);
}

#[test]
fn closing_connections_are_not_part_of_a_floor() {
    let mut core = core(4);
    let kept = add_tenant(&mut core, Budget { floor: 3, ..ALL }, PoolLimits { size: 4, ..POOL });
    let slots = [0; 4].map(|_| open(&mut core, kept, 0));
    let greedy = add_pool(&mut core, POOL);
    let mut actions = Actions::new();
    core.checkout(greedy, Millis(1), &mut actions);
    core.checkout(greedy, Millis(1), &mut actions);
    let rested = slots.map(|slot| core.release(slot, Millis(500), &mut actions));
    assert_eq!(rested.iter().filter(|rested| **rested == Rested::Close).count(), 1, "{rested:?}");
}

#[test]
fn lowered_limits_close_no_more_than_they_must() {
    let mut core = core(10);
    let pool = add_pool(&mut core, PoolLimits { size: 6, ..POOL });
    let slots = [0; 6].map(|_| open(&mut core, pool, 0));
    let mut actions = Actions::new();
    for slot in slots {
        core.release(slot, Millis(1), &mut actions);
    }
    core.set_pool_limits(pool, PoolLimits { size: 5, ..POOL }, Millis(2));
    core.tick(Millis(3), &mut actions);
    assert_eq!(actions.len(), 1, "{actions:?}");
    let name = TenantId::parse("t0").unwrap();
    core.set_budget(&name, Budget { ceiling: 2, ..ALL }, Millis(4));
    actions.clear();
    core.tick(Millis(5), &mut actions);
    assert_eq!(actions.len(), 3, "{actions:?}");
}

#[test]
fn connections_that_do_not_close_stop_nobody_elses_from_moving() {
    let mut core = core(6);
    let patient = PoolLimits { size: 6, query_wait_timeout: 60_000, ..POOL };
    let greedy = add_pool(&mut core, patient);
    let slots = [0; 6].map(|_| open(&mut core, greedy, 0));
    let poor = add_pool(&mut core, patient);
    let mut actions = Actions::new();
    for slot in &slots[..4] {
        core.change(*slot, SlotEvent::Close, Millis(10), &mut actions);
    }
    core.checkout(poor, Millis(20), &mut actions);
    core.checkout(greedy, Millis(20), &mut actions);
    assert!(matches!(core.release(slots[4], Millis(900), &mut actions), Rested::Hand(_)), "four are on their way");
    core.checkout(greedy, Millis(950), &mut actions);
    core.tick(Millis(1_100), &mut actions);
    assert_eq!(core.release(slots[5], Millis(1_200), &mut actions), Rested::Close);
}

#[test]
fn postgresql_is_asked_for_its_room_also_while_nothing_is_dialled() {
    let mut core = Core::new(ServerLimits { cap: None, reserve: 2, ..server_limits(0) });
    let pool = add_pool(&mut core, POOL);
    let mut actions = Actions::new();
    core.checkout(pool, Millis(0), &mut actions);
    let [slot] = dials(&actions)[..] else { panic!("{actions:?}") };
    let room = |connections| Some(Room { slots: 10, connections });
    assert!(matches!(core.dialed(slot, room(1), Millis(1), &mut actions), Rested::Hand(_)));
    assert_eq!(core.permits().1, 8);
    assert_eq!(core.release(slot, Millis(5_000), &mut actions), Rested::Idle);
    assert_eq!(core.checkout(pool, Millis(5_000), &mut actions), Checkout::Ready(slot));
    assert_eq!(core.release(slot, Millis(5_001), &mut actions), Rested::Check);
    assert_eq!(core.checked(slot, room(7), Millis(5_002), &mut actions), Rested::Idle);
    assert_eq!(core.permits().1, 4, "six are others'");
    core.checkout(pool, Millis(5_003), &mut actions);
    assert_eq!(core.release(slot, Millis(5_004), &mut actions), Rested::Idle, "not again at once");
}

#[test]
fn slow_dials_do_not_keep_tenants_from_being_served() {
    let mut core = core(1);
    let pools = [add_pool(&mut core, POOL), add_pool(&mut core, POOL)];
    let (dial_takes, transaction_takes) = (300, 50);
    let mut served = [0; 2];
    let mut now = 0;
    let mut actions = Actions::new();
    for pool in pools {
        core.checkout(pool, Millis(now), &mut actions);
    }
    while now < 20_000 {
        let [slot] = dials(&actions)[..] else { panic!("one dial under way: {actions:?}") };
        actions.clear();
        now += dial_takes;
        let mut rested = core.dialed(slot, None, Millis(now), &mut actions);
        // As long as it is handed on; each client asks again at once.
        while let Rested::Hand(_) = rested {
            let pool = core.slots[slot.0].pool;
            let which = pools.iter().position(|p| *p == pool).unwrap();
            served[which] += 1;
            core.checkout(pool, Millis(now), &mut actions);
            now += transaction_takes;
            rested = core.release(slot, Millis(now), &mut actions);
        }
        assert_eq!(rested, Rested::Close);
        actions.clear();
        core.closed(slot, Millis(now), &mut actions);
        // Nobody waits as long as this test's clients do.
        for pool in pools {
            while core.waiting(pool) == 0 {
                core.checkout(pool, Millis(now), &mut actions);
            }
        }
    }
    assert!(served.iter().all(|n| *n >= 20), "{served:?}");
}

#[test]
fn a_new_pool_that_is_shut_moves_nobody_elses_connections() {
    let mut core = core(1);
    let rich = add_pool(&mut core, POOL);
    let poor = add_pool(&mut core, POOL);
    let slot = open(&mut core, rich, 0);
    let mut actions = Actions::new();
    core.release(slot, Millis(1), &mut actions);
    core.checkout(poor, Millis(2), &mut actions);
    assert!(actions.is_empty());
    let paused = TenantId::parse("paused").unwrap();
    let tenant = core.tenant(&paused, ALL, Millis(1 + LEAST_IDLE));
    let pool = core.add_pool(tenant, POOL, true, Gate::Held);
    assert!(matches!(core.checkout(pool, Millis(1 + LEAST_IDLE), &mut actions), Checkout::Queued(_)));
    // Whatever the core decided is in the actions, not lost: the idle connection is closed for the one who waits.
    core.nudge(Millis(2 + LEAST_IDLE), &mut actions);
    assert_eq!(actions.as_slice(), [Action::Close { slot }]);
}

#[test]
fn a_tenant_whose_login_looks_like_a_server_that_is_down_leaves_others_their_turn() {
    let mut core = core(10);
    let broken = [add_pool(&mut core, POOL), add_pool(&mut core, POOL)];
    let healthy = add_pool(&mut core, POOL);
    let mut actions = Actions::new();
    for pool in broken {
        core.checkout(pool, Millis(0), &mut actions);
        core.checkout(pool, Millis(0), &mut actions);
    }
    core.checkout(healthy, Millis(0), &mut actions);
    let mut served = false;
    for now in (0..1_000).step_by(100) {
        for action in std::mem::take(&mut actions) {
            let Action::Dial { slot, pool } = action else { continue };
            if pool == healthy {
                served |= matches!(core.dialed(slot, None, Millis(now), &mut actions), Rested::Hand(_));
            } else {
                fail(&mut core, slot, DialFailure::ServerDown, now, &mut actions);
            }
        }
        core.tick(Millis(now + 100), &mut actions);
    }
    assert!(served, "{:?}", core.explain(healthy, None, Millis(1_000)));
}

#[test]
fn a_dial_that_hangs_while_the_server_seems_down_leaves_others_their_turn() {
    let mut core = core(10);
    let patient = PoolLimits { query_wait_timeout: u64::MAX, ..POOL };
    let (stuck, healthy) = (add_pool(&mut core, patient), add_pool(&mut core, patient));
    let mut actions = Actions::new();
    core.checkout(stuck, Millis(0), &mut actions);
    let [slot] = dials(&actions)[..] else { panic!("{actions:?}") };
    fail(&mut core, slot, DialFailure::ServerDown, 1, &mut Actions::new());
    actions.clear();
    core.tick(Millis(100), &mut actions);
    assert_eq!(dials(&actions).len(), 1, "and this one hangs");
    actions.clear();
    core.checkout(healthy, Millis(200), &mut actions);
    assert!(actions.is_empty(), "one finds out for all");
    core.tick(Millis(100 + LOOKS_WITHIN), &mut actions);
    assert!(matches!(actions[..], [Action::Dial { pool, .. }] if pool == healthy), "{actions:?}");
}

#[test]
fn logins_that_hang_do_not_pile_up() {
    let mut core = core(10);
    let pool = add_pool(&mut core, PoolLimits { size: 10, max_waiters: 9, query_wait_timeout: u64::MAX, ..POOL });
    let mut actions = Actions::new();
    for _ in 0..5 {
        core.checkout(pool, Millis(0), &mut actions);
    }
    let mut hanging = Vec::new();
    for now in (0..120_000).step_by(100) {
        for slot in dials(&actions) {
            core.dial_failed(slot, DialFailure::Later, Millis(now), &mut Actions::new());
            hanging.push(slot);
        }
        actions.clear();
        core.tick(Millis(now), &mut actions);
        assert!(core.permits().0 <= core.dials_of_one(), "{:?} at {now}", core.permits());
    }
    core.closed(hanging[0], Millis(120_000), &mut actions);
    assert_eq!(dials(&actions).len(), 1, "one is over, one more is tried");
}

#[test]
fn new_credentials_end_only_the_pause_of_a_login_that_was_refused() {
    for (failure, dials_again) in [(DialFailure::Refused, 1), (DialFailure::Later, 0), (DialFailure::TenantFull, 0)] {
        let mut core = core(10);
        let pool = add_pool(&mut core, POOL);
        let mut actions = Actions::new();
        core.checkout(pool, Millis(0), &mut actions);
        let [slot] = dials(&actions)[..] else { panic!("{actions:?}") };
        fail(&mut core, slot, failure, 1, &mut Actions::new());
        core.credentials_known(pool, Millis(2));
        actions.clear();
        core.checkout(pool, Millis(3), &mut actions);
        assert_eq!(dials(&actions).len(), dials_again, "{failure:?}");
    }
}

#[test]
fn a_cap_that_yielded_to_others_is_tried_again_also_while_everything_is_lent() {
    let mut core = Core::new(ServerLimits { cap: None, reserve: 2, ..server_limits(0) });
    let pool = add_pool(&mut core, PoolLimits { query_wait_timeout: u64::MAX, size: 9, ..POOL });
    let mut actions = Actions::new();
    core.checkout(pool, Millis(0), &mut actions);
    let [slot] = dials(&actions)[..] else { panic!("{actions:?}") };
    let room = |connections| Some(Room { slots: 10, connections });
    assert!(matches!(core.dialed(slot, room(10), Millis(1), &mut actions), Rested::Hand(_)));
    assert_eq!(core.permits(), (1, 1), "nine are others'");
    actions.clear();
    core.checkout(pool, Millis(2), &mut actions);
    core.tick(Millis(ROOM_AGE * 2), &mut actions);
    assert!(actions.is_empty(), "what is known is not old");
    core.tick(Millis(ROOM_AGE * 2 + 1), &mut actions);
    let [slot] = dials(&actions)[..] else { panic!("{actions:?}") };
    assert!(matches!(core.dialed(slot, room(2), Millis(ROOM_AGE * 2 + 2), &mut actions), Rested::Hand(_)));
    assert_eq!(core.permits(), (2, 8), "the others have left");
}

#[test]
fn connections_that_do_not_close_count_when_the_cap_is_lowered() {
    let mut core = core(4);
    let pool = add_pool(&mut core, PoolLimits { size: 4, ..POOL });
    let slots = [0; 4].map(|_| open(&mut core, pool, 0));
    let mut actions = Actions::new();
    core.release(slots[0], Millis(1), &mut actions);
    core.release(slots[1], Millis(1), &mut actions);
    core.change(slots[2], SlotEvent::Close, Millis(1), &mut actions);
    core.change(slots[3], SlotEvent::Close, Millis(1), &mut actions);
    core.tick(Millis(1 + CLOSES_WITHIN), &mut actions);
    assert!(actions.is_empty(), "{actions:?}");
    core.set_limits(server_limits(2), Millis(1_100));
    core.tick(Millis(1_200), &mut actions);
    assert_eq!(actions.as_slice(), [slots[0], slots[1]].map(|slot| Action::Close { slot }));
}

#[test]
fn a_fresh_connection_that_did_not_tell_what_room_there_is_serves_first() {
    let mut core = Core::new(ServerLimits { cap: None, reserve: 2, ..server_limits(0) });
    let pool = add_pool(&mut core, POOL);
    let mut actions = Actions::new();
    core.checkout(pool, Millis(0), &mut actions);
    let [slot] = dials(&actions)[..] else { panic!("{actions:?}") };
    core.dialed(slot, Some(Room { slots: 10, connections: 1 }), Millis(1), &mut actions);
    actions.clear();
    core.checkout(pool, Millis(2), &mut actions);
    let [slot] = dials(&actions)[..] else { panic!("{actions:?}") };
    let late = Millis(2 + ROOM_AGE * 2);
    assert!(matches!(core.dialed(slot, None, late, &mut actions), Rested::Hand(_)));
    assert_eq!(core.release(slot, late, &mut actions), Rested::Check);
}

#[test]
fn time_does_not_go_back() {
    let mut core = core(1);
    let (failed, other) = (add_pool(&mut core, POOL), add_pool(&mut core, POOL));
    let mut actions = Actions::new();
    core.checkout(failed, Millis(0), &mut actions);
    let [slot] = dials(&actions)[..] else { panic!("{actions:?}") };
    fail(&mut core, slot, DialFailure::Later, 50, &mut Actions::new());
    let slot = open(&mut core, other, 60);
    core.tick(Millis(100), &mut Actions::new());
    actions.clear();
    // Its session read the clock before that tick, and comes after it: the pause stays over.
    core.change(slot, SlotEvent::Close, Millis(99), &mut actions);
    core.closed(slot, Millis(99), &mut actions);
    assert!(matches!(actions[..], [Action::Dial { pool, .. }] if pool == failed), "{actions:?}");
}

#[test]
fn a_tenant_that_is_shut_dials_for_none_of_its_roles() {
    let mut core = core(10);
    let tenant = core.tenant(&TenantId::parse("several").unwrap(), ALL, Millis(0));
    let web = core.add_pool(tenant, POOL, true, Gate::Open);
    let jobs = core.add_pool(tenant, PoolLimits { size: 9, max_waiters: 9, ..POOL }, true, Gate::Open);
    let mut actions = Actions::new();
    for _ in 0..5 {
        core.checkout(jobs, Millis(0), &mut actions);
    }
    for slot in dials(&actions) {
        fail(&mut core, slot, DialFailure::Later, 1, &mut Actions::new());
    }
    actions.clear();
    core.set_gates(&[web, jobs], Gate::Held, Millis(300), &mut actions);
    assert!(actions.is_empty(), "{actions:?}");
}
