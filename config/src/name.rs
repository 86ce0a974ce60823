//! Names of tenants and servers.
//!
//! What always holds: a `TenantId` is 1 to 63 bytes of `[a-z_][a-z0-9_-]*` and is none of the reserved names, so it can
//! stand in a path, a metric label, a log line or (quoted) in SQL without a second look.

use std::{borrow::Borrow, fmt, sync::Arc};

/// PostgreSQL's `NAMEDATALEN - 1`: longer names would be cut off by the server, and two tenants could become one.
const MAX_NAME_BYTES: usize = 63;

/// The system databases of PostgreSQL and RDS, and the names of admin consoles: never a tenant's.
const RESERVED: [&str; 6] = ["postgres", "template0", "template1", "rdsadmin", "pgbouncer", "tenantry"];

/// A tenant's name: the database name that clients ask for. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(Arc<str>);

impl TenantId {
    /// The only way to make one.
    ///
    /// # Errors
    /// The name is empty, longer than 63 bytes, has a character outside `[a-z0-9_-]`, starts with a digit or `-`, or is
    /// reserved (`postgres`, `template0`, `template1`, `rdsadmin`, `pgbouncer`, `tenantry`).
    pub fn parse(name: &str) -> Result<Self, NameError> {
        check_name(name)?;
        if RESERVED.contains(&name) {
            return Err(NameError::Reserved);
        }
        Ok(Self(name.into()))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for TenantId {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

// Sound because the derived Eq, Ord and Hash of `Arc<str>` are those of `str`.
impl Borrow<str> for TenantId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl std::str::FromStr for TenantId {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        Self::parse(name)
    }
}

/// Why a name was refused. Never repeats the name, which may come from a stranger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameError {
    /// No byte at all.
    Empty,
    /// More than 63 bytes.
    TooLong,
    /// The first character is not `a`-`z` or `_`.
    Start,
    /// A character outside `[a-z0-9_-]`.
    Character,
    /// Belongs to PostgreSQL, RDS or an admin console.
    Reserved,
}

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "the name is empty; write 1 to 63 of a-z, 0-9, _ and -",
            Self::TooLong => "the name is longer than 63 bytes, PostgreSQL's limit; shorten it",
            Self::Start => "the name must start with a-z or _",
            Self::Character => "the name has a character other than a-z, 0-9, _ and -; rename it",
            Self::Reserved => {
                "the name is reserved (postgres, template0, template1, rdsadmin, pgbouncer, tenantry); choose another"
            }
        })
    }
}

impl std::error::Error for NameError {}

/// The shape shared by tenants and servers. Servers need it too: environment variables fold case, and the name ends up
/// in metric labels and paths of the API.
pub(crate) fn check_name(name: &str) -> Result<(), NameError> {
    let Some(first) = name.bytes().next() else { return Err(NameError::Empty) };
    if name.len() > MAX_NAME_BYTES {
        return Err(NameError::TooLong);
    }
    if !name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-')) {
        return Err(NameError::Character);
    }
    if !matches!(first, b'a'..=b'z' | b'_') {
        return Err(NameError::Start);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_names_are_accepted() {
        let longest = "a".repeat(63);
        for name in ["a", "_", "acme", "acme-eu_2", longest.as_str()] {
            assert_eq!(TenantId::parse(name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn hostile_names_are_refused() {
        let too_long = "a".repeat(64);
        let cases = [
            ("", NameError::Empty),
            (too_long.as_str(), NameError::TooLong),
            ("Acme", NameError::Character),
            ("a\"b", NameError::Character),
            ("a'b", NameError::Character),
            ("a;drop", NameError::Character),
            ("a\0", NameError::Character),
            ("a\n", NameError::Character),
            ("..", NameError::Character),
            ("a/b", NameError::Character),
            ("a b", NameError::Character),
            ("*", NameError::Character),
            ("\u{430}cme", NameError::Character),     // Cyrillic а
            ("\u{ff41}cme", NameError::Character),    // full-width a
            ("acme\u{200b}", NameError::Character),   // zero-width space
            ("\u{202e}emca", NameError::Character),   // right-to-left override
            ("p\u{43e}stgres", NameError::Character), // Cyrillic о
            ("1a", NameError::Start),
            ("-a", NameError::Start),
            ("postgres", NameError::Reserved),
            ("template0", NameError::Reserved),
            ("template1", NameError::Reserved),
            ("rdsadmin", NameError::Reserved),
            ("pgbouncer", NameError::Reserved),
            ("tenantry", NameError::Reserved),
        ];
        for (name, error) in cases {
            assert_eq!(TenantId::parse(name), Err(error), "{name:?}");
        }
    }

    #[test]
    fn a_map_is_searched_by_plain_text() {
        let map = std::collections::HashMap::from([(TenantId::parse("acme").unwrap(), 1)]);
        assert_eq!(map.get("acme"), Some(&1));
    }
}
