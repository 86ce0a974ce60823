//! One PostgreSQL instance: the shell around the core that does what the core decides.
//!
//! What always holds: a connection that the core calls idle lies in `idle`; every waiter that the core knows has its
//! handoff in `handoffs`; both change only under the one lock, together with the core.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};

use arc_swap::ArcSwap;
use foldhash::{HashMap, HashMapExt};
use parking_lot::Mutex;
use tenantry_config::{OrAuto, TenantId};
use tenantry_wire::message;
use tokio::sync::{Notify, Semaphore};
use tokio_util::task::TaskTracker;

use super::{
    LoginError, Place, Pool, PoolSettings,
    core::Core,
    decision::{
        Action, Actions, Checkout, DialFailure, Gate, PoolId, PoolLimits, Refusal, Rested, ServerLimits, SlotId, Waste,
    },
    explain::Explanation,
    functions::{self, KnownFunctions, Reading},
    hub::Hub,
    lease::{Handoff, Lease, Waiting},
    slot::{Counts, SlotEvent, SlotState},
    stats::Stats,
    waiters::WaiterId,
};
use crate::{
    budget::{cap::Room, fair::Budget},
    clock::{Millis, Pulse},
    net::tls::{Connector, TlsError},
    server::{
        conn::ServerConn,
        connect::{self, ConnectError, Endpoint, NoLogin},
        credentials::{Credentials, Keyring},
        upkeep,
    },
};

/// How often time passes for the core: the resolution of its deadlines.
const TICK: Duration = Duration::from_millis(100);
const NUDGE: Duration = Duration::from_millis(5);
/// An idle connection that lay this long is looked at (one peek) before it is lent: PostgreSQL may have ended it. A busy
/// pool hands connections over without their ever being idle, and pays nothing.
const PEEK_AFTER: Duration = Duration::from_millis(1);

/// A PostgreSQL instance and all of its pools.
#[derive(Debug)]
pub struct Server {
    name: ArcSwap<String>,
    endpoint: ArcSwap<Endpoint>,
    inner: Mutex<Inner>,
    /// With how many there are in all.
    cancels: ArcSwap<(Semaphore, u32)>,
    tasks: TaskTracker,
    /// Somebody has begun to wait for somebody else's permit.
    contended: Arc<Notify>,
    me: Weak<Self>,
}

#[derive(Debug)]
struct Inner {
    core: Core,
    idle: HashMap<SlotId, (Box<ServerConn>, Millis)>,
    handoffs: HashMap<WaiterId, Arc<Handoff>>,
    pools: BTreeMap<PoolId, Weak<Pool>>,
    /// Floors and cap when they were last seen not to fit; told once.
    broken_promise: Option<(u64, u32)>,
    /// The clock's task was told that somebody waits for somebody else's permit, and nudges until nobody does.
    nudging: bool,
}

/// What goes on in a tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Activity {
    /// Client connections.
    pub clients: u32,
    /// Clients that wait for a server connection.
    pub waiting: usize,
    /// Server connections that are lent, or being made fit to be lent again.
    pub active: u32,
    /// All that PostgreSQL counts, idle and closing ones included.
    pub connections: u32,
    /// Lent beyond their transaction.
    pub pinned: u32,
}

/// What a session that asks for a connection gets.
#[derive(Debug)]
pub enum Asked {
    Lease(Lease),
    Waiting(Waiting),
    Refused(Refusal),
}

/// What the pools of a server look like at one moment.
#[derive(Debug, Clone)]
pub struct PoolSnapshot {
    pub tenant: TenantId,
    pub role: String,
    pub server: String,
    pub counts: Counts,
    pub explanation: Explanation,
    pub budget: Option<Budget>,
}

impl Server {
    /// Starts with nothing open; its upkeep runs until `close`. Must be called within the runtime.
    pub fn start(name: &str, settings: &tenantry_config::Server) -> Result<Arc<Self>, TlsError> {
        let endpoint = endpoint(settings)?;
        let server = Arc::new_cyclic(|me| Self {
            name: ArcSwap::from_pointee(name.to_owned()),
            endpoint: ArcSwap::from_pointee(endpoint),
            inner: Mutex::new(Inner {
                core: Core::new(limits(settings)),
                idle: HashMap::new(),
                handoffs: HashMap::new(),
                pools: BTreeMap::new(),
                broken_promise: None,
                nudging: false,
            }),
            cancels: ArcSwap::from_pointee(cancels(settings)),
            tasks: TaskTracker::new(),
            contended: Arc::default(),
            me: me.clone(),
        });
        tokio::spawn(keep_time(Arc::downgrade(&server), Arc::clone(&server.contended)));
        Ok(server)
    }

    /// The part of a reload that can fail.
    pub fn prepare(settings: &tenantry_config::Server) -> Result<Endpoint, TlsError> {
        endpoint(settings)
    }

    /// New limits, and a new address or name; connections that are open stay until they come to rest. `fresh`: what was
    /// prepared of these settings.
    pub fn reload(&self, name: &str, settings: &tenantry_config::Server, fresh: Endpoint) {
        if *self.name.load_full() != name {
            self.name.store(Arc::new(name.to_owned()));
        }
        if self.cancels.load().1 != settings.max_cancels {
            self.cancels.store(Arc::new(cancels(settings)));
        }
        let old = self.endpoint.load();
        let same_place = old.host == fresh.host && old.port == fresh.port;
        let moved = !same_place || old.tls_mode != fresh.tls_mode;
        if same_place {
            *fresh.last_good.lock() = *old.last_good.lock();
        }
        drop(old);
        self.endpoint.store(Arc::new(fresh));
        let mut actions = Actions::new();
        let now = Millis::now();
        let mut inner = self.inner.lock();
        inner.core.set_limits(limits(settings), now);
        if moved {
            let pools: Vec<_> = inner.pools.keys().copied().collect();
            pools.into_iter().for_each(|id| inner.core.reconnect(id, now, &mut actions));
        }
        self.act(inner, actions);
        if moved {
            self.pools_of(|_| true).iter().for_each(|pool| pool.hub.nudge());
        }
    }

    /// As the settings call it.
    #[must_use]
    pub fn name(&self) -> Arc<String> {
        self.name.load_full()
    }

    #[must_use]
    pub fn endpoint(&self) -> Arc<Endpoint> {
        self.endpoint.load_full()
    }

    /// A pool for one (tenant, role); it lives as long as somebody holds it. `before`: the same role's at the server that the
    /// tenant has left, whose statements, counters and login go on here.
    #[must_use]
    #[expect(clippy::too_many_arguments, reason = "each is another part of what a pool begins with")]
    pub fn add_pool(
        &self,
        place: Place,
        gate: Gate,
        budget: Budget,
        hub: Arc<Hub>,
        role: &str,
        settings: PoolSettings,
        credentials: Credentials,
        before: Option<&Pool>,
    ) -> Arc<Pool> {
        let may_prewarm = !matches!(credentials, Credentials::ScramKeys { .. });
        let mut inner = self.inner.lock();
        let key = inner.core.tenant(&place.tenant, budget, Millis::now());
        let id = inner.core.add_pool(key, pool_limits(&settings), may_prewarm, gate);
        let pool = Arc::new(Pool {
            id,
            place: ArcSwap::from_pointee(place),
            role: role.to_owned(),
            server: self.me(),
            settings: ArcSwap::from_pointee(settings),
            keyring: Mutex::new(
                before.map_or_else(|| Keyring::new(credentials), |before| before.keyring.lock().copy()),
            ),
            welcome: Mutex::new(None),
            login_error: Mutex::new(None),
            statements: before.map_or_else(Arc::default, |before| Arc::clone(&before.statements)),
            stats: before.map_or_else(Arc::default, |before| Arc::clone(&before.stats)),
            functions: KnownFunctions::new(Arc::clone(&hub.makers)),
            // Another server may tell other columns: each statement is looked at once more.
            plans: std::sync::atomic::AtomicU32::new(before.map_or(0, |before| before.plans().wrapping_add(1))),
            reads_sequences: std::sync::atomic::AtomicBool::new(before.is_some_and(Pool::reads_sequences)),
            pinned: std::sync::atomic::AtomicU32::new(0),
            hub,
            listening: std::sync::atomic::AtomicU32::new(0),
            reconnected: std::sync::atomic::AtomicU64::new(0),
            tried: Mutex::new(Vec::new()),
            common: Mutex::new(Vec::new()),
            successor: std::sync::OnceLock::new(),
        });
        inner.pools.insert(id, Arc::downgrade(&pool));
        pool
    }

    /// A new budget of a tenant; connections above its ceiling close as they come to rest.
    pub fn set_budget(&self, tenant: &TenantId, budget: Budget) {
        self.inner.lock().core.set_budget(tenant, budget, Millis::now());
        self.pools_of(|at| at.tenant == *tenant).iter().for_each(|pool| pool.hub.nudge());
    }

    /// Every pool of a tenant, also those that only old sessions hold.
    pub(crate) fn pools_of(&self, is_meant: impl Fn(&Place) -> bool) -> Vec<Arc<Pool>> {
        // The last holder of a pool takes the lock when it lets go: nothing is let go under it.
        let all: Vec<Arc<Pool>> = self.inner.lock().pools.values().filter_map(Weak::upgrade).collect();
        all.into_iter().filter(|pool| is_meant(&pool.place())).collect()
    }

    /// Opens or closes all pools of a tenant.
    pub fn set_gate(&self, is_meant: impl Fn(&Place) -> bool, gate: Gate) {
        let mut actions = Actions::new();
        let now = Millis::now();
        let pools = self.pools_of(is_meant);
        let mut inner = self.inner.lock();
        let ids: Vec<PoolId> = pools.iter().map(|pool| pool.id).collect();
        inner.core.set_gates(&ids, gate, now, &mut actions);
        self.act(inner, actions);
        pools.iter().for_each(|pool| pool.hub.nudge());
    }

    /// Whether a pool lets anybody in.
    #[must_use]
    pub fn gate(&self, pool: PoolId) -> Gate {
        self.inner.lock().core.gate(pool)
    }

    /// Where the server is: another value, another place.
    pub(super) fn address(&self) -> (String, u16) {
        let endpoint = self.endpoint.load();
        (endpoint.host.clone(), endpoint.port)
    }

    /// The tenant's pools lead to another database or have another name from now on.
    pub fn relocate(&self, is_meant: impl Fn(&Place) -> bool, place: &Place) {
        let mut actions = Actions::new();
        let now = Millis::now();
        let pools = self.pools_of(is_meant);
        let mut inner = self.inner.lock();
        for pool in &pools {
            let old = pool.place.swap(Arc::new(place.clone()));
            if old.tenant != place.tenant {
                inner.core.rename_tenant(pool.id, &place.tenant);
            }
            if old.database != place.database {
                inner.core.reconnect(pool.id, now, &mut actions);
            }
        }
        self.act(inner, actions);
    }

    /// What the connections of a tenant do.
    #[must_use]
    pub fn activity(&self, is_meant: impl Fn(&Place) -> bool) -> Activity {
        let pools = self.pools_of(is_meant);
        let inner = self.inner.lock();
        let mut sum = Activity::default();
        for pool in &pools {
            let counts = inner.core.counts(pool.id);
            sum.waiting += inner.core.waiting(pool.id);
            sum.active +=
                counts.of(SlotState::Active) + counts.of(SlotState::Resetting) + counts.of(SlotState::CancelPending);
            sum.connections += counts.sum();
            sum.pinned += pool.pinned();
        }
        drop(inner);
        sum
    }

    /// New settings of a pool; open connections stay.
    pub fn reload_pool(&self, pool: &Pool, settings: PoolSettings) {
        self.inner.lock().core.set_pool_limits(pool.id, pool_limits(&settings), Millis::now());
        pool.settings.store(Arc::new(settings));
        pool.hub.nudge();
    }

    /// PgBouncer's RECONNECT: connections are closed as they come to rest.
    pub fn reconnect(&self, pool: &Pool) {
        let mut actions = Actions::new();
        let mut inner = self.inner.lock();
        inner.core.reconnect(pool.id, Millis::now(), &mut actions);
        self.act(inner, actions);
    }

    /// The same for all pools of a tenant, also those that only old sessions hold.
    pub fn reconnect_those(&self, is_meant: impl Fn(&Place) -> bool) {
        self.pools_of(is_meant).iter().for_each(|pool| self.reconnect(pool));
    }

    /// It has no connection, not even one that is closing, and nobody waits for one.
    #[must_use]
    pub fn is_unused(&self, pool: &Pool) -> bool {
        let inner = self.inner.lock();
        inner.core.counts(pool.id).sum() == 0 && inner.core.waiting(pool.id) == 0
    }

    /// The pool is gone with its last holder: its connections are closed as they come to rest.
    pub(super) fn forget(&self, pool: PoolId) {
        let mut actions = Actions::new();
        let mut inner = self.inner.lock();
        inner.pools.remove(&pool);
        inner.core.retire_pool(pool, Millis::now(), &mut actions);
        self.act(inner, actions);
    }

    /// Asks for a connection. Never waits: an idle one is lent at once, else the session gets a place in the queue.
    pub fn checkout(&self, pool: &Arc<Pool>, handoff: &Arc<Handoff>, now: Millis) -> Asked {
        loop {
            let mut actions = Actions::new();
            let mut inner = self.inner.lock();
            match inner.core.checkout(pool.id, now, &mut actions) {
                Checkout::Ready(slot) => {
                    let Some((conn, since)) = inner.idle.remove(&slot) else {
                        debug_assert!(false, "an idle slot without its connection");
                        continue;
                    };
                    drop(inner);
                    if now.since(since) >= PEEK_AFTER && conn.stream.has_input() {
                        // It said something while idle, most likely its last words. Never lend it unheard.
                        self.hear_out(conn, Arc::clone(pool));
                        continue;
                    }
                    return Asked::Lease(Lease::new(pool, conn));
                }
                Checkout::Queued(waiter) => {
                    inner.handoffs.insert(waiter, Arc::clone(handoff));
                    if !inner.nudging && inner.core.is_contended() {
                        inner.nudging = true;
                        self.contended.notify_one();
                    }
                    self.act(inner, actions);
                    return Asked::Waiting(Waiting::new(pool, handoff, waiter, now));
                }
                Checkout::Refused(refusal) => return Asked::Refused(refusal),
            }
        }
    }

    pub(super) fn release(&self, conn: Box<ServerConn>, now: Millis) {
        let mut actions = Actions::new();
        let mut inner = self.inner.lock();
        let rested = inner.core.release(conn.slot, now, &mut actions);
        self.place(inner, conn, rested, now, actions);
    }

    pub(super) fn change(&self, slot: SlotId, event: SlotEvent, now: Millis) {
        let mut actions = Actions::new();
        let mut inner = self.inner.lock();
        inner.core.change(slot, event, now, &mut actions);
        self.act(inner, actions);
    }

    pub(super) fn close_lent(&self, conn: Box<ServerConn>, pool: &Pool) {
        Stats::count(&pool.stats.server_closes);
        self.change(conn.slot, SlotEvent::Close, Millis::now());
        self.spawn_close(conn);
    }

    pub(super) fn leave_queue(&self, pool: PoolId, waiter: WaiterId) -> bool {
        let mut inner = self.inner.lock();
        let left = inner.core.leave_queue(pool, waiter, Millis::now());
        if left {
            inner.handoffs.remove(&waiter);
        }
        left
    }

    pub(super) fn credentials_known(&self, pool: PoolId) {
        self.inner.lock().core.credentials_known(pool, Millis::now());
    }

    /// Cancels what runs on a connection; the number under way at once is limited, and so is the time.
    /// True when PostgreSQL has acted on it; false when that is unknown, and it may yet hit whoever comes next.
    pub async fn cancel(self: Arc<Self>, key: tenantry_wire::startup::CancelKey, deadline: Duration) -> bool {
        let endpoint = self.endpoint();
        let cancels = self.cancels.load_full();
        let work = async {
            let _permit = cancels.0.acquire().await.ok()?;
            connect::cancel(&endpoint, &key).await.ok()
        };
        let delivered = tokio::time::timeout(deadline, work).await.ok().flatten().is_some();
        if !delivered {
            tracing::warn!(server = %self.name.load(), "a cancel request could not be delivered");
        }
        delivered
    }

    /// Runs work that belongs to this server's connections; `close` waits for it.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        // Without a runtime there is nobody left to talk to PostgreSQL: the sockets close with the process.
        if tokio::runtime::Handle::try_current().is_ok() {
            self.tasks.spawn(work);
        }
    }

    /// Closes what is idle and waits, up to `deadline`, until PostgreSQL has closed every connection.
    pub async fn close(&self, deadline: Duration) {
        let mut actions = Actions::new();
        let now = Millis::now();
        {
            let mut inner = self.inner.lock();
            inner.core.stop_dialing();
            let pools: Vec<_> = inner.pools.keys().copied().collect();
            pools.into_iter().for_each(|id| inner.core.reconnect(id, now, &mut actions));
            self.act(inner, actions);
        }
        self.tasks.close();
        let _ = tokio::time::timeout(deadline, self.tasks.wait()).await;
    }

    #[must_use]
    pub fn waste(&self) -> Waste {
        self.inner.lock().core.waste()
    }

    /// Permits held, and the cap.
    #[must_use]
    pub fn permits(&self) -> (u32, u32) {
        self.inner.lock().core.permits()
    }

    /// Connections that PostgreSQL has for roles that are not privileged, if it was asked.
    #[must_use]
    pub fn slots(&self) -> Option<u32> {
        self.inner.lock().core.slots()
    }

    /// Why this pool's queue does not move, or why this waiter of it waits.
    #[must_use]
    pub fn explain(&self, pool: PoolId, waiter: Option<WaiterId>) -> Explanation {
        self.inner.lock().core.explain(pool, waiter, Millis::now())
    }

    #[must_use]
    pub fn snapshot(&self, pool: &Pool) -> PoolSnapshot {
        let now = Millis::now();
        let inner = self.inner.lock();
        PoolSnapshot {
            tenant: pool.tenant(),
            role: pool.role.clone(),
            server: self.name().as_ref().clone(),
            counts: inner.core.counts(pool.id),
            explanation: inner.core.explain(pool.id, None, now),
            budget: inner.core.budget(&pool.tenant()),
        }
    }

    fn me(&self) -> Arc<Self> {
        // `self` is only ever reached through its Arc, so the weak reference upgrades.
        self.me.upgrade().unwrap_or_else(|| unreachable!("a server outlives its own call"))
    }

    fn tick(&self, now: Millis) {
        let mut actions = Actions::new();
        let mut inner = self.inner.lock();
        inner.core.tick(now, &mut actions);
        self.act(inner, actions);
    }

    /// True while the cap keeps somebody waiting.
    fn nudge(&self, now: Millis) -> bool {
        let mut inner = self.inner.lock();
        inner.nudging = inner.core.is_contended();
        if !inner.nudging {
            return false;
        }
        let mut actions = Actions::new();
        inner.core.nudge(now, &mut actions);
        self.act(inner, actions);
        true
    }

    /// Does what the core decided. Deliveries happen under the lock: who leaves the queue in vain finds its connection.
    fn act(&self, mut inner: parking_lot::MutexGuard<'_, Inner>, actions: Actions) {
        let mut later: smallvec::SmallVec<[Later; 2]> = smallvec::SmallVec::new();
        for action in actions {
            match action {
                Action::Dial { slot, pool } => {
                    later.push(Later::Dial(slot, inner.pools.get(&pool).and_then(Weak::upgrade)))
                }
                Action::Close { slot } => later.extend(inner.idle.remove(&slot).map(|(conn, _)| Later::Close(conn))),
                Action::Check { slot } => later.extend(inner.idle.remove(&slot).map(|(conn, _)| Later::Check(conn))),
                Action::Refuse { waiter, refusal } => {
                    if let Some(handoff) = inner.handoffs.remove(&waiter) {
                        handoff.refuse(refusal);
                    }
                }
            }
        }
        drop(inner);
        later.into_iter().for_each(|work| self.begin(work));
    }

    fn begin(&self, work: Later) {
        match work {
            Later::Dial(slot, Some(pool)) => self.spawn_dial(slot, pool),
            Later::Dial(slot, None) => {
                // The pool is gone with its tenant: nobody wants this connection.
                self.dial_failed(slot, DialFailure::Later);
                self.closed(slot);
            }
            Later::Close(conn) => self.spawn_close(conn),
            Later::Check(conn) => self.spawn_check(conn),
        }
    }

    fn spawn_dial(&self, slot: SlotId, pool: Arc<Pool>) {
        let server = self.me();
        self.spawn(async move {
            let mut guard = PermitGuard::new(&server, slot, Held::ByDial);
            let (endpoint, (login, turn)) = (server.endpoint(), pool.login());
            let limit = pool.settings().pool.server_connect_timeout;
            let dialed = connect::connect_within(limit, &endpoint, &login, slot).await;
            let dialed = match dialed {
                Ok((conn, room)) => look_at_functions(&pool, conn, limit).await.map(|conn| (conn, room)),
                Err(none) => Err(none),
            };
            match dialed {
                Ok((conn, room)) => {
                    guard.slot = None;
                    pool.login_worked(turn);
                    server.dialed(&pool, Box::new(conn), room);
                }
                Err(NoLogin { error, half_open }) => {
                    guard.held = Held::ToItsEnd;
                    server.report_failure(&pool, slot, turn, &error);
                    if let Some(stream) = half_open {
                        upkeep::end(stream).await;
                    }
                }
            }
        });
    }

    fn dialed(&self, pool: &Pool, conn: Box<ServerConn>, room: Option<Room>) {
        Stats::count(&pool.stats.server_connects);
        *pool.welcome.lock() = Some(Arc::clone(&conn.baseline));
        *pool.login_error.lock() = None;
        let now = Millis::now();
        let mut actions = Actions::new();
        let mut inner = self.inner.lock();
        let rested = inner.core.dialed(conn.slot, room, now, &mut actions);
        self.tell_broken_promise(&mut inner);
        self.place(inner, conn, rested, now, actions);
    }

    /// Says so once, when the floors have come not to fit.
    fn tell_broken_promise(&self, inner: &mut Inner) {
        let broken = inner.core.broken_promise();
        if broken != std::mem::replace(&mut inner.broken_promise, broken)
            && let Some((floors, cap)) = broken
        {
            tracing::warn!(server = %self.name.load(), floors, cap, "the floors of the tenants cannot all be kept, and are \
                scaled down in proportion: lower them, or raise max_connections");
        }
    }

    /// Puts a connection where the core says, and does what it decided besides.
    fn place(
        &self,
        mut inner: parking_lot::MutexGuard<'_, Inner>,
        conn: Box<ServerConn>,
        rested: Rested,
        now: Millis,
        actions: Actions,
    ) {
        let mut over = None;
        match rested {
            Rested::Hand(waiter) => match inner.handoffs.remove(&waiter) {
                Some(handoff) => handoff.deliver(conn),
                None => {
                    debug_assert!(false, "a waiter without its handoff");
                    over = Some(Later::Close(conn));
                }
            },
            Rested::Idle => {
                inner.idle.insert(conn.slot, (conn, now));
            }
            Rested::Check => over = Some(Later::Check(conn)),
            Rested::Close => over = Some(Later::Close(conn)),
        }
        self.act(inner, actions);
        if let Some(work) = over {
            self.begin(work);
        }
    }

    fn report_failure(&self, pool: &Pool, slot: SlotId, turn: u32, error: &ConnectError) {
        Stats::count(&pool.stats.server_connect_failures);
        tracing::warn!(server = %self.name.load(), tenant = %pool.tenant(), role = %pool.role, %error, "login to the server failed");
        // While a password is changed PostgreSQL may have the one that is not tried first.
        let may_yet_work = error.is_wrong_password() && pool.password_refused(turn);
        let failure = if may_yet_work { DialFailure::Later } else { error.failure() };
        let refused = match error {
            ConnectError::Refused(body) => LoginError::Server(body.clone()),
            ConnectError::Credentials(..) => {
                LoginError::Ours("the server login for this role is not set up in Tenantry".to_owned())
            }
            _ => LoginError::Ours("the login to the server failed".to_owned()),
        };
        *pool.login_error.lock() = Some(refused);
        self.dial_failed(slot, failure);
    }

    fn dial_failed(&self, slot: SlotId, failure: DialFailure) {
        let mut actions = Actions::new();
        let mut inner = self.inner.lock();
        inner.core.dial_failed(slot, failure, Millis::now(), &mut actions);
        self.act(inner, actions);
    }

    fn spawn_close(&self, conn: Box<ServerConn>) {
        let server = self.me();
        let slot = conn.slot;
        self.spawn(async move {
            let _guard = PermitGuard::new(&server, slot, Held::ToItsEnd);
            upkeep::close(conn, &server.endpoint()).await;
        });
    }

    /// PostgreSQL has closed its end.
    fn closed(&self, slot: SlotId) {
        let mut actions = Actions::new();
        let mut inner = self.inner.lock();
        inner.core.closed(slot, Millis::now(), &mut actions);
        self.act(inner, actions);
    }

    fn spawn_check(&self, mut conn: Box<ServerConn>) {
        let server = self.me();
        self.spawn(async move {
            let mut guard = PermitGuard::new(&server, conn.slot, Held::ByCheck);
            let absorbed = async {
                upkeep::absorb(&mut conn).await.map_err(|_| upkeep::Unusable)?;
                upkeep::ask_for_room(&mut conn).await
            };
            let answer = tokio::time::timeout(CHECK_LIMIT, absorbed).await;
            guard.slot = None;
            server.after_check(conn, answer.unwrap_or(Err(upkeep::Unusable)));
        });
    }

    /// A lent connection had something to say: listens, then puts it back or closes it.
    fn hear_out(&self, mut conn: Box<ServerConn>, pool: Arc<Pool>) {
        let server = self.me();
        self.spawn(async move {
            let mut guard = PermitGuard::new(&server, conn.slot, Held::ByCheck);
            let heard = tokio::time::timeout(CHECK_LIMIT, upkeep::absorb(&mut conn)).await;
            guard.slot = None;
            if let Ok(Err(Some(words))) = &heard {
                tracing::info!(server = %server.name.load(), tenant = %pool.tenant(), reason = %words, "PostgreSQL ended an idle connection");
            }
            server.after_check(conn, if matches!(heard, Ok(Ok(()))) { Ok(None) } else { Err(upkeep::Unusable) });
        });
    }

    fn after_check(&self, conn: Box<ServerConn>, answer: Result<Option<Room>, upkeep::Unusable>) {
        let now = Millis::now();
        let Ok(room) = answer else {
            self.change(conn.slot, SlotEvent::Close, now);
            self.spawn_close(conn);
            return;
        };
        let mut actions = Actions::new();
        let mut inner = self.inner.lock();
        let rested = inner.core.checked(conn.slot, room, now, &mut actions);
        self.tell_broken_promise(&mut inner);
        self.place(inner, conn, rested, now, actions);
    }
}

/// Time passes for the core: ten times a second, and every `NUDGE` while the cap keeps somebody waiting, so that a
/// permit that has become free to be moved is moved.
async fn keep_time(server: Weak<Server>, contended: Arc<Notify>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut pulse = Pulse::new(Millis::now());
    let mut somebody_waits = false;
    loop {
        let due = tokio::select! {
            _ = ticks.tick() => true,
            () = contended.notified() => false,
            () = tokio::time::sleep(NUDGE), if somebody_waits => false,
        };
        let Some(server) = server.upgrade() else { return };
        let now = Millis::now();
        if due && pulse.beat(now) {
            server.tick(now);
        }
        somebody_waits = server.nudge(now);
    }
}

/// How long a background check may take before the connection is closed.
const CHECK_LIMIT: Duration = Duration::from_secs(5);

enum Later {
    Dial(SlotId, Option<Arc<Pool>>),
    Close(Box<ServerConn>),
    Check(Box<ServerConn>),
}

/// What a task holds a permit for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    /// A dial: it failed, if nothing else is said.
    ByDial,
    /// A sign of life: there was none, if nothing else is said.
    ByCheck,
    /// Its end, which the core knows of.
    ToItsEnd,
}

/// A task that does not pass its connection on gives the permit back, however it ends: a panic or a cancelled task must
/// not keep the slot for ever.
struct PermitGuard {
    server: Arc<Server>,
    slot: Option<SlotId>,
    held: Held,
}

impl PermitGuard {
    fn new(server: &Arc<Server>, slot: SlotId, held: Held) -> Self {
        Self { server: Arc::clone(server), slot: Some(slot), held }
    }
}

impl Drop for PermitGuard {
    fn drop(&mut self) {
        let Some(slot) = self.slot.take() else { return };
        match self.held {
            Held::ByDial => self.server.dial_failed(slot, DialFailure::Later),
            Held::ByCheck => self.server.change(slot, SlotEvent::Close, Millis::now()),
            Held::ToItsEnd => {}
        }
        self.server.closed(slot);
    }
}

fn endpoint(settings: &tenantry_config::Server) -> Result<Endpoint, TlsError> {
    Ok(Endpoint {
        host: settings.host.clone(),
        port: settings.port,
        tls_mode: settings.tls.mode,
        direct_tls: settings.tls.direct,
        connector: Connector::load(&settings.tls, &settings.host)?,
        tcp_user_timeout: settings.tcp_user_timeout,
        last_good: Mutex::new(None),
    })
}

fn cancels(settings: &tenantry_config::Server) -> (Semaphore, u32) {
    (Semaphore::new(usize::try_from(settings.max_cancels).unwrap_or(1)), settings.max_cancels)
}

fn limits(settings: &tenantry_config::Server) -> ServerLimits {
    ServerLimits {
        cap: match settings.cap {
            OrAuto::Auto => None,
            OrAuto::Is(cap) => Some(cap.get()),
        },
        reserve: settings.reserve,
        max_connecting: settings.max_connecting,
        login_retry: millis(settings.server_login_retry),
    }
}

fn pool_limits(settings: &PoolSettings) -> PoolLimits {
    let pool = &settings.pool;
    PoolLimits {
        size: pool.pool_size,
        min_size: pool.min_pool_size,
        max_waiters: usize::try_from(pool.max_waiters).unwrap_or(usize::MAX),
        query_wait_timeout: millis(pool.query_wait_timeout),
        round_robin: pool.server_round_robin,
        lifetime: millis(pool.server_lifetime),
        idle_timeout: millis(pool.server_idle_timeout),
        check_delay: millis(pool.server_check_delay),
    }
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

/// If it is time to: on a fresh connection nobody waits for the answer but who waits for the connection.
async fn look_at_functions(pool: &Pool, mut conn: ServerConn, limit: Duration) -> Result<ServerConn, NoLogin> {
    let Some(asked) = pool.functions.to_ask(Millis::now()) else { return Ok(conn) };
    let sql = if asked.is_all { functions::READ.as_str() } else { functions::PRINT };
    let answered = tokio::time::timeout(limit, upkeep::ask_for_rows(&mut conn, sql)).await;
    let Ok(Ok(rows)) = answered else {
        let error = ConnectError::Timeout { reached: true };
        return Err(NoLogin { error, half_open: Some(conn.stream) });
    };
    let mut reading = Reading::default();
    let made_sense = rows.iter().all(|row| {
        let columns = message::read_data_row(row).unwrap_or_default();
        let text = |i: usize| columns.get(i).copied().flatten().and_then(|v| std::str::from_utf8(v).ok());
        matches!((text(0), text(1)), (Some(kind), Some(name)) if reading.row(kind, name))
    });
    if made_sense {
        pool.read_functions(asked, reading, false, Millis::now());
    }
    Ok(conn)
}
