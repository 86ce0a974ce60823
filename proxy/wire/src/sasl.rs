//! Authentication messages of both directions; the exchange itself is in `scram`.

use bytes::BytesMut;

use crate::{
    error::seal,
    frame::{self, FrameError},
    tag::{backend, frontend},
};

pub const SCRAM_SHA_256: &str = "SCRAM-SHA-256";
pub const SCRAM_SHA_256_PLUS: &str = "SCRAM-SHA-256-PLUS";

/// AuthenticationSASL: the mechanisms, best first.
pub fn write_mechanisms(out: &mut BytesMut, mechanisms: &[&str]) {
    let start = out.len();
    out.extend_from_slice(&[backend::AUTHENTICATION, 0, 0, 0, 0, 0, 0, 0, 10]);
    for mechanism in mechanisms {
        out.extend_from_slice(mechanism.as_bytes());
        out.extend_from_slice(&[0]);
    }
    out.extend_from_slice(&[0]);
    seal(out, start);
}

/// AuthenticationSASLContinue.
pub fn write_continue(out: &mut BytesMut, data: &[u8]) {
    write_step(out, 11, data);
}

/// AuthenticationSASLFinal.
pub fn write_final(out: &mut BytesMut, data: &[u8]) {
    write_step(out, 12, data);
}

fn write_step(out: &mut BytesMut, kind: u8, data: &[u8]) {
    let start = out.len();
    out.extend_from_slice(&[backend::AUTHENTICATION, 0, 0, 0, 0, 0, 0, 0, kind]);
    out.extend_from_slice(data);
    seal(out, start);
}

/// Mechanism and client-first message of a SASLInitialResponse body.
#[must_use]
pub fn read_initial_response(body: &[u8]) -> Option<(&str, &[u8])> {
    let end = body.iter().position(|b| *b == 0)?;
    let (mechanism, rest) = body.split_at_checked(end)?;
    let (&length, data) = rest.get(1..)?.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_be_bytes(length)).ok()?;
    (data.len() == length).then_some((std::str::from_utf8(mechanism).ok()?, data))
}

/// Appends a SASLInitialResponse.
pub fn write_initial_response(out: &mut BytesMut, mechanism: &str, data: &[u8]) -> Result<(), FrameError> {
    let body = mechanism.len().saturating_add(5).saturating_add(data.len());
    frame::put_header(out, frontend::PASSWORD, body)?;
    out.extend_from_slice(mechanism.as_bytes());
    out.extend_from_slice(&[0]);
    out.extend_from_slice(&u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
    out.extend_from_slice(data);
    Ok(())
}

/// Appends a SASLResponse.
pub fn write_response(out: &mut BytesMut, data: &[u8]) -> Result<(), FrameError> {
    frame::put_header(out, frontend::PASSWORD, data.len())?;
    out.extend_from_slice(data);
    Ok(())
}

/// What a server asks for in an `R` message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authentication<'a> {
    Ok,
    Cleartext,
    Md5([u8; 4]),
    Sasl(Vec<&'a str>),
    SaslContinue(&'a [u8]),
    SaslFinal(&'a [u8]),
    /// Kerberos, GSSAPI, SSPI and whatever else: the number.
    Other(u32),
}

impl<'a> Authentication<'a> {
    /// Reads the body of an `R` message.
    #[must_use]
    pub fn read(body: &'a [u8]) -> Option<Self> {
        let (&kind, data) = body.split_first_chunk::<4>()?;
        Some(match u32::from_be_bytes(kind) {
            0 => Self::Ok,
            3 => Self::Cleartext,
            5 => Self::Md5(*data.first_chunk::<4>()?),
            10 => Self::Sasl(
                data.split(|b| *b == 0).filter_map(|m| std::str::from_utf8(m).ok()).filter(|m| !m.is_empty()).collect(),
            ),
            11 => Self::SaslContinue(data),
            12 => Self::SaslFinal(data),
            other => Self::Other(other),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initial_response_round_trips_and_lies_are_refused() {
        let mut out = BytesMut::new();
        write_initial_response(&mut out, SCRAM_SHA_256, b"n,,n=,r=x").unwrap();
        assert_eq!(read_initial_response(&out[5..]), Some((SCRAM_SHA_256, &b"n,,n=,r=x"[..])));
        assert_eq!(read_initial_response(&out[5..out.len() - 1]), None);
        assert_eq!(read_initial_response(b"X\0\xff\xff\xff\xff"), None);
        assert_eq!(read_initial_response(b""), None);
    }

    #[test]
    fn mechanisms_are_read_back() {
        let mut out = BytesMut::new();
        write_mechanisms(&mut out, &[SCRAM_SHA_256_PLUS, SCRAM_SHA_256]);
        assert_eq!(
            Authentication::read(&out[5..]),
            Some(Authentication::Sasl(vec![SCRAM_SHA_256_PLUS, SCRAM_SHA_256]))
        );
    }
}
