//! Who is it? The client proves a role; which tenants exist is not told before that.
//!
//! Unknown database, unknown role and wrong password look alike: the same exchange, the same error, and for SCRAM a salt
//! that stays the same for a name. The work of hashing is bounded and not done on a thread that serves queries. While a
//! secret is changed, the former one is taken where its role says so. A login may take as long as its client likes, and the
//! settings may change meanwhile: what was proved is then held against what they say when it is over.

use std::sync::Arc;

use bytes::{Buf, Bytes};
use tenantry_config::{AuthType, RoleSecret};
use tenantry_wire::{
    error::ErrorResponse,
    frame::{self, HEADER},
    message, sasl,
    scram::{self, ChannelBinding, ClientKey, ServerExchange, Verifier},
    startup::Startup,
};
use zeroize::Zeroizing;

use super::{
    attempts::Pair,
    errors,
    hello::{Greeting, Refused},
};
use crate::{
    directory::Directory,
    net::stream::Stream,
    server::credentials::Credentials,
    tenant::{RoleEntry, Seat},
};

/// Longest message of a client during login.
const MAX_LOGIN_MESSAGE: u32 = 8 * 1024;
/// A failed login is answered no sooner: guessing must cost time.
const TARPIT: std::time::Duration = std::time::Duration::from_millis(500);

/// A client that proved its role.
pub(super) struct Admitted {
    pub seat: Seat,
    /// What it proved, if that can log in to the server.
    pub learned: Option<Credentials>,
}

/// What a proof tells of the role's secret.
enum Told {
    Nothing,
    /// The client's key for the current or the former secret.
    Key(ClientKey),
    /// The current secret itself.
    Password(Zeroizing<String>),
}

/// The client could not prove it.
struct Unproved;
type Proof = Result<Told, Unproved>;

/// Runs the authentication exchange.
pub(super) async fn prove(
    directory: &Arc<Directory>,
    greeting: &mut Greeting,
    startup: &Startup,
) -> Result<Admitted, Refused> {
    let name = startup.parameter("user").filter(|u| !u.is_empty()).ok_or_else(errors::no_user)?.to_owned();
    if startup.parameter("replication").is_some_and(|r| !matches!(r, "" | "false" | "off" | "no" | "0")) {
        return Err(errors::replication().into());
    }
    let database = startup.parameter("database").filter(|d| !d.is_empty()).unwrap_or(&name).to_owned();
    let role = match directory.tenant(&database) {
        Some(tenant) => tenant.role(&name),
        None => directory.any_role(&name),
    };
    let pair = Pair::new(&database, greeting.stream.peer());
    if !directory.may_try_login(&pair) {
        return Err(turn_away(greeting, errors::too_many_failed_logins(&name)).await);
    }
    // A client that leaves half-way (libpq asks for a password first, and then comes again) guessed nothing.
    let proof = exchange(directory, greeting, &name, role.as_ref()).await?;
    let proved = proof.ok().zip(role);
    if !directory.judge_login(&pair, proved.is_some()) {
        return Err(turn_away(greeting, errors::too_many_failed_logins(&name)).await);
    }
    let Some((told, role)) = proved else {
        return Err(turn_away(greeting, errors::authentication_failed(&name)).await);
    };
    greeting.output.extend_from_slice(message::AUTHENTICATION_OK);
    enter(directory, &database, &role, told).map_err(Refused::from)
}

/// The answer to a wrong login, late. Nothing that was meant for a right one goes out with it.
async fn turn_away(greeting: &mut Greeting, error: ErrorResponse) -> Refused {
    greeting.output.clear();
    tokio::time::sleep(TARPIT).await;
    error.into()
}

async fn exchange(
    directory: &Arc<Directory>,
    greeting: &mut Greeting,
    name: &str,
    role: Option<&Arc<RoleEntry>>,
) -> Result<Proof, Refused> {
    let auth_type = directory.settings().auth.auth_type;
    match auth_type {
        AuthType::Trust => Ok(Ok(Told::Nothing)),
        AuthType::ScramSha256 => scram_login(directory, greeting, name, role.map(Arc::as_ref)).await,
        AuthType::Md5 => md5_login(greeting, name, role.map(Arc::as_ref)).await,
        AuthType::Password => password_login(directory, greeting, role.cloned()).await,
    }
}

/// With the tenant and the role as they are now.
fn enter(directory: &Directory, database: &str, proved: &RoleEntry, told: Told) -> Result<Admitted, ErrorResponse> {
    let (role, seat) = directory.enter(database, proved)?;
    let learned = match told {
        Told::Nothing => None,
        Told::Key(key) => role.credentials_from(&key),
        Told::Password(password) => role.has_secret_of(proved).then_some(Credentials::Password(password)),
    };
    Ok(Admitted { seat, learned })
}

async fn scram_login(
    directory: &Arc<Directory>,
    greeting: &mut Greeting,
    name: &str,
    role: Option<&RoleEntry>,
) -> Result<Proof, Refused> {
    let verifier = verifier(directory, name, role).await?;
    let binding = match &greeting.end_point {
        Some(hash) => ChannelBinding::Available(hash.to_vec()),
        None => ChannelBinding::Unsupported,
    };
    let plus = matches!(binding, ChannelBinding::Available(_));
    let mechanisms: &[&str] =
        if plus { &[sasl::SCRAM_SHA_256_PLUS, sasl::SCRAM_SHA_256] } else { &[sasl::SCRAM_SHA_256] };
    sasl::write_mechanisms(&mut greeting.output, mechanisms);
    greeting.send().await?;
    let mut exchange = ServerExchange::new(verifier, scram::encode_nonce(&rand::random()), binding);
    if let Some(former) = role.and_then(RoleEntry::former_verifier) {
        exchange.accept_former(former.clone());
    }

    let initial = login_message(greeting).await?;
    let (mechanism, data) = sasl::read_initial_response(&initial).ok_or_else(errors::bad_login_message)?;
    let Ok(challenge) = exchange.first(mechanism, data) else { return Ok(Err(Unproved)) };
    sasl::write_continue(&mut greeting.output, &challenge);
    greeting.send().await?;

    let response = login_message(greeting).await?;
    let Ok(proof) = exchange.finish(&response) else { return Ok(Err(Unproved)) };
    sasl::write_final(&mut greeting.output, &proof.message);
    Ok(Ok(Told::Key(proof.client_key)))
}

/// The role's verifier, or one that nobody can satisfy.
async fn verifier(directory: &Arc<Directory>, name: &str, role: Option<&RoleEntry>) -> Result<Verifier, Refused> {
    let iterations = directory.settings().auth.scram_iterations.get();
    if let Some(role) = role {
        if let Some(known) = role.verifier() {
            return Ok(known);
        }
        if let RoleSecret::Plain(secret) = &role.settings.secret {
            let secret = Zeroizing::new(secret.expose().as_bytes().to_vec());
            let salt: [u8; 16] = rand::random();
            let made = directory.hash(move || Verifier::from_password(&secret, &salt, iterations)).await?;
            return Ok(role.keep_verifier(made));
        }
    }
    Ok(Verifier::mock(name, directory.mock_seed(), iterations))
}

async fn md5_login(greeting: &mut Greeting, name: &str, role: Option<&RoleEntry>) -> Result<Proof, Refused> {
    let salt: [u8; 4] = rand::random();
    message::write_authentication_md5(&mut greeting.output, salt);
    greeting.send().await?;
    let response = password(greeting).await?;
    let expected = match role.map(|r| &r.settings.secret) {
        Some(RoleSecret::Plain(p)) => Some(scram::md5_password(name.as_bytes(), p.expose().as_bytes(), salt)),
        Some(RoleSecret::Md5(stored)) => scram::md5_from_stored(stored.expose(), salt),
        _ => None,
    };
    let proved = expected.is_some_and(|e| scram::same_secret(e.as_bytes(), &response));
    Ok(if proved { Ok(Told::Nothing) } else { Err(Unproved) })
}

async fn password_login(
    directory: &Arc<Directory>,
    greeting: &mut Greeting,
    role: Option<Arc<RoleEntry>>,
) -> Result<Proof, Refused> {
    if matches!(greeting.stream, Stream::Tcp(_)) {
        return Err(errors::tls_required().into());
    }
    greeting.output.extend_from_slice(message::AUTHENTICATION_CLEARTEXT);
    greeting.send().await?;
    let given = password(greeting).await?;
    let Some(role) = role else { return Ok(Err(Unproved)) };
    directory.hash(move || check(&role, &given)).await.map_err(Refused::from)
}

/// Runs PBKDF2.
fn check(role: &RoleEntry, given: &[u8]) -> Proof {
    if matches(role, given) {
        let plain = String::from_utf8(given.to_vec()).map_err(|_| Unproved)?;
        return Ok(Told::Password(Zeroizing::new(plain)));
    }
    let former = role.former_verifier().ok_or(Unproved)?;
    let (_, key) = Verifier::derive(given, former.salt(), former.iterations());
    if former.fits(&key) { Ok(Told::Key(key)) } else { Err(Unproved) }
}

fn matches(role: &RoleEntry, given: &[u8]) -> bool {
    match &role.settings.secret {
        RoleSecret::Plain(p) => scram::same_secret(p.expose().as_bytes(), given),
        RoleSecret::Scram(v) => Verifier::parse(v.expose()).is_ok_and(|v| v.check_password(given)),
        RoleSecret::Md5(stored) => {
            let salt = [0; 4];
            let made = scram::md5_password(role.settings.name.as_bytes(), given, salt);
            scram::md5_from_stored(stored.expose(), salt)
                .is_some_and(|e| scram::same_secret(e.as_bytes(), made.as_bytes()))
        }
        RoleSecret::None => false,
    }
}

/// The text of a PasswordMessage.
async fn password(greeting: &mut Greeting) -> Result<Bytes, Refused> {
    let body = login_message(greeting).await?;
    match body.split_last() {
        Some((0, text)) if !text.contains(&0) => Ok(Bytes::copy_from_slice(text)),
        _ => Err(errors::bad_login_message().into()),
    }
}

async fn login_message(greeting: &mut Greeting) -> Result<Bytes, Refused> {
    loop {
        let header =
            frame::login_header(&greeting.input, MAX_LOGIN_MESSAGE).map_err(|_| errors::bad_login_message())?;
        if let Some(header) = header
            && greeting.input.len() >= header.total()
        {
            greeting.input.advance(HEADER);
            return Ok(greeting.input.split_to(header.body).freeze());
        }
        greeting.receive().await?;
    }
}

#[cfg(test)]
mod tests {
    use tenantry_config::{FormerSecret, Role, Secret};

    use super::*;

    #[test]
    fn a_password_in_the_clear_may_be_the_former_one_and_is_then_good_for_its_key_only() {
        let verifier = |password: &[u8]| Verifier::derive(password, b"0123456789abcdef", 16);
        let text = |password| Secret::new(verifier(password).0.to_pg_string());
        let role = |accepts| {
            let former = Some(FormerSecret { verifier: text(b"old"), bridge: None, accepts });
            let secret = RoleSecret::Scram(text(b"new"));
            RoleEntry::new(Role { name: "app".to_owned(), secret, pool_mode: None, pool_size: None, former }, None)
        };
        assert!(matches!(check(&role(true), b"new"), Ok(Told::Password(given)) if given.as_str() == "new"));
        assert!(matches!(check(&role(true), b"old"), Ok(Told::Key(key)) if key.0 == verifier(b"old").1.0));
        assert!(check(&role(true), b"guess").is_err() && check(&role(false), b"old").is_err());
        assert!(check(&role(false), b"new").is_ok());
    }
}
