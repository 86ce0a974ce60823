//! The messages that Tenantry itself writes, and the small ones it reads.

use bytes::BytesMut;

use crate::{
    error::seal,
    frame::{self, FrameError},
    startup::CancelKey,
    tag::{backend, frontend},
};

/// ParseComplete, CloseComplete, Sync, Flush, Terminate, CopyDone: a header alone.
pub const PARSE_COMPLETE: &[u8] = &[backend::PARSE_COMPLETE, 0, 0, 0, 4];
pub const CLOSE_COMPLETE: &[u8] = &[backend::CLOSE_COMPLETE, 0, 0, 0, 4];
pub const SYNC: &[u8] = &[frontend::SYNC, 0, 0, 0, 4];
pub const FLUSH: &[u8] = &[frontend::FLUSH, 0, 0, 0, 4];
pub const TERMINATE: &[u8] = &[frontend::TERMINATE, 0, 0, 0, 4];
/// CopyFail with the reason that PostgreSQL will repeat in its error.
pub const COPY_FAIL: &[u8] = b"f\0\0\0\x14client vanished\0";
/// AuthenticationOk.
pub const AUTHENTICATION_OK: &[u8] = &[backend::AUTHENTICATION, 0, 0, 0, 8, 0, 0, 0, 0];
/// AuthenticationCleartextPassword.
pub const AUTHENTICATION_CLEARTEXT: &[u8] = &[backend::AUTHENTICATION, 0, 0, 0, 8, 0, 0, 0, 3];

/// ReadyForQuery.
#[must_use]
pub fn ready_for_query(status: u8) -> [u8; 6] {
    [backend::READY_FOR_QUERY, 0, 0, 0, 5, status]
}

/// AuthenticationMD5Password.
pub fn write_authentication_md5(out: &mut BytesMut, salt: [u8; 4]) {
    out.extend_from_slice(&[backend::AUTHENTICATION, 0, 0, 0, 12, 0, 0, 0, 5]);
    out.extend_from_slice(&salt);
}

/// ParameterStatus.
pub fn write_parameter_status(out: &mut BytesMut, name: &str, value: &str) {
    let start = out.len();
    out.extend_from_slice(&[backend::PARAMETER_STATUS, 0, 0, 0, 0]);
    for word in [name, value] {
        out.extend_from_slice(word.as_bytes());
        out.extend_from_slice(&[0]);
    }
    seal(out, start);
}

/// BackendKeyData.
pub fn write_backend_key_data(out: &mut BytesMut, key: &CancelKey) {
    let start = out.len();
    out.extend_from_slice(&[backend::BACKEND_KEY_DATA, 0, 0, 0, 0]);
    out.extend_from_slice(&key.process.to_be_bytes());
    out.extend_from_slice(&key.secret);
    seal(out, start);
}

/// Query.
pub fn write_query(out: &mut BytesMut, text: &str) -> Result<(), FrameError> {
    frame::put_header(out, frontend::QUERY, text.len().saturating_add(1))?;
    out.extend_from_slice(text.as_bytes());
    out.extend_from_slice(&[0]);
    Ok(())
}

/// PasswordMessage with a cleartext or md5 password.
pub fn write_password(out: &mut BytesMut, password: &[u8]) -> Result<(), FrameError> {
    frame::put_header(out, frontend::PASSWORD, password.len().saturating_add(1))?;
    out.extend_from_slice(password);
    out.extend_from_slice(&[0]);
    Ok(())
}

/// Name and value of a ParameterStatus body.
#[must_use]
pub fn read_parameter_status(body: &[u8]) -> Option<(&str, &str)> {
    let mut words = body.split(|b| *b == 0);
    let name = std::str::from_utf8(words.next()?).ok()?;
    let value = std::str::from_utf8(words.next()?).ok()?;
    (words.next() == Some(b"") && words.next().is_none()).then_some((name, value))
}

/// Process, channel and payload of a NotificationResponse body.
#[must_use]
pub fn read_notification(body: &[u8]) -> Option<(u32, &[u8], &[u8])> {
    let (&process, text) = body.split_first_chunk::<4>()?;
    let mut words = text.split(|b| *b == 0);
    let (channel, payload) = (words.next()?, words.next()?);
    (words.next() == Some(b"") && words.next().is_none()).then_some((u32::from_be_bytes(process), channel, payload))
}

/// Whether the body of a CommandComplete says that every prepared statement is gone.
#[must_use]
pub fn drops_all_statements(body: &[u8]) -> bool {
    matches!(body, b"DISCARD ALL\0" | b"DEALLOCATE ALL\0")
}

/// Of each column in the body of a RowDescription: name, type, type modifier. Ends early where the body does.
pub fn columns(body: &[u8]) -> impl Iterator<Item = (&[u8], &[u8], &[u8])> {
    // Behind the name: table (4), column (2), type (4), size (2), modifier (4), format (2).
    const BEHIND: usize = 18;
    let mut rest = body.get(2..).unwrap_or_default();
    std::iter::from_fn(move || {
        let end = rest.iter().position(|b| *b == 0)?;
        let (name, numbers) = rest.split_at_checked(end)?;
        let numbers = numbers.get(1..)?;
        let column = (name, numbers.get(6..10)?, numbers.get(12..16)?);
        rest = numbers.get(BEHIND..)?;
        Some(column)
    })
}

/// Whether the body of a CommandComplete says that tables, views or types may have other columns now.
#[must_use]
pub fn changes_tables(body: &[u8]) -> bool {
    [&b"ALTER "[..], b"DROP ", b"CREATE VIEW"].into_iter().any(|tag| body.starts_with(tag))
}

/// Whether the body of a CommandComplete says that something was created, or may have been.
#[must_use]
pub fn creates(body: &[u8]) -> bool {
    [&b"CREATE "[..], b"DO\0", b"CALL\0"].into_iter().any(|tag| body.starts_with(tag))
}

/// Whether the body of a CommandComplete says that one prepared statement was deallocated.
#[must_use]
pub fn drops_statement(body: &[u8]) -> bool {
    body.starts_with(b"DEALLOCATE\0")
}

/// Whether the body of a CommandComplete says that a transaction was rolled back, all of it or to a savepoint.
#[must_use]
pub fn rolls_back(body: &[u8]) -> bool {
    body.starts_with(b"ROLLBACK\0")
}

/// Whether the body of a CommandComplete says that there may be a function now that there was not before, or another
/// expression that is kept in the catalog: a view, a default, a policy, a check.
#[must_use]
pub fn makes_functions(body: &[u8]) -> bool {
    let others =
        [&b"CREATE INDEX"[..], b"CREATE ROLE", b"CREATE SEQUENCE", b"ALTER ROLE", b"ALTER SEQUENCE", b"ALTER INDEX"];
    let may = [&b"CREATE "[..], b"ALTER ", b"DO\0", b"CALL\0", b"COMMIT PREPARED"];
    may.into_iter().any(|tag| body.starts_with(tag)) && !others.into_iter().any(|tag| body.starts_with(tag))
}

/// The key in a BackendKeyData body.
#[must_use]
pub fn read_backend_key_data(body: &[u8]) -> Option<CancelKey> {
    let (&process, secret) = body.split_first_chunk::<4>()?;
    (4..=256)
        .contains(&secret.len())
        .then(|| CancelKey { process: u32::from_be_bytes(process), secret: secret.to_vec() })
}

/// The text columns of a DataRow body; `None` inside is NULL. The outer `None` means that the body is malformed.
#[must_use]
pub fn read_data_row(body: &[u8]) -> Option<Vec<Option<&[u8]>>> {
    let (&count, mut rest) = body.split_first_chunk::<2>()?;
    let mut columns = Vec::new();
    for _ in 0..u16::from_be_bytes(count) {
        let (&length, tail) = rest.split_first_chunk::<4>()?;
        if length == [0xFF; 4] {
            columns.push(None);
            rest = tail;
            continue;
        }
        let (value, tail) = tail.split_at_checked(usize::try_from(u32::from_be_bytes(length)).ok()?)?;
        columns.push(Some(value));
        rest = tail;
    }
    rest.is_empty().then_some(columns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_fail_has_its_own_length() {
        let header = frame::client_header(COPY_FAIL).unwrap().unwrap();
        assert_eq!(header.total(), COPY_FAIL.len());
    }

    #[test]
    fn parameter_status_round_trips() {
        let mut out = BytesMut::new();
        write_parameter_status(&mut out, "TimeZone", "UTC");
        assert_eq!(read_parameter_status(&out[5..]), Some(("TimeZone", "UTC")));
        assert_eq!(read_parameter_status(b"x\0y"), None);
        assert_eq!(read_parameter_status(b""), None);
    }

    #[test]
    fn a_row_that_lies_about_its_lengths_is_malformed() {
        assert_eq!(read_data_row(b"\0\x01\0\0\0\x01a"), Some(vec![Some(&b"a"[..])]));
        assert_eq!(read_data_row(b"\0\x01\xff\xff\xff\xff"), Some(vec![None]));
        assert_eq!(read_data_row(b"\0\x01\xff\xff\xff\xfe"), None);
        assert_eq!(read_data_row(b"\0\x02\0\0\0\x01a"), None);
        assert_eq!(read_data_row(b"\0"), None);
    }
}
