//! A logged-in connection to PostgreSQL and what is known about its session there.

use std::sync::Arc;

use tenantry_wire::startup::CancelKey;

use super::{settings::Settings, statements::Prepared};
use crate::{net::stream::Stream, pool::decision::SlotId};

/// What a fresh connection reports, in PostgreSQL's order: name and value.
pub type Parameters = Arc<Vec<(String, String)>>;

/// An unnamed statement among all that clients have had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unnamed {
    pub session: u64,
    /// Among that session's.
    pub number: u64,
}

/// Owned by exactly one place at a time: the pool, a lease, or the task that resets, checks or closes it.
#[derive(Debug)]
pub struct ServerConn {
    pub stream: Stream,
    pub slot: SlotId,
    /// What cancels its running query.
    pub key: CancelKey,
    /// What its session has set, beyond `baseline`.
    pub label: Settings,
    /// Reported parameters right after login.
    pub baseline: Parameters,
    pub prepared: Prepared,
    /// What settings that functions touch are, where the session does not set them.
    pub defaults: Vec<(String, String)>,
    /// The unnamed statement on it, if it is a client's.
    pub unnamed: Option<Unnamed>,
    /// The session in whose transaction alone sequences have been used since they were discarded; 0 if nobody knows.
    pub sequences_of: u64,
    /// The pool's count of what made plans stale when `prepared` was last empty.
    pub plans: u32,
    /// It has been used since its session was last as new.
    pub used: bool,
    /// A string of its last user's held what could have left something that nothing shows (`Signs::hints`).
    pub hinted: bool,
    /// Its role begins a session as another one (`ALTER ROLE ... SET role`).
    pub begins_as_another: bool,
    /// The client's first bytes of this use, for as long as they may have to be dealt with once more.
    pub kept: Vec<u8>,
}

impl ServerConn {
    /// The value that a fresh connection reports for a parameter; `name` in any case.
    #[must_use]
    pub fn baseline(&self, name: &str) -> Option<&str> {
        self.baseline.iter().find(|(k, _)| k.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }

    /// Whether a setting that was looked at has the value that it should have.
    #[must_use]
    pub fn expects(&self, name: &str, value: &str) -> bool {
        let default = || self.defaults.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str());
        self.label.get(name).or_else(default) == Some(value)
    }

    /// A setting that functions touch has this value where the session does not set it.
    pub fn learn_default(&mut self, name: &str, value: &str) {
        match self.defaults.iter_mut().find(|(k, _)| k == name) {
            Some((_, known)) => value.clone_into(known),
            None => self.defaults.push((name.to_owned(), value.to_owned())),
        }
    }

    /// Nobody's unnamed statement is on it any more: a simple query drops it, and so does an error while it is parsed.
    pub fn forget_unnamed(&mut self) {
        self.unnamed = None;
    }

    /// None of the shared statements is on it any more.
    pub fn forget_statements(&mut self, plans: u32) {
        self.prepared.clear();
        self.plans = plans;
    }

    /// PostgreSQL reported a parameter: the label follows.
    pub fn reported(&mut self, name: &str, value: &str) {
        // in_hot_standby and the like are facts of the server, not settings of the session.
        if !is_setting(name) {
            return;
        }
        let differs = self.baseline(name) != Some(value);
        self.label = self.label.with(name, differs.then_some(value));
    }
}

/// Whether a reported parameter can be set by a session.
#[must_use]
pub fn is_setting(name: &str) -> bool {
    ![
        "server_version",
        "server_encoding",
        "is_superuser",
        "integer_datetimes",
        "in_hot_standby",
        "session_authorization",
    ]
    .iter()
    .any(|fact| name.eq_ignore_ascii_case(fact))
}
