//! How a pool logs in to PostgreSQL. Held in memory only, never shown.
//!
//! While a password is changed nobody can say which of two PostgreSQL has by now, so a [`Keyring`] holds both. What always
//! holds: it never holds more than two; of two that are both wrong the second refusal counts, and is not tried away.

use tenantry_wire::scram::{ClientKey, ClientSecret, same_secret};
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

    /// Whether both say the same.
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::None, Self::None) => true,
            (Self::Password(a), Self::Password(b)) | (Self::Md5(a), Self::Md5(b)) => {
                same_secret(a.as_bytes(), b.as_bytes())
            }
            (Self::ScramKeys { client_key: a, server_key: x }, Self::ScramKeys { client_key: b, server_key: y }) => {
                same_secret(a.0.as_slice(), b.0.as_slice()) && same_secret(x.as_slice(), y.as_slice())
            }
            _ => false,
        }
    }

    /// For the SCRAM exchange without the password.
    #[must_use]
    pub fn client_key(&self) -> Option<&ClientKey> {
        match self {
            Self::ScramKeys { client_key, .. } => Some(client_key),
            _ => None,
        }
    }
}

/// What a pool logs in with, and what it would try if PostgreSQL refuses that. Pure.
///
/// Calls: `current` for each dial; `worked` or `refused` with its turn when the dial is decided; `learn` and `change` when
/// somebody tells of a secret.
#[derive(Debug)]
pub struct Keyring {
    current: Credentials,
    other: Option<Credentials>,
    /// Grows whenever `current` becomes another.
    turn: u32,
    /// `current` stands in for `other`, which was refused, and has not worked yet.
    swapped: bool,
}

impl Keyring {
    #[must_use]
    pub fn new(current: Credentials) -> Self {
        Self { current, other: None, turn: 0, swapped: false }
    }

    /// The same secrets, for a pool at another server.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self { current: self.current.clone(), other: self.other.clone(), turn: 0, swapped: false }
    }

    /// What to log in with now, and whose turn that is.
    #[must_use]
    pub fn current(&self) -> (Credentials, u32) {
        (self.current.clone(), self.turn)
    }

    /// Both, the current one first.
    pub fn all(&self) -> impl Iterator<Item = &Credentials> {
        [&self.current].into_iter().chain(&self.other)
    }

    /// A client proved this. False if it was known already: PostgreSQL has said, or will say, which of the two it takes.
    pub fn learn(&mut self, credentials: Credentials) -> bool {
        !self.all().any(|known| known.is(&credentials)) && self.change(credentials)
    }

    /// This is the secret from now on. False if it was before.
    pub fn change(&mut self, credentials: Credentials) -> bool {
        if self.current.is(&credentials) {
            return false;
        }
        self.other = match std::mem::replace(&mut self.current, credentials) {
            Credentials::None => None,
            old => Some(old),
        };
        self.begin_turn(false);
        true
    }

    /// PostgreSQL took what had this turn.
    pub fn worked(&mut self, turn: u32) {
        if turn == self.turn {
            self.swapped = false;
        }
    }

    /// PostgreSQL refused what had this turn; true if there is another to try.
    #[must_use]
    pub fn refused(&mut self, turn: u32) -> bool {
        if turn != self.turn {
            // A dial of the time before: another is being tried already.
            return true;
        }
        let Some(other) = &mut self.other else { return false };
        std::mem::swap(&mut self.current, other);
        // Refused both: back to the first, for the next round.
        let is_first = !self.swapped;
        self.begin_turn(is_first);
        is_first
    }

    fn begin_turn(&mut self, swapped: bool) {
        self.turn = self.turn.wrapping_add(1);
        self.swapped = swapped;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(text: &str) -> Credentials {
        Credentials::Password(Zeroizing::new(text.to_owned()))
    }

    fn keys(byte: u8) -> Credentials {
        let client_key = ClientKey(Zeroizing::new([byte; 32]));
        Credentials::ScramKeys { client_key, server_key: Zeroizing::new([byte; 32]) }
    }

    /// Dials until PostgreSQL, which has `theirs`, takes one or the pool gives up: how many dials, and whether it worked.
    fn dial(ring: &mut Keyring, theirs: &Credentials) -> (u32, bool) {
        for dials in 1..10 {
            let (current, turn) = ring.current();
            if current.is(theirs) {
                ring.worked(turn);
                return (dials, true);
            }
            if !ring.refused(turn) {
                return (dials, false);
            }
        }
        panic!("it tries for ever");
    }

    #[test]
    fn a_changed_password_works_whichever_side_changes_first_and_back_again() {
        let mut ring = Keyring::new(password("a"));
        assert!(ring.change(password("b")));
        assert_eq!(dial(&mut ring, &password("a")), (2, true), "PostgreSQL has the old one still");
        assert_eq!(dial(&mut ring, &password("a")), (1, true));
        assert_eq!(dial(&mut ring, &password("b")), (2, true), "now it has the new one");
        assert!(!ring.change(password("b")), "nothing new");
        assert!(ring.change(password("a")));
        assert_eq!(dial(&mut ring, &password("b")), (2, true));
        assert_eq!(dial(&mut ring, &password("a")), (2, true));
    }

    #[test]
    fn two_wrong_ones_are_refused_every_time_after_two_dials() {
        let mut ring = Keyring::new(password("a"));
        assert_eq!(dial(&mut ring, &password("c")), (1, false));
        ring.change(password("b"));
        for _ in 0..3 {
            assert_eq!(dial(&mut ring, &password("c")), (2, false));
        }
        assert_eq!(dial(&mut ring, &password("b")), (1, true), "each round begins with the newest");
    }

    #[test]
    fn dials_that_were_under_way_together_change_it_once() {
        let mut ring = Keyring::new(password("a"));
        ring.change(password("b"));
        let turns = [ring.current().1, ring.current().1, ring.current().1];
        assert!(turns.into_iter().all(|turn| ring.refused(turn)));
        assert!(ring.current().0.is(&password("a")));
        // What came too late is no success of what is tried now.
        ring.worked(turns[0]);
        let turn = ring.current().1;
        assert!(!ring.refused(turn));
    }

    #[test]
    fn what_is_known_is_not_learned_again_and_the_third_pushes_out_the_one_that_was_not_used() {
        let mut ring = Keyring::new(Credentials::None);
        assert!(ring.learn(keys(1)) && !ring.learn(keys(1)));
        assert_eq!(ring.all().count(), 1, "no secret is none to fall back to");
        assert!(ring.learn(keys(2)) && !ring.learn(keys(1)) && !ring.learn(keys(2)));
        assert!(ring.learn(keys(3)) && ring.all().count() == 2);
        assert_eq!(dial(&mut ring, &keys(1)), (2, false));
        assert_eq!(dial(&mut ring, &keys(2)), (2, true));
    }
}
