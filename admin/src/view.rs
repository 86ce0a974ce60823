//! What this crate wants of the data plane, and what `main` tells it about the process.

use std::{
    collections::BTreeMap,
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU8, Ordering::Relaxed},
    },
};

use tenantry_config::Settings;
use tenantry_proxy::{
    directory::{Activity, ClientSnapshot, Directory, Snapshot},
    pool::explain::Explanation,
};
use tenantry_wire::scram::ClientKey;

/// The data plane, seen from here: looked at, never changed.
pub trait View: Send + Sync + 'static {
    /// Whether clients are served.
    fn is_ready(&self) -> bool;
    /// Everything countable at this moment.
    fn snapshot(&self) -> Snapshot;
    /// Errors that clients saw before they had a tenant, by SQLSTATE, since the start.
    fn refusals(&self) -> BTreeMap<String, u64>;
    /// Those of them that a limit is behind, by its name.
    fn limit_refusals(&self) -> BTreeMap<&'static str, u64> {
        BTreeMap::new()
    }
    /// Connections that PostgreSQL has for roles that are not privileged, if the server was asked.
    fn slots(&self, _server: &str) -> Option<u32> {
        None
    }
}

impl View for Directory {
    fn is_ready(&self) -> bool {
        Directory::is_ready(self)
    }

    fn snapshot(&self) -> Snapshot {
        Directory::snapshot(self)
    }

    fn refusals(&self) -> BTreeMap<String, u64> {
        self.refusals.errors()
    }

    fn limit_refusals(&self) -> BTreeMap<&'static str, u64> {
        self.refusals.limits()
    }

    fn slots(&self, server: &str) -> Option<u32> {
        Directory::slots(self, server)
    }
}

/// The data plane as the control plane drives it: by what it is to serve, and by what cannot wait.
pub trait Plane: View {
    /// Serves these settings from now on, whole or not at all.
    fn apply(&self, settings: Settings) -> Result<(), String>;
    /// What a tenant's clients do; `None`: no such tenant. One of the catalog is meant by its number: the settings file may
    /// have another of that name, and then serves that.
    fn activity(&self, tenant: &str, number: Option<i64>) -> Option<Activity>;
    /// A tenant's clients, the oldest first; meant as in `activity`.
    fn clients(&self, tenant: &str, number: Option<i64>) -> Option<Vec<ClientSnapshot>>;
    /// Cancels what runs; how many statements.
    fn cancel_running(&self, tenant: &str, number: Option<i64>) -> usize;
    /// Ends sessions, those in a transaction too if `at_once`; how many are in one.
    fn end_sessions(&self, tenant: &str, number: Option<i64>, at_once: bool) -> usize;
    /// Ends sessions that are in a transaction, at once; how many.
    fn end_transactions(&self, tenant: &str, number: Option<i64>) -> usize;
    /// Gives up a tenant's server connections: idle ones now, others as they come to rest.
    fn release(&self, tenant: &str);
    /// The key with which a role's pool proves itself to PostgreSQL, if a client's login told it. A secret.
    fn client_key(&self, tenant: &str, role: &str) -> Option<ClientKey>;
    /// Why each of its roles would wait, or waits.
    fn explain(&self, tenant: &str) -> Vec<(String, Explanation)>;
    /// Where clients reach it.
    fn addresses(&self) -> Vec<std::net::SocketAddr>;
}

/// What only `main` knows of the process.
#[derive(Default)]
pub struct Status {
    settings_stale: AtomicBool,
    draining: AtomicBool,
    catalog: AtomicU8,
    dropped_lines: OnceLock<Box<dyn Fn() -> u64 + Send + Sync>>,
}

impl std::fmt::Debug for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Status")
    }
}

impl Status {
    /// The last reload failed: the settings in force are older than the file.
    pub fn set_settings_stale(&self, stale: bool) {
        self.settings_stale.store(stale, Relaxed);
    }

    #[must_use]
    pub fn settings_stale(&self) -> bool {
        self.settings_stale.load(Relaxed)
    }

    /// Whether the catalog could be read last time; `None`: there is none.
    pub fn set_catalog(&self, is_within_reach: Option<bool>) {
        self.catalog.store(is_within_reach.map_or(0, |is| 1 + u8::from(is)), Relaxed);
    }

    #[must_use]
    pub fn catalog(&self) -> Option<bool> {
        self.catalog.load(Relaxed).checked_sub(1).map(|is| is > 0)
    }

    /// Who counts the lines of the log that were dropped; told once.
    pub fn count_dropped_lines(&self, count: impl Fn() -> u64 + Send + Sync + 'static) {
        let _ = self.dropped_lines.set(Box::new(count));
    }

    #[must_use]
    pub fn dropped_lines(&self) -> u64 {
        self.dropped_lines.get().map_or(0, |count| count())
    }

    /// The process was asked to stop.
    pub fn set_draining(&self) {
        self.draining.store(true, Relaxed);
    }

    #[must_use]
    pub fn draining(&self) -> bool {
        self.draining.load(Relaxed)
    }
}

impl Plane for Directory {
    fn release(&self, tenant: &str) {
        Directory::release(self, tenant);
    }

    fn client_key(&self, tenant: &str, role: &str) -> Option<ClientKey> {
        Directory::client_key(self, tenant, role)
    }

    fn apply(&self, settings: Settings) -> Result<(), String> {
        self.reload(settings).map_err(|error| error.to_string())
    }

    fn activity(&self, tenant: &str, number: Option<i64>) -> Option<Activity> {
        Directory::activity(self, tenant, number)
    }

    fn clients(&self, tenant: &str, number: Option<i64>) -> Option<Vec<ClientSnapshot>> {
        Directory::clients(self, tenant, number)
    }

    fn cancel_running(&self, tenant: &str, number: Option<i64>) -> usize {
        Directory::cancel_running(self, tenant, number)
    }

    fn end_sessions(&self, tenant: &str, number: Option<i64>, at_once: bool) -> usize {
        Directory::end_sessions(self, tenant, number, at_once)
    }

    fn end_transactions(&self, tenant: &str, number: Option<i64>) -> usize {
        Directory::end_transactions(self, tenant, number)
    }

    fn explain(&self, tenant: &str) -> Vec<(String, Explanation)> {
        Directory::explain(self, tenant)
    }

    fn addresses(&self) -> Vec<std::net::SocketAddr> {
        Directory::addresses(self).to_vec()
    }
}
