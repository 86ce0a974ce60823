//! The live map: database name → tenant → server. The one door of the data plane for everybody outside.
//!
//! Lookups read an atomic snapshot; a reload swaps it whole, or not at all. Sessions that are under way keep what they
//! hold: a changed tenant's pools live on where they still fit.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tenantry_config::{ClientTlsMode, Settings, TenantId, TenantState};
use tenantry_wire::{error::ErrorResponse, scram::ClientKey};
use tokio::sync::{Notify, Semaphore};
use tokio_util::task::TaskTracker;

use crate::{
    clock::{Millis, Pulse},
    listen::{self, Listener},
    net::{
        memory::Memory,
        tls::{Acceptor, Identity, TlsError},
    },
    pool::{
        Place, Pool,
        decision::{Gate, PoolId, Waste},
        explain::Explanation,
        server::{PoolSnapshot, Server},
        stats::Stats,
    },
    session::{
        Limits,
        attempts::{Attempts, Pair},
        errors,
        lobby::{Guest, Lobby},
        pin::Pins,
        registry::{EndReason, Registry},
        state::SessionState,
    },
    tenant::{NoSeat, RoleEntry, Seat, Tenant},
};

pub use crate::pool::server::Activity;

/// Why the data plane does not start, or does not take new settings.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot listen on {place}: {source}")]
    Listen { place: String, source: std::io::Error },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("tenant {tenant}: no server named {server}")]
    NoServer { tenant: String, server: String },
}

/// Most tenants that `[tenants."*"]` may bring to life at once.
const MAX_ANY_TENANTS: usize = if cfg!(test) { 3 } else { 10_000 };
/// After so many sweeps, those that nobody uses are forgotten.
const FORGET_EVERY: u32 = 100;
/// How often deadlines of sessions are looked at.
const SWEEP: Duration = Duration::from_millis(100);

/// The data plane of one process.
#[derive(Debug)]
pub struct Directory {
    routes: ArcSwap<Routes>,
    any: Mutex<HashMap<String, Arc<Tenant>>>,
    registry: Arc<Registry>,
    acceptor: Option<Acceptor>,
    addresses: Vec<SocketAddr>,
    unix_socket: Option<PathBuf>,
    clients: Arc<AtomicU32>,
    /// Connections that are no clients yet.
    lobby: Arc<Mutex<Lobby>>,
    memory: Arc<Memory>,
    attempts: Mutex<Attempts>,
    throttled: AtomicU64,
    /// Errors that clients saw before they had a tenant.
    pub refusals: Stats,
    draining: AtomicBool,
    stop: Notify,
    stopped: AtomicBool,
    mock_seed: [u8; 32],
    hashing: Semaphore,
    tasks: TaskTracker,
    reload: Mutex<()>,
}

#[derive(Debug)]
struct Routes {
    settings: Settings,
    servers: BTreeMap<String, Arc<Server>>,
    /// Servers that were taken out of the settings, while somebody holds connections of theirs.
    gone: Vec<Weak<Server>>,
    tenants: BTreeMap<TenantId, Arc<Tenant>>,
    /// By name and by alias, those that clients may know of.
    names: BTreeMap<TenantId, Arc<Tenant>>,
    shared_roles: BTreeMap<String, Arc<RoleEntry>>,
    any_roles: BTreeMap<String, Arc<RoleEntry>>,
}

/// What the data plane looks like at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub servers: Vec<ServerSnapshot>,
    pub pools: Vec<PoolView>,
    /// Sessions by (tenant, role) and state.
    pub sessions: HashMap<(TenantId, String), [u64; SessionState::ALL.len()]>,
    /// Client connections, those still logging in included.
    pub clients: u32,
    /// Bytes held for large messages, and the most there may be.
    pub message_memory: (usize, usize),
    /// Logins that were turned away because too many had failed.
    pub throttled_logins: u64,
}

/// A server's permits.
#[derive(Debug, Clone)]
pub struct ServerSnapshot {
    pub name: String,
    pub held: u32,
    pub cap: u32,
    pub waste: Waste,
}

/// A pool and its counters.
#[derive(Debug, Clone)]
pub struct PoolView {
    pub snapshot: PoolSnapshot,
    pub pool: Arc<Pool>,
}

/// A client's session at one moment.
#[derive(Debug, Clone)]
pub struct ClientSnapshot {
    pub id: u64,
    /// The process number that the client was told at its login.
    pub process: u32,
    pub role: String,
    pub server: String,
    pub pool: PoolId,
    pub state: SessionState,
    /// How long it has been in that state.
    pub in_state: Duration,
    /// Why it keeps its server connection.
    pub pins: Pins,
}

/// One client connection; counted out when dropped.
#[derive(Debug)]
pub struct ClientGuard(Arc<AtomicU32>);

impl Drop for ClientGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Directory {
    /// Binds the listeners and serves. Must be called within a tokio runtime.
    pub async fn start(mut settings: Settings) -> Result<Arc<Self>, StartError> {
        settings.servers.values_mut().for_each(forget_control);
        let acceptor = load_acceptor(&settings).await?;
        let mut listeners = Vec::new();
        for address in &settings.listen.addresses {
            listeners.push(listen::tcp(*address)?);
        }
        let addresses: Vec<_> = listeners.iter().filter_map(Listener::address).collect();
        let port = addresses.first().map_or(6432, SocketAddr::port);
        let unix_socket = settings.listen.unix_socket_dir.as_ref().map(|dir| dir.join(format!(".s.PGSQL.{port}")));
        if let Some(path) = &unix_socket {
            listeners.push(listen::unix(path, settings.listen.unix_socket_mode)?);
        }
        let memory = Arc::new(Memory::new(settings.listen.max_message_memory));
        let routes = Routes::build(settings, None)?;
        routes.tenants.values().for_each(|t| t.prewarm());
        let directory = Arc::new(Self {
            routes: ArcSwap::from_pointee(routes),
            any: Mutex::default(),
            registry: Arc::default(),
            acceptor,
            addresses,
            unix_socket,
            clients: Arc::default(),
            lobby: Arc::default(),
            memory,
            attempts: Mutex::default(),
            throttled: AtomicU64::new(0),
            refusals: Stats::default(),
            draining: AtomicBool::new(false),
            stop: Notify::new(),
            stopped: AtomicBool::new(false),
            mock_seed: rand::random(),
            // Hashing may use one core's worth of threads at a time; the rest of the machine serves queries.
            hashing: Semaphore::new(std::thread::available_parallelism().map_or(1, std::num::NonZero::get)),
            tasks: TaskTracker::new(),
            reload: Mutex::default(),
        });
        for listener in listeners {
            tokio::spawn(listen::run(listener, Arc::clone(&directory)));
        }
        tokio::spawn(sweep(Arc::downgrade(&directory)));
        Ok(directory)
    }

    /// Takes new settings, whole or not at all. What only a restart can change (addresses) stays as it is.
    pub fn reload(&self, mut settings: Settings) -> Result<(), StartError> {
        let _one_at_a_time = self.reload.lock();
        settings.servers.values_mut().for_each(forget_control);
        let old = self.routes.load_full();
        let (was, is) = (old.settings.listen.tls.mode, settings.listen.tls.mode);
        if (was == ClientTlsMode::Disable) != (is == ClientTlsMode::Disable) {
            // Whether there is TLS at all is decided at the start; `serve` says so.
            settings.listen.tls.mode = was;
        }
        // What can fail comes first, so that a bad file changes nothing.
        let identity = match &self.acceptor {
            Some(acceptor) => Some((acceptor, Identity::load(&settings.listen.tls)?)),
            None => None,
        };
        let fresh = Routes::build(settings, Some(&old))?;
        if let Some((acceptor, identity)) = identity {
            acceptor.show(identity);
        }
        fresh.tenants.values().for_each(|t| t.prewarm());
        self.memory.set_limit(fresh.settings.listen.max_message_memory);
        self.routes.store(Arc::new(fresh));
        let fresh = self.routes.load_full();
        old.tenants.values().for_each(|tenant| drop(tenant.retire()));
        self.reload_any(&fresh);
        self.end_where_nothing_runs(&old, &fresh);
        Ok(())
    }

    /// Sessions of tenants that are drained, archived or gone end, those in a transaction after it.
    fn end_where_nothing_runs(&self, old: &Routes, fresh: &Routes) {
        let by_number = numbers(&fresh.tenants);
        for tenant in old.tenants.values() {
            let place = tenant.place();
            let now = match place.number {
                Some(number) => by_number.get(&number).copied(),
                // A tenant of the file has no state, and one that was taken out of it serves whom it has.
                None => continue,
            };
            let reason = match now.map_or(TenantState::Dropped, |now| now.state()) {
                TenantState::Drained | TenantState::Archived => EndReason::Drained,
                TenantState::Dropped => EndReason::Dropped,
                _ => continue,
            };
            let is_meant = |at: &Place| at.is_of(&place.tenant, place.number);
            tenant.server.set_gate(is_meant, Gate::Shut);
            self.registry.end_those(is_meant, reason);
        }
    }

    // For the control plane. A tenant of the catalog is asked for by its number, since one of the settings file may have its
    // name; any other by its name or by an alias.

    /// What a tenant's clients and its connections do; `None`: no such tenant.
    #[must_use]
    pub fn activity(&self, tenant: &str, number: Option<i64>) -> Option<Activity> {
        Some(self.find_one(tenant, number)?.activity())
    }

    /// Cancels what the tenant's sessions run, as their clients could; how many statements.
    pub fn cancel_running(&self, tenant: &str, number: Option<i64>) -> usize {
        let Some(tenant) = self.find_one(tenant, number) else { return 0 };
        let place = tenant.place();
        self.registry.cancel_those(|at| at.is_of(&place.tenant, place.number))
    }

    /// Ends the tenant's sessions with 57P01: after their transactions, or at once. How many of them are in one.
    pub fn end_sessions(&self, tenant: &str, number: Option<i64>, at_once: bool) -> usize {
        let Some(tenant) = self.find_one(tenant, number) else { return 0 };
        let place = tenant.place();
        let reason = if at_once { EndReason::DrainedNow } else { EndReason::Drained };
        self.registry.end_those(|at| at.is_of(&place.tenant, place.number), reason)
    }

    /// Ends those of the tenant's sessions that are in a transaction, with 57P01; the others only wait. How many.
    pub fn end_transactions(&self, tenant: &str, number: Option<i64>) -> usize {
        let Some(tenant) = self.find_one(tenant, number) else { return 0 };
        let place = tenant.place();
        self.registry.end_transactions(|at| at.is_of(&place.tenant, place.number), EndReason::Moved)
    }

    /// Gives up the tenant's server connections: idle ones now, lent ones as they come to rest. Its next query opens new ones.
    pub fn release(&self, tenant: &str) {
        if let Some(tenant) = self.find(tenant) {
            tenant.release();
        }
    }

    /// What the pool of a role would prove itself with to PostgreSQL, if that is the key of a client that logged in: for the
    /// bridge from one password to the next. A secret.
    #[must_use]
    pub fn client_key(&self, tenant: &str, role: &str) -> Option<ClientKey> {
        self.find(tenant)?.pool_of(role)?.client_key()
    }

    /// For each role of the tenant that was used: why its queue does not move, or what would hold up the next one.
    #[must_use]
    pub fn explain(&self, tenant: &str) -> Vec<(String, Explanation)> {
        let any = || self.any.lock().get(tenant).cloned();
        let pools = self.find(tenant).or_else(any).map(|tenant| tenant.pools()).unwrap_or_default();
        pools.iter().map(|pool| (pool.role.clone(), pool.server.explain(pool.id, None))).collect()
    }

    /// A tenant's sessions, the oldest first; `None`: no such tenant. An alias is none, and a database of `[tenants."*"]` is
    /// one once somebody has used it.
    #[must_use]
    pub fn clients(&self, tenant: &str, number: Option<i64>) -> Option<Vec<ClientSnapshot>> {
        let by_name = || self.routes.load().tenants.get(tenant).cloned();
        let any = || self.any.lock().get(tenant).cloned();
        let found = if number.is_some() { self.find_one(tenant, number) } else { by_name().or_else(any) };
        let (place, now) = (found?.place(), Millis::now());
        let mut clients: Vec<_> = self
            .registry
            .of(|at| at.is_of(&place.tenant, place.number))
            .iter()
            .map(|shared| {
                let pool = shared.pool().latest();
                ClientSnapshot {
                    id: shared.id,
                    process: shared.key.process,
                    role: pool.role.clone(),
                    server: pool.server.name().as_ref().clone(),
                    pool: pool.id,
                    state: shared.state(),
                    in_state: shared.in_state_for(now),
                    pins: shared.pins(),
                }
            })
            .collect();
        clients.sort_unstable_by_key(|client| client.id);
        Some(clients)
    }

    /// Connections that a server has for roles that are not privileged, if it was asked.
    #[must_use]
    pub fn slots(&self, server: &str) -> Option<u32> {
        self.routes.load().servers.get(server)?.slots()
    }

    fn find_one(&self, tenant: &str, number: Option<i64>) -> Option<Arc<Tenant>> {
        let Some(number) = number else { return self.find(tenant) };
        let is_meant = |tenant: &&Arc<Tenant>| tenant.settings.standing.number == Some(number);
        let routes = self.routes.load();
        // Mostly it has that name.
        let by_name = routes.tenants.get(tenant).filter(is_meant);
        by_name.or_else(|| routes.tenants.values().find(is_meant)).cloned()
    }

    fn find(&self, tenant: &str) -> Option<Arc<Tenant>> {
        let routes = self.routes.load();
        routes.tenants.get(tenant).or_else(|| routes.names.get(tenant)).cloned()
    }

    /// The databases that `[tenants."*"]` serves live on with its new settings, unless they have a section of their own now.
    fn reload_any(&self, routes: &Routes) {
        let mut any = self.any.lock();
        let old = std::mem::take(&mut *any);
        for (name, tenant) in old {
            drop(tenant.retire());
            if !routes.names.contains_key(name.as_str())
                && let Some(fresh) = routes.any_tenant(tenant.id.clone(), Some(&tenant))
            {
                any.insert(name, fresh);
            }
        }
    }

    /// Serving, and not about to stop.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        !self.draining.load(Relaxed)
    }

    /// The TCP addresses that were bound.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Stops: accepts no more, lets transactions finish, ends the rest at the deadline, closes every server connection.
    pub async fn drain(&self, deadline: Duration) {
        self.draining.store(true, Relaxed);
        self.stopped.store(true, Relaxed);
        self.stop.notify_waiters();
        self.tasks.close();
        let finished = async {
            // Again and again: a login that was under way becomes a session that must be told too.
            loop {
                self.registry.end_all(EndReason::Shutdown);
                if self.registry.is_empty() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(deadline, finished).await.is_err() {
            tracing::warn!(sessions = self.registry.len(), "drain deadline passed; ending what still runs");
            self.registry.end_all_now();
            let _ = tokio::time::timeout(Duration::from_secs(1), self.tasks.wait()).await;
        }
        let routes = self.routes.load_full();
        // All at once: the deadline of a supervisor does not grow with the number of servers.
        let closing = routes.servers.values().map(|s| {
            let server = Arc::clone(s);
            tokio::spawn(async move { server.close(Duration::from_secs(1)).await })
        });
        for closed in closing.collect::<Vec<_>>() {
            let _ = closed.await;
        }
        if let Some(path) = &self.unix_socket {
            let _ = std::fs::remove_file(path);
        }
    }

    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let routes = self.routes.load_full();
        let any: Vec<_> = self.any.lock().values().cloned().collect();
        let pools = routes.tenants.values().chain(&any).flat_map(|t| t.pools());
        Snapshot {
            servers: routes
                .servers
                .values()
                .map(|s| {
                    let (held, cap) = s.permits();
                    ServerSnapshot { name: s.name().as_ref().clone(), held, cap, waste: s.waste() }
                })
                .collect(),
            pools: pools.map(|pool| PoolView { snapshot: pool.server.snapshot(&pool), pool }).collect(),
            sessions: self.registry.states(),
            clients: self.clients.load(Relaxed).saturating_add(u32::try_from(self.lobby.lock().len()).unwrap_or(0)),
            throttled_logins: self.throttled.load(Relaxed),
            message_memory: (self.memory.held(), self.memory.limit()),
        }
    }

    /// Every tenant of the settings, in order.
    #[must_use]
    pub fn tenants(&self) -> Vec<Arc<Tenant>> {
        self.routes.load().tenants.values().cloned().collect()
    }

    // For sessions.

    pub(crate) fn settings(&self) -> SettingsRef {
        SettingsRef(self.routes.load_full())
    }

    /// What a session that begins now may make us hold.
    pub(crate) fn limits(&self) -> Limits {
        let max_message = self.routes.load().settings.listen.max_message_size;
        Limits { max_message, memory: Arc::clone(&self.memory) }
    }

    pub(crate) fn tenant(&self, database: &str) -> Option<Arc<Tenant>> {
        self.routes.load().names.get(database).cloned()
    }

    /// A role for a database that no tenant has: those of `[tenants."*"]`, and the shared ones.
    pub(crate) fn any_role(&self, name: &str) -> Option<Arc<RoleEntry>> {
        self.routes.load().any_roles.get(name).cloned()
    }

    /// The tenant that `[tenants."*"]` makes for a database nobody else has.
    fn any_tenant(&self, database: &str) -> Option<Arc<Tenant>> {
        let id = TenantId::parse(database).ok()?;
        let mut any = self.any.lock();
        if let Some(tenant) = any.get(database) {
            return Some(Arc::clone(tenant));
        }
        if any.len() >= MAX_ANY_TENANTS {
            forget_unused(&mut any);
        }
        if any.len() >= MAX_ANY_TENANTS {
            return None;
        }
        // Under the lock, which a reload takes after it changed the routes: none is made of old settings unseen by it.
        let tenant = self.routes.load().any_tenant(id, None)?;
        any.insert(database.to_owned(), Arc::clone(&tenant));
        Some(tenant)
    }

    /// A place for who proved this role, with the tenant and the role as they are now.
    pub(crate) fn enter(&self, database: &str, proved: &RoleEntry) -> Result<(Arc<RoleEntry>, Seat), ErrorResponse> {
        let outcome = match self.try_enter(database, proved) {
            Err(NoSeat::Retired) => {
                // In the middle of a reload: when it is over, what is found is what counts.
                let _settled = self.reload.lock();
                self.try_enter(database, proved)
            }
            outcome => outcome,
        };
        outcome.map_err(|refused| match refused {
            NoSeat::Retired => errors::internal(),
            NoSeat::Refused(error) => error,
        })
    }

    fn try_enter(&self, database: &str, proved: &RoleEntry) -> Result<(Arc<RoleEntry>, Seat), NoSeat> {
        let tenant = match self.tenant(database) {
            Some(tenant) => tenant,
            None => self.any_tenant(database).ok_or_else(|| NoSeat::Refused(errors::no_database(database)))?,
        };
        let name = &proved.settings.name;
        let role = tenant.role(name).filter(|role| role.takes(proved));
        let role = role.ok_or_else(|| NoSeat::Refused(errors::authentication_failed(name)))?;
        tenant.admits(database).map_err(NoSeat::Refused)?;
        Ok((Arc::clone(&role), tenant.seat(&role)?))
    }

    /// Whether too many logins have failed from there to hear another.
    pub(crate) fn may_try_login(&self, pair: &Pair) -> bool {
        let Some(limit) = self.routes.load().settings.auth.max_failed_logins else { return true };
        self.heard(self.attempts.lock().may_try(pair, limit, Millis::now()))
    }

    /// A login came to its verdict; false: it is not to be told, since too many failed meanwhile.
    pub(crate) fn judge_login(&self, pair: &Pair, is_right: bool) -> bool {
        let Some(limit) = self.routes.load().settings.auth.max_failed_logins else { return true };
        self.heard(self.attempts.lock().judge(pair, is_right, limit, Millis::now()))
    }

    fn heard(&self, heard: bool) -> bool {
        if !heard {
            self.throttled.fetch_add(1, Relaxed);
        }
        heard
    }

    pub(crate) fn acceptor(&self) -> Option<Acceptor> {
        self.acceptor.clone()
    }

    pub(crate) fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    pub(crate) fn mock_seed(&self) -> &[u8; 32] {
        &self.mock_seed
    }

    /// Somebody has connected.
    pub(crate) fn receive(&self, address: Option<std::net::IpAddr>) -> Guest {
        Guest::enter(&self.lobby, address, self.routes.load().settings.listen.max_client_conn)
    }

    /// Whether the process takes one more client.
    pub(crate) fn admits_another(&self) -> Result<(), ErrorResponse> {
        if !self.is_ready() {
            return Err(errors::shutting_down());
        }
        if self.clients.load(Relaxed) >= self.routes.load().settings.listen.max_client_conn {
            return Err(errors::too_many_clients("max_client_conn"));
        }
        Ok(())
    }

    /// Counts one in.
    pub(crate) fn client_guard(&self) -> Result<ClientGuard, ErrorResponse> {
        let limit = self.routes.load().settings.listen.max_client_conn;
        let counted = self.clients.fetch_update(Relaxed, Relaxed, |n| (n < limit).then_some(n + 1));
        counted.map_err(|_| errors::too_many_clients("max_client_conn"))?;
        Ok(ClientGuard(Arc::clone(&self.clients)))
    }

    pub(crate) fn count_refusal(&self, error: &ErrorResponse) {
        self.refusals.told(error);
    }

    /// Runs hashing work off the threads that serve queries, a bounded amount at a time.
    pub(crate) async fn hash<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ErrorResponse> {
        let _permit = self.hashing.acquire().await.map_err(|_| errors::shutting_down())?;
        tokio::task::spawn_blocking(work).await.map_err(|_| errors::internal())
    }

    /// The one place where tasks of clients begin.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(work);
    }

    pub(crate) async fn stopped(&self) {
        let notified = self.stop.notified();
        if !self.stopped.load(Relaxed) {
            notified.await;
        }
    }
}

/// The settings of one moment.
pub(crate) struct SettingsRef(Arc<Routes>);

impl std::ops::Deref for SettingsRef {
    type Target = Settings;

    fn deref(&self) -> &Settings {
        &self.0.settings
    }
}

impl Routes {
    /// A tenant as `[tenants."*"]` describes it.
    fn any_tenant(&self, id: TenantId, old: Option<&Tenant>) -> Option<Arc<Tenant>> {
        let template = self.settings.any_tenant.as_ref()?;
        let server = self.servers.get(&template.server)?;
        let settings = tenantry_config::Tenant { database: None, ..template.clone() };
        Some(Tenant::new(id, settings, Arc::clone(server), self.any_roles.clone(), old))
    }

    fn build(settings: Settings, old: Option<&Self>) -> Result<Self, StartError> {
        // Everything that can fail comes first: an error leaves the old routes untouched.
        let mut servers = old.map(|old| old.going_on(&settings)).unwrap_or_default();
        let mut kept = Vec::new();
        for (name, server) in &settings.servers {
            match servers.get(name) {
                Some(known) => kept.push((Arc::clone(known), name, server, Server::prepare(server)?)),
                None => drop(servers.insert(name.clone(), Server::start(name, server)?)),
            }
        }
        let shared_roles = entries(&settings.roles, old.map(|o| &o.shared_roles));
        let mut any_roles = shared_roles.clone();
        if let Some(any) = &settings.any_tenant {
            any_roles.extend(entries(&any.roles, old.map(|o| &o.any_roles)));
        }
        let mut tenants = BTreeMap::new();
        let by_number = old.map(|o| numbers(&o.tenants)).unwrap_or_default();
        for (id, tenant) in &settings.tenants {
            let Some(server) = servers.get(&tenant.server) else {
                return Err(StartError::NoServer { tenant: id.to_string(), server: tenant.server.clone() });
            };
            let before = match tenant.standing.number {
                Some(number) => by_number.get(&number).copied(),
                None => old.and_then(|o| o.tenants.get(id.as_str())).filter(|t| t.settings.standing.number.is_none()),
            };
            let roles = roles_of(&tenant.roles, &shared_roles, before.map(|t| t.as_ref()));
            tenants.insert(id.clone(), (tenant.clone(), Arc::clone(server), roles, before.map(Arc::clone)));
        }
        for (server, name, settings, endpoint) in kept {
            server.reload(name, settings, endpoint);
        }
        let tenants: BTreeMap<_, _> = tenants
            .into_iter()
            .map(|(id, (tenant, server, roles, before))| {
                (id.clone(), Tenant::new(id, tenant, server, roles, before.as_deref()))
            })
            .collect();
        let names = names(&tenants);
        let gone = old.map(|old| old.left_out(&servers)).unwrap_or_default();
        Ok(Self { settings, servers, gone, tenants, names, shared_roles, any_roles })
    }

    /// For each server of new settings the one that goes on for it. Who is at the same place has the connections that
    /// PostgreSQL counts there, whatever it was called, and even if it was taken out before: its cap is over all of them.
    fn going_on(&self, settings: &Settings) -> BTreeMap<String, Arc<Server>> {
        let gone: Vec<_> = self.gone.iter().filter_map(Weak::upgrade).collect();
        let same_place = |known: &Server, fresh: &tenantry_config::Server| {
            let endpoint = known.endpoint();
            endpoint.host == fresh.host && endpoint.port == fresh.port
        };
        let mut left: Vec<&Arc<Server>> = self.servers.values().chain(&gone).collect();
        let mut chosen = BTreeMap::new();
        // First a name that was there before: its sessions go with it, wherever it leads now. Then a new name at a known place.
        for (by_place, by_name) in [(true, true), (false, true), (true, false)] {
            for (name, fresh) in settings.servers.iter() {
                let is_it = |known: &&Arc<Server>| {
                    (!by_place || same_place(known, fresh))
                        && (!by_name || self.servers.get(name).is_some_and(|own| Arc::ptr_eq(own, known)))
                };
                if !chosen.contains_key(name)
                    && let Some(at) = left.iter().position(is_it)
                {
                    chosen.insert(name.clone(), Arc::clone(left.remove(at)));
                }
            }
        }
        chosen
    }

    /// Servers that these do not have any more, and that still run.
    fn left_out(&self, servers: &BTreeMap<String, Arc<Server>>) -> Vec<Weak<Server>> {
        let is_out = |known: &Arc<Server>| !servers.values().any(|server| Arc::ptr_eq(server, known));
        let gone = self.gone.iter().filter_map(Weak::upgrade);
        gone.chain(self.servers.values().cloned()).filter(is_out).map(|server| Arc::downgrade(&server)).collect()
    }
}

/// What clients may ask for; a name wins over an alias.
fn names(tenants: &BTreeMap<TenantId, Arc<Tenant>>) -> BTreeMap<TenantId, Arc<Tenant>> {
    let known = || tenants.iter().filter(|(_, t)| !matches!(t.state(), TenantState::Creating | TenantState::Dropped));
    let aliases = known().flat_map(|(_, t)| t.settings.aliases.iter().map(move |alias| (alias, t)));
    let all = aliases.chain(known());
    all.map(|(name, tenant)| (name.clone(), Arc::clone(tenant))).collect()
}

/// How Tenantry logs in for what is done to databases is no business of clients' connections, and not even held here.
fn forget_control(server: &mut tenantry_config::Server) {
    server.control = None;
}

/// Names that `[tenants."*"]` served and nobody uses: whoever can log in could invent them without end.
fn forget_unused(any: &mut HashMap<String, Arc<Tenant>>) {
    any.retain(|_, tenant| !tenant.retire_unused());
}

/// Those that have a number, by it.
fn numbers(tenants: &BTreeMap<TenantId, Arc<Tenant>>) -> BTreeMap<i64, &Arc<Tenant>> {
    tenants.values().filter_map(|tenant| Some((tenant.settings.standing.number?, tenant))).collect()
}

/// A tenant's own roles first, then the shared ones; entries whose secret did not change keep what was derived from it.
fn roles_of(
    own: &[tenantry_config::Role],
    shared: &BTreeMap<String, Arc<RoleEntry>>,
    before: Option<&Tenant>,
) -> BTreeMap<String, Arc<RoleEntry>> {
    let known = before.map(|t| t.roles().map(|r| (r.settings.name.clone(), Arc::clone(r))).collect());
    let mut roles = shared.clone();
    roles.extend(entries(own, known.as_ref()));
    roles
}

fn entries(
    roles: &[tenantry_config::Role],
    known: Option<&BTreeMap<String, Arc<RoleEntry>>>,
) -> BTreeMap<String, Arc<RoleEntry>> {
    let entry = |role: &tenantry_config::Role| {
        let before = known.and_then(|known| known.get(&role.name));
        let same = before.filter(|before| before.settings == *role);
        same.cloned().unwrap_or_else(|| RoleEntry::new(role.clone(), before.map(Arc::as_ref)))
    };
    roles.iter().map(|role| (role.name.clone(), entry(role))).collect()
}

async fn load_acceptor(settings: &Settings) -> Result<Option<Acceptor>, StartError> {
    if settings.listen.tls.mode == ClientTlsMode::Disable {
        return Ok(None);
    }
    let tls = settings.listen.tls.clone();
    // Reads files and may make a key: not on a thread that serves.
    let loaded = tokio::task::spawn_blocking(move || Acceptor::load(&tls)).await;
    match loaded {
        Ok(acceptor) => Ok(Some(acceptor?)),
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}

async fn sweep(directory: Weak<Directory>) {
    let mut ticks = tokio::time::interval(SWEEP);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut pulse = Pulse::new(Millis::now());
    for tick in (1..=FORGET_EVERY).cycle() {
        ticks.tick().await;
        let Some(directory) = directory.upgrade() else { return };
        let now = Millis::now();
        if pulse.beat(now) {
            directory.registry.sweep(now);
        }
        if tick == FORGET_EVERY {
            forget_unused(&mut directory.any.lock());
        }
    }
}

#[cfg(test)]
#[path = "directory_tests.rs"]
mod tests;
