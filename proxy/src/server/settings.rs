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
        Self(Arc::new(Inner { hash: hasher.finish(), map }))
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

    /// Settings that change what a statement means: two clients share a prepared statement only if these are equal.
    #[must_use]
    pub fn planning(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for name in ["search_path", "role", "session_authorization"] {
            self.get(name).hash(&mut hasher);
        }
        hasher.finish()
    }
}

impl Difference {
    /// Whether a later statement may only be sent once these were seen to succeed: a role that is gone must not leave
    /// the statement running under another one.
    #[must_use]
    pub fn must_be_confirmed(&self) -> bool {
        let guarded = |k: &String| matches!(k.as_str(), "role" | "session_authorization");
        self.reset.iter().any(guarded) || self.set.iter().any(|(k, _)| guarded(k))
    }
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
    fn a_role_must_be_confirmed_before_anything_runs() {
        assert!(map(&[]).difference(&map(&[("role", "x")])).must_be_confirmed());
        assert!(map(&[("role", "x")]).difference(&map(&[])).must_be_confirmed());
        assert!(!map(&[]).difference(&map(&[("work_mem", "1MB")])).must_be_confirmed());
    }
}
