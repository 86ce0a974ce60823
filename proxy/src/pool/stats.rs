//! A pool's counters: plain atomics, added to once a transaction and read when somebody asks.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use parking_lot::Mutex;
use tenantry_wire::error::ErrorResponse;

use crate::session::errors;

/// Since the start; only ever grows.
#[derive(Debug, Default)]
pub struct Stats {
    pub transactions: AtomicU64,
    pub queries: AtomicU64,
    pub received_bytes: AtomicU64,
    pub sent_bytes: AtomicU64,
    pub waits: AtomicU64,
    pub wait_micros: AtomicU64,
    pub wait_timeouts: AtomicU64,
    pub logins: AtomicU64,
    pub server_connects: AtomicU64,
    pub server_connect_failures: AtomicU64,
    pub server_closes: AtomicU64,
    pub cancels: AtomicU64,
    pub replays: AtomicU64,
    pub notifications: AtomicU64,
    pub parses: AtomicU64,
    pub parses_saved: AtomicU64,
    pub pins: Mutex<BTreeMap<&'static str, u64>>,
    /// Errors that clients saw, by SQLSTATE; bounded, the rest under "other".
    errors: Mutex<BTreeMap<String, u64>>,
    /// Those of them that a limit of ours is behind, by its name.
    limits: Mutex<BTreeMap<&'static str, u64>>,
}

/// What one session counts by itself until its transaction ends.
#[derive(Debug, Default)]
pub struct Tally {
    pub transactions: u64,
    pub queries: u64,
    pub received_bytes: u64,
    pub sent_bytes: u64,
}

/// More SQLSTATEs than this are counted together.
const MAX_SQLSTATES: usize = 64;

impl Stats {
    pub fn add(&self, tally: &mut Tally) {
        for (counter, n) in [
            (&self.transactions, tally.transactions),
            (&self.queries, tally.queries),
            (&self.received_bytes, tally.received_bytes),
            (&self.sent_bytes, tally.sent_bytes),
        ] {
            if n > 0 {
                counter.fetch_add(n, Relaxed);
            }
        }
        *tally = Tally::default();
    }

    pub fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Relaxed);
    }

    /// A client is told this error of ours.
    pub fn told(&self, error: &ErrorResponse) {
        self.error(error.code);
        if let Some(limit) = errors::limit_of(error) {
            *self.limits.lock().entry(limit).or_default() += 1;
        }
    }

    pub fn error(&self, sqlstate: &str) {
        let mut errors = self.errors.lock();
        if let Some(n) = errors.get_mut(sqlstate) {
            *n += 1;
        } else if errors.len() < MAX_SQLSTATES {
            errors.insert(sqlstate.to_owned(), 1);
        } else {
            *errors.entry("other".to_owned()).or_default() += 1;
        }
    }

    #[must_use]
    pub fn errors(&self) -> BTreeMap<String, u64> {
        self.errors.lock().clone()
    }

    /// How often each limit was the reason.
    #[must_use]
    pub fn limits(&self) -> BTreeMap<&'static str, u64> {
        self.limits.lock().clone()
    }
}
