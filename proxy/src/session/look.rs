//! What a client that the hub serves is about to do: a look at its bytes before any of them is sent. Pure.

use tenantry_wire::{
    extended::{BindHead, Parse},
    frame::{self, HEADER},
    tag::frontend,
};

use super::statements::Names;
use crate::server::signs::Signs;

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Nothing in it has to do with channels, notifications or the begin of a transaction.
    Harmless,
    /// Something in it may.
    Touches,
    /// More of it must be there first.
    Incomplete,
}

/// Looks at the next unit of `bytes`: one simple query, or a batch up to its Sync or Flush.
#[must_use]
pub fn ahead(bytes: &[u8], names: &Names) -> Look {
    let mut rest = bytes;
    let mut is_first = true;
    loop {
        let Ok(Some(header)) = frame::client_header(rest) else {
            // A malformed one is answered with an error, by whomever it is sent to.
            return if frame::client_header(rest).is_err() { Look::Harmless } else { Look::Incomplete };
        };
        let Some(body) = rest.get(HEADER..header.total()) else { return Look::Incomplete };
        let touches = match header.tag {
            frontend::QUERY if is_first => {
                let text = body.strip_suffix(b"\0").unwrap_or(body);
                return if Signs::of(text).listens { Look::Touches } else { Look::Harmless };
            }
            // It ends the batch without a Sync.
            frontend::QUERY => return Look::Harmless,
            // A function by its number: it may be any.
            frontend::FUNCTION_CALL => return Look::Touches,
            frontend::SYNC | frontend::FLUSH | frontend::TERMINATE => return Look::Harmless,
            frontend::PARSE => Parse::read(body).is_some_and(|parse| Signs::of(parse.query).listens),
            frontend::BIND => BindHead::read(body).is_some_and(|head| match names.get(head.statement) {
                Some(statement) => statement.signs.listens,
                None => head.statement.is_empty() && names.unnamed_signs.listens,
            }),
            _ => false,
        };
        if touches {
            return Look::Touches;
        }
        is_first = false;
        rest = rest.get(header.total()..).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).unwrap();
        [&[tag], &length.to_be_bytes()[..], body].concat()
    }

    fn look(messages: &[Vec<u8>]) -> Look {
        ahead(&messages.concat(), &Names::default())
    }

    #[test]
    fn a_simple_query_is_looked_at_by_itself() {
        let query = |sql: &str| message(b'Q', format!("{sql}\0").as_bytes());
        assert_eq!(look(&[query("SELECT 1")]), Look::Harmless);
        assert_eq!(look(&[query("SELECT 1"), query("UNLISTEN *")]), Look::Harmless, "the next has its turn");
        for sql in ["UNLISTEN a", "BEGIN", "DISCARD ALL", "SELECT pg_notify('a', '')"] {
            assert_eq!(look(&[query(sql)]), Look::Touches, "{sql}");
        }
        let cut = query("SELECT 1");
        assert_eq!(ahead(&cut[..cut.len() - 1], &Names::default()), Look::Incomplete);
    }

    #[test]
    fn a_batch_is_looked_at_whole() {
        let parse = |sql: &str| message(b'P', format!("\0{sql}\0\0\0").as_bytes());
        let (bind, execute) = (message(b'B', b"\0\0\0\0\0\0\0\0"), message(b'E', b"\0\0\0\0\0"));
        let (sync, flush) = (message(b'S', b""), message(b'H', b""));
        let select = [parse("SELECT 1"), bind.clone(), execute.clone()].concat();
        assert_eq!(look(std::slice::from_ref(&select)), Look::Incomplete);
        assert_eq!(look(&[select.clone(), sync.clone()]), Look::Harmless);
        assert_eq!(look(&[select.clone(), flush]), Look::Harmless);
        assert_eq!(look(&[select, parse("LISTEN a"), bind, execute, sync]), Look::Touches);
    }

    #[test]
    fn what_an_earlier_parse_holds_counts_where_it_is_used() {
        let mut names = Names::default();
        let batch = [message(b'B', b"\0\0\0\0\0\0\0\0"), message(b'S', b"")].concat();
        assert_eq!(ahead(&batch, &names), Look::Harmless);
        names.unnamed_signs = Signs::of(b"UNLISTEN a");
        assert_eq!(ahead(&batch, &names), Look::Touches);
    }
}
