//! A tenant: its roles, its pools, its state, and how many clients it may have.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use parking_lot::Mutex;
use tenantry_config::{FormerSecret, Role, RoleSecret, TenantId, TenantState};
use tenantry_wire::{
    error::ErrorResponse,
    scram::{self, ClientKey, Verifier},
};
use zeroize::Zeroizing;

use crate::{
    budget::fair::Budget,
    pool::{
        Place, Pool, PoolSettings,
        decision::Gate,
        hub::Hub,
        server::{Activity, Server},
    },
    server::credentials::Credentials,
    session::errors,
};

/// A role that may log in, and what is derived from its secrets.
#[derive(Debug)]
pub struct RoleEntry {
    pub settings: Role,
    verifier: OnceLock<Verifier>,
    former: Option<Former>,
}

/// The secret that a role had before, while its change is under way.
#[derive(Debug)]
struct Former {
    verifier: Verifier,
    bridge: Option<Bridge>,
    accepts: bool,
}

/// From the former secret's key to the current one's.
struct Bridge(Zeroizing<[u8; 32]>);

impl std::fmt::Debug for Bridge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bridge(***)")
    }
}

impl Former {
    /// What cannot be read is as if it were not there: the role's own secret counts without it.
    fn read(settings: &FormerSecret) -> Option<Self> {
        let verifier = Verifier::parse(settings.verifier.expose()).ok()?;
        let bridge = settings.bridge.as_ref().and_then(|text| {
            let bytes = Zeroizing::new(STANDARD.decode(text.expose()).ok()?);
            Some(Bridge(Zeroizing::new(bytes.as_slice().try_into().ok()?)))
        });
        Some(Self { verifier, bridge, accepts: settings.accepts })
    }
}

impl RoleEntry {
    /// `before`: the same role's entry before a reload; what was derived from a secret that stays is kept.
    #[must_use]
    pub fn new(settings: Role, before: Option<&Self>) -> Arc<Self> {
        let derived = match (&settings.secret, before) {
            (RoleSecret::Scram(text), _) => Verifier::parse(text.expose()).ok(),
            (secret, Some(before)) if before.settings.secret == *secret => before.verifier(),
            _ => None,
        };
        let verifier = derived.map_or_else(OnceLock::new, OnceLock::from);
        let former = settings.former.as_ref().and_then(Former::read);
        Arc::new(Self { settings, verifier, former })
    }

    /// For a plain password it is made at the first login.
    #[must_use]
    pub fn verifier(&self) -> Option<Verifier> {
        self.verifier.get().cloned()
    }

    /// Keeps the first one made, and gives that.
    #[must_use]
    pub fn keep_verifier(&self, made: Verifier) -> Verifier {
        self.verifier.get_or_init(|| made).clone()
    }

    /// That of the secret before this one, while logins with it are let in.
    #[must_use]
    pub fn former_verifier(&self) -> Option<&Verifier> {
        self.former.as_ref().filter(|former| former.accepts).map(|former| &former.verifier)
    }

    /// Whether the two have the same secret.
    #[must_use]
    pub fn has_secret_of(&self, other: &Self) -> bool {
        self.settings.secret == other.settings.secret
    }

    /// Whether who proved the role as it was then may come in now: with the same secret, or with the former one.
    #[must_use]
    pub fn takes(&self, then: &Self) -> bool {
        let former = || self.settings.former.as_ref().filter(|former| former.accepts).map(|former| &former.verifier);
        let is_former = matches!(&then.settings.secret, RoleSecret::Scram(text) if former() == Some(text));
        self.has_secret_of(then) || is_former
    }

    /// What a pool of the role begins with.
    fn credentials(&self) -> Credentials {
        match &self.settings.secret {
            RoleSecret::Plain(p) => Credentials::Password(Zeroizing::new(p.expose().to_owned())),
            RoleSecret::Md5(m) => Credentials::Md5(Zeroizing::new(m.expose().to_owned())),
            // A verifier proves others to us, not us to others: the first client's proof brings the keys.
            RoleSecret::Scram(_) | RoleSecret::None => Credentials::None,
        }
    }

    /// What the key of a client is good for at the server, where we have a verifier alone: itself, or the key that the
    /// bridge leads to. Never one of a secret that does not count any more.
    #[must_use]
    pub fn credentials_from(&self, key: &ClientKey) -> Option<Credentials> {
        let (RoleSecret::Scram(_), Some(verifier)) = (&self.settings.secret, self.verifier.get()) else { return None };
        let crossed = || Some(scram::cross(key, &self.former.as_ref()?.bridge.as_ref()?.0));
        let fitting = Some(key.clone()).filter(|key| verifier.fits(key)).or_else(crossed);
        let client_key = fitting.filter(|key| verifier.fits(key))?;
        Some(Credentials::ScramKeys { client_key, server_key: Zeroizing::new(*verifier.server_key()) })
    }

    /// What a pool that knows this of the role logs in with from now on; `None`: what it knows is the best there is.
    fn credentials_after(&self, known: &Credentials) -> Option<Credentials> {
        match &self.settings.secret {
            RoleSecret::Plain(_) | RoleSecret::Md5(_) => Some(self.credentials()),
            RoleSecret::Scram(_) => self.credentials_from(known.client_key()?),
            RoleSecret::None => None,
        }
    }
}

/// One fork: a database on a server, roles, pools.
#[derive(Debug)]
pub struct Tenant {
    pub id: TenantId,
    pub settings: tenantry_config::Tenant,
    pub database: String,
    pub server: Arc<Server>,
    roles: BTreeMap<String, Arc<RoleEntry>>,
    pools: Mutex<Pools>,
    clients: Arc<AtomicU32>,
    /// Listens for all of its clients.
    hub: Arc<Hub>,
}

/// By role, until another tenant has taken them over.
#[derive(Debug, Default)]
struct Pools {
    by_role: BTreeMap<String, Arc<Pool>>,
    /// The tenant is not the one that counts any more: nobody gets in by it.
    retired: bool,
}

/// A client's place in a tenant.
#[derive(Debug)]
pub struct Seat {
    pub pool: Arc<Pool>,
    pub guard: TenantGuard,
}

/// Why a client gets none.
#[derive(Debug)]
pub enum NoSeat {
    /// The settings were changed meanwhile: look up the tenant again.
    Retired,
    Refused(ErrorResponse),
}

impl Tenant {
    /// `old`: the same tenant before a reload; its pools and clients live on where they still fit.
    #[must_use]
    pub fn new(
        id: TenantId,
        settings: tenantry_config::Tenant,
        server: Arc<Server>,
        roles: BTreeMap<String, Arc<RoleEntry>>,
        old: Option<&Self>,
    ) -> Arc<Self> {
        let database = settings.database.clone().unwrap_or_else(|| id.as_str().to_owned());
        let left = old.map(Self::retire);
        let same_place = old.filter(|o| {
            // Renamed, its pools live on; at another database without a number, it is another's.
            Arc::ptr_eq(&o.server, &server) && (o.database == database || settings.standing.number.is_some())
        });
        // Moved to another server, with a number, it is the same tenant: its sessions follow.
        let moved = old.filter(|o| settings.standing.number.is_some() && !Arc::ptr_eq(&o.server, &server));
        let tenant = Self {
            id,
            settings,
            database,
            server,
            roles,
            pools: Mutex::new(Pools { by_role: same_place.and(left).unwrap_or_default(), retired: false }),
            clients: old.map_or_else(Arc::default, |o| Arc::clone(&o.clients)),
            hub: same_place.or(moved).map_or_else(Arc::default, |o| Arc::clone(&o.hub)),
        };
        tenant.refit(old);
        if let Some(old) = moved {
            tenant.follow(old);
        }
        Arc::new(tenant)
    }

    /// Nobody gets in by this one from now on; what it leaves.
    pub fn retire(&self) -> BTreeMap<String, Arc<Pool>> {
        let mut pools = self.pools.lock();
        pools.retired = true;
        pools.by_role.clone()
    }

    /// Retires if it has no client and no connection.
    #[must_use]
    pub fn retire_unused(&self) -> bool {
        let mut pools = self.pools.lock();
        pools.retired |=
            self.clients.load(Relaxed) == 0 && pools.by_role.values().all(|pool| pool.server.is_unused(pool));
        pools.retired
    }

    /// After a reload: pools of roles that are gone begin anew, the others take the new settings and the new secret.
    fn refit(&self, old: Option<&Self>) {
        let Some(old) = old else { return };
        let (place, state) = (self.place(), self.state());
        if old.place() != place && Arc::ptr_eq(&old.server, &self.server) && place.number.is_some() {
            self.server.relocate(|at| at.is_of(&old.id, place.number), &place);
        }
        // Also for the pools that only old sessions hold.
        self.server.set_budget(&self.id, Budget::of(&self.settings));
        self.pools.lock().by_role.retain(|name, pool| {
            let (Some(now), Some(_)) = (self.roles.get(name), old.roles.get(name)) else { return false };
            pool.server.reload_pool(pool, self.pool_settings(now));
            pool.change_credentials(|known| now.credentials_after(known));
            true
        });
        if old.settings.standing.plans != self.settings.standing.plans {
            for pool in self.pools.lock().by_role.values() {
                pool.plans_are_stale();
            }
        }
        if state == TenantState::Suspended && old.state() != state {
            self.release();
        }
        if self.gate() != Gate::Open || old.gate() != Gate::Open {
            self.server.set_gate(|at| at.is_of(&self.id, place.number), self.gate());
        }
    }

    /// The tenant was at another server: its pools there get successors here, and let nobody in any more. Who waits there, or
    /// asks there next, is sent on; who is in the middle of a transaction ends it there.
    fn follow(&self, old: &Self) {
        let number = self.settings.standing.number;
        let is_meant = |at: &Place| at.is_of(&old.id, number);
        let mut pools = self.pools.lock();
        // Also those that only old sessions hold; the one that counts first, for its secrets.
        let current: Vec<_> = old.pools.lock().by_role.values().cloned().collect();
        for before in current.into_iter().chain(old.server.pools_of(is_meant)).filter(|pool| !pool.has_moved()) {
            let Some(role) = self.roles.get(&before.role) else { continue };
            let next = match pools.by_role.get(&before.role) {
                Some(next) => Arc::clone(next),
                None => {
                    let next = self.add_pool(role, Some(&before));
                    next.change_credentials(|known| role.credentials_after(known));
                    pools.by_role.insert(before.role.clone(), Arc::clone(&next));
                    next
                }
            };
            before.succeed(&next);
        }
        drop(pools);
        old.server.set_gate(is_meant, Gate::Shut);
        // What was kept for it there is the others' now.
        old.server.set_budget(&old.id, Budget { floor: 0, ..Budget::of(&self.settings) });
    }

    /// Gives up its server connections: idle ones now, lent ones as they come to rest. The next query opens them again.
    pub fn release(&self) {
        let number = self.settings.standing.number;
        self.server.reconnect_those(|at| at.is_of(&self.id, number));
    }

    #[must_use]
    pub fn state(&self) -> TenantState {
        self.settings.standing.state
    }

    /// Whose its pools are, and where they lead.
    #[must_use]
    pub fn place(&self) -> Place {
        Place { tenant: self.id.clone(), number: self.settings.standing.number, database: self.database.clone() }
    }

    fn gate(&self) -> Gate {
        match self.state() {
            TenantState::Active | TenantState::Suspended => Gate::Open,
            TenantState::Paused => Gate::Held,
            TenantState::Creating
            | TenantState::Draining
            | TenantState::Drained
            | TenantState::Archived
            | TenantState::Dropped => Gate::Shut,
        }
    }

    /// Whether somebody who proved a role may come in.
    pub fn admits(&self, database: &str) -> Result<(), ErrorResponse> {
        match self.state() {
            TenantState::Active | TenantState::Paused | TenantState::Suspended => Ok(()),
            TenantState::Draining | TenantState::Drained => Err(errors::drained()),
            TenantState::Archived => Err(errors::archived(database)),
            TenantState::Creating | TenantState::Dropped => Err(errors::no_database(database)),
        }
    }

    /// What its clients and its connections do.
    #[must_use]
    pub fn activity(&self) -> Activity {
        let number = self.settings.standing.number;
        let activity = self.server.activity(|at| at.is_of(&self.id, number));
        Activity { clients: self.clients.load(Relaxed), ..activity }
    }

    /// A role of this tenant.
    #[must_use]
    pub fn role(&self, name: &str) -> Option<Arc<RoleEntry>> {
        self.roles.get(name).cloned()
    }

    pub fn roles(&self) -> impl Iterator<Item = &Arc<RoleEntry>> {
        self.roles.values()
    }

    /// A place for a client of this role.
    pub fn seat(&self, role: &RoleEntry) -> Result<Seat, NoSeat> {
        let mut pools = self.pools.lock();
        if pools.retired {
            return Err(NoSeat::Retired);
        }
        let guard = self.admit().ok_or_else(|| NoSeat::Refused(errors::too_many_of_tenant(self)))?;
        Ok(Seat { pool: self.pool(&mut pools.by_role, role), guard })
    }

    /// The pool of a role, made at its first client.
    fn pool(&self, pools: &mut BTreeMap<String, Arc<Pool>>, role: &RoleEntry) -> Arc<Pool> {
        if let Some(pool) = pools.get(&role.settings.name) {
            return Arc::clone(pool);
        }
        let pool = self.add_pool(role, None);
        pools.insert(role.settings.name.clone(), Arc::clone(&pool));
        pool
    }

    fn add_pool(&self, role: &RoleEntry, before: Option<&Pool>) -> Arc<Pool> {
        self.server.add_pool(
            self.place(),
            self.gate(),
            Budget::of(&self.settings),
            Arc::clone(&self.hub),
            &role.settings.name,
            self.pool_settings(role),
            role.credentials(),
            before,
        )
    }

    #[must_use]
    pub fn pools(&self) -> Vec<Arc<Pool>> {
        self.pools.lock().by_role.values().cloned().collect()
    }

    /// The pool of a role, if it was used.
    #[must_use]
    pub fn pool_of(&self, role: &str) -> Option<Arc<Pool>> {
        self.pools.lock().by_role.get(role).cloned()
    }

    /// Makes the pools that keep connections without clients.
    pub fn prewarm(&self) {
        let mut pools = self.pools.lock();
        for role in self.roles.values() {
            if self.pool_settings(role).pool.min_pool_size > 0 {
                let _ = self.pool(&mut pools.by_role, role);
            }
        }
    }

    /// Counts a client in; `None` if the tenant has all it may have.
    fn admit(&self) -> Option<TenantGuard> {
        let limit = self.settings.max_client_conn.unwrap_or(u32::MAX);
        self.clients.fetch_update(Relaxed, Relaxed, |n| (n < limit).then_some(n + 1)).ok()?;
        Some(TenantGuard(Arc::clone(&self.clients)))
    }

    fn pool_settings(&self, role: &RoleEntry) -> PoolSettings {
        let mut pool = self.settings.pool.clone();
        if let Some(size) = role.settings.pool_size {
            pool.pool_size = size;
        }
        if self.state() == TenantState::Suspended {
            pool.min_pool_size = 0;
        }
        PoolSettings { mode: role.settings.pool_mode.unwrap_or(pool.pool_mode), pool }
    }
}

/// One client of a tenant; counted out when dropped.
#[derive(Debug)]
pub struct TenantGuard(Arc<AtomicU32>);

impl Drop for TenantGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}
