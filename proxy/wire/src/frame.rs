//! Message headers: one type byte and a 32-bit length that counts itself.
//!
//! The hot path walks these five bytes and nothing else. Limits are PostgreSQL's own, so that what PostgreSQL would
//! refuse never reaches it: a frame that kills the server connection must cost only the client that sent it.

use crate::tag::{backend, frontend};

/// Bytes of a header: type and length.
pub const HEADER: usize = 5;
/// PostgreSQL's `PQ_LARGE_MESSAGE_LIMIT`: Query, Parse, Bind, CopyData, FunctionCall.
pub const LARGE_MESSAGE: u32 = 0x3FFF_FFFE;
/// PostgreSQL's `PQ_SMALL_MESSAGE_LIMIT`: every other message of a client.
pub const SMALL_MESSAGE: u32 = 10_000;

/// A header that passed its limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub tag: u8,
    /// Body bytes, without the header.
    pub body: usize,
}

impl Header {
    /// Header and body, in bytes.
    #[must_use]
    pub fn total(self) -> usize {
        self.body.saturating_add(HEADER)
    }
}

/// Why a header cannot be believed. Nothing after it in the stream means anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("invalid frontend message type {0}")]
    UnknownFrontend(u8),
    #[error("invalid backend message type {0}")]
    UnknownBackend(u8),
    #[error("invalid message length {length} for message type {tag}")]
    Length { tag: u8, length: u32 },
}

/// The header at the start of `buf`, sent by a client after login; `None` if fewer than five bytes are there.
pub fn client_header(buf: &[u8]) -> Result<Option<Header>, FrameError> {
    let Some((tag, length)) = raw(buf) else { return Ok(None) };
    let limit = match tag {
        frontend::QUERY | frontend::PARSE | frontend::BIND | frontend::COPY_DATA | frontend::FUNCTION_CALL => {
            LARGE_MESSAGE
        }
        frontend::CLOSE
        | frontend::DESCRIBE
        | frontend::EXECUTE
        | frontend::FLUSH
        | frontend::SYNC
        | frontend::TERMINATE
        | frontend::COPY_DONE
        | frontend::COPY_FAIL => SMALL_MESSAGE,
        _ => return Err(FrameError::UnknownFrontend(tag)),
    };
    checked(tag, length, limit).map(Some)
}

/// The header at the start of `buf`, sent by a client during login (`p`); `limit` bounds the body.
pub fn login_header(buf: &[u8], limit: u32) -> Result<Option<Header>, FrameError> {
    let Some((tag, length)) = raw(buf) else { return Ok(None) };
    if tag != frontend::PASSWORD {
        return Err(FrameError::UnknownFrontend(tag));
    }
    checked(tag, length, limit).map(Some)
}

/// The header at the start of `buf`, sent by a server; `None` if fewer than five bytes are there.
pub fn server_header(buf: &[u8]) -> Result<Option<Header>, FrameError> {
    let Some((tag, length)) = raw(buf) else { return Ok(None) };
    if !is_backend(tag) {
        return Err(FrameError::UnknownBackend(tag));
    }
    checked(tag, length, i32::MAX.unsigned_abs()).map(Some)
}

/// Skips the run of whole messages of one type at the start of `buf`: how many bytes they take.
///
/// A result set is mostly this, so the loop holds nothing but the comparison and the addition.
#[must_use]
pub fn run_of(buf: &[u8], tag: u8) -> usize {
    let mut at = 0usize;
    while let Some(&[t, a, b, c, d]) = buf.get(at..).and_then(|rest| rest.first_chunk::<HEADER>()) {
        let length = u32::from_be_bytes([a, b, c, d]);
        if t != tag || length < 4 || length > i32::MAX.unsigned_abs() {
            break;
        }
        let Ok(length) = usize::try_from(length) else { break };
        let next = at.saturating_add(1).saturating_add(length);
        if next > buf.len() {
            break;
        }
        at = next;
    }
    at
}

/// Appends a header for a body of `body` bytes. Fails rather than wraps: a wrapped length is an injected message.
pub fn put_header(out: &mut bytes::BytesMut, tag: u8, body: usize) -> Result<(), FrameError> {
    let length = u32::try_from(body).ok().and_then(|n| n.checked_add(4)).filter(|n| *n <= i32::MAX.unsigned_abs());
    let Some(length) = length else { return Err(FrameError::Length { tag, length: u32::MAX }) };
    out.extend_from_slice(&[tag]);
    out.extend_from_slice(&length.to_be_bytes());
    Ok(())
}

fn raw(buf: &[u8]) -> Option<(u8, u32)> {
    let &[tag, a, b, c, d] = buf.first_chunk::<HEADER>()?;
    Some((tag, u32::from_be_bytes([a, b, c, d])))
}

fn checked(tag: u8, length: u32, limit: u32) -> Result<Header, FrameError> {
    if length < 4 || length > limit {
        return Err(FrameError::Length { tag, length });
    }
    usize::try_from(length - 4).map(|body| Header { tag, body }).map_err(|_| FrameError::Length { tag, length })
}

fn is_backend(tag: u8) -> bool {
    matches!(
        tag,
        backend::AUTHENTICATION
            | backend::BACKEND_KEY_DATA
            | backend::BIND_COMPLETE
            | backend::CLOSE_COMPLETE
            | backend::COMMAND_COMPLETE
            | backend::COPY_BOTH_RESPONSE
            | backend::COPY_DATA
            | backend::COPY_DONE
            | backend::COPY_IN_RESPONSE
            | backend::COPY_OUT_RESPONSE
            | backend::DATA_ROW
            | backend::EMPTY_QUERY_RESPONSE
            | backend::ERROR_RESPONSE
            | backend::FUNCTION_CALL_RESPONSE
            | backend::NEGOTIATE_PROTOCOL_VERSION
            | backend::NO_DATA
            | backend::NOTICE_RESPONSE
            | backend::NOTIFICATION_RESPONSE
            | backend::PARAMETER_DESCRIPTION
            | backend::PARAMETER_STATUS
            | backend::PARSE_COMPLETE
            | backend::PORTAL_SUSPENDED
            | backend::READY_FOR_QUERY
            | backend::ROW_DESCRIPTION
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(tag: u8, length: u32) -> Vec<u8> {
        let mut v = vec![tag];
        v.extend_from_slice(&length.to_be_bytes());
        v
    }

    #[test]
    fn lengths_are_postgresqls() {
        for (tag, limit) in [(b'Q', LARGE_MESSAGE), (b'd', LARGE_MESSAGE), (b'S', SMALL_MESSAGE), (b'X', SMALL_MESSAGE)]
        {
            assert!(client_header(&header(tag, limit)).is_ok());
            assert!(client_header(&header(tag, limit + 1)).is_err());
            for short in 0..4 {
                assert!(client_header(&header(tag, short)).is_err());
            }
            assert!(client_header(&header(tag, u32::MAX)).is_err(), "negative");
        }
    }

    #[test]
    fn backend_types_and_p_are_no_requests() {
        for tag in [b'p', b'Z', b'R', b'1', 0, 255] {
            assert_eq!(client_header(&header(tag, 4)), Err(FrameError::UnknownFrontend(tag)));
        }
    }

    #[test]
    fn a_split_header_waits() {
        let whole = header(b'Q', 10);
        for n in 0..HEADER {
            assert_eq!(client_header(&whole[..n]), Ok(None));
            assert_eq!(server_header(&whole[..n]), Ok(None));
        }
    }

    #[test]
    fn run_stops_at_another_type_and_at_a_partial_message() {
        let mut rows = Vec::new();
        for _ in 0..3 {
            rows.extend_from_slice(&header(b'D', 6));
            rows.extend_from_slice(&[0, 0]);
        }
        assert_eq!(run_of(&rows, b'D'), 21);
        assert_eq!(run_of(&rows[..20], b'D'), 14);
        rows.extend_from_slice(&header(b'C', 4));
        assert_eq!(run_of(&rows, b'D'), 21);
        assert_eq!(run_of(&header(b'D', 3), b'D'), 0);
    }

    #[test]
    fn a_body_that_would_wrap_is_refused() {
        let mut out = bytes::BytesMut::new();
        assert!(put_header(&mut out, b'Q', usize::MAX).is_err());
        assert!(put_header(&mut out, b'Q', 0x7FFF_FFFC).is_err());
        assert!(out.is_empty());
    }
}
