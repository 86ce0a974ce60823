//! A tenant: its roles, its pools, its state, and how many clients it may have.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use parking_lot::Mutex;
use tenantry_config::{Role, RoleSecret, TenantId, TenantState};
use tenantry_wire::{error::ErrorResponse, scram::Verifier};
use zeroize::Zeroizing;

use crate::{
    budget::fair::Budget,
    pool::{
        Place, Pool, PoolSettings,
        decision::Gate,
        server::{Activity, Server},
    },
    server::credentials::Credentials,
    session::errors,
};

/// A role that may log in, and what is derived from its secret.
#[derive(Debug)]
pub struct RoleEntry {
    pub settings: Role,
    verifier: OnceLock<Verifier>,
}

impl RoleEntry {
    #[must_use]
    pub fn new(settings: Role) -> Arc<Self> {
        let verifier = OnceLock::new();
        if let RoleSecret::Scram(text) = &settings.secret
            && let Ok(parsed) = Verifier::parse(text.expose())
        {
            let _ = verifier.set(parsed);
        }
        Arc::new(Self { settings, verifier })
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

    fn credentials(&self) -> Credentials {
        match &self.settings.secret {
            RoleSecret::Plain(p) => Credentials::Password(Zeroizing::new(p.expose().to_owned())),
            RoleSecret::Md5(m) => Credentials::Md5(Zeroizing::new(m.expose().to_owned())),
            // A verifier proves others to us, not us to others: the first client's proof brings the keys.
            RoleSecret::Scram(_) | RoleSecret::None => Credentials::None,
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
    pools: Mutex<BTreeMap<String, Arc<Pool>>>,
    clients: Arc<AtomicU32>,
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
        let same_place = old.filter(|o| {
            // Renamed, its pools live on; at another database without a number, it is another's.
            Arc::ptr_eq(&o.server, &server) && (o.database == database || settings.standing.number.is_some())
        });
        let tenant = Self {
            id,
            settings,
            database,
            server,
            roles,
            pools: Mutex::new(same_place.map(|o| o.pools.lock().clone()).unwrap_or_default()),
            clients: old.map_or_else(Arc::default, |o| Arc::clone(&o.clients)),
        };
        tenant.refit(old);
        Arc::new(tenant)
    }

    /// After a reload: pools of roles that are gone or have another secret begin anew, the others take the new settings.
    fn refit(&self, old: Option<&Self>) {
        let Some(old) = old else { return };
        let (place, state) = (self.place(), self.state());
        if old.place() != place && Arc::ptr_eq(&old.server, &self.server) && place.number.is_some() {
            self.server.relocate(|at| at.is_of(&old.id, place.number), &place);
        }
        self.pools.lock().retain(|name, pool| {
            let (Some(now), Some(then)) = (self.roles.get(name), old.roles.get(name)) else { return false };
            if now.settings.secret != then.settings.secret {
                return false;
            }
            pool.server.reload_pool(pool, self.pool_settings(now));
            pool.server.set_budget(&self.id, Budget::of(&self.settings));
            true
        });
        if state == TenantState::Suspended && old.state() != state {
            self.pools().iter().for_each(|pool| pool.server.reconnect(pool));
        }
        if self.gate() != Gate::Open || old.gate() != Gate::Open {
            self.server.set_gate(|at| at.is_of(&self.id, place.number), self.gate());
        }
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

    /// The pool of a role, made at its first client.
    #[must_use]
    pub fn pool(&self, role: &RoleEntry) -> Arc<Pool> {
        let mut pools = self.pools.lock();
        if let Some(pool) = pools.get(&role.settings.name) {
            return Arc::clone(pool);
        }
        let settings = self.pool_settings(role);
        let pool = self.server.add_pool(
            self.place(),
            self.gate(),
            Budget::of(&self.settings),
            &role.settings.name,
            settings,
            role.credentials(),
        );
        pools.insert(role.settings.name.clone(), Arc::clone(&pool));
        pool
    }

    #[must_use]
    pub fn pools(&self) -> Vec<Arc<Pool>> {
        self.pools.lock().values().cloned().collect()
    }

    /// Makes the pools that keep connections without clients.
    pub fn prewarm(&self) {
        for role in self.roles.values() {
            if self.pool_settings(role).pool.min_pool_size > 0 {
                let _ = self.pool(role);
            }
        }
    }

    /// Counts a client in; `None` if the tenant has all it may have.
    #[must_use]
    pub fn admit(&self) -> Option<TenantGuard> {
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
