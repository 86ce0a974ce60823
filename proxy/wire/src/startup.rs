//! What a client may send first (PostgreSQL documentation, "Start-up" and "StartupMessage").
//!
//! Limits are PostgreSQL's: 8 to 10,004 bytes, a cancel key of 4 to 256 bytes. A packet that is not whole yet is `None`;
//! one that can never become valid is an error, and says whether the client is told or only closed, as PostgreSQL does.

use bytes::BytesMut;

use crate::{error, tag::backend};

const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;
const CANCEL_REQUEST: u32 = 80_877_102;
/// PostgreSQL's `MAX_STARTUP_PACKET_LENGTH` plus the length word.
pub const MAX_STARTUP: usize = 10_004;
const MIN_STARTUP: usize = 8;
/// Newest minor version of protocol 3 that we speak.
pub const NEWEST_MINOR: u16 = 2;
/// First byte of a TLS ClientHello: `sslnegotiation=direct`.
pub const TLS_HANDSHAKE: u8 = 0x16;

/// The first packet of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum First {
    SslRequest,
    GssEncRequest,
    CancelRequest(CancelKey),
    Startup(Startup),
}

/// Identifies a session to cancel: the process id is public, the secret is not.
#[derive(Clone, PartialEq, Eq)]
pub struct CancelKey {
    pub process: u32,
    /// 4 bytes in protocol 3.0, up to 256 in 3.2.
    pub secret: Vec<u8>,
}

impl std::fmt::Debug for CancelKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CancelKey({})", self.process)
    }
}

/// StartupMessage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Startup {
    /// Minor version that the client asked for; the major one is 3.
    pub minor: u16,
    /// In the order sent; names starting with `_pq_.` are in `protocol_options`.
    pub parameters: Vec<(String, String)>,
    pub protocol_options: Vec<String>,
}

impl Startup {
    #[must_use]
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().rev().find(|(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    /// The minor version to speak: the client's, or ours if it is newer.
    #[must_use]
    pub fn agreed_minor(&self) -> u16 {
        self.minor.min(NEWEST_MINOR)
    }

    /// Whether a NegotiateProtocolVersion is due (once): a newer minor version, or an option that we do not know. We know none.
    #[must_use]
    pub fn needs_negotiation(&self) -> bool {
        self.minor > NEWEST_MINOR || !self.protocol_options.is_empty()
    }

    /// Appends NegotiateProtocolVersion.
    pub fn write_negotiation(&self, out: &mut BytesMut) {
        let start = out.len();
        out.extend_from_slice(&[backend::NEGOTIATE_PROTOCOL_VERSION, 0, 0, 0, 0]);
        // PostgreSQL and libpq put the whole version here, major included.
        out.extend_from_slice(&(0x0003_0000 | u32::from(self.agreed_minor())).to_be_bytes());
        out.extend_from_slice(&u32::try_from(self.protocol_options.len()).unwrap_or(0).to_be_bytes());
        for option in &self.protocol_options {
            out.extend_from_slice(option.as_bytes());
            out.extend_from_slice(&[0]);
        }
        error::seal(out, start);
    }
}

/// Why the first packet is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StartupError {
    /// Closed without a word, as PostgreSQL does.
    #[error("invalid length of startup packet")]
    Length,
    /// 0A000.
    #[error("unsupported frontend protocol {0}.{1}: server supports 3.0 to 3.2")]
    Version(u16, u16),
    /// 08P01.
    #[error("invalid startup packet layout: expected terminator as last byte")]
    Terminator,
    /// 08P01.
    #[error("invalid startup packet: names and values must be valid UTF-8")]
    Encoding,
}

/// Decodes the first packet in `buf` and says how many bytes it took; `None` while it is not whole.
pub fn decode(buf: &[u8]) -> Result<Option<(First, usize)>, StartupError> {
    let Some(&[a, b, c, d]) = buf.first_chunk::<4>() else { return Ok(None) };
    let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).map_err(|_| StartupError::Length)?;
    if !(MIN_STARTUP..=MAX_STARTUP).contains(&length) {
        return Err(StartupError::Length);
    }
    let Some(packet) = buf.get(4..length) else { return Ok(None) };
    let Some((&code, body)) = packet.split_first_chunk::<4>() else { return Err(StartupError::Length) };
    let first = match u32::from_be_bytes(code) {
        SSL_REQUEST if body.is_empty() => First::SslRequest,
        GSSENC_REQUEST if body.is_empty() => First::GssEncRequest,
        CANCEL_REQUEST => First::CancelRequest(cancel(body)?),
        SSL_REQUEST | GSSENC_REQUEST => return Err(StartupError::Length),
        version => First::Startup(startup(version, body)?),
    };
    Ok(Some((first, length)))
}

fn cancel(body: &[u8]) -> Result<CancelKey, StartupError> {
    let Some((&process, secret)) = body.split_first_chunk::<4>() else { return Err(StartupError::Length) };
    if !(4..=256).contains(&secret.len()) {
        return Err(StartupError::Length);
    }
    Ok(CancelKey { process: u32::from_be_bytes(process), secret: secret.to_vec() })
}

fn startup(version: u32, body: &[u8]) -> Result<Startup, StartupError> {
    let [_, _, hi, lo] = version.to_be_bytes();
    let [mh, ml, _, _] = version.to_be_bytes();
    let (major, minor) = (u16::from_be_bytes([mh, ml]), u16::from_be_bytes([hi, lo]));
    if major != 3 {
        return Err(StartupError::Version(major, minor));
    }
    let Some((&0, pairs)) = body.split_last() else { return Err(StartupError::Terminator) };
    let mut startup = Startup { minor, parameters: Vec::new(), protocol_options: Vec::new() };
    let mut words = pairs.split(|b| *b == 0);
    loop {
        let name = match words.next() {
            Some([]) => break,
            Some(name) => name,
            None => return Err(StartupError::Terminator),
        };
        let Some(value) = words.next() else { return Err(StartupError::Terminator) };
        let name = std::str::from_utf8(name).map_err(|_| StartupError::Encoding)?;
        let value = std::str::from_utf8(value).map_err(|_| StartupError::Encoding)?;
        if name.starts_with("_pq_.") {
            startup.protocol_options.push(name.to_owned());
        } else {
            startup.parameters.push((name.to_owned(), value.to_owned()));
        }
    }
    // What is left must be nothing: the empty name was the terminator.
    if words.next().is_some() {
        return Err(StartupError::Terminator);
    }
    Ok(startup)
}

/// Reads the `options` parameter: `-c name=value`, `-cname=value` and `--name=value`, words split at blanks, a backslash
/// keeping the next character (as PostgreSQL's `pg_split_opts`). The first word that is none of these is the error.
pub fn split_options(options: &str) -> Result<Vec<(String, String)>, String> {
    let mut settings = Vec::new();
    let mut words = split_words(options).into_iter();
    while let Some(word) = words.next() {
        let assignment = match (word.strip_prefix("--"), word.strip_prefix("-c")) {
            (Some(long), _) => long.to_owned(),
            (None, Some("")) => words.next().ok_or_else(|| word.clone())?,
            (None, Some(short)) => short.to_owned(),
            (None, None) => return Err(word),
        };
        let (name, value) = assignment.split_once('=').ok_or_else(|| assignment.clone())?;
        settings.push((name.replace('-', "_"), value.to_owned()));
    }
    Ok(settings)
}

fn split_words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            c if c.is_ascii_whitespace() => words.extend(word.take()),
            '\\' => word.get_or_insert_default().extend(chars.next()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// Appends a StartupMessage for protocol 3.`minor`.
pub fn write_startup(out: &mut BytesMut, minor: u16, parameters: &[(&str, &str)]) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&(0x0003_0000 | u32::from(minor)).to_be_bytes());
    for (name, value) in parameters {
        for word in [name, value] {
            out.extend_from_slice(word.as_bytes());
            out.extend_from_slice(&[0]);
        }
    }
    out.extend_from_slice(&[0]);
    seal_untagged(out, start);
}

/// Appends an SSLRequest.
pub fn write_ssl_request(out: &mut BytesMut) {
    out.extend_from_slice(&8u32.to_be_bytes());
    out.extend_from_slice(&SSL_REQUEST.to_be_bytes());
}

/// Appends a CancelRequest.
pub fn write_cancel_request(out: &mut BytesMut, key: &CancelKey) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&CANCEL_REQUEST.to_be_bytes());
    out.extend_from_slice(&key.process.to_be_bytes());
    out.extend_from_slice(&key.secret);
    seal_untagged(out, start);
}

fn seal_untagged(out: &mut BytesMut, start: usize) {
    let length = u32::try_from(out.len().saturating_sub(start)).unwrap_or(0).to_be_bytes();
    if let Some(slot) = out.get_mut(start..start.saturating_add(4)) {
        slot.copy_from_slice(&length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(parameters: &[(&str, &str)], minor: u16) -> BytesMut {
        let mut out = BytesMut::new();
        write_startup(&mut out, minor, parameters);
        out
    }

    #[test]
    fn a_startup_is_read_whole_or_not_at_all() {
        let whole = packet(&[("user", "u"), ("database", "d")], 0);
        for cut in 0..whole.len() {
            assert_eq!(decode(&whole[..cut]), Ok(None), "cut at {cut}");
        }
        let Ok(Some((First::Startup(startup), used))) = decode(&whole) else { panic!("startup") };
        assert_eq!(used, whole.len());
        assert_eq!(startup.parameter("user"), Some("u"));
        assert!(!startup.needs_negotiation());
    }

    #[test]
    fn a_newer_minor_version_or_an_unknown_option_is_negotiated_once() {
        let probe = packet(&[("user", "u"), ("_pq_.test_protocol_negotiation", "")], 9999);
        let Ok(Some((First::Startup(startup), _))) = decode(&probe) else { panic!("startup") };
        assert!(startup.needs_negotiation());
        let mut out = BytesMut::new();
        startup.write_negotiation(&mut out);
        assert_eq!(&out[..13], b"v\0\0\0\x2b\0\x03\0\x02\0\0\0\x01".as_slice());
        let Ok(Some((First::Startup(v32), _))) = decode(&packet(&[("user", "u")], 2)) else { panic!("startup") };
        assert!(!v32.needs_negotiation());
    }

    #[test]
    fn bad_lengths_and_layouts_are_refused() {
        for length in [0u32, 4, 7, 10_005, u32::MAX] {
            assert_eq!(decode(&length.to_be_bytes()), Err(StartupError::Length));
        }
        assert_eq!(decode(b"GET / HTTP/1.1\r\n\r\n"), Err(StartupError::Length));
        let mut no_end = packet(&[("user", "u")], 0);
        let last = no_end.len() - 1;
        no_end[last] = b'x';
        assert_eq!(decode(&no_end), Err(StartupError::Terminator));
        let mut no_last = packet(&[("user", "u")], 0);
        no_last.truncate(last);
        no_last[3] -= 1;
        assert_eq!(decode(&no_last), Err(StartupError::Terminator), "the last value's NUL is no terminator");
        assert_eq!(decode(&[0, 0, 0, 9, 0, 2, 0, 0, 0]), Err(StartupError::Version(2, 0)));
    }

    #[test]
    fn cancel_keys_may_be_long() {
        for n in [4usize, 32, 256] {
            let mut out = BytesMut::new();
            write_cancel_request(&mut out, &CancelKey { process: 7, secret: vec![9; n] });
            assert!(matches!(decode(&out), Ok(Some((First::CancelRequest(k), _))) if k.secret.len() == n));
        }
        for n in [0usize, 3, 257] {
            let mut out = BytesMut::new();
            write_cancel_request(&mut out, &CancelKey { process: 7, secret: vec![9; n] });
            assert_eq!(decode(&out), Err(StartupError::Length));
        }
    }

    #[test]
    fn options_are_split_as_postgresql_does() {
        let read = |s: &str| split_options(s);
        assert_eq!(
            read(r"-c a=1 -cb=2  --c-d=x\ y"),
            Ok(vec![("a".into(), "1".into()), ("b".into(), "2".into()), ("c_d".into(), "x y".into())])
        );
        assert!(read("-x").is_err());
        assert!(read("-c").is_err());
        assert_eq!(read("  "), Ok(vec![]));
    }
}
