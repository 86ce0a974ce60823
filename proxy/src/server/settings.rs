//! Session settings as a map, and the difference between two maps as SQL-free data.
//!
//! A map holds what differs from a fresh connection of the pool; names are lower case, as PostgreSQL compares them. Each
//! client has one (what it asked for), each server connection has one (what it really has: its label). Pure.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

/// An immutable map, cheap to share and quick to compare.
#[derive(Debug, Clone, Default)]
pub struct Settings(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    map: BTreeMap<String, String>,
    hash: u64,
    planning: u64,
    makes_temporary: bool,
}

impl PartialEq for Settings {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || (self.0.hash == other.0.hash && self.0.map == other.0.map)
    }
}

impl Eq for Settings {}

impl FromIterator<(String, String)> for Settings {
    fn from_iter<T: IntoIterator<Item = (String, String)>>(pairs: T) -> Self {
        let map: BTreeMap<_, _> = pairs.into_iter().map(|(k, v)| (k.to_ascii_lowercase(), v)).collect();
        if map.is_empty() {
            return Self::default();
        }
        let mut hasher = DefaultHasher::new();
        map.hash(&mut hasher);
        let mut meaning = map.iter().filter(|(name, _)| changes_meaning(name)).peekable();
        let mut planning = DefaultHasher::new();
        let plain = meaning.peek().is_none();
        meaning.for_each(|pair| pair.hash(&mut planning));
        let planning = if plain { 0 } else { planning.finish() };
        let path = map.get("search_path").map(|path| path.trim_start_matches(['"', ' ']));
        let makes_temporary = path.is_some_and(|path| path.to_ascii_lowercase().starts_with("pg_temp"));
        Self(Arc::new(Inner { hash: hasher.finish(), planning, makes_temporary, map }))
    }
}

/// What to tell a server connection so that its label becomes the wanted map.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Difference {
    /// To their default.
    pub reset: Vec<String>,
    pub set: Vec<(String, String)>,
}

impl Settings {
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.map.get(name).map(String::as_str)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.map.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.map.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }

    /// The same with one value changed; `None` takes the name out.
    #[must_use]
    pub fn with(&self, name: &str, value: Option<&str>) -> Self {
        let name = name.to_ascii_lowercase();
        if self.get(&name) == value {
            return self.clone();
        }
        let kept = self.0.map.iter().filter(|(k, _)| **k != name).map(|(k, v)| (k.clone(), v.clone()));
        kept.chain(value.map(|v| (name.clone(), v.to_owned()))).collect()
    }

    /// From `self` (what a server connection has) to `wanted`.
    #[must_use]
    pub fn difference(&self, wanted: &Self) -> Difference {
        let reset = self.0.map.keys().filter(|k| !wanted.0.map.contains_key(*k)).cloned().collect();
        let changed = wanted.0.map.iter().filter(|(k, v)| self.0.map.get(*k) != Some(v));
        Difference { reset, set: changed.map(|(k, v)| (k.clone(), v.clone())).collect() }
    }

    /// Whether what runs under these may be ended by a timer, our own replay included.
    #[must_use]
    pub fn may_time_out(&self) -> bool {
        ["statement_timeout", "transaction_timeout", "lock_timeout"].iter().any(|name| self.get(name).is_some())
    }

    /// Whatever is made is temporary unless its text says otherwise.
    #[must_use]
    pub fn makes_temporary(&self) -> bool {
        self.0.makes_temporary
    }

    /// Settings that change what a statement means or how it is planned: two clients share a prepared statement only if
    /// these are equal. 0 if none is set.
    #[must_use]
    pub fn planning(&self) -> u64 {
        self.0.planning
    }
}

/// Settings that change neither what a text means nor how it is planned. All others keep clients from sharing a prepared
/// statement: PostgreSQL looks at `search_path` and the role again by itself, but not at, say, `DateStyle`, which decided
/// what the literals in the text are, or at the planner's settings, by which a plan was made that may be kept.
const NO_MEANING: [&str; 12] = [
    "application_name",
    "bytea_output",
    "client_min_messages",
    "extra_float_digits",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "lock_timeout",
    "log_min_duration_statement",
    "log_statement",
    "statement_timeout",
    "synchronous_commit",
    "transaction_timeout",
];

/// A setting with a dot is a module's or the application's, and only looked at when a statement runs.
fn changes_meaning(name: &str) -> bool {
    !name.contains('.') && NO_MEANING.binary_search(&name).is_err()
}

/// Settings that any role may make at any time, and whose value, once accepted, stays acceptable: none of them names
/// something in the catalog or needs a privilege. In order.
const ALWAYS_ACCEPTED: [&str; 26] = [
    "application_name",
    "bytea_output",
    "client_encoding",
    "client_min_messages",
    "constraint_exclusion",
    "datestyle",
    "default_transaction_deferrable",
    "default_transaction_isolation",
    "default_transaction_read_only",
    "effective_cache_size",
    "extra_float_digits",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "intervalstyle",
    "jit",
    "lock_timeout",
    "maintenance_work_mem",
    "random_page_cost",
    "row_security",
    "search_path",
    "standard_conforming_strings",
    "statement_timeout",
    "synchronous_commit",
    "timezone",
    "transaction_timeout",
    "work_mem",
];

impl Difference {
    /// Whether PostgreSQL may refuse it: then a later statement may only be sent once it was seen to succeed. A role, a
    /// tablespace or a module's setting that is gone must not leave the statement running under somebody else's.
    #[must_use]
    pub fn may_fail(&self) -> bool {
        let safe = |name: &str| ALWAYS_ACCEPTED.binary_search(&name).is_ok();
        !self.reset.iter().all(|name| safe(name)) || !self.set.iter().all(|(name, _)| safe(name))
    }

    /// Whether it changes who acts.
    #[must_use]
    pub fn changes_role(&self) -> bool {
        self.reset.iter().chain(self.set.iter().map(|(name, _)| name)).any(|name| is_role(name))
    }
}

/// Who acts, as a setting.
#[must_use]
pub fn is_role(name: &str) -> bool {
    matches!(name, "role" | "session_authorization")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> Settings {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn the_difference_turns_one_into_the_other() {
        let has = map(&[("a", "1"), ("b", "2"), ("c", "3")]);
        let wants = map(&[("B", "2"), ("c", "4"), ("d", "5")]);
        let difference = has.difference(&wants);
        assert_eq!(difference.reset, ["a"]);
        assert_eq!(difference.set, [("c".to_owned(), "4".to_owned()), ("d".to_owned(), "5".to_owned())]);
        assert_eq!(wants.difference(&wants.clone()), Difference::default());
    }

    #[test]
    fn equal_maps_are_equal_however_made() {
        assert_eq!(map(&[("a", "1")]).with("b", Some("2")).with("A", None), map(&[("b", "2")]));
        assert_ne!(map(&[("a", "1")]), map(&[("a", "2")]));
        assert_eq!(map(&[("a", "1")]).with("a", None), Settings::default());
    }

    #[test]
    fn statements_are_shared_unless_a_setting_may_change_what_they_mean() {
        assert!(NO_MEANING.is_sorted());
        let of = |pairs: &[(&str, &str)]| map(pairs).planning();
        assert_eq!(of(&[("application_name", "a"), ("app.tenant", "1"), ("statement_timeout", "5s")]), of(&[]));
        let names =
            ["search_path", "role", "DateStyle", "client_encoding", "enable_seqscan", "default_transaction_read_only"];
        for name in names {
            assert_ne!(of(&[(name, "x")]), of(&[]), "{name}");
            assert_ne!(of(&[(name, "x")]), of(&[(name, "y")]), "{name}");
            assert_eq!(of(&[(name, "x"), ("application_name", "a")]), of(&[(name, "x")]), "{name}");
        }
    }

    #[test]
    fn what_may_be_refused_is_known() {
        assert!(ALWAYS_ACCEPTED.is_sorted());
        for name in ["role", "default_tablespace", "app.tenant", "log_statement"] {
            assert!(map(&[]).difference(&map(&[(name, "x")])).may_fail(), "{name}");
            assert!(map(&[(name, "x")]).difference(&map(&[])).may_fail(), "{name}");
        }
        assert!(!map(&[]).difference(&map(&[("work_mem", "1MB"), ("search_path", "a")])).may_fail());
        assert!(map(&[("statement_timeout", "5ms")]).may_time_out() && !map(&[("work_mem", "1MB")]).may_time_out());
    }
}
