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
