//! What this crate wants of the data plane, and what `main` tells it about the process.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use tenantry_proxy::directory::{Directory, Snapshot};

/// The data plane, seen from here: looked at, never changed.
pub trait View: Send + Sync + 'static {
    /// Whether clients are served.
    fn is_ready(&self) -> bool;
    /// Everything countable at this moment.
    fn snapshot(&self) -> Snapshot;
    /// Errors that clients saw before they had a tenant, by SQLSTATE, since the start.
    fn refusals(&self) -> BTreeMap<String, u64>;
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
}

/// What only `main` knows of the process.
#[derive(Debug, Default)]
pub struct Status {
    settings_stale: AtomicBool,
    draining: AtomicBool,
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

    /// The process was asked to stop.
    pub fn set_draining(&self) {
        self.draining.store(true, Relaxed);
    }

    #[must_use]
    pub fn draining(&self) -> bool {
        self.draining.load(Relaxed)
    }
}
