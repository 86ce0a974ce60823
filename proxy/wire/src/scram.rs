//! SCRAM-SHA-256 and SCRAM-SHA-256-PLUS, both sides, as PostgreSQL speaks them (RFC 5802, RFC 7677, chapter 53.3),
//! and the two MD5 hashes of the older method.
//!
//! What always holds: nothing here does I/O, reads a clock or makes randomness (nonces, salts and seeds are
//! arguments); no message of the other side can make it panic, allocate more than a few KiB or, as a client, run more
//! than [`MAX_ITERATIONS`] rounds; no error or `Debug` output holds a key, a password or text of the other side; keys
//! are wiped when dropped; proofs and signatures are compared in constant time.

use std::{fmt, str};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, Mac as _, digest::KeyInit};
use md5::Md5;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use zeroize::{Zeroize as _, Zeroizing};

/// The mechanism without channel binding.
pub const SCRAM_SHA_256: &str = "SCRAM-SHA-256";
/// The mechanism with channel binding (`tls-server-end-point`), only ever offered over TLS.
pub const SCRAM_SHA_256_PLUS: &str = "SCRAM-SHA-256-PLUS";
/// Most PBKDF2 rounds a server can make us run: beyond it a hostile server could burn our CPU.
pub const MAX_ITERATIONS: u32 = 100_000;
/// Longest SASL message that is looked at.
pub const MAX_MESSAGE: usize = 4096;
/// Longest nonce (the whole one, both halves) and longest salt.
pub const MAX_NONCE: usize = 1024;
const MAX_SALT: usize = 1024;
const KEY_LEN: usize = 32;
const BLOCK_LEN: usize = 64;
const BINDING_TYPE: &str = "tls-server-end-point";

type Key = [u8; KEY_LEN];

/// Why an exchange ended. No variant holds anything secret or anything the other side wrote.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScramError {
    /// Not a message of the protocol; the text says what is wrong with it.
    #[error("malformed SCRAM message: {0}")]
    Malformed(&'static str),
    /// The mechanism is not SCRAM-SHA-256 or -PLUS, or is not offered on this connection.
    #[error("unsupported SASL mechanism")]
    UnsupportedMechanism,
    /// The client asks for something we do not do (authorization identity, another binding type, an extension).
    #[error("unsupported SCRAM feature: {0}")]
    UnsupportedFeature(&'static str),
    /// The client says that we do not offer channel binding, but we did: somebody changed our offer.
    #[error("SCRAM channel binding negotiation error: the client thinks the server does not support it")]
    Downgrade,
    /// The channel binding of the client's last message is not that of this connection.
    #[error("SCRAM channel binding check failed")]
    ChannelBindingMismatch,
    /// The nonce is not the one of this exchange.
    #[error("SCRAM nonce does not match")]
    NonceMismatch,
    /// The client's proof is wrong: wrong password, or a user that does not exist.
    #[error("SCRAM proof is wrong")]
    WrongProof,
    /// The server asks for more rounds than [`MAX_ITERATIONS`].
    #[error("server asks for too many SCRAM iterations (more than {MAX_ITERATIONS})")]
    TooManyIterations,
    /// The server's signature is wrong: it does not know the password's verifier.
    #[error("SCRAM server signature is wrong")]
    BadServerSignature,
    /// The server ended the exchange with an error attribute.
    #[error("server ended the SCRAM exchange with an error")]
    ServerRefused,
    /// A step was called when it was not its turn (a bug of the caller, or a message too many of the peer).
    #[error("SCRAM message out of order")]
    OutOfOrder,
    /// A stored verifier is not of the form `SCRAM-SHA-256$iterations:salt$stored:server`.
    #[error("not a SCRAM-SHA-256 verifier")]
    BadVerifier,
}

use ScramError::Malformed;

/// `ClientKey`: proves knowledge of the password to any server that holds the same verifier.
#[derive(Clone)]
pub struct ClientKey(pub Zeroizing<[u8; 32]>);

impl fmt::Debug for ClientKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientKey(..)")
    }
}

/// What a server stores of a password: `pg_authid.rolpassword`.
#[derive(Clone)]
pub struct Verifier {
    iterations: u32,
    salt: Vec<u8>,
    stored_key: Key,
    server_key: Key,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").field("iterations", &self.iterations).finish_non_exhaustive()
    }
}

impl Drop for Verifier {
    fn drop(&mut self) {
        self.stored_key.zeroize();
        self.server_key.zeroize();
    }
}

impl Verifier {
    /// Reads PostgreSQL's form. Any positive number of iterations is taken: it is the client that runs them.
    pub fn parse(text: &str) -> Result<Self, ScramError> {
        Self::parse_parts(text).ok_or(ScramError::BadVerifier)
    }

    fn parse_parts(text: &str) -> Option<Self> {
        let (scheme, rest) = text.split_once('$')?;
        let (parameters, keys) = rest.split_once('$')?;
        let (iterations, salt) = parameters.split_once(':')?;
        let (stored, server) = keys.split_once(':')?;
        // PostgreSQL holds the count in an `int`.
        let iterations = decimal(iterations).filter(|count| (1..=i32::MAX.unsigned_abs()).contains(count))?;
        let salt = STANDARD.decode(salt).ok().filter(|salt| !salt.is_empty() && salt.len() <= MAX_SALT)?;
        let (stored_key, server_key) = (decode_key(stored)?, decode_key(server)?);
        (scheme == SCRAM_SHA_256).then_some(Self { iterations, salt, stored_key, server_key })
    }

    /// PostgreSQL's form, as `rolpassword` holds it.
    #[must_use]
    pub fn to_pg_string(&self) -> String {
        let [salt, stored, server] = [&self.salt[..], &self.stored_key, &self.server_key].map(|b| STANDARD.encode(b));
        format!("{SCRAM_SHA_256}${}:{salt}${stored}:{server}", self.iterations)
    }

    /// Runs PBKDF2 (milliseconds of CPU). `iterations` of 0 counts as 1.
    #[must_use]
    pub fn from_password(password: &[u8], salt: &[u8], iterations: u32) -> Self {
        Self::derive(password, salt, iterations).0
    }

    /// The same, and the client's key, with which whoever knows the password proves it.
    #[must_use]
    pub fn derive(password: &[u8], salt: &[u8], iterations: u32) -> (Self, ClientKey) {
        let iterations = iterations.max(1);
        let (client_key, server_key) = derive(password, salt, iterations);
        let verifier = Self { iterations, salt: salt.to_vec(), stored_key: hash(&client_key), server_key: *server_key };
        (verifier, client_key)
    }

    /// Whether this key proves the password to who holds the verifier.
    #[must_use]
    pub fn fits(&self, key: &ClientKey) -> bool {
        hash(key).ct_eq(&self.stored_key).into()
    }

    /// For a user that does not exist: always the same salt for one name, as a real user would have, and keys for
    /// which nobody knows a password. An exchange with it runs to its end and fails like a wrong password.
    #[must_use]
    pub fn mock(name: &str, secret_seed: &[u8; 32], iterations: u32) -> Self {
        // The stored key is a hash output with no known preimage, so no proof fits it.
        let part = |label: &str| hmac(secret_seed, &[label.as_bytes(), b"\0", name.as_bytes()]);
        // 16 bytes: the length of PostgreSQL's own salts, or the length would tell.
        let salt = part("salt").iter().copied().take(16).collect();
        Self { iterations: iterations.max(1), salt, stored_key: part("stored key"), server_key: part("server key") }
    }

    /// Whether a cleartext password fits. Runs PBKDF2.
    #[must_use]
    pub fn check_password(&self, password: &[u8]) -> bool {
        let made = Self::from_password(password, &self.salt, self.iterations);
        bool::from(made.stored_key.ct_eq(&self.stored_key) & made.server_key.ct_eq(&self.server_key))
    }

    /// PBKDF2 rounds.
    #[must_use]
    pub fn iterations(&self) -> u32 {
        self.iterations
    }

    /// The salt, decoded.
    #[must_use]
    pub fn salt(&self) -> &[u8] {
        &self.salt
    }

    /// For [`ClientSecret::Keys`]: checks the signature of a PostgreSQL that holds the same verifier.
    #[must_use]
    pub fn server_key(&self) -> &[u8; 32] {
        &self.server_key
    }
}

/// What we, as the server, can bind an exchange to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChannelBinding {
    /// No TLS, or a certificate with no defined hash: -PLUS was not offered. `p` is refused, `n` and `y` are taken.
    Unsupported,
    /// -PLUS was offered; the `tls-server-end-point` hash of our certificate.
    Available(Vec<u8>),
}

/// `to`, for nobody but who can prove `from`: for a password that is changed while clients go on with the old one.
///
/// Pass-through logs in to PostgreSQL with the key of a client's proof. Once PostgreSQL has the new password, the key of the
/// old one opens nothing there; but who still proves the old one (which is let in for a grace time) can be led over this
/// bridge, [`cross`], to the key of the new one. Safe to keep beside the verifiers: it is `to` XOR HMAC-SHA-256(`from`, a
/// fixed text), a one-time pad whose key is as long and as random as what it hides. The bridge alone tells nothing of `to`;
/// with `to` known, it tells that HMAC and not `from`; and a verifier holds only the hash of `from`. What it does give away
/// is meant: the old password is as good as the new one to who has the bridge, so it is forgotten with the grace time.
/// For one `from` there must be one bridge only: two would share the pad.
#[must_use]
pub fn bridge(from: &ClientKey, to: &ClientKey) -> [u8; 32] {
    xor(&to.0, &pad(from))
}

/// The key at the other end of a [`bridge`]. Whether it is the right one, tells [`Verifier::fits`].
#[must_use]
pub fn cross(from: &ClientKey, bridge: &[u8; 32]) -> ClientKey {
    ClientKey(Zeroizing::new(xor(bridge, &pad(from))))
}

fn pad(from: &ClientKey) -> Zeroizing<Key> {
    Zeroizing::new(hmac(&from.0, &[b"tenantry password bridge"]))
}

/// `StoredKey`.
fn hash(key: &ClientKey) -> Key {
    Sha256::digest(key.0.as_slice()).into()
}

/// Which of two passwords a client proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fitted {
    /// The one that counts.
    Current,
    /// The one before, where that is still taken: see [`ServerExchange::accept_former`].
    Former,
}

/// What a client's last message proved.
#[derive(Debug)]
pub struct Proof {
    /// The data of `SASLFinal`.
    pub message: Vec<u8>,
    /// For logins to a PostgreSQL with the verifier that it fits.
    pub client_key: ClientKey,
    /// The verifier that it fits.
    pub fitted: Fitted,
}

/// Our side of a client's login. A failed step ends the exchange: each later call is `OutOfOrder`.
pub struct ServerExchange {
    verifier: Verifier,
    former: Option<Verifier>,
    nonce: String,
    binding: ChannelBinding,
    state: ServerState,
}

enum ServerState {
    Start,
    /// Server-first is out.
    Challenged {
        client_first_bare: String,
        server_first: String,
        full_nonce: String,
        /// What `c=` must be, before base64.
        binding_input: Vec<u8>,
    },
    Done,
}

impl fmt::Debug for ServerExchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerExchange(..)")
    }
}

impl ServerExchange {
    /// `nonce` is our half, fresh for each exchange: see [`encode_nonce`].
    #[must_use]
    pub fn new(verifier: Verifier, nonce: String, channel_binding: ChannelBinding) -> Self {
        Self { verifier, former: None, nonce, binding: channel_binding, state: ServerState::Start }
    }

    /// Takes a proof of the password before this one, too. A challenge names one salt and one number of rounds: a former
    /// verifier that has others is ignored.
    pub fn accept_former(&mut self, former: Verifier) {
        let same = former.salt == self.verifier.salt && former.iterations == self.verifier.iterations;
        self.former = same.then_some(former);
    }

    /// Takes the mechanism and first message of `SASLInitialResponse`; gives the data of `SASLContinue`.
    pub fn first(&mut self, mechanism: &str, client_first: &[u8]) -> Result<Vec<u8>, ScramError> {
        let ServerState::Start = std::mem::replace(&mut self.state, ServerState::Done) else {
            return Err(ScramError::OutOfOrder);
        };
        let plus = match (mechanism, &self.binding) {
            (SCRAM_SHA_256, _) => false,
            (SCRAM_SHA_256_PLUS, ChannelBinding::Available(_)) => true,
            _ => return Err(ScramError::UnsupportedMechanism),
        };
        let message = text(client_first)?;
        let (flag, rest) = message.split_once(',').ok_or(Malformed("no GS2 header"))?;
        let binding_input = self.binding_input(flag, plus)?;
        let bare = match rest.split_once(',') {
            Some(("", bare)) => bare,
            Some((identity, _)) if identity.starts_with("a=") => {
                return Err(ScramError::UnsupportedFeature("authorization identity"));
            }
            _ => return Err(Malformed("bad GS2 header")),
        };
        let full_nonce = format!("{}{}", client_nonce(bare)?, self.nonce);
        let salt = STANDARD.encode(&self.verifier.salt);
        let server_first = format!("r={full_nonce},s={salt},i={}", self.verifier.iterations);
        let answer = server_first.clone().into_bytes();
        let client_first_bare = bare.to_owned();
        self.state = ServerState::Challenged { client_first_bare, server_first, full_nonce, binding_input };
        Ok(answer)
    }

    /// Checks the GS2 flag against what was offered and chosen, as PostgreSQL does, and gives what `c=` must hold.
    fn binding_input(&self, flag: &str, plus: bool) -> Result<Vec<u8>, ScramError> {
        match (flag, plus, &self.binding) {
            ("n", false, _) => Ok(b"n,,".to_vec()),
            ("y", false, ChannelBinding::Unsupported) => Ok(b"y,,".to_vec()),
            ("y", false, ChannelBinding::Available(_)) => Err(ScramError::Downgrade),
            ("n" | "y", true, _) => Err(Malformed("-PLUS was chosen, but there is no channel binding data")),
            (flag, plus, binding) => {
                let kind = flag.strip_prefix("p=").ok_or(Malformed("unknown channel binding flag"))?;
                let (true, ChannelBinding::Available(hash)) = (plus, binding) else {
                    return Err(Malformed("-PLUS was not chosen, but there is channel binding data"));
                };
                if kind != BINDING_TYPE {
                    return Err(ScramError::UnsupportedFeature("channel binding type"));
                }
                Ok([b"p=", BINDING_TYPE.as_bytes(), b",,", hash].concat())
            }
        }
    }

    /// Takes the client's last message; gives the data of `SASLFinal`, and the client's key for logins to a
    /// PostgreSQL with the same verifier.
    pub fn finish(&mut self, client_final: &[u8]) -> Result<Proof, ScramError> {
        let ServerState::Challenged { client_first_bare, server_first, full_nonce, binding_input } =
            std::mem::replace(&mut self.state, ServerState::Done)
        else {
            return Err(ScramError::OutOfOrder);
        };
        let message = text(client_final)?;
        // The proof is the last attribute and the only one that is not signed. Base64 has no comma.
        let (signed, last) = message.rsplit_once(',').ok_or(Malformed("no proof"))?;
        let proof = last.strip_prefix("p=").ok_or(Malformed("no proof"))?;
        let proof = Zeroizing::new(decode_key(proof).ok_or(Malformed("bad proof"))?);
        let mut attributes = Attributes(Some(signed));
        let binding = decode(attributes.expect('c')?).ok_or(Malformed("bad channel binding"))?;
        let nonce = attributes.expect('r')?;
        attributes.finish()?;
        if !bool::from(binding.ct_eq(&binding_input)) {
            return Err(ScramError::ChannelBindingMismatch);
        }
        if nonce != full_nonce {
            return Err(ScramError::NonceMismatch);
        }
        let auth: AuthMessage<'_> = [&client_first_bare, &server_first, signed];
        let verifiers = [(Fitted::Current, Some(&self.verifier)), (Fitted::Former, self.former.as_ref())];
        let proved = verifiers.into_iter().find_map(|(fitted, verifier)| {
            let verifier = verifier?;
            Some((fitted, verifier, prove(verifier, &proof, &auth)?))
        });
        let (fitted, verifier, client_key) = proved.ok_or(ScramError::WrongProof)?;
        // The client checks that we have the verifier of the password that it has.
        let signature = STANDARD.encode(sign(&verifier.server_key, &auth));
        Ok(Proof { message: format!("v={signature}").into_bytes(), client_key, fitted })
    }
}

/// The client's key, if its proof fits this verifier.
fn prove(verifier: &Verifier, proof: &Key, auth: &AuthMessage<'_>) -> Option<ClientKey> {
    let signature = Zeroizing::new(sign(&verifier.stored_key, auth));
    let client_key = ClientKey(Zeroizing::new(xor(proof, &signature)));
    verifier.fits(&client_key).then_some(client_key)
}

/// The client's half of the nonce; the name in `n=` is not used (PostgreSQL takes that of the startup packet).
fn client_nonce(bare: &str) -> Result<&str, ScramError> {
    if bare.starts_with("m=") {
        return Err(ScramError::UnsupportedFeature("mandatory extension"));
    }
    let mut attributes = Attributes(Some(bare));
    attributes.expect('n')?;
    let nonce = attributes.expect('r')?;
    attributes.finish()?;
    check_nonce(nonce)?;
    Ok(nonce)
}

/// What we, as the client, log in to PostgreSQL with.
pub enum ClientSecret {
    /// The cleartext password; costs PBKDF2 in [`ClientExchange::client_final`].
    Password(Zeroizing<Vec<u8>>),
    /// Keys of a client that logged in to us with the verifier that PostgreSQL has too: same salt, same iterations.
    Keys {
        /// From [`ServerExchange::finish`].
        client_key: ClientKey,
        /// From [`Verifier::server_key`].
        server_key: [u8; 32],
    },
}

impl fmt::Debug for ClientSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password(_) => "Password(..)",
            Self::Keys { .. } => "Keys(..)",
        })
    }
}

impl Drop for ClientSecret {
    fn drop(&mut self) {
        if let Self::Keys { server_key, .. } = self {
            server_key.zeroize();
        }
    }
}

/// What we, as the client, bind an exchange to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientBinding {
    /// No TLS, or a server certificate with no defined hash.
    Unsupported,
    /// TLS, but the server offers no -PLUS: say so (`y`), so that it can see when somebody took it from its offer.
    NotOffered,
    /// TLS and -PLUS offered: the `tls-server-end-point` hash of the server's certificate.
    EndPoint(Vec<u8>),
}

/// Our login to PostgreSQL: `first`, `read_server_first`, `client_final`, `verify_server_final`, in this order.
pub struct ClientExchange {
    secret: ClientSecret,
    nonce: String,
    binding: ClientBinding,
    state: ClientState,
}

enum ClientState {
    Start,
    Challenged(Challenge),
    /// Client-final is out; what the server must answer.
    Proved(Zeroizing<Key>),
    Done,
}

struct Challenge {
    server_first: String,
    full_nonce: String,
    salt: Vec<u8>,
    iterations: u32,
}

impl fmt::Debug for ClientExchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientExchange(..)")
    }
}

impl ClientExchange {
    /// `nonce` is fresh for each exchange: see [`encode_nonce`].
    #[must_use]
    pub fn new(secret: ClientSecret, nonce: String, binding: ClientBinding) -> Self {
        Self { secret, nonce, binding, state: ClientState::Start }
    }

    /// Mechanism and data of `SASLInitialResponse`.
    #[must_use]
    pub fn first(&self) -> (&'static str, Vec<u8>) {
        let mechanism = match self.binding {
            ClientBinding::EndPoint(_) => SCRAM_SHA_256_PLUS,
            ClientBinding::Unsupported | ClientBinding::NotOffered => SCRAM_SHA_256,
        };
        (mechanism, format!("{}{}", self.gs2_header(), self.first_bare()).into_bytes())
    }

    /// Takes the data of `SASLContinue`.
    pub fn read_server_first(&mut self, server_first: &[u8]) -> Result<(), ScramError> {
        let ClientState::Start = std::mem::replace(&mut self.state, ClientState::Done) else {
            return Err(ScramError::OutOfOrder);
        };
        let message = text(server_first)?;
        if message.starts_with("m=") {
            return Err(ScramError::UnsupportedFeature("mandatory extension"));
        }
        let mut attributes = Attributes(Some(message));
        let nonce = attributes.expect('r')?;
        let salt = decode(attributes.expect('s')?).ok_or(Malformed("bad salt"))?;
        let iterations = attributes.expect('i')?;
        attributes.finish()?;
        check_nonce(nonce)?;
        // Without a half of the server's own the exchange could be a replay.
        if nonce.strip_prefix(&self.nonce).is_none_or(str::is_empty) {
            return Err(ScramError::NonceMismatch);
        }
        if salt.is_empty() || salt.len() > MAX_SALT {
            return Err(Malformed("bad salt"));
        }
        let iterations = read_iterations(iterations)?;
        // With keys no round is run, whatever the number says.
        if iterations > MAX_ITERATIONS && matches!(self.secret, ClientSecret::Password(_)) {
            return Err(ScramError::TooManyIterations);
        }
        let (server_first, full_nonce) = (message.to_owned(), nonce.to_owned());
        self.state = ClientState::Challenged(Challenge { server_first, full_nonce, salt, iterations });
        Ok(())
    }

    /// How many PBKDF2 rounds [`Self::client_final`] will run: 0 with keys, `None` before `read_server_first`.
    #[must_use]
    pub fn iterations(&self) -> Option<u32> {
        match (&self.state, &self.secret) {
            (ClientState::Challenged(_), ClientSecret::Keys { .. }) => Some(0),
            (ClientState::Challenged(challenge), ClientSecret::Password(_)) => Some(challenge.iterations),
            _ => None,
        }
    }

    /// Data of the last `SASLResponse`. Does the CPU work: with a password it belongs on a blocking thread.
    pub fn client_final(&mut self) -> Result<Vec<u8>, ScramError> {
        let ClientState::Challenged(challenge) = std::mem::replace(&mut self.state, ClientState::Done) else {
            return Err(ScramError::OutOfOrder);
        };
        let (client_key, server_key) = match &self.secret {
            ClientSecret::Password(password) => derive(password, &challenge.salt, challenge.iterations),
            ClientSecret::Keys { client_key, server_key } => (client_key.clone(), Zeroizing::new(*server_key)),
        };
        let mut binding_input = self.gs2_header().into_bytes();
        if let ClientBinding::EndPoint(hash) = &self.binding {
            binding_input.extend_from_slice(hash);
        }
        let signed = format!("c={},r={}", STANDARD.encode(binding_input), challenge.full_nonce);
        let bare = self.first_bare();
        let auth: AuthMessage<'_> = [&bare, &challenge.server_first, &signed];
        let stored_key: Zeroizing<Key> = Zeroizing::new(hash(&client_key));
        let signature = Zeroizing::new(sign(&stored_key, &auth));
        let proof = STANDARD.encode(xor(&client_key.0, &signature));
        let message = format!("{signed},p={proof}").into_bytes();
        self.state = ClientState::Proved(Zeroizing::new(sign(&server_key, &auth)));
        Ok(message)
    }

    /// Takes the data of `SASLFinal`. Only when this is `Ok` is the server known to hold the verifier: an
    /// `AuthenticationOk` before it must be refused.
    pub fn verify_server_final(&mut self, server_final: &[u8]) -> Result<(), ScramError> {
        let ClientState::Proved(expected) = std::mem::replace(&mut self.state, ClientState::Done) else {
            return Err(ScramError::OutOfOrder);
        };
        let message = text(server_final)?;
        if message.starts_with("e=") {
            return Err(ScramError::ServerRefused);
        }
        let mut attributes = Attributes(Some(message));
        let signature = decode_key(attributes.expect('v')?).ok_or(Malformed("bad server signature"))?;
        attributes.finish()?;
        if bool::from(signature.ct_eq(&*expected)) { Ok(()) } else { Err(ScramError::BadServerSignature) }
    }

    /// No user name, as libpq: PostgreSQL takes that of the startup packet.
    fn first_bare(&self) -> String {
        format!("n=,r={}", self.nonce)
    }

    fn gs2_header(&self) -> String {
        match self.binding {
            ClientBinding::Unsupported => "n,,".to_owned(),
            ClientBinding::NotOffered => "y,,".to_owned(),
            ClientBinding::EndPoint(_) => format!("p={BINDING_TYPE},,"),
        }
    }
}

/// A nonce of 18 random bytes (PostgreSQL's length) in the characters that a nonce may have.
#[must_use]
pub fn encode_nonce(random: &[u8; 18]) -> String {
    STANDARD.encode(random)
}

/// `AuthMessage` in its three parts, which are joined by commas: client-first-bare, server-first, client-final without
/// proof.
type AuthMessage<'a> = [&'a str; 3];

fn sign(key: &Key, [bare, server_first, signed]: &AuthMessage<'_>) -> Key {
    hmac(key, &[bare.as_bytes(), b",", server_first.as_bytes(), b",", signed.as_bytes()])
}

fn hmac(key: &Key, parts: &[&[u8]]) -> Key {
    // A key shorter than the block is padded with zeros (RFC 2104); done here, as a block-long key cannot fail.
    let mut block = Zeroizing::new([0_u8; BLOCK_LEN]);
    block.iter_mut().zip(key).for_each(|(to, from)| *to = *from);
    let mut mac = <Hmac<Sha256> as KeyInit>::new((&*block).into());
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}

/// `ClientKey` and `ServerKey` of a password: the PBKDF2 work.
fn derive(password: &[u8], salt: &[u8], iterations: u32) -> (ClientKey, Zeroizing<Key>) {
    let mut salted = Zeroizing::new([0_u8; KEY_LEN]);
    pbkdf2::pbkdf2_hmac::<Sha256>(&normalize(password), salt, iterations, salted.as_mut_slice());
    let client_key = ClientKey(Zeroizing::new(hmac(&salted, &[b"Client Key"])));
    (client_key, Zeroizing::new(hmac(&salted, &[b"Server Key"])))
}

/// SASLprep; like PostgreSQL, a password that is not UTF-8, or that it prohibits or empties, is taken byte for byte.
fn normalize(password: &[u8]) -> Zeroizing<Vec<u8>> {
    let prepared = str::from_utf8(password).ok().and_then(|password| stringprep::saslprep(password).ok());
    match prepared {
        Some(prepared) if !prepared.is_empty() => Zeroizing::new(prepared.into_owned().into_bytes()),
        _ => Zeroizing::new(password.to_vec()),
    }
}

fn xor(left: &Key, right: &Key) -> Key {
    let mut out = *left;
    out.iter_mut().zip(right).for_each(|(to, with)| *to ^= *with);
    out
}

fn text(message: &[u8]) -> Result<&str, ScramError> {
    if message.len() > MAX_MESSAGE {
        return Err(Malformed("too long"));
    }
    let message = str::from_utf8(message).map_err(|_| Malformed("not UTF-8"))?;
    if message.contains('\0') { Err(Malformed("NUL byte")) } else { Ok(message) }
}

/// RFC 5802 `printable`; a comma cannot come here, as it ends the attribute.
fn check_nonce(nonce: &str) -> Result<(), ScramError> {
    let valid = (1..=MAX_NONCE).contains(&nonce.len()) && nonce.bytes().all(|byte| byte.is_ascii_graphic());
    if valid { Ok(()) } else { Err(Malformed("bad nonce")) }
}

fn read_iterations(digits: &str) -> Result<u32, ScramError> {
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Malformed("bad iteration count"));
    }
    match digits.parse() {
        Ok(0) => Err(Malformed("bad iteration count")),
        Ok(count) => Ok(count),
        Err(_) => Err(ScramError::TooManyIterations),
    }
}

fn decimal(digits: &str) -> Option<u32> {
    read_iterations(digits).ok()
}

fn decode(base64: &str) -> Option<Vec<u8>> {
    STANDARD.decode(base64).ok()
}

fn decode_key(base64: &str) -> Option<Key> {
    decode(base64).and_then(|bytes| bytes.try_into().ok())
}

/// `a=value` pairs between commas, taken in the order that the protocol fixes. `None` when all are taken.
struct Attributes<'a>(Option<&'a str>);

impl<'a> Attributes<'a> {
    fn next(&mut self) -> Result<Option<(char, &'a str)>, ScramError> {
        let Some(rest) = self.0 else { return Ok(None) };
        let (attribute, rest) = rest.split_once(',').map_or((rest, None), |(first, rest)| (first, Some(rest)));
        self.0 = rest;
        let (name, value) = attribute.split_once('=').ok_or(Malformed("attribute without a value"))?;
        let mut letters = name.chars();
        match (letters.next(), letters.next()) {
            (Some(letter), None) if letter.is_ascii_alphabetic() => Ok(Some((letter, value))),
            _ => Err(Malformed("attribute name is not one letter")),
        }
    }

    fn expect(&mut self, name: char) -> Result<&'a str, ScramError> {
        match self.next()? {
            Some((letter, value)) if letter == name => Ok(value),
            Some(_) => Err(Malformed("unexpected attribute")),
            None => Err(Malformed("missing attribute")),
        }
    }

    /// What is left are extensions, which are ignored but must be well formed.
    fn finish(&mut self) -> Result<(), ScramError> {
        while self.next()?.is_some() {}
        Ok(())
    }
}

/// The response to `AuthenticationMD5Password`: `md5` and 32 hex digits.
#[must_use]
pub fn md5_password(user: &[u8], password: &[u8], salt: [u8; 4]) -> String {
    md5_response(&md5_hex(&[password, user]), salt)
}

/// The same response from what a server stores (`md5` and 32 hex digits); `None` when `stored` is not of that form.
#[must_use]
pub fn md5_from_stored(stored: &str, salt: [u8; 4]) -> Option<String> {
    let digits = stored.strip_prefix("md5")?;
    let valid = digits.len() == 32 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    valid.then(|| md5_response(&digits.to_ascii_lowercase(), salt))
}

fn md5_response(inner: &str, salt: [u8; 4]) -> String {
    format!("md5{}", md5_hex(&[inner.as_bytes(), &salt]))
}

fn md5_hex(parts: &[&[u8]]) -> String {
    let mut hash = Md5::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Compares a response or password with what it should be, in a time that does not tell where they differ.
#[must_use]
pub fn same_secret(left: &[u8], right: &[u8]) -> bool {
    left.ct_eq(right).into()
}

#[cfg(test)]
#[path = "scram_tests.rs"]
mod tests;
