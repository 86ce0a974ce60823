//! The only file of the control plane that builds SQL text.

use postgres_protocol::escape::escape_identifier;

/// The databases of these names and their connection limits; -1 is none, -2 a database that was dropped halfway.
pub const CONNECTION_LIMITS: &str =
    "SELECT datname::text, datconnlimit FROM pg_catalog.pg_database WHERE datname = ANY ($1::text[])";

/// `None`: no limit.
pub fn set_connection_limit(database: &str, limit: Option<u32>) -> String {
    let limit = limit.map_or_else(|| "-1".to_owned(), |limit| limit.to_string());
    format!("ALTER DATABASE {} CONNECTION LIMIT {limit}", escape_identifier(database))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_whatever_they_hold() {
        assert_eq!(set_connection_limit("a\"b; x", Some(3)), "ALTER DATABASE \"a\"\"b; x\" CONNECTION LIMIT 3");
        assert_eq!(set_connection_limit("acme", None), "ALTER DATABASE \"acme\" CONNECTION LIMIT -1");
    }
}
