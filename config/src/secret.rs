//! Secrets: text that must not be shown, and the three forms a role's secret may take.
//!
//! What always holds: no `Debug`, `Display` or error text of this file contains the secret, and a `Secret` is wiped
//! when dropped.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use zeroize::Zeroizing;

use crate::RoleSecret;

/// A password or verifier. Wiped on drop; `Debug` prints `***`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Takes the text over without a copy.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The text itself; the one way to it, so that its readers can be searched for.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self::new(text)
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self::new(text.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Why a role's secret was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretError {
    /// No byte at all.
    Empty,
    /// Has a NUL, which no client can send.
    Nul,
    /// Starts with `SCRAM-SHA-256$` but is not a verifier.
    BadScram,
}

impl fmt::Display for SecretError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "the secret is empty; write one, or leave the key out",
            Self::Nul => "the secret contains a NUL byte, which no client can send",
            Self::BadScram => {
                "starts with SCRAM-SHA-256$ but is not a well-formed verifier \
                 (SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>); copy it whole from pg_authid.rolpassword"
            }
        })
    }
}

impl std::error::Error for SecretError {}

impl RoleSecret {
    /// Tells a plain password, an md5 hash and a SCRAM verifier apart the way PostgreSQL does (`get_password_type`),
    /// except that a malformed SCRAM verifier is an error rather than a very long password.
    ///
    /// # Errors
    /// The secret is empty, has a NUL, or is a malformed SCRAM verifier.
    pub fn classify(secret: Secret) -> Result<Self, SecretError> {
        let text = secret.expose();
        if text.is_empty() {
            return Err(SecretError::Empty);
        }
        if text.contains('\0') {
            return Err(SecretError::Nul);
        }
        if is_md5(text) {
            return Ok(Self::Md5(secret));
        }
        match text.strip_prefix("SCRAM-SHA-256$") {
            None => Ok(Self::Plain(secret)),
            Some(rest) if is_scram(rest) => Ok(Self::Scram(secret)),
            Some(_) => Err(SecretError::BadScram),
        }
    }
}

fn is_md5(text: &str) -> bool {
    text.strip_prefix("md5")
        .is_some_and(|hex| hex.len() == 32 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
}

/// `<iterations>:<salt>$<StoredKey>:<ServerKey>`; the keys are SHA-256 digests.
fn is_scram(rest: &str) -> bool {
    let is_key = |text: &str| BASE64.decode(text).is_ok_and(|key| key.len() == 32);
    let parts = || {
        let (head, keys) = rest.split_once('$')?;
        let (iterations, salt) = head.split_once(':')?;
        let (stored, server) = keys.split_once(':')?;
        Some((iterations, salt, stored, server))
    };
    parts().is_some_and(|(iterations, salt, stored, server)| {
        iterations.bytes().all(|b| b.is_ascii_digit())
            && iterations.parse::<i32>().is_ok_and(|n| n > 0)
            && BASE64.decode(salt).is_ok_and(|salt| !salt.is_empty())
            && is_key(stored)
            && is_key(server)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

    #[test]
    fn debug_shows_nothing() {
        let role = RoleSecret::classify("hunter2".into()).unwrap();
        assert_eq!(format!("{role:?}"), "Plain(***)");
    }

    #[test]
    fn the_three_forms_are_told_apart() {
        let md5 = format!("md5{}", "0123456789abcdef".repeat(2));
        let scram = format!("SCRAM-SHA-256$4096:c2FsdA==${KEY}:{KEY}");
        assert!(matches!(RoleSecret::classify(md5.into()), Ok(RoleSecret::Md5(_))));
        assert!(matches!(RoleSecret::classify(scram.into()), Ok(RoleSecret::Scram(_))));
        for plain in ["x", "md5", "md5abc", "SCRAM-SHA-256", &format!("md5{}", "A".repeat(32))] {
            assert!(matches!(RoleSecret::classify(plain.into()), Ok(RoleSecret::Plain(_))), "{plain}");
        }
    }

    #[test]
    fn malformed_secrets_are_refused() {
        assert_eq!(RoleSecret::classify("".into()), Err(SecretError::Empty));
        assert_eq!(RoleSecret::classify("a\0b".into()), Err(SecretError::Nul));
        for rest in [
            String::new(),
            format!("4096:c2FsdA==${KEY}"),
            format!("0:c2FsdA==${KEY}:{KEY}"),
            format!("-1:c2FsdA==${KEY}:{KEY}"),
            format!("+1:c2FsdA==${KEY}:{KEY}"),
            format!("99999999999:c2FsdA==${KEY}:{KEY}"),
            format!("4096:${KEY}:{KEY}"),
            format!("4096:!!!!${KEY}:{KEY}"),
            format!("4096:c2FsdA==$c2hvcnQ=:{KEY}"),
            format!("4096:c2FsdA==${KEY}:{KEY}:{KEY}"),
        ] {
            let text = format!("SCRAM-SHA-256${rest}");
            assert_eq!(RoleSecret::classify(text.as_str().into()), Err(SecretError::BadScram), "{text}");
        }
    }
}
