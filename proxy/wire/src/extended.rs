//! Names inside Parse, Bind, Describe and Close: read from the body, rewritten in place.
//!
//! A client's statement names are its own; on a server connection the statement has one name that all share. Only the
//! name changes: the bytes after it are never decoded and never copied by this file.

use bytes::BytesMut;

use crate::{
    frame::{self, FrameError},
    tag::{frontend, target},
};

/// A Parse: statement name, query text, and the parameter types as they stand on the wire (count and OIDs).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parse<'a> {
    pub name: &'a [u8],
    pub query: &'a [u8],
    pub types: &'a [u8],
}

impl<'a> Parse<'a> {
    /// Reads a whole body; `None` if it is not laid out as a Parse (PostgreSQL then says what is wrong with it).
    #[must_use]
    pub fn read(body: &'a [u8]) -> Option<Self> {
        let (name, rest) = cstr(body)?;
        let (query, types) = cstr(rest)?;
        Some(Self { name, query, types })
    }

    /// Appends the message with another statement name.
    pub fn write_as(&self, out: &mut BytesMut, name: &[u8]) -> Result<(), FrameError> {
        let body = name.len().saturating_add(self.query.len()).saturating_add(self.types.len()).saturating_add(2);
        frame::put_header(out, frontend::PARSE, body)?;
        put_cstr(out, name);
        put_cstr(out, self.query);
        out.extend_from_slice(self.types);
        Ok(())
    }
}

/// The beginning of a Bind: portal and statement names, and where in the body they end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BindHead<'a> {
    pub portal: &'a [u8],
    pub statement: &'a [u8],
    /// Body bytes that the two names take, terminators included.
    pub length: usize,
}

impl<'a> BindHead<'a> {
    /// Reads the names from the bytes of the body that are there; `None` if they are not all there yet.
    #[must_use]
    pub fn read(prefix: &'a [u8]) -> Option<Self> {
        let (portal, rest) = cstr(prefix)?;
        let (statement, rest) = cstr(rest)?;
        Some(Self { portal, statement, length: prefix.len().saturating_sub(rest.len()) })
    }

    /// Appends header and names of the Bind whose body has `body` bytes, with another statement name. What follows the
    /// names (`body - length` bytes) is the caller's to pass on unchanged.
    pub fn write_as(&self, out: &mut BytesMut, statement: &[u8], body: usize) -> Result<(), FrameError> {
        let rest = body.saturating_sub(self.length);
        let names = self.portal.len().saturating_add(statement.len()).saturating_add(2);
        frame::put_header(out, frontend::BIND, names.saturating_add(rest))?;
        put_cstr(out, self.portal);
        put_cstr(out, statement);
        Ok(())
    }
}

/// Appends a Bind of a statement without parameters to the unnamed portal, results as text, and the Execute of it.
pub fn write_plain_run(out: &mut BytesMut, statement: &[u8]) -> Result<(), FrameError> {
    frame::put_header(out, frontend::BIND, statement.len().saturating_add(8))?;
    put_cstr(out, b"");
    put_cstr(out, statement);
    out.extend_from_slice(&[0; 6]);
    frame::put_header(out, frontend::EXECUTE, 5)?;
    out.extend_from_slice(&[0; 5]);
    Ok(())
}

/// The body of a Describe or Close.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target<'a> {
    /// `target::STATEMENT`, `target::PORTAL`, or what PostgreSQL will complain about.
    pub kind: u8,
    pub name: &'a [u8],
}

impl<'a> Target<'a> {
    #[must_use]
    pub fn read(body: &'a [u8]) -> Option<Self> {
        let (&kind, rest) = body.split_first()?;
        let (name, rest) = cstr(rest)?;
        rest.is_empty().then_some(Self { kind, name })
    }

    #[must_use]
    pub fn is_statement(&self) -> bool {
        self.kind == target::STATEMENT
    }
}

/// Appends a Describe (or Close) of a statement.
pub fn write_statement_target(out: &mut BytesMut, tag: u8, name: &[u8]) -> Result<(), FrameError> {
    frame::put_header(out, tag, name.len().saturating_add(2))?;
    out.extend_from_slice(&[target::STATEMENT]);
    put_cstr(out, name);
    Ok(())
}

fn put_cstr(out: &mut BytesMut, text: &[u8]) {
    out.extend_from_slice(text);
    out.extend_from_slice(&[0]);
}

fn cstr(buf: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = buf.iter().position(|b| *b == 0)?;
    let (text, rest) = buf.split_at_checked(end)?;
    Some((text, rest.get(1..)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::HEADER;

    #[test]
    fn a_parse_keeps_all_but_its_name() {
        let body = b"s1\0select $1\0\0\x01\0\0\0\x17";
        let parse = Parse::read(body).unwrap();
        assert_eq!((parse.name, parse.query), (&b"s1"[..], &b"select $1"[..]));
        let mut out = BytesMut::new();
        parse.write_as(&mut out, b"longer").unwrap();
        let header = frame::client_header(&out).unwrap().unwrap();
        assert_eq!(header.total(), out.len());
        let again = Parse::read(&out[HEADER..]).unwrap();
        assert_eq!((again.name, again.query, again.types), (&b"longer"[..], parse.query, parse.types));
    }

    #[test]
    fn a_bind_head_is_read_as_soon_as_its_names_are_there() {
        let body = b"p\0s1\0\0\0rest";
        for cut in 0..5 {
            assert_eq!(BindHead::read(&body[..cut]), None);
        }
        let head = BindHead::read(&body[..5]).unwrap();
        let mut out = BytesMut::new();
        head.write_as(&mut out, b"x", body.len()).unwrap();
        out.extend_from_slice(&body[head.length..]);
        let header = frame::client_header(&out).unwrap().unwrap();
        assert_eq!(header.total(), out.len());
        assert_eq!(&out[HEADER..], b"p\0x\0\0\0rest");
    }

    #[test]
    fn a_target_with_bytes_after_its_name_is_not_ours_to_read() {
        assert!(Target::read(b"Sx\0").unwrap().is_statement());
        assert_eq!(Target::read(b"Sx\0y"), None);
        assert_eq!(Target::read(b""), None);
        assert_eq!(Target::read(b"Sx"), None);
    }
}
