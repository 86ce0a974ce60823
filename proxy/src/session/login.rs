//! Who is it? The client proves a role; which tenants exist is not told before that.
//!
//! Unknown database, unknown role and wrong password look alike: the same exchange, the same error, and for SCRAM a salt
//! that stays the same for a name. The work of hashing is bounded and not done on a thread that serves queries.

use std::sync::Arc;

use bytes::{Buf, Bytes};
use tenantry_config::{AuthType, RoleSecret};
use tenantry_wire::{
    frame::{self, HEADER},
    message, sasl,
    scram::{self, ChannelBinding, ServerExchange, Verifier},
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
    tenant::{RoleEntry, Tenant},
};

/// Longest message of a client during login.
const MAX_LOGIN_MESSAGE: u32 = 8 * 1024;
/// A failed login is answered no sooner: guessing must cost time.
const TARPIT: std::time::Duration = std::time::Duration::from_millis(500);

/// A client that proved its role.
pub(super) struct Admitted {
    pub tenant: Arc<Tenant>,
    pub role: Arc<RoleEntry>,
    /// What it proved, if that can log in to the server.
    pub learned: Option<Credentials>,
}

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
    let tenant = directory.tenant(&database);
    let role = match &tenant {
        Some(tenant) => tenant.role(&name),
        None => directory.any_role(&name),
    };
    let settings = directory.settings();
    let pair = Pair::new(&database, greeting.stream.peer());
    if !directory.may_try_login(&pair) {
        tokio::time::sleep(TARPIT).await;
        return Err(errors::too_many_failed_logins(&name).into());
    }
    // A client that leaves half-way (libpq asks for a password first, and then comes again) guessed nothing.
    let unheard = |refused: Refused| {
        directory.login_proved(&pair);
        refused
    };
    let proof = match settings.auth.auth_type {
        AuthType::Trust => Ok(None),
        AuthType::ScramSha256 => scram_login(directory, greeting, &name, role.as_deref()).await.map_err(unheard)?,
        AuthType::Md5 => md5_login(greeting, &name, role.as_deref()).await.map_err(unheard)?,
        AuthType::Password => password_login(directory, greeting, role.clone()).await.map_err(unheard)?,
    };
    let failed = errors::authentication_failed(&name);
    let (Ok(learned), Some(role)) = (proof, role) else {
        tokio::time::sleep(TARPIT).await;
        return Err(failed.into());
    };
    directory.login_proved(&pair);
    greeting.output.extend_from_slice(message::AUTHENTICATION_OK);
    let tenant = match tenant {
        Some(tenant) => tenant,
        None => directory.any_tenant(&database).ok_or_else(|| errors::no_database(&database))?,
    };
    tenant.admits(&database)?;
    Ok(Admitted { tenant, role, learned })
}

/// The client could not prove it.
struct Unproved;
type Proof = Result<Option<Credentials>, Unproved>;

async fn scram_login(
    directory: &Arc<Directory>,
    greeting: &mut Greeting,
    name: &str,
    role: Option<&RoleEntry>,
) -> Result<Proof, Refused> {
    let verifier = verifier(directory, name, role).await?;
    let server_key = Zeroizing::new(*verifier.server_key());
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

    let initial = login_message(greeting).await?;
    let (mechanism, data) = sasl::read_initial_response(&initial).ok_or_else(errors::bad_login_message)?;
    let Ok(challenge) = exchange.first(mechanism, data) else { return Ok(Err(Unproved)) };
    sasl::write_continue(&mut greeting.output, &challenge);
    greeting.send().await?;

    let response = login_message(greeting).await?;
    let Ok((outcome, client_key)) = exchange.finish(&response) else { return Ok(Err(Unproved)) };
    sasl::write_final(&mut greeting.output, &outcome);
    // With a verifier alone these keys are the only way into the server.
    let only_verifier = role.is_some_and(|r| matches!(r.settings.secret, RoleSecret::Scram(_)));
    Ok(Ok(only_verifier.then_some(Credentials::ScramKeys { client_key, server_key })))
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
    Ok(if proved { Ok(None) } else { Err(Unproved) })
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
    let plain = String::from_utf8(given.to_vec()).map(Zeroizing::new);
    let proved = directory.hash(move || matches(&role, &given)).await?;
    Ok(match plain {
        Ok(plain) if proved => Ok(Some(Credentials::Password(plain))),
        _ => Err(Unproved),
    })
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
