//! How a pool logs in to PostgreSQL. Held in memory only, never shown.

use tenantry_wire::scram::{ClientKey, ClientSecret};
use zeroize::Zeroizing;

/// What proves to PostgreSQL that we may act for a role.
#[derive(Clone)]
pub enum Credentials {
    /// No secret: good for servers that trust us.
    None,
    Password(Zeroizing<String>),
    /// `md5…` as in `pg_authid`: answers an md5 challenge only.
    Md5(Zeroizing<String>),
    /// Recovered from a client's SCRAM proof; good while the server has the same verifier.
    ScramKeys {
        client_key: ClientKey,
        server_key: Zeroizing<[u8; 32]>,
    },
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Password(_) => "Password(***)",
            Self::Md5(_) => "Md5(***)",
            Self::ScramKeys { .. } => "ScramKeys(***)",
        })
    }
}

impl Credentials {
    /// Whether they prove the same in the same way.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::None, Self::None) => true,
            (Self::Password(own), Self::Password(other)) | (Self::Md5(own), Self::Md5(other)) => own == other,
            (
                Self::ScramKeys { client_key, server_key },
                Self::ScramKeys { client_key: other_client, server_key: other_server },
            ) => client_key.0 == other_client.0 && server_key == other_server,
            _ => false,
        }
    }

    /// For the SCRAM exchange; `None` if this cannot do SCRAM.
    #[must_use]
    pub fn scram(&self) -> Option<ClientSecret> {
        match self {
            Self::Password(p) => Some(ClientSecret::Password(Zeroizing::new(p.as_bytes().to_vec()))),
            Self::ScramKeys { client_key, server_key } => {
                Some(ClientSecret::Keys { client_key: client_key.clone(), server_key: **server_key })
            }
            Self::None | Self::Md5(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_secret_is_told_from_another() {
        let keys = |client, server| Credentials::ScramKeys {
            client_key: ClientKey(Zeroizing::new([client; 32])),
            server_key: Zeroizing::new([server; 32]),
        };
        let password = |text: &str| Credentials::Password(Zeroizing::new(text.to_owned()));
        assert!(keys(1, 2).is_same(&keys(1, 2)) && password("a").is_same(&password("a")));
        assert!(!keys(1, 2).is_same(&keys(1, 3)) && !keys(1, 2).is_same(&keys(3, 2)));
        assert!(!password("a").is_same(&password("b")) && !password("a").is_same(&Credentials::None));
    }
}
