//! ErrorResponse and NoticeResponse: reading the fields that matter, building our own.
//!
//! Whatever we build carries a severity, an SQLSTATE and a text for the client. That text names no address, no secret
//! and no other tenant; who calls this decides it, nothing here adds to it.

use bytes::BytesMut;

use crate::{
    frame::{self, HEADER},
    tag::backend,
};

/// SQLSTATEs that Tenantry itself sends or looks for (PostgreSQL documentation, appendix "Error Codes").
pub mod sqlstate {
    pub const ADMIN_SHUTDOWN: &str = "57P01";
    pub const DATABASE_DROPPED: &str = "57P04";
    pub const CANNOT_CONNECT_NOW: &str = "57P03";
    pub const CONNECTION_FAILURE: &str = "08006";
    pub const CRASH_SHUTDOWN: &str = "57P02";
    pub const DUPLICATE_PREPARED_STATEMENT: &str = "42P05";
    pub const FEATURE_NOT_SUPPORTED: &str = "0A000";
    pub const IDLE_IN_TRANSACTION_TIMEOUT: &str = "25P03";
    pub const IDLE_SESSION_TIMEOUT: &str = "57P05";
    pub const INVALID_AUTHORIZATION: &str = "28000";
    pub const INVALID_CATALOG_NAME: &str = "3D000";
    pub const INVALID_PASSWORD: &str = "28P01";
    pub const INVALID_STATEMENT_NAME: &str = "26000";
    pub const OUT_OF_MEMORY: &str = "53200";
    pub const PROGRAM_LIMIT_EXCEEDED: &str = "54000";
    pub const PROTOCOL_VIOLATION: &str = "08P01";
    pub const QUERY_CANCELED: &str = "57014";
    pub const READ_ONLY_TRANSACTION: &str = "25006";
    pub const TOO_MANY_CONNECTIONS: &str = "53300";
    pub const TRANSACTION_RESOLUTION_UNKNOWN: &str = "08007";
    pub const TRANSACTION_TIMEOUT: &str = "25P04";
}

/// How bad it is; after `Fatal` the connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    Error,
    Fatal,
}

impl Severity {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "ERROR",
            Self::Fatal => "FATAL",
        }
    }
}

/// An error that we tell a client ourselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorResponse {
    pub severity: Severity,
    pub code: &'static str,
    pub message: String,
    /// `proxy_code=… key=value …`: stable, for machines.
    pub detail: Option<String>,
    pub hint: Option<String>,
    /// The routine in PostgreSQL's source that an error of ours stands for: drivers know some by it.
    pub routine: Option<&'static str>,
}

impl ErrorResponse {
    #[must_use]
    pub fn new(severity: Severity, code: &'static str, message: impl Into<String>) -> Self {
        Self { severity, code, message: message.into(), detail: None, hint: None, routine: None }
    }

    #[must_use]
    pub fn error(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(Severity::Error, code, message)
    }

    #[must_use]
    pub fn fatal(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(Severity::Fatal, code, message)
    }

    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same with another severity (an error before login is fatal).
    #[must_use]
    pub fn with_severity(mut self, severity: Severity) -> Self {
        self.severity = severity;
        self
    }

    /// Appends the message.
    pub fn write(&self, out: &mut BytesMut) {
        let severity = self.severity.as_str();
        let fields = [
            (b'S', Some(severity)),
            (b'V', Some(severity)),
            (b'C', Some(self.code)),
            (b'M', Some(self.message.as_str())),
            (b'D', self.detail.as_deref()),
            (b'H', self.hint.as_deref()),
            (b'R', self.routine),
        ];
        write_fields(out, backend::ERROR_RESPONSE, fields.into_iter().filter_map(|(k, v)| Some((k, v?.as_bytes()))));
    }
}

/// The body of an ErrorResponse or NoticeResponse, read field by field; a field that is absent is `None`.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// `body` may be only the beginning of the message: the fields that matter come first.
    #[must_use]
    pub fn new(body: &'a [u8]) -> Self {
        Self(body)
    }

    #[must_use]
    pub fn get(&self, field: u8) -> Option<&'a [u8]> {
        self.iter().find_map(|(k, v)| (k == field).then_some(v))
    }

    /// The untranslated severity (`V`), or the translated one of servers before 9.6.
    #[must_use]
    pub fn severity(&self) -> Option<&'a [u8]> {
        self.get(b'V').or_else(|| self.get(b'S'))
    }

    /// FATAL or PANIC: the server closes after it.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        matches!(self.severity(), Some(b"FATAL" | b"PANIC"))
    }

    #[must_use]
    pub fn code(&self) -> Option<&'a str> {
        self.get(b'C').and_then(|c| std::str::from_utf8(c).ok()).filter(|c| c.len() == 5)
    }

    /// The function of PostgreSQL's source that raised it; the one text that is never translated.
    #[must_use]
    pub fn routine(&self) -> Option<&'a str> {
        self.get(b'R').and_then(|c| std::str::from_utf8(c).ok())
    }

    #[must_use]
    pub fn message(&self) -> Option<&'a str> {
        self.get(b'M').and_then(|c| std::str::from_utf8(c).ok())
    }

    pub fn iter(&self) -> impl Iterator<Item = (u8, &'a [u8])> + use<'a> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let (&kind, tail) = rest.split_first()?;
            if kind == 0 {
                return None;
            }
            let end = tail.iter().position(|b| *b == 0)?;
            let (value, after) = tail.split_at_checked(end)?;
            rest = after.get(1..)?;
            Some((kind, value))
        })
    }
}

/// Turns a NoticeResponse that announced the end ("terminating connection because of crash of another server process")
/// into the FATAL that the client would otherwise miss: same fields, severity FATAL.
pub fn write_fatal_from_notice(out: &mut BytesMut, body: &[u8]) {
    let fields =
        Fields::new(body).iter().map(|(k, v)| if matches!(k, b'S' | b'V') { (k, &b"FATAL"[..]) } else { (k, v) });
    write_fields(out, backend::ERROR_RESPONSE, fields);
}

fn write_fields<'a>(out: &mut BytesMut, tag: u8, fields: impl Iterator<Item = (u8, &'a [u8])>) {
    let start = out.len();
    out.extend_from_slice(&[tag, 0, 0, 0, 0]);
    for (kind, value) in fields {
        out.extend_from_slice(&[kind]);
        // A NUL inside a field would end it early and turn the rest into fields of its own.
        out.extend(value.iter().copied().map(|b| if b == 0 { b' ' } else { b }));
        out.extend_from_slice(&[0]);
    }
    out.extend_from_slice(&[0]);
    seal(out, start);
}

/// Writes the length of the message that began at `start`. Used for messages whose size we bound ourselves.
pub(crate) fn seal(out: &mut BytesMut, start: usize) {
    let length = out.len().saturating_sub(start).saturating_sub(1);
    let length = u32::try_from(length).unwrap_or(frame::LARGE_MESSAGE).to_be_bytes();
    if let Some(slot) = out.get_mut(start.saturating_add(1)..start.saturating_add(HEADER)) {
        slot.copy_from_slice(&length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut out = BytesMut::new();
        ErrorResponse::error(sqlstate::TOO_MANY_CONNECTIONS, "full\0C99999")
            .detail("proxy_code=X")
            .hint("wait")
            .write(&mut out);
        let header = frame::server_header(&out).unwrap().unwrap();
        assert_eq!(header.total(), out.len());
        let fields = Fields::new(&out[HEADER..]);
        assert_eq!(fields.code(), Some("53300"));
        assert_eq!(fields.message(), Some("full C99999"));
        assert_eq!(fields.get(b'D'), Some(&b"proxy_code=X"[..]));
        assert!(!fields.is_fatal());
    }

    #[test]
    fn an_error_without_sqlstate_is_no_panic() {
        assert_eq!(Fields::new(b"SFATAL\0Mx\0\0").code(), None);
        assert!(Fields::new(b"SFATAL\0").is_fatal());
        for cut in 0..8 {
            let _ = Fields::new(&b"SFATAL\0C"[..cut]).code();
        }
    }

    #[test]
    fn a_crash_notice_becomes_one_fatal() {
        let mut out = BytesMut::new();
        write_fatal_from_notice(&mut out, b"SWARNING\0VWARNING\0C57P02\0Mterminating\0\0");
        let fields = Fields::new(&out[HEADER..]);
        assert!(fields.is_fatal());
        assert_eq!(fields.code(), Some(sqlstate::CRASH_SHUTDOWN));
    }
}
